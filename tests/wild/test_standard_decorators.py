"""The decorators of the standard library, and @opero itself, above and below @opero."""

from __future__ import annotations

import abc
import asyncio
import atexit
import concurrent.futures
import contextlib
import dataclasses
import enum
import functools
import threading
import typing

import pytest

from opero import control, opero


def make(world, policy, plain):
    return policy(world.define(plain))


# Stacked


def test_each_of_two_stacked_policies_does_its_part(world):
    tries = []

    @opero(retries=2, min_delay=0, retry_on=ConnectionError)
    @opero(retries=2, min_delay=0, retry_on=TimeoutError)
    @world.define
    def fetch(x):
        tries.append(x)
        raise [TimeoutError, ConnectionError, TimeoutError, KeyError][len(tries) - 1]

    with pytest.raises(KeyError):
        world.run(fetch, 1)
    assert len(tries) == 4


def test_a_cache_above_a_retry_knows_one_call_in_all_its_spellings(world, flaky):
    @opero(cache=True)
    @opero(min_delay=0)
    @world.define
    def price(item, currency="EUR"):
        return flaky(f"{item} {currency}")

    calls = [(("tea",), {}), ((), {"item": "tea"}), (("tea", "EUR"), {}), (("tea",), {"currency": "EUR"})]
    assert {world.run(price, *args, **kwargs) for args, kwargs in calls} == {"tea EUR"}
    assert flaky.tries == 2


def test_wrong_arguments_of_a_stacked_function_are_not_retried(world, fake_clock):
    @opero(retries=3)
    @opero(retries=0)
    @world.define
    def fetch(x):
        return x

    with pytest.raises(TypeError):
        world.run(fetch)
    assert fake_clock.sleeps == []


def test_stacked_policies_count_apart(world, flaky):
    @opero(min_delay=0)
    @world.define
    def inner(x):
        return flaky(x)

    outer = opero(retries=0)(inner)
    world.run(outer, 1)
    assert (control(inner).stats.attempts, control(outer).stats.attempts) == (2, 1)


def test_control_and_its_short_names_are_those_of_the_outermost(world):
    inner = opero(cache=True)(world.define(lambda x: x))
    outer = opero(cache=True)(inner)
    world.run(outer, 1)
    outer.cache_clear()
    assert outer.cache_info().currsize == 0
    assert inner.cache_info().currsize == 1


# Above: properties, partials, caches


def test_a_property_is_retried(flaky):
    class Item:
        @property
        @opero(min_delay=0)
        def size(self):
            return flaky(3)

    assert Item().size == 3
    assert flaky.tries == 2


def test_the_setter_of_a_property_is_retried(flaky):
    class Item:
        @property
        @opero(min_delay=0)
        def size(self):
            return self._size

        @size.setter
        @opero(min_delay=0)
        def size(self, value):
            self._size = flaky(value)

    item = Item()
    item.size = 3
    assert item.size == 3


def test_a_cached_property_is_retried_and_runs_once(flaky):
    class Item:
        @functools.cached_property
        @opero(min_delay=0)
        def size(self):
            return flaky(3)

    item = Item()
    assert [item.size, item.size] == [3, 3]
    assert flaky.tries == 2


def test_a_cached_function_below_a_property_keeps_instances_apart():
    class Item:
        def __init__(self, size):
            self._size = size

        @property
        @opero(cache=True)
        def size(self):
            return self._size

    assert [Item(1).size, Item(2).size] == [1, 2]


def test_a_partial_of_a_function_is_retried(world, flaky):
    function = functools.partial(make(world, opero(min_delay=0), lambda x, y: flaky((x, y))), 1)
    assert world.run(function, y=2) == (1, 2)


def test_a_partial_is_decorated(world, flaky):
    function = opero(min_delay=0)(functools.partial(world.define(lambda x, y: flaky((x, y))), 1))
    assert world.run(function, y=2) == (1, 2)


def test_a_partial_method_is_retried(world, flaky):
    class Client:
        fetch = make(world, opero(min_delay=0), lambda self, path, deep=False: flaky((path, deep)))
        fetch_deep = functools.partialmethod(fetch, deep=True)

    assert world.run(Client().fetch_deep, "/a") == ("/a", True)


def test_an_lru_cache_stands_above(flaky):
    @functools.lru_cache
    @opero(min_delay=0)
    def fetch(x):
        return flaky(x)

    assert [fetch(1), fetch(1)] == [1, 1]
    assert fetch.cache_info().hits == 1
    assert flaky.tries == 2


def test_an_lru_cache_stands_below(flaky):
    @opero(min_delay=0)
    @functools.lru_cache
    def fetch(x):
        return flaky(x)

    assert [fetch(1), fetch(1)] == [1, 1]
    assert flaky.tries == 2


def test_a_decorator_of_the_user_stands_above_and_below(world, flaky):
    def twice(function):
        @functools.wraps(function)
        def doubled(*args, **kwargs):
            return 2 * function(*args, **kwargs)

        @functools.wraps(function)
        async def doubled_async(*args, **kwargs):
            return 2 * await function(*args, **kwargs)

        return doubled_async if world.is_async else doubled

    @twice
    @opero(min_delay=0)
    @twice
    @world.define
    def fetch(x):
        return flaky(x)

    assert world.run(fetch, 1) == 4
    assert fetch.__name__ == "fetch"


# Dispatch


def test_an_implementation_of_a_single_dispatch_is_retried(world, flaky):
    @functools.singledispatch
    def show(value):
        return "anything"

    @show.register(int)
    @opero(min_delay=0)
    @world.define
    def _(value):
        return flaky("a number")

    assert world.run(show, 1) == "a number"
    assert show("text") == "anything"


def test_an_implementation_is_registered_by_its_annotation(flaky):
    @functools.singledispatch
    def show(value):
        return "anything"

    @show.register
    @opero(min_delay=0)
    def _(value: int):
        return flaky("a number")

    assert show(1) == "a number"


def test_a_single_dispatch_above_a_function_is_told_more(flaky):
    @functools.singledispatch
    @opero(min_delay=0)
    def show(value):
        return flaky("anything")

    show.register(int, lambda value: "a number")
    assert [show("text"), show(1)] == ["anything", "a number"]


def test_a_single_dispatch_is_decorated(flaky):
    @functools.singledispatch
    def show(value):
        return flaky("anything")

    show.register(int, lambda value: flaky("a number"))
    shown = opero(min_delay=0)(show)
    assert [shown(1), shown("text")] == ["a number", "anything"]


def test_a_single_dispatch_method_is_retried(flaky):
    class Printer:
        @functools.singledispatchmethod
        @opero(min_delay=0)
        def show(self, value):
            return flaky("anything")

        @show.register
        @opero(min_delay=0)
        def _(self, value: int):
            return "a number"

    assert [Printer().show("text"), Printer().show(1)] == ["anything", "a number"]


# Classes


def test_an_abstract_method_keeps_its_class_abstract(world):
    class Base(abc.ABC):
        @abc.abstractmethod
        @opero(min_delay=0)
        def above(self):
            """Fetch."""

        @opero(min_delay=0)
        @abc.abstractmethod
        def below(self):
            """Fetch."""

    class Whole(Base):
        @opero(min_delay=0)
        def above(self):
            return "above"

        @opero(min_delay=0)
        def below(self):
            return "below"

    assert Base.__abstractmethods__ == {"above", "below"}
    with pytest.raises(TypeError, match="abstract"):
        Base()
    assert (Whole().above(), Whole().below()) == ("above", "below")


def test_a_class_method_is_retried(world, flaky):
    class Client:
        made = classmethod(make(world, opero(min_delay=0), lambda cls, x: flaky((cls.__name__, x))))

    class Sub(Client):
        pass

    assert world.run(Sub.made, 1) == ("Sub", 1)


def test_a_static_method_is_retried(world, flaky):
    class Client:
        joined = staticmethod(make(world, opero(min_delay=0), flaky))

    assert world.run(Client().joined, 1) == 1


def test_a_class_method_caches_for_each_class(world):
    class Client:
        named = classmethod(make(world, opero(cache=True), lambda cls: cls.__name__))

    class Sub(Client):
        pass

    assert [world.run(Client.named), world.run(Sub.named), world.run(Client.named)] == ["Client", "Sub", "Client"]


def test_an_override_calls_the_method_above_it_by_super():
    class Client:
        @opero(min_delay=0)
        def fetch(self):
            return "base"

    class Sub(Client):
        @opero(min_delay=0)
        def fetch(self):
            return f"sub of {super().fetch()}"

    assert Sub().fetch() == "sub of base"


def test_a_function_that_is_the_default_of_a_field_is_no_method(world):
    function = make(world, opero(cache=True), lambda x: 2 * x)

    @dataclasses.dataclass
    class Job:
        work: typing.Any = function
        factory: typing.Any = dataclasses.field(default_factory=lambda: function)

    assert world.run(Job().work, 2) == 4
    assert world.run(Job().factory, 2) == 4
    assert Job() == Job()
    assert world.run(function, 2) == 4
    assert function.cache_info().misses == 1


def test_a_dataclass_with_slots_has_decorated_methods(flaky):
    @dataclasses.dataclass(slots=True, frozen=True)
    class Point:
        x: int

        @opero(min_delay=0)
        def shifted(self, by):
            return flaky(dataclasses.replace(self, x=self.x + by))

    assert Point(1).shifted(2) == Point(3)


def test_a_named_tuple_has_decorated_methods(flaky):
    class Point(typing.NamedTuple):
        x: int

        @opero(min_delay=0)
        def shifted(self, by):
            return flaky(self.x + by)

    assert Point(1).shifted(2) == 3


def test_a_decorated_function_in_an_enumeration_is_a_method_and_no_member(flaky):
    class Colour(enum.Enum):
        RED = 1

        @opero(min_delay=0)
        def shown(self):
            return flaky(self.name)

    assert list(Colour) == [Colour.RED]
    assert Colour.RED.shown() == "RED"


def test_special_methods_are_retried(flaky):
    class Odd:
        @opero(min_delay=0)
        def __call__(self, x):
            return flaky(x)

        @opero(min_delay=0)
        def __getitem__(self, x):
            return x

        @opero(min_delay=0)
        def __enter__(self):
            return "entered"

        @opero(min_delay=0)
        def __exit__(self, *exc):
            return True

    assert Odd()(1) == 1
    assert Odd()[2] == 2
    with Odd() as entered:
        raise ValueError(entered)


def test_a_protocol_is_met_by_a_decorated_method():
    @typing.runtime_checkable
    class Fetches(typing.Protocol):
        def fetch(self): ...

    class Client:
        @opero
        def fetch(self):
            return 1

    assert isinstance(Client(), Fetches)


# Generators


def test_a_context_manager_of_a_generator_function_is_retried_until_it_is_entered(flaky):
    closed = []

    @contextlib.contextmanager
    @opero(min_delay=0)
    def opened(name):
        yield flaky(name)
        closed.append(name)

    with opened("a") as name:
        assert name == "a"
    assert closed == ["a"]
    assert flaky.tries == 2


def test_an_async_context_manager_of_a_generator_function_is_retried_until_it_is_entered(flaky):
    closed = []

    @contextlib.asynccontextmanager
    @opero(min_delay=0)
    async def opened(name):
        yield flaky(name)
        closed.append(name)

    async def use():
        async with opened("a") as name:
            return name

    assert asyncio.run(use()) == "a"
    assert closed == ["a"]
    assert flaky.tries == 2


def test_an_error_within_a_with_block_reaches_the_generator_function(flaky):
    @contextlib.contextmanager
    @opero(min_delay=0)
    def opened():
        try:
            yield
        except KeyError:
            caught.append(KeyError)

    caught = []
    with opened():
        raise KeyError
    assert caught == [KeyError]


def test_a_context_manager_decorates_a_function(flaky):
    @contextlib.contextmanager
    @opero(min_delay=0)
    def opened():
        yield flaky("a")

    @opened()
    @opero(min_delay=0)
    def work(x):
        return x

    assert [work(1), work(2)] == [1, 2]


# Those who take any callable


def test_threads_and_executors_call_a_decorated_function(flaky):
    function = opero(min_delay=0)(flaky)
    thread = threading.Thread(target=function, args=(1,))
    thread.start()
    thread.join()
    assert flaky.tries == 2
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        assert executor.submit(function, 2).result() == 2


def test_asyncio_takes_a_decorated_function(flaky):
    function = opero(min_delay=0)(flaky)
    function_async = opero(min_delay=0)(asyncio.to_thread)

    async def use():
        by_thread = await asyncio.to_thread(function, 1)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(function_async(function, 2))
        return [by_thread, task.result()]

    assert asyncio.run(use()) == [1, 2]


def test_an_exit_handler_is_decorated():
    handler = opero(min_delay=0)(lambda: None)
    assert atexit.register(handler) is handler
    atexit.unregister(handler)
