"""What a rate-limited call costs that need not wait, and what is answered in time of more calls than the rate allows.

`soak_limits` shows how well limits are kept and used. token-throttle is measured where it can be installed: it asks for
Python 3.12.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import tempfile
import time
import timeit
from typing import TYPE_CHECKING, Any

import aiolimiter
import asynciolimiter
import limits
import pyrate_limiter

from opero import OperoError, opero
from opero.core import RateLimiter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

try:
    import token_throttle
except ImportError:
    token_throttle = None  # type: ignore[assignment]

CALLS = 20_000
PLENTY = 1_000_000_000
# Of the table about overload: calls per second, the time that each call has, and what an execution takes.
RATE, PATIENCE, EXECUTION, SECONDS = 100, 1.0, 0.1, 3.0


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
        "opero(max_concurrent=8)": opero(retries=0, max_concurrent=8)(same),
        "opero, with circuit, places, total_timeout": opero(
            retries=0, rate_limit=PLENTY, breaker=5, max_concurrent=8, total_timeout=60
        )(same),
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
    two = {"calls": PLENTY, "tokens": PLENTY}
    costly = {
        "bare call": same_async,
        "opero, 5 tokens": opero(retries=0, rate_limit=two, rate_limit_cost={"tokens": 5})(same_async),
        "opero, tokens by a function": opero(
            retries=0, rate_limit=two, rate_limit_cost={"tokens": lambda number: number}
        )(same_async),
        "opero, corrected afterwards": opero(
            retries=0, rate_limit=two, rate_limit_cost={"tokens": (5, lambda result: result)}
        )(same_async),
    }
    if token_throttle is not None:
        costly["token-throttle, corrected afterwards"] = reserving()
    overloaded: list[Any] = [("what the rate allows", lambda: float(RATE))]
    for load in (1.2, 2.0, 5.0):
        times = f"{load:g} times as many calls"
        overloaded += [
            (f"opero, {times}", functools.partial(answered, load, in_time)),
            (f"opero with a circuit, {times}", functools.partial(answered, load, in_time, breaker=5)),
            (f"by hand, {times}", functools.partial(answered, load, by_hand)),
        ]
    return [
        ("limited call that need not wait, sync", [(n, functools.partial(_sync, f)) for n, f in blocking.items()]),
        ("limited call that need not wait, async", [(n, functools.partial(_async, f)) for n, f in awaiting.items()]),
        ("limited call with costs, async", [(n, functools.partial(_async, f)) for n, f in costly.items()]),
        ("answered in time, of more calls than the rate allows", overloaded, "calls/s"),
    ]


def in_time(**options: Any) -> Callable[[], Awaitable[None]]:
    """A healthy service behind opero."""
    return opero(retries=0, rate_limit=RATE, total_timeout=PATIENCE, **options)(_execute)


def by_hand() -> Callable[[], Awaitable[None]]:
    """The same as one would write it by hand."""
    limiter = asynciolimiter.Limiter(RATE)

    async def limited() -> None:
        async with asyncio.timeout(PATIENCE):
            await limiter.wait()
            await _execute()

    return limited


async def _execute() -> None:
    await asyncio.sleep(EXECUTION)


def answered(load: float, make: Callable[..., Callable[[], Awaitable[None]]], **options: Any) -> float:
    """Calls per second that end in time, of ``load`` times as many as the rate allows, once they wait for slots."""
    ended: list[float] = []

    async def one(function: Callable[[], Awaitable[None]], begins: float) -> None:
        await asyncio.sleep(begins)
        with contextlib.suppress(TimeoutError, OperoError):
            await function()
            ended.append(time.perf_counter())

    async def main() -> None:
        function = make(**options)
        seconds = PATIENCE + SECONDS
        await asyncio.gather(*[one(function, number / (load * RATE)) for number in range(int(seconds * load * RATE))])

    begun = time.perf_counter()
    asyncio.run(main())
    return sum(begun + PATIENCE <= moment < begun + PATIENCE + SECONDS for moment in ended) / SECONDS


def reserving() -> Callable[[int], Awaitable[int]]:
    """A function behind token-throttle, which is told afterwards what was used."""
    quotas = [token_throttle.Quota(metric=name, limit=PLENTY, per_seconds=60) for name in ("requests", "tokens")]
    config = token_throttle.PerModelConfig(quotas=token_throttle.UsageQuotas(quotas))
    made: list[Any] = []

    async def limited(number: int) -> int:
        if not made:
            made.append(token_throttle.RateLimiter(config, backend=token_throttle.MemoryBackendBuilder()))
        async with made[0].reserve({"requests": 1, "tokens": 5}, model="bench") as reservation:
            reservation.set_actual_usage({"requests": 1, "tokens": number})
            return number

    limited.begin = made.clear  # type: ignore[attr-defined]  # each measurement has an event loop of its own
    return limited


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
