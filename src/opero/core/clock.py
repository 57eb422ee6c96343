"""The only place where opero reads the time or waits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from opero.core.forks import ForkSafeLock

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

# `time.sleep` and lock timeouts overflow far above this; nobody means to wait longer than a year.
LONGEST_WAIT = 365 * 86_400.0


async def asyncio_sleep(seconds: float) -> None:
    """`asyncio.sleep`, without the import of asyncio until it is needed."""
    import asyncio

    await asyncio.sleep(seconds)


class Clock:
    """Time, and every wait that is for time to pass, as attributes so that a test can replace them.

    Attributes:
        now: Monotonic seconds, by which policies decide.
        wall: Seconds since the epoch, for what outlives the process: the end of an entry on disk.
        machine: Monotonic seconds that all processes of a machine agree upon.
        sleep: Blocks for so many seconds.
        async_sleep: The same without blocking the event loop.
        skips: Whether waits are skipped, see `VirtualTime`; None or the one who does.
    """

    __slots__ = ("async_sleep", "machine", "now", "skips", "sleep", "wall")

    now: Callable[[], float]
    wall: Callable[[], float]
    machine: Callable[[], float]
    sleep: Callable[[float], None]
    async_sleep: Callable[[float], Awaitable[None]]
    skips: VirtualTime | None

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.now = time.monotonic
        self.wall = time.time
        self.machine = time.monotonic
        self.sleep = time.sleep
        self.async_sleep = asyncio_sleep
        self.skips = None

    def wait(
        self, wait_for: Callable[[float | None], Any], seconds: float | None, *, patience: float | None = None
    ) -> None:
        """Let ``wait_for(timeout)`` block until what it waits for is there, or ``seconds`` have passed.

        Args:
            wait_for: Gives something true if it did not run into its timeout.
            seconds: Of this clock; None for no bound.
            patience: Real seconds after which to return, too; None for no bound.
        """
        if self.skips is None or seconds is None:
            bounds = [bound for bound in (seconds, patience) if bound is not None]
            wait_for(min(bounds, default=None))
        elif not wait_for(0):
            self.skips.advance(seconds)

    def call_later(
        self, loop: asyncio.AbstractEventLoop, seconds: float, callback: Callable[[], None]
    ) -> asyncio.Handle:
        """Call back in an event loop after ``seconds`` of this clock."""
        if self.skips is None:
            return loop.call_later(seconds, callback)
        return loop.call_soon(self.skips.then, self.now() + seconds, callback)


class VirtualTime:
    """Lets time jump in place of every wait; between the jumps it passes as ever."""

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._jumped = 0.0
        self._jumped_before = 0.0

    def begin(self) -> None:
        """From here on the time of day jumps, too; what was jumped over before is over."""
        self._jumped_before = self._jumped

    @property
    def skipped(self) -> float:
        """Seconds that were jumped over."""
        return self._jumped

    def now(self) -> float:
        return time.monotonic() + self._jumped

    def wall(self) -> float:
        return time.time() + self._jumped - self._jumped_before

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass, at once."""
        self._advance_to(self.now() + seconds)

    async def advance_async(self, seconds: float) -> None:
        """The same, and let other tasks run."""
        import asyncio

        self.advance(seconds)
        await asyncio.sleep(0)

    def then(self, moment: float, callback: Callable[[], None]) -> None:
        """Let time pass up to a moment, and call back."""
        self._advance_to(moment)
        callback()

    def _advance_to(self, moment: float) -> None:
        # Who waits side by side with others waits for the same time to pass.
        with self._lock.lock:
            self._jumped += max(0.0, moment - self.now())


clock = Clock()
