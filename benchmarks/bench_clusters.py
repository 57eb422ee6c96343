"""Maps on clusters of two workers on this machine, and each engine used directly in its best way.

Needs both engines: `python cleanup.py clusters` makes an environment that has them, and
``unshare --net .venv-clusters/bin/python benchmarks/run.py clusters`` keeps their ports to itself (bring ``lo`` up).
"""

from __future__ import annotations

import atexit
import time
from typing import TYPE_CHECKING, Any

from opero import opmap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from run import Table

WORKERS = 2
TRIVIAL = 100_000
SLOW = 100
MANY = 20_000
THREADS = 32
CHUNK = 500


def trivial(item: int) -> int:
    """Take no time."""
    return item + 1


def slow(item: int) -> int:
    """Take 50 ms."""
    time.sleep(0.05)
    return item


def quick(item: int) -> int:
    """Take 5 ms."""
    time.sleep(0.005)
    return item


def _chunk(function: Callable[[int], int], items: list[int]) -> list[int]:
    return [function(item) for item in items]


def _chunks(count: int, size: int) -> list[list[int]]:
    return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


def _rate(count: int, run: Callable[[], Any]) -> Callable[[], float]:
    """Items a second."""

    def measure() -> float:
        began = time.perf_counter()
        run()
        return count / (time.perf_counter() - began)

    return measure


def tables() -> Iterator[Table]:
    """The tables of both engines, one after the other."""
    yield from _of_ray()
    yield from _of_dask()


def _of_ray() -> Iterator[Table]:
    import ray
    from ray.util.multiprocessing import Pool

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    by_task = ray.remote(trivial)
    slow_by_task = ray.remote(slow)
    with Pool(WORKERS) as pool:
        pool.map(trivial, range(WORKERS * 10))
        pooled: Table = (
            f"ray, {WORKERS} CPUs, {TRIVIAL} trivial items: Pool.map",
            [("ray.util.multiprocessing.Pool.map", _rate(TRIVIAL, lambda: pool.map(trivial, range(TRIVIAL))))],
            "items/s",
        )
        yield pooled
        yield (
            f"ray, {WORKERS} CPUs, {SLOW} items of 50 ms: Pool.map",
            [("Pool.map, chunks of 1", _rate(SLOW, lambda: pool.map(slow, range(SLOW), chunksize=1)))],
            "items/s",
        )
    # Its actors hold the CPUs that the others need.
    mapped = opmap(mode="ray", progress=False)(trivial)
    slowly = opmap(mode="ray", progress=False)(slow)
    mapped(range(1_000))
    yield (
        f"ray, {WORKERS} CPUs, {TRIVIAL} trivial items",
        [
            ("opmap(mode='ray')", _rate(TRIVIAL, lambda: mapped(range(TRIVIAL)))),
            ("tasks (2 000)", _rate(2_000, lambda: ray.get([by_task.remote(n) for n in range(2_000)]))),
        ],
        "items/s",
    )
    yield (
        f"ray, {WORKERS} CPUs, {SLOW} items of 50 ms",
        [
            ("opmap(mode='ray')", _rate(SLOW, lambda: slowly(range(SLOW)))),
            ("tasks", _rate(SLOW, lambda: ray.get([slow_by_task.remote(n) for n in range(SLOW)]))),
        ],
        "items/s",
    )
    ray.shutdown()


def _of_dask() -> Iterator[Table]:
    client = _dask(WORKERS, 1)
    mapped = opmap(mode="dask", progress=False, pool_options={"client": client})(trivial)
    slowly = opmap(mode="dask", progress=False, pool_options={"client": client})(slow)
    by_executor = opmap(mode=client.get_executor(), progress=False)(trivial)
    mapped(range(1_000))
    chunks = _chunks(TRIVIAL, CHUNK)

    def in_chunks() -> Any:
        return client.gather(client.map(lambda chunk: _chunk(trivial, chunk), chunks, pure=False))

    yield (
        f"dask, {WORKERS} workers, {TRIVIAL} trivial items",
        [
            ("opmap(mode='dask')", _rate(TRIVIAL, lambda: mapped(range(TRIVIAL)))),
            ("opmap(mode=client.get_executor())", _rate(TRIVIAL, lambda: by_executor(range(TRIVIAL)))),
            (f"client.map, own chunks of {CHUNK}", _rate(TRIVIAL, in_chunks)),
            ("client.map (1 000)", _rate(1_000, lambda: client.gather(client.map(trivial, range(1_000), pure=False)))),
        ],
        "items/s",
    )
    yield (
        f"dask, {WORKERS} workers, {SLOW} items of 50 ms",
        [
            ("opmap(mode='dask')", _rate(SLOW, lambda: slowly(range(SLOW)))),
            ("client.map", _rate(SLOW, lambda: client.gather(client.map(slow, range(SLOW), pure=False)))),
        ],
        "items/s",
    )
    _end(client)
    client = _dask(1, THREADS)
    quickly = opmap(mode="dask", progress=False, pool_options={"client": client})(quick)
    quickly(range(100))
    few = MANY // 10
    yield (
        f"dask, {THREADS} threads, items of 5 ms",
        [
            ("opmap(mode='dask')", _rate(MANY, lambda: quickly(range(MANY)))),
            ("client.map", _rate(few, lambda: client.gather(client.map(quick, range(few), pure=False)))),
        ],
        "items/s",
    )
    _end(client)


def _dask(workers: int, threads: int) -> Any:
    import distributed

    here = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    cluster: Any = distributed.LocalCluster(n_workers=workers, threads_per_worker=threads, silence_logs=50, **here)
    client: Any = distributed.Client(cluster)
    atexit.register(cluster.close)
    return client


def _end(client: Any) -> None:
    cluster = client.cluster
    client.close()
    cluster.close()
    atexit.unregister(cluster.close)
