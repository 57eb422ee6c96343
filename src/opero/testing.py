"""For the tests of programs that use opero: no waits, no policies, and a record of what happened.

The three switches act on the whole process and may be nested. As pytest fixtures they are `opero_instant`,
`opero_disabled` and `opero_recorded`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from opero.core.clock import clock
from opero.core.forks import ForkSafeLock
from opero.core.virtual_time import VirtualTime
from opero.events import on_event, switches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opero.events import Event

__all__ = ["Instant", "disabled", "instant", "recorded"]

_lock = ForkSafeLock()
_time = VirtualTime()
_users = 0


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


@contextlib.contextmanager
def instant() -> Iterator[Instant]:
    """Let no wait of opero's sleep: neither backoff nor rate limit, in threads, tasks and maps; time jumps instead.

    What is decided by time is decided as ever: delays are counted, entries of a memory cache expire, slots are granted
    at their rate, ``total_timeout`` ends calls. Waits for something else than time (an identical call under way, a
    worker, a lock) go on as they are, and the functions themselves are not touched: ``attempt_timeout`` counts real
    seconds, and so does the function's own ``time.sleep`` or ``asyncio.sleep``. Limits that processes share are kept by
    this process alone.

    There is one time for all. When for a real millisecond no call of opero's has begun or ended a wait, all are taken
    to wait, and time jumps to the earliest moment that one of them waits for: tasks of one event loop that back off
    side by side for an hour skip one hour. A program with a single thread and no event loop does not even wait for the
    millisecond.

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
    global _users  # noqa: PLW0603 - one clock for the process
    with _lock.lock:
        _users += 1
        if _users == 1:
            _time.begin()
        clock.now, clock.wall = _time.now, _time.wall
        clock.sleep, clock.async_sleep = _time.sleep, _time.async_sleep
        clock.wait, clock.wait_async = _time.wait, _time.wait_async
        clock.is_virtual = True
    block = Instant()
    try:
        yield block
    finally:
        block._skipped = block.skipped  # noqa: SLF001 - of this module
        with _lock.lock:
            _users -= 1
            if _users == 0:
                clock.reset()
                # Time does not run back: a slot that was taken a virtual hour ahead would be waited for.
                clock.now = _time.now


@contextlib.contextmanager
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


@contextlib.contextmanager
def recorded() -> Iterator[list[Event]]:
    """Gather the events of all decorated functions, in the order in which they happen.

    Yields:
        The list, which goes on growing until the end of the block.
    """
    events: list[Event] = []
    with on_event(events.append):
        yield events
