"""The process pool: bare processes of multiprocessing, started through twat-mp, and a private pipe to each.

twat-mp (2.6.5) has pools whose `map` hangs for ever when a process dies (so does `multiprocessing.Pool`), and that are
strangers to the standard library's managers, locks and handlers. So its `MultiPool` gets processes of the standard
library, and the work goes over a pipe of opero's: a death is the end of exactly one pipe, and hits exactly the batch
that was in it. A worker gets its next batch when it has reported on the one before.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - registers what it does before a fork, see `_starting`
import contextlib
import logging  # noqa: F401 - as above
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from functools import partial
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
from opero.concurrency.native_threads import fork_server_has_threads, has_other_threads
from opero.concurrency.process_worker import (
    BETWEEN,
    NUMBER,
    PEACE_SECONDS,
    THREAD_SETTINGS,
    Kind,
    Start,
    marks_at,
    serve,
)
from opero.concurrency.transport import Packer, unpack_report
from opero.core.forks import watch_forks
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

# As long as a thread has it, no other forks: a child must not have the ends of a pipe that is being given to a worker.
_starting = threading.RLock()
if hasattr(os, "register_at_fork"):
    # What is registered last comes first before a fork: whoever forks takes this lock before those of logging and
    # concurrent.futures, as a thread does that starts a worker. In another order two of them would wait for each other.
    os.register_at_fork(
        before=_starting.acquire,
        after_in_parent=_starting.release,
        after_in_child=_starting._at_fork_reinit,  # type: ignore[attr-defined]  # noqa: SLF001 - as threading does
    )


class Worker:
    """One worker process as the parent sees it."""

    def __init__(self, process: Any, pipe: Any, marks: Any, place: int, most_items: int | None) -> None:
        self.process = process
        self.pipe = pipe
        self.place = place
        # Memory that the worker shares, see `process_worker.Parent`.
        self.mark = marks_at(marks, place)
        # Items that it may still run, those that are with it included.
        self.room = sys.maxsize if most_items is None else most_items
        self.is_ready = False
        # What is with it, by numbers that count from 1; how many it has been sent, and the bytes of the latest one.
        self.batches: dict[int, Batch] = {}
        self.count = self.size = 0
        self._ends_since: float | None = None
        self._family: dict[int, str] = {}

    def accepts(self, batch: Batch, at_once: int) -> bool:
        if not self.is_ready or len(self.batches) >= at_once or len(self.batches) + len(batch.items) > self.room:
            return False
        return not self.batches or not (batch.alone or any(other.alone for other in self.batches.values()))

    @property
    def is_idle(self) -> bool:
        return self.is_ready and not self.batches

    def tell(self, kind: bytes, payload: bytes = b"") -> None:
        # If it has just died, its pipe will say so.
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(kind + payload)

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


class Workers:
    """The workers of a pool, in the form of a pool that twat-mp's `MultiPool` can enter and leave."""

    map = None

    def __init__(self) -> None:
        self.all: list[Worker] = []

    def close(self) -> None:
        """Let idle workers end in peace, and end the others by force."""
        for worker in self.all:
            if worker.is_idle:
                worker.tell(Kind.STOP)
        end_by_force(worker.process for worker in self.all if not worker.is_idle)

    terminate = close

    def join(self) -> None:
        end_by_force(wait_until_ended([worker.process for worker in self.all], PEACE_SECONDS))

    def clear(self) -> None:
        for worker in self.all.copy():
            self.remove(worker)

    def remove(self, worker: Worker) -> None:
        """Forget a worker that has ended; what is open for it is closed."""
        self.all.remove(worker)
        worker.pipe.close()
        _forget(worker.process)

    def leave_to_parent(self) -> None:
        """In a forked child: as long as it has a pipe open, too, a worker does not notice that the parent has died."""
        for worker in self.all:
            worker.pipe.close()
            _disown(worker.process)
        self.all.clear()


def _forget(process: Any) -> None:
    # Not by its own `close`, which fails where another thread or the system was told how it ended.
    process._popen.close()  # noqa: SLF001 - see above
    _disown(process)


def _disown(process: Any) -> None:
    """Let multiprocessing not end it with this process."""
    multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]  # noqa: SLF001 - no function does it


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
        self._pool = Workers()
        self._workers = self._pool.all
        # The pipe of the one that is being started.
        self._coming: Any = None
        self._pending: deque[Batch] = deque()
        self._is_paced = False
        self._stillbirths = 0
        self._most_stillbirths = MOST_STILLBIRTHS

    def _use(self, method: str) -> None:
        self._method = method
        self._context: Any = multiprocessing.get_context(method)
        self._packer = Packer(everything if method == "fork" else fresh_workers_have())
        self._start = Start(self._packer, (self._work, *self._hooks), self._threads)

    def after_fork(self) -> None:
        """Leave the workers to the parent."""
        if self._coming is not None:
            self._coming.close()
        self._pool.leave_to_parent()

    @property
    def slots(self) -> int:
        """Batches that can run at the same time, in workers that are there or can be started.

        Where calls shall start at a rate, only in those that are ready: else they would start when their worker does.
        """
        count = 0 if self._is_paced else self.at_once * max(0, self._size - len(self._workers))
        for worker in self._workers:
            if worker.is_ready or not self._is_paced:
                count += min(self.at_once, worker.room)
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
            inbox.listen(worker.pipe, partial(self._hear, worker))

    def prepare(self) -> None:
        """Start workers for calls that take no slot before one of them is ready."""
        self._start_workers()

    def submit(self, batch: Batch) -> None:
        self._pending.append(batch)
        self._hand_out()

    def begun(self, batch: Batch) -> int | None:
        begun = next((worker.mark[0] for worker in self._workers if batch in worker.batches.values()), 0)
        return 0 if begun == BETWEEN else begun

    def kill(self, batch: Batch) -> bool:
        """End the worker that runs the batch, by force if that was asked before, unless it is reporting."""
        for worker in self._workers:
            if batch in worker.batches.values():
                if worker.pipe.poll():
                    return False
                worker.end_soon()
        return True

    def rest(self) -> None:
        for worker in self._workers:
            self._inbox.forget(worker.pipe)

    def take_on(self, work: Work) -> None:
        arguments = self._packer.arguments(work)
        self._work = work
        self._use(self._method)
        for worker in self._workers:
            worker.tell(Kind.ARGUMENTS, arguments)

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
        if kind in {Kind.REPORT, Kind.PART}:
            return self._worker_reports(worker, payload, is_last=kind == Kind.REPORT)
        if kind == Kind.HELLO:
            worker.is_ready = True
            self._stillbirths, self._most_stillbirths = 0, MOST_LATE_STILLBIRTHS
            self._hand_out()
        elif kind == Kind.LOG:
            hand_on(payload)
        elif kind == Kind.BROKEN:
            return Fatal(OperoError(f"a worker process cannot run {self._name}: {bytes(payload).decode()}"))
        return None

    async def stop_async(self) -> None:
        # Here: an event loop is told by its own thread.
        self.rest()
        await in_own_thread(self.stop)

    def stop(self, is_left: Callable[[], bool] = lambda: False) -> None:  # noqa: ARG002 - it does not take long
        """End idle workers in peace and the others by force; nothing of the pool is left."""
        atexit.unregister(self.stop)
        self.rest()
        if self._multi_pool is not None:
            self._multi_pool.__exit__(None, None, None)

    # Workers

    def _start_workers(self) -> None:
        """As many as there are batches for that no other will take."""
        coming = sum(not worker.is_ready for worker in self._workers)
        wanted = self._size if self._is_paced else -(-len(self._pending) // self.at_once) - coming + len(self._workers)
        while len(self._workers) < min(wanted, self._size):
            if self._method == "fork" and not self._method_is_given and has_other_threads():
                # Threads have come that may hold locks. What cannot be pickled can only be forked.
                self._use("forkserver")
                try:
                    self._start_worker()
                except NotTransferableError:
                    self._method_is_given = True
                    self._use("fork")
            else:
                self._start_worker()

    def _start_worker(self) -> None:
        with Hold(), _starting, held_back_in_children(self._method), _allowed_to_start():
            if self._multi_pool is None:
                self._open()
            place = min(set(range(self._most_workers)) - {worker.place for worker in self._workers})
            ours, theirs = self._context.Pipe()
            self._coming = ours
            try:
                process = self._make_process(theirs, self._marks, place, self._start)
                process.start()
                if self._method == "forkserver" and fork_server_has_threads():
                    # The worker may find a lock of theirs held for ever.
                    process.kill()
                    wait_until_ended([process], GRACE_SECONDS)
                    _forget(process)
                    self._use("spawn")
                    process = self._make_process(theirs, self._marks, place, self._start)
                    process.start()
            except BaseException:
                ours.close()
                raise
            finally:
                self._coming = None
                theirs.close()
            worker = Worker(process, ours, self._marks, place, self._most_items)
            self._workers.append(worker)
            self._inbox.listen(ours, partial(self._hear, worker))

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
        # No array in memory that the program's own shared values have, too: a pipe to it can be passed on only once.
        self._marks = Arena(4 * self._most_workers)
        workers = self._pool
        # Without this pool in it, which would have to wait for the garbage collector.
        factory: Any = lambda nodes: workers  # noqa: ARG005, E731 - MultiPool calls it with nodes=
        self._multi_pool = MultiPool(pool_class=factory, nodes=self._size)
        self._multi_pool.__enter__()

    def _make_process(self, *args: Any) -> Any:
        return self._context.Process(target=serve, args=args, daemon=True)

    def _worker_ended(self, worker: Worker) -> Any:
        batches, mark = list(worker.batches.values()), worker.mark[0]
        with Hold():
            worker.has_ended()
            reason = _how_it_ended(worker.process) if batches else ""
            self._pool.remove(worker)
        if not worker.is_ready:
            self._stillbirths += 1
            if self._stillbirths >= self._most_stillbirths or worker.process.exitcode == UNGUARDED_CODE:
                return Fatal(OperoError(f"worker processes for {self._name} end before they are ready; {_MAIN_HINT}"))
        self._start_workers()
        if self.runs_together:
            not_begun = [batch for number, batch in worker.batches.items() if number > mark]
            return Lost(batches, reason, innocent=not_begun)
        return Lost(batches, reason, innocent=[] if mark else batches, begun=None if mark in {0, BETWEEN} else mark)

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
                continue
            if not self.runs_together:
                worker.mark[0] = 0
            worker.count += 1
            worker.batches[worker.count] = batch
            worker.size = len(data)
            worker.tell(Kind.BATCH, NUMBER.pack(worker.count) + data)

    def _worker_reports(self, worker: Worker, payload: memoryview, *, is_last: bool) -> Any:
        report = unpack_report(payload[NUMBER.size :])
        number, ran = NUMBER.unpack_from(payload)[0], len(report.values)
        batch = worker.batches[number]
        worker.room = max(0, worker.room - ran)
        if is_last:
            del worker.batches[number]
            if not worker.room and not worker.batches:
                worker.tell(Kind.STOP)
            self._hand_out()
            if 0 in report.errors and not ran:
                return not_run(batch, report.errors[0])
        return Done(batch, report, max(len(payload), worker.size), not is_last)

    def _hear(self, worker: Worker) -> None:
        """Put all that the worker has said into the inbox, with None for the end of its pipe."""
        has_more = True
        while has_more:
            try:
                message: memoryview | None = memoryview(worker.pipe.recv_bytes())
                has_more = self.runs_together and worker.pipe.poll()
            except (EOFError, OSError):
                message, has_more = None, False
                self._inbox.forget(worker.pipe)
            self._inbox.put((worker, message))


@contextlib.contextmanager
def _allowed_to_start() -> Iterator[None]:
    """Let a map start workers inside of a worker of `multiprocessing.Pool`, too; they end with their pipes.

    Python 3.12 warns of forks beside threads; those are counted before, and may be the program's wish.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # noqa: SLF001 - it asks this
    before = config.get("daemon")
    config["daemon"] = False
    try:
        with warnings.catch_warnings(), only_if_it_can_be_imported():
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            yield
    finally:
        config["daemon"] = before


def _start_method() -> tuple[str, bool]:
    """What the program has set by `multiprocessing.set_start_method`, and whether it has set anything.

    Else ``fork`` where it is safe, that is with no other thread that could hold a lock; else a fresh process.
    """
    method = multiprocessing.get_start_method(allow_none=True)
    # The first one, the system's own, need not have been set: it is noted, too, when a program makes a lock of
    # multiprocessing. One that is not its own is of a worker of loky's.
    if method in multiprocessing.get_all_start_methods()[1:]:
        return method, True
    if sys.platform == "linux" and not has_other_threads():
        return "fork", False
    return "spawn" if sys.platform == "win32" else "forkserver", False


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
    names = {each.value: each.name for each in signal.Signals}
    return f"killed by signal {-code} ({names.get(-code, 'a real-time one')})"
