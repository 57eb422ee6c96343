"""What stands behind one decorated function: its plan, and the ways from the wrapper to the function."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

from opero.core.clock import clock
from opero.core.control import Control, changed_options, with_shared_policies
from opero.core.flow import call_flow
from opero.core.plan import Call, Plan
from opero.core.signature import MISSING, check_decoratable, innermost, refuse_unfinished
from opero.core.steps import (
    NOT_RUN,
    Attempt,
    Failed,
    drive,
    drive_async,
    leading,
    made_an_error_of_its_cancellation,
    run_attempt_async,
)
from opero.core.wrapper import wrap
from opero.events import AttemptStarted, CircuitChanged, begin_telling, switches, tell_of_the_end
from opero.utils.notes import Shortened, shorten

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from opero.core.breaker import Passage
    from opero.core.limits.places import Places
    from opero.core.steps import Flow

F = TypeVar("F", bound="Callable[..., Any]")

Recipe = tuple["Callable[..., Any]", dict[str, Any]]  # a function that makes a decorator, and its options


class Decoration:
    """What a wrapper holds: the plan, and the ways from the wrapper to the function.

    The first call goes through the flow, which looks at the function's result: that may not be there yet (an awaitable,
    a generator). From then on the first attempt of a call is made without a flow where that is possible.

    Attributes:
        plan: The policies.
        recipe: What makes the decorated function anew, in another process or under changed options.
        function: What is called at once where ``is_direct``.
        count: Counts such a call.
        fetch: Gives the cache's entry of a key, by awaiting; None where that is no use.
        find: Gives the cache's entry, a tuple that begins with the result, if that is quick; else None.
        is_quick: Whether no more has to be done before a first attempt than `_first` does.
        is_direct: Whether nothing has to be done.
    """

    def __init__(self, plan: Plan, recipe: Recipe) -> None:
        cache, limit = plan.cache, plan.limit
        self.plan = plan
        self.recipe = recipe
        self.function = plan.function
        self.clock = clock
        self.switches = switches
        self.count = plan.stats.direct.tick
        self.new_call = Call
        self.is_direct = self.is_quick = False
        # The cache looks at all results.
        self._has_looked = cache is not None
        limits = [(plan.attempt_timeout, "attempt_timeout"), (plan.total_timeout, "total_timeout")]
        self._seconds: float | None
        self._seconds, self._limit = min(((s, name) for s, name in limits if s is not None), default=(None, ""))
        self._take_slot = None if limit is None else limit.take_now
        # Whether a slot would come too late to be of use is told by how long the function takes.
        self._learn = None if limit is None or plan.total_timeout is None else limit.usual.learn
        # Whether anybody else than listeners hears how a first attempt ended.
        self._follows = any(each is not None for each in (plan.breaker, plan.places, self._learn))
        self._key_of: Callable[..., Any] = _nothing
        self._look_up: Callable[[Any], tuple[Any, float] | None] | None = None
        self._may_expire = False
        self.fetch: Callable[[Any], Awaitable[tuple[Any, float] | None]] | None = None
        self.find: Callable[..., tuple[Any, float] | None] = _nothing
        if cache is not None:
            self._key_of, self._look_up, self.fetch = cache.keys.key_of, cache.look_up, cache.fetch
            self._may_expire = cache.entries_may_expire
            cache.stats = plan.stats
            if self._look_up is not None and plan.on_event is None:
                self.find = cache.finder(plan.stats.hits.tick, clock if self._may_expire else None) or _nothing

    drive = staticmethod(drive)
    shorten = staticmethod(shorten)
    drive_async = staticmethod(drive_async)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of a ``def`` function, or the beginning of a generator."""
        if switches.is_disabled:
            args, kwargs = self._with_first_candidate(args, kwargs)
            return self.attempted(*args, **kwargs)
        first = self._first(args, kwargs) if self.is_quick else None
        if first is None:
            begun = self.begin(args, kwargs)
            return begun[0] if begun.__class__ is tuple else drive(begun, self.attempted)
        first_args, first_kwargs, passage, places, told = first
        started = clock.now()
        outcome: Any = NOT_RUN
        token = None
        if places is not None:
            others = leading.get()
            token = leading.set(others | places.badges if others else places.badges)
        try:
            outcome = self.function(*first_args, **first_kwargs)
        except Exception as error:  # noqa: BLE001 - the flow decides what becomes of it
            outcome = Failed(error)
        finally:
            if token is not None:
                leading.reset(token)
            if self._follows or told is not None:
                self._first_is_over(passage, places, told, outcome, started)
        if outcome.__class__ is not Failed:
            return outcome
        call = told or Call(args, kwargs, started=started)
        call.failure = outcome.error
        del outcome
        return self.go_on(call)

    async def call_async(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same for ``async def``."""
        if switches.is_disabled:
            args, kwargs = self._with_first_candidate(args, kwargs)
            return await self.attempted(*args, **kwargs)
        first = self._first(args, kwargs) if self.is_quick else None
        if first is None:
            begun = self.begin(args, kwargs)
            if begun.__class__ is tuple:
                return begun[0]
            return await drive_async(begun, self.attempted, self.plan.name)
        first_args, first_kwargs, passage, places, told = first
        started = clock.now()
        outcome: Any = NOT_RUN
        try:
            if self._seconds is None and places is None:
                try:
                    outcome = await self.function(*first_args, **first_kwargs)
                except Exception as error:  # noqa: BLE001 - as above
                    outcome = Failed(error)
            else:
                badges = frozenset() if places is None else places.badges
                attempt = Attempt(first_args, first_kwargs, MISSING, badges, timeout=self._seconds, limit=self._limit)
                outcome = await run_attempt_async(self.function, attempt, self.plan.name)
        finally:
            if self._follows or told is not None:
                self._first_is_over(passage, places, told, outcome, started)
        if outcome.__class__ is not Failed:
            return outcome
        call = told or Call(args, kwargs, started=started)
        call.failure = outcome.error
        del outcome
        return await self.go_on_async(call)

    def _first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a first attempt that may be made now is made with; None where the flow has to decide.

        That is its arguments, its passage through the circuit, the places of which it has one, and the call if somebody
        is told of it.
        """
        plan, passage, places = self.plan, None, None
        is_told = switches.are_on or plan.on_event is not None
        call_args, call_kwargs = args, kwargs
        try:
            first = (args, kwargs, MISSING) if plan.fallback is None else plan.fallback.first(args, kwargs)
            is_ready = first is not None
            if first is not None:
                args, kwargs, value = first
                if plan.breaker is not None:
                    per = plan.breaker.per
                    passage = plan.breaker.shared.enter(value if per is None else per.get(args, kwargs))
                    is_ready = passage is not None
                if is_ready and plan.places is not None:
                    places = plan.places.take_now(args, kwargs)
                    is_ready = places is not None
                if is_ready and plan.limit is not None:
                    is_ready = self._take_slot is not None and self._take_slot(args, kwargs)
        except Exception:  # noqa: BLE001 - the flow asks again, and counts a value that is refused as a call that failed
            is_ready = False
        if is_ready:
            self.count()
            return args, kwargs, passage, places, self._told(call_args, call_kwargs) if is_told else None
        if passage is not None:
            passage.end()
        if places is not None:
            places.give_back()
        return None

    def _told(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call of which listeners are told, up to the beginning of its first attempt."""
        call = Call(args, kwargs)
        begin_telling(self.plan, call)
        call.attempts = call.rounds = 1
        call.began = clock.now()
        if call.tell is not None:
            call.tell(AttemptStarted, attempt=1, round=1)
        return call

    def _first_is_over(
        self, passage: Passage | None, places: Places | None, told: Call | None, outcome: Any, started: float
    ) -> None:
        """How a first attempt has ended: ``NOT_RUN`` if Ctrl-C or the like ended it."""
        if places is not None:
            places.give_back()
        if passage is not None:
            if outcome.__class__ is Failed:
                # The flow goes on with it, and tells.
                passage.is_over = True
            elif outcome is NOT_RUN:
                passage.end()
            else:
                changed = passage.tell(failed=False)
                if changed is not None and told is not None and told.tell is not None:
                    told.tell(CircuitChanged, state=changed, place=None if self.plan.fallback is None else 0)
        if self._learn is not None and outcome is not NOT_RUN:
            self._learn(clock.now() - started)
        if told is not None and outcome.__class__ is not Failed:
            tell_of_the_end(told, cancelled=outcome is NOT_RUN)

    def go_on(self, call: Call) -> Any:
        """The rest of a call whose first attempt was made without a flow, and failed."""
        call.blocks = True
        return drive(call_flow(self.plan, call), self.function)

    async def go_on_async(self, call: Call) -> Any:
        """The same for ``async def``."""
        call.is_last = call.failure is not None and made_an_error_of_its_cancellation(call.failure)
        return await drive_async(call_flow(self.plan, call), self.function, self.plan.name)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The cache's entry, a tuple that begins with the result, or the flow of the call."""
        key = MISSING
        try:
            if self._look_up is not None and not self.plan.is_listened_to:
                key = self._key(args, kwargs)
                entry = None if key.__class__ is Failed else self._look_up(key)
                if entry is not None and not (self._may_expire and entry[1] <= clock.now()):
                    self.plan.stats.hits.tick()
                    return entry
            return self._flow(args, kwargs, key)
        finally:
            # It may hold an error, whose traceback leads to this frame.
            del key

    async def begin_async(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `begin`, where the cache can be asked in the event loop."""
        if self.fetch is None or self.plan.is_listened_to:
            return self.begin(args, kwargs)
        key = self._key(args, kwargs)
        try:
            entry = None if key.__class__ is Failed else await self.fetch(key)
            if entry is not None:
                self.plan.stats.hits.tick()
                return entry
            return self._flow(args, kwargs, key)
        finally:
            del key

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._key_of(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the call fails with it, and is counted
            return Failed(error)

    def _flow(self, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any) -> Flow:
        call = Call(args, kwargs)
        call.key, call.blocks = key, not self.plan.is_async
        return call_flow(self.plan, call)

    def refresh(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function whatever the cache has; of an ``async def`` one, a coroutine that does."""
        call = Call(args, kwargs)
        call.blocks, call.refreshes = not self.plan.is_async, True
        flow = call_flow(self.plan, call)
        return drive_async(flow, self.function, self.plan.name) if self.plan.is_async else drive(flow, self.function)

    def _with_first_candidate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        fallback = self.plan.fallback
        if fallback is None:
            return args, kwargs
        call = Call(args, kwargs)
        return fallback.arguments(call, fallback.values(call)[0])

    @property
    def attempted(self) -> Callable[..., Any]:
        """What an attempt calls: of a generator function its beginning; else, once it was looked at, the function."""
        if self._has_looked:
            return self.function
        kinds = {
            "generator": self._first_item,
            "async generator": self._first_item_async,
            "async def": self._await,
        }
        return kinds.get(self.plan.kind, self._look)

    def _look(self, /, *args: Any, **kwargs: Any) -> Any:
        result = self.function(*args, **kwargs)
        refuse_unfinished(self.function, result, is_cached=False)
        self._looked()
        return result

    async def _await(self, /, *args: Any, **kwargs: Any) -> Any:
        result = await self.function(*args, **kwargs)
        self._looked()
        return result

    def _looked(self) -> None:
        """From now on, let first attempts be made without a flow where no policy needs one."""
        self._has_looked = True
        # A `def` function cannot be stopped: its time limit ends what comes after the first attempt.
        is_timed = self.plan.is_async and self._seconds is not None
        self.is_quick = not self.plan.needs_flow
        self.is_direct = not is_timed and not self.plan.asks_first

    def _first_item(self, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """A generator that has begun, and its first item; None and its result if it has ended without one."""
        generator = self.function(*args, **kwargs)
        try:
            return generator, next(generator)
        except StopIteration as end:
            return None, end.value

    async def _first_item_async(self, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        generator = self.function(*args, **kwargs)
        # The event loop closes all generators that it knows: it is to know the wrapper's only, which closes this one.
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(None, None)
        try:
            first = generator.__anext__()
        finally:
            sys.set_asyncgen_hooks(*hooks)
        try:
            return generator, await first
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


def _nothing(*_args: Any, **_kwargs: Any) -> Any:
    """Stand for what only a cache has."""


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
    # Here, since `import opero` does not need it.
    from opero.core.parameters import first_parameter

    first = first_parameter(decoration.function)
    its: Control[..., Any] = Control(decoration, missing=first if first in {"self", "cls"} else None)
    made.stats, made.with_options = its.stats, its.with_options
    if decoration.plan.cache is not None:
        # On others they would hide those of `functools.lru_cache` above.
        made.cache_info, made.cache_clear = its.cache_info, its.cache_clear
        made.cache_delete, made.cache_refresh = its.cache_delete, its.cache_refresh


def decorator(name: str, make_plan: Callable[[Callable[..., Any]], Plan], recipe: Recipe) -> Callable[[F], F]:
    """A decorator, called ``name`` in its errors, that plans each function by ``make_plan``."""

    def decorate(function: F) -> F:
        with Shortened():
            check_decoratable(function, name)
            return cast("F", decorated(make_plan(function), recipe))

    return decorate
