"""The thread pool: twat-mp's threads, each taking batches from one queue."""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from opero.concurrency.interrupts import let_through
from opero.concurrency.own_thread import in_own_thread
from opero.concurrency.scheduler import Batch, Done, Fatal
from opero.concurrency.worker import AsyncCaller, Work, run_batch
from opero.core.interrupts import Hold
from opero.core.signature import name_of
from opero.exceptions import OperoError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.contract import Inbox

# Items are held by reference, so a batch of large ones costs memory only for as long as they live.
LARGEST_BATCH = 128


class ThreadPool:
    """Runs batches in threads; each item has a copy of the caller's context variables."""

    largest_batch = LARGEST_BATCH
    queues_batches = True
    kill = None

    def __init__(
        self,
        work: Work,
        workers: int,
        *,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
    ) -> None:
        self._initializer = initializer
        self._initargs = initargs
        self.slots = workers
        self.take_on(work)
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._pool: Any = None
        self._stopped = False
        self._threads: set[int] = set()

    def start(self, inbox: Inbox) -> None:
        self._deliver = inbox.put
        with Hold():
            self._start_threads()

    def _start_threads(self) -> None:
        from twat_mp.mp import MultiPool

        from opero.concurrency.whole_pool import WholeThreads, enter

        # Not pathos' own ThreadPool: that one shares its threads with every other pool of the same size.
        factory: Any = WholeThreads
        self._pool = MultiPool(pool_class=factory, nodes=self.slots)
        threads = enter(self._pool)
        for _ in range(self.slots):
            threads.apply_async(self._serve)

    def take_on(self, work: Work) -> None:
        self._map = _Map(work, contextvars.copy_context())

    def give_up(self) -> list[Batch]:
        withdrawn: list[Batch] = []
        with contextlib.suppress(queue.Empty):
            while batch := self._batches.get_nowait():
                withdrawn.append(batch)
        return withdrawn

    def receive(self, event: Any) -> Any:
        return event

    def runs_here(self) -> bool:
        return threading.get_ident() in self._threads

    def submit(self, batch: Batch) -> None:
        self._batches.put(batch)

    def stop(self) -> None:
        """Let running items end, start no other, and join the threads; Ctrl-C leaves them to themselves."""
        self._stopped = True
        for _ in range(self.slots):
            self._batches.put(None)
        # Ctrl-C may come before there is one.
        if self._pool is not None and self._pool.pool is not None:
            with Hold():
                self._pool.pool.end_when_idle()
            with let_through():
                self._pool.__exit__(None, None, None)

    async def stop_async(self) -> None:
        await in_own_thread(self.stop, may_be_left=lambda: True)

    def _serve(self) -> None:
        self._threads.add(threading.get_ident())
        try:
            if self._initializer is not None and not self._stopped:
                self._initializer(*self._initargs)
        except Exception as error:  # noqa: BLE001 - the user's code
            refused = OperoError(f"a worker thread cannot run {name_of(self._map.work.function)}: {describe(error)}")
            refused.__cause__ = error
            self._deliver(Fatal(refused))
            return
        caller = AsyncCaller() if self._map.work.is_async else None
        try:
            while (batch := self._batches.get()) is not None and not self._stopped:
                work, context = self._map
                self._deliver(_run(batch, work, caller, context))
        except BaseException as error:  # noqa: BLE001 - Ctrl-C and exit belong to the caller's thread
            self._deliver(Fatal(error))
        finally:
            if caller is not None:
                caller.close()


def _run(batch: Batch, work: Work, caller: AsyncCaller | None, context: contextvars.Context) -> Done:
    report = run_batch(work, batch.items, batch.candidate, batch.time_limit, caller, context=context)
    try:
        return Done(batch, report.values, report.errors, report.seconds)
    finally:
        # This frame is in the traceback of an error: without this they would keep each other alive.
        del report


class _Map(NamedTuple):
    """What the threads run, and the context variables of whoever called it."""

    work: Work
    context: contextvars.Context
