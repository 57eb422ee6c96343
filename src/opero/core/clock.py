"""The only place where opero reads the time or waits."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from opero.core.virtual_time import VirtualTime

# `time.sleep` and lock timeouts overflow far above this; nobody means to wait longer than a year.
LONGEST_WAIT = 365 * 86_400.0


def _sleep(seconds: float) -> None:
    """`time.sleep`, looked up at each call: programs and their tests put others in its place."""
    time.sleep(seconds)


async def asyncio_sleep(seconds: float) -> None:
    """`asyncio.sleep`, without the import of asyncio until it is needed."""
    import asyncio

    await asyncio.sleep(seconds)


class Bell:
    """What one thread waits for, as `Clock.wait` wants it.

    A bare lock, which is held until somebody nudges: Ctrl-C inside of `threading.Event.wait` can come out as the
    RuntimeError of a lock that was not taken again.
    """

    __slots__ = ("_is_rung", "_lock")

    def __init__(self) -> None:
        self._is_rung = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def nudge(self) -> None:
        """Let who waits look."""
        with contextlib.suppress(RuntimeError):  # was nudged already
            self._lock.release()

    def ring(self) -> None:
        """What was waited for is there."""
        self._is_rung = True
        self.nudge()

    def wait(self, timeout: float | None) -> bool:
        """Whether it was rung since the last time."""
        self._lock.acquire(timeout=-1 if timeout is None else max(0.0, timeout))
        if not self._is_rung:
            return False
        self._is_rung = False
        return True


def _no_seconds() -> float:
    return 0.0


class Clock:
    """Time, and every wait that is for time to pass, as attributes so that a test can replace them.

    Attributes:
        now: Monotonic seconds, by which policies decide.
        wall: Seconds since the epoch, for what outlives the process: the end of an entry on disk.
        machine: Monotonic seconds that all processes of a machine agree upon.
        sleep: Blocks for so many seconds.
        async_sleep: The same without blocking the event loop.
        skips: Whether waits are skipped, see `VirtualTime`; None or the one who does.
        jumped_by_others: Seconds that passed without anybody's waiting for them in this thread or task.
    """

    __slots__ = ("async_sleep", "jumped_by_others", "machine", "now", "skips", "sleep", "wall")

    now: Callable[[], float]
    wall: Callable[[], float]
    machine: Callable[[], float]
    sleep: Callable[[float], None]
    async_sleep: Callable[[float], Awaitable[None]]
    skips: VirtualTime | None
    jumped_by_others: Callable[[], float]

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.now = time.monotonic
        self.wall = time.time
        self.machine = time.monotonic
        self.sleep = _sleep
        self.async_sleep = asyncio_sleep
        self.skips = None
        self.jumped_by_others = _no_seconds

    def wait(
        self,
        wait_for: Callable[[float | None], Any],
        seconds: float | None,
        *,
        nudge: Callable[[], None],
        patience: float | None = None,
        pushes: bool = True,
    ) -> None:
        """Let ``wait_for(timeout)`` block until what it waits for is there, or ``seconds`` have passed.

        Args:
            wait_for: Gives something true if what it waits for is there, False after its timeout or a nudge.
            seconds: Of this clock; None for no bound.
            nudge: Ends ``wait_for``, from any thread.
            patience: Real seconds after which to return, too; None for no bound.
            pushes: Whether this wait may let time jump where waits are skipped.
        """
        if self.skips is not None and seconds is not None:
            self.skips.wait(wait_for, seconds, nudge=nudge, patience=patience, pushes=pushes)
            return
        bounds = [bound for bound in (seconds, patience) if bound is not None]
        wait_for(min(bounds, default=None))

    async def wait_async(
        self,
        event: asyncio.Event,
        seconds: float | None,
        on_time: Callable[[], None],
        *,
        patience: float | None = None,
        pushes: bool = True,
    ) -> None:
        """Wait for an event; ``on_time``, which sets it, is called after ``seconds`` or ``patience``, as in `wait`."""
        import asyncio

        loop = asyncio.get_running_loop()
        skips = None if seconds is None else self.skips
        bounds = [bound for bound in (None if skips else seconds, patience) if bound is not None]
        timer = loop.call_later(min(bounds), on_time) if bounds else None
        try:
            if skips is None or seconds is None:
                await event.wait()
            else:
                await skips.wait_async(event, seconds, on_time, pushes=pushes)
        finally:
            if timer is not None:
                timer.cancel()


clock = Clock()
