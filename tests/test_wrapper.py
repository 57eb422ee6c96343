"""The decorated function is like the function itself: to callers, to `inspect`, to `pickle`, to other decorators."""

from __future__ import annotations

import abc
import asyncio
import copy
import functools
import importlib
import inspect
import pickle
import pydoc
import re
import subprocess
import sys
import textwrap
import typing
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cloudpickle
import dill
import pytest

from conftest import World
from opero import CallStats, control, opero, opmap

# One set of options for each way in which a wrapper can enter the function, and the names of the ways.
WAYS = {
    "direct": {},
    "limited": {"rate_limit": 1e6},
    "cached": {"cache": True},
    "cached by key": {"cache": True, "cache_key": lambda *args, **kwargs: repr((args, kwargs))},
    "through the flow": {"total_timeout": 60},
}
DEFAULT = object()


class BrokenError(Exception):
    """What a user's function raises here."""


@pytest.fixture(params=WAYS)
def way(request):
    return {"retries": 2, "min_delay": 0, "max_delay": 0, **WAYS[request.param]}


def fetch(url: str, *, retries_left: int = 3) -> tuple[str, int]:
    """Fetch one page.

    More about it.
    """
    return url, retries_left


def no_parameters():
    return "none"


def plain(a, b):
    return a, b


def with_defaults(a, b=2, c=DEFAULT):
    return a, b, c


def positional_only(a, b=2, /):
    return a, b


def keyword_only(*, a, b=2, c):
    return a, b, c


def variadic(*args):
    return args


def variadic_keywords(**kwargs):
    return kwargs


def anything(*args, **kwargs):
    return args, kwargs


def everything(a, b=2, /, c=3, *args, d, e=DEFAULT, **kwargs):
    return a, b, c, args, d, e, kwargs


def positional_only_and_keyword_only(a, /, *, b):
    return a, b


def positional_only_and_keywords(a, /, **kwargs):
    return a, kwargs


def names_of_the_decorators(function, fn, func, self, cls, options, plan, call):  # noqa: PLR0917 - odd on purpose
    return function, fn, func, self, cls, options, plan, call


def names_of_a_flow(args, kwargs, error, key, result, started, attempt, item):  # noqa: PLR0917 - odd on purpose
    return args, kwargs, error, key, result, started, attempt, item


def names_of_builtins(Exception, tuple, type, repr, dict=None, print=None):  # noqa: A002, N803, PLR0917 - odd on purpose
    return Exception, tuple, type, repr, dict, print


def names_of_soft_keywords(match, case, _, type=1):  # noqa: A002 - odd on purpose
    return match, case, _, type


def names_in_other_scripts(größe, été=1, 名前=2):  # noqa: N803, PLC2401 - odd on purpose
    return größe, été, 名前


def names_of_the_wrapper(_opero_function, _opero_started=1, *, _opero_error=2):
    return _opero_function, _opero_started, _opero_error


def names_with_underscores(_, __b__=1, *, ___=2):
    return _, __b__, ___


SHAPES = [
    (no_parameters, (), {}),
    (plain, (1, 2), {}),
    (plain, (1,), {"b": 2}),
    (plain, (), {"b": 2, "a": 1}),
    (with_defaults, (1,), {}),
    (with_defaults, (1, 5), {"c": 6}),
    (positional_only, (1,), {}),
    (positional_only, (1, 5), {}),
    (keyword_only, (), {"c": 3, "a": 1}),
    (keyword_only, (), {"a": 1, "b": 5, "c": 3}),
    (variadic, (), {}),
    (variadic, (1, 2, 3), {}),
    (variadic_keywords, (), {}),
    (variadic_keywords, (), {"self": 1, "function": 2, "args": 3, "key": 4}),
    (anything, (1, 2), {"self": 1, "args": 2, "kwargs": 3}),
    (everything, (1,), {"d": 4}),
    (everything, (1, 5, 6, 7, 8), {"d": 4, "e": 9, "a": 10, "b": 11}),
    (positional_only_and_keyword_only, (1,), {"b": 2}),
    (positional_only_and_keywords, (1,), {"a": 2}),
    (names_of_the_decorators, range(8), {}),
    (names_of_the_decorators, (), {n: n for n in inspect.signature(names_of_the_decorators).parameters}),
    (names_of_a_flow, range(8), {}),
    (names_of_a_flow, (), {n: n for n in inspect.signature(names_of_a_flow).parameters}),
    (names_of_builtins, range(4), {}),
    (names_of_builtins, (), {"Exception": 1, "tuple": 2, "type": 3, "repr": 4, "dict": 5}),
    (names_of_soft_keywords, (1, 2, 3), {}),
    (names_of_soft_keywords, (), {"match": 1, "case": 2, "_": 3}),
    (names_in_other_scripts, (1,), {}),
    (names_in_other_scripts, (), {"größe": 1, "名前": 3}),
    (names_of_the_wrapper, (1,), {}),
    (names_of_the_wrapper, (), {"_opero_function": 1, "_opero_error": 3}),
    (names_with_underscores, (1,), {"___": 3}),
]
FUNCTIONS = list(dict.fromkeys(function for function, _, _ in SHAPES))

each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
each_shape = pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [pytest.param(*shape, id=f"{shape[0].__name__}-{n}") for n, shape in enumerate(SHAPES)],
)


# Names and signature


@each_function
def test_the_signature_is_that_of_the_function(function, world, way):
    assert inspect.signature(opero(**way)(world.define(function))) == inspect.signature(function)


@pytest.mark.parametrize("name", ["__name__", "__qualname__", "__doc__", "__module__", "__annotations__"])
def test_what_a_function_tells_of_itself_is_kept(name, world, way):
    assert getattr(opero(**way)(world.define(fetch)), name) == getattr(fetch, name)


@pytest.mark.parametrize("name", ["__name__", "__qualname__", "__doc__", "__module__"])
def test_what_a_function_tells_of_itself_is_kept_by_a_map(name, mode):
    assert getattr(opmap(**mode.options)(mode.define(fetch)), name) == getattr(fetch, name)


def test_the_function_itself_can_be_had(world, way):
    function = world.define(fetch)

    assert opero(**way)(function).__wrapped__ is function


def test_the_function_itself_can_be_had_of_a_map(mode):
    function = mode.define(fetch)

    assert opmap(**mode.options)(function).__wrapped__ is function


def test_unwrapping_leads_to_the_innermost_function():
    assert inspect.unwrap(opero(opero(fetch))) is fetch


def test_type_hints_can_be_had(way):
    assert typing.get_type_hints(opero(**way)(fetch)) == typing.get_type_hints(fetch)


def test_attributes_of_the_function_are_kept(way):
    def tagged():
        """Do nothing."""

    tagged.tags = ["slow"]

    assert opero(**way)(tagged).tags is tagged.tags


def test_an_attribute_of_the_function_does_not_hide_one_of_operos():
    def counted():
        """Do nothing."""

    counted.stats, counted.plan, counted.remake = "mine", "mine", "mine"
    decorated = opero(counted)
    decorated()

    assert decorated.stats.snapshot() == CallStats(calls=1, attempts=1)


@pytest.mark.parametrize("decorate", [opero, opmap(mode="thread")], ids=["opero", "opmap"])
def test_the_repr_names_the_function(decorate):
    assert "fetch" in repr(decorate(fetch))


@pytest.mark.parametrize("decorate", [opero, opmap(mode="thread")], ids=["opero", "opmap"])
def test_the_docstring_is_found_by_inspect(decorate):
    assert inspect.getdoc(decorate(fetch)) == "Fetch one page.\n\nMore about it."


@pytest.mark.parametrize("decorate", [opero, opmap(mode="thread")], ids=["opero", "opmap"])
def test_a_function_without_a_docstring_gets_none(decorate):
    assert inspect.getdoc(decorate(no_parameters)) is None


@pytest.mark.parametrize("decorate", [opero, opmap(mode="thread")], ids=["opero", "opmap"])
def test_help_shows_the_name_and_the_docstring(decorate):
    def get(url, size=1):
        """Get one page."""

    text = pydoc.render_doc(decorate(get), renderer=pydoc.plaintext)

    assert re.search(r"^get\b.*\n    Get one page\.$", text, re.MULTILINE)


def test_help_on_a_class_shows_the_name_and_the_docstring_of_its_method():
    class Local:
        @opero
        def get(self, url, size=1):
            """Get one page."""

    text = pydoc.render_doc(Local, renderer=pydoc.plaintext)

    assert re.search(r"^ \|  get\b.*\n \|      Get one page\.$", text, re.MULTILINE)


def test_a_decorated_function_is_callable_hashable_and_weakly_referable():
    decorated = opero(fetch)

    assert callable(decorated)
    assert {decorated: 1}[decorated] == 1
    assert weakref.ref(decorated)() is decorated


def test_a_decorated_function_is_a_coroutine_function_exactly_if_the_function_is(world, way):
    assert inspect.iscoroutinefunction(opero(**way)(world.define(fetch))) is world.is_async


def test_a_bound_method_is_a_coroutine_function_exactly_if_the_method_is(world):
    class Local:
        method = opero(world.define(lambda self: 1))

    assert inspect.iscoroutinefunction(Local().method) is world.is_async


@pytest.mark.parametrize("form", ["partial", "nested partial", "bound method", "callable object"])
def test_what_gives_a_coroutine_is_a_coroutine_function(form):
    class Caller:
        async def method(self, url):
            return url

        async def __call__(self, url):
            return url

    async def call(first, second, url):
        return url

    function = {
        "partial": functools.partial(call, 1, 2),
        "nested partial": functools.partial(functools.partial(call, 1), 2),
        "bound method": Caller().method,
        "callable object": Caller(),
    }[form]
    decorated = opero(function)

    assert inspect.iscoroutinefunction(decorated)
    assert asyncio.run(decorated("u")) == "u"


# Bare and called


@pytest.mark.parametrize(
    "decorate", [opero, opero(), opero(None), opero(retries=1)], ids=["bare", "()", "None", "options"]
)
def test_opero_is_written_with_and_without_parentheses(decorate):
    assert decorate(fetch)("u") == ("u", 3)


@pytest.mark.parametrize("name", ["bare", "()", "None"])
def test_opmap_is_written_with_and_without_parentheses(name):
    decorate = {"bare": opmap, "()": opmap(), "None": opmap(None)}[name]

    assert decorate(fetch).one("u") == ("u", 3)


# Calls


@each_shape
def test_arguments_arrive_as_they_were_given(function, args, kwargs, world, way):
    decorated = opero(**way)(world.define(function))

    assert world.run(decorated, *args, **kwargs) == function(*args, **kwargs)


@each_shape
def test_arguments_arrive_as_they_were_given_when_the_first_attempt_fails(function, args, kwargs, world, way):
    attempts = []

    @functools.wraps(function)
    def flaky(*args, **kwargs):
        attempts.append(1)
        if len(attempts) == 1:
            raise BrokenError
        return function(*args, **kwargs)

    flaky.__signature__ = inspect.signature(function)
    decorated = opero(**way)(world.define(flaky))

    assert world.run(decorated, *args, **kwargs) == function(*args, **kwargs)
    assert decorated.stats.attempts == 2


def test_a_default_arrives_as_the_same_object(world, way):
    default = [1]

    def give(first=default, *, second=default):
        return first, second

    first, second = world.run(opero(**way)(world.define(give)))

    assert first is default
    assert second is default


def test_an_argument_arrives_as_the_same_object(world, way):
    given = [1]

    def give(argument):
        return argument

    assert world.run(opero(**way)(world.define(give)), given) is given


def test_a_default_that_the_repr_cannot_rebuild_arrives(way):
    def give(infinity=float("inf"), text="'; raise SystemExit #", lowest=lambda: 1):
        return infinity, text, lowest

    assert opero(**way)(give)() == give()


WRONG_CALLS = [
    (no_parameters, (1,), {}),
    (no_parameters, (), {"a": 1}),
    (plain, (), {}),
    (plain, (1,), {}),
    (plain, (1, 2, 3), {}),
    (plain, (1, 2), {"c": 3}),
    (plain, (1, 2), {"b": 3}),
    (with_defaults, (), {"b": 1}),
    (positional_only, (), {"a": 1}),
    (keyword_only, (1,), {"a": 1, "c": 2}),
    (keyword_only, (), {"a": 1}),
    (variadic, (1,), {"a": 1}),
    (variadic_keywords, (1,), {}),
    (everything, (), {"d": 1}),
    (everything, (1,), {}),
    (everything, (1, 2, 3), {"d": 1, "c": 4}),
    (names_of_builtins, (), {}),
    (names_in_other_scripts, (), {}),
]


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [pytest.param(*call, id=f"{call[0].__name__}-{n}") for n, call in enumerate(WRONG_CALLS)],
)
def test_a_wrong_call_raises_what_the_function_itself_would_raise_at_once(function, args, kwargs, world, way):
    decorated = opero(**way)(world.define(function))
    with pytest.raises(TypeError) as expected:
        function(*args, **kwargs)

    with pytest.raises(TypeError) as caught:
        world.run(decorated, *args, **kwargs)

    assert str(caught.value) == str(expected.value)
    assert f"{function.__name__}()" in str(caught.value)
    assert decorated.stats.retries == 0


def test_a_type_error_of_the_functions_own_is_retried(world, way):
    attempts = []

    def fail():
        attempts.append(1)
        raise TypeError

    with pytest.raises(TypeError):
        world.run(opero(**way)(world.define(fail)))

    assert len(attempts) == 3


def test_a_wrong_call_of_a_method_names_class_and_method():
    with pytest.raises(TypeError, match=r"^Client\.get\(\) missing 1 required positional argument: 'page'$"):
        Client().get()


@pytest.mark.parametrize("kwargs", [{"nope": 1}, {"url": "u"}], ids=str)
@pytest.mark.parametrize("how", ["call", "stream"])
def test_a_wrong_call_of_a_map_names_the_function_before_anything_starts(how, kwargs, mode):
    mapped = opmap(**mode.options)(mode.define(fetch))
    calls = {
        "call": lambda: mode.run(mapped, ["u"], **kwargs),
        "stream": lambda: mapped.stream(["u"], **kwargs),
    }

    with pytest.raises(TypeError, match="fetch"):
        calls[how]()

    assert mapped.stats.snapshot() == CallStats()


def test_a_wrong_single_call_of_a_map_is_not_retried(mode):
    mapped = opmap(retries=3, **mode.options)(mode.define(fetch))
    world = World(is_async=mode.is_async)

    with pytest.raises(TypeError, match=r"fetch\(\) got an unexpected keyword argument 'nope'"):
        world.run(mapped.one, "u", nope=1)

    assert mapped.stats.retries == 0


def test_a_missing_argument_of_a_map_names_the_function_before_an_item_is_pulled(mode):
    def pulled():
        pytest.fail("an item was pulled")
        yield

    mapped = opmap(**mode.options)(mode.define(plain))

    with pytest.raises(TypeError, match="plain"):
        mode.run(mapped, pulled())

    assert mapped.stats.snapshot() == CallStats()


@pytest.mark.parametrize("form", ["coroutine", "future-like"])
def test_a_plain_function_that_returns_an_awaitable_is_refused_at_its_first_call(form, way):
    async def answer():
        return 1

    class Later:
        def __await__(self):
            yield

    def hidden():
        return answer() if form == "coroutine" else Later()

    decorated = opero(**way)(hidden)

    with pytest.raises(TypeError, match=r"hidden.*async def"):
        decorated()
    assert decorated.stats.attempts == 1


# Partial objects


def test_a_partial_object_is_named_after_its_function(world):
    decorated = opero(functools.partial(world.define(fetch), retries_left=5))

    assert (decorated.__name__, decorated.__qualname__) == ("fetch", "fetch")


def test_a_partial_object_of_a_local_function_has_the_function_s_short_name():
    def local():
        """Do nothing."""

    decorated = opero(functools.partial(local))

    assert decorated.__name__ == "local"
    assert decorated.__qualname__.endswith(".<locals>.local")


def test_a_partial_object_has_the_module_of_its_function():
    assert opero(functools.partial(fetch)).__module__ == fetch.__module__


def test_a_partial_object_has_the_docstring_of_its_function():
    assert inspect.getdoc(opero(functools.partial(fetch))) == inspect.getdoc(fetch)


def test_a_partial_object_has_its_own_signature(world, way):
    partial = functools.partial(world.define(everything), 1, d=4)

    assert inspect.signature(opero(**way)(partial)) == inspect.signature(partial)


def test_a_partial_object_is_called_with_what_it_lacks(world, way):
    partial = functools.partial(world.define(everything), 1, d=4)
    decorated = opero(**way)(partial)

    assert world.run(decorated, 5, 6, 7, e=8, f=9) == everything(1, 5, 6, 7, d=4, e=8, f=9)


def test_a_keyword_that_a_partial_object_holds_can_be_given_anew(world, way):
    decorated = opero(**way)(functools.partial(world.define(everything), 1, d=4))

    assert world.run(decorated, d=5) == everything(1, d=5)


def test_a_wrong_call_of_a_partial_object_is_not_retried(world, way):
    decorated = opero(**way)(functools.partial(world.define(fetch), retries_left=5))

    with pytest.raises(TypeError, match=r"fetch\(\) missing 1 required positional argument: 'url'"):
        world.run(decorated)
    assert decorated.stats.retries == 0


def test_a_partial_object_can_be_made_of_a_decorated_function(world, way):
    decorated = opero(**way)(world.define(everything))
    partial = functools.partial(decorated, 1, d=4)

    assert world.run(partial, 5, e=8) == everything(1, 5, d=4, e=8)
    assert inspect.iscoroutinefunction(partial) is world.is_async
    assert decorated.stats.calls == 1


def test_a_partial_object_can_be_made_of_a_bound_method():
    client = Client()

    assert functools.partial(client.get, 5)(size=2) == (client, 5, 2)


def test_a_partial_object_can_be_a_map(mode):
    mapped = opmap(**mode.options)(functools.partial(mode.define(fetch), retries_left=5))

    assert mode.run(mapped, ["u", "v"]) == [("u", 5), ("v", 5)]


# Methods


class Client:
    """A class with decorated methods, importable by name."""

    @opero
    def get(self, page, /, size=10, *more):
        """Get one page."""
        return (self, page, size, *more)

    @opero
    async def get_async(self, page, /, size=10, *more):
        """Get one page."""
        return (self, page, size, *more)

    @classmethod
    @opero
    def make(cls, page):
        """Make one."""
        return cls, page

    @staticmethod
    @opero
    def helper(page):
        """Help."""
        return page

    @opmap(mode="thread", workers=1, progress=False)
    def get_all(self, page, *, size=10):
        """Get pages."""
        return type(self), page, size

    @opmap(mode="async", progress=False)
    async def get_all_async(self, page, *, size=10):
        """Get pages."""
        return type(self), page, size

    @staticmethod
    @opmap(mode="thread", workers=1, progress=False)
    def help_all(page, *, size=10):
        """Help."""
        return page, size


class SpecialClient(Client):
    """A class that overrides a decorated method and calls it."""

    @opero
    def get(self, page, /, size=10, *more):
        return ("special", *super().get(page, size, *more))


def test_a_method_gets_its_instance(world, way):
    class Local:
        method = opero(**way)(world.define(lambda self, page, *, size=10: (self, page, size)))

    instance = Local()

    assert world.run(instance.method, 5) == (instance, 5, 10)
    assert world.run(instance.method, page=5, size=2) == (instance, 5, 2)
    assert world.run(Local.method, instance, 5) == (instance, 5, 10)


def test_a_method_of_a_class_with_slots_gets_its_instance(way):
    class Slotted:
        __slots__ = ("__weakref__",)

        @opero(**way)
        def method(self):
            return self

    instance = Slotted()

    assert instance.method() is instance


def test_the_instance_can_have_any_name(way):
    class Local:
        @opero(**way)
        def method(this, self):  # noqa: N805 - odd on purpose
            return this, self

    instance = Local()

    assert instance.method(self=5) == (instance, 5)


@pytest.mark.parametrize("name", ["get", "get_async"])
def test_the_signature_of_a_method_has_the_instance(name):
    assert list(inspect.signature(getattr(Client, name)).parameters) == ["self", "page", "size", "more"]


@pytest.mark.parametrize("name", ["get", "get_async"])
def test_the_signature_of_a_bound_method_lacks_the_instance(name):
    assert str(inspect.signature(getattr(Client(), name))) == "(page, /, size=10, *more)"


@pytest.mark.parametrize("name", ["__name__", "__qualname__", "__doc__", "__module__"])
@pytest.mark.parametrize("method", ["get", "get_async", "get_all", "get_all_async"])
def test_what_a_bound_method_tells_of_itself_is_that_of_the_method(method, name):
    assert getattr(getattr(Client(), method), name) == getattr(getattr(Client, method).__wrapped__, name)


@pytest.mark.parametrize("method", ["get", "get_async"])
def test_the_docstring_of_a_bound_method_is_found_by_inspect(method):
    assert inspect.getdoc(getattr(Client(), method)) == "Get one page."


def test_the_function_itself_can_be_had_of_a_bound_method():
    client = Client()

    assert client.get.__wrapped__(client, 5) == (client, 5, 10)


def test_the_function_itself_can_be_had_of_a_bound_map():
    client = Client()

    assert client.get_all.__wrapped__(client, 5) == (Client, 5, 10)


def test_a_bound_method_counts_for_the_method():
    class Local:
        @opero
        def method(self):
            """Do nothing."""

    Local().method()
    bound = Local().method
    bound()

    assert bound.stats.snapshot() == Local.method.stats.snapshot() == CallStats(calls=2, attempts=2)


def test_a_bound_map_counts_for_the_map():
    class Local:
        @opmap(mode="thread", progress=False)
        def method(self, item):
            """Do nothing."""

    Local().method([1, 2])
    bound = Local().method
    bound([3])

    assert bound.stats.snapshot() == Local.method.stats.snapshot() == CallStats(calls=3, attempts=3)


def test_the_cache_of_a_bound_method_is_the_methods():
    class Local:
        @opero(cache=True)
        def method(self, page):
            return page

    instance = Local()
    instance.method(1)
    assert instance.method.cache_info() == Local.method.cache_info() == (0, 1, 10_000, 1)
    assert control(instance.method).cache_delete(1) is True
    instance.method(1)
    instance.method.cache_clear()
    assert Local.method.cache_info().currsize == 0


def test_bound_methods_of_one_instance_are_equal():
    client = Client()

    assert client.get == client.get
    assert hash(client.get) == hash(client.get)


def test_bound_methods_of_different_instances_are_not_equal():
    assert Client().get != Client().get


def test_a_bound_method_knows_its_instance():
    client = Client()

    assert client.get.__self__ is client


def test_a_bound_method_keeps_no_cycle_with_its_instance():
    client = Client()
    client.get(1)
    alive = weakref.ref(client)
    del client

    assert alive() is None


def test_a_method_can_be_overridden_and_called_through_super():
    client = SpecialClient()

    assert client.get(5) == ("special", client, 5, 10)


def test_a_class_method_gets_its_class():
    assert Client.make(5) == (Client, 5)
    assert SpecialClient().make(5) == (SpecialClient, 5)


def test_a_static_method_gets_its_arguments_only():
    assert Client.helper(5) == Client().helper(5) == 5


@pytest.mark.parametrize("name", ["make", "helper"])
def test_class_and_static_methods_have_stats(name):
    method = getattr(Client, name)
    before = method.stats.calls
    method(5)

    assert getattr(Client, name).stats.calls == before + 1


def test_a_property_can_stand_above(way):
    class Local:
        @property
        @opero(**way)
        def size(self):
            return 5

    assert Local().size == 5


def test_a_cached_property_can_stand_above():
    class Local:
        @functools.cached_property
        @opero
        def size(self):
            return [5]

    instance = Local()

    assert instance.size is instance.size


@pytest.mark.parametrize("above", [True, False], ids=["above", "below"])
def test_a_decorated_method_stays_abstract(above):
    def get(self):
        """Get one page."""

    class Base(abc.ABC):  # noqa: B024 - that is the question
        method = opero(abc.abstractmethod(get)) if above else abc.abstractmethod(opero(get))

    assert Base.__abstractmethods__ == {"method"}


def test_a_decorated_function_as_an_attribute_of_an_instance_is_not_bound():
    client = Client()
    client.fetch = opero(fetch)

    assert client.fetch("u") == ("u", 3)


def test_a_decorated_function_put_into_a_class_later_is_a_method():
    class Local:
        pass

    Local.method = opero(lambda self, page: (self, page))
    instance = Local()

    assert instance.method(5) == (instance, 5)


def test_a_bound_method_can_be_decorated(world):
    class Local:
        def method(self, page):
            return self, page

        async def method_async(self, page):
            return self, page

    instance = Local()
    decorated = opero(instance.method_async if world.is_async else instance.method)

    assert world.run(decorated, 5) == (instance, 5)
    assert str(inspect.signature(decorated)) == "(page)"


def test_a_callable_object_can_be_decorated(world, way):
    class Caller:
        """Call."""

        __call__ = world.define(lambda self, page, *, size=10: (page, size))

    decorated = opero(**way)(Caller())

    assert world.run(decorated, 5) == (5, 10)
    assert str(inspect.signature(decorated)) == "(page, *, size=10)"


def test_a_callable_object_is_named_after_its_class():
    class Caller:
        """Call."""

        def __call__(self):
            """Do nothing."""

    decorated = opero(Caller())

    assert decorated.__name__ == "Caller"
    assert decorated.__qualname__ == Caller.__qualname__
    assert decorated.__doc__ == "Call."


@pytest.mark.parametrize("name", ["get_all", "get_all_async"])
def test_a_map_can_be_a_method(name):
    assert getattr(SpecialClient(), name).run([1, 2], size=5) == [(SpecialClient, 1, 5), (SpecialClient, 2, 5)]


def test_a_map_can_be_a_static_method():
    assert Client.help_all([1, 2], size=5) == Client().help_all([1, 2], size=5) == [(1, 5), (2, 5)]


def test_a_map_of_the_class_takes_no_instance_from_nowhere():
    assert Client.get_all is Client.__dict__["get_all"]


def test_a_single_call_of_a_bound_map_gets_its_instance():
    assert SpecialClient().get_all.one(1) == (SpecialClient, 1, 10)


# Builtins and signatures that tell something else


def test_a_builtin_can_be_decorated(way):
    assert opero(**way)(pow)(2, 10, mod=1000) == 24


def test_a_builtin_without_a_signature_can_be_decorated(way):
    assert opero(**way)(max)([1, 3, 2], default=0) == 3


def test_a_signature_that_a_function_claims_is_kept(way):
    def wrapper(*args, **kwargs):
        return args, kwargs

    wrapper.__signature__ = inspect.Signature([inspect.Parameter("page", inspect.Parameter.POSITIONAL_OR_KEYWORD)])
    decorated = opero(**way)(wrapper)

    assert str(inspect.signature(decorated)) == "(page)"
    assert decorated(5) in [((5,), {}), ((), {"page": 5})]


def test_a_positional_only_parameter_can_be_named_by_a_keyword_of_the_language(way):
    def wrapper(*args):
        return args

    wrapper.__signature__ = inspect.Signature([inspect.Parameter("class", inspect.Parameter.POSITIONAL_ONLY)])

    assert opero(**way)(wrapper)(5) == (5,)


# Other decorators


def logged(function):
    """A decorator as everybody writes it."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        log.append((args, kwargs))
        return function(*args, **kwargs)

    return wrapper


def logged_async(function):
    @functools.wraps(function)
    async def wrapper(*args, **kwargs):
        log.append((args, kwargs))
        return await function(*args, **kwargs)

    vars(wrapper).pop("__signature__", None)  # it came from `World.define`, which is of no interest here
    return wrapper


log = []


@pytest.fixture(autouse=True)
def _empty_log():
    log.clear()


# A limit and a key of the user's change nothing of how arguments come in.
some_ways = pytest.mark.parametrize("way", ["direct", "cached", "through the flow"], indirect=True)


@each_function
@some_ways
def test_the_signature_survives_a_wrapper_below(function, world, way):
    wrap = logged_async if world.is_async else logged

    assert inspect.signature(opero(**way)(wrap(world.define(function)))) == inspect.signature(function)


@each_shape
@some_ways
def test_arguments_arrive_through_a_wrapper_below(function, args, kwargs, world, way):
    wrap = logged_async if world.is_async else logged
    decorated = opero(**way)(wrap(world.define(function)))

    assert world.run(decorated, *args, **kwargs) == function(*args, **kwargs)
    assert log == [(tuple(args), kwargs)]


@each_shape
@some_ways
def test_arguments_arrive_through_a_wrapper_above(function, args, kwargs, world, way):
    wrap = logged_async if world.is_async else logged
    decorated = wrap(opero(**way)(world.define(function)))

    assert world.run(decorated, *args, **kwargs) == function(*args, **kwargs)
    assert log == [(tuple(args), kwargs)]


def test_a_wrapper_above_keeps_names_signature_and_stats(world):
    decorated = logged(opero(world.define(fetch)))
    world.run(decorated, "u")

    assert (decorated.__name__, decorated.__doc__) == (fetch.__name__, fetch.__doc__)
    assert inspect.signature(decorated) == inspect.signature(fetch)
    assert decorated.__wrapped__.stats.calls == 1


def test_a_wrapper_below_runs_in_every_attempt(world):
    wrap = logged_async if world.is_async else logged

    def fail(page):
        raise BrokenError

    with pytest.raises(BrokenError):
        world.run(opero(retries=2, min_delay=0, max_delay=0)(wrap(world.define(fail))), 5)

    assert log == [((5,), {})] * 3


def test_a_wrapper_below_that_takes_other_arguments_gets_its_own(way):
    @functools.wraps(fetch)
    def with_session(session, *args, **kwargs):
        return session, *fetch(*args, **kwargs)

    assert opero(**way)(with_session)("s", "u", retries_left=1) == ("s", "u", 1)


def test_a_signature_that_wraps_has_copied_does_not_hide_what_a_wrapper_takes(way):
    def get(page):
        return page

    get.__signature__ = inspect.signature(get)

    @functools.wraps(get)
    def with_session(session, *args, **kwargs):
        return session, get(*args, **kwargs)

    assert opero(**way)(with_session)("s", 5) == ("s", 5)


def test_a_plain_wrapper_around_an_async_function_is_refused_at_its_first_call():
    async def answer():
        return 1

    decorated = opero(logged(answer))

    with pytest.raises(TypeError, match=r"answer.*async def"):
        decorated()


def test_a_wrapper_can_stand_above_and_below_a_map():
    mapped = logged(opmap(mode="thread", workers=1, progress=False)(logged(fetch)))

    assert mapped(["u"], retries_left=1) == [("u", 1)]
    assert log == [((["u"],), {"retries_left": 1}), (("u",), {"retries_left": 1})]


def test_lru_cache_can_stand_below(way):
    calls = []

    @functools.lru_cache
    def double(number):
        calls.append(number)
        return 2 * number

    decorated = opero(**way)(double)

    assert [decorated(2), decorated(2), decorated(number=3)] == [4, 4, 6]
    assert calls == [2, 3]


def test_lru_cache_can_stand_above():
    decorated = opero(fetch)
    cached = functools.lru_cache(decorated)

    assert cached("u") == cached("u") == ("u", 3)
    assert decorated.stats.calls == 1


def test_opero_can_stand_above_opero(world, way):
    inner = opero(**way)(world.define(fetch))
    outer = opero(**way)(inner)

    assert world.run(outer, "u") == ("u", 3)
    assert outer.stats.attempts == inner.stats.calls == 1
    assert inspect.signature(outer) == inspect.signature(fetch)


@pytest.mark.parametrize("options", [{}, {"cache": True}, {"arg_fallback": "page"}], ids=str)
def test_a_bound_method_that_opero_has_decorated_can_be_decorated_again(world, options):
    class Pages:
        fetch = opero(world.define(lambda self, page: (self, page)))
        mapped = opmap(mode="async" if world.is_async else "thread", progress=False)(fetch)

    pages = Pages()
    assert world.run(opero(**options)(pages.fetch), 1) == (pages, 1)
    mapped = opmap(mode="async" if world.is_async else "thread", progress=False, **options)(pages.fetch)
    assert mapped.run([1, 2]) == [(pages, 1), (pages, 2)]


def test_opmap_can_stand_above_opero(mode):
    mapped = opmap(**mode.options)(opero(mode.define(fetch)))

    assert mode.run(mapped, ["u", "v"], retries_left=1) == [("u", 1), ("v", 1)]


def test_singledispatch_can_stand_above():
    @functools.singledispatch
    @opero
    def kind_of(value):
        return "something"

    kind_of.register(int, opero(lambda value: "a number"))

    assert [kind_of("text"), kind_of(5)] == ["something", "a number"]


# Independence


def test_decorating_the_same_function_twice_gives_independent_stats(world):
    function = world.define(fetch)
    first, second = opero(function), opero(function)
    world.run(first, "u")

    assert first.stats.snapshot() == CallStats(calls=1, attempts=1)
    assert second.stats.snapshot() == CallStats()


def test_decorating_the_same_function_twice_gives_independent_caches(world):
    function = world.define(fetch)
    first, second = opero(cache=True)(function), opero(cache=True)(function)
    world.run(first, "u")

    assert (first.cache_info().currsize, second.cache_info().currsize) == (1, 0)


def test_one_called_decorator_gives_each_function_stats_of_its_own(world):
    decorate = opero(retries=1)
    first, second = decorate(world.define(fetch)), decorate(world.define(fetch))
    world.run(first, "u")

    assert first.stats.snapshot() == CallStats(calls=1, attempts=1)
    assert second.stats.snapshot() == CallStats()


def test_mapping_the_same_function_twice_gives_independent_stats(mode):
    function = mode.define(fetch)
    first, second = opmap(**mode.options)(function), opmap(**mode.options)(function)
    mode.run(first, ["u"])

    assert first.stats.snapshot() == CallStats(calls=1, attempts=1)
    assert second.stats.snapshot() == CallStats()


def test_the_function_itself_is_left_as_it_was(world, way):
    function = world.define(fetch)
    before = dict(vars(function))
    decorated = opero(**way)(function)
    world.run(function, "u")

    assert vars(function) == before
    assert decorated.stats.snapshot() == CallStats()


# Copies


def local(mode_name=None):
    """A decorated function that no name leads to."""

    def double(number):
        return 2 * number

    return opero(double) if mode_name is None else opmap(mode=mode_name, workers=1, progress=False)(double)


MODULE = '''
"""Decorated functions and maps for a test."""

from opero import opero, opmap


@opero(retries=1, cache=True)
def double(number):
    return 2 * number


@opero
async def double_async(number):
    return 2 * number


@opmap(mode="thread", workers=1, progress=False)
def double_all(number):
    return 2 * number


@opmap(mode="async", progress=False)
async def double_all_async(number):
    return 2 * number


class Doubler:
    def __init__(self, factor):
        self.factor = factor

    @opero
    def double(self, number):
        return self.factor * number

    @opmap(mode="thread", workers=1, progress=False)
    def double_all(self, number):
        return self.factor * number


def local_function():
    return opero(lambda number: 2 * number)


def local_cached_function():
    return opero(cache=True, rate_limit=1e6)(lambda number: 2 * number)


def local_map():
    return opmap(mode="thread", workers=1, progress=False)(lambda number: 2 * number)


def closure():
    double = local_function()
    return lambda number: double(number)
'''
BY_NAME = {
    "double": "thing(21)",
    "double_async": "asyncio.run(thing(21))",
    "double_all": "thing([21])[0]",
    "double_all_async": "thing.run([21])[0]",
    "Doubler.double": "thing(module.Doubler(2), 21)",
    "Doubler.double_all": "thing.__wrapped__(module.Doubler(2), 21)",
}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module with decorated functions, which other processes can import too."""
    (tmp_path / "decorated_module.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("decorated_module")
    del sys.modules["decorated_module"]


def named(module, name):
    return functools.reduce(getattr, name.split("."), module)


def elsewhere(module, data, pickler, expression):
    """The value of an expression about the unpickled ``thing``, in another process."""
    program = (
        "import asyncio, importlib, sys\n"
        f"import {pickler}\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "module = importlib.import_module('decorated_module')\n"
        f"thing = {pickler}.loads(sys.stdin.buffer.read())\n"
        f"print({expression})\n"
    )
    folder = str(Path(module.__file__).parent)
    done = subprocess.run([sys.executable, "-c", program, folder], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", BY_NAME)
def test_pickle_gives_the_same_object_by_its_name(name, protocol, module):
    thing = named(module, name)

    assert pickle.loads(pickle.dumps(thing, protocol)) is thing


@pytest.mark.parametrize("name", BY_NAME)
def test_dill_gives_the_same_object_by_its_name(name, module):
    thing = named(module, name)

    assert dill.loads(dill.dumps(thing)) is thing


def test_pickled_things_work_in_another_process(module):
    data = pickle.dumps([named(module, name) for name in BY_NAME])
    expressions = ", ".join(f"[{use} for thing in [thing[{n}]]][0]" for n, use in enumerate(BY_NAME.values()))

    assert elsewhere(module, data, "pickle", expressions) == "42 42 42 42 42 42"


def test_pickled_bound_methods_work_in_another_process(module):
    doubler = module.Doubler(2)
    data = pickle.dumps([doubler.double, doubler.double_all])

    assert elsewhere(module, data, "pickle", "thing[0](21), thing[1]([21])") == "42 [42]"


def test_a_pickled_bound_method_counts_for_the_method(module):
    bound = pickle.loads(pickle.dumps(module.Doubler(2).double))
    bound(21)

    assert module.Doubler.double.stats.calls == 1


def test_a_pickled_bound_map_counts_for_the_map(module):
    bound = pickle.loads(pickle.dumps(module.Doubler(2).double_all))
    bound([21])

    assert module.Doubler.double_all.stats.calls == 1


def test_pickle_refuses_a_local_function_as_it_refuses_every_local_function():
    with pytest.raises((pickle.PicklingError, AttributeError), match="local"):
        pickle.dumps(local())


def test_cloudpickle_rebuilds_a_local_function():
    original = local()
    rebuilt = cloudpickle.loads(cloudpickle.dumps(original))

    assert rebuilt(21) == 42
    assert (rebuilt.stats.calls, original.stats.calls) == (1, 0)


def test_cloudpickle_rebuilds_a_local_map():
    original = local("thread")
    rebuilt = cloudpickle.loads(cloudpickle.dumps(original))

    assert rebuilt([21]) == [42]
    assert (rebuilt.stats.calls, original.stats.calls) == (1, 0)


@pytest.mark.parametrize("pickler", ["cloudpickle", "dill"])
def test_local_things_are_carried_to_another_process(pickler, module):
    things = module.local_function(), module.local_cached_function(), module.local_map(), module.closure()
    data = cloudpickle.dumps(things) if pickler == "cloudpickle" else dill.dumps(things, recurse=True)

    assert (
        elsewhere(module, data, pickler, "thing[0](21), thing[1](21), thing[2]([21]), thing[3](21)") == "42 42 [42] 42"
    )


SCRIPT = """
from opero import opero, opmap


@opero
def double(number):
    return 2 * number


@opmap(workers=1, progress=False, pool_options={"start_method": "spawn"})
def work(number):
    return double(number)


if __name__ == "__main__":
    print(work([21]))
"""


def test_a_map_of_a_script_calls_a_decorated_function_of_the_script_in_another_process(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")

    done = subprocess.run([sys.executable, str(path)], capture_output=True, check=False)

    assert (done.stdout.decode().strip(), done.stderr.decode()[-500:]) == ("[42]", "")


def test_cloudpickle_keeps_the_options_of_a_local_function():
    def fail():
        raise BrokenError

    rebuilt = cloudpickle.loads(cloudpickle.dumps(opero(retries=4, min_delay=0, max_delay=0)(fail)))

    with pytest.raises(BrokenError):
        rebuilt()
    assert rebuilt.stats.attempts == 5


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
@pytest.mark.parametrize("kind", ["module-level", "local", "map", "local map", "async map"])
def test_a_copy_is_the_same_object(kind, copier):
    thing = {
        "module-level": Client.get,
        "local": local(),
        "map": Client.get_all,
        "local map": local("thread"),
        "async map": Client.get_all_async,
    }[kind]

    assert copier(thing) is thing


@pytest.mark.parametrize("options", [{}, {"total_timeout": 60}, {"default": None}])
def test_the_first_call_may_be_a_deep_recursion(options):
    @opero(retries=1, **options)
    def walk(depth):
        return 0 if depth == 0 else 1 + walk(depth - 1)

    # In a thread, whose stack has nothing else on it.
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(walk, 220).result() == 220


def test_a_deep_copy_of_what_holds_a_decorated_function_holds_the_same():
    decorated = local()

    assert copy.deepcopy({"hook": [decorated]}) == {"hook": [decorated]}


def test_a_copy_of_a_bound_method_is_bound_to_the_same_instance():
    client = Client()

    assert copy.copy(client.get)(5)[0] is client
    assert copy.copy(client.get_all).one(5) == (Client, 5, 10)


def test_a_deep_copy_of_a_bound_method_is_bound_to_a_copy():
    class Box:
        def __init__(self):
            self.content = []

        @opero
        def add(self, item):
            self.content.append(item)
            return self.content

    box = Box()
    copied = copy.deepcopy(box.add)

    assert copied(1) == [1]
    assert box.content == []


# Maps


def with_session(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function("session", *args, **kwargs)

    return wrapper


def test_a_map_takes_the_arguments_of_a_wrapper_and_not_of_what_it_wraps():
    @opmap(mode="thread", progress=False)
    @with_session
    def fetch(session, url, suffix=""):
        return session, url + suffix

    assert fetch(["u"]) == [("session", "u")]
    assert fetch(["u"], suffix="/") == [("session", "u/")]
    assert [outcome.result for outcome in fetch.stream(["u"])] == [("session", "u")]


def test_a_map_has_what_others_have_attached_to_the_function():
    class Service(abc.ABC):
        @opmap(mode="thread", progress=False)
        @abc.abstractmethod
        def fetch(self, url):
            return url

    with pytest.raises(TypeError, match="abstract"):
        Service()

    def work(item):
        return item

    work.label = "attached"
    work.stats = "hides nothing of the map's own"
    mapped = opmap(mode="thread", progress=False)(work)
    assert mapped.label == "attached"
    assert mapped.stats.calls == 0


MAIN = """
    import concurrent.futures, multiprocessing, pickle, sys
    from opero import opero, opmap

    @opero(retries=1)
    def double(item):
        return 2 * item

    @opmap(mode="thread", progress=False)
    def triple(item):
        return 3 * item

    def main():
        print(pickle.loads(pickle.dumps(double)) is double, pickle.loads(pickle.dumps(triple)) is triple)
        context = multiprocessing.get_context(sys.argv[1])
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
            print(list(executor.map(double, [1, 2])), executor.submit(triple, [1, 2]).result())

    if __name__ == "__main__":
        main()
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_decorated_function_of_the_main_module_can_be_sent_by_the_standard_library(tmp_path, method):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(MAIN))
    command = [sys.executable, script, method]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.stdout, run.stderr) == ("True True\n[2, 4] [3, 6]\n", "")


BY_VALUE = """
    import cloudpickle, dill, subprocess, sys
    from opero import opero

    @opero(retries=1)
    def double(item):
        return 2 * item

    for dumps, options in ((cloudpickle.dumps, {}), (dill.dumps, {"recurse": True})):
        code = f"import pickle, sys; print(pickle.load(sys.stdin.buffer)(4))"
        sent = dumps(double, **options)
        print(subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True).stdout)
"""


def test_a_decorated_function_of_the_main_module_can_be_sent_by_value():
    command = [sys.executable, "-c", textwrap.dedent(BY_VALUE)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.stdout, run.stderr) == ("b'8\\n'\n" * 2, "")
