"""The function that the user gets: one closure for each kind of function.

A closure only calls; what it calls is its `Decoration`. Its code names nothing of this module and holds nothing but
that one object: so cloudpickle, which carries a function by its code and by what it holds, carries it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from opero.core.decoration import Decoration


def wrap(this: Decoration) -> Callable[..., Any]:
    """A plain function that does what the decoration says, and looks like the function that it decorates."""
    make = {
        "def": _function,
        "async def": _async_function,
        "generator": _generator,
        "async generator": _async_generator,
    }
    function = this.plan.function
    if this.plan.cache is not None:
        make = {"def": _cached_function, "async def": _cached_async_function}
    # What an object with a `__call__` keeps for itself, a mock its calls, is not the wrapper's.
    updated = functools.WRAPPER_UPDATES if hasattr(function, "__qualname__") else ()
    return functools.update_wrapper(make[this.plan.kind](this), function, updated=updated)


def _function(this: Decoration) -> Callable[..., Any]:
    def decorated(*args: Any, **kwargs: Any) -> Any:
        try:
            if not this.is_direct or this.switches.are_on:
                return this.call(args, kwargs)
            this.count()
            started = this.clock.now()
            try:
                return this.function(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - the flow decides what becomes of it
                call = this.new_call(args, kwargs, started=started)
                call.failure = error
            return this.go_on(call)
        except Exception as error:
            this.shorten(error)
            raise

    return decorated


def _cached_function(this: Decoration) -> Callable[..., Any]:
    def decorated(*args: Any, **kwargs: Any) -> Any:
        try:
            if this.switches.are_on:
                return this.call(args, kwargs)
            try:
                entry = this.find(*args, **kwargs) if kwargs else this.find(*args)
            except Exception:  # noqa: BLE001 - a wrong call, which has to be counted
                entry = None
            if entry is not None:
                return entry[0]
            # Not by a method, whose frame would stay: recursions of cached functions are as deep as Python allows.
            begun = this.begin(args, kwargs)
            return begun[0] if begun.__class__ is tuple else this.drive(begun, this.function)
        except Exception as error:
            this.shorten(error)
            raise

    return decorated


def _cached_async_function(this: Decoration) -> Callable[..., Any]:
    async def decorated(*args: Any, **kwargs: Any) -> Any:
        try:
            if this.switches.are_on:
                return await this.call_async(args, kwargs)
            try:
                entry = this.find(*args, **kwargs) if kwargs else this.find(*args)
            except Exception:  # noqa: BLE001 - as above
                entry = None
            if entry is not None:
                return entry[0]
            begun = this.begin(args, kwargs) if this.fetch is None else await this.begin_async(args, kwargs)
            if begun.__class__ is tuple:
                return begun[0]
            return await this.drive_async(begun, this.function, this.plan.name)
        except Exception as error:
            this.shorten(error)
            raise

    return decorated


def _async_function(this: Decoration) -> Callable[..., Any]:
    async def decorated(*args: Any, **kwargs: Any) -> Any:
        try:
            if not this.is_direct or this.switches.are_on:
                return await this.call_async(args, kwargs)
            this.count()
            started = this.clock.now()
            try:
                return await this.function(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - as above
                call = this.new_call(args, kwargs, started=started)
                call.failure = error
            return await this.go_on_async(call)
        except Exception as error:
            this.shorten(error)
            raise

    return decorated


def _generator(this: Decoration) -> Callable[..., Any]:
    def decorated(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        try:
            source, item, place = this.call(args, kwargs)
        except Exception as error:
            this.shorten(error)
            raise
        if source is None:
            return item
        try:
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    source.close()
                    raise
                except BaseException as error:  # noqa: BLE001 - the generator decides what becomes of it
                    item = source.throw(error) if place is None else place.resume(source.throw, error)
                else:
                    item = source.send(sent) if place is None else place.resume(source.send, sent)
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
            this.shorten(error)
            raise
        if source is None:
            return
        try:
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    await source.aclose()
                    raise
                except BaseException as error:  # noqa: BLE001 - the generator decides what becomes of it
                    item = await (source.athrow(error) if place is None else place.resume_async(source.athrow, error))
                else:
                    item = await (source.asend(sent) if place is None else place.resume_async(source.asend, sent))
        except StopAsyncIteration:
            return
        finally:
            if place is not None:
                place.give_back()

    return decorated
