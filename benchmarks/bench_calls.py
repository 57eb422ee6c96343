"""What one call costs on the happy path."""

from __future__ import annotations

import asyncio
import functools
import time
import timeit
from typing import TYPE_CHECKING, Any

import cachebox
import tenacity

from opero import opero

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CALLS = 100_000


def same(number: int) -> int:
    """Stand for a user's function."""
    return number


async def same_async(number: int) -> int:
    """Stand for a user's async function."""
    return number


def tables() -> list[Any]:
    """All tables of this group."""
    retried = tenacity.retry(stop=tenacity.stop_after_attempt(3))
    return [
        (
            "success of a retried function, sync",
            _rows(
                _sync,
                {
                    "bare call": same,
                    "opero(retries=3)": opero(retries=3)(same),
                    "opero(rate_limit=1e9)": opero(rate_limit=1e9)(same),
                    "opero(arg_fallback=…)": opero(arg_fallback="number")(same),
                    "tenacity": retried(same),
                },
            ),
        ),
        (
            "success of a retried function, async",
            _rows(
                _async,
                {
                    "bare call": same_async,
                    "opero(retries=3)": opero(retries=3)(same_async),
                    "opero(rate_limit=1e9)": opero(rate_limit=1e9)(same_async),
                    "tenacity": retried(same_async),
                },
            ),
        ),
        (
            "hit of a memory cache, one int argument",
            _rows(
                _sync,
                {
                    "lru_cache(typed=True)": functools.lru_cache(typed=True)(same),
                    "opero(cache=True)": opero(cache=True)(same),
                    "opero(cache=True, cache_ttl=60)": opero(cache=True, cache_ttl=60)(same),
                    "cachebox.cached": cachebox.cached(cachebox.LRUCache(10_000))(same),
                },
            ),
        ),
        ("hit of a memory cache, async", _rows(_async, {"opero(cache=True)": opero(cache=True)(same_async)})),
    ]


def _rows(measure: Callable[[Any], float], functions: dict[str, Any]) -> list[Any]:
    return [(name, functools.partial(measure, function)) for name, function in functions.items()]


def _sync(function: Callable[[int], int]) -> float:
    function(1)
    return timeit.timeit("function(1)", globals={"function": function}, number=CALLS) / CALLS


def _async(function: Callable[[int], Awaitable[int]]) -> float:
    async def loop() -> float:
        await function(1)
        started = time.perf_counter()
        for _ in range(CALLS):
            await function(1)
        return (time.perf_counter() - started) / CALLS

    return asyncio.run(loop())
