"""No pool: items run one after the other in the calling thread, for debuggers and profilers."""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any

from opero.concurrency.batches import Batch, Done
from opero.concurrency.kept import PoolSource
from opero.concurrency.tasks import TaskPool
from opero.concurrency.worker import How, Work, run_items

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.batches import Pool
    from opero.concurrency.inbox import Inbox


class SerialPool:
    """Runs single items of a ``def`` function; each has a copy of the caller's context variables.

    It does so when the map would wait for a worker: then all results before have been handed out.
    """

    largest_batch = 1
    can_rest = is_far = False
    kill = prepare = begun = None
    slots = 1

    def __init__(self, work: Work) -> None:
        self._work = work
        self._context = contextvars.copy_context()

    def start(self, inbox: Inbox, **_about_the_map: Any) -> None:
        self._deliver = inbox.put

    def submit(self, batch: Batch) -> None:
        self._deliver(batch)

    def receive(self, event: Any) -> Any:
        if not isinstance(event, Batch):
            return event
        report = run_items(self._work, event.items, event.candidate, How(self._context))
        try:
            return Done(event, report.values, report.errors, report.seconds)
        finally:
            # This frame is in the traceback of an error: without this they would keep each other alive.
            del report

    def rest(self) -> None:
        """There are no workers that could be kept."""

    def take_on(self, work: Work) -> None:
        """As `rest`."""

    def stop(self, is_left: Callable[[], bool]) -> None:
        """Nothing runs any more."""

    async def stop_async(self) -> None:
        """As `stop`."""


def serial_pool(work: Work, _workers: int = 1) -> Pool:
    """What runs a map in the calling thread; coroutines in the event loop there."""
    return TaskPool(work, 1) if work.is_async else SerialPool(work)


def serial_pools() -> PoolSource:
    """For maps of one item."""
    return PoolSource(serial_pool)
