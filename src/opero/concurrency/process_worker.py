"""The life of a worker process."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import signal
import struct
import sys
import threading
import time
import weakref
from dataclasses import replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from opero.concurrency import log_records
from opero.concurrency.pickling import loads
from opero.concurrency.system import ENDED_CODE, GRACE_SECONDS, fork_server
from opero.concurrency.transport import Start, pack_report, unpack_batch
from opero.concurrency.worker import How, Report, Work, in_time, run_batch, runner_for
from opero.core.forks import watch_forks
from opero.utils.notes import describe

if TYPE_CHECKING:
    import asyncio
    from multiprocessing.connection import Connection
    from multiprocessing.heap import Arena


class Kind(IntEnum):
    """Kinds of messages."""

    HELLO, BROKEN, BATCH, REPORT, PART, STOP, ARGUMENTS, LOG = range(8)


# What a message begins with: its kind, and the number of the batch that it is about; a payload follows.
HEADER = struct.Struct("<BI")
# The mark of a worker that reads a batch or makes a report, and runs none of its items; see `Parent`.
BETWEEN = 2**32 - 1
# A worker that has nothing to do may take so long to end: the interpreter tidies up, and the user's threads and exit
# handlers run.
PEACE_SECONDS = 30.0

# Those of the libraries that have threads of their own for what they compute.
THREAD_SETTINGS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


class Parent:
    """The parent process as its worker sees it: a pipe, and ``mark``, the memory that both share.

    Its element is the number of items of the batch that have begun, or `BETWEEN`; where batches of one item run
    together, the number of those that have been received since the worker began.
    """

    def __init__(self, pipe: Connection, shared: Arena) -> None:
        self.pipe = pipe
        self.mark = memoryview(shared.buffer).cast("I")
        self._sending = threading.RLock()
        self._is_interrupted = self._is_ending = False
        watch_forks(self)

    def after_fork(self) -> None:
        """Leave the pipe to the worker: as long as a child of its has it open, too, a dead worker is not noticed."""
        self.pipe.close()

    def tell(self, kind: Kind, payload: bytes = b"", number: int = 0) -> None:
        # If it has just died, its pipe will say so.
        with self._sending, contextlib.suppress(OSError):
            self.pipe.send_bytes(HEADER.pack(kind, number) + payload)

    def log(self, record: bytes) -> None:
        """Send a log record; those of exit handlers are lost."""
        if not self._is_ending:
            self.tell(Kind.LOG, record)

    def hear(self) -> tuple[int, int, memoryview]:
        """The next message: its kind, the number of its batch, its payload; `Kind.STOP` if the parent is gone."""
        try:
            data = memoryview(self.pipe.recv_bytes())
        except (EOFError, OSError):
            data = memoryview(HEADER.pack(Kind.STOP, 0))
        self._is_interrupted = False
        kind, number = HEADER.unpack_from(data)
        if kind == Kind.STOP:
            # From then on the parent hears nothing any more.
            self._is_ending = True
        return kind, number, data[HEADER.size :]

    def report(self, number: int, report: Report, kind: Kind = Kind.REPORT) -> None:
        """Report, unless Ctrl-C has come meanwhile: what it has interrupted may look like a success.

        Then the parent has a second to say what becomes of the map.
        """
        if self._is_interrupted:
            with contextlib.suppress(OSError):
                self.pipe.poll(GRACE_SECONDS)
        self.tell(kind, pack_report(report), number)

    def hear_signals(self) -> None:
        """Let Ctrl-C be the parent's business, but not ignored by programs that are started here; let SIGTERM end."""
        signal.signal(signal.SIGINT, self._interrupted)
        signal.signal(signal.SIGTERM, self._terminated)
        # A forked worker has the one of its parent's event loop, which would take this one's signals for its own.
        signal.set_wakeup_fd(-1)
        if hasattr(signal, "pthread_sigmask"):
            # Held back by the parent until here, where it can do no harm any more.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _interrupted(self, _signal: int, _frame: Any) -> None:
        self._is_interrupted = True

    def _terminated(self, _signal: int, _frame: Any) -> None:
        self._is_ending = True
        # Once: the exit handlers shall not be interrupted.
        signal.signal(signal.SIGTERM, self._interrupted)
        sys.exit(ENDED_CODE)


def serve(pipe: Connection, shared: Arena, start: Start, threads: int | None, at_once: int) -> None:
    """Run so many batches at once until the pipe ends; the whole life of a worker."""
    parent = Parent(pipe, shared)
    # At the end, however it comes, the finalizer and the user's exit handlers run; from Python 3.13 on multiprocessing
    # runs the latter by itself.
    with contextlib.ExitStack() as ending:
        ending.callback(atexit._run_exitfuncs)  # noqa: SLF001 - see above
        ending.callback(_limit_the_end)
        work = _get_ready(parent, start, threads, ending)
        if at_once > 1:
            import asyncio

            asyncio.run(_serve_together(parent, work))
        else:
            with runner_for(work) as runner:
                _serve_batches(parent, work, runner)


def _limit_the_end() -> None:
    """Wait no longer for threads that do not end; all reports have been sent."""
    end = threading.Timer(PEACE_SECONDS, os._exit, (0,))
    end.daemon = True
    end.start()


def _get_ready(parent: Parent, start: Start, threads: int | None, ending: contextlib.ExitStack) -> Work:
    """Load the work and say hello, or tell the parent why this cannot be done."""
    parent.hear_signals()
    _forget_the_parents_own()
    if threads is not None:
        _limit_threads(threads)
    try:
        with log_records.taken_from_handlers(start.levels, parent.log):
            work, initializer, initargs, finalizer = start.load()
            _seed()
            if initializer is not None:
                initializer(*initargs)
    except Exception as error:
        parent.tell(Kind.BROKEN, describe(error).encode(errors="backslashreplace"))
        raise SystemExit from error
    if finalizer is not None:
        ending.callback(finalizer)
    parent.tell(Kind.HELLO)
    return work


def _forget_the_parents_own() -> None:
    """Let a forked worker have exit handlers and a fork server of its own, but none of its parent's."""
    # Only the parent can wait for that one.
    fork_server()["_forkserver_pid"] = None
    if sys.version_info < (3, 13):
        # Newer ones have done so already, and use exit handlers of their own.
        atexit._clear()  # noqa: SLF001 - see above
    finalize: Any = weakref.finalize
    for finalizer in finalize._registry:  # noqa: SLF001 - as above
        finalizer.atexit = False
    finalize._registered_with_atexit = False  # noqa: SLF001 - as above


def _seed() -> None:
    """Let each worker have random numbers of its own: forked ones share the state, the main module may set one."""
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _limit_threads(count: int) -> None:
    """Let numeric libraries have so many threads: each would have one for each CPU in each worker."""
    for name in THREAD_SETTINGS:
        os.environ[name] = str(count)
    if "numpy" in sys.modules:
        with contextlib.suppress(ImportError):
            import threadpoolctl

            threadpoolctl.threadpool_limits(count)


def _serve_batches(parent: Parent, work: Work, runner: asyncio.Runner | None) -> None:
    while True:
        kind, number, payload = parent.hear()
        if kind == Kind.STOP:
            return
        if kind == Kind.ARGUMENTS:
            work = _with_arguments(work, payload)
        else:
            _run_batch(parent, work, runner, number, payload)


def _run_batch(parent: Parent, work: Work, runner: asyncio.Runner | None, number: int, payload: memoryview) -> None:
    def report(made: Report, kind: Kind = Kind.PART) -> None:
        parent.mark[0] = BETWEEN
        parent.report(number, made, kind)

    parent.mark[0] = BETWEEN
    arrived = unpack_batch(payload)
    if not isinstance(arrived, Report):
        arrived = run_batch(work, *arrived, runner, How(mark=parent.mark, tell=report))
    report(arrived, Kind.REPORT)


def _with_arguments(work: Work, payload: memoryview) -> Work:
    """The work of the next map.

    If its arguments cannot be unpickled, this worker ends; the one that replaces it has them from the start if it is
    forked, or says what is wrong.
    """
    try:
        return replace(work, shape=loads(payload))
    except Exception as error:
        raise SystemExit from error


async def _serve_together(parent: Parent, work: Work) -> None:
    """Run every batch, of one item, in a task of its own; messages have its number before their payload."""
    import asyncio

    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[Any] = asyncio.Queue()

    def hear() -> None:
        kind = None
        while kind != Kind.STOP:
            message = parent.hear()
            kind = message[0]
            loop.call_soon_threadsafe(heard.put_nowait, message)

    running: set[asyncio.Task[None]] = set()

    def ended(task: asyncio.Task[None]) -> None:
        running.discard(task)
        if task.cancelled() or task.exception() is not None:
            heard.put_nowait(task)

    threading.Thread(target=hear, daemon=True).start()
    while True:
        message = await heard.get()
        if isinstance(message, asyncio.Task):
            # As in a worker that runs plain functions, what is no `Exception` ends the worker.
            message.result()
        kind, number, payload = message
        if kind == Kind.STOP:
            return
        if kind == Kind.ARGUMENTS:
            work = _with_arguments(work, payload)
        else:
            parent.mark[0] += 1
            task = loop.create_task(_run_one(parent, work, number, payload))
            running.add(task)
            task.add_done_callback(ended)


async def _run_one(parent: Parent, work: Work, number: int, payload: memoryview) -> None:
    report = unpack_batch(payload)
    if not isinstance(report, Report):
        (item,), limit = report
        started = time.perf_counter()
        value, errors = None, {}
        try:
            value = await in_time(work.caller(), item, limit, work)
        except Exception as error:  # noqa: BLE001 - the policies of the calling process decide about it
            errors[0] = error
        report = Report([value], errors, time.perf_counter() - started)
    parent.report(number, report)
