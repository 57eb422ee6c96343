"""The process pool: bare processes of multiprocessing, started through twat-mp, and a private pipe to each.

twat-mp (2.6.5) has pools whose `map` hangs for ever when a process dies (so does `multiprocessing.Pool`), and that are
strangers to the standard library's managers, locks and handlers. So its `MultiPool` gets processes of the standard
library, and the work goes over a pipe of opero's: a death is the end of exactly one pipe, and hits exactly the batch
that was in it. A worker gets its next batch when it has reported on the one before.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opero.concurrency import system
from opero.concurrency.fork_server import Server, server_for
from opero.concurrency.mapping import level_of_the_user
from opero.concurrency.pickling import Packer, names_in_fresh_workers, unpack_record, unpack_report
from opero.concurrency.pool import Batch, Pool, default_workers
from opero.concurrency.process_worker import (
    BETWEEN,
    PEACE_SECONDS,
    THREAD_SETTINGS,
    Parent,
    Start,
    arena,
    known_loggers,
    serve,
)
from opero.concurrency.scheduler import Scheduler
from opero.core.clock import clock
from opero.core.forks import ForkSafeLock, watch_forks
from opero.core.interrupts import Hold
from opero.core.signature import module_of
from opero.exceptions import NotTransferableError, OperoError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opero.concurrency.running import Inbox
    from opero.concurrency.worker import Work

LARGEST_BATCH = 10_000
# By which a worker ends that has called a map while it imported a module.
UNGUARDED_CODE = 113
# So many workers in a row that end before they are ready are not an accident: it may be the main module, or the
# initializer. One accident may hit all workers of a large pool, so there it is twice as many as these.
MOST_STILLBIRTHS = 10
# So long are workers that end heard between two looks at whether they have ended.
_HEARING_SECONDS = 0.01

# As long as a thread has it, no other starts a worker, which would have the ends of a pipe that is another worker's.
_starting = ForkSafeLock()


@dataclass(eq=False)
class Worker:
    """One worker process as the parent sees it.

    ``mark``: see `process_worker.Parent`.
    ``room``: items that it may still run, those that are with it included.
    ``process``: it is started when its pipe is known, so that a forked one can leave that to its parent.
    ``batches``: what is with it, by numbers that count from 1.
    ``count``: how many it has been sent.
    ``ends_since``, ``family``: when it was told to end, and the processes that it had started then.
    """

    pipe: Any
    mark: memoryview
    room: int
    process: Any = None
    is_ready: bool = False
    batches: dict[int, Batch] = field(default_factory=dict)
    count: int = 0
    ends_since: float | None = None
    family: set[int] = field(default_factory=set)

    def tell(self, kind: str, payload: bytes = b"") -> None:
        # If it has just died, its pipe will say so.
        with contextlib.suppress(OSError):
            self.pipe.send((kind, self.count, payload))


class ProcessPool(Pool):
    """Runs batches in processes, which are started when there is something to run, and replaced when they end."""

    can_rest = can_kill = marks = True

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
        concurrency: int = 1,
    ) -> None:
        super().__init__(work, workers)
        self._hooks = initializer, initargs, finalizer
        self._most_items = max_tasks_per_worker or sys.maxsize
        if threads_per_worker is None and not any(map(os.environ.get, THREAD_SETTINGS)):
            threads_per_worker = max(1, default_workers("process") // workers)
        self._threads = threads_per_worker
        self._size = self._most_workers = workers
        # Batches that run together in a worker, as coroutines, of one item each.
        self._at_once = concurrency
        self._workers: list[Worker] = []
        self._server: Server | None = None
        self._pending: deque[Batch] = deque()
        self._has_begun = False
        self._stillbirths = 0
        method, self._method_is_given = (start_method, True) if start_method else system.start_method()
        self._use(method)
        watch_forks(self)

    def _use(self, method: str) -> None:
        self._method = method
        names, levels, filters = None, {}, []
        if method != "fork":
            names = names_in_fresh_workers()
            levels = {logger.name: logger.level for logger in known_loggers() if logger.level}
            # Of classes for which a worker need not import anything.
            filters = [each for each in warnings.filters if each[2].__module__ == "builtins"]
        environ = dict(os.environ) if method == "forkserver" else None
        self._packer = Packer(names)
        self._start = Start(self._packer, (self._work, *self._hooks), levels, filters, environ)

    def after_fork(self) -> None:
        """Leave the workers to the parent: as long as a child has their pipes open, they do not notice its death."""
        for worker in self._workers:
            worker.pipe.close()
        self._workers.clear()

    @property
    def slots(self) -> int:
        """Batches that can run at the same time, in workers that are there or can be started.

        Where calls shall start at a rate, only in those that are ready: else they would start when their worker does.
        """
        count = 0 if self._is_paced else self._at_once * max(0, self._size - len(self._workers))
        for worker in self._workers:
            if worker.is_ready or not self._is_paced:
                count += min(self._at_once, worker.room)
        return count

    @property
    def largest_batch(self) -> int:  # type: ignore[override]  # here it is not always the same
        """Items that may be sent in one go now: as many as whichever worker gets them may still run."""
        most = min(LARGEST_BATCH if self._at_once == 1 else 1, self._most_items)
        for worker in self._workers:
            if worker.room and len(worker.batches) < self._at_once:
                most = min(most, worker.room)
        return most

    @property
    def is_starting(self) -> bool:  # type: ignore[override]  # as above
        return bool(self._pending) and not any(worker.is_ready for worker in self._workers)

    def start(self, inbox: Inbox, **about: Any) -> None:
        # A worker that imports an unguarded main module: by this mark multiprocessing itself would refuse to start
        # another process, with a traceback from each worker. Or it imports the module of its function, which maps
        # then: so would the workers of that map, and theirs. The map that has started this one tells.
        is_imported = Parent.is_loading or getattr(multiprocessing.current_process(), "_inheriting", False)
        if self._method != "fork" and is_imported:
            raise SystemExit(UNGUARDED_CODE)
        super().start(inbox, **about)
        self._inbox, most = inbox, self._most_batches
        self._size = self._most_workers if most is None else max(1, min(self._most_workers, most))
        for worker in self._workers:
            inbox.listen(worker.pipe, partial(self._hear, worker))

    def submit(self, batch: Batch) -> None:
        self._pending.append(batch)
        self._hand_out()

    def kill(self, batch: Batch) -> bool:
        """Let the worker that runs the batch raise `SystemExit`, unless it is reporting; a second later, kill it."""
        worker = next((worker for worker in self._workers if batch in worker.batches.values()), None)
        if worker is None:
            return True
        # Once it has been told to end, what can be heard may be its end.
        if worker.ends_since is None and worker.pipe.poll():
            return False
        worker.room = 0
        worker.family |= system.family_of(worker.process.pid)
        if worker.ends_since is None:
            worker.ends_since = clock.real()
            worker.process.terminate()
        elif clock.real() - worker.ends_since >= system.GRACE_SECONDS:
            worker.process.kill()
        return True

    def rest(self) -> None:
        for worker in self._workers:
            self._inbox.forget(worker.pipe)

    def take_on(self, work: Work) -> None:
        arguments = self._packer.arguments(work)
        self._work = work
        self._use(self._method)
        for worker in self._workers:
            worker.tell("arguments", arguments)

    def _heard(self, run: Scheduler, worker: Worker, message: tuple[str, int, bytes] | None) -> None:
        """Make sense of what a worker has said, None at its end."""
        if worker not in self._workers:
            return
        if message is None:
            self._worker_ended(run, worker)
            return
        kind, number, payload = message
        if kind in {"report", "part"}:
            self._worker_reports(run, worker, number, payload, is_last=kind == "report")
        elif kind == "hello":
            worker.is_ready, self._stillbirths = True, 0
            self._hand_out()
        elif kind == "log":
            _log_here(payload)
        elif kind == "broken":
            raise OperoError(f"a worker process cannot run {self._name}: {payload.decode()}")

    def _end_workers(self) -> None:
        """End idle workers in peace and the others by force; nothing of the pool is left."""
        # Also for a thread that still maps while the program ends.
        self.rest()
        pipes, idle, busy = [], [], []
        for worker in self._workers:
            pipes.append(worker.pipe)
            if worker.is_ready and not worker.batches:
                worker.tell("stop")
                idle.append(worker.process)
            else:
                busy.append(worker.process)
        records: list[bytes] = []
        hear = partial(_hear_records, pipes, records)
        system.end(busy, meanwhile=hear)
        system.end(idle, PEACE_SECONDS, hear)
        hear(system.GRACE_SECONDS)
        while self._workers:
            self._workers.pop().pipe.close()
        # Last: a handler of the program's may raise.
        for record in records:
            _log_here(record)

    # Workers

    def prepare(self) -> None:
        """Start workers, as many as there are batches for that no other will take."""
        missing = self._size - len(self._workers)
        if not self._is_paced:
            waiting = math.ceil(len(self._pending) / self._at_once)
            for worker in self._workers:
                # Those that are starting take what waits.
                waiting -= not worker.is_ready
            missing = min(missing, waiting)
        if missing > 0 and self._method == "fork" and not self._method_is_given and system.has_other_threads():
            # They have come meanwhile, and may hold locks.
            self._use("forkserver")
        for _ in range(missing):
            try:
                self._start_worker()
            except OSError as error:
                # There are no more processes, files or memory for now. That shall cost no results of a long map.
                self._size = len(self._workers)
                if not self._size:
                    raise
                text = f"no more than {self._size} of {self._name}'s workers can be started: {describe(error)}"
                warnings.warn(text, RuntimeWarning, stacklevel=level_of_the_user())
                break

    def _start_worker(self) -> None:
        # A forked one has the handlers of this process, and hooks in which no exception is heard.
        more = {signal.SIGTERM} if self._method == "fork" else ()
        held_back = system.held_back_in_children(self._method, *more)
        with Hold(), _starting.lock, held_back, _allowed_to_start(self._method):
            if not self._has_begun:
                self._has_begun = True
                self.enter_multi_pool(self._size, self._end_workers)
            if self._method == "forkserver" and self._server is None:
                try:
                    self._server = server_for(module_of(self._work.function))
                except OSError:
                    # There may be no temporary folder for its socket, or only one with too long a path.
                    if self._method_is_given:
                        raise
                    self._use("spawn")
            context: Any = multiprocessing.get_context(self._method)
            ours, theirs = context.Pipe()
            # Not in the memory of the program's own shared values: a pipe to that can be passed on only once.
            shared = arena(4)
            worker = Worker(ours, memoryview(shared.buffer).cast("I"), self._most_items)
            args = theirs, shared, self._start, self._threads, self._at_once
            worker.process = context.Process(target=serve, args=args, daemon=False)
            self._workers.append(worker)
            try:
                with self._server.serving() if self._server else contextlib.nullcontext():
                    worker.process.start()
            except BaseException:
                self._workers.remove(worker)
                ours.close()
                raise
            finally:
                theirs.close()
            # Multiprocessing shall not end it: not with this process, as the pool does so, nor with a forked child.
            multiprocessing.process._children.discard(worker.process)  # type: ignore[attr-defined]  # noqa: SLF001
            self._inbox.listen(ours, partial(self._hear, worker))

    def _worker_ended(self, run: Scheduler, worker: Worker) -> None:
        batches, mark = list(worker.batches.values()), worker.mark[0]
        with Hold():
            system.end([worker.process], system.GRACE_SECONDS)
            system.end_family(worker.family)
            worker.pipe.close()
            self._workers.remove(worker)
        if not worker.is_ready:
            self._stillbirths += 1
            most = max(MOST_STILLBIRTHS, 2 * self._most_workers)
            code = worker.process.exitcode
            if self._stillbirths >= most or code == UNGUARDED_CODE:
                name, reason = self._name, system.how_it_ended(worker.process)
                is_main = code == UNGUARDED_CODE or (self._method != "fork" and self._hooks[0] is None)
                hint = _MAIN_HINT if is_main else "see what their initializer does"
                raise OperoError(f"worker processes for {name} end before they are ready ({reason}); {hint}")
        self.prepare()
        reason = system.how_it_ended(worker.process)
        if self._at_once > 1:
            not_begun = [batch for number, batch in worker.batches.items() if number > mark]
            run.lost(batches, reason, not_begun)
        else:
            run.lost(batches, reason, [] if mark else batches, begun=None if mark in {0, BETWEEN} else mark)

    # Batches

    def _hand_out(self) -> None:
        while self._pending:
            worker = self._free_worker(self._pending[0])
            if worker is None:
                self.prepare()
                return
            batch = self._pending.popleft()
            if batch.time_limit is not None:
                batch.begins(*batch.time_limit)
            try:
                data = self._packer.batch(batch)
            except NotTransferableError as error:
                self.deliver(Scheduler.not_sent, batch, error)
                continue
            if self._at_once == 1:
                worker.mark[0], batch.mark = 0, worker.mark
            worker.count += 1
            worker.batches[worker.count] = batch
            worker.tell("batch", data)

    def _free_worker(self, batch: Batch) -> Worker | None:
        """The ready one with the least to do, if it can take the batch, too."""
        free = None
        for worker in self._workers:
            count = len(worker.batches)
            fits = worker.is_ready and count < self._at_once and count + len(batch.items) <= worker.room
            if fits and count:
                fits = not (batch.alone or any(other.alone for other in worker.batches.values()))
            if fits and (free is None or count < len(free.batches)):
                free = worker
        return free

    def _worker_reports(self, run: Scheduler, worker: Worker, number: int, payload: bytes, *, is_last: bool) -> None:
        report, batch = unpack_report(payload), worker.batches[number]
        worker.room = max(0, worker.room - len(report.values))
        if is_last:
            del worker.batches[number]
            if not worker.room and not worker.batches:
                worker.tell("stop")
            self._hand_out()
        run.done(batch, report, is_part=not is_last)

    def _hear(self, worker: Worker) -> None:
        """Put all that the worker has said into the inbox, with None for the end of its pipe."""
        has_more = True
        while has_more:
            try:
                message = worker.pipe.recv()
                has_more = self._at_once > 1 and worker.pipe.poll()
            except (EOFError, OSError):
                message, has_more = None, False
                self._inbox.forget(worker.pipe)
            self.deliver(self._heard, worker, message)


def _hear_records(pipes: list[Any], records: list[bytes], seconds: float = _HEARING_SECONDS) -> None:
    """Read what ending workers say, who would wait for that; only what they log is of interest now."""
    enough = clock.real() + seconds
    talking: Any = pipes
    while talking and clock.real() < enough:
        talking = wait(pipes, 0)
        for pipe in talking:
            try:
                kind, _, payload = pipe.recv()
            except (EOFError, OSError):
                # Nothing can follow half a message.
                pipes.remove(pipe)
                continue
            if kind == "log":
                records.append(payload)


def _log_here(data: bytes) -> None:
    """Let the handlers of this process have a record of a worker's."""
    record = unpack_record(data)
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


@contextlib.contextmanager
def _allowed_to_start(method: str) -> Iterator[None]:
    """Let a map start workers inside of a worker of `multiprocessing.Pool`, too; they end with their pipes.

    Python 3.12 warns of forks beside threads; those are counted before, and may be the program's wish.
    """
    this, its = multiprocessing.current_process(), vars(sys.modules["__main__"])
    before, this.daemon = this.daemon, False
    # New processes would import the main module from its file, which is not there if it is read as input.
    is_hidden = method != "fork" and "__file__" in its and not Path(its["__file__"]).exists()
    hidden = {"__file__": its.pop("__file__")} if is_hidden else {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            yield
    finally:
        its.update(hidden)
        this.daemon = before


_MAIN_HINT = (
    "each imports the main module and that of the function, so put what shall run only once below "
    "`if __name__ == '__main__':`, or give pool_options={'start_method': 'fork'}"
)
