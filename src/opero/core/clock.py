"""The only place where opero reads the time or sleeps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# `time.sleep` and lock timeouts overflow far above this; nobody means to wait longer than a year.
LONGEST_WAIT = 365 * 86_400.0


async def _asyncio_sleep(seconds: float) -> None:
    import asyncio

    await asyncio.sleep(seconds)


class Clock:
    """Monotonic time, the time of day, and both kinds of sleep, as attributes so that a test can replace them.

    ``wall`` is only for what outlives the process: the end of an entry on disk.
    """

    __slots__ = ("async_sleep", "now", "sleep", "wall")

    now: Callable[[], float]
    wall: Callable[[], float]
    sleep: Callable[[float], None]
    async_sleep: Callable[[float], Awaitable[None]]

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.now = time.monotonic
        self.wall = time.time
        self.sleep = time.sleep
        self.async_sleep = _asyncio_sleep


clock = Clock()
