"""For the tests of programs that use opero: no waits, no policies, and a record of what happened.

The three switches act on the whole process and may be nested. As pytest fixtures they are `opero_instant`,
`opero_disabled` and `opero_recorded`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from opero.core.clock import clock
from opero.core.forks import ForkSafeLock
from opero.core.listeners import on_event, switches
from opero.core.virtual_time import VirtualTime

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

    There is one time for all. It jumps to the next moment that somebody waits for, when nothing else is ready to go on,
    so that waits side by side pass together. That is exact for one thread, and for the tasks of one event loop. Of the
    other threads it can only be guessed, by whether they use the processor, and each wait takes a part of a millisecond
    for that; a thread that goes on computing is waited for 0.05 s, and one that waits for the real world (a server, a
    sleep) is not waited for. Only a map waits for its own workers, whatever they do. What is jumped over by other
    threads and tasks, while a call waits for something else, is not counted by its ``total_timeout``.

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
        clock.skips = _time
        clock.now, clock.wall = _time.now, _time.wall
        clock.sleep, clock.async_sleep = _time.sleep, _time.sleep_async
        clock.jumped_by_others = _time.jumped_by_others
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
                clock.now, clock.jumped_by_others = _time.now, _time.jumped_by_others


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Call the bare functions: no cache, retry, rate limit, time limit or breaker.

    A function with ``arg_fallback`` gets the first candidate. Maps go on to use their workers. The environment variable
    ``OPERO_DISABLED=1`` does the same for a whole program.
    """
    switches.disabling(begins=True)
    try:
        yield
    finally:
        switches.disabling(begins=False)


@contextlib.contextmanager
def recorded() -> Iterator[list[Event]]:
    """Gather the events of all decorated functions, in the order in which they happen.

    Yields:
        The list, which goes on growing until the end of the block.
    """
    events: list[Event] = []
    with on_event(events.append):
        yield events
