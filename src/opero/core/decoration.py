"""What stands behind one decorated function: its plan, and the ways from the wrapper to the function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

from opero.core.clock import clock
from opero.core.control import Control, changed_options, with_shared_policies
from opero.core.flow import call_flow
from opero.core.listeners import is_listened_to, switches
from opero.core.plan import Call, Plan
from opero.core.signature import MISSING, check_decoratable, first_parameter, innermost, refuse_unfinished
from opero.core.steps import Failed, drive, drive_async, made_an_error_of_its_cancellation
from opero.core.wrapper import wrap
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")

Recipe = tuple["Callable[..., Any]", dict[str, Any]]  # a function that makes a decorator, and its options


class Decoration:
    """What a wrapper holds.

    The first call looks at the function's result, which may not be there yet (an awaitable, a generator); only then may
    the wrapper call the function by itself.

    Attributes:
        plan: The policies.
        recipe: What makes the decorated function anew, in another process or under changed options.
        function: What is called at once where ``is_direct``.
        count: Counts such a call.
        is_direct: Whether it may be called without asking anybody.
        is_limited: Whether nobody has to be asked but the rate limit.
    """

    __slots__ = (
        "_has_looked",
        "_key_of",
        "_look_up",
        "_may_expire",
        "_take_slot",
        "clock",
        "count",
        "function",
        "is_direct",
        "is_limited",
        "new_call",
        "plan",
        "recipe",
        "switches",
    )

    def __init__(self, plan: Plan, recipe: Recipe) -> None:
        self.plan = plan
        self.recipe = recipe
        self.function = plan.function
        self.clock = clock
        self.switches = switches
        self.count = plan.stats.direct.tick
        self.new_call = Call
        self.is_direct = self.is_limited = self._has_looked = False
        self._key_of: Callable[..., Any] = _no_key
        self._look_up: Callable[[Any], tuple[Any, float] | None] | None = None
        self._may_expire = False
        if plan.cache is not None:
            self._key_of, self._look_up = plan.cache.keys.key_of, plan.cache.look_up
            self._may_expire = plan.cache.entries_may_expire
        self._take_slot = None if plan.limit is None else plan.limit.take_now

    def may_start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Take a free slot of the rate limit, if there is one now."""
        if self._take_slot is None or switches.are_on:
            return False
        try:
            return self._take_slot(args, kwargs)
        except Exception:  # noqa: BLE001 - the flow asks again, and counts a value that has no limit as a call that failed
            return False

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of a ``def`` function, or the beginning of a generator."""
        if switches.is_disabled:
            args, kwargs = self._with_first_candidate(args, kwargs)
            return self._run(*args, **kwargs)
        begun = self._begin(args, kwargs)
        return begun[0] if begun.__class__ is tuple else drive(begun, self.function if self._has_looked else self._run)

    async def call_async(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same for ``async def``."""
        if switches.is_disabled:
            args, kwargs = self._with_first_candidate(args, kwargs)
            return await self._run(*args, **kwargs)
        begun = self._begin(args, kwargs)
        if begun.__class__ is tuple:
            return begun[0]
        return await drive_async(begun, self.function if self._has_looked else self._run, self.plan.name)

    def go_on(self, call: Call) -> Any:
        """The rest of a call whose first attempt was made by the wrapper, and failed."""
        call.blocks = True
        return drive(call_flow(self.plan, call), self.function if self._has_looked else self._run)

    async def go_on_async(self, call: Call) -> Any:
        """The same for ``async def``."""
        call.is_last = call.failure is not None and made_an_error_of_its_cancellation(call.failure)
        function = self.function if self._has_looked else self._run
        return await drive_async(call_flow(self.plan, call), function, self.plan.name)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The cache's entry, a tuple that begins with the result, or the flow of the call."""
        key: Any = MISSING
        if self._look_up is not None and not is_listened_to(self.plan):
            try:
                key = self._key_of(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - the call fails with it, and is counted
                key = Failed(error)
            else:
                entry = self._look_up(key)
                if entry is not None and not (self._may_expire and entry[1] <= clock.now()):
                    self.plan.stats.hits.tick()
                    return entry
        try:
            return call_flow(self.plan, Call(args, kwargs, key=key, blocks=not self.plan.is_async))
        finally:
            # It may hold the error that has this frame in its traceback.
            del key

    def _with_first_candidate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        fallback = self.plan.fallback
        if fallback is None:
            return args, kwargs
        call = Call(args, kwargs)
        return fallback.arguments(call, fallback.values(call)[0])

    @property
    def _run(self) -> Callable[..., Any]:
        """What an attempt calls until a result was looked at; of a generator function always its first item."""
        kinds = {
            "generator": self._first_item,
            "async generator": self._first_item_async,
            "async def": self._look_async,
        }
        return kinds.get(self.plan.kind, self._look)

    def _look(self, /, *args: Any, **kwargs: Any) -> Any:
        result = self.function(*args, **kwargs)
        refuse_unfinished(self.function, result, is_cached=self.plan.cache is not None)
        self._looked()
        return result

    async def _look_async(self, /, *args: Any, **kwargs: Any) -> Any:
        result = await self.function(*args, **kwargs)
        if self.plan.cache is not None:
            refuse_unfinished(self.function, result, is_cached=True)
        self._looked()
        return result

    def _looked(self) -> None:
        plan = self.plan
        self._has_looked = True
        at_once = plan.cache is None and plan.first_attempt_is_direct
        self.is_direct = at_once and plan.limit is None
        self.is_limited = at_once and plan.limit is not None

    def _first_item(self, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """A generator that has begun, and its first item; None and its result if it has ended without one."""
        generator = self.function(*args, **kwargs)
        try:
            return generator, next(generator)
        except StopIteration as end:
            return None, end.value

    async def _first_item_async(self, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        generator = self.function(*args, **kwargs)
        try:
            return generator, await anext(generator)
        except StopAsyncIteration:
            return None, None

    def under(self, options: dict[str, Any]) -> Any:
        """The function under changed options."""
        factory, given = self.recipe
        changed = changed_options(given, options)
        made: Any = factory(**changed)(self.function)
        plan = with_shared_policies(made.__opero__.plan, self.plan, set(options))
        return made.with_plan(plan) if hasattr(made, "with_plan") else decorated(plan, (factory, changed))

    def __reduce__(self) -> Any:
        return _decoration_made_by, (*self.recipe, self.function)


def _no_key(*_args: Any, **_kwargs: Any) -> Any:
    """Without a cache."""


def _decoration_made_by(factory: Callable[..., Any], options: dict[str, Any], function: Callable[..., Any]) -> Any:
    return factory(**options)(function).__opero__


def decorated(plan: Plan, recipe: Recipe) -> Callable[..., Any]:
    """The function that the user gets; ``recipe`` makes it again from the bare one."""
    decoration = Decoration(plan, recipe)
    made = wrap(decoration)
    like: Any = innermost(plan.function)
    if like is not plan.function:
        made.__name__, made.__qualname__ = plan.name.rpartition(".")[2], plan.name
        made.__module__, made.__doc__ = getattr(like, "__module__", ""), getattr(like, "__doc__", None)
    # Copied from what the function wraps, it would hide what is really taken; `inspect` follows `__wrapped__`.
    made.__dict__.pop("__signature__", None)
    made.__dict__["__opero__"] = decoration
    _attach(made, decoration)
    return made


def _attach(made: Any, decoration: Decoration) -> None:
    """What is known from `functools`, on the function itself."""
    its: Control[..., Any] = Control(decoration)
    made.stats, made.with_options = its.stats, its.with_options
    if decoration.plan.cache is not None:
        # On others they would hide those of `functools.lru_cache` above.
        made.cache_info, made.cache_clear = its.cache_info, its.cache_clear
        is_method = first_parameter(decoration.function) in {"self", "cls"}
        made.cache_delete = _NeedsInstance("cache_delete", decoration) if is_method else its.cache_delete


class _NeedsInstance:
    """In place of what takes the arguments of a call, where these begin with an instance that Python does not pass."""

    def __init__(self, name: str, decoration: Decoration) -> None:
        self._name = name
        self._decoration = decoration

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        name = self._decoration.plan.name
        method = name.rpartition(".")[2]
        msg = (
            f"{name}.{self._name}(…) does not know the instance of the method; "
            f"write opero.control(instance.{method}).{self._name}(…)"
        )
        raise MisuseError(msg)


def decorator(name: str, make_plan: Callable[[Callable[..., Any]], Plan], recipe: Recipe) -> Callable[[F], F]:
    """A decorator, called ``name`` in its errors, that plans each function by ``make_plan``."""

    def decorate(function: F) -> F:
        check_decoratable(function, name)
        return cast("F", decorated(make_plan(function), recipe))

    return decorate
