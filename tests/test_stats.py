"""The counters of a decorated function."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from side_by_side import until

from opero import CallStats, opero, opmap
from opero.core import MisuseError, UnsafeCacheError
from opero.events import CallDone, on_event


def fails(times):
    """A function that fails so many times and then succeeds."""
    rest = list(range(times))

    def work(key=None):
        if rest:
            rest.pop()
            raise LookupError
        return "done"

    return work


def test_a_new_function_has_done_nothing(world):
    assert opero(cache=True, rate_limit=5)(world.define(fails(0))).stats.snapshot() == CallStats()


def test_asking_counts_nothing(world):
    function = opero(world.define(fails(0)))
    world.run(function)
    assert {function.stats.snapshot() for _ in range(100)} == {CallStats(calls=1, attempts=1)}


def test_a_snapshot_is_frozen(world):
    function = opero(world.define(fails(0)))
    before = function.stats.snapshot()
    world.run(function)
    assert before == CallStats()
    with pytest.raises(AttributeError, match="frozen"):
        before.calls = 5


def test_stats_are_live_and_read_only(world):
    function = opero(world.define(fails(0)))
    stats = function.stats
    world.run(function)
    assert (stats.calls, stats.attempts, stats.waited) == (1, 1, 0.0)
    assert repr(stats) == repr(stats.snapshot()).replace("CallStats", "LiveStats")
    with pytest.raises(AttributeError):
        stats.calls = 5
    with pytest.raises(AttributeError, match="no attribute 'call'"):
        _ = stats.call


COUNTED = {
    "success": ({}, 0, 3, CallStats(calls=3, attempts=3)),
    "retry": ({}, 2, 1, CallStats(calls=1, attempts=3, retries=2)),
    "failure": ({"retries": 1}, 9, 2, CallStats(calls=2, attempts=4, retries=2, failures=2)),
    "no retry": ({"retries": 0}, 9, 2, CallStats(calls=2, attempts=2, failures=2)),
    "hit": ({"cache": True}, 1, 3, CallStats(calls=3, hits=2, attempts=2, retries=1)),
    "no hit": ({"cache": True, "retries": 0}, 1, 3, CallStats(calls=3, hits=1, attempts=2, failures=1)),
    "fallback": ({"arg_fallback": "key"}, 1, 1, CallStats(calls=1, attempts=2, fallbacks=1)),
    "rounds": ({"arg_fallback": "key"}, 5, 1, CallStats(calls=1, attempts=6, fallbacks=3, retries=2)),
    "all failed": (
        {"arg_fallback": "key", "retries": 1},
        *(9, 1),
        CallStats(calls=1, attempts=4, fallbacks=2, retries=1, failures=1),
    ),
    "free slots": ({"rate_limit": 1e9}, 0, 1, CallStats(calls=1, attempts=1)),
    "total_timeout": ({"total_timeout": 60}, 1, 2, CallStats(calls=2, attempts=3, retries=1)),
    "made up": (
        {"retries": 0, "retry_options": {"retry_error_callback": lambda state: "made up"}},
        *(9, 1),
        CallStats(calls=1, attempts=1),
    ),
    "watched": ({"retry_options": {"before": lambda state: None}}, 1, 2, CallStats(calls=2, attempts=3, retries=1)),
}


@pytest.mark.parametrize("row", COUNTED.values(), ids=COUNTED)
def test_counters(world, fake_clock, row):
    options, failures, calls, expected = row
    function = opero(**options)(world.define(fails(failures)))
    for _ in range(calls):
        with contextlib.suppress(LookupError, ExceptionGroup):
            world.run(function, ["a", "b"])
    assert function.stats.snapshot() == expected


def test_calls_without_candidates_are_failures_without_an_attempt(world):
    function = opero(arg_fallback="key")(world.define(fails(0)))
    with pytest.raises(ValueError, match="key"):
        world.run(function, [])
    assert function.stats.snapshot() == CallStats(calls=1, failures=1)


def test_calls_that_join_an_identical_one_are_hits():
    @opero(cache=True)
    async def work():
        await asyncio.sleep(0)
        return "done"

    async def three():
        return await asyncio.gather(work(), work(), work())

    assert asyncio.run(three()) == ["done"] * 3
    assert work.stats.snapshot() == CallStats(calls=3, hits=2, attempts=1)


def test_waited_is_the_time_spent_on_the_rate_limit(world, fake_clock):
    function = opero(rate_limit=50)(world.define(fails(0)))
    world.run(function)  # takes the slot of this moment, in which the clock stands still

    def tick():
        until(lambda: function.__opero__.plan.limit.limiter.limit.expected_wait() > 0.02)
        fake_clock.tick(0.02)

    with ThreadPoolExecutor(1) as pool:
        ticking = pool.submit(tick)
        world.run(function)
        ticking.result()
    assert function.stats.waited == pytest.approx(0.02)


def test_counters_are_exact_under_threads(world, fake_clock):
    calls, threads = 200, 8
    numbers = threading.local()

    def work(key):
        numbers.last = getattr(numbers, "last", 0) + 1
        if numbers.last % 4:  # three of four attempts fail: the first round, and one candidate of the second
            raise LookupError
        return "done"

    function = opero(arg_fallback="key", min_delay=0)(world.define(work))
    ended = threading.Event()

    def read():
        while not ended.is_set():
            assert function.stats.calls <= calls * threads

    def call():
        for _ in range(calls):
            function(["a", "b"])

    async def call_async():
        for _ in range(calls):
            await function(["a", "b"])

    with ThreadPoolExecutor(threads + 1) as pool:
        reading = pool.submit(read)
        for calling in [pool.submit(world.run, call_async if world.is_async else call) for _ in range(threads)]:
            calling.result()
        ended.set()
        reading.result()
    n = calls * threads
    assert function.stats.snapshot() == CallStats(calls=n, attempts=4 * n, retries=n, fallbacks=2 * n)


def test_hits_are_exact_under_threads():
    function = opero(cache=True)(lambda: "done")
    together = threading.Barrier(8)

    def call():
        together.wait()
        for _ in range(2000):
            function()

    with ThreadPoolExecutor(8) as pool:
        for calling in [pool.submit(call) for _ in range(8)]:
            calling.result()
    assert function.stats.snapshot() == CallStats(calls=16_000, hits=15_999, attempts=1)


def test_a_method_counts_for_all_its_instances(world):
    class Client:
        ask = opero(world.define(lambda self: "done"))
        of_class = classmethod(opero(world.define(lambda cls: "done")))

    one, other = Client(), Client()
    for client in (one, one, other):
        world.run(client.ask)
    assert (
        one.ask.stats.snapshot()
        == other.ask.stats.snapshot()
        == Client.ask.stats.snapshot()
        == CallStats(calls=3, attempts=3)
    )
    world.run(Client.of_class)
    assert one.of_class.stats.snapshot() == CallStats(calls=1, attempts=1)


def test_each_decorated_function_has_counters_of_its_own(world):
    decorate = opero(retries=1)
    one, other = decorate(world.define(fails(0))), decorate(world.define(fails(0)))
    world.run(one)
    assert other.stats.snapshot() == CallStats()


class Unhashable:
    __hash__ = None


def refused_key(x):
    raise LookupError(x)


KEYLESS = {
    "an argument": ({"cache": True}, threading.Lock()),
    "an argument, on disk": ({"cache": True, "cache_backend": "disk"}, threading.Lock()),
    "cache_key": ({"cache": True, "cache_key": refused_key}, 1),
    "what cache_key returns": ({"cache": True, "cache_key": lambda x: [x]}, threading.Lock()),
    "a value to limit": ({"rate_limit": 100, "per": refused_key}, 1),
}


@pytest.fixture(params=["usual", "listening"])
def told(request):
    """The events; empty where nobody listens."""
    gathered = []
    with on_event(gathered.append) if request.param == "listening" else contextlib.nullcontext():
        yield gathered


@pytest.mark.parametrize("what", KEYLESS)
def test_a_call_that_fails_for_want_of_a_key_is_a_call_that_failed(world, told, what, tmp_path):
    options, argument = KEYLESS[what]
    if options.get("cache_backend") == "disk":
        options = {**options, "cache_options": {"cache_dir": tmp_path}}
    function = opero(**options)(world.define(lambda x: "done"))
    with pytest.raises((TypeError, LookupError)) as caught:
        world.run(function, argument)
    assert function.stats.snapshot() == CallStats(calls=1, failures=1)
    if told:
        assert (told[-1].error, told[-1].cancelled, told[-1].attempts) == (caught.value, False, 0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="folders are the user's own on this system")
def test_a_call_that_an_unsafe_folder_ends_is_a_call_that_failed(world, told, tmp_path):
    (tmp_path / "opero").mkdir()
    (tmp_path / "opero").chmod(0o777)
    options = {"cache_backend": "disk", "cache_options": {"cache_dir": tmp_path}}
    function = opero(cache=True, **options)(world.define(lambda x: "done"))
    with pytest.raises(UnsafeCacheError) as caught:
        world.run(function, 1)
    assert function.stats.snapshot() == CallStats(calls=1, failures=1)
    if told:
        assert (told[-1].error, told[-1].cancelled) == (caught.value, False)


def test_a_call_of_a_function_that_has_no_lasting_name_is_a_call_that_failed(world, told, tmp_path):
    lock = threading.Lock()
    options = {"cache_backend": "disk", "cache_options": {"cache_dir": tmp_path}}
    function = opero(cache=True, **options)(world.define(functools.partial(lambda lock, x: "done", lock)))
    with pytest.raises(MisuseError, match="cannot be told apart") as caught:
        world.run(function, 1)
    assert function.stats.snapshot() == CallStats(calls=1, failures=1)
    if told:
        assert (told[-1].error, told[-1].cancelled) == (caught.value, False)


@pytest.mark.parametrize("what", ["an argument", "cache_key"])
def test_items_that_fail_for_want_of_a_key_are_calls_that_failed(mode, told, what):
    options, argument = KEYLESS[what]
    mapped = opmap(**options, **mode.options, return_exceptions=True)(mode.define(lambda x: "done"))
    assert [type(outcome) for outcome in mode.run(mapped, [argument, argument])] == [
        MisuseError if what == "an argument" else LookupError
    ] * 2
    assert mapped.stats.snapshot() == CallStats(calls=2, failures=2)
    assert [(e.index, e.cancelled) for e in told if isinstance(e, CallDone)] == (
        [(0, False), (1, False)] if told else []
    )


def test_a_key_that_cannot_be_made_keeps_nothing_alive():
    def key(x):
        raise LookupError

    function = opero(cache=True, cache_key=key)(lambda x: x)
    argument = Unhashable()
    seen = weakref.ref(argument)
    gc.disable()
    try:
        with contextlib.suppress(LookupError):
            function(argument)
        del argument
        assert seen() is None
    finally:
        gc.enable()
