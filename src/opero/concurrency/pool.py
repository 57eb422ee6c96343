"""Pools: which one runs a map, the block in which they are kept, what all of them can; and maps without any policy."""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import importlib.util
import math
import os
import threading
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from opero.concurrency.mapping import make_map
from opero.concurrency.progress import ProgressOption, check_progress
from opero.core.checks import (
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_known,
    check_mapping,
    check_number,
    check_text,
    kind_of,
    listed,
    shown,
    wrong_type,
)
from opero.core.clock import clock
from opero.core.forks import watch_forks
from opero.core.interrupts import Hold
from opero.core.plan import Plan
from opero.core.retry import RetryPolicy
from opero.core.signature import check_decoratable, is_async, name_of, refuse_generator
from opero.exceptions import NotTransferableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Executor

    from opero.concurrency.running import Inbox
    from opero.concurrency.scheduler import Entry
    from opero.concurrency.worker import Work


__all__ = ["get_parallel_executor", "get_parallel_map_decorator"]

ModeName: TypeAlias = Literal["process", "thread", "async", "async_process", "serial", "dask", "ray"]
Mode: TypeAlias = "ModeName | Executor | Callable[[], Executor]"


_HOOKS = ("initializer", "initargs", "finalizer")
_OF_PROCESSES = ("start_method", *_HOOKS, "max_tasks_per_worker", "threads_per_worker")
# The file and the class of each mode's pool, and its options. A file that needs an extra is imported when a map runs.
POOLS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "process": ("processes", "ProcessPool", _OF_PROCESSES),
    "thread": ("threads", "ThreadPool", _HOOKS),
    "async": ("threads", "TaskPool", ()),
    "async_process": ("processes", "ProcessPool", (*_OF_PROCESSES, "concurrency")),
    "serial": ("threads", "serial_pool", ()),
    "dask": ("dask", "DaskPool", ("client", "address", "resources", "priority", "restart_workers")),
    "ray": (
        "ray",
        "RayPool",
        ("address", "init", "num_cpus", "num_gpus", "memory", "resources", "runtime_env", "scheduling_strategy"),
    ),
    "executor": ("executors", "ExecutorPool", ("mode",)),
}
_MODES = tuple(mode for mode in POOLS if mode != "executor")
_ASYNC_ONLY = ("async", "async_process")
# Whoever makes their workers says how many there are.
_WORKERS_ELSEWHERE = ("dask", "ray", "executor")
# Coroutines in each process.
_CONCURRENCY = 16
# The library that a mode needs; an extra of the mode's name brings it.
_NEEDED: Mapping[str, str] = {"dask": "distributed", "ray": "ray"}


def _check_start_method(name: str, method: Any) -> None:
    import multiprocessing

    check_choice(name, method, multiprocessing.get_all_start_methods())


def _check_initargs(name: str, initargs: Any) -> None:
    if not isinstance(initargs, tuple):
        raise wrong_type(name, initargs, "a tuple")


_needs = partial(check_number, what="what each call needs", smallest=0)
_count = partial(check_count, smallest=1)
# Those that are not here are the cluster's business.
_CHECKS: Mapping[str, Callable[[str, Any], object]] = {
    "start_method": _check_start_method,
    "initializer": partial(check_callable, what="a function that prepares each worker"),
    "finalizer": partial(check_callable, what="a function that takes no arguments, for its end"),
    "initargs": _check_initargs,
    "concurrency": partial(_count, what="coroutines in each process"),
    "max_tasks_per_worker": partial(_count, what="items that a worker runs before it is replaced"),
    "threads_per_worker": partial(_count, what="threads of numeric libraries in each worker"),
    "resources": check_mapping,
    "init": check_mapping,
    "runtime_env": check_mapping,
    "num_cpus": _needs,
    "num_gpus": _needs,
    "memory": _needs,
    "priority": partial(check_number, what="the priority", smallest=-math.inf),
    "address": partial(check_text, what="an address such as 'host:port'"),
    "restart_workers": check_flag,
}


MAP_DEFAULTS: dict[str, Any] = {
    "mode": "process",
    "workers": None,
    "ordered": True,
    "progress": True,
    "return_exceptions": True,
    "total": None,
    "batch_size": None,
    "pool_options": None,
}
_OF_MAPS_WITHOUT_POLICIES = ("workers", "ordered", "progress", "return_exceptions", "total")


@dataclass(frozen=True)
class MapSettings:
    """How a map runs; the options of `opero.opmap` that are no policies.

    ``warns``: whether items that failed are worth a warning, because nobody said what shall become of them.
    """

    pools: PoolSource
    warns: bool = False
    ordered: bool = True
    progress: ProgressOption = False
    return_exceptions: bool = True
    total: int | None = None
    batch_size: int | None = None


def map_settings(function: Callable[..., Any], options: Mapping[str, Any]) -> MapSettings:
    """Check those options of a map of ``function`` that are no policies."""
    given = {**MAP_DEFAULTS, **options}
    mode, workers, pool_options = (given.pop(name) for name in ("mode", "workers", "pool_options"))
    check_mode(mode)
    refuse_generator(function, "a map")
    if mode in _ASYNC_ONLY and not is_async(function):
        raise TypeError(
            f"mode={mode!r} runs coroutines, but {name_of(function)} is a `def` function; "
            "write mode='thread' or mode='process'"
        )
    if workers is not None:
        workers = check_count("workers", workers, "workers", smallest=1)
        if mode == "serial":
            msg = f"workers={workers} cannot apply with mode='serial', in which the calling thread works; leave it out"
            raise ValueError(msg)
    check_flag("ordered", given["ordered"])
    check_progress(given["progress"])
    check_flag("return_exceptions", given["return_exceptions"])
    for name, what, smallest in (("total", "items", 0), ("batch_size", "items in one list", 1)):
        if given[name] is not None:
            given[name] = check_count(name, given[name], what, smallest=smallest)
    pool_options = check_mapping("pool_options", pool_options)
    _check_pool_options(mode, pool_options)
    pools = PoolSource(mode, workers, pool_options)
    return MapSettings(pools, warns="return_exceptions" not in options, **given)


def check_mode(mode: Any) -> None:
    """Refuse what is no mode, with what to write instead."""
    if isinstance(mode, str):
        check_choice("mode", mode, _MODES)
        return
    from concurrent.futures import Executor

    if isinstance(mode, Executor):
        return
    ways = f"write one of {listed(_MODES)}, an executor, or a function that makes one"
    if hasattr(mode, "get_executor"):
        ways = "write mode='dask', pool_options={'client': client}"
    if not callable(mode) or (isinstance(mode, type) and not issubclass(mode, Executor)):
        raise TypeError(f"mode={shown(mode)} is {kind_of(mode)}, which is no concurrent.futures.Executor; {ways}")
    check_callable("mode", mode, "a function that makes an executor")


def _check_pool_options(mode: Mode, options: dict[str, Any]) -> None:
    known = POOLS[mode][2] if isinstance(mode, str) else ()
    named = f"mode={mode!r}" if isinstance(mode, str) else "an executor as mode"
    if options and not known:
        msg = f"pool_options with {listed(options)} cannot apply with {named}, which takes none; leave it out"
        raise TypeError(msg)
    check_known(f"pool_options with {named}", options, known)
    if "initargs" in options and "initializer" not in options:
        raise ValueError("pool_options['initargs'] has no effect without an initializer; add one")
    for option, value in options.items():
        if option in _CHECKS:
            _CHECKS[option](f"pool_options[{option!r}]", value)
    if {"client", "address"} <= options.keys():
        raise ValueError("pool_options has 'client' and 'address', which say the same; leave one of them out")
    library = _NEEDED.get(mode) if isinstance(mode, str) else None
    if library is not None and importlib.util.find_spec(library) is None:
        raise ImportError(f"mode={mode!r} needs {library}; install it with: pip install 'opero[{mode}]'")


def default_workers(mode: str) -> int:
    """How many workers a mode has when nobody says."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"thread": min(32, cpus + 4), "async": 100, "serial": 1}.get(mode, cpus)


class PoolSource:
    """Where the maps of one function get their pools, and a block in which these are kept, ``with fn.pool():``.

    The workers are started by the first map and have ended when the block is left. A map has the pool that it uses to
    itself: maps that run at the same time do not share workers, but leave theirs to later ones. A map that raises
    or is closed early leaves none.

    Args:
        mode: One of ``_MODES``, an executor, or a function that makes one.
        workers: By default as many as `default_workers` says.
        options: For the pool.
    """

    def __init__(self, mode: Any, workers: int | None = None, options: Mapping[str, Any] | None = None) -> None:
        if type(mode).__module__ == "distributed.cfexecutor" and not mode._kwargs:  # noqa: SLF001 - nothing else tells
            # As dask's executor, opero sends tasks by its client, and hears more of what becomes of them.
            mode, options = "dask", {"client": mode._client}  # noqa: SLF001 - as above
        kind = mode if isinstance(mode, str) else "executor"
        self._file, self._class, _ = POOLS[kind]
        self._options = {"mode": mode} if kind == "executor" else dict(options or {})
        if kind == "async_process":
            self._options.setdefault("concurrency", _CONCURRENCY)
        self._workers = default_workers(kind) if workers is None and kind not in _WORKERS_ELSEWHERE else workers
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """The workers that are kept are children of the parent."""
        # The garbage collector may close a stream at any moment, also while its thread is in here.
        self._lock = threading.RLock()
        self._blocks = 0
        self._idle: list[Pool] = []

    def pool_for(self, work: Work) -> Pool:
        """A pool that is idle, and ready for this map, or a new one."""
        with self._lock:
            pool = self._idle.pop() if self._idle else None
        if pool is not None:
            try:
                pool.take_on(work)
            except NotTransferableError:
                # Forked workers can have what cannot be sent to workers that are there already.
                pool.stop()
            else:
                return pool
        module = importlib.import_module(f"opero.concurrency.{self._file}")
        made: Pool = getattr(module, self._class)(work, self._workers, **self._options)
        return made

    def keep(self, pool: Pool) -> bool:
        """Keep a pool in which nothing runs, if a block is open; tells whether it is kept."""
        with self._lock:
            if self._blocks and pool.can_rest:
                pool.rest()
                self._idle.append(pool)
                return True
            return False

    def __enter__(self) -> None:
        with self._lock:
            self._blocks += 1

    def __exit__(self, *_exc: object) -> None:
        """Stop what is idle, unless there is another block; what is in use is stopped by the map that uses it."""
        with Hold():
            with self._lock:
                # A forked child leaves the blocks of its parent, too.
                self._blocks = max(0, self._blocks - 1)
                idle: list[Pool] = []
                if not self._blocks:
                    idle, self._idle = self._idle, idle
            for pool in idle:
                pool.stop()

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, *_exc: object) -> None:
        from opero.concurrency.system import in_own_thread

        await in_own_thread(lambda _is_left: self.__exit__())


@dataclass(slots=True, eq=False)
class Batch:
    """What is sent to a worker in one go.

    ``items`` are the varying first arguments, if it ``has_candidates`` each in a pair with its candidate;
    ``time_limit`` is the seconds one execution has, and the option that says so; ``grace`` is how many more its worker
    has until it is ended.
    ``alone``: nothing else may run in the worker's process meanwhile.
    ``look_at``, ``ends_at``: by `clock.real`, when its worker is looked at again, how many had ``begun`` then, and
    when the worker is ended; ``is_overdue``: that has been done.
    ``size``: its bytes, where it goes to a process.
    ``mark``: where its worker notes how many have begun, see `worker.run_batch`, or that it is between two; it counts
    the ``reported`` ones, too.
    """

    items: list[Any]
    start: int
    entries: list[Entry] | None = None
    has_candidates: bool = False
    time_limit: tuple[float, str] | None = None
    grace: float = 0.0
    alone: bool = False
    size: int = 0
    mark: list[int] | memoryview = field(default_factory=[0].copy)
    reported: int = 0
    sent_at: float = 0.0
    look_at: float = math.inf
    begun: int = 0
    ends_at: float = math.inf
    is_overdue: bool = False

    def begins(self, seconds: float, option: str) -> None:
        """A worker gets it now, which may have taken long to start: that is no part of an attempt's time."""
        if option == "attempt_timeout":
            self.ends_at, self.is_overdue = clock.real() + seconds + self.grace, False

    def begun_now(self) -> int:
        """How many have begun; 0 if its worker is between two of them."""
        begun = self.mark[0]
        return begun if begun <= self.reported + len(self.items) else 0

    def cut(self, place: int) -> tuple[list[Any], list[Entry] | None]:
        """Take the items from there on out of it, and their entries, if they have any."""
        items, entries = self.items[place:], None if self.entries is None else self.entries[place:]
        # A worker of this process may be iterating over the list.
        self.items = self.items[:place]
        self.entries = None if self.entries is None else self.entries[:place]
        return items, entries

    def drop(self, count: int) -> None:
        """Forget the first ones, which have been reported."""
        self.items, self.start, self.reported = self.items[count:], self.start + count, self.reported + count
        self.entries = None if self.entries is None else self.entries[count:]


class Pool:
    """Runs a function on the items of batches, and tells the map what became of them. Each kind of pool is one file.

    It tells by the methods `done`, `lost`, `not_sent` and `fail` of the map's `Scheduler`.

    Attributes:
        is_far: Whether its workers are on a cluster: longer batches, of which some wait there for each of its slots.
        can_rest: Whether its workers can run one map after the other.
        can_kill: Whether a worker can be stopped while it runs a batch.
        marks: Whether the marks of its batches tell here how many items have begun.
        is_starting: Whether a batch waits for the first worker, and begins only if somebody listens when that is ready.
        isolates: Whether it lets a batch that is to be alone run so; otherwise no other is sent meanwhile.
        largest_batch: Items that may be sent in one go now.
        deliver: Lets the thread of the map call a function with its scheduler and these arguments.
        ends: What has to be done when the pool is stopped, last things first.
    """

    is_far = can_rest = can_kill = marks = is_starting = False
    isolates = True
    largest_batch = 1
    deliver: Callable[..., None]

    def __init__(self, work: Work, workers: int | None) -> None:
        self._name = name_of(work.function)
        self._most = workers
        self.ends = contextlib.ExitStack()
        self._is_left: Callable[[], bool] = lambda: False
        self._work, self._context = work, contextvars.copy_context()

    def take_on(self, work: Work) -> None:
        """Be ready for a map, the first one or, after a `rest`, another one of the same function.

        Raises:
            NotTransferableError: If its arguments cannot be sent to the workers.
        """
        # With the context variables of whoever calls it.
        self._work, self._context = work, contextvars.copy_context()

    @property
    def slots(self) -> int:
        """Batches that can run at the same time."""
        return self._most or 1

    def start(
        self,
        inbox: Inbox,
        *,
        most_batches: int | None = None,
        is_paced: bool = False,
        patience: float | None = None,
    ) -> None:
        """Begin, or go on with the next map; what is delivered goes to the ``inbox``.

        There will be at most so many batches. ``is_paced``: none is to be sent before a worker can begin it at once,
        and ``slots`` are those of workers that can. ``patience``: seconds that a call has in all.
        """
        self.deliver = inbox.put
        self._most_batches, self._is_paced, self._patience = most_batches, is_paced, patience

    def prepare(self) -> None:
        """Start workers, if there are none that a batch could begin in."""

    def submit(self, batch: Batch) -> None:
        """Run a batch as soon as a worker is free."""
        raise NotImplementedError

    def kill(self, batch: Batch) -> bool:
        """End the worker that runs a batch, by force if it is asked again.

        Gives False if the worker has ended the batch and its report is arriving: it may be asked again soon.
        """
        raise NotImplementedError

    def rest(self) -> None:
        """The map has ended and nothing runs; listen to nobody until the next one starts."""

    def enter_multi_pool(self, workers: int, end: Callable[[], None]) -> None:
        """Enter one of twat-mp's, for workers that ``end`` ends when it is left, each time that it asks for that."""
        from twat_mp.mp import MultiPool

        # A stream that is open when the program ends is closed too late, when threads and modules are gone.
        atexit.register(self.ends.close)
        self.ends.callback(atexit.unregister, self.ends.close)
        # Not one of pathos: those share their workers with every other pool of the same size.
        pool = SimpleNamespace(map=None, close=end, join=end, terminate=end, clear=end)
        made = MultiPool(pool_class=lambda nodes: pool, nodes=workers)  # type: ignore[arg-type]  # noqa: ARG005
        self.ends.enter_context(made)
        # It puts a function there that holds the pool: what all items share would live until the garbage collector
        # comes.
        pool.map = None

    def stop(self, is_left: Callable[[], bool] = lambda: False) -> None:
        """End the workers; blocks until they have ended, unless it is called in one of them.

        What cannot be ended is waited for as long as ``is_left`` does not tell that nobody wants to any more.
        """
        self._is_left = is_left
        self.ends.close()

    async def stop_async(self) -> None:
        """End the workers without blocking the event loop."""
        from opero.concurrency.system import in_own_thread

        # An event loop is told by its own thread to listen no longer.
        self.rest()
        await in_own_thread(self.stop)


def get_parallel_map_decorator(mode: Mode = "process", **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a decorator that turns a function of one item into a map, and adds no policy.

    Args:
        mode: ``"process"``, ``"thread"``, ``"async"``, ``"async_process"``, ``"serial"``, an executor, or a function
            that makes one.
        **options: ``workers``, ``ordered``, ``progress`` (here False by default), ``return_exceptions`` and ``total``,
            as of `opero.opmap`; all others are for the pool, such as ``start_method``.

    Raises:
        TypeError: If an option has the wrong type or is not known, or the mode does not fit the function.
        ValueError: If an option's value is out of range.
    """
    check_mode(mode)
    given: dict[str, Any] = {"mode": mode, "progress": False, "pool_options": {}}
    for name, value in options.items():
        if name == "return_exceptions" and value is None:
            # As if it were not given.
            continue
        (given if name in _OF_MAPS_WITHOUT_POLICIES else given["pool_options"])[name] = value

    def decorate(function: Callable[..., Any]) -> Any:
        check_decoratable(function, "get_parallel_map_decorator")
        recipe = get_parallel_map_decorator, {"mode": mode, **options}
        return make_map(Plan(function, RetryPolicy()), map_settings(function, given), recipe)

    return decorate


def get_parallel_executor(mode: Mode = "process", **options: Any) -> Callable[..., Any]:
    """Make ``executor(function, items, **kwargs)``, which maps any function or class without decorating it.

    The arguments and errors are those of `get_parallel_map_decorator`. For an ``async def`` function the executor
    returns an awaitable of the list.
    """
    decorate = get_parallel_map_decorator(mode, **options)

    def executor(function: Callable[..., Any], items: Any, /, **kwargs: Any) -> Any:
        # A class among functions, as in `map(int, texts)`, is meant; below a decorator it would be a mistake.
        mapped = partial(function) if isinstance(function, type) else function
        return decorate(mapped)(items, **kwargs)

    return executor
