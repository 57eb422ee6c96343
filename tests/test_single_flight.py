"""Identical calls at once share one run of the function, whatever becomes of it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import random
import signal
import sys
import threading
import time
import traceback
import weakref
from concurrent.futures import Future
from typing import Any, ClassVar

import pytest
from side_by_side import SECONDS, errors, forked, forks, results, started, until

import opero
import opero.core.cache
from opero.core.signature import MISSING
from opero.core.steps import leaders, within
from opero.core.stores.flights import Flight, Flights, Seat


def cached(function, **options):
    return opero.opero(cache=True, retries=0, **options)(function)


def waiters(f) -> int:
    """How many callers wait for a run of another's."""
    return sum(len(flight.seats) for flight in list(f.__opero__.plan.cache.store.flights._under_way.values()))


class Held:
    """A function whose runs wait to be told what to do; from any thread."""

    def __init__(self):
        self.runs: list[Any] = []
        self.began = threading.Semaphore(0)
        self._orders: list[Future] = []

    def function(self, x=0):
        order: Future = Future()
        self._orders.append(order)
        self.runs.append(x)
        self.began.release()
        return order.result(SECONDS)

    def wait(self):
        """Until another run has begun."""
        assert self.began.acquire(timeout=SECONDS)

    def end(self, result=None, *, run=0):
        self._orders[run].set_result(result)

    def fail(self, error, *, run=0):
        self._orders[run].set_exception(error)


@pytest.fixture
def held():
    return Held()


# Threads; in the async world each has an event loop of its own


def test_fifty_threads_run_the_function_once(world, held):
    f = cached(world.define(held.function))
    calls = [started(world.run, f, 1) for _ in range(50)]
    held.wait()
    until(lambda: waiters(f) == 49)
    held.end("result")
    assert results(calls) == ["result"] * 50
    assert held.runs == [1]


def test_threads_that_begin_together_run_the_function_once(world):
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            runs: list[int] = []
            f = cached(world.define(runs.append))
            barrier = threading.Barrier(8)

            def call(f=f, barrier=barrier):
                barrier.wait(SECONDS)
                return world.run(f, 1)

            results([started(call) for _ in range(8)])
            assert runs == [1]
    finally:
        sys.setswitchinterval(before)


def test_threads_that_find_an_expired_entry_run_the_function_once(world, held, fake_clock):
    f = cached(world.define(held.function), cache_ttl=1)
    first = started(world.run, f, 1)
    held.wait()
    held.end("old")
    first.result(SECONDS)
    fake_clock.tick(2)
    calls = [started(world.run, f, 1) for _ in range(10)]
    held.wait()
    until(lambda: waiters(f) == 9)
    held.end("new", run=1)
    assert results(calls) == ["new"] * 10


def test_those_who_waited_count_as_hits(world, held):
    f = cached(world.define(held.function))
    calls = [started(world.run, f, 1) for _ in range(5)]
    held.wait()
    until(lambda: waiters(f) == 4)
    held.end()
    results(calls)
    assert f.cache_info()[:2] == (4, 1)
    assert (f.stats.calls, f.stats.attempts) == (5, 1)


def test_all_get_the_very_object(world, held):
    f = cached(world.define(held.function))
    calls = [started(world.run, f, 1) for _ in range(3)]
    held.wait()
    until(lambda: waiters(f) == 2)
    held.end(object())
    assert len(set(results(calls))) == 1


def test_none_is_shared_like_any_result(world, held):
    f = cached(world.define(held.function))
    calls = [started(world.run, f, 1) for _ in range(3)]
    held.wait()
    until(lambda: waiters(f) == 2)
    held.end(None)
    assert results(calls) == [None] * 3


def test_an_exception_that_is_a_result_is_returned_to_all(world, held):
    f = cached(world.define(held.function))
    calls = [started(world.run, f, 1) for _ in range(3)]
    held.wait()
    until(lambda: waiters(f) == 2)
    error = ValueError()
    held.end(error)
    assert results(calls) == [error] * 3


def test_different_arguments_run_at_the_same_time(world):
    barrier = threading.Barrier(3)
    f = cached(world.define(lambda x: barrier.wait(SECONDS)))
    assert sorted(results([started(world.run, f, x) for x in (1, 1.0, True)])) == [0, 1, 2]


def test_different_instances_run_at_the_same_time(world):
    barrier = threading.Barrier(3)

    class Owner:
        method = cached(world.define(lambda self: barrier.wait(SECONDS)))

    owners = [Owner() for _ in range(3)]
    assert sorted(results([started(world.run, owner.method) for owner in owners])) == [0, 1, 2]


def test_functions_of_one_namespace_share_a_run(world, held, request):
    f = cached(world.define(held.function), cache_namespace=request.node.nodeid)
    g = cached(world.define(lambda x: "not run"), cache_namespace=request.node.nodeid)
    first = started(world.run, f, 1)
    held.wait()
    second = started(world.run, g, 1)
    until(lambda: waiters(g) == 1)
    held.end("result")
    assert results([first, second]) == ["result"] * 2


def test_retries_are_shared(world, held):
    f = opero.opero(cache=True, retries=1, min_delay=0)(world.define(held.function))
    calls = [started(world.run, f, 1) for _ in range(5)]
    held.wait()
    until(lambda: waiters(f) == 4)
    held.fail(ValueError())
    held.wait()
    held.end("result", run=1)
    assert results(calls) == ["result"] * 5
    assert f.stats.attempts == 2


# Failure


class StatusError(Exception):
    def __init__(self, text, *, status):
        super().__init__(f"{status}: {text}")
        self.status = status


class PlaceError(OSError):
    __slots__ = ("place",)


class SingleError(Exception):
    def __new__(cls, *args):
        assert not args, "made only once"
        return super().__new__(cls)


def first_of_ten(error, world, held):
    """The errors of ten callers, the first of whom has run the function."""
    f = cached(world.define(held.function))
    first = started(world.run, f, 1)
    held.wait()
    others = [started(world.run, f, 1) for _ in range(9)]
    until(lambda: waiters(f) == 9)
    held.fail(error)
    assert held.runs == [1]
    return errors([first, *others])


def test_each_waiter_gets_a_copy_of_the_error(world, held):
    error = StatusError("for all", status=503)
    try:
        raise error from KeyError("its cause")
    except StatusError:
        error.add_note("its note")
    first, *others = first_of_ten(error, world, held)
    assert first is error
    assert len({id(got) for got in [first, *others]}) == 10
    for got in others:
        assert (type(got), got.args, got.status, got.__cause__) == (StatusError, error.args, 503, error.__cause__)
        assert got.__notes__[0] == "its note"
        assert got.__notes__ is not error.__notes__


def test_a_copy_of_an_error_has_what_its_class_keeps_beside_its_attributes(world, held):
    error = PlaceError(2, "not there", "a file")
    error.place = "a place"
    for got in first_of_ten(error, world, held):
        assert (str(got), got.errno, got.filename, got.place) == (str(error), 2, "a file", "a place")


def test_an_error_that_cannot_be_copied_is_the_same_for_all(world, held):
    error = SingleError()
    error.args = ("more",)
    assert first_of_ten(error, world, held) == [error] * 10


def test_what_one_caller_does_with_the_error_is_not_seen_by_the_others():
    async def main():
        held = AsyncHeld()
        f = cached(held.function)

        async def caller(name):
            try:
                await f(1)
            except ValueError as error:
                error.add_note(name)
                error.name = name
                return error.__notes__[1:], error.name, traceback.extract_tb(error.__traceback__)[0].name

        tasks = [asyncio.create_task(caller(name)) for name in "abc"]
        await settle()
        held.orders[0].set_exception(ValueError("for all"))
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == [([name], name, "caller") for name in "abc"]


def test_each_waiter_that_got_the_error_is_a_failed_call(world, held):
    f = cached(world.define(held.function))
    calls = [started(world.run, f, 1) for _ in range(4)]
    held.wait()
    until(lambda: waiters(f) == 3)
    held.fail(ValueError())
    errors(calls)
    assert (f.stats.calls, f.stats.failures, f.stats.attempts, f.stats.hits) == (4, 4, 1, 0)


def test_each_waiter_gets_the_error_of_all_candidates(world, held):
    f = cached(world.define(held.function), arg_fallback="x")
    calls = [started(world.run, f, [1, 2]) for _ in range(3)]
    held.wait()
    until(lambda: waiters(f) == 2)
    held.fail(ValueError())
    held.wait()
    held.fail(KeyError(), run=1)
    got = errors(calls)
    assert [type(error) for error in got] == [opero.AllFailedError] * 3
    assert [error.errors for error in got] == [got[0].errors] * 3


def test_after_a_failure_the_function_runs_anew(world, held):
    f = cached(world.define(held.function))
    calls = [started(world.run, f, 1) for _ in range(3)]
    held.wait()
    until(lambda: waiters(f) == 2)
    held.fail(ValueError())
    errors(calls)
    again = started(world.run, f, 1)
    held.wait()
    held.end("result", run=1)
    assert again.result(SECONDS) == "result"


def test_what_a_retry_error_callback_made_up_is_shared_but_not_remembered(world, held):
    f = cached(world.define(held.function), retry_options={"retry_error_callback": lambda _state: "made up"})
    calls = [started(world.run, f, 1) for _ in range(3)]
    held.wait()
    until(lambda: waiters(f) == 2)
    held.fail(ValueError())
    assert results(calls) == ["made up"] * 3
    assert f.cache_info().currsize == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_when_the_run_is_broken_off_one_waiter_takes_over(held, error):
    f = cached(held.function)
    calls = [started(f, 1) for _ in range(5)]
    held.wait()
    until(lambda: waiters(f) == 4)
    held.fail(error())
    held.wait()
    until(lambda: waiters(f) == 3)
    held.end("result", run=1)
    outcomes = [call.exception(SECONDS) or call.result() for call in calls]
    assert sorted(map(repr, outcomes)) == sorted(["'result'"] * 4 + [repr(error())])
    assert held.runs == [1, 1]


def test_an_error_is_freed_with_its_caller(world):
    class Error(Exception):
        pass

    def function():
        raise Error

    f = cached(world.define(function))

    def call():
        with pytest.raises(Error) as caught:
            world.run(f)
        return weakref.ref(caught.value)

    error = call()
    gc.collect()
    assert error() is None


def test_who_takes_a_seat_when_the_flight_has_landed_is_woken_and_begins_anew():
    flights, flight, woken = Flights(), Flight("key"), []
    flights.board(flight)
    flights.land(flight, "result")
    seat = Seat(flight, lambda: None)
    seat.notify(lambda: woken.append(1))
    assert (seat.poll(), seat.outcome, woken) == (True, MISSING, [1])
    assert flights.board(own := Flight("key")) is own


@pytest.mark.parametrize("backend", ["memory", "disk"])
def test_a_task_that_a_run_leaves_behind_keeps_nothing_of_its_result(backend, tmp_path):
    contexts = []
    cache = opero.Cache(backend=backend, **({"cache_dir": tmp_path} if backend == "disk" else {}))
    f = opero.opero(cache=cache, retries=0)(lambda: contexts.append(contextvars.copy_context()) or ["result"])
    assert f() == ["result"]
    (flight,) = contexts[0][within]
    assert flight.is_over
    assert (flight.found, flight.old, flight.written) == (None, None, None)


# Forgetting in the middle


def forgetting():
    return {
        "cache_clear": lambda f: f.cache_clear(),
        "cache_delete": lambda f: f.cache_delete(1),
        "clear_cache": lambda f: opero.clear_cache(),
        "clear_cache of the namespace": lambda f: opero.clear_cache(f.__opero__.plan.cache.namespace),
    }


@pytest.fixture(params=forgetting().values(), ids=forgetting())
def forget(request):
    return request.param


def test_forgetting_in_the_middle_is_not_undone_by_the_late_result(world, held, forget):
    f = cached(world.define(held.function))
    first = started(world.run, f, 1)
    held.wait()
    forget(f)
    held.end("old")
    assert first.result(SECONDS) == "old"
    assert f.cache_info().currsize == 0
    again = started(world.run, f, 1)
    held.wait()
    held.end("new", run=1)
    assert again.result(SECONDS) == "new"


def test_who_comes_after_the_forgetting_does_not_get_the_old_result(world, held, forget):
    f = cached(world.define(held.function))
    first = started(world.run, f, 1)
    held.wait()
    forget(f)
    second = started(world.run, f, 1)
    held.wait()
    held.end("new", run=1)
    held.end("old", run=0)
    assert results([first, second]) == ["old", "new"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["old one first", "new one first"])
def test_the_run_that_began_after_the_forgetting_is_remembered(world, held, forget, order):
    f = cached(world.define(held.function))
    calls = [started(world.run, f, 1)]
    held.wait()
    forget(f)
    calls.append(started(world.run, f, 1))
    held.wait()
    for run in order:
        held.end(["old", "new"][run], run=run)
        calls[run].result(SECONDS)
    assert started(world.run, f, 1).result(SECONDS) == "new"
    assert held.runs == [1, 1]


def test_who_comes_after_the_forgetting_shares_the_run_that_began_after_it(world, held, forget):
    f = cached(world.define(held.function))
    first = started(world.run, f, 1)
    held.wait()
    forget(f)
    second = started(world.run, f, 1)
    held.wait()
    held.end("old")
    first.result(SECONDS)
    third = started(world.run, f, 1)
    until(lambda: waiters(f) == 1)
    held.end("new", run=1)
    assert results([second, third]) == ["new"] * 2


def test_who_waited_before_the_forgetting_still_gets_the_result(world, held, forget):
    f = cached(world.define(held.function))
    calls = [started(world.run, f, 1) for _ in range(3)]
    held.wait()
    until(lambda: waiters(f) == 2)
    forget(f)
    held.end("old")
    assert results(calls) == ["old"] * 3
    assert held.runs == [1]


def test_forgetting_another_entry_does_not_touch_the_run(world, held):
    f = cached(world.define(held.function))
    first = started(world.run, f, 1)
    held.wait()
    assert not f.cache_delete(2)
    held.end("result")
    first.result(SECONDS)
    assert f.cache_info().currsize == 1


# Calls of itself


def calling_itself(world, **options):
    """A function whose every call has the same key, and that calls itself ``depth`` times."""
    if world.is_async:

        @opero.opero(cache=True, retries=0, cache_key=lambda depth: "the same", **options)
        async def f(depth):
            return [depth, *(await f(depth - 1) if depth else [])]

    else:

        @opero.opero(cache=True, retries=0, cache_key=lambda depth: "the same", **options)
        def f(depth):
            return [depth, *(f(depth - 1) if depth else [])]

    return f


def test_a_function_may_need_its_own_result(world):
    f = calling_itself(world)
    assert started(world.run, f, 3).result(SECONDS) == [3, 2, 1, 0]


def test_the_outermost_result_is_remembered_when_a_function_needed_its_own(world):
    f = calling_itself(world)
    started(world.run, f, 3).result(SECONDS)
    assert started(world.run, f, 5).result(SECONDS) == [3, 2, 1, 0]
    assert f.cache_info().currsize == 1


def test_two_functions_may_need_each_others_results(world):
    if world.is_async:

        async def ping(depth):
            return await g(depth) if depth else "end"

        async def pong(depth):
            return await f(depth - 1)

    else:

        def ping(depth):
            return g(depth) if depth else "end"

        def pong(depth):
            return f(depth - 1)

    f, g = cached(ping, cache_key=lambda depth: "f"), cached(pong, cache_key=lambda depth: "g")
    assert started(world.run, f, 3).result(SECONDS) == "end"


def test_a_blocking_run_may_need_its_own_result_by_an_event_loop():
    @opero.opero(cache=True, retries=0, cache_key=lambda depth: "the same")
    def f(depth):
        async def inner():
            return f(depth - 1)

        return asyncio.run(inner()) if depth else "end"

    assert started(f, 1).result(SECONDS) == "end"


def test_tasks_of_a_run_may_need_its_result():
    @opero.opero(cache=True, retries=0, cache_key=lambda depth: "the same")
    async def f(depth):
        return sum(await asyncio.gather(f(depth - 1), f(depth - 1))) if depth else 1

    assert started(asyncio.run, f(3)).result(SECONDS) == 8


def test_a_thread_of_a_tasks_context_may_need_its_result():
    @opero.opero(cache=True, retries=0, cache_key=lambda depth: "the same")
    async def f(depth):
        return await asyncio.to_thread(lambda: asyncio.run(f(depth - 1))) if depth else "end"

    assert started(asyncio.run, f(1)).result(SECONDS) == "end"


def test_a_task_left_behind_by_a_run_waits_for_the_next_run_like_any_other():
    async def main():
        runs = []
        go, tasks = asyncio.Event(), []

        @opero.opero(cache=True, retries=0)
        async def f():
            runs.append(1)
            if not tasks:
                tasks.append(asyncio.create_task(later()))
                return "first"
            await asyncio.sleep(0.01)
            return "second"

        async def later():
            await go.wait()
            return await f()

        await f()
        f.cache_clear()
        next_run = asyncio.create_task(f())
        go.set()
        return [await next_run, await tasks[0], len(runs)]

    assert asyncio.run(main()) == ["second", "second", 2]


# Tasks


async def settle():
    """Let every task run until it waits for something."""
    for _ in range(10):
        await asyncio.sleep(0)


class AsyncHeld:
    """An async function whose runs wait to be told what to do; for tasks of one loop."""

    def __init__(self):
        self.orders: list[asyncio.Future] = []

    async def function(self, x=0):
        self.orders.append(asyncio.get_running_loop().create_future())
        return await self.orders[-1]


def test_five_hundred_tasks_run_the_function_once():
    async def main():
        held = AsyncHeld()
        f = cached(held.function)
        tasks = [asyncio.create_task(f(1)) for _ in range(500)]
        await settle()
        held.orders[0].set_result("result")
        return await asyncio.gather(*tasks), len(held.orders)

    assert asyncio.run(main()) == (["result"] * 500, 1)


def test_each_waiting_task_gets_the_error():
    async def main():
        held = AsyncHeld()
        f = cached(held.function)
        tasks = [asyncio.create_task(f(1)) for _ in range(20)]
        await settle()
        error = ValueError("for all")
        held.orders[0].set_exception(error)
        got = await asyncio.gather(*tasks, return_exceptions=True)
        return {repr(one) for one in got}, len({id(one) for one in got}), len(held.orders)

    assert asyncio.run(main()) == ({repr(ValueError("for all"))}, 20, 1)


def test_when_the_running_task_is_cancelled_one_waiter_takes_over():
    async def main():
        held = AsyncHeld()
        f = cached(held.function)
        leader, *others = [asyncio.create_task(f(1)) for _ in range(20)]
        await settle()
        leader.cancel()
        await settle()
        runs = len(held.orders)
        held.orders[1].set_result("result")
        return leader.cancelled(), await asyncio.gather(*others), runs, len(held.orders)

    assert asyncio.run(main()) == (True, ["result"] * 19, 2, 2)


def test_when_those_who_would_take_over_are_cancelled_too_the_next_one_does():
    async def main():
        held = AsyncHeld()
        f = cached(held.function)
        *gone, last = [asyncio.create_task(f(1)) for _ in range(5)]
        await settle()
        for task in gone:
            task.cancel()
        await settle()
        held.orders[1].set_result("result")
        return await last, [task.cancelled() for task in gone], len(held.orders)

    assert asyncio.run(main()) == ("result", [True] * 4, 2)


def test_one_after_the_other_may_be_cancelled():
    async def main():
        held = AsyncHeld()
        f = cached(held.function)
        tasks = [asyncio.create_task(f(1)) for _ in range(5)]
        await settle()
        for runs in range(1, 5):
            assert len(held.orders) == runs
            leader = next(task for task in tasks if not task.done() and is_running(task, held))
            leader.cancel()
            await settle()
        held.orders[4].set_result("result")
        return sorted(str(one) for one in await asyncio.gather(*tasks, return_exceptions=True))

    def is_running(task, held):
        stack, inner = [], task.get_coro()
        while inner is not None:
            stack.append(getattr(inner, "cr_code", None))
            inner = getattr(inner, "cr_await", None)
        return held.function.__code__ in stack

    assert asyncio.run(main()) == ["", "", "", "", "result"]


def test_a_cancelled_waiter_does_no_harm():
    async def main():
        held = AsyncHeld()
        f = cached(held.function)
        leader, waiter, other = [asyncio.create_task(f(1)) for _ in range(3)]
        await settle()
        waiter.cancel()
        await settle()
        held.orders[0].set_result("result")
        return waiter.cancelled(), await leader, await other, len(held.orders)

    assert asyncio.run(main()) == (True, "result", "result", 1)


def test_a_waiter_that_is_cancelled_when_the_result_comes_does_no_harm():
    async def main():
        held = AsyncHeld()
        f = cached(held.function)
        leader, waiter, other = [asyncio.create_task(f(1)) for _ in range(3)]
        await settle()
        held.orders[0].set_result("result")
        result = await leader
        waiter.cancel()
        return result, await other, len(held.orders)

    assert asyncio.run(main()) == ("result", "result", 1)


def test_a_waiter_with_a_time_limit_of_its_own_does_no_harm():
    async def main():
        held = AsyncHeld()
        f = cached(held.function)
        leader = asyncio.create_task(f(1))
        await settle()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(f(1), 0.01)
        held.orders[0].set_result("result")
        return await leader, await f(1), len(held.orders)

    assert asyncio.run(main()) == ("result", "result", 1)


def test_a_waiter_gets_a_result_though_the_running_task_is_cancelled_at_the_last_moment():
    async def main():
        held = AsyncHeld()
        f = cached(held.function)
        leader, other = [asyncio.create_task(f(1)) for _ in range(2)]
        await settle()
        held.orders[0].set_result("result")
        leader.cancel()
        await settle()
        for order in held.orders[1:]:
            order.set_result("again")
        return await other

    assert asyncio.run(main()) in {"result", "again"}


def test_tasks_cancelled_at_random_leave_every_other_one_with_a_result():
    chance = random.Random(5)

    async def once():
        @opero.opero(cache=True, retries=0)
        async def f():
            for _ in range(3):
                await asyncio.sleep(0)
            return "result"

        tasks = [asyncio.create_task(f()) for _ in range(8)]
        victims = set(chance.sample(tasks, chance.randrange(8)))
        for task in victims:
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            task.cancel()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(one == "result" for task, one in zip(tasks, got, strict=True) if task not in victims)
        assert waiters(f) == 0
        assert await f() == "result"

    async def main():
        async with asyncio.timeout(SECONDS):
            for _ in range(300):
                await once()

    asyncio.run(main())


# Several event loops


async def released(event):
    await asyncio.to_thread(event.wait, SECONDS)


def test_two_event_loops_in_two_threads_share_a_run():
    began, release = threading.Event(), threading.Event()
    runs = []

    @opero.opero(cache=True, retries=0)
    async def f():
        runs.append(threading.get_ident())
        began.set()
        await released(release)
        return "result"

    async def several():
        return await asyncio.gather(*[f() for _ in range(10)])

    first = started(asyncio.run, several())
    assert began.wait(SECONDS)
    second = started(asyncio.run, several())
    until(lambda: waiters(f) == 19)
    release.set()
    assert results([first, second]) == [["result"] * 10] * 2
    assert len(runs) == 1


def test_when_the_running_loop_ends_a_waiter_in_another_loop_takes_over():
    began, quit_ = threading.Event(), threading.Event()
    runs = []

    @opero.opero(cache=True, retries=0)
    async def f():
        runs.append(1)
        began.set()
        if len(runs) == 1:
            await asyncio.Event().wait()
        return "result"

    async def leave():
        task = asyncio.create_task(f())
        await released(quit_)
        return task

    first = started(asyncio.run, leave())
    assert began.wait(SECONDS)
    second = started(asyncio.run, f())
    until(lambda: waiters(f) == 1)
    quit_.set()
    assert first.result(SECONDS).cancelled()
    assert second.result(SECONDS) == "result"


def test_a_loop_that_ends_with_waiters_does_no_harm():
    began, release = threading.Event(), threading.Event()

    @opero.opero(cache=True, retries=0)
    async def f():
        began.set()
        await released(release)
        return "result"

    async def leave():
        task = asyncio.create_task(f())
        await settle()
        assert waiters(f) == 1
        return task

    first = started(asyncio.run, f())
    assert began.wait(SECONDS)
    assert asyncio.run(leave()).cancelled()
    release.set()
    assert first.result(SECONDS) == "result"


def test_a_loop_closed_over_its_waiters_does_no_harm():
    began, release = threading.Event(), threading.Event()

    @opero.opero(cache=True, retries=0)
    async def f():
        began.set()
        await released(release)
        return "result"

    first = started(asyncio.run, f())
    assert began.wait(SECONDS)
    loop = asyncio.new_event_loop()
    task = loop.create_task(f())
    loop.run_until_complete(settle())
    assert waiters(f) == 1
    loop.close()
    release.set()
    assert first.result(SECONDS) == "result"
    task._log_destroy_pending = False


def test_a_function_and_its_async_twin_share_a_run(held, request):
    @opero.opero(cache=True, retries=0, cache_namespace=request.node.nodeid)
    async def twin(x):
        return "not run"

    f = cached(held.function, cache_namespace=request.node.nodeid)
    first = started(f, 1)
    held.wait()
    second = started(asyncio.run, twin(1))
    until(lambda: waiters(f) == 1)
    held.end("result")
    assert results([first, second]) == ["result"] * 2


def test_a_blocking_call_does_not_wait_for_a_task_of_its_own_thread(request):
    @opero.opero(cache=True, retries=0, cache_namespace=request.node.nodeid)
    async def twin():
        await asyncio.sleep(0)
        return "async"

    f = cached(lambda: "blocking", cache_namespace=request.node.nodeid)

    async def main():
        task = asyncio.create_task(twin())
        await asyncio.sleep(0)
        return f(), await task

    assert started(asyncio.run, main()).result(3) == ("blocking", "async")


# Forks


class TestForks:
    pytestmark = forks

    def test_a_child_does_not_wait_for_a_run_of_its_parent(self, world, held):
        parent = os.getpid()
        f = cached(world.define(lambda x: held.function(x) if os.getpid() == parent else "child"))
        call = started(world.run, f, 1)
        held.wait()
        assert forked(lambda: world.run(f, 1)) == "'child'"
        held.end("parent")
        assert call.result(SECONDS) == "parent"

    def test_a_child_does_not_wait_with_its_parents_waiters(self, world, held):
        parent = os.getpid()
        f = cached(world.define(lambda x: held.function(x) if os.getpid() == parent else "child"))
        calls = [started(world.run, f, 1) for _ in range(5)]
        held.wait()
        until(lambda: waiters(f) == 4)
        assert forked(lambda: [world.run(f, 1), f.cache_info().currsize]) == "['child', 1]"
        held.end("parent")
        assert results(calls) == ["parent"] * 5

    def test_a_child_can_clear_what_its_parent_computes(self, held):
        f = cached(held.function)
        call = started(f, 1)
        held.wait()
        assert forked(f.cache_clear) == "None"
        held.end("parent")
        call.result(SECONDS)
        assert f.cache_info().currsize == 1

    def test_a_child_has_its_parents_entries(self, world):
        f = cached(world.define(lambda x: [x, os.getpid()]))
        answer = world.run(f, 1)
        assert forked(lambda: world.run(f, 1)) == repr(answer)

    def test_a_child_does_not_wait_for_a_first_call_of_its_parent(self, backend, monkeypatch):
        go, began = threading.Event(), threading.Event()
        make = opero.core.cache.store_of

        def store(settings, namespace, made_by):
            if "slow" in namespace:
                began.set()
                assert go.wait(SECONDS)
            return make(settings, namespace, made_by)

        monkeypatch.setattr(opero.core.cache, "store_of", store)
        f, g = [
            opero.opero(**backend.options, cache_namespace=backend.namespace() + name, retries=0)(lambda x: x)
            for name in ("slow", "")
        ]
        call = started(f, 1)
        assert began.wait(SECONDS)
        assert forked(lambda: g(1)) == "1"
        go.set()
        assert call.result(SECONDS) == 1

    def test_a_child_forked_in_the_middle_of_a_run_of_its_own_goes_on(self, world):
        f = cached(world.define(lambda: forked(lambda: "child") if os.getpid() == parent else None))
        parent = os.getpid()
        assert world.run(f) == "'child'"

    def test_a_child_forked_at_any_moment_does_not_hang(self):
        f = cached(lambda x: x)
        stop = threading.Event()

        def busy(n):
            while not stop.is_set():
                for x in range(20):
                    f((n, x % 7))
                f.cache_clear()

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        threads = [started(busy, n % 2) for n in range(4)]
        try:
            answers = [forked(lambda: [f((0, 1)), f.cache_clear(), f((0, 1)), f.stats.failures]) for _ in range(20)]
        finally:
            sys.setswitchinterval(before)
            stop.set()
        results(threads)
        assert answers == ["[(0, 1), None, (0, 1), 0]"] * 20


# Runs that need each other's results


@pytest.mark.parametrize("backend", ["memory", "disk"])
class TestRunsThatNeedEachOther:
    """Walks of a graph with a circle, each of which goes to no node twice."""

    WAYS: ClassVar = {"a": ["b"], "b": ["a"]}

    @pytest.fixture
    def cache(self, backend, tmp_path):
        return opero.Cache(backend=backend, namespace="f", **({"cache_dir": tmp_path} if backend == "disk" else {}))

    def test_two_threads_get_their_results(self, cache):
        walked, both = contextvars.ContextVar("walked", default=()), threading.Barrier(2)

        @opero.opero(cache=cache, retries=0)
        def size(node):
            if not walked.get():
                both.wait(SECONDS)
            token = walked.set((*walked.get(), node))
            try:
                return 1 + sum(size(other) for other in self.WAYS[node] if other not in walked.get())
            finally:
                walked.reset(token)

        assert set(results([started(size, node) for node in "ab"])) <= {2, 3}

    def test_two_tasks_get_their_results(self, cache):
        walked = contextvars.ContextVar("walked", default=())

        async def main():
            both, begun = asyncio.Event(), []

            @opero.opero(cache=cache, retries=0)
            async def size(node):
                if not walked.get():
                    begun.append(node)
                    if len(begun) == len(self.WAYS):
                        both.set()
                    await both.wait()
                walked.set((*walked.get(), node))
                others = [other for other in self.WAYS[node] if other not in walked.get()]
                # By tasks of its own: it waits for several at once.
                return 1 + sum(await asyncio.gather(*map(size, others)))

            return await asyncio.wait_for(asyncio.gather(size("a"), size("b")), SECONDS)

        assert set(asyncio.run(main())) <= {2, 3}


def test_a_computation_that_is_over_is_none_that_tasks_are_part_of_which_it_left_behind():
    known = []

    async def main():
        left = []

        @opero.opero(cache=True, retries=0)
        async def step(number):
            known.append(len(leaders()))
            if number < 5:
                left.append(asyncio.create_task(step(number + 1)))

        await step(0)
        while left:
            await left.pop()

    asyncio.run(main())
    assert known == [1] * 6


class UncopyableError(Exception):
    def __new__(cls, *, text):
        return super().__new__(cls, text)

    def __init__(self, *, text):
        super().__init__(text)


def test_of_those_who_share_an_error_that_cannot_be_copied_none_gets_the_frames_of_others():
    begun, goes_on = threading.Event(), threading.Event()

    @opero.opero(cache=True, retries=0)
    def fail():
        begun.set()
        goes_on.wait(SECONDS)
        raise UncopyableError(text="text")

    leader = started(fail)
    begun.wait(SECONDS)
    followers = [started(fail) for _ in range(9)]
    (flight,) = fail.__opero__.plan.cache.store.flights._under_way.values()
    until(lambda: len(flight.seats) == len(followers))
    goes_on.set()
    lengths = {len(traceback.extract_tb(error.__traceback__)) for error in errors([leader, *followers])}
    assert max(lengths) <= 5


# Streams that nobody pulls


def number(text):
    return int(text)


def test_what_a_resting_stream_has_under_way_is_not_waited_for(mode):
    f = opero.opmap(**mode.options, cache=True, retries=0)(mode.define(number))

    async def nested():
        return [await f([o.item, str(int(o.item) + 1)]) async for o in f.stream(["1", "2", "3", "4"])]

    if mode.is_async:
        results = asyncio.run(nested())
    else:
        results = [f([o.item, str(int(o.item) + 1)]) for o in f.stream(["1", "2", "3", "4"])]

    assert results == [[1, 2], [2, 3], [3, 4], [4, 5]]


# Python cannot raise what interrupts a destructor or a hook of the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("no_garbage_of_others")
@pytest.mark.soak
def test_ctrl_c_at_any_moment_leaves_no_run_that_others_would_wait_for():
    @cached
    def f(x):
        return x

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    deadline = time.monotonic() + SECONDS
    try:
        for x in range(100_000):
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 3e-5))
                f(("key", x))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
                assert not f.__opero__.plan.cache.store.flights._under_way
            if interrupted == 2_000 or time.monotonic() > deadline:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 200
