"""The pool of a dask cluster: batches that are pinned to its workers, which come and go.

dask would run a task again when its worker died, and tells nothing of how far it had come. So each batch is bound to
one worker; when that is gone its batches are withdrawn, and its nanny reads the journal for the map.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections import deque
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from opero.concurrency.far import (
    CONNECTING_SECONDS,
    ENDING_SECONDS,
    FarPool,
    Found,
    load,
    recover,
    run_parcel,
    run_watched,
    works,
)
from opero.concurrency.outcome import StreamSink
from opero.concurrency.pool import MapSettings, PoolSource
from opero.concurrency.running import run_blocking
from opero.concurrency.scheduler import Scheduler
from opero.concurrency.worker import How, Report, Shape, Work
from opero.core.checks import kind_of
from opero.core.forks import ForkSafeLock
from opero.core.plan import Plan
from opero.core.retry import RetryPolicy
from opero.core.signature import name_of
from opero.exceptions import OperoError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from concurrent.futures import Future

    from opero.concurrency.pool import Batch
    from opero.core.steps import TimeLimit

# Who makes a pool of this kind has been told what to install where it is missing; the module is there all the same.
distributed: Any = importlib.import_module("distributed") if importlib.util.find_spec("distributed") else None

# Between two looks at the scheduler: whether it is there, and what workers it has.
_LOOKING_SECONDS = 1.0


@dataclass(eq=False)
class _Worker:
    """A worker of the cluster, as long as it is there.

    ``room``: items that it can run at once, none before it has loaded the work; ``batches``: what it has to do, by name
    and as dask's future.
    """

    address: str
    nanny: str | None
    room: int = 0
    batches: dict[Batch, tuple[str, Any]] = field(default_factory=dict)


class DaskPool(FarPool):
    """Runs batches on the workers of a dask cluster."""

    engine = "dask"
    isolates = False

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
        self.needs = dict(resources or {})
        self._priority, self._restarts = priority, restart_workers
        self._workers: dict[str, _Worker] = {}
        self._pending: deque[tuple[Batch, str, bytes]] = deque()
        # The map's own, of a library that has no types; and what waits there for a first worker.
        self._client: Any = None
        self._knock: Any = None
        self._has_limits = False
        super().__init__(work, workers)

    def room(self) -> int:
        return sum(worker.room for worker in list(self._workers.values()))

    def send(self, batch: Batch, name: str, payload: bytes) -> None:
        if batch.time_limit is not None and not self._has_limits:
            self._has_limits = True
            self.ends.callback(lambda: wait([self._spawn(self._end_children())], timeout=ENDING_SECONDS))
        self._pending.append((batch, name, payload))
        self._loop.call_soon_threadsafe(self._hand_out)

    # In the thread of the map

    def begin(self) -> None:
        where = self._where()
        try:
            # One of the map's own: what others subscribe to, cancel or restart is theirs.
            self._client = distributed.Client(**where, set_as_default=False, timeout=CONNECTING_SECONDS, name="opero")
        except OSError as error:
            address = where.get("address", "127.0.0.1")
            raise OperoError(f"the scheduler of dask at {address} cannot be reached: {describe(error)}") from error
        self.ends.callback(self._leave)
        self._loop = self._client.loop.asyncio_loop
        self._client.subscribe_topic("all", self._heard)
        self.ends.callback(self._spawn(self._look_after()).cancel)

    def _leave(self) -> None:
        """Close the client; with it goes what has not begun, and a cluster of its own."""
        with contextlib.suppress(Exception):
            # Else the scheduler would tell it of its own end, and log that it cannot.
            self._client.unsubscribe_topic("all")
        self._client.close(timeout=ENDING_SECONDS)

    def _where(self) -> dict[str, Any]:
        """What a client needs for the scheduler of the client that was given, or is there, or for a new cluster."""
        if self._address is not None:
            return {"address": self._address}
        client = self._given
        if client is None:
            with contextlib.suppress(ValueError):
                worker = distributed.get_worker()
                # In a task, whose thread would be missing to those that it waits for.
                distributed.secede()
                self.ends.callback(distributed.rejoin)
                return {"address": worker.scheduler.address, "security": worker.security}
            with contextlib.suppress(ValueError):
                client = distributed.Client.current()
        if client is not None:
            if not isinstance(client, distributed.Client):
                raise TypeError(f"pool_options['client'] is {kind_of(client)}; write a distributed.Client")
            if client.scheduler is None or client.status != "running":
                raise OperoError(f"the client of dask that is to run {self._name} is not connected ({client.status})")
            return {"address": client.scheduler.address, "security": client.security}
        # dask's web servers would listen on all interfaces.
        here = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}
        return {"n_workers": self._most, "threads_per_worker": 1, **here}

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        """Run it in the client's loop, which has a thread of its own; an error ends the map.

        One of the way to the scheduler does not: what looks after that will say so.
        """

        def over(future: Future[None]) -> None:
            error = None if future.cancelled() else future.exception()
            if error is not None and not isinstance(error, OSError):
                self.deliver(Scheduler.fail, error)

        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        future.add_done_callback(over)
        return future

    # In the loop of the client, which alone knows what its workers do

    async def _end_children(self) -> None:
        if self._client.status == "running":
            await self._client.run(_end_children, self._digest, on_error="ignore")

    async def _look_after(self) -> None:
        """See which workers there are, and tell of a scheduler that is away: its futures would never end."""
        while True:
            if self._client.status == "running":
                self._spawn(self._count())
            else:
                away = OperoError(f"the scheduler of dask that runs {self._name} is away")
                self.deliver(Scheduler.fail, away)
            await asyncio.sleep(_LOOKING_SECONDS)

    async def _heard(self, event: Any) -> None:
        about = event[1] if isinstance(event[1], dict) else {}
        if about.get("action") == "remove-worker":
            await self._gone(about["worker"], is_expected=bool(about.get("expected")))
        elif about.get("action") == "add-worker":
            await self._count()

    async def _count(self) -> None:
        """Take in workers that are new, and see whether there is any."""
        there = (await self._client.scheduler.identity(n_workers=-1))["workers"]
        for address, about in there.items():
            rooms = [about["resources"].get(kind, 0) // need for kind, need in self.needs.items() if need]
            # What restarts a worker, restarts all that runs there.
            room = int(min([1 if self._restarts else about["nthreads"], *rooms]))
            if address not in self._workers and room and about["status"] == "running":
                worker = self._workers[address] = _Worker(address, about.get("nanny"))
                self._spawn(self._greet(worker, room))
        for address in self._workers.keys() - there.keys():
            # Its end may not have been told.
            await self._gone(address, is_expected=False)
        if self.room():
            self._knock = None
        elif self._knock is None and not self._workers:
            # A cluster that adapts starts a worker for that, and keeps it until there is more to do.
            self._knock = self._client.submit(bool, pure=False, resources=self.needs or None)
        self.deliver(self.see_room, bool(self._workers))

    async def _greet(self, worker: _Worker, room: int) -> None:
        """Let a worker load the work."""
        there = [worker.address]
        answers = await self._client.run(_load, self._digest, self._packed, workers=there, on_error="return")
        problem = answers.get(worker.address)
        if problem is None:
            worker.room = room
            self._hand_out()
            self.deliver(self.see_room, has_room=True)
        elif not isinstance(problem, OSError):
            self.deliver(self.refused, problem)
        elif self._workers.get(worker.address) is worker and not worker.batches:
            # It cannot be reached. It has left, or will be counted and greeted again.
            del self._workers[worker.address]

    def _hand_out(self) -> None:
        """Give each batch to the worker that has the least to do for its room."""
        ready = [worker for worker in self._workers.values() if worker.room]
        while self._pending and ready:
            batch, name, payload = self._pending.popleft()
            worker = min(ready, key=lambda worker: len(worker.batches) / worker.room)
            future = self._client.submit(
                _run,
                name,
                self._digest,
                payload,
                restarts=self._restarts,
                key=f"opero {self._name}-{name}",
                workers=[worker.address],
                allow_other_workers=False,
                retries=0,
                priority=self._priority,
                resources=self.needs or None,
            )
            worker.batches[batch] = name, future
            self._spawn(self._wait_for(future, batch, worker))

    async def _wait_for(self, future: Any, batch: Batch, worker: _Worker) -> None:
        """Tell what became of a batch."""
        answer: Any
        try:
            answer = await self._client.gather(future)
        except Exception as error:  # noqa: BLE001 - told apart below
            answer = error
        if self._workers.get(worker.address) is not worker or isinstance(answer, distributed.KilledWorker):
            # Its worker has left: what it had is searched for, or will be when that is told.
            return
        del worker.batches[batch]
        if isinstance(answer, Found):
            self.deliver(self.opened, batch, answer)
        elif answer is None or isinstance(answer, (CancelledError, OSError)):
            # Somebody has cancelled its task; or the worker has forgotten the work, or the scheduler is away.
            self.deliver(Scheduler.lost, [batch], "its task was withdrawn", [batch])
            self._spawn(self._greet(worker, worker.room))
        else:
            self.deliver(self.refused, answer)

    async def _gone(self, address: str, *, is_expected: bool) -> None:
        """A worker has left; its nanny, if it has one, can read what it has left of its batches."""
        worker = self._workers.pop(address, None)
        if worker is None or not worker.batches:
            return
        names, futures = zip(*worker.batches.values(), strict=True)
        found: list[Found | None] = [None] * len(names)
        with contextlib.suppress(Exception):
            # Else dask would run them if a worker came to the same address.
            await self._client.cancel(list(futures), force=True)
            asked = self._client.run(recover, list(names), workers=[worker.nanny], on_error="raise")
            found = (await asyncio.wait_for(asked, ENDING_SECONDS))[worker.nanny]
        reason = "its worker has left the cluster" if is_expected else "its dask worker ended"
        left = dict(zip(worker.batches, found, strict=True))
        self.deliver(self.recovered, left, reason, is_innocent=is_expected)


# In the workers


def _load(digest: bytes, packed: bytes) -> str | None:
    """Load the work; tells why that cannot be done."""
    try:
        load(digest, lambda: packed)
    except Exception as error:  # noqa: BLE001 - the map raises it
        return describe(error)
    return None


def _run(name: str, digest: bytes, payload: bytes, *, restarts: bool) -> Found | None:
    """One batch, in a task; None if this worker has loaded the work of many other maps meanwhile."""
    if digest not in works:
        return None
    return run_parcel(name, digest, bytes, payload, run_watched if restarts else partial(_run_in_child, digest))


# By maps: processes below this one that run nothing, which the next item gets.
_children: dict[bytes, PoolSource] = {}
_making = ForkSafeLock()


def _run_in_child(digest: bytes, work: Work, items: list[Any], limit: TimeLimit, how: How) -> Report:
    """Run an item that has a time limit in a process below this one, by a map of that item alone."""
    with _making.lock:
        if digest not in _children:
            _children[digest] = PoolSource("process", 1)
            _children[digest].__enter__()
        pools = _children[digest]
    how.mark[0] = 1
    seconds, option = limit
    of_item = {"name": name_of(work.function), "is_async": work.is_async, option: seconds}
    plan = Plan(work.caller(), RetryPolicy(), **of_item)
    shape, sink = Shape((), (), {}, is_starred=False), StreamSink(ordered=True)
    (outcome,) = run_blocking(plan, MapSettings(pools), shape, sink, items=iter(items), total=1)
    return Report([outcome["result"]], {} if outcome.error is None else {0: outcome.error}, outcome.seconds)


def _end_children(digest: bytes) -> None:
    """End the processes of a map that is over; one that runs an item when that has ended."""
    if digest in _children:
        _children.pop(digest).__exit__()
