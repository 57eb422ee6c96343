"""Where the maps of a function get their pools, and the block in which these are kept between the maps."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING
from weakref import WeakSet

from opero.concurrency.contract import KeepablePool
from opero.concurrency.own_thread import in_own_thread
from opero.core.forks import watch_forks
from opero.core.interrupts import Hold, forget_earlier_interrupts

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
        # The garbage collector may close a stream at any moment, also while its thread is in here.
        self._lock = threading.RLock()
        # Ctrl-C may come when a block is open and not entered yet: it ends with its object then.
        self._blocks: WeakSet[_Block] = WeakSet()
        self._idle: list[Kept] = []

    def pool_for(self, work: Work) -> Pool:
        pool = self._make(work)
        if not (self._blocks and isinstance(pool, KeepablePool)):
            return pool
        from opero.concurrency.kept import Lease

        return Lease(self, pool, work)

    def open(self, block: _Block) -> None:
        with self._lock:
            self._blocks.add(block)

    def close(self, block: _Block) -> None:
        """Stop what is idle, unless there is another block; what is in use is stopped by the map that uses it."""
        with Hold(), ExitStack() as stack:
            for kept in self._forget(block):
                stack.callback(kept.pool.stop)

    def _forget(self, block: _Block) -> list[Kept]:
        with self._lock:
            self._blocks.discard(block)
            idle: list[Kept] = []
            if not self._blocks:
                idle, self._idle = self._idle, idle
            return idle

    def take(self) -> Kept | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def give_back(self, kept: Kept) -> bool:
        """Tells whether it is kept."""
        with self._lock:
            if self._blocks:
                self._idle.append(kept)
            return bool(self._blocks)


class _Block:
    """A block that is open. Ctrl-C may end one without `__exit__`: then it ends with this object.

    Not with that of ``fn.pool()``, which garbage may hold: Ctrl-C that comes while the collector finalizes is lost.
    """

    def __init__(self, source: PoolSource) -> None:
        self._source = source
        source.open(self)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        self._source.close(self)


class KeptWorkers:
    """A block in which the maps of a function use the same workers: ``with fn.pool():`` or ``async with fn.pool():``.

    The workers are started by the first map and have ended when the block is left. Maps that run at the same time do
    not share workers, but leave theirs to later ones.
    """

    def __init__(self, source: PoolSource) -> None:
        self._source = source
        self._open: list[_Block] = []

    def __enter__(self) -> None:
        self._open.append(_Block(self._source))

    def __exit__(self, *_exc: object) -> None:
        left = len(self._open) - 1
        try:
            self._close_all_but(left)
        except KeyboardInterrupt as interrupt:
            # It may have come before that has begun.
            self._close_all_but(left)
            forget_earlier_interrupts(interrupt)
            raise

    def _close_all_but(self, count: int) -> None:
        with Hold():
            while len(self._open) > count:
                self._open.pop().close()

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, *_exc: object) -> None:
        left = len(self._open) - 1
        await in_own_thread(lambda: self._close_all_but(left))
