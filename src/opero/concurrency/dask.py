"""The pool of a dask cluster: batches that are pinned to its workers, which come and go.

dask would run a task again when its worker died, and tells nothing of how far it had come. So each batch is bound to
one worker, and to the process that it was sent to; when that is gone, its nanny reads the journal for the map.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from opero.concurrency.batches import Batch, Fatal
from opero.concurrency.dask_worker import STALE, end_children, is_starting, load_on_dask, recover_all, run_on_dask
from opero.concurrency.far import (
    BROKEN,
    CONNECTING_SECONDS,
    ENDED,
    ENDING_SECONDS,
    Answer,
    FarPool,
    Found,
    check_reachable,
    merged,
    tell_of_dashboard,
    wait_for_the_end,
)
from opero.concurrency.scheduler import MOST_AHEAD
from opero.core.forks import ForkSafeLock
from opero.core.showing import kind_of
from opero.exceptions import OperoError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from opero.concurrency.inbox import Inbox
    from opero.concurrency.worker import Work

# Between two looks at the scheduler: whether it is there; and at what workers it has.
_LOOKING_SECONDS = 0.1
_COUNTING_SECONDS = 1.0
# Batches at a worker for each of its threads.
_PER_THREAD = 1 + MOST_AHEAD
# Larger work goes to each worker once, larger batches past the scheduler's graph, which warns of them.
_MOST_BYTES_ALONG = 65_536
_POLLING_SECONDS = 0.02
# The first use of some parts of the library imports them, which it does not survive in two threads at once.
_making = ForkSafeLock()
_KNOCK = "knock"


@dataclass(eq=False)
class _Worker:
    """A worker of the cluster: where it is, how many items it can run at once, and what it has to do."""

    address: str
    nanny: str | None
    room: int
    # Which process it is; known when it has loaded the work.
    process: str | None = None
    work: Any = None
    batches: dict[Batch, str] = field(default_factory=dict)


class DaskPool(FarPool):
    """Runs batches on the workers of a dask cluster."""

    who_needs_opero = "its scheduler and workers"

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
        super().__init__(work, "dask")
        self._most = workers
        self._given, self._address = client, address
        self._resources, self._priority = dict(resources or {}), priority
        self._restarts = restart_workers
        self._workers: dict[str, _Worker] = {}
        self._pending: deque[Batch] = deque()
        self._client: Any = None
        self._cluster: Any = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._futures: dict[str, Any] = {}
        self._has_limits = self._is_over = self._is_paced = self._has_seceded = False

    @property
    def slots(self) -> int:
        if self._client is None:
            return 0 if self._is_paced else 1
        room = sum(worker.room for worker in self._workers.values() if worker.process is not None)
        return room if self._most is None else min(room, self._most)

    def start(
        self, inbox: Inbox, *, is_paced: bool = False, patience: float | None = None, **_about_the_map: Any
    ) -> None:
        self.deliver = inbox.put
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

    def submit(self, batch: Batch) -> None:
        if self._client is None:
            self._begin()
        self._pending.append(batch)
        self._hand_out()

    def stop(self, is_left: Callable[[], bool]) -> None:
        """Withdraw what has not begun; an item that runs is left to its end, one with a time limit is ended."""
        self._is_over = True
        self.not_at_exit()
        client, self._client = self._client, None
        try:
            if client is not None:
                self._end(client, is_left)
        finally:
            cluster, self._cluster = self._cluster, None
            if cluster is not None:
                cluster.close(timeout=ENDING_SECONDS)
            if self._has_seceded:
                self._has_seceded = False
                _distributed().rejoin()

    def _end(self, client: Any, is_left: Callable[[], bool]) -> None:
        try:
            done = asyncio.run_coroutine_threadsafe(self._withdraw(client), client.loop.asyncio_loop)
            wait_for_the_end(done.done, is_left)
        finally:
            self._workers.clear()
            client.close(timeout=ENDING_SECONDS)

    # In the thread of the map

    def _begin(self) -> None:
        distributed = _distributed()
        address, security = self._where()
        scheme, _, rest = address.rpartition("://")
        host, _, port = rest.rpartition(":")
        if scheme in {"", "tcp", "tls"} and port.isdecimal():
            check_reachable("the scheduler of dask", host, int(port))
        try:
            # One of the map's own: what others subscribe to, cancel or restart is theirs.
            self._client = distributed.Client(
                address, security=security, set_as_default=False, timeout=CONNECTING_SECONDS, name="opero"
            )
        except OSError as error:
            msg = f"the scheduler of dask at {address} cannot be reached: {describe(error)}"
            raise OperoError(msg) from error
        self.end_at_exit()
        tell_of_dashboard("dask", self._client.dashboard_link)
        self._spawn(self._look_after(self._client))

    def _where(self) -> tuple[str, Any]:
        """Address and security of the scheduler: of the client that was given, or is there, or of a new cluster."""
        distributed = _distributed()
        if self._address is not None:
            return self._address, None
        client = self._given
        if client is None:
            with contextlib.suppress(ValueError):
                worker = distributed.get_worker()
                # In a task, whose thread would be missing to those that it waits for.
                distributed.secede()
                self._has_seceded = True
                return worker.scheduler.address, worker.security
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
        with _making.lock:
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

    def _counted(self, there: Mapping[str, Mapping[str, Any]]) -> list[Any]:
        """Take in workers that are new, and see whether there is any."""
        for address, about in there.items():
            room = self._room(about)
            if address not in self._workers and room and about["status"] == "running":
                self._workers[address] = _Worker(address, about.get("nanny"), room)
                self._spawn(self._greet(self._client, self._workers[address]))
        for address in self._workers.keys() - there.keys():
            # Its end may not have been told.
            self._gone(address, is_expected=False)
        needs = f", which needs {', '.join(sorted(self._resources))}" if self._resources else ""
        end = self.see_room(self._workers, needs)
        return [] if end is None else [end]

    def _room(self, about: Mapping[str, Any]) -> int:
        rooms = [about["resources"].get(kind, 0) // need for kind, need in self._resources.items() if need]
        return int(min([about["nthreads"], *rooms]))

    def _joined(self, worker: _Worker, process: str, problem: str | None) -> list[Any]:
        """A worker has loaded the work, or says why it cannot."""
        if problem is not None:
            return self.opened(Batch([], 0), (BROKEN, problem), 0)
        worker.process = process
        self._hand_out()
        return []

    def _hand_out(self) -> None:
        while self._pending:
            worker = self._free_for(self._pending[0])
            if worker is None:
                return
            self._send(self._pending.popleft(), worker)

    def _free_for(self, batch: Batch) -> _Worker | None:
        """The worker with the least to do for its room; nothing else may run beside a batch that is to be alone."""
        free = [
            worker
            for worker in self._workers.values()
            if worker.process is not None
            and len(worker.batches) < (1 if batch.alone else worker.room * _PER_THREAD)
            and not any(other.alone for other in worker.batches)
        ]
        return min(free, key=lambda worker: len(worker.batches) / worker.room, default=None)

    def _send(self, batch: Batch, worker: _Worker) -> None:
        payload = self.pack(batch)
        if payload is None:
            return
        self._has_limits = self._has_limits or batch.time_limit is not None
        name = uuid4().hex
        worker.batches[batch] = name
        self._spawn(self._run(self._client, batch, worker, name, payload))

    def _came(self, batch: Batch, answer: Answer | None, size: int, error: Exception | None) -> list[Any]:
        """A batch has its answer; without one its worker is gone, which is told as well."""
        worker = next((worker for worker in self._workers.values() if batch in worker.batches), None)
        if worker is None:
            return []
        if error is not None:
            return [self.refused(error)]
        if answer is None or answer[0] == STALE:
            return []
        del worker.batches[batch]
        self._hand_out()
        return self.opened(batch, answer, size)

    def _gone(self, address: str, *, is_expected: bool) -> list[Any]:
        """A worker has left; its nanny, or a worker beside it, can read what it has left of its batches."""
        worker = self._workers.pop(address, None)
        if worker is not None and worker.batches:
            host = _host_of(address)
            beside = (other for other in self._workers if _host_of(other) == host)
            reader = worker.nanny or next(beside, None)
            self._spawn(self._search(self._client, worker, reader, is_expected=is_expected))
        return []

    def _searched(self, found: dict[Batch, Found | None], is_expected: bool) -> list[Any]:  # noqa: FBT001 - a plain fact
        """Charge the item that was running, if it was the only one; what was stuck explains all the others."""
        running = [batch for batch, left in found.items() if left and left.begun > len(merged(left.reports).values)]
        is_explained = is_expected or any(left and left.stuck for left in found.values())
        reason = "its worker has left the cluster" if is_expected else "its dask worker ended"
        events: list[Any] = []
        for batch, left in found.items():
            is_innocent = is_explained and not (left and left.stuck)
            is_sure = len(running) == 1 or batch not in running
            events += self.recovered(batch, left, reason, is_innocent=is_innocent, is_sure=is_sure)
        self._hand_out()
        return events

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
                self._ask_for(client, any(map(self._room, counted["workers"].values())))
                self.later(self._counted, counted["workers"])
            await asyncio.sleep(_LOOKING_SECONDS)
            seconds -= _LOOKING_SECONDS

    def _ask_for(self, client: Any, has_room: bool) -> None:  # noqa: FBT001 - a plain fact
        """Without a worker, wait for one in the scheduler, too: a cluster that adapts starts one for that."""
        if has_room:
            self._futures.pop(_KNOCK, None)
        elif _KNOCK not in self._futures:
            self._futures[_KNOCK] = client.submit(
                bool, key=f"opero {self._name}-{uuid4().hex}", resources=self._resources or None
            )

    def _away(self) -> None:
        if not self._is_over:
            self.deliver(Fatal(OperoError(f"the scheduler of dask that runs {self._name} is away")))

    async def _greet(self, client: Any, worker: _Worker) -> None:
        """Let a worker load the work, and tell which process it is."""
        client.subscribe_topic(worker.address, lambda event: self._heard(worker.address, event))
        packed = self._packed
        try:
            worker.work = packed
            if len(packed) > _MOST_BYTES_ALONG:
                worker.work = await client.scatter(packed, workers=[worker.address], hash=False)
            await self._nanny_is_ready(client, worker)
            name = uuid4().hex
            future = self._submit(client, worker, name, load_on_dask, self._digest)
            process, problem = await client.gather(future)
            del self._futures[name]
        except Exception as error:  # noqa: BLE001 - it may have left again; else the map shall know
            if await _has_worker(client, worker.address):
                self.later(self._joined, worker, "", describe(error))
        else:
            self.later(self._joined, worker, process, problem)

    async def _nanny_is_ready(self, client: Any, worker: _Worker) -> None:
        """Wait until it looks after its worker: one that dies before that is never replaced."""
        ends = time.monotonic() + ENDING_SECONDS
        while worker.nanny is not None and time.monotonic() < ends:
            answers = await client.run(is_starting, workers=[worker.nanny], on_error="return")
            if answers.get(worker.nanny) is not True:
                return
            await asyncio.sleep(_POLLING_SECONDS)

    def _heard(self, address: str, event: Any) -> None:
        _, about = event
        if isinstance(about, dict) and about.get("action") == "remove-worker":
            is_expected = bool(about.get("expected"))
            self.later(lambda: self._gone(address, is_expected=is_expected))

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
                client, worker, name, run_on_dask, name, worker.process, self._digest, self._restarts, sent
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
        self.later(self._came, batch, answer, len(payload), error)

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
                (answer,) = (await asyncio.wait_for(asked, ENDING_SECONDS)).values()
                found = dict(zip(worker.batches, answer, strict=True))
        self.later(self._searched, found, is_expected)

    async def _withdraw(self, client: Any) -> None:
        with contextlib.suppress(Exception):
            if self._futures and client.status == "running":
                await client.cancel(list(self._futures.values()), force=True)
            if self._has_limits and client.status == "running":
                await client.run(end_children, self._digest, on_error="ignore")
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


def _is_withdrawn(error: Exception) -> bool:
    from distributed.client import FutureCancelledError

    return isinstance(error, FutureCancelledError)


async def _has_worker(client: Any, address: str) -> bool:
    with contextlib.suppress(OSError):
        return client.status == "running" and address in (await client.scheduler.identity(n_workers=-1))["workers"]
    return False


def _host_of(address: str) -> str:
    return address.rpartition(":")[0]
