"""Single flight: the first caller of a key computes, the others wait for the same outcome."""

from __future__ import annotations

import enum
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from opero.core.forks import watch_forks
from opero.core.signature import MISSING
from opero.core.steps import Failed
from opero.utils.notes import copied

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from types import TracebackType


class Presence:
    """Whether somebody attends to the flights of a map: while its stream has handed out, nobody does."""

    is_away = False


@dataclass(eq=False, repr=False)
class Flight:
    """One computation under way, and the right to it among the processes that share the store: a lease.

    It stands in frames that may end up in the traceback of its outcome, and in the contexts of tasks that a run leaves
    behind: so it holds no outcome that was computed, and nothing large when it has landed.
    """

    key: Any
    # Of the map that it is part of.
    presence: Presence | None = None
    # For how many seconds after its end an entry is of use if the call fails.
    stale: float = 0.0
    # Others get the old entry meanwhile, or compute it, too.
    refreshes: bool = False
    # Where it was begun.
    thread: int = field(default_factory=threading.get_ident)
    # Those who wait for it, and for which others the call waits that it belongs to.
    seats: list[Seat] = field(default_factory=list)
    waits_for: list[Flight] = field(default_factory=list)
    # It has landed: nothing is to be waited for any more, see `opero.core.steps.within`.
    is_over: bool = False
    # The entry was deleted meanwhile, so that the outcome is not to be stored.
    is_void: bool = False
    # The entry's value, if a store has answered `FOUND`, or that of one that has ended, with its bytes.
    found: Any = None
    old: tuple[Any, bytes | None] | None = None
    # The entry as bytes, where results are kept so.
    written: bytes | None = None
    # The lease was claimed and not given back; or is wanted no more: a thread that is still on its way to claim it then
    # gives it back at once.
    held: bool = False
    dropped: bool = False
    # By what the store tells the lease from others of the key.
    ticket: Any = None

    def needs(self, others: Collection[Flight]) -> bool:
        """Whether it is one of the others, or waits for one, itself or by those that it waits for."""
        known = [self]
        for flight in known:  # which grows meanwhile
            known += [other for other in flight.waits_for if other not in known]
        return any(flight in others for flight in known)


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
    """One who waits for a flight; an `Arrival`."""

    is_turn = False
    # What the flight has landed with; missing if there is nothing to share, as of one that was broken off.
    outcome: Any = MISSING
    # The same as bytes, where results are kept so: all others get copies of their own.
    written: bytes | None = None
    traceback: TracebackType | None = None
    wake: Callable[[], None] | None = None

    def __init__(self, flight: Flight, time_left: Callable[[], float | None]) -> None:
        self.flight = flight
        self.due_in = time_left
        flight.seats.append(self)

    def poll(self) -> bool:
        left = self.due_in()
        return self.flight.is_over or (left is not None and left <= 0)

    def notify(self, wake: Callable[[], None] | None) -> None:
        self.wake = wake
        if wake is not None and self.flight.is_over:
            wake()


class Flights:
    """The computations of one cache that are under way.

    Without a lock: a finalizer, a signal handler or the garbage collector may come between any two steps, and call the
    same function.
    """

    def __init__(self) -> None:
        # By key, and whether they refresh the entry.
        self._under_way: dict[tuple[Any, bool], Flight] = {}
        watch_forks(self)

    def after_fork(self) -> None:
        """Forget computations whose threads exist only in the parent."""
        self._under_way.clear()

    def board(self, flight: Flight) -> Flight:
        """The flight that is under way for the key, or else ``flight``, which the caller then has to fly."""
        return self._under_way.setdefault((flight.key, flight.refreshes), flight)

    def land(self, flight: Flight, outcome: Any = MISSING) -> None:
        """Give every waiter the outcome; without one, some waiter has to take over. What comes second says nothing."""
        if not flight.is_over:
            self._leave(flight)
            for seat in flight.seats.copy():
                seat.outcome, seat.written = outcome, flight.written
                if type(outcome) is Failed:
                    # Now, since whoever gets the error itself goes on with it, and may change it.
                    error, trace = outcome.error, outcome.error.__traceback__
                    copy = copied(error, context=error.__context__).with_traceback(trace)
                    seat.outcome, seat.traceback = outcome._replace(error=copy), trace
            # Who takes a seat from now on has come too late for this one, and begins anew.
            flight.is_over = True
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
        place = flight.key, flight.refreshes
        if self._under_way.get(place) is flight:
            self._under_way.pop(place, None)
