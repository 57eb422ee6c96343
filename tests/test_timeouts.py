"""attempt_timeout bounds one execution, total_timeout the whole call."""

from __future__ import annotations

import asyncio

import pytest

from opero import AllFailedError, OperoError, opero
from opero.core import CallTimeoutError

SHORT = 0.02


def hang():
    """Wait for ever."""
    return asyncio.Event().wait()


# attempt_timeout


def test_an_attempt_past_its_timeout_is_stopped_and_retried():
    attempts = []

    @opero(attempt_timeout=SHORT, min_delay=0)
    async def slow_at_first():
        attempts.append(1)
        if len(attempts) < 3:
            await hang()
        return "done"

    assert asyncio.run(slow_at_first()) == "done"
    assert len(attempts) == 3


def test_the_last_timeout_is_raised_and_names_function_and_option():
    @opero(attempt_timeout=SHORT, retries=1, min_delay=0)
    async def always_slow():
        await hang()

    with pytest.raises(CallTimeoutError, match=r"always_slow.*attempt_timeout.*20 ms") as caught:
        asyncio.run(always_slow())
    assert isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value, OperoError)
    assert "2 attempts" in caught.value.__notes__[0]
    assert always_slow.stats.attempts == 2


def test_a_stopped_attempt_has_ended_before_the_next_one_starts():
    events = []

    @opero(attempt_timeout=SHORT, retries=1, min_delay=0)
    async def slow_to_end():
        events.append("start")
        try:
            await hang()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            events.append("end")

    with pytest.raises(CallTimeoutError):
        asyncio.run(slow_to_end())
    assert events == ["start", "end", "start", "end"]


@pytest.mark.parametrize("option", ["attempt_timeout", "total_timeout"])
def test_the_functions_own_timeout_error_is_not_taken_for_the_librarys(option):
    error = TimeoutError("my own")

    @opero(retries=0, **{option: 60})
    async def fail():
        raise error

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(fail())
    assert caught.value is error


def test_the_functions_own_inner_timeout_is_not_taken_for_the_librarys():
    @opero(retries=0, attempt_timeout=60)
    async def fail():
        async with asyncio.timeout(SHORT):
            await hang()

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(fail())
    assert not isinstance(caught.value, CallTimeoutError)


def test_an_error_that_the_function_raises_while_it_is_stopped_is_its_error():
    error = ValueError("could not say goodbye")

    @opero(retries=0, attempt_timeout=SHORT)
    async def fail():
        try:
            await hang()
        except asyncio.CancelledError:
            raise error from None

    with pytest.raises(ValueError, match="goodbye") as caught:
        asyncio.run(fail())
    assert caught.value is error


def test_a_stopped_attempt_leaves_the_task_uncancelled():
    @opero(attempt_timeout=SHORT, retries=0)
    async def always_slow():
        await hang()

    async def body():
        with pytest.raises(CallTimeoutError):
            await always_slow()
        await asyncio.sleep(0)
        return asyncio.current_task().cancelling()

    assert asyncio.run(body()) == 0


@pytest.mark.parametrize("options", [{"attempt_timeout": 60}, {"total_timeout": 60}, {}], ids=str)
def test_a_timeout_around_the_call_ends_it_without_a_retry(options):
    @opero(**options)
    async def always_slow():
        await hang()

    async def body():
        async with asyncio.timeout(SHORT):
            await always_slow()

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(body())
    assert not isinstance(caught.value, CallTimeoutError)
    assert always_slow.stats.attempts == 1


def test_attempt_timeout_cannot_apply_to_a_plain_function():
    with pytest.raises(ValueError, match=r"attempt_timeout.*async def"):
        opero(attempt_timeout=1)(lambda: None)


# total_timeout


def lasting(fake_clock, seconds, errors):
    """A function that fails with a new error after so many seconds."""

    def fail(key=None):
        errors.append(LookupError(fake_clock.now() - 1000, key))
        fake_clock.tick(seconds)
        raise errors[-1]

    return fail


def test_no_attempt_starts_after_the_end(world, fake_clock):
    errors = []
    function = opero(total_timeout=5, retries=9, min_delay=1, max_delay=1, jitter=False)(
        world.define(lasting(fake_clock, 1, errors))
    )
    with pytest.raises(LookupError):
        world.run(function)
    assert [error.args[0] for error in errors] == [0, 2, 4]


def test_the_functions_last_error_is_raised_with_a_note(world, fake_clock):
    errors = []
    function = opero(total_timeout=5, retries=9, min_delay=2, max_delay=2, jitter=False)(
        world.define(lasting(fake_clock, 1, errors))
    )
    with pytest.raises(LookupError) as caught:
        world.run(function)
    assert caught.value is errors[-1]
    (note,) = caught.value.__notes__
    assert "2 attempts" in note
    assert "4 s" in note
    assert "total_timeout=5" in note
    assert caught.value.__context__ is None


@pytest.mark.parametrize("options", [{"min_delay": 10}, {"retry_on": lambda error: 10}])
def test_a_wait_that_would_end_too_late_is_not_begun(world, fake_clock, options):
    errors = []
    function = opero(total_timeout=5, jitter=False, **options)(world.define(lasting(fake_clock, 1, errors)))
    with pytest.raises(LookupError):
        world.run(function)
    assert fake_clock.sleeps == []


def test_no_candidate_is_tried_after_the_end(world, fake_clock):
    errors = []
    function = opero(total_timeout=2, arg_fallback="key")(world.define(lasting(fake_clock, 1, errors)))
    with pytest.raises(AllFailedError, match=r"1 round.*2 attempts.*total_timeout=2") as caught:
        world.run(function, ["a", "b", "c"])
    assert caught.value.errors == errors
    assert [error.args[1] for error in errors] == ["a", "b"]


def test_a_slot_that_would_come_too_late_is_not_waited_for(world, fake_clock):
    function = opero(total_timeout=5, rate_limit=0.1)(world.define(lambda: "done"))
    world.run(function)
    with pytest.raises(CallTimeoutError, match=r"total_timeout=5.*rate"):
        world.run(function)
    assert function.stats.attempts == 1
    # Nor does it hold a place in the line.
    fake_clock.tick(10)
    assert world.run(function) == "done"


def test_a_success_that_came_in_time_is_a_success(world, fake_clock):
    rest = [LookupError()]

    def recover():
        fake_clock.tick(1)
        if rest:
            raise rest.pop()
        return "done"

    assert world.run(opero(total_timeout=5)(world.define(recover))) == "done"


def test_a_plain_function_that_ends_late_is_not_stopped(fake_clock):
    @opero(total_timeout=5)
    def late():
        fake_clock.tick(60)
        return "done"

    assert late() == "done"


def test_an_async_attempt_is_stopped_at_the_end_and_has_ended_before_the_call():
    events = []

    @opero(total_timeout=SHORT, min_delay=0)
    async def always_slow():
        try:
            await hang()
        finally:
            await asyncio.sleep(0)
            events.append("end")

    with pytest.raises(CallTimeoutError, match="total_timeout"):
        asyncio.run(always_slow())
    assert events == ["end"]


def test_the_shorter_of_both_timeouts_stops_an_attempt():
    @opero(total_timeout=SHORT, attempt_timeout=60)
    async def always_slow():
        await hang()

    with pytest.raises(CallTimeoutError, match="total_timeout"):
        asyncio.run(always_slow())


def test_each_call_has_its_own_total_timeout(world, fake_clock):
    def slow():
        fake_clock.tick(4)
        return "done"

    function = opero(total_timeout=5)(world.define(slow))
    for _ in range(3):
        assert world.run(function) == "done"


def test_an_attempt_cut_by_the_total_timeout_tells_of_the_error_before_it():
    tries = []

    @opero(total_timeout=0.05, min_delay=0)
    async def function():
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("own")
        await asyncio.Event().wait()

    with pytest.raises(CallTimeoutError) as caught:
        asyncio.run(function())
    assert "an attempt before that failed with ValueError: own" in "".join(caught.value.__notes__)
