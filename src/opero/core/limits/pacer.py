"""One limit's slots: asynciolimiter's queue and pacing, made to be shared by threads, tasks and event loops.

asynciolimiter (1.2.0) decides when a slot has come and who gets it. Its `Limiter` belongs to one event loop: used from
a second loop, thread or forked child it hangs or limits nothing. `Pacer` therefore runs it on a stand-in for a loop
that holds a time and one timer, and steps it under a lock whenever a waiter looks. Delete the stand-in when a release
of asynciolimiter can be shared.
"""

from __future__ import annotations

import itertools
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
_MOST_GRACES = 5


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

    __slots__ = ("granted", "granted_at", "is_slow", "left", "looked_at", "wake")

    def __init__(self, wake: Callable[[], None] | None = None) -> None:
        self.granted = False
        self.granted_at = -math.inf
        self.left = False
        self.looked_at = -math.inf
        # Its owner did not look when it could have.
        self.is_slow = False
        self.wake = wake

    def done(self) -> bool:
        return self.granted or self.left

    def set_result(self, _result: None) -> None:
        self.granted = True

    def cancel(self) -> None:
        self.left = True

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

    def opens_at(self, ahead: int, now: float) -> float:
        """When one more may start, at the soonest, with so many that start before it."""
        starts = self._starts
        assert starts.maxlen is not None  # noqa: S101 - for the type checkers
        decides = len(starts) + ahead - starts.maxlen
        if decides < 0:
            return -math.inf
        if decides < len(starts):
            return starts[decides] + self._seconds
        # One of those ahead decides, which has not started yet.
        return now + self._seconds * (1 + (decides - len(starts)) // starts.maxlen)

    def is_idle(self, now: float) -> bool:
        return not self._starts or self._starts[-1] + self._seconds <= now


class Pacer:
    """Grants slots in order when they come due, never ahead; a free slot is taken without a line.

    An interrupt (Ctrl-C) may end any method in the middle: `_is_stepping` tells the next one that asynciolimiter has to
    be set up anew. Whoever has to be woken is woken without the lock.
    """

    _logs: list[_StartLog]
    _paused_until: float
    _closed_until: float
    _free_at: float
    _made_up_until: float
    _all_taken_at: float
    _all_granted_at: float

    def __init__(self, rates: Rates) -> None:
        self._limiter: Any = None
        self._line: deque[Place] = deque()
        self._to_wake: deque[Place] = deque()
        self._take_over(rates)
        self._start_afresh()
        watch_forks(self)

    def after_fork(self) -> None:
        """Forget the parent's waiters, which do not exist in this child."""
        self._empty_limiter()
        self._start_afresh()

    def __del__(self) -> None:
        # It may have been interrupted before it was complete.
        if getattr(self, "_limiter", None) is not None:
            self._empty_limiter()

    def take_now(self) -> bool:
        """Take a slot if one is free and nobody waits; tell whether it was."""
        with self._lock:
            taken = self._take_now(clock.now())
        if self._to_wake:
            self._wake()
        return taken

    def expected_wait(self) -> float:
        """Seconds until a caller that joined the line now would have its slot."""
        with self._lock:
            now = clock.now()
            return max(0.0, self._expected_start(sum(not place.done() for place in self._line), now) - now)

    def expects_in_time(self, place: Place, deadline: float) -> bool:
        """Whether the slot of ``place`` should come before the clock shows ``deadline``."""
        with self._lock:
            now = clock.now()
            if place.granted:
                return max(now, self._may_start_at(place, now)) < deadline
            return max(now, self._expected_start(self._count_before(place), now)) < deadline

    def pause(self, seconds: float) -> None:
        """Let nothing start for so long."""
        with self._lock:
            self._paused_until = max(self._paused_until, clock.now() + seconds)
            self._closed_until = max(self._closed_until, self._paused_until)
            self._to_wake.extend([*self._called, *self._line])
        self._wake()

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
            self._is_stepping = True
            stretch = rates.interval / self._interval
            self._take_over(rates)
            starts: tuple[float, ...] = max([log.starts() for log in self._logs], key=len, default=())
            self._logs = [_StartLog(quota, starts) for quota in rates.quotas]
            self._closed_until = self._opens_at(0, now)
            self._free_at, self._all_taken_at, self._all_granted_at, next_slot = (
                now + (moment - now) * stretch if moment > now else moment
                for moment in (self._free_at, self._all_taken_at, self._all_granted_at, self._next_slot())
            )
            # asynciolimiter would keep to the old rate until its next wake-up.
            self._line_up_again(next_slot)
            self._to_wake.extend([*self._called, *self._line])
        self._wake()

    def join(self, place: Place) -> bool:
        """Take a slot if one is free, and tell; else ``place`` is the end of the line."""
        with self._lock:
            now = clock.now()
            joined = not self._take_now(now)
            if joined:
                if self._loop.timer is None:
                    # The limiter was not asked while slots were free; tell it now of the last one that was taken.
                    self._step(max(self._free_at, now) - self._interval)
                self._line.append(place)
                self._step(now, place)
        if self._to_wake:
            self._wake()
        return not joined

    def look(self, place: Place) -> bool:
        """Grant what has come due by now; tell whether ``place`` was reached and its caller may start."""
        with self._lock:
            now = clock.now()
            self._note_look(place, now)
            self._advance(now)
            may_start = place.granted and now >= self._may_start_at(place, now) and self._starts(now)
            if may_start:
                self._called.remove(place)
        if self._to_wake:
            self._wake()
        return may_start

    def due_in(self, place: Place) -> float:
        """Seconds until it is worth looking again."""
        with self._lock:
            now = clock.now()
            self._advance(now)
            if place.granted:
                due = self._may_start_at(place, now) - now
            elif self._loop.timer is None:
                due = 0.0
            else:
                before = 0
                for other in self._line:
                    if other is place or before == _MOST_GRACES:
                        break
                    before += not (other.done() or other.is_slow)
                due = max(0.0, self._loop.timer.when - now) + before * _GRACE
        if self._to_wake:
            self._wake()
        return max(0.0, due)

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
        self._wake()

    def _take_over(self, rates: Rates) -> None:
        self._rates = rates
        self._interval = rates.interval
        self._tolerance = rates.tolerance

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._make_limiter()
        self._line.clear()
        self._to_wake.clear()
        self._logs = [_StartLog(quota) for quota in self._rates.quotas]
        self._paused_until = -math.inf
        # By pauses and quotas.
        self._closed_until = -math.inf
        self._called: deque[Place] = deque()
        self._free_at = -math.inf
        self._made_up_until = -math.inf
        self._all_taken_at = -math.inf
        self._all_granted_at = -math.inf

    def _empty_limiter(self) -> None:
        """Take everybody out of asynciolimiter, which complains when it is freed with waiters."""
        for place in self._line:
            place.cancel()
        self._limiter.cancel()

    def _make_limiter(self) -> None:
        from asyncio import _get_running_loop, _set_running_loop

        from asynciolimiter import Limiter

        # Kept: while the interpreter ends, nothing can be imported.
        self._running_loop, self._set_running_loop = _get_running_loop, _set_running_loop
        self._limiter = Limiter(self._rates.per_second, max_burst=self._rates.burst)
        self._loop = _LoopStandIn()
        self._is_stepping = False

    def _line_up_again(self, next_slot: float) -> None:
        """Set asynciolimiter up anew, with those who wait and one slot taken."""
        waiting = [place for place in self._line if not place.done()]
        self._limiter.cancel()
        for place in waiting:
            place.left = False
        self._line = deque(waiting)
        self._make_limiter()
        self._is_stepping = True
        if waiting or next_slot > clock.now():
            self._step(next_slot - self._interval)
            for place in waiting:
                self._step(next_slot - self._interval, place)
        self._is_stepping = False

    def _repair(self, now: float) -> None:
        self._called.extend(place for place in self._line if place.granted and place not in self._called)
        self._line_up_again(max(now, self._free_at, self._all_granted_at - self._tolerance))
        self._rouse_first()

    def _next_slot(self) -> float:
        return self._loop.timer.when if self._loop.timer is not None else self._free_at

    def _take_now(self, now: float) -> bool:
        self._advance(now)
        if self._line or self._loop.timer is not None or now < self._free_at or not self._starts(now):
            return False
        self._free_at = (self._free_at if now <= self._made_up_until else now) + self._interval
        return True

    def _count_before(self, place: Place) -> int:
        before = itertools.takewhile(lambda other: other is not place, self._line)
        return sum(not other.done() for other in before)

    def _expected_start(self, before: int, now: float) -> float:
        """When one that has so many others before it in line would start."""
        by_line = max(self._next_slot(), now, self._paused_until) + before * self._interval
        by_bucket = max(self._all_granted_at, now) + before * self._interval - self._tolerance
        return max(by_line, by_bucket, self._opens_at(before + len(self._called), now))

    def _may_start_at(self, place: Place, now: float) -> float:
        """Those that were granted a slot just before ``place``, and have not started yet, keep their room."""
        if place not in self._called:
            self._called.append(place)  # the grant was interrupted
        ahead = 0
        for other in self._called:
            if other is place:
                break
            ahead += other.granted_at > now - _GRACE
        return max(self._all_taken_at - self._tolerance + ahead * self._interval, self._opens_at(ahead, now))

    def _opens_at(self, ahead: int, now: float) -> float:
        """When pauses and quotas let one more start, after so many others."""
        if not self._logs:
            return self._paused_until
        return max(self._paused_until, *[log.opens_at(ahead, now) for log in self._logs])

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
            self._closed_until = self._opens_at(0, now)
        return True

    def _advance(self, now: float) -> None:
        """Run asynciolimiter's timer as far as the time has come."""
        if self._is_stepping:
            self._repair(now)
        loop = self._loop
        while loop.timer is not None and loop.timer.when <= now:
            # The limiter makes up for a late timer; more than the starts may make up for would wait out of order.
            opens_at = self._opens_at(len(self._called), now)
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
            if granted:
                # Who waits again and again, alone, may make up for what passed before it could look.
                self._made_up_until = now + self._tolerance
            if loop.timer is None:
                self._free_at = max(due + granted * self._interval, now - self._tolerance)

    def _note_look(self, place: Place, now: float) -> None:
        """Who looks although others are before it has found that these do not look in time."""
        place.is_slow = False
        place.looked_at = now
        timer = self._loop.timer
        if timer is None or not self._line or self._line[0] is place or timer.when + _GRACE > now:
            return
        for other in self._line:
            if other is place:
                return
            other.is_slow = other.looked_at < timer.when

    def _run_timer(self, now: float) -> int:
        """Gives how many slots were granted."""
        loop = self._loop
        assert loop.timer is not None  # noqa: S101 - for the type checkers
        self._is_stepping = True
        callback, loop.timer, loop.now = loop.timer.callback, None, now
        self._run_in(loop, callback)
        called = [place for place in self._line if place.granted]
        for place in called:
            place.granted_at = now
        self._called.extend(called)
        self._to_wake.extend(called)
        granted = len(called)
        self._tidy_line()
        self._is_stepping = False
        return granted

    def _hand_on(self) -> None:
        for place in self._line:
            if not place.done():
                place.set_result(None)
                place.granted_at = clock.now()
                self._called.append(place)
                self._to_wake.append(place)
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
            self._to_wake.append(self._line[0])

    def _wake(self) -> None:
        while self._to_wake:
            try:
                wake = self._to_wake.popleft().wake
            except IndexError:  # another thread was faster
                return
            if wake is not None:
                wake()

    def _step(self, now: float, place: Place | None = None) -> None:
        """Run one ``await limiter.wait()`` up to where it would suspend, at ``place`` or not at all."""
        was_stepping, self._is_stepping = self._is_stepping, True
        self._loop.now = now
        self._loop.next_place = place
        waiting: Coroutine[Place, None, None] = self._limiter.wait()
        self._run_in(self._loop, lambda: _up_to_first_stop(waiting))
        self._is_stepping = was_stepping

    def _run_in(self, loop: _LoopStandIn, act: Callable[[], None]) -> None:
        """Act while asyncio takes the stand-in for the running loop of this thread."""
        outer = self._running_loop()
        try:
            self._set_running_loop(loop)  # type: ignore[arg-type]  # it is all of a loop that asynciolimiter uses
            act()
        finally:
            self._set_running_loop(outer)


def _up_to_first_stop(waiting: Coroutine[Place, None, None]) -> None:
    try:
        waiting.send(None)
    except StopIteration:
        return
    finally:
        waiting.close()
