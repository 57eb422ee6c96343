"""Functions that take lists of items and return lists of results: `batch_size`."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from opero import AllFailedError, MisuseError, WorkerCrashedError, opmap
from opero.concurrency import scheduler


class SpoiledError(Exception):
    """A user's error."""


@pytest.fixture
def lists(mode, monkeypatch):
    """Make a map of a function of lists, which are full as long as there are items, however busy the machine is."""
    monkeypatch.setattr(scheduler, "BATCH_SECONDS", 60)

    def make(function, **options):
        options = {"retries": 0, "batch_size": 3, "return_exceptions": True, **options}
        if options["retries"]:
            options["min_delay"] = 0
        if "default" in options:
            del options["return_exceptions"]
        return opmap(**{**mode.options, **options})(mode.define(function))

    return make


def doubled(items):
    return [2 * item for item in items]


def test_the_function_gets_lists_of_up_to_so_many_items(mode, lists, journal):
    def work(items):
        journal.add(len(items))
        assert type(items) is list
        return doubled(items)

    mapped = lists(work)
    results = mode.run(mapped, range(8))
    assert results == [2 * item for item in range(8)]
    assert sorted(journal.lines()) == ["2", "3", "3"]
    assert (mapped.stats.calls, mapped.stats.attempts) == (8, 3)


def test_the_first_list_is_full_also_when_a_map_takes_long_to_begin():
    seen = []

    def slowly_made():
        time.sleep(0.05)
        return ThreadPoolExecutor(1)

    @opmap(mode=slowly_made, batch_size=3)
    def work(items):
        seen.append(len(items))
        return doubled(items)

    assert work(range(6)) == [0, 2, 4, 6, 8, 10]
    assert seen == [3, 3]


def test_each_item_has_an_outcome(mode, lists):
    outcomes = mode.stream(lists(doubled), list("abcd"))
    assert [(o.index, o.item, o.result, o.attempts, o.cached) for o in outcomes] == [
        (index, item, 2 * item, 1, False) for index, item in enumerate("abcd")
    ]


def test_arguments_go_to_every_call(mode, lists):
    def work(items, factor, *, plus=0):
        return [item * factor + plus for item in items]

    assert mode.run(lists(work), range(4), factor=3, plus=1) == [1, 4, 7, 10]


def test_no_item_is_no_call(mode, lists):
    mapped = lists(doubled)
    assert mode.run(mapped, []) == []
    assert mapped.stats.attempts == 0


def test_the_cache_is_asked_item_by_item_and_only_missing_ones_are_sent(mode, lists, journal):
    def work(items):
        for item in items:
            journal.add(item)
        return doubled(items)

    mapped = lists(work, cache=True)
    assert mode.run(mapped, [1, 2, 3, 4]) == [2, 4, 6, 8]
    assert mode.run(mapped, [5, 4, 3, 6, 2, 7, 5]) == [10, 8, 6, 12, 4, 14, 10]
    assert sorted(journal.lines()) == list("1234567")
    assert mapped.stats.hits == 4
    assert mapped.cache_delete(7) is True


def test_a_disk_cache_is_asked_item_by_item(mode, lists, disk_backend, journal):
    def work(items):
        for item in items:
            journal.add(item)
        return doubled(items)

    mapped = lists(work, **disk_backend.options, cache_namespace=disk_backend.namespace())
    assert mode.run(mapped, [1, 2, 3, 4]) == [2, 4, 6, 8]
    assert mode.run(mapped, [5, 4, 3, 6, 2, 7, 5]) == [10, 8, 6, 12, 4, 14, 10]
    assert sorted(journal.lines()) == list("1234567")


def test_equal_items_are_sent_once(mode, lists, journal):
    def work(items):
        for item in items:
            journal.add(item)
        return doubled(items)

    assert mode.run(lists(work, cache=True), [1, 1, 1, 2, 2, 1]) == [2, 2, 2, 4, 4, 2]
    assert sorted(journal.lines()) == ["1", "2"]


def test_a_call_that_raises_is_tried_again_as_a_whole(mode, lists, journal):
    def work(items):
        journal.add(items)
        if journal.lines().count(str(items)) == 1:
            raise SpoiledError
        return doubled(items)

    mapped = lists(work, retries=1)
    results = mode.stream(mapped, range(6))
    assert [outcome.result for outcome in results] == [0, 2, 4, 6, 8, 10]
    assert {outcome.attempts for outcome in results} == {2}
    assert sorted(journal.lines()) == ["[0, 1, 2]"] * 2 + ["[3, 4, 5]"] * 2
    assert (mapped.stats.calls, mapped.stats.attempts, mapped.stats.retries) == (6, 4, 2)


def test_a_call_that_fails_fails_all_its_items(mode, lists):
    def work(items):
        if 4 in items:
            raise SpoiledError
        return doubled(items)

    mapped = lists(work)
    results = mode.run(mapped, range(7))
    assert results.ok == [0, 2, 4, 12]
    assert [(outcome.item, type(outcome.error)) for outcome in results.failed] == [
        (item, SpoiledError) for item in (3, 4, 5)
    ]
    assert mapped.stats.failures == 3


def test_an_error_of_a_list_says_which_items_it_was(mode, lists):
    def work(items):
        raise SpoiledError

    first, *_ = mode.run(lists(work), range(3))
    assert "opero: this was item 0 of the map, and 2 more in one list" in first.__notes__


def test_an_error_of_a_predicate_ends_the_call_for_all_items_that_it_may_concern(mode, lists):
    def predicate(error):
        raise LookupError

    def work(items):
        return [SpoiledError() if item else 0 for item in items]

    results = mode.run(lists(work, retries=2, retry_on=predicate), range(3))
    assert [type(result) for result in results] == [int, LookupError, LookupError]


def test_what_tenacity_supplies_in_place_of_an_error_is_a_list(mode, lists):
    def work(items):
        return [SpoiledError() if item else 0 for item in items]

    options = {"retry_error_callback": lambda state: [-1, -2]}
    assert mode.run(lists(work, retries=1, retry_options=options), range(3)) == [0, -1, -2]


def test_a_returned_exception_is_that_items_and_is_tried_again_without_the_others(mode, lists, journal):
    def work(items):
        journal.add(items)
        return [SpoiledError(item) if item % 2 and len(journal.lines()) < 2 else 2 * item for item in items]

    mapped = lists(work, retries=2, batch_size=4, cache=True)
    assert mode.run(mapped, range(4)) == [0, 2, 4, 6]
    assert journal.lines() == ["[0, 1, 2, 3]", "[1, 3]"]


def test_items_whose_exceptions_are_not_to_be_retried_end_with_these(mode, lists, journal):
    def work(items):
        journal.add(items)
        return [{0: 0, 1: ValueError(1), 2: SpoiledError(2)}[item] for item in items]

    results = mode.run(lists(work, retries=2, retry_on=SpoiledError), range(3))
    assert [(outcome.item, repr(outcome.error), outcome.attempts) for outcome in results.failed] == [
        (1, "ValueError(1)", 1),
        (2, "SpoiledError(2)", 3),
    ]
    assert journal.lines() == ["[0, 1, 2]", "[2]", "[2]"]


def test_a_default_stands_for_each_item_that_failed(mode, lists):
    def work(items):
        return [SpoiledError() if item % 2 else item for item in items]

    results = mode.run(lists(work, default=-1), range(4))
    assert results == [0, -1, 2, -1]
    assert results.ok == [0, 2]


def test_candidates_are_tried_with_the_items_that_have_no_result(mode, lists, journal):
    def work(items, key):
        journal.add([key, items])
        if key == "bad":
            raise SpoiledError
        return [SpoiledError() if key == "poor" and item % 2 else f"{item} by {key}" for item in items]

    results = mode.run(lists(work, arg_fallback="key"), range(3), key=["bad", "poor", "good"])
    assert results == ["0 by poor", "1 by good", "2 by poor"]
    assert journal.lines() == ["['bad', [0, 1, 2]]", "['poor', [0, 1, 2]]", "['good', [1]]"]


def test_items_that_no_candidate_can_do_share_an_all_failed_error(mode, lists):
    def work(items, key):
        raise SpoiledError

    results = mode.run(lists(work, arg_fallback="key"), range(2), key=["a", "b"])
    assert [type(error) for error in results] == [AllFailedError] * 2


def test_a_call_takes_one_slot(mode, lists):
    mapped = lists(doubled, rate_limit=["2/hour", "1000/s"], total_timeout=5)
    assert mode.run(mapped, range(6)) == doubled(range(6))
    assert mapped.stats.attempts == 2


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ([1, 2], "a list of 2"),
        ("abc", "str"),
        ({1: 1, 2: 2, 3: 3}, "dict"),
        (None, "NoneType"),
        (5, "int"),
        (pd.DataFrame({"x": [1, 2, 3], "y": [1, 2, 3]}), "DataFrame"),
        (pd.DataFrame({"x": [1, 2, 3], "y": [1, 2, 3], "z": [1, 2, 3]}), "DataFrame"),
    ],
    ids=["too few", "text", "mapping", "nothing", "number", "frame", "square frame"],
)
def test_what_is_no_list_of_as_many_results_is_a_misuse(mode, lists, result, words):
    mapped = lists(lambda items: result, retries=3)
    results = mode.run(mapped, range(3))
    assert [type(error) for error in results] == [MisuseError] * 3
    assert f"got a list of 3 and returned {words}; return a list with a result for each item" in str(results[0])
    assert mapped.stats.attempts == 1


def test_a_column_of_pandas_is_a_list_of_results(mode, lists):
    results = mode.run(lists(lambda items: pd.Series(items) * 2), range(4))
    assert results == [0, 2, 4, 6]


def test_rows_of_an_array_are_results(mode, lists):
    results = mode.run(lists(lambda items: np.array([[item, item] for item in items])), range(4))
    assert [row.tolist() for row in results] == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_a_bad_item_stops_a_map_that_returns_no_exceptions(mode, lists):
    def work(items):
        return [SpoiledError(item) if item == 4 else item for item in items]

    with pytest.raises(SpoiledError):
        mode.run(lists(work, return_exceptions=False), itertools.count())


@pytest.mark.parametrize("name", ["process", "async_process"])
def test_a_crash_is_charged_to_all_items_of_its_call(name):
    def work(items):
        if 1 in items:
            os._exit(3)
        return items

    async def work_async(items):
        return work(items)

    function = work if name == "process" else work_async
    options = {"pool_options": {"concurrency": 1}} if name == "async_process" else {}
    mapped = opmap(mode=name, workers=2, progress=False, retries=0, batch_size=2, return_exceptions=True, **options)(
        function
    )
    results = mapped.run(range(6))
    assert results.ok == [2, 3, 4, 5]
    assert [type(outcome.error) for outcome in results.failed] == [WorkerCrashedError] * 2


def test_the_single_call_is_one_of_a_list(mode, lists):
    mapped = lists(doubled, cache=True)

    def once(item):
        if not mode.is_async:
            return mapped.one(item)

        async def call():
            return await mapped.one(item)

        return asyncio.run(call())

    assert once(3) == 6
    assert mode.run(mapped, [3]) == [6]
    assert (mapped.stats.hits, mapped.stats.attempts) == (1, 1)
    failing = lists(lambda items: [SpoiledError()])
    mapped = failing
    with pytest.raises(SpoiledError):
        once(1)


def test_a_method_takes_lists():
    class Client:
        factor = 3

        @opmap(mode="thread", batch_size=2, progress=False)
        def scale(self, items):
            return [self.factor * item for item in items]

    assert Client().scale([1, 2, 3]) == [3, 6, 9]
    assert Client().scale.one(1) == 3


def test_items_of_a_slow_input_wait_while_a_call_runs_and_not_for_others():
    """A list is sent that is not full, if nothing else is under way."""
    first = asyncio.Event()
    seen = []

    @opmap(mode="async", workers=1, batch_size=3, progress=False)
    async def work(items):
        seen.append(items)
        first.set()
        return items

    async def items():
        yield 0
        await first.wait()
        for item in range(1, 7):
            yield item

    assert work.run(items()) == list(range(7))
    assert seen[0] == [0]
    assert max(map(len, seen)) <= 3


def test_starmap_is_refused():
    mapped = opmap(mode="thread", batch_size=2, progress=False)(doubled)
    with pytest.raises(TypeError, match="batch_size"):
        mapped.starmap([(1,)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"retry_if_result": bool}, "return an exception in place of the result"),
        ({"arg_fallback": "items"}, "name another one"),
        ({"batch_size": 0}, "1 or more"),
    ],
    ids=str,
)
def test_what_cannot_apply_to_lists_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        opmap(**{"mode": "thread", "batch_size": 2, **options})(doubled)
