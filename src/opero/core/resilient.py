"""From a plan to a callable: the wrapper with the function's own signature, and what is attached to it.

The wrapper is compiled from the signature (as `dataclasses` does it), so that a call that succeeds costs little more
than the call: one counter, one look at the clock. A wrong call raises its `TypeError` at once and is not retried.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, cast, overload

from opero.core.clock import clock
from opero.core.flow import call_flow
from opero.core.plan import CacheInfo, Call, Plan
from opero.core.signature import (
    MISSING,
    check_decoratable,
    compile_function,
    find_by_name,
    forwarding,
    innermost,
    refuse_awaitable,
)
from opero.core.steps import Failed, drive, drive_async
from opero.core.switches import switches

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from opero.core.signature import Forwarding
    from opero.core.stats import CallStats

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")

if TYPE_CHECKING:

    class _Callable(Generic[P, R]):
        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

else:
    # `functools.partial` calls from C, is seen through by `inspect.iscoroutinefunction`, and its subclasses may have
    # properties and methods: all that a plain function cannot give at once.
    class _Callable(functools.partial):
        def __class_getitem__(cls, _item: Any) -> type:
            return cls


S_contra = TypeVar("S_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class _Method(Protocol[S_contra, Q, R_co]):
    """A function whose first parameter is the instance; for type checkers."""

    @property
    def _types(self) -> Callable[Concatenate[S_contra, Q], R_co]: ...


class OperoFunction(_Callable[P, R]):
    """A function made resilient by `opero.opero`; called like the function itself.

    Attributes:
        __wrapped__: The function as it was.
    """

    __wrapped__: Callable[P, R]
    plan: Plan

    @property
    def stats(self) -> CallStats:
        """A snapshot of what this function has done so far."""
        return self.plan.stats.snapshot()

    def cache_info(self) -> CacheInfo:
        """Hits, misses, largest and current number of entries; zeros without a cache."""
        cache = self.plan.cache
        return CacheInfo(0, 0, 0, 0) if cache is None else cache.info(self.stats)

    def cache_clear(self) -> None:
        """Forget all results; one that is being computed now is returned to its callers but not kept."""
        if self.plan.cache is not None:
            self.plan.cache.clear()

    def cache_delete(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Forget the result for these arguments; tells whether there was one."""
        cache = self.plan.cache
        return cache is not None and cache.delete(cache.keys.key_of(*args, **kwargs))

    if TYPE_CHECKING:

        @property
        def _types(self) -> Callable[P, R]: ...

    @overload  # below @classmethod
    def __get__(
        self: _Method[type[S], Q, R], instance: S | None, owner: type[S] | None = None
    ) -> BoundOperoFunction[Q, R]: ...
    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self: _Method[S, Q, R], instance: S, owner: type | None = None) -> BoundOperoFunction[Q, R]: ...
    @overload  # below @staticmethod
    def __get__(self, instance: object, owner: type | None = None) -> Self: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        bound = cast("Any", BoundOperoFunction)(self, instance)
        # A class has these two itself; the others are found by `__getattr__`.
        bound.__doc__, bound.__module__ = self.__doc__, self.__module__
        return bound

    def __set_name__(self, owner: type, name: str) -> None:
        if self.plan.cache is not None:
            self.plan.cache.keys.belongs_to_method()

    def __reduce__(self) -> Any:
        return reduce_decorated(self)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __repr__(self) -> str:
        return f"<opero {self.plan.name}>"


class BoundOperoFunction(_Callable[P, R]):
    """An `OperoFunction` as the method of one instance."""

    if TYPE_CHECKING:
        stats: CallStats

        def cache_info(self) -> CacheInfo: ...
        def cache_clear(self) -> None: ...

    @property
    def __self__(self) -> object:
        instance: object = _bound(self)[1]
        return instance

    @property
    def __func__(self) -> OperoFunction[..., Any]:
        return _bound(self)[0]

    @property
    def __wrapped__(self) -> Callable[P, R]:
        function, instance = _bound(self)
        method: Callable[P, R] = function.__wrapped__.__get__(instance)
        return method

    def cache_delete(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Forget the result for this instance and these arguments; tells whether there was one."""
        function, instance = _bound(self)
        return function.cache_delete(instance, *args, **kwargs)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BoundOperoFunction):
            return NotImplemented
        (function, instance), (others_function, others_instance) = _bound(self), _bound(other)
        return function is others_function and instance is others_instance

    def __hash__(self) -> int:
        function, instance = _bound(self)
        return hash((id(function), id(instance)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in _NAMES:
            raise AttributeError(name)
        return getattr(_bound(self)[0], name)

    def __repr__(self) -> str:
        function, instance = _bound(self)
        owner = instance if isinstance(instance, type) else type(instance)
        return f"<opero {function.plan.name} of {owner.__qualname__}>"


_NAMES = ("__name__", "__qualname__")


def _bound(method: Any) -> tuple[OperoFunction[..., Any], Any]:
    return method.func, method.args[0]


Recipe = tuple["Callable[..., Any]", dict[str, Any]]  # a function that makes a decorator, and its options


def redecorate(factory: Callable[..., Any], options: dict[str, Any], function: Callable[..., Any]) -> Any:
    """Follow a `Recipe`, in another process."""
    return factory(**options)(function)


def reduce_decorated(decorated: Any) -> Any:
    """Pickle by name where the name leads back to the object, else by what it was made of.

    What the main module has is known to other processes if those of multiprocessing are meant, and not if somebody
    pickles functions by value.
    """
    found = find_by_name(decorated.__module__, decorated.__qualname__)
    if found is decorated and not (decorated.__module__ == "__main__" and _is_pickled_by_value()):
        return decorated.__qualname__
    return redecorate, (*decorated.__dict__["recipe"], decorated.__wrapped__)


def _is_pickled_by_value() -> bool:
    """Whether a pickler is at work here that sends functions by value: pickle does not tell who asks."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 - as `inspect.currentframe` does
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).split(".")
        if "cloudpickle" in package or "dill" in package:
            return True
        frame = frame.f_back
    return False


def make_resilient(plan: Plan, recipe: Recipe) -> OperoFunction[..., Any]:
    """Build the callable for a plan; ``recipe`` makes it again from the bare function, in another process."""
    make: Any = OperoFunction
    wrapper = _Wrapper(plan)
    resilient: OperoFunction[..., Any] = make(wrapper.call)
    functools.update_wrapper(resilient, plan.function)
    # Copied from what ``plan.function`` wraps, it would hide what is really taken.
    resilient.__dict__.pop("__signature__", None)
    if not hasattr(plan.function, "__qualname__"):
        like = innermost(plan.function)
        resilient.__dict__.update(
            __name__=plan.name.rpartition(".")[2],
            __qualname__=plan.name,
            __module__=getattr(like, "__module__", None),
            __doc__=getattr(like, "__doc__", None),
        )
    resilient.__dict__.update(plan=plan, recipe=recipe, wrapper=wrapper)
    return resilient


_DIRECT = """
{define} call({parameters}):
    {guard}_opero_count()
    _opero_started = _opero_clock.now()
    try:
        return {await_}_opero_function({forwarded})
    except _opero_Exception as _opero_error:
        _opero_failure = _opero_error
    try:
        return {await_}_opero_recover(_opero_failure, _opero_started, {packed})
    finally:
        del _opero_failure
"""

_GUARD = """if not _opero_take_slot({limited_by}):
        return {await_}_opero_enter({packed})
    """

_GUARD_OF_VALUE = """try:
        _opero_may_start = _opero_take_slot({limited_by})
    except _opero_Exception:
        # The flow asks again, and counts a value that has no limit as a call that failed.
        _opero_may_start = False
    if not _opero_may_start:
        return {await_}_opero_enter({packed})
    """

_BY_FLOW = """
{define} call({parameters}):
    return {await_}_opero_enter({packed})
"""

_CACHED = """
{define} call({parameters}):
    try:
        _opero_key = {key}
    except _opero_Exception as _opero_error:
        _opero_failure = _opero_error
    else:
        _opero_entry = _opero_look_up(_opero_key)
        if _opero_entry is not None{in_time}:
            _opero_count_hit()
            return _opero_entry[0]
        return {await_}_opero_enter({packed}, _opero_key)
    try:
        return {await_}_opero_enter({packed}, _opero_Failed(_opero_failure))
    finally:
        del _opero_failure
"""


_BARE = """
{define} call({parameters}):
    return {await_}_opero_bare({forwarded})
"""


class _Wrapper:
    """The compiled function, and its bodies for the ways of `opero.core.switches`."""

    def __init__(self, plan: Plan) -> None:
        shape = forwarding(plan.function)
        self._name = plan.name
        self._words = {
            "define": "async def" if plan.is_async else "def",
            "await_": "await " if plan.is_async else "",
            "parameters": shape.parameters,
            "forwarded": shape.call,
            "packed": shape.packed,
        }
        entrances = _AsyncEntrances(plan) if plan.is_async else _Entrances(plan)
        self._namespace: dict[str, Any] = {
            **shape.defaults,
            "_opero_clock": clock,
            "_opero_Exception": Exception,  # a parameter may be named like the builtin
            "_opero_bare": plan.function if plan.fallback is None else entrances.bare,
            "_opero_enter": entrances.enter,
            "_opero_recover": entrances.recover,
        }
        template = self._choose_template(plan, shape, entrances)
        self.call: Any = self._compile(template)
        # A wrong call is reported under the name that the user knows.
        self.call.__qualname__ = plan.name
        self._bodies = {"usual": self.call.__code__}
        switches.register(self)

    def go(self, way: str) -> None:
        body = self._bodies.get(way)
        if body is None:
            made: Any = self._compile(_BARE if way == "bare" else _BY_FLOW)
            self._bodies[way] = body = made.__code__
        self.call.__code__ = body

    def _choose_template(self, plan: Plan, shape: Forwarding, entrances: _Entrances | _AsyncEntrances) -> str:
        words, namespace = self._words, self._namespace
        look_up = None if plan.cache is None or plan.on_event is not None else plan.cache.look_up
        if plan.cache is not None and look_up is not None:
            words["key"] = plan.cache.keys.source
            words["in_time"] = " and _opero_entry[1] > _opero_clock.now()" if plan.cache.entries_may_expire else ""
            namespace |= plan.cache.keys.namespace
            namespace |= {"_opero_look_up": look_up, "_opero_count_hit": plan.stats.hits.tick, "_opero_Failed": Failed}
            return _CACHED
        if plan.cache is None and plan.first_attempt_is_direct and _can_be_limited(plan, shape):
            words["limited_by"] = "" if plan.limit is None else plan.limit.parameter or ""
            guard = _GUARD_OF_VALUE if words["limited_by"] else _GUARD
            words["guard"] = "" if plan.limit is None else guard.format(**words)
            namespace["_opero_function"] = entrances.function
            entrances.when_looked_at(lambda: namespace.update(_opero_function=plan.function))
            namespace["_opero_count"] = plan.stats.direct.tick
            namespace["_opero_take_slot"] = None if plan.limit is None else plan.limit.take_now
            return _DIRECT
        return _BY_FLOW

    def _compile(self, template: str) -> Any:
        return compile_function(template.format(**self._words), "call", self._namespace)


def _can_be_limited(plan: Plan, shape: Forwarding) -> bool:
    """Whether the wrapper has the parameter whose values have limits of their own."""
    return plan.limit is None or plan.limit.parameter is None or plan.limit.parameter in shape.named


class _Entrances:
    """The ways from a wrapper to a plain function and into the flow.

    The function's first result is looked at, then the bare function takes the place of the looking one. Nothing here
    refers to the wrapper after that, so that no garbage collector is needed to free the two.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._looked_at: Callable[[], None] | None = None
        self._has_looked = False

    def when_looked_at(self, act: Callable[[], None]) -> None:
        self._looked_at = act

    def function(self, /, *args: Any, **kwargs: Any) -> Any:
        result = self._plan.function(*args, **kwargs)
        refuse_awaitable(self._plan.function, result)
        self._has_looked = True
        if self._looked_at is not None:
            self._looked_at()
            self._looked_at = None
        return result

    def bare(self, /, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _with_first_candidate(self._plan, args, kwargs)
        return self._plan.function(*args, **kwargs)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any = MISSING) -> Any:
        function = self._plan.function if self._has_looked else self.function
        flow = call_flow(self._plan, Call(args, kwargs, key=key, blocks=True))
        # It may hold the error that this frame will be in the traceback of.
        del key
        return drive(flow, function)

    def recover(self, error: Exception, started: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = self._plan.function if self._has_looked else self.function
        flow = call_flow(self._plan, Call(args, kwargs, started=started, attempts=1, blocks=True), error)
        del error
        return drive(flow, function)


class _AsyncEntrances:
    """The ways from a wrapper to an async function and into the flow."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.function = plan.function

    def when_looked_at(self, act: Callable[[], None]) -> None:
        """What an async function returns is awaited; nothing has to be looked at."""

    async def bare(self, /, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _with_first_candidate(self._plan, args, kwargs)
        return await self._plan.function(*args, **kwargs)

    async def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any = MISSING) -> Any:
        plan = self._plan
        flow = call_flow(plan, Call(args, kwargs, key=key))
        del key
        return await drive_async(flow, plan.function, plan.name)

    async def recover(self, error: Exception, started: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan = self._plan
        flow = call_flow(plan, Call(args, kwargs, started=started, attempts=1), error)
        del error
        return await drive_async(flow, plan.function, plan.name)


def _with_first_candidate(
    plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if plan.fallback is None:
        return args, kwargs
    call = Call(args, kwargs)
    return plan.fallback.arguments(call, plan.fallback.values(call)[0])


def decorator(
    name: str, make_plan: Callable[[Callable[..., Any]], Plan], recipe: Recipe
) -> Callable[[Callable[P, R]], OperoFunction[P, R]]:
    """A decorator, called ``name`` in its errors, that plans each function by ``make_plan``."""

    def decorate(function: Callable[P, R]) -> OperoFunction[P, R]:
        check_decoratable(function, name)
        return cast("OperoFunction[P, R]", make_resilient(make_plan(function), recipe))

    return decorate
