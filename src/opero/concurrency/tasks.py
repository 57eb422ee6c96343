"""The task pool: asyncio tasks in the caller's event loop, one for each item."""

from __future__ import annotations

import asyncio
import contextvars
import time
from typing import TYPE_CHECKING, Any

from opero.concurrency.batches import Batch, Done, Fatal
from opero.concurrency.worker import Work, in_time
from opero.core.steps import Failed, was_cancelled

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.inbox import Inbox


class TaskPool:
    """Runs single items in tasks; each has a copy of the caller's context variables."""

    largest_batch = 1
    can_rest = is_far = False
    kill = prepare = begun = None

    def __init__(self, work: Work, workers: int) -> None:
        self.slots = workers
        self._work = work
        self._context = contextvars.copy_context()
        self._tasks: dict[Batch, asyncio.Task[None]] = {}
        self._stopping = False

    def start(self, inbox: Inbox, **_about_the_map: Any) -> None:
        self._deliver = inbox.put

    def receive(self, event: Any) -> Any:
        return event

    def submit(self, batch: Batch) -> None:
        # A task has a copy of the context in which it is made.
        self._tasks[batch] = self._context.run(asyncio.get_running_loop().create_task, self._run(batch))

    def rest(self) -> None:
        """There are no workers that could be kept."""

    def take_on(self, work: Work) -> None:
        """As `rest`."""

    def stop(self, is_left: Callable[[], bool]) -> None:
        """Tasks cannot be waited for by blocking their own loop; `stop_async` does the work."""

    async def stop_async(self) -> None:
        """Cancel the tasks and wait until they have ended."""
        self._stopping = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _run(self, batch: Batch) -> None:
        started = time.perf_counter()
        errors: dict[int, Exception] = {}
        value = None
        try:
            call, item, limit = self._work.caller(batch.candidate), batch.items[0], batch.time_limit
            value = await (call(item) if limit is None else in_time(call, item, limit, self._work))
        except Exception as error:  # noqa: BLE001 - the policies decide about it
            errors[0] = error
        except BaseException as error:
            # Exit, and a cancellation that came from the user's function, not from `stop_async`, belong to the caller.
            if not self._stopping:
                # Before the map hears of it other tasks may have their turn: none shall begin an item.
                self._stopping = True
                self._deliver(Fatal(error))
            if isinstance(error, asyncio.CancelledError):
                raise
            return
        del self._tasks[batch]
        batch.is_last = was_cancelled(Failed(errors[0]) if errors else value, 0)
        self._deliver(Done(batch, [value], errors, time.perf_counter() - started))
        # This frame is in the error's traceback: without this they would keep each other alive.
        del errors
