"""A line of callers of this process, of whom the first asks somebody else for a slot."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from opero.core.clock import clock
from opero.core.forks import watch_forks

if TYPE_CHECKING:
    from collections.abc import Callable

# One further back may ask, too, this much later for each place: those before it may not be able to.
_GRACE = 0.05
_MOST_GRACES = 5


class Line:
    """First come, first served; not across processes."""

    def __init__(self) -> None:
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """Forget the parent's callers."""
        self.lock = threading.Lock()
        self.turns: deque[Turn] = deque()
        # When the first can ask, or could have.
        self.asks_at = 0.0

    def __len__(self) -> int:
        return len(self.turns)

    def join(self, deadline: float | None = None) -> Turn:
        """A place at the end; `Turn.leave` has to follow."""
        return Turn(self, deadline)

    def rouse(self) -> None:
        """Let all look again, at once."""
        with self.lock:
            self.asks_at = clock.now()
            turns = list(self.turns)
        for turn in turns:
            turn.rouse()


class Turn:
    """One caller's place; an `opero.core.steps.Arrival` of each moment in which it may ask, or of its deadline."""

    __slots__ = ("_deadline", "_line", "_wake")

    def __init__(self, line: Line, deadline: float | None) -> None:
        self._line = line
        self._deadline = deadline
        self._wake: Callable[[], None] | None = None

    def enter(self) -> None:
        line = self._line
        with line.lock:
            if not line.turns:
                line.asks_at = clock.now()
            line.turns.append(self)

    def poll(self) -> bool:
        return self._comes_at() <= clock.now()

    def due_in(self) -> float | None:
        return max(0.0, self._comes_at() - clock.now())

    def notify(self, wake: Callable[[], None] | None) -> None:
        self._wake = wake

    def withdraw(self) -> None:
        """It goes on to ask; `leave` comes after that."""

    def rouse(self) -> None:
        if self._wake is not None:
            self._wake()

    def asks_again_at(self, moment: float) -> None:
        """It was told to come again; those behind it have no earlier chance."""
        line = self._line
        with line.lock:
            line.asks_at = max(line.asks_at, moment)

    def leave(self) -> None:
        """It has its slot, or wants none any more."""
        line = self._line
        with line.lock:
            was_first = bool(line.turns) and line.turns[0] is self
            # Not so in a forked child, for a caller of the parent.
            if self in line.turns:
                line.turns.remove(self)
            first = line.turns[0] if was_first and line.turns else None
            if was_first:
                line.asks_at = clock.now()
        if first is not None:
            first.rouse()

    def _comes_at(self) -> float:
        line = self._line
        with line.lock:
            place = 0
            for turn in line.turns:
                if turn is self or place == _MOST_GRACES:
                    break
                place += 1
            comes_at = line.asks_at + place * _GRACE
        return comes_at if self._deadline is None else min(comes_at, self._deadline)
