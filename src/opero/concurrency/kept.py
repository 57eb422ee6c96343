"""Where the maps of a function get their pools, and the block in which these are kept between the maps."""

from __future__ import annotations

import importlib
import os
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from opero.core.forks import watch_forks
from opero.core.interrupts import Hold
from opero.exceptions import NotTransferableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opero.concurrency.batches import Pool
    from opero.concurrency.progress import ProgressOption
    from opero.concurrency.worker import Work


@dataclass(frozen=True)
class MapSettings:
    """How a map runs; the options of `opero.opmap` that are no policies."""

    pools: PoolSource
    ordered: bool = True
    progress: ProgressOption = True
    return_exceptions: bool = True
    # Whether items that failed are worth a warning, because nobody said what shall become of them.
    warns: bool = False
    # Number of items where it cannot be seen.
    total: int | None = None
    # Of a function that takes lists, most items in one.
    batch_size: int | None = None


# The file and the class of each mode's pool. Those that need an extra are imported only when a map has them.
POOLS: Mapping[str, tuple[str, str]] = {
    "process": ("processes", "ProcessPool"),
    "thread": ("threads", "ThreadPool"),
    "async": ("tasks", "TaskPool"),
    "async_process": ("processes", "async_process_pool"),
    "serial": ("serial", "serial_pool"),
    "dask": ("dask", "DaskPool"),
    "ray": ("ray", "RayPool"),
}
DEFAULT_TASKS = 100
MOST_DEFAULT_THREADS = 32


# Whoever makes their workers says how many there are.
_ELSEWHERE = ("dask", "ray", "executor")


def default_workers(mode: str) -> int:
    """How many workers a mode has when nobody says."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"thread": min(MOST_DEFAULT_THREADS, cpus + 4), "async": DEFAULT_TASKS, "serial": 1}.get(mode, cpus)


class PoolSource:
    """Where the maps of one function get their pools, and a block in which these are kept, ``with fn.pool():``.

    The workers are started by the first map and have ended when the block is left. A map has the pool that it uses to
    itself: maps that run at the same time do not share workers, but leave theirs to later ones. A map that ends before
    all that it has begun leaves none.

    Args:
        mode: One of `POOLS`, an executor, or a function that makes one.
        workers: By default as many as `default_workers` says.
        options: For the pool.
    """

    def __init__(self, mode: Any, workers: int | None = None, options: Mapping[str, Any] | None = None) -> None:
        if type(mode).__module__ == "distributed.cfexecutor" and not mode._kwargs:  # noqa: SLF001 - nothing else tells
            # As dask's executor, opero sends tasks by its client, and hears more of what becomes of them.
            mode, options = "dask", {"client": mode._client}  # noqa: SLF001 - as above
        kind = mode if isinstance(mode, str) else "executor"
        self._file, self._class = POOLS.get(kind, ("executors", "ExecutorPool"))
        self._options = {"mode": mode} if kind == "executor" else options or {}
        self._workers = default_workers(kind) if workers is None and kind not in _ELSEWHERE else workers
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """The workers that are kept are children of the parent."""
        # The garbage collector may close a stream at any moment, also while its thread is in here.
        self._lock = threading.RLock()
        self._blocks = 0
        self._idle: list[Pool] = []

    def pool_for(self, work: Work) -> Pool:
        """A pool that is idle, and ready for this map, or a new one."""
        with self._lock:
            pool = self._idle.pop() if self._idle else None
        if pool is not None:
            try:
                pool.take_on(work)
            except NotTransferableError:
                # Forked workers can have what cannot be sent to workers that are there already.
                pool.stop(lambda: False)
            else:
                return pool
        module = importlib.import_module(f"opero.concurrency.{self._file}")
        made: Pool = getattr(module, self._class)(work, self._workers, **self._options)
        return made

    def keep(self, pool: Pool) -> bool:
        """Keep a pool in which nothing runs, if a block is open; tells whether it is kept."""
        with self._lock:
            if self._blocks and pool.can_rest:
                pool.rest()
                self._idle.append(pool)
                return True
            return False

    def __enter__(self) -> None:
        with self._lock:
            self._blocks += 1

    def __exit__(self, *_exc: object) -> None:
        """Stop what is idle, unless there is another block; what is in use is stopped by the map that uses it."""
        with Hold(), ExitStack() as stack:
            with self._lock:
                # A forked child leaves the blocks of its parent, too.
                self._blocks = max(0, self._blocks - 1)
                if self._blocks:
                    return
                idle, self._idle = self._idle, []
            for pool in idle:
                stack.callback(pool.stop, lambda: False)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, *_exc: object) -> None:
        from opero.concurrency.ctrl_c import in_own_thread

        await in_own_thread(lambda _is_left: self.__exit__())


def entered_multi_pool(workers: int, end: Callable[[], None]) -> Any:
    """One of twat-mp's, for workers that ``end`` ends when it is left, each time that it asks for that."""
    from twat_mp.mp import MultiPool

    # Not one of pathos: those share their workers with every other pool of the same size.
    pool = SimpleNamespace(map=None, close=end, join=end, terminate=end, clear=end)
    made = MultiPool(pool_class=lambda nodes: pool, nodes=workers)  # type: ignore[arg-type]  # noqa: ARG005
    made.__enter__()
    return made
