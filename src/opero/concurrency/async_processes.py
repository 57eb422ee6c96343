"""The pool of event loops: aiomultiprocess starts the processes, each of which runs many coroutines at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.concurrency.process_worker import Door, serve_async
from opero.concurrency.processes import ProcessPool, Worker, starting
from opero.core.forks import ForkSafeLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.worker import Work

DEFAULT_CONCURRENCY = 16

_lock = ForkSafeLock()
_pools_open = 0


class AsyncProcessPool(ProcessPool):
    """Runs single items in coroutines of several processes."""

    largest_batch = 1
    runs_together = True

    def __init__(
        self,
        work: Work,
        workers: int,
        *,
        concurrency: int = DEFAULT_CONCURRENCY,
        start_method: str | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(work, workers, start_method=start_method, initializer=initializer, initargs=initargs)
        self._concurrency = concurrency

    @property
    def slots(self) -> int:
        return super().slots * self._concurrency

    def start(self, deliver: Callable[[Any], None]) -> None:
        global _pools_open  # noqa: PLW0603 - aiomultiprocess has one manager for the whole process
        with _lock:
            _pools_open += 1
        super().start(deliver)

    def stop(self) -> None:
        super().stop()
        _release_manager()

    def _start_worker(self) -> None:
        import aiomultiprocess.core

        self._stay_safe()
        with starting, self._starting_one():
            aiomultiprocess.core.set_start_method(self._method)
            # Before the pipe: the manager's process would inherit it, and hide the worker's end.
            aiomultiprocess.core.get_manager()
            ours, theirs = aiomultiprocess.core.get_context().Pipe()
            self._pipes.add(ours)
            process = aiomultiprocess.core.Process(
                target=serve_async, args=(Door(theirs), self._work, *self._prepare), daemon=True
            )
            self._quietly(process.start)
            theirs.close()
            self._workers.append(_LoopWorker(process.aio_process, ours))


class _LoopWorker(Worker):
    """A worker that aiomultiprocess started."""

    def found(self, _pid: int, /) -> None:
        self.process = self.pool

    def end(self, *, in_peace: bool) -> None:
        if not in_peace:
            self.pool.kill()
        self.pool.join()


def _release_manager() -> None:
    """End, with opero's last pool, the manager process that aiomultiprocess (0.9.1) starts and never ends."""
    import aiomultiprocess.core

    global _pools_open  # noqa: PLW0603 - as above
    with _lock:
        _pools_open -= 1
        manager = aiomultiprocess.core._manager  # noqa: SLF001 - `get_manager` would start a new one
        if _pools_open == 0 and manager is not None:
            aiomultiprocess.core._manager = None  # noqa: SLF001 - as above
            manager.shutdown()
