"""Decorators and classes of wrapt, decorator, deprecated and attrs."""

from __future__ import annotations

import inspect

import attrs
import decorator
import deprecated
import pytest
import wrapt

from opero import opero


@wrapt.decorator
def by_wrapt(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs)


@decorator.decorator
def by_decorator(function, *args, **kwargs):
    return function(*args, **kwargs)


@decorator.decorator
async def by_decorator_async(function, *args, **kwargs):
    return await function(*args, **kwargs)


by_deprecated = deprecated.deprecated(reason="old", action="ignore")


@pytest.fixture(params=["wrapt", "decorator", "deprecated"])
def decorate(request, world):
    """A decorator of somebody else, which does nothing."""
    return {
        "wrapt": by_wrapt,
        "decorator": by_decorator_async if world.is_async else by_decorator,
        "deprecated": by_deprecated,
    }[request.param]


def test_a_decorator_of_others_stands_above(world, decorate, flaky):
    @decorate
    @opero(min_delay=0)
    @world.define
    def fetch(x, y=2):
        return flaky((x, y))

    assert world.run(fetch, 1) == (1, 2)
    assert list(inspect.signature(fetch).parameters) == ["x", "y"]
    assert inspect.iscoroutinefunction(fetch) == world.is_async


def test_a_decorator_of_others_stands_below(world, decorate, flaky):
    @opero(min_delay=0)
    @decorate
    @world.define
    def fetch(x, y=2):
        return flaky((x, y))

    assert world.run(fetch, 1) == (1, 2)
    assert list(inspect.signature(fetch).parameters) == ["x", "y"]
    assert inspect.iscoroutinefunction(fetch) == world.is_async


def test_a_decorator_of_others_stands_above_a_method(world, decorate, flaky):
    class Client:
        base = "u"

        @decorate
        @opero(min_delay=0)
        @world.define
        def fetch(self, path):
            return flaky(self.base + path)

    assert world.run(Client().fetch, "/a") == "u/a"


def test_a_decorator_of_others_stands_below_a_method(world, decorate, flaky):
    class Client:
        base = "u"

        @opero(min_delay=0)
        @decorate
        @world.define
        def fetch(self, path):
            return flaky(self.base + path)

    assert world.run(Client().fetch, "/a") == "u/a"


@pytest.mark.parametrize("above", [True, False], ids=["above", "below"])
def test_a_cached_method_beside_a_decorator_of_others_keeps_instances_apart(world, decorate, above):
    class Client:
        def __init__(self, base):
            self.base = base

        def fetch(self, path):
            return self.base + path

        cached = opero(cache=True)
        fetch = world.define(fetch)
        fetch = decorate(cached(fetch)) if above else cached(decorate(fetch))

    assert [world.run(Client(base).fetch, "/a") for base in "uv"] == ["u/a", "v/a"]


def test_a_deprecated_function_warns_once_for_a_call_however_often_it_is_retried(flaky):
    @deprecated.deprecated(reason="old")
    @opero(min_delay=0)
    def fetch(x):
        return flaky(x)

    with pytest.warns(DeprecationWarning, match="old") as heard:
        assert fetch(1) == 1
    assert len(heard) == 1


@attrs.define
class Point:
    x: int
    tries: int = attrs.field(default=0, eq=False)

    @opero(min_delay=0)
    def shifted(self, by):
        self.tries += 1
        if self.tries == 1:
            raise ConnectionError
        return Point(self.x + by)

    @opero(min_delay=0)
    async def shifted_async(self, by):
        self.tries += 1
        if self.tries == 1:
            raise ConnectionError
        return Point(self.x + by)

    @opero(cache=True)
    def doubled(self):
        return 2 * self.x


def test_a_class_with_slots_of_attrs_has_decorated_methods(world):
    point = Point(1)
    assert world.run(point.shifted_async if world.is_async else point.shifted, 2) == Point(3)


def test_a_class_of_attrs_has_a_cached_method():
    first, second = Point(1), Point(2)
    assert [first.doubled(), second.doubled(), first.doubled()] == [2, 4, 2]


def test_a_decorated_function_makes_and_checks_fields_of_attrs(flaky):
    made = opero(min_delay=0)(lambda: flaky(3))
    doubled = opero(min_delay=0)(lambda value: 2 * value)

    @attrs.define
    class Item:
        size: int = attrs.field(factory=made, converter=doubled)

    assert Item().size == 6
    assert Item(1).size == 2


def test_a_decorated_function_is_the_default_of_a_field_of_attrs(world):
    function = opero(cache=True)(world.define(lambda x: 2 * x))

    @attrs.define
    class Job:
        work: object = function

    assert world.run(Job().work, 2) == 4
