"""The pool of event loops: aiomultiprocess starts the processes, each of which runs many coroutines at a time."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from opero.concurrency.process_worker import serve_async
from opero.concurrency.processes import ProcessPool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opero.concurrency.worker import Work

DEFAULT_CONCURRENCY = 16


class AsyncProcessPool(ProcessPool):
    """Runs single items in coroutines of several processes."""

    most_in_batch = 1
    runs_together = True

    def __init__(self, work: Work, workers: int, *, concurrency: int = DEFAULT_CONCURRENCY, **options: Any) -> None:
        super().__init__(work, workers, **options)
        self.at_once = concurrency

    def _make_process(self, *args: Any) -> Any:
        import aiomultiprocess.core

        with _settings_of_aiomultiprocess(self._context, _NoManager):
            return aiomultiprocess.core.Process(target=serve_async, args=args, daemon=True).aio_process


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
