"""The only place where opero reads the time or waits."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

# `time.sleep` and lock timeouts overflow far above this; nobody means to wait longer than a year.
LONGEST_WAIT = 365 * 86_400.0


# A module of opero's own: what a test puts in place of the functions of `time` (freezegun's stand still) would hold up
# every wait, and fail once that test is over where it has imported opero.
_spec: Any = importlib.util.find_spec("time")
_time = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_time)


async def asyncio_sleep(seconds: float) -> None:
    """`asyncio.sleep`, without the import of asyncio until it is needed."""
    import asyncio

    await asyncio.sleep(seconds)


async def wait_really_async(event: asyncio.Event, seconds: float | None) -> None:
    """`Clock.wait_async` in real seconds."""
    import asyncio

    timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, event.set)
    try:
        await event.wait()
    finally:
        if timer is not None:
            timer.cancel()


class Clock:
    """Time, and every wait that is for time to pass, as attributes so that a test can replace them.

    Attributes:
        real: Seconds that pass whatever a test does, for what depends on workers and other processes.
        now: Monotonic seconds, by which policies decide.
        wall: Seconds since the epoch, for what outlives the process: the end of an entry on disk.
        machine: Monotonic seconds that all processes of a machine agree upon.
        sleep: Blocks for so many seconds; None for `time.sleep`, looked up at each call: programs and their tests
            put others in its place.
        async_sleep: The same without blocking the event loop.
        wait: ``wait(wait_for, seconds)`` lets ``wait_for(timeout)``, which tells whether what it waits for has come,
            block for so many seconds; None for no bound.
        wait_async: ``wait_async(event, seconds)`` waits for an `asyncio.Event`, and sets it after so many seconds.
        is_virtual: Whether this time jumps, as no other process's does.
    """

    real: Callable[[], float] = _time.perf_counter
    now: Callable[[], float] = _time.monotonic
    wall: Callable[[], float] = _time.time
    machine: Callable[[], float] = _time.monotonic
    sleep: Callable[[float], None] | None = None
    async_sleep: Callable[[float], Awaitable[None]] = staticmethod(asyncio_sleep)
    wait: Callable[[Callable[[float | None], Any], float | None], None] = staticmethod(
        lambda wait_for, seconds: wait_for(seconds)
    )
    wait_async: Callable[[asyncio.Event, float | None], Awaitable[None]] = staticmethod(wait_really_async)
    is_virtual = False

    def reset(self) -> None:
        """Take back what others have put in their places."""
        vars(self).clear()


clock = Clock()
