"""The pool of a ray cluster: one task for each batch, and a journal that tells what a dead worker was at."""

from __future__ import annotations

import atexit
import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from opero.concurrency.batches import Batch, Fatal
from opero.concurrency.far import CONNECTING_SECONDS, ENDING_SECONDS, FarPool
from opero.concurrency.far_worker import Found, load_on_ray, recover, run_on_ray
from opero.core.forks import ForkSafeLock
from opero.exceptions import OperoError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opero.concurrency.worker import Work

# Between two looks at the cluster: whether it is there, and how large it is.
_LOOKING_SECONDS = 0.5
_WARMING_SECONDS = 0.2
# A node may have to start a process to read a journal.
_SEARCHING_SECONDS = 60.0


# The pools that use a ray which was started for maps; it ends with the last of them.
_users: set[RayPool] = set()
_entering = ForkSafeLock()


def _start(address: str | None, init: Mapping[str, Any]) -> None:
    import ray

    if address is not None:
        init = {"address": address, **init}
    host, _, port = str(init.get("address")).rpartition(":")
    try:
        if port.isdecimal():
            _check_reachable(host.removeprefix("ray://"), int(port))
        # Its dashboard would listen on a port that nobody has asked for.
        ray.init(**{"include_dashboard": False, "logging_level": "WARNING", **init})
    except (OSError, RuntimeError, ValueError) as error:
        where = f" at {init['address']}" if "address" in init else ""
        raise OperoError(f"ray{where} cannot be started or reached for a map: {describe(error)}") from error


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
        self._address, self._init = address, dict(init or {})
        # Those of `ray.remote`, which go with every task, and what each takes of a node.
        self._options = of_tasks
        cpus = 1 if of_tasks.get("num_cpus") is None else of_tasks["num_cpus"]
        needs = {"CPU": cpus, "GPU": of_tasks.get("num_gpus"), "memory": of_tasks.get("memory")}
        needs |= of_tasks.get("resources") or {}
        self._needs = {kind: need for kind, need in needs.items() if need} or {"CPU": 1}
        self._ray: Any = None
        # In a list, so that only workers which lack it fetch it.
        self._work: list[Any] = []
        self._in_flight: dict[Batch, Any] = {}
        # Nodes that are alive, and how many items of this map they can run at the same time.
        self._nodes: list[dict[str, Any]] = []
        self._capacity = 0
        # Where calls have times: workers that have been told to load the work, and that have.
        self._loading = self._warm = 0
        self._has_begun = self._is_away = False
        self._over = threading.Event()
        # Apart, because whoever looks at the nodes while the head dies hangs.
        looks = (self._check, self._see)
        self._looking = [threading.Thread(target=self._repeat, args=(look,), daemon=True) for look in looks]
        super().__init__(work, workers)

    @property
    def slots(self) -> int:
        if not self._has_begun:
            return 0 if self._is_paced else 1
        return min(self._size, self._warm) if self._is_paced else self._size

    @property
    def _size(self) -> int:
        return self._capacity if self._most is None else min(self._most, self._capacity)

    def prepare(self) -> None:
        """Let workers load the work, for calls that take no slot before one of them has."""
        if not self._has_begun:
            self._begin()
        while self._loading < max(1, self._size):
            self._loading += 1
            loading = self._load.remote(self._digest, self._work, _WARMING_SECONDS)
            loading.future().add_done_callback(lambda done: self.later(self._loaded, done))

    def submit(self, batch: Batch) -> None:
        if not self._has_begun:
            self._begin()
        payload = self.pack(batch)
        if payload is not None:
            name = uuid4().hex
            self._in_flight[batch] = self._run.remote(name, self._digest, self._work, payload)
            self._in_flight[batch].future().add_done_callback(lambda done: self.later(self._came, batch, name, done))

    def take_on(self, work: Work) -> None:
        super().take_on(work)
        if self._has_begun:
            self._work = [self._ray.put(self._packed)]

    def stop(self, is_left: Callable[[], bool] = lambda: False) -> None:  # noqa: ARG002 - it does not take long
        """Withdraw what waits, kill what runs, and end a ray that was started here."""
        if not self._has_begun:
            return
        self._has_begun = False
        atexit.unregister(self.stop)
        self._over.set()
        references = list(self._in_flight.values())
        try:
            if self._is_away:
                return
            for reference in references:
                # A finished one is left alone.
                with contextlib.suppress(Exception):
                    self._ray.cancel(reference, force=True)
            if references:
                self._ray.wait(references, num_returns=len(references), timeout=ENDING_SECONDS, fetch_local=False)
            for thread in self._looking:
                thread.join()
        finally:
            self._in_flight.clear()
            self._work = []
            with _entering.lock:
                is_last = _users == {self}
                _users.discard(self)
                if is_last:
                    self._ray.shutdown()

    # The cluster

    def _begin(self) -> None:
        import ray

        self._ray = ray
        with _entering.lock:
            if _users or not ray.is_initialized():
                if not ray.is_initialized():
                    _start(self._address, self._init)
                _users.add(self)
            elif self._address is not None or self._init:
                named = "'address'" if self._address is not None else "'init'"
                msg = f"pool_options[{named}] cannot apply: ray is initialised already, and is used; leave it out"
                raise OperoError(msg)
        self._has_begun = True
        # A forgotten stream is ended while ray can still do that.
        atexit.register(self.stop)
        # A worker that has died is a failed attempt of opero's, not one of ray's; one with a GPU serves many batches.
        options = {"max_retries": 0, "name": f"opero: {self._name}", **self._options}
        self._run = ray.remote(max_calls=0)(run_on_ray).options(**options)
        self._load = ray.remote(max_calls=0)(load_on_ray).options(**options)
        self._context = ray.get_runtime_context()
        self._work = [ray.put(self._packed)]
        self._see()
        for thread in self._looking:
            thread.start()

    def _loaded(self, future: Any) -> list[Any]:
        """A worker has loaded the work; if it was killed, the next one will do."""
        self._warm += 1
        error = future.exception()
        return self.refused(error.cause) if isinstance(error, self._ray.exceptions.RayTaskError) else []

    def _repeat(self, look: Callable[[], None]) -> None:
        """In a thread: ray itself says late or never that it is away, and then ends this process."""
        while not self._over.wait(_LOOKING_SECONDS):
            try:
                look()
            except Exception as error:  # noqa: BLE001 - whatever it is, the map shall know
                self._is_away = True
                self.deliver(Fatal(OperoError(f"ray is away: {describe(error)}")))

    def _check(self) -> None:
        host, _, port = self._context.gcs_address.rpartition(":")
        _check_reachable(host, int(port))
        for node in self._nodes:
            if node["NodeID"] == self._context.get_node_id():
                _check_reachable(node["NodeManagerAddress"], node["NodeManagerPort"])

    def _see(self) -> None:
        """Look at the nodes, and how much room there is."""
        self._nodes = [node for node in self._ray.nodes() if node["Alive"]]
        rooms = ([node["Resources"].get(kind, 0) // need for kind, need in self._needs.items()] for node in self._nodes)
        self._capacity = int(sum(map(min, rooms)))
        self.later(self.see_room, self._capacity, self._needs)

    # Batches

    def _came(self, batch: Batch, name: str, future: Any) -> list[Any]:
        """The task of a batch has ended."""
        if self._in_flight.pop(batch, None) is None:
            return []
        try:
            return self.opened(batch, future.result())
        except self._ray.exceptions.RayTaskError as error:
            return self.refused(error.cause)
        except self._ray.exceptions.RuntimeEnvSetupError as error:
            return self.refused(error)
        except self._ray.exceptions.RayError as error:
            # Its worker has ended, or its whole machine.
            threading.Thread(target=self._search, args=(batch, name, describe(error)), daemon=True).start()
        except Exception as error:  # noqa: BLE001 - nothing of the function's, which is in the reports
            return self.refused(error)
        return []

    def _search(self, batch: Batch, name: str, reason: str) -> None:
        """In a thread, ask all nodes for the journal: ray does not tell on which of them a task was."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        found: Found | None = None
        with contextlib.suppress(Exception):
            reader = self._ray.remote(num_cpus=0, runtime_env=self._options.get("runtime_env"))(recover)
            there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in self._nodes]
            asked = [reader.options(scheduling_strategy=strategy).remote([name]) for strategy in there]
            for reference in asked:
                # A node may be gone, too.
                with contextlib.suppress(Exception):
                    found = self._ray.get(reference, timeout=_SEARCHING_SECONDS)[0] or found
        self.later(self.recovered, {batch: found}, reason)
