"""The life of a worker process."""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing.context
import os
import pickle
import random
import signal
import struct
import sys
import threading
import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opero.concurrency import log_records
from opero.concurrency.ending import ENDED_CODE, GRACE_SECONDS
from opero.concurrency.shared_buffers import SharedBuffers
from opero.concurrency.transport import pack_report, unpack_batch, unpack_start
from opero.concurrency.worker import AsyncCaller, How, Report, Work, in_time, run_batch
from opero.core.forks import watch_forks
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from opero.concurrency.transport import Packer, WorkerLife


class Kind:
    """Kinds of messages: the first byte; what follows is a payload."""

    HELLO, BROKEN, BATCH, REPORT, PART, STOP, ARGUMENTS, LOG = (bytes([kind]) for kind in range(8))


# What a batch and its report begin with.
NUMBER = struct.Struct("<I")
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


class Start:
    """What a worker process begins with; pickled only while one is started afresh, with what it can only inherit."""

    def __init__(self, packer: Packer, life: WorkerLife, threads: int | None) -> None:
        self._packer = packer
        self._life: WorkerLife | None = life
        self._packed: tuple[bytes, SharedBuffers] | None = None
        self.threads = threads
        self.logging = log_records.settings_here()

    def __getstate__(self) -> Any:
        assert self._life is not None  # noqa: S101 - for the type checkers
        packed = self._packed
        if packed is None:
            # Files that the process inherits are listed there; without any, others can be sent the same.
            inherited: Any = getattr(multiprocessing.context.get_spawning_popen(), "_fds", [])
            count, shared = len(inherited), SharedBuffers()
            packed = self._packer.start(self._life, shared), shared
            if len(inherited) == count:
                self._packed = packed
        return packed, self.threads, self.logging

    def __setstate__(self, state: Any) -> None:
        self._packed, self.threads, self.logging = state
        self._life = None

    def load(self) -> WorkerLife:
        """What it was made of, in a worker; one that was forked has it already."""
        if self._life is None:
            assert self._packed is not None  # noqa: S101 - for the type checkers
            data, shared = self._packed
            self._life = unpack_start(data, shared.views())
        return self._life


class Parent:
    """The parent process as its worker sees it: a pipe, and ``mark``, the memory that both share.

    Its element is the number of items of the batch that have begun, or `BETWEEN`; where batches of one item run
    together, the number of those that have been received since the worker began.
    """

    def __init__(self, pipe: Connection, marks: Any, place: int) -> None:
        self.pipe = pipe
        self.mark = marks_at(marks, place)
        self._sending = threading.RLock()
        self._interrupts = self._interrupts_before = 0
        self._is_ending = self._is_terminated = False
        watch_forks(self)

    def after_fork(self) -> None:
        """Leave the pipe to the worker: as long as a child of its has it open, too, a dead worker is not noticed."""
        self.pipe.close()

    def tell(self, kind: bytes, payload: bytes = b"") -> None:
        with self._sending:
            self.pipe.send_bytes(kind + payload)

    def log(self, record: bytes) -> None:
        """Send a log record; those of exit handlers are lost."""
        if not self._is_ending:
            self.tell(Kind.LOG, record)

    def hear(self) -> tuple[bytes, memoryview]:
        """The next message, its kind and payload."""
        data = memoryview(self.pipe.recv_bytes())
        self._interrupts_before = self._interrupts
        kind = bytes(data[:1])
        # From then on the parent hears nothing any more.
        self._is_ending = self._is_ending or kind == Kind.STOP
        return kind, data[1:]

    def report(self, number: bytes, report: Report, *, is_last: bool) -> None:
        """Report, unless Ctrl-C has come meanwhile: what it has interrupted may look like a success.

        Then the parent has a second to say what becomes of the map.
        """
        if self._interrupts > self._interrupts_before:
            self.pipe.poll(GRACE_SECONDS)
        self.tell(Kind.REPORT if is_last else Kind.PART, number + pack_report(report))

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
        self._interrupts += 1

    def _terminated(self, _signal: int, _frame: Any) -> None:
        # Once: the exit handlers shall not be interrupted.
        if not self._is_terminated:
            self._is_terminated = self._is_ending = True
            sys.exit(ENDED_CODE)


def marks_at(marks: Any, place: int) -> memoryview:
    """The memory that a worker shares with its parent, of an arena of multiprocessing's that has that of all."""
    return memoryview(marks.buffer).cast("I")[place : place + 1]


def serve(pipe: Connection, marks: Any, place: int, start: Start) -> None:
    """Run batches, one after the other, until the pipe ends; the whole life of a worker."""
    parent = Parent(pipe, marks, place)
    with _ending() as ending:
        work = _get_ready(parent, start, ending)
        # Without a parent there is nobody to report to.
        with contextlib.suppress(EOFError, OSError):
            if work is not None:
                _serve_batches(parent, work)


async def serve_async(pipe: Connection, marks: Any, place: int, start: Start) -> None:
    """Run batches, as many as come at the same time, until the pipe ends; the whole life of a worker."""
    # aiomultiprocess (0.9.1) writes a traceback of `SystemExit`, by which a worker is ended.
    logging.getLogger("aiomultiprocess.core").disabled = True
    parent = Parent(pipe, marks, place)
    with _ending() as ending:
        work = _get_ready(parent, start, ending)
        if work is not None:
            await _AsyncServer(parent, work).ended


@contextlib.contextmanager
def _ending() -> Iterator[contextlib.ExitStack]:
    """Run the finalizer, which is given to the stack, and the user's exit handlers at the end, however it comes.

    From Python 3.13 on multiprocessing runs the exit handlers by itself.
    """
    with contextlib.ExitStack() as ending:
        ending.callback(atexit._run_exitfuncs)  # noqa: SLF001 - see above
        try:
            yield ending
        finally:
            # Threads that do not end are not waited for any longer; all reports have been sent.
            end = threading.Timer(PEACE_SECONDS, os._exit, (0,))
            end.daemon = True
            end.start()


def _get_ready(parent: Parent, start: Start, ending: contextlib.ExitStack) -> Work | None:
    """Load the work and say hello; None if the parent has been told that this cannot be done."""
    parent.hear_signals()
    _forget_the_parents_own()
    if start.threads is not None:
        _limit_threads(start.threads)
    try:
        with log_records.taken_from_handlers(start.logging, parent.log):
            work, initializer, initargs, finalizer = start.load()
            _seed()
            if initializer is not None:
                initializer(*initargs)
        if finalizer is not None:
            ending.callback(finalizer)
    except Exception as error:  # noqa: BLE001 - the parent raises it
        parent.tell(Kind.BROKEN, describe(error).encode(errors="backslashreplace"))
        return None
    with contextlib.suppress(OSError):
        parent.tell(Kind.HELLO)
    return work


def _forget_the_parents_own() -> None:
    """Let this worker have workers of its own, for maps inside maps, and exit handlers, but none of its parent's."""
    import multiprocessing.forkserver
    import multiprocessing.process

    multiprocessing.process.current_process().daemon = False
    # A fork server that a forked worker inherited can be waited for only by the parent.
    server: Any = multiprocessing.forkserver._forkserver  # noqa: SLF001 - no function does it
    inherited = server._inherited_fds  # noqa: SLF001 - as above
    server.__init__()
    server._inherited_fds = inherited  # noqa: SLF001 - as above
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


def _serve_batches(parent: Parent, work: Work) -> None:
    with contextlib.closing(AsyncCaller()) if work.is_async else contextlib.nullcontext() as caller:
        while True:
            kind, payload = parent.hear()
            if kind == Kind.STOP:
                return
            if kind == Kind.ARGUMENTS:
                changed = _with_arguments(work, payload)
                if changed is None:
                    return
                work = changed
                continue
            parent.mark[0] = BETWEEN
            arrived = unpack_batch(payload[NUMBER.size :])
            number = bytes(payload[: NUMBER.size])

            def report(made: Report, *, is_last: bool = False, number: bytes = number) -> None:
                parent.mark[0] = BETWEEN
                parent.report(number, made, is_last=is_last)

            if not isinstance(arrived, Report):
                arrived = run_batch(work, *arrived, caller, How(mark=parent.mark, tell=report))
            report(arrived, is_last=True)
            del arrived, payload


def _with_arguments(work: Work, payload: memoryview) -> Work | None:
    """The work of the next map; None if its arguments cannot be unpickled.

    This worker ends then, and the one that replaces it has them from the start if it is forked, or says what is wrong.
    """
    try:
        return replace(work, shape=pickle.loads(payload))  # noqa: S301 - from the parent process
    except Exception:  # noqa: BLE001 - see above
        return None


class _AsyncServer:
    """Runs every batch, of one item, in a task of its own; messages have its number before their payload."""

    def __init__(self, parent: Parent, work: Work) -> None:
        import asyncio

        self._parent = parent
        self._work = work
        self._tasks: set[Any] = set()
        self._loop = asyncio.get_running_loop()
        self.ended = self._loop.create_future()
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        kind = b""
        while kind != Kind.STOP:
            try:
                kind, payload = self._parent.hear()
            except (EOFError, OSError):
                kind, payload = Kind.STOP, memoryview(b"")
            self._loop.call_soon_threadsafe(self._heard, kind, payload)

    def _heard(self, kind: bytes, payload: memoryview) -> None:
        if self.ended.done():
            return
        if kind == Kind.BATCH:
            self._parent.mark[0] += 1
            task = self._loop.create_task(self._run(payload))
            self._tasks.add(task)
            task.add_done_callback(self._run_ended)
            return
        changed = _with_arguments(self._work, payload) if kind == Kind.ARGUMENTS else None
        if changed is not None:
            self._work = changed
        else:
            self.ended.set_result(None)

    def _run_ended(self, task: Any) -> None:
        self._tasks.discard(task)
        # As in a worker that runs plain functions, what is no `Exception` ends the worker.
        if task.cancelled():
            self.ended.cancel()
        elif task.exception() is not None and not self.ended.done():
            self.ended.set_exception(task.exception())

    async def _run(self, payload: memoryview) -> None:
        report = unpack_batch(payload[NUMBER.size :])
        if not isinstance(report, Report):
            (item,), candidate, limit = report
            started = time.perf_counter()
            value, errors = None, {}
            try:
                value = await in_time(self._work.caller(candidate), item, limit, self._work)
            except Exception as error:  # noqa: BLE001 - the policies of the calling process decide about it
                errors[0] = error
            report = Report([value], errors, time.perf_counter() - started)
        self._parent.report(bytes(payload[: NUMBER.size]), report, is_last=True)
