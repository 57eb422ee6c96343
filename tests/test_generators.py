"""Generator functions: every policy holds until their first item has come; then they are as they were."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import re
import subprocess
import sys
import weakref

import pytest
import tenacity

from opero import AllFailedError, control, opero
from opero.core import (
    CallTimeoutError,
    CircuitOpenError,
    get_cache_decorator,
    get_rate_limit_decorator,
    get_retry_decorator,
)
from opero.testing import instant


class Generators:
    """Runs one test body with generator functions or with async generator functions."""

    def __init__(self, *, is_async: bool) -> None:
        self.is_async = is_async

    def define(self, function):
        """Make a generator function one of this world."""
        if not self.is_async:
            return function

        @functools.wraps(function)
        async def generator(*args, **kwargs):
            source = function(*args, **kwargs)
            item = next(source, None)
            while True:
                try:
                    sent = yield item
                    item = source.send(sent)
                except StopIteration:
                    return
                except GeneratorExit:
                    source.close()
                    raise
                except ThrownError as error:
                    item = source.throw(error)

        return generator

    def list(self, generator):
        if not self.is_async:
            return list(generator)

        async def gathered():
            return [item async for item in generator]

        return asyncio.run(gathered())

    def steps(self, generator, *steps):
        """What a generator gives for each step: the name of a method, and its arguments."""
        if not self.is_async:
            return [getattr(generator, name)(*args) for name, *args in steps]

        async def taken():
            return [await getattr(generator, f"a{name}")(*args) for name, *args in steps]

        return asyncio.run(taken())


@pytest.fixture(params=["sync", "async"])
def world(request):
    return Generators(is_async=request.param == "async")


class ThrownError(Exception):
    pass


def pages(count, failures=()):
    """A generator function that fails before its first item as often as there are failures left."""

    def fetch(first=0):
        if failures:
            raise failures.pop()
        yield from range(first, first + count)

    return fetch


def test_a_decorated_generator_function_is_one(world):
    f = opero(world.define(pages(2)))
    assert inspect.isgeneratorfunction(f) is not world.is_async
    assert inspect.isasyncgenfunction(f) is world.is_async


def test_the_items_come_as_they_are(world):
    f = opero(world.define(pages(3)))
    assert world.list(f(5)) == [5, 6, 7]
    assert world.list(f(first=1)) == [1, 2, 3]
    assert f.stats.calls == f.stats.attempts == 2


def test_nothing_runs_before_the_first_item_is_asked_for(world):
    f = opero(world.define(pages(3)))
    generator = f()
    assert f.stats.calls == 0
    assert world.list(generator) == [0, 1, 2]


def test_a_failure_before_the_first_item_is_retried(world, fake_clock):
    f = opero(retries=3)(world.define(pages(2, [ConnectionError(), ConnectionError()])))
    assert world.list(f()) == [0, 1]
    assert f.stats.retries == 2
    assert len(fake_clock.sleeps) == 2


def test_the_last_failure_is_raised_where_the_first_item_is_asked_for(world, fake_clock):
    errors = [ConnectionError(n) for n in range(3)]
    last = errors[0]
    f = opero(retries=2)(world.define(pages(2, errors)))
    generator = f()
    with pytest.raises(ConnectionError) as caught:
        world.list(generator)
    assert caught.value is last


def test_a_failure_after_the_first_item_is_the_callers(world):
    def breaks():
        yield 1
        raise ConnectionError

    f = opero(retries=3)(world.define(breaks))
    with pytest.raises(ConnectionError):
        world.list(f())
    assert (f.stats.attempts, f.stats.failures) == (1, 0)


def test_candidates_are_tried_until_one_gives_an_item(world):
    def read(mirror):
        if mirror == "north":
            raise ConnectionError
        yield mirror

    f = opero(arg_fallback="mirror", retries=0)(world.define(read))
    assert world.list(f(["north", "south"])) == ["south"]
    with pytest.raises(AllFailedError):
        world.list(f(["north", "north"]))


def test_a_generator_without_items_is_a_success(world):
    f = opero(retries=3)(world.define(pages(0)))
    if world.is_async:
        f = opero(retries=3)(empty_async)
    assert world.list(f()) == []
    assert (f.stats.attempts, f.stats.failures) == (1, 0)


async def empty_async():
    return
    yield


@contextlib.contextmanager
def manager():
    yield


@contextlib.asynccontextmanager
async def manager_async():
    yield


def test_the_result_of_a_generator_is_given_to_yield_from():
    @opero
    def inner(count):
        yield from range(count)
        return "done"

    ends = []

    def outer(count):
        ends.append((yield from inner(count)))

    assert [list(outer(count)) for count in (0, 1, 3)] == [[], [0], [0, 1, 2]]
    assert ends == ["done"] * 3


def test_what_is_sent_and_thrown_arrives(world):
    def echo():
        got = yield "first"
        try:
            got = yield got
        except ThrownError:
            got = yield "caught"
        yield got

    f = opero(world.define(echo))
    steps = (("send", None), ("send", "sent"), ("throw", ThrownError()), ("send", "again"))
    assert world.steps(f(), *steps) == ["first", "sent", "caught", "again"]


def test_an_error_that_is_thrown_and_caught_is_not_kept():
    def echo():
        while True:
            with contextlib.suppress(ThrownError):
                yield

    generator = opero(echo)()
    next(generator)
    error = ThrownError()
    known = weakref.ref(error)
    generator.throw(error)
    del error
    assert known() is None


def test_an_error_that_is_thrown_into_an_async_generator_and_caught_is_not_kept():
    async def echo():
        while True:
            with contextlib.suppress(ThrownError):
                yield

    async def body():
        generator = opero(echo)()
        await anext(generator)
        error = ThrownError()
        known = weakref.ref(error)
        await generator.athrow(error)
        del error
        return known() is None

    assert asyncio.run(body())


def test_an_error_that_is_thrown_and_not_caught_comes_back(world):
    f = opero(world.define(pages(3)))
    with pytest.raises(ThrownError):
        world.steps(f(), ("send", None), ("throw", ThrownError()))


def test_closing_closes_the_generator_below(world):
    closed = []

    def lines():
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    f = opero(world.define(lines))
    world.steps(f(), ("send", None), ("close",))
    assert closed == [True]


def test_a_generator_that_is_dropped_is_closed_at_once():
    closed = []

    @opero
    def lines():
        try:
            yield 1
        finally:
            closed.append(True)

    next(lines())
    assert closed == [True]


def test_each_beginning_takes_a_slot_and_items_take_none(world):
    f = opero(rate_limit=0.1, rate_limit_options={"max_burst": 1}, retries=0)(world.define(pages(5)))
    with instant() as time:
        for _ in range(3):
            world.list(f())
    assert time.skipped == pytest.approx(20, rel=0.1)


def test_the_circuit_hears_of_beginnings(world, fake_clock):
    f = opero(breaker=2, retries=0)(world.define(pages(2, [ConnectionError(), ConnectionError()])))
    for _ in range(2):
        with pytest.raises(ConnectionError):
            world.list(f())
    with pytest.raises(CircuitOpenError):
        world.list(f())


def test_attempt_timeout_bounds_the_first_item_and_no_other():
    async def slow(first):
        if first:
            await asyncio.Event().wait()
        yield 1
        await asyncio.sleep(0.05)
        yield 2

    f = opero(attempt_timeout=0.02, retries=0)(slow)

    async def gather(first):
        return [item async for item in f(first)]

    assert asyncio.run(gather(first=False)) == [1, 2]
    with pytest.raises(CallTimeoutError):
        asyncio.run(gather(first=True))


def test_methods_can_be_generator_functions(world):
    class Client:
        rows = opero(world.define(lambda self, count: (yield from [self] * count)))

    client = Client()
    assert world.list(client.rows(2)) == [client, client]


def test_a_generator_function_can_be_given_other_options(world, fake_clock):
    f = opero(retries=3)(world.define(pages(1, [ConnectionError(), ConnectionError()])))
    with pytest.raises(ConnectionError):
        world.list(control(f).with_options(retries=0)())
    assert world.list(f()) == [0]


@pytest.mark.parametrize("options", [{}, {"retries": 0}, {"cache": True}], ids=str)
@pytest.mark.parametrize(
    ("returned", "hint"),
    [
        (lambda: (n for n in range(3)), "write `yield` in the decorated function itself"),
        (empty_async, "write `yield` in the decorated function itself"),
        (manager, "put the decorator of contextlib above"),
        (manager_async, "put the decorator of contextlib above"),
    ],
    ids=["generator", "async generator", "manager", "async manager"],
)
def test_a_function_that_returns_what_has_not_run_is_refused_at_its_first_call(returned, hint, options):
    def fetch():
        return returned()

    f = opero(**options)(fetch)
    with pytest.raises(TypeError, match=f"fetch returned .*{hint}"):
        f()
    assert f.stats.attempts == 1


@pytest.mark.parametrize("returned", [iter, enumerate, lambda items: map(str, items)], ids=["iter", "enumerate", "map"])
def test_what_can_be_read_once_is_refused_where_it_would_be_cached(returned):
    def rows():
        return returned([1, 2])

    with pytest.raises(TypeError, match=r"rows returned .*read only once"):
        opero(cache=True)(rows)()
    assert list(opero(rows)()) == list(returned([1, 2]))


def test_a_file_is_refused_where_it_would_be_cached(tmp_path):
    (tmp_path / "file").write_text("line")

    @opero(cache=True)
    def opened():
        with (tmp_path / "file").open() as file:
            return file

    with pytest.raises(TypeError, match=r"opened returned TextIOWrapper.*read only once"):
        opened()


def test_what_an_async_function_returns_is_looked_at_where_it_would_be_cached():
    @opero(cache=True)
    async def rows():
        return (n for n in range(3))

    with pytest.raises(TypeError, match="rows returned generator"):
        asyncio.run(rows())


@pytest.mark.parametrize("options", [{"default": None}, {"retry_if_result": len}], ids=str)
def test_what_needs_a_result_is_refused(world, options):
    (name,) = options
    with pytest.raises(TypeError, match=f"{name}=… cannot apply to the generator function"):
        opero(**options)(world.define(pages(1)))


OPEN_GENERATOR = """
import asyncio
from opero import opero

@opero(retries=2)
async def rows():
    try:
        for number in range(10):
            await asyncio.sleep(0)
            yield number
    finally:
        await asyncio.sleep(0)
        print("closed")

async def main():
    global stream
    stream = rows()
    await anext(stream)

asyncio.run(main())
"""


def test_a_generator_that_is_open_when_the_loop_ends_is_closed_once():
    command = [sys.executable, "-c", OPEN_GENERATOR]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.stdout, run.stderr) == ("closed\n", "")


class Large:
    pass


def test_arguments_live_no_longer_than_the_generator_needs_them(world):
    def items(large):
        known = weakref.ref(large)
        del large
        yield 1
        yield known() is None

    async def items_async(large):
        known = weakref.ref(large)
        del large
        yield 1
        yield known() is None

    generator = opero(retries=0)(items_async if world.is_async else items)(Large())
    assert world.list(generator) == [1, True]


def test_what_judges_results_is_told_the_first_item(world, fake_clock):
    told = []
    judge = tenacity.retry_if_result(told.append)
    f = opero(retries=1, retry_options={"retry": judge})(world.define(pages(2)))
    assert world.list(f(5)) == [5, 6]
    assert told == [5]


@pytest.mark.parametrize(
    ("decorator", "what"),
    [
        (opero(retry_options={"retry_error_callback": lambda state: []}), "retry_error_callback"),
        (opero(rate_limit="9/s", rate_limit_cost=(1, lambda result: 1)), "a cost that is told by the result"),
        (get_retry_decorator(retry_if_result=len), "retry_if_result=…"),
        (get_retry_decorator(retry_error_callback=lambda state: []), "retry_error_callback"),
        (get_rate_limit_decorator("9/s", rate_limit_cost=(1, len)), "a cost that is told by the result"),
        (get_cache_decorator(), "cache"),
    ],
    ids=["callback", "cost", "retry_if_result", "callback of retry", "cost of rate limit", "cache"],
)
def test_what_is_told_the_result_or_makes_one_is_refused(world, decorator, what):
    with pytest.raises(TypeError, match=re.escape(f"{what} cannot apply to the generator function")):
        decorator(world.define(pages(2)))
