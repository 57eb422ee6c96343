"""The process pool: bare processes of multiprocessing, started through twat-mp, and a private pipe to each.

twat-mp (2.6.5) has pools whose `map` hangs for ever when a process dies (so does `multiprocessing.Pool`), and that are
strangers to the standard library's managers, locks and handlers. So its `MultiPool` gets processes of the standard
library, and the work goes over a pipe of opero's: a death is the end of exactly one pipe, and hits exactly the batch
that was in it. A worker gets its next batch when it has reported on the one before.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any

from opero.concurrency.batches import Batch, Done, Fatal, Lost, Pool, not_run
from opero.concurrency.ctrl_c import held_back_in_children, in_own_thread
from opero.concurrency.ending import ENDED_CODE, GRACE_SECONDS, end_by_force, end_family, family_of, wait_until_ended
from opero.concurrency.log_records import hand_on
from opero.concurrency.main_module import (
    MAINS,
    everything,
    fresh_workers_have,
    imported_by_main,
    only_if_it_can_be_imported,
)
from opero.concurrency.native_threads import fork_server_has_threads, has_native_threads
from opero.concurrency.process_worker import (
    ARGUMENTS,
    BATCH,
    BROKEN,
    HELLO,
    LOG,
    NUMBER,
    PEACE_SECONDS,
    REPORT,
    STOP,
    THREAD_SETTINGS,
    Start,
    marks_at,
    serve,
)
from opero.concurrency.transport import Packer, unpack_report
from opero.core.forks import ForkSafeLock, foreign_threads, watch_forks
from opero.core.interrupts import Hold
from opero.core.signature import module_of, name_of
from opero.exceptions import NotTransferableError, OperoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opero.concurrency.inbox import Inbox
    from opero.concurrency.worker import Work

LARGEST_BATCH = 10_000
# By which a worker ends that has called a map while it imported the main module.
UNGUARDED_CODE = 113
# So many workers in a row that end before they are ready are not an accident: it may be the main module, or the
# initializer. Once one has been ready it is more likely somebody who kills them.
MOST_STILLBIRTHS = 3
MOST_LATE_STILLBIRTHS = 100

# Held while a worker is started: what must not be open in any other process is open then.
starting = ForkSafeLock()


class _OpenEnds:
    """The ends of pipes to workers that are open in this process; a child has none but that of the worker it is.

    As long as a copy of a worker's end is open somewhere else, its death is not noticed.
    """

    def __init__(self) -> None:
        self.all: set[Any] = set()
        # The one that is being given to a worker, and the thread that starts it.
        self.given: tuple[Any, int] = None, 0
        watch_forks(self)

    def after_fork(self) -> None:
        end, thread = self.given
        for other in self.all - ({end} if thread == threading.get_ident() else set()):
            other.close()
        self.all.clear()


_open_ends = _OpenEnds()


class Processes:
    """Bare processes, in the form of a pool that twat-mp's `MultiPool` can enter and leave."""

    map = None

    def __init__(self) -> None:
        self.running: list[Any] = []

    def start(self, process: Any) -> Any:
        with _allowed_to_start():
            process.start()
        self.running.append(process)
        return process

    def remove(self, process: Any) -> None:
        """Forget a process that has ended, or that is another's; what is open for it is closed."""
        self.running.remove(process)
        # Not by its own `close`, which fails where another thread or the system was told how it ended.
        process._popen.close()  # noqa: SLF001 - see above
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]  # noqa: SLF001 - as above

    def close(self) -> None:
        """Those that are to end in peace have been told so."""

    def join(self) -> None:
        end_by_force(wait_until_ended(self.running, PEACE_SECONDS))

    def terminate(self) -> None:
        end_by_force(self.running)

    def clear(self) -> None:
        for process in self.running.copy():
            self.remove(process)


@contextlib.contextmanager
def _allowed_to_start() -> Iterator[None]:
    """Let a map start workers inside of a worker of `multiprocessing.Pool`, too; they end with their pipes.

    Python 3.12 warns of forks beside threads; those are counted before, and may be the program's wish.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # noqa: SLF001 - it asks this
    before = config.get("daemon")
    config["daemon"] = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            yield
    finally:
        config["daemon"] = before


class Worker:
    """One worker process as the parent sees it."""

    def __init__(self, process: Any, pipe: Any, marks: Any, place: int, most_items: int | None) -> None:
        self.process = process
        self.pipe = pipe
        self.place = place
        self.is_deaf = False
        self.room = sys.maxsize if most_items is None else most_items
        self.is_ready = False
        self.is_reserved = False
        # By their numbers, which count from 1; and how many items, of how many bytes, each had when it was sent.
        self.batches: dict[int, Batch] = {}
        self._sent: dict[int, tuple[int, int]] = {}
        self._count = 0
        # Memory that the worker shares, see `process_worker.Parent`.
        self._mark = marks_at(marks, place)
        self._mark[0] = self._mark[1] = 0
        self._ends_since: float | None = None
        self._family: dict[int, str] = {}

    def accepts(self, batch: Batch, at_once: int) -> bool:
        if not self.is_ready or self.is_reserved or len(self.batches) >= at_once:
            return False
        return len(batch.items) <= self.room and not (batch.alone and self.batches)

    def tell(self, kind: bytes, payload: bytes = b"") -> None:
        # If it has just died, its pipe will say so.
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(kind + payload)

    def send(self, batch: Batch, data: bytes) -> None:
        self._count += 1
        self._mark[0] = 0
        self.room -= len(batch.items)
        self.is_reserved = batch.alone
        self.batches[self._count] = batch
        self._sent[self._count] = len(batch.items), len(data)
        self.tell(BATCH, NUMBER.pack(self._count) + data)

    def reported(self, number: int, ran: int, *, is_last: bool) -> tuple[Batch, int]:
        """The batch that has been reported on, and its size in bytes."""
        left, size = self._sent.pop(number)
        if not is_last:
            self._sent[number] = left - ran, size
            return self.batches[number], size
        self.room += left - ran
        self.is_reserved = False
        return self.batches.pop(number), size

    def begun(self) -> int:
        """How many items of its only batch have begun."""
        return self._mark[0]

    def unread(self) -> list[Batch]:
        """Batches that the worker has not received to their end."""
        return [batch for number, batch in self.batches.items() if number > self._mark[1]]

    def end_soon(self) -> None:
        """Let it raise `SystemExit`; if it was asked for that a second ago, kill it."""
        self.room = 0
        self._family |= family_of(self.process.pid)
        if self._ends_since is None:
            self._ends_since = time.monotonic()
            self.process.terminate()
        elif time.monotonic() - self._ends_since >= GRACE_SECONDS:
            self.process.kill()

    def has_ended(self) -> None:
        """The end of its pipe has come."""
        end_by_force(wait_until_ended([self.process], GRACE_SECONDS))
        end_family(self._family)


class ProcessPool(Pool):
    """Runs batches in processes, which are started when there is something to run, and replaced when they end."""

    most_in_batch = LARGEST_BATCH
    runs_together = False
    can_rest = can_kill = True
    at_once = 1

    def __init__(
        self,
        work: Work,
        workers: int,
        *,
        start_method: str | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        finalizer: Callable[[], Any] | None = None,
        max_tasks_per_worker: int | None = None,
        threads_per_worker: int | None = None,
    ) -> None:
        self._work = work
        self._hooks = initializer, initargs, finalizer
        self._most_items = max_tasks_per_worker
        if threads_per_worker is None and not any(map(os.environ.get, THREAD_SETTINGS)):
            threads_per_worker = max(1, (os.cpu_count() or 1) // workers)
        self._threads = threads_per_worker
        self._name = name_of(work.function)
        self._size = self._most_workers = workers
        method, self._method_is_given = (start_method, True) if start_method else _start_method()
        self._use(method)
        watch_forks(self)
        self._multi_pool: Any = None
        self._processes = Processes()
        self._marks: Any = None
        self._free_marks: list[int] = []
        self._workers: list[Worker] = []
        self._pending: deque[Batch] = deque()
        self._is_paced = False
        self._stopped = False
        self._stillbirths = 0
        self._most_stillbirths = MOST_STILLBIRTHS
        self._hearing = threading.Lock()

    def _use(self, method: str) -> None:
        self._packer = Packer(everything if method == "fork" else fresh_workers_have())
        self._start = Start(self._packer, (self._work, *self._hooks), self._threads)
        if method != "fork":
            # A forked worker has everything already, even what cannot be pickled.
            self._start.pack()
        self._method = method
        self._context: Any = multiprocessing.get_context(method)

    def after_fork(self) -> None:
        """Leave the workers to the parent."""
        atexit.unregister(self.stop)
        self._stopped = True
        workers, self._workers = self._workers, []
        for worker in workers:
            # It ends those that are noted there with this process.
            multiprocessing.process._children.discard(worker.process)  # type: ignore[attr-defined]  # noqa: SLF001 - see above

    @property
    def slots(self) -> int:
        """Batches that can run at the same time, in workers that are there or can be started.

        Where calls shall start at a rate, only in those that are ready: else they would start when their worker does.
        """
        count = 0 if self._is_paced else self.at_once * max(0, self._size - len(self._workers))
        for worker in self._workers:
            if worker.is_ready or not self._is_paced:
                # One that may run no further items only ends what it has.
                count += self.at_once if worker.room else min(self.at_once, len(worker.batches))
        return count

    @property
    def largest_batch(self) -> int:
        """Items that may be sent in one go now: as many as whichever worker gets them may still run."""
        if self._most_items is None:
            return self.most_in_batch
        rooms = [worker.room for worker in self._workers if len(worker.batches) < self.at_once and worker.room]
        return min(self.most_in_batch, self._most_items, *rooms)

    def start(self, inbox: Inbox, *, most_batches: int | None = None, is_paced: bool = False, **_more: object) -> None:
        # A worker that imports an unguarded main module: by this mark multiprocessing itself would refuse to start
        # another process, with a traceback from each worker. The map that has started this one tells.
        if self._method != "fork" and getattr(multiprocessing.current_process(), "_inheriting", False):
            raise SystemExit(UNGUARDED_CODE)
        self._inbox = inbox
        self._size = self._most_workers if most_batches is None else max(1, min(self._most_workers, most_batches))
        self._is_paced = is_paced
        # A stream that is still open when the program ends is closed too late: threads and modules are gone by then.
        atexit.unregister(self.stop)
        atexit.register(self.stop)
        for worker in self._workers:
            self._listen_to(worker)

    def prepare(self) -> None:
        """Start workers for calls that take no slot before one of them is ready."""
        self._start_workers()

    def submit(self, batch: Batch) -> None:
        self._pending.append(batch)
        self._hand_out()

    def begun(self, batch: Batch) -> int | None:
        return next((worker.begun() for worker in self._workers if batch in worker.batches.values()), 0)

    def kill(self, batch: Batch) -> bool:
        """End the worker that runs the batch, by force if that was asked before, unless it is reporting."""
        for worker in self._workers:
            if batch in worker.batches.values():
                if worker.pipe.poll():
                    return False
                worker.end_soon()
        return True

    def rest(self) -> None:
        self._turn_away_from(*self._workers)

    def take_on(self, work: Work) -> None:
        arguments = self._packer.arguments(work)
        self._work = work
        self._use(self._method)
        for worker in self._workers:
            worker.tell(ARGUMENTS, arguments)

    def receive(self, event: Any) -> Any:
        """Make sense of what was heard; None if it is of no interest to the scheduler."""
        if not isinstance(event, tuple):
            return event
        worker, data = event
        if worker not in self._workers:
            return None
        if data is None:
            return self._worker_ended(worker)
        kind, payload = bytes(data[:1]), data[1:]
        if kind == HELLO:
            worker.is_ready = True
            self._stillbirths, self._most_stillbirths = 0, MOST_LATE_STILLBIRTHS
            self._hand_out()
        elif kind == LOG:
            hand_on(payload)
        elif kind == BROKEN:
            return Fatal(OperoError(f"a worker process cannot run {self._name}: {bytes(payload).decode()}"))
        else:
            return self._worker_reports(worker, payload, is_last=kind == REPORT)
        return None

    async def stop_async(self) -> None:
        # Here: an event loop is told by its own thread.
        self._turn_away_from(*self._workers)
        await in_own_thread(self.stop)

    def stop(self, is_left: Callable[[], bool] = lambda: False) -> None:  # noqa: ARG002 - it does not take long
        """End idle workers in peace and the others by force; nothing of the pool is left."""
        if self._stopped:
            return
        self._stopped = True
        atexit.unregister(self.stop)
        workers, self._workers = self._workers, []
        self._turn_away_from(*workers)
        for worker in workers:
            if worker.is_ready and not worker.batches:
                worker.tell(STOP)
        end_by_force(worker.process for worker in workers if not worker.is_ready or worker.batches)
        if self._multi_pool is not None:
            self._multi_pool.__exit__(None, None, None)
        for worker in workers:
            self._close_pipe(worker)

    # Workers

    def _start_workers(self) -> None:
        """As many as there are batches for that no other will take."""
        coming = sum(not worker.is_ready for worker in self._workers)
        wanted = self._size if self._is_paced else -(-len(self._pending) // self.at_once) - coming + len(self._workers)
        missing = min(wanted, self._size) - len(self._workers)
        if missing > 0 and self._method == "fork" and not self._method_is_given and _has_other_threads():
            # Threads have come that may hold locks. What cannot be pickled can only be forked.
            with contextlib.suppress(NotTransferableError):
                self._use("forkserver")
        for _ in range(missing):
            self._start_worker()

    def _start_worker(self) -> None:
        with starting.lock, Hold(), held_back_in_children(self._method), only_if_it_can_be_imported():
            if self._marks is None:
                self._open()
            place = self._free_marks.pop()
            ours, theirs = self._context.Pipe()
            _open_ends.all |= {ours, theirs}
            _open_ends.given = theirs, threading.get_ident()
            try:
                process = self._launch(theirs, place)
                if self._method == "forkserver" and fork_server_has_threads():
                    # The worker may find a lock of theirs held for ever.
                    process.kill()
                    wait_until_ended([process], GRACE_SECONDS)
                    self._processes.remove(process)
                    self._use("spawn")
                    process = self._launch(theirs, place)
            except BaseException:
                _open_ends.all.discard(ours)
                ours.close()
                raise
            finally:
                _open_ends.given = None, 0
                _open_ends.all.discard(theirs)
                theirs.close()
            worker = Worker(process, ours, self._marks, place, self._most_items)
            self._workers.append(worker)
            self._listen_to(worker)

    def _open(self) -> None:
        from multiprocessing import forkserver
        from multiprocessing.heap import Arena

        from twat_mp.mp import MultiPool

        server: Any = forkserver._forkserver  # noqa: SLF001 - there is no function that tells
        if server._forkserver_pid is None and server._preload_modules == ["__main__"]:  # noqa: SLF001 - as above
            # It imports what each worker needs, unless the program has said what it shall import.
            module = module_of(self._work.function)
            modules = {serve.__module__, *(imported_by_main() if module in MAINS else {module})}
            forkserver.set_forkserver_preload(["__main__", *(modules & sys.modules.keys())])
        # A worker that has ended makes room for the next one before this has been seen.
        # No array in memory that the program's own shared values have, too: a pipe to it can be passed on only once.
        self._marks = Arena(16 * self._most_workers)
        self._free_marks = list(range(2 * self._most_workers))
        processes = self._processes
        # Without this pool in it, which would have to wait for the garbage collector.
        factory: Any = lambda nodes: processes  # noqa: ARG005, E731 - MultiPool calls it with nodes=
        self._multi_pool = MultiPool(pool_class=factory, nodes=self._size)
        self._multi_pool.__enter__()

    def _launch(self, pipe: Any, place: int) -> Any:
        args = pipe, self._marks, place, self._start
        return self._processes.start(self._context.Process(target=serve, args=args, daemon=True))

    def _worker_ended(self, worker: Worker) -> Any:
        # Before another worker has the memory in which they are marked.
        batches, unread = list(worker.batches.values()), worker.unread()
        begun = None if self.runs_together or not batches or unread else worker.begun() or None
        with Hold():
            self._workers.remove(worker)
            worker.has_ended()
            reason = _how_it_ended(worker.process) if batches else ""
            self._processes.remove(worker.process)
            self._close_pipe(worker)
        if not worker.is_ready:
            self._stillbirths += 1
            if self._stillbirths >= self._most_stillbirths or worker.process.exitcode == UNGUARDED_CODE:
                return Fatal(OperoError(f"worker processes for {self._name} end before they are ready; {_MAIN_HINT}"))
        self._start_workers()
        return Lost(batches, reason, innocent=unread, begun=begun)

    # Batches

    def _hand_out(self) -> None:
        while self._pending:
            free = [worker for worker in self._workers if worker.accepts(self._pending[0], self.at_once)]
            if not free:
                self._start_workers()
                return
            worker, batch = min(free, key=lambda worker: len(worker.batches)), self._pending.popleft()
            try:
                data = self._packer.batch(batch)
            except NotTransferableError as error:
                self._inbox.put(not_run(batch, error))
            else:
                worker.send(batch, data)

    def _worker_reports(self, worker: Worker, payload: memoryview, *, is_last: bool) -> Any:
        report = unpack_report(payload[NUMBER.size :])
        number, ran = NUMBER.unpack_from(payload)[0], len(report.values)
        batch, size = worker.reported(number, ran, is_last=is_last)
        if is_last:
            if not worker.room and not worker.batches:
                worker.tell(STOP)
            self._hand_out()
        if is_last and 0 in report.errors and not ran:
            return not_run(batch, report.errors[0])
        return Done(batch, report, max(len(payload), size), not is_last)

    # Messages

    def _hear(self, worker: Worker) -> None:
        """Put what the worker has said into the inbox, with None for the end of its pipe."""
        with self._hearing:
            has_more = not worker.is_deaf
            while has_more:
                try:
                    message: memoryview | None = memoryview(worker.pipe.recv_bytes())
                    has_more = self.runs_together and worker.pipe.poll()
                except (EOFError, OSError):
                    message, has_more = None, False
                    worker.is_deaf = True
                    self._inbox.forget(worker.pipe)
                self._inbox.put((worker, message))

    def _listen_to(self, worker: Worker) -> None:
        worker.is_deaf = False
        self._inbox.listen(worker.pipe, lambda: self._hear(worker))

    def _turn_away_from(self, *workers: Worker) -> None:
        with self._hearing:
            for worker in workers:
                if not worker.is_deaf:
                    worker.is_deaf = True
                    self._inbox.forget(worker.pipe)

    def _close_pipe(self, worker: Worker) -> None:
        self._free_marks.append(worker.place)
        _open_ends.all.discard(worker.pipe)
        worker.pipe.close()


def _start_method() -> tuple[str, bool]:
    """What the program has set by `multiprocessing.set_start_method`, and whether it has set anything.

    Else ``fork`` where it is safe, that is with no other thread that could hold a lock; else a fresh process.
    """
    method = multiprocessing.get_start_method(allow_none=True)
    # The first one, the system's own, need not have been set: it is noted, too, when a program makes a lock of
    # multiprocessing. One that is not its own is of a worker of loky's.
    if method in multiprocessing.get_all_start_methods()[1:]:
        return method, True
    if sys.platform == "linux" and not _has_other_threads():
        return "fork", False
    return "spawn" if sys.platform == "win32" else "forkserver", False


def _has_other_threads() -> bool:
    return bool(foreign_threads()) or has_native_threads()


_MAIN_HINT = (
    "each imports the main module, so put what shall run only once below `if __name__ == '__main__':`, "
    "or give pool_options={'start_method': 'fork'}"
)


def _how_it_ended(process: Any) -> str:
    code = -signal.SIGTERM if process.exitcode == ENDED_CODE else process.exitcode
    if code is None:
        return "its exit code is not known"
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    return f"killed by signal {-code}"
