"""The process pool: one twat-mp pool of one process for each worker, and a private pipe to each.

twat-mp (2.6.5) starts and ends the processes. Its own `map` and `apipe` hang for ever when a process dies (so does
`multiprocessing.Pool`), so the work goes over a pipe of opero's: a death is the end of exactly one pipe, and hits
exactly the batch that was in it. Items are pickled by the C pickler; twat-mp's queues would use dill's, in Python, for
each.
"""

from __future__ import annotations

import atexit
import contextlib
import pickle
import selectors
import signal
import sys
import threading
import time
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any

from opero.concurrency.interrupts import held_back, held_back_in_children
from opero.concurrency.own_thread import in_own_thread, uninterrupted
from opero.concurrency.pipe_end import pipe_end
from opero.concurrency.process_worker import (
    AGAIN,
    ARGUMENTS,
    BATCH,
    BROKEN,
    HELLO,
    PEACE_SECONDS,
    SINGLES,
    STOP,
    Door,
    pack_message,
    serve,
    unpack_message,
)
from opero.concurrency.scheduler import Batch, Done, Fatal, Lost, not_run
from opero.concurrency.transport import pack_arguments, pack_batch, pack_work, unpack_singly
from opero.core.forks import ForkSafeLock, foreign_threads, watch_forks
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

# Held from making a pipe to closing the worker's end of it here, so that no other worker inherits that end.
starting = ForkSafeLock()


def default_start_method() -> str:
    """``fork`` where it is safe, that is with no other thread that could hold a lock; else a fresh process."""
    if sys.platform == "linux" and not foreign_threads():
        return "fork"
    return "spawn" if sys.platform == "win32" else "forkserver"


class Worker:
    """One worker process as the parent sees it; ``pool`` is the twat-mp pool of one that started it."""

    def __init__(self, pool: Any, pipe: Any, most_items: int | None = None) -> None:
        self.pool = pool
        self.pipe = pipe_end(pipe)
        self.room = sys.maxsize if most_items is None else most_items
        self.process: Any = None
        self.batches: dict[int, Batch] = {}
        self.sent_bytes: dict[int, int] = {}
        self.not_reached: list[Batch] = []
        self.reserved = False

    @property
    def ready(self) -> bool:
        return self.process is not None

    def found(self, pid: int, /) -> None:
        """The worker has said hello; find out which process it is."""
        from multiprocess.process import active_children

        self.process = next((p for p in active_children() if p.pid == pid), None)

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

    def stop_replacing(self) -> None:
        """A closed pool starts no other process in place of one that has ended."""
        self.pool.pool.close()

    def end(self, *, in_peace: bool) -> None:
        """Wait until the process has ended, by itself or by force."""
        if in_peace:
            self.process.join(PEACE_SECONDS)
        elif self.ready:
            self.process.kill()
        # What MultiPool does on Ctrl-C is to terminate and not to wait: its pool may have replaced this worker already.
        self.pool.__exit__(KeyboardInterrupt, None, None)


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
        self._most_items = max_tasks_per_worker
        self._method_is_given = start_method is not None
        self._use(start_method or default_start_method())
        self._pipes: set[Any] = set()
        self._own_threads: set[threading.Thread] = set()
        watch_forks(self)
        self._prepare = (initializer, initargs)
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
        self._work: Work | bytes = self._bare_work if method == "fork" else pack_work(self._bare_work)
        self._method = method
        self._context: Any = multiprocess.get_context(method)  # pyright: ignore[reportAttributeAccessIssue]

    def after_fork(self) -> None:
        """Close this child's copies of the parent's ends: as long as one is open, a dead parent is not noticed."""
        atexit.unregister(self.stop)
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()

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
        arguments = pack_arguments(work)
        self._bare_work = work
        self._use(self._method)
        for worker in self._workers:
            # One that has just died is replaced when the end of its pipe is heard.
            with contextlib.suppress(OSError):
                self._tell(worker, ARGUMENTS, payload=arguments)

    def receive(self, event: Any) -> Any:
        """Make sense of what was heard; None if it is of no interest to the scheduler."""
        if not isinstance(event, tuple):
            return event
        worker, data = event
        if worker not in self._workers:
            return None
        if data is None:
            return self._worker_ended(worker)
        kind, number, payload = unpack_message(data)
        if kind == HELLO:
            return self._worker_ready(worker, number)
        if kind == BROKEN:
            return Fatal(OperoError(f"a worker process cannot run {self._name}: {bytes(payload).decode()}"))
        return self._worker_reports(worker, kind, number, payload)

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
        with starting.lock, self._starting_one():
            from twat_mp.mp import MultiPool

            ours, theirs = self._context.Pipe()
            self._pipes.add(ours)
            door = Door(theirs)
            factory: Any = lambda nodes: self._context.Pool(  # noqa: E731 - MultiPool calls it with nodes=
                nodes, initializer=serve, initargs=(door, self._work, *self._prepare)
            )
            pool = MultiPool(pool_class=factory, nodes=1)
            self._quietly(pool.__enter__)
            # As long as this end is open in another process, the worker's death does not end the pipe.
            theirs.close()
            self._welcome(Worker(pool, ours, self._most_items))

    def _stay_safe(self) -> None:
        """Fork no more once threads have come that may hold locks; those of the pools themselves hold none for long."""
        foreign = foreign_threads() - self._own_threads
        if self._method == "fork" and not self._method_is_given and foreign:
            # What cannot be pickled can only be forked.
            with contextlib.suppress(NotTransferableError):
                self._use("forkserver")

    @contextlib.contextmanager
    def _starting_one(self) -> Iterator[None]:
        """Hold Ctrl-C back while a worker is half made, and note which threads come with it."""
        before = set(threading.enumerate())
        with held_back(), held_back_in_children(self._method, self._library):
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

    def _worker_ready(self, worker: Worker, pid: int) -> None:
        worker.found(pid)
        self._stillbirths = 0
        self._most_stillbirths = MOST_LATE_STILLBIRTHS
        self._hand_out()

    def _worker_ended(self, worker: Worker) -> Any:
        reason = _how_it_ended(worker.process) if worker.batches else ""
        # What is left of its pool would hang the next process that is forked.
        with held_back():
            self._workers.remove(worker)
            self._dismiss(worker)
            self._close_pipe(worker)
        if not worker.ready:
            self._stillbirths += 1
            if self._stillbirths >= self._most_stillbirths:
                return Fatal(OperoError(f"worker processes for {self._name} end before they are ready; {_MAIN_HINT}"))
        self._start_worker()
        return Lost(list(worker.batches.values()), reason, at_once=self.runs_together, innocent=worker.not_reached)

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
            data = pack_batch(batch)
        except NotTransferableError as error:
            self._inbox.put(not_run(batch, error))
            return
        worker.room -= len(batch.items)
        worker.batches[self._numbers] = batch
        worker.reserved = batch.alone
        worker.sent_bytes[self._numbers] = len(data)
        try:
            self._tell(worker, BATCH, self._numbers, data)
        except OSError:
            # It has just died; its pipe will say so, and this batch is none of the suspects.
            worker.not_reached.append(batch)

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
        worker.pipe.send(pack_message(kind, number, payload), lambda: self._until_writable(worker))

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
        worker.stop_replacing()
        with contextlib.suppress(OSError):
            self._tell(worker, STOP)


def _least_busy(workers: list[Worker]) -> Worker:
    return min(workers, key=lambda worker: len(worker.batches))


_MAIN_HINT = (
    "the main module must be importable without side effects (guard it with `if __name__ == '__main__':`), "
    "or give pool_options={'start_method': 'fork'}"
)


def _how_it_ended(process: Any) -> str:
    # The pool of this worker may be the one that reaps it: its exit code can take a moment to be known.
    deadline = time.monotonic() + 1.0
    while process is not None and process.exitcode is None and time.monotonic() < deadline:
        process.join(0.01)
    code = None if process is None else process.exitcode
    if code is None:
        return "its exit code is not known"
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    return f"killed by signal {-code}"
