"""``max_concurrent``: how many run at once, in which order, and that a place comes back whatever ends the execution."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading

import pytest
from side_by_side import SECONDS, results, started, until

import opero
from opero import CallTimeoutError, MisuseError
from opero.core.steps import within


class Busy:
    """Counts those that run, and lets them go when it is told to."""

    def __init__(self):
        self.lock = threading.Lock()
        self.running = self.most = 0
        self.order = []
        self.go_on = threading.Event()

    def __enter__(self):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)

    def __exit__(self, *_exc):
        with self.lock:
            self.running -= 1

    def __call__(self, x=None):
        with self:
            self.order.append(x)
            assert self.go_on.wait(SECONDS)
            return x

    async def in_task(self, x=None):
        with self:
            self.order.append(x)
            while not self.go_on.is_set():  # noqa: ASYNC110 - set by threads
                await asyncio.sleep(0.001)
            return x


@pytest.fixture
def busy():
    return Busy()


def limited(count=1, **options):
    return opero.opero(max_concurrent=count, retries=0, **options)


def waiting_for(f):
    return len(f.__opero__.plan.places._places.waiting)


def test_no_more_than_so_many_threads_run_at_once_and_in_the_order_of_coming(busy):
    f = limited(2)(busy)
    calls = []
    for x in range(6):
        calls.append(started(f, x))
        until(lambda x=x: len(busy.order) + waiting_for(f) == x + 1)
    busy.go_on.set()
    assert results(calls) == list(range(6))
    assert busy.most == 2
    # Of two that go on at one moment, either may run first.
    assert all(abs(x - place) <= 1 for place, x in enumerate(busy.order))


def test_no_more_than_so_many_tasks_run_at_once_and_in_the_order_of_coming(busy):
    f = limited(2)(busy.in_task)

    async def main():
        tasks = [asyncio.create_task(f(x)) for x in range(6)]
        await asyncio.sleep(0.02)
        busy.go_on.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == list(range(6))
    assert (busy.most, busy.order) == (2, list(range(6)))


def test_threads_and_event_loops_share_the_places(busy):
    f = limited(2)(busy.in_task)

    async def some():
        await asyncio.gather(*[f() for _ in range(4)])

    loops = [started(asyncio.run, some()) for _ in range(3)]
    until(lambda: busy.running == 2)
    busy.go_on.set()
    results(loops)
    assert busy.most == 2


def test_items_of_a_map_share_the_places(mode, journal):
    def function(x):
        import time

        journal.add("+")
        time.sleep(0.01)
        journal.add("-")
        return x

    mapped = opero.opmap(max_concurrent=1, **mode.options)(mode.define(function))
    assert mode.run(mapped, range(8)) == list(range(8))
    assert journal.lines() == ["+", "-"] * 8


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_place_comes_back_when_the_function_raises(world, error):
    def function(x):
        if x is not None:
            raise x
        return "result"

    f = limited()(world.define(function))
    for _ in range(3):
        with pytest.raises(error):
            world.run(f, error())
    assert world.run(f, None) == "result"


def test_a_place_comes_back_when_a_task_is_cancelled(busy):
    f = limited()(busy.in_task)

    async def main():
        running, waits, last = [asyncio.create_task(f(x)) for x in range(3)]
        await asyncio.sleep(0.01)
        waits.cancel()
        running.cancel()
        await asyncio.gather(running, waits, return_exceptions=True)
        busy.go_on.set()
        return await last

    assert asyncio.run(main()) == 2


def test_a_place_that_a_closed_loop_was_to_get_passes_on(busy):
    f = limited()(busy.in_task)
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(f(x)) for x in range(3)]
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    busy.go_on.set()
    for task in tasks:
        task._log_destroy_pending = False
    # The first one's place is gone with its task.
    del tasks, task
    gc.collect()
    assert asyncio.run(f("next")) == "next"


def test_who_waits_behind_a_loop_that_was_closed_goes_on(busy):
    f = limited()(busy.in_task)
    first = started(asyncio.run, f("first"))
    until(lambda: busy.running == 1)
    loop = asyncio.new_event_loop()
    dead = [loop.create_task(f(x)) for x in range(8)]
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    last = started(asyncio.run, f("last"))
    until(lambda: waiting_for(f) == 9)
    busy.go_on.set()
    assert results([first, last]) == ["first", "last"]
    for task in dead:
        task._log_destroy_pending = False


def test_a_call_that_is_out_of_time_waits_no_more(world, busy):
    f = limited(total_timeout=0.1)(busy if not world.is_async else busy.in_task)
    running = started(world.run, opero.control(f).with_options(total_timeout=None), "first")
    until(lambda: busy.running == 1)
    with pytest.raises(CallTimeoutError, match=r"total_timeout=0\.1 s ended it during the wait for a place"):
        world.run(f, "second")
    busy.go_on.set()
    assert running.result(SECONDS) == "first"


def test_a_call_within_its_own_place_is_refused(world):
    def function(depth):
        return f(depth - 1) if depth else "result"

    async def in_task(depth):
        return await f(depth - 1) if depth else "result"

    f = limited(5)(in_task if world.is_async else function)
    assert world.run(f, 0) == "result"
    with pytest.raises(MisuseError, match="max_concurrent"):
        world.run(f, 1)


@pytest.mark.parametrize("per", [None, "x"])
def test_what_an_execution_has_left_behind_may_call_when_that_is_over(world, per):
    contexts = []
    f = limited(per=per)(world.define(lambda x: contexts.append(contextvars.copy_context()) or x))
    for x in range(3):
        assert world.run(f, 1) == 1
        # As a task or a thread that goes on, and starts others.
        assert contexts[-1].run(world.run, f, 1) == 1
        assert len(contexts) == 2 * x + 2
    assert [context.run(world.run, f, 1) for context in contexts[:]] == [1] * 6


def test_what_an_attempt_that_failed_has_left_behind_may_call(world):
    contexts = []

    def function():
        contexts.append(contextvars.copy_context())
        if len(contexts) < 3:
            raise ValueError
        return "result"

    f = opero.opero(max_concurrent=1, retries=2, min_delay=0)(world.define(function))
    assert world.run(f) == "result"
    assert [context.run(world.run, f) for context in contexts[:3]] == ["result"] * 3


def test_what_an_execution_has_started_is_refused_while_that_has_its_place(world, busy):
    def function(x):
        if x:
            contexts.append(contextvars.copy_context())
            busy()
        return x

    async def in_task(x):
        if x:
            contexts.append(contextvars.copy_context())
            await busy.in_task()
        return x

    contexts = []
    f = limited(2)(in_task if world.is_async else function)
    assert world.run(f, 0) == 0
    running = started(world.run, f, 1)
    until(lambda: busy.running)
    with pytest.raises(MisuseError, match="within one of its own executions"):
        contexts[0].run(world.run, f, 0)
    busy.go_on.set()
    assert running.result(SECONDS) == 1
    assert contexts[0].run(world.run, f, 0) == 0


def test_what_an_item_of_a_map_has_left_behind_may_call(world):
    contexts = []
    f = limited()(world.define(lambda x: contexts.append(contextvars.copy_context()) or x))
    mapped = opero.opmap(mode="async" if world.is_async else "thread", workers=1, progress=False)(f)
    assert mapped.run(range(3)) == [0, 1, 2]
    assert [context.run(world.run, f, 1) for context in contexts[:]] == [1] * 3


def test_what_is_left_behind_by_one_after_the_other_holds_no_more_than_the_last():
    contexts = []
    fs = [limited()(lambda: contexts.append(contextvars.copy_context())) for _ in range(2)]
    for f in [fs[0], fs[1]] * 20:
        (contexts or [contextvars.copy_context()])[-1].run(f)
    assert len(contexts[-1][within]) <= 2


def test_each_value_has_places_of_its_own(busy):
    f = limited(per="x")(busy)
    calls = [started(f, x) for x in "ab"]
    until(lambda: busy.running == 2)
    busy.go_on.set()
    assert results(calls) == ["a", "b"]


def test_a_value_that_shows_another_class_is_told_by_what_it_is(world):
    class Shown:
        __class__ = property(lambda self: str)

        def __len__(self):
            return 1

    f = limited(per="x")(world.define(lambda x: "result"))
    shown = Shown()
    assert world.run(f, shown) == "result"
    assert shown not in [*f.__opero__.plan.places._of_values._lines]


def test_between_two_attempts_the_place_is_free(world):
    runs = []

    def function(x):
        runs.append(x)
        if x == "first" and len(runs) == 1:
            raise ValueError
        return x

    f = opero.opero(max_concurrent=1, retries=1, min_delay=0.3, jitter=False)(world.define(function))
    first = started(world.run, f, "first")
    until(lambda: runs)
    assert world.run(f, "second") == "second"
    assert first.result(SECONDS) == "first"
    assert runs == ["first", "second", "first"]


def test_the_place_of_a_generator_comes_back_when_it_ends_or_is_closed():
    @limited(total_timeout=0.05)
    def f():
        yield 1
        yield 2

    assert [*f()] == [1, 2]
    source = f()
    assert next(source) == 1
    with pytest.raises(CallTimeoutError):
        next(f())
    source.close()
    assert [*f()] == [1, 2]
    with contextlib.suppress(RuntimeError):
        source = f()
        next(source)
        source.throw(RuntimeError)
    assert [*f()] == [1, 2]


def test_the_place_of_an_async_generator_comes_back_when_it_ends_or_is_closed():
    @limited(total_timeout=0.05)
    async def f():
        yield 1
        yield 2

    async def main():
        assert [x async for x in f()] == [1, 2]
        source = f()
        assert await anext(source) == 1
        with pytest.raises(CallTimeoutError):
            await anext(f())
        await source.aclose()
        return [x async for x in f()]

    assert asyncio.run(main()) == [1, 2]


def test_a_call_within_the_place_of_its_own_generator_is_refused():
    @opero.opero(max_concurrent=1, retries=0)
    def count(number):
        yield number
        yield from count(number - 1)

    counting = count(3)
    assert next(counting) == 3
    with pytest.raises(MisuseError, match="within one of its own executions"):
        next(counting)


def test_a_call_within_the_place_of_its_own_async_generator_is_refused():
    @opero.opero(max_concurrent=1, retries=0)
    async def count(number):
        yield number
        async for lower in count(number - 1):
            yield lower

    async def body():
        counting = count(3)
        assert await anext(counting) == 3
        with pytest.raises(MisuseError, match="within one of its own executions"):
            await asyncio.wait_for(anext(counting), 10)

    asyncio.run(body())


def test_what_a_generator_has_left_behind_may_call_when_that_is_over():
    contexts = []

    @limited(2)
    def count():
        contexts.append(contextvars.copy_context())
        yield 1
        contexts.append(contextvars.copy_context())
        yield 2

    counting = count()
    assert [next(counting), next(counting)] == [1, 2]
    for context in contexts[:]:
        with pytest.raises(MisuseError, match="within one of its own executions"):
            context.run(next, count())
    assert list(counting) == []
    assert [context.run(list, count()) for context in contexts[:]] == [[1, 2]] * 2


def test_what_an_async_generator_has_left_behind_may_call_when_that_is_over():
    contexts = []

    @limited(2)
    async def count():
        contexts.append(contextvars.copy_context())
        yield 1
        contexts.append(contextvars.copy_context())
        yield 2

    async def all_of_it():
        return [x async for x in count()]

    async def body():
        counting = count()
        assert [await anext(counting), await anext(counting)] == [1, 2]
        for context in contexts[:]:
            with pytest.raises(MisuseError, match="within one of its own executions"):
                await asyncio.create_task(all_of_it(), context=context)
        await counting.aclose()
        return [await asyncio.create_task(all_of_it(), context=context) for context in contexts[:]]

    assert asyncio.run(body()) == [[1, 2]] * 2


def test_a_step_of_a_generator_may_go_on_with_it_in_what_it_has_left_behind():
    contexts = []

    @limited()
    def count():
        contexts.append(contextvars.copy_context())
        yield 1
        yield 2

    counting = count()
    assert next(counting) == 1
    assert contexts[0].run(list, counting) == [2]
    assert contexts[0].run(list, count()) == [1, 2]


def test_who_reads_a_generator_that_has_a_place_is_not_in_it():
    @opero.opero(max_concurrent=2, retries=0)
    def count():
        yield 1
        yield 2

    for _ in count():
        assert list(count()) == [1, 2]
