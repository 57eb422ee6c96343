"""What listeners are told, in which order, and what they cannot change."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import gc
import inspect
import pickle
import threading
import weakref

import cloudpickle
import pytest
from side_by_side import SECONDS, forked, forks, results, started

import opero
from opero import events
from opero.events import (
    AttemptFailed,
    AttemptStarted,
    CacheHit,
    CallDone,
    CallStarted,
    CandidateSwitched,
    CircuitChanged,
    RetryPlanned,
    SlotWaited,
    on_event,
)


@pytest.fixture
def heard():
    """All events of all functions during the test."""
    gathered = []
    with on_event(gathered.append):
        yield gathered


def kinds(heard):
    return [type(event) for event in heard]


def changed(value, **changes):
    """A value like this one, apart from these attributes."""
    return type(value)(**{**vars(value), **changes})


def failing(times, result="result"):
    """A function that raises so many times before it returns."""
    left = [times]

    def function(*_args):
        if left[0]:
            left[0] -= 1
            raise ValueError(left[0])
        return result

    return function


def test_a_call_that_succeeds_starts_tries_and_ends(world, heard):
    f = opero.opero(world.define(lambda: "result"))
    assert world.run(f) == "result"
    assert kinds(heard) == [CallStarted, AttemptStarted, CallDone]
    assert heard[-1] == changed(heard[-1], error=None, attempts=1, cached=False, cancelled=False)


def test_a_retried_call_tells_each_attempt_and_what_is_planned(world, heard, fake_clock):
    f = opero.opero(jitter=False, min_delay=2)(world.define(failing(2)))
    world.run(f)
    one_round = [AttemptStarted, AttemptFailed, RetryPlanned]
    assert kinds(heard) == [CallStarted, *one_round, *one_round, AttemptStarted, CallDone]
    assert [(e.round, e.delay) for e in heard if isinstance(e, RetryPlanned)] == [(1, 2), (2, 4)]
    assert [(e.attempt, e.round) for e in heard if isinstance(e, AttemptStarted)] == [(1, 1), (2, 2), (3, 3)]
    assert [str(e.error) for e in heard if isinstance(e, AttemptFailed)] == ["1", "0"]
    assert (heard[-1].attempts, heard[-1].seconds) == (3, 6)


def test_a_failed_call_tells_the_error_that_it_raises(world, heard, fake_clock):
    f = opero.opero(retries=1)(world.define(failing(5)))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the function's own
        world.run(f)
    assert heard[-1].error is caught.value
    assert heard[-1].attempts == 2


def test_a_candidate_that_takes_over_is_told_by_its_place_and_not_by_its_value(world, heard):
    f = opero.opero(arg_fallback="key", retries=0)(world.define(lambda key: failing(key != "secret-c")()))
    world.run(f, ["secret-a", "secret-b", "secret-c"])
    assert [e.place for e in heard if isinstance(e, CandidateSwitched)] == [1, 2]
    assert "secret" not in repr(heard)


def test_a_hit_is_told(world, heard):
    f = opero.opero(cache=True)(world.define(lambda: "result"))
    world.run(f)
    heard.clear()
    assert world.run(f) == "result"
    assert kinds(heard) == [CallStarted, CacheHit, CallDone]
    assert (heard[-1].cached, heard[-1].attempts) == (True, 0)


def test_a_wait_for_a_slot_is_told(world, heard):
    f = opero.opero(rate_limit=50, rate_limit_options={"max_burst": 1})(world.define(lambda: None))
    for _ in range(3):
        world.run(f)
    waits = [e.seconds for e in heard if isinstance(e, SlotWaited)]
    assert len(waits) == 2
    assert all(0.001 <= seconds < SECONDS for seconds in waits)


def test_a_free_slot_is_no_wait(world, heard):
    world.run(opero.opero(rate_limit=50)(world.define(lambda: None)))
    assert SlotWaited not in kinds(heard)


def test_the_events_of_one_call_have_one_number_and_no_other_call_has_it(world, heard):
    f = opero.opero(world.define(lambda: None))
    for _ in range(3):
        world.run(f)
    numbers = [event.call for event in heard]
    assert len(set(numbers)) == 3
    assert numbers == sorted(numbers)


def test_an_event_names_the_function_and_the_time_and_cannot_be_changed(world, heard, monkeypatch):
    def function():
        pass

    world.run(opero.opero(world.define(function)))
    (event, *_) = heard
    assert event.function.endswith("function")
    assert event.module == __name__
    assert event.time > 1_700_000_000
    with pytest.raises(AttributeError, match="frozen"):
        event.time = 0


@pytest.mark.parametrize("shown", [0, 1])
def test_items_of_a_map_are_told_by_their_places(mode, heard, shown):
    mapped = opero.opmap(retries=1, min_delay=0, **mode.options, return_exceptions=True)(mode.define(lambda x: 1 / x))
    mode.run(mapped, [1, 0])
    mine = [event for event in heard if event.index == shown]
    attempt = [AttemptStarted] if shown == 0 else [AttemptStarted, AttemptFailed]
    more = [] if shown == 0 else [RetryPlanned, *attempt]
    assert kinds(mine) == [CallStarted, *attempt, *more, CallDone]
    assert isinstance(mine[-1].error, ZeroDivisionError if shown else type(None))


def test_a_large_map_tells_of_every_item(mode, heard):
    mapped = opero.opmap(**mode.options)(mode.define(abs))
    mode.run(mapped, range(300))
    assert sorted(e.index for e in heard if isinstance(e, CallDone)) == list(range(300))


def test_a_function_has_a_listener_of_its_own(world):
    mine = []
    f = opero.opero(on_event=mine.append)(world.define(lambda: None))
    other = opero.opero(world.define(lambda: None))
    world.run(f)
    world.run(other)
    assert kinds(mine) == [CallStarted, AttemptStarted, CallDone]


def test_a_cached_function_tells_its_own_listener_of_hits(world):
    mine = []
    f = opero.opero(cache=True, on_event=mine.append)(world.define(lambda: None))
    world.run(f)
    world.run(f)
    assert kinds(mine).count(CacheHit) == 1


def test_all_listeners_are_told(world, heard):
    mine = []
    f = opero.opero(on_event=mine.append)(world.define(lambda: None))
    with on_event(mine.append):
        world.run(f)
    assert len(mine) == 2 * len(heard)


def test_the_end_is_told_to_the_last_listener_first(world):
    told = []
    f = opero.opero(on_event=lambda event: told.append((type(event), "own")))(world.define(lambda: None))
    with (
        on_event(lambda event: told.append((type(event), "first"))),
        on_event(lambda e: told.append((type(e), "last"))),
    ):
        world.run(f)
    order = {kind: [who for other, who in told if other is kind] for kind in (CallStarted, CallDone)}
    assert order == {CallStarted: ["own", "first", "last"], CallDone: ["last", "first", "own"]}


def told_of(event):
    """An event without what differs from call to call."""
    error = getattr(event, "error", None)
    facts = changed(event, call=0, time=0, **({"seconds": 0} if hasattr(event, "seconds") else {}))
    return repr(facts if error is None else changed(facts, error=type(error)))


@pytest.mark.parametrize("ends", ["returns", "fails once", "fails", "is cancelled"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"total_timeout": 60},
        {"arg_fallback": "key"},
        {"breaker": 9},
        {"max_concurrent": 1, "rate_limit": 1e9},
        {"total_timeout": 60, "arg_fallback": "key", "breaker": 9, "max_concurrent": 1, "rate_limit": 1e9},
    ],
    ids=", ".join,
)
def test_a_later_call_tells_what_the_first_one_told(world, heard, options, ends):
    failures = []

    def function(key=("a", "b")):
        if failures:
            raise failures.pop()
        return "result"

    def told():
        failures[:] = {
            "returns": [],
            "fails once": [ValueError()],
            "fails": [ValueError() for _ in range(4)],
            "is cancelled": [asyncio.CancelledError()],
        }[ends]
        heard.clear()
        with contextlib.suppress(ValueError, ExceptionGroup, asyncio.CancelledError):
            world.run(f)
        # A slow machine may take a free slot late.
        return [told_of(event) for event in heard if not isinstance(event, SlotWaited)]

    def make():
        return opero.opero(retries=1, min_delay=0, **options)(world.define(function))

    f = make()
    first = told()
    failures.clear()
    f = make()
    world.run(f)
    assert told() == first


def test_a_trial_that_closes_a_circuit_is_told_of_as_by_the_flow(world, heard, fake_clock):
    f = opero.opero(breaker=opero.Breaker(1, recovery=5), retries=0)(world.define(failing(0)))
    world.run(f)
    opero.control(f).circuit.open()
    fake_clock.tick(5)
    heard.clear()
    world.run(f)
    assert kinds(heard) == [CallStarted, AttemptStarted, CircuitChanged, CallDone]
    assert (heard[2].state, heard[2].place) == ("closed", None)


def test_after_the_end_nobody_is_told(world):
    gathered = []
    f = opero.opero(world.define(lambda: None))
    subscription = on_event(gathered.append)
    world.run(f)
    count = len(gathered)
    subscription.close()
    subscription.close()
    world.run(f)
    assert len(gathered) == count > 0


def test_one_callback_may_listen_twice_and_stop_once(world):
    gathered = []
    f = opero.opero(world.define(lambda: None))
    first, second = on_event(gathered.append), on_event(gathered.append)
    second.close()
    world.run(f)
    first.close()
    assert len(gathered) == 3


def test_callbacks_that_are_equal_to_nothing_can_stop_listening(world):
    class Callback:
        __hash__ = None

        def __init__(self):
            self.count = 0

        def __eq__(self, other):
            return False

        def __call__(self, event):
            self.count += 1

    first, second = Callback(), Callback()
    with on_event(second):
        with on_event(first):
            pass
        world.run(opero.opero(world.define(lambda: None)))
    assert (first.count, second.count) == (0, 3)


def test_a_call_whose_arguments_cannot_be_a_key_is_told_with_its_error(world, heard):
    f = opero.opero(cache=True)(world.define(lambda x: x))
    with pytest.raises(TypeError) as caught:
        world.run(f, memoryview(b"a"))
    assert (heard[-1].error, heard[-1].cancelled) == (caught.value, False)


def test_functions_made_before_and_during_are_told_of(world):
    before = opero.opero(world.define(lambda: "before"))
    gathered = []
    with on_event(gathered.append):
        during = opero.opero(world.define(lambda: "during"))
        assert [world.run(before), world.run(during)] == ["before", "during"]
    assert len({event.call for event in gathered}) == 2


def test_calls_are_as_ever_after_a_listener_has_gone(world):
    f = opero.opero(retries=0)(world.define(lambda x, /, y=2, *z, w=4, **v: (x, y, z, w, v)))
    told = []
    with on_event(told.append):
        assert world.run(f, 1, 3, 5, w=6, u=7) == (1, 3, (5,), 6, {"u": 7})
    count = len(told)
    assert world.run(f, 1) == (1, 2, (), 4, {})
    assert len(told) == count > 0


def test_stats_are_the_same_with_and_without_a_listener(world, fake_clock):
    def numbers():
        f = opero.opero(cache=True, retries=2)(world.define(failing(1)))
        world.run(f, 1)
        world.run(f, 1)
        return f.stats.snapshot()

    without = numbers()
    with on_event(lambda event: None):
        assert changed(numbers(), waited=0.0) == changed(without, waited=0.0)


@pytest.fixture
def log_lines():
    """What arrives at a sink of the program's, once opero is enabled."""
    from loguru import logger

    lines = []
    sink = logger.add(lines.append, level="WARNING", filter="opero")
    yield lines
    logger.disable("opero")
    logger.remove(sink)


def test_each_listener_that_raises_changes_nothing_and_is_complained_of_once(world, log_lines):
    def first(event):
        raise ValueError("secret-text")

    f = opero.opero(on_event=first)(world.define(lambda: "result"))
    opero.configure_logging("WARNING")
    with on_event(functools.partial(pow, "secret-argument")), on_event(functools.partial(pow, "secret-argument")):
        assert [world.run(f), world.run(f)] == ["result"] * 2
    assert ["on_event=pow raised TypeError" in line for line in log_lines] == [False, True, True]
    assert "first raised ValueError" in log_lines[0]
    assert "secret" not in str(log_lines)


def test_the_next_listener_is_told_although_one_raised(world):
    gathered = []
    with on_event(lambda event: 1 / 0), on_event(gathered.append):
        world.run(opero.opero(world.define(lambda: None)))
    assert len(gathered) == 3


def test_what_is_no_exception_passes_through_a_listener(world):
    def stop(event):
        raise KeyboardInterrupt

    with on_event(stop), pytest.raises(KeyboardInterrupt):
        world.run(opero.opero(world.define(lambda: None)))


def test_a_call_that_is_cancelled_is_told_as_cancelled(heard):
    @opero.opero
    async def f():
        await asyncio.Event().wait()

    async def main():
        task = asyncio.create_task(f())
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert kinds(heard) == [CallStarted, AttemptStarted, CallDone]
    assert (heard[-1].cancelled, heard[-1].error) == (True, None)


def test_a_call_that_is_interrupted_is_told_as_cancelled(heard):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opero.opero(interrupted)()
    assert heard[-1].cancelled


def test_an_attempt_that_runs_out_of_time_is_a_failed_one(heard):
    @opero.opero(attempt_timeout=0.01, retries=0)
    async def f():
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        asyncio.run(f())
    assert kinds(heard) == [CallStarted, AttemptStarted, AttemptFailed, CallDone]


def test_threads_that_call_while_listeners_come_and_go_are_right(world):
    f = opero.opero(retries=0)(world.define(lambda x: x))
    stop = threading.Event()

    def call():
        count = 0
        while not stop.is_set() and count < 20_000:
            assert world.run(f, count) == count
            count += 1
        return count

    callers = [started(call) for _ in range(3)]
    for _ in range(200):
        with on_event(lambda event: None):
            pass
    stop.set()
    assert all(count > 0 for count in results(callers))
    assert f.stats.calls == sum(results(callers))


def test_a_decorated_function_is_freed_without_the_garbage_collector():
    gc.disable()
    try:
        f = opero.opero(lambda: None)
        with on_event(lambda event: None):
            f()
        seen = weakref.ref(f)
        del f
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("callback", [None, 5, "print"])
def test_what_is_no_callback_is_refused(callback):
    with pytest.raises(TypeError, match="on_event"):
        on_event(callback)


def test_an_async_callback_is_refused():
    async def callback(event):
        pass

    with pytest.raises(TypeError, match="async"):
        on_event(callback)
    with pytest.raises(TypeError, match="async"):
        opero.opero(on_event=callback)(print)


# A listener that makes calls itself


@pytest.mark.parametrize("listens", ["to all", "to the function"])
def test_a_listener_is_not_told_of_calls_that_it_makes(listens):
    told = []
    send = opero.opero(lambda: len(told))

    def listener(event):
        told.append(event)
        if len(told) > 50:
            raise RecursionError
        send()

    f = opero.opero(on_event=listener if listens == "to the function" else None)(lambda: "result")
    with on_event(listener) if listens == "to all" else contextlib.nullcontext():
        assert f() == "result"
    assert kinds(told) == [CallStarted, AttemptStarted, CallDone]
    assert {event.function for event in told} == {f.__opero__.plan.name}
    assert send.stats.calls == 3


def test_a_map_that_a_listener_runs_is_not_told_to_it(mode):
    told = []
    mapped = opero.opmap(**mode.options)(mode.define(abs))
    f = opero.opero(lambda: None)

    def listener(event):
        told.append(event)
        if isinstance(event, CallDone):
            lists.append(mode.run(mapped, [-1, -2]))

    lists = []
    with on_event(listener):
        f()
    assert (kinds(told), lists) == ([CallStarted, AttemptStarted, CallDone], [[1, 2]])


def test_a_listener_is_not_told_of_calls_in_tasks_that_it_starts():
    told, tasks = [], []

    @opero.opero
    async def send():
        await asyncio.sleep(0)

    @opero.opero
    async def f():
        await asyncio.sleep(0)

    def listener(event):
        told.append(event)
        if len(told) < 50:
            tasks.append(asyncio.ensure_future(send()))

    async def main():
        with on_event(listener):
            await f()
            await asyncio.gather(*tasks)

    asyncio.run(main())
    assert len(told) == len(tasks) == send.stats.calls == 3


def test_what_runs_beside_a_listener_is_told_to_it():
    other = opero.opero(lambda: None)
    inside, told = threading.Event(), []

    def listener(event):
        told.append(event.function)
        if event.function == f.__opero__.plan.name and not inside.is_set():
            inside.set()
            results([started(other)])

    @opero.opero
    def f():
        pass

    with on_event(listener):
        f()
    assert told.count(other.__opero__.plan.name) == 3


def test_a_callback_that_is_false_is_told_all_the_same(world):
    class Gathered(list):
        __call__ = list.append

    gathered = Gathered()
    world.run(opero.opero(on_event=gathered)(world.define(lambda: None)))
    assert len(gathered) == 3


# Forks


def forking(test):
    for mark in forks:
        test = mark(test)
    return test


@forking
def test_a_forked_child_inherits_the_listeners(heard):
    f = opero.opero(lambda: None)

    def in_child():
        f()
        return len(heard)

    assert forked(in_child) == "3"
    assert heard == []


@forking
def test_a_child_forked_while_another_thread_is_told_can_be_told():
    inside, leave = threading.Event(), threading.Event()
    f = opero.opero(lambda: None)

    def listener(event):
        if not inside.is_set():
            inside.set()
            assert leave.wait(SECONDS)

    with on_event(listener):
        telling = started(f)
        assert inside.wait(SECONDS)
        try:
            assert forked(lambda: [f(), f.stats.calls > 0]) == "[None, True]"
        finally:
            leave.set()
            results([telling])


# What a function is besides being called


def undecorated(x, /, y: int = 2) -> int:
    """What it does."""
    return x + y


@opero.opero(on_event=print)
def importable(x):
    return x


@pytest.fixture(params=["usual", "listening"])
def listening(request):
    """Nobody listens to all functions, or somebody does."""
    with on_event(lambda event: None) if request.param == "listening" else contextlib.nullcontext():
        yield


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_a_function_with_a_listener_is_copied_as_what_it_is(copied):
    assert copied(importable) is importable


@pytest.mark.usefixtures("listening")
def test_a_function_with_a_listener_that_has_no_name_is_pickled_with_it(capsys):
    f = opero.opero(on_event=print)(undecorated)
    carried = cloudpickle.loads(cloudpickle.dumps(f))
    assert carried is not f
    assert carried(1) == 3
    assert "CallDone" in capsys.readouterr().out


@pytest.mark.usefixtures("listening")
def test_a_function_with_a_listener_shows_its_own_signature(world):
    plain = world.define(undecorated)
    f = opero.opero(on_event=print)(plain)
    assert inspect.signature(f) == inspect.signature(plain)
    assert inspect.iscoroutinefunction(f) == world.is_async
    assert (f.__name__, f.__doc__, f.__wrapped__) == (plain.__name__, plain.__doc__, plain)


class Account:
    def __init__(self, number):
        self.number = number

    @opero.opero(on_event=print)
    def shifted(self, by=1):
        return self.number + by


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_method_with_a_listener_is_copied_with_its_instance(copied, capsys):
    method = copied(Account(5).shifted)
    assert method() == 6
    assert str(inspect.signature(method)) == "(by=1)"


@pytest.mark.usefixtures("listening")
def test_a_map_whose_listener_cannot_travel_runs_in_processes():
    told = []
    mapped = opero.opmap(mode="process", workers=1, progress=False, on_event=told.append)(undecorated)
    assert mapped([1, 2]) == [3, 4]
    assert len(told) == 6


def test_the_module_has_every_event():
    assert {name for name in events.__all__ if name[0].isupper()} == {
        "AttemptFailed",
        "AttemptStarted",
        "CacheHit",
        "CallDone",
        "CallStarted",
        "CandidateSwitched",
        "CircuitChanged",
        "Event",
        "RetryPlanned",
        "SlotWaited",
        "Subscription",
    }
