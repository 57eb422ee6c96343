"""Single flight: the first caller of a key computes, the others wait for the same outcome."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from opero.core.forks import watch_forks

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from types import TracebackType

    from opero.core.stores.contract import Found


class Presence:
    """Whether somebody attends to the flights of a map: while its stream has handed out, nobody does."""

    is_away = False


class Badge:
    """Stands for a computation in frames that may end up in the traceback of its outcome; knows for which it waits."""

    __slots__ = ("waits_for",)

    def __init__(self) -> None:
        self.waits_for: list[Badge] = []

    def needs(self, others: Collection[object]) -> bool:
        """Whether it is one of the others, or waits for one, itself or by those that it waits for."""
        seen: set[Badge] = set()
        left = [self]
        while left:
            badge = left.pop()
            if badge in others:
                return True
            if badge not in seen:
                seen.add(badge)
                left += badge.waits_for.copy()
        return False


class Flight:
    """One computation under way, and the right to it against other processes that share the store: a lease.

    Attributes:
        key: Of the entry.
        place: What it is found by; while an entry is refreshed others compute it, too.
        is_void: Whether the entry was deleted meanwhile, so that the outcome is not to be stored.
        written: The outcome as bytes, where results are kept so.
        traceback: Where the outcome is an error, the way that it had come then.
        stale: For how many seconds after its end an entry is of use if the call fails.
        token: Tells the lease from others of the key.
        held: Whether the lease was claimed and not given back.
        dropped: Whether it is wanted no more; a thread that is still on its way to claim it then gives it back at once.
        old: An entry that has ended, not more than ``stale`` seconds ago.
        seen: How often the store had been cleared when it was claimed.
    """

    __slots__ = (
        "abandoned",
        "badge",
        "dropped",
        "held",
        "is_void",
        "key",
        "landed",
        "old",
        "outcome",
        "place",
        "presence",
        "seen",
        "stale",
        "thread",
        "token",
        "traceback",
        "wakers",
        "written",
    )

    def __init__(
        self, key: Any, presence: Presence | None = None, *, stale: float = 0.0, refreshes: bool = False
    ) -> None:
        self.key = key
        self.place = (_REFRESH, key) if refreshes else key
        self.presence = presence
        self.badge = Badge()
        self.thread = threading.get_ident()
        self.landed = self.abandoned = self.is_void = False
        self.outcome: Any = None
        self.written: bytes | None = None
        self.traceback: TracebackType | None = None
        self.wakers: list[Callable[[], None]] = []
        self.stale = stale
        self.token = b""
        self.held = self.dropped = False
        self.old: Found | None = None
        self.seen: int | None = None


# Stands in the place of a flight that refreshes an entry.
_REFRESH = object()


class Flights:
    """The computations of one cache that are under way.

    Without a lock: a finalizer, a signal handler or the garbage collector may come between any two steps, and call the
    same function.
    """

    def __init__(self) -> None:
        self._under_way: dict[Any, Flight] = {}
        # What was under way when this process was forked: its parent may wait for it, and not the other way round.
        self.inherited: frozenset[Any] = frozenset()
        watch_forks(self)

    def after_fork(self) -> None:
        """Forget computations whose threads exist only in the parent."""
        self.inherited |= self._under_way.keys()
        self._under_way.clear()

    def board(self, flight: Flight) -> Flight:
        """The flight that is under way for the key, or else ``flight``, which the caller then has to fly."""
        return self._under_way.setdefault(flight.place, flight)

    def land(self, flight: Flight, outcome: Any, written: bytes | None = None) -> None:
        """Give every waiter the outcome."""
        flight.outcome, flight.written = outcome, written
        error = getattr(outcome, "error", None)
        flight.traceback = error.__traceback__ if isinstance(error, Exception) else None
        self._end(flight)

    def abandon(self, flight: Flight) -> None:
        """The leader cannot finish: unless it has landed, some waiter has to take over."""
        if not flight.landed:
            flight.abandoned = True
            self._end(flight)

    def invalidate(self, key: Any = None) -> None:
        """What is being computed, for ``key`` or for all, must not be stored; later callers compute anew."""
        under_way = self._under_way.copy()
        for flight in under_way.values():
            if key is None or flight.key == key:
                flight.is_void = True
                self._leave(flight)

    def _end(self, flight: Flight) -> None:
        self._leave(flight)
        flight.landed = True
        # Whoever comes now looks at `landed` after adding itself.
        for wake in flight.wakers.copy():
            wake()

    def _leave(self, flight: Flight) -> None:
        if self._under_way.get(flight.place) is flight:
            self._under_way.pop(flight.place, None)


class Seat:
    """One waiter's view of a flight; an `Arrival`."""

    is_turn = False

    __slots__ = ("_flight", "_time_left", "_wake")

    def __init__(self, flight: Flight, time_left: Callable[[], float | None]) -> None:
        self._flight = flight
        self._time_left = time_left
        self._wake: Callable[[], None] | None = None

    def poll(self) -> bool:
        left = self._time_left()
        return self._flight.landed or (left is not None and left <= 0)

    def due_in(self) -> float | None:
        return self._time_left()

    def notify(self, wake: Callable[[], None] | None) -> None:
        if self._wake is not None and self._wake in self._flight.wakers:
            self._flight.wakers.remove(self._wake)
        self._wake = wake
        if wake is not None:
            self._flight.wakers.append(wake)
            if self._flight.landed:
                wake()
