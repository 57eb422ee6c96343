"""What maps cost beside the pools of the standard library, twat-mp, joblib, mpire, tqdm, aiometer and plain asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opero import opmap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PROCESSES = 2
TRIVIAL, CHUNK = 100_000, 5_000
TRIVIAL_IN_THREADS = 20_000
BURNS, BURN = 2_000, 0.002
SLEEPS, SLEEP, THREADS = 1_000, 0.02, 16
ASYNC_ITEMS, ASYNC_SLEEP, ASYNC_WORKERS = 10_000, 0.001, 100
ARRAY_BYTES, ARRAY_ITEMS = 100_000_000, 8
FLAKY, FLAKY_SECONDS, FLAKY_WORKERS, BACKOFF = 1_000, 0.005, 8, 1.0
# Unequal items: first many that end at once, then some slow ones; slow ones at random; a last long one.
INSTANT, SLOW, SLOW_SECONDS, UNEQUAL_WORKERS = 200, 8, 0.5, 4
RANDOM, RANDOM_SLOW, RANDOM_SECONDS = 2_000, 0.05, 0.02
LAST, LAST_SECONDS = 400, 0.3
NOBODY, CROWD = 16, 128
MIB = 2**20


def square(number: int) -> int:
    """Stand for a user's function that does nearly nothing."""
    return number * number


def burn(number: int) -> int:
    """Stand for a user's function that computes."""
    end = time.process_time() + BURN
    while time.process_time() < end:
        pass
    return number


def nap(_number: int) -> None:
    """Stand for a user's function that waits."""
    time.sleep(SLEEP)


async def nap_async(number: int) -> int:
    """Stand for a user's async function that waits."""
    await asyncio.sleep(ASYNC_SLEEP)
    return number


def slow_at_the_end(number: int) -> int:
    """Stand for files of which the large ones come last."""
    if number >= INSTANT:
        time.sleep(SLOW_SECONDS)
    return number


def slow_at_random(number: int) -> int:
    """Stand for a service that is slow now and then."""
    if random.Random(number).random() < RANDOM_SLOW:
        time.sleep(RANDOM_SECONDS)
    return number


def slow_last(number: int) -> int:
    """Stand for jobs of which the last is the longest."""
    time.sleep(LAST_SECONDS if number == LAST - 1 else 0.001)
    return number


def item_of(number: int, *, array: Any) -> int:
    """Stand for a user's function with a large argument that all items have in common."""
    return int(array[number])


def own_memory(_number: int) -> tuple[int, float]:
    """The process that runs this, and how much memory it shares with nobody."""
    time.sleep(0.02)  # so that all workers get some
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return os.getpid(), sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / MIB


class Flaky:
    """Stand for a user's function of which every fifth item fails once."""

    def __init__(self, failed: Iterable[int] = ()) -> None:
        self._failed = set(failed)

    def __call__(self, number: int) -> int:
        """Wait, then fail or succeed."""
        time.sleep(FLAKY_SECONDS)
        if number % 5 == 0 and number not in self._failed:
            self._failed.add(number)
            raise ConnectionError(number)
        return number


def tables() -> list[Any]:
    """All tables of this group."""
    # Some of the others leave threads behind, beside which opmap by itself would not fork, as they all do.
    forked = {"start_method": "fork"}
    in_processes = opmap(mode="process", workers=PROCESSES, progress=False, pool_options=forked)
    in_threads = opmap(mode="thread", workers=THREADS, progress=False)
    spawned = opmap(workers=NOBODY, progress=False, pool_options={"start_method": "spawn"})
    cached = opmap(workers=NOBODY, cache=True, progress=False, pool_options={"start_method": "spawn"})(square)
    cached.one(1)
    in_tasks = opmap(mode="async", workers=ASYNC_WORKERS, progress=False)(nap_async)
    return [
        (
            f"{TRIVIAL:,} trivial items, {PROCESSES} processes",
            [
                (f"concurrent.futures, chunks of {CHUNK:,}", timed(lambda: futures_map(square, TRIVIAL, CHUNK))),
                ("opmap", timed(lambda: in_processes(square)(range(TRIVIAL)))),
                ("multiprocessing.Pool.map", timed(lambda: pool_map(square, TRIVIAL))),
                ("joblib", timed(lambda: joblib_map(square, TRIVIAL))),
                ("mpire", timed(lambda: mpire_map(square, TRIVIAL))),
                ("twat-mp ProcessPool.map", timed(lambda: twat_map(square, TRIVIAL))),
                (f"tqdm process_map, chunks of {CHUNK:,}", timed(lambda: tqdm_map(square, TRIVIAL, CHUNK))),
            ],
        ),
        (
            f"{BURNS:,} items of {BURN * 1000:g} ms of computing, {PROCESSES} processes",
            [
                ("concurrent.futures, chunks of 25", timed(lambda: futures_map(burn, BURNS, 25))),
                ("opmap", timed(lambda: in_processes(burn)(range(BURNS)))),
                ("multiprocessing.Pool.map", timed(lambda: pool_map(burn, BURNS))),
                ("joblib", timed(lambda: joblib_map(burn, BURNS))),
                ("mpire", timed(lambda: mpire_map(burn, BURNS))),
                ("twat-mp ProcessPool.map", timed(lambda: twat_map(burn, BURNS))),
                ("tqdm process_map, chunks of 25", timed(lambda: tqdm_map(burn, BURNS, 25))),
            ],
        ),
        (
            f"time to the first of {TRIVIAL:,} results, {PROCESSES} processes",
            [
                ("concurrent.futures.map, chunks of 100", first_of(futures_first)),
                ("opmap .stream", first_of(lambda: in_processes(square).stream(range(TRIVIAL)))),
                ("multiprocessing.Pool.imap, chunks of 100", first_of(pool_first)),
                ("joblib, as a generator", first_of(joblib_first)),
                ("mpire.imap", first_of(mpire_first)),
            ],
        ),
        (
            f"an array of {ARRAY_BYTES / 1e6:g} MB as an argument of {ARRAY_ITEMS} items, {PROCESSES} processes",
            [
                ("concurrent.futures", timed(lambda: futures_map(with_array(), ARRAY_ITEMS, 1))),
                ("opmap, forked", timed(lambda: in_processes(item_of)(range(ARRAY_ITEMS), array=the_array()))),
                ("opmap, fork server", timed(array_in_fresh_processes)),
                ("multiprocessing.Pool.map", timed(lambda: pool_map(with_array(), ARRAY_ITEMS))),
                ("joblib (maps it into memory)", timed(lambda: joblib_map(with_array(), ARRAY_ITEMS))),
                ("mpire", timed(lambda: mpire_map(with_array(), ARRAY_ITEMS))),
            ],
        ),
        (
            f"memory of a worker that nobody shares, {PROCESSES} processes",
            [
                ("concurrent.futures", per_worker(lambda: futures_map(own_memory, 8, 1))),
                ("opmap", per_worker(lambda: in_processes(own_memory)(range(8)))),
                ("multiprocessing.Pool.map", per_worker(lambda: pool_map(own_memory, 8))),
                ("joblib", per_worker(lambda: joblib_map(own_memory, 8))),
                ("mpire", per_worker(lambda: mpire_map(own_memory, 8))),
            ],
            "MiB",
        ),
        *unequal_tables(),
        (
            f"a map of no item, {NOBODY} spawned workers",
            [
                ("concurrent.futures", timed(lambda: spawned_futures(0))),
                ("opmap", timed(lambda: spawned(square)([]))),
                ("opmap, an item that is cached", timed(lambda: cached([1]))),
            ],
        ),
        (
            f"{2 * CROWD} trivial items, {CROWD} processes",
            [
                ("concurrent.futures", timed(lambda: futures_map(square, 2 * CROWD, 1, CROWD))),
                ("opmap", timed(lambda: opmap(workers=CROWD, progress=False)(square)(range(2 * CROWD)))),
                ("multiprocessing.Pool.map", timed(lambda: pool_map(square, 2 * CROWD, CROWD))),
            ],
        ),
        (
            f"{TRIVIAL_IN_THREADS:,} trivial items, {THREADS} threads",
            [
                ("concurrent.futures", timed(lambda: threads_map(square, TRIVIAL_IN_THREADS))),
                ("opmap", timed(lambda: in_threads(square)(range(TRIVIAL_IN_THREADS)))),
                ("multiprocessing.ThreadPool.map", timed(lambda: thread_pool_map(square, TRIVIAL_IN_THREADS))),
                ("joblib", timed(lambda: joblib_map(square, TRIVIAL_IN_THREADS, threads=True))),
            ],
        ),
        (
            f"{SLEEPS:,} sleeps of {SLEEP * 1000:g} ms, {THREADS} threads",
            [
                ("concurrent.futures", timed(lambda: threads_map(nap, SLEEPS))),
                ("opmap", timed(lambda: in_threads(nap)(range(SLEEPS)))),
                ("multiprocessing.ThreadPool.map", timed(lambda: thread_pool_map(nap, SLEEPS))),
                ("joblib", timed(lambda: joblib_map(nap, SLEEPS, threads=True))),
            ],
        ),
        (
            f"{ASYNC_ITEMS:,} async items of {ASYNC_SLEEP * 1000:g} ms, {ASYNC_WORKERS} at a time",
            [
                ("gather + semaphore", timed(lambda: asyncio.run(gather_map()))),
                ("opmap", timed(lambda: in_tasks.run(range(ASYNC_ITEMS)))),
                ("aiometer", timed(lambda: asyncio.run(aiometer_map()))),
                (f"{ASYNC_WORKERS} tasks pulling from one iterator", timed(lambda: asyncio.run(pulling_map()))),
            ],
        ),
        (
            f"{FLAKY:,} items, a fifth fails once and backs off {BACKOFF:g} s, {FLAKY_WORKERS} threads",
            [
                ("opmap, nothing fails", timed(lambda: flaky_map(Flaky(range(FLAKY))))),
                ("opmap", timed(lambda: flaky_map(Flaky()))),
                ("tenacity in concurrent.futures", once(timed(flaky_futures))),
            ],
        ),
    ]


def unequal_tables() -> list[Any]:
    """Items of which some take much longer than the others."""
    cases = [
        (f"{INSTANT} instant items, then {SLOW} of {SLOW_SECONDS:g} s", slow_at_the_end, INSTANT + SLOW),
        (f"{RANDOM:,} items, {RANDOM_SLOW:.0%} of {RANDOM_SECONDS * 1000:g} ms at random", slow_at_random, RANDOM),
        (f"{LAST} items of 1 ms, the last of {LAST_SECONDS:g} s", slow_last, LAST),
    ]
    return [table for case in cases for table in (in_unequal_threads(*case), in_unequal_processes(*case))]


def in_unequal_threads(name: str, function: Callable[[int], int], count: int) -> Any:
    """In threads."""
    mapped = opmap(mode="thread", workers=UNEQUAL_WORKERS, progress=False)(function)
    return (
        f"{name}, {UNEQUAL_WORKERS} threads",
        [
            ("concurrent.futures", timed(lambda: threads_map(function, count, UNEQUAL_WORKERS))),
            ("opmap", timed(lambda: mapped(range(count)))),
        ],
    )


def in_unequal_processes(name: str, function: Callable[[int], int], count: int) -> Any:
    """In processes."""
    mapped = opmap(workers=UNEQUAL_WORKERS, progress=False, pool_options={"start_method": "fork"})(function)
    return (
        f"{name}, {UNEQUAL_WORKERS} processes",
        [
            ("concurrent.futures, one by one", timed(lambda: futures_map(function, count, 1, UNEQUAL_WORKERS))),
            ("opmap", timed(lambda: mapped(range(count)))),
            ("multiprocessing.Pool.map", timed(lambda: pool_map(function, count, UNEQUAL_WORKERS))),
        ],
    )


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """A measurement of the whole of ``work``, start and stop of its pool included."""

    def measure() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return measure


def once(measure: Callable[[], float]) -> Callable[[], float]:
    """The same measurement each time, of something that takes too long to repeat."""
    return functools.cache(measure)


def first_of(results: Callable[[], Iterator[Any]]) -> Callable[[], float]:
    """A measurement that ends with the first result; the rest is left."""

    def measure() -> float:
        started = time.perf_counter()
        stream = results()
        next(stream)
        seconds = time.perf_counter() - started
        stream.close()  # type: ignore[attr-defined]
        return seconds

    return measure


def per_worker(results: Callable[[], Iterable[tuple[int, float]]]) -> Callable[[], float]:
    """The mean over the workers of what their latest items reported."""

    def measure() -> float:
        latest = dict(results())
        return sum(latest.values()) / len(latest)

    return measure


# Processes


def futures_map(function: Callable[[int], Any], count: int, chunk: int, workers: int = PROCESSES) -> list[Any]:
    """`concurrent.futures`, in chunks."""
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        return list(pool.map(function, range(count), chunksize=chunk))


def futures_first() -> Iterator[int]:
    """The same as they come."""
    with concurrent.futures.ProcessPoolExecutor(PROCESSES) as pool:
        yield from pool.map(square, range(TRIVIAL), chunksize=100)


def spawned_futures(count: int) -> list[Any]:
    """The same with workers that are started afresh."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(NOBODY, mp_context=context) as pool:
        return list(pool.map(square, range(count)))


def pool_map(function: Callable[[int], Any], count: int, workers: int = PROCESSES) -> list[Any]:
    """The same with `multiprocessing`."""
    with multiprocessing.Pool(workers) as pool:
        return pool.map(function, range(count))


def pool_first() -> Iterator[int]:
    """The same as they come."""
    with multiprocessing.Pool(PROCESSES) as pool:
        yield from pool.imap(square, range(TRIVIAL), chunksize=100)


def joblib_map(function: Callable[[int], Any], count: int, *, threads: bool = False) -> list[Any]:
    """The same with joblib, whose workers are ended afterwards as those of the others are."""
    import joblib
    from joblib.externals.loky import get_reusable_executor

    how = {"n_jobs": THREADS, "prefer": "threads"} if threads else {"n_jobs": PROCESSES}
    results = joblib.Parallel(**how)(joblib.delayed(function)(number) for number in range(count))
    if not threads:
        get_reusable_executor().shutdown(wait=True)
    return results


def joblib_first() -> Iterator[int]:
    """The same as they come."""
    import joblib
    from joblib.externals.loky import get_reusable_executor

    results = joblib.Parallel(n_jobs=PROCESSES, return_as="generator")(
        joblib.delayed(square)(number) for number in range(TRIVIAL)
    )
    try:
        yield from results
    finally:
        results.close()
        get_reusable_executor().shutdown(wait=True, kill_workers=True)


def mpire_map(function: Callable[[int], Any], count: int) -> list[Any]:
    """The same with mpire."""
    import mpire

    with mpire.WorkerPool(PROCESSES) as pool:
        return pool.map(function, range(count))


def mpire_first() -> Iterator[int]:
    """The same as they come."""
    import mpire

    with mpire.WorkerPool(PROCESSES) as pool:
        yield from pool.imap(square, range(TRIVIAL))


def twat_map(function: Callable[[int], Any], count: int) -> list[Any]:
    """The same with twat-mp alone."""
    from twat_mp import ProcessPool

    with ProcessPool(nodes=PROCESSES) as pool:
        return list(pool.map(function, range(count)))


def tqdm_map(function: Callable[[int], Any], count: int, chunk: int) -> list[Any]:
    """The same with tqdm's own map, without its bar."""
    from tqdm.contrib.concurrent import process_map

    return process_map(function, range(count), max_workers=PROCESSES, chunksize=chunk, disable=True)


# A large argument


@functools.cache
def the_array() -> Any:
    """Made once, before any measurement."""
    import numpy as np

    return np.ones(ARRAY_BYTES, dtype=np.uint8)


def with_array() -> Callable[[int], int]:
    """The form in which the other libraries take an argument that all items have in common."""
    return functools.partial(item_of, array=the_array())


def array_in_fresh_processes() -> None:
    """Workers that are no copies of this process map it from a file."""
    mapped = opmap(workers=PROCESSES, progress=False, pool_options={"start_method": "forkserver"})(item_of)
    mapped(range(ARRAY_ITEMS), array=the_array())


# Threads


def threads_map(function: Callable[[int], Any], count: int, workers: int = THREADS) -> list[Any]:
    """Any function in threads of `concurrent.futures`."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, range(count)))


def thread_pool_map(function: Callable[[int], Any], count: int) -> list[Any]:
    """The same with `multiprocessing`."""
    from multiprocessing.pool import ThreadPool

    with ThreadPool(THREADS) as pool:
        return pool.map(function, range(count))


# Tasks


async def gather_map() -> list[int]:
    """One task for each item, and a semaphore."""
    free = asyncio.Semaphore(ASYNC_WORKERS)

    async def one(number: int) -> int:
        async with free:
            return await nap_async(number)

    return await asyncio.gather(*(one(number) for number in range(ASYNC_ITEMS)))


async def aiometer_map() -> list[int]:
    """The same with aiometer."""
    import aiometer

    calls = [functools.partial(nap_async, number) for number in range(ASYNC_ITEMS)]
    return await aiometer.run_all(calls, max_at_once=ASYNC_WORKERS)


async def pulling_map() -> list[int]:
    """The least that can be done by hand."""
    numbers = iter(range(ASYNC_ITEMS))
    results = [0] * ASYNC_ITEMS

    async def pull() -> None:
        for number in numbers:
            results[number] = await nap_async(number)

    await asyncio.gather(*(pull() for _ in range(ASYNC_WORKERS)))
    return results


# Failures


def flaky_map(function: Flaky) -> list[Any]:
    """An item that waits for its retry holds no thread."""
    mapped = opmap(mode="thread", workers=FLAKY_WORKERS, progress=False, min_delay=BACKOFF, jitter=False)
    return mapped(function)(range(FLAKY))


def flaky_futures() -> list[Any]:
    """An item that waits for its retry holds a thread."""
    import tenacity

    retrying = tenacity.retry(wait=tenacity.wait_fixed(BACKOFF), stop=tenacity.stop_after_attempt(4))
    flaky = Flaky()
    return threads_map(retrying(flaky), FLAKY, FLAKY_WORKERS)
