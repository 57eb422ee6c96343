"""Time that jumps in place of every wait, for `opero.testing.instant`.

All who wait have their moments in one heap. Whoever waits looks every millisecond whether anybody has begun or ended a
wait since the last look; if nobody has, time jumps to the earliest moment.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from opero.core.forks import watch_forks

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

# Real seconds without a change after which everybody is taken to wait.
_PATIENCE = 0.001
# Real seconds for which those whose moment has come may take to go on. Some never will: their event loop was closed.
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
        self._moments: list[tuple[float, int]] = []
        self._waiting: dict[int, Callable[[], object]] = {}
        self._woken: set[int] = set()
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
        end = self.now() + seconds
        number = self._join(end, lambda: None)
        try:
            # Without other threads there is nobody to be patient with.
            while not wait_for(patience := 0.0 if threading.active_count() == 1 else _PATIENCE) and self.now() < end:
                self._look(patience)
        finally:
            self._leave(number)

    async def wait_async(self, event: asyncio.Event, seconds: float | None, on_time: Callable[[], None]) -> None:
        """See `opero.core.clock.Clock`."""
        import asyncio

        if seconds is None:
            await event.wait()
            return
        loop = asyncio.get_running_loop()
        number = self._join(self.now() + seconds, lambda: loop.call_soon_threadsafe(on_time))
        try:
            if loop not in self._watched:
                self._watched.add(loop)
                self._watch(loop)
            await event.wait()
        finally:
            self._leave(number)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look again and again, in between the other work of the loop, while anybody waits."""
        self._look(_PATIENCE)
        if self._waiting:
            loop.call_later(_PATIENCE, self._watch, loop)
        else:
            self._watched.discard(loop)

    def _join(self, moment: float, wake: Callable[[], object]) -> int:
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = wake
            heapq.heappush(self._moments, (moment, number))
            self._changed_at = time.monotonic()
            return number

    def _leave(self, number: int) -> None:
        with self._lock:
            self._waiting.pop(number, None)
            self._woken.discard(number)
            self._changed_at = time.monotonic()
            if not self._waiting:
                self._moments.clear()

    def _look(self, patience: float) -> None:
        """Wake those whose moment has come; if all have waited for so many real seconds, let the next one come."""
        wakes = []
        with self._lock:
            while self._moments:
                moment, number = self._moments[0]
                if number in self._waiting and moment > self.now():
                    if time.monotonic() - self._changed_at < (max(patience, _TO_GO_ON) if self._woken else patience):
                        break
                    self.skipped += max(0.0, moment - self.now())
                    self._woken.clear()
                heapq.heappop(self._moments)
                if number in self._waiting:
                    wakes.append(self._waiting.pop(number))
                    self._woken.add(number)
                    self._changed_at = time.monotonic()
        for wake in wakes:
            with contextlib.suppress(RuntimeError):  # its event loop was closed, with it in it
                wake()
