"""What stands behind one decorated function, and the function that the user gets.

That is one closure for each kind of function. A closure only calls; what it calls is its `Decoration`. Its code names
nothing of this module and holds nothing but that one object: so cloudpickle, which carries a function by its code and
by what it holds, carries it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

from opero.core.clock import clock
from opero.core.control import Control, changed_options, with_shared_policies
from opero.core.flow import call_flow
from opero.core.plan import ANSWER_AT_ONCE, Call, Plan
from opero.core.signature import MISSING, check_decoratable, innermost, refuse_unfinished
from opero.core.steps import NOT_RUN, Failed, drive, drive_async, part_of, run_in_time
from opero.events import AttemptStarted, begin_telling, switches, tell_of_the_end
from opero.utils.notes import Shortened, shorten

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from opero.core.limits.places import Place
    from opero.core.steps import TimeLimit

F = TypeVar("F", bound="Callable[..., Any]")

Recipe = tuple["Callable[..., Any]", dict[str, Any]]  # a function that makes a decorator, and its options
# What a first attempt is made with: its arguments, its place, the call if somebody is told of it, and when it began.
First = tuple[tuple[Any, ...], dict[str, Any], "Place | None", "Call | None", float]
_ALONE = contextlib.nullcontext()


class Decoration:
    """What a wrapper holds: the plan, and the ways from the wrapper to the function.

    The first attempt of a call is made without a flow where all that has a say can be asked at once (`_begin`), and the
    flow begins when that has failed. Else the flow makes all attempts.

    Attributes:
        plan: The policies.
        recipe: What makes the decorated function anew, in another process or under changed options.
        function: What an attempt calls: the function itself (a ``def`` one once its first result was looked at), or
            what gives the first item of a generator function, too.
        find: Gives the entry of a call of a cached function, if it can be told at once.
        let_in: True if nothing has to be done before a first attempt; what takes a slot for a call, if one is free,
            where nothing else has to be done.
    """

    def __init__(self, plan: Plan, recipe: Recipe) -> None:
        cache, limit, asked = plan.cache, plan.limit, plan.asks_first
        self.plan = plan
        self.recipe = recipe
        self.clock = clock
        self.switches = switches
        self.count, self.count_hit = plan.stats.direct.tick, plan.stats.hits.tick
        limits = [(plan.attempt_timeout, "attempt_timeout"), (plan.total_timeout, "total_timeout")]
        self._limit: TimeLimit | None = min(((s, name) for s, name in limits if s is not None), default=None)
        # What the layers say of a first attempt.
        self._first_candidate = None if plan.fallback is None else plan.fallback.first
        self._circuits = {} if plan.breaker is None else plan.breaker.shared.circuits
        self._enter = None if plan.places is None else plan.places.enter
        self._take_slot = None if limit is None else limit.take_now
        # Whether a slot would come too late to be of use is told by how long the function takes.
        self._learn = None if limit is None or plan.total_timeout is None else limit.learn
        # Whether anybody else than listeners hears how a first attempt ended.
        self._follows = plan.breaker is not None or self._learn is not None
        self._tells = plan.on_event is not None
        attempts = {"def": self._look, "generator": self._first_item, "async generator": self._first_item_async}
        self.function: Callable[..., Any] = attempts.get(plan.kind, plan.function)
        self._is_quick = False
        self.find: Any = None
        self.let_in: Any = None
        if cache is not None:
            self.function = plan.function
            self.key_of, self.look_up = cache.keys.key_of, cache.look_up
            if plan.on_event is None:
                # A listener is told of hits by the flow.
                self.find = cache.finder(self.count_hit) or (lambda *_args, **_kwargs: None)
            cache.stats = plan.stats
        elif not plan.kind.endswith("generator"):
            self._is_quick = (limit is None or self._take_slot is not None) and asked.issubset(ANSWER_AT_ONCE)
            # A `def` function cannot be stopped: its time limit ends what comes after the first attempt.
            if not plan.is_async or self._limit is None:
                self.let_in = not asked or (asked == {"limit"} and self._learn is None and self._take_slot)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of a ``def`` function, or the beginning of a generator."""
        if switches.is_disabled:
            return self._call_bare(args, kwargs)
        first = self._begin(args, kwargs)
        if first is None:
            return drive(call_flow(self.plan, Call(args, kwargs)), self.function)
        first_args, first_kwargs, place, told, started = first
        outcome = NOT_RUN
        try:
            outcome = self.function(*first_args, **first_kwargs)
        except Exception as error:  # the flow decides what becomes of it
            outcome = Failed(error)
        finally:
            if place is not None:
                place.give_back()
            if self._follows or told is not None:
                self._end(first, outcome)
        if type(outcome) is not Failed:
            return outcome
        call = told or Call(args, kwargs, started=started)
        call.failure = outcome.error
        del outcome
        return drive(call_flow(self.plan, call), self.function)

    async def call_async(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same for ``async def``."""
        if switches.is_disabled:
            return await self._call_bare(args, kwargs)
        first = self._begin(args, kwargs)
        if first is None:
            return await drive_async(call_flow(self.plan, Call(args, kwargs)), self.function, self.plan.name)
        first_args, first_kwargs, place, told, started = first
        outcome = NOT_RUN
        try:
            outcome = await run_in_time(self.function, first_args, first_kwargs, self._limit, self.plan.name)
        finally:
            if place is not None:
                place.give_back()
            if self._follows or told is not None:
                self._end(first, outcome)
        if type(outcome) is not Failed:
            return outcome
        call = told or Call(args, kwargs, started=started)
        call.failure = outcome.error
        del outcome
        return await drive_async(call_flow(self.plan, call), self.function, self.plan.name)

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The key of a call, and its entry, if a look that cannot block finds it."""
        try:
            key = self.key_of(*args, **kwargs)
            entry = self.look_up(key)
        except RecursionError as error:  # to try again would double its work at each level
            return Failed(error), None
        except Exception:  # which the flow meets again and counts
            return MISSING, None
        if entry is not None:
            self.count_hit()
        return key, entry

    async def look_async(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The same, or what can be awaited."""
        key, entry = self.look(args, kwargs)
        if entry is None and self.plan.cache is not None and isinstance(key, bytes):
            entry = await self.plan.cache.fetch(key)
            if entry is not None:
                self.count_hit()
        return key, entry

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> First | None:
        """What a first attempt that may be made now is made with; None where the flow has to decide."""
        if not self._is_quick or self._circuits:
            # A circuit is known while something has failed.
            return None
        given, place, is_ready = None, None, False
        try:
            if self._first_candidate is not None:
                first = self._first_candidate(args, kwargs)
                if first is None:
                    return None
                given, (args, kwargs) = (args, kwargs), first
            if self._enter is not None:
                place = self._enter(args, kwargs)
                if place is None:
                    return None
            is_ready = self._take_slot is None or self._take_slot(args, kwargs)
        except Exception:  # the flow asks again, and counts a value that is refused as a call that failed
            is_ready = False
        if is_ready:
            self.count()
            told = self._told(*(given or (args, kwargs))) if self._tells or switches.are_on else None
            return args, kwargs, place, told, clock.now()
        if place is not None:
            place.give_back()
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

    def _end(self, first: First, outcome: Any) -> None:
        """How a first attempt has ended: ``NOT_RUN`` if Ctrl-C or the like ended it; with `Failed` the flow goes on."""
        args, kwargs, _, told, started = first
        if self._learn is not None and outcome is not NOT_RUN:
            self._learn(clock.now() - started)
        if type(outcome) is not Failed:
            if self.plan.breaker is not None and outcome is not NOT_RUN:
                self.plan.breaker.succeeded(args, kwargs)
            if told is not None:
                tell_of_the_end(told, cancelled=outcome is NOT_RUN)

    def _call_bare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the function gives without any policy; of an ``async def`` one, what is to be awaited."""
        fallback = self.plan.fallback
        if fallback is not None:
            args, kwargs = fallback.slot.put(args, kwargs, fallback.values(args, kwargs)[0])
        return self.function(*args, **kwargs)

    def refresh(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function whatever the cache has; of an ``async def`` one, a coroutine that does."""
        flow = call_flow(self.plan, Call(args, kwargs, refreshes=True))
        return drive_async(flow, self.function, self.plan.name) if self.plan.is_async else drive(flow, self.function)

    def _look(self, /, *args: Any, **kwargs: Any) -> Any:
        """The function, until its first result shows that it is there: no awaitable, and no generator."""
        result = self.plan.function(*args, **kwargs)
        refuse_unfinished(self.plan.function, result, is_cached=False)
        self.function = self.plan.function
        return result

    def _first_item(self, /, *args: Any, **kwargs: Any) -> tuple[Any, Any, None]:
        """A generator that has begun, its first item, and no place; None and its result if it has ended."""
        generator = self.plan.function(*args, **kwargs)
        try:
            return generator, next(generator), None
        except StopIteration as end:
            return None, end.value, None

    async def _first_item_async(self, /, *args: Any, **kwargs: Any) -> tuple[Any, Any, None]:
        generator = self.plan.function(*args, **kwargs)
        # The event loop closes all generators that it knows: it is to know the wrapper's only, which closes this one.
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(None, None)
        try:
            first = generator.__anext__()
        finally:
            sys.set_asyncgen_hooks(*hooks)
        try:
            return generator, await first, None
        except StopAsyncIteration:
            return None, None, None

    def step_of(self, place: Place | None) -> contextlib.AbstractContextManager[None]:
        """A block in which a generator goes on, as part of its place; there may be millions."""
        return _ALONE if place is None else part_of(place)

    def under(self, options: dict[str, Any]) -> Any:
        """The function under changed options."""
        factory, given = self.recipe
        changed = changed_options(given, options)
        made: Any = factory(**changed)(self.plan.function)
        plan = with_shared_policies(made.__opero__.plan, self.plan, set(options))
        return made.with_plan(plan) if hasattr(made, "with_plan") else decorated(plan, (factory, changed))

    def __reduce__(self) -> Any:
        return _decoration_made_by, (*self.recipe, self.plan.function)


def _decoration_made_by(factory: Callable[..., Any], options: dict[str, Any], function: Callable[..., Any]) -> Any:
    return factory(**options)(function).__opero__


# The functions that users get


def _function(this: Decoration) -> Callable[..., Any]:
    def decorated(*args: Any, **kwargs: Any) -> Any:
        try:
            find, let_in = this.find, this.let_in
            if this.switches.are_on:
                return this.call(args, kwargs)
            if find is not None:
                entry = find(*args, **kwargs) if kwargs else find(*args)
                if entry is not None:
                    return entry[0]
                key, entry = this.look(args, kwargs)
                if entry is not None:
                    return entry[0]
                call = Call(args, kwargs, key=key)
            elif let_in is True or (let_in and let_in(args, kwargs)):
                this.count()
                started = this.clock.now()
                try:
                    return this.function(*args, **kwargs)
                except Exception as error:  # the flow decides what becomes of it
                    call = Call(args, kwargs, started=started, failure=error)
            else:
                return this.call(args, kwargs)
            # Not by a method, whose frame would stay: recursions of cached functions are as deep as Python allows.
            return drive(call_flow(this.plan, call), this.function)
        except Exception as error:
            shorten(error)
            raise

    return decorated


def _async_function(this: Decoration) -> Callable[..., Any]:
    async def decorated(*args: Any, **kwargs: Any) -> Any:
        try:
            find, let_in = this.find, this.let_in
            if this.switches.are_on:
                return await this.call_async(args, kwargs)
            if find is not None:
                entry = find(*args, **kwargs) if kwargs else find(*args)
                if entry is not None:
                    return entry[0]
                key, entry = await this.look_async(args, kwargs)
                if entry is not None:
                    return entry[0]
                call = Call(args, kwargs, key=key)
            elif let_in is True or (let_in and let_in(args, kwargs)):
                this.count()
                started = this.clock.now()
                try:
                    return await this.function(*args, **kwargs)
                except Exception as error:
                    call = Call(args, kwargs, started=started, failure=error)
            else:
                return await this.call_async(args, kwargs)
            return await drive_async(call_flow(this.plan, call), this.function, this.plan.name)
        except Exception as error:
            shorten(error)
            raise

    return decorated


def _generator(this: Decoration) -> Callable[..., Any]:
    def decorated(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        try:
            source, item, place = this.call(args, kwargs)
        except Exception as error:
            shorten(error)
            raise
        # They live no longer than the generator needs them.
        del args, kwargs
        if source is None:
            return item
        try:
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    source.close()
                    raise
                except BaseException as error:  # the generator decides what becomes of it
                    with this.step_of(place):
                        item = source.throw(error)
                else:
                    with this.step_of(place):
                        item = source.send(sent)
        except StopIteration as end:
            return end.value
        finally:
            if place is not None:
                place.give_back()

    return decorated


def _async_generator(this: Decoration) -> Callable[..., Any]:
    async def decorated(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        try:
            source, item, place = await this.call_async(args, kwargs)
        except Exception as error:
            shorten(error)
            raise
        # They live no longer than the generator needs them.
        del args, kwargs
        if source is None:
            return
        try:
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    await source.aclose()
                    raise
                except BaseException as error:  # the generator decides what becomes of it
                    with this.step_of(place):
                        item = await source.athrow(error)
                else:
                    with this.step_of(place):
                        item = await source.asend(sent)
        except StopAsyncIteration:
            return
        finally:
            if place is not None:
                place.give_back()

    return decorated


_MAKERS: dict[str, Callable[[Decoration], Callable[..., Any]]] = {
    "def": _function,
    "async def": _async_function,
    "generator": _generator,
    "async generator": _async_generator,
}


def decorated(plan: Plan, recipe: Recipe) -> Any:
    """The function that the user gets; ``recipe`` makes it again from the bare one."""
    decoration, function = Decoration(plan, recipe), plan.function
    # What an object with a `__call__` keeps for itself, a mock its calls, is not the wrapper's.
    updated = functools.WRAPPER_UPDATES if hasattr(function, "__qualname__") else ()
    made: Any = functools.update_wrapper(_MAKERS[plan.kind](decoration), function, updated=updated)
    like: Any = innermost(function)
    if like is not function:
        made.__name__, made.__qualname__ = plan.name.rpartition(".")[2], plan.name
        made.__module__, made.__doc__ = getattr(like, "__module__", ""), getattr(like, "__doc__", None)
    # Copied from what the function wraps, it would hide what is really taken; `inspect` follows `__wrapped__`.
    made.__dict__.pop("__signature__", None)
    made.__dict__["__opero__"] = decoration
    # Here, since `import opero` does not need it.
    from opero.core.parameters import first_parameter

    first = first_parameter(function)
    its: Control[..., Any] = Control(decoration, missing=first if first in {"self", "cls"} else None)
    made.stats, made.with_options = its.stats, its.with_options
    if plan.cache is not None:
        # What is known from `functools`; on others it would hide that of `functools.lru_cache` above.
        made.cache_info, made.cache_clear = its.cache_info, its.cache_clear
        made.cache_delete, made.cache_refresh = its.cache_delete, its.cache_refresh
    return made


def decorator(make_plan: Callable[[Callable[..., Any]], Plan], recipe: Recipe) -> Callable[[F], F]:
    """A decorator that plans each function by ``make_plan``, called in its errors as what the recipe makes it by."""

    def decorate(function: F) -> F:
        with Shortened():
            check_decoratable(function, recipe[0].__name__)
            return cast("F", decorated(make_plan(function), recipe))

    return decorate
