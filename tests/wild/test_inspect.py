"""What looks at functions sees the one that was decorated."""

from __future__ import annotations

import asyncio
import copy
import doctest
import inspect
import operator
import pickle
import pydoc
import sys
import types
import typing
import weakref
from functools import partial

import cloudpickle
import pytest

from opero import control, opero


def plain(a: int, /, b: list[str] | None = None, *more: float, c: bool = True, **rest: typing.Any) -> str:
    """Tell something.

    >>> 1 + 1
    2
    """
    return f"{a} {b} {more} {c} {rest}"


async def coroutine(a: int, /, b: list[str] | None = None, *more: float, c: bool = True, **rest: typing.Any) -> str:
    """Tell something."""
    return f"{a} {b} {more} {c} {rest}"


def generator(a: int, b: list[str] | None = None) -> typing.Iterator[str]:
    """Tell something."""
    yield f"{a} {b}"


async def async_generator(a: int, b: list[str] | None = None) -> typing.AsyncIterator[str]:
    """Tell something."""
    yield f"{a} {b}"


KINDS = [plain, coroutine, generator, async_generator]


@opero(min_delay=0)
def importable(x: int) -> int:
    """Add one.

    >>> importable(1)
    2
    """
    return x + 1


@opero(min_delay=0)
async def importable_async(x: int) -> int:
    return x + 1


class Client:
    """Has methods of each form."""

    @opero(min_delay=0)
    def fetch(self, path: str) -> str:
        """Fetch a path."""
        return path

    @opero(min_delay=0)
    async def fetch_async(self, path: str) -> str:
        return path

    @classmethod
    @opero(min_delay=0)
    def make(cls, path: str) -> type[Client]:
        return cls

    @property
    @opero(min_delay=0)
    def size(self) -> int:
        """How large it is."""
        return 3


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def original(request):
    return request.param


@pytest.fixture
def decorated(original):
    return opero(min_delay=0)(original)


QUESTIONS = [
    *(inspect.isfunction, inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction),
    *(inspect.isroutine, inspect.ismethoddescriptor, inspect.isbuiltin, inspect.isclass, callable, type),
    *(inspect.signature, inspect.get_annotations, typing.get_type_hints),
    *(inspect.getsource, inspect.getsourcelines, inspect.getcomments),
    *(inspect.getdoc, inspect.getmodule, pydoc.render_doc),
    *map(operator.attrgetter, ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__")),
    *(partial(ask, eval_str=True) for ask in (inspect.signature, inspect.get_annotations)),
    lambda function: getattr(function, "__type_params__", ()),
]


@pytest.mark.parametrize("question", QUESTIONS, ids=str)
def test_a_decorated_function_answers_like_its_own(original, decorated, question):
    assert question(decorated) == question(original)


def test_unwrap_gives_the_function_itself(original, decorated):
    assert inspect.unwrap(decorated) is original


def test_getfullargspec_takes_a_decorated_function(decorated):
    assert inspect.getfullargspec(decorated)  # it looks no further than the wrapper, whoever wrapped


def test_asyncio_knows_a_coroutine_function():
    if sys.version_info >= (3, 14):
        pytest.skip("deprecated there")
    assert asyncio.iscoroutinefunction(importable_async)
    assert not asyncio.iscoroutinefunction(importable)


def test_a_function_keeps_what_was_set_on_it(original):
    def marked():
        return None

    marked.mark = "kept"
    assert opero(marked).mark == "kept"


def test_something_can_be_set_on_a_decorated_function(decorated):
    decorated.mark = "set"
    assert decorated.mark == "set"


def test_a_decorated_function_has_a_weak_reference_and_a_hash(decorated):
    assert weakref.ref(decorated)() is decorated
    assert {decorated: 1}[decorated] == 1


def test_a_decorated_function_has_no_parameters_but_its_own(decorated, original):
    assert decorated != original
    assert list(inspect.signature(decorated).parameters) == list(inspect.signature(original).parameters)


# Methods


def test_a_method_is_found_as_a_function_of_the_class():
    assert {name for name, _ in inspect.getmembers(Client, inspect.isfunction)} == {"fetch", "fetch_async"}


def test_a_method_of_an_instance_is_bound():
    method = Client().fetch
    assert inspect.ismethod(method)
    assert isinstance(method, types.MethodType)
    assert list(inspect.signature(method).parameters) == ["path"]
    assert method.__func__ is Client.fetch


def test_methods_of_an_instance_are_equal():
    client = Client()
    assert client.fetch == client.fetch
    assert client.fetch != Client().fetch


def test_a_method_of_an_instance_is_a_coroutine_function():
    assert inspect.iscoroutinefunction(Client().fetch_async)


def test_a_weak_method_is_called():
    client = Client()
    assert weakref.WeakMethod(client.fetch)()("/a") == "/a"


def test_help_of_a_class_tells_of_its_methods():
    text = pydoc.plain(pydoc.render_doc(Client))
    assert "fetch(self, path: " in text
    assert "Fetch a path." in text
    assert "How large it is." in text


def test_doctest_runs_the_examples_of_a_decorated_function():
    module = sys.modules[__name__]
    found = doctest.DocTestFinder(exclude_empty=True).find(module)
    assert f"{__name__}.importable" in {test.name for test in found if test.examples}


# Copies and pickles


def test_a_copy_of_a_function_is_the_function(decorated):
    assert copy.copy(decorated) is decorated
    assert copy.deepcopy(decorated) is decorated


def test_a_pickled_function_is_the_one_of_its_module():
    for function in (importable, importable_async, Client.fetch):
        assert pickle.loads(pickle.dumps(function)) is function


def test_a_bound_method_is_pickled():
    assert pickle.loads(pickle.dumps(Client().fetch))("/a") == "/a"


def local_function(world):
    tries = []

    @opero(min_delay=0)
    @world.define
    def second_time(x):
        tries.append(x)
        if len(tries) == 1:
            raise ConnectionError
        return tries

    return second_time


def test_cloudpickle_takes_a_function_as_it_was_made(world):
    function = cloudpickle.loads(cloudpickle.dumps(local_function(world)))
    assert world.run(function, 1) == [1, 1]
    assert control(function).stats.attempts == 2


def test_cloudpickle_takes_a_function_after_its_calls(world):
    function = local_function(world)
    world.run(function, 1)
    copied = cloudpickle.loads(cloudpickle.dumps(function))
    assert world.run(copied, 2) == [1, 1, 2]
    assert control(function).stats.attempts == 2


def test_cloudpickle_takes_a_cached_function(world):
    @opero(cache=True)
    @world.define
    def twice(x):
        return 2 * x

    world.run(twice, 1)
    assert world.run(cloudpickle.loads(cloudpickle.dumps(twice)), 1) == 2


def test_cloudpickle_takes_a_class_with_decorated_methods():
    class Local:
        def __init__(self):
            self.tries = 0

        @opero(min_delay=0)
        def fetch(self):
            self.tries += 1
            if self.tries == 1:
                raise ConnectionError
            return self.tries

    assert cloudpickle.loads(cloudpickle.dumps(Local()))
    assert cloudpickle.loads(cloudpickle.dumps(Local))().fetch() == 2


def test_a_function_of_main_is_carried_to_another_process_by_cloudpickle(tmp_path, program):
    path = tmp_path / "pickled"
    source = """
        import sys, cloudpickle
        from opero import opero

        tries = []

        @opero(min_delay=0)
        def second_time(x):
            tries.append(x)
            if len(tries) == 1:
                raise ConnectionError
            return tries

        open(sys.argv[1], "wb").write(cloudpickle.dumps(second_time))
    """
    program(source, str(path))
    load = "import sys, cloudpickle; print(cloudpickle.load(open(sys.argv[1], 'rb'))(1))"
    assert program(load, str(path)) == "[1, 1]"
