"""The circuit breaker: when calls fail at once, who may try, and what closes it again."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
import time
import weakref

import pytest
from side_by_side import SECONDS, errors, forked, results, started, until

import opero
from opero import CircuitOpenError
from opero.core import RateLimiter
from opero.core.clock import clock
from opero.core.flow import call_flow
from opero.core.plan import Call
from opero.core.steps import drive_async, within
from opero.events import AttemptFailed, AttemptStarted, CandidateSwitched, CircuitChanged
from opero.testing import instant


class Service:
    """Fails as long as it is told to, and counts what reaches it."""

    def __init__(self):
        self.is_down = True
        self.runs = []

    def __call__(self, x=None):
        self.runs.append(x)
        if self.is_down:
            raise ConnectionError(x)
        return x


@pytest.fixture
def service():
    return Service()


@pytest.fixture
def call(world, service):
    """Calls a function with a breaker, and says what came of it."""
    made = {}

    def one(x=None, **options):
        if not made:
            options = {"breaker": 3, "retries": 0, **options}
            made["f"] = opero.opero(**options)(world.define(lambda x=None: service(x)))
        try:
            return world.run(made["f"], x)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            return type(error)

    one.made = made
    return one


def test_so_many_failures_in_a_row_open_the_circuit(call, service):
    assert [call() for _ in range(5)] == [ConnectionError] * 3 + [CircuitOpenError] * 2
    assert len(service.runs) == 3


def test_a_success_in_between_starts_the_count_anew(call, service):
    for is_down in (True, True, False, True, True, True):
        service.is_down = is_down
        call()
    assert len(service.runs) == 6
    assert call() is CircuitOpenError


def test_after_the_recovery_one_call_may_try_and_its_success_closes(call, service, fake_clock):
    for _ in range(4):
        call(breaker=opero.Breaker(3, recovery=10))
    fake_clock.tick(9.9)
    assert call() is CircuitOpenError
    fake_clock.tick(0.1)
    service.is_down = False
    assert [call(x) for x in (1, 2)] == [1, 2]


def test_a_trial_that_fails_opens_it_for_another_recovery(call, service, fake_clock):
    for _ in range(3):
        call(breaker=opero.Breaker(3, recovery=10))
    fake_clock.tick(10)
    assert [call(), call()] == [ConnectionError, CircuitOpenError]
    fake_clock.tick(10)
    assert call() is ConnectionError


def test_thirty_seconds_are_the_default_recovery(call, fake_clock):
    for _ in range(3):
        call()
    fake_clock.tick(29.9)
    assert call() is CircuitOpenError
    fake_clock.tick(0.1)
    assert call() is ConnectionError


def test_failures_outside_of_the_window_do_not_count(call, fake_clock):
    for _ in range(3):
        call(breaker=opero.Breaker(3, window=60))
        fake_clock.tick(31)
    assert call() is ConnectionError
    fake_clock.tick(1)
    assert [call(), call()] == [ConnectionError, CircuitOpenError]


def test_the_error_says_how_many_failed_and_when_the_next_trial_is(world, fake_clock):
    f = opero.opero(breaker=2, retries=0)(world.define(Service()))
    for _ in range(2):
        with pytest.raises(ConnectionError):
            world.run(f)
    fake_clock.tick(10)
    with pytest.raises(CircuitOpenError, match=r"2 failures in a row.*20 s"):
        world.run(f)


def test_retries_of_one_call_count_and_end_when_it_opens(call, service, fake_clock):
    assert call(retries=10) is ConnectionError
    assert len(service.runs) == 3
    assert len(fake_clock.sleeps) == 2


def test_the_error_of_a_call_that_opened_it_is_its_own_and_says_why_it_ended(world, fake_clock):
    f = opero.opero(breaker=2, retries=5)(world.define(Service()))
    with pytest.raises(ConnectionError) as caught:
        world.run(f)
    assert any("circuit" in note for note in caught.value.__notes__)


def test_a_call_whose_backoff_outlasts_the_recovery_goes_on(call, service, fake_clock):
    call(breaker=opero.Breaker(2, recovery=1), retries=4, min_delay=2, jitter=False)
    assert len(service.runs) == 5


def test_errors_that_are_not_retried_do_not_count(call, service):
    assert [call(retries=1, retry_on=KeyError) for _ in range(5)] == [ConnectionError] * 5
    assert len(service.runs) == 5


def test_an_open_circuit_takes_no_slot_and_a_hit_needs_none(world, service):
    f = opero.opero(breaker=1, retries=0, cache=True, rate_limit=[1_000, "2/hour"], total_timeout=5)(
        world.define(service)
    )
    service.is_down = False
    world.run(f, "kept")
    service.is_down = True
    with pytest.raises(ConnectionError):
        world.run(f, "lost")
    with pytest.raises(CircuitOpenError):
        world.run(f, "lost")
    assert world.run(f, "kept") == "kept"
    assert f.stats.attempts == 2


def test_each_candidate_has_a_circuit_of_its_own(world):
    tried = []

    def function(key):
        tried.append(key)
        if key == "bad":
            raise ConnectionError
        return key

    f = opero.opero(breaker=2, retries=0, arg_fallback="key")(world.define(function))
    assert [world.run(f, ["bad", "good"]) for _ in range(4)] == ["good"] * 4
    assert tried == ["bad", "good", "bad", "good", "good", "good"]


def test_when_all_candidates_are_shut_off_the_call_fails_at_once(world, service):
    f = opero.opero(breaker=1, retries=0, arg_fallback="key")(world.define(lambda key: service(key)))  # noqa: PLW0108 - a parameter of that name
    with pytest.raises(opero.AllFailedError):
        world.run(f, ["a", "b"])
    with pytest.raises(CircuitOpenError):
        world.run(f, ["b", "a"])
    with pytest.raises(opero.AllFailedError) as caught:
        world.run(f, ["a", "new"])
    assert len(caught.value.errors) == 1


def test_only_one_of_many_threads_makes_the_trial(fake_clock):
    entered, go_on = threading.Event(), threading.Event()
    service = Service()

    def function(x):
        if x == "trial":
            entered.set()
            assert go_on.wait(SECONDS)
        return service(x)

    f = opero.opero(breaker=opero.Breaker(1, recovery=10), retries=0)(function)
    with pytest.raises(ConnectionError):
        f("first")
    service.is_down = False
    fake_clock.tick(10)
    trial = started(f, "trial")
    assert entered.wait(SECONDS)
    for _ in range(5):
        with pytest.raises(CircuitOpenError):
            f("other")
    go_on.set()
    assert trial.result(SECONDS) == "trial"
    assert f("other") == "other"


def test_a_trial_that_is_cancelled_leaves_the_trial_to_the_next(fake_clock):
    service = Service()

    @opero.opero(breaker=opero.Breaker(1, recovery=10), retries=0)
    async def f(hangs=False):
        if hangs:
            await asyncio.Event().wait()
        return service("x")

    async def main():
        with pytest.raises(ConnectionError):
            await f()
        fake_clock.tick(10)
        task = asyncio.create_task(f(hangs=True))
        await asyncio.sleep(0)
        with pytest.raises(CircuitOpenError):
            await f()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        service.is_down = False
        return await f()

    assert asyncio.run(main()) == "x"


def test_the_items_of_a_map_share_one_circuit(mode, journal):
    def function(x):
        if x < 1_000:
            return x
        journal.add(x)
        raise ConnectionError(x)

    options = {**mode.options, "workers": 1}
    mapped = opero.opmap(breaker=opero.Breaker(3, recovery=0.2), retries=0, **options, return_exceptions=True)(
        mode.define(function)
    )
    begin = time.monotonic()
    outcomes = mode.run(mapped, range(2_000))
    recoveries = (time.monotonic() - begin) / 0.2
    assert {type(outcome) for outcome in outcomes} == {int, ConnectionError, CircuitOpenError}
    # What was with the worker is run: two batches, or as many coroutines as a process runs at the same time; and a
    # trial after each recovery.
    assert 3 <= len(journal.lines()) <= 40 + recoveries


def test_a_forked_child_can_make_the_trial_that_its_parent_makes(fake_clock):
    f = opero.opero(breaker=opero.Breaker(1, recovery=10), retries=0)(lambda x: 1 / x)
    with pytest.raises(ZeroDivisionError):
        f(0)
    fake_clock.tick(10)
    trial = f.__opero__.plan.breaker.shared.enter(None)
    assert trial is not None
    assert f.__opero__.plan.breaker.shared.enter(None) is None
    assert forked(lambda: f(2)) == "0.5"


@pytest.mark.parametrize("end", ["result", "error", "cancelled"])
def test_a_call_that_began_before_the_circuit_opened_decides_nothing(fake_clock, end):
    async def main():
        go_on = asyncio.Event()

        @opero.opero(breaker=opero.Breaker(1, recovery=10), retries=0)
        async def f(what):
            if what == "old":
                await go_on.wait()
            if what in {"bad", "trial"} or (what == "old" and end == "error"):
                raise ConnectionError(what)
            return what

        old = asyncio.create_task(f("old"))
        await asyncio.sleep(0)
        with pytest.raises(ConnectionError):
            await f("bad")
        if end == "cancelled":
            old.cancel()
        go_on.set()
        await asyncio.gather(old, return_exceptions=True)
        with pytest.raises(CircuitOpenError):
            await f("good")
        fake_clock.tick(10)
        return await f("good")

    assert asyncio.run(main()) == "good"


def test_a_candidate_that_is_shut_off_is_neither_told_nor_counted_nor_costs_a_slot(world):
    switched = []
    f = opero.opero(
        breaker=1,
        retries=0,
        arg_fallback="key",
        rate_limit="1/hour",
        per="key",
        rate_limit_options={"when_full": "next"},
        on_event=lambda event: switched.append(event) if isinstance(event, CandidateSwitched) else None,
    )(world.define(lambda key: failing_for("bad", key)))
    with pytest.raises(opero.AllFailedError):
        world.run(f, ["bad"])
    switched.clear()
    assert world.run(f, ["bad", "good"]) == "good"
    assert switched == []
    assert f.stats.fallbacks == 0


def failing_for(bad, key):
    if key == bad:
        raise ConnectionError
    return key


def test_threads_count_every_failure():
    service = Service()
    f = opero.opero(breaker=50, retries=0)(service)

    def work():
        seen = []
        for _ in range(30):
            try:
                f()
            except Exception as error:  # noqa: BLE001 - counted below
                seen.append(type(error))
        return seen

    seen = [kind for part in results([started(work) for _ in range(4)]) for kind in part]
    assert len(seen) == 120
    assert 50 <= len(service.runs) <= 53
    assert seen.count(ConnectionError) == len(service.runs)


# Calls that wait for a rate slot

SCOPES = ["process", "machine", "redis"]


@pytest.fixture(params=SCOPES)
def hourly(request, tmp_path):
    """A limit of one call per hour, in each place that can keep it."""
    options = {"scope": request.param}
    if request.param == "machine":
        options |= {"name": "hourly", "folder": tmp_path}
    elif request.param == "redis":
        server = request.getfixturevalue("redis_server")
        options |= {"name": str(tmp_path), "url": f"redis://{server.host}:{server.port}/0"}
    return RateLimiter(["1/hour", 1_000], **options)


def waits_in(limit, places):
    """Whether so many callers are in the limit's line."""
    return limit.limit.expected_wait() > 0 and len(limit.limit.waiting) == places


def test_threads_that_wait_for_a_slot_fail_as_soon_as_the_circuit_opens(hourly):
    go_on, runs = threading.Event(), []

    @opero.opero(breaker=1, retries=0, rate_limit=hourly)
    def f(x):
        runs.append(x)
        assert go_on.wait(SECONDS)
        raise ConnectionError

    first = started(f, "first")
    until(lambda: runs)
    waiting = [started(f, x) for x in range(3)]
    until(lambda: waits_in(hourly, 3))
    go_on.set()
    assert [type(error) for error in errors([first, *waiting])] == [ConnectionError] + [CircuitOpenError] * 3
    assert runs == ["first"]
    assert f.stats.attempts == 1


def test_tasks_that_wait_for_a_slot_fail_as_soon_as_the_circuit_opens(hourly):
    runs = []

    async def main():
        go_on = asyncio.Event()

        @opero.opero(breaker=1, retries=0, rate_limit=hourly)
        async def f(x):
            runs.append(x)
            await go_on.wait()
            raise ConnectionError

        tasks = [asyncio.create_task(f(x)) for x in range(4)]
        await asyncio.to_thread(until, lambda: runs and waits_in(hourly, 3))
        go_on.set()
        async with asyncio.timeout(SECONDS):
            return await asyncio.gather(*tasks, return_exceptions=True)

    assert sorted(type(error).__name__ for error in asyncio.run(main())) == ["CircuitOpenError"] * 3 + [
        "ConnectionError"
    ]
    assert len(runs) == 1


def test_items_that_wait_for_a_slot_fail_as_soon_as_the_circuit_opens(mode, journal):
    def function(x):
        journal.add(x)
        raise ConnectionError(x)

    # There would be time for their slots, and none for a trial.
    options = {"breaker": opero.Breaker(1, recovery=1e6), "rate_limit": ["1/hour", 1_000], "total_timeout": 1e5}
    mapped = opero.opmap(retries=0, **options, **mode.options, return_exceptions=True)(mode.define(function))
    outcomes = mode.run(mapped, range(5))
    assert [type(outcome) for outcome in outcomes] == [ConnectionError] + [CircuitOpenError] * 4
    assert journal.lines() == ["0"]


def test_a_round_that_the_circuit_does_not_let_begin_is_no_retry(mode):
    def function(x):
        raise ConnectionError(x)

    mapped = opero.opmap(
        breaker=3,
        retries=2,
        min_delay=0.05,
        jitter=False,
        total_timeout=SECONDS,
        **mode.options,
        return_exceptions=True,
    )(mode.define(function))
    mode.run(mapped, range(3))
    assert mapped.stats.snapshot() == opero.CallStats(calls=3, attempts=3, retries=0, failures=3)


def test_items_that_wait_for_a_worker_are_not_run_when_the_circuit_opens(mode, journal, fake_clock):
    def function(x):
        is_retry = str(x) in journal.lines()
        journal.add(x)
        if is_retry or x % 2 == 0:
            raise ConnectionError(x)
        return x

    def items():
        yield from range(19)
        fake_clock.tick(30)  # now all retries are due
        yield 19

    told = []
    mapped = opero.opmap(
        breaker=opero.Breaker(3, recovery=2_000),
        retries=1,
        min_delay=30,
        jitter=False,
        total_timeout=1_000,  # so that items travel one at a time
        on_event=told.append,
        **{**mode.options, "workers": 1},
        pool_options={"concurrency": 1} if mode.name == "async_process" else None,
    )(mode.define(function))
    outcomes = mode.stream(mapped, items())
    assert [type(outcome.error) for outcome in outcomes] == [ConnectionError, type(None)] * 10
    assert len(journal.lines()) == 23
    assert mapped.stats.attempts == sum(outcome.attempts for outcome in outcomes) == 23
    assert mapped.stats.retries == 3  # the others were not run again
    assert sum(isinstance(event, AttemptFailed) for event in told) == 13
    assert sum(isinstance(event, AttemptStarted) for event in told) == 23


def test_a_slot_that_nobody_waits_for_any_more_is_left_to_others():
    limit, go_on = RateLimiter(["1/hour", 1_000]), threading.Event()

    @opero.opero(breaker=1, retries=0, rate_limit=limit)
    def f():
        assert go_on.wait(SECONDS)
        raise ConnectionError

    calls = [started(f) for _ in range(4)]
    until(lambda: waits_in(limit, 3))
    go_on.set()
    errors(calls)
    assert 0 < limit.limit.expected_wait() <= 3_600


def test_who_waits_for_the_slot_of_a_candidate_goes_on_to_the_next_when_it_is_shut_off():
    limit, go_on, runs = RateLimiter(["1/hour", 1_000]), threading.Event(), []

    @opero.opero(breaker=1, retries=0, arg_fallback="key", rate_limit=limit, per="key")
    def f(key):
        runs.append(key)
        if key == "good":
            return key
        assert go_on.wait(SECONDS)
        raise ConnectionError

    first = started(f, ["bad"])
    until(lambda: runs)
    second = started(f, ["bad", "good"])
    until(lambda: len(limit.per_value.of("bad").waiting) == 1)
    go_on.set()
    assert second.result(SECONDS) == "good"
    assert isinstance(first.exception(SECONDS), opero.AllFailedError)
    assert runs == ["bad", "good"]


def test_a_retry_that_waits_for_a_slot_fails_with_its_own_error_when_the_circuit_opens():
    limit, go_on, runs = RateLimiter(["2/hour", 1_000]), threading.Event(), []

    @opero.opero(breaker=2, retries=5, min_delay=0, rate_limit=limit)
    def f(x):
        runs.append(x)
        if x == "late":
            assert go_on.wait(SECONDS)
        raise ConnectionError(x)

    late = started(f, "late")
    until(lambda: runs)
    retried = started(f, "early")
    until(lambda: waits_in(limit, 1))
    go_on.set()
    error = retried.exception(SECONDS)
    assert str(error) == "early"
    assert any("circuit is open" in note for note in error.__notes__)
    assert isinstance(late.exception(SECONDS), ConnectionError)
    assert runs == ["late", "early"]


def test_a_trial_that_waits_for_its_slot_keeps_others_out_and_is_given_back_when_cancelled(fake_clock):
    service = Service()

    @opero.opero(breaker=opero.Breaker(1, recovery=10), retries=0, rate_limit=["1/hour", 1_000])
    async def f(x=None):
        return service(x)

    async def main():
        with pytest.raises(ConnectionError):
            await f()
        fake_clock.tick(10)
        trial = asyncio.create_task(f())
        await asyncio.sleep(0)
        with pytest.raises(CircuitOpenError, match="a trial call is under way"):
            await f()
        trial.cancel()
        await asyncio.gather(trial, return_exceptions=True)
        service.is_down = False
        fake_clock.tick(3_600)
        return await f("back")

    assert asyncio.run(main()) == "back"
    assert service.runs == [None, "back"]


def test_a_trial_whose_slot_would_come_too_late_is_left_to_the_next(call, service, fake_clock):
    options = {"breaker": opero.Breaker(1, recovery=10), "rate_limit": ["1/hour", 1_000], "total_timeout": 5}
    call(**options)
    fake_clock.tick(10)
    assert [call(), call()] == [opero.core.CallTimeoutError] * 2
    fake_clock.tick(3_600)
    service.is_down = False
    assert call("back") == "back"


# Trials


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_trial_that_is_interrupted_is_neither_a_success_nor_a_failure(fake_clock, interrupt):
    ends = [ConnectionError, interrupt, ConnectionError]

    @opero.opero(breaker=opero.Breaker(1, recovery=10), retries=0)
    def f():
        raise ends.pop(0)

    with pytest.raises(ConnectionError):
        f()
    fake_clock.tick(10)
    with pytest.raises(interrupt):
        f()
    with pytest.raises(ConnectionError):
        f()
    with pytest.raises(CircuitOpenError):
        f()


def test_a_trial_that_nobody_awaits_any_more_is_left_to_the_next(fake_clock):
    service = Service()

    @opero.opero(breaker=opero.Breaker(1, recovery=10), retries=0)
    async def f(x):
        if x == "abandoned":
            await asyncio.Event().wait()
        return service(x)

    with pytest.raises(ConnectionError):
        asyncio.run(f("bad"))
    fake_clock.tick(10)
    service.is_down = False

    async def main():
        trial = f("abandoned")
        # A task has a context of its own, too.
        contextvars.copy_context().run(trial.send, None)
        with pytest.raises(CircuitOpenError):
            await f("other")
        del trial
        gc.collect()
        return await f("next")

    assert asyncio.run(main()) == "next"


def test_a_map_of_tasks_that_is_cancelled_during_a_trial_leaves_it_to_the_next(fake_clock):
    service = Service()

    async def main():
        entered = asyncio.Event()

        @opero.opmap(mode="async", breaker=opero.Breaker(1, recovery=10), retries=0, return_exceptions=True)
        async def mapped(x):
            if x == "trial":
                entered.set()
                await asyncio.Event().wait()
            return service(x)

        await mapped(["bad"])
        fake_clock.tick(10)
        service.is_down = False
        task = asyncio.create_task(mapped(["trial"]))
        await entered.wait()
        waits = asyncio.create_task(mapped(["next"]))
        await asyncio.sleep(0.05)
        assert not waits.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        fake_clock.tick(1)
        return await waits

    assert asyncio.run(main()) == ["next"]


def test_items_that_wait_for_a_trial_go_on_when_somebody_resets_the_circuit(fake_clock):
    async def main():
        @opero.opmap(mode="async", breaker=opero.Breaker(1, recovery=1), retries=0)
        async def mapped(x):
            return x

        circuit = opero.control(mapped).circuit
        circuit.open()
        waits = asyncio.create_task(mapped([1, 2]))
        await asyncio.sleep(0.05)
        assert not waits.done()
        circuit.reset()
        fake_clock.tick(0.1)
        return await waits

    assert asyncio.run(main()) == [1, 2]
    assert fake_clock.time < 1_000.5


def test_a_map_that_is_interrupted_during_a_trial_leaves_it_to_the_next(mode):
    def function(x):
        if x == "bad":
            raise ConnectionError
        return x

    def items():
        yield "trial"
        raise KeyboardInterrupt

    mapped = opero.opmap(breaker=opero.Breaker(1, recovery=600), retries=0, **mode.options, return_exceptions=True)(
        mode.define(function)
    )
    with instant() as virtual:
        mode.run(mapped, ["bad"])
        virtual.advance(600)
        with pytest.raises(KeyboardInterrupt):
            mode.run(mapped, items())
        assert mode.run(mapped, ["next"]) == ["next"]


def test_only_one_of_many_threads_and_tasks_makes_the_trial(fake_clock):
    service, ready = Service(), threading.Barrier(4)

    @opero.opero(breaker=opero.Breaker(1, recovery=10), retries=0)
    async def f(x=None):
        await asyncio.sleep(0.01)
        return service(x)

    with pytest.raises(ConnectionError):
        asyncio.run(f())
    fake_clock.tick(1e6)

    async def in_one_loop():
        ready.wait(SECONDS)
        return await asyncio.gather(*(f() for _ in range(5)), return_exceptions=True)

    seen = [error for loop in results([started(asyncio.run, in_one_loop()) for _ in range(4)]) for error in loop]
    assert sorted(type(error).__name__ for error in seen) == ["CircuitOpenError"] * 19 + ["ConnectionError"]
    assert len(service.runs) == 2


def test_only_one_item_of_a_map_makes_the_trial(mode, journal):
    def function(x):
        journal.add(x)
        raise ConnectionError(x)

    options = {"breaker": opero.Breaker(1, recovery=600), "retries": 0, "total_timeout": 60}
    mapped = opero.opmap(**options, **mode.options, return_exceptions=True)(mode.define(function))
    with instant() as virtual:
        mode.run(mapped, [0])
        virtual.advance(600)
        outcomes = mode.run(mapped, range(1, 8))
    assert [type(outcome) for outcome in outcomes].count(ConnectionError) == 1
    assert len(journal.lines()) == 2


def test_a_trial_may_be_dropped_in_the_middle_of_another_call_as_the_garbage_collector_does(fake_clock):
    trials = []

    @opero.opero(breaker=opero.Breaker(1, recovery=10), retries=0)
    async def f(x):
        if x == "hangs":
            await asyncio.Event().wait()
        if x == "bad":
            raise ConnectionError
        return x

    async def begin_trial():
        with pytest.raises(ConnectionError):
            await f("bad")
        fake_clock.tick(10)
        trials.append(f("hangs"))
        trials[0].send(None)

    def now():
        if f.__opero__.plan.breaker.shared._lock.lock._is_owned():
            trials.clear()
        return fake_clock.now()

    def next_call():
        asyncio.run(begin_trial())
        clock.now = now
        opero.control(f).circuit.open()
        fake_clock.tick(10)
        return asyncio.run(f("next"))

    assert started(next_call).result(SECONDS) == "next"
    assert trials == []


# What counts as a failure


def test_an_error_that_is_not_retried_was_an_answer_and_starts_the_count_anew(world):
    ends = [ConnectionError, ConnectionError, KeyError, ConnectionError, ConnectionError]

    def function():
        raise ends.pop(0)

    f = opero.opero(breaker=3, retries=0, retry_on=ConnectionError)(world.define(function))
    for _ in range(5):
        with pytest.raises((ConnectionError, KeyError)):
            world.run(f)
    assert ends == []


def test_a_trial_that_ends_with_an_error_that_is_not_retried_closes_the_circuit(world, fake_clock):
    ends = [ConnectionError, KeyError, KeyError]

    def function():
        raise ends.pop(0)

    f = opero.opero(breaker=opero.Breaker(1, recovery=10), retries=0, retry_on=ConnectionError)(world.define(function))
    with pytest.raises(ConnectionError):
        world.run(f)
    fake_clock.tick(10)
    for _ in range(2):
        with pytest.raises(KeyError):
            world.run(f)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_call_within_a_trial_by_the_same_circuit_is_part_of_it(service, is_async, fake_clock):
    guarded = opero.opero(retries=0, breaker=opero.Breaker(1, recovery=10))
    if is_async:

        @guarded
        async def page():
            return service(1)

        @guarded
        async def whole():
            return await page()

        def run():
            return asyncio.run(whole())

    else:
        page = guarded(lambda: service(1))

        @guarded
        def run():
            return page()

    for _ in range(2):
        with pytest.raises(ConnectionError):
            run()
        with pytest.raises(CircuitOpenError):
            run()
        fake_clock.tick(10)
    service.is_down = False
    assert [run(), run()] == [1, 1]
    assert opero.control(page).circuit.state == "closed"


def test_a_call_beside_a_trial_is_refused_though_it_began_in_an_earlier_one(service, fake_clock):
    guarded = opero.opero(retries=0, breaker=opero.Breaker(1, recovery=10))
    page = guarded(lambda: service(1))
    left = []

    @guarded
    def leaves_something():
        left.append(contextvars.copy_context())
        page()

    @guarded
    def other():
        with pytest.raises(CircuitOpenError, match="a trial call is under way"):
            left[-1].run(page)

    for _ in range(2):
        with pytest.raises(ConnectionError):
            leaves_something()
        fake_clock.tick(10)
    other()


def test_tasks_that_start_each_other_within_guarded_calls_are_part_of_none_that_are_over():
    known, tasks = [], []

    @opero.opero(retries=1, min_delay=0, breaker=5, per="left")
    async def f(left, runs):
        runs.append(left)
        if len(runs) == 1:
            raise ConnectionError
        known.append(len(within.get()))
        if left:
            tasks.append(asyncio.create_task(f(left - 1, [])))

    async def main():
        await f(5, [])
        while tasks:
            await tasks.pop()

    asyncio.run(main())
    assert known == [1] * 6


@pytest.mark.parametrize("option", ["attempt_timeout", "total_timeout"])
def test_a_call_that_ran_out_of_time_was_no_answer(option):
    @opero.opero(breaker=1, retries=1, min_delay=10, retry_on=ConnectionError, **{option: 0.1})
    async def f():
        await asyncio.Event().wait()

    with pytest.raises(opero.core.CallTimeoutError):
        asyncio.run(f())
    with pytest.raises(CircuitOpenError):
        asyncio.run(f())


def test_a_failure_is_counted_before_others_are_told_to_pause(fake_clock):
    paused = []

    @opero.opero(
        breaker=opero.Breaker(1, recovery=60),
        retries=1,
        retry_on=lambda _error: 5,
        rate_limit=1_000,
    )
    def f():
        raise ConnectionError

    pause = f.__opero__.plan.limit.pause
    f.__opero__.plan.limit.pause = lambda *args: (
        paused.append(opero.control(f).circuit.state),
        pause(*args),
    )[1]
    with pytest.raises(ConnectionError):
        f()
    assert paused == ["open"]


# Retries and candidates


def test_a_call_that_finds_the_circuit_open_does_not_wait_for_a_retry(call, service, fake_clock):
    for _ in range(2):
        call(breaker=opero.Breaker(1, recovery=10), retries=3)
    assert call() is CircuitOpenError
    assert fake_clock.sleeps == []
    assert len(service.runs) == 1


def test_a_call_goes_on_to_the_candidate_that_asked_for_a_rest_when_the_others_are_shut_off(world, fake_clock):
    tried = []

    def function(key):
        tried.append(key)
        if tried != ["bad", "bad", "rests", "rests"]:
            raise ConnectionError(key)
        return key

    f = opero.opero(
        breaker=opero.Breaker(2, recovery=60),
        retries=2,
        arg_fallback="key",
        retry_on=lambda error: 5 if str(error) == "rests" else True,
    )(world.define(function))
    with pytest.raises(opero.AllFailedError):
        world.run(f, ["bad"])
    assert world.run(f, ["bad", "rests"]) == "rests"
    assert fake_clock.sleeps[-1] == 5


def test_the_error_tells_of_the_candidates_of_the_call(world, fake_clock):
    f = opero.opero(arg_fallback="key", retries=0, breaker=opero.Breaker(1, recovery=100))(world.define(Failing()))
    for key in ("a", "b"):
        with pytest.raises(opero.AllFailedError):
            world.run(f, [key])
        fake_clock.tick(60)
    with pytest.raises(CircuitOpenError, match=r"its circuit opened after 1 failure in a row; .* in 40 s"):
        world.run(f, ["b"])
    fake_clock.tick(-50)
    with pytest.raises(CircuitOpenError, match=r"the circuit of every candidate opened .* in 30 s"):
        world.run(f, ["b", "a"])


class Failing:
    def __call__(self, key):
        raise ConnectionError


def test_a_cooling_candidate_makes_its_trial_when_its_turn_comes(world, fake_clock):
    tried = []

    def function(key):
        tried.append(key)
        return failing_for("bad", key)

    f = opero.opero(arg_fallback="key", retries=0, breaker=opero.Breaker(1, recovery=10), fallback_cooldown=20)(
        world.define(function)
    )
    for seconds in (0, 10, 10):
        fake_clock.tick(seconds)
        assert world.run(f, ["bad", "good"]) == "good"
    assert tried == ["bad", "good", "good", "bad", "good"]


def test_a_method_has_one_circuit_for_all_instances(world):
    class Client:
        @opero.opero(breaker=2, retries=0)
        @world.define
        def get(self):
            raise ConnectionError

    for error in (ConnectionError, ConnectionError, CircuitOpenError):
        with pytest.raises(error):
            world.run(Client().get)


# What a breaker remembers


def fail_with(f, keys):
    for key in keys:
        with pytest.raises(opero.AllFailedError):
            f(key)


def test_of_many_candidates_that_fail_only_some_are_remembered(monkeypatch):
    monkeypatch.setattr("opero.core.breaker._MOST_KEPT", 100)
    f = opero.opero(arg_fallback="key", retries=0, breaker=2)(Failing())
    fail_with(f, (f"key {n}" for n in range(200)))
    assert len(f.__opero__.plan.breaker.shared.circuits) == 100


class Unhashable:
    __hash__ = None


class Plain:
    pass


@pytest.mark.parametrize("kind", [Plain, Unhashable])
def test_an_object_is_not_kept_nor_taken_for_a_new_one_at_its_address(kind):
    f = opero.opero(arg_fallback="key", retries=0, breaker=opero.Breaker(1, recovery=600))(Failing())
    for _ in range(5):
        key = kind()
        reference = weakref.ref(key)
        fail_with(f, [key])
        del key
        gc.collect()
        assert reference() is None


@pytest.mark.parametrize(
    ("breaker", "error", "shows"),
    [
        (0, ValueError, "1 or more"),
        (-1, ValueError, "1 or more"),
        (True, TypeError, "opero.Breaker"),
        (2.5, TypeError, "opero.Breaker"),
        ("5", TypeError, "opero.Breaker"),
        ({"failures": 5}, TypeError, "opero.Breaker"),
    ],
)
@pytest.mark.parametrize("decorator", [opero.opero, opero.opmap])
def test_what_is_no_breaker_is_refused(decorator, breaker, error, shows):
    with pytest.raises(error, match=shows):
        decorator(breaker=breaker)(print)


@pytest.mark.parametrize(
    ("options", "error", "shows"),
    [
        ({"failures": 0}, ValueError, "failures"),
        ({"failures": None}, TypeError, "failures"),
        ({"window": 0}, ValueError, "window"),
        ({"recovery": -1}, ValueError, "recovery"),
        ({"recovery": float("nan")}, ValueError, "recovery"),
        ({"recovery": None}, TypeError, "recovery"),
    ],
)
def test_a_breaker_refuses_what_it_cannot_mean(options, error, shows):
    with pytest.raises(error, match=shows):
        opero.Breaker(**options)


# One object for several functions, and one circuit for each value


def test_functions_share_the_circuit_of_the_breaker_they_are_given(world):
    breaker = opero.Breaker(2)
    decorate = opero.opero(breaker=breaker, retries=0)
    f, g = decorate(world.define(lambda: 1 / 0)), decorate(world.define(lambda: "g"))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            world.run(f)
    with pytest.raises(CircuitOpenError):
        world.run(g)


def test_functions_that_are_given_a_number_have_circuits_of_their_own(world):
    decorate = opero.opero(breaker=1, retries=0)
    f, g = decorate(world.define(lambda: 1 / 0)), decorate(world.define(lambda: "g"))
    with pytest.raises(ZeroDivisionError):
        world.run(f)
    assert world.run(g) == "g"


def host(url, **_more):
    return url.split("/")[2]


@pytest.mark.parametrize("per", ["url", ("url",), host])
def test_each_value_of_per_has_a_circuit_of_its_own(world, per):
    f = opero.opero(breaker=1, per=per, retries=0)(world.define(lambda url: failing_for("http://down/", url)))
    with pytest.raises(ConnectionError):
        world.run(f, "http://down/")
    with pytest.raises(CircuitOpenError):
        world.run(f, "http://down/")
    assert world.run(f, "http://up/") == "http://up/"


def test_candidates_of_one_host_share_its_circuit(world):
    def function(url):
        if url == "http://a/1":
            raise ConnectionError
        return url

    f = opero.opero(breaker=1, per=host, arg_fallback="url", retries=0)(world.define(function))
    assert world.run(f, ["http://a/1", "http://a/2", "http://b/1"]) == "http://b/1"


def test_each_instance_has_a_circuit_of_its_own(world):
    class Service:
        def __init__(self, host):
            self.host = host

    Service.call = opero.opero(breaker=1, per="self", retries=0)(
        world.define(lambda self: failing_for("down", self.host))
    )
    with pytest.raises(ConnectionError):
        world.run(Service("down").call)
    assert world.run(Service("up").call) == "up"


def test_a_copy_of_a_breaker_is_the_breaker_and_cannot_be_pickled():
    breaker = opero.Breaker(2, recovery=5)
    assert copy.copy(breaker) is copy.deepcopy(breaker) is breaker
    with pytest.raises(TypeError, match="process"):
        pickle.dumps(breaker)


# What can be asked and done


def test_the_state_of_a_circuit_can_be_read(world, fake_clock):
    service = Service()
    f = opero.opero(breaker=opero.Breaker(1, recovery=10), retries=0)(world.define(service))
    circuit = opero.control(f).circuit
    states = [circuit.state]
    with pytest.raises(ConnectionError):
        world.run(f)
    states.append(circuit.state)
    fake_clock.tick(10)
    states.append(circuit.state)
    service.is_down = False
    world.run(f)
    assert [*states, circuit.state] == ["closed", "open", "half-open", "closed"]


def test_a_circuit_can_be_opened_and_reset(world):
    f = opero.opero(breaker=5, retries=0)(world.define(lambda: "result"))
    opero.control(f).circuit.open()
    with pytest.raises(CircuitOpenError):
        world.run(f)
    opero.control(f).circuit.reset()
    assert world.run(f) == "result"


@pytest.mark.parametrize("options", [{"per": "key"}, {"arg_fallback": "key"}])
def test_the_circuit_of_one_value_can_be_opened(world, options):
    f = opero.opero(breaker=5, retries=0, **options)(world.define(lambda key: key))
    circuit = opero.control(f).circuit
    circuit["a"].open()
    with pytest.raises(CircuitOpenError):
        world.run(f, "a")
    assert (world.run(f, "b"), circuit["b"].state) == ("b", "closed")
    with pytest.raises(TypeError, match=r"circuit\[value\]"):
        circuit.reset()


def test_a_function_with_one_circuit_has_none_by_value():
    f = opero.opero(breaker=5)(print)
    with pytest.raises(TypeError, match="per="):
        opero.control(f).circuit["a"]


def test_a_function_without_a_breaker_has_no_circuit():
    with pytest.raises(opero.MisuseError, match="breaker=5"):
        _ = opero.control(opero.opero(print)).circuit


def test_listeners_are_told_when_a_circuit_changes(world, fake_clock):
    told, service = [], Service()
    f = opero.opero(
        breaker=opero.Breaker(1, recovery=10),
        retries=0,
        on_event=lambda event: told.append(event.state) if isinstance(event, CircuitChanged) else None,
    )(world.define(service))
    with pytest.raises(ConnectionError):
        world.run(f)
    fake_clock.tick(10)
    service.is_down = False
    world.run(f)
    assert told == ["open", "closed"]


def test_the_error_has_the_seconds_until_the_next_trial_and_the_place_of_the_candidate(world, fake_clock):
    f = opero.opero(breaker=opero.Breaker(1, recovery=10), retries=0, arg_fallback="key")(
        world.define(lambda key: failing_for(key, key))
    )
    for key in ("secret a", "secret b"):
        with pytest.raises(opero.AllFailedError):
            world.run(f, [key])
        fake_clock.tick(2)
    with pytest.raises(CircuitOpenError) as caught:
        world.run(f, ["secret b", "secret a"])
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.retry_in, error.place) == (pytest.approx(6), 1)
    assert "secret" not in str(error)


# Items of a map


def test_items_of_a_map_wait_for_the_trial_of_an_open_circuit(mode, journal):
    def function(x):
        journal.add(x)
        if len(journal.lines()) < 2:
            raise ConnectionError
        return x

    mapped = opero.opmap(
        breaker=opero.Breaker(1, recovery=0.3), retries=0, **{**mode.options, "workers": 1, "return_exceptions": True}
    )(mode.define(function))
    first, *others = mode.run(mapped, range(20))
    assert isinstance(first, ConnectionError)
    assert others == list(range(1, 20))


def test_an_item_that_failed_waits_for_the_trial_before_it_is_retried(mode, journal):
    def function(x):
        journal.add(x)
        if len(journal.lines()) < 2:
            raise ConnectionError
        return x

    mapped = opero.opmap(breaker=opero.Breaker(1, recovery=0.3), retries=1, min_delay=0.01, **mode.options)(
        mode.define(function)
    )
    assert mode.run(mapped, range(1)) == [0]


def test_items_of_a_map_wait_for_no_longer_than_one_recovery(mode):
    def function(x):
        raise ConnectionError

    breaker = opero.Breaker(1, recovery=0.2)
    mapped = opero.opmap(breaker=breaker, retries=0, **mode.options, return_exceptions=True)(mode.define(function))
    assert CircuitOpenError in {type(outcome) for outcome in mode.run(mapped, range(500))}


# Too little time


@pytest.mark.parametrize(("waited", "state"), [(0, "open"), (0.45, "closed")])
def test_an_execution_that_others_left_too_little_time_says_nothing_of_the_service(fake_clock, waited, state):
    breaker = opero.Breaker(1)

    @opero.opero(breaker=breaker, retries=1, min_delay=0, max_delay=0, retry_on=ValueError, total_timeout=0.5)
    async def f(x):
        await asyncio.Event().wait()

    started_at = fake_clock.now()
    call = Call(("second",), {}, started=started_at)
    fake_clock.tick(waited)
    with pytest.raises(opero.CallTimeoutError):
        asyncio.run(drive_async(call_flow(f.__opero__.plan, call), f.__opero__.function, "f"))
    assert opero.control(f).circuit.state == state
