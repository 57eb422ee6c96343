"""Maps in the calling thread."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from contextvars import ContextVar

import pytest

from opero import opmap

OPTIONS = {"mode": "serial", "progress": False}
variable: ContextVar[int] = ContextVar("variable", default=0)


def test_items_run_one_after_the_other_in_the_calling_thread(world):
    seen = []

    def work(item):
        seen.append((item, threading.get_ident()))
        return 2 * item

    assert opmap(**OPTIONS)(world.define(work)).run(range(5)) == [0, 2, 4, 6, 8]
    assert seen == [(item, threading.get_ident()) for item in range(5)]


def test_coroutines_run_in_the_callers_event_loop_one_at_a_time():
    running = []

    @opmap(**OPTIONS)
    async def work(item):
        running.append(item)
        await asyncio.sleep(0)
        assert running == [item]
        running.remove(item)
        return asyncio.get_running_loop()

    async def main():
        return set(await work(range(5))) == {asyncio.get_running_loop()}

    assert asyncio.run(main())


def test_the_caller_is_on_the_stack_of_the_function():
    """A debugger that stops in the function can go up to the caller."""

    def the_caller():
        return opmap(**OPTIONS)(lambda _: [frame.name for frame in traceback.extract_stack()])([1])

    assert "the_caller" in the_caller()[0]


def test_a_profiler_of_the_calling_thread_sees_the_function():
    seen = set()

    def work(item):
        return item

    sys.setprofile(lambda frame, event, _arg: seen.add(frame.f_code))
    try:
        opmap(**OPTIONS)(work)([1])
    finally:
        sys.setprofile(None)
    assert work.__code__ in seen


def test_a_stream_gives_each_outcome_before_the_next_item_runs():
    begun = []

    def work(item):
        begun.append(item)

    for outcome in opmap(**OPTIONS)(work).stream(range(4)):
        assert begun == list(range(outcome.index + 1))


def test_policies_hold(world):
    def flaky(item):
        if flaky_map.stats.attempts < 2:
            raise ConnectionError
        return item

    flaky_map = opmap(**OPTIONS, retries=1, min_delay=0, cache=True)(world.define(flaky))
    assert flaky_map.run([1, 1]) == [1, 1]
    assert (flaky_map.stats.retries, flaky_map.stats.hits) == (1, 1)


def test_what_an_item_leaves_in_a_context_variable_is_gone_for_the_others(world):
    def work(item):
        before = variable.get()
        variable.set(item)
        return before

    token = variable.set(7)
    assert opmap(**OPTIONS)(world.define(work)).run([1, 2]) == [7, 7]
    variable.reset(token)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_passes_through(kind):
    def work(item):
        raise kind

    with pytest.raises(kind):
        opmap(**OPTIONS)(work)([1])


def test_a_map_in_a_map_runs_in_the_same_thread():
    inner = opmap(**OPTIONS)(lambda item: (item, threading.get_ident()))
    outer = opmap(**OPTIONS)(lambda item: inner([item])[0])
    assert outer([1, 2]) == [(1, threading.get_ident()), (2, threading.get_ident())]


def test_there_are_no_workers_to_keep():
    mapped = opmap(**OPTIONS)(lambda item: item)
    with mapped.pool():
        assert mapped([1]) == [1]


def test_workers_are_refused():
    with pytest.raises(ValueError, match="calling thread works; leave it out"):
        opmap(mode="serial", workers=2)(abs)


def test_options_for_a_pool_are_refused():
    with pytest.raises(TypeError, match="takes none"):
        opmap(mode="serial", pool_options={"initializer": print})(abs)
