"""A function as a map: the objects that `opero.opmap` makes."""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
import traceback
import warnings
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, overload

from opero.concurrency.outcome import ListSink, Outcome, Results, StreamSink
from opero.core.checks import kind_of
from opero.core.control import Control
from opero.core.decoration import Recipe, decorated
from opero.core.frozen import itself
from opero.core.parameters import own_signature
from opero.core.signature import MISSING, find_by_name
from opero.core.steps import is_in_asyncio
from opero.exceptions import FailedItemsWarning
from opero.utils.notes import Shortened, add_note, class_counts

if TYPE_CHECKING:
    from opero.concurrency.outcome import Sink
    from opero.concurrency.pool import MapSettings, PoolSource
    from opero.concurrency.worker import Shape
    from opero.core.plan import Plan

T = TypeVar("T")
R = TypeVar("R")
L = TypeVar("L")
S = TypeVar("S")
Item = TypeVar("Item")
S_contra = TypeVar("S_contra", contravariant=True)
Item_contra = TypeVar("Item_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)
L_co = TypeVar("L_co", covariant=True)
P = ParamSpec("P")
Q = ParamSpec("Q")


class _Method(Protocol[S_contra, Item_contra, Q, R_co, L_co]):
    """A map whose items would be instances, were it not a method."""

    @property
    def _types(self) -> Callable[Concatenate[S_contra, Item_contra, Q], tuple[R_co, L_co]]: ...


class _Map(Control[Concatenate[T, P], R], Generic[T, P, R, L]):
    """A function that takes many items, and what can be done with it besides; what both kinds have in common."""

    if TYPE_CHECKING:

        @property
        def _types(self) -> Callable[Concatenate[T, P], tuple[R, L]]: ...

    def __init__(self, plan: Plan, settings: MapSettings, single: Any) -> None:
        super().__init__(single.__opero__)
        self.plan = plan
        self.settings = settings
        self.single = single
        # Whether items are tuples of arguments.
        self._is_starred = False
        # Of a bound or starred map, what pickle makes it again by.
        self._origin: tuple[Any, ...] | None = None
        # None where it is not known, as of some builtins: they will complain themselves.
        self._signature: inspect.Signature | None = None
        with contextlib.suppress(ValueError, TypeError):
            self._signature = own_signature(plan.function)

    def pool(self) -> PoolSource:
        """A block in which the workers stay alive between the calls of this map.

        ``with fn.pool():`` or ``async with fn.pool():``, for ``def`` and ``async def`` functions alike. The first call
        starts the workers, later ones use them again, and leaving the block ends them. Calls at the same time, from
        several threads or tasks, have workers of their own. In mode ``"async"`` there is nothing to keep: tasks belong
        to the event loop of their call.
        """
        return self.settings.pools

    def cache_delete(self, item: T, /, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Forget the result for this item and these arguments; tells whether there was one."""
        return super().cache_delete(*self._single_arguments(item, args), **kwargs)

    def with_plan(self, plan: Plan) -> Self:
        """The same map under other policies."""
        made: Self = make_map(plan, self.settings, self._decoration.recipe)
        return made

    def __reduce__(self) -> Any:
        if self._origin is not None:
            return self._origin
        module, name = self.__dict__["__module__"], self.__dict__["__qualname__"]
        # What the main module has is known to other processes if those of multiprocessing are meant, and not if a
        # pickler is at work that sends functions by value: pickle does not tell who asks.
        is_own = module == "__main__" and any({"cloudpickle", "dill"} & {*m.split(".")} for m in _modules_of_callers())
        if find_by_name(module, name) is self and not is_own:
            return name
        return _made_again, (*self._decoration.recipe, self.__dict__["__wrapped__"])

    __copy__ = __deepcopy__ = itself

    def __repr__(self) -> str:
        return f"<opmap {self.plan.name}>"

    def _with(self, **changes: Any) -> Self:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, **changes)
        return made

    def _bound_to(self, instance: Any) -> Self:
        origin = operator.methodcaller("__get__", instance), (self,)
        return self._with(single=self.single.__get__(instance), _head=(instance,), _origin=origin)

    def _starred(self) -> Any:
        return self._with(_is_starred=True, _origin=(getattr, (self, "starmap")))

    def _for_one_item(self) -> Any:
        """The same map in the calling thread, or in a process if it is to be stopped: elsewhere it cannot be."""
        is_to_be_stopped = self.plan.attempt_timeout is not None and not self.plan.is_async
        from opero.concurrency.pool import PoolSource

        pools = self.settings.pools if is_to_be_stopped else PoolSource("serial")
        return self._with(settings=replace(self.settings, pools=pools, progress=False, return_exceptions=False))

    def _outcomes(self, items: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sink: Sink) -> Any:
        """Begin to map: an iterator of what the sink hands out, or of an ``async def`` function an async one."""
        shape = self._arguments(args, kwargs)
        self._check_items(items)
        from opero.concurrency.running import run_awaiting, run_blocking

        # The user's, unless their length is known; else what they hint at.
        total = self.settings.total
        # As the built-in `list` does with something that has no length, or does not know it.
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if total is None or hasattr(items, "__len__"):
                hint = operator.length_hint(items, -1)
                total = None if hint < 0 else hint
        if not self.plan.is_async:
            return run_blocking(self.plan, self.settings, shape, sink, items=iter(items), total=total)
        source = aiter(items) if isinstance(items, AsyncIterable) else iter(items)
        return run_awaiting(self.plan, self.settings, shape, sink, items=source, total=total)

    def _is_classmethod_of(self, first: type) -> bool:
        """Whether a call with this first argument is one through ``@classmethod``, which binds no maps since 3.13."""
        if self._head:
            return False
        this: Any = self
        held = (value for owner in first.__mro__ for value in vars(owner).values())
        return any(isinstance(value, classmethod) and value.__func__ is this for value in held)

    def _arguments(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Shape:
        """What all calls have in common; a wrong call raises its TypeError before anything starts."""
        name = self.plan.name
        if self._is_starred and self.settings.batch_size is not None:
            raise TypeError(f"{name}.starmap cannot apply with batch_size, where the function takes a list of items")
        if self._is_starred and rest:
            msg = f"{name}.starmap takes all positional arguments from the tuples; give the same for all by keyword"
            raise TypeError(msg)
        from opero.concurrency.worker import Shape

        shape = Shape(self._head, rest, kwargs, self._is_starred)
        signature = self._signature
        if signature is None:
            return shape
        try:
            if self._is_starred:
                signature.bind_partial(*self._head, **kwargs)
            else:
                signature.bind(*self._head, None, *rest, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}() {error}{self._hint(signature, rest, kwargs)}") from None
        return shape

    def _hint(self, signature: inspect.Signature, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """What to write instead, if positional arguments are missing and no other thing is wrong."""
        name, parameters = self.plan.name.rpartition(".")[2], list(signature.parameters.values())
        if not self._head and parameters and parameters[0].name == "cls":
            return (
                "; from Python 3.13 on a map below @classmethod knows its class only where it is called itself: "
                f"write opero.control(Class.{name}).stream(items), and so with run and one"
            )
        try:
            given = signature.bind_partial(*self._head, None, *rest, **kwargs).arguments
        except TypeError:
            return ""
        required = [p.name for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
        for missing in required:
            if missing not in given:
                return (
                    f"; write {name}(items, {missing}=…) to give the same to every item, or {name}.starmap(tuples) if "
                    "each item is a tuple of arguments"
                )
        return ""

    def _check_items(self, items: Any) -> None:
        """Refuse as all items of a map what is meant as one of them."""
        kind, name = type(items), self.plan.name.rpartition(".")[2]
        if items is MISSING:
            raise TypeError(f"{name}() is a map and got no items; write {name}([item, …])")
        if isinstance(items, Mapping):
            ways = f"{name}(list(mapping)) for its keys, {name}.starmap(mapping.items()) for keys and values"
        elif isinstance(items, (str, bytes, bytearray)) or not (
            hasattr(kind, "__iter__") or hasattr(kind, "__getitem__") or hasattr(kind, "__aiter__")
        ):
            ways = f"{name}.one(item) for one item, {name}([item, …]) for several"
        elif isinstance(items, AsyncIterable) and not (self.plan.is_async or isinstance(items, Iterable)):
            got = f"{kind.__qualname__}, an async iterable"
            raise TypeError(f"{self.plan.name} is a `def` function and got {got}; make it `async def`")
        else:
            return
        raise TypeError(f"{self.plan.name} got {kind_of(items)} as its items; write {ways}")

    def _list_of(self, sink: ListSink) -> Any:
        """What the user gets of a map that has ended."""
        if not self.settings.return_exceptions:
            return sink.results
        results: Results[Any, Any] = Results(sink.results, sink.failed)
        if not (sink.failed and self.settings.warns):
            return results
        # With a default, few errors are in the list themselves.
        told = [outcome for outcome in results.failed if not outcome.is_excused]
        if told:
            warning = FailedItemsWarning(
                f"{self.plan.name}: {len(told)} of {len(results)} items failed: "
                f"{class_counts(outcome.error for outcome in told if outcome.error is not None)}; "
                f"the first was item {min(outcome.index for outcome in told)}",
                results,
            )
            warnings.warn(warning, stacklevel=level_of_the_user())
        return results

    def _single_arguments(self, item: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*item, *args) if self._is_starred else (item, *args)


class SyncMap(_Map[T, P, R, L]):
    """A ``def`` function as a map, which may be a method; made by `opero.opmap`."""

    __wrapped__: Callable[Concatenate[T, P], R]

    def __call__(self, items: Iterable[T], /, *args: P.args, **kwargs: P.kwargs) -> L:
        """Call the function with each item, and these arguments, and return all results.

        A failed item is its exception in the list, or with ``return_exceptions=False`` raises it and stops the map.
        """
        if isinstance(items, type) and self._is_classmethod_of(items):
            return self._bound_to(items)(*args, **kwargs)  # type: ignore[arg-type]  # the items are among args
        sink = ListSink(ordered=self.settings.ordered)
        with Shortened():
            for _ in self._outcomes(items, args, kwargs, sink):
                pass  # a ListSink hands nothing out
            results: L = self._list_of(sink)
        return results

    def run(self, items: Iterable[T], /, *args: P.args, **kwargs: P.kwargs) -> L:
        """The same as calling the map; scripts can treat ``def`` and ``async def`` alike."""
        with Shortened():
            return self(items, *args, **kwargs)

    def stream(self, items: Iterable[T], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[Outcome[T, R]]:
        """Yield the `Outcome` of each item as it ends, in input order unless ``ordered=False``; may be closed early."""
        outcomes: Iterator[Outcome[T, R]] = self._outcomes(
            items, args, kwargs, StreamSink(ordered=self.settings.ordered)
        )
        return outcomes

    def one(self, item: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function with one item, under the same policies."""
        with Shortened():
            if self.plan.attempt_timeout is None and self.settings.batch_size is None:
                result: R = self.single(*self._single_arguments(item, args), **kwargs)
            else:
                result = self._for_one_item()([item], *args, **kwargs)[0]
        return result

    @property
    def starmap(self) -> SyncMap[tuple[Any, ...], ..., R, L]:
        """The same map over tuples, each of which is the positional arguments of one call.

        ``fn.starmap(zip(names, sizes))`` calls ``fn(name, size)`` for each pair; keyword arguments go to every call.
        ``fn.starmap.stream(…)``, ``.run(…)`` and ``.one(…)`` take tuples in the same way. An item that is no tuple
        (list, or other iterable but text) ends the map with a TypeError.
        """
        starred: SyncMap[tuple[Any, ...], ..., R, L] = self._starred()
        return starred

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self: _Method[S, Item, Q, R, L], instance: S, owner: type | None = None) -> SyncMap[Item, Q, R, L]: ...
    @overload  # mypy binds what the property ``starmap`` gives, too
    def __get__(self, instance: object, owner: type | None = None) -> Self: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self._bound_to(instance)


class AsyncMap(_Map[T, P, R, L]):
    """An ``async def`` function as a map, which may be a method; made by `opero.opmap`."""

    __wrapped__: Callable[Concatenate[T, P], Coroutine[Any, Any, R]]

    async def __call__(self, items: Iterable[T] | AsyncIterable[T], /, *args: P.args, **kwargs: P.kwargs) -> L:
        """Call the function with each item, and these arguments, and return all results.

        A failed item is its exception in the list, or with ``return_exceptions=False`` raises it and stops the map.
        """
        if isinstance(items, type) and self._is_classmethod_of(items):
            return await self._bound_to(items)(*args, **kwargs)  # type: ignore[arg-type]  # the items are among args
        sink = ListSink(ordered=self.settings.ordered)
        with Shortened():
            async for _ in self._outcomes(items, args, kwargs, sink):
                pass  # a ListSink hands nothing out
            results: L = self._list_of(sink)
        return results

    def run(self, items: Iterable[T] | AsyncIterable[T], /, *args: P.args, **kwargs: P.kwargs) -> L:
        """The blocking form, for scripts; inside a running event loop write ``await`` instead."""
        if is_in_asyncio():
            msg = f"{self.plan.name}.run blocks, but this thread has a running event loop; write await in place of .run"
            raise RuntimeError(msg)
        import asyncio

        try:
            with Shortened():
                return asyncio.run(self(items, *args, **kwargs))
        except KeyboardInterrupt as interrupt:
            # asyncio raises it while it handles the cancellation, whose notes tell how much was done.
            for note in getattr(interrupt.__context__, "__notes__", ()):
                add_note(interrupt, note)
            interrupt.__context__ = None
            raise

    def stream(
        self, items: Iterable[T] | AsyncIterable[T], /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncIterator[Outcome[T, R]]:
        """Yield the `Outcome` of each item as it ends, in input order unless ``ordered=False``; may be closed early."""
        outcomes: AsyncIterator[Outcome[T, R]]
        outcomes = self._outcomes(items, args, kwargs, StreamSink(ordered=self.settings.ordered))
        return outcomes

    async def one(self, item: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function with one item, under the same policies, in this event loop."""
        with Shortened():
            if self.settings.batch_size is None:
                result: R = await self.single(*self._single_arguments(item, args), **kwargs)
            else:
                result = (await self._for_one_item()([item], *args, **kwargs))[0]
        return result

    @property
    def starmap(self) -> AsyncMap[tuple[Any, ...], ..., R, L]:
        """The same map over tuples, each of which is the positional arguments of one call.

        ``await fn.starmap(zip(names, sizes))`` awaits ``fn(name, size)`` for each pair; keyword arguments go to every
        call. ``fn.starmap.stream(…)``, ``.run(…)`` and ``.one(…)`` take tuples in the same way. An item that is no
        tuple (list, or other iterable but text) ends the map with a TypeError.
        """
        starred: AsyncMap[tuple[Any, ...], ..., R, L] = self._starred()
        return starred

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self: _Method[S, Item, Q, R, L], instance: S, owner: type | None = None) -> AsyncMap[Item, Q, R, L]: ...
    @overload  # mypy binds what the property ``starmap`` gives, too
    def __get__(self, instance: object, owner: type | None = None) -> Self: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self._bound_to(instance)


# Type checkers see that they have to be given; Python would name these methods, and not the function.
for _method in (SyncMap.__call__, SyncMap.run, SyncMap.stream, AsyncMap.__call__, AsyncMap.run, AsyncMap.stream):
    _method.__defaults__ = (MISSING,)


def level_of_the_user() -> int:
    """How many frames above the caller of this function the program's own code is."""
    modules = _modules_of_callers()
    return next((level for level, name in enumerate(modules) if name.partition(".")[0] not in {"opero", "asyncio"}), 1)


def _modules_of_callers() -> list[str]:
    """The names of the modules of those who wait for the caller of this function to return, the caller first."""
    frames = traceback.walk_stack(sys._getframe(1))  # noqa: SLF001 - as `inspect.currentframe` does
    return [str(frame.f_globals.get("__name__", "")) for frame, _ in frames]


def make_map(plan: Plan, settings: MapSettings, recipe: Recipe) -> Any:
    """Make the map object for a plan; ``recipe`` makes it again from the bare function, in another process."""
    kind = AsyncMap if plan.is_async else SyncMap
    made: Any = kind(plan, settings, decorated(plan, recipe))
    for name in ("__module__", "__name__", "__qualname__", "__doc__", "__wrapped__", "__opero__"):
        made.__dict__[name] = getattr(made.single, name)
    if plan.is_async:
        # As `unittest.mock.AsyncMock` marks itself: calling it gives a coroutine.
        made.__dict__["_is_coroutine"] = True
    # What others have attached to the function, such as `abc.abstractmethod`.
    if inspect.isfunction(plan.function):
        made.__dict__.update({k: v for k, v in vars(plan.function).items() if not hasattr(made, k)})
    return made


def _made_again(factory: Callable[..., Any], options: dict[str, Any], function: Callable[..., Any]) -> Any:
    return factory(**options)(function)
