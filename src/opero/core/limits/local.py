"""A limit of this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.core.clock import clock
from opero.core.limits.pacer import Pacer, Place
from opero.core.steps import Await

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from opero.core.limits.rates import Rates


class LocalLimit:
    """A `opero.core.limits.contract.Limit` that all threads, tasks and event loops of a process share."""

    def __init__(self, rates: Rates) -> None:
        self._pacer = Pacer(rates)
        self.take_now = self._pacer.take_now
        self.expected_wait = self._pacer.expected_wait
        self.change = self._pacer.change
        self.is_idle = self._pacer.is_idle

    def ticket(self, deadline: float | None = None) -> Ticket:
        """Ask for a slot without waiting for it here."""
        return Ticket(self._pacer, deadline)

    def take(self, deadline: float | None) -> Generator[Any, Any, bool]:
        if self.take_now():
            return True
        if deadline is not None and clock.now() + self.expected_wait() >= deadline:
            return False
        ticket = self.ticket(deadline)
        yield Await(ticket, is_turn=True)
        return ticket.taken

    def try_to_take(self) -> Generator[Any, Any, bool]:
        yield from ()
        return self.take_now()

    def pause(self, seconds: float) -> Generator[Any, Any, None]:
        yield from ()
        self._pacer.pause(seconds)


class Ticket:
    """One caller's wait for one slot: an `opero.core.steps.Arrival` of it, or of the news that it will be late."""

    __slots__ = ("_deadline", "_is_late", "_joined", "_pacer", "_place", "taken")

    def __init__(self, pacer: Pacer, deadline: float | None = None) -> None:
        self._pacer = pacer
        self._deadline = deadline
        self._place = Place()
        self._joined = False
        self._is_late = False
        self.taken = False

    def poll(self) -> bool:
        if self.taken or self._is_late:
            return True
        if self._joined:
            self.taken = self._pacer.look(self._place)
        else:
            # Before it is: an interrupt in between must not leave the place behind.
            self._joined = True
            self.taken = self._pacer.join(self._place)
        if not self.taken and self._deadline is not None:
            self._is_late = not self._pacer.expects_in_time(self._place, self._deadline)
        return self.taken or self._is_late

    def due_in(self) -> float | None:
        if self.taken or self._is_late or not self._joined:
            return 0.0
        due = self._pacer.due_in(self._place)
        return due if self._deadline is None else min(due, max(0.0, self._deadline - clock.now()))

    def notify(self, wake: Callable[[], None] | None) -> None:
        self._pacer.set_wake(self._place, wake)

    def withdraw(self) -> None:
        if self._joined and not self.taken:
            self._joined = False
            self._pacer.leave(self._place)
