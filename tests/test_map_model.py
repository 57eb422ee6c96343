"""Generated maps beside a plain loop: the same items, failures, kills and policies, and the same outcomes."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from leftovers import surroundings

from opero import CallStats, WorkerCrashedError, opmap

MODES = {"thread": 60, "process": 40, "async": 60, "async_process": 20}  # and how many maps of each
SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


class SpoiledError(Exception):
    """A user's error."""


@dataclass(frozen=True)
class Item:
    """One call: ``value``, and what its attempts do, one after the other, before it succeeds."""

    value: int
    attempts: tuple[str, ...]


@dataclass(frozen=True)
class Scenario:
    """One map, and how it is consumed."""

    items: tuple[Item, ...]
    breaks_after: int | None  # the input raises after so many items
    closes_after: int | None  # the stream is closed after so many outcomes
    retries: int
    ordered: bool
    return_exceptions: bool
    cache: bool
    workers: int
    streamed: bool
    alone: bool = True  # nothing else runs in an item's worker at the same time, or is sent there with it


ALWAYS = 99


@st.composite
def scenarios(draw, mode):
    can_kill = mode in {"process", "async_process"}
    kinds = st.sampled_from(["raise", "kill"] if can_kill else ["raise"])
    # What a killed worker had done with others is done again, uncharged: only what fails always fails as often as told.
    alone = not can_kill or draw(st.booleans())
    attempts = st.lists(kinds, max_size=3).map(tuple) if alone else kinds.map(lambda kind: (kind,) * ALWAYS)
    calm = st.builds(Item, st.integers(0, 40), st.just(()))
    item = st.one_of(calm, calm, calm, st.builds(Item, st.integers(0, 40), attempts))
    end = st.one_of(st.none(), st.none(), st.integers(0, 30))
    scenario = st.builds(
        Scenario,
        items=st.lists(item, max_size=30).map(tuple),
        breaks_after=end,
        closes_after=end,
        retries=st.integers(0, 2),
        ordered=st.booleans(),
        return_exceptions=st.sampled_from([True, True, False]),
        cache=st.booleans(),
        workers=st.integers(1, 3),
        streamed=st.booleans(),
        alone=st.just(alone),
    )
    return draw(scenario.map(with_fewer_twins))


def with_fewer_twins(scenario):
    """Equal items share their attempts: they are only kept where the first one's result answers the others."""
    seen: set[Item] = set()
    kept = []
    for item in scenario.items:
        answered = scenario.cache and len(item.attempts) <= scenario.retries
        if item not in seen or answered:
            kept.append(item)
        seen.add(item)
    return replace(scenario, items=tuple(kept))


# The function of the maps: which attempt it is, all processes find out from files.


def attempt(item, folder):
    number = next(n for n in itertools.count() if _first(Path(folder, f"{item.value}.{hash_of(item)}.{n}")))
    what = item.attempts[number] if number < len(item.attempts) else "return"
    if what == "kill":
        os._exit(1)
    if what == "raise":
        raise SpoiledError(item.value, number)
    return item.value * 2


def hash_of(item):
    return "".join(kind[0] for kind in item.attempts[:3])


def _first(path):
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


async def attempt_async(item, folder):
    await asyncio.sleep(0)
    return attempt(item, folder)


# The model


@dataclass
class Expected:
    """What a plain loop makes of the items."""

    outcomes: list[Any]  # results, and types of errors
    attempts: list[int]


def plain_loop(scenario) -> Expected:
    expected = Expected([], [])
    cached: dict[Item, Any] = {}
    for item in scenario.items[: scenario.breaks_after]:
        if item in cached:
            expected.outcomes.append(cached[item])
            expected.attempts.append(0)
            continue
        failures = item.attempts[: scenario.retries + 1]
        if len(failures) <= scenario.retries:
            expected.outcomes.append(item.value * 2)
            expected.attempts.append(len(failures) + 1)
            if scenario.cache:
                cached[item] = expected.outcomes[-1]
        else:
            expected.outcomes.append(SpoiledError if failures[-1] == "raise" else WorkerCrashedError)
            expected.attempts.append(len(failures))
    return expected


def shown(value):
    return type(value) if isinstance(value, Exception) else value


# The maps


class InputBreaksError(Exception):
    """The input has an error of its own."""


def source(scenario):
    yield from scenario.items[: scenario.breaks_after]
    if scenario.breaks_after is not None and scenario.breaks_after <= len(scenario.items):
        raise InputBreaksError


@dataclass
class Seen:
    """What came of a map."""

    outcomes: list[Any]
    error: Exception | None
    stats: CallStats


def run(mode, scenario, folder) -> Seen:
    policies: dict[str, Any] = {"retries": scenario.retries, **({"min_delay": 0} if scenario.retries else {})}
    if scenario.alone and mode in {"process", "async_process"}:
        # One item in a batch: of several, those that are quick run again after a crash.
        policies["attempt_timeout"] = 60
    if scenario.alone and mode == "async_process":
        policies["pool_options"] = {"concurrency": 1}
    mapped: Any = opmap(
        mode=mode,
        workers=scenario.workers,
        progress=False,
        ordered=scenario.ordered,
        return_exceptions=scenario.return_exceptions,
        cache=scenario.cache,
        **policies,
    )(attempt_async if mode.startswith("async") else attempt)
    gathered: list[Any] = []
    error = None
    try:
        if not scenario.streamed:
            gathered = mapped.run(source(scenario), folder)
        elif mode.startswith("async"):
            asyncio.run(consume_async(mapped.stream(source(scenario), folder), scenario.closes_after, gathered))
        else:
            consume(mapped.stream(source(scenario), folder), scenario.closes_after, gathered)
    except (SpoiledError, WorkerCrashedError, InputBreaksError) as raised:
        error = raised
    return Seen(gathered, error, mapped.stats)


def consume(stream, most, gathered):
    gathered.extend(itertools.islice(stream, most))
    stream.close()


async def consume_async(stream, most, gathered):
    if most != 0:
        async for outcome in stream:
            gathered.append(outcome)
            if len(gathered) == most:
                break
    await stream.aclose()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("mode", MODES)
def test_a_map_does_what_a_plain_loop_does(mode):
    check_maps(mode, settings(max_examples=MODES[mode], derandomize=True, **SETTINGS))


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
def test_many_maps_that_are_others_each_time_do_what_a_plain_loop_does(mode):
    check_maps(mode, settings(max_examples=3 * MODES[mode], **SETTINGS))


def check_maps(mode, how):
    before = surroundings()

    @how
    @given(scenarios(mode))
    def check(scenario):
        compare(mode, scenario)
        assert surroundings() == before

    check()


def compare(mode, scenario):
    with TemporaryDirectory() as folder:
        seen = run(mode, scenario, folder)
    expected = plain_loop(scenario)
    failures = {kind for kind in expected.outcomes if kind in (SpoiledError, WorkerCrashedError)}
    may_stop = failures if not scenario.return_exceptions else set()
    breaks = scenario.breaks_after is not None and scenario.breaks_after <= len(scenario.items)
    if seen.error is not None:
        assert type(seen.error) in may_stop | ({InputBreaksError} if breaks else set())
    if not scenario.streamed:
        check_list(scenario, seen, expected, must_raise=bool(may_stop) or breaks)
    else:
        check_stream(scenario, seen, expected)
        if scenario.closes_after is None:
            assert (seen.error is not None) is (bool(may_stop) or breaks)
    if seen.error is None and (not scenario.streamed or scenario.closes_after is None):
        assert seen.stats.calls == len(expected.outcomes)
        if not scenario.cache:
            assert seen.stats.attempts == sum(expected.attempts)
            assert seen.stats.failures == sum(kind in failures for kind in expected.outcomes)


def check_list(scenario, seen, expected, *, must_raise):
    assert (seen.error is not None) is must_raise
    if seen.error is not None:
        return
    results = [shown(result) for result in seen.outcomes]
    if scenario.ordered:
        assert results == expected.outcomes
    else:
        assert Counter(results) == Counter(expected.outcomes)


def check_stream(scenario, seen, expected):
    indexes = [outcome.index for outcome in seen.outcomes]
    assert len(set(indexes)) == len(indexes)
    if scenario.ordered:
        assert indexes == list(range(len(indexes)))
    for outcome in seen.outcomes:
        item = scenario.items[outcome.index]
        assert outcome.item == item
        got = outcome.result if outcome.error is None else type(outcome.error)
        assert got == expected.outcomes[outcome.index]
        if not scenario.cache:
            assert outcome.attempts == expected.attempts[outcome.index]
    if seen.error is None:
        all_of_it = len(expected.outcomes)
        assert len(indexes) == (all_of_it if scenario.closes_after is None else min(all_of_it, scenario.closes_after))
