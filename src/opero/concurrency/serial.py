"""No pool: items run one after the other in the calling thread, for debuggers and profilers."""

from __future__ import annotations

import contextvars
from typing import Any

from opero.concurrency.batches import Batch, Done, Pool
from opero.concurrency.tasks import TaskPool
from opero.concurrency.worker import How, Work, run_batch


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
