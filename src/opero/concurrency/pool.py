"""Pools by mode: which pool runs a map, and maps without any policy."""

from __future__ import annotations

import functools
import inspect
import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from opero.concurrency.kept import POOLS, MapSettings, PoolSource
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
)
from opero.core.plan import Plan
from opero.core.retry import RetryPolicy
from opero.core.showing import kind_of, listed, shown
from opero.core.signature import MISSING, check_decoratable, is_async, name_of, refuse_generator

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Executor


__all__ = ["get_parallel_executor", "get_parallel_map_decorator"]

ModeName: TypeAlias = Literal["process", "thread", "async", "async_process", "serial", "dask", "ray"]
Mode: TypeAlias = "ModeName | Executor | Callable[[], Executor]"


# Modes whose cluster says how many workers there are, and what they need.
_CLUSTERS: Mapping[str, str] = {"dask": "distributed", "ray": "ray"}
_ASYNC_ONLY = ("async", "async_process")
_HOOKS = ("initializer", "initargs", "finalizer")
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "process": ("start_method", *_HOOKS, "max_tasks_per_worker", "threads_per_worker"),
    "thread": _HOOKS,
    "async": (),
    "serial": (),
    "async_process": ("start_method", *_HOOKS, "max_tasks_per_worker", "threads_per_worker", "concurrency"),
    "dask": ("client", "address", "resources", "priority", "restart_workers"),
    "ray": ("address", "init", "num_cpus", "num_gpus", "memory", "resources", "runtime_env", "scheduling_strategy"),
}


_COUNTS: Mapping[str, str] = {
    "concurrency": "coroutines in each process",
    "max_tasks_per_worker": "items that a worker runs before it is replaced",
    "threads_per_worker": "threads of numeric libraries in each worker",
}


def map_settings(
    function: Callable[..., Any],
    *,
    mode: Mode = "process",
    workers: int | None = None,
    ordered: bool = True,
    progress: ProgressOption = True,
    return_exceptions: bool = MISSING,
    total: int | None = None,
    batch_size: int | None = None,
    pool_options: Mapping[str, Any] | None = None,
) -> MapSettings:
    """Check the options of a map of ``function``."""
    check_mode(mode)
    refuse_generator(function, "a map")
    if mode in _ASYNC_ONLY and not is_async(function):
        msg = (
            f"mode={mode!r} runs coroutines, but {name_of(function)} is a `def` function; "
            "write mode='thread' or mode='process'"
        )
        raise TypeError(msg)
    if workers is not None:
        check_count("workers", workers, "workers", smallest=1)
        if mode == "serial":
            msg = f"workers={workers} cannot apply with mode='serial', in which the calling thread works; leave it out"
            raise ValueError(msg)
    check_flag("ordered", ordered)
    check_progress(progress)
    if return_exceptions is not MISSING:
        check_flag("return_exceptions", return_exceptions)
    if total is not None:
        check_count("total", total, "items", smallest=0)
    if batch_size is not None:
        check_count("batch_size", batch_size, "items in one list", smallest=1)
    options = check_mapping("pool_options", pool_options)
    _check_pool_options(mode, options)
    return MapSettings(
        pools=PoolSource(mode, workers, options),
        ordered=ordered,
        progress=progress,
        return_exceptions=True if return_exceptions is MISSING else return_exceptions,
        warns=return_exceptions is MISSING,
        total=total,
        batch_size=batch_size,
    )


def check_mode(mode: Any) -> None:
    """Refuse what is no mode, with what to write instead."""
    if isinstance(mode, str):
        check_choice("mode", mode, POOLS)
        return
    from concurrent.futures import Executor

    if isinstance(mode, Executor):
        return
    ways = f"write one of {', '.join(map(repr, sorted(POOLS)))}, an executor, or a function that makes one"
    if hasattr(mode, "get_executor"):
        ways = f"write its executor, {type(mode).__name__.lower()}.get_executor()"
    if not callable(mode) or (isinstance(mode, type) and not issubclass(mode, Executor)):
        msg = f"mode={shown(mode)} is {kind_of(mode)}, which is no concurrent.futures.Executor; {ways}"
        raise TypeError(msg)
    check_callable("mode", mode, "a function that makes an executor")
    try:
        inspect.signature(mode).bind()
    except TypeError as error:
        msg = (
            f"mode={shown(mode)} is called without arguments to make an executor, but {error}; write a lambda around it"
        )
        raise TypeError(msg) from None
    except ValueError:  # a builtin whose signature is not known
        pass


def _check_pool_options(mode: Mode, options: dict[str, Any]) -> None:
    known = _OPTIONS[mode] if isinstance(mode, str) else ()
    named = f"mode={mode!r}" if isinstance(mode, str) else "an executor as mode"
    if options and not known:
        msg = f"pool_options with {listed(options)} cannot apply with {named}, which takes none; leave it out"
        raise TypeError(msg)
    check_known(f"pool_options with {named}", options, known)
    if "start_method" in options:
        import multiprocessing

        check_choice("pool_options['start_method']", options["start_method"], multiprocessing.get_all_start_methods())
    for hook, does in (("initializer", "prepares each worker"), ("finalizer", "takes no arguments, for its end")):
        if hook in options:
            check_callable(f"pool_options[{hook!r}]", options[hook], f"a function that {does}")
    if "initargs" in options:
        _check_initargs(options)
    for option, counted in _COUNTS.items():
        if option in options:
            check_count(f"pool_options[{option!r}]", options[option], counted, smallest=1)
    if isinstance(mode, str):
        _check_needed(mode, options)


def _check_needed(mode: str, options: dict[str, Any]) -> None:
    """The options of clusters, and whether the library is installed."""
    if mode in _CLUSTERS:
        _check_cluster_options(mode, options)
    needed = {"async_process": "aiomultiprocess", **_CLUSTERS}.get(mode)
    if needed is not None:
        import importlib.util

        if importlib.util.find_spec(needed) is None:
            extra = mode if mode in _CLUSTERS else needed
            msg = f"mode={mode!r} needs {needed}; install it with: pip install 'opero[{extra}]'"
            raise ImportError(msg)


def _check_cluster_options(mode: str, options: dict[str, Any]) -> None:
    for option in ("resources", "init", "runtime_env"):
        if option in options:
            check_mapping(f"pool_options[{option!r}]", options[option])
    for option in ("num_cpus", "num_gpus", "memory"):
        if option in options:
            check_number(f"pool_options[{option!r}]", options[option], "what each call needs", smallest=0)
    if "priority" in options:
        check_number("pool_options['priority']", options["priority"], "the priority", smallest=-math.inf)
    if "address" in options:
        check_text("pool_options['address']", options["address"], "an address such as 'host:port'")
    if "restart_workers" in options:
        check_flag("pool_options['restart_workers']", options["restart_workers"])
    if mode == "dask" and {"client", "address"} <= options.keys():
        msg = "pool_options has 'client' and 'address', which say the same; leave one of them out"
        raise ValueError(msg)


def _check_initargs(options: dict[str, Any]) -> None:
    if "initializer" not in options:
        msg = "pool_options['initargs'] has no effect without an initializer; add one"
        raise ValueError(msg)
    initargs = options["initargs"]
    if not isinstance(initargs, tuple):
        msg = f"pool_options['initargs']={shown(initargs)} is {kind_of(initargs)}; write a tuple"
        raise TypeError(msg)


def get_parallel_map_decorator(
    mode: Mode = "process",
    *,
    workers: int | None = None,
    ordered: bool = True,
    progress: ProgressOption = False,
    return_exceptions: bool = MISSING,
    total: int | None = None,
    **pool_options: Any,
) -> Callable[[Callable[..., Any]], Any]:
    """Make a decorator that turns a function of one item into a map, and adds no policy.

    Args:
        mode: ``"process"``, ``"thread"``, ``"async"``, ``"async_process"``, ``"serial"``, an executor, or a function
            that makes one.
        workers: Processes, threads or tasks; by default what `opero.opmap` has.
        ordered: Whether results come in input order, or in order of completion.
        progress: Whether to show a bar on a terminal, or how; see `opero.opmap`.
        return_exceptions: Whether a failed item is its exception in the list, or stops the map and is raised. If not
            given, it is in the list, and an `opero.FailedItemsWarning` tells of it.
        total: Number of items, for the bar, where neither their length nor `operator.length_hint` tells it.
        **pool_options: For the pool, such as ``start_method``.

    Raises:
        TypeError: If an option has the wrong type or is not known, or the mode does not fit the function.
        ValueError: If an option's value is out of range.
    """
    check_mode(mode)

    def decorate(function: Callable[..., Any]) -> Any:
        check_decoratable(function, "get_parallel_map_decorator")
        options: dict[str, Any] = {
            "mode": mode,
            "workers": workers,
            "ordered": ordered,
            "progress": progress,
            "return_exceptions": return_exceptions,
            "total": total,
        }
        settings = map_settings(function, **options, pool_options=pool_options)
        recipe = get_parallel_map_decorator, {**options, **pool_options}
        return make_map(Plan(function, RetryPolicy()), settings, recipe)

    return decorate


def get_parallel_executor(
    mode: Mode = "process",
    *,
    workers: int | None = None,
    ordered: bool = True,
    progress: ProgressOption = False,
    return_exceptions: bool = MISSING,
    total: int | None = None,
    **pool_options: Any,
) -> Callable[..., Any]:
    """Make ``executor(function, items, **kwargs)``, which maps any function or class without decorating it.

    The arguments and errors are those of `get_parallel_map_decorator`. For an ``async def`` function the executor
    returns an awaitable of the list.
    """
    decorate = get_parallel_map_decorator(
        mode,
        workers=workers,
        ordered=ordered,
        progress=progress,
        return_exceptions=return_exceptions,
        total=total,
        **pool_options,
    )

    def executor(function: Callable[..., Any], items: Any, /, **kwargs: Any) -> Any:
        # A class among functions, as in `map(int, texts)`, is meant; below a decorator it would be a mistake.
        mapped = functools.partial(function) if isinstance(function, type) else function
        return decorate(mapped)(items, **kwargs)

    return executor
