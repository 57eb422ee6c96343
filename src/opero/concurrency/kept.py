"""Where the maps of a function get their pools, and the block in which these are kept between the maps.

A map has the pool that it uses to itself. One that runs at the same time has another, which is kept as well.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from opero.core.forks import watch_forks
from opero.core.interrupts import Hold
from opero.exceptions import NotTransferableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from opero.concurrency.inbox import Inbox
    from opero.concurrency.scheduler import Batch, KeepablePool, Pool
    from opero.concurrency.worker import Work

# The arguments before the item, those after it, those by keyword, and whether items are tuples of arguments.
Arguments = tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any], bool]
_NEWS = object()


@dataclass(frozen=True)
class MapSettings:
    """How a map runs; the options of `opero.opmap` that are no policies."""

    pools: PoolSource
    ordered: bool = True
    progress: bool | str = True
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
        # Ctrl-C may come when a block is open and not entered yet: it ends with its object then.
        self._blocks: WeakSet[_Block] = WeakSet()
        self._idle: list[Kept] = []

    def pool_for(self, work: Work) -> Pool:
        pool: Any = self._make(work)
        return Lease(self, pool, work) if self._blocks and hasattr(pool, "take_on") else pool

    def open(self, block: _Block) -> None:
        with self._lock:
            self._blocks.add(block)

    def close(self, block: _Block) -> None:
        """Stop what is idle, unless there is another block; what is in use is stopped by the map that uses it."""
        with Hold(), ExitStack() as stack:
            with self._lock:
                self._blocks.discard(block)
                if self._blocks:
                    return
                idle, self._idle = self._idle, []
            for kept in idle:
                stack.callback(kept.pool.stop, lambda: False)

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
    not share workers, but leave theirs to later ones. A map that ends before all that it has begun does not.
    """

    def __init__(self, source: PoolSource) -> None:
        self._source = source
        self._open: list[_Block] = []

    def __enter__(self) -> None:
        self._open.append(_Block(self._source))

    def __exit__(self, *_exc: object) -> None:
        with Hold():
            self._open.pop().close()

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, *_exc: object) -> None:
        from opero.concurrency.ctrl_c import in_own_thread

        block = self._open.pop()
        await in_own_thread(lambda _is_left: block.close())


class Kept:
    """A pool that has been started, and an inbox that is passed on from one map to the next."""

    def __init__(self, pool: KeepablePool) -> None:
        self.pool = pool
        self.events: SimpleQueue[Any] = SimpleQueue()
        # Cut short by Ctrl-C, what was heard may be lost.
        self.is_hearing = False
        self._pipes: dict[Connection, Callable[[], None]] = {}
        self._inbox: Inbox | None = None

    def put(self, event: Any) -> None:
        self.events.put(event)
        inbox = self._inbox
        if inbox is not None:
            inbox.put(_NEWS)

    def listen(self, pipe: Connection, heard: Callable[[], None]) -> None:
        def hear() -> None:
            self.is_hearing = True
            heard()
            self.is_hearing = False

        self._pipes[pipe] = hear
        if self._inbox is not None:
            self._inbox.listen(pipe, hear)

    def forget(self, pipe: Connection) -> None:
        self._pipes.pop(pipe, None)
        if self._inbox is not None:
            self._inbox.forget(pipe)

    def pass_on(self, inbox: Inbox | None) -> None:
        """Let another map hear the pool, or nobody."""
        before, self._inbox = self._inbox, inbox
        for pipe, heard in list(self._pipes.items()):
            if before is not None:
                before.forget(pipe)
            if inbox is not None:
                inbox.listen(pipe, heard)
        if inbox is not None:
            for _ in range(self.events.qsize()):
                inbox.put(_NEWS)


class Lease:
    """The pool of one map: one that is idle, or a new one, which is kept when the map has ended."""

    def __init__(self, source: PoolSource, pool: KeepablePool, work: Work) -> None:
        self._source = source
        self._pool = pool
        self._work = work
        self._kept: Kept | None = None
        # Interrupted in the midst of something, it is not known whether a batch is out, or an event lost.
        self._is_sound = True
        self._out: set[Batch] = set()

    @property
    def largest_batch(self) -> int:
        return self._pool.largest_batch

    @property
    def slots(self) -> int:
        return self._pool.slots

    @property
    def begun(self) -> Callable[[Batch], int] | None:
        return self._pool.begun

    @property
    def kill(self) -> Callable[[Batch], bool] | None:
        return self._pool.kill

    @property
    def prepare(self) -> Callable[[], None] | None:
        return self._pool.prepare

    def start(self, inbox: Inbox, *, most_batches: int | None = None, **about_the_map: Any) -> None:  # noqa: ARG002
        with Hold():
            self._kept = self._source.take()
        if self._kept is None or not self._take_on(self._kept, inbox):
            self._kept = Kept(self._pool)
            self._kept.pass_on(inbox)
            # The next map may have more items.
            self._pool.start(self._kept, **about_the_map)

    def submit(self, batch: Batch) -> None:
        self._is_sound = False
        self._out.add(batch)
        self._pool.submit(batch)
        self._is_sound = True

    def receive(self, event: Any) -> Any:
        if event is not _NEWS or self._kept is None:
            return event
        self._is_sound = False
        try:
            known = self._pool.receive(self._kept.events.get_nowait())
        except Empty:
            known = None
        self._out -= {getattr(known, "batch", None), *getattr(known, "batches", ())}
        self._is_sound = not isinstance(getattr(known, "error", None), BaseException)
        return known

    def runs_here(self) -> bool:
        return self._pool.runs_here()

    def stop(self, is_left: Callable[[], bool]) -> None:
        """Keep the pool, or stop it if something runs in it or nobody wants to keep it."""
        if self._kept is not None:
            self._kept.pass_on(None)
            rests = self._is_sound and not self._kept.is_hearing and not self._out
            if not (rests and self._source.give_back(self._kept)):
                self._pool.stop(is_left)

    async def stop_async(self) -> None:
        from opero.concurrency.ctrl_c import in_own_thread

        # Here: an event loop is told by its own thread.
        if self._kept is not None:
            self._kept.pass_on(None)
        await in_own_thread(self.stop)

    def _take_on(self, kept: Kept, inbox: Inbox) -> bool:
        """Prepare an idle pool for this map; tells whether it can run it."""
        try:
            kept.pool.take_on(self._work)
        except NotTransferableError:
            # Forked workers can have what cannot be sent to workers that are there already.
            kept.pool.stop(lambda: False)
            return False
        self._pool = kept.pool
        kept.pass_on(inbox)
        return True
