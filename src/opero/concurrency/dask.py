"""The pool of a dask cluster: batches that are pinned to its workers, which come and go.

dask would run a task again when its worker died, and tells nothing of how far it had come. So each batch is bound to
one worker, and to the process that it was sent to; when that is gone, its nanny reads the journal for the map.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
import warnings
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from opero.concurrency.batches import Batch, Done, Fatal, Lost, Wake, not_run
from opero.concurrency.ctrl_c import in_own_thread
from opero.concurrency.far import (
    BROKEN,
    ENDED,
    LARGEST_BATCH,
    UNHEEDED_SECONDS,
    Answer,
    Found,
    Parcels,
    load,
    merged,
    recover,
    run_parcel,
    work_of,
)
from opero.concurrency.inbox import BlockingInbox
from opero.concurrency.worker import How, Report, TimeLimit, Work
from opero.core.forks import ForkSafeLock
from opero.core.showing import kind_of
from opero.core.signature import name_of
from opero.exceptions import CallTimeoutError, NotTransferableError, OperoError, WorkerCrashedError
from opero.utils.logging import log
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from opero.concurrency.inbox import Inbox

# Between two looks at the scheduler: whether it is there; and at what workers it has.
_LOOKING_SECONDS = 0.1
_COUNTING_SECONDS = 1.0
_CONNECTING_SECONDS = 5.0
_ENDING_SECONDS = 5.0
_WARNING_SECONDS = 30.0
# Batches at a worker for each of its threads.
_PER_THREAD = 2
# Larger work goes to each worker once, larger batches past the scheduler's graph, which warns of them.
_MOST_BYTES_ALONG = 65_536
# The worker's process is not the one that the batch was sent to.
_STALE = -1
_POLLING_SECONDS = 0.02


@dataclass(eq=False)
class _Worker:
    """A worker of the cluster: where it is, how many items it can run at once, and what it has to do."""

    address: str
    nanny: str | None
    room: int
    # Which process it is; known when it has loaded the work.
    process: str | None = None
    work: Any = None
    is_reserved: bool = False
    batches: dict[Batch, str] = field(default_factory=dict)


class _Counted(NamedTuple):
    """The workers that the scheduler has, by their addresses."""

    workers: Mapping[str, Mapping[str, Any]]


class _Joined(NamedTuple):
    """A worker has loaded the work, or says why it cannot."""

    worker: _Worker
    process: str
    problem: str | None


class _Gone(NamedTuple):
    """A worker has left, expectedly or not."""

    address: str
    is_expected: bool


class _Came(NamedTuple):
    """A batch has its answer."""

    batch: Batch
    answer: Answer | None
    size: int
    error: Exception | None


class _Searched(NamedTuple):
    """What a worker that is gone has left of its batches."""

    found: dict[Batch, Found | None]
    is_expected: bool


class DaskPool:
    """Runs batches on the workers of a dask cluster."""

    largest_batch = LARGEST_BATCH
    is_far = can_rest = True
    kill = begun = None

    def __init__(
        self,
        work: Work,
        workers: int | None,
        *,
        client: Any = None,
        address: str | None = None,
        resources: Mapping[str, float] | None = None,
        priority: float = 0,
        restart_workers: bool = False,
    ) -> None:
        self._name = name_of(work.function)
        self._most = workers
        self._given, self._address = client, address
        self._resources, self._priority = dict(resources or {}), priority
        self._restarts = restart_workers
        self._parcels = Parcels(work)
        self._workers: dict[str, _Worker] = {}
        self._pending: deque[Batch] = deque()
        self._client: Any = None
        self._cluster: Any = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._futures: dict[str, Any] = {}
        self._has_limits = self._is_over = self._is_paced = False
        self._resting: list[Any] = []
        self._deliver: Callable[[Any], None] = self._resting.append
        self._roomless_since: float | None = None
        self._has_warned = False

    @property
    def slots(self) -> int:
        if self._client is None:
            return 0 if self._is_paced else 1
        room = sum(worker.room for worker in self._workers.values() if worker.process is not None)
        return room if self._most is None else min(room, self._most)

    def start(
        self, inbox: Inbox, *, is_paced: bool = False, patience: float | None = None, **_about_the_map: Any
    ) -> None:
        self._deliver = inbox.put
        self._is_paced, self._patience = is_paced, patience
        if self._client is not None and self._client.status != "running":
            self._away()
        for worker in self._workers.values():
            worker.process = None
            self._spawn(self._greet(self._client, worker))

    def prepare(self) -> None:
        """Look for workers, for calls that take no slot before there is one."""
        if self._client is None:
            self._begin()

    def rest(self) -> None:
        """Workers may come and go meanwhile."""
        self._deliver = lambda event: self._resting.append(event) if not isinstance(event, _Counted) else None

    def take_on(self, work: Work) -> None:
        self._parcels = Parcels(work)
        resting, self._resting = self._resting, []
        for event in resting:
            self.receive(event)

    def submit(self, batch: Batch) -> None:
        if self._client is None:
            self._begin()
        self._pending.append(batch)
        self._hand_out()

    def receive(self, event: Any) -> Any:
        if isinstance(event, _Came):
            return self._first(self._came(event))
        if isinstance(event, _Joined):
            return self._joined(event)
        if isinstance(event, _Counted):
            return self._counted(event)
        if isinstance(event, _Gone):
            self._gone(event)
            return None
        if isinstance(event, _Searched):
            return self._first(self._searched(event))
        return event

    def stop(self, is_left: Callable[[], bool]) -> None:
        """Withdraw what has not begun; an item that runs is left to its end, one with a time limit is ended."""
        if self._client is None:
            return
        client, self._client = self._client, None
        self._is_over = True
        try:
            done = asyncio.run_coroutine_threadsafe(self._withdraw(client), client.loop.asyncio_loop)
            ends = time.monotonic() + _ENDING_SECONDS
            while not done.done() and time.monotonic() < ends and not is_left():
                time.sleep(0.005)
        finally:
            self._workers.clear()
            client.close(timeout=_ENDING_SECONDS)
            if self._cluster is not None:
                self._cluster.close(timeout=_ENDING_SECONDS)

    async def stop_async(self) -> None:
        await in_own_thread(self.stop)

    # In the thread of the map

    def _begin(self) -> None:
        distributed = _distributed()
        address, security = self._where()
        _check_reachable(address)
        try:
            # One of the map's own: what others subscribe to, cancel or restart is theirs.
            self._client = distributed.Client(
                address, security=security, set_as_default=False, timeout=_CONNECTING_SECONDS, name="opero"
            )
        except OSError as error:
            msg = f"the scheduler of dask at {address} cannot be reached: {describe(error)}"
            raise OperoError(msg) from error
        if self._cluster is not None:
            log("INFO", "the dashboard of dask is at {}", self._client.dashboard_link)
        self._spawn(self._look_after(self._client))

    def _where(self) -> tuple[str, Any]:
        """Address and security of the scheduler: of the client that was given, or is there, or of a new cluster."""
        distributed = _distributed()
        if self._address is not None:
            return self._address, None
        client = self._given
        if client is None:
            with contextlib.suppress(ValueError):
                client = distributed.Client.current()
        if client is not None:
            if not isinstance(client, distributed.Client):
                msg = f"pool_options['client'] is {kind_of(client)}; write a distributed.Client"
                raise TypeError(msg)
            if client.scheduler is None or client.status != "running":
                msg = f"the client of dask that is to run {self._name} is not connected ({client.status})"
                raise OperoError(msg)
            return client.scheduler.address, client.security
        # dask's web servers would listen on all interfaces.
        self._cluster = distributed.LocalCluster(
            n_workers=self._most,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
        )
        return self._cluster.scheduler_address, self._cluster.security

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run it in the client's loop, which has a thread of its own."""

        def create() -> None:
            task = asyncio.get_running_loop().create_task(coroutine)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._client.loop.add_callback(create)

    def _counted(self, counted: _Counted) -> Any:
        """Take in workers that are new, and see whether there is any."""
        for address, about in counted.workers.items():
            known = self._workers.get(address)
            room = self._room(about)
            if known is None and room and about["status"] == "running":
                self._workers[address] = _Worker(address, about.get("nanny"), room)
                self._spawn(self._greet(self._client, self._workers[address]))
        for address in list(self._workers):
            if address not in counted.workers:
                # Its end may not have been told.
                self._gone(_Gone(address, is_expected=False))
        if self._workers:
            self._roomless_since = None
            return None
        self._roomless_since = self._roomless_since or time.monotonic()
        waited = time.monotonic() - self._roomless_since
        lacking = f"dask has no worker for {self._name}" + (
            f", which needs {', '.join(sorted(self._resources))}" if self._resources else ""
        )
        if self._patience is not None and waited > self._patience:
            return Fatal(OperoError(f"{lacking}, for {self._patience:g} s"))
        if waited > _WARNING_SECONDS and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"{lacking}; the map waits for one", RuntimeWarning, stacklevel=2)
        return None

    def _room(self, about: Mapping[str, Any]) -> int:
        rooms = [about["resources"].get(kind, 0) // need for kind, need in self._resources.items() if need]
        return int(min([about["nthreads"], *rooms]))

    def _joined(self, joined: _Joined) -> Any:
        if joined.problem is not None:
            return self._parcels.opened(Batch([], 0), (BROKEN, joined.problem), 0)[0]
        joined.worker.process = joined.process
        self._hand_out()
        return Wake()

    def _hand_out(self) -> None:
        while self._pending:
            batch = self._pending[0]
            ready = [worker for worker in self._workers.values() if worker.process is not None]
            free = [w for w in ready if not w.is_reserved and len(w.batches) < w.room * _PER_THREAD]
            if batch.alone:
                # Nothing else may run in its process meanwhile.
                empty = [worker for worker in ready if not worker.batches]
                if not empty:
                    if free and not any(worker.is_reserved for worker in ready):
                        min(free, key=lambda worker: len(worker.batches)).is_reserved = True
                    return
                worker = empty[0]
                worker.is_reserved = True
            elif free:
                worker = min(free, key=lambda worker: len(worker.batches) / worker.room)
            else:
                return
            self._send(self._pending.popleft(), worker)

    def _send(self, batch: Batch, worker: _Worker) -> None:
        try:
            payload = self._parcels.pack(batch)
        except NotTransferableError as error:
            self._deliver(not_run(batch, error))
            return
        self._has_limits = self._has_limits or batch.time_limit is not None
        name = self._parcels.name()
        worker.batches[batch] = name
        self._spawn(self._run(self._client, batch, worker, name, payload))

    def _came(self, came: _Came) -> list[Any]:
        worker = next((worker for worker in self._workers.values() if came.batch in worker.batches), None)
        if worker is None:
            return []  # it was gone before
        if came.error is not None:
            refused = OperoError(
                f"dask cannot run {self._name}: {describe(came.error)}; its scheduler and workers need opero, and its "
                f"workers what {self._name} imports"
            )
            refused.__cause__ = came.error
            return [Fatal(refused)]
        if came.answer is None or came.answer[0] == _STALE:
            # Its worker is gone, which will be told.
            return []
        del worker.batches[came.batch]
        worker.is_reserved = worker.is_reserved and bool(worker.batches)
        self._hand_out()
        return self._parcels.opened(came.batch, came.answer, came.size)

    def _gone(self, gone: _Gone) -> None:
        worker = self._workers.pop(gone.address, None)
        if worker is not None and worker.batches:
            host = _host_of(worker.address)
            beside = [other.address for other in self._workers.values() if _host_of(other.address) == host]
            reader = worker.nanny or next(iter(beside), None)
            self._spawn(self._search(self._client, worker, reader, is_expected=gone.is_expected))

    def _searched(self, searched: _Searched) -> list[Any]:
        """Charge the item that was running, if it was the only one; what was stuck explains all the others."""
        found = searched.found
        running = [batch for batch, left in found.items() if left and left.begun > len(merged(left.reports).values)]
        is_explained = searched.is_expected or any(left and left.stuck for left in found.values())
        reason = "its worker has left the cluster" if searched.is_expected else "its dask worker ended"
        events: list[Any] = []
        for batch, left in found.items():
            is_innocent = is_explained and not (left and left.stuck)
            events += self._parcels.recovered(
                batch, left, reason, is_innocent=is_innocent, is_sure=len(running) == 1 or batch not in running
            )
        self._hand_out()
        return events

    def _first(self, events: list[Any]) -> Any:
        for event in events[1:]:
            self._deliver(event)
        return events[0] if events else None

    # In the loop of the client

    async def _look_after(self, client: Any) -> None:
        """Tell which workers there are, and of a scheduler that is away: its futures would never end."""
        seconds = 0.0
        while not self._is_over:
            if client.status != "running":
                self._away()
                return
            if seconds <= 0:
                seconds = _COUNTING_SECONDS
                try:
                    counted = await client.scheduler.identity(n_workers=-1)
                except OSError:
                    continue  # its status will say so
                self._deliver(_Counted(counted["workers"]))
            await asyncio.sleep(_LOOKING_SECONDS)
            seconds -= _LOOKING_SECONDS

    def _away(self) -> None:
        if not self._is_over:
            self._deliver(Fatal(OperoError(f"the scheduler of dask that runs {self._name} is away")))

    async def _greet(self, client: Any, worker: _Worker) -> None:
        """Let a worker load the work, and tell which process it is."""
        client.subscribe_topic(worker.address, lambda event: self._heard(worker.address, event))
        packed = self._parcels.packed
        try:
            worker.work = packed
            if len(packed) > _MOST_BYTES_ALONG:
                worker.work = await client.scatter(packed, workers=[worker.address], hash=False)
            await self._nanny_is_ready(client, worker)
            name = self._parcels.name()
            future = self._submit(client, worker, name, load_on_dask, self._parcels.digest)
            process, problem = await client.gather(future)
            del self._futures[name]
        except Exception as error:  # noqa: BLE001 - it may have left again; else the map shall know
            if await _has_worker(client, worker.address):
                self._deliver(_Joined(worker, "", describe(error)))
        else:
            self._deliver(_Joined(worker, process, problem))

    async def _nanny_is_ready(self, client: Any, worker: _Worker) -> None:
        """Wait until it looks after its worker: one that dies before that is never replaced."""
        ends = time.monotonic() + _ENDING_SECONDS
        while worker.nanny is not None and time.monotonic() < ends:
            answers = await client.run(is_starting, workers=[worker.nanny], on_error="return")
            if answers.get(worker.nanny) is not True:
                return
            await asyncio.sleep(_POLLING_SECONDS)

    def _heard(self, address: str, event: Any) -> None:
        _, about = event
        if isinstance(about, dict) and about.get("action") == "remove-worker":
            self._deliver(_Gone(address, is_expected=bool(about.get("expected"))))

    def _submit(self, client: Any, worker: _Worker, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        future = client.submit(
            function,
            *arguments,
            worker.work,
            key=f"opero {self._name}-{name}",
            workers=[worker.address],
            allow_other_workers=False,
            retries=0,
            priority=self._priority,
            resources=self._resources or None,
        )
        self._futures[name] = future
        return future

    async def _run(self, client: Any, batch: Batch, worker: _Worker, name: str, payload: bytes) -> None:
        answer: Answer | None = None
        error: Exception | None = None
        try:
            sent: Any = payload
            if len(payload) > _MOST_BYTES_ALONG:
                sent = await client.scatter(payload, workers=[worker.address], hash=False)
            future = self._submit(
                client, worker, name, run_on_dask, name, worker.process, self._parcels.digest, self._restarts, sent
            )
            answer = await client.gather(future)
        except asyncio.CancelledError:
            if self._is_over:
                raise
        except Exception as raised:  # noqa: BLE001 - told apart below
            error = raised
        finally:
            self._futures.pop(name, None)
        if client.status != "running":
            self._away()
        elif answer is None and not await _has_worker(client, worker.address):
            # That is told, too.
            error = None
        elif answer is None and (error is None or _is_withdrawn(error)):
            answer, error = (ENDED, (None, "somebody has cancelled its task")), None
        self._deliver(_Came(batch, answer, len(payload), error))

    async def _search(self, client: Any, worker: _Worker, reader: str | None, *, is_expected: bool) -> None:
        """Let the nanny of a worker that is gone, or a worker beside it, read the journals of its batches."""
        for name in worker.batches.values():
            if name in self._futures:
                # Else dask would run it if a worker came to the same address.
                with contextlib.suppress(Exception):
                    await client.cancel([self._futures[name]], force=True)
        found: dict[Batch, Found | None] = dict.fromkeys(worker.batches)
        with contextlib.suppress(Exception):
            if reader is not None:
                names = list(worker.batches.values())
                asked = client.run(recover_all, names, workers=[reader], on_error="return")
                (answer,) = (await asyncio.wait_for(asked, _ENDING_SECONDS)).values()
                found = dict(zip(worker.batches, answer, strict=True))
        self._deliver(_Searched(found, is_expected))

    async def _withdraw(self, client: Any) -> None:
        with contextlib.suppress(Exception):
            if self._futures and client.status == "running":
                await client.cancel(list(self._futures.values()), force=True)
            if self._has_limits and client.status == "running":
                await client.run(end_children, self._parcels.digest, on_error="ignore")
        # They end by themselves now; dask complains of waits for its futures that are cancelled.
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=1.0)
            for task in late:
                task.cancel()
        self._futures.clear()


def _distributed() -> Any:
    """The library, most of which has no types."""
    import distributed

    return distributed


def threads_of(client: Any) -> int:
    """How many items the cluster of a client can run at the same time."""
    counts = client.nthreads()
    return sum(counts.values()) if isinstance(counts, dict) else 0


def watch(client: Any, name: str, tell: Callable[[OperoError], None]) -> Callable[[], None]:
    """Look whether the scheduler of somebody's client is there; gives what ends that."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOKING_SECONDS):
            if client.status != "running":
                tell(OperoError(f"the scheduler of dask that runs {name} is away"))
                return

    threading.Thread(target=look, name="opero-dask", daemon=True).start()
    return over.set


def _is_withdrawn(error: Exception) -> bool:
    from distributed.client import FutureCancelledError

    return isinstance(error, FutureCancelledError)


async def _has_worker(client: Any, address: str) -> bool:
    with contextlib.suppress(OSError):
        return client.status == "running" and address in (await client.scheduler.identity(n_workers=-1))["workers"]
    return False


def _host_of(address: str) -> str:
    return address.rpartition(":")[0]


def _check_reachable(address: str) -> None:
    scheme, _, rest = address.rpartition("://")
    host, _, port = rest.rpartition(":")
    if scheme not in {"", "tcp", "tls"} or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECTING_SECONDS).close()
    except OSError as error:
        msg = f"the scheduler of dask is away: nothing answers at {address} ({describe(error)})"
        raise OperoError(msg) from error


# In the workers


def load_on_dask(digest: bytes, packed: bytes) -> tuple[str, str | None]:
    """Load the work; tells which process this is, and why that cannot be done."""
    from distributed import get_worker

    return get_worker().id, load(digest, lambda: packed)


def run_on_dask(  # noqa: PLR0917 - as `submit` takes them
    name: str,
    process: str,
    digest: bytes,
    restarts: bool,  # noqa: FBT001 - as above
    payload: bytes,
    packed: bytes,
) -> Answer:
    """One batch, in a task; not in a worker that has come to the same address."""
    from distributed import get_worker

    if get_worker().id != process:
        return _STALE, None
    return run_parcel(name, digest, lambda: packed, payload, None if restarts else run_in_child)


def is_starting(dask_worker: Any) -> bool:
    """Whether a nanny, which dask gives by this name, has not yet heard of its worker that it is there."""
    status = getattr(getattr(dask_worker, "process", None), "status", None)
    return getattr(status, "name", "") == "starting"


def recover_all(names: list[str]) -> list[Found | None]:
    """The journals of batches, read by their worker's nanny."""
    return [recover(name) for name in names]


class _Child:
    """A process below a thread of a worker, for items that have a time limit: it can be ended."""

    def __init__(self, work: Work) -> None:
        from opero.concurrency.processes import ProcessPool

        self.work = work
        self.is_over = False
        self.using = threading.Lock()
        self._inbox = BlockingInbox()
        self._pool = ProcessPool(work, 1)
        self._pool.start(self._inbox)

    def run(self, items: list[Any], candidate: Any, limit: TimeLimit, how: How) -> Report:
        batch = Batch(items, 0)
        batch.candidate, batch.time_limit = candidate, limit
        how.mark[0] = 1
        self._pool.submit(batch)
        # The time begins with the item, not with its process.
        ends: float | None = None
        is_late = False
        while not self.is_over:
            for event in self._inbox.collect(_POLLING_SECONDS, is_real=True):
                known = self._pool.receive(event)
                if isinstance(known, Fatal):
                    raise known.error
                if isinstance(known, Done) and known.batch is batch:
                    return Report(known.values, known.errors, known.seconds)
                if isinstance(known, Lost):
                    if is_late:
                        msg = f"{name_of(self.work.function)} was stopped: {limit[1]} left it {limit[0]:.3g} s"
                        return Report([None], {0: CallTimeoutError(msg)}, limit[0])
                    raise WorkerCrashedError(known.reason)
            if ends is None and self._pool.begun(batch):
                ends = time.monotonic() + limit[0] + UNHEEDED_SECONDS * self.work.is_async
            if ends is not None and time.monotonic() > ends:
                is_late = self._pool.kill(batch) or is_late
                ends = time.monotonic() + 1.0
        msg = "the map has ended"
        raise WorkerCrashedError(msg)

    def stop(self) -> None:
        self._pool.stop()
        self._inbox.close()


_children: dict[int, _Child] = {}
_children_lock = ForkSafeLock()


def run_in_child(work: Work, items: list[Any], candidate: Any, limit: TimeLimit, how: How) -> Report:
    """Run an item that has a time limit in a process below this thread, which stays for the next one."""
    thread = threading.get_ident()
    with _children_lock.lock:
        child = _children.get(thread)
    if child is None or child.work is not work:
        if child is not None:
            child.stop()
        child = _Child(work)
        with _children_lock.lock:
            _children[thread] = child
    with child.using:
        try:
            return child.run(items, candidate, limit, how)
        finally:
            if child.is_over:
                child.stop()


def end_children(digest: bytes) -> None:
    """End the processes of a map that is over."""
    with _children_lock.lock:
        ended = {thread: child for thread, child in _children.items() if child.work is work_of(digest)}
        for thread in ended:
            del _children[thread]
    for child in ended.values():
        child.is_over = True
        # One that runs an item is ended by its own thread.
        if child.using.acquire(blocking=False):
            child.stop()
