"""What one call costs: where it succeeds, with each policy, and where it fails once.

The time is that of the processor, so that a busy machine changes little.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import timeit
from typing import TYPE_CHECKING, Any

import backoff
import cachebox
import opnieuw
import pybreaker
import pyresilience
import stamina
import tenacity

from opero import opero

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CALLS = 50_000
FAILING_CALLS = 2_000


class FlakyError(Exception):
    """What the failing functions raise."""


def same(number: int) -> int:
    """Stand for a user's function."""
    return number


async def same_async(number: int) -> int:
    """Stand for a user's async function."""
    return number


class Service:
    """A class whose methods are decorated."""

    bare = same_method = lambda _self, number: number
    retried = opero(retries=3)(same_method)
    cached = opero(cache=True)(same_method)
    tenacious = tenacity.retry(stop=tenacity.stop_after_attempt(3))(same_method)
    again = opnieuw.retry(
        retry_on_exceptions=FlakyError, max_calls_total=3, retry_window_after_first_call_in_seconds=60
    )(same_method)


def failing_once(decorate: Callable[[Any], Any]) -> Callable[[int], int]:
    """A decorated function that fails in every second execution."""
    failed = False

    def flaky(number: int) -> int:
        nonlocal failed
        failed = not failed
        if failed:
            raise FlakyError
        return number

    decorated: Callable[[int], int] = decorate(flaky)
    return decorated


def tables() -> list[Any]:
    """All tables of this group."""
    logging.getLogger("stamina").disabled = logging.getLogger("backoff").disabled = True
    stamina.instrumentation.set_on_retry_hooks(())
    three = tenacity.retry(stop=tenacity.stop_after_attempt(3))
    service = Service()
    others: dict[str, Callable[[Any], Any]] = {
        "tenacity": three,
        "stamina": stamina.retry(on=FlakyError, attempts=3, wait_initial=0, wait_max=0, wait_jitter=0),
        "backoff": backoff.on_exception(backoff.constant, FlakyError, max_tries=3, interval=0, jitter=None),
        "opnieuw": opnieuw.retry(
            retry_on_exceptions=FlakyError, max_calls_total=3, retry_window_after_first_call_in_seconds=60
        ),
        "pyresilience": pyresilience.resilient(retry=pyresilience.RetryConfig(max_attempts=3, delay=0)),
    }
    return [
        (
            "success of a retried function, sync",
            _rows(
                _sync,
                {
                    "bare call": same,
                    "opero(retries=3)": opero(retries=3)(same),
                    **{name: decorate(same) for name, decorate in others.items()},
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
                    "opero(attempt_timeout=60)": opero(attempt_timeout=60)(same_async),
                    "asyncio.timeout by hand": _in_time,
                    **{name: decorate(same_async) for name, decorate in others.items()},
                },
            ),
        ),
        (
            "success of a retried method",
            _rows(
                _sync,
                {
                    "bare call": service.bare,
                    "opero(retries=3)": service.retried,
                    "tenacity": service.tenacious,
                    "opnieuw": service.again,
                },
            ),
        ),
        (
            "success under other policies, sync",
            _rows(
                _sync,
                {
                    "bare call": same,
                    "opero(total_timeout=60)": opero(total_timeout=60)(same),
                    "opero(breaker=5)": opero(breaker=5)(same),
                    "opero(arg_fallback=…), the first of two": _first_of_two(opero(arg_fallback="number")(same)),
                    "opero(rate_limit=1e9)": opero(rate_limit=1e9)(same),
                    "opero(max_concurrent=5)": opero(max_concurrent=5)(same),
                    "all four": _first_of_two(
                        opero(total_timeout=60, breaker=5, arg_fallback="number", rate_limit=1e9)(same)
                    ),
                    "opero(on_event=…)": opero(on_event=_ignore)(same),
                    "pybreaker": pybreaker.CircuitBreaker(fail_max=5)(same),
                    "pyresilience breaker": pyresilience.resilient(
                        circuit_breaker=pyresilience.CircuitBreakerConfig(failure_threshold=5)
                    )(same),
                },
            ),
        ),
        (
            "one failure and then success, without delay",
            _rows(
                _failing,
                {
                    "opero(retries=3)": failing_once(opero(retries=3, min_delay=0, max_delay=0)),
                    **{name: failing_once(decorate) for name, decorate in others.items() if name != "opnieuw"},
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
                    "opero(cache=True) on a method": service.cached,
                    "cachebox.cached": cachebox.cached(cachebox.LRUCache(10_000))(same),
                },
            ),
        ),
        ("hit of a memory cache, async", _rows(_async, {"opero(cache=True)": opero(cache=True)(same_async)})),
    ]


def _ignore(_event: Any) -> None:
    """Listen, and do nothing."""


async def _in_time(number: int) -> int:
    async with asyncio.timeout(60):
        return await same_async(number)


def _first_of_two(function: Callable[[Any], int]) -> Callable[[int], int]:
    candidates = [1, 2]
    return lambda _number: function(candidates)


def _rows(measure: Callable[[Any], float], functions: dict[str, Any]) -> list[Any]:
    return [(name, functools.partial(measure, function)) for name, function in functions.items()]


def _sync(function: Callable[[int], int], calls: int = CALLS) -> float:
    function(1)
    seconds = timeit.timeit("function(1)", globals={"function": function}, number=calls, timer=time.process_time)
    return seconds / calls


def _failing(function: Callable[[int], int]) -> float:
    return _sync(function, FAILING_CALLS)


def _async(function: Callable[[int], Awaitable[int]]) -> float:
    async def loop() -> float:
        await function(1)
        started = time.process_time()
        for _ in range(CALLS):
            await function(1)
        return (time.process_time() - started) / CALLS

    return asyncio.run(loop())
