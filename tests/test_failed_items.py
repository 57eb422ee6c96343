"""Failures of items are heard: by a warning where nobody said what shall become of them, and by their notes."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import warnings

import pytest

from opero import AllFailedError, Cache, FailedItemsWarning, Results, opmap
from opero.concurrency import get_parallel_executor, get_parallel_map_decorator

OPTIONS = {"mode": "serial", "progress": False, "retries": 0}


class SpoiledError(Exception):
    """A user's error."""


def fail_on_odd(item):
    if item % 2:
        raise SpoiledError(item)
    if item < 0:
        raise KeyError(item)
    return 10 * item


def heard(call):
    """What a call returns, and the warnings about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, caught


# The warning


def test_one_warning_says_how_many_items_failed_by_which_errors_and_which_was_the_first(mode):
    mapped = opmap(**mode.options, retries=0)(mode.define(fail_on_odd))
    results, caught = heard(lambda: mode.run(mapped, [0, 1, 2, 3, -4]))
    (warning,) = caught
    assert warning.category is FailedItemsWarning
    name = mapped.__qualname__
    assert str(warning.message) == (
        f"{name}: 3 of 5 items failed: SpoiledError (2), KeyError (1); the first was item 1"
    )
    assert warning.message.results is results
    assert results.ok == [0, 20]


def test_a_map_that_fails_as_a_whole_is_heard(mode):
    mapped = opmap(**mode.options, ordered=False, retries=0)(mode.define(fail_on_odd))
    _, caught = heard(lambda: mode.run(mapped, [1] * 1000))
    (warning,) = caught
    assert str(warning.message).endswith(": 1000 of 1000 items failed: SpoiledError (1000); the first was item 0")


@pytest.mark.parametrize("items", [[], [0, 2]], ids=["no item", "no failure"])
def test_where_nothing_failed_nothing_is_said(mode, items):
    assert mode.run(opmap(**mode.options)(mode.define(fail_on_odd)), items) == [10 * item for item in items]


@pytest.mark.parametrize("options", [{"return_exceptions": True}, {"default": None}], ids=["exceptions", "default"])
def test_who_says_what_becomes_of_failures_hears_no_warning(mode, options):
    results = mode.run(opmap(**mode.options, retries=0, **options)(mode.define(fail_on_odd)), [0, 1])
    assert len(results.failed) == 1


def test_a_wrong_program_is_heard_in_spite_of_a_default(mode):
    """Its errors are in the list, not the default."""
    mapped = opmap(**mode.options, retries=0, default=None)(mode.define(fail_on_odd))
    results, caught = heard(lambda: mode.run(mapped.starmap, [(0,), (1,), (1, 2)]))
    assert [str(warning.message).partition(": ")[2] for warning in caught] == [
        "1 of 3 items failed: TypeError (1); the first was item 2"
    ]
    assert results[1] is None


def test_a_stream_says_nothing_because_its_outcomes_do(mode):
    outcomes = mode.stream(opmap(**mode.options, retries=0)(mode.define(fail_on_odd)), [0, 1])
    assert [type(outcome.error) for outcome in outcomes] == [type(None), SpoiledError]


def test_where_warnings_are_errors_it_has_the_results(mode):
    mapped = opmap(**mode.options, retries=0)(mode.define(fail_on_odd))
    with pytest.raises(FailedItemsWarning) as caught:
        mode.run(mapped, [0, 1, 2])
    assert type(caught.value.results) is Results
    assert caught.value.results.ok == [0, 20]
    assert [outcome.item for outcome in caught.value.results.failed] == [1]


def test_it_can_be_pickled():
    with pytest.raises(FailedItemsWarning) as caught:
        opmap(**OPTIONS)(fail_on_odd)([0, 1])
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.results.ok == [0]


mapped_sync = opmap(**OPTIONS)(fail_on_odd)


@opmap(**OPTIONS)
async def mapped_async(item):
    return fail_on_odd(item)


class Client:
    get = opmap(**OPTIONS)(lambda self, item: fail_on_odd(item))


async def awaited():
    return await mapped_async([1])  # the user's line


async def awaited_in_a_task():
    return await asyncio.create_task(mapped_async([1]))


WAYS = {
    "call": lambda: mapped_sync([1]),
    "run": lambda: mapped_sync.run([1]),
    "starmap": lambda: mapped_sync.starmap([(1,)]),
    "method": lambda: Client().get([1]),
    "run of async def": lambda: mapped_async.run([1]),
    "await": lambda: asyncio.run(awaited()),
    "task": lambda: asyncio.run(awaited_in_a_task()),
    "executor": lambda: get_parallel_executor("serial")(fail_on_odd, [1]),
    "decorator": lambda: get_parallel_map_decorator("serial")(fail_on_odd)([1]),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_names_the_line_of_the_user(way):
    _, caught = heard(WAYS[way])
    (warning,) = caught
    assert warning.filename == __file__
    line = WAYS[way].__code__.co_firstlineno
    assert warning.lineno == (awaited.__code__.co_firstlineno + 1 if way == "await" else line)


@pytest.mark.parametrize("make", [get_parallel_executor, get_parallel_map_decorator])
def test_a_map_without_policies_is_silent_if_it_is_told_what_to_do(make):
    made = make("serial", return_exceptions=True)
    results = made(fail_on_odd, [1]) if make is get_parallel_executor else made(fail_on_odd)([1])
    assert len(results.failed) == 1


# Notes


def notes(error):
    return [note for note in error.__notes__ if "this was item" in note]


@pytest.mark.parametrize("options", [{}, {"retries": 1, "min_delay": 0}, {"ordered": False}], ids=str)
def test_a_failed_item_has_its_index_in_a_note(mode, options):
    mapped = opmap(**{**mode.options, "retries": 0, "return_exceptions": True, **options})(mode.define(fail_on_odd))
    failed = mode.run(mapped, [0, 1, 2, 3]).failed
    assert {outcome.index: notes(outcome.error) for outcome in failed} == {
        1: ["opero: this was item 1 of the map"],
        3: ["opero: this was item 3 of the map"],
    }


def test_the_failure_that_stops_a_map_says_which_item_it_was(mode):
    mapped = opmap(**mode.options, retries=0, return_exceptions=False)(mode.define(fail_on_odd))
    with pytest.raises(SpoiledError) as caught:
        mode.run(mapped, [0, 2, 3])
    assert notes(caught.value) == ["opero: this was item 2 of the map"]


def test_items_whose_candidates_all_failed_have_their_index_in_a_note(mode):
    def fetch(item, key):
        raise SpoiledError

    mapped = opmap(**mode.options, retries=0, return_exceptions=True, arg_fallback="key")(mode.define(fetch))
    results = mode.run(mapped, [1, 2], key=["a", "b"])
    assert [type(error) for error in results] == [AllFailedError] * 2
    assert [notes(error) for error in results] == [[f"opero: this was item {index} of the map"] for index in (0, 1)]


def test_one_error_of_many_items_tells_of_the_last_one():
    error = SpoiledError()

    def work(item):
        raise error

    opmap(**OPTIONS, return_exceptions=True)(work)([1, 2, 3])
    assert notes(error) == ["opero: this was item 2 of the map"]


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Its attributes cannot be set, those of every exception included."""


@pytest.mark.parametrize("mode", ["thread", "serial", "process"])
@pytest.mark.parametrize("options", [{}, {"cache": Cache(exceptions=FrozenError)}], ids=["", "cache"])
def test_a_frozen_exception_is_the_error_of_its_item(mode, options):
    def fail(item):
        raise FrozenError

    mapped = opmap(mode=mode, progress=False, retries=0, return_exceptions=True, **options)(fail)
    for _ in range(2):
        assert [type(error) for error in mapped([1, 1, 2])] == [FrozenError] * 3


def test_a_call_outside_of_a_map_has_no_index():
    with pytest.raises(SpoiledError) as caught:
        mapped_sync.one(1)
    assert notes(caught.value) == []
