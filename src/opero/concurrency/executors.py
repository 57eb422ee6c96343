"""The pool of somebody else's workers: any `concurrent.futures.Executor`.

An executor tells little: not where its workers are, nor which of them has died. So the first thing that is sent is an
object that comes back: the same one from workers that share memory with this process, a copy from all others. And when
the executor breaks, everything that was in flight is suspected.
"""

from __future__ import annotations

import threading
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from opero.concurrency.far import FarPool, Found, load, works
from opero.concurrency.pickling import Packer, names_in_fresh_workers, pack_report, unpack_batch
from opero.concurrency.pool import Batch, Pool, default_workers
from opero.concurrency.scheduler import Scheduler
from opero.concurrency.system import wait_unless_left
from opero.concurrency.worker import SLOW_SECONDS, How, Report, Work, run_batch, runner_for
from opero.core.checks import kind_of, shown
from opero.core.frozen import itself
from opero.exceptions import OperoError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.core.steps import TimeLimit

# An executor that breaks so often in a row, with nothing of the map in it, does not do so by accident.
MOST_STILLBIRTHS = 3


class ExecutorPool(FarPool):
    """Runs batches in an executor: one that was given, or one that is made, and made anew when it breaks."""

    is_far = isolates = False
    largest_batch = 1_000

    def __init__(self, work: Work, workers: int | None, *, mode: Executor | Callable[[], Executor]) -> None:
        self._mode: Any = mode
        self._is_given = isinstance(mode, Executor)
        # The executor, once something is to be run.
        self._executor: Any = None
        # Whether its workers share memory with this process; None as long as that is not known.
        self._is_near: bool | None = None
        self._in_flight: dict[Future[Any], Batch | None] = {}
        # What was sent before it is known where the workers are.
        self._pending: list[Batch] = []
        self._stillbirths = 0
        super().__init__(work, workers)

    @property
    def slots(self) -> int:
        """Batches that may be in flight; only the first one before it is known how to send them."""
        if self._executor is None:
            return 0 if self._is_paced else 1
        return 0 if self._is_near is None else self._size

    @property
    def can_rest(self) -> bool:  # type: ignore[override]  # here it is not always the same
        """Unless it is still to be told where the workers are."""
        return not self._in_flight

    def prepare(self) -> None:
        """Take an executor, and send it what tells where its workers are: the answer comes when there is one."""
        if self._executor is not None:
            return
        executor = self._mode if self._is_given else self._mode()
        if not isinstance(executor, Executor):
            msg = f"mode={shown(self._mode)} made {kind_of(executor)}, which is no concurrent.futures.Executor"
            raise TypeError(msg)
        self._executor, self._is_near = executor, None
        self._size = self._most or getattr(executor, "_max_workers", None) or default_workers("process")
        self._probe = object()
        self._launch(None, itself, self._probe)

    def submit(self, batch: Batch) -> None:
        self.prepare()
        self._send(batch)

    def take_on(self, work: Work) -> None:
        if self._is_near is False:
            super().take_on(work)
        else:
            Pool.take_on(self, work)

    def stop(self, is_left: Callable[[], bool] = lambda: False) -> None:
        """Withdraw what has not begun, wait for what has, and shut down an executor that was made here.

        After Ctrl-C the processes of such an executor are ended; what runs in threads can be left to itself.
        """
        running = [future for future in self._in_flight if not future.cancel()]
        executor = self._executor
        # The garbage collector ends an abandoned stream in any thread, also in one that runs an item of it.
        threads = getattr(executor, "_threads", ()) if isinstance(executor, ThreadPoolExecutor) else ()
        is_over = threading.current_thread() not in threads and wait_unless_left(
            lambda seconds: not wait(running, timeout=seconds).not_done, is_left
        )
        if executor is None or self._is_given:
            return
        processes = () if is_over else list((getattr(executor, "_processes", None) or {}).values())
        for process in processes:
            process.terminate()
        executor.shutdown(wait=is_over or bool(processes))

    # The executor

    def _make_anew(self, error: Exception, batch: Batch | None, *, is_innocent: bool = False) -> None:
        """The executor has broken, or was shut down: make another, unless it was given; what was in it is lost."""
        if self._is_given:
            msg = (
                f"the executor that runs {self._name} broke, and only whoever made it can make it anew "
                f"({describe(error)}); let mode be a function that makes the executor"
            )
            raise OperoError(msg) from error
        # All has come back then: with a result, or with this error.
        self._executor.shutdown(wait=True)
        gone = [future for future in self._in_flight if future.cancelled() or future.exception() is not None]
        batches = [each for each in (batch, *map(self._in_flight.pop, gone)) if each is not None]
        innocent = [each for each in batches if each is batch and is_innocent]
        self._stillbirths = 0 if len(batches) > len(innocent) else self._stillbirths + 1
        if self._stillbirths >= MOST_STILLBIRTHS:
            raise OperoError(f"the executors for {self._name} break before they run anything: {describe(error)}")
        self._executor = None
        self.prepare()
        self.deliver(Scheduler.lost, batches, describe(error), innocent)

    # Batches

    def _send(self, batch: Batch, *, completely: bool = False) -> None:
        if self._is_near is None:
            self._pending.append(batch)
            return
        if self._is_near:
            how = How(self._context, batch.mark)
            self._launch(batch, _run, self._work, batch.items, batch.time_limit, how)
            return
        payload = self.pack(batch)
        if payload is not None:
            # The work of the map goes only to workers that have asked for it.
            along = self._packed if completely else None
            self._launch(batch, run_parcel, self._digest, along, payload, uuid4().hex)

    def _launch(self, batch: Batch | None, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            future = self._executor.submit(function, *arguments)
        except Exception as error:
            # Somebody may have shut it down.
            if not isinstance(error, BrokenExecutor) and (self._is_given or not isinstance(error, RuntimeError)):
                raise self._refused(error) from error
            self._make_anew(error, batch, is_innocent=True)
        else:
            self._in_flight[future] = batch
            future.add_done_callback(partial(self.deliver, self._came_back))

    def _refused(self, error: Exception) -> OperoError:
        return OperoError(f"the executor that is to run {self._name} takes no work: {describe(error)}")

    def _came_back(self, run: Scheduler, future: Future[Any]) -> None:
        if future not in self._in_flight:
            return
        batch = self._in_flight.pop(future)
        try:
            answer = future.result()
        except BrokenExecutor as error:
            self._make_anew(error, batch)
        except Exception as error:
            # Not the function's, which are in the report: such as dask's KilledWorker.
            if batch is None:
                raise self._refused(error) from error
            innocent = [batch] if isinstance(error, CancelledError) else []
            run.lost([batch], describe(error), innocent, sure=not self._in_flight)
        else:
            self._answered(run, batch, answer)

    def _answered(self, run: Scheduler, batch: Batch | None, answer: Any) -> None:
        if batch is None:
            self._is_near = self.marks = answer is self._probe
            # The workers of the standard library's executor have the main module; those of others may not.
            is_of_the_library = isinstance(self._executor, ProcessPoolExecutor)
            self._packer = Packer(names_in_fresh_workers() if is_of_the_library else frozenset())
            self.take_on(self._work)
            pending, self._pending = self._pending, []
            for each in pending:
                self._send(each)
            return
        if answer is None:
            self._send(batch, completely=True)
            return
        self._stillbirths = 0
        if isinstance(answer, str):
            raise OperoError(f"a worker cannot run {self._name}: {answer}")
        if self._is_near:
            run.done(batch, answer)
        else:
            self.opened(run, batch, answer)


# In the workers


def _run(work: Work, items: list[Any], limit: TimeLimit | None, how: How) -> Report:
    # An executor has no place for a loop that outlives one call.
    with runner_for(work) as runner:
        return run_batch(work, items, limit, runner, how)


def run_parcel(digest: bytes, packed: bytes | None, payload: bytes, _number: str) -> Found | str | None:
    """Run one batch in a worker that shares no memory with the map.

    Gives None if it lacks the map's work, and a text if that cannot be loaded.
    ``_number`` is different for every batch: by default dask runs no call twice that has the same arguments.
    """
    if packed is None and digest not in works:
        return None
    try:
        work = load(digest, lambda: packed or b"")
    except Exception as error:  # noqa: BLE001 - the map raises it
        return describe(error)
    arrived, how = unpack_batch(payload), How(longest=SLOW_SECONDS)
    try:
        report = arrived if isinstance(arrived, Report) else _run(work, *arrived, how)
    except BaseException as error:  # noqa: BLE001 - as in process mode; the executor might hand it to the caller
        return Found(how.mark[0], [], describe(error))
    return Found(how.mark[0], [pack_report(report)])
