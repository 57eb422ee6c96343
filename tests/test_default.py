"""What a failed call returns in place of raising."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from opero import RejectedResultError, opero, opmap
from opero.exceptions import MisuseError

UNTIL = {
    "retries": {"retries": 1, "min_delay": 0},
    "no retries": {"retries": 0},
    "not retryable": {"retry_on": KeyError},
    "total_timeout": {"retries": 9, "min_delay": 5, "max_delay": 5, "total_timeout": 1},
    "circuit": {"retries": 9, "min_delay": 0, "breaker": 2},
    "candidates": {"retries": 0, "arg_fallback": "key"},
    "no slot": {"rate_limit": 0.01, "rate_limit_options": {"max_burst": 1}, "total_timeout": 1},
    "cache": {"retries": 0, "cache": True},
    "tenacity": {"retries": 1, "min_delay": 0, "retry_options": {"reraise": False}},
}


@pytest.mark.parametrize("options", UNTIL.values(), ids=UNTIL)
@pytest.mark.parametrize("default", [None, [], ValueError("a default"), "text"], ids=repr)
def test_a_failed_call_returns_the_default_whatever_ended_it(world, fake_clock, options, default):
    def fail(key="k"):
        raise ConnectionError

    function = opero(default=default, **options)(world.define(fail))
    # The second one finds the circuit open, and no slot.
    assert world.run(function) is default
    assert world.run(function) is default
    assert function.stats.failures == 2


def test_an_error_of_the_program_gives_the_default_after_one_attempt(world):
    function = opero(retries=3, min_delay=0, default="default")(world.define(lambda: misspelt))  # noqa: F821 - on purpose
    assert world.run(function) == "default"
    assert function.stats.attempts == 1


def test_a_call_that_succeeds_returns_its_result(world, fake_clock):
    errors = [ConnectionError()]

    def recover():
        if errors:
            raise errors.pop()

    assert world.run(opero(default="default")(world.define(recover))) is None


def test_a_rejected_result_is_replaced(world):
    function = opero(retries=0, default="default", retry_if_result=bool)(world.define(lambda: "rejected"))
    assert world.run(function) == "default"


def test_the_default_is_not_cached(world):
    answers = [ConnectionError(), "done"]

    def ask():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    function = opero(cache=True, retries=0, default="default")(world.define(ask))
    assert [world.run(function) for _ in range(3)] == ["default", "done", "done"]


def test_each_caller_that_waited_for_one_run_gets_the_default():
    runs = []

    @opero(cache=True, retries=0, default="default")
    async def fail():
        runs.append(1)
        await asyncio.sleep(0)
        raise ConnectionError

    async def both():
        return await asyncio.gather(fail(), fail())

    assert asyncio.run(both()) == ["default", "default"]
    assert (len(runs), fail.stats.failures) == (1, 2)


def test_listeners_are_told_of_the_error(world):
    error, told = ConnectionError(), []

    def fail():
        raise error

    world.run(opero(retries=0, default=None, on_event=told.append)(world.define(fail)))
    assert told[-1].error is error


def test_what_retry_error_callback_gives_comes_first(world):
    def fail():
        raise ConnectionError

    options = {"retry_error_callback": lambda state: "of the hook"}
    assert world.run(opero(retries=0, default="default", retry_options=options)(world.define(fail))) == "of the hook"


@pytest.mark.parametrize("options", [{}, {"cache": True}, {"arg_fallback": "key"}], ids=str)
def test_arguments_that_do_not_fit_are_an_error_all_the_same(world, options):
    function = opero(default=None, **options)(world.define(lambda key="k": key))
    with pytest.raises(TypeError):
        world.run(function, wrong=1)


def test_a_misuse_is_an_error_all_the_same(world):
    def fail():
        raise ConnectionError

    with pytest.raises(MisuseError):
        world.run(opero(default=None, retry_on=lambda error: "no answer")(world.define(fail)))


def test_an_awaitable_from_a_plain_function_is_an_error_all_the_same():
    async def later():
        """Never awaited."""

    with pytest.raises(MisuseError):
        opero(default=None)(lambda: later())()  # noqa: PLW0108 - a plain function


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_what_is_no_exception_passes(world, kind):
    def stop():
        raise kind

    with pytest.raises(kind):
        world.run(opero(default=None)(world.define(stop)))


# In a map


def half(item):
    if item % 2:
        raise ValueError(item)
    return item // 2


MAPS = {
    "first attempts": {"retries": 0},
    "retries": {"retries": 1, "min_delay": 0},
    "flows": {"retries": 0, "breaker": 99},
}
maps = pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)


@maps
@pytest.mark.parametrize("default", [None, "odd"])
def test_the_default_is_in_the_list_for_an_item_that_failed(mode, default, options):
    mapped = opmap(**mode.options, default=default, **options)(mode.define(half))
    assert mode.run(mapped, range(5)) == [0, default, 1, default, 2]
    assert mapped.stats.failures == 2


def test_the_outcome_of_an_item_that_failed_has_its_error(mode):
    mapped = opmap(**mode.options, default="odd", retries=0)(mode.define(half))
    (outcome,) = mode.stream(mapped, [1])
    assert isinstance(outcome.error, ValueError)
    with pytest.raises(ValueError, match="1"):
        _ = outcome.result


def test_one_item_alone_gives_the_default(mode):
    mapped = opmap(**mode.options, default="odd", retries=0)(mode.define(half))
    one = asyncio.run(_awaited(mapped, 1)) if mode.is_async else mapped.one(1)
    assert one == "odd"


def test_one_item_alone_gives_the_default_from_a_process_that_can_be_stopped():
    mapped = opmap(mode="process", progress=False, default=None, retries=0, attempt_timeout=60)(half)
    assert [mapped.one(1), mapped.one(2)] == [None, 1]


def test_a_rejected_result_of_an_item_is_replaced(mode):
    mapped = opmap(**mode.options, default="rejected", retries=0, retry_if_result=bool)(mode.define(half))
    assert mode.run(mapped, [0, 2]) == [0, "rejected"]
    assert isinstance(mode.stream(mapped, [2])[0].error, RejectedResultError)


async def _awaited(mapped, item):
    return await mapped.one(item)


@pytest.mark.parametrize("default", [np.zeros(2), np.array([])], ids=["two numbers", "none"])
def test_a_default_may_be_an_array(world, default):
    def fail():
        raise ConnectionError

    f = opero(retries=0, default=default)(world.define(fail))
    assert world.run(f) is default
    assert world.run(f.with_options(retries=0, default=np.ones(3))).sum() == 3
