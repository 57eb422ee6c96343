"""The pool of a ray cluster: one task for each batch, and a journal that tells what a dead worker was at."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from opero.concurrency.batches import Batch, Fatal
from opero.concurrency.far import (
    BROKEN,
    Answer,
    FarPool,
    Found,
    check_reachable,
    load,
    recover,
    run_parcel,
    tell_of_dashboard,
    wait_for_the_end,
)
from opero.core.forks import ForkSafeLock
from opero.core.showing import shown
from opero.exceptions import OperoError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opero.concurrency.inbox import Inbox
    from opero.concurrency.worker import Work

# Between two looks at the cluster: whether it is there, and how large it is.
_LOOKING_SECONDS = 0.5
_WARMING_SECONDS = 0.2
# A node may have to start a process to read a journal.
_SEARCHING_SECONDS = 60.0
# Those of `ray.remote`, which go with every task.
_OF_TASKS = ("num_cpus", "num_gpus", "memory", "resources", "runtime_env", "scheduling_strategy")


class _Session:
    """The ray of this process: the program's, or one that was started for maps and ends with the last of them."""

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._users = 0
        self._is_own = False
        self._may_end = threading.Event()

    def enter(self, address: str | None, init: Mapping[str, Any]) -> None:
        import ray

        with self._lock.lock:
            if ray.is_initialized() and not self._is_own:
                if address is not None or init:
                    named = "'address'" if address is not None else "'init'"
                    msg = f"pool_options[{named}] cannot apply: ray is initialised already, and is used; leave it out"
                    raise OperoError(msg)
            elif not ray.is_initialized():
                self._start(address, init)
                self._is_own = True
            self._users += 1

    def dashboard(self) -> str | None:
        """Where it is, if there is one."""
        import ray

        url = ray._private.worker.get_dashboard_url()  # noqa: SLF001 - the public way is the result of `ray.init`
        return f"http://{url}" if url else None

    def leave(self) -> None:
        import ray

        with self._lock.lock:
            self._users -= 1
            if not self._users and self._is_own:
                self._is_own = False
                ray.shutdown()
                self._may_end.set()

    def _start(self, address: str | None, init: Mapping[str, Any]) -> None:
        """Start it where it lasts: Linux ends ray's processes with the thread that has started them."""
        if threading.current_thread() is threading.main_thread():
            _start(address, init)
            return
        started: Future[None] = Future()
        self._may_end = may_end = threading.Event()

        def keep() -> None:
            try:
                _start(address, init)
            except BaseException as error:  # noqa: BLE001 - raised where it was asked for
                started.set_exception(error)
            else:
                started.set_result(None)
                may_end.wait()

        threading.Thread(target=keep, name="opero-ray-start", daemon=True).start()
        started.result()


_session = _Session()


def _start(address: str | None, init: Mapping[str, Any]) -> None:
    import ray

    given = address if address is not None else init.get("address")
    host, _, port = str(given).rpartition(":")
    if port.isdecimal():
        check_reachable("ray", host.removeprefix("ray://"), int(port))
    # Its dashboard would listen on a port that nobody has asked for.
    defaults = {"include_dashboard": False, "logging_level": "WARNING"}
    try:
        ray.init(**{**defaults, **({} if address is None else {"address": address}), **init})
    except (ConnectionError, RuntimeError, ValueError) as error:
        msg = f"ray cannot be started or reached for a map: {describe(error)}"
        raise OperoError(msg) from error


class RayPool(FarPool):
    """Runs batches as tasks of ray; engine retries are off, and a worker that is stuck ends itself."""

    def __init__(
        self,
        work: Work,
        workers: int | None,
        *,
        address: str | None = None,
        init: Mapping[str, Any] | None = None,
        **of_tasks: Any,
    ) -> None:
        self._workers = workers
        self._address, self._init = address, dict(init or {})
        self._options = of_tasks
        # In a list, so that only workers which lack it fetch it.
        self._work: list[Any] = []
        self._in_flight: dict[Batch, Any] = {}
        # Nodes that are alive, and how many items of this map they can run at the same time.
        self._nodes: list[dict[str, Any]] = []
        self._capacity = 0
        # Workers that have loaded the work; None where calls have no times, and nobody waits for that.
        self._warm: int | None = None
        self._has_begun = self._is_away = False
        super().__init__(work, "ray")
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._look, name="opero-ray", daemon=True)

    @property
    def slots(self) -> int:
        if not self._has_begun:
            return 1 if self._warm is None else 0
        slots = self._capacity if self._workers is None else min(self._workers, self._capacity)
        return slots if self._warm is None else min(slots, self._warm)

    def start(
        self, inbox: Inbox, *, is_paced: bool = False, patience: float | None = None, **_about_the_map: Any
    ) -> None:
        self.deliver = inbox.put
        self._patience = patience
        if self._is_away:
            inbox.put(Fatal(OperoError("ray is away")))
        if not is_paced:
            self._warm = None
        elif self._warm is None:
            self._warm = 0
            if self._has_begun:
                self._warm_up()

    def prepare(self) -> None:
        """Let workers load the work, for calls that take no slot before one of them has."""
        if not self._has_begun:
            self._begin()

    def submit(self, batch: Batch) -> None:
        if not self._has_begun:
            self._begin()
        payload = self.pack(batch)
        if payload is None:
            return
        name = uuid4().hex
        reference = self._task.remote(name, self._digest, self._work, payload)
        self._in_flight[batch] = reference
        reference.future().add_done_callback(lambda done: self.later(self._came, batch, name, len(payload), done))

    def take_on(self, work: Work) -> None:
        super().take_on(work)
        self._warm = None
        if self._has_begun:
            self._share()

    def stop(self, is_left: Callable[[], bool]) -> None:
        """Withdraw what waits, kill what runs, and end a ray that was started here."""
        if not self._has_begun:
            return
        self._has_begun = False
        self.not_at_exit()
        self._over.set()
        try:
            if not self._is_away:
                self._cancel_all(is_left)
        finally:
            self._in_flight.clear()
            self._work = []
            if self._looking.is_alive():
                self._looking.join()
            _session.leave()

    def _cancel_all(self, is_left: Callable[[], bool]) -> None:
        import ray

        ended = [reference.future() for reference in self._in_flight.values()]
        for reference in self._in_flight.values():
            # A finished one is left alone.
            with contextlib.suppress(Exception):
                ray.cancel(reference, force=True)
        wait_for_the_end(lambda: all(future.done() for future in ended), is_left)

    # The cluster

    def _begin(self) -> None:
        import ray

        _session.enter(self._address, self._init)
        self._has_begun = True
        self.end_at_exit()
        context = ray.get_runtime_context()
        tell_of_dashboard("ray", _session.dashboard())
        self._own_node = context.get_node_id()
        host, _, port = context.gcs_address.rpartition(":")
        self._head = (host, int(port))
        # A worker that has died is a failed attempt of opero's, not one of ray's; one with a GPU serves many batches.
        options = {"max_retries": 0, "name": f"opero: {self._name}", **self._options}
        self._task = ray.remote(max_calls=0)(run_on_ray).options(**options)
        self._load = ray.remote(max_calls=0)(load_on_ray).options(**options)
        self._share()
        self._see()
        self._looking.start()
        if self._warm is not None:
            self._warm_up()

    def _warm_up(self) -> None:
        for _ in range(max(1, min(self._workers or self._capacity, self._capacity))):
            reference = self._load.remote(self._digest, self._work)
            reference.future().add_done_callback(self._warmed_up)

    def _share(self) -> None:
        import ray

        self._work = [ray.put(self._packed)]

    def _see(self) -> bool:
        """Look at the nodes; tells whether there is room for more or less than before."""
        import ray

        before = self._capacity
        self._nodes = [node for node in ray.nodes() if node["Alive"]]
        needs = {
            "CPU": 1 if self._options.get("num_cpus") is None else self._options["num_cpus"],
            "GPU": self._options.get("num_gpus"),
            "memory": self._options.get("memory"),
            **(self._options.get("resources") or {}),
        }
        self._capacity = sum(_room(node["Resources"], needs) for node in self._nodes)
        return self._capacity != before

    def _look(self) -> None:
        """In a thread: ray itself says late or never that it is away, and then ends this process."""
        while not self._over.wait(_LOOKING_SECONDS):
            try:
                for host, port in [self._head, *self._own_raylet()]:
                    check_reachable("ray", host, port)
                if self._see():
                    self.deliver(None)
            except Exception as error:  # noqa: BLE001 - whatever it is, the map shall know
                self._is_away = True
                away = error if isinstance(error, OperoError) else OperoError(f"ray is away: {describe(error)}")
                self.deliver(Fatal(away))
                return
            end = self.see_room(self._capacity, f", which needs {_named(self._options)}")
            if end is not None:
                self.deliver(end)
                return

    def _own_raylet(self) -> list[tuple[str, int]]:
        return [
            (node["NodeManagerAddress"], node["NodeManagerPort"])
            for node in self._nodes
            if node["NodeID"] == self._own_node
        ]

    def _warmed_up(self, future: Any) -> None:
        error = future.exception()
        answer = None if error is not None else future.result()
        if answer is not None:
            self.later(self.opened, Batch([], 0), (BROKEN, answer), 0)
        else:
            # If it was killed, the next one will do.
            self._warm = (self._warm or 0) + 1
            self.deliver(None)

    # Batches

    def _came(self, batch: Batch, name: str, size: int, future: Any) -> list[Any]:
        """The task of a batch has ended."""
        from ray import exceptions

        if self._in_flight.pop(batch, None) is None:
            return []
        gone = (
            exceptions.WorkerCrashedError,
            exceptions.OutOfMemoryError,
            exceptions.NodeDiedError,
            exceptions.LocalRayletDiedError,
            exceptions.ObjectLostError,
            exceptions.TaskCancelledError,
            exceptions.TaskUnschedulableError,
        )
        try:
            answer = future.result()
        except gone as error:
            threading.Thread(target=self._search, args=(batch, name, describe(error)), daemon=True).start()
            return []
        except Exception as error:  # noqa: BLE001 - not the function's, which are in the reports
            return [self.refused(error)]
        return self.opened(batch, answer, size)

    def _search(self, batch: Batch, name: str, reason: str) -> None:
        """In a thread, ask all nodes for the journal: ray does not tell on which of them a task was."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        found: Found | None = None
        with contextlib.suppress(Exception):
            reader = ray.remote(recover)
            environment = {k: v for k, v in self._options.items() if k == "runtime_env"}
            asked = []
            for node in list(self._nodes):
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                asked.append(reader.options(num_cpus=0, scheduling_strategy=there, **environment).remote(name))
            for reference in asked:
                # A node may be gone, too.
                with contextlib.suppress(Exception):
                    found = ray.get(reference, timeout=_SEARCHING_SECONDS) or found
        self.later(self.recovered, batch, found, reason)


def _room(has: Mapping[str, float], needs: Mapping[str, float | None]) -> int:
    """How many tasks a node can run at the same time."""
    rooms = [int(has.get(kind, 0) // need) for kind, need in needs.items() if need]
    return min(rooms) if rooms else int(has.get("CPU", 0))


def _named(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={shown(options[name])}" for name in _OF_TASKS[:4] if options.get(name)) or "one CPU"


# In the workers


def run_on_ray(name: str, digest: bytes, work: list[Any], payload: bytes) -> Answer:
    """One batch, in a task."""
    import ray

    return run_parcel(name, digest, lambda: ray.get(work[0]), payload)


def load_on_ray(digest: bytes, work: list[Any]) -> str | None:
    """Load the work before there is something to do; tells why that cannot be done."""
    import ray

    problem = load(digest, lambda: ray.get(work[0]))
    # Others shall not be loaded by the same worker.
    time.sleep(_WARMING_SECONDS)
    return problem
