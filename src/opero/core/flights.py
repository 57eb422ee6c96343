"""Single flight: the first caller of a key computes, the others wait for the same outcome."""

from __future__ import annotations

import enum
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from opero.core.forks import watch_forks
from opero.core.signature import MISSING
from opero.core.steps import Failed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from types import TracebackType


class Presence:
    """Whether somebody attends to the flights of a map: while its stream has handed out, nobody does."""

    is_away = False


class Flight:
    """One computation under way, and the right to it among the processes that share the store: a lease.

    It stands in frames that may end up in the traceback of its outcome, and in the contexts of tasks that a run leaves
    behind: so it holds no outcome that was computed, and nothing large when it has landed.

    Attributes:
        key: Of the entry.
        place: What it is found by; while an entry is refreshed others compute it, too.
        stale: For how many seconds after its end an entry is of use if the call fails.
        presence: Of the map that it is part of.
        thread: Where it was begun.
        seats: Those who wait for it.
        waits_for: For which others the call waits that it belongs to.
        landed: Whether nothing is to be waited for any more.
        is_void: Whether the entry was deleted meanwhile, so that the outcome is not to be stored.
        found: The entry's value, if a store has answered `FOUND`.
        old: The value and the bytes of an entry that has ended, not more than ``stale`` seconds ago.
        written: The entry as bytes, where results are kept so.
        held: Whether the lease was claimed and not given back.
        dropped: Whether it is wanted no more; a thread that is still on its way to claim it then gives it back at once.
        ticket: By what the store tells the lease from others of the key.
    """

    def __init__(
        self, key: Any, presence: Presence | None = None, *, stale: float = 0.0, refreshes: bool = False
    ) -> None:
        self.key = key
        self.place = (_REFRESH, key) if refreshes else key
        self.stale = stale
        self.presence = presence
        self.thread = threading.get_ident()
        self.seats: list[Seat] = []
        self.waits_for: list[Flight] = []
        self.landed = self.is_void = False
        self.found: Any = None
        self.old: tuple[Any, bytes | None] | None = None
        self.written: bytes | None = None
        self.held = self.dropped = False
        self.ticket: Any = None

    def needs(self, others: Collection[Flight]) -> bool:
        """Whether it is one of the others, or waits for one, itself or by those that it waits for."""
        seen: set[Flight] = set()
        left = [self]
        while left:
            flight = left.pop()
            if flight in others:
                return True
            if flight not in seen:
                seen.add(flight)
                left += flight.waits_for.copy()
        return False


# Stands in the place of a flight that refreshes an entry.
_REFRESH = object()


# What a store answers to a flight, unless it is an exception.
Answer = enum.Enum("Answer", "FOUND CLAIMED BUSY")
FOUND, CLAIMED, BUSY = Answer


class Keep(NamedTuple):
    """Asks a store to keep the outcome of a flight, unless that is void by now; answered by None or an exception.

    Attributes:
        ttl: Seconds that it lives; for ``stale`` more it may be given if the call fails.
        patience: Seconds that may be waited for others who write; None for as long as the store thinks right.
    """

    flight: Flight
    value: Any
    ttl: float | None
    stale: float = 0.0
    patience: float | None = None

    @property
    def seconds(self) -> float | None:
        """How long it is to be kept in all."""
        return None if self.ttl is None else self.ttl + self.stale


class Seat:
    """One waiter's view of a flight; an `Arrival`.

    Attributes:
        outcome: What the flight has landed with; missing if there is nothing to share, as of one that was broken off.
        written: The same as bytes, where results are kept so: all others get copies of their own.
        traceback: Where that is an error, the way that it had come then.
    """

    is_turn = False

    def __init__(self, flight: Flight, time_left: Callable[[], float | None]) -> None:
        self.outcome: Any = MISSING
        self.written: bytes | None = None
        self.traceback: TracebackType | None = None
        self.wake: Callable[[], None] | None = None
        self._flight = flight
        self._time_left = time_left
        flight.seats.append(self)

    def poll(self) -> bool:
        left = self._time_left()
        return self._flight.landed or (left is not None and left <= 0)

    def due_in(self) -> float | None:
        return self._time_left()

    def notify(self, wake: Callable[[], None] | None) -> None:
        self.wake = wake
        if wake is not None and self._flight.landed:
            wake()

    def leave(self) -> None:
        """Wait no longer."""
        self._flight.seats.remove(self)


class Flights:
    """The computations of one cache that are under way.

    Without a lock: a finalizer, a signal handler or the garbage collector may come between any two steps, and call the
    same function.
    """

    def __init__(self) -> None:
        self._under_way: dict[Any, Flight] = {}
        watch_forks(self)

    def after_fork(self) -> None:
        """Forget computations whose threads exist only in the parent."""
        self._under_way.clear()

    def board(self, flight: Flight) -> Flight:
        """The flight that is under way for the key, or else ``flight``, which the caller then has to fly."""
        return self._under_way.setdefault(flight.place, flight)

    def land(self, flight: Flight, outcome: Any = MISSING) -> None:
        """Give every waiter the outcome; without one, some waiter has to take over. What comes second says nothing."""
        if not flight.landed:
            self._leave(flight)
            traceback = outcome.error.__traceback__ if outcome.__class__ is Failed else None
            for seat in flight.seats.copy():
                seat.outcome, seat.written, seat.traceback = outcome, flight.written, traceback
            # Who takes a seat from now on has come too late for this one, and begins anew.
            flight.landed = True
            flight.found = flight.old = flight.written = None
        for seat in flight.seats.copy():
            if (wake := seat.wake) is not None:
                wake()

    def held(self) -> list[Flight]:
        """Those whose lease this process has."""
        return [flight for flight in self._under_way.copy().values() if flight.held]

    def invalidate(self, key: Any = None) -> None:
        """What is being computed, for ``key`` or for all, must not be stored; later callers compute anew."""
        for flight in self._under_way.copy().values():
            if key is None or flight.key == key:
                flight.is_void = True
                self._leave(flight)

    def _leave(self, flight: Flight) -> None:
        if self._under_way.get(flight.place) is flight:
            self._under_way.pop(flight.place, None)
