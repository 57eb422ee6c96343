"""What a rate-limited call costs that need not wait; `soak_limits` shows how well limits are kept and used."""

from __future__ import annotations

import asyncio
import functools
import tempfile
import time
import timeit
from typing import TYPE_CHECKING, Any

import aiolimiter
import asynciolimiter
import limits
import pyrate_limiter

from opero import opero
from opero.core import RateLimiter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CALLS = 20_000
PLENTY = 1_000_000_000


def same(number: int) -> int:
    """Stand for a user's function."""
    return number


async def same_async(number: int) -> int:
    """Stand for a user's async function."""
    return number


def tables() -> list[Any]:
    """All tables of this group."""
    folder = tempfile.mkdtemp(prefix="opero-bench-")
    shared = {"scope": "machine", "folder": folder, "name": "bench"}
    blocking = {
        "bare call": same,
        "opero(rate_limit=…)": opero(retries=0, rate_limit=PLENTY)(same),
        "opero, per value": opero(retries=0, rate_limit=PLENTY, per="number")(same),
        "opero, two rates": opero(retries=0, rate_limit=[PLENTY, "1000000/minute"])(same),
        "opero, shared by the machine": opero(retries=0, rate_limit=PLENTY, rate_limit_options=shared)(same),
        "RateLimiter.acquire": acquiring(RateLimiter(PLENTY)),
        "pyrate-limiter": pyrate(),
        "limits, fixed window": fixed_window(),
    }
    awaiting = {
        "bare call": same_async,
        "opero(rate_limit=…)": opero(retries=0, rate_limit=PLENTY)(same_async),
        "asynciolimiter": waiting(lambda: asynciolimiter.Limiter(PLENTY)),
        "aiolimiter": entering(lambda: aiolimiter.AsyncLimiter(PLENTY, 1)),
    }
    return [
        ("limited call that need not wait, sync", [(n, functools.partial(_sync, f)) for n, f in blocking.items()]),
        ("limited call that need not wait, async", [(n, functools.partial(_async, f)) for n, f in awaiting.items()]),
    ]


def acquiring(limiter: RateLimiter) -> Callable[[int], int]:
    """A function behind a limiter by itself."""

    def limited(number: int) -> int:
        limiter.acquire()
        return number

    return limited


def pyrate() -> Callable[[int], int]:
    """A function behind pyrate-limiter."""
    limiter = pyrate_limiter.Limiter(pyrate_limiter.Rate(PLENTY, pyrate_limiter.Duration.SECOND))

    def limited(number: int) -> int:
        limiter.try_acquire("bench")
        return number

    return limited


def fixed_window() -> Callable[[int], int]:
    """A function behind limits."""
    limiter = limits.strategies.FixedWindowRateLimiter(limits.storage.MemoryStorage())
    rate = limits.RateLimitItemPerSecond(PLENTY)

    def limited(number: int) -> int:
        limiter.hit(rate, "bench")
        return number

    return limited


def waiting(make: Callable[[], Any]) -> Callable[[int], Awaitable[int]]:
    """A function behind a limiter that is awaited; made in the loop that uses it."""
    made: list[Any] = []

    async def limited(number: int) -> int:
        if not made:
            made.append(make())
        await made[0].wait()
        return number

    limited.begin = made.clear  # type: ignore[attr-defined]  # each measurement has an event loop of its own
    return limited


def entering(make: Callable[[], Any]) -> Callable[[int], Awaitable[int]]:
    """A function behind a limiter that is entered; made in the loop that uses it."""
    made: list[Any] = []

    async def limited(number: int) -> int:
        if not made:
            made.append(make())
        async with made[0]:
            return number

    limited.begin = made.clear  # type: ignore[attr-defined]  # as above
    return limited


def _sync(function: Callable[[int], int]) -> float:
    function(1)
    return timeit.timeit("function(1)", globals={"function": function}, number=CALLS) / CALLS


def _async(function: Any) -> float:
    async def loop() -> float:
        getattr(function, "begin", lambda: None)()
        await function(1)
        started = time.perf_counter()
        for _ in range(CALLS):
            await function(1)
        return (time.perf_counter() - started) / CALLS

    return asyncio.run(loop())
