"""Fallback: the candidates of one parameter, in order, round by round."""

from __future__ import annotations

import collections
import contextvars
import copy
import functools
import pickle
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from opero import AllFailedError, OperoError, candidates, candidates_from, opero, opmap
from opero.core import CallTimeoutError, MisuseError, get_fallback_decorator
from opero.core.clock import clock
from opero.core.fallback import FallbackOverParameter
from opero.core.flow import call_flow
from opero.core.limits.rates import parse_rates
from opero.core.parameters import Per
from opero.core.plan import Call, Plan
from opero.core.rate_limit import FunctionLimit
from opero.core.retry import RetryPolicy
from opero.core.steps import Failed

ONCE = {"retries": 0, "arg_fallback": "key"}


class Service:
    """Answers to the keys it knows; any other has its own error, by which tests choose what is retryable."""

    def __init__(self, *good, clock=None):
        self.good = good
        self.clock = clock
        self.asked = []
        self.times = []

    def __call__(self, key):
        self.asked.append(key)
        if self.clock is not None:
            self.times.append((key, self.clock.now() - 1000))
        if key not in self.good:
            raise LookupError(key)
        return f"answer to {key}"

    def function(self, world):
        """The service as a function of one parameter."""

        def ask(key):
            return self(key)

        return world.define(ask)


def all_failed(world, function, *args):
    with pytest.raises(AllFailedError) as caught:
        world.run(function, *args)
    return caught.value


# Where the candidates come from


def by_position(function):
    return function(0, ["a", "b"])


def by_keyword(function):
    return function(0, key=["a", "b"])


def by_default(function):
    return function(0)


def all_by_keyword(function):
    return function(key=["a", "b"], other=0)


@pytest.mark.parametrize("call", [by_position, by_keyword, by_default, all_by_keyword])
def test_candidates_are_bound_like_arguments(world, call):
    service = Service("b")

    def ask(other, key=("a", "b"), *more):
        assert (other, more) == (0, ())
        return service(key)

    assert world.run(call, opero(**ONCE)(world.define(ask))) == "answer to b"
    assert service.asked == ["a", "b"]


def test_a_keyword_only_parameter_can_hold_candidates(world):
    service = Service("b")

    def ask(*, other=0, key=("x", "y")):
        return service(key)

    function = opero(**ONCE)(world.define(ask))
    assert world.run(function, key=("a", "b")) == "answer to b"
    all_failed(world, function)
    assert service.asked == ["a", "b", "x", "y"]


def test_a_positional_only_parameter_can_hold_candidates(world):
    service = Service("b")

    def ask(other, key=("x", "y"), /, **options):
        assert options == {}
        return service(key)

    function = opero(**ONCE)(world.define(ask))
    assert world.run(function, 0, ["a", "b"]) == "answer to b"
    all_failed(world, function, 0)
    assert service.asked == ["a", "b", "x", "y"]


def test_a_method_can_have_candidates(world):
    service = Service("b")

    def ask(self, key):
        assert isinstance(self, Client)
        return service(key)

    class Client:
        method = opero(**ONCE)(world.define(ask))

    assert world.run(Client().method, ["a", "b"]) == "answer to b"
    assert world.run(Client.method, Client(), key=["a", "b"]) == "answer to b"


@pytest.mark.parametrize("call", [by_position, by_keyword, by_default, all_by_keyword])
def test_candidates_are_found_through_a_wrapper_with_other_parameters(world, call):
    service = Service("b")

    def ask(other, key=("a", "b")):
        return service(key)

    @functools.wraps(ask)
    def wrapper(*args, **kwargs):
        return ask(*args, **kwargs)

    assert world.run(call, opero(**ONCE)(world.define(wrapper))) == "answer to b"
    assert service.asked == ["a", "b"]


def test_arguments_around_the_candidates_stay_as_they_are(world):
    seen = []

    def ask(first, key, *rest, option, **more):
        seen.append((first, key, rest, option, more))
        raise ValueError

    with pytest.raises(AllFailedError):
        world.run(opero(**ONCE)(world.define(ask)), 1, ["a", "b"], 2, 3, option=4, extra=5)
    assert seen == [(1, key, (2, 3), 4, {"extra": 5}) for key in "ab"]


@pytest.mark.parametrize("value", ["text", b"bytes", None, {"a", "b"}, {"a": 1}, 7, range(2)], ids=repr)
def test_anything_but_a_list_or_tuple_is_the_only_candidate(world, value):
    service = Service()
    all_failed(world, opero(**ONCE)(service.function(world)), value)
    assert service.asked == [value]


def test_a_candidate_may_itself_be_a_list(world):
    service = Service(["b"])
    world.run(opero(**ONCE)(service.function(world)), [["a"], ["b"]])
    assert service.asked == [["a"], ["b"]]


@pytest.mark.parametrize("empty", [[], ()], ids=repr)
def test_no_candidates_are_a_value_error_that_is_not_retried(world, fake_clock, empty):
    service = Service()
    with pytest.raises(ValueError, match="key"):
        world.run(opero(arg_fallback="key")(service.function(world)), empty)
    assert service.asked == []
    assert fake_clock.sleeps == []


def test_fallback_alone_makes_one_round(world):
    service = Service()
    all_failed(world, get_fallback_decorator("key")(service.function(world)), ["a", "b"])
    assert service.asked == ["a", "b"]


# The rounds


def test_the_first_success_wins(world):
    service = Service("b", "c")
    assert world.run(opero(**ONCE)(service.function(world)), ["a", "b", "c"]) == "answer to b"
    assert service.asked == ["a", "b"]


def test_a_failed_round_is_repeated_after_one_delay(world, fake_clock):
    service = Service(clock=fake_clock)
    all_failed(world, opero(arg_fallback="key", retries=2, jitter=False)(service.function(world)), ["a", "b"])
    assert service.asked == ["a", "b"] * 3
    assert fake_clock.sleeps == pytest.approx([0.1, 0.2])


def test_a_later_round_can_succeed(world, fake_clock):
    service = Service(clock=fake_clock)

    def ask(key):
        if len(service.asked) == 3:
            service.good = ("b",)
        return service(key)

    function = opero(arg_fallback="key")(world.define(ask))
    assert world.run(function, ["a", "b"]) == "answer to b"
    assert service.asked == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("hopeless", "asked"),
    [
        ("", ["a", "b", "a", "b", "a", "b"]),
        ("a", ["a", "b", "b", "b"]),
        ("b", ["a", "b", "a", "a"]),
        ("ab", ["a", "b"]),
    ],
)
def test_candidates_without_a_retryable_error_are_not_tried_again(world, fake_clock, hopeless, asked):
    service = Service()
    options = {"retries": 2, "retry_on": lambda error: error.args[0] not in hopeless}
    error = all_failed(world, opero(arg_fallback="key", **options)(service.function(world)), ["a", "b"])
    assert service.asked == asked
    assert [e.args[0] for e in error.errors] == asked


def test_a_hook_is_told_of_an_error_for_which_the_round_is_repeated(world, fake_clock):
    told = []
    options = {
        "retry_on": lambda error: error.args[0] == "a",
        "retry_options": {"before_sleep": lambda state: told.append(state.outcome.exception().args[0])},
    }
    all_failed(world, opero(arg_fallback="key", retries=1, **options)(Service().function(world)), ["a", "b"])
    assert told == ["a"]


def test_what_was_not_tried_again_is_tried_in_the_next_call(world):
    service = Service()
    function = opero(arg_fallback="key", retry_on=KeyError)(service.function(world))
    all_failed(world, function, ["a"])
    all_failed(world, function, ["a"])
    assert service.asked == ["a", "a"]


def test_equal_candidates_are_told_apart(world, fake_clock):
    service = Service()
    options = {"retries": 1, "retry_on": lambda error: error.args[0] is not True}
    all_failed(world, opero(arg_fallback="key", **options)(service.function(world)), [1, True])
    assert list(map(repr, service.asked)) == ["1", "True", "1"]


def test_candidates_that_cannot_be_compared_are_fine(world, fake_clock):
    class Array:
        __hash__ = None

        def __eq__(self, other):
            raise RuntimeError("ambiguous")

    asked = []

    def ask(key):
        asked.append(key)
        raise LookupError(key is last)

    first, last = Array(), Array()
    options = {"retries": 1, "retry_on": lambda error: not error.args[0], "fallback_cooldown": 5}
    all_failed(world, opero(arg_fallback="key", **options)(world.define(ask)), [first, last])
    assert [key is last for key in asked] == [False, True, False]


# What is raised


def test_all_errors_are_kept_in_order(world, fake_clock):
    errors = []

    def ask(key):
        errors.append(LookupError(key))
        raise errors[-1]

    error = all_failed(world, opero(arg_fallback="key", retries=1)(world.define(ask)), ["a", "b"])
    assert isinstance(error, ExceptionGroup)
    assert isinstance(error, OperoError)
    assert len(errors) == 4
    assert all(kept is raised for kept, raised in zip(error.errors, errors, strict=True))
    assert all(kept.__context__ is None and kept.__traceback__ is not None for kept in error.errors)
    assert error.__context__ is None
    assert error.__cause__ is None


@pytest.mark.parametrize("retries", [0, 2])
def test_the_message_names_function_parameter_and_rounds_but_no_candidate(world, fake_clock, retries):
    function = opero(arg_fallback="key", retries=retries)(Service().function(world))
    message = str(all_failed(world, function, ["sesame", "swordfish"]))
    assert "ask" in message
    assert "'key'" in message
    assert ("1 round " if retries == 0 else "3 rounds") in message
    assert "sesame" not in message
    assert "swordfish" not in message


def test_except_star_reaches_the_single_errors(world):
    def ask(key):
        raise {"a": KeyError, "b": OSError}[key]

    function = opero(**ONCE)(world.define(ask))
    caught = []
    try:
        world.run(function, ["a", "b"])
    except* KeyError as group:
        caught.append(("KeyError", len(group.exceptions)))
    except* OSError as group:
        caught.append(("OSError", len(group.exceptions)))
    assert caught == [("KeyError", 1), ("OSError", 1)]


def test_the_parts_of_a_split_error_are_of_the_same_class(world):
    def ask(key):
        raise {"a": KeyError, "b": OSError}[key]

    error = all_failed(world, opero(**ONCE)(world.define(ask)), ["a", "b"])
    parts = error.split(KeyError)
    assert [type(part) for part in parts] == [AllFailedError, AllFailedError]
    assert [type(part.errors[0]) for part in parts] == [KeyError, OSError]
    assert parts[0].message == error.message


@pytest.mark.parametrize("copied", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickle", "copy"])
def test_the_error_survives_being_copied(world, copied):
    error = all_failed(world, opero(**ONCE)(Service().function(world)), ["a", "b"])
    error.add_note("note")
    again = copied(error)
    assert type(again) is AllFailedError
    assert str(again) == str(error)
    assert again.__notes__ == ["note"]
    assert [(type(e), e.args) for e in again.errors] == [(LookupError, ("a",)), (LookupError, ("b",))]


# Rest for candidates


def test_a_candidate_that_failed_is_tried_last_until_its_cooldown_is_over(world, fake_clock):
    service = Service("b")
    function = opero(**ONCE, fallback_cooldown=60)(service.function(world))
    for seconds in (0, 59, 2):
        fake_clock.tick(seconds)
        world.run(function, ["a", "b"])
    assert service.asked == ["a", "b", "b", "a", "b"]


def test_cooling_candidates_keep_their_order_and_are_all_tried(world, fake_clock):
    service = Service()
    function = opero(**ONCE, fallback_cooldown=60)(service.function(world))
    all_failed(world, function, ["a", "b"])
    all_failed(world, function, ["b", "c", "a", "d"])
    assert service.asked == ["a", "b", "c", "d", "b", "a"]


def test_without_a_cooldown_the_order_never_changes(world):
    service = Service("b")
    function = opero(**ONCE)(service.function(world))
    for _ in range(2):
        world.run(function, ["a", "b"])
    assert service.asked == ["a", "b", "a", "b"]


def test_candidates_without_a_hash_can_cool_down_too(world, fake_clock):
    service = Service({"token": "b"})
    function = opero(**ONCE, fallback_cooldown=60)(service.function(world))
    for _ in range(2):
        world.run(function, [{"token": "a"}, {"token": "b"}])
    assert service.asked == [{"token": "a"}, {"token": "b"}, {"token": "b"}]


def retry_after(**seconds):
    return lambda error: seconds[error.args[0]]


def test_a_candidate_that_asked_for_a_rest_is_not_asked_before_its_time(world, fake_clock):
    service = Service(clock=fake_clock)
    function = opero(arg_fallback="key", retries=5, retry_on=retry_after(a=3, b=1))(service.function(world))
    all_failed(world, function, ["a", "b"])
    assert service.times == [("a", 0), ("b", 0), ("b", 1), ("b", 2), ("a", 3), ("b", 3), ("b", 4), ("b", 5)]


def test_the_others_follow_the_backoff_while_one_candidate_rests(world, fake_clock):
    service = Service(clock=fake_clock)
    options = {"retries": 3, "min_delay": 2, "jitter": False, "retry_on": retry_after(a=5, b=True)}
    all_failed(world, opero(arg_fallback="key", **options)(service.function(world)), ["a", "b"])
    assert service.times == [("a", 0), ("b", 0), ("b", 2), ("a", 6), ("b", 6), ("a", 14), ("b", 14)]


def test_the_round_after_the_last_awake_candidate_is_out_waits_for_the_resting_one(world, fake_clock):
    service = Service(clock=fake_clock)
    function = opero(arg_fallback="key", retries=1, retry_on=retry_after(a=30, b=False))(service.function(world))
    all_failed(world, function, ["a", "b"])
    assert service.times == [("a", 0), ("b", 0), ("a", 30)]


def test_a_candidate_that_may_be_asked_at_once_is(world, fake_clock):
    service = Service(clock=fake_clock)
    function = opero(arg_fallback="key", retries=1, retry_on=retry_after(a=0, b=9))(service.function(world))
    all_failed(world, function, ["a", "b"])
    assert service.times == [("a", 0), ("b", 0), ("a", 0)]


def test_a_sleep_that_ends_a_little_early_wakes_no_other_candidate(world, fake_clock):
    def sleep(seconds):
        fake_clock.sleep(seconds - 1e-6)

    async def async_sleep(seconds):
        sleep(seconds)

    clock.sleep, clock.async_sleep = sleep, async_sleep
    service = Service(clock=fake_clock)
    function = opero(arg_fallback="key", retries=1, retry_on=retry_after(a=1, b=60))(service.function(world))
    all_failed(world, function, ["a", "b"])
    assert service.asked == ["a", "b", "a"]


# Those that asked for a rest, for every caller


@pytest.mark.parametrize("options", [{}, {"fallback_cooldown": 10}], ids=["no cooldown", "a shorter cooldown"])
def test_a_candidate_that_asked_for_a_rest_is_tried_last_by_every_caller_until_then(world, fake_clock, options):
    service = Service("b")
    function = opero(**ONCE, retry_on=retry_after(a=30), **options)(service.function(world))
    for seconds in (0, 29, 2):
        fake_clock.tick(seconds)
        world.run(function, ["a", "b"])
    assert service.asked == ["a", "b", "b", "a", "b"]


def test_of_candidates_that_rest_the_one_that_wakes_first_is_tried_first(world, fake_clock):
    service = Service("d")
    function = opero(**ONCE, retry_on=retry_after(a=30, b=10, c=20))(service.function(world))
    for _ in range(2):
        world.run(function, ["a", "b", "c", "d"])
    all_failed(world, function, ["a", "b", "c"])
    assert service.asked == ["a", "b", "c", "d", "d", "b", "c", "a"]


def test_with_a_cooldown_the_one_that_failed_first_is_tried_first(world, fake_clock):
    service = Service("c")
    function = opero(**ONCE, fallback_cooldown=60)(service.function(world))
    for key in "ba":
        world.run(function, [key, "c"])
        fake_clock.tick(20)
    all_failed(world, function, ["a", "b"])
    assert service.asked == ["b", "c", "a", "c", "b", "a"]


def revoked_and_flaky(world, failures, **options):
    """A function of a key that is revoked and of others, each of which fails as often as ``failures`` says."""
    asked = []

    def ask(key):
        asked.append(key)
        if key == "revoked":
            raise PermissionError
        if failures.get(key, 0):
            failures[key] -= 1
            raise LookupError
        return key

    options = {"retries": 2, "min_delay": 0.1, **options}
    options |= {"arg_fallback": "key", "fallback_cooldown": 600, "retry_on": LookupError}
    return opero(**options)(world.define(ask)), asked


def test_those_that_failed_for_a_while_come_before_those_that_were_given_up(world, fake_clock):
    function, asked = revoked_and_flaky(world, {"flaky": 1}, retries=0)
    world.run(function, ["revoked", "flaky", "good"])
    fake_clock.tick(1)
    world.run(function, ["revoked", "flaky"])
    assert asked == ["revoked", "flaky", "good", "flaky"]


def test_a_candidate_that_was_given_up_is_not_asked_while_another_may_be_tried_again(world, fake_clock):
    function, asked = revoked_and_flaky(world, failures := {})
    world.run(function, ["revoked", "good"])
    for _ in range(3):
        failures["good"] = 2
        assert world.run(function, ["revoked", "good"]) == "good"
    assert asked == ["revoked", "good", *["good"] * 9]


def test_a_candidate_that_was_given_up_is_asked_in_the_last_round(world, fake_clock):
    function, asked = revoked_and_flaky(world, failures := {})
    world.run(function, ["revoked", "good"])
    failures["good"] = 9
    all_failed(world, function, ["revoked", "good"])
    assert asked[2:] == ["good", "good", "good", "revoked"]


def test_a_candidate_that_was_given_up_is_asked_at_once_when_no_other_may_be_tried_again(world, fake_clock):
    function, asked = revoked_and_flaky(world, {})
    for _ in range(2):
        all_failed(world, function, ["revoked"])
    assert asked == ["revoked", "revoked"]


def test_a_retry_after_of_another_leaves_the_one_that_was_given_up_alone(world, fake_clock):
    asked = []

    def ask(key):
        asked.append(key)
        if key == "revoked" or asked.count(key) == 2:
            raise LookupError(key)

    def judge(error):
        return False if error.args == ("revoked",) else 5

    function = opero(retries=2, arg_fallback="key", fallback_cooldown=600, retry_on=judge)(world.define(ask))
    for _ in range(2):
        world.run(function, ["revoked", "good"])
    assert asked == ["revoked", "good", "good", "good"]


def test_a_longer_rest_is_not_cut_short_by_a_later_failure(world, fake_clock):
    service = Service("b")
    rests = [30, 1]
    function = opero(**ONCE, retry_on=lambda _: rests.pop(0))(service.function(world))
    for _ in range(2):
        all_failed(world, function, ["a"])
    fake_clock.tick(29)
    world.run(function, ["a", "b"])
    assert service.asked == ["a", "a", "b"]


def test_a_call_hears_of_the_rests_of_others_before_it_chooses_its_next_candidate(world, fake_clock):
    asked = []

    def ask(key):
        asked.append(key)
        if key == "a":
            with ThreadPoolExecutor(1) as others:
                assert isinstance(others.submit(world.run, function, ["b"]).exception(), AllFailedError)
        if key == "c":
            return "done"
        raise LookupError(key)

    function = opero(**ONCE, retry_on=retry_after(a=True, b=30))(world.define(ask))
    assert world.run(function, ["a", "b", "c"]) == "done"
    assert asked == ["a", "b", "c"]


def test_where_each_call_has_other_candidates_not_all_that_failed_are_remembered():
    policy = FallbackOverParameter(lambda url: url, "url", fallback_cooldown=600)
    for url in range(25_000):
        policy.failed(url, None)
        assert policy.rest_of(url) is not None
    assert len(policy._rests) <= 10_000


# Those that rest, and the rate limit

SLOTS = {"arg_fallback": "key", "retries": 0, "rate_limit": 1_000}


class SlowService(Service):
    """Takes so long that there is a free slot when it answers."""

    def __call__(self, key):
        self.clock.tick(1)
        return super().__call__(key)


def test_a_candidate_with_a_limit_of_its_own_holds_up_that_one(world, fake_clock):
    service = SlowService("b", "c", clock=fake_clock)
    options = {**SLOTS, "per": "key", "retry_on": retry_after(a=30), "total_timeout": 5}
    function = opero(**options)(service.function(world))
    world.run(function, ["a", "b"])
    assert world.run(function, "c") == "answer to c"
    with pytest.raises(CallTimeoutError):
        world.run(function, "a")
    assert service.asked == ["a", "b", "c"]


def test_a_limit_that_candidates_share_waits_for_none_of_several(world, fake_clock):
    service = SlowService("b", clock=fake_clock)
    function = opero(**SLOTS, retry_on=retry_after(a=30), total_timeout=5)(service.function(world))
    for _ in range(2):
        world.run(function, ["a", "b"])
    assert service.times == [("a", 1), ("b", 2), ("b", 3)]


def test_a_limit_that_candidates_share_waits_for_the_only_one(world, fake_clock):
    service = SlowService("b", clock=fake_clock)
    function = opero(**SLOTS, retry_on=retry_after(a=30), total_timeout=5)(service.function(world))
    all_failed(world, function, ["a"])
    with pytest.raises(CallTimeoutError):
        world.run(function, ["b"])


def test_rest_comes_before_a_free_slot(world, fake_clock):
    service = Service("a", "b")
    options = {"arg_fallback": "key", "rate_limit": 1, "per": "key", "total_timeout": 0.5, "retries": 0}
    options |= {"rate_limit_options": {"when_full": "next"}, "fallback_cooldown": 60}
    function = opero(**options)(service.function(world))
    all_failed(world, function, ["c"])
    fake_clock.tick(1.1)
    # All three have a free slot now.
    for _ in range(2):
        world.run(function, ["c", "a", "b"])
    with pytest.raises(CallTimeoutError):
        world.run(function, ["c", "a", "b"])
    assert service.asked == ["c", "a", "b"]


def begun(plan, *keys):
    """A call that has begun, and the step that it has come to."""
    flow = call_flow(plan, Call((list(keys),), {}))
    return flow, flow.send(None)


def plan_of_limited(retry_on, per=None):
    def ask(key):
        raise AssertionError

    return Plan(
        ask,
        retry=RetryPolicy(retries=0, retry_on=retry_on),
        fallback=FallbackOverParameter(ask, "key"),
        limit=FunctionLimit(ask, Per(ask, per) if per else None, rate_limit=1, arg_fallback="key"),
    )


def test_who_waits_for_the_slot_of_a_candidate_turns_to_another_one_when_it_is_put_to_rest(fake_clock):
    plan = plan_of_limited(retry_after(a=30), per="key")
    first, _ = begun(plan, "a")
    second, wait = begun(plan, "a", "b")
    woken = []
    wait.notify(lambda: woken.append("second"))
    assert not wait.poll()
    with pytest.raises(StopIteration):
        first.send(Failed(LookupError("a")))
    assert woken
    assert wait.poll()
    assert second.send(None).args == ("b",)


@pytest.mark.parametrize("per", [None, "key"])
def test_who_waits_for_a_place_turns_to_another_candidate_when_the_first_is_put_to_rest(fake_clock, per):
    def ask(key):
        raise AssertionError

    options = {"arg_fallback": "key", "retries": 0, "retry_on": retry_after(a=30)}
    plan = opero(**options, max_concurrent=1, per=per)(ask).__opero__.plan
    elsewhere = contextvars.copy_context()
    first, _ = elsewhere.run(begun, plan, "a")
    second, wait = begun(plan, "a", "b")
    assert not wait.poll()
    with pytest.raises(StopIteration):
        elsewhere.run(first.send, Failed(LookupError("a")))
    assert wait.poll()
    assert second.send(None).args == ("b",)


def test_who_has_waited_for_a_slot_of_all_candidates_gives_it_to_one_that_does_not_rest(fake_clock):
    plan = plan_of_limited(retry_after(a=30))
    first, _ = begun(plan, "a", "c")
    second, wait = begun(plan, "a", "b")
    assert not wait.poll()
    first.send(Failed(LookupError("a")))
    fake_clock.tick(1)
    assert wait.poll()
    assert second.send(None).args == ("b",)


def test_of_candidates_that_all_rest_the_one_that_is_not_shut_off_is_waited_for(fake_clock):
    def ask(key):
        raise AssertionError

    plan = opero(arg_fallback="key", fallback_cooldown=1_000, breaker=2, per="key", rate_limit="1/hour", retries=0)(
        ask
    ).__opero__.plan
    for key in ("a", "b", "a"):
        flow, _ = begun(plan, key)
        with pytest.raises(StopIteration):
            flow.send(Failed(LookupError()))
        fake_clock.tick(1)
        plan.limit.limiter.per_value.of("a").change(parse_rates(1_000))
    _, wait = begun(plan, "a", "b")
    assert not wait.poll()
    fake_clock.tick(3_600)
    assert wait.poll()


def test_items_that_failed_and_wait_for_a_resting_candidate_hold_no_worker(mode):
    def ask(item, key):
        if key == "a":
            raise LookupError
        if item < 40:
            raise ValueError
        return item

    def rest(error):
        return 30 if isinstance(error, LookupError) else False

    options = {**mode.options, **SLOTS, "per": "key", "retry_on": rest, "ordered": False}
    mapped = opmap(**options, return_exceptions=True)(mode.define(ask))
    mode.run(mapped, [0], key=["a"])
    seen = []

    class EnoughError(Exception):
        pass

    def see(outcome):
        seen.append(outcome.item)
        if len(seen) == 5:
            raise EnoughError

    started = time.monotonic()
    with pytest.raises(EnoughError):
        mode.each(see, mapped, range(50), key=["a", "b"])
    assert min(seen) >= 40
    assert time.monotonic() - started < 30


# Candidates for type checkers


def key_a_and_key_b():
    return ["a", "b"]


BOTH_KINDS = pytest.mark.parametrize(
    "both", [candidates("a", "b"), candidates_from(key_a_and_key_b), candidates_from(lambda: ("a", "b"))], ids=repr
)


@BOTH_KINDS
@pytest.mark.parametrize(
    "call",
    [lambda f, both: f(0, both), lambda f, both: f(0, key=both), lambda f, both: f(other=0, key=both)],
    ids=["position", "keyword", "all by keyword"],
)
def test_typed_candidates_can_be_passed(world, both, call):
    service = Service("b")

    def ask(other, key):
        return service(key)

    function = opero(**ONCE)(world.define(ask))
    assert world.run(lambda: call(function, both)) == "answer to b"
    assert service.asked == ["a", "b"]


@BOTH_KINDS
def test_typed_candidates_can_be_the_default(world, both):
    service = Service()

    def ask(key=both):
        return service(key)

    all_failed(world, opero(**ONCE)(world.define(ask)))
    all_failed(world, get_fallback_decorator("key")(world.define(ask)))
    assert service.asked == ["a", "b"] * 2


@BOTH_KINDS
def test_typed_candidates_are_tried_round_by_round(world, fake_clock, both):
    service = Service(clock=fake_clock)
    all_failed(world, opero(arg_fallback="key", retries=2)(service.function(world)), both)
    assert service.asked == ["a", "b"] * 3


@BOTH_KINDS
def test_typed_candidates_can_cool_down(world, fake_clock, both):
    service = Service("b")
    function = opero(**ONCE, fallback_cooldown=60)(service.function(world))
    for _ in range(2):
        world.run(function, both)
    assert service.asked == ["a", "b", "b"]


def test_a_typed_candidate_may_be_a_list(world):
    service = Service(["b"])
    world.run(opero(**ONCE)(service.function(world)), candidates(["a"], ["b"]))
    assert service.asked == [["a"], ["b"]]


@pytest.mark.parametrize("empty", [candidates(), candidates_from(list), candidates_from(tuple)], ids=repr)
def test_no_typed_candidates_are_the_value_error_of_an_empty_list(world, fake_clock, empty):
    service = Service()
    function = opero(arg_fallback="key")(service.function(world))
    with pytest.raises(ValueError, match=r"got an empty (list|tuple) for 'key'; give at least one candidate"):
        world.run(function, empty)
    assert (service.asked, fake_clock.sleeps) == ([], [])


@pytest.mark.parametrize("shown", [repr, str, "{}".format, ascii])
def test_typed_candidates_show_their_number_and_no_value(shown):
    assert shown(candidates("sesame", "swordfish")) == "candidates(<2 values>)"
    assert shown(candidates("sesame")) == "candidates(<1 value>)"


def test_candidates_from_a_function_show_its_name_and_do_not_ask_it():
    assert repr(candidates_from(key_a_and_key_b)) == "candidates_from(key_a_and_key_b)"
    assert "not_to_be_asked" in repr(candidates_from(functools.partial(not_to_be_asked, 1)))


@pytest.mark.parametrize("copied", [lambda it: pickle.loads(pickle.dumps(it)), copy.copy, copy.deepcopy])
def test_typed_candidates_survive_being_copied(copied):
    service = Service("b")
    assert opero(**ONCE)(service)(copied(candidates("a", "b"))) == "answer to b"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_candidates_from_a_function_asks_the_same_function(copied):
    rotation = Rotation()
    assert opero(**ONCE)(good_ones)(copied(candidates_from(rotation.keys))) == "good 1"
    assert rotation.asked == 1


# Candidates that a function gives


def not_to_be_asked(*_):
    raise AssertionError


class Rotation:
    """Gives other keys each time, and cannot be pickled."""

    def __init__(self, error=None):
        self.lock = threading.Lock()
        self.asked = 0
        self.error = error

    def keys(self):
        self.asked += 1
        if self.error is not None:
            raise self.error
        return [f"bad {self.asked}", f"good {self.asked}"]


def good_ones(key):
    if not key.startswith("good"):
        raise LookupError(key)
    return key


def test_the_function_is_asked_once_for_each_call_and_not_for_each_round(world, fake_clock):
    rotation = Rotation()
    service = Service()
    function = opero(arg_fallback="key", retries=1)(service.function(world))
    all_failed(world, function, candidates_from(rotation.keys))
    assert service.asked == ["bad 1", "good 1"] * 2
    all_failed(world, function, candidates_from(rotation.keys))
    assert service.asked[4:] == ["bad 2", "good 2"] * 2


@pytest.mark.parametrize("error", [ValueError("no key"), LookupError("no key")], ids=repr)
def test_what_the_function_raises_is_raised_and_not_retried(world, fake_clock, error):
    rotation = Rotation(error)
    service = Service()
    with pytest.raises(type(error)) as caught:
        world.run(opero(arg_fallback="key")(service.function(world)), candidates_from(rotation.keys))
    assert caught.value is error
    assert (rotation.asked, service.asked, fake_clock.sleeps) == (1, [], [])


@pytest.mark.parametrize(
    "given", ["sesame", {"sesame"}, None, iter(["sesame"]), candidates("sesame")], ids=lambda g: type(g).__name__
)
def test_anything_but_a_list_or_tuple_from_the_function_is_an_error_that_does_not_show_it(world, fake_clock, given):
    service = Service()
    with pytest.raises(MisuseError, match="return a list or a tuple") as caught:
        world.run(opero(arg_fallback="key")(service.function(world)), candidates_from(lambda: given))
    assert type(given).__name__ in str(caught.value)
    assert not re.search("sesame|123", str(caught.value))
    assert service.asked == []


def test_a_function_that_turns_out_to_be_async_is_an_error(world, fake_clock):
    async def keys(count):
        return ["a"] * count

    with pytest.raises(MisuseError, match="awaitable"):
        world.run(opero(arg_fallback="key")(Service().function(world)), candidates_from(lambda: keys(1)))


def test_an_async_function_is_refused_with_the_way_out():
    async def keys():
        return ["a"]

    with pytest.raises(TypeError, match=r"keys is an async function; write a plain one"):
        candidates_from(keys)


@pytest.mark.parametrize("secrets", [["sesame"], "sesame", 1234567890], ids=str)
def test_values_in_place_of_the_function_are_refused_and_not_shown(secrets):
    with pytest.raises(TypeError, match=rf"{type(secrets).__name__}.*candidates\(…\)") as caught:
        candidates_from(secrets)
    assert "sesame" not in str(caught.value)


# Candidates and the cache


def test_equal_typed_candidates_share_an_entry_and_others_do_not(world):
    service = Service("a", "b")
    function = opero(cache=True, **ONCE)(service.function(world))
    for given in (candidates("a", "b"), candidates("a", "b"), candidates("b", "a"), ("a", "b"), ["a", "b"]):
        world.run(function, given)
    assert service.asked == ["a", "b", "a", "a"]


ASKED = collections.Counter()


def keys_of(service):
    def keys():
        ASKED[service] += 1
        return [f"bad {ASKED[service]}", f"good {ASKED[service]}"]

    return keys


def test_the_cache_knows_a_function_by_itself_and_asks_it_only_when_it_computes(world):
    ASKED.clear()
    function = opero(cache=True, **ONCE)(world.define(good_ones))
    for service in ("first", "first", "second", "second"):
        assert world.run(function, candidates_from(keys_of(service))) == "good 1"
    assert ASKED == {"first": 1, "second": 1}
    assert function.cache_delete(candidates_from(keys_of("first")))
    assert world.run(function, candidates_from(keys_of("first"))) == "good 2"


OF_A_SCRIPT = """
KEYS = ["bad", "good"]

def keys(of="all"):
    return KEYS
"""


def test_results_of_earlier_values_are_found_again_where_a_script_tells_them_by_a_global(world):
    script = {"__name__": "__main__", "__file__": "script.py"}
    exec(OF_A_SCRIPT, script)
    function = opero(cache=True, **ONCE)(world.define(good_ones))
    assert world.run(function, candidates_from(script["keys"])) == "good"
    script["KEYS"] = ["bad", "good 2"]
    assert world.run(function, candidates_from(script["keys"])) == "good"
    assert function.cache_info()[:2] == (1, 1)


def test_functions_that_have_captured_other_values_have_other_keys(world):
    def keys_of(key, *, default):
        return lambda first=default: [first, key]

    function = opero(cache=True, **ONCE)(world.define(good_ones))
    for key, default in (("good 1", "bad"), ("good 2", "bad"), ("good 2", "good 3")):
        world.run(function, candidates_from(keys_of(key, default=default)))
    assert function.cache_info()[:2] == (0, 3)


def test_functions_that_carry_other_attributes_have_other_keys(world):
    script = {"__name__": "__main__", "__file__": "script.py"}
    exec("def keys():\n    return keys.known", script)
    keys = script["keys"]
    function = opero(cache=True, **ONCE)(world.define(good_ones))
    for keys.known in (["good 1"], ["good 2"]):
        assert world.run(function, candidates_from(keys)) == keys.known[0]


def test_a_lambda_for_a_default_is_cached(world):
    service = Service("b")

    def ask(key=candidates_from(lambda: ["a", "b"])):
        return service(key)

    function = opero(cache=True, **ONCE)(world.define(ask))
    for _ in range(2):
        assert world.run(function) == "answer to b"
    assert service.asked == ["a", "b"]


def test_a_failure_of_the_function_is_not_cached(world):
    ASKED.clear()

    def keys():
        ASKED["once"] += 1
        if ASKED["once"] == 1:
            raise LookupError
        return ["good"]

    function = opero(cache=True, **ONCE)(world.define(good_ones))
    with pytest.raises(LookupError):
        world.run(function, candidates_from(keys))
    assert world.run(function, candidates_from(keys)) == "good"


def test_what_is_cached_with_typed_candidates_outlives_the_process(world, backend, start):
    source = """
    from opero import candidates, candidates_from

    def keys():
        note("asked")
        return ["a", "b"]

    DEF ask(key):
        note(key)
        return key

    function = cached(ask, arg_fallback="key")
    say(run(function, candidates("x", "y")))
    say(run(function, candidates_from(keys)))
    say((noted("x"), noted("asked"), noted("a")))
    """
    options = {**backend.options, "cache_namespace": backend.namespace()}
    for _ in range(2):
        program = start(source, options, world=world)
        assert program.end() == ["x", "a", (1, 1, 1)]


# Candidates and maps


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"key": candidates("worse", "good")},
        {"key": candidates_from(lambda: ["worse", "good"])},
        {"key": candidates_from(Rotation().keys)},
    ],
    ids=["default", "values", "lambda", "method"],
)
def test_a_function_in_a_map_gets_one_value_at_a_time(mode, given):
    def ask(item, key=candidates("bad", "good")):
        if not key.startswith("good"):
            raise LookupError
        return item, type(key).__name__

    mapped = opmap(**mode.options, **ONCE)(mode.define(ask))
    assert mode.run(mapped, [1, 2, 3], **given) == [(1, "str"), (2, "str"), (3, "str")]


@pytest.mark.parametrize("gives", [lambda: ["bad", "good"], Rotation().keys], ids=["lambda", "method"])
def test_what_gives_the_candidates_stays_where_it_is_when_workers_are_started_afresh(gives):
    options = {"mode": "process", "workers": 1, "progress": False, "pool_options": {"start_method": "spawn"}}
    mapped = opmap(**options, **ONCE)(lambda item, key: (item, type(key).__name__, good_ones(key)[:4]))
    assert mapped([1, 2], key=candidates_from(gives)) == [(1, "str", "good"), (2, "str", "good")]
    assert mapped([1], candidates_from(gives)) == [(1, "str", "good")]


def test_the_items_of_a_map_can_be_candidates(mode):
    rotation = Rotation()
    mapped = opmap(**mode.options, **ONCE)(mode.define(good_ones))
    items = [candidates("bad", "good"), candidates_from(rotation.keys), "good one"]
    assert mode.run(mapped, items) == ["good", "good 1", "good one"]


def test_a_function_is_asked_once_for_each_item_of_a_map(mode):
    rotation = Rotation()

    def ask(item, key):
        return good_ones(key)

    mapped = opmap(**mode.options, **ONCE)(mode.define(ask))
    assert sorted(mode.run(mapped, list("xyz"), key=candidates_from(rotation.keys))) == ["good 1", "good 2", "good 3"]
    assert rotation.asked == 3


def test_what_the_function_raises_is_the_error_of_the_item(mode):
    errors = [LookupError("no key"), ValueError("no key"), None]

    def keys():
        error = errors.pop(0)
        if error is not None:
            raise error
        return ["good"]

    def ask(item, key):
        return key

    mapped = opmap(**mode.options, arg_fallback="key", return_exceptions=True)(mode.define(ask))
    results = mode.run(mapped, list("xyz"), key=candidates_from(keys))
    assert list(map(repr, results)) == ["LookupError('no key')", "ValueError('no key')", "'good'"]
    assert mapped.stats.attempts == 1


def test_a_function_that_was_carried_to_another_process_says_so():
    carried = pickle.loads(pickle.dumps(candidates_from(Rotation().keys)))
    with pytest.raises(MisuseError, match=r"Rotation\.keys.* was carried to another process"):
        opero(**ONCE)(Service())(carried)


def test_values_that_were_carried_to_a_worker_are_tried_there():
    inner = opero(**ONCE)(lambda key=candidates("bad", "good"): good_ones(key))
    mapped = opmap(mode="process", workers=1, progress=False, retries=0)(lambda item: (item, inner()))
    assert mapped([1]) == [(1, "good")]


@pytest.mark.parametrize("keys", [1, 2, 3])
def test_candidates_that_rest_for_different_times_are_each_tried_in_every_round(world, fake_clock, keys):
    asked = []

    def ask(key):
        asked.append(key)
        fake_clock.tick(0.05)
        raise ConnectionError

    function = opero(arg_fallback="key", retries=3, retry_on=lambda _: 0.5)(world.define(ask))
    all_failed(world, function, list("abc"[:keys]))
    assert asked.count("a") == 4
    assert min(map(asked.count, "abc"[:keys])) >= 3
    assert function.stats.retries == 3
