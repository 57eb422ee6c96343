"""The pool of a ray cluster: one task for each batch, and a journal that tells what a dead worker was at."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import threading
import time
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
)
from opero.concurrency.scheduler import Scheduler
from opero.core.checks import listed
from opero.core.forks import ForkSafeLock
from opero.exceptions import OperoError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opero.concurrency.pool import Batch
    from opero.concurrency.worker import Work

# Who makes a pool of this kind has been told what to install where it is missing; the module is there all the same.
ray: Any = importlib.import_module("ray") if importlib.util.find_spec("ray") else None

# Between two looks at the cluster: whether it is there, and how large it is.
_LOOKING_SECONDS = 0.5
_WARMING_SECONDS = 0.2
# A node may have to start a process to read a journal.
_SEARCHING_SECONDS = 60.0

# The pools that use a ray which was started for maps; it ends with the last of them.
_users: set[RayPool] = set()
_entering = ForkSafeLock()


def _check_reachable(host: str, port: int) -> None:
    """Raise at once if nothing answers there: ray itself tries for minutes."""
    socket.create_connection((host.strip("[]"), port), CONNECTING_SECONDS).close()


class RayPool(FarPool):
    """Runs batches as tasks of ray; engine retries are off, and a worker that is stuck ends itself."""

    engine = "ray"

    def __init__(
        self,
        work: Work,
        workers: int | None,
        *,
        address: str | None = None,
        init: Mapping[str, Any] | None = None,
        **of_tasks: Any,
    ) -> None:
        self._init = {**({} if address is None else {"address": address}), **(init or {})}
        # Those of `ray.remote`, which go with every task, and what each takes of a node.
        self._options = of_tasks
        needs = {"CPU": of_tasks.get("num_cpus", 1), "GPU": of_tasks.get("num_gpus"), "memory": of_tasks.get("memory")}
        needs |= of_tasks.get("resources") or {}
        self.needs = {kind: need for kind, need in needs.items() if need} or {"CPU": 1}
        self._in_flight: dict[Batch, Any] = {}
        # Nodes that are alive, and how many items of this map they can run at the same time.
        self._nodes: list[dict[str, Any]] = []
        self._capacity = 0
        # Where calls shall start at a rate: workers that have loaded the work.
        self._warm = 0
        self._over = threading.Event()
        super().__init__(work, workers)

    def room(self) -> int:
        return min(self._capacity, self._warm) if self._is_paced else self._capacity

    def send(self, batch: Batch, name: str, payload: bytes) -> None:
        reference = self._in_flight[batch] = self._run.remote(name, self._digest, self._there, payload)
        reference.future().add_done_callback(lambda done: self.deliver(self._came, batch, name, done))

    # The cluster

    def begin(self) -> None:
        with _entering.lock:
            if _users or not ray.is_initialized():
                if not _users:
                    self._start()
                _users.add(self)
            elif self._init:
                given = f"pool_options with {listed(self._init)}"
                raise OperoError(f"{given} cannot apply: ray is initialised already, and is used; leave it out")
        self.ends.callback(self._leave)
        # A worker that has died is a failed attempt of opero's, not one of ray's; one with a GPU serves many batches.
        options = {"max_retries": 0, "name": f"opero: {self._name}", **self._options}
        self._run = ray.remote(max_calls=0)(_run).options(**options)
        self._runtime = ray.get_runtime_context()
        # In a list, so that only workers which lack it fetch it.
        self._there = [ray.put(self._packed)]
        self._see()
        # Apart, because whoever looks at the nodes while the head dies hangs.
        looks = (self._check, self._see)
        threads = [threading.Thread(target=self._repeat, args=(look,), daemon=True) for look in looks]
        for thread in threads:
            thread.start()
        self.ends.callback(self._withdraw, threads)
        if self._is_paced:
            warming = ray.remote(max_calls=0)(_load).options(**options)
            for _ in range(max(1, min(self._capacity, self._most or self._capacity))):
                warming.remote(self._digest, self._there).future().add_done_callback(
                    lambda _: self.deliver(self._loaded)
                )

    def _start(self) -> None:
        address = str(self._init.get("address", ""))
        host, _, port = address.rpartition(":")
        try:
            if port.isdecimal():
                _check_reachable(host, int(port))
            # Its dashboard would listen on a port that nobody has asked for.
            ray.init(**{"include_dashboard": False, "logging_level": "WARNING", **self._init})
        except (OSError, RuntimeError, ValueError) as error:
            where = f" at {address}" if address else ""
            raise OperoError(f"ray{where} cannot be started or reached for a map: {describe(error)}") from error

    def _leave(self) -> None:
        with _entering.lock:
            is_last = _users == {self}
            _users.discard(self)
            if is_last:
                ray.shutdown()

    def _withdraw(self, threads: list[threading.Thread]) -> None:
        """Withdraw what waits, and kill what runs."""
        if self._over.is_set():
            return
        self._over.set()
        references = list(self._in_flight.values())
        self._in_flight.clear()
        for reference in references:
            # A finished one is left alone.
            with contextlib.suppress(Exception):
                ray.cancel(reference, force=True)
        if references:
            ray.wait(references, num_returns=len(references), timeout=ENDING_SECONDS, fetch_local=False)
        for thread in threads:
            thread.join()

    def _loaded(self, _run: Scheduler) -> None:
        """A worker has loaded the work; if it could not, the first batch will tell."""
        self._warm += 1

    def _repeat(self, look: Callable[[], None]) -> None:
        """In a thread: ray itself says late or never that it is away, and then ends this process."""
        while not self._over.wait(_LOOKING_SECONDS):
            try:
                look()
            except Exception as error:  # noqa: BLE001 - whatever it is, the map shall know
                self._over.set()
                self.deliver(Scheduler.fail, OperoError(f"ray is away: {describe(error)}"))

    def _check(self) -> None:
        host, _, port = self._runtime.gcs_address.rpartition(":")
        _check_reachable(host, int(port))
        for node in self._nodes:
            if node["NodeID"] == self._runtime.get_node_id():
                _check_reachable(node["NodeManagerAddress"], node["NodeManagerPort"])

    def _see(self) -> None:
        """Look at the nodes, and how much room there is."""
        self._nodes = [node for node in ray.nodes() if node["Alive"]]
        rooms = ([node["Resources"].get(kind, 0) // need for kind, need in self.needs.items()] for node in self._nodes)
        self._capacity = int(sum(map(min, rooms)))
        self.deliver(self.see_room, self._capacity)

    # Batches

    def _came(self, run: Scheduler, batch: Batch, name: str, future: Any) -> None:
        """The task of a batch has ended."""
        if self._in_flight.pop(batch, None) is None:
            return
        error, errors = future.exception(), ray.exceptions
        if error is None:
            self.opened(run, batch, future.result())
        elif isinstance(error, errors.RayError) and not isinstance(
            error, (errors.RayTaskError, errors.RuntimeEnvSetupError)
        ):
            # Its worker has ended, or its whole machine.
            threading.Thread(target=self._search, args=(batch, name, describe(error)), daemon=True).start()
        else:
            self.refused(run, getattr(error, "cause", error))

    def _search(self, batch: Batch, name: str, reason: str) -> None:
        """In a thread, ask all nodes for the journal: ray does not tell on which of them a task was."""
        found: Found | None = None
        with contextlib.suppress(Exception):
            reader = ray.remote(num_cpus=0, runtime_env=self._options.get("runtime_env"))(recover)
            on_node = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
            there = [on_node(node["NodeID"], soft=False) for node in self._nodes]
            asked = [reader.options(scheduling_strategy=strategy).remote([name]) for strategy in there]
            for reference in asked:
                # A node may be gone, too.
                with contextlib.suppress(Exception):
                    found = ray.get(reference, timeout=_SEARCHING_SECONDS)[0] or found
        self.deliver(self.recovered, {batch: found}, reason)


# In the workers


def _run(name: str, digest: bytes, work: list[Any], payload: bytes) -> Found:
    """One batch, in a task."""
    return run_parcel(name, digest, lambda: ray.get(work[0]), payload, run_watched)


def _load(digest: bytes, work: list[Any]) -> None:
    """Load the work before there is something to do, and take so long that no other is loaded by the same worker."""
    load(digest, lambda: ray.get(work[0]))
    time.sleep(_WARMING_SECONDS)
