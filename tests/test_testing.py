"""What `opero.testing` gives to users' tests: no waits, no policies, a record."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
import threading
import time
import types

import pytest
from side_by_side import SECONDS, forked, forks, results, started, until

import opero
from opero.core import RateLimiter
from opero.core.clock import clock
from opero.events import CallDone, CallStarted, RetryPlanned
from opero.testing import disabled, instant, recorded

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def _real_clock_after():
    yield
    clock.reset()


def failing(times):
    left = [times]

    def function(*_args):
        if left[0]:
            left[0] -= 1
            raise ValueError
        return "result"

    return function


# Instant


def test_a_backoff_of_hours_is_skipped_and_counted(world):
    f = opero.opero(retries=3, min_delay=3600, max_delay=1e6, jitter=False)(world.define(failing(3)))
    begin = time.monotonic()
    with instant() as passed:
        assert world.run(f) == "result"
    assert passed.skipped == pytest.approx(7 * 3600, abs=1)
    assert time.monotonic() - begin < 5


def test_a_rate_limit_is_kept_in_virtual_time(world):
    f = opero.opero(rate_limit="1/minute", retries=0)(world.define(lambda: None))
    with instant() as passed:
        for _ in range(10):
            world.run(f)
    assert passed.skipped == pytest.approx(9 * 60, abs=1)


def test_threads_share_the_virtual_time(world):
    f = opero.opero(rate_limit="1/minute", retries=0)(world.define(lambda: None))
    with instant() as passed:
        results([started(lambda: [world.run(f) for _ in range(5)]) for _ in range(4)])
    assert passed.skipped == pytest.approx(19 * 60, abs=70)


def test_tasks_share_the_virtual_time():
    f = opero.opero(rate_limit="1/minute", retries=2, min_delay=600, max_delay=600, jitter=False)(asyncio.sleep)

    async def main():
        await asyncio.gather(*[f(0) for _ in range(20)])

    with instant() as passed:
        asyncio.run(main())
    assert passed.skipped == pytest.approx(19 * 60, abs=1)


HOUR = {"min_delay": 3600, "max_delay": 3600, "jitter": False}


def fails_first(seen):
    """Fails for each list once; a task's own part takes some rounds of the loop."""
    seen.append(1)
    if len(seen) == 1:
        raise ValueError
    return "result"


async def fails_first_async(seen):
    for _ in range(20):
        await asyncio.sleep(0)
    return fails_first(seen)


async def is_spinning_until(condition):
    while not condition():  # noqa: ASYNC110 - nothing announces it, and the loop shall not be idle
        await asyncio.sleep(0)


def has_failed(events):
    return any(isinstance(event, RetryPlanned) for event in events)


async def together(function, count):
    return await asyncio.gather(*[function([]) for _ in range(count)])


def test_tasks_that_back_off_side_by_side_skip_the_time_once():
    f = opero.opero(retries=1, total_timeout=4000, **HOUR)(fails_first_async)
    with instant() as passed:
        assert asyncio.run(together(f, 50)) == ["result"] * 50
    assert passed.skipped == pytest.approx(3600, abs=1)


def test_the_waits_of_calls_inside_of_a_call_count_for_its_time(world):
    inner = opero.opero(retries=1, **HOUR)(world.define(failing(99)))
    f = opero.opero(retries=3, min_delay=1, total_timeout=60)(inner)
    with instant(), pytest.raises(ValueError):  # noqa: PT011 - the function's own
        world.run(f)
    assert f.stats.attempts == 1


def test_loops_in_several_threads_share_the_virtual_time():
    f = opero.opero(retries=1, **HOUR)(fails_first_async)
    with instant() as passed:
        assert results([started(asyncio.run, together(f, 5)) for _ in range(4)]) == [["result"] * 5] * 4
    assert 3500 < passed.skipped < 5 * 3600


def test_a_task_that_spins_until_a_wait_has_ended_does_not_hold_the_time():
    f = opero.opero(retries=1, **HOUR)(fails_first_async)

    async def main():
        waiting = asyncio.create_task(f([]))
        await is_spinning_until(waiting.done)
        return waiting.result()

    with instant():
        assert asyncio.run(main()) == "result"


def test_a_busy_thread_does_not_hold_the_time(world):
    f = opero.opero(retries=1, **HOUR)(world.define(fails_first))
    is_over = threading.Event()

    def be_busy():
        while not is_over.is_set():
            pass

    busy = started(be_busy)
    with instant():
        assert world.run(f, []) == "result"
    is_over.set()
    busy.result(SECONDS)


def test_a_call_that_blocks_the_loop_does_not_wait_for_its_tasks():
    f, f_async = (opero.opero(retries=1, **HOUR)(g) for g in (fails_first, fails_first_async))

    async def main():
        waiting = asyncio.create_task(f_async([]))
        await asyncio.sleep(0.01)
        return f([]), await waiting

    with instant():
        assert asyncio.run(main()) == ("result", "result")


def test_a_cancelled_wait_moves_no_time(monkeypatch):
    f = opero.opero(retries=1, **HOUR)(fails_first_async)
    limiter = RateLimiter("1/minute")

    async def main():
        waits = [asyncio.create_task(f([])), asyncio.create_task(limiter.acquire_async())]
        with recorded() as events, monkeypatch.context() as patch:
            # However long a busy machine takes until both are cancelled: time does not jump before.
            now = clock.real()
            patch.setattr(clock, "real", lambda: now)
            await is_spinning_until(lambda: has_failed(events))
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        await opero.opero(retries=1, min_delay=5, jitter=False)(fails_first_async)([])

    with instant() as passed:
        limiter.acquire()
        asyncio.run(main())
    assert passed.skipped == pytest.approx(5, abs=1)


def test_who_waits_at_the_end_of_the_block_goes_on():
    f = opero.opero(retries=1, **HOUR)(fails_first_async)

    async def main():
        with instant(), recorded() as events:
            waiting = asyncio.create_task(f([]))
            await is_spinning_until(lambda: has_failed(events))
        return await asyncio.wait_for(waiting, SECONDS)

    assert asyncio.run(main()) == "result"


def test_what_was_skipped_by_one_block_is_not_counted_by_another():
    with instant() as first:
        first.advance(10)
    with instant() as second:
        second.advance(100)
    assert (first.skipped, second.skipped) == (10, 100)


def test_time_that_is_advanced_by_hand_counts_for_everybody(world):
    @world.define
    def function():
        passed.advance(40)
        raise ValueError

    f = opero.opero(retries=9, min_delay=1, total_timeout=60)(function)
    with instant() as passed, pytest.raises(ValueError):  # noqa: PT011 - the function's own
        world.run(f)
    assert f.stats.attempts == 2


@forks[0]
@forks[1]
def test_a_forked_child_waits_for_nobody_of_its_parent():
    f = opero.opero(retries=1, **HOUR)(fails_first)

    async def main():
        with recorded() as events:
            other = asyncio.create_task(opero.opero(retries=1, **HOUR)(fails_first_async)([]))
            await is_spinning_until(lambda: has_failed(events))
        child = forked(lambda: f([]))
        return child, await other

    with instant():
        assert asyncio.run(main()) == ("'result'", "result")


def test_the_items_of_a_map_that_back_off_side_by_side_skip_the_time_once(mode, journal):
    def function(x):
        journal.add(x)
        if journal.lines().count(str(x)) < 3:
            raise ValueError
        return x

    mapped = opero.opmap(retries=2, total_timeout=8000, **HOUR, **mode.options)(mode.define(function))
    with instant() as passed:
        assert mode.run(mapped, range(8)) == [*range(8)]
    assert passed.skipped == pytest.approx(2 * 3600, abs=60)


def test_no_time_is_skipped_while_a_worker_of_the_map_is_busy(mode, journal):
    def function(x):
        journal.add(f"{x} begins")
        if x == 0 and journal.lines().count("0 begins") == 1:
            raise ValueError
        time.sleep(0.3)
        journal.add(f"{x} ends")

    mapped = opero.opmap(retries=1, **HOUR, **mode.options)(mode.define(function))
    with instant():
        mode.run(mapped, [0, 1])
    assert journal.lines()[2:] == ["1 ends", "0 begins", "0 ends"]


def test_the_items_of_a_map_do_not_wait(mode, journal):
    def function(x):
        journal.add(x)
        if journal.lines().count(str(x)) < 3:
            raise ValueError
        return x

    options = {"retries": 5, "min_delay": 3600, "max_delay": 3600, "rate_limit": "1/minute"}
    mapped = opero.opmap(**options, **mode.options)(mode.define(function))
    begin = time.monotonic()
    with instant() as passed:
        assert mode.run(mapped, range(4)) == [0, 1, 2, 3]
    assert time.monotonic() - begin < SECONDS
    assert passed.skipped > 3600


def test_an_attempt_of_a_map_has_its_real_time(journal):
    def function(x):
        if x == 0:
            raise ValueError
        time.sleep(0.3)
        return x

    mapped = opero.opmap(
        mode="process", workers=2, retries=3, min_delay=30, attempt_timeout=20, progress=False, return_exceptions=True
    )(function)
    with instant():
        failed, done = mapped([0, 1])
    assert isinstance(failed, ValueError)
    assert done == 1


def test_entries_of_a_memory_cache_expire_in_virtual_time(world):
    f = opero.opero(cache=True, cache_ttl=60)(world.define(lambda: [1]))
    with instant() as passed:
        first = world.run(f)
        passed.advance(59)
        assert world.run(f) is first
        passed.advance(2)
        assert world.run(f) is not first


def test_the_time_of_day_jumps_only_for_the_block(world, backend):
    options = {**backend.options, "cache_namespace": backend.namespace(), "cache_ttl": 60}
    f = opero.opero(**options)(world.define(lambda: None))
    with instant() as passed:
        passed.advance(3600)
    world.run(f)
    with instant():
        world.run(f)
    assert f.stats.hits == 1


def test_total_timeout_ends_a_call_in_virtual_time(world):
    f = opero.opero(retries=50, min_delay=10, total_timeout=60)(world.define(failing(99)))
    with instant() as passed, pytest.raises(ValueError):  # noqa: PT011 - the function's own
        world.run(f)
    assert passed.skipped <= 60


def test_a_breaker_recovers_in_virtual_time(world):
    f = opero.opero(breaker=opero.Breaker(1, recovery=600), retries=0)(world.define(failing(1)))
    with instant() as passed:
        with pytest.raises(ValueError):  # noqa: PT011 - the function's own
            world.run(f)
        with pytest.raises(opero.CircuitOpenError):
            world.run(f)
        passed.advance(600)
        assert world.run(f) == "result"


def test_who_waits_for_an_identical_call_still_waits():
    entered, go_on = threading.Event(), threading.Event()

    @opero.opero(cache=True)
    def f():
        entered.set()
        assert go_on.wait(SECONDS)
        return object()

    with instant():
        first = started(f)
        assert entered.wait(SECONDS)
        second = started(f)
        go_on.set()
        assert first.result(SECONDS) is second.result(SECONDS)


def test_a_lease_of_another_process_is_waited_for(backend, start, journal):
    options = {**backend.options, "cache_namespace": backend.namespace(), "retries": 0}
    program = start(
        """
        def f():
            say("running")
            told()
            return "theirs"
        cached(f)()
        """,
        options,
    )
    assert program.heard() == "running"
    mine = opero.opero(**options)(lambda: "mine")
    with instant():
        waiting = started(mine)
        time.sleep(0.1)
        assert not waiting.done()
        program.tell("go on")
        assert waiting.result(SECONDS) == "theirs"
    program.end()


def test_time_does_not_run_back_at_the_end(world):
    limiter = RateLimiter("1/minute")
    with instant():
        for _ in range(100):
            limiter.acquire()
    assert limiter.limit.expected_wait() <= 61


def test_waits_are_real_again_at_the_end_of_the_outermost(world):
    with instant(), instant():
        pass
    f = opero.opero(retries=1, min_delay=0.05, jitter=False)(world.define(failing(1)))
    begin = time.monotonic()
    world.run(f)
    assert time.monotonic() - begin >= 0.04


def test_who_waits_for_a_shared_limit_when_the_block_begins_goes_on_with_that_of_the_process(tmp_path):
    limiter = RateLimiter("1/minute", scope="machine", name="n", folder=str(tmp_path), max_burst=1)
    limiter.acquire()
    waiting = started(limiter.acquire)
    until(lambda: limiter.limit.expected_wait() > 100)
    with instant():
        limiter.rate = "2/minute"  # wakes who waits
        assert waiting.result(SECONDS)


def test_a_shared_limit_is_kept_by_the_process_alone(tmp_path):
    options = {"scope": "machine", "name": "n", "folder": str(tmp_path), "max_burst": 1}
    with instant():
        for _ in range(5):
            RateLimiter("1/minute", **options).acquire()
    assert RateLimiter("1/minute", **options).acquire(timeout=0)


# Disabled


def test_disabled_functions_are_the_bare_ones(world):
    runs = []
    f = opero.opero(cache=True, retries=3, rate_limit="1/day", total_timeout=1)(
        world.define(lambda x, *, y=2: runs.append((x, y)))
    )
    with disabled():
        for _ in range(3):
            world.run(f, 1)
    assert runs == [(1, 2)] * 3
    assert f.stats.calls == 0


def test_disabled_functions_raise_the_first_error(world):
    f = opero.opero(retries=3)(world.define(failing(1)))
    with disabled(), pytest.raises(ValueError):  # noqa: PT011 - the function's own
        world.run(f)


def test_a_disabled_fallback_gives_the_first_candidate(world):
    f = opero.opero(arg_fallback="key")(world.define(lambda x, key=("default", "other"): (x, key)))
    with disabled():
        assert [world.run(f, 1), world.run(f, 1, ["a", "b"]), world.run(f, 1, key="c")] == [
            (1, "default"),
            (1, "a"),
            (1, "c"),
        ]


def test_a_disabled_map_still_maps(mode, journal):
    def function(x):
        journal.add(x)
        return 1 / x

    mapped = opero.opmap(
        cache=True, retries=3, min_delay=30, rate_limit="1/day", **mode.options, return_exceptions=True
    )(mode.define(function))
    with disabled():
        results_of_all = mode.run(mapped, [1, 0, 1])
    assert results_of_all[0] == results_of_all[2] == 1
    assert isinstance(results_of_all[1], ZeroDivisionError)
    assert len(journal.lines()) == 3


def test_functions_made_while_disabled_are_whole_afterwards(world):
    with disabled():
        f = opero.opero(retries=1, min_delay=0)(world.define(failing(2)))
        with pytest.raises(ValueError):  # noqa: PT011 - the function's own
            world.run(f)
    assert world.run(f) == "result"


def test_disabled_wins_over_listening(world):
    f = opero.opero(world.define(lambda: "result"))
    with recorded() as events, disabled():
        assert world.run(f) == "result"
    assert events == []


@pytest.mark.parametrize(("value", "expected"), [("1", "1"), ("true", "1"), ("0", "3"), ("", "3"), ("no", "3")])
def test_the_environment_can_disable_a_program(value, expected):
    program = """
import opero
runs = []
@opero.opero(retries=2, min_delay=0)
def f():
    runs.append(1)
    raise ValueError
try:
    f()
except ValueError:
    print(len(runs))
"""
    environment = {"OPERO_DISABLED": value, "PATH": ""}
    output = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert output.strip() == expected


# Recorded


def test_a_record_has_the_events_of_all_functions(world):
    f, g = opero.opero(world.define(lambda: "f")), opero.opero(world.define(lambda: "g"))
    with recorded() as events:
        world.run(f)
        world.run(g)
    world.run(f)
    assert [type(e) for e in events if type(e) in {CallStarted, CallDone}] == [CallStarted, CallDone] * 2


# As fixtures


def test_the_fixtures_come_with_opero(pytester):
    pytester.makepyfile(
        """
        import opero, pytest

        @opero.opero(retries=2, min_delay=20)
        def flaky(seen):
            seen.append(1)
            if len(seen) < 3:
                raise ValueError
            return len(seen)

        def test_instant(opero_instant):
            assert flaky([]) == 3
            assert opero_instant.skipped > 20

        def test_disabled(opero_disabled):
            with pytest.raises(ValueError):
                flaky([])

        def test_recorded(opero_instant, opero_recorded):
            flaky([])
            assert len(opero_recorded) == 9
        """
    )
    pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider").assert_outcomes(passed=3)


def test_a_loop_that_was_closed_with_a_waiter_in_it_disturbs_nobody():
    waiting, other = failing(times=1), failing(times=2)

    @opero.opero(retries=1, min_delay=10)
    async def left_behind():
        return waiting()

    with instant():
        loop = asyncio.new_event_loop()
        task = loop.create_task(left_behind())
        loop.call_soon(loop.stop)
        loop.run_forever()
        loop.close()
        task._log_destroy_pending = False  # it is what is meant here
        assert opero.opero(retries=2, min_delay=20)(other)() == "result"


IMPORTED_WHILE_TIME_IS_FROZEN = """
import threading, time

real = time.monotonic, time.time
time.monotonic = lambda: 5.0
time.time = lambda: 5.0
from opero import opero

runs = []

@opero(cache=True, cache_ttl=60, retries=1, min_delay=0.001, rate_limit="100/s", rate_limit_options={"max_burst": 1})
def function(x):
    runs.append(x)
    if len(runs) == 1:
        raise ConnectionError
    return x

assert [function(x) for x in (1, 2, 1)] == [1, 2, 1]
time.monotonic, time.time = real
assert [function(x) for x in (1, 3)] == [1, 3]
assert runs == [1, 1, 2, 3], runs
"""


def test_opero_may_be_imported_while_a_test_has_frozen_time():
    subprocess.run([sys.executable, "-c", IMPORTED_WHILE_TIME_IS_FROZEN], check=True, timeout=SECONDS)


@pytest.fixture
def frozen_time(monkeypatch):
    """As freezegun does it: what the names in modules mean tells the same time for ever."""
    importlib.import_module("opero.concurrency.processes")
    importlib.import_module("opero.concurrency.scheduler")
    told = dict.fromkeys(("monotonic", "perf_counter", "time"), lambda: 5.0)
    frozen = {time: types.SimpleNamespace(**vars(time) | told)} | {getattr(time, name): told[name] for name in told}
    names = [name for name in sys.modules if name.startswith("opero")]
    for module in [sys.modules[name] for name in [*names, "asyncio.base_events"]]:
        for name, value in [*vars(module).items()]:
            if isinstance(value, (types.ModuleType, types.BuiltinFunctionType)) and value in frozen:
                monkeypatch.setattr(module, name, frozen[value])


def test_backoff_is_skipped_while_time_is_frozen(frozen_time, world):
    with instant() as passed:
        assert world.run(opero.opero(retries=3, min_delay=3600, max_delay=1e6)(world.define(failing(3)))) == "result"
    assert passed.skipped > 3600


def test_a_worker_that_is_stuck_is_ended_while_time_is_frozen(frozen_time):
    def function(x):
        time.sleep(5 * x)
        return x

    options = {"mode": "process", "workers": 2, "retries": 0, "attempt_timeout": 0.3, "return_exceptions": True}
    done, stuck = opero.opmap(**options)(function)([0, 1])
    assert done == 0
    assert isinstance(stuck, TimeoutError)


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({"max_concurrent": 3, "total_timeout": 20}, 0),
        ({"rate_limit": {"tokens": "6000/minute"}, "rate_limit_cost": {"tokens": (500, lambda used: used)}}, 299),
    ],
    ids=["a place that was left", "a cost that was less"],
)
def test_no_time_is_skipped_beyond_what_has_just_woken_one_of_hundreds_of_tasks(options, seconds):
    @opero.opero(retries=0, **options)
    async def use():
        await asyncio.sleep(0)
        return 100

    async def main():
        await asyncio.gather(*(use() for _ in range(300)))

    with instant() as passed:
        asyncio.run(main())
    assert passed.skipped == pytest.approx(seconds, abs=2)
