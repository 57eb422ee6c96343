"""How items are shared among the workers of a map: no work is bound to a guess, and no crash makes it run twice."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import Counter

import pytest
from side_by_side import until

from opero import WorkerCrashedError, opmap
from opero.concurrency.pool import Pool
from opero.concurrency.scheduler import Scheduler
from opero.concurrency.worker import Report

PATIENCE = 10.0


class Executors:
    """A maker of executors, with a name for the test."""

    @staticmethod
    def processes():
        return concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork"))

    @staticmethod
    def threads():
        return concurrent.futures.ThreadPoolExecutor(4)


IN_MEMORY = {"thread": "thread", "process": "process", "threads of an executor": Executors.threads}


@pytest.mark.parametrize("mode", IN_MEMORY.values(), ids=IN_MEMORY)
def test_idle_workers_get_what_a_busy_one_has_not_begun(mode, journal):
    """Batches have grown on items that end at once; the slow ones, which come together, run side by side."""

    def work(item):
        if item >= 200:
            journal.add(item)
            until(lambda: len(journal.lines()) >= 4)
        return item

    assert opmap(mode=mode, workers=4, retries=0, progress=False)(work)(range(204)) == [*range(204)]


@pytest.mark.parametrize("mode", IN_MEMORY.values(), ids=IN_MEMORY)
def test_nothing_runs_twice_when_unequal_items_are_given_back_and_taken_back(mode, journal):
    def work(item):
        journal.add(item)
        time.sleep(0.025 if item % 40 == 0 else 0.0008 if item % 3 == 0 else 0)
        return item

    mapped = opmap(mode=mode, workers=4, retries=0, progress=False)(work)
    assert mapped(range(800)) == [*range(800)]
    assert Counter(journal.lines()) == {str(item): 1 for item in range(800)}
    assert mapped.stats.attempts == 800


def test_items_with_policies_are_shared_in_the_same_way(journal):
    """Not first batches but entries: each item is looked up in a cache before."""

    def work(item):
        if item >= 200:
            journal.add(item)
            until(lambda: len(journal.lines()) >= 2)
        return item

    mapped = opmap(mode="process", workers=2, cache=True, retries=1, progress=False)(work)
    assert mapped(range(202)) == [*range(202)]


CRASHES = {"process": "process", "an executor": Executors.processes}


@pytest.mark.parametrize("mode", CRASHES.values(), ids=CRASHES)
def test_no_crash_makes_an_item_run_twice_that_took_over_a_millisecond(mode, journal):
    def work(item):
        journal.add(item)
        time.sleep(0.002)
        if item == 150:
            os._exit(1)
        return item

    results = opmap(mode=mode, workers=1, retries=0, progress=False, return_exceptions=True)(work)(range(200))
    assert isinstance(results.pop(150), WorkerCrashedError)
    assert results == [*range(150), *range(151, 200)]
    # The executor breaks with what another worker of it runs; the guilty one is known when it runs alone.
    most = 1 if mode == "process" else 2
    assert max(Counter(journal.lines()).values()) <= most
    assert len([item for item, count in Counter(journal.lines()).items() if count > 1]) < 2


def test_a_crash_is_charged_where_its_worker_is_replaced_at_once(journal):
    """Calls with a rate are sent to workers that are ready: the next one starts before the crash has been looked at."""

    def work(item):
        journal.add(item)
        if item == 2:
            os._exit(1)
        return item

    options = {"retries": 0, "rate_limit": 1000, "progress": False, "return_exceptions": True}
    results = opmap(mode="process", workers=2, **options)(work)(range(6))
    assert isinstance(results.pop(2), WorkerCrashedError)
    assert journal.lines().count("2") == 1


def test_the_item_that_ran_when_its_worker_died_is_known_within_a_batch(journal):
    """Those after it, which had not begun, run once; those before it had been done in no time."""

    def work(item):
        if item == 5_000:
            os._exit(1)
        if item > 5_000:
            journal.add(item)
        return item

    results = opmap(mode="process", workers=1, retries=0, progress=False, return_exceptions=True)(work)(range(5_100))
    assert isinstance(results.pop(5_000), WorkerCrashedError)
    assert results == [*range(5_000), *range(5_001, 5_100)]
    assert max(Counter(journal.lines()).values()) == 1


# No more workers than work


def meet(folder, workers):
    """Let each of so many workers have an item."""
    (folder / str(os.getpid())).touch()
    until(lambda: len(list(folder.iterdir())) >= workers)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_map_starts_no_worker_without_an_item_for_it(count, journal, tmp_path):
    (tmp_path / "met").mkdir()
    options = {"initializer": lambda: journal.add(os.getpid())}
    mapped = opmap(mode="process", workers=6, progress=False, pool_options=options)(meet)
    assert mapped([tmp_path / "met"] * count, count) == [None] * count
    assert len(set(journal.lines())) == count


def test_a_map_of_items_that_the_cache_has_starts_no_worker(journal):
    options = {"initializer": lambda: journal.add(os.getpid())}
    mapped = opmap(mode="process", workers=2, cache=True, progress=False, pool_options=options)(abs)
    mapped(range(4))
    started = journal.lines()
    mapped(range(4))
    assert journal.lines() == started


@pytest.mark.parametrize("items", [[], [1]])
def test_an_executor_is_made_when_there_is_something_to_run(items):
    made = []

    def make():
        made.append(Executors.threads())
        return made[-1]

    mapped = opmap(mode=make, workers=2, progress=False)(abs)
    assert mapped(items) == items
    assert len(made) == len(items)


def test_a_map_starts_no_thread_without_an_item_for_it():
    names = set()

    def work(item):
        names.add(threading.current_thread().name)
        return threading.active_count()

    before = threading.active_count()
    assert max(opmap(mode="thread", workers=30, progress=False)(work)([1, 2])) <= before + 2


MANY = """
    import resource
    from opero import opmap

    if __name__ == "__main__":
        resource.setrlimit(resource.RLIMIT_NOFILE, (140, 140))
        mapped = opmap(workers=40, retries=0, progress=False, pool_options={"start_method": "fork"})(abs)
        print(mapped(range(80)) == [*range(80)])
"""


def test_a_worker_costs_no_more_than_three_open_files(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(MANY))
    run = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60, check=False)
    assert (run.stdout, run.stderr) == ("True\n", "")


# Streams


class Result:
    pass


def test_a_stream_keeps_nothing_that_its_consumer_has_dropped(mode):
    alive = weakref.WeakSet()
    most = 0

    def see(outcome):
        nonlocal most
        most = max(most, len(alive))
        alive.add(outcome.result)

    mode.each(see, opmap(**mode.options)(mode.define(make_result)), range(500))
    # The consumer's own, and the one before it that is being replaced.
    assert most <= 2


def make_result(_item):
    return Result()


def test_a_stream_gives_what_was_pulled_before_its_input_raised(mode):
    def items():
        yield from range(50)
        raise LookupError("no more")

    seen = []
    with pytest.raises(LookupError, match="no more"):
        mode.each(lambda outcome: seen.append(outcome.result), opmap(**mode.options)(mode.define(abs_of)), items())
    assert seen == [*range(50)]


def abs_of(item):
    return abs(item)


class FarPool(Pool):
    """On a cluster, where the items of a batch seem to take the seconds that the test says."""

    is_far = True
    slots = 2
    largest_batch = 10_000

    def __init__(self, seconds):
        self._seconds = itertools.chain(seconds, itertools.repeat(seconds[-1]))
        self.sizes = []

    def submit(self, batch):
        count = len(batch.items)
        self.sizes.append(count)
        self.deliver(Scheduler.done, batch, Report(batch.items, {}, next(self._seconds) * count))

    def stop(self, is_left):
        """Nothing has been started."""


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([0.05], 2),
        ([0.005], 20),
        ([0.00002], 5_000),
        ([1.0], 1),
        # A late batch says little of those that follow, a slow item much.
        ([*[0.005] * 30, 0.01, 0.005], 20),
        ([*[0.005] * 30, 0.5], 1),
    ],
    ids=["slow", "fast", "trivial", "long", "late", "slower"],
)
def test_a_batch_for_a_cluster_takes_about_a_tenth_of_a_second(monkeypatch, seconds, expected):
    pool = FarPool(seconds)
    monkeypatch.setattr("opero.concurrency.threads.ThreadPool", lambda _work, _workers: pool)
    opmap(mode="thread", progress=False)(abs)(range(1_000 + expected * 100))
    assert expected in pool.sizes[-6:]


def test_one_late_batch_for_a_cluster_makes_no_small_ones(monkeypatch):
    pool = FarPool([*[0.005] * 30, 0.02, 0.005])
    monkeypatch.setattr("opero.concurrency.threads.ThreadPool", lambda _work, _workers: pool)
    opmap(mode="thread", progress=False)(abs)(range(1_000))
    assert min(pool.sizes[10:40]) > 10


def test_the_last_items_are_shared_evenly_among_the_workers_of_a_cluster(monkeypatch):
    pool = FarPool([0.05])
    monkeypatch.setattr("opero.concurrency.threads.ThreadPool", lambda _work, _workers: pool)
    opmap(mode="thread", progress=False)(abs)(range(100))
    assert pool.sizes[-4:] == [2, 2, 1, 1]
