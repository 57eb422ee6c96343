"""`@opmap`: the same policies over many items."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, Unpack, overload

from opero.concurrency.mapping import AsyncMap, SyncMap, make_map
from opero.concurrency.pool import MAP_DEFAULTS, map_settings
from opero.core.checks import check_known, shown
from opero.core.control import OPERO_DEFAULTS
from opero.core.parameters import own_signature
from opero.core.signature import MISSING, check_decoratable
from opero.decorators.opero import CommonOptions, keyword_signature, make_plan
from opero.utils.notes import Shortened

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping

    from opero.concurrency.outcome import Results
    from opero.concurrency.pool import Mode
    from opero.concurrency.progress import ProgressOption

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
D = TypeVar("D")
P = ParamSpec("P")

if TYPE_CHECKING:
    # What is mapped: functions of an item, or of an instance and an item. A coroutine is an R, too: Async comes first.
    Plain = Callable[Concatenate[T, P], R]
    Async = Callable[Concatenate[T, P], Coroutine[Any, Any, R]]


class OpmapOptions(CommonOptions, total=False):
    """Types of the options of `opmap`, for type checkers; those that decide about its type stand in its overloads."""

    mode: Mode
    workers: int | None
    ordered: bool
    progress: ProgressOption
    total: int | None
    pool_options: Mapping[str, Any] | None


OPMAP_DEFAULTS: dict[str, Any] = {**MAP_DEFAULTS, **OPERO_DEFAULTS}


class _ToMap(Protocol[D]):
    """A decorator whose maps return results and, of items that failed, defaults or exceptions."""

    @overload
    def __call__(self, function: Async[T, P, R], /) -> AsyncMap[T, P, R, Results[R, D]]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, function: Plain[T, P, R], /) -> SyncMap[T, P, R, Results[R, D]]: ...


class _ToRaisingMap(Protocol):
    """A decorator whose maps return results, or raise."""

    @overload
    def __call__(self, function: Async[T, P, R], /) -> AsyncMap[T, P, R, list[R]]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, function: Plain[T, P, R], /) -> SyncMap[T, P, R, list[R]]: ...


class _ToMapOfLists(Protocol[D]):
    """The same of functions of lists, which may be methods."""

    @overload
    def __call__(self, function: Async[list[T], P, Iterable[R | Exception]], /) -> AsyncMap[T, P, R, Results[R, D]]: ...
    @overload
    def __call__(
        self, function: Async[S, Concatenate[list[T], P], Iterable[R | Exception]], /
    ) -> AsyncMap[S, Concatenate[T, P], R, Results[R, D]]: ...
    @overload
    def __call__(self, function: Plain[list[T], P, Iterable[R | Exception]], /) -> SyncMap[T, P, R, Results[R, D]]: ...
    @overload
    def __call__(
        self, function: Plain[S, Concatenate[list[T], P], Iterable[R | Exception]], /
    ) -> SyncMap[S, Concatenate[T, P], R, Results[R, D]]: ...


class _ToRaisingMapOfLists(Protocol):
    """The same of functions of lists, which may be methods."""

    @overload
    def __call__(self, function: Async[list[T], P, Iterable[R | Exception]], /) -> AsyncMap[T, P, R, list[R]]: ...
    @overload
    def __call__(
        self, function: Async[S, Concatenate[list[T], P], Iterable[R | Exception]], /
    ) -> AsyncMap[S, Concatenate[T, P], R, list[R]]: ...
    @overload
    def __call__(self, function: Plain[list[T], P, Iterable[R | Exception]], /) -> SyncMap[T, P, R, list[R]]: ...
    @overload
    def __call__(
        self, function: Plain[S, Concatenate[list[T], P], Iterable[R | Exception]], /
    ) -> SyncMap[S, Concatenate[T, P], R, list[R]]: ...


@overload
def opmap(function: Async[T, P, R], /) -> AsyncMap[T, P, R, Results[R]]: ...  # type: ignore[overload-overlap]
@overload
def opmap(function: Plain[T, P, R], /) -> SyncMap[T, P, R, Results[R]]: ...
@overload
def opmap(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]  # False is a bool too
    *, batch_size: int, return_exceptions: Literal[False], **options: Unpack[OpmapOptions]
) -> _ToRaisingMapOfLists: ...
@overload
def opmap(*, batch_size: int, default: D, **options: Unpack[OpmapOptions]) -> _ToMapOfLists[D]: ...
@overload
def opmap(
    *, batch_size: int, return_exceptions: bool = ..., **options: Unpack[OpmapOptions]
) -> _ToMapOfLists[Exception]: ...
@overload
def opmap(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]  # False is a bool too
    *, return_exceptions: Literal[False], **options: Unpack[OpmapOptions]
) -> _ToRaisingMap: ...
@overload
def opmap(*, default: D, **options: Unpack[OpmapOptions]) -> _ToMap[D]: ...
@overload
def opmap(*, return_exceptions: bool = ..., **options: Unpack[OpmapOptions]) -> _ToMap[Exception]: ...
def opmap(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a function of one item a resilient map over any number of items.

    A ``def`` function is called with the items and returns the list of results, an `opero.Results`, which also has
    those that failed apart; an ``async def`` function gives a coroutine of it in every mode, and ``.run(items)``
    blocks. Further arguments go to every item. ``.stream(items)`` yields an `Outcome` for each, ``.starmap(tuples)``
    takes several arguments for each call, ``.one(item)`` is the single call, ``.stats`` counts all of them.

    Cache, retries, fallback, rate limit and progress live in the calling process; workers only run the function. So the
    memory cache and the rate limit hold for all workers together, an item that waits for its retry holds no worker, and
    a worker that is killed is one failed attempt of the item it ran. Items are pulled as fast as they are finished, so
    the input may be infinite; an async generator is closed when its map ends.

    Args:
        function: The function, when used without parentheses.
        **options: All options of `opero.opero`, and:

            - ``mode`` (``"process"``): ``"process"``, ``"thread"``, ``"async"`` (``async def`` in this event loop),
              ``"async_process"`` (``async def`` in event loops of several processes)
              or ``"serial"`` (one item after the other in the calling thread, for debuggers and profilers; of
              ``async def`` functions in this event loop); on clusters ``"dask"`` (needs ``opero[dask]``) or ``"ray"``
              (needs ``opero[ray]``), the one that is connected or one that is started. Or a
              `concurrent.futures.Executor`, which is used and left as it is; or a function that makes one, which is
              made for each map, shut down at its end, and made anew when it breaks.
            - ``workers``: processes (default: CPUs), threads (CPUs + 4, at most 32) or tasks (100); of a cluster, the
              most that are used at the same time (default: all); of an executor, the batches that are in it at the same
              time (default: as many as it has workers, if it tells; else CPUs).
            - ``ordered`` (True): results in input order; else in order of completion.
            - ``progress`` (True): a tqdm bar on a terminal or in a notebook, red when items have failed; elsewhere a
              line in the log now and then; nothing in child processes. Text is its label; a mapping has options for
              it, as ``{"desc": "pages", "position": 1}``; a class takes its place, as ``tqdm.rich.tqdm``. Or a
              function, which is called here with a tally whenever items have ended: ``finished``, ``failed``,
              ``retried``, ``cached``, and ``total`` (None where it is not known).
            - ``return_exceptions`` (True): a failed item is its exception in the list; False: the first failure stops
              the map and is raised. Where it is not given, an `opero.FailedItemsWarning` tells of exceptions in the
              list, once for each map. Not beside ``default``, which is in the list for an item that failed; its
              `Outcome` has the exception.
            - ``total`` (None): number of items for the bar, where neither `len` nor `operator.length_hint` tells it.
            - ``batch_size`` (None): the function takes a list of up to so many items and returns a list of as many
              results. By item: the cache and its key, the `Outcome`, ``default``. By call: attempts, retries, the rate
              limit, time limits, the circuit, events, and a crash, which is charged to all its items. An exception in
              place of a result is that item's, and is tried again, without the others, if ``retry_on`` says so; one
              that is raised is of all items. A list that is not full is sent when no other call is under way, or the
              input has ended. ``.one(x)`` is ``function([x])[0]``; ``arg_fallback`` names another parameter.
            - ``pool_options`` (None): mapping for the pool: ``initializer`` with ``initargs``, called in each thread or
              process before its first item, and ``finalizer``, called there without arguments at its end; a process
              that is ended has a second for it. For processes also ``start_method``, ``max_tasks_per_worker`` (None:
              any number), the items after which one is replaced, and ``threads_per_worker`` (CPUs / workers), the
              threads of numeric libraries in each; with ``"async_process"`` also ``concurrency`` (16), the coroutines
              in each process. ``"dask"``: ``client`` or ``address``, ``resources``, ``priority``, ``restart_workers``;
              ``"ray"``: ``address``, ``init`` (for `ray.init`) and, for each call, ``num_cpus``, ``num_gpus``,
              ``memory``, ``resources``, ``runtime_env``, ``scheduling_strategy``.

            ``attempt_timeout`` may here be given for ``def`` functions too, with ``mode="process"``, ``"dask"`` and
            ``"ray"``: the worker that takes longer is killed and replaced; on dask it is a child of the worker, or with
            ``"restart_workers": True`` the worker itself.

    Raises:
        TypeError: When decorating: an unknown option, a wrong type, or a mode that does not fit the function.
        ValueError: When decorating: a value out of range, or an option that cannot apply.
    """
    check_known("@opmap", options, OPMAP_DEFAULTS)
    if function is None:
        return partial(_mapped, options)
    if options:
        msg = f"opmap got a function and options; write opmap({', '.join(f'{n}=…' for n in options)})(function)"
        raise TypeError(msg)
    return _mapped(options, function)


def _mapped(options: dict[str, Any], function: Callable[..., Any]) -> Any:
    """Check all that depends on the function, and make its map."""
    with Shortened():
        check_decoratable(function, "opmap")
        if options.get("default", MISSING) is not MISSING and "return_exceptions" in options:
            raise ValueError(
                f"return_exceptions={shown(options['return_exceptions'])} has no effect beside default, which stands "
                "for an item that failed in the list; leave one of them out"
            )
        settings = map_settings(function, {name: value for name, value in options.items() if name in MAP_DEFAULTS})
        if settings.batch_size is not None:
            _check_takes_lists(function, options)
        policies = {name: value for name, value in options.items() if name not in MAP_DEFAULTS}
        plan = make_plan(function, policies, killable=options.get("mode", "process") in {"process", "dask", "ray"})
        return make_map(plan, settings, (opmap, options))


def _check_takes_lists(function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Refuse, beside ``batch_size``, what would be by item and by call."""
    if options.get("retry_if_result") is not None:
        raise ValueError(
            "retry_if_result cannot apply with batch_size, where a result is a list; "
            "let the function return an exception in place of the result of an item that shall be tried again"
        )
    fallback = options.get("arg_fallback")
    first = next((name for name in own_signature(function).parameters if name not in {"self", "cls"}), None)
    if fallback is not None and fallback == first:
        msg = f"arg_fallback={fallback!r} cannot name the parameter that takes the list of items; name another one"
        raise ValueError(msg)


opmap.__signature__ = keyword_signature(OPMAP_DEFAULTS)  # type: ignore[attr-defined]  # read by inspect and help
