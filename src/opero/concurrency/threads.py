"""The pools of this process: threads that take batches from one queue, tasks of an event loop, and no worker at all."""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import TYPE_CHECKING, Any

from opero.concurrency.pool import Batch, Pool
from opero.concurrency.scheduler import Scheduler
from opero.concurrency.system import wait_unless_left
from opero.concurrency.worker import How, Work, run_batch, run_one, runner_for
from opero.core.interrupts import Hold
from opero.exceptions import OperoError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable


class ThreadPool(Pool):
    """Runs batches in threads; each item has a copy of the caller's context variables."""

    can_rest = marks = True
    # Items are held by reference, so a batch of large ones costs memory only for as long as they live.
    largest_batch = 128

    def __init__(
        self,
        work: Work,
        workers: int,
        *,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        finalizer: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(work, workers)
        self._hooks = initializer, initargs, finalizer
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._stopped = False

    def submit(self, batch: Batch) -> None:
        if len(self._threads) < self.slots:
            with Hold():
                if not self._threads:
                    self.enter_multi_pool(self.slots, self._end_threads)
                name = f"opero-worker-{len(self._threads) + 1}"
                # As those of any pool, they do not keep the program alive that has left them.
                thread = threading.Thread(target=self._serve, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
        self._batches.put(batch)

    def _end_threads(self) -> None:
        """Let running items end, start no other, and join the threads, unless they are left to themselves."""
        self._stopped = True
        for _ in self._threads:
            self._batches.put(None)
        # The garbage collector ends an abandoned stream in any thread, also in one of its own.
        if threading.current_thread() not in self._threads:
            wait_unless_left(self._have_ended, self._is_left)

    def _have_ended(self, seconds: float) -> bool:
        for thread in self._threads:
            thread.join(seconds)
            if thread.is_alive():
                return False
        return True

    def _serve(self) -> None:
        if self._stopped:
            return
        initializer, initargs, finalizer = self._hooks
        try:
            if initializer is not None:
                initializer(*initargs)
        except Exception as error:  # noqa: BLE001 - the user's code
            refused = OperoError(f"a worker thread cannot run {self._name}: {describe(error)}")
            refused.__cause__ = error
            self.deliver(Scheduler.fail, refused)
            return
        try:
            with runner_for(self._work) as runner:
                while (batch := self._batches.get()) is not None and not self._stopped:
                    work, how = self._work, How(self._context, batch.mark)
                    # Held by no variable: the frame is reached from the traceback of an error.
                    self.deliver(Scheduler.done, batch, run_batch(work, batch.items, batch.time_limit, runner, how))
                    del batch
        except BaseException as error:  # noqa: BLE001 - Ctrl-C and exit belong to the caller's thread
            self.deliver(Scheduler.fail, error)
        finally:
            if finalizer is not None:
                finalizer()


class TaskPool(Pool):
    """Runs single items in tasks; each has a copy of the caller's context variables."""

    def __init__(self, work: Work, workers: int) -> None:
        super().__init__(work, workers)
        self._tasks: dict[Batch, asyncio.Task[None]] = {}
        self._stopping = False

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
                self.deliver(Scheduler.fail, error)
            if isinstance(error, asyncio.CancelledError):
                raise
            return
        del self._tasks[batch]
        self.deliver(Scheduler.done, batch, report)
        # From Python 3.13 on the traceback of its error may lead to this frame.
        del report


class SerialPool(Pool):
    """Runs single items of a ``def`` function; each has a copy of the caller's context variables.

    It does so when the map would wait for a worker: then all results before have been handed out.
    """

    def submit(self, batch: Batch) -> None:
        self.deliver(self._run, batch)

    def _run(self, run: Scheduler, batch: Batch) -> None:
        # Held by no variable: this frame is reached from the traceback of an error; they would keep each other alive.
        run.done(batch, run_batch(self._work, batch.items, None, None, How(self._context)))


def serial_pool(work: Work, workers: int) -> Pool:
    """What runs a map in the calling thread; coroutines in the event loop there."""
    return TaskPool(work, workers) if work.is_async else SerialPool(work, workers)
