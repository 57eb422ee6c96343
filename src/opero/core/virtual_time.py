"""Time that jumps in place of every wait, for `opero.testing.instant`.

Whoever waits looks every millisecond whether anybody has begun or ended a wait since the last look; if nobody has, time
jumps to the earliest moment that somebody waits for.
"""

from __future__ import annotations

import itertools
import threading
import time
from bisect import bisect_right, insort
from contextlib import contextmanager, suppress
from operator import itemgetter
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from opero.core.forks import watch_forks

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

# Real seconds without a change after which everybody is taken to wait.
_PATIENCE = 0.001
# Real seconds for which those whose moment has come may take to go on. Some never will: their event loop has stopped.
_TO_GO_ON = 0.05


class VirtualTime:
    """Lets time jump in place of every wait; between the jumps it passes as ever.

    Attributes:
        skipped: Seconds that were jumped over.
    """

    def __init__(self) -> None:
        self.skipped = 0.0
        self._skipped_before = 0.0
        self._numbers = itertools.count()
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """Forget the waits of threads that do not exist in this child."""
        self._lock = threading.Lock()
        # Of each wait the moment at which it ends, a number, and what wakes it then; in this order.
        self._waits: list[tuple[float, int, Callable[[], object]]] = []
        self._changed_at = time.monotonic()
        self._watched: WeakSet[asyncio.AbstractEventLoop] = WeakSet()

    def begin(self) -> None:
        """From here on the time of day jumps, too; what was jumped over before is over."""
        self._skipped_before = self.skipped

    def now(self) -> float:
        return time.monotonic() + self.skipped

    def wall(self) -> float:
        return time.time() + self.skipped - self._skipped_before

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass, at once and for everybody."""
        with self._lock:
            self.skipped += max(0.0, seconds)
        self._look(float("inf"))

    def sleep(self, seconds: float) -> None:
        self.wait(threading.Event().wait, seconds)

    async def async_sleep(self, seconds: float) -> None:
        import asyncio

        event = asyncio.Event()
        await self.wait_async(event, seconds, event.set)

    def wait(self, wait_for: Callable[[float | None], Any], seconds: float | None) -> None:
        """See `opero.core.clock.Clock`."""
        if not seconds:
            wait_for(seconds)
            return
        with self._waiting(seconds, lambda: None) as moment:
            # Without other threads there is nobody to be patient with.
            while not wait_for(patience := 0.0 if threading.active_count() == 1 else _PATIENCE):
                if self._look(patience) >= moment:
                    return

    async def wait_async(self, event: asyncio.Event, seconds: float | None, on_time: Callable[[], None]) -> None:
        """See `opero.core.clock.Clock`."""
        import asyncio

        if seconds is None:
            await event.wait()
            return
        loop = asyncio.get_running_loop()
        with self._waiting(seconds, lambda: loop.call_soon_threadsafe(on_time)):
            if loop not in self._watched:
                self._watch(loop)
            await event.wait()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look again and again, in between the other work of the loop, while anybody waits."""
        self._look(_PATIENCE)
        if self._waits:
            self._watched.add(loop)
            loop.call_later(_PATIENCE, self._watch, loop)
        else:
            self._watched.discard(loop)

    @contextmanager
    def _waiting(self, seconds: float, wake: Callable[[], object]) -> Iterator[float]:
        wait = (self.now() + seconds, next(self._numbers), wake)
        with self._lock:
            insort(self._waits, wait)
            self._changed_at = time.monotonic()
        try:
            yield wait[0]
        finally:
            # In a forked child it has been forgotten.
            with self._lock, suppress(ValueError):
                self._waits.remove(wait)
                self._changed_at = time.monotonic()

    def _look(self, patience: float) -> float:
        """Jump if all have waited for so many real seconds, wake those whose moment has come, and tell the time."""
        with self._lock:
            has_come = bisect_right(self._waits, self.now(), key=itemgetter(0))
            unchanged = time.monotonic() - self._changed_at
            if has_come < len(self._waits) and unchanged >= (max(patience, _TO_GO_ON) if has_come else patience):
                self.skipped += max(0.0, self._waits[has_come][0] - self.now())
                self._changed_at = time.monotonic()
                has_come += 1
            now = self.now()
            wakes = [wake for _, _, wake in self._waits[:has_come]]
        for wake in wakes:
            with suppress(RuntimeError):  # its event loop was closed, with it in it
                wake()
        return now
