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


class Line:
    """First come, first served; not across processes."""

    def __init__(self) -> None:
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """Forget the parent's callers."""
        self.lock = threading.Lock()
        self.turns: deque[Turn] = deque()
        self.moved_at = 0.0

    def __len__(self) -> int:
        return len(self.turns)

    def join(self) -> Turn:
        """A place at the end; `Turn.leave` has to follow."""
        turn = Turn(self)
        with self.lock:
            if not self.turns:
                self.moved_at = clock.now()
            self.turns.append(turn)
        return turn


class Turn:
    """One caller's place; an `opero.core.steps.Arrival` of the moment in which it is the first."""

    __slots__ = ("_line", "_wake")

    def __init__(self, line: Line) -> None:
        self._line = line
        self._wake: Callable[[], None] | None = None

    def poll(self) -> bool:
        return self._asks_at() <= clock.now()

    def due_in(self) -> float | None:
        return max(0.0, self._asks_at() - clock.now())

    def notify(self, wake: Callable[[], None] | None) -> None:
        self._wake = wake

    def withdraw(self) -> None:
        """It goes on to ask; `leave` comes after that."""

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
                line.moved_at = clock.now()
        if first is not None and first._wake is not None:  # noqa: SLF001 - of the same class
            first._wake()  # noqa: SLF001 - as above

    def _asks_at(self) -> float:
        line = self._line
        with line.lock:
            if not line.turns or line.turns[0] is self or self not in line.turns:
                return 0.0
            return line.moved_at + line.turns.index(self) * _GRACE
