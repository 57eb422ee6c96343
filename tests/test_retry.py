"""Retry: how many rounds, which errors, how long between, and what is raised in the end."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import datetime as dt
import decimal
import gc
import inspect
import pickle
import subprocess
import sys
import textwrap
import threading
import traceback
import unittest
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tenacity

from conftest import World
from opero import (
    GIVE_UP,
    NEXT,
    AllFailedError,
    CircuitOpenError,
    RejectedResultError,
    control,
    opero,
    opmap,
)
from opero.core import get_retry_decorator
from opero.core.flow import call_flow
from opero.core.plan import Call
from opero.core.steps import drive, drive_async
from opero.decorators.opero import make_plan
from opero.testing import instant

STEADY = {"jitter": False, "min_delay": 1}


def script(*outcomes):
    """A function that ends each call as the next of ``outcomes`` says, and in the end always as the last one."""
    rest = list(outcomes)

    def scripted(*args):
        outcome = rest.pop(0) if len(rest) > 1 else rest[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return scripted


def raised_by(world, function, *args):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the caller looks at it
        world.run(function, *args)
    return caught.value


# What is raised


def test_a_failing_call_is_repeated_until_it_succeeds(world, fake_clock):
    function = opero(world.define(script(ValueError(), KeyError(), "done")))
    assert world.run(function) == "done"
    assert len(fake_clock.sleeps) == 2


def test_a_tenacity_that_cannot_be_switched_off_is_good_enough(world, fake_clock, monkeypatch):
    class Retrying(tenacity.Retrying):
        """That of tenacity before 9.2, which libraries beside opero ask for."""

        def __init__(self, **options):
            super().__init__(**options)
            vars(self).pop("enabled", None)

    monkeypatch.setattr(tenacity, "Retrying", Retrying)
    function = opero(retries=1)(world.define(script(ValueError(), "done", ValueError(), KeyError())))
    assert world.run(function) == "done"
    assert isinstance(raised_by(world, function), KeyError)


def test_the_last_error_itself_is_raised_with_its_traceback(world, fake_clock):
    errors = [ValueError(1), ValueError(2), ValueError(3)]
    error = raised_by(world, opero(retries=2)(world.define(script(*errors))))
    assert error is errors[2]
    assert traceback.extract_tb(error.__traceback__)[-1].name == "scripted"


def test_the_last_error_is_not_chained_to_those_before_it(world, fake_clock):
    error = raised_by(world, opero(retries=2)(world.define(script(ValueError(1), ValueError(2), ValueError(3)))))
    assert error.__context__ is None
    assert error.__cause__ is None


def test_the_error_keeps_the_cause_that_the_function_gave_it(world, fake_clock):
    cause = KeyError("cause")

    def fail():
        raise ValueError from cause

    error = raised_by(world, opero(retries=1)(world.define(fail)))
    assert error.__cause__ is cause
    assert error.__suppress_context__


def test_one_note_tells_attempts_and_seconds(world, fake_clock):
    def fail():
        fake_clock.tick(1)
        raise ValueError

    (note,) = raised_by(world, opero(retries=2, **STEADY)(world.define(fail))).__notes__
    assert "3 attempts" in note
    assert "6 s" in note


def test_the_note_counts_a_single_attempt_too(world):
    (note,) = raised_by(world, opero(retries=0)(world.define(script(ValueError())))).__notes__
    assert "1 attempt in" in note


def test_an_error_that_ends_two_calls_has_the_note_of_the_second_one_and_the_users_own(world, fake_clock):
    error = ValueError()
    error.add_note("mine")
    function = opero(retries=1)(world.define(script(error)))
    raised_by(world, function)
    fake_clock.tick(1000)
    raised_by(world, function)
    assert len(error.__notes__) == 2
    assert error.__notes__[0] == "mine"


@pytest.mark.parametrize("broken_hook", [{}, {"retry_options": {"before_sleep": script(KeyError())}}], ids=["", "hook"])
def test_an_error_that_refuses_attributes_is_raised_all_the_same(world, fake_clock, broken_hook):
    @dataclass(frozen=True)
    class FrozenError(Exception):
        code: int

    error = FrozenError(7)
    assert raised_by(world, opero(retries=1, **broken_hook)(world.define(script(error)))) is error


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
def test_the_exceptions_of_iteration_are_errors_like_any_other(world, fake_clock, kind):
    errors = [kind(1), kind(2)]
    function = opero(retries=1)(world.define(script(*errors)))
    error = raised_by(world, function)
    if world.is_async and kind is StopIteration:
        # Python itself turns it into this before anybody can see it.
        assert isinstance(error, RuntimeError)
        error = error.__cause__
    assert error is errors[1]
    assert function.stats.attempts == 2


def test_a_retry_error_of_the_users_own_is_an_error_like_any_other(world, fake_clock):
    inner = tenacity.retry(stop=tenacity.stop_after_attempt(2))(script(ValueError()))
    function = opero(retries=2)(world.define(inner))
    error = raised_by(world, function)
    assert isinstance(error, tenacity.RetryError)
    assert function.stats.attempts == 3
    # Once in the user's own retrying, not again in opero's.
    assert [frame.name for frame in traceback.extract_tb(error.__traceback__)].count("iter") == 1


POLICIES = {
    "no retry": {"retries": 0},
    "retry": {"retries": 1, "min_delay": 0},
    "not retryable": {"retry_on": KeyError},
    "hooks": {"retries": 1, "min_delay": 0, "retry_options": {"before_sleep": lambda state: None}},
    "judge": {"retries": 1, "min_delay": 0, "retry_options": {"retry": tenacity.retry_if_exception_type(ValueError)}},
    "fallback": {"retries": 1, "min_delay": 0, "arg_fallback": "key"},
    "cache": {"retries": 1, "min_delay": 0, "cache": True},
    "total_timeout": {"retries": 1, "min_delay": 0, "total_timeout": 60},
}


@pytest.mark.parametrize("has_succeeded", [False, True])
@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
def test_handled_errors_are_freed_without_the_garbage_collector(world, options, has_succeeded):
    alive = weakref.WeakSet()
    successes = ["one"] if has_succeeded else []

    class TrackedError(ValueError):
        def __init__(self):
            alive.add(self)

    def fail(key=("a", "b")):
        if successes:
            return successes.pop()
        raise TrackedError

    function = opero(**options)(world.define(fail))
    if has_succeeded:
        world.run(function, key="a")

    def count():
        with contextlib.suppress(TrackedError, ExceptionGroup):
            function()
        return len(alive)

    async def count_async():
        with contextlib.suppress(TrackedError, ExceptionGroup):
            await function()
        return len(alive)

    gc.collect()
    gc.disable()
    try:
        assert world.run(count_async if world.is_async else count) == 0
    finally:
        gc.enable()


# How long between


@pytest.mark.parametrize(
    ("options", "delays"),
    [
        ({}, [0.1, 0.2, 0.4]),
        ({"min_delay": 1, "backoff_factor": 3, "retries": 4}, [1, 3, 9, 27]),
        ({"min_delay": 1, "backoff_factor": 1.0}, [1, 1, 1]),
        ({"min_delay": 1, "max_delay": 2.5}, [1, 2, 2.5]),
        ({"min_delay": 0}, [0, 0, 0]),
        ({"retries": 0, "retry_options": {"reraise": True}}, []),
    ],
)
def test_without_jitter_the_delays_are_exactly_the_formula(world, fake_clock, options, delays):
    raised_by(world, opero(jitter=False, **options)(world.define(script(ValueError()))))
    assert fake_clock.sleeps == pytest.approx(delays)


def test_delays_may_be_timedeltas(world, fake_clock):
    delays = {"min_delay": dt.timedelta(seconds=1), "max_delay": dt.timedelta(seconds=3)}
    raised_by(world, opero(retries=3, jitter=False, **delays)(world.define(script(ValueError()))))
    assert fake_clock.sleeps == [1, 2, 3]


def test_with_jitter_each_delay_is_drawn_from_its_upper_half(world, fake_clock):
    raised_by(world, opero(retries=300, min_delay=2, max_delay=2)(world.define(script(ValueError()))))
    assert all(1 <= delay <= 2 for delay in fake_clock.sleeps)
    assert min(fake_clock.sleeps) < 1.2
    assert max(fake_clock.sleeps) > 1.8


@pytest.mark.parametrize("factor", [2.0, 10, 1e300])
def test_delays_never_overflow(world, fake_clock, factor):
    error = ValueError()
    function = opero(retries=2000, backoff_factor=factor)(world.define(script(error)))
    assert raised_by(world, function) is error
    assert len(fake_clock.sleeps) == 2000
    assert max(fake_clock.sleeps) <= 30


def test_a_min_delay_of_zero_stays_zero_however_many_rounds_there_are(world, fake_clock):
    raised_by(world, opero(retries=2000, min_delay=0)(world.define(script(ValueError()))))
    assert set(fake_clock.sleeps) == {0}


@pytest.mark.parametrize(
    "options", [{"max_delay": 1e300, "min_delay": 1e300}, {"retry_on": lambda error: float("inf")}]
)
def test_no_delay_is_longer_than_the_system_can_wait(world, fake_clock, options):
    raised_by(world, opero(retries=1, **options)(world.define(script(ValueError()))))
    assert 0 < fake_clock.sleeps[0] <= threading.TIMEOUT_MAX


def test_calls_in_threads_at_once_do_not_share_their_backoff(fake_clock):
    together = threading.Barrier(2)

    @opero(retries=3, **STEADY)
    def fail():
        together.wait()
        raise ValueError

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(fail) for _ in range(2)]
    assert all(isinstance(call.exception(), ValueError) for call in calls)
    assert sorted(fake_clock.sleeps) == [1, 1, 2, 2, 4, 4]


def test_calls_in_tasks_at_once_do_not_share_their_backoff(fake_clock):
    @opero(retries=3, **STEADY)
    async def fail():
        await asyncio.sleep(0)
        raise ValueError

    async def both():
        return await asyncio.gather(fail(), fail(), return_exceptions=True)

    assert all(isinstance(error, ValueError) for error in asyncio.run(both()))
    assert fake_clock.sleeps == [1, 1, 2, 2, 4, 4]


# Which errors


CHOICES = {
    "class": ValueError,
    "tuple": (ValueError, OSError),
    "bool": lambda error: isinstance(error, ValueError),
    "seconds": lambda error: 5 if isinstance(error, ValueError) else False,
    "none": lambda error: True if isinstance(error, ValueError) else None,
}


@pytest.mark.parametrize("retry_on", CHOICES.values(), ids=CHOICES)
def test_only_the_chosen_errors_are_retried(world, fake_clock, retry_on):
    other = KeyError()
    function = opero(retry_on=retry_on)(world.define(script(UnicodeError(), other, "never")))
    assert raised_by(world, function) is other
    assert function.stats.attempts == 2


@pytest.mark.parametrize(
    ("answer", "delays"), [(5, [5.0]), (100.0, [100.0]), (0, [0.0]), (0.0, [0.0]), (False, []), (True, [0.1])]
)
def test_a_number_from_retry_on_is_the_delay_and_a_bool_is_a_yes_or_no(world, fake_clock, answer, delays):
    raised_by(world, opero(retries=1, jitter=False, retry_on=lambda error: answer)(world.define(script(ValueError()))))
    assert fake_clock.sleeps == delays


def test_a_delay_from_retry_on_holds_for_one_round_only(world, fake_clock):
    errors = [ValueError(True), ValueError(50), ValueError(True), ValueError(True)]
    raised_by(world, opero(jitter=False, retry_on=lambda error: error.args[0])(world.define(script(*errors))))
    assert fake_clock.sleeps == pytest.approx([0.1, 50, 0.4])


class MineError(ConnectionError):
    pass


GROUPS = {
    "all of the class": (ExceptionGroup("", [ConnectionError(), MineError()]), True),
    "groups in a group": (ExceptionGroup("", [ExceptionGroup("", [MineError()]), ConnectionError()]), True),
    "another among them": (ExceptionGroup("", [ConnectionError(), KeyError()]), False),
    "another further in": (ExceptionGroup("", [ConnectionError(), ExceptionGroup("", [KeyError()])]), False),
}
groups = pytest.mark.parametrize(("group", "is_retried"), GROUPS.values(), ids=GROUPS)


@groups
@pytest.mark.parametrize("retry_on", [ConnectionError, (OSError, ValueError)])
def test_a_class_matches_a_group_if_it_matches_all_that_is_in_it(world, fake_clock, group, is_retried, retry_on):
    function = opero(retries=1, retry_on=retry_on)(world.define(script(group)))
    assert raised_by(world, function) is group
    assert function.stats.attempts == 1 + is_retried


@groups
def test_a_class_matches_the_group_of_an_item(mode, group, is_retried):
    def fail(item):
        raise group

    mapped = opmap(**mode.options, retries=1, min_delay=0, retry_on=ConnectionError)(mode.define(fail))
    (outcome,) = mode.stream(mapped, [1])
    assert outcome.attempts == 1 + is_retried


def test_the_failures_of_a_task_group_are_retried_like_one(fake_clock):
    async def connect(failures):
        if failures:
            raise failures.pop()

    @opero(retry_on=ConnectionError)
    async def both(failures):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(connect(failures))
        return "done"

    assert asyncio.run(both([ConnectionError()])) == "done"


OF_THE_PROGRAM = [
    NameError,
    UnboundLocalError,
    ImportError,
    ModuleNotFoundError,
    SyntaxError,
    NotImplementedError,
    RecursionError,
    MemoryError,
]
of_the_program = pytest.mark.parametrize("kind", OF_THE_PROGRAM)


@of_the_program
def test_an_error_of_the_program_itself_ends_the_call_where_retry_on_is_not_given(world, kind):
    error = kind()
    function = opero(world.define(script(error)))
    assert raised_by(world, function) is error
    assert function.stats.attempts == 1


@of_the_program
@pytest.mark.parametrize("retries", [0, 1])
def test_an_error_of_the_program_itself_is_no_reason_to_try_the_next_candidate(world, kind, retries):
    tried = []

    def fail(key):
        tried.append(key)
        raise kind

    error = raised_by(world, opero(retries=retries, arg_fallback="key")(world.define(fail)), ["a", "b"])
    assert isinstance(error, AllFailedError)
    assert tried == ["a"]


def test_an_error_of_the_program_itself_says_nothing_of_the_service(world):
    function = opero(retries=0, breaker=1)(world.define(script(NameError())))
    raised_by(world, function)
    assert isinstance(raised_by(world, function), NameError)


@of_the_program
def test_an_error_of_the_program_itself_is_retried_if_retry_on_says_so(world, fake_clock, kind):
    function = opero(retries=1, retry_on=Exception)(world.define(script(kind())))
    raised_by(world, function)
    assert function.stats.attempts == 2


@pytest.mark.parametrize("other", [ImportError(), unittest.SkipTest(), ExceptionGroup("", [NameError()])], ids=repr)
def test_a_group_of_errors_that_end_the_call_ends_it(world, other):
    function = opero(world.define(script(ExceptionGroup("", [NameError(), other]))))
    raised_by(world, function)
    assert function.stats.attempts == 1


@pytest.mark.parametrize(("options", "attempts"), [({}, 1), ({"retry_on": Exception}, 2)], ids=str)
def test_an_error_of_the_program_ends_its_item_where_retry_on_is_not_given(mode, options, attempts):
    def fail(item):
        raise NotImplementedError

    mapped = opmap(**mode.options, retries=1, min_delay=0, **options)(mode.define(fail))
    assert [outcome.attempts for outcome in mode.stream(mapped, range(2))] == [attempts] * 2


def test_the_decorator_for_retries_alone_ends_at_an_error_of_the_program_too(world, fake_clock):
    function = get_retry_decorator()(world.define(script(NameError())))
    raised_by(world, function)
    assert function.stats.attempts == 1


# What an answer means


@dataclass(frozen=True)
class Row:
    """One of the answers to an error: the candidates that are tried then, and what becomes of the one that failed."""

    answer: Any
    tried: str
    rests: bool = False
    counts: bool = False


TABLE = {
    "True": Row(lambda error: True, "aba", rests=True, counts=True),
    "NumPy's True": Row(lambda error: np.bool_(True), "aba", rests=True, counts=True),
    "a delay": Row(lambda error: 0.5, "aba", rests=True, counts=True),
    "a timedelta": Row(lambda error: dt.timedelta(seconds=0.5), "aba", rests=True, counts=True),
    "a class that matches": Row(ValueError, "aba", rests=True, counts=True),
    "False": Row(lambda error: False, "ab", rests=True, counts=True),
    "NumPy's False": Row(lambda error: np.bool_(False), "ab", rests=True, counts=True),
    "None": Row(lambda error: None, "ab", rests=True, counts=True),
    "no class matches": Row(OSError, "ab", rests=True),
    "NEXT": Row(lambda error: NEXT, "ab"),
    "GIVE_UP": Row(lambda error: GIVE_UP, "a"),
}
rows = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)


def where_a_fails(answer, *, and_b=KeyError):
    """The candidates that were tried, a function that tries them, and its ``retry_on``."""
    tried = []

    def ask(key):
        tried.append(key)
        if key == "a":
            raise ValueError
        if and_b is not None:
            raise and_b

    def retry_on(error):
        return answer(error) if isinstance(error, ValueError) else False

    return tried, ask, answer if isinstance(answer, type) else retry_on


@rows
def test_an_answer_says_whether_a_candidate_is_tried_again_and_whether_the_call_goes_on(world, fake_clock, row):
    asked, ask, retry_on = where_a_fails(row.answer)
    error = raised_by(world, opero(retries=1, arg_fallback="key", retry_on=retry_on)(world.define(ask)), ["a", "b"])
    assert "".join(asked) == row.tried
    assert isinstance(error, AllFailedError)
    assert len(error.errors) == len(row.tried)


@rows
def test_an_answer_says_whether_a_candidate_rests(world, fake_clock, row):
    asked, ask, retry_on = where_a_fails(row.answer, and_b=None)
    options = {"arg_fallback": "key", "fallback_cooldown": 60, "retry_on": retry_on}
    function = opero(retries=0, **options)(world.define(ask))
    with contextlib.suppress(AllFailedError):
        world.run(function, ["a", "b"])
    asked.clear()
    with contextlib.suppress(AllFailedError):
        world.run(function, ["a", "b"])
    assert asked[0] == ("b" if row.rests else "a")


@rows
def test_an_answer_says_whether_the_circuit_counts_an_error(world, row):
    _, ask, retry_on = where_a_fails(row.answer)
    function = opero(retries=0, breaker=1, retry_on=retry_on)(world.define(ask))
    raised_by(world, function, "a")
    assert isinstance(raised_by(world, function, "a"), CircuitOpenError if row.counts else ValueError)


@rows
def test_an_answer_means_the_same_for_the_items_of_a_map(mode, row, journal):
    def ask(item, key):
        journal.add(key)
        raise ValueError if key == "a" else KeyError

    _, _, retry_on = where_a_fails(row.answer)
    options = {"retries": 1, "min_delay": 0, "arg_fallback": "key", "retry_on": retry_on}
    with instant():
        (outcome,) = mode.stream(opmap(**mode.options, **options)(mode.define(ask)), [1], key=["a", "b"])
    assert "".join(journal.lines()) == row.tried
    assert isinstance(outcome.error, AllFailedError)


def test_a_call_that_was_given_up_does_not_say_that_every_candidate_failed(world):
    _, ask, retry_on = where_a_fails(lambda error: GIVE_UP)
    error = raised_by(world, opero(arg_fallback="key", retry_on=retry_on)(world.define(ask)), ["a", "b"])
    assert "gave up on every candidate of 'key' in 1 round" in str(error)


@pytest.mark.parametrize("answer", [NEXT, GIVE_UP])
def test_without_candidates_to_go_on_to_the_functions_own_error_ends_the_call(world, fake_clock, answer):
    error = ValueError()
    function = opero(retry_on=lambda error: answer)(world.define(script(error)))
    assert raised_by(world, function) is error
    assert function.stats.attempts == 1


@pytest.mark.parametrize("answer", [NEXT, GIVE_UP])
def test_an_answer_is_one_object_wherever_it_is_copied_to(answer):
    copies = [pickle.loads(pickle.dumps(answer)), copy.copy(answer), copy.deepcopy(answer)]
    assert all(made is answer for made in copies)


@pytest.mark.parametrize("answer", ["yes", decimal.Decimal(1), [True], object()], ids=str)
def test_an_answer_that_is_none_ends_the_call_with_a_type_error_that_names_its_type(world, answer):
    error = ValueError()
    function = opero(cache=True, retry_on=lambda error: answer)(world.define(script(error)))
    refusal = raised_by(world, function)
    assert isinstance(refusal, TypeError)
    assert type(answer).__name__ in str(refusal)
    assert "opero.GIVE_UP" in str(refusal)
    assert refusal.__context__ is error
    assert (function.stats.attempts, control(function).cache_info().currsize) == (1, 0)


PREDICATES = {
    "retry_on": lambda predicate: {"retry_on": predicate},
    "retry": lambda predicate: {"retry_options": {"retry": predicate}},
}
predicates = pytest.mark.parametrize("as_option", PREDICATES.values(), ids=PREDICATES)


@predicates
@pytest.mark.parametrize("more", [{}, {"arg_fallback": "key"}, {"breaker": 1}, {"cache": True}], ids=str)
def test_a_predicate_that_raises_ends_the_call_with_its_error(world, as_option, more):
    error, of_predicate = ValueError(), KeyError()
    asked, tried = [], []

    def predicate(_):
        asked.append(1)
        raise of_predicate

    def fail(key=("a", "b")):
        tried.append(key)
        raise error

    function = opero(**as_option(predicate), **more)(world.define(fail))
    assert raised_by(world, function) is of_predicate
    assert of_predicate.__context__ is error
    assert (len(asked), len(tried), function.stats.failures) == (1, 1, 1)


@predicates
def test_a_predicate_that_raises_is_the_error_of_its_item(mode, as_option):
    def fail(item):
        raise ValueError(item)

    def predicate(_):
        raise KeyError

    mapped = opmap(**mode.options, **as_option(predicate))(mode.define(fail))
    outcomes = mode.stream(mapped, range(3))
    assert [(type(outcome.error), outcome.attempts) for outcome in outcomes] == [(KeyError, 1)] * 3


def test_a_result_that_the_predicate_cannot_judge_is_not_cached(world):
    results = [{"status": "odd"}, {"done": True}]

    def poll(job):
        return results.pop(0)

    judge = tenacity.retry_if_result(lambda result: not result["done"])
    function = opero(cache=True, retry_options={"retry": judge})(world.define(poll))
    assert isinstance(raised_by(world, function, 1), KeyError)
    assert world.run(function, 1) == {"done": True}


# Results that are not accepted


def is_none(result):
    return result is None


@pytest.mark.parametrize("retry_on", [Exception, KeyError, lambda error: False], ids=["all", "others", "none"])
def test_a_rejected_result_is_a_failed_attempt_whatever_retry_on_says(world, fake_clock, retry_on):
    function = opero(retries=2, retry_on=retry_on, retry_if_result=is_none)(world.define(script(None, None, "done")))
    assert world.run(function) == "done"
    assert (function.stats.attempts, len(fake_clock.sleeps)) == (3, 2)


@pytest.mark.parametrize("retries", [0, 2])
def test_a_result_that_is_rejected_to_the_end_is_in_the_error_and_not_in_its_text(world, fake_clock, retries):
    function = opero(retries=retries, retry_if_result=bool)(world.define(script("swordfish")))
    error = raised_by(world, function)
    assert isinstance(error, RejectedResultError)
    assert error.result == "swordfish"
    assert "swordfish" not in f"{error} {error!r} {error.__notes__}"
    assert "scripted" in str(error)
    assert f"attempt {retries + 1}" in str(error)
    assert function.stats.failures == 1


def test_a_rejected_result_survives_pickling():
    error = RejectedResultError("rejected", [1])
    error.add_note("a note")
    made = pickle.loads(pickle.dumps(error))
    assert (str(made), made.result, made.__notes__) == ("rejected", [1], ["a note"])


@pytest.mark.parametrize("more", [{}, {"arg_fallback": "key"}, {"cache": True}], ids=str)
def test_a_judge_of_results_that_raises_ends_the_call_with_its_error(world, more):
    of_predicate = KeyError()

    def judge(result):
        raise of_predicate

    def answer(key=("a", "b")):
        return "odd"

    function = opero(retry_if_result=judge, **more)(world.define(answer))
    assert raised_by(world, function) is of_predicate
    assert (function.stats.attempts, control(function).cache_info().currsize) == (1, 0)


def test_after_a_rejected_result_the_next_candidate_is_tried(world):
    def ask(key):
        return key

    function = opero(retries=0, arg_fallback="key", retry_if_result=lambda key: key != "c")(world.define(ask))
    assert world.run(function, ["a", "b", "c"]) == "c"
    error = raised_by(world, function, ["a", "b"])
    assert [(type(e), e.result) for e in error.errors] == [(RejectedResultError, "a"), (RejectedResultError, "b")]


def test_a_rejected_result_counts_for_the_circuit(world):
    function = opero(retries=0, breaker=1, retry_if_result=is_none)(world.define(script(None)))
    assert isinstance(raised_by(world, function), RejectedResultError)
    assert isinstance(raised_by(world, function), CircuitOpenError)


def test_only_an_accepted_result_is_cached(world):
    function = opero(cache=True, retries=0, retry_if_result=is_none)(world.define(script(None, "done")))
    assert isinstance(raised_by(world, function), RejectedResultError)
    assert [world.run(function), world.run(function)] == ["done", "done"]
    assert function.stats.attempts == 2


def test_listeners_are_told_of_a_rejected_result_as_a_failed_attempt(world, fake_clock):
    told = []
    options = {"retry_if_result": is_none, "on_event": told.append}
    world.run(opero(**options)(world.define(script(None, "done"))))
    kinds = ["CallStarted", "AttemptStarted", "AttemptFailed", "RetryPlanned", "AttemptStarted", "CallDone"]
    assert [type(event).__name__ for event in told] == kinds
    assert isinstance(told[2].error, RejectedResultError)


def test_the_results_of_items_are_judged(mode):
    def double(item):
        return 2 * item

    mapped = opmap(**mode.options, retries=1, min_delay=0, retry_if_result=lambda result: result == 4)
    mapped = mapped(mode.define(double))
    outcomes = mode.stream(mapped, [1, 2, 3])
    assert [outcome.attempts for outcome in outcomes] == [1, 2, 1]
    assert isinstance(outcomes[1].error, RejectedResultError)
    assert (outcomes[1].error.result, outcomes[2].result) == (4, 6)


def test_hooks_see_a_rejected_result_as_in_tenacity(world, fake_clock):
    told = []
    options = {
        "before_sleep": lambda state: told.append(state.outcome.result()),
        "retry_error_callback": lambda state: ("gave up on", state.outcome.result()),
    }
    function = opero(retries=1, retry_if_result=bool, retry_options=options)(world.define(script("first", "last")))
    assert world.run(function) == ("gave up on", "last")
    assert told == ["first"]


# tenacity's options


def test_stop_and_wait_of_tenacity_win_over_retries_and_delays(world, fake_clock):
    options = {"stop": tenacity.stop_after_attempt(4), "wait": tenacity.wait_incrementing(start=7, increment=1)}
    raised_by(world, opero(retries=1, retry_options=options)(world.define(script(ValueError()))))
    assert fake_clock.sleeps == [7, 8, 9]


def test_tenacitys_delays_count_from_the_start_of_the_first_attempt(world, fake_clock):
    def fail():
        fake_clock.tick(3)
        raise ValueError

    options = {"stop": tenacity.stop_after_delay(8), "wait": tenacity.wait_fixed(1)}
    function = opero(retry_options=options)(world.define(fail))
    raised_by(world, function)
    assert function.stats.attempts == 3


def test_retry_of_tenacity_wins_over_retry_on(world, fake_clock):
    other = KeyError()
    options = {"retry": tenacity.retry_if_exception_type(ValueError)}
    function = opero(retry_on=KeyError, retry_options=options)(world.define(script(ValueError(), other, "never")))
    assert raised_by(world, function) is other
    assert function.stats.attempts == 2


def test_retry_of_tenacity_judges_results_too(world, fake_clock):
    options = {"retry": tenacity.retry_if_result(lambda result: result is None)}
    function = opero(retry_options=options)(world.define(script(None, None, "done")))
    assert world.run(function) == "done"
    assert function.stats.attempts == 3


def test_a_result_that_is_never_accepted_ends_as_tenacitys_retry_error(world, fake_clock):
    options = {"retry": tenacity.retry_if_result(lambda result: result is None)}
    error = raised_by(world, opero(retries=2, retry_options=options)(world.define(script(None))))
    assert isinstance(error, tenacity.RetryError)
    assert error.last_attempt.result() is None


def test_try_again_retries_what_retry_would_not(world, fake_clock):
    options = {"retry": tenacity.retry_never}
    assert world.run(opero(retry_options=options)(world.define(script(tenacity.TryAgain(), "done")))) == "done"


def test_hooks_are_told_of_each_attempt(world, fake_clock):
    told = []

    def hook(name):
        return lambda state: told.append((name, state.attempt_number, state.args))

    options = {name: hook(name) for name in ("before", "after", "before_sleep")}
    world.run(opero(retry_options=options)(world.define(script(ValueError(), "done"))), "argument")
    assert told == [
        ("before", 1, ("argument",)),
        ("after", 1, ("argument",)),
        ("before_sleep", 1, ("argument",)),
        ("before", 2, ("argument",)),
    ]


def test_before_sleep_knows_error_and_delay(world, fake_clock):
    told = []
    error = ValueError()
    options = {"before_sleep": lambda state: told.append((state.outcome.exception(), state.next_action.sleep))}
    world.run(opero(**STEADY, retry_options=options)(world.define(script(error, "done"))))
    assert told == [(error, 1)]


def test_retry_error_callback_gives_the_result_when_retries_have_run_out(world, fake_clock):
    options = {"retry_error_callback": lambda state: ("gave up", state.attempt_number)}
    function = opero(retries=1, retry_options=options)(world.define(script(ValueError())))
    assert world.run(function) == ("gave up", 2)


SLOT = {"rate_limit": "1/hour", "rate_limit_options": {"max_burst": 1}}
# How many rounds there are then, and how many sleeps.
ENDS = {
    "count": ({"retries": 1, "min_delay": 0}, 2, 1),
    "total_timeout": ({"retries": 9, "min_delay": 5, "max_delay": 5, "total_timeout": 1}, 1, 0),
    "circuit": ({"retries": 9, "min_delay": 0, "breaker": 2}, 2, 1),
    "no slot": ({"retries": 9, "min_delay": 0, "total_timeout": 60, **SLOT}, 1, 1),
}
ends = pytest.mark.parametrize(("options", "rounds", "sleeps"), ENDS.values(), ids=ENDS)


def test_hooks_find_the_statistics_of_their_call(world, fake_clock):
    names = ("attempt_number", "idle_for", "delay_since_first_attempt")
    seen = []
    look = {"before_sleep": lambda state: seen.append([state.retry_object.statistics[name] for name in names])}
    options = {"retries": 2, "min_delay": 1, "jitter": False, "retry_options": look}
    function = opero(**options)(world.define(script(KeyError())))
    for _ in range(2):
        raised_by(world, function)
    # As tenacity has it: the number is that of the attempt to come.
    assert seen == [[2, 1, 0], [3, 3, 1]] * 2


@ends
def test_retry_error_callback_gives_the_result_whatever_ends_the_retries(world, fake_clock, options, rounds, sleeps):
    callback = {"retry_error_callback": lambda state: (type(state.outcome.exception()), state.attempt_number)}
    function = opero(**options, retry_options=callback)(world.define(script(ConnectionError())))
    assert world.run(function) == (ConnectionError, rounds)


@ends
def test_before_sleep_is_told_only_of_sleeps(world, fake_clock, options, rounds, sleeps):
    told = []
    function = opero(**options, retry_options={"before_sleep": told.append})(world.define(script(KeyError())))
    raised_by(world, function)
    assert len(told) == sleeps


@ends
def test_after_is_told_of_each_failed_attempt_once(world, fake_clock, options, rounds, sleeps):
    told = []
    hook = {"after": lambda state: told.append(state.attempt_number)}
    raised_by(world, opero(**options, retry_options=hook)(world.define(script(KeyError()))))
    assert told == list(range(1, rounds + 1))


@pytest.mark.parametrize("options", [{"retries": 1}, {"breaker": 1}, {"total_timeout": 60, **SLOT}], ids=str)
def test_retry_error_callback_gives_the_result_for_candidates_too(world, fake_clock, options):
    def fail(key):
        raise ConnectionError(key)

    callback = {"retry_error_callback": lambda state: (state.args, state.attempt_number)}
    function = opero(arg_fallback="key", **options, retry_options=callback)(world.define(fail))
    assert world.run(function, ["a", "b"]) == ((["a", "b"],), 2 if "retries" in options else 1)


@pytest.mark.parametrize("answer", [False, GIVE_UP])
def test_an_error_that_is_not_retried_is_raised_past_retry_error_callback(world, answer):
    options = {"retry_error_callback": lambda state: "default"}
    function = opero(retry_on=lambda error: answer, retry_options=options)(world.define(script(KeyError())))
    assert isinstance(raised_by(world, function), KeyError)


@pytest.mark.parametrize("name", ["count", "total_timeout"])
def test_retry_error_callback_gives_the_result_of_an_item(mode, name):
    def fail(item):
        raise ConnectionError(item)

    callback = {"retry_error_callback": lambda state: state.attempt_number}
    mapped = opmap(**mode.options, **ENDS[name][0], retry_options=callback)(mode.define(fail))
    assert mode.run(mapped, [0]) == [ENDS[name][1]]


def test_hooks_see_the_arguments_as_they_were_given(world, fake_clock):
    seen = []
    hook = {"before_sleep": lambda state: seen.append((state.args, state.kwargs))}
    flow = Flow(world, add, retries=1, arg_fallback="key", retry_options=hook)
    with pytest.raises(AllFailedError):
        flow.call(None, key=["a", "b"])
    assert seen == [((None,), {"key": ["a", "b"]})]


COPIES = {"pickle": lambda error: pickle.loads(pickle.dumps(error)), "copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("made_again", COPIES.values(), ids=COPIES)
def test_a_retry_error_of_tenacitys_can_leave_its_process(world, fake_clock, made_again):
    function = opero(retries=1, retry_options={"reraise": False})(world.define(script(ValueError("why"))))
    error = made_again(raised_by(world, function))
    assert isinstance(error, tenacity.RetryError)
    assert error.last_attempt.attempt_number == 2
    assert "2 attempts" in error.__notes__[0]
    with pytest.raises(ValueError, match="why"):
        error.reraise()


@pytest.mark.parametrize("made_again", COPIES.values(), ids=COPIES)
def test_a_retry_error_with_a_result_can_leave_its_process(world, made_again):
    options = {"retry": tenacity.retry_if_result(bool)}
    error = made_again(raised_by(world, opero(retries=0, retry_options=options)(world.define(script([1])))))
    assert error.last_attempt.result() == [1]


def test_a_retry_error_of_a_worker_arrives(fake_clock):
    @opmap(mode="process", workers=1, progress=False, retries=0, return_exceptions=True)
    def fail(item):
        return opero(retries=0, retry_options={"retry": tenacity.retry_if_result(bool)})(lambda: item)()

    (error,) = fail([1])
    assert isinstance(error, tenacity.RetryError)
    assert error.last_attempt.result() == 1


def test_without_reraise_the_end_is_a_retry_error_caused_by_the_users(world, fake_clock):
    last = ValueError()
    function = opero(retries=1, retry_options={"reraise": False})(world.define(script(KeyError(), last)))
    error = raised_by(world, function)
    assert isinstance(error, tenacity.RetryError)
    assert error.__cause__ is last


def test_retry_error_cls_is_what_is_raised_without_reraise(world, fake_clock):
    class GaveUpError(Exception):
        pass

    options = {"reraise": False, "retry_error_cls": GaveUpError}
    assert isinstance(
        raised_by(world, opero(retries=1, retry_options=options)(world.define(script(OSError())))), GaveUpError
    )


def test_what_retry_error_callback_raises_ends_the_call(world, fake_clock):
    class ServiceDownError(Exception):
        pass

    def give_up(state):
        raise ServiceDownError

    error = ValueError()
    function = opero(retries=1, retry_options={"retry_error_callback": give_up})(world.define(script(error, error)))
    raised = raised_by(world, function)
    assert isinstance(raised, ServiceDownError)
    assert raised.__context__ is error


def test_an_object_of_tenacitys_is_no_retry_on():
    with pytest.raises(TypeError, match=r"retry_if_exception_type; write retry_options=\{'retry': …\}"):
        opero(retry_on=tenacity.retry_if_exception_type(KeyError))(len)


def test_what_a_framework_is_steered_by_is_not_retried(world):
    function = opero(retries=3, min_delay=0)(world.define(script(unittest.SkipTest("not here"))))
    assert isinstance(raised_by(world, function), unittest.SkipTest)
    assert function.stats.attempts == 1
    told_by_hand = opero(retries=3, min_delay=0, retry_on=Exception)(world.define(script(unittest.SkipTest(""))))
    raised_by(world, told_by_hand)
    assert told_by_hand.stats.attempts > 1


@pytest.mark.parametrize(
    "name",
    [
        "airflow.exceptions.AirflowSkipException",
        "arq.worker.Retry",
        "billiard.exceptions.SoftTimeLimitExceeded",
        "celery.exceptions.TaskPredicate",
        "django.core.management.base.CommandError",
        "dramatiq.errors.Retry",
        "falcon.http_status.HTTPStatus",
        "huey.exceptions.RetryTask",
        "litestar.exceptions.http_exceptions.HTTPException",
        "rq.timeouts.BaseTimeoutException",
        "sanic.exceptions.SanicException",
        "scrapy.exceptions.DropItem",
        "starlette.exceptions.WebSocketException",
        "starlette.websockets.WebSocketDisconnect",
        "tornado.web.Finish",
    ],
)
def test_what_a_queue_or_a_server_is_told_by_is_not_retried(world, name):
    module, _, name = name.rpartition(".")
    error_class = type("Own", (type(name, (Exception,), {"__module__": module}),), {})
    function = opero(retries=3, min_delay=0)(world.define(script(error_class())))
    assert type(raised_by(world, function)) is error_class
    assert function.stats.attempts == 1


@pytest.mark.parametrize("hook", ["stop", "wait", "before", "after", "before_sleep"])
def test_a_hook_that_raises_does_not_replace_the_users_error(world, fake_clock, hook):
    error = ValueError()
    function = opero(retries=1, retry_options={hook: script(KeyError("hook"))})(world.define(script(error)))
    assert raised_by(world, function) is error
    assert error.__context__ is None
    assert traceback.extract_tb(error.__traceback__)[-1].name == "scripted"
    assert function.stats.attempts == (2 if hook == "before" else 1)


def test_a_before_that_raises_does_not_spoil_a_success(world):
    function = opero(retry_options={"before": script(KeyError("hook"))})(world.define(script("done")))
    assert world.run(function) == "done"


def test_the_decorator_for_retries_alone_passes_options_to_tenacity(world, fake_clock):
    function = get_retry_decorator(retries=9, wait=tenacity.wait_fixed(3), stop=tenacity.stop_after_attempt(2))(
        world.define(script(ValueError()))
    )
    raised_by(world, function)
    assert fake_clock.sleeps == [3]


# The call itself


def test_every_attempt_gets_the_same_arguments_uncopied(world, fake_clock):
    seen = []

    def fail(items, *, extra):
        seen.append((items, extra))
        raise ValueError

    items, extra = [1], {2}
    with pytest.raises(ValueError):  # noqa: PT011 - bare
        world.run(opero(retries=2)(world.define(fail)), items, extra=extra)
    assert len(seen) == 3
    assert all(a is items and b is extra for a, b in seen)


def test_parameters_may_have_any_name(world, fake_clock):
    rest = [ValueError()]

    def echo(self, fn, function, args, kwargs, *, state, error, call, plan, **options):
        if rest:
            raise rest.pop()
        return (self, fn, function, args, kwargs, state, error, call, plan, options)

    function = opero(world.define(echo))
    given = {"function": 3, "kwargs": 5, "state": 6, "error": 7, "call": 8, "plan": 9, "key": 0, "started": 1}
    names = world.run(lambda: function(1, 2, args=4, **given))
    assert names == (1, 2, 3, 4, 5, 6, 7, 8, 9, {"key": 0, "started": 1})
    assert function.stats.attempts == 2


# Where nothing can be imported


def said_by_program(source):
    """What a program prints that has imported nothing yet; the other programs of the tests begin with all of opero."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(source)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


FAILING = """
    import sys
    IMPORT
    from opero import opero

    @opero(retries=1, min_delay=0, OPTIONS)
    DEF fail(key):
        raise KeyError

    DEF error_of(function, argument):
        try:
            AWAIT function(argument)
        except Exception as error:
            return type(error).__name__
"""
IN_THE_WORLD = {
    False: {"IMPORT": "", "DEF": "def", "AWAIT": "", "RUN": ""},
    True: {"IMPORT": "import asyncio", "DEF": "async def", "AWAIT": "await", "RUN": "asyncio.run"},
}


@pytest.fixture
def said_after_failures(world):
    """What a program prints that makes a function ``fail``."""

    def said_after_failures(rest, options=""):
        source = (textwrap.dedent(FAILING) + textwrap.dedent(rest)).replace("OPTIONS", options)
        for word, meaning in IN_THE_WORLD[world.is_async].items():
            source = source.replace(word, meaning)
        return said_by_program(source)

    return said_after_failures


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", ["KeyError", "RecursionError", "KeyError", "2"]),
        ("arg_fallback='key'", ["AllFailedError", "RecursionError", "AllFailedError", "4"]),
        ("on_event=id", ["KeyError", "RecursionError", "KeyError", "2"]),
    ],
)
def test_a_recursion_that_is_too_deep_costs_no_later_retry(said_after_failures, options, expected):
    source = """
        DEF descend(depth):
            return (AWAIT descend(depth - 1)) if depth else (AWAIT fail(["a", "b"]))

        DEF descend_less_and_less(_):
            return {AWAIT error_of(descend, depth) for depth in range(1000, 800, -1)}

        print(*sorted(RUN(descend_less_and_less(None))))
        attempts = fail.stats.attempts
        print(RUN(error_of(fail, ["a", "b"])), fail.stats.attempts - attempts)
    """
    assert said_after_failures(source, options) == expected


@pytest.mark.parametrize("options", ["", "arg_fallback='key'", "on_event=id", "total_timeout=9"])
def test_a_failing_call_imports_nothing(said_after_failures, options):
    source = """
        DEF succeed(_):
            pass

        RUN(succeed(None))
        before = set(sys.modules)
        RUN(error_of(fail, ["a", "b"]))
        print(*set(sys.modules) - before)
    """
    assert said_after_failures(source, options) == []


@pytest.mark.parametrize(
    "options",
    [
        "",
        "rate_limit=100",
        "rate_limit={'calls': 100, 'tokens': '900/minute'}, rate_limit_cost={'tokens': 2}, per='rows'",
        "rate_limit=100, rate_limit_options={'scope': 'machine', 'folder': 'limits', 'name': 'last'}",
        "cache=True",
        "cache=Cache(backend='disk', cache_dir='entries', ignore='self')",
    ],
)
def test_a_failing_function_has_its_first_calls_when_nothing_can_be_imported_any_more(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = said_by_program(f"""
        import sys
        from opero import Cache, opero

        class Buffer:
            tries = 0

            @opero(retries=1, min_delay=0, {options})
            def flush(self, rows):
                self.tries += 1
                if self.tries < 2:
                    raise ConnectionError
                if rows == 2:
                    raise TypeError("own")
                return rows

            def __del__(self, sys=sys):
                print(sys.meta_path, self.flush(1))
                for arguments in (2,), (1, 2):
                    try:
                        self.flush(*arguments)
                    except TypeError as error:
                        print(error)

        buffer = Buffer()
    """)
    assert " ".join(said) == "None 1 own Buffer.flush() takes 2 positional arguments but 3 were given"


def test_a_finalizer_retries_when_the_program_ends():
    said = said_by_program("""
        from opero import opero

        class Buffer:
            rest = 3

            @opero(retries=3, min_delay=0, on_event=id)
            def flush(self):
                self.rest -= 1
                if self.rest:
                    raise ConnectionError
                print("flushed")

            def __del__(self):
                self.flush()

        buffer = Buffer()
    """)
    assert said == ["flushed"]


# Arguments that do not fit the function


class Flow:
    """Calls of a function that nothing has looked at before the flow begins."""

    def __init__(self, world, function, **options):
        self._world = world
        self._plan = make_plan(world.define(function), options)

    @property
    def stats(self):
        return self._plan.stats.snapshot()

    def call(self, *args, **kwargs):
        plan = self._plan
        if not self._world.is_async:
            return drive(call_flow(plan, Call(args, kwargs)), plan.function)
        return asyncio.run(drive_async(call_flow(plan, Call(args, kwargs)), plan.function, plan.name))


def add(a, *, key="k"):
    return a + len(key)


WRONG = {"too few": ((), {}), "too many": ((1, 2), {}), "unknown": ((1,), {"b": 2})}
ROUND_IT = {
    "retries": {},
    "retry_on": {"retry_on": lambda error: True},
    "tenacity": {"retry_options": {"retry": tenacity.retry_always}},
    "candidates": {"arg_fallback": "key"},
    "circuit": {"breaker": 1},
    "default": {"default": None},
    "default of a cached one": {"default": None, "cache": True},
}


@pytest.mark.parametrize(("args", "kwargs"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("options", ROUND_IT.values(), ids=ROUND_IT)
def test_a_call_with_arguments_that_do_not_fit_ends_with_its_type_error(world, args, kwargs, options):
    flow = Flow(world, add, **options)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"\(\) (missing|takes|got)") as caught:
            flow.call(*args, **kwargs)
        assert not hasattr(caught.value, "__notes__")
    assert (flow.stats.retries, flow.stats.failures) == (0, 2)


def test_a_type_error_of_the_functions_own_is_retried(world, fake_clock):
    flow = Flow(world, add, retries=2)
    with pytest.raises(TypeError, match="unsupported operand"):
        flow.call(None)
    assert flow.stats.attempts == 3


def test_a_type_error_of_a_function_whose_signature_is_not_known_is_retried(fake_clock):
    unknown = next(function for function in (getattr, iter, max, dict) if not _has_signature(function))
    flow = Flow(World(is_async=False), unknown, retries=2)
    with pytest.raises(TypeError):
        flow.call()
    assert flow.stats.attempts == 3


def _has_signature(function):
    try:
        inspect.signature(function)
    except ValueError:
        return False
    return True
