"""What maps cost beside the pools of the standard library and twat-mp."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import time
from typing import TYPE_CHECKING, Any

from opero import opmap

if TYPE_CHECKING:
    from collections.abc import Callable

TRIVIAL = 100_000
TRIVIAL_IN_THREADS = 20_000
SLEEPS, SLEEP, SLEEPING_THREADS = 1_000, 0.02, 16
ASYNC_ITEMS, ASYNC_SLEEP, ASYNC_WORKERS = 10_000, 0.001, 100


def square(number: int) -> int:
    """Stand for a user's function that does nearly nothing."""
    return number * number


def nap(_number: int) -> None:
    """Stand for a user's function that waits."""
    time.sleep(SLEEP)


async def nap_async(number: int) -> int:
    """Stand for a user's async function that waits."""
    await asyncio.sleep(ASYNC_SLEEP)
    return number


def tables() -> list[Any]:
    """All tables of this group."""
    in_processes = opmap(mode="process", workers=2, progress=False)(square)
    in_threads = opmap(mode="thread", workers=SLEEPING_THREADS, progress=False)(square)
    asleep = opmap(mode="thread", workers=SLEEPING_THREADS, progress=False)(nap)
    in_tasks = opmap(mode="async", workers=ASYNC_WORKERS, progress=False)(nap_async)
    return [
        (
            f"{TRIVIAL:,} trivial items, 2 processes",
            [
                ("concurrent.futures, chunks of 5 000", timed(futures_map)),
                ("opmap", timed(lambda: in_processes(range(TRIVIAL)))),
                ("multiprocessing.Pool.map", timed(pool_map)),
                ("twat-mp ProcessPool.map", timed(twat_map)),
            ],
        ),
        (
            f"{TRIVIAL_IN_THREADS:,} trivial items, {SLEEPING_THREADS} threads",
            [
                ("concurrent.futures", timed(lambda: threads_map(square, TRIVIAL_IN_THREADS))),
                ("opmap", timed(lambda: in_threads(range(TRIVIAL_IN_THREADS)))),
            ],
        ),
        (
            f"{SLEEPS:,} sleeps of {SLEEP * 1000:g} ms, {SLEEPING_THREADS} threads",
            [
                ("concurrent.futures", timed(lambda: threads_map(nap, SLEEPS))),
                ("opmap", timed(lambda: asleep(range(SLEEPS)))),
            ],
        ),
        (
            f"{ASYNC_ITEMS:,} async items of {ASYNC_SLEEP * 1000:g} ms, {ASYNC_WORKERS} at a time",
            [
                ("gather + semaphore", timed(lambda: asyncio.run(gather_map()))),
                ("opmap", timed(lambda: in_tasks.run(range(ASYNC_ITEMS)))),
            ],
        ),
    ]


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """A measurement of the whole of ``work``, start and stop of its pool included."""

    def measure() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return measure


def futures_map() -> list[int]:
    """100 000 items in the chunks that are best for them."""
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        return list(pool.map(square, range(TRIVIAL), chunksize=5_000))


def pool_map() -> list[int]:
    """The same with `multiprocessing`."""
    with multiprocessing.Pool(2) as pool:
        return pool.map(square, range(TRIVIAL))


def twat_map() -> list[int]:
    """The same with twat-mp alone."""
    from twat_mp import ProcessPool

    with ProcessPool(nodes=2) as pool:
        return list(pool.map(square, range(TRIVIAL)))


def threads_map(function: Callable[[int], Any], count: int) -> list[Any]:
    """Any function in threads of `concurrent.futures`."""
    with concurrent.futures.ThreadPoolExecutor(SLEEPING_THREADS) as pool:
        return list(pool.map(function, range(count)))


async def gather_map() -> list[int]:
    """One task for each item, and a semaphore."""
    free = asyncio.Semaphore(ASYNC_WORKERS)

    async def one(number: int) -> int:
        async with free:
            return await nap_async(number)

    return await asyncio.gather(*(one(number) for number in range(ASYNC_ITEMS)))
