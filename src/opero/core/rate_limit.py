"""The rate limit: asynciolimiter's queue and pacing, shared by threads, tasks and event loops.

asynciolimiter 1.2.0 decides when a slot has come and who gets it. Its `Limiter` belongs to one event loop: used from a
second loop, thread or forked child it hangs or limits nothing. `RateLimiter` therefore runs it on a stand-in for a loop
that holds a time and one timer, and steps it under a lock whenever a waiter looks. Delete the stand-in when asynciolimiter
can be shared.
"""

from __future__ import annotations

import math
import re
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from opero.core.checks import check_known, check_mapping
from opero.core.clock import clock
from opero.core.forks import watch_forks
from opero.core.plan import Plan
from opero.core.resilient import OperoFunction, decorator
from opero.core.steps import await_arrival, await_arrival_async

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from asynciolimiter import Limiter

__all__ = ["RateLimiter", "get_rate_limit_decorator"]

P = ParamSpec("P")
R = TypeVar("R")

_UNITS = {"s": 1.0, "second": 1.0, "m": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0, "d": 86_400.0, "day": 86_400.0}
_RATE_TEXT = re.compile(r"\s*(?P<calls>\d+(?:\.\d+)?)\s*/\s*(?P<unit>[a-z]+)\s*", re.ASCII)
# A waiter that is not first in line looks this much later for each place, in case those before it cannot look.
_GRACE = 0.05


def parse_rate(rate: Any, option: str = "rate_limit") -> float:
    """Calls per second, from a number or from text such as ``"100/minute"``."""
    asked = rate
    if isinstance(rate, str):
        match = _RATE_TEXT.fullmatch(rate)
        if match is None or match["unit"] not in _UNITS:
            msg = f"{option}={asked!r} cannot be read; write calls per second, or text such as '100/minute' or '5/s'"
            raise ValueError(msg)
        rate = float(match["calls"]) / _UNITS[match["unit"]]
    elif isinstance(rate, bool) or not isinstance(rate, (int, float)):
        msg = f"{option}={asked!r} is {type(asked).__name__}; write calls per second, or text such as '100/minute'"
        raise TypeError(msg)
    if not (math.isfinite(rate) and rate > 0):
        msg = f"{option}={asked!r} limits nothing; write a number of calls per second above 0, or None for no limit"
        raise ValueError(msg)
    return float(rate)


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

    def create_future(self) -> _Place:
        return _Place()


class _Timer:
    __slots__ = ("callback", "cancelled", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback = callback

    def cancel(self) -> None:
        """Only `Limiter.close` cancels; the limiter here is never closed."""


class _Place:
    """A place in the limiter's queue: a future, as far as asynciolimiter can tell."""

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


class RateLimiter:
    """A limit on starts per second that every thread, task and event loop of the process shares.

    Slots are granted first come, first served, when they come due, never ahead. In any window of T seconds at most
    ``rate * T + max_burst`` calls start; bursts only make up for slots that passed while the process could not run.

    Args:
        rate: Calls per second (fractions too), or text such as ``"100/minute"``, ``"5/s"``, ``"1000/day"``.
        max_burst: How many missed slots may be made up at once. Default: 10 ms worth of calls, at least 5.

    Raises:
        TypeError: If ``rate`` is neither a number nor text, or ``max_burst`` is not an int.
        ValueError: If ``rate`` is not finite and above 0, or its text cannot be read, or ``max_burst`` is below 1.
    """

    def __init__(self, rate: float | str, *, max_burst: int | None = None) -> None:
        from asynciolimiter import Limiter

        self.rate = parse_rate(rate, "rate")
        if max_burst is None:
            max_burst = max(5, math.ceil(self.rate / 100))
        if isinstance(max_burst, bool) or not isinstance(max_burst, int):
            msg = f"max_burst={max_burst!r} is {type(max_burst).__name__}; write a whole number of calls"
            raise TypeError(msg)
        if max_burst < 1:
            msg = f"max_burst={max_burst!r} would let nothing through; write 1 or more"
            raise ValueError(msg)
        self._make_limiter: Callable[[], Limiter] = lambda: Limiter(self.rate, max_burst=max_burst)
        self._interval = 1 / self.rate
        self._line: deque[_Place] = deque()
        self._start_afresh()
        watch_forks(self)

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._limiter = self._make_limiter()
        self._loop = _LoopStandIn()
        self._line.clear()
        self._free_at = -math.inf
        self._returned = 0

    def after_fork(self) -> None:
        """Forget the parent's waiters, which do not exist in this child."""
        for place in self._line:
            place.cancel()
        self._start_afresh()

    def take_now(self) -> bool:
        """Take a slot if one is free and nobody waits; tell whether it was."""
        with self._lock:
            return self._take_now(clock.now())

    def acquire(self) -> None:
        """Block until a slot has come, and take it."""
        await_arrival(self.ticket())

    async def acquire_async(self) -> None:
        """Wait for a slot without blocking the event loop, and take it."""
        await await_arrival_async(self.ticket())

    def ticket(self) -> Ticket:
        """Ask for a slot without waiting for it here."""
        return Ticket(self)

    def expected_wait(self) -> float:
        """Seconds until a caller that joined the line now would have its slot."""
        with self._lock:
            next_slot = self._loop.timer.when if self._loop.timer is not None else self._free_at
            return max(0.0, next_slot - clock.now()) + len(self._line) * self._interval

    def _take_now(self, now: float) -> bool:
        self._advance(now)
        if self._line:
            return False
        if self._returned:
            self._returned -= 1
            return True
        if now < self._free_at:
            return False
        self._free_at = now + self._interval
        return True

    def _advance(self, now: float) -> None:
        """Run asynciolimiter's timer as far as the time has come."""
        loop = self._loop
        while loop.timer is not None and loop.timer.when <= now:
            callback, loop.timer, loop.now = loop.timer.callback, None, now
            with _running(loop):
                callback()
            self._tidy_line()
            if loop.timer is None:
                self._free_at = now
            elif not self._line:
                self._free_at = loop.timer.when

    def _tidy_line(self) -> None:
        while self._line and self._line[0].done():
            self._line.popleft()
        if self._line:
            self._line[0].rouse()

    def _join_line(self, now: float) -> _Place:
        if self._loop.timer is None:
            # The limiter was not asked while slots were free; tell it now of the last one that was taken.
            self._step(self._free_at - self._interval)
        place = self._step(now)
        self._line.append(place)
        return place

    def _step(self, now: float) -> _Place:
        """Run one ``await limiter.wait()`` up to where it would suspend."""
        self._loop.now = now
        waiting: Coroutine[_Place, None, None] = self._limiter.wait()
        with _running(self._loop):
            try:
                return waiting.send(None)
            except StopIteration:
                place = _Place()
                place.granted = True
                return place
            finally:
                waiting.close()


class _running:  # noqa: N801 - reads as a phrase in `with`
    """Make asyncio take the stand-in for the running loop of this thread."""

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


class Ticket:
    """One caller's wait for one slot; an `Arrival`."""

    __slots__ = ("_limiter", "_place", "_taken", "_wake")

    def __init__(self, limiter: RateLimiter) -> None:
        self._limiter = limiter
        self._place: _Place | None = None
        self._taken = False
        self._wake: Callable[[], None] | None = None

    def poll(self) -> bool:
        limiter = self._limiter
        with limiter._lock:
            now = clock.now()
            if self._place is None:
                if limiter._take_now(now):
                    self._taken = True
                else:
                    self._place = limiter._join_line(now)
                    self._place.wake = self._wake
            else:
                limiter._advance(now)
            if self._place is not None and self._place.granted:
                self._taken = True
            return self._taken

    def due_in(self) -> float | None:
        limiter = self._limiter
        with limiter._lock:
            if self._place is None or self._place.granted or limiter._loop.timer is None:
                return 0.0
            places_before = 0
            for place in limiter._line:
                if place is self._place:
                    break
                places_before += not place.done()
            return max(0.0, limiter._loop.timer.when - clock.now()) + places_before * _GRACE

    def notify(self, wake: Callable[[], None] | None) -> None:
        with self._limiter._lock:
            self._wake = wake
            if self._place is not None:
                self._place.wake = wake

    def withdraw(self) -> None:
        limiter = self._limiter
        with limiter._lock:
            if self._taken or self._place is None:
                return
            if self._place.granted:
                # asynciolimiter would lose a slot whose waiter is cancelled in the moment of the grant.
                self._hand_on()
            self._place.left = True
            limiter._tidy_line()

    def _hand_on(self) -> None:
        limiter = self._limiter
        for place in limiter._line:
            if not place.done():
                place.set_result(None)
                limiter._tidy_line()
                return
        limiter._returned += 1


def limit_policy(rate_limit: float | str, options: Mapping[str, Any] | None = None) -> RateLimiter:
    """Check the rate limit's options and make the limiter."""
    rate = parse_rate(rate_limit)
    given = check_mapping("rate_limit_options", options)
    check_known("rate_limit_options", given, ("max_burst",))
    return RateLimiter(rate, **given)


def get_rate_limit_decorator(rate_limit: float | str, **options: Any) -> Callable[[Callable[P, R]], OperoFunction[P, R]]:
    """Make a decorator that limits how often calls start, and does nothing else.

    Args:
        rate_limit: Calls per second (fractions too), or text such as ``"100/minute"``. Each decorated function has a
            limit of its own, shared by all its callers in the process.
        **options: For `asynciolimiter.Limiter`: ``max_burst``, how many missed slots may be made up at once.

    Raises:
        TypeError: If an option has the wrong type or is not known.
        ValueError: If the rate is not finite and above 0, or its text cannot be read.
    """
    limit_policy(rate_limit, options)
    return decorator("get_rate_limit_decorator", lambda f: Plan(f, limit=limit_policy(rate_limit, options)))
