"""The pool of a dask cluster: batches that are pinned to its workers, which come and go.

dask would run a task again when its worker died, and tells nothing of how far it had come. So each batch is bound to
one worker; when that is gone its batches are withdrawn, and its nanny reads the journal for the map.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
from collections import deque
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from opero.concurrency.batches import Batch, Fatal, Lost
from opero.concurrency.far import CONNECTING_SECONDS, ENDING_SECONDS, FarPool
from opero.concurrency.far_worker import Found, end_children, load_on_dask, recover, run_on_dask
from opero.concurrency.scheduler import MOST_AHEAD
from opero.core.checks import kind_of
from opero.core.forks import ForkSafeLock
from opero.exceptions import OperoError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from opero.concurrency.running import Inbox
    from opero.concurrency.worker import Work

# Between two looks at the scheduler: whether it is there, and what workers it has.
_LOOKING_SECONDS = 1.0
# Batches at a worker for each of its threads.
_PER_THREAD = 1 + MOST_AHEAD
# Larger batches go past the scheduler's graph, which warns of them.
_MOST_BYTES_ALONG = 65_536
# The first use of some parts of the library imports them, which it does not survive in two threads at once.
_making = ForkSafeLock()


@dataclass(eq=False)
class _Worker:
    """A worker of the cluster: where it is, how many items it can run at once, and what it has to do, by name."""

    address: str
    nanny: str | None
    room: int
    is_ready: bool = False
    batches: dict[Batch, str] = field(default_factory=dict)


class DaskPool(FarPool):
    """Runs batches on the workers of a dask cluster."""

    engine = "dask"

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
        self._given, self._address = client, address
        self._resources, self._priority = dict(resources or {}), priority
        self._restarts = restart_workers
        self._workers: dict[str, _Worker] = {}
        self._pending: deque[tuple[Batch, bytes]] = deque()
        # The library, most of which has no types; the map's own client, and cluster if it had to be made.
        self._distributed: Any = None
        self._client: Any = None
        self._cluster: Any = None
        # Those of batches by their names, and one that waits for a first worker.
        self._futures: dict[str, Any] = {}
        self._knock: Any = None
        self._has_limits = self._has_seceded = False
        super().__init__(work, workers)

    @property
    def slots(self) -> int:
        if self._client is None:
            return 0 if self._is_paced else 1
        room = sum(worker.room for worker in list(self._workers.values()) if worker.is_ready)
        return room if self._most is None else min(room, self._most)

    def start(self, inbox: Inbox, **about_the_map: Any) -> None:
        super().start(inbox, **about_the_map)
        if self._client is not None:
            # They have the arguments of the last map, and what has become of them meanwhile is not known.
            self._workers.clear()
            self._spawn(self._count())

    def take_on(self, work: Work) -> None:
        if self._client is not None and self._has_limits:
            self._spawn(self._end_children(self._digest))
        super().take_on(work)

    def prepare(self) -> None:
        """Look for workers, for calls that take no slot before there is one."""
        if self._client is None:
            self._begin()

    def submit(self, batch: Batch) -> None:
        self.prepare()
        payload = self.pack(batch)
        if payload is not None:
            self._has_limits = self._has_limits or batch.time_limit is not None
            self._pending.append((batch, payload))
            self._loop.call_soon_threadsafe(self._hand_out)

    def stop(self, is_left: Callable[[], bool] = lambda: False) -> None:  # noqa: ARG002 - it does not take long
        """Withdraw what has not begun; what runs is left to its end."""
        try:
            if self._client is not None:
                atexit.unregister(self.stop)
                self._looking.cancel()
                wait([self._spawn(self._withdraw())], timeout=ENDING_SECONDS)
                self._client.close(timeout=ENDING_SECONDS)
        finally:
            if self._cluster is not None:
                self._cluster.close(timeout=ENDING_SECONDS)
            if self._has_seceded:
                self._distributed.rejoin()
            self._client = self._cluster = None
            self._has_seceded = False

    # In the thread of the map

    def _begin(self) -> None:
        import distributed

        self._distributed = distributed
        address, security = self._where()
        try:
            # One of the map's own: what others subscribe to, cancel or restart is theirs.
            self._client = self._distributed.Client(
                address, security=security, set_as_default=False, timeout=CONNECTING_SECONDS, name="opero"
            )
        except OSError as error:
            raise OperoError(f"the scheduler of dask at {address} cannot be reached: {describe(error)}") from error
        self._loop = self._client.loop.asyncio_loop
        # A forgotten stream is ended while dask can still do that.
        atexit.register(self.stop)
        self._client.subscribe_topic("all", self._heard)
        self._looking = self._spawn(self._look_after())

    def _where(self) -> tuple[str, Any]:
        """Address and security of the scheduler: of the client that was given, or is there, or of a new cluster."""
        distributed = self._distributed
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
                raise TypeError(f"pool_options['client'] is {kind_of(client)}; write a distributed.Client")
            if client.scheduler is None or client.status != "running":
                raise OperoError(f"the client of dask that is to run {self._name} is not connected ({client.status})")
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

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        """Run it in the client's loop, which has a thread of its own; an error ends the map."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        future.add_done_callback(self._over)
        return future

    def _over(self, future: Future[None]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None:
            self.deliver(Fatal(error))

    # In the loop of the client, which alone knows what its workers do

    async def _look_after(self) -> None:
        """See which workers there are, and tell of a scheduler that is away: its futures would never end."""
        while True:
            if self._client.status == "running":
                await self._count()
            else:
                self.deliver(self._away())
            await asyncio.sleep(_LOOKING_SECONDS)

    def _away(self) -> Fatal:
        return Fatal(OperoError(f"the scheduler of dask that runs {self._name} is away"))

    async def _heard(self, event: Any) -> None:
        about = event[1] if isinstance(event[1], dict) else {}
        if about.get("action") == "remove-worker":
            await self._gone(about["worker"], is_expected=bool(about.get("expected")))
        elif about.get("action") == "add-worker" and self._client is not None:
            await self._count()

    async def _count(self) -> None:
        """Take in workers that are new, and see whether there is any."""
        try:
            there = (await self._client.scheduler.identity(n_workers=-1))["workers"]
        except OSError:
            # If the scheduler is away, its status will say so.
            return
        for address, about in there.items():
            rooms = [about["resources"].get(kind, 0) // need for kind, need in self._resources.items() if need]
            room = int(min([about["nthreads"], *rooms]))
            if address not in self._workers and room and about["status"] == "running":
                worker = self._workers[address] = _Worker(address, about.get("nanny"), room)
                self._spawn(self._greet(worker))
        for address in self._workers.keys() - there.keys():
            # Its end may not have been told.
            await self._gone(address, is_expected=False)
        if self._workers:
            self._knock = None
        elif self._knock is None:
            # A cluster that adapts starts a worker for that.
            resources = self._resources or None
            self._knock = self._client.submit(bool, key=f"opero {self._name}-{uuid4().hex}", resources=resources)
        self.later(self.see_room, bool(self._workers), self._resources)

    async def _greet(self, worker: _Worker) -> None:
        """Let a worker load the work."""
        there = [worker.address]
        try:
            answers = await self._client.run(load_on_dask, self._digest, self._packed, workers=there, on_error="return")
        except OSError:
            # The way to the scheduler is broken, which is told soon.
            return
        problem = answers.get(worker.address)
        if problem is None:
            worker.is_ready = True
            self._hand_out()
        elif not isinstance(problem, OSError):
            self.later(self.refused, problem)
        elif not worker.batches:
            # It cannot be reached. It has left, or will be counted and greeted again.
            self._workers.pop(worker.address, None)

    def _hand_out(self) -> None:
        while self._pending:
            worker = self._free_for(self._pending[0][0])
            if worker is None:
                return
            batch, payload = self._pending.popleft()
            worker.batches[batch] = uuid4().hex
            # Of those with as much to do, the one that got its last batch first is done first.
            self._workers[worker.address] = self._workers.pop(worker.address)
            self._spawn(self._run(batch, worker, payload))

    def _free_for(self, batch: Batch) -> _Worker | None:
        """The worker with the least to do for its room; nothing else may run beside a batch that is to be alone."""
        free = [
            worker
            for worker in self._workers.values()
            if worker.is_ready
            and len(worker.batches) < (1 if batch.alone else worker.room * _PER_THREAD)
            and not any(other.alone for other in worker.batches)
        ]
        return min(free, key=lambda worker: len(worker.batches) / worker.room, default=None)

    async def _run(self, batch: Batch, worker: _Worker, payload: bytes) -> None:
        """Run a batch, and tell what became of it."""
        answer = await self._answer(worker, worker.batches[batch], payload)
        if self._client.status != "running":
            self.deliver(self._away())
            return
        # If its worker has left, what it had is searched for, or will be when that is told.
        if self._workers.get(worker.address) is not worker or isinstance(answer, self._distributed.KilledWorker):
            return
        del worker.batches[batch]
        if isinstance(answer, Found):
            self.later(self.opened, batch, answer)
        elif answer is None or isinstance(answer, (asyncio.CancelledError, OSError)):
            # Somebody has cancelled its task, or the way to the scheduler is broken, which is told soon.
            self.deliver(Lost([batch], "its task was withdrawn", innocent=[batch]))
        else:
            self.later(self.refused, answer)
        if answer is None:
            worker.is_ready = False
            await self._greet(worker)
        self._hand_out()

    async def _answer(self, worker: _Worker, name: str, payload: bytes) -> Any:
        try:
            sent: Any = payload
            if len(payload) > _MOST_BYTES_ALONG:
                sent = await self._client.scatter(payload, workers=[worker.address], hash=False)
            self._futures[name] = self._client.submit(
                run_on_dask,
                name,
                self._digest,
                sent,
                restarts=self._restarts,
                key=f"opero {self._name}-{name}",
                workers=[worker.address],
                allow_other_workers=False,
                retries=0,
                priority=self._priority,
                resources=self._resources or None,
            )
            return await self._client.gather(self._futures[name])
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - whoever asks tells them apart
            return error
        finally:
            self._futures.pop(name, None)

    async def _gone(self, address: str, *, is_expected: bool) -> None:
        """A worker has left; its nanny, or a worker beside it, can read what it has left of its batches."""
        worker = self._workers.pop(address, None)
        if worker is None or not worker.batches:
            return
        host = address.rpartition(":")[0]
        beside = (other for other in self._workers if other.rpartition(":")[0] == host)
        reader = worker.nanny or next(beside, None)
        names = list(worker.batches.values())
        found: list[Found | None] = [None] * len(names)
        with contextlib.suppress(Exception):
            # Else dask would run them if a worker came to the same address.
            await self._client.cancel([self._futures[name] for name in names if name in self._futures], force=True)
        with contextlib.suppress(Exception):
            if reader is not None:
                asked = self._client.run(recover, names, workers=[reader], on_error="raise")
                found = (await asyncio.wait_for(asked, ENDING_SECONDS))[reader]
        reason = "its worker has left the cluster" if is_expected else "its dask worker ended"
        left = dict(zip(worker.batches, found, strict=True))
        self.later(self.recovered, left, reason, is_innocent=is_expected)
        self._hand_out()

    async def _withdraw(self) -> None:
        self._knock = None
        with contextlib.suppress(Exception):
            if self._client.status == "running":
                # Else the scheduler would tell it of its own end, and log that it cannot.
                self._client.unsubscribe_topic("all")
                await self._client.cancel(list(self._futures.values()), force=True)
                if self._has_limits:
                    await self._end_children(self._digest)
        self._futures.clear()

    async def _end_children(self, digest: bytes) -> None:
        await self._client.run(end_children, digest, on_error="ignore")
