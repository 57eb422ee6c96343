"""`opero.opmap` in every mode: results, policies, streams, where it may be used, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import enum
import functools
import gc
import inspect
import itertools
import os
import threading
import time
import types
import weakref
from collections import Counter
from typing import Any

import pytest
from leftovers import surroundings
from side_by_side import assert_limited, eventually

from opero import AllFailedError, CallStats, Outcome, control, opmap
from opero.testing import instant

MODES = ("thread", "process", "async", "async_process")
PATIENCE = 10.0  # seconds until a test gives up waiting for something that must happen


class SpoiledError(Exception):
    """A user's error."""


class OwnBaseError(BaseException):
    """A user's error that is no `Exception`."""


class TwoPartError(Exception):
    """A user's error whose arguments are not what `Exception` was given."""

    def __init__(self, item: int, reason: str) -> None:
        super().__init__(f"{item}: {reason}")
        self.item = item
        self.reason = reason

    def __reduce__(self) -> Any:
        return type(self), (self.item, self.reason)


@pytest.fixture(autouse=True)
def clean_surroundings():
    """Every test here is also a test that no process and no thread is left."""
    before = surroundings()
    yield before
    assert surroundings() == before


def outcomes(mapped, items, **kwargs) -> list[Outcome]:
    """All outcomes of a stream, of whichever kind it is."""
    stream = mapped.stream(items, **kwargs)
    if not inspect.isasyncgen(stream):
        return list(stream)

    async def collect():
        return [outcome async for outcome in stream]

    return asyncio.run(collect())


def one(mapped, item, **kwargs):
    """The single call of a map, blocking."""
    result = mapped.one(item, **kwargs)
    if not inspect.isawaitable(result):
        return result

    async def call():
        return await result

    return asyncio.run(call())


def most_together(lines: list[str]) -> int:
    """The largest number of "+" lines without their "-" lines."""
    return max(itertools.accumulate({"+": 1, "-": -1}.get(line, 0) for line in lines))


def double(item):
    return item * 2


async def double_async(item):
    return item * 2


# Results


def test_results_come_in_input_order(mode):
    mapped = opmap(**mode.options)(mode.define(double))
    assert mode.run(mapped, range(300)) == [n * 2 for n in range(300)]


def test_results_keep_input_order_when_a_later_item_ends_first(mode, journal):
    @opmap(**mode.options)
    async def work(item):
        if item == 0:
            await eventually(lambda: journal.count(1))
        journal.add(item)
        return item

    assert work.run([0, 1, 2, 3]) == [0, 1, 2, 3]
    assert journal.lines().index("1") < journal.lines().index("0")


def test_unordered_results_come_in_order_of_completion(mode, journal):
    @opmap(**mode.options, ordered=False)
    async def work(item):
        if item == 0:
            await eventually(lambda: journal.count(1))
            await asyncio.sleep(0.15)  # the result of item 1 is reported after its line in the journal
        journal.add(item)
        return item

    assert work.run([0, 1]) == [1, 0]


def test_unordered_results_are_all_there(mode):
    mapped = opmap(**mode.options, ordered=False)(mode.define(double))
    assert sorted(mode.run(mapped, range(300))) == [n * 2 for n in range(300)]


@pytest.mark.parametrize(
    "make",
    [
        list,
        collections.deque,
        lambda items: dict.fromkeys(items).keys(),
        lambda items: (item for item in items),
        lambda items: map(int, items),
    ],
    ids=["list", "deque", "keys", "generator", "map object"],
)
def test_items_may_be_any_iterable(mode, make):
    mapped = opmap(**mode.options)(mode.define(double))
    assert mode.run(mapped, make(range(5))) == [0, 2, 4, 6, 8]


def test_an_empty_input_gives_an_empty_list(mode):
    mapped = opmap(**mode.options)(mode.define(double))
    assert mode.run(mapped, []) == []
    assert mode.run(mapped, iter(())) == []
    assert mode.stream(mapped, []) == []
    assert mapped.stats.snapshot() == CallStats()


def test_none_results_are_results(mode):
    mapped = opmap(**mode.options)(mode.define(lambda item: None))
    assert mode.run(mapped, range(3)) == [None, None, None]


def test_an_exception_that_is_returned_is_a_result(mode):
    def work(item):
        return SpoiledError(item)

    mapped = opmap(**mode.options, return_exceptions=False)(mode.define(work))
    (result,) = mode.run(mapped, [1])
    assert isinstance(result, SpoiledError)
    assert mapped.stats.failures == 0


def test_without_parentheses_a_map_runs_in_processes():
    @opmap
    def process_of(item):
        return os.getpid()

    pids = process_of(range(3))
    assert len(pids) == 3
    assert os.getpid() not in pids


@pytest.mark.parametrize("name", MODES)
def test_an_async_function_takes_an_async_iterable(name):
    @opmap(mode=name, workers=2, progress=False)
    async def work(item):
        return item * 2

    async def items():
        for item in range(50):
            await asyncio.sleep(0)
            yield item

    assert work.run(items()) == [n * 2 for n in range(50)]


@pytest.mark.parametrize("name", ["thread", "process"])
def test_a_def_function_refuses_an_async_iterable(name):
    async def items():
        yield 1

    mapped = opmap(mode=name, workers=2, progress=False)(double)
    with pytest.raises(TypeError, match="async def"):
        mapped(items())


@pytest.mark.parametrize("name", MODES)
def test_an_async_function_makes_a_map_that_is_awaited(name):
    mapped = opmap(mode=name, workers=2, progress=False)(double_async)

    async def main():
        return await mapped([1, 2, 3])

    assert asyncio.run(main()) == [2, 4, 6]
    assert mapped.run([1, 2, 3]) == [2, 4, 6]


@pytest.mark.parametrize("name", ["thread", "process"])
def test_a_def_function_makes_a_map_that_is_called(name):
    mapped = opmap(mode=name, workers=2, progress=False)(double)
    assert mapped([1, 2, 3]) == [2, 4, 6]
    assert mapped.run([1, 2, 3]) == [2, 4, 6]


@pytest.mark.parametrize("name", ["thread", "process"])
def test_an_async_function_runs_in_one_event_loop_for_each_worker(name):
    @opmap(mode=name, workers=1, progress=False)
    async def loop_of(item):
        await asyncio.sleep(0)
        return id(asyncio.get_running_loop())

    assert len(set(loop_of.run(range(5)))) == 1


def test_async_mode_runs_all_items_in_the_event_loop_of_the_caller():
    @opmap(mode="async", progress=False)
    async def place(item):
        return os.getpid(), threading.get_ident(), id(asyncio.get_running_loop())

    async def main():
        here = (os.getpid(), threading.get_ident(), id(asyncio.get_running_loop()))
        return await place(range(20)), here

    places, here = asyncio.run(main())
    assert set(places) == {here}


# Arguments


def test_keyword_arguments_go_to_every_item(mode):
    def work(item, *, factor, plus=0):
        return item * factor + plus

    mapped = opmap(**mode.options)(mode.define(work))
    assert mode.run(mapped, [1, 2, 3], factor=10, plus=1) == [11, 21, 31]
    assert [outcome.result for outcome in mode.stream(mapped, [1, 2, 3], factor=10)] == [10, 20, 30]


def test_further_positional_arguments_go_to_every_item(mode):
    mapped = opmap(**mode.options)(mode.define(lambda item, factor, plus: item * factor + plus))
    assert mapped.run([1, 2, 3], 10, 1) == [11, 21, 31]


def test_a_parameter_may_have_any_name(mode):
    def work(item, *, items, self, function, mode, args, kwargs):
        return (item, items, self, function, mode, args, kwargs)

    mapped = opmap(**mode.options)(mode.define(work))
    given = {"items": 1, "self": 2, "function": 3, "mode": 4, "args": 5, "kwargs": 6}
    assert mode.run(mapped, [0], **given) == [(0, 1, 2, 3, 4, 5, 6)]


def test_wrong_arguments_raise_before_anything_starts(mode, journal):
    def items():
        journal.add("pulled")
        yield 1

    mapped = opmap(**mode.options)(mode.define(lambda item, *, plus=0: journal.add("ran")))
    with pytest.raises(TypeError, match="unknown"):
        mode.run(mapped, items(), unknown=1)
    with pytest.raises(TypeError, match="unknown"):
        mode.stream(mapped, items(), unknown=1)
    with pytest.raises(TypeError, match="positional"):
        mapped.run(items(), 1, 2)
    assert journal.lines() == []
    assert mapped.stats.snapshot() == CallStats()


def test_items_that_are_not_iterable_raise(mode):
    mapped = opmap(**mode.options)(mode.define(double))
    with pytest.raises(TypeError, match="int"):
        mode.run(mapped, 5)


# Failures


def fail_on_odd(item):
    if item % 2:
        raise TwoPartError(item, "odd")
    return item


def test_a_failed_item_is_its_own_exception(mode):
    mapped = opmap(**mode.options, retries=0, return_exceptions=True)(mode.define(fail_on_odd))
    results = mode.run(mapped, range(40))
    assert results[::2] == list(range(0, 40, 2))
    assert [type(error) for error in results[1::2]] == [TwoPartError] * 20
    assert [(error.item, error.reason) for error in results[1::2]] == [(n, "odd") for n in range(1, 40, 2)]


def test_a_failed_item_has_a_note_with_its_attempts(mode):
    mapped = opmap(**mode.options, retries=1, min_delay=0.01, return_exceptions=True)(mode.define(fail_on_odd))
    (error,) = mode.run(mapped, [1])
    assert any("2 attempts" in note for note in error.__notes__)


def test_the_first_failure_is_raised_and_stops_the_map(mode, journal):
    def work(item):
        journal.add(item)
        if item == 3:
            raise TwoPartError(item, "bad")
        return item

    mapped = opmap(**mode.options, retries=0, return_exceptions=False)(mode.define(work))
    with pytest.raises(TwoPartError) as caught:
        mode.run(mapped, itertools.count())  # only a map that stops comes to an end
    assert (caught.value.item, caught.value.reason) == (3, "bad")


def test_without_return_exceptions_an_item_is_retried_before_it_stops_the_map(mode, journal):
    def work(item):
        journal.add(item)
        if journal.count(item) < 2:
            raise SpoiledError(item)
        return item

    mapped = opmap(**mode.options, min_delay=0.01, return_exceptions=False)(mode.define(work))
    assert mode.run(mapped, range(5)) == [0, 1, 2, 3, 4]


def test_a_stream_without_return_exceptions_raises_the_first_failure(mode):
    mapped = opmap(**mode.options, retries=0, return_exceptions=False)(mode.define(fail_on_odd))
    with pytest.raises(TwoPartError):
        mode.stream(mapped, itertools.count())


@pytest.mark.parametrize("name", ["thread", "process"])
def test_a_def_function_that_returns_an_awaitable_fails_without_a_retry(name, journal):
    def work(item):
        journal.add(item)
        return double_async(item)

    mapped = opmap(mode=name, workers=2, progress=False, return_exceptions=True)(work)
    (error,) = mapped([1])
    assert isinstance(error, TypeError)
    assert "async def" in str(error)
    assert journal.lines() == ["1"]


@pytest.mark.parametrize("name", ["thread", "async"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError, OwnBaseError])
def test_what_is_no_exception_passes_through_a_map(name, error):
    def work(item):
        if item == 3:
            raise error
        return item

    async def work_async(item):
        return work(item)

    mapped = opmap(mode=name, workers=2, progress=False)(work if name == "thread" else work_async)
    with pytest.raises(error):
        mapped.run(itertools.count())


# Policies


def test_a_failed_item_is_tried_again_until_it_succeeds(mode, journal):
    def work(item):
        journal.add(item)
        if journal.count(item) < 3:
            raise SpoiledError(item)
        return item

    mapped = opmap(**mode.options, retries=2, min_delay=0.01)(mode.define(work))
    assert mode.run(mapped, range(6)) == [0, 1, 2, 3, 4, 5]
    assert Counter(journal.lines()) == {str(item): 3 for item in range(6)}


def test_an_item_is_tried_no_more_often_than_retries_allow(mode, journal):
    def work(item):
        journal.add(item)
        raise SpoiledError(item)

    mapped = opmap(**mode.options, retries=2, min_delay=0.01, return_exceptions=True)(mode.define(work))
    results = mode.run(mapped, range(3))
    assert [type(error) for error in results] == [SpoiledError] * 3
    assert Counter(journal.lines()) == {"0": 3, "1": 3, "2": 3}


def test_an_error_that_is_not_to_be_retried_is_not(mode, journal):
    def work(item):
        journal.add(item)
        raise KeyError(item)

    mapped = opmap(**mode.options, retry_on=OSError, return_exceptions=True)(mode.define(work))
    (error,) = mode.run(mapped, [1])
    assert isinstance(error, KeyError)
    assert journal.lines() == ["1"]


@pytest.mark.parametrize("options", [{}, {"rate_limit": 1_000}, {"total_timeout": 100}], ids=str)
def test_items_equal_to_one_that_waits_for_its_retry_hold_no_worker(mode, journal, options):
    def work(item):
        journal.add(item)
        if item == "flaky" and journal.count("flaky") == 1:
            raise SpoiledError(item)
        return item

    mapped = opmap(**mode.options, cache=True, retries=1, min_delay=20, jitter=False, **options)(mode.define(work))
    items = ["flaky"] * 5 + ["a", "b", "c"]
    with instant():
        assert mode.run(mapped, items) == items
    *first, last = journal.lines()
    assert (sorted(first), last) == (["a", "b", "c", "flaky"], "flaky")


def test_an_item_that_waits_for_its_retry_holds_no_worker(mode, journal):
    def work(item):
        journal.add(item)
        if item == 0 and journal.count(0) == 1:
            raise SpoiledError(item)
        return item

    options = {**mode.options, "workers": 1, "ordered": False}
    mapped = opmap(**options, min_delay=20, jitter=False)(mode.define(work))
    with instant():
        assert mode.run(mapped, range(4)) == [1, 2, 3, 0]


def test_fallback_tries_the_candidates_of_a_keyword_for_every_item(mode):
    def work(item, *, key):
        if key == "first":
            raise SpoiledError(key)
        return item, key

    mapped = opmap(**mode.options, arg_fallback="key", retries=0)(mode.define(work))
    assert mode.run(mapped, range(4), key=["first", "second", "third"]) == [(n, "second") for n in range(4)]
    assert mapped.stats.fallbacks == 4
    assert mapped.stats.attempts == 8


def test_fallback_candidates_may_be_the_items_themselves(mode):
    def work(mirrors):
        if "dead" in mirrors:
            raise SpoiledError(mirrors)
        return mirrors

    mapped = opmap(**mode.options, arg_fallback="mirrors", retries=0)(mode.define(work))
    items = [["dead", "north"], ("south", "dead"), "east", ["dead 1", "dead 2", "west"]]
    assert mode.run(mapped, items) == ["north", "south", "east", "west"]


def test_an_item_without_candidates_is_a_value_error(mode):
    mapped = opmap(**mode.options, arg_fallback="mirrors", return_exceptions=True)(mode.define(lambda mirrors: mirrors))
    good, bad = mode.run(mapped, [["north"], []])
    assert good == "north"
    assert isinstance(bad, ValueError)


def test_an_item_whose_candidates_all_fail_is_an_all_failed_error(mode):
    def work(item, *, key):
        raise SpoiledError(f"{item} refused")

    mapped = opmap(**mode.options, arg_fallback="key", retries=1, min_delay=0.01, return_exceptions=True)(
        mode.define(work)
    )
    (error,) = mode.run(mapped, [7], key=["hidden-1", "hidden-2"])
    assert isinstance(error, AllFailedError)
    assert [type(part) for part in error.errors] == [SpoiledError] * 4
    assert "'key'" in str(error)
    assert "2 rounds" in str(error)
    assert "hidden" not in str(error)


def test_equal_items_run_once_for_all_workers(mode, journal):
    def work(item):
        journal.add(item)
        return item * 2

    mapped = opmap(**mode.options, cache=True)(mode.define(work))
    assert mode.run(mapped, [1, 1, 2, 1, 2] * 20) == [2, 2, 4, 2, 4] * 20
    assert Counter(journal.lines()) == {"1": 1, "2": 1}


def test_a_second_map_is_answered_from_the_cache(mode, journal):
    def work(item):
        journal.add(item)
        return item * 2

    mapped = opmap(**mode.options, cache=True)(mode.define(work))
    mode.run(mapped, range(10))
    seen = mode.stream(mapped, range(10))
    assert [outcome.result for outcome in seen] == [n * 2 for n in range(10)]
    assert all(outcome.cached and outcome.attempts == 0 for outcome in seen)
    assert len(journal.lines()) == 10


def test_the_single_call_and_the_map_share_the_cache(mode, journal):
    def work(item):
        journal.add(item)
        return item

    mapped = opmap(**mode.options, cache=True)(mode.define(work))
    assert one(mapped, 1) == 1
    assert mode.run(mapped, [1, 2]) == [1, 2]
    assert one(mapped, 2) == 2
    assert journal.lines() == ["1", "2"]
    assert mapped.cache_info().hits == 2
    assert mapped.cache_info().currsize == 2


def test_a_deleted_or_cleared_result_is_computed_again(mode, journal):
    mapped = opmap(**mode.options, cache=True)(mode.define(journal.add))
    mode.run(mapped, [1, 2])
    assert mapped.cache_delete(1) is True
    assert mapped.cache_delete(1) is False
    mode.run(mapped, [1, 2])
    assert Counter(journal.lines()) == {"1": 2, "2": 1}
    mapped.cache_clear()
    mode.run(mapped, [1, 2])
    assert Counter(journal.lines()) == {"1": 3, "2": 2}


def test_equal_numbers_of_different_types_are_different_items_to_the_cache(mode):
    mapped = opmap(**mode.options, cache=True)(mode.define(lambda item: type(item).__name__))
    assert mode.run(mapped, [1, 1.0, True]) == ["int", "float", "bool"]


def test_a_failed_item_is_not_cached(mode, journal):
    def work(item):
        journal.add(item)
        raise SpoiledError(item)

    mapped = opmap(**mode.options, cache=True, retries=0, return_exceptions=True)(mode.define(work))
    for _ in range(2):
        (error,) = mode.run(mapped, [1])
        assert isinstance(error, SpoiledError)
    assert journal.lines() == ["1", "1"]


def test_the_rate_limit_is_shared_by_all_workers(mode):
    mapped = opmap(**mode.options, rate_limit=40, rate_limit_options={"max_burst": 1})(
        mode.define(lambda item: time.monotonic())
    )
    began = time.monotonic()
    assert_limited(mode.run(mapped, range(10)), 40, since=began)
    assert mapped.stats.waited > 0


def test_the_rate_limit_is_shared_by_maps_in_several_threads():
    mapped = opmap(mode="thread", workers=2, progress=False, rate_limit=40, rate_limit_options={"max_burst": 1})(
        lambda item: time.monotonic()
    )
    starts: list[float] = []
    threads = [threading.Thread(target=lambda: starts.extend(mapped(range(6)))) for _ in range(3)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(starts) == 18
    assert_limited(starts, 40, since=began)


def test_every_retry_takes_a_rate_slot(mode, journal):
    def work(item):
        journal.add(time.monotonic())
        raise SpoiledError(item)

    mapped = opmap(
        **mode.options,
        retries=3,
        min_delay=0,
        jitter=False,
        rate_limit=40,
        rate_limit_options={"max_burst": 1},
        return_exceptions=True,
    )(mode.define(work))
    began = time.monotonic()
    mode.run(mapped, range(3))
    starts = [float(line) for line in journal.lines()]
    assert len(starts) == 12
    assert_limited(starts, 40, since=began)


def test_cache_hits_take_no_rate_slot(mode):
    mapped = opmap(**mode.options, cache=True, rate_limit=50, rate_limit_options={"max_burst": 1})(mode.define(double))
    mode.run(mapped, range(5))
    waited = mapped.stats.waited
    assert mode.run(mapped, list(range(5)) * 100) == [0, 2, 4, 6, 8] * 100
    assert mapped.stats.waited == waited


@pytest.mark.parametrize("name", MODES)
def test_an_attempt_timeout_ends_a_coroutine_that_takes_too_long(name, journal):
    @opmap(mode=name, workers=2, progress=False, attempt_timeout=0.1, retries=1, min_delay=0.01, return_exceptions=True)
    async def work(item):
        journal.add(item)
        if item == "slow":
            await asyncio.Event().wait()
        return item

    quick, slow = work.run(["quick", "slow"])
    assert quick == "quick"
    assert isinstance(slow, TimeoutError)
    assert "attempt_timeout" in str(slow)
    assert Counter(journal.lines()) == {"quick": 1, "slow": 2}


def test_total_timeout_bounds_the_retries_of_each_item(mode):
    mapped = opmap(**mode.options, total_timeout=0.3, retries=1000, min_delay=0.12, jitter=False, backoff_factor=1)(
        mode.define(fail_on_odd)
    )
    good, bad = mode.stream(mapped, [2, 1])
    assert good.result == 2
    assert isinstance(bad.error, TwoPartError)
    assert bad.attempts <= 3


def test_stats_count_every_item(mode, journal):
    def work(item):
        journal.add(item)
        if item == "fails":
            raise SpoiledError(item)
        if item == "recovers" and journal.count(item) == 1:
            raise SpoiledError(item)
        return item

    mapped = opmap(**mode.options, retries=1, min_delay=0.01, cache=True, return_exceptions=True)(mode.define(work))
    mode.run(mapped, ["good", "good", "fails", "recovers"])
    assert mapped.stats.snapshot() == CallStats(calls=4, hits=1, attempts=5, retries=2, failures=1)


def test_stats_add_up_over_maps_and_single_calls(mode):
    mapped = opmap(**mode.options)(mode.define(double))
    mode.run(mapped, range(100))
    mode.stream(mapped, range(10))
    one(mapped, 1)
    assert mapped.stats.snapshot() == CallStats(calls=111, attempts=111)


# Streams, single calls, methods


def test_a_stream_tells_what_became_of_each_item(mode, journal):
    def work(item):
        journal.add(item)
        if item == "fails":
            raise SpoiledError(item)
        if item == "recovers" and journal.count(item) == 1:
            raise SpoiledError(item)
        time.sleep(0.01)
        return item.upper()

    mapped = opmap(**mode.options, retries=1, min_delay=0.05, jitter=False)(mode.define(work))
    good, fails, recovers = mode.stream(mapped, iter(["good", "fails", "recovers"]))
    assert all(isinstance(outcome, Outcome) for outcome in (good, fails, recovers))
    assert [(o.index, o.item, o.cached) for o in (good, fails, recovers)] == [
        (0, "good", False),
        (1, "fails", False),
        (2, "recovers", False),
    ]
    assert (good.result, good.error, good.attempts) == ("GOOD", None, 1)
    assert (recovers.result, recovers.error, recovers.attempts) == ("RECOVERS", None, 2)
    assert (type(fails.error), fails.attempts) == (SpoiledError, 2)
    assert good.seconds >= 0.01
    assert recovers.seconds >= 0.06
    assert fails.seconds >= 0.05


def test_the_result_of_a_failed_outcome_raises_its_error(mode):
    mapped = opmap(**mode.options, retries=0)(mode.define(fail_on_odd))
    (outcome,) = mode.stream(mapped, [1])
    with pytest.raises(TwoPartError) as caught:
        _ = outcome.result
    assert caught.value is outcome.error


def test_an_outcome_cannot_be_changed():
    outcome = Outcome(0, "item", "result", None, 1, 0.1, cached=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        outcome.index = 1  # type: ignore[misc]


def test_a_stream_is_in_input_order(mode, journal):
    @opmap(**mode.options)
    async def work(item):
        if item == 0:
            await eventually(lambda: journal.count(1))
        journal.add(item)

    assert [outcome.index for outcome in outcomes(work, range(20))] == list(range(20))


def test_an_unordered_stream_yields_an_item_while_an_earlier_one_runs(mode, journal):
    @opmap(**mode.options, ordered=False)
    async def work(item):
        if item == 0:
            await eventually(lambda: journal.count("1 was seen"))
        return item

    async def consume():
        order = []
        async for outcome in work.stream([0, 1]):
            order.append(outcome.result)
            journal.add(f"{outcome.item} was seen")
        return order

    assert asyncio.run(consume()) == [1, 0]


def test_a_stream_yields_an_item_before_the_map_has_ended(mode, journal):
    @opmap(**mode.options)
    async def work(item):
        if item == 1:
            await eventually(lambda: journal.count("0 was seen"))
        return item

    async def consume():
        order = []
        async for outcome in work.stream([0, 1]):
            order.append(outcome.result)
            journal.add(f"{outcome.item} was seen")
        return order

    assert asyncio.run(consume()) == [0, 1]


def test_an_infinite_input_can_be_streamed_and_closed(mode, clean_surroundings):
    mapped = opmap(**mode.options)(mode.define(double))

    def consume():
        stream = mapped.stream(itertools.count())
        first = [next(stream).result for _ in range(100)]
        stream.close()
        assert next(stream, None) is None
        assert surroundings() == clean_surroundings
        return first

    async def consume_async():
        stream = mapped.stream(itertools.count())
        first = [(await anext(stream)).result for _ in range(100)]
        await stream.aclose()
        assert await anext(stream, None) is None
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert surroundings() == clean_surroundings
        return first

    first = asyncio.run(consume_async()) if mode.is_async else consume()
    assert first == [n * 2 for n in range(100)]


@pytest.mark.parametrize("is_waiting", [False, True])
def test_an_async_generator_is_closed_with_the_map_it_is_the_input_of(mode, clean_surroundings, is_waiting):
    mapped = opmap(**mode.options)(double_async)
    ends = []

    async def items():
        try:
            for item in itertools.count():
                if is_waiting and item == 5:
                    await asyncio.Event().wait()
                yield item
        finally:
            await asyncio.sleep(0)
            ends.append("closed")

    async def consume():
        source = items()
        stream = mapped.stream(source)
        first = [(await anext(stream)).result for _ in range(5)]
        await asyncio.sleep(0.05)  # what is pulled ahead has come, and no more is pulled
        await stream.aclose()
        assert ends == ["closed"]
        assert await anext(source, None) is None
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert surroundings() == clean_surroundings
        return first

    assert asyncio.run(consume()) == [n * 2 for n in range(5)]


def test_an_async_iterator_that_is_no_generator_is_left_open():
    class Channel:
        is_closed = False

        def __aiter__(self):
            return self

        async def __anext__(self):
            return 1

        async def aclose(self):
            self.is_closed = True

    async def consume():
        channel = Channel()
        stream = opmap(mode="async", workers=2, progress=False)(double_async).stream(channel)
        await anext(stream)
        await stream.aclose()
        return channel.is_closed

    assert not asyncio.run(consume())


@pytest.mark.parametrize("name", ["thread", "process"])
def test_a_stream_that_is_dropped_cleans_up(name, clean_surroundings):
    mapped = opmap(mode=name, workers=2, progress=False)(double)
    for outcome in mapped.stream(itertools.count()):
        if outcome.index == 10:
            break
    del outcome
    gc.collect()
    assert surroundings() == clean_surroundings


def test_a_stream_that_is_not_read_starts_nothing(mode, journal, clean_surroundings):
    def items():
        journal.add("pulled")
        yield 1

    mapped = opmap(**mode.options)(mode.define(lambda item: journal.add("ran")))
    stream = mapped.stream(items())
    assert surroundings() == clean_surroundings
    del stream
    gc.collect()
    assert journal.lines() == []


def test_one_is_a_single_call_under_the_same_policies(mode, journal):
    def work(item, *, plus=0):
        journal.add(item)
        if journal.count(item) < 3:
            raise SpoiledError(item)
        return item + plus

    mapped = opmap(**mode.options, min_delay=0.01)(mode.define(work))
    assert one(mapped, 1, plus=10) == 11
    assert mapped.stats.snapshot() == CallStats(calls=1, attempts=3, retries=2)


def test_one_raises_the_error_of_the_function(mode):
    mapped = opmap(**mode.options, retries=0)(mode.define(fail_on_odd))
    with pytest.raises(TwoPartError):
        one(mapped, 1)


def test_run_inside_a_running_loop_is_refused_for_async_functions():
    mapped = opmap(mode="async", progress=False)(double_async)

    async def main():
        with pytest.raises(RuntimeError):
            mapped.run([1])

    asyncio.run(main())
    gc.collect()  # a coroutine that was never awaited warns here


def test_a_method_can_be_a_map(mode):
    class Scale:
        def __init__(self, factor):
            self.factor = factor

        def _scale(self, item, *, plus=0):
            """Scale one number."""
            return item * self.factor + plus

        scale = opmap(**mode.options)(mode.define(_scale))

    scale = Scale(10)
    assert mode.run(scale.scale, [1, 2]) == [10, 20]
    assert mode.run(scale.scale, [1, 2], plus=1) == [11, 21]
    assert [outcome.result for outcome in mode.stream(scale.scale, [1, 2])] == [10, 20]
    assert one(scale.scale, 3) == 30
    assert scale.scale.__doc__ == "Scale one number."


def test_a_method_of_the_class_maps_over_instances():
    class Scale:
        def __init__(self, factor):
            self.factor = factor

        @opmap(mode="thread", workers=2, progress=False)
        def scale(self, item):
            return item * self.factor

    assert Scale.scale([Scale(2), Scale(3)], 7) == [14, 21]


class Scaled:
    """How a class method and a static method are written that are maps."""

    factor = 10

    def __init_subclass__(cls, *, mode):
        cls.by_class = classmethod(opmap(**mode.options)(mode.define(lambda cls, item: item * cls.factor)))
        cls.by_none = staticmethod(opmap(**mode.options)(mode.define(double)))


def called(mode, function, items):
    """As a user writes it, without `run`."""
    if not mode.is_async:
        return function(items)

    async def call():
        return await function(items)

    return asyncio.run(call())


def test_a_class_method_and_a_static_method_can_be_maps(mode):
    class Scale(Scaled, mode=mode):
        pass

    assert called(mode, Scale.by_class, [1, 2]) == [10, 20]
    assert called(mode, Scale().by_class, [1, 2]) == [10, 20]
    assert mode.run(Scale.by_none, [1, 2]) == [2, 4]
    assert mode.run(Scale().by_none, [1, 2]) == [2, 4]


def test_a_class_method_is_a_map_where_python_does_not_bind_it(mode):
    """From Python 3.13 on this is all that `classmethod` does."""

    class Scale(Scaled, mode=mode):
        pass

    bound = types.MethodType(vars(Scale)["by_class"].__func__, Scale)
    assert called(mode, bound, [1, 2]) == [10, 20]
    with pytest.raises(TypeError, match=r"write opero\.control\(Class\..*\)\.stream\(items\)"):
        mode.run(bound, [1, 2])


BINDINGS = {
    "by Python": getattr,
    "as from Python 3.13 on": lambda cls, name: types.MethodType(vars(cls)[name].__func__, cls),
    "by an instance": lambda cls, name: getattr(cls(), name),
}


@pytest.mark.parametrize("binding", BINDINGS)
def test_control_of_a_class_method_has_all_that_a_map_has(mode, binding):
    class Scale(Scaled, mode=mode):
        pass

    its = control(BINDINGS[binding](Scale, "by_class"))
    assert its.run([1, 2]) == [10, 20]
    assert [outcome.result for outcome in mode.stream(its, [1, 2])] == [10, 20]
    assert one(its, 3) == 30
    assert its.starmap.run([(1,)]) == [10]
    with its.pool():
        assert its.run([1]) == [10]
    assert its.with_options(retries=0).run([1]) == [10]
    assert its.stats.calls == 8


def test_control_of_a_static_method_has_all_that_a_map_has(mode):
    class Scale(Scaled, mode=mode):
        pass

    for its in (control(Scale.by_none), control(Scale().by_none)):
        assert its.run([1, 2]) == [2, 4]
        assert [outcome.result for outcome in mode.stream(its, [1, 2])] == [2, 4]
        assert one(its, 3) == 6


def test_a_subclass_is_the_class_of_its_class_method(mode):
    class Scale(Scaled, mode=mode):
        pass

    class Large(Scale, mode=mode):
        factor = 100

    assert control(Large.by_class).run([1]) == [100]
    assert control(types.MethodType(vars(Scale)["by_class"].__func__, Large)).run([1]) == [100]


class Color(enum.Enum):
    red = 1
    blue = 2


def test_a_class_can_be_the_items(mode):
    assert called(mode, opmap(**mode.options)(mode.define(lambda color: color.name)), Color) == ["red", "blue"]


def test_a_cached_method_keeps_instances_apart_and_none_alive(mode, journal):
    class Scale:
        def __init__(self, factor):
            self.factor = factor

        def _scale(self, item):
            journal.add(item)
            return item * self.factor

        scale = opmap(**mode.options, cache=True)(mode.define(_scale))

    by_two, by_three = Scale(2), Scale(3)
    for _ in range(2):
        assert mode.run(by_two.scale, [1, 2]) == [2, 4]
        assert mode.run(by_three.scale, [1, 2]) == [3, 6]
    assert Counter(journal.lines()) == {"1": 2, "2": 2}
    watch = weakref.ref(by_two)
    del by_two
    gc.collect()
    assert watch() is None


class Tripler:
    """A callable object."""

    def __call__(self, item):
        return item * 3


class AsyncTripler:
    """An object with an async ``__call__``."""

    async def __call__(self, item):
        return item * 3


def times(factor, item):
    return item * factor


async def times_async(factor, item):
    return item * factor


@pytest.mark.parametrize("name", ["thread", "process"])
@pytest.mark.parametrize("function", [functools.partial(times, 3), Tripler(), Tripler().__call__])
def test_other_callables_than_functions_can_be_maps(name, function):
    assert opmap(mode=name, workers=2, progress=False)(function)([1, 2]) == [3, 6]


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("function", [functools.partial(times_async, 3), AsyncTripler(), AsyncTripler().__call__])
def test_other_async_callables_than_functions_can_be_maps(name, function):
    assert opmap(mode=name, workers=2, progress=False)(function).run([1, 2]) == [3, 6]


def test_a_map_carries_the_name_and_text_of_its_function(mode):
    def work(item):
        """Do it."""

    mapped = opmap(**mode.options)(mode.define(work))
    assert mapped.__name__ == "work"
    assert mapped.__doc__ == "Do it."
    assert mapped.__module__ == __name__
    assert callable(mapped.__wrapped__)


# How fast items are pulled, and how many run


def test_items_are_pulled_only_as_fast_as_they_are_finished(mode, journal):
    """However long the input is, a slow consumer finds a few items ahead of it."""

    def items():
        for item in range(5_000):
            journal.add("pulled")
            yield item

    def work(item):
        time.sleep(0.01)
        return journal.count("pulled")

    options = {"pool_options": {"concurrency": 2}} if mode.name == "async_process" else {}
    mapped = opmap(**mode.options, **options)(mode.define(work))
    ahead = []

    def note(outcome):
        time.sleep(0.02)
        ahead.append(max(outcome.result, journal.count("pulled")) - outcome.index)
        return outcome.index == 15

    def consume():
        stream = mapped.stream(items())
        any(note(outcome) for outcome in stream)
        stream.close()

    async def consume_async():
        stream = mapped.stream(items())
        while not note(await anext(stream)):
            pass
        await stream.aclose()

    if mode.is_async:
        asyncio.run(consume_async())
    else:
        consume()
    assert len(ahead) == 16
    assert max(ahead) <= 12  # two workers; async_process has four places


SLOW = 0.03  # seconds; more than a map pulls before it looks at its results


@pytest.mark.parametrize("cache", [False, True])
def test_a_slow_input_does_not_delay_what_is_finished(mode, cache):
    """Whether the batches have grown on fast items before, or the items end at once because they are cached."""
    pulled = []
    fast = 0 if cache else 2_000

    def items():
        for item in range(fast + 12):
            if item >= fast:
                time.sleep(SLOW)
                pulled.append(item)
            yield item

    mapped = opmap(**mode.options, cache=cache)(mode.define(double))
    if cache:
        mode.run(mapped, range(12))
    ahead = []

    def see(outcome):
        if outcome.index >= fast:
            ahead.append(len(pulled) - (outcome.index - fast))

    mode.each(see, mapped, items())
    assert len(ahead) == 12
    assert ahead[0] <= 6  # two workers with two batches each; the last of these may wait in the worker
    assert pulled == [*range(fast, fast + 12)]


def test_an_async_input_is_pulled_only_as_fast_as_items_are_finished(mode, journal):
    async def items():
        for item in range(5_000):
            journal.add("pulled")
            yield item

    async def work(item):
        await asyncio.sleep(0.01)
        ahead = journal.count("pulled") - journal.count("done")
        journal.add("done")
        return ahead

    options = {"pool_options": {"concurrency": 2}} if mode.name == "async_process" else {}
    mapped = opmap(**mode.options, **options)(work)

    async def consume():
        stream = mapped.stream(items())
        ahead = [(await anext(stream)).result for _ in range(16)]
        await stream.aclose()
        return ahead

    assert max(asyncio.run(consume())) <= 8  # two workers; async_process has four places


class Tracked:
    """An item whose life can be watched."""


def watched(count: int, seen: list[int]):
    """So many items; ``seen`` gets how many of them were alive at each moment."""
    alive: weakref.WeakSet[Tracked] = weakref.WeakSet()
    for _ in range(count):
        item = Tracked()
        alive.add(item)
        seen.append(len(alive))
        yield item
        del item


def test_a_map_holds_only_the_items_in_flight(mode):
    seen: list[int] = []
    mapped = opmap(**mode.options)(mode.define(lambda item: time.sleep(0.0002)))
    assert len(mode.run(mapped, watched(1500, seen))) == 1500
    assert len(seen) == 1500
    assert max(seen) <= 1000


def test_an_ordered_stream_holds_a_bounded_number_of_items_while_the_first_one_runs():
    """What ended early waits for the first item, but the input is not taken up without end meanwhile."""
    too_many = 30_000
    pulled = [0]
    opened = threading.Event()

    @opmap(mode="thread", workers=2, progress=False)
    def work(item):
        if item == 0:
            opened.wait(PATIENCE)

    def items():
        for pulled[0] in range(2 * too_many):
            yield pulled[0]

    def open_when_the_input_rests():
        before = -1
        while before < pulled[0] < too_many:
            before = pulled[0]
            time.sleep(0.2)
        opened.set()

    opener = threading.Thread(target=open_when_the_input_rests)
    opener.start()
    stream = work.stream(items())
    next(stream)
    most = pulled[0]
    stream.close()
    opener.join()
    assert 100 < most < too_many


def test_as_many_items_run_together_as_there_are_workers(mode, journal):
    @opmap(**{**mode.options, "workers": 3}, **one_at_a_time(mode.name))
    async def work(item):
        journal.add("+")
        await eventually(lambda: journal.count("+") >= 3)
        await asyncio.sleep(0.02)
        journal.add("-")

    work.run(range(9))
    assert most_together(journal.lines()) == 3


def one_at_a_time(name: str) -> dict[str, Any]:
    return {"pool_options": {"concurrency": 1}} if name == "async_process" else {}


def test_the_default_number_of_workers_fits_the_mode(mode, journal):
    cpus = len(os.sched_getaffinity(0))
    workers = {"thread": min(32, cpus + 4), "async": 100}.get(mode.name, cpus)

    @opmap(mode=mode.name, progress=False, **one_at_a_time(mode.name))
    async def work(item):
        journal.add("+")
        await eventually(lambda: journal.count("+") >= workers)
        await asyncio.sleep(0.02)
        journal.add("-")

    work.run(range(workers + 20))
    assert most_together(journal.lines()) == workers


@pytest.mark.parametrize("name", ["process", "async_process"])
def test_each_worker_is_a_process_of_its_own(name, journal):
    @opmap(mode=name, workers=3, progress=False, **one_at_a_time(name))
    async def work(item):
        journal.add("+")
        await eventually(lambda: journal.count("+") >= 3)
        return os.getpid()

    pids = set(work.run(range(9)))
    assert len(pids) == 3
    assert os.getpid() not in pids


def test_each_process_of_async_process_mode_runs_several_coroutines(journal):
    @opmap(mode="async_process", workers=1, progress=False, pool_options={"concurrency": 5})
    async def work(item):
        journal.add("+")
        await eventually(lambda: journal.count("+") >= 5)
        await asyncio.sleep(0.02)
        journal.add("-")

    work.run(range(10))
    assert most_together(journal.lines()) == 5


def test_no_process_of_async_process_mode_runs_more_coroutines_than_it_may(journal):
    """Not even when the items are so fast that they are sent ahead."""

    @opmap(mode="async_process", workers=2, progress=False, pool_options={"concurrency": 2})
    async def work(item):
        journal.add(f"+{os.getpid()}")
        await asyncio.sleep(0.001)
        journal.add(f"-{os.getpid()}")

    work.run(range(100))
    running: Counter[str] = Counter()
    most = 0
    for line in journal.lines():
        running[line[1:]] += 1 if line[0] == "+" else -1
        most = max(most, *running.values())
    assert most == 2


# What goes wrong around a map


def test_an_error_of_the_input_is_raised_and_everything_is_cleaned(mode, clean_surroundings):
    def items():
        yield from range(5)
        raise SpoiledError("input")

    mapped = opmap(**mode.options)(mode.define(double))
    with pytest.raises(SpoiledError, match="input"):
        mode.run(mapped, items())
    assert surroundings() == clean_surroundings
    with pytest.raises(SpoiledError, match="input"):
        mode.stream(mapped, items())
    assert surroundings() == clean_surroundings
    assert mode.run(mapped, range(3)) == [0, 2, 4]


@pytest.mark.parametrize("name", MODES)
def test_an_error_of_an_async_input_is_raised_and_everything_is_cleaned(name):
    async def items():
        for item in range(5):
            yield item
        raise SpoiledError("input")

    mapped = opmap(mode=name, workers=2, progress=False)(double_async)

    async def main():
        with pytest.raises(SpoiledError, match="input"):
            await mapped(items())
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_cancellation_that_an_async_input_meets_is_raised():
    @opmap(mode="async", workers=2, progress=False)
    async def work(item):
        return item

    async def items():
        yield 1
        task = asyncio.get_running_loop().create_future()
        task.cancel()
        await task

    async def main():
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(work(items()), 10)

    asyncio.run(main())


def test_cancelling_an_awaited_map_cleans_everything(mode, journal, clean_surroundings):
    @opmap(**mode.options)
    async def work(item):
        journal.add("+")
        await asyncio.sleep(0.1)  # short, because a thread cannot be stopped

    async def main():
        task = asyncio.create_task(work(itertools.count()))
        await eventually(lambda: journal.count("+") >= 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert surroundings() == clean_surroundings

    asyncio.run(main())


def test_cancelling_async_mode_cancels_its_running_items(journal):
    @opmap(mode="async", workers=2, progress=False)
    async def work(item):
        journal.add("+")
        try:
            await asyncio.Event().wait()
        finally:
            journal.add("cancelled")

    async def main():
        task = asyncio.create_task(work(range(10)))
        await eventually(lambda: journal.count("+") >= 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert Counter(journal.lines()) == {"+": 2, "cancelled": 2}


def test_a_map_after_a_failed_one_works(mode):
    mapped = opmap(**mode.options, retries=0, return_exceptions=False)(mode.define(fail_on_odd))
    for _ in range(3):
        with pytest.raises(TwoPartError):
            mode.run(mapped, range(10))
        assert mode.run(mapped, [0, 2]) == [0, 2]


def test_a_closed_stream_gives_up_the_items_that_others_may_wait_for(mode, journal):
    """An item in its backoff would otherwise be computed by nobody and awaited by all."""

    def work(item):
        journal.add(item)
        if item == 1 and journal.count(1) == 1:
            raise SpoiledError(item)
        while not journal.count(1):
            time.sleep(0.001)
        return item

    mapped = opmap(**mode.options, ordered=False, cache=True, min_delay=30, jitter=False)(mode.define(work))

    async def consume():
        stream = mapped.stream([1, 2])
        first = await anext(stream)
        await stream.aclose()
        return first

    if mode.is_async:
        first = asyncio.run(consume())
    else:
        stream = mapped.stream([1, 2])
        first = next(stream)
        stream.close()
    assert first.item == 2
    started = time.monotonic()
    assert mode.run(mapped, [1]) == [1]
    assert time.monotonic() - started < 10


def test_a_closed_stream_gives_its_places_at_the_rate_limit_back():
    mapped = opmap(mode="thread", workers=8, progress=False, rate_limit=2, rate_limit_options={"max_burst": 1})(double)
    stream = mapped.stream(range(100))
    next(stream)  # the next ones stand in line now
    stream.close()
    started = time.monotonic()
    assert mapped([1]) == [2]
    assert time.monotonic() - started < 1.5


# Where a map may be used


@pytest.mark.parametrize("name", ["thread", "process"])
def test_a_def_map_works_inside_a_running_loop(name):
    mapped = opmap(mode=name, workers=2, progress=False)(double)

    async def main():
        return mapped([1, 2, 3])

    assert asyncio.run(main()) == [2, 4, 6]


def test_two_async_maps_run_side_by_side_in_one_loop(mode, journal):
    @opmap(**{**mode.options, "workers": 1})
    async def work(item):
        journal.add(item)
        other = "b" if item == "a" else "a"
        await eventually(lambda: journal.count(other))
        return item

    async def main():
        return await asyncio.gather(work(["a"]), work(["b"]))

    assert asyncio.run(main()) == [["a"], ["b"]]


def test_a_map_works_inside_a_thread(mode):
    mapped = opmap(**{**mode.options, "workers": 1})(mode.define(double))
    results = []
    thread = threading.Thread(target=lambda: results.extend(mode.run(mapped, range(20))))
    thread.start()
    thread.join()
    assert results == [n * 2 for n in range(20)]


def test_one_map_can_be_used_by_several_threads_at_once(mode):
    mapped = opmap(**{**mode.options, "workers": 1}, cache=True)(mode.define(double))
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda: results.append(mode.run(mapped, range(30)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[n * 2 for n in range(30)]] * 3
    assert mapped.stats.calls == 90
    assert mapped.stats.attempts == 30


@pytest.mark.parametrize("inner", MODES)
@pytest.mark.parametrize("outer", ["thread", "process"])
def test_a_map_works_inside_a_worker_of_another_map(outer, inner):
    inner_map = opmap(mode=inner, workers=1, progress=False)(double_async if inner.startswith("async") else double)

    @opmap(mode=outer, workers=2, progress=False, retries=0, return_exceptions=False)
    def sums(item):
        return sum(inner_map.run(range(item)))

    assert sums([2, 3]) == [2, 6]


@pytest.mark.parametrize("inner", MODES)
@pytest.mark.parametrize("outer", ["thread", "process", "async", "async_process"])
def test_an_async_map_works_inside_a_worker_of_another_one(outer, inner):
    inner_map = opmap(mode=inner, workers=1, progress=False)(double_async)

    @opmap(mode=outer, workers=2, progress=False, retries=0, return_exceptions=False)
    async def sums(item):
        return sum(await inner_map(range(item)))

    assert sums.run([2, 3]) == [2, 6]
