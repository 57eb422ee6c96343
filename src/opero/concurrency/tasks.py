"""Pools without workers of their own: asyncio tasks in the caller's event loop, and no pool at all, for debuggers."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

from opero.concurrency.batches import Batch, Done, Fatal, Pool
from opero.concurrency.worker import How, Work, run_batch, run_one
from opero.core.steps import Failed, was_cancelled


class TaskPool(Pool):
    """Runs single items in tasks; each has a copy of the caller's context variables."""

    def __init__(self, work: Work, workers: int) -> None:
        self._workers = workers
        self._work = work
        self._context = contextvars.copy_context()
        self._tasks: dict[Batch, asyncio.Task[None]] = {}
        self._stopping = False

    @property
    def slots(self) -> int:
        return self._workers

    def submit(self, batch: Batch) -> None:
        # A task has a copy of the context in which it is made.
        self._tasks[batch] = self._context.run(asyncio.get_running_loop().create_task, self._run(batch))

    async def stop_async(self) -> None:
        """Cancel the tasks and wait until they have ended."""
        self._stopping = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _run(self, batch: Batch) -> None:
        if self._stopping:
            return
        try:
            report = await run_one(self._work, batch.items[0], batch.time_limit)
        except BaseException as error:
            # Exit, and a cancellation that came from the user's function, not from `stop_async`, belong to the caller.
            if not self._stopping:
                # Before the map hears of it other tasks may have their turn: none shall begin an item.
                self._stopping = True
                self.deliver(Fatal(error))
            if isinstance(error, asyncio.CancelledError):
                raise
            return
        del self._tasks[batch]
        batch.is_last = was_cancelled(Failed(report.errors[0]) if report.errors else report.values[0], 0)
        self.deliver(Done(batch, report))
        # From Python 3.13 on the traceback of its error may lead to this frame.
        del report


class SerialPool(Pool):
    """Runs single items of a ``def`` function; each has a copy of the caller's context variables.

    It does so when the map would wait for a worker: then all results before have been handed out.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._context = contextvars.copy_context()

    def submit(self, batch: Batch) -> None:
        self.deliver(batch)

    def receive(self, event: Any) -> Any:
        if not isinstance(event, Batch):
            return event
        # Held by no variable: this frame is reached from the traceback of an error; they would keep each other alive.
        return Done(event, run_batch(self._work, event.items, None, None, How(self._context)))


def serial_pool(work: Work, _workers: int = 1) -> Pool:
    """What runs a map in the calling thread; coroutines in the event loop there."""
    return TaskPool(work, 1) if work.is_async else SerialPool(work)
