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
    from collections.abc import Callable, Coroutine, Iterable

    from opero.core.limits.rates import Quota, Rates

# A waiter that is not first in line looks this much later for each place, in case those before it cannot look.
_GRACE = 0.05


class _LoopStandIn:
    """What asynciolimiter asks of a running event loop."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timer: _Timer | None = None
        self.next_place: Place | None = None

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> _Timer:
        self.timer = _Timer(when, callback)
        return self.timer

    def create_future(self) -> Place:
        place, self.next_place = self.next_place, None
        return Place() if place is None else place


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


class _StartLog:
    """The last starts that one quota counts."""

    __slots__ = ("_seconds", "_starts")

    def __init__(self, quota: Quota, starts: Iterable[float] = ()) -> None:
        self._seconds = quota.seconds
        self._starts: deque[float] = deque(starts, maxlen=quota.calls)

    def starts(self) -> tuple[float, ...]:
        return tuple(self._starts)

    def add(self, now: float) -> None:
        self._starts.append(now)

    def opens_at(self, ahead: int) -> float:
        """When one more may start, at the soonest, with so many that start before it."""
        starts = self._starts
        assert starts.maxlen is not None  # noqa: S101 - for the type checkers
        decides = len(starts) + ahead - starts.maxlen
        return -math.inf if decides < 0 else starts[min(decides, len(starts) - 1)] + self._seconds

    def is_idle(self, now: float) -> bool:
        return not self._starts or self._starts[-1] + self._seconds <= now


class Pacer:
    """Grants slots in order when they come due, never ahead; a free slot is taken without a line."""

    _logs: list[_StartLog]
    _paused_until: float
    _closed_until: float
    _free_at: float
    _made_up_until: float
    _all_taken_at: float
    _all_granted_at: float

    def __init__(self, rates: Rates) -> None:
        self._line: deque[Place] = deque()
        self._take_over(rates)
        self._start_afresh()
        watch_forks(self)

    def _take_over(self, rates: Rates) -> None:
        self._rates = rates
        self._interval = rates.interval
        self._tolerance = rates.tolerance

    def after_fork(self) -> None:
        """Forget the parent's waiters, which do not exist in this child."""
        self._empty_limiter()
        self._start_afresh()

    def __del__(self) -> None:
        self._empty_limiter()

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
            by_line = max(0.0, next_slot - now, self._paused_until - now) + waiting * self._interval
            by_bucket = max(self._all_granted_at, now) + waiting * self._interval - self._tolerance - now
            return max(by_line, by_bucket, self._opens_at(waiting + len(self._called)) - now)

    def pause(self, seconds: float) -> None:
        """Let nothing start for so long."""
        with self._lock:
            self._paused_until = max(self._paused_until, clock.now() + seconds)
            self._closed_until = max(self._closed_until, self._paused_until)

    def is_idle(self) -> bool:
        """Whether a new pacer would not behave any differently."""
        with self._lock:
            now = clock.now()
            self._advance(now)
            busy = self._line or self._called or self._loop.timer is not None
            quiet_since = max(self._free_at, self._all_taken_at, self._all_granted_at, self._paused_until)
            return not busy and quiet_since <= now and all(log.is_idle(now) for log in self._logs)

    def change(self, rates: Rates) -> None:
        """Go on at other rates; those who wait keep their places."""
        with self._lock:
            now = clock.now()
            self._advance(now)
            stretch = self._interval / rates.interval
            self._take_over(rates)
            starts: tuple[float, ...] = max([log.starts() for log in self._logs], key=len, default=())
            self._logs = [_StartLog(quota, starts) for quota in rates.quotas]
            self._closed_until = self._opens_at(0)
            self._free_at, self._all_taken_at, self._all_granted_at = (
                now + (moment - now) / stretch if moment > now else moment
                for moment in (self._free_at, self._all_taken_at, self._all_granted_at)
            )
            timer = self._loop.timer
            # asynciolimiter would keep to the old rate until its next wake-up.
            waiting = self._empty_limiter()
            self._make_limiter()
            if timer is None:
                return
            self._step(now + max(0.0, timer.when - now) / stretch - self._interval)
            for place in waiting:
                place.left = False
                self._step(now, place)
            self._rouse_first()

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
            self._advance(now)
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
        self._lock = threading.Lock()
        self._make_limiter()
        self._line.clear()
        self._logs = [_StartLog(quota) for quota in self._rates.quotas]
        self._paused_until = -math.inf
        # By pauses and quotas.
        self._closed_until = -math.inf
        self._called: deque[Place] = deque()
        self._free_at = -math.inf
        self._made_up_until = -math.inf
        self._all_taken_at = -math.inf
        self._all_granted_at = -math.inf

    def _empty_limiter(self) -> list[Place]:
        """Take everybody out of asynciolimiter, which complains when it is freed with waiters."""
        waiting = [place for place in self._line if not place.done()]
        for place in waiting:
            place.cancel()
        return waiting

    def _make_limiter(self) -> None:
        from asynciolimiter import Limiter

        self._limiter = Limiter(self._rates.per_second, max_burst=self._rates.burst)
        self._loop = _LoopStandIn()

    def _take_now(self, now: float) -> bool:
        self._advance(now)
        if self._line or self._loop.timer is not None or now < self._free_at or not self._starts(now):
            return False
        self._free_at = (self._free_at if now <= self._made_up_until else now) + self._interval
        return True

    def _may_start_at(self, place: Place) -> float:
        """Those that were granted a slot before ``place``, and have not started yet, keep their room."""
        ahead = self._called.index(place)
        return max(self._all_taken_at - self._tolerance + ahead * self._interval, self._opens_at(ahead))

    def _opens_at(self, ahead: int) -> float:
        """When pauses and quotas let one more start, after so many others."""
        if not self._logs:
            return self._paused_until
        return max(self._paused_until, *[log.opens_at(ahead) for log in self._logs])

    def _starts(self, now: float) -> bool:
        """Whether a call may start at this moment, by the "generic cell rate algorithm" (ITU-T I.371).

        asynciolimiter spaces the grants; those that are taken late could still start too many at once.
        """
        if now < self._all_taken_at - self._tolerance or now < self._closed_until:
            return False
        self._all_taken_at = max(self._all_taken_at, now) + self._interval
        self._all_granted_at = max(self._all_granted_at, self._all_taken_at)
        if self._logs:
            for log in self._logs:
                log.add(now)
            self._closed_until = self._opens_at(0)
        return True

    def _advance(self, now: float) -> None:
        """Run asynciolimiter's timer as far as the time has come."""
        loop = self._loop
        while loop.timer is not None and loop.timer.when <= now:
            # The limiter makes up for a late timer; more than the starts may make up for would wait out of order.
            opens_at = self._opens_at(len(self._called))
            blocked_until = max(self._all_granted_at - self._tolerance, opens_at)
            if now < blocked_until:
                loop.timer.when = blocked_until
                return
            missed = max(0.0, self._all_granted_at - now)
            # What passed while all was closed was not missed.
            most = min(self._tolerance + self._interval - missed, now - opens_at + self._interval)
            self._limiter.max_burst = max(1, int(min(most / self._interval, self._rates.burst)))
            due = loop.timer.when
            granted = self._run_timer(now)
            self._all_granted_at = max(self._all_granted_at, now) + granted * self._interval
            if loop.timer is None:
                self._free_at = now
                if granted:
                    # Who waits again and again, alone, may make up for what passed before it could look.
                    self._free_at = max(due + granted * self._interval, now - self._tolerance)
                    self._made_up_until = now + self._tolerance

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
        self._rouse_first()

    def _rouse_first(self) -> None:
        if self._line:
            self._line[0].rouse()

    def _step(self, now: float, place: Place | None = None) -> Place:
        """Run one ``await limiter.wait()`` up to where it would suspend, at ``place`` or at a new one."""
        self._loop.now = now
        self._loop.next_place = place
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
