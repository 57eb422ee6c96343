"""Pools by mode: which pool runs a map, and maps without any policy."""

from __future__ import annotations

import importlib.util
import inspect
import math
from functools import partial
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
from opero.core.signature import check_decoratable, is_async, name_of, refuse_generator

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Executor


__all__ = ["get_parallel_executor", "get_parallel_map_decorator"]

ModeName: TypeAlias = Literal["process", "thread", "async", "async_process", "serial", "dask", "ray"]
Mode: TypeAlias = "ModeName | Executor | Callable[[], Executor]"


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
# The library that a mode needs; an extra of the mode's name brings it.
_NEEDED: Mapping[str, str] = {"dask": "distributed", "ray": "ray"}


def _check_start_method(name: str, method: Any) -> None:
    import multiprocessing

    check_choice(name, method, multiprocessing.get_all_start_methods())


def _check_initargs(name: str, initargs: Any) -> None:
    if not isinstance(initargs, tuple):
        raise TypeError(f"{name}={shown(initargs)} is {kind_of(initargs)}; write a tuple")


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


def map_settings(function: Callable[..., Any], options: Mapping[str, Any]) -> MapSettings:
    """Check those options of a map of ``function`` that are no policies."""
    given = {**MAP_DEFAULTS, **options}
    mode, workers, total, batch_size = given["mode"], given["workers"], given["total"], given["batch_size"]
    check_mode(mode)
    refuse_generator(function, "a map")
    if mode in _ASYNC_ONLY and not is_async(function):
        raise TypeError(
            f"mode={mode!r} runs coroutines, but {name_of(function)} is a `def` function; "
            "write mode='thread' or mode='process'"
        )
    if workers is not None:
        check_count("workers", workers, "workers", smallest=1)
        if mode == "serial":
            msg = f"workers={workers} cannot apply with mode='serial', in which the calling thread works; leave it out"
            raise ValueError(msg)
    check_flag("ordered", given["ordered"])
    check_progress(given["progress"])
    check_flag("return_exceptions", given["return_exceptions"])
    if total is not None:
        check_count("total", total, "items", smallest=0)
    if batch_size is not None:
        check_count("batch_size", batch_size, "items in one list", smallest=1)
    pool_options = check_mapping("pool_options", given["pool_options"])
    _check_pool_options(mode, pool_options)
    return MapSettings(
        pools=PoolSource(mode, workers, pool_options),
        ordered=given["ordered"],
        progress=given["progress"],
        return_exceptions=given["return_exceptions"],
        warns="return_exceptions" not in options,
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
        ways = "write mode='dask', pool_options={'client': client}"
    if not callable(mode) or (isinstance(mode, type) and not issubclass(mode, Executor)):
        raise TypeError(f"mode={shown(mode)} is {kind_of(mode)}, which is no concurrent.futures.Executor; {ways}")
    check_callable("mode", mode, "a function that makes an executor")
    try:
        inspect.signature(mode).bind()
    except TypeError as error:
        raise TypeError(
            f"mode={shown(mode)} is called without arguments to make an executor, but {error}; write a lambda around it"
        ) from None
    except ValueError:  # a builtin whose signature is not known
        pass


def _check_pool_options(mode: Mode, options: dict[str, Any]) -> None:
    known = _OPTIONS[mode] if isinstance(mode, str) else ()
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


def get_parallel_map_decorator(
    mode: Mode = "process",
    *,
    workers: int | None = None,
    ordered: bool = True,
    progress: ProgressOption = False,
    return_exceptions: bool | None = None,
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
        options = {"mode": mode, "workers": workers, "ordered": ordered, "progress": progress, "total": total}
        if return_exceptions is not None:
            options["return_exceptions"] = return_exceptions
        settings = map_settings(function, {**options, "pool_options": pool_options})
        recipe = get_parallel_map_decorator, {**options, **pool_options}
        return make_map(Plan(function, RetryPolicy()), settings, recipe)

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
