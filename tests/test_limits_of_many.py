"""Several rates at once, limits per value, limits that functions share, limits that follow what a service says."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import itertools
import math
import pickle
import random
import threading
import weakref

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from side_by_side import SECONDS, results, started, until
from test_rate_limit import Timed, limited, polled, settle, ticket_of, worst_excess

import opero
from opero.core import CallTimeoutError, RateLimitedError, RateLimiter, get_rate_limit_decorator
from opero.core.flow import call_flow
from opero.core.limits.line import Turn
from opero.core.limits.rates import parse_rates
from opero.core.plan import Call
from opero.core.rate_limit import FunctionLimit
from opero.core.steps import Candidate, drive

thoroughly = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def starts_of(limiter, fake_clock, seconds, *, step=0.01):
    """When one who asks all the time would start."""
    starts = []
    for _ in range(round(seconds / step)):
        while limiter.take_now():
            starts.append(fake_clock.now())
        fake_clock.tick(step)
    return starts


# Several rates


@pytest.mark.parametrize(
    ("rate", "paces", "quotas"),
    [
        ([5], [(0, 1 / 5, 5)], []),
        ([5, 2], [(0, 1 / 2, 5)], []),
        (["5/s", 2.5], [(0, 1 / 2.5, 5)], []),
        ([10, "100/minute"], [(0, 1 / 10, 5)], [(0, 100, 60)]),
        (["100/minute", "10/s", "1000/day"], [(0, 1 / 10, 5)], [(0, 100, 60), (0, 1000, 86_400)]),
        (["100/minute", "1000/day"], [(0, 0.6, 5)], [(0, 1000, 86_400)]),
        ([1000, "0.5/hour"], [(0, 1 / 1000, 40)], [(0, 1, 7200)]),
        ([1, "1.5/minute"], [(0, 1, 5)], [(0, 1, 40)]),
        ("900/15 minutes", [(0, 1, 5)], []),
        ({"calls": 10, "tokens": ["1000/s", "90000/min"]}, [(0, 0.1, 5), (1, 0.001, 40)], [(1, 90_000, 60)]),
    ],
)
def test_the_lowest_rate_per_second_is_the_pace_and_longer_ones_are_quotas(rate, paces, quotas):
    rates = parse_rates(rate)
    assert ([*rates.paces], [*rates.quotas]) == (paces, quotas)


def test_a_quota_is_used_at_the_pace_and_then_waited_for(fake_clock):
    limiter = RateLimiter([2, "5/minute"])
    starts = [moment - 1000 for moment in starts_of(limiter, fake_clock, 125)]
    assert starts == pytest.approx([0, 0.5, 1, 1.5, 2, 60, 60.5, 61, 61.5, 62, 120, 120.5, 121, 121.5, 122], abs=0.1)


def test_those_who_wait_for_a_quota_start_in_order_when_it_comes(fake_clock):
    limiter = RateLimiter([10, "3/minute"])
    starts_of(limiter, fake_clock, 1)
    tickets = [ticket_of(limiter) for _ in range(3)]
    assert polled(tickets) == 0
    fake_clock.tick(59.05)
    assert [ticket.poll() for ticket in reversed(tickets)] == [False, False, True]
    for _ in range(20):
        fake_clock.tick(0.1)
        for ticket in tickets:
            ticket.poll()
    assert all(ticket.poll() for ticket in tickets)


def test_a_quota_counts_for_the_wait_that_is_foretold(fake_clock):
    limiter = RateLimiter([10, "3/minute"])
    starts_of(limiter, fake_clock, 1)
    assert limiter.limit.expected_wait() == pytest.approx(59, abs=0.01)


def test_a_call_that_would_wait_for_a_quota_too_long_fails_at_once(world, fake_clock):
    f = limited(world.define(lambda: None), rate_limit=[1000, "2/minute"], total_timeout=5)
    for _ in range(2):
        world.run(f)
        fake_clock.tick(0.1)
    with pytest.raises(CallTimeoutError):
        world.run(f)
    assert fake_clock.sleeps == []


class Queue:
    """Those who wait for a limiter, and when all started."""

    def __init__(self, limiter, fake_clock):
        self.limiter = limiter
        self.clock = fake_clock
        self.waiting = {}
        self.joined = 0
        self.starts = []
        self.quiet = []

    def play(self, events):
        for what, value in events:
            getattr(self, what)(value)
            self.look()

    def tick(self, seconds):
        self.clock.tick(seconds)

    def ask(self, count):
        self.starts += [self.clock.now()] * sum(self.limiter.take_now() for _ in range(count))

    def join(self, count):
        for _ in range(count):
            self.waiting[self.joined] = ticket_of(self.limiter)
            self.waiting[self.joined].poll()
            self.joined += 1

    def leave(self, place):
        if self.waiting:
            self.waiting.pop(list(self.waiting)[place % len(self.waiting)]).leave()

    def pause(self, seconds):
        self.quiet.append((self.clock.now(), self.clock.now() + seconds))
        exhaust(self.limiter.limit.pause(seconds))

    def rate(self, rate):
        self.limiter.rate = rate

    def look(self):
        for place in sorted(self.waiting):
            if self.waiting[place].poll():
                assert place == min(self.waiting), "somebody got past another"
                del self.waiting[place]
                self.starts.append(self.clock.now())

    def serve_all(self, *, within):
        end = self.clock.now() + within
        while self.waiting:
            self.clock.tick(max(0.001, self.waiting[min(self.waiting)].due_in()))
            self.look()
            assert self.clock.now() < end, "somebody waits for ever"


def event(what, values):
    return st.tuples(st.just(what), values)


ticks = event("tick", st.sampled_from([0.05, 0.5, 2.0, 20.0, 60.0, 600.0]))
comings = st.one_of(
    event("join", st.integers(1, 4)), event("ask", st.integers(1, 4)), event("leave", st.integers(0, 9))
)
pauses = event("pause", st.sampled_from([0.2, 5.0, 100.0]))


@thoroughly
@given(
    st.sampled_from([0.5, 2.0, 10.0]),
    st.lists(st.sampled_from(["3/minute", "20/minute", "30/hour", "100/day"]), max_size=3),
    st.integers(1, 5),
    st.lists(st.one_of(ticks, comings, pauses), max_size=40),
)
def test_no_window_has_too_many_starts_under_any_of_several_rates(fake_clock, pace, quotas, burst, events):
    queue = Queue(RateLimiter([pace, *quotas], max_burst=burst), fake_clock)
    queue.play(events)
    queue.serve_all(within=2 * 86_400)
    assert worst_excess(queue.starts, pace, burst) <= 1e-6
    for _, units, seconds in parse_rates([pace, *quotas]).quotas:
        for first, later in zip(queue.starts, queue.starts[units:], strict=False):
            assert later - first >= seconds - 1e-6
    for begin, end in queue.quiet:
        assert not any(begin < start < end - 1e-9 for start in queue.starts)


def exhaust(flow):
    """Drive steps that should be none."""
    with pytest.raises(StopIteration):
        next(flow)


@pytest.mark.parametrize(
    ("rate", "error"), [([], ValueError), ([5, 0], ValueError), ([[5]], TypeError), ({5}, TypeError)]
)
@pytest.mark.parametrize(
    "make", [RateLimiter, get_rate_limit_decorator, lambda rate: opero.opero(rate_limit=rate)(print)]
)
def test_a_list_that_limits_nothing_is_refused(make, rate, error):
    with pytest.raises(error, match="rate"):
        make(rate)


# A limit per value

ONE_EACH = {"rate_limit": "1/hour", "per": "key"}


def test_each_value_has_a_limit_of_its_own(world, fake_clock):
    f = limited(world.define(lambda x, key="default": key), total_timeout=5, **ONE_EACH)
    assert [world.run(f, 1, "a"), world.run(f, 1, key="b"), world.run(f, 1)] == ["a", "b", "default"]
    for args, kwargs in [((2, "a"), {}), ((2,), {"key": "b"}), ((2,), {}), ((2, "default"), {})]:
        with pytest.raises(CallTimeoutError):
            world.run(f, *args, **kwargs)


def test_a_value_that_is_the_only_argument_has_a_limit_of_its_own(world, fake_clock):
    f = limited(world.define(lambda key: key), **ONE_EACH)
    assert [world.run(f, key) for key in (1, 1.0, True, "1", (1, [2]))] == [1, 1.0, True, "1", (1, [2])]


def test_keyword_only_and_variadic_neighbours_do_not_matter(world, fake_clock):
    f = limited(world.define(lambda *args, key, **more: key), total_timeout=5, **ONE_EACH)
    assert [world.run(f, 1, 2, key="a", z=1), world.run(f, key="b")] == ["a", "b"]
    with pytest.raises(CallTimeoutError):
        world.run(f, 3, key="a")


def test_a_parameter_of_the_function_is_not_mistaken_for_the_wrappers_own(fake_clock):
    def function(options="a"):
        return options

    @functools.wraps(function)
    def wrapper(*args, **options):
        return function(*args, **options)

    f = limited(wrapper, rate_limit="1/hour", per="options", total_timeout=5)
    assert [f("x"), f(options="y")] == ["x", "y"]
    with pytest.raises(CallTimeoutError):
        f("x")


class Unhashable:
    __hash__ = None


@pytest.mark.parametrize("kind", [object, Unhashable])
def test_each_object_has_a_limit_of_its_own(world, fake_clock, kind):
    class Client(kind):
        pass

    f = limited(world.define(lambda key: key), total_timeout=5, **ONE_EACH)
    one, two = Client(), Client()
    assert [world.run(f, one), world.run(f, two)] == [one, two]
    with pytest.raises(CallTimeoutError):
        world.run(f, one)


def test_each_candidate_has_a_limit_of_its_own(world, fake_clock):
    tried = []

    def function(key):
        tried.append(key)
        raise ValueError

    f = limited(world.define(function), arg_fallback="key", **ONE_EACH)
    with pytest.raises(opero.AllFailedError):
        world.run(f, ["a", "b", "c"])
    assert tried == ["a", "b", "c"]
    assert f.stats.waited < 1


def test_with_when_full_next_a_candidate_with_a_free_slot_is_tried_first(world, fake_clock):
    f = limited(
        world.define(lambda x, key: key), arg_fallback="key", rate_limit_options={"when_full": "next"}, **ONE_EACH
    )
    assert [world.run(f, x, ["a", "b", "c"]) for x in range(3)] == ["a", "b", "c"]


def test_without_it_the_first_candidate_is_waited_for(world, fake_clock):
    f = limited(world.define(lambda x, key: key), arg_fallback="key", total_timeout=5, **ONE_EACH)
    world.run(f, 1, ["a", "b"])
    with pytest.raises(CallTimeoutError):
        world.run(f, 2, ["a", "b"])


def test_a_candidate_that_was_passed_over_is_still_tried_when_the_others_fail(world):
    tried = []

    def function(x, key):
        tried.append(key)
        if key == "b":
            raise ValueError
        return key

    f = limited(
        world.define(function),
        arg_fallback="key",
        rate_limit=2,
        per="key",
        rate_limit_options={"when_full": "next", "max_burst": 1},
    )
    world.run(f, 1, ["a", "b"])
    assert world.run(f, 2, ["a", "b"]) == "a"
    assert tried == ["a", "b", "a"]


def test_when_all_are_full_the_one_whose_slot_comes_first_is_waited_for(world):
    f = limited(
        world.define(lambda x, key: key),
        arg_fallback="key",
        rate_limit=10,
        per="key",
        rate_limit_options={"when_full": "next"},
    )
    world.run(f, 1, ["b"])
    f.__opero__.plan.limit.limiter.per_value.of("a").take_now()
    f.__opero__.plan.limit.limiter.per_value.of("c").take_now()
    assert world.run(f, 2, ["a", "b", "c"]) == "b"


def test_a_call_that_gave_way_is_not_refused_when_the_reason_is_gone_a_moment_later(fake_clock):
    limit = FunctionLimit(lambda: None, rate_limit=1)
    limit.limiter.take_now()
    reasons = [True]
    waiting = limit.take(
        Candidate(None, None, ((), {})), math.inf, is_over=lambda: reasons and reasons.pop(), is_turn=True
    )
    assert drive(waiting, None) == "over"


def test_idle_values_are_forgotten(world, fake_clock):
    f = limited(world.define(lambda key: key), rate_limit=10, per="key")
    for value in range(5_000):
        world.run(f, value) if value < 10 else f.__opero__.plan.limit.limiter.per_value.of(value).take_now()
        fake_clock.tick(0.05)
    assert len(f.__opero__.plan.limit.limiter.per_value._lines) <= 128


def test_values_that_are_not_idle_are_remembered(fake_clock):
    limits = RateLimiter("1/hour").per_value
    assert all(limits.of(value).take_now() for value in range(500))
    assert not any(limits.of(value).take_now() for value in range(500))


def test_a_value_that_is_paused_or_waited_for_is_remembered(fake_clock):
    limiter = RateLimiter([100, "1/hour"])
    exhaust(limiter.per_value.of("paused").pause(1000))
    limiter.per_value.of("used up").take_now()
    fake_clock.tick(100)
    for value in range(500):
        limiter.per_value.of(value).take_now()
    assert [limiter.per_value.of(value).take_now() for value in ("paused", "used up")] == [False, False]


def test_threads_that_use_many_values_never_get_more_than_their_limits_allow():
    limits = RateLimiter("1/hour").per_value
    chosen = [random.Random(seed) for seed in range(8)]

    def work(generator):
        return [value for value in (generator.randrange(400) for _ in range(2_000)) if limits.of(value).take_now()]

    taken = [value for part in results([started(work, each) for each in chosen]) for value in part]
    assert sorted(taken) == sorted(set(taken))


def test_a_limit_that_was_just_asked_for_is_not_forgotten_for_a_new_value():
    limits = RateLimiter("1/hour").per_value
    asked_for = limits.of("asked for")
    limits.of("new")
    assert limits.of("asked for") is asked_for


def test_the_limits_of_a_function_go_with_it():
    f = limited(lambda key: key, **ONE_EACH)
    f("a")
    gc.disable()
    try:
        limits = weakref.ref(f.__opero__.plan.limit.limiter.per_value)
        del f
        assert limits() is None
    finally:
        gc.enable()


# The service says when


class BusyError(Exception):
    """Says how long to wait."""


def seconds_of(error):
    return error.args[0] if isinstance(error, BusyError) else False


@pytest.fixture
def busy():
    """Options of a function that is told to come again later, and a function that is, once."""
    told = threading.Event()

    def function(x=None):
        if not told.is_set():
            told.set()
            raise BusyError(0.2)
        return x

    return function, {"retry_on": seconds_of, "retries": 1, "rate_limit": 1000}


def test_after_seconds_from_retry_on_nobody_starts_before(world, fake_clock):
    def function(x):
        if x == 1:
            raise BusyError(30)
        return x

    f = opero.opero(retry_on=seconds_of, retries=1, rate_limit=1000, total_timeout=10)(world.define(function))
    with pytest.raises(BusyError):
        world.run(f, 1)
    with pytest.raises(CallTimeoutError):
        world.run(f, 2)
    fake_clock.tick(30)
    assert world.run(f, 3) == 3


def test_the_pause_holds_for_callers_in_other_threads(busy):
    function, options = busy
    f = opero.opero(**options)(function)
    first = started(f, "first")
    until(lambda: f.stats.attempts == 1)
    with Timed() as time_taken:
        until(lambda: not f.__opero__.plan.limit.limiter.take_now())
        f("second")
    assert first.result(SECONDS) == "first"
    assert time_taken.seconds > 0.1


def test_the_pause_is_that_of_one_key(world, fake_clock):
    def function(key, x):
        if x == 1:
            raise BusyError(30)
        return key

    f = opero.opero(retry_on=seconds_of, retries=1, rate_limit=1000, per="key", total_timeout=10)(
        world.define(function)
    )
    with pytest.raises(BusyError):
        world.run(f, "a", 1)
    assert world.run(f, "b", 2) == "b"
    with pytest.raises(CallTimeoutError):
        world.run(f, "a", 2)


def test_the_items_of_a_map_all_wait_for_what_one_of_them_was_told(mode, journal):
    def function(x):
        import time

        journal.add(f"{x} {time.monotonic()}")
        if x == 0 and sum(line.startswith("0 ") for line in journal.lines()) == 1:
            raise BusyError(0.3)
        return x

    mapped = opero.opmap(retry_on=seconds_of, rate_limit=20, rate_limit_options={"max_burst": 1}, **mode.options)(
        mode.define(function)
    )
    assert mode.run(mapped, range(6)) == list(range(6))
    moments = sorted(float(line.split()[1]) for line in journal.lines())
    # Those that had their slots when the word came back may still start.
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert max(gaps) >= 0.2


def test_a_true_from_retry_on_pauses_nobody(world, fake_clock):
    f = opero.opero(retry_on=lambda error: True, retries=1, jitter=False, rate_limit=1000, total_timeout=1)(
        world.define(lambda x: 1 / x)
    )
    with pytest.raises(ZeroDivisionError):
        world.run(f, 0)
    fake_clock.tick(0.001)
    assert world.run(f, 1) == 1


def test_those_in_line_wait_for_the_pause_and_keep_their_order(fake_clock):
    limiter = RateLimiter(10)
    limiter.take_now()
    tickets = [ticket_of(limiter) for _ in range(3)]
    assert polled(tickets) == 0
    exhaust(limiter.limit.pause(5))
    assert limiter.limit.expected_wait() >= 5
    fake_clock.tick(4.9)
    assert polled(tickets) == 0
    fake_clock.tick(0.11)
    assert [ticket.poll() for ticket in reversed(tickets)] == [False, False, True]
    fake_clock.tick(0.1)
    assert [ticket.poll() for ticket in tickets] == [True, True, False]


def test_a_pause_saves_no_slots_up(fake_clock):
    limiter = RateLimiter(10, max_burst=3)
    limiter.take_now()
    tickets = [ticket_of(limiter) for _ in range(20)]
    for ticket in tickets:
        ticket.poll()
    exhaust(limiter.limit.pause(100))
    fake_clock.tick(100)
    assert polled(tickets) <= 2


# One limiter for several functions


def test_functions_share_the_limiter_they_are_given(world, fake_clock):
    limit = RateLimiter("1/hour")
    f = limited(world.define(lambda: "f"), rate_limit=limit, total_timeout=5)
    g = get_rate_limit_decorator(limit)(world.define(lambda: "g"))
    world.run(g)
    with pytest.raises(CallTimeoutError):
        world.run(f)


def test_functions_share_the_limits_of_each_value(world, fake_clock):
    limit = RateLimiter("1/hour")
    f = limited(world.define(lambda key: key), rate_limit=limit, per="key", total_timeout=5)
    g = limited(world.define(lambda x, key: key), rate_limit=limit, per="key", total_timeout=5)
    assert [world.run(f, "a"), world.run(g, 1, "b")] == ["a", "b"]
    for function, args in [(f, ("b",)), (g, (1, "a"))]:
        with pytest.raises(CallTimeoutError):
            world.run(function, *args)


def test_a_map_and_a_function_share_a_limiter(mode):
    limit = RateLimiter(50, max_burst=1)
    mapped = opero.opmap(retries=0, rate_limit=limit, **mode.options)(mode.define(abs))
    with Timed() as time_taken:
        waiting = started(lambda: [limit.acquire() for _ in range(8)])
        assert mode.run(mapped, range(8)) == list(range(8))
        waiting.result(SECONDS)
    assert time_taken.is_enough_for(16)


def test_options_beside_a_limiter_are_refused():
    with pytest.raises(ValueError, match="max_burst"):
        opero.opero(rate_limit=RateLimiter(5), rate_limit_options={"max_burst": 5})(print)


def test_acquire_tells_whether_it_got_a_slot(fake_clock):
    limiter = RateLimiter("1/hour")
    assert [limiter.acquire(timeout=0), limiter.acquire(timeout=0), limiter.acquire(timeout=60)] == [True, False, False]
    assert fake_clock.sleeps == []


def test_acquire_async_tells_whether_it_got_a_slot(fake_clock):
    limiter = RateLimiter("1/hour")

    async def main():
        return [await limiter.acquire_async(timeout=seconds) for seconds in (5, 0, 60)]

    assert asyncio.run(main()) == [True, False, False]


def test_acquire_waits_for_a_slot_that_comes_in_time():
    limiter = RateLimiter(50, max_burst=1)
    with Timed() as time_taken:
        assert [limiter.acquire(timeout=SECONDS) for _ in range(4)] == [True] * 4
    assert time_taken.is_enough_for(4)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", True])
def test_a_wrong_timeout_is_refused(timeout):
    with pytest.raises((TypeError, ValueError), match="timeout"):
        RateLimiter(5).acquire(timeout=timeout)


def test_a_limiter_is_a_context_that_waits_at_its_entrance():
    limiter = RateLimiter(50, max_burst=1)

    async def main():
        for _ in range(4):
            async with limiter as entered:
                assert entered is limiter

    with Timed() as time_taken:
        for _ in range(4):
            with limiter as entered:
                assert entered is limiter
        asyncio.run(main())
    assert time_taken.is_enough_for(8)


def test_a_limiter_of_the_process_cannot_be_pickled():
    with pytest.raises(TypeError, match="scope="):
        pickle.dumps(RateLimiter(5))


def test_a_copy_of_a_limiter_is_the_limiter():
    limiter = RateLimiter(5)
    assert copy.copy(limiter) is copy.deepcopy(limiter) is limiter


# Another rate


def test_a_new_rate_holds_for_those_who_come(fake_clock):
    limiter = RateLimiter("1/hour")
    limiter.take_now()
    limiter.rate = 10
    fake_clock.tick(0.1)
    assert limiter.take_now()
    assert limiter.rate == 10


def test_a_new_rate_holds_for_those_who_wait_and_wakes_them(fake_clock):
    limiter = RateLimiter("1/hour")
    limiter.take_now()
    first, second = tickets = [ticket_of(limiter), ticket_of(limiter)]
    assert polled(tickets) == 0
    woken = threading.Event()
    first.notify(woken.set)
    limiter.rate = "10/s"
    assert woken.is_set()
    assert not first.poll()
    assert first.due_in() == pytest.approx(0.1)
    fake_clock.tick(0.1)
    assert [second.poll(), first.poll()] == [False, True]
    fake_clock.tick(0.1)
    assert second.poll()


def test_a_lower_rate_makes_those_who_wait_wait_longer(fake_clock):
    limiter = RateLimiter(10)
    limiter.take_now()
    ticket = ticket_of(limiter)
    ticket.poll()
    limiter.rate = 0.1
    fake_clock.tick(9.9)
    assert not ticket.poll()
    fake_clock.tick(0.2)
    assert ticket.poll()


def test_a_thread_that_waits_is_let_through_by_a_new_rate():
    limiter = RateLimiter("1/hour")
    limiter.acquire()
    waiting = started(limiter.acquire)
    until(lambda: limiter.limit.expected_wait() > 3_600)
    limiter.rate = 100
    assert waiting.result(SECONDS)


def test_a_task_that_waits_is_let_through_by_a_new_rate():
    limiter = RateLimiter("1/hour")

    async def main():
        await limiter.acquire_async()
        waiting = asyncio.create_task(limiter.acquire_async())
        await settle()
        limiter.rate = 100
        return await asyncio.wait_for(waiting, SECONDS)

    assert asyncio.run(main())


def test_a_new_rate_holds_for_each_value(fake_clock):
    limiter = RateLimiter("1/hour")
    limiter.per_value.of("a").take_now()
    limiter.rate = 10
    fake_clock.tick(0.1)
    assert limiter.per_value.of("a").take_now()


def test_a_new_rate_keeps_what_its_quotas_have_counted(fake_clock):
    limiter = RateLimiter([10, "3/minute"])
    starts_of(limiter, fake_clock, 1)
    limiter.rate = [100, "4/minute"]
    assert len(starts_of(limiter, fake_clock, 1)) == 1


@pytest.mark.parametrize("rate", [0, -1, float("nan"), "often", None])
def test_a_new_rate_that_limits_nothing_is_refused_and_changes_nothing(rate):
    limiter = RateLimiter(5)
    with pytest.raises((TypeError, ValueError), match="rate"):
        limiter.rate = rate
    assert limiter.rate == 5


def test_a_small_quota_that_is_set_while_callers_wait_breaks_nothing(fake_clock):
    limiter = RateLimiter(10)
    limiter.take_now()
    tickets = [ticket_of(limiter) for _ in range(4)]
    assert polled(tickets) == 0
    limiter.rate = [10, "1/minute"]
    fake_clock.tick(1)
    assert polled(tickets) == 1
    assert limiter.limit.expected_wait() > 100
    assert tickets[3].due_in() > 0
    for _ in range(3):
        fake_clock.tick(61)
        polled(tickets)
    assert polled(tickets) == 4


@pytest.mark.parametrize("spread", [True, False])
def test_a_call_that_costs_more_than_a_new_rate_starts_and_holds_up_nobody_for_ever(fake_clock, spread):
    limiter = RateLimiter({"tokens": "100/minute"}, spread=spread, max_burst=1)
    assert limiter.acquire(tokens=50)
    dear, cheap = (Turn([(limiter.limit, (tokens,))]) for tokens in (80.0, 10.0))
    assert [dear.poll(), cheap.poll()] == [False, False]
    limiter.rate = {"tokens": "50/minute"}
    fake_clock.tick(60)
    assert [dear.poll(), cheap.poll()] == [True, False]
    assert limiter.limit.expected_wait((60.0,)) >= 60
    fake_clock.tick(100)
    assert cheap.poll()


@pytest.mark.parametrize("news", ["lower", "pause"])
def test_acquire_gives_up_as_soon_as_its_slot_will_be_late(news):
    limiter = RateLimiter(2, max_burst=1)
    limiter.acquire()
    waiting = started(lambda: limiter.acquire(timeout=60))
    until(lambda: limiter.limit.expected_wait() > 0.5)
    if news == "lower":
        limiter.rate = "1/hour"
    else:
        exhaust(limiter.limit.pause(3600))
    assert waiting.result(SECONDS) is False


def test_a_call_gives_up_as_soon_as_another_one_is_told_to_wait_for_longer(world):
    gate = threading.Event()

    def function(x):
        if x == "told":
            assert gate.wait(SECONDS)
            raise BusyError(3_600)
        return x

    f = opero.opero(retry_on=seconds_of, retries=1, rate_limit=1, total_timeout=60)(world.define(function))
    told = started(world.run, f, "told")
    until(lambda: f.stats.attempts == 1)
    waiting = started(world.run, f, "waits")
    until(lambda: f.__opero__.plan.limit.limiter.limit.expected_wait() > 1)
    gate.set()
    assert isinstance(waiting.exception(SECONDS), CallTimeoutError)
    assert isinstance(told.exception(SECONDS), BusyError)


@thoroughly
@given(st.lists(st.one_of(ticks, comings, event("rate", st.sampled_from([1.0, 4.0, 50.0]))), max_size=40))
def test_under_changing_rates_all_are_served_in_order_and_windows_hold_the_highest(fake_clock, events):
    queue = Queue(RateLimiter(1, max_burst=3), fake_clock)
    queue.play(events)
    queue.serve_all(within=queue.joined + 2)
    highest = max([1.0, *(value for what, value in events if what == "rate")])
    assert worst_excess(queue.starts, highest, 3) <= 1e-6


# Refused when decorating


@pytest.mark.parametrize(
    ("options", "error", "shows"),
    [
        ({"per": "key"}, ValueError, "rate_limit="),
        (
            {"rate_limit": 5, "per": "nothing"},
            ValueError,
            r"no parameter of .*function; write one of \['x', 'key'\]",
        ),
        ({"rate_limit": 5, "per": 5}, TypeError, "per"),
        ({"rate_limit": 5, "rate_limit_options": {"when_full": "next"}}, ValueError, "per"),
        ({"rate_limit": 5, "rate_limit_options": {"when_full": "skip"}}, ValueError, "'next'"),
        ({"rate_limit": 5, "rate_limit_options": {"when_full": None}}, TypeError, "when_full"),
        (
            {"rate_limit": 5, "per": "key", "rate_limit_options": {"when_full": "next"}},
            ValueError,
            "arg_fallback",
        ),
        ({"rate_limit": 5, "rate_limit_options": {"scope": "galaxy"}}, ValueError, "'machine'"),
        ({"rate_limit": 5, "rate_limit_options": {"scope": None}}, TypeError, "scope"),
        ({"rate_limit": 5, "rate_limit_options": {"scope": "redis"}}, ValueError, "redis://"),
        ({"rate_limit": 5, "rate_limit_options": {"scope": "redis", "url": "http://x"}}, ValueError, "redis://"),
        ({"rate_limit": 5, "rate_limit_options": {"scope": "redis", "url": 5}}, TypeError, "url"),
        ({"rate_limit": 5, "rate_limit_options": {"url": "redis://x"}}, ValueError, "url"),
        ({"rate_limit": 5, "rate_limit_options": {"name": "x"}}, ValueError, "name"),
        ({"rate_limit": 5, "rate_limit_options": {"scope": "machine", "url": "redis://x"}}, ValueError, "url"),
        ({"rate_limit": 5, "rate_limit_options": {"scope": "machine", "name": ""}}, ValueError, "name"),
        ({"rate_limit": 5, "rate_limit_options": {"scope": "machine", "folder": 5}}, TypeError, "folder"),
    ],
)
@pytest.mark.parametrize("decorator", [opero.opero, opero.opmap])
def test_what_cannot_apply_is_refused(decorator, options, error, shows):
    def function(x, key=None):
        pass

    with pytest.raises(error, match=shows):
        decorator(**options)(function)


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "redis", "url": "http://me:secret@x"},
        {"scope": "redis", "url": "redis://:secret/x@host"},
        {"scope": "redis", "url": "redis://:secret@host:abc"},
        {"scope": "redis", "url": "redis://:secret@host:99999"},
        {"scope": "redis", "url": ["redis://:secret@host"]},
        {"scope": "redis", "url": b"redis://:secret@host"},
        "redis://:secret@host",
    ],
)
def test_a_url_that_is_none_is_refused_when_decorating_and_not_shown(options):
    with pytest.raises((TypeError, ValueError), match=r"redis://|mapping") as caught:
        opero.opero(rate_limit=5, rate_limit_options=options)(print)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("scope", ["machine", "redis"])
def test_a_limiter_that_processes_share_needs_a_name(scope):
    with pytest.raises(ValueError, match="name="):
        RateLimiter(5, scope=scope, url="redis://localhost" if scope == "redis" else None)


LIMITER = RateLimiter({"calls": 5, "tokens": 900})


@pytest.mark.parametrize(
    ("options", "error", "shows"),
    [
        ({"rate_limit": 5, "rate_limit_cost": {"calls": "5"}}, TypeError, "number of units"),
        ({"rate_limit": 5, "rate_limit_cost": {"call": 5}}, TypeError, "'calls'"),
        ({"rate_limit": 5, "rate_limit_cost": 5_000}, ValueError, "could never start"),
        ({"rate_limit": 5, "rate_limit_cost": {"calls": (1, len, 2)}}, ValueError, "pair"),
        ({"rate_limit": {"calls": 5, "tokens": 9}}, ValueError, r"rate_limit_cost=\{'tokens': …\}"),
        ({"rate_limit": {"calls": 5, "tokens": 9}, "rate_limit_cost": len}, ValueError, "write a mapping"),
        ({"rate_limit": [LIMITER, LIMITER], "rate_limit_cost": {"tokens": 1}}, ValueError, "twice"),
        ({"rate_limit": (900, 15)}, ValueError, "'900/15 seconds'"),
        ({"rate_limit": {}}, ValueError, "name what it limits"),
        ({"rate_limit": RateLimiter}, TypeError, "calls per second"),
    ],
)
def test_costs_and_rates_that_cannot_be_meant_are_refused(options, error, shows):
    with pytest.raises(error, match=shows):
        opero.opero(**options)(print)


# Costs


TOKENS = {"rate_limit": {"calls": 100, "tokens": "60/minute"}, "rate_limit_cost": {"tokens": len}, "total_timeout": 59}


def test_a_call_takes_what_it_costs(world, fake_clock):
    f = limited(world.define(lambda text: text), **TOKENS)
    world.run(f, "x" * 30)
    fake_clock.tick(29)
    f.__opero__.plan.limit.learn(58.5)
    with pytest.raises(CallTimeoutError):
        world.run(f, "x")
    fake_clock.tick(1)
    assert world.run(f, "x") == "x"


@pytest.mark.parametrize(
    "cost",
    [len, lambda it: 2 * len(it) / 2, lambda text: 2 * len(text) / 2, lambda **names: len(names["text"])],
    ids=["builtin", "another name", "its name", "any name"],
)
def test_a_cost_may_be_asked_of_a_call_that_names_its_arguments(world, fake_clock, cost):
    f = limited(world.define(lambda text: text), rate_limit={"tokens": 10}, rate_limit_cost=cost)
    assert world.run(f, text="x" * 10) == "x" * 10
    assert f.__opero__.plan.limit.limiter.limit.expected_wait() == pytest.approx(1)


def test_a_cost_is_asked_of_the_arguments_that_were_passed(world):
    asked = []

    def cost(text, **more):
        asked.append((text, more))
        return 1

    f = limited(
        world.define(lambda text, model="small", *, size=1: (text, model, size)),
        rate_limit={"tokens": 1000},
        rate_limit_cost=lambda it, *rest, size=1: cost(it, rest=rest, size=size),
    )
    world.run(f, "a")
    world.run(f, text="a", size=2)
    world.run(f, model="large", text="a")
    assert asked == [
        ("a", {"rest": (), "size": 1}),
        ("a", {"rest": (), "size": 2}),
        ("a", {"rest": ("large",), "size": 1}),
    ]


@pytest.mark.parametrize("per", [str.lower, lambda it: it.lower()], ids=["builtin", "another name"])
def test_a_function_of_per_may_be_asked_of_a_call_that_names_its_arguments(world, fake_clock, per):
    options = {"max_burst": 1, "when_full": "raise"}
    f = opero.opero(retries=0, rate_limit=1, max_concurrent=1, breaker=1, per=per, rate_limit_options=options)(
        world.define(lambda name: name)
    )
    assert world.run(f, name="A") == "A"
    with pytest.raises(opero.RateLimitedError):
        world.run(f, name="a")
    assert world.run(f, name="b") == "b"


def test_a_cost_may_have_places_for_the_first_arguments_only(world, fake_clock):
    def cost(prompt, **options):
        return len(prompt) if options["model"] == "small" else 100

    f = limited(
        world.define(lambda prompt, model="large", seed=0: prompt),
        rate_limit={"tokens": 10},
        rate_limit_cost={"tokens": cost},
    )
    assert world.run(f, "xx", "small") == "xx"
    assert f.__opero__.plan.limit.limiter.limit.expected_wait() == pytest.approx(0.2)


class WithoutSignature:
    __signature__ = "none"

    def __call__(self, model, prompt):
        return len(prompt) if model == "small" else 100


@pytest.mark.parametrize(
    ("cost", "args", "kwargs"),
    [
        (WithoutSignature(), (), {"prompt": "xx", "model": "small"}),
        (lambda it, name: len(it) if name == "small" else 100, ("xx",), {"model": "small"}),
        (lambda *, prompt, model="small", **more: len(prompt) if model == "small" else 100, (), {"prompt": "xx"}),
    ],
    ids=["no signature", "places", "names"],
)
def test_a_cost_has_the_arguments_that_were_meant(world, fake_clock, cost, args, kwargs):
    def f(prompt, /, model="large"):
        return prompt

    def g(prompt, model="large"):
        return prompt

    f = limited(world.define(f if args else g), rate_limit={"tokens": 10}, rate_limit_cost={"tokens": cost})
    assert world.run(f, *args, **kwargs) == "xx"
    assert f.__opero__.plan.limit.limiter.limit.expected_wait() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("cost", "kwargs"),
    [
        (lambda prompt, model="small": len(prompt), {"temperature": 2}),
        (lambda it, name: len(it), {"seed": 7}),
        (lambda temperature, it: len(it), {"prompt": "b", "temperature": 2}),
    ],
    ids=["an option of another name", "a gap", "another order"],
)
def test_a_cost_is_not_given_one_argument_for_another(world, cost, kwargs):
    f = limited(
        world.define(lambda prompt, temperature=1, seed=0: prompt),
        rate_limit={"tokens": 1000},
        rate_limit_cost={"tokens": cost},
    )
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        world.run(f, *(() if "prompt" in kwargs else ("a",)), **kwargs)


def test_a_class_without_a_signature_tells_values_of_per_apart(world, fake_clock):
    options = {"max_burst": 1, "when_full": "raise"}
    f = opero.opero(retries=0, rate_limit=1, per=dict, rate_limit_options=options)(
        world.define(lambda a=1, b=2: (a, b))
    )
    assert world.run(f, a=1, b=2) == (1, 2)
    with pytest.raises(opero.RateLimitedError):
        world.run(f, b=2, a=1)
    assert world.run(f, a=2, b=2) == (2, 2)


def test_a_cost_above_the_whole_rate_is_an_error_at_once_and_not_retried(world, fake_clock):
    f = opero.opero(retries=5, **TOKENS)(world.define(lambda text: text))
    with pytest.raises(ValueError, match="could never start"):
        world.run(f, "x" * 61)
    assert fake_clock.sleeps == []
    assert world.run(f, "x" * 60)


def test_a_cost_is_corrected_by_what_the_result_says(world, fake_clock):
    options = {**TOKENS, "rate_limit": {"tokens": ["1000/s", "60/minute"]}}
    f = limited(world.define(lambda text: text), **{**options, "rate_limit_cost": (len, lambda text: len(text) / 2)})
    limiter = f.__opero__.plan.limit.limiter
    world.run(f, "x" * 40)
    fake_clock.tick(1)
    assert limiter.acquire(tokens=40, timeout=0)
    assert not limiter.acquire(tokens=1, timeout=0)


def test_a_result_that_cost_more_is_taken_afterwards(world, fake_clock):
    f = limited(world.define(lambda text: text), rate_limit={"tokens": 10}, rate_limit_cost=(1, len))
    world.run(f, "x" * 10)
    assert f.__opero__.plan.limit.limiter.limit.expected_wait() == pytest.approx(1)


def test_a_cost_is_asked_for_once_for_each_attempt_and_corrected_by_it(world, fake_clock):
    asked = []
    options = {"rate_limit": {"tokens": 10}, "rate_limit_cost": (lambda text: asked.append(text) or 3, len)}
    f = limited(world.define(lambda text: text), **options)
    for text in ("x" * 10, "", "x" * 5):
        world.run(f, text)
        assert asked.pop() == text
        assert not asked
        assert f.__opero__.plan.limit.limiter.limit.expected_wait() == pytest.approx(len(text) / 10)
        fake_clock.tick(1)


@pytest.fixture(params=["process", "machine"])
def quota(request, fake_clock, tmp_path):
    """60 tokens a minute, of the process or shared with others."""
    options = {"scope": "machine", "name": "n", "folder": tmp_path} if request.param == "machine" else {}
    return RateLimiter({"tokens": "60/minute"}, spread=False, **options)


def test_what_a_long_call_gives_back_makes_no_room_once_it_is_too_old_to_count(world, fake_clock, quota):
    def call():
        fake_clock.tick(65)
        assert quota.acquire(tokens=50, timeout=0)

    world.run(limited(world.define(call), rate_limit=quota, rate_limit_cost=(40, lambda _: 10)))
    assert not quota.acquire(tokens=11, timeout=0)
    assert quota.acquire(tokens=10, timeout=0)


def test_what_a_call_gives_back_counts_no_longer_than_what_others_took_before(world, fake_clock, quota):
    quota.acquire(tokens=40)
    fake_clock.tick(30)
    world.run(limited(world.define(lambda: fake_clock.tick(10)), rate_limit=quota, rate_limit_cost=(20, lambda _: 5)))
    assert [quota.acquire(tokens=16, timeout=0), fake_clock.tick(21)] == [False, None]
    assert not quota.acquire(tokens=56, timeout=0)
    assert quota.acquire(tokens=55, timeout=0)


def test_a_cost_of_a_call_that_waits_is_asked_for_once(world):
    asked = []
    options = {"rate_limit": {"tokens": 100}, "rate_limit_cost": lambda text: asked.append(text) or len(text)}
    f = limited(world.define(lambda text: text), **options)
    for text in ("x", "y"):
        world.run(f, text)
    assert asked == ["x", "y"]


def test_a_cost_afterwards_that_is_none_ends_the_call(world, fake_clock):
    f = opero.opero(retries=5, rate_limit={"tokens": 10}, rate_limit_cost=(1, lambda _: "much"))(
        world.define(lambda: "result")
    )
    for _ in range(2):
        with pytest.raises(TypeError, match="number of units"):
            world.run(f)
        fake_clock.tick(1)
    assert f.stats.attempts == 2


def test_each_value_pays_its_own_costs(world, fake_clock):
    f = limited(world.define(lambda text, key: key), per="key", **{**TOKENS, "rate_limit_cost": {"tokens": 60}})
    assert [world.run(f, "x", key) for key in "ab"] == ["a", "b"]


def test_a_dear_call_is_not_passed_by_cheap_ones(fake_clock):
    limiter = RateLimiter({"calls": 1000, "tokens": ["1000/s", "10/minute"]}, max_burst=1)
    limiter.acquire(tokens=5)
    dear, cheap = (Turn([(limiter.limit, (1.0, tokens))]) for tokens in (8.0, 1.0))
    assert [dear.poll(), cheap.poll()] == [False, False]
    fake_clock.tick(30)
    assert [cheap.poll(), dear.poll()] == [False, False]
    fake_clock.tick(30)
    assert [dear.poll(), fake_clock.tick(1), cheap.poll()] == [True, None, True]
    cheap.leave()


def test_acquire_takes_costs_by_name(fake_clock):
    limiter = RateLimiter({"calls": "600/minute", "tokens": "60/minute"})
    assert limiter.acquire(tokens=30, timeout=0)
    fake_clock.tick(29.9)
    assert not limiter.acquire(tokens=1, timeout=0)
    fake_clock.tick(0.1)
    assert limiter.acquire(tokens=60, timeout=0)


@pytest.mark.parametrize(
    ("costs", "error"),
    [({}, TypeError), ({"tokens": "5"}, TypeError), ({"tokens": 61}, ValueError), ({"x": 1}, TypeError)],
)
def test_costs_that_acquire_cannot_take_are_refused(costs, error):
    with pytest.raises(error):
        RateLimiter({"tokens": "60/minute"}).acquire(**costs)


@pytest.mark.parametrize("gate", ["process", "machine"])
@thoroughly
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.integers(1, 20)),
            st.tuples(st.just("tick"), st.sampled_from([0.01, 0.5, 3.0, 20.0, 60.0])),
        ),
        max_size=60,
    )
)
def test_no_window_costs_too_much(fake_clock, tmp_path_factory, gate, events):
    rate = {"calls": [50, "5/minute"], "tokens": ["10/s", "30/minute"]}
    options = {"scope": gate, "name": "n", "folder": tmp_path_factory.mktemp("limits")} if gate == "machine" else {}
    limiter, taken = RateLimiter(rate, max_burst=3, **options), []
    for what, value in events:
        if what == "tick":
            fake_clock.tick(value)
        elif value <= 10 and limiter.acquire(tokens=value, timeout=0):
            taken.append((fake_clock.now(), value))
    for place, (first, _) in enumerate(taken):
        for seconds, tokens, calls in [(60, 30, 5), (1, 10 + 3 + 10, 50)]:
            window = [cost for moment, cost in taken[place:] if moment < first + seconds - 1e-6]
            assert sum(window) <= tokens
            assert len(window) <= calls


@pytest.mark.parametrize("costs", [[1.0, 5.0], [2.0, 20.0, 0.5], [0.5, 4.0], [1.0, 1.0, 10.0]])
def test_who_has_waited_for_one_rate_makes_up_for_no_time_twice_in_another(fake_clock, costs):
    limiter = RateLimiter({"calls": 1, "tokens": "20/10 s"}, max_burst=5)
    began, taken = fake_clock.now(), []
    for tokens in itertools.cycle(costs):
        turn = Turn([(limiter.limit, (1.0, tokens))])
        while not turn.poll():
            fake_clock.tick(turn.due_in())
        turn.leave()
        if fake_clock.now() >= began + 100:
            break
        taken.append(tokens)
    assert 2 * 100 - max(costs) <= sum(taken) <= 2 * 100 + 5 + max(costs)


def test_a_quota_of_many_calls_remembers_few_entries_and_is_exact_from_above(fake_clock):
    limiter = RateLimiter(["100000/s", "10000/minute"], max_burst=1)
    starts = starts_of(limiter, fake_clock, 70, step=0.001)
    assert max(len(quota.entries) for quota in limiter.limit.ledger.meters[1:]) <= 300
    early = [start for start in starts if start < starts[0] + 60 - 1e-6]
    assert len(early) == 10_000
    assert len(starts) > 10_000 + 9_000


# How to wait


def test_when_full_may_raise(world, fake_clock):
    f = limited(world.define(lambda: "result"), rate_limit=1, rate_limit_options={"when_full": "raise"})
    world.run(f)
    with pytest.raises(RateLimitedError) as caught:
        world.run(f)
    assert caught.value.retry_in == pytest.approx(1)
    fake_clock.tick(1)
    assert world.run(f) == "result"


def test_a_call_that_would_wait_for_longer_than_max_wait_raises_at_once(world, fake_clock):
    f = limited(world.define(lambda: "result"), rate_limit="1/minute", rate_limit_options={"max_wait": 30})
    world.run(f)
    with pytest.raises(RateLimitedError):
        world.run(f)
    assert fake_clock.sleeps == []


def test_a_call_whose_slot_comes_within_max_wait_waits_for_it(world):
    f = limited(world.define(lambda: "result"), rate_limit=20, rate_limit_options={"max_wait": SECONDS})
    assert [world.run(f) for _ in range(3)] == ["result"] * 3


def test_a_limiter_says_how_those_wait_who_use_it(world, fake_clock):
    limiter = RateLimiter(1, when_full="raise")
    f = limited(world.define(lambda: None), rate_limit=limiter)
    limiter.acquire()
    with pytest.raises(RateLimitedError):
        world.run(f)
    with pytest.raises(RateLimitedError):
        limiter.acquire()
    patient = limited(world.define(lambda: None), rate_limit=limiter, rate_limit_options={"when_full": "wait"})
    with pytest.raises(CallTimeoutError):
        world.run(opero.control(patient).with_options(total_timeout=0.5))


def test_each_limiter_of_several_says_how_those_wait_who_use_it(world):
    budget = RateLimiter("2/day", spread=False, when_full="raise")
    f = limited(world.define(lambda: None), rate_limit=[budget, "100/s"])
    for _ in range(2):
        world.run(f)
    with pytest.raises(RateLimitedError):
        world.run(f)
    patient = limited(
        world.define(lambda: None), rate_limit=[budget, RateLimiter(100)], rate_limit_options={"when_full": "wait"}
    )
    with pytest.raises(CallTimeoutError):
        world.run(opero.control(patient).with_options(total_timeout=0.5))


def test_without_spread_a_rate_is_a_quota(fake_clock):
    limiter = RateLimiter("3/minute", spread=False)
    assert [limiter.take_now() for _ in range(4)] == [True, True, True, False]
    fake_clock.tick(60)
    assert limiter.take_now()


def test_a_limiter_can_be_paused(world, fake_clock):
    limiter = RateLimiter(100)
    f = limited(world.define(lambda key: None), rate_limit=limiter, per="key", total_timeout=5)
    world.run(f, "a")
    fake_clock.tick(1)
    limiter.pause(10)
    with pytest.raises(CallTimeoutError):
        world.run(f, "a")
    with pytest.raises(CallTimeoutError):
        world.run(f, "a value that comes meanwhile")
    assert not limiter.take_now()
    fake_clock.tick(10)
    world.run(f, "a")


# Several limits


def test_a_call_takes_a_slot_of_its_own_limit_and_of_a_shared_one(world, fake_clock):
    shared = RateLimiter("10/minute")
    f = limited(world.define(lambda: "f"), rate_limit=[shared, "1/minute"], total_timeout=5)
    g = limited(world.define(lambda: "g"), rate_limit=shared, total_timeout=5)
    world.run(f)
    with pytest.raises(CallTimeoutError):
        world.run(g)
    fake_clock.tick(6)
    world.run(g)
    fake_clock.tick(6)
    with pytest.raises(CallTimeoutError):
        world.run(f)
    # Of which it has taken no slot.
    assert world.run(g) == "g"


def test_who_waits_for_its_own_limit_holds_up_nobody_else_in_the_shared_one(fake_clock):
    shared = RateLimiter(10)
    f = limited(lambda: "f", rate_limit=[shared, "1/hour"])
    f()
    fake_clock.tick(1)
    flow = call_flow(f.__opero__.plan, Call((), {}))
    wait = flow.send(None)
    assert not wait.poll()
    assert shared.take_now()
    flow.close()


def test_functions_with_two_shared_limits_in_either_order_do_not_stop_each_other(world):
    a, b = RateLimiter(100, max_burst=1), RateLimiter(200, max_burst=1)
    f = limited(world.define(lambda: "f"), rate_limit=[a, b])
    g = limited(world.define(lambda: "g"), rate_limit=[b, a])
    with Timed() as time_taken:
        results([started(lambda one=one: [world.run(one) for _ in range(10)]) for one in (f, g, f, g)])
    assert time_taken.is_enough_for(40, rate=100)


@pytest.mark.parametrize("per", ["key", ("region", "key"), lambda region, key: (region, key)])
def test_limits_are_told_apart_by_names_or_a_function(world, fake_clock, per):
    f = limited(world.define(lambda region, key: key), rate_limit="1/hour", per=per, total_timeout=5)
    assert [world.run(f, "eu", "a"), world.run(f, "eu", "b")] == ["a", "b"]
    with pytest.raises(CallTimeoutError):
        world.run(f, "eu", "a")
    if per != "key":
        assert world.run(f, "us", "a") == "a"


@pytest.mark.parametrize("seed", range(12))
def test_calls_of_several_limits_keep_them_use_them_and_all_get_their_turn(fake_clock, seed):
    generator = random.Random(seed)
    limiters = [
        RateLimiter(generator.choice([5, 10, 50]), max_burst=generator.choice([1, 3, 5])),
        RateLimiter(generator.choice([4, 20]), max_burst=generator.choice([1, 5])),
        RateLimiter("10/2 s", spread=False),
    ]
    needs = [(0,), *generator.sample([(1,), (2,), (0, 1), (1, 0), (0, 2), (2, 1), (0, 1, 2)], 3)]
    waiting, starts = [], []

    def ask(need):
        due = [0.0]
        turn = Turn([(limiters[place].limit, (1.0,)) for place in need])
        turn.notify(lambda: due.__setitem__(0, 0.0))
        waiting.append((turn, need, due))

    for need in needs * 3:
        ask(need)
    began = fake_clock.now()
    while fake_clock.now() < began + 12:
        for caller in list(waiting):
            turn, need, due = caller
            if fake_clock.now() < due[0]:
                continue
            if turn.poll():
                waiting.remove(caller)
                starts.append((fake_clock.now(), need))
                ask(need)
            else:
                due[0] = fake_clock.now() + turn.due_in()
        fake_clock.tick(0.005)
    for place, limiter in enumerate(limiters[:2]):
        moments = [moment for moment, need in starts if place in need]
        _, interval, burst = limiter.limit.ledger.rates.paces[0]
        assert worst_excess(moments, 1 / interval, burst) <= 1e-6 if moments else True
    moments = [moment for moment, need in starts if 2 in need]
    assert all(later - first >= 2 - 1e-6 for first, later in zip(moments, moments[10:], strict=False))
    assert sum(0 in need for _, need in starts) >= 0.85 * 12 * limiters[0].rate
    assert {need for _, need in starts} == set(needs)
