"""Pools that outlive a map, and how a map uses one.

A map has the pool that it uses to itself. One that runs at the same time has another, which is kept as well.
"""

from __future__ import annotations

import contextlib
import sys
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from opero.concurrency.inbox import BlockingInbox
from opero.concurrency.interrupts import let_through
from opero.concurrency.own_thread import in_own_thread
from opero.concurrency.scheduler import Batch, Done, Fatal, Lost
from opero.core.interrupts import Hold
from opero.exceptions import NotTransferableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from opero.concurrency.contract import Inbox, KeepablePool
    from opero.concurrency.pool_source import PoolSource
    from opero.concurrency.worker import Work

_NEWS = object()


class Kept:
    """A pool that has been started, and an inbox that is passed on from one map to the next."""

    def __init__(self, pool: KeepablePool) -> None:
        self.pool = pool
        self.events: SimpleQueue[Any] = SimpleQueue()
        self._pipes: dict[Connection, Callable[[], None]] = {}
        self._inbox: Inbox | None = None
        # Cut short by Ctrl-C, what was heard may be lost.
        self.is_hearing = False

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

    def write_when_ready(self, pipe: Connection, write: Callable[[], None] | None) -> bool:
        return self._inbox is not None and self._inbox.write_when_ready(pipe, write)

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
        self._sound = False
        self._out: set[Batch] = set()
        self.queues_batches = pool.queues_batches
        # The scheduler asks before the map starts, when it is not known yet which pool it will be.
        self.kill = None if pool.kill is None else self._kill

    @property
    def largest_batch(self) -> int:
        return self._pool.largest_batch

    @property
    def slots(self) -> int:
        return self._pool.slots

    def start(self, inbox: Inbox) -> None:
        with Hold():
            self._kept = self._source.take()
        if self._kept is None or not self._take_on(self._kept, inbox):
            self._kept = Kept(self._pool)
            self._kept.pass_on(inbox)
            self._pool.start(self._kept)
        self._sound = True

    def submit(self, batch: Batch) -> None:
        # Interrupted here, it is not known whether the batch is out.
        sound, self._sound = self._sound, False
        self._out.add(batch)
        self._pool.submit(batch)
        self._sound = sound

    def receive(self, event: Any) -> Any:
        if event is not _NEWS:
            return event
        assert self._kept is not None  # noqa: S101 - for the type checkers
        # Interrupted here, an event is lost; and a pool that raises is not to be trusted any more.
        sound, self._sound = self._sound, False
        try:
            known = self._pool.receive(self._kept.events.get_nowait())
        except Empty:
            known = None
        if isinstance(known, Done):
            self._out.discard(known.batch)
        elif isinstance(known, Lost):
            self._out.difference_update(known.batches)
        self._sound = sound and not isinstance(known, Fatal)
        return known

    def runs_here(self) -> bool:
        return self._pool.runs_here()

    def stop(self) -> None:
        """Bring the pool to rest, or stop it if that cannot be done or nobody wants to keep it."""
        kept = self._kept
        if kept is None:
            return
        rests = False
        # What can only be waited for is waited for once after Ctrl-C: by the pool, which leaves it when it comes again.
        is_left = self._pool.kill is None and isinstance(sys.exception(), KeyboardInterrupt)
        try:
            rests = self._sound and not kept.is_hearing and not is_left and self._bring_to_rest(kept)
        finally:
            kept.pass_on(None)
            if not (rests and self._source.give_back(kept)):
                kept.pool.stop()

    async def stop_async(self) -> None:
        try:
            # Here: an event loop is told by its own thread.
            if self._kept is not None:
                self._kept.pass_on(None)
        finally:
            await in_own_thread(self.stop, may_be_left=(lambda: True) if self._pool.kill is None else None)

    def _kill(self, batch: Batch) -> bool:
        return self._pool.kill is None or self._pool.kill(batch)

    def _take_on(self, kept: Kept, inbox: Inbox) -> bool:
        """Prepare an idle pool for this map; tells whether it can run it."""
        try:
            kept.pool.take_on(self._work)
        except NotTransferableError:
            # Forked workers can have what cannot be sent to workers that are there already.
            kept.pool.stop()
            return False
        self._pool = kept.pool
        kept.pass_on(inbox)
        return True

    def _bring_to_rest(self, kept: Kept) -> bool:
        """End what runs, and wait until it has ended; tells whether the pool can be used again."""
        self._out.difference_update(self._pool.give_up())
        if self._out and self._sound:
            with contextlib.closing(BlockingInbox()) as inbox:
                kept.pass_on(inbox)
                while self._out and self._sound:
                    with let_through():
                        events = inbox.collect(None)
                    for event in events:
                        self.receive(event)
                kept.pass_on(None)
        return self._sound
