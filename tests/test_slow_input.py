"""An input that takes its time: what it holds up, and what not."""

from __future__ import annotations

import asyncio
import time

import pytest

from opero import opmap

# Longer than a map pulls before it looks at its results, and than an item takes in any mode.
SLOW = 0.1


def slow_items(count, given):
    """Items that take long to come; what had been given out when each was asked for."""
    seen = []

    def items():
        for item in range(count):
            seen.append(len(given))
            time.sleep(SLOW)
            yield item

    return items(), seen


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "as completed"])
@pytest.mark.parametrize("mode", ["thread", "process", "serial"])
def test_finished_results_are_given_out_before_the_next_item_is_pulled(mode, ordered):
    given = []
    items, seen = slow_items(10, given)
    for outcome in opmap(mode=mode, ordered=ordered, progress=False)(abs).stream(items):
        given.append(outcome.result)  # noqa: PERF401 - the input looks at it meanwhile
    assert sorted(given) == list(range(10))
    # While an item came, the one before it was done; the first ones may have waited for their workers to start.
    assert all(count >= item - 1 for item, count in enumerate(seen[6:], 6))


def test_what_a_quick_function_makes_of_an_item_does_not_wait_for_the_next_one():
    given = []
    items, seen = slow_items(10, given)
    for outcome in opmap(mode="thread", progress=False)(abs).stream(items):
        given.append(outcome.result)  # noqa: PERF401 - as above
    # Now and then a busy machine lets a thread wait for longer than the map does.
    assert sum(count == item for item, count in enumerate(seen)) > len(seen) / 2


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_an_item_is_run_while_the_next_one_does_not_come(mode, tmp_path):
    begun = tmp_path / "begun"
    waited = []

    def items():
        time.sleep(SLOW)
        yield 0
        deadline = time.monotonic() + 10
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        waited.append(begun.exists())
        yield 1

    assert opmap(mode=mode, progress=False)(lambda item: begun.write_text(str(item)))(items()) == [1, 1]
    assert waited == [True]


@pytest.mark.parametrize("mode", ["thread", "async"])
def test_an_async_input_holds_up_nothing(mode):
    @opmap(mode=mode, progress=False)
    async def work(item):
        return item

    async def main():
        given, asked = asyncio.Event(), []

        async def items():
            for item in range(4):
                asked.append(item)
                yield item
                # It comes only when the result of the one before has been given out.
                await asyncio.wait_for(given.wait(), 10)
                given.clear()

        async for outcome in work.stream(items()):
            assert outcome.index == asked[-1]
            given.set()
        return asked

    assert asyncio.run(main()) == [0, 1, 2, 3]
