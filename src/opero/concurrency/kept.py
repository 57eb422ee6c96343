"""Where the maps of a function get their pools, and the block in which these are kept between the maps.

A map has the pool that it uses to itself. One that runs at the same time has another, which is kept as well.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opero.core.forks import watch_forks
from opero.core.interrupts import Hold
from opero.exceptions import NotTransferableError

if TYPE_CHECKING:
    from collections.abc import Callable

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


class PoolSource:
    """Where the maps of one function get their pools."""

    def __init__(self, make: Callable[[Work], Pool]) -> None:
        self._make = make
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
        return self._make(work)

    def keep(self, pool: Pool) -> bool:
        """Keep a pool in which nothing runs, if a block is open; tells whether it is kept."""
        with self._lock:
            if self._blocks and pool.can_rest:
                pool.rest()
                self._idle.append(pool)
                return True
            return False

    def open_block(self) -> None:
        with self._lock:
            self._blocks += 1

    def close_block(self) -> None:
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


class KeptWorkers:
    """A block in which the maps of a function use the same workers: ``with fn.pool():`` or ``async with fn.pool():``.

    The workers are started by the first map and have ended when the block is left. Maps that run at the same time do
    not share workers, but leave theirs to later ones. A map that ends before all that it has begun does not.
    """

    def __init__(self, source: PoolSource) -> None:
        self._source = source

    def __enter__(self) -> None:
        self._source.open_block()

    def __exit__(self, *_exc: object) -> None:
        self._source.close_block()

    async def __aenter__(self) -> None:
        self._source.open_block()

    async def __aexit__(self, *_exc: object) -> None:
        from opero.concurrency.ctrl_c import in_own_thread

        await in_own_thread(lambda _is_left: self._source.close_block())
