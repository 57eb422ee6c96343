"""A limit that processes share: a gate outside of them keeps it, and the first of each process's line asks it."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from opero.core.clock import clock
from opero.core.faults import Complaints
from opero.core.limits.line import Line
from opero.core.limits.local import LocalLimit
from opero.core.steps import Await, Consult

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from opero.core.limits.rates import Rates


class Request:
    """Asked of a gate: a slot now, or to let nothing start for ``pause`` seconds."""

    __slots__ = ("pause",)

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause


class Gate(Protocol):
    """Keeps the rates of one name. ``is_instant``: asking blocks for no longer than microseconds."""

    is_instant: ClassVar[bool]

    def perform(self, requests: Sequence[Request]) -> list[Any]:
        """For each: 0 if it was granted, seconds until asking again is worth it, or the exception that prevents it."""
        ...

    def change(self, rates: Rates) -> None:
        """Ask at other rates from now on."""
        ...


class SharedLimit:
    """A `opero.core.limits.contract.Limit` behind a gate; without the gate, the limit of this process alone."""

    def __init__(self, rates: Rates, open_gate: Callable[[Rates], Gate], what: str) -> None:
        self._rates = rates
        self._open_gate = open_gate
        self._line = Line()
        self._alone = LocalLimit(rates)
        self._complaints = Complaints(what, "going on with a limit of this process alone")
        self._opens_at = -math.inf
        self._changes = 0

    @cached_property
    def _gate(self) -> Gate:
        return self._open_gate(self._rates)

    @property
    def take_now(self) -> Callable[[], bool] | None:
        return None

    def take(self, deadline: float | None) -> Generator[Any, Any, bool]:
        if clock.is_virtual:
            # The others go by a time that does not jump.
            return (yield from self._alone.take(deadline))
        if deadline is not None and clock.now() + self.expected_wait() >= deadline:
            return False
        turn = self._line.join(deadline)
        try:
            turn.enter()
            while deadline is None or max(clock.now(), self._opens_at) < deadline:
                yield Await(turn, is_turn=True)
                if clock.is_virtual:
                    return (yield from self._alone.take(deadline))
                wait = yield from self._ask(Request())
                if isinstance(wait, Exception):
                    return (yield from self._alone.take(deadline))
                if not wait:
                    return True
                turn.asks_again_at(self._opens_at)
            return False
        finally:
            turn.leave()

    def try_to_take(self) -> Generator[Any, Any, bool]:
        if clock.is_virtual:
            return (yield from self._alone.try_to_take())
        if self._line or clock.now() < self._opens_at:
            return False
        wait = yield from self._ask(Request())
        if isinstance(wait, Exception):
            return (yield from self._alone.try_to_take())
        return not wait

    def expected_wait(self) -> float:
        until_it_opens = self._opens_at - clock.now()
        return max(0.0, until_it_opens) + len(self._line) * self._rates.interval

    def pause(self, seconds: float) -> Generator[Any, Any, None]:
        self._opens_at = max(self._opens_at, clock.now() + seconds)
        yield from self._alone.pause(seconds)
        if not clock.is_virtual:
            yield from self._ask(Request(seconds))
        # Some may not want to wait for so long.
        self._line.rouse()

    def change(self, rates: Rates) -> None:
        self._rates = rates
        self._changes += 1
        self._alone.change(rates)
        self._gate.change(rates)
        self._opens_at = -math.inf
        self._line.rouse()

    def is_idle(self) -> bool:
        return not self._line and self._alone.is_idle()

    def _ask(self, request: Request) -> Generator[Any, Any, Any]:
        changes = self._changes
        (answer,) = self._gate.perform([request]) if self._gate.is_instant else [(yield Consult(self._gate, request))]
        if isinstance(answer, Exception):
            self._complaints.tell(answer)
        elif answer and changes == self._changes:
            # Else it was told by rates that hold no more.
            self._opens_at = clock.now() + answer
        return answer
