"""A limit of this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.core.clock import clock
from opero.core.limits.pacer import Pacer
from opero.core.steps import Await

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from opero.core.limits.pacer import Place
    from opero.core.limits.rates import Rates


class LocalLimit:
    """A `opero.core.limits.contract.Limit` that all threads, tasks and event loops of a process share."""

    def __init__(self, rates: Rates) -> None:
        self._pacer = Pacer(rates)
        self.take_now = self._pacer.take_now
        self.expected_wait = self._pacer.expected_wait
        self.change = self._pacer.change
        self.is_idle = self._pacer.is_idle

    def ticket(self) -> Ticket:
        """Ask for a slot without waiting for it here."""
        return Ticket(self._pacer)

    def take(self, deadline: float | None) -> Generator[Any, Any, bool]:
        if self.take_now():
            return True
        if deadline is not None and clock.now() + self.expected_wait() >= deadline:
            return False
        yield Await(self.ticket())
        return True

    def try_to_take(self) -> Generator[Any, Any, bool]:
        yield from ()
        return self.take_now()

    def pause(self, seconds: float) -> Generator[Any, Any, None]:
        yield from ()
        self._pacer.pause(seconds)


class Ticket:
    """One caller's wait for one slot; an `opero.core.steps.Arrival`."""

    __slots__ = ("_pacer", "_place", "_taken", "_wake")

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer
        self._place: Place | None = None
        self._taken = False
        self._wake: Callable[[], None] | None = None

    def poll(self) -> bool:
        if not self._taken:
            if self._place is None:
                self._place = self._pacer.join(self._wake)
                self._taken = self._place is None
            else:
                self._taken = self._pacer.look(self._place)
        return self._taken

    def due_in(self) -> float | None:
        return 0.0 if self._taken or self._place is None else self._pacer.due_in(self._place)

    def notify(self, wake: Callable[[], None] | None) -> None:
        self._wake = wake
        if self._place is not None:
            self._pacer.set_wake(self._place, wake)

    def withdraw(self) -> None:
        if self._place is not None and not self._taken:
            self._pacer.leave(self._place)
            self._place = None
