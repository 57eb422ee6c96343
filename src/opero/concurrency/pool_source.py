"""Where the maps of a function get their pools, and the block in which these are kept between the maps."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

from opero.concurrency.contract import KeepablePool
from opero.concurrency.own_thread import in_own_thread
from opero.core.forks import watch_forks

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.contract import Pool
    from opero.concurrency.kept import Kept
    from opero.concurrency.worker import Work


class PoolSource:
    """Where the maps of one function get their pools."""

    def __init__(self, make: Callable[[Work], Pool]) -> None:
        self._make = make
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """The workers that are kept are children of the parent."""
        self._lock = threading.Lock()
        self._blocks: set[KeptWorkers] = set()
        self._idle: list[Kept] = []

    def pool_for(self, work: Work) -> Pool:
        pool = self._make(work)
        if not (self._blocks and isinstance(pool, KeepablePool)):
            return pool
        from opero.concurrency.kept import Lease

        return Lease(self, pool, work)

    def open(self, block: KeptWorkers) -> None:
        with self._lock:
            self._blocks.add(block)

    def close(self, block: KeptWorkers) -> None:
        """Stop what is idle, unless there is another block; what is in use is stopped by the map that uses it."""
        with self._lock:
            self._blocks.discard(block)
            if self._blocks:
                return
            idle, self._idle = self._idle, []
        with ExitStack() as stack:
            for kept in idle:
                stack.callback(kept.pool.stop)

    def take(self) -> Kept | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def give_back(self, kept: Kept) -> bool:
        """Tells whether it is kept."""
        with self._lock:
            if self._blocks:
                self._idle.append(kept)
            return bool(self._blocks)


class KeptWorkers:
    """A block in which the maps of a function use the same workers: ``with fn.pool():`` or ``async with fn.pool():``.

    The workers are started by the first map and have ended when the block is left. Maps that run at the same time do
    not share workers, but leave theirs to later ones.
    """

    def __init__(self, source: PoolSource) -> None:
        self._source = source

    def __enter__(self) -> None:
        self._source.open(self)

    def __exit__(self, *_exc: object) -> None:
        self._source.close(self)

    async def __aenter__(self) -> None:
        self._source.open(self)

    async def __aexit__(self, *_exc: object) -> None:
        await in_own_thread(lambda: self._source.close(self))
