"""The process pool: one twat-mp pool of one process for each worker, and a private pipe to each.

twat-mp (2.6.5) starts and ends the processes. Its own `map` and `apipe` hang for ever when a process dies (so does
`multiprocessing.Pool`), so the work goes over a pipe of opero's: a death is the end of exactly one pipe, and hits
exactly the batch that was in it. Items are pickled by the C pickler; twat-mp's queues would use dill's, in Python, for
each.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import selectors
import signal
import sys
import threading
import time
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any

from opero.concurrency.interrupts import held_back_in_children
from opero.concurrency.main_module import (
    is_surely_in_fresh_workers,
    only_if_it_can_be_imported,
    unknown_to_fresh_workers,
)
from opero.concurrency.native_threads import has_native_threads
from opero.concurrency.own_thread import in_own_thread, uninterrupted
from opero.concurrency.pipe_end import pipe_end
from opero.concurrency.preparation import Preparation
from opero.concurrency.process_worker import (
    AGAIN,
    ARGUMENTS,
    BATCH,
    BEGUN,
    BROKEN,
    HELLO,
    PEACE_SECONDS,
    SINGLES,
    STOP,
    pack_message,
    serve,
    unpack_message,
)
from opero.concurrency.scheduler import Batch, Done, Fatal, Lost, not_run
from opero.concurrency.transport import Packer, unpack_singly
from opero.core.forks import ForkSafeLock, foreign_threads, watch_forks
from opero.core.interrupts import Hold
from opero.core.signature import name_of
from opero.exceptions import NotTransferableError, OperoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opero.concurrency.contract import Inbox
    from opero.concurrency.worker import Work

LARGEST_BATCH = 10_000
# So many workers in a row that end before they are ready are not an accident: it may be the main module, or the
# initializer. Once one has been ready it is more likely somebody who kills them.
MOST_STILLBIRTHS = 3
MOST_LATE_STILLBIRTHS = 100
_SAYING_SECONDS = 0.05


# Held while a worker is started, for which aiomultiprocess needs settings that are the same for all.
starting = ForkSafeLock()


class _EndsAjar:
    """Ends of pipes that are open here until their worker has them, and the thread that starts it."""

    def __init__(self) -> None:
        self._starters: dict[Any, int] = {}
        watch_forks(self)

    @contextlib.contextmanager
    def pipe(self, context: Any, owned: set[Any]) -> Iterator[tuple[Any, Any]]:
        """Both ends of a new one: the first is added to those ``owned``, the second is open during the block."""
        ours, theirs = context.Pipe()
        owned.add(ours)
        self._starters[theirs] = threading.get_ident()
        try:
            yield ours, theirs
        finally:
            theirs.close()
            self._starters.pop(theirs, None)

    def after_fork(self) -> None:
        """Close those that are not for this process: while it has one, the death of a worker does not end its pipe."""
        for end, starter in self._starters.items():
            if starter != threading.get_ident():
                end.close()
        self._starters.clear()


_ends_ajar = _EndsAjar()


def start_method_of_the_program() -> str | None:
    """What it has set by `multiprocessing.set_start_method`, if anything."""
    method = multiprocessing.get_start_method(allow_none=True)
    # The system's own need not have been set: it is noted, too, when a program makes a lock of multiprocessing.
    return None if method == multiprocessing.get_all_start_methods()[0] else method


def default_start_method() -> str:
    """``fork`` where it is safe, that is with no other thread that could hold a lock; else a fresh process."""
    if sys.platform == "linux" and not foreign_threads() and not has_native_threads():
        return "fork"
    return "spawn" if sys.platform == "win32" else "forkserver"


def wait_until_ended(process: Any, seconds: float) -> None:
    """Wait at most so long; `Process.join` waits for a pipe's end, which a child of the program's own may have open."""
    deadline, pause = time.monotonic() + seconds, 0.001
    is_gone = False
    while process.exitcode is None and time.monotonic() < deadline:
        if not is_gone and not _exists(process.pid):
            # Another thread has been told its exit code and may say so in a moment; or the system keeps none.
            is_gone = True
            deadline = min(deadline, time.monotonic() + _SAYING_SECONDS)
        process.join(pause)
        pause = min(2 * pause, 0.05)


def _exists(pid: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Worker:
    """One worker process as the parent sees it; ``pool`` is the twat-mp pool of one that started it."""

    def __init__(self, pool: Any, pipe: Any, most_items: int | None = None) -> None:
        self.pool = pool
        self.pipe = pipe_end(pipe)
        self.room = sys.maxsize if most_items is None else most_items
        self.process: Any = None
        self.batches: dict[int, Batch] = {}
        self.begun: set[int] = set()
        self.sent_bytes: dict[int, int] = {}
        self.reserved = False

    @property
    def ready(self) -> bool:
        return self.process is not None

    def found(self) -> None:
        """The worker has said hello."""
        self.process = self.pool.pool.process

    @property
    def open(self) -> bool:
        return self.ready and not self.reserved and self.room > 0

    def accepts(self, batch: Batch) -> bool:
        return self.open and len(batch.items) <= self.room and not (batch.alone and self.batches)

    def slots(self, at_once: int) -> int:
        """Batches that it can run, where each worker can run ``at_once``; a full one only ends what it has."""
        if not self.ready:
            return 0
        return at_once if self.room else min(at_once, len(self.batches))

    def not_begun(self) -> list[Batch]:
        """Batches that the worker has not read to their end."""
        return [batch for number, batch in self.batches.items() if number not in self.begun]

    def end(self, *, in_peace: bool) -> None:
        """Wait until the process has ended, by itself or by force."""
        if in_peace:
            wait_until_ended(self.process, PEACE_SECONDS)
        pool = self.pool.pool
        # MultiPool's own way is SIGTERM, for which the program may have a handler, and its forked workers with it.
        pool.kill()
        # What MultiPool does on Ctrl-C is to terminate and not to wait for tasks.
        self.pool.__exit__(KeyboardInterrupt, None, None)
        pool.free()

    def disown(self) -> None:
        """In a forked child: do not end the process of the parent's with this one's own."""
        self.pool.pool.disown()


class ProcessPool:
    """Runs batches in processes; a worker that ends is replaced."""

    most_in_batch = LARGEST_BATCH
    queues_batches = True
    runs_together = False
    at_once = 1
    _library = "multiprocess"

    def __init__(
        self,
        work: Work,
        workers: int,
        *,
        start_method: str | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        max_tasks_per_worker: int | None = None,
    ) -> None:
        self._bare_work = work
        self._initializer = initializer
        self._initargs = initargs
        self._most_items = max_tasks_per_worker
        start_method = start_method or start_method_of_the_program()
        self._method_is_given = start_method is not None
        self._use(start_method or default_start_method())
        self._pipes: set[Any] = set()
        self._own_threads: set[threading.Thread] = set()
        watch_forks(self)
        self._name = name_of(work.function)
        self._size = workers
        self._workers: list[Worker] = []
        self._pending: deque[Batch] = deque()
        self._numbers = 0
        self._stopped = False
        self._stillbirths = 0
        self._most_stillbirths = MOST_STILLBIRTHS
        self._hearing = threading.Lock()
        self._audible: set[Worker] = set()

    def _use(self, method: str) -> None:
        import multiprocess

        # A forked worker has everything already, even what cannot be pickled.
        is_unknown = None if method == "fork" else unknown_to_fresh_workers()
        self._packer = Packer(is_unknown, is_surely_there=is_surely_in_fresh_workers, initializer=self._initializer)
        self._work: Work | bytes = self._bare_work if method == "fork" else self._packer.work(self._bare_work)
        self._preparation = None
        if self._initializer is not None:
            self._preparation = Preparation(self._packer, self._initializer, self._initargs)
        self._method = method
        self._context: Any = multiprocess.get_context(method)  # pyright: ignore[reportAttributeAccessIssue]

    def after_fork(self) -> None:
        """Leave the workers to the parent; as long as a copy of its ends is open here, its death is not noticed."""
        atexit.unregister(self.stop)
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()
        self._stopped = True
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.disown()

    @property
    def slots(self) -> int:
        """What the workers that are ready can run at the same time."""
        return sum(worker.slots(self.at_once) for worker in self._workers)

    @property
    def largest_batch(self) -> int:
        """Items that may be sent in one go now: as many as the worker whose turn it is may still run."""
        if self._most_items is None:
            return self.most_in_batch
        free = [] if self._pending else [worker for worker in self._workers if worker.open]
        return min(self.most_in_batch, _least_busy(free).room) if free else 0

    def start(self, inbox: Inbox) -> None:
        self._inbox = inbox
        # A stream that is still open when the program ends is closed too late: threads and modules are gone by then.
        atexit.register(self.stop)
        for _ in range(self._size):
            self._start_worker()

    def submit(self, batch: Batch) -> None:
        self._pending.append(batch)
        self._hand_out()

    def kill(self, batch: Batch) -> bool:
        """Kill the worker that runs the batch, unless it is reporting; its end is reported as `Lost`."""
        for worker in self._workers:
            if batch in worker.batches.values():
                if worker.pipe.is_arriving():
                    return False
                # Nothing more may be sent to it.
                worker.room = 0
                worker.process.kill()
        return True

    def give_up(self) -> list[Batch]:
        """Kill the workers that run something; their ends are reported as `Lost`."""
        for worker in self._workers:
            if worker.batches:
                worker.room = 0
                worker.process.kill()
        withdrawn = list(self._pending)
        self._pending.clear()
        return withdrawn

    def take_on(self, work: Work) -> None:
        arguments = self._packer.arguments(work)
        self._bare_work = work
        self._use(self._method)
        for worker in self._workers:
            # One that has just died is replaced when the end of its pipe is heard.
            with contextlib.suppress(OSError):
                self._tell(worker, ARGUMENTS, payload=arguments)
                self._wait_until_sent(worker)

    def receive(self, event: Any) -> Any:
        """Make sense of what was heard; None if it is of no interest to the scheduler."""
        if not isinstance(event, tuple):
            return event
        worker, data = event
        if worker not in self._workers:
            return None
        return self._worker_ended(worker) if data is None else self._worker_says(worker, data)

    def _worker_says(self, worker: Worker, data: bytes) -> Any:
        kind, number, _, payload = unpack_message(data)
        if kind == HELLO:
            return self._worker_ready(worker)
        if kind == BEGUN:
            worker.begun.add(number)
            return None
        if kind == BROKEN:
            return Fatal(OperoError(f"a worker process cannot run {self._name}: {bytes(payload).decode()}"))
        return self._worker_reports(worker, kind, number, payload)

    def runs_here(self) -> bool:
        return threading.current_thread() in self._own_threads

    def stop(self) -> None:
        """End idle workers in peace and kill the others; nothing of the pool is left."""
        if not self._stopped:
            uninterrupted(self._stop)

    async def stop_async(self) -> None:
        try:
            # Here: an event loop is told by its own thread.
            self._turn_away_from(*self._workers)
        finally:
            await in_own_thread(self._stop)

    def _stop(self) -> None:
        self._stopped = True
        atexit.unregister(self.stop)
        workers, self._workers = self._workers, []
        self._turn_away_from(*workers)
        self._dismiss(*workers)
        for worker in workers:
            self._close_pipe(worker)

    def _close_pipe(self, worker: Worker) -> None:
        pipe = worker.pipe.connection
        self._pipes.discard(pipe)
        pipe.close()

    # Workers

    def _start_worker(self) -> None:
        self._stay_safe()
        with starting.lock, self._starting_one(), self._pipe(self._context) as (ours, theirs):
            from twat_mp.mp import MultiPool

            from opero.concurrency.whole_pool import WholePool, enter

            factory: Any = lambda nodes: WholePool(  # noqa: E731 - MultiPool calls it with nodes=
                nodes, initializer=serve, initargs=(theirs, self._work, self._preparation), context=self._context
            )
            pool = MultiPool(pool_class=factory, nodes=1)
            self._quietly(lambda: enter(pool))
            self._welcome(Worker(pool, ours, self._most_items))

    @contextlib.contextmanager
    def _pipe(self, context: Any) -> Iterator[tuple[Any, Any]]:
        """The ends of a pipe to a worker that is started in the block."""
        with _ends_ajar.pipe(context, self._pipes) as (ours, theirs):
            try:
                yield ours, theirs
            except BaseException:
                self._pipes.discard(ours)
                ours.close()
                raise

    def _stay_safe(self) -> None:
        """Fork no more once threads have come that may hold locks; those of the pools themselves hold none for long."""
        if self._method != "fork" or self._method_is_given:
            return
        if foreign_threads() - self._own_threads or has_native_threads():
            # What cannot be pickled can only be forked.
            with contextlib.suppress(NotTransferableError):
                if self._preparation is not None:
                    self._preparation.pack()
                self._use("forkserver")

    @contextlib.contextmanager
    def _starting_one(self) -> Iterator[None]:
        """Hold Ctrl-C back while a worker is half made, and note which threads come with it."""
        before = set(threading.enumerate())
        with Hold(), held_back_in_children(self._method, self._library), only_if_it_can_be_imported():
            try:
                yield
            finally:
                self._own_threads |= set(threading.enumerate()) - before

    @staticmethod
    def _quietly(start: Callable[[], Any]) -> None:
        with warnings.catch_warnings():
            # Python 3.12 warns of forks with threads; the threads here are those of the other workers' idle pools.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            start()

    def _worker_ready(self, worker: Worker) -> None:
        worker.found()
        self._stillbirths = 0
        self._most_stillbirths = MOST_LATE_STILLBIRTHS
        self._hand_out()

    def _worker_ended(self, worker: Worker) -> Any:
        reason = _how_it_ended(worker.process) if worker.batches else ""
        # What is left of its pool would hang the next process that is forked.
        with Hold():
            self._workers.remove(worker)
            self._dismiss(worker)
            self._close_pipe(worker)
        if not worker.ready:
            self._stillbirths += 1
            if self._stillbirths >= self._most_stillbirths:
                return Fatal(OperoError(f"worker processes for {self._name} end before they are ready; {_MAIN_HINT}"))
        self._start_worker()
        return Lost(list(worker.batches.values()), reason, at_once=self.runs_together, innocent=worker.not_begun())

    def _dismiss(self, *workers: Worker) -> None:
        idle = [worker for worker in workers if worker.ready and not worker.batches]
        for worker in idle:
            self._ask_to_end(worker)
        for worker in workers:
            worker.end(in_peace=worker in idle)

    # Batches

    def _hand_out(self) -> None:
        while self._pending:
            batch = self._pending[0]
            free = [worker for worker in self._workers if worker.accepts(batch)]
            if not free:
                return
            self._pending.popleft()
            self._send(_least_busy(free), batch)

    def _send(self, worker: Worker, batch: Batch) -> None:
        self._numbers += 1
        try:
            data = self._packer.batch(batch)
        except NotTransferableError as error:
            self._inbox.put(not_run(batch, error))
            return
        worker.room -= len(batch.items)
        worker.batches[self._numbers] = batch
        worker.reserved = batch.alone
        worker.sent_bytes[self._numbers] = len(data)
        # If it has just died, its pipe will say so.
        with contextlib.suppress(OSError):
            self._tell(worker, BATCH, self._numbers, data)

    def _worker_reports(self, worker: Worker, kind: int, number: int, payload: bytes) -> Any:
        batch = worker.batches[number]
        try:
            values, errors, seconds = pickle.loads(payload)  # noqa: S301 - made by this pool's worker
        except Exception:  # noqa: BLE001 - one of the results cannot be unpickled here: ask for each by itself
            # If it has just died, its pipe will say so.
            with contextlib.suppress(OSError):
                self._tell(worker, AGAIN, number)
            return None
        if kind == SINGLES:
            values, errors = unpack_singly(values, errors)
        del worker.batches[number]
        worker.begun.discard(number)
        size = max(len(payload), worker.sent_bytes.pop(number))
        worker.reserved = False
        self._hand_out()
        if not worker.room and not worker.batches:
            self._ask_to_end(worker)
        if len(values) < len(batch.items):
            return not_run(batch, errors[0])
        return Done(batch, values, errors, seconds, size)

    # Messages

    def _welcome(self, worker: Worker) -> None:
        self._workers.append(worker)
        self._audible.add(worker)
        self._inbox.listen(worker.pipe.connection, lambda: self._hear(worker))

    def _turn_away_from(self, *workers: Worker) -> None:
        with self._hearing:
            for worker in self._audible.intersection(workers):
                self._audible.discard(worker)
                self._inbox.forget(worker.pipe.connection)

    def _hear(self, worker: Worker) -> None:
        """Put what the worker has said into the inbox, with None for the end of its pipe."""
        with self._hearing:
            if worker not in self._audible:
                return
            try:
                messages = worker.pipe.receive()
            except EOFError:
                messages = [None]
                self._audible.discard(worker)
                self._inbox.forget(worker.pipe.connection)
        for message in messages:
            self._inbox.put((worker, message))

    def _tell(self, worker: Worker, kind: int, number: int = 0, payload: bytes = b"") -> None:
        message = pack_message(kind, number, payload, oldest=next(iter(worker.batches), 0))
        is_all_sent = worker.pipe.send(message)
        # A worker that is busy reads nothing meanwhile; one whose end has been heard never will.
        if not is_all_sent and worker in self._audible:
            self._send_when_it_reads(worker)

    def _send_when_it_reads(self, worker: Worker) -> None:
        if not self._inbox.write_when_ready(worker.pipe.connection, lambda: self._send_on(worker)):
            self._wait_until_sent(worker)

    def _send_on(self, worker: Worker) -> None:
        is_all_sent = True
        # If it has just died, its pipe will say so.
        with contextlib.suppress(OSError):
            is_all_sent = worker.pipe.send_on()
        if is_all_sent:
            self._inbox.write_when_ready(worker.pipe.connection, None)

    def _wait_until_sent(self, worker: Worker) -> None:
        while not worker.pipe.send_on():
            self._until_writable(worker)

    def _until_writable(self, worker: Worker) -> None:
        """Wait until the worker reads on; it, and those it waits for, may want to be heard first."""
        with selectors.PollSelector() as selector:
            for other in self._audible - {worker}:
                selector.register(other.pipe.connection, selectors.EVENT_READ, other)
            events = selectors.EVENT_WRITE | (selectors.EVENT_READ if worker in self._audible else 0)
            selector.register(worker.pipe.connection, events, worker)
            for key, events in selector.select():
                if events & selectors.EVENT_READ:
                    self._hear(key.data)

    def _ask_to_end(self, worker: Worker) -> None:
        """Tell a worker that is ready that there is nothing more to do."""
        with contextlib.suppress(OSError):
            self._tell(worker, STOP)
            self._wait_until_sent(worker)


def _least_busy(workers: list[Worker]) -> Worker:
    return min(workers, key=lambda worker: len(worker.batches))


_MAIN_HINT = (
    "the main module must be importable without side effects (guard it with `if __name__ == '__main__':`), "
    "or give pool_options={'start_method': 'fork'}"
)


def _how_it_ended(process: Any) -> str:
    # The pool of this worker may be the one that reaps it: its exit code can take a moment to be known.
    if process is not None:
        wait_until_ended(process, 1.0)
    code = None if process is None else process.exitcode
    if code is None:
        return "its exit code is not known"
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    return f"killed by signal {-code}"
