"""One limit's slots: asynciolimiter's queue and pacing, made to be shared by threads, tasks and event loops.

asynciolimiter (1.2.0) decides when a slot has come and who gets it. Its `Limiter` belongs to one event loop: used from
a second loop, thread or forked child it hangs or limits nothing. `Pacer` therefore runs it on a stand-in for a loop
that holds a time and one timer, and steps it under a lock whenever a waiter looks. Delete the stand-in when a release
of asynciolimiter can be shared.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from opero.core.clock import clock
from opero.core.forks import watch_forks

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

# A waiter that is not first in line looks this much later for each place, in case those before it cannot look.
_GRACE = 0.05


class _LoopStandIn:
    """What asynciolimiter asks of a running event loop."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timer: _Timer | None = None

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> _Timer:
        self.timer = _Timer(when, callback)
        return self.timer

    def create_future(self) -> Place:
        return Place()


class _Timer:
    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback = callback


class Place:
    """A place in the line for slots: a future, as far as asynciolimiter can tell."""

    __slots__ = ("granted", "left", "wake")

    def __init__(self) -> None:
        self.granted = False
        self.left = False
        self.wake: Callable[[], None] | None = None

    def done(self) -> bool:
        return self.granted or self.left

    def set_result(self, _result: None) -> None:
        self.granted = True
        self.rouse()

    def cancel(self) -> None:
        self.left = True

    def rouse(self) -> None:
        if self.wake is not None:
            self.wake()

    def __await__(self) -> Any:
        yield self


class Pacer:
    """Grants slots in order when they come due, never ahead; a free slot is taken without a line."""

    def __init__(self, rate: float, max_burst: int) -> None:
        self._rate = rate
        self._max_burst = max_burst
        self._interval = 1 / rate
        # Rounding must not make a slot that has come look as if it had not.
        self._tolerance = (max_burst - 1) * self._interval + 1e-9
        self._line: deque[Place] = deque()
        self._start_afresh()
        watch_forks(self)

    def after_fork(self) -> None:
        """Forget the parent's waiters, which do not exist in this child."""
        for place in self._line:
            place.cancel()
        self._start_afresh()

    def take_now(self) -> bool:
        """Take a slot if one is free and nobody waits; tell whether it was."""
        with self._lock:
            return self._take_now(clock.now())

    def expected_wait(self) -> float:
        """Seconds until a caller that joined the line now would have its slot."""
        with self._lock:
            next_slot = self._loop.timer.when if self._loop.timer is not None else self._free_at
            now = clock.now()
            waiting = sum(not place.done() for place in self._line)
            by_line = max(0.0, next_slot - now) + waiting * self._interval
            by_bucket = max(self._all_granted_at, now) + waiting * self._interval - self._tolerance - now
            return max(by_line, by_bucket)

    def join(self, wake: Callable[[], None] | None) -> Place | None:
        """Take a slot if one is free, and give None; else a place at the end of the line."""
        with self._lock:
            now = clock.now()
            if self._take_now(now):
                return None
            if self._loop.timer is None:
                # The limiter was not asked while slots were free; tell it now of the last one that was taken.
                self._step(max(self._free_at, now) - self._interval)
            place = self._step(now)
            place.wake = wake
            self._line.append(place)
            return place

    def look(self, place: Place) -> bool:
        """Grant what has come due by now; tell whether ``place`` was reached and its caller may start."""
        with self._lock:
            now = clock.now()
            self._advance(now)
            if not place.granted or now < self._may_start_at(place) or not self._starts(now):
                return False
            self._called.remove(place)
            return True

    def due_in(self, place: Place) -> float:
        """Seconds until it is worth looking again."""
        with self._lock:
            now = clock.now()
            if place.granted:
                return max(0.0, self._may_start_at(place) - now)
            if self._loop.timer is None:
                return 0.0
            before = 0
            for other in self._line:
                if other is place:
                    break
                before += not other.done()
            return max(0.0, self._loop.timer.when - now) + before * _GRACE

    def set_wake(self, place: Place, wake: Callable[[], None] | None) -> None:
        with self._lock:
            place.wake = wake

    def leave(self, place: Place) -> None:
        """Give up a place whose slot was not used."""
        with self._lock:
            granted = place in self._called  # not so in a forked child, for what the parent granted
            place.cancel()
            self._tidy_line()
            if granted:
                self._called.remove(place)
                # asynciolimiter would lose a slot whose waiter is cancelled in the moment of the grant.
                self._hand_on()

    def _start_afresh(self) -> None:
        from asynciolimiter import Limiter

        self._lock = threading.Lock()
        self._limiter = Limiter(self._rate, max_burst=self._max_burst)
        self._loop = _LoopStandIn()
        self._line.clear()
        self._called: deque[Place] = deque()
        self._free_at = -math.inf
        self._all_taken_at = -math.inf
        self._all_granted_at = -math.inf

    def _take_now(self, now: float) -> bool:
        self._advance(now)
        if self._line or self._loop.timer is not None or now < self._free_at or not self._starts(now):
            return False
        self._free_at = now + self._interval
        return True

    def _may_start_at(self, place: Place) -> float:
        """Those that were granted a slot before ``place``, and have not started yet, keep their room."""
        return self._all_taken_at - self._tolerance + self._called.index(place) * self._interval

    def _starts(self, now: float) -> bool:
        """Whether a call may start at this moment, by the "generic cell rate algorithm" (ITU-T I.371).

        asynciolimiter spaces the grants; those that are taken late could still start too many at once.
        """
        if now < self._all_taken_at - self._tolerance:
            return False
        self._all_taken_at = max(self._all_taken_at, now) + self._interval
        self._all_granted_at = max(self._all_granted_at, self._all_taken_at)
        return True

    def _advance(self, now: float) -> None:
        """Run asynciolimiter's timer as far as the time has come."""
        loop = self._loop
        while loop.timer is not None and loop.timer.when <= now:
            if now < self._all_granted_at - self._tolerance:
                # The limiter makes up for a late timer; more than the starts may make up for would wait out of order.
                loop.timer.when = self._all_granted_at - self._tolerance
                return
            missed = max(0.0, self._all_granted_at - now)
            self._limiter.max_burst = max(1, int((self._tolerance + self._interval - missed) / self._interval))
            granted = self._run_timer(now)
            self._all_granted_at = max(self._all_granted_at, now) + granted * self._interval
            if loop.timer is None:
                self._free_at = now

    def _run_timer(self, now: float) -> int:
        """Gives how many slots were granted."""
        loop = self._loop
        assert loop.timer is not None  # noqa: S101 - for the type checkers
        callback, loop.timer, loop.now = loop.timer.callback, None, now
        with _Running(loop):
            callback()
        called = [place for place in self._line if place.granted]
        self._called.extend(called)
        granted = len(called)
        self._tidy_line()
        return granted

    def _hand_on(self) -> None:
        for place in self._line:
            if not place.done():
                place.set_result(None)
                self._called.append(place)
                self._tidy_line()
                return
        # Nobody waits: the limiter finds that out when its timer runs, and is free again.
        if self._loop.timer is not None:
            self._run_timer(self._loop.timer.when)
        self._free_at = clock.now()

    def _tidy_line(self) -> None:
        while self._line and self._line[0].done():
            self._line.popleft()
        if self._line:
            self._line[0].rouse()

    def _step(self, now: float) -> Place:
        """Run one ``await limiter.wait()`` up to where it would suspend."""
        self._loop.now = now
        waiting: Coroutine[Place, None, None] = self._limiter.wait()
        with _Running(self._loop):
            try:
                return waiting.send(None)
            except StopIteration:
                place = Place()
                place.granted = True
                return place
            finally:
                waiting.close()


class _Running:
    """While entered, asyncio takes the stand-in for the running loop of this thread."""

    __slots__ = ("_loop", "_outer")

    def __init__(self, loop: _LoopStandIn) -> None:
        self._loop = loop

    def __enter__(self) -> None:
        from asyncio import _get_running_loop, _set_running_loop

        self._outer = _get_running_loop()
        _set_running_loop(self._loop)  # type: ignore[arg-type]  # it is all of a loop that asynciolimiter uses

    def __exit__(self, *_exc: object) -> None:
        from asyncio import _set_running_loop

        _set_running_loop(self._outer)
