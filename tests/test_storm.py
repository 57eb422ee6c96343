"""Maps whose worker processes are killed all the time: nothing is lost, doubled or wrong."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack

import pytest
from leftovers import descendants, storm, surroundings

from opero import WorkerCrashedError, opmap

pytestmark = pytest.mark.soak
PROCESS = pytest.mark.parametrize("mode", ["process"], indirect=True)
BOTH = pytest.mark.parametrize("mode", ["process", "async_process"], indirect=True)
# Short items travel in batches, none of which is charged with a kill; long ones alone, and need their retries.
SHORT, LONG = 2_000, 150


def seconds_of(item):
    return 0.0003 if item < SHORT else 0.008


def square(item):
    time.sleep(seconds_of(item))
    return item * item


async def square_async(item):
    await asyncio.sleep(seconds_of(item) * 10)
    return item * item


@pytest.fixture(autouse=True)
def clean_surroundings():
    before = surroundings()
    yield
    assert surroundings() == before


class InStorm:
    """A map, and what was raised by its attempts."""

    def __init__(self, mode, **options):
        self.raised: list[type] = []

        def note(error):
            self.raised.append(type(error))
            return True

        retries = {} if options.get("retries") == 0 else {"min_delay": 0.01, "max_delay": 0.1, "retry_on": note}
        function = square_async if mode.is_async else square
        self.mapped = opmap(**{**mode.options, "workers": 4, **retries, **options})(function)
        self._mode = mode

    def outcomes(self, items, count=SHORT + LONG):
        """All outcomes; none is missing and none comes twice."""
        outcomes = self._mode.stream(self.mapped, items)
        assert sorted(outcome.index for outcome in outcomes) == list(range(count))
        assert all(outcome.item == outcome.index for outcome in outcomes)
        return outcomes

    def stays_complete_and_right(self, items, count=SHORT + LONG):
        outcomes = self.outcomes(items, count)
        assert [outcome.error for outcome in outcomes if outcome.error is not None] == []
        assert [outcome.result for outcome in outcomes] == [outcome.index**2 for outcome in outcomes]


@PROCESS
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "unordered"])
def test_in_a_storm_a_map_with_retries_is_complete_and_right_ten_times_in_a_row(mode, ordered):
    in_storm = InStorm(mode, ordered=ordered)
    with storm() as victims:
        for _ in range(10):
            in_storm.stays_complete_and_right(range(SHORT + LONG))
    assert len(victims) >= 30
    assert set(in_storm.raised) == {WorkerCrashedError}


@pytest.mark.parametrize("mode", ["async_process"], indirect=True)
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "unordered"])
def test_in_a_storm_a_map_of_coroutines_is_complete_and_right(mode, ordered):
    # An item that runs alone for 80 ms is hit now and then; the last one, whose worker is the only one, mostly.
    in_storm = InStorm(mode, ordered=ordered, retries=100)
    with storm(pause=0.15) as victims:
        for _ in range(2):
            in_storm.stays_complete_and_right(range(SHORT + LONG))
    assert len(victims) >= 8
    assert set(in_storm.raised) <= {WorkerCrashedError}


@BOTH
def test_in_a_storm_a_list_is_in_input_order(mode):
    with storm():
        assert InStorm(mode, retries=20).mapped.run(range(SHORT + LONG)) == [item**2 for item in range(SHORT + LONG)]


@BOTH
def test_workers_that_take_longer_to_start_than_the_storm_leaves_them_are_started_again(mode):
    """They come from a fork server, and most are killed before they are ready."""
    weather, spared = ExitStack(), descendants()

    count = SHORT + 30

    def items():
        # On a busy machine they take longer still; some have to get through.
        pause = max(0.1, (time.monotonic() - began) / 5)
        yield from range(SHORT // 2)
        weather.enter_context(storm(spared, pause))
        yield from range(SHORT // 2, count)

    in_storm = InStorm(mode, pool_options={"start_method": "forkserver"}, retries=20)
    began = time.monotonic()
    with weather:
        in_storm.stays_complete_and_right(items(), count)
    assert set(in_storm.raised) <= {WorkerCrashedError}


@PROCESS
def test_in_a_storm_without_retries_only_crashes_fail_and_all_else_is_right(mode):
    in_storm = InStorm(mode, retries=0)
    failed = 0
    with storm():
        for _ in range(3):
            outcomes = in_storm.outcomes(range(SHORT + LONG))
            failed += sum(outcome.error is not None for outcome in outcomes)
            assert {type(outcome.error) for outcome in outcomes} <= {type(None), WorkerCrashedError}
            right = [outcome for outcome in outcomes if outcome.error is None]
            assert [outcome.result for outcome in right] == [outcome.index**2 for outcome in right]
    assert failed
    assert in_storm.mapped.stats.failures == failed


def test_in_a_storm_no_item_runs_twice_but_those_that_are_hit(journal):
    """Each takes longer than a millisecond: what has been done is known to the map before the next one begins."""

    def work(item):
        time.sleep(0.002)
        journal.add(item)
        return item

    mapped = opmap(mode="process", workers=2, retries=20, min_delay=0.001, max_delay=0.01, progress=False)(work)
    with storm() as victims:
        assert mapped(range(1_500)) == [*range(1_500)]
    assert len(victims) >= 5
    # Killed after the last line of the function and before its report, an item has run and nobody knows.
    assert len(journal.lines()) - 1_500 <= len(victims)
