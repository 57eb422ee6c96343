"""Options that are told in seconds take a `datetime.timedelta`, too, and mean the same by it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt

import pytest

from opero import AllFailedError, Breaker, CircuitOpenError, opero
from opero.core import CallTimeoutError, RateLimiter, get_cache_decorator

MINUTE = dt.timedelta(minutes=1)


@pytest.fixture(params=[60, MINUTE], ids=["seconds", "timedelta"])
def minute(request):
    return request.param


CACHED = {
    "opero": lambda ttl: opero(cache=True, cache_ttl=ttl),
    "cache alone": lambda ttl: get_cache_decorator(cache_ttl=ttl),
}


@pytest.mark.parametrize("cached", CACHED.values(), ids=CACHED)
def test_an_entry_lives_so_long(world, fake_clock, minute, cached):
    function = cached(minute)(world.define(lambda: 1))
    world.run(function)
    fake_clock.tick(59)
    world.run(function)
    assert function.stats.attempts == 1
    fake_clock.tick(2)
    world.run(function)
    assert function.stats.attempts == 2


def test_a_candidate_rests_so_long(world, fake_clock, minute):
    tried = []

    def ask(key):
        tried.append(key)
        if key == "a":
            raise ValueError

    function = opero(retries=0, arg_fallback="key", fallback_cooldown=minute)(world.define(ask))
    for seconds in (0, 59, 2):
        fake_clock.tick(seconds)
        world.run(function, ["a", "b"])
    assert tried == ["a", "b", "b", "a", "b"]


def test_a_circuit_counts_and_recovers_so_long(world, fake_clock, minute):
    def fail():
        raise ValueError

    function = opero(retries=0, breaker=Breaker(2, window=minute, recovery=minute))(world.define(fail))

    def kind(after):
        fake_clock.tick(after)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - its class is compared
            world.run(function)
        return type(caught.value)

    assert [kind(after) for after in (0, 61, 59)] == [ValueError] * 3
    assert [kind(after) for after in (59, 2)] == [CircuitOpenError, ValueError]


def test_a_call_has_so_long_in_all(world, fake_clock, minute):
    def fail():
        raise KeyError

    function = opero(retries=9, min_delay=25, max_delay=25, jitter=False, total_timeout=minute)(world.define(fail))
    with pytest.raises(KeyError):
        world.run(function)
    assert fake_clock.sleeps == [25, 25]


def test_an_attempt_has_so_long():
    @opero(retries=0, attempt_timeout=dt.timedelta(milliseconds=10))
    async def hang():
        await asyncio.Event().wait()

    with pytest.raises(CallTimeoutError, match="10 ms"):
        asyncio.run(hang())


def test_a_slot_is_waited_for_so_long(minute):
    limit = RateLimiter("1/hour", max_burst=1)
    assert limit.acquire(timeout=dt.timedelta(0))
    assert not limit.acquire(timeout=minute)
    assert not asyncio.run(limit.acquire_async(timeout=minute))


def test_a_candidate_may_ask_for_a_timedelta(world, fake_clock):
    def fail(key):
        raise ValueError

    function = opero(retries=1, arg_fallback="key", retry_on=lambda error: MINUTE)(world.define(fail))
    with contextlib.suppress(AllFailedError):
        world.run(function, ["a", "b"])
    assert fake_clock.sleeps == [60]
