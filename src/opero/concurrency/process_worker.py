"""The life of a worker process."""

from __future__ import annotations

import atexit
import contextlib
import logging
import mmap
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass, replace
from multiprocessing.context import get_spawning_popen
from multiprocessing.heap import Arena
from typing import TYPE_CHECKING, Any

from opero.concurrency.pickling import Packer, WorkerLife, loads, pack_record, pack_report, unpack_batch, unpack_start
from opero.concurrency.system import ENDED_CODE, GRACE_SECONDS
from opero.concurrency.worker import How, Report, Work, run_batch, run_one, runner_for
from opero.core.forks import forget_exit_handlers, watch_forks
from opero.utils.notes import describe

if TYPE_CHECKING:
    import asyncio
    from multiprocessing.connection import Connection

# The mark of a worker that reads a batch or makes a report, and runs none of its items; see `Parent`.
BETWEEN = 2**32 - 1
_ALIGNMENT = 64
# A worker that has nothing to do may take so long to end: the interpreter tidies up, and the user's threads and exit
# handlers run.
PEACE_SECONDS = 30.0

# Those of the libraries that NumPy and its like compute with; who sets one of them sees to all of these.
THREAD_SETTINGS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
# Those that others look at when they are imported, each only at its own.
_SETTINGS_OF_OTHERS = {"numba": "NUMBA_NUM_THREADS", "cv2": "OPENCV_FOR_THREADS_NUM", "polars": "POLARS_MAX_THREADS"}


@dataclass
class Start:
    """What a worker process begins with; ``life`` is packed while one is started, if it is not forked.

    Large arrays go to a file; its pages are shared by all workers until one writes to them, which the others do not
    see.

    ``levels``, ``filters``, ``environ``: those of the program's loggers and warnings, and its environment, where a
    worker has not got them yet.
    """

    packer: Packer
    life: WorkerLife | None
    levels: dict[str, int]
    filters: list[Any]
    environ: dict[str, str] | None
    packed: Any = None

    def __getstate__(self) -> dict[str, Any]:
        packed = self.packed
        if packed is None and self.life is not None:
            # Files that the process inherits are listed there; without any, others can be sent the same.
            inherited: Any = getattr(get_spawning_popen(), "_fds", [])
            count = len(inherited)
            large: list[memoryview] = []
            packed = self.packer.start(self.life, large), *_in_a_file(large)
            if len(inherited) == count:
                self.packed = packed
        return {**vars(self), "life": None, "packed": packed}

    def load(self) -> WorkerLife:
        """What it was made of, in a worker; one that was forked has it already."""
        if self.life is not None:
            return self.life
        data, file, spans = self.packed
        if file is None:
            return unpack_start(data)
        mapped = memoryview(mmap.mmap(file.fd, file.size, flags=mmap.MAP_PRIVATE))
        return unpack_start(data, (mapped[start:end] for start, end in spans))


def _in_a_file(large: list[memoryview]) -> tuple[Arena | None, list[tuple[int, int]]]:
    """Write them to a file that multiprocessing chooses, in memory if there is room; gives where each is there."""
    if not large:
        return None, []
    made: Any = arena(sum(view.nbytes + _ALIGNMENT for view in large))
    spans = []
    # Twice as fast as to write to the memory into which it is mapped.
    with open(made.fd, "wb", closefd=False) as file:
        for view in large:
            start = file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
            spans.append((start, start + file.write(view)))
    return made, spans


def arena(size: int) -> Arena:
    """Memory of multiprocessing for processes that it starts; a file where it finds no place, such as in AWS Lambda."""
    try:
        return Arena(size)
    except OSError:
        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            return Arena(size, os.dup(file.fileno()))


class Parent:
    """The parent process as its worker sees it: a pipe, and ``mark``, the memory that both share.

    A message in the pipe is a triple of its kind, the number of the batch that it is about, and more.
    The mark is the number of items of the batch that have begun, or `BETWEEN`; where batches of one item run together,
    the number of those that have been received since the worker began.
    """

    work: Work
    # Whether this process is a worker that imports what it shall run.
    is_loading = False

    def __init__(self, pipe: Connection, shared: Arena) -> None:
        self.pipe = pipe
        self.mark = memoryview(shared.buffer).cast("I")
        self._sending = threading.RLock()
        self._is_interrupted = False
        watch_forks(self)

    def after_fork(self) -> None:
        """Leave the pipe to the worker: as long as a child of its has it open, too, a dead worker is not noticed."""
        self.pipe.close()

    def tell(self, kind: str, payload: bytes = b"", number: int = 0) -> None:
        # If it has just died, its pipe will say so.
        with self._sending, contextlib.suppress(OSError):
            try:
                self.pipe.send((kind, number, payload))
            except SystemExit:
                # SIGTERM has come, and nothing can follow half a message.
                self.pipe.close()
                raise

    def hear(self) -> tuple[int, bytes] | None:
        """The next batch, its number first; None at the end, also when the parent is gone.

        Also where the arguments of the next map cannot be read: the worker that replaces this one says what is wrong.
        """
        with contextlib.suppress(Exception):
            while True:
                kind, number, payload = self.pipe.recv()
                self._is_interrupted = False
                if kind == "batch":
                    return number, payload
                if kind == "stop":
                    break
                self.work = replace(self.work, shape=loads(payload))
        return None

    def report(self, number: int, report: Report, kind: str = "report") -> None:
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
        parent: Any = multiprocessing.parent_process()
        if sys.platform == "linux":
            import fcntl

            # If the parent is killed, which ends a pipe, nobody hears of what runs here, and it might have no end.
            signal.signal(signal.SIGIO, self._terminated)
            fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, os.O_ASYNC)
        if hasattr(signal, "pthread_sigmask"):
            # Held back by the parent until here, where they can do no harm any more.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})

    def _interrupted(self, _signal: int, _frame: Any) -> None:
        self._is_interrupted = True

    def _terminated(self, _signal: int, _frame: Any) -> None:
        # Once: the exit handlers shall not be interrupted.
        signal.signal(signal.SIGTERM, self._interrupted)
        sys.exit(ENDED_CODE)


def serve(pipe: Connection, shared: Arena, start: Start, threads: int | None, at_once: int) -> None:
    """Run so many batches at once until the pipe ends; the whole life of a worker."""
    parent = Parent(pipe, shared)
    if start.life is not None:
        # It was forked.
        forget_exit_handlers()
    # At the end, however it comes, the finalizer and the user's exit handlers run; from Python 3.13 on multiprocessing
    # runs the latter by itself. All reports have been sent: threads that do not end are not waited for any longer.
    limit = threading.Timer(PEACE_SECONDS, os._exit, (0,))
    limit.daemon = True
    with contextlib.ExitStack() as ending:
        ending.callback(atexit._run_exitfuncs)  # noqa: SLF001 - see above
        ending.callback(_end_executors)
        ending.callback(limit.start)
        _get_ready(parent, start, threads, ending)
        # An event loop that is half made, or a coroutine that has not begun, would complain of its end.
        _hold_back_the_end("SIG_BLOCK")
        with runner_for(parent.work) as runner:
            if runner is not None and at_once > 1:
                runner.run(_serve_together(parent))
            else:
                _hold_back_the_end("SIG_UNBLOCK")
                _serve_batches(parent, runner)


def _hold_back_the_end(how: str) -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(getattr(signal, how), {signal.SIGTERM, signal.SIGIO})


def _get_ready(parent: Parent, start: Start, threads: int | None, ending: contextlib.ExitStack) -> None:
    """Load the work and say hello, or tell the parent why this cannot be done."""
    handler = _ToParent(parent)
    for logger in known_loggers():
        # Not closed: in a forked worker their files are the parent's, too.
        logger.handlers.clear()
    for name, level in start.levels.items():
        logging.getLogger(name).setLevel(level)
    # While the initializer may configure logging: `basicConfig` does nothing where the root has a handler.
    logging.lastResort = handler
    parent.hear_signals()
    try:
        if start.environ is not None:
            os.environ.clear()
            os.environ.update(start.environ)
        if threads is not None:
            _limit_threads(threads)
        Parent.is_loading = True
        parent.work, initializer, initargs, finalizer = start.load()
        Parent.is_loading = False
        # Before those of what has just been imported.
        warnings.filters = [*start.filters, *warnings.filters]
        # Forked workers share the state of the parent's, and the main module may set one.
        random.seed()
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is not None:
            numpy_random.seed()
        if initializer is not None:
            initializer(*initargs)
    except Exception as error:
        parent.tell("broken", describe(error).encode(errors="backslashreplace"))
        raise SystemExit from error
    # Libraries give their loggers handlers that do nothing.
    handlers = [one for logger in known_loggers() for one in logger.handlers if type(one) is not logging.NullHandler]
    if not handlers and not logging.root.handlers:
        logging.root.addHandler(handler)
    if finalizer is not None:
        ending.callback(finalizer)
    parent.tell("hello")


class _ToParent(logging.Handler):
    """Lets the parent's handlers have what a worker logs, unless the initializer gives any logger a handler."""

    def __init__(self, parent: Parent) -> None:
        super().__init__()
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._parent.tell("log", pack_record(record))
        except Exception:  # noqa: BLE001 - as all handlers: it may be a mistake in the program's line
            self.handleError(record)


def known_loggers() -> list[logging.Logger]:
    """All that there are in this process."""
    known = list(logging.Logger.manager.loggerDict.values())
    return [logging.getLogger(), *(logger for logger in known if isinstance(logger, logging.Logger))]


def _end_executors() -> None:
    """Let those of joblib and the library end, as at a program's end: multiprocessing waits for their processes."""
    handlers: list[Any] = getattr(threading, "_threading_atexits", [])
    while handlers:
        handlers.pop()()


def _limit_threads(count: int) -> None:
    """Let numeric libraries have so many threads: each would have one for each CPU in each worker."""
    os.environ.update(dict.fromkeys(THREAD_SETTINGS, str(count)))
    for library, name in _SETTINGS_OF_OTHERS.items():
        if library not in sys.modules:
            os.environ.setdefault(name, str(count))
    # It compiles nothing where the environment says another number than that which it has read.
    numba = sys.modules.get("numba")
    if numba is not None and not os.environ.get("NUMBA_NUM_THREADS"):
        with contextlib.suppress(Exception):
            numba.set_num_threads(count)
    if "numpy" in sys.modules:
        with contextlib.suppress(ImportError):
            import threadpoolctl

            threadpoolctl.threadpool_limits(count)


def _serve_batches(parent: Parent, runner: asyncio.Runner | None) -> None:
    def report(made: Report, kind: str = "part") -> None:
        parent.mark[0] = BETWEEN
        parent.report(number, made, kind)

    how = How(mark=parent.mark, tell=report)
    while (message := parent.hear()) is not None:
        parent.mark[0] = BETWEEN
        number, payload = message
        arrived = unpack_batch(payload)
        del message, payload
        if not isinstance(arrived, Report):
            arrived = run_batch(parent.work, *arrived, runner, how)
        report(arrived, "report")
        del arrived


async def _serve_together(parent: Parent) -> None:
    """Run every batch, of one item, in a task of its own."""
    import asyncio

    _hold_back_the_end("SIG_UNBLOCK")
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[Any] = asyncio.Queue()

    def hear() -> None:
        message: Any = ()
        # The loop may be closed: the worker ends.
        with contextlib.suppress(RuntimeError):
            while message is not None:
                message = parent.hear()
                loop.call_soon_threadsafe(heard.put_nowait, message)

    async def run(number: int, payload: bytes) -> None:
        try:
            arrived = unpack_batch(payload)
            if not isinstance(arrived, Report):
                (item,), limit = arrived
                arrived = await run_one(parent.work, item, limit)
            parent.report(number, arrived)
        except BaseException as error:  # noqa: BLE001 - as in a worker that runs plain functions, it ends the worker
            heard.put_nowait(error)

    threading.Thread(target=hear, daemon=True).start()
    running: set[asyncio.Task[None]] = set()
    while (message := await heard.get()) is not None:
        if isinstance(message, BaseException):
            raise message
        parent.mark[0] += 1
        task = loop.create_task(run(*message))
        running.add(task)
        task.add_done_callback(running.discard)
