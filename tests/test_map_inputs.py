"""What maps take their items from: everything that a `for` loop and an `async for` loop take."""

from __future__ import annotations

import asyncio
import contextlib
from contextvars import ContextVar
from types import MappingProxyType

import pytest

from opero import opmap

variable: ContextVar[str] = ContextVar("variable", default="unset")


def echo(item):
    return item


async def echo_async(item):
    return item


# One item in place of many


@pytest.mark.parametrize("items", ["https://one", b"bytes", bytearray(b"bytes"), 5, None, object()], ids=type)
def test_one_item_in_place_of_many_is_refused_with_the_ways_out(mode, items):
    mapped = opmap(**mode.options)(mode.define(echo))
    for run in (mode.run, mode.stream):
        with pytest.raises(TypeError, match=rf"{type(items).__name__} as its items; write echo\.one\(item\)"):
            run(mapped, items)


@pytest.mark.parametrize("mapping", [{"a": 1}, MappingProxyType({"a": 1})], ids=type)
def test_a_mapping_of_items_is_refused_with_the_ways_out(mode, mapping):
    mapped = opmap(**mode.options)(mode.define(echo))
    for way in (mapped, mapped.starmap):
        with pytest.raises(TypeError, match=r"echo\(list\(mapping\)\).* echo\.starmap\(mapping\.items\(\)\)"):
            mode.run(way, mapping)
    assert mode.run(mapped, {"a": 1}.keys()) == ["a"]


def test_text_is_one_item_of_a_single_call():
    mapped = opmap(mode="thread", progress=False)(echo)
    assert mapped.one("https://one") == "https://one"


# Lengths and iterators


class OnlyNext:
    """An iterator that is no iterable."""

    def __init__(self, count):
        self.left = count

    def __next__(self):
        if not self.left:
            raise StopIteration
        self.left -= 1
        return self.left

    async def __anext__(self):
        try:
            return next(self)
        except StopIteration:
            raise StopAsyncIteration from None


class ItsIteratorIsNoIterable:
    def __iter__(self):
        return OnlyNext(3)


class ItsAsyncIteratorIsNoIterable:
    def __aiter__(self):
        return OnlyNext(3)


class ItsLengthIsUnknown:
    def __len__(self):
        raise TypeError

    def __iter__(self):
        return iter([2, 1, 0])


@pytest.mark.parametrize(
    "items",
    [ItsIteratorIsNoIterable(), ItsLengthIsUnknown()],
    ids=["iterator without __iter__", "length without a value"],
)
@pytest.mark.parametrize("function", [echo, echo_async])
def test_a_map_takes_what_a_for_loop_takes(items, function):
    assert opmap(mode="thread", progress=False)(function).run(items) == [2, 1, 0]


def test_a_map_takes_what_an_async_for_loop_takes():
    assert opmap(mode="async", progress=False)(echo_async).run(ItsAsyncIteratorIsNoIterable()) == [2, 1, 0]


def test_a_stream_takes_a_range_that_has_no_length():
    with contextlib.closing(opmap(mode="thread", progress=False)(echo).stream(range(10**30))) as stream:
        assert next(stream).result == 0


# Async generators


def collect(source):
    async def main():
        return await opmap(mode="async", workers=3, progress=False)(echo_async)(source)

    return asyncio.run(main())


def test_an_async_generator_has_one_context_for_all_its_items():
    seen = []

    async def source():
        token = variable.set("set")
        for item in range(5):
            seen.append(variable.get())
            yield item
        variable.reset(token)

    assert collect(source()) == [0, 1, 2, 3, 4]
    assert seen == ["set"] * 5


def test_an_async_generator_can_be_timed_out_across_its_items():
    is_over = asyncio.Event()

    async def source():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                yield 1
                await is_over.wait()
        yield 2

    assert collect(source()) == [1, 2]


def test_an_async_generator_that_is_closed_early_ends_in_the_task_in_which_it_began():
    tasks = []

    async def source():
        tasks.append(asyncio.current_task())
        try:
            for item in range(100):
                yield item
        finally:
            tasks.append(asyncio.current_task())

    async def main():
        async with contextlib.aclosing(opmap(mode="async", progress=False)(echo_async).stream(source())) as stream:
            async for outcome in stream:
                if outcome.index == 2:
                    break

    asyncio.run(main())
    assert tasks[0] is tasks[1]
