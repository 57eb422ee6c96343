"""The thread pool: twat-mp's threads, each taking batches from one queue."""

from __future__ import annotations

import contextlib
import contextvars
import queue
from typing import TYPE_CHECKING, Any, NamedTuple

from opero.concurrency.interrupts import held_back, let_through
from opero.concurrency.own_thread import in_own_thread
from opero.concurrency.scheduler import Batch, Done, Fatal
from opero.concurrency.worker import AsyncCaller, Work, run_batch

if TYPE_CHECKING:
    from opero.concurrency.contract import Inbox

# Items are held by reference, so a batch of large ones costs memory only for as long as they live.
LARGEST_BATCH = 128


class ThreadPool:
    """Runs batches in threads that carry copies of the caller's context variables."""

    largest_batch = LARGEST_BATCH
    queues_batches = True
    kill = None

    def __init__(self, work: Work, workers: int) -> None:
        self.slots = workers
        self.take_on(work)
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._pool: Any = None
        self._stopped = False

    @held_back()
    def start(self, inbox: Inbox) -> None:
        from multiprocess.pool import ThreadPool as Threads
        from twat_mp.mp import MultiPool

        self._deliver = inbox.put
        # Not pathos' own ThreadPool: that one shares its threads with every other pool of the same size.
        factory: Any = lambda nodes: Threads(processes=nodes)  # noqa: E731 - MultiPool calls it with nodes=
        self._pool = MultiPool(pool_class=factory, nodes=self.slots)
        threads: Any = self._pool.__enter__()
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

    def submit(self, batch: Batch) -> None:
        self._batches.put(batch)

    def stop(self) -> None:
        """Let running items end, start no other, and join the threads; Ctrl-C leaves them to themselves."""
        self._stopped = True
        for _ in range(self.slots):
            self._batches.put(None)
        # Ctrl-C may come before there is one.
        if self._pool is not None and self._pool.pool is not None:
            with held_back():
                self._pool.pool.close()
            with let_through():
                self._pool.__exit__(None, None, None)

    async def stop_async(self) -> None:
        await in_own_thread(self.stop, may_be_left=lambda: True)

    def _serve(self) -> None:
        caller = AsyncCaller() if self._map.work.is_async else None
        latest = self._map
        context = latest.context.copy()
        try:
            while (batch := self._batches.get()) is not None and not self._stopped:
                if latest is not self._map:
                    latest = self._map
                    context = latest.context.copy()
                report = context.run(run_batch, latest.work, batch.items, batch.candidate, batch.time_limit, caller)
                self._deliver(Done(batch, report.values, report.errors, report.seconds))
        except BaseException as error:  # noqa: BLE001 - Ctrl-C and exit belong to the caller's thread
            self._deliver(Fatal(error))
        finally:
            if caller is not None:
                caller.close()


class _Map(NamedTuple):
    """What the threads run, and the context variables of whoever called it."""

    work: Work
    context: contextvars.Context
