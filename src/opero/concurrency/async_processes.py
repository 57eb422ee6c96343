"""The pool of event loops: aiomultiprocess starts the processes, each of which runs many coroutines at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from opero.concurrency.process_worker import PEACE_SECONDS, serve_async
from opero.concurrency.processes import ProcessPool, Worker, starting, wait_until_ended

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opero.concurrency.worker import Work

DEFAULT_CONCURRENCY = 16


class AsyncProcessPool(ProcessPool):
    """Runs single items in coroutines of several processes."""

    most_in_batch = 1
    queues_batches = False
    runs_together = True
    _library = "multiprocessing"

    def __init__(
        self,
        work: Work,
        workers: int,
        *,
        concurrency: int = DEFAULT_CONCURRENCY,
        start_method: str | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        max_tasks_per_worker: int | None = None,
    ) -> None:
        super().__init__(
            work,
            workers,
            start_method=start_method,
            initializer=initializer,
            initargs=initargs,
            max_tasks_per_worker=max_tasks_per_worker,
        )
        self.at_once = concurrency

    def _start_worker(self) -> None:
        import aiomultiprocess.core

        self._stay_safe()
        context = multiprocessing.get_context(self._method)
        with starting.lock, self._starting_one(), self._pipe(context) as (ours, theirs):
            with _settings_of_aiomultiprocess(context, _NoManager):
                process = aiomultiprocess.core.Process(
                    target=serve_async, args=(theirs, self._work, self._preparation), daemon=True
                )
            self._quietly(process.start)
            self._welcome(_LoopWorker(process.aio_process, ours, self._most_items))


class _LoopWorker(Worker):
    """A worker that aiomultiprocess started."""

    def found(self) -> None:
        self.process = self.pool

    def end(self, *, in_peace: bool) -> None:
        if in_peace:
            wait_until_ended(self.pool, PEACE_SECONDS)
        self.pool.kill()
        self.pool.join()

    def disown(self) -> None:
        multiprocessing.process._children.discard(self.pool)  # type: ignore[attr-defined]  # noqa: SLF001 - as there


@contextlib.contextmanager
def _settings_of_aiomultiprocess(context: Any, manager: Any) -> Iterator[None]:
    """Lend aiomultiprocess other settings: its own are global, and may be those of the host program."""
    from aiomultiprocess import core

    before = core.context, core._manager  # noqa: SLF001 - `get_manager` would start one
    core.context, core._manager = context, manager  # noqa: SLF001 - as above
    try:
        yield
    finally:
        core.context, core._manager = before  # noqa: SLF001 - as above


class _NoManager:
    """In place of the manager process that aiomultiprocess (0.9.1) starts with its first worker.

    Nothing that opero uses of a worker needs it, nothing of aiomultiprocess ever ends it, and it outlives a parent that
    is killed.
    """

    @staticmethod
    def Namespace() -> SimpleNamespace:  # noqa: N802 - the name that aiomultiprocess calls
        return SimpleNamespace()
