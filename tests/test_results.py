"""What a map returns: a list that also knows which items failed."""

from __future__ import annotations

import copy
import pickle
import re
import threading

import pytest

from conftest import as_async
from opero import Outcome, Results, opmap


class SpoiledError(Exception):
    """A user's error."""


def fail_on_odd(item):
    if item % 2:
        raise SpoiledError(item)
    return 10 * item


@pytest.fixture(params=[True, False], ids=["ordered", "as completed"])
def ordered(request):
    return request.param


def test_a_map_returns_a_list_with_what_failed_and_what_did_not_apart(mode, ordered):
    mapped = opmap(**mode.options, ordered=ordered, retries=1, min_delay=0, return_exceptions=True)
    results = mode.run(mapped(mode.define(fail_on_odd)), range(6))
    assert type(results) is Results
    assert isinstance(results, list)
    assert sorted(results.ok) == [0, 20, 40]
    assert sorted((o.index, o.item, o.attempts) for o in results.failed) == [(1, 1, 2), (3, 3, 2), (5, 5, 2)]
    assert all(type(outcome) is Outcome for outcome in results.failed)
    assert [o.error for o in results.failed] == [value for value in results if isinstance(value, SpoiledError)]
    if ordered:
        assert results.ok == [0, 20, 40]
        assert [outcome.index for outcome in results.failed] == [1, 3, 5]


def test_of_a_map_without_failures_all_is_ok(mode):
    results = mode.run(opmap(**mode.options)(mode.define(fail_on_odd)), [0, 2])
    assert (results, results.ok, results.failed) == ([0, 20], [0, 20], [])


def test_a_default_is_no_result(mode, ordered):
    """Nor is a true result a default because it is equal to one."""
    mapped = opmap(**mode.options, ordered=ordered, retries=0, default=0)(mode.define(fail_on_odd))
    results = mode.run(mapped, [0, 1, 2, 3])
    assert sorted(results) == [0, 0, 0, 20]
    assert sorted(results.ok) == [0, 20]
    assert sorted(outcome.item for outcome in results.failed) == [1, 3]
    assert {type(outcome.error) for outcome in results.failed} == {SpoiledError}


def test_a_map_that_raises_its_first_failure_returns_a_bare_list(mode):
    assert type(mode.run(opmap(**mode.options, return_exceptions=False)(mode.define(fail_on_odd)), [0])) is list


@pytest.mark.parametrize("as_one", [fail_on_odd, as_async(fail_on_odd)], ids=["def", "async def"])
def test_tuples_of_arguments_have_results_of_the_same_kind(as_one):
    results = opmap(mode="thread", progress=False, retries=0, return_exceptions=True)(as_one).starmap.run([(0,), (1,)])
    assert results.ok == [0]
    assert [outcome.item for outcome in results.failed] == [(1,)]


def some_results():
    return opmap(mode="serial", progress=False, retries=0, return_exceptions=True)(fail_on_odd)([2, 1])


def test_results_look_like_a_list():
    assert repr(some_results()) == "[20, SpoiledError(1)]"


@pytest.mark.parametrize(
    "again", [copy.copy, lambda results: pickle.loads(pickle.dumps(results))], ids=["copy", "pickle"]
)
def test_copies_of_results_know_what_failed(again):
    results = again(some_results())
    assert type(results) is Results
    assert results.ok == [20]
    assert [(outcome.item, repr(outcome.error)) for outcome in results.failed] == [(1, "SpoiledError(1)")]


def test_results_can_be_made_by_hand():
    """As the tests of a program do in place of a map."""
    assert Results([1, 2]).ok == [1, 2]
    assert Results([1, 2]).failed == []


def test_results_can_be_subscribed_at_run_time():
    assert Results[int].__origin__ is Results
    assert Results[int, None].__origin__ is Results


# Shown


def quick(item):
    return 10 // item


@pytest.fixture
def failed_and_not():
    mapped = opmap(mode="serial", retries=0, return_exceptions=True)(quick)
    return mapped, mapped([5, 0])


def test_an_outcome_shows_what_became_of_its_item(failed_and_not):
    mapped, results = failed_and_not
    error = re.escape(repr(results[1]))
    assert re.fullmatch(rf"\[<Outcome 1: item=0, error={error}, attempts=1, \d.* .?s>\]", repr(results.failed))
    (outcome,) = mapped.stream([5])
    assert re.fullmatch(r"<Outcome 0: item=5, result=2, attempts=1, \d.* .?s>", repr(outcome))


def test_what_an_outcome_shows_of_a_large_item_is_short():
    (outcome,) = opmap(mode="serial", cache=True)(len).stream(["x" * 10_000])
    assert len(repr(outcome)) < 250


def test_results_are_shown_as_a_list_and_in_a_notebook_with_what_failed(failed_and_not):
    _, results = failed_and_not
    assert repr(results).startswith("[2, ZeroDivisionError(")
    table = results._repr_html_()
    assert "2 items, 1 failed: ZeroDivisionError (1)" in table
    assert table.count("<tr>") == 2


def test_a_notebook_shows_results_without_failures(failed_and_not):
    mapped, _ = failed_and_not
    table = mapped([5] * 1000)._repr_html_()
    assert "1000 items, 0 failed" in table
    assert len(table) < 2000


def test_a_notebook_shows_no_markup_of_items():
    table = opmap(mode="serial", retries=0, return_exceptions=True)("{:d}".format)(["<b>"])._repr_html_()
    assert "<b>" not in table
    assert "&lt;b&gt;" in table


def test_a_notebook_shows_outcomes_and_stats_as_tables(failed_and_not):
    mapped, results = failed_and_not
    assert "<th>result</th>" in results.failed[0]._repr_html_()
    assert "<th>calls</th><th>hits</th>" in mapped.stats._repr_html_()
    assert mapped.stats._repr_html_() == mapped.stats.snapshot()._repr_html_()


COLUMNS = ["index", "item", "result", "error", "attempts", "seconds", "cached"]


def test_an_outcome_is_a_mapping_of_its_attributes(failed_and_not):
    _, results = failed_and_not
    row = dict(results.failed[0])
    assert list(row) == COLUMNS
    assert row["result"] is None
    assert row["error"] is results.failed[0].error
    with pytest.raises(KeyError):
        results.failed[0]["value"]


def test_a_frame_of_a_stream_has_a_column_for_each_attribute(mode):
    pandas = pytest.importorskip("pandas")
    mapped = opmap(**mode.options, retries=0, default=-1)(mode.define(quick))
    frame = pandas.DataFrame(mode.stream(mapped, [5, 0, 1]))
    assert list(frame.columns) == COLUMNS
    assert list(frame["result"]) == [2, -1, 10]
    assert list(frame["error"].isna()) == [True, False, True]


def test_a_frame_of_outcomes_has_the_results_themselves_and_no_copies():
    pandas = pytest.importorskip("pandas")
    (outcome,) = opmap(mode="serial")(lambda item: [item]).stream([threading.Lock()])
    assert pandas.DataFrame([outcome])["result"][0] is outcome.result
