"""For the tests of programs that use opero: no waits, no policies, and a record of what happened.

The three switches act on the whole process and may be nested. As pytest fixtures they are `opero_instant`,
`opero_disabled` and `opero_recorded`.
"""

from __future__ import annotations

import threading
from bisect import bisect_right, insort
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opero.core.clock import Clock, clock
from opero.core.forks import ForkSafeLock
from opero.events import on_event, switches

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from opero.events import Event

__all__ = ["Instant", "disabled", "instant", "recorded"]

# Real seconds without a change after which everybody is taken to wait.
_PATIENCE = 0.001
# Of an event loop from one look to the next: however many wait in it, one that was woken can go on meanwhile.
_ROUNDS = 3
# Real seconds for which those whose moment has come may take to go on. Some never will: their event loop has stopped.
_TO_GO_ON = 0.05


# What nobody puts anything in the place of.
_system = Clock()


class _VirtualTime:
    """Lets time jump in place of every wait; between the jumps it passes as ever.

    Whoever waits looks every millisecond whether anybody has begun or ended a wait since the last look; if nobody has,
    time jumps to the earliest moment that somebody waits for.

    Attributes:
        skipped: Seconds that were jumped over.
        blocks: Of `instant` that have begun and not ended.
    """

    def __init__(self) -> None:
        self.skipped = 0.0
        self.blocks = 0
        self._lock = ForkSafeLock()
        # The moments at which waits end, in order; those of a parent's threads do no harm in a forked child.
        self._moments: list[float] = []
        self._changed_at = clock.real()

    def now(self) -> float:
        return _system.now() + self.skipped

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass, at once and for everybody."""
        with self._lock.lock:
            self.skipped += max(0.0, seconds)

    def sleep(self, seconds: float) -> None:
        self.wait(threading.Event().wait, seconds)

    async def async_sleep(self, seconds: float) -> None:
        import asyncio

        await self.wait_async(asyncio.Event(), seconds)

    def wait(self, wait_for: Callable[[float | None], Any], seconds: float | None) -> None:
        """See `opero.core.clock.Clock`."""
        if not seconds:
            wait_for(seconds)
            return
        with self._waiting(seconds) as moment:
            seen = 0.0
            while not wait_for(_PATIENCE) and self._look(seen) < moment:
                seen = self._changed_at

    async def wait_async(self, event: asyncio.Event, seconds: float | None) -> None:
        """See `opero.core.clock.Clock`."""
        import asyncio

        if seconds is None:
            await event.wait()
            return
        with self._waiting(seconds) as moment:
            seen = 0.0
            while not event.is_set() and self._look(seen) < moment:
                seen = self._changed_at
                for _ in range(_ROUNDS):
                    # Not for a millisecond: freezegun stops the time of event loops, too.
                    await asyncio.sleep(0)
        event.set()

    @contextmanager
    def _waiting(self, seconds: float) -> Iterator[float]:
        moment = self.now() + seconds
        with self._lock.lock:
            insort(self._moments, moment)
            self._changed_at = clock.real()
        try:
            yield moment
        finally:
            with self._lock.lock:
                self._moments.remove(moment)
                self._changed_at = clock.real()

    def _look(self, seen: float) -> float:
        """Jump if nothing has changed for long enough, nor since the last change that was ``seen``; tell the time."""
        with self._lock.lock:
            has_come = bisect_right(self._moments, self.now())
            patience = _TO_GO_ON if has_come else _PATIENCE
            is_still = self._changed_at == seen and clock.real() - seen >= patience
            if is_still and has_come < len(self._moments):
                self.skipped += max(0.0, self._moments[has_come] - self.now())
                self._changed_at = clock.real()
            return self.now()


_lock = ForkSafeLock()
_time = _VirtualTime()


class Instant:
    """The time of one `instant` block."""

    def __init__(self) -> None:
        self._skipped_before = _time.skipped
        self._skipped: float | None = None

    @property
    def skipped(self) -> float:
        """Seconds that were jumped over while the block lasted."""
        return _time.skipped - self._skipped_before if self._skipped is None else self._skipped

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass, at once."""
        _time.advance(seconds)


@contextmanager
def instant() -> Iterator[Instant]:
    """Let no wait of opero's sleep: neither backoff nor rate limit, in threads, tasks and maps; time jumps instead.

    What is decided by time is decided as ever: delays are counted, entries of a memory cache expire, slots are granted
    at their rate, ``total_timeout`` ends calls. Waits for something else than time (an identical call under way, a
    worker, a lock) go on as they are, and the functions themselves are not touched: ``attempt_timeout`` counts real
    seconds, and so does the function's own ``time.sleep`` or ``asyncio.sleep``. Limits that processes share are kept by
    this process alone.

    There is one time for all. When for a real millisecond no call of opero's has begun or ended a wait, all are taken
    to wait, and time jumps to the earliest moment that one of them waits for: tasks of one event loop that back off
    side by side for an hour skip one hour.

    Nobody knows what the rest of the program is about to do. A thread that computes, or a function that waits for a
    server or a sleep of its own, for longer than the millisecond is not waited for: time may jump meanwhile, and counts
    for its call, too, whose ``total_timeout`` may be over when it comes back. So several threads that back off side by
    side can skip anything from one backoff to the sum of them, and a test of ``total_timeout`` should make one call at
    a time. Only a map waits for its own workers, whatever they do.

    The jumps stay after the end, so that what was decided by them stays right, and waits that began inside go on to
    skip what is left of them.

    Yields:
        An `Instant`: ``.skipped`` is how many seconds of the block were jumped over, and ``.advance(seconds)`` lets
        more pass.
    """
    block = Instant()
    with _lock.lock:
        _time.blocks += 1
        if not clock.is_virtual:
            before = _time.skipped
            clock.wall = lambda: _system.wall() + _time.skipped - before
        clock.now, clock.is_virtual = _time.now, True
        clock.sleep, clock.async_sleep = _time.sleep, _time.async_sleep
        clock.wait, clock.wait_async = _time.wait, _time.wait_async
    try:
        yield block
    finally:
        block._skipped = block.skipped  # noqa: SLF001 - of this module
        with _lock.lock:
            _time.blocks -= 1
            if _time.blocks == 0:
                clock.reset()
                # Time does not run back: a slot that was taken a virtual hour ahead would be waited for.
                clock.now = _time.now


@contextmanager
def disabled() -> Iterator[None]:
    """Call the bare functions: no cache, retry, rate limit, time limit or breaker.

    A function with ``arg_fallback`` gets the first candidate. Maps go on to use their workers. The environment variable
    ``OPERO_DISABLED=1`` does the same for a whole program.
    """
    switches.change(disablers=1)
    try:
        yield
    finally:
        switches.change(disablers=-1)


@contextmanager
def recorded() -> Iterator[list[Event]]:
    """Gather the events of all decorated functions, in the order in which they happen.

    Yields:
        The list, which goes on growing until the end of the block.
    """
    events: list[Event] = []
    with on_event(events.append):
        yield events
