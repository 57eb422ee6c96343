"""The circuit breaker: when calls fail at once, who may try, and what closes it again."""

from __future__ import annotations

import asyncio
import threading

import pytest
from side_by_side import SECONDS, forked, results, started

import opero
from opero import CircuitOpenError
from opero.core.signature import MISSING
from opero.events import CandidateSwitched


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
        call(breaker={"failures": 3, "recovery": 10})
    fake_clock.tick(9.9)
    assert call() is CircuitOpenError
    fake_clock.tick(0.1)
    service.is_down = False
    assert [call(x) for x in (1, 2)] == [1, 2]


def test_a_trial_that_fails_opens_it_for_another_recovery(call, service, fake_clock):
    for _ in range(3):
        call(breaker={"failures": 3, "recovery": 10})
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
        call(breaker={"failures": 3, "window": 60})
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
    call(breaker={"failures": 2, "recovery": 1}, retries=4, min_delay=2, jitter=False)
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

    f = opero.opero(breaker={"failures": 1, "recovery": 10}, retries=0)(function)
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

    @opero.opero(breaker={"failures": 1, "recovery": 10}, retries=0)
    async def f(hangs=False):
        if hangs:
            await asyncio.sleep(SECONDS)
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
        journal.add(x)
        raise ConnectionError(x)

    options = {**mode.options, "workers": 1}
    mapped = opero.opmap(breaker=3, retries=0, **options)(mode.define(function))
    outcomes = mode.run(mapped, range(200))
    assert {type(outcome) for outcome in outcomes} == {ConnectionError, CircuitOpenError}
    assert 3 <= len(journal.lines()) <= 110


def test_a_forked_child_can_make_the_trial_that_its_parent_makes(fake_clock):
    f = opero.opero(breaker={"failures": 1, "recovery": 10}, retries=0)(lambda x: 1 / x)
    with pytest.raises(ZeroDivisionError):
        f(0)
    fake_clock.tick(10)
    trial = f.plan.breaker.enter(MISSING)
    assert trial is not None
    assert f.plan.breaker.enter(MISSING) is None
    assert forked(lambda: f(2)) == "0.5"


@pytest.mark.parametrize("end", ["result", "error", "cancelled"])
def test_a_call_that_began_before_the_circuit_opened_decides_nothing(fake_clock, end):
    async def main():
        go_on = asyncio.Event()

        @opero.opero(breaker={"failures": 1, "recovery": 10}, retries=0)
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
        rate_limit_per="key",
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


@pytest.mark.parametrize(
    ("breaker", "error", "shows"),
    [
        (0, ValueError, "1 or more"),
        (-1, ValueError, "1 or more"),
        (True, TypeError, "mapping"),
        (2.5, TypeError, "mapping"),
        ("5", TypeError, "mapping"),
        ({"failures": 0}, ValueError, "failures"),
        ({"failures": None}, TypeError, "failures"),
        ({"failure": 5}, TypeError, "'failures'"),
        ({"window": 0}, ValueError, "window"),
        ({"recovery": -1}, ValueError, "recovery"),
        ({"recovery": float("nan")}, ValueError, "recovery"),
        ({"recovery": None}, TypeError, "recovery"),
    ],
)
@pytest.mark.parametrize("decorator", [opero.opero, opero.opmap])
def test_what_is_no_breaker_is_refused(decorator, breaker, error, shows):
    with pytest.raises(error, match=shows):
        decorator(breaker=breaker)(print)
