"""The task pool: a fixed number of asyncio tasks in the caller's event loop."""

from __future__ import annotations

import asyncio
import contextvars
import time
import types
from collections import deque
from typing import TYPE_CHECKING, Any

from opero.concurrency.batches import Batch, Done, Fatal
from opero.concurrency.worker import Work, in_time
from opero.core.signature import MISSING
from opero.core.steps import Failed, was_cancelled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from opero.concurrency.inbox import Inbox


class TaskPool:
    """Runs single items in tasks, one after the other; each item has a copy of the caller's context variables."""

    largest_batch = 1
    can_rest = is_far = False
    kill = prepare = begun = None

    def __init__(self, work: Work, workers: int) -> None:
        self.slots = workers
        self._work = work
        self._call = work.caller()
        self._context = contextvars.copy_context()
        self._batches: deque[Batch] = deque()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    def start(self, inbox: Inbox, **_about_the_map: Any) -> None:
        self._deliver = inbox.put

    def receive(self, event: Any) -> Any:
        return event

    def submit(self, batch: Batch) -> None:
        self._batches.append(batch)
        while self._idle:
            waiter = self._idle.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        if len(self._tasks) < self.slots:
            self._tasks.append(asyncio.get_running_loop().create_task(self._serve()))

    def rest(self) -> None:
        """There are no workers that could be kept."""

    def take_on(self, work: Work) -> None:
        """As `rest`."""

    def stop(self, is_left: Callable[[], bool]) -> None:
        """Tasks cannot be waited for by blocking their own loop; `stop_async` does the work."""

    async def stop_async(self) -> None:
        """Cancel the tasks and wait until they have ended."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checkers
        try:
            # A function may go on in spite of its cancellation.
            while not self._stopping:
                while not self._batches:
                    waiter = loop.create_future()
                    self._idle.append(waiter)
                    await waiter
                await self._run(self._batches.popleft(), task)
        except BaseException as error:
            # Exit, and a cancellation that came from the user's function, not from `stop_async`, belong to the caller.
            if not self._stopping:
                # Before the map hears of it other tasks may have their turn: none shall begin an item.
                self._stopping = True
                self._deliver(Fatal(error))
            if isinstance(error, asyncio.CancelledError):
                raise

    async def _run(self, batch: Batch, task: asyncio.Task[None]) -> None:
        work, item = self._work, batch.items[0]
        call = self._call if batch.candidate is MISSING else work.caller(batch.candidate)
        started, before = time.perf_counter(), task.cancelling()
        errors: dict[int, Exception] = {}
        value = None
        try:
            limit = batch.time_limit
            mine = self._context.copy()
            value = await _in_context(mine, mine.run(call, item) if limit is None else in_time(call, item, limit, work))
        except Exception as error:  # noqa: BLE001 - the policies decide about it
            errors[0] = error
        batch.is_last = was_cancelled(Failed(errors[0]) if errors else value, before)
        self._deliver(Done(batch, [value], errors, time.perf_counter() - started))
        # This frame is in the error's traceback: without this they would keep each other alive.
        del errors


@types.coroutine
def _in_context(context: contextvars.Context, awaited: Awaitable[Any]) -> Generator[Any, Any, Any]:
    """Await something in a context of its own, as in a task of its own: a task has one context for its whole life."""
    coroutine: Any = awaited if isinstance(awaited, types.CoroutineType) else awaited.__await__()
    step: Any = coroutine.send
    given: Any = None
    try:
        while True:
            try:
                future = context.run(step, given)
            except StopIteration as end:
                return end.value
            try:
                given = yield future
                step = coroutine.send
            except BaseException as error:  # noqa: BLE001 - thrown into it
                step, given = coroutine.throw, error
    finally:
        # The error's traceback has this frame: without this they would keep each other alive.
        del given
