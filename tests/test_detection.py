"""What is async, what is not, and what cannot be decorated at all."""

from __future__ import annotations

import asyncio
import functools
import inspect
from unittest import mock

import pytest

from opero import OperoError, opero
from opero.core import get_cache_decorator, get_fallback_decorator, get_rate_limit_decorator, get_retry_decorator


class Callable:
    """An object that is called like a function, sync or async."""

    def __call__(self, value):
        return value + 1

    def method(self, value):
        return value + 1


class AsyncCallable:
    async def __call__(self, value):
        return value + 1

    async def method(self, value):
        return value + 1


def plain(value, step=2):
    return value + step


async def coroutine(value, step=2):
    return value + step


FORMS = {
    "def": (plain, coroutine),
    "partial": (functools.partial(plain, step=1), functools.partial(coroutine, step=1)),
    "partial of partial": (
        functools.partial(functools.partial(plain), step=1),
        functools.partial(functools.partial(coroutine), step=1),
    ),
    "object": (Callable(), AsyncCallable()),
    "partial of object": (functools.partial(Callable()), functools.partial(AsyncCallable())),
    "bound method": (Callable().method, AsyncCallable().method),
    "opero function": (opero(plain), opero(coroutine)),
}


@pytest.mark.parametrize("options", [{}, {"cache": True}, {"total_timeout": 60}], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_each_form_of_a_function_stays_sync_or_async(world, form, options):
    function = opero(**options)(form[world.is_async])
    assert inspect.iscoroutinefunction(function) is world.is_async
    assert inspect.iscoroutinefunction(function.__call__) is False
    for _ in range(2):
        assert world.run(function, 1) in {2, 3}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_each_form_of_a_function_is_retried(world, fake_clock, form):
    function = opero(retries=2)(form[world.is_async])
    with pytest.raises(TypeError):
        world.run(function, "text")  # to which no number can be added
    assert function.stats.attempts == 3


def test_methods_know_their_instance(world, fake_clock):
    rest = [ValueError()]

    def method(self, value):
        if rest:
            raise rest.pop()
        return self, value

    class Client:
        ask = opero(world.define(method))

    client = Client()
    assert world.run(client.ask, 1) == (client, 1)
    assert world.run(Client.ask, client, 2) == (client, 2)
    assert inspect.iscoroutinefunction(client.ask) is world.is_async


@pytest.mark.parametrize("options", [{}, {"cache": True}, {"total_timeout": 60}], ids=str)
def test_below_classmethod_and_staticmethod(world, fake_clock, options):
    failures = [ValueError(), ValueError()]

    def recover(*args):
        if failures:
            raise failures.pop()
        return args

    class Client:
        of_class = classmethod(opero(**options)(world.define(recover)))
        static = staticmethod(opero(**options)(world.define(recover)))

    assert world.run(Client.of_class, 1) == (Client, 1)
    assert world.run(Client().of_class, 2) == (Client, 2)
    assert world.run(Client.static, 1) == (1,)
    assert world.run(Client().static, 2) == (2,)


# What is refused

DECORATORS = {
    "opero": opero,
    "opero()": opero(),
    "retry": get_retry_decorator(),
    "cache": get_cache_decorator(),
    "limit": get_rate_limit_decorator(5),
    "fallback": get_fallback_decorator("value"),
}


@pytest.mark.parametrize("kind", [classmethod, staticmethod])
@pytest.mark.parametrize("decorate", DECORATORS.values(), ids=DECORATORS)
def test_above_classmethod_and_staticmethod_is_refused_with_a_hint(decorate, kind):
    with pytest.raises(TypeError, match=rf"below @{kind.__name__}"):
        decorate(kind(plain))


@pytest.mark.parametrize("thing", [Callable, 5, "text", property(plain)], ids=repr)
def test_what_is_no_function_is_refused(thing):
    with pytest.raises(TypeError, match="opero"):
        opero()(thing)


class Awaitable:
    def __await__(self):
        return iter(())


def returns_coroutine(value):
    return coroutine(value)


def returns_awaitable(value):
    return Awaitable()


@pytest.mark.parametrize(
    "options", [{}, {"arg_fallback": "value"}, {"cache": True}, {"total_timeout": 60}, {"rate_limit": 1000}], ids=str
)
@pytest.mark.parametrize("function", [returns_coroutine, returns_awaitable, functools.partial(returns_coroutine)])
def test_a_plain_function_that_returns_an_awaitable_is_refused_at_its_first_call(fake_clock, function, options):
    decorated = opero(**options)(function)
    with pytest.raises(TypeError, match="async def") as caught:
        decorated(1)
    assert isinstance(caught.value, OperoError)
    assert "returns_" in str(caught.value)
    assert decorated.stats.attempts == 1
    assert fake_clock.sleeps == []


def test_an_awaitable_is_refused_when_the_first_attempt_failed(fake_clock):
    rest = [ValueError()]

    @opero
    def function():
        if rest:
            raise rest.pop()
        return Awaitable()

    with pytest.raises(TypeError, match="async def"):
        function()


# Functions in functions


def test_an_opero_function_inside_another_works(world, fake_clock):
    rest = [ValueError(), ValueError(), ValueError()]

    def work(value):
        if rest:
            raise rest.pop()
        return value

    inner = opero(retries=1)(world.define(work))
    outer = opero(retries=1)(call_of(world, inner))
    assert world.run(outer, 7) == 7
    assert (outer.stats.attempts, inner.stats.attempts) == (2, 4)


def test_the_retries_of_nested_functions_multiply(world, fake_clock):
    error = ValueError()

    def work(value):
        raise error

    inner = opero(retries=2)(world.define(work))
    outer = opero(retries=2)(call_of(world, inner))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below
        world.run(outer, 7)
    assert caught.value is error
    assert inner.stats.attempts == 9
    assert len(error.__notes__) == 2


def test_a_cached_function_may_call_itself(world):
    if world.is_async:

        @opero(cache=True)
        async def factorial(n):
            return n * await factorial(n - 1) if n else 1

    else:

        @opero(cache=True)
        def factorial(n):
            return n * factorial(n - 1) if n else 1

    assert world.run(factorial, 5) == 120
    assert factorial.stats.attempts == 6


def test_a_sync_opero_function_works_inside_an_async_one(fake_clock):
    rest = [ValueError()]

    @opero
    def inner():
        if rest:
            raise rest.pop()
        return "done"

    @opero
    async def outer():
        return inner()

    assert asyncio.run(outer()) == "done"


def call_of(world, inner):
    """A function of the world that calls another."""

    def outer(value):
        return inner(value)

    async def outer_async(value):
        return await inner(value)

    return outer_async if world.is_async else outer


class Proxy:
    """As werkzeug's and Django's: to tell its class it has to look for what it stands for."""

    @property
    def __class__(self):
        raise RuntimeError("bound to nothing here")


@pytest.mark.parametrize(
    "options", [{}, {"cache": True}, {"breaker": 5}, {"max_concurrent": 1}, {"retry_if_result": lambda _: False}]
)
def test_a_result_is_not_asked_for_its_class(world, options):
    results = []
    f = opero(retries=1, **options)(world.define(lambda: results.append(Proxy()) or results[-1]))
    assert world.run(f) is results[0]
    assert len(results) == 1


class Table:
    """What is read anew by each `iter`, though it has a `__next__`."""

    def __iter__(self):
        return iter([1, 2])

    def __next__(self):
        return 1


@pytest.mark.parametrize("result", [Table(), mock.MagicMock()], ids=["a table", "a mock"])
def test_what_can_be_read_again_and_again_can_be_cached(world, result):
    f = opero(cache=True)(world.define(lambda: result))
    assert world.run(f) is world.run(f) is result
    assert f.cache_info().hits == 1
