"""Maps with a cache that outlives them: what is equal runs once, and what was finished never runs again."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from test_single_flight import started, until

import opero
from conftest import Mode

SECONDS = 30


@pytest.fixture(params=["thread", "process", "async"])
def mode(request):
    return Mode(request.param)


@pytest.fixture
def mapped(mode, backend):
    """Decorate a plain function; all maps of one test share their entries."""
    namespace = backend.namespace()

    def decorate(function, **more):
        options = {**mode.options, **backend.options, "cache_namespace": namespace, "retries": 0, **more}
        return opero.opmap(**options)(mode.define(function))

    return decorate


def noting(journal):
    def function(x):
        journal.add(x)
        return x * x

    return function


def test_equal_items_run_once(mode, mapped, journal):
    f = mapped(noting(journal))
    assert mode.run(f, [3, 1, 3, 2, 3, 1] * 20) == [9, 1, 9, 4, 9, 1] * 20
    assert sorted(journal.lines()) == ["1", "2", "3"]


def test_a_second_map_has_hits_only(mode, mapped, journal):
    mode.run(mapped(noting(journal)), range(50))
    before = journal.lines()
    outcomes = mode.stream(mapped(noting(journal)), range(50))
    assert [(outcome.result, outcome.cached, outcome.attempts) for outcome in outcomes] == [
        (x * x, True, 0) for x in range(50)
    ]
    assert journal.lines() == before


def test_a_map_runs_only_what_is_missing(mode, mapped, journal):
    mode.run(mapped(noting(journal)), range(0, 40, 2))
    assert mode.run(mapped(noting(journal)), range(40)) == [x * x for x in range(40)]
    assert sorted(map(int, journal.lines())) == list(range(40))


def test_failed_items_run_again_in_the_next_map(mode, mapped, journal):
    def function(x):
        journal.add(x)
        if x % 2 and journal.lines().count(str(x)) == 1:
            raise ValueError(x)
        return x

    first = mode.run(mapped(function, return_exceptions=True), range(10))
    assert [isinstance(result, ValueError) for result in first] == [bool(x % 2) for x in range(10)]
    assert mode.run(mapped(function), range(10)) == list(range(10))
    assert Counter(journal.lines()) == {str(x): 1 + x % 2 for x in range(10)}


def test_a_map_counts_hits_and_runs(mode, mapped, journal):
    f = mapped(noting(journal))
    mode.run(f, [1, 2, 1])
    mode.run(f, [1, 2, 3])
    assert (f.stats.calls, f.stats.hits, f.stats.attempts) == (6, 3, 3)
    assert f.stats.cache_errors == 0


def test_results_that_cannot_be_stored_are_results_of_the_map(mode, backend):
    choice = {**backend.cache_options, "serializer": "json"}
    options = {**mode.options, **backend.options, "cache_options": choice, "cache_namespace": backend.namespace()}
    f = opero.opmap(**options)(mode.define(lambda x: {x}))
    assert mode.run(f, range(10)) == [{x} for x in range(10)]
    assert f.stats.cache_errors >= 10


def test_what_one_map_clears_in_the_middle_of_another_is_not_stored(mode, mapped, journal, tmp_path):
    gate = tmp_path / "gate"

    def function(x):
        journal.add(x)
        until(gate.exists)
        return x

    f = mapped(function)
    running = started(mode.run, f, [1])
    until(journal.lines)
    mapped(function).cache_clear()
    gate.touch()
    assert running.result(SECONDS) == [1]
    mode.run(mapped(function), [1])
    assert journal.lines() == ["1", "1"]


def test_two_maps_at_once_run_each_item_once(mode, mapped, journal):
    maps = [started(mode.run, mapped(noting(journal)), range(30)) for _ in range(2)]
    assert [running.result(SECONDS) for running in maps] == [[x * x for x in range(30)]] * 2
    assert sorted(map(int, journal.lines())) == list(range(30))


def test_no_item_fails_when_redis_stops_and_starts_in_the_middle(mode, own_redis, journal):
    def function(x):
        journal.add(x)
        time.sleep(0.005)
        return x

    f = opero.opmap(**mode.options, **own_redis.options, cache_namespace="map", retries=0)(mode.define(function))
    running = started(mode.run, f, range(200))
    until(lambda: len(journal.lines()) > 20)
    own_redis.server.kill()
    until(lambda: len(journal.lines()) > 80)
    own_redis.server.start()
    assert running.result(SECONDS) == list(range(200))


def test_no_item_fails_when_redis_is_frozen_in_the_middle(mode, own_redis, journal):
    def function(x):
        journal.add(x)
        time.sleep(0.005)
        return x

    f = opero.opmap(**mode.options, **own_redis.options, cache_namespace="map", retries=0)(mode.define(function))
    running = started(mode.run, f, range(100))
    until(lambda: len(journal.lines()) > 20)
    own_redis.server.freeze()
    assert running.result(SECONDS) == list(range(100))


# Killed and run again

ITEMS = 60
MAP = """
import opero.core.stores.redis
opero.core.stores.redis.LEASE_SECONDS = 1.0  # else the second run would wait so long for what the killed one was doing

DEF work(x):
    time.sleep(0.02)
    note(x)
    return x * x

def main():
    mapped = opero.opmap(**OPTIONS)(work)
    if OPTIONS["mode"] != "async":
        for outcome in mapped.stream(range(60)):
            say((outcome.item, outcome.result, outcome.cached))
        return

    import asyncio

    async def stream():
        async for outcome in mapped.stream(range(60)):
            say((outcome.item, outcome.result, outcome.cached))

    asyncio.run(stream())

if __name__ == "__main__":
    main()
"""


class AsyncWorld:
    is_async = True


@pytest.mark.parametrize(
    ("name", "where"), [("thread", "disk"), ("process", "disk"), ("async", "disk"), ("thread", "redis")]
)
def test_a_map_that_was_killed_goes_on_where_it_stopped(request, start, journal, name, where):
    mode, backend = Mode(name), request.getfixturevalue(f"{where}_backend")
    options = {**mode.options, **backend.options, "cache_namespace": backend.namespace(), "ordered": False}
    world = AsyncWorld() if mode.is_async else None
    first = start(MAP, options, world=world)
    finished = [first.heard()[0] for _ in range(20)]
    finished += [item for item, _, _ in first.kill()]
    assert len(finished) < ITEMS

    said = start(MAP, options, world=world).end()
    assert sorted((item, result) for item, result, _ in said) == [(x, x * x) for x in range(ITEMS)]
    runs = Counter(map(int, journal.lines()))
    assert {x: runs[x] for x in finished} == dict.fromkeys(finished, 1)
    assert {item for item, _, cached in said if cached} >= set(finished)
    assert max(runs.values()) <= 2


def test_a_map_that_is_killed_again_and_again_comes_to_its_end(start, disk_backend, journal):
    options = {"mode": "thread", "workers": 2, "progress": False, **disk_backend.options, "cache_namespace": "map"}
    finished: list[int] = []
    while len(finished) < ITEMS and len(journal.lines()) < 4 * ITEMS:
        program = start(MAP, {**options, "ordered": False})
        new = 0
        while new < 20 and (said := program.heard()):
            finished += [said[0]] if said[0] not in finished else []
            new += not said[2]
            if len(finished) == ITEMS:
                break
        program.kill()
    assert sorted(finished) == list(range(ITEMS))
    # Only what was under way at a kill may run twice: by two workers, at each of at most three kills.
    assert sum(Counter(journal.lines()).values()) <= ITEMS + 6
