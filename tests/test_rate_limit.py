"""The rate limit: how many calls start in any time, in which order, whoever makes them and whatever becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import random
import signal
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from side_by_side import SECONDS, forked, results, started, until

import opero
from opero.core import CallTimeoutError, RateLimiter, get_rate_limit_decorator
from opero.core.limits.line import ONE, Turn
from opero.core.steps import Consult, consult


def limited(function, **options):
    return opero.opero(retries=0, **options)(function)


async def settle():
    """Let every task run until it waits for something."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
def joined():
    """Puts so many tickets in a limiter's line; those that are still in it at the end leave."""
    made = []

    def join(limiter, count):
        tickets = [ticket_of(limiter) for _ in range(count)]
        assert polled(tickets) == 0
        made.extend(tickets)
        return tickets

    yield join
    for ticket in made:
        ticket.leave()


def ticket_of(limiter):
    """One who waits for a slot of a limiter, and looks when it is told to."""
    return Turn([(limiter.limit, ONE)])


def polled(tickets) -> int:
    """How many of them have their slot, looked at in order."""
    return sum([ticket.poll() for ticket in tickets])


def worst_excess(starts, rate, burst) -> float:
    """By how much the fullest window has more starts than ``rate * T + burst``."""
    excess = lowest = -math.inf
    for number, start in enumerate(starts):
        due = number - rate * (start - starts[0])
        lowest = max(lowest, -due)
        excess = max(excess, due + lowest + 1 - burst)
    return excess


# Arithmetic


def test_the_first_slot_is_free(fake_clock):
    assert RateLimiter(4).take_now()


def test_the_next_slot_comes_after_one_interval(fake_clock):
    limiter = RateLimiter(4)
    limiter.take_now()
    fake_clock.tick(0.24)
    assert not limiter.take_now()
    fake_clock.tick(0.01)
    assert limiter.take_now()


@pytest.mark.parametrize(("rate", "interval"), [(0.5, 2), (1, 1), (100, 0.01), ("30/minute", 2), ("1/day", 86_400)])
def test_the_interval_is_the_inverse_of_the_rate(fake_clock, rate, interval):
    limiter = RateLimiter(rate)
    limiter.take_now()
    fake_clock.tick(interval * 0.999)
    assert not limiter.take_now()
    fake_clock.tick(interval * 0.002)
    assert limiter.take_now()


def test_idle_time_is_not_saved_up(fake_clock):
    limiter = RateLimiter(4)
    limiter.take_now()
    fake_clock.tick(1000)
    assert [limiter.take_now() for _ in range(5)] == [True, False, False, False, False]


def test_a_ticket_takes_a_free_slot_at_once(fake_clock):
    assert ticket_of(RateLimiter(4)).poll()


def test_a_ticket_that_has_its_slot_keeps_it(fake_clock):
    limiter = RateLimiter(4)
    ticket = ticket_of(limiter)
    assert [ticket.poll(), ticket.poll()] == [True, True]
    fake_clock.tick(0.25)
    assert limiter.take_now()


def test_a_ticket_waits_for_its_slot(fake_clock, joined):
    limiter = RateLimiter(4)
    limiter.take_now()
    [ticket] = joined(limiter, 1)
    fake_clock.tick(0.24)
    assert not ticket.poll()
    fake_clock.tick(0.01)
    assert ticket.poll()


def test_a_ticket_tells_when_its_slot_is_due(fake_clock, joined):
    limiter = RateLimiter(4)
    limiter.take_now()
    fake_clock.tick(0.1)
    [ticket] = joined(limiter, 1)
    assert ticket.due_in() == pytest.approx(0.15)


def test_slots_are_granted_in_the_order_of_asking(fake_clock, joined):
    limiter = RateLimiter(4)
    limiter.take_now()
    tickets = joined(limiter, 5)
    for served in range(1, 6):
        fake_clock.tick(0.25)
        assert [ticket.poll() for ticket in reversed(tickets)] == [False] * (5 - served) + [True] * served


def test_nobody_gets_past_those_who_wait(fake_clock, joined):
    limiter = RateLimiter(4)
    limiter.take_now()
    first, second = joined(limiter, 2)
    fake_clock.tick(0.25)
    assert not limiter.take_now()
    assert first.poll()
    fake_clock.tick(0.25)
    assert not limiter.take_now()
    assert second.poll()


def test_who_is_granted_a_slot_by_anothers_look_is_woken(fake_clock, joined):
    limiter = RateLimiter(4)
    limiter.take_now()
    [ticket] = joined(limiter, 1)
    woken = threading.Event()
    ticket.notify(woken.set)
    fake_clock.tick(0.25)
    joined(limiter, 1)
    assert woken.is_set()


@pytest.mark.parametrize("gone", ["served", "left"])
def test_who_becomes_the_first_in_line_is_woken(fake_clock, joined, gone):
    limiter = RateLimiter(4)
    limiter.take_now()
    first, second = joined(limiter, 2)
    woken = threading.Event()
    second.notify(woken.set)
    if gone == "served":
        fake_clock.tick(0.25)
        assert first.poll()
    else:
        first.leave()
    assert woken.is_set()


def test_who_is_further_back_looks_later_than_the_first_but_does_look(fake_clock, joined):
    limiter = RateLimiter(4)
    limiter.take_now()
    tickets = joined(limiter, 3)
    looks = [ticket.due_in() for ticket in tickets]
    assert looks == sorted(looks)
    assert 0.25 <= looks[2] < 1


def test_thousands_look_seldom(fake_clock, joined):
    limiter = RateLimiter(50)
    limiter.take_now()
    looks = sum(1 / ticket.due_in() for ticket in joined(limiter, 5000))
    assert looks < 2500  # in a second


def test_after_the_last_in_line_the_next_slot_still_has_to_come(fake_clock, joined):
    limiter = RateLimiter(4)
    limiter.take_now()
    [last] = joined(limiter, 1)
    fake_clock.tick(0.25)
    assert last.poll()
    assert not limiter.take_now()
    fake_clock.tick(0.24)
    assert not limiter.take_now()
    fake_clock.tick(0.01)
    assert limiter.take_now()


def test_steady_demand_is_served_at_the_full_rate(fake_clock, joined):
    limiter = RateLimiter(50)
    limiter.take_now()
    tickets = joined(limiter, 100)
    for _ in range(200):
        fake_clock.tick(0.01)
        polled(tickets)
    assert polled(tickets) >= 98


# The process is stopped


@pytest.mark.parametrize("max_burst", [1, 2, 5, 20])
def test_after_a_stop_only_max_burst_start_at_once(fake_clock, max_burst, joined):
    limiter = RateLimiter(50, max_burst=max_burst)
    limiter.take_now()
    tickets = joined(limiter, 100)
    fake_clock.tick(2)
    assert polled(tickets) == max_burst
    assert polled(tickets) == max_burst
    assert not limiter.take_now()


def test_after_a_stop_the_rest_starts_at_the_rate(fake_clock, joined):
    limiter = RateLimiter(50, max_burst=5)
    limiter.take_now()
    tickets = joined(limiter, 100)
    fake_clock.tick(2)
    polled(tickets)
    fake_clock.tick(0.2)
    assert polled(tickets) <= 5 + 10 + 5


@pytest.mark.parametrize(("rate", "max_burst"), [(0.5, 5), (50, 5), (125, 5), (126, 6), (10_000, 400)])
def test_forty_milliseconds_worth_but_at_least_five_are_made_up_by_default(fake_clock, rate, max_burst, joined):
    limiter = RateLimiter(rate)
    limiter.take_now()
    tickets = joined(limiter, 500)
    fake_clock.tick(1000)
    assert polled(tickets) == max_burst


def test_who_comes_again_and_again_and_looks_late_loses_no_slot(fake_clock):
    limiter = RateLimiter(10_000)
    starts, begin = 0, fake_clock.now()
    while fake_clock.now() < begin + 1:
        if not limiter.take_now():
            # The slot comes before it has joined the line.
            fake_clock.tick(12e-6)
            ticket = ticket_of(limiter)
            while not ticket.poll():
                fake_clock.tick(ticket.due_in() + 80e-6)
        starts += 1
        fake_clock.tick(12e-6)
    assert starts >= 0.999 * 10_000


def test_those_who_look_late_do_not_start_all_at_once(fake_clock, joined):
    limiter = RateLimiter(50, max_burst=5)
    limiter.take_now()
    stuck = joined(limiter, 100)
    # Somebody else, in another thread, looks all the time and cannot get past them.
    for _ in range(200):
        fake_clock.tick(0.01)
        assert not limiter.take_now()
    assert polled(stuck) <= 5


def test_a_blocked_event_loop_does_not_start_all_its_tasks_at_once(fake_clock):
    starts = []

    @opero.opero(retries=0, rate_limit=50, rate_limit_options={"max_burst": 5})
    async def f():
        starts.append(fake_clock.now())

    async def main():
        tasks = [asyncio.create_task(f()) for _ in range(101)]
        await settle()
        for _ in range(200):
            fake_clock.tick(0.01)
            f.__opero__.plan.limit.limiter.take_now()
        await settle()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert len(starts) <= 1 + 5


@pytest.mark.parametrize("latest", [math.inf, 1e9], ids=["patient", "in time"])
def test_who_comes_does_not_look_at_all_who_wait_before(fake_clock, latest):
    """Thousands of tasks begin in one pass of their event loop, in which those that wait cannot look."""

    def steps(count):
        limiter = RateLimiter(50)
        tickets = [Turn([(limiter.limit, ONE)], lambda: latest) for _ in range(count)]
        seen = [0]

        def count_step(_frame, _kind, _argument):
            seen[0] += 1

        sys.setprofile(count_step)
        try:
            for ticket in tickets:
                fake_clock.tick(0.01)
                ticket.poll()
        finally:
            sys.setprofile(None)
        for ticket in tickets:
            ticket.leave()
        return seen[0]

    assert steps(1000) < 3 * steps(500)


def test_who_comes_passes_nobody_however_long_those_before_cannot_look(fake_clock):
    """Thousands of tasks begin in one pass of their event loop, which takes a second."""
    limiter = RateLimiter(50)
    limiter.take_now()
    tickets = [ticket_of(limiter) for _ in range(1000)]
    for ticket in tickets:
        assert not ticket.poll()
        fake_clock.tick(0.001)
    # As many as a burst makes up for.
    assert [ticket.poll() for ticket in tickets[:7]] == 5 * [True] + 2 * [False]
    for ticket in tickets:
        ticket.leave()


def test_who_looks_again_before_it_had_to_passes_nobody(fake_clock, joined):
    """A driver looks once more before it waits; between the two the garbage collector may take half a second."""
    limiter = RateLimiter(50)
    limiter.take_now()
    first, *_ = joined(limiter, 40)
    fake_clock.tick(0.1)
    [last] = joined(limiter, 1)
    fake_clock.tick(0.5)
    assert not last.poll()
    assert first.poll()


# Waiters give up


def test_a_waiter_that_leaves_gives_its_place_back(fake_clock, joined):
    limiter = RateLimiter(4)
    limiter.take_now()
    first, second = joined(limiter, 2)
    first.leave()
    fake_clock.tick(0.25)
    assert second.poll()


def test_a_waiter_that_leaves_when_its_slot_came_gives_it_to_the_next(fake_clock, joined):
    limiter = RateLimiter(4)
    limiter.take_now()
    first, second, third = joined(limiter, 3)
    fake_clock.tick(0.25)
    assert not third.poll()  # this look grants the slot to the first, which does not take it
    first.leave()
    assert [second.poll(), third.poll()] == [True, False]


def test_the_only_waiter_that_leaves_when_its_slot_came_gives_it_to_whoever_comes(fake_clock, joined):
    limiter = RateLimiter(4)
    limiter.take_now()
    [ticket] = joined(limiter, 1)
    fake_clock.tick(0.25)
    assert not limiter.take_now()
    ticket.leave()
    assert [limiter.take_now(), limiter.take_now()] == [True, False]


def test_a_waiter_that_has_started_has_nothing_to_give_back(fake_clock, joined):
    limiter = RateLimiter(4)
    limiter.take_now()
    [ticket] = joined(limiter, 1)
    fake_clock.tick(0.25)
    assert ticket.poll()
    ticket.leave()
    assert not limiter.take_now()


def test_leaving_twice_gives_one_place_back(fake_clock, joined):
    limiter = RateLimiter(4)
    limiter.take_now()
    first, second, third = joined(limiter, 3)
    fake_clock.tick(0.25)
    limiter.take_now()
    first.leave()
    first.leave()
    assert [second.poll(), third.poll()] == [True, False]


def test_after_a_hundred_that_left_the_next_waits_for_one_slot(fake_clock, joined):
    limiter = RateLimiter(20)
    limiter.take_now()
    for ticket in joined(limiter, 100):
        ticket.leave()
    [next_one] = joined(limiter, 1)
    fake_clock.tick(0.051)
    assert next_one.poll()


def test_waiters_in_the_middle_that_left_do_not_hold_up_those_behind(fake_clock, joined):
    limiter = RateLimiter(20)
    limiter.take_now()
    first, *gone, last = joined(limiter, 100)
    for ticket in gone:
        ticket.leave()
    fake_clock.tick(0.051)
    assert first.poll()
    fake_clock.tick(0.051)
    assert last.poll()


def test_a_slot_that_was_given_back_long_ago_is_one_slot(fake_clock, joined):
    limiter = RateLimiter(4, max_burst=1)
    limiter.take_now()
    [ticket] = joined(limiter, 1)
    fake_clock.tick(0.25)
    limiter.take_now()
    ticket.leave()
    fake_clock.tick(100)
    assert [limiter.take_now(), limiter.take_now()] == [True, False]


def test_slots_that_were_given_back_do_not_add_up(fake_clock, joined):
    limiter = RateLimiter(4, max_burst=1)
    limiter.take_now()
    tickets = joined(limiter, 10)
    for _ in range(10):
        fake_clock.tick(0.25)
        limiter.take_now()
    for ticket in tickets:
        ticket.leave()
    assert sum(limiter.take_now() for _ in range(20)) <= 1


def test_the_slot_after_one_that_left_still_has_to_come(fake_clock, joined):
    limiter = RateLimiter(1, max_burst=1)
    limiter.take_now()
    first, second = joined(limiter, 2)
    fake_clock.tick(1)
    assert [first.poll(), second.poll()] == [True, False]
    second.leave()
    fake_clock.tick(0.2)
    assert not limiter.take_now()


# Any sequence of events

RATES_AND_BURSTS = [(1, 1), (1, 2), (1, 5), (4, 1), (4, 3), (50, 5)]
PAUSES = [0.0, 0.1, 0.25, 0.5, 0.9, 1.0, 1.1, 1.5, 2.0, 2.9, 10.0]  # intervals
pauses = st.tuples(st.just("pause"), st.sampled_from(PAUSES))
arrivals = st.one_of(
    st.tuples(st.just("arrive"), st.integers(1, 5)),
    st.tuples(st.just("attempt"), st.integers(1, 5)),
)
looks = st.tuples(st.just("look"), st.integers(0, 9))
leavings = st.tuples(st.just("leave"), st.integers(0, 9))


class Story:
    """A limiter, those who wait for it, and the times of all starts."""

    def __init__(self, fake_clock, rate, burst, *, all_look, last_first=False):
        self.clock = fake_clock
        self.rate = rate
        self.burst = burst
        self.limiter = RateLimiter(rate, max_burst=burst)
        self.all_look = all_look
        self.last_first = last_first
        self.waiting: dict[int, object] = {}
        self.arrived = 0
        self.starts: list[float] = []

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        for ticket in self.waiting.values():
            ticket.leave()

    def play(self, events):
        for what, value in events:
            getattr(self, what)(value)
            if self.all_look:
                self.look_all()

    def pause(self, intervals):
        self.clock.tick(intervals / self.rate)

    def pass_time(self, steps):
        """A pause in which all look in time."""
        for _ in range(steps):
            self.pause(0.05)
            self.look_all()

    def arrive(self, count):
        for _ in range(count):
            self.waiting[self.arrived] = ticket_of(self.limiter)
            self._look(self.arrived)
            self.arrived += 1

    def attempt(self, count):
        for _ in range(count):
            if self.limiter.take_now():
                assert not (self.all_look and self.waiting), "somebody got past those who wait"
                self.starts.append(self.clock.now())

    def look(self, value):
        if self.waiting:
            self._look(list(self.waiting)[value % len(self.waiting)])

    def leave(self, value):
        if self.waiting:
            self.waiting.pop(list(self.waiting)[value % len(self.waiting)]).leave()

    def look_all(self):
        before = set(self.waiting)
        for number in sorted(before, reverse=self.last_first):
            self._look(number)
        started = before - set(self.waiting)
        assert not started or not self.waiting or max(started) < min(self.waiting), "somebody got past those who wait"

    def _look(self, number):
        if self.waiting[number].poll():
            del self.waiting[number]
            self.starts.append(self.clock.now())

    @property
    def excess(self):
        return worst_excess(self.starts, self.rate, self.burst)


thoroughly = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@thoroughly
@given(st.sampled_from(RATES_AND_BURSTS), st.lists(st.one_of(pauses, arrivals), max_size=30))
@example((1, 1), [("arrive", 3), ("pause", 2.9), ("pause", 0.1)])
def test_no_window_has_too_many_starts(fake_clock, rate_and_burst, events):
    with Story(fake_clock, *rate_and_burst, all_look=True) as story:
        story.play(events)
        assert story.excess <= 1e-6


@thoroughly
@given(st.sampled_from(RATES_AND_BURSTS), st.lists(st.one_of(pauses, arrivals, leavings), max_size=30))
@example((1, 1), [("arrive", 3), ("pause", 1.0), ("leave", 0), ("pause", 0.1), ("attempt", 1)])
def test_no_window_has_too_many_starts_when_waiters_leave(fake_clock, rate_and_burst, events):
    with Story(fake_clock, *rate_and_burst, all_look=True) as story:
        story.play(events)
        assert story.excess <= 1e-6


@thoroughly
@given(st.sampled_from(RATES_AND_BURSTS), st.lists(st.one_of(pauses, arrivals, looks, leavings), max_size=30))
@example((1, 1), [("arrive", 3), *[("pause", 1.0), ("attempt", 1)] * 2])
def test_no_window_has_too_many_starts_when_waiters_look_late(fake_clock, rate_and_burst, events):
    with Story(fake_clock, *rate_and_burst, all_look=False) as story:
        story.play([*events, *[("look", 0)] * 40])
        assert story.excess <= 1e-6


@thoroughly
@given(st.sampled_from(RATES_AND_BURSTS), st.lists(st.one_of(pauses, arrivals, leavings), max_size=30))
@example((1, 1), [("arrive", 4), ("pause", 1.1), ("pause", 0.9), ("pause", 1.0)])
@example((50, 5), [("arrive", 7), ("pause", 10.0)])
def test_waiters_start_in_the_order_of_asking_whoever_looks_first(fake_clock, rate_and_burst, events):
    with Story(fake_clock, *rate_and_burst, all_look=True, last_first=True) as story:
        story.play(events)


@thoroughly
@given(st.sampled_from(RATES_AND_BURSTS), st.lists(st.one_of(pauses, arrivals, looks, leavings), max_size=30))
def test_each_interval_serves_one_who_waits(fake_clock, rate_and_burst, events):
    with Story(fake_clock, *rate_and_burst, all_look=False) as story:
        story.play(events)
        for _ in range(len(story.waiting) + 1):
            story.pause(1.001)
            story.look_all()
        assert story.waiting == {}


@thoroughly
@given(
    st.sampled_from([(rate, burst) for rate, burst in RATES_AND_BURSTS if burst > 1]),
    st.lists(st.one_of(st.tuples(st.just("pass_time"), st.integers(1, 40)), arrivals, leavings), max_size=30),
)
def test_the_wait_of_the_next_is_foretold_within_one_interval(fake_clock, rate_and_burst, events):
    with Story(fake_clock, *rate_and_burst, all_look=True) as story:
        story.play(events)
        foretold, now = story.limiter.limit.expected_wait(), fake_clock.now()
        ticket = ticket_of(story.limiter)
        while not ticket.poll():
            story.pass_time(1)
        assert fake_clock.now() - now == pytest.approx(foretold, abs=1.05 / story.rate)


def test_threads_that_ask_at_one_moment_share_one_slot(fake_clock):
    limiter = RateLimiter(1)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            fake_clock.tick(1)
            barrier = threading.Barrier(8)

            def ask(barrier=barrier):
                barrier.wait(SECONDS)
                return sum(limiter.take_now() for _ in range(50))

            assert sum(results([started(ask) for _ in range(8)])) == 1
    finally:
        sys.setswitchinterval(before)


# Real callers; the times are lower bounds, which a slow machine cannot break

RATE = 50
ONE_AT_A_TIME = {"rate_limit": RATE, "rate_limit_options": {"max_burst": 1}}


class Timed:
    """Seconds since it was entered."""

    def __enter__(self):
        self.begin = time.monotonic()
        return self

    def __exit__(self, *_exc):
        self.seconds = time.monotonic() - self.begin

    def is_enough_for(self, calls, *, rate=RATE, burst=1):
        return self.seconds >= (calls - burst) / rate


def test_threads_share_one_limit(world):
    f = limited(world.define(lambda: None), **ONE_AT_A_TIME)
    with Timed() as time_taken:
        results([started(lambda: [world.run(f) for _ in range(4)]) for _ in range(4)])
    assert time_taken.is_enough_for(16)


def test_tasks_share_one_limit():
    f = limited(asyncio.sleep, **ONE_AT_A_TIME)

    async def main():
        await asyncio.gather(*[f(0) for _ in range(16)])

    with Timed() as time_taken:
        asyncio.run(main())
    assert time_taken.is_enough_for(16)


def order_of_tasks(limiter, count):
    """In which order so many tasks start that ask one after the other."""
    order = []

    async def start(number):
        await limiter.acquire_async()
        order.append(number)

    async def main():
        await asyncio.gather(*[start(number) for number in range(count)])

    started(asyncio.run, main()).result(SECONDS)
    return order


def test_tasks_start_in_the_order_of_asking():
    # In a loop that stalls for longer than an interval two neighbours may swap.
    assert order_of_tasks(RateLimiter(50, max_burst=1), 20) == list(range(20))


def test_two_event_loops_in_two_threads_share_one_limit():
    f = limited(asyncio.sleep, **ONE_AT_A_TIME)

    async def main():
        await asyncio.gather(*[f(0) for _ in range(8)])

    with Timed() as time_taken:
        results([started(asyncio.run, main()) for _ in range(2)])
    assert time_taken.is_enough_for(16)


def test_one_event_loop_after_another_shares_one_limit():
    f = limited(asyncio.sleep, **ONE_AT_A_TIME)

    async def main():
        await asyncio.gather(*[f(0) for _ in range(5)])

    with Timed() as time_taken:
        for _ in range(3):
            started(asyncio.run, main()).result(SECONDS)
    assert time_taken.is_enough_for(15)


def test_an_event_loop_that_ended_with_waiters_does_not_stop_the_next():
    f = limited(asyncio.sleep, **ONE_AT_A_TIME)

    async def leave():
        tasks = [asyncio.create_task(f(0)) for _ in range(1000)]
        await settle()
        return tasks

    async def come():
        await asyncio.gather(*[f(0) for _ in range(3)])

    asyncio.run(leave())
    with Timed() as time_taken:
        started(asyncio.run, come()).result(SECONDS)
    assert time_taken.seconds < 5


def test_an_event_loop_closed_over_its_waiters_does_not_stop_the_next():
    f = limited(asyncio.sleep, **ONE_AT_A_TIME)
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(f(0)) for _ in range(3)]
    loop.run_until_complete(settle())
    loop.close()

    async def come():
        await asyncio.gather(*[f(0) for _ in range(3)])

    started(asyncio.run, come()).result(SECONDS)
    for task in tasks:
        task._log_destroy_pending = False


def test_a_fast_limit_is_shared_by_threads(world):
    f = limited(world.define(lambda: None), rate_limit=500, rate_limit_options={"max_burst": 5})
    with Timed() as time_taken:
        results([started(lambda: [world.run(f) for _ in range(12)]) for _ in range(8)])
    assert time_taken.is_enough_for(96, rate=500, burst=5)


def test_instances_share_one_limit(world):
    class Owner:
        method = limited(world.define(lambda self: None), **ONE_AT_A_TIME)

    with Timed() as time_taken:
        for _ in range(5):
            world.run(Owner().method)
    assert time_taken.is_enough_for(5)


def test_functions_have_limits_of_their_own(world, fake_clock):
    decorate = get_rate_limit_decorator("1/hour")
    f, g = decorate(world.define(lambda: "f")), decorate(world.define(lambda: "g"))
    assert [world.run(f), world.run(g)] == ["f", "g"]


def test_the_limiter_alone_lets_threads_and_tasks_through_at_its_rate():
    limiter = RateLimiter(RATE, max_burst=1)

    def blocking():
        for _ in range(4):
            limiter.acquire()

    async def main():
        await asyncio.gather(*[limiter.acquire_async() for _ in range(4)])

    with Timed() as time_taken:
        results([*[started(blocking) for _ in range(2)], *[started(asyncio.run, main()) for _ in range(2)]])
    assert time_taken.is_enough_for(16)


def test_a_blocking_call_in_a_running_event_loop_waits_behind_its_tasks():
    limiter = RateLimiter(RATE, max_burst=1)

    async def main():
        tasks = [asyncio.create_task(limiter.acquire_async()) for _ in range(4)]
        await settle()
        limiter.acquire()
        await asyncio.gather(*tasks)

    with Timed() as time_taken:
        started(asyncio.run, main()).result(SECONDS)
    assert time_taken.is_enough_for(5)


def test_waiting_tasks_leave_the_event_loop_free():
    limiter = RateLimiter("1/hour")

    async def main():
        limiter.take_now()
        task = asyncio.create_task(limiter.acquire_async())
        async with asyncio.timeout(SECONDS):
            await asyncio.sleep(0.01)
        task.cancel()
        return await asyncio.gather(task, return_exceptions=True)

    [outcome] = asyncio.run(main())
    assert isinstance(outcome, asyncio.CancelledError)


# Cancelled callers


def test_a_cancelled_task_gives_its_place_back(fake_clock):
    limiter = RateLimiter(4)

    async def main():
        limiter.take_now()
        first, second = [asyncio.create_task(limiter.acquire_async()) for _ in range(2)]
        await settle()
        first.cancel()
        await settle()
        fake_clock.tick(0.25)
        await asyncio.wait_for(second, SECONDS)
        return first.cancelled()

    assert asyncio.run(main())


def test_a_task_that_is_cancelled_in_the_moment_of_the_grant_gives_its_slot_to_the_next(fake_clock):
    limiter = RateLimiter(4)

    async def main():
        limiter.take_now()
        first, second = [asyncio.create_task(limiter.acquire_async()) for _ in range(2)]
        await settle()
        fake_clock.tick(0.25)
        assert not limiter.take_now()  # grants the slot to the first, which has not run yet
        first.cancel()
        await asyncio.wait_for(second, SECONDS)
        return first.cancelled(), limiter.take_now()

    assert asyncio.run(main()) == (True, False)


def test_a_task_that_is_cancelled_in_the_moment_of_the_grant_gives_its_slot_to_whoever_comes(fake_clock):
    limiter = RateLimiter(4)

    async def main():
        limiter.take_now()
        task = asyncio.create_task(limiter.acquire_async())
        await settle()
        fake_clock.tick(0.25)
        assert not limiter.take_now()
        task.cancel()
        await settle()
        return task.cancelled(), limiter.take_now(), limiter.take_now()

    assert asyncio.run(main()) == (True, True, False)


def test_a_cancelled_call_does_not_run_the_function(fake_clock):
    runs = []

    @opero.opero(retries=0, rate_limit="1/hour")
    async def f():
        runs.append(1)

    async def main():
        await f()
        task = asyncio.create_task(f())
        await settle()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    assert runs == [1]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads on this system")
def test_a_blocking_caller_that_is_interrupted_gives_its_place_back(fake_clock):
    limiter = RateLimiter("1/hour")
    limiter.take_now()
    main_thread = threading.get_ident()
    raised = threading.Event()

    def interrupt():
        try:
            until(lambda: sys._current_frames()[main_thread].f_code is threading.Condition.wait.__code__)
            time.sleep(0.02)  # into the system's own wait
        finally:
            # A signal that comes just before that wait is noticed with the next one only.
            until(lambda: raised.is_set() or signal.pthread_kill(main_thread, signal.SIGUSR1))

    def raise_interrupt(_number, _frame):
        if not raised.is_set():
            raised.set()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, raise_interrupt)
    try:
        interrupter = started(interrupt)
        with pytest.raises(KeyboardInterrupt):
            limiter.acquire()
        interrupter.result(SECONDS)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert limiter.limit.expected_wait() == pytest.approx(3600)
    fake_clock.tick(3600)
    assert limiter.take_now()


def test_tasks_cancelled_at_random_do_not_stop_the_others():
    async def main():
        limiter = RateLimiter(500)
        tasks = [asyncio.create_task(limiter.acquire_async()) for _ in range(90)]
        for number, task in enumerate(tasks):
            if number % 3:
                asyncio.get_running_loop().call_later(number * 0.001, task.cancel)
        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*tasks[::3])

    asyncio.run(main())


# What takes a slot; there is one an hour, and a call that would have to wait for it fails

SCARCE = {"rate_limit": "1/hour", "total_timeout": 60}


def test_a_call_takes_a_slot(world, fake_clock):
    f = limited(world.define(lambda: "result"), **SCARCE)
    assert world.run(f) == "result"
    with pytest.raises(CallTimeoutError):
        world.run(f)


def test_a_cache_hit_takes_no_slot(world, fake_clock):
    f = limited(world.define(lambda x: [x]), cache=True, **SCARCE)
    assert [world.run(f, 1) for _ in range(10)] == [[1]] * 10
    fake_clock.tick(3600)
    assert world.run(f, 2) == [2]


def test_one_who_waits_for_the_same_run_takes_no_slot(world, fake_clock):
    began, release = threading.Event(), threading.Event()

    def function():
        began.set()
        assert release.wait(SECONDS)
        return "result"

    f = limited(world.define(function), cache=True, **SCARCE)
    calls = [started(world.run, f)]
    assert began.wait(SECONDS)
    calls.append(started(world.run, f))
    until(lambda: any(flight.seats for flight in f.__opero__.plan.cache.store.flights._under_way.values()))
    release.set()
    assert results(calls) == ["result"] * 2


def test_each_retry_takes_a_slot(world):
    runs = []
    options = {"retries": 4, "min_delay": 0, "max_delay": 0, **ONE_AT_A_TIME}
    f = opero.opero(**options)(world.define(lambda: runs.append(1) or 1 / 0))
    with Timed() as time_taken, pytest.raises(ZeroDivisionError):
        world.run(f)
    assert len(runs) == 5
    assert time_taken.is_enough_for(5)


def test_a_retry_that_would_wait_too_long_for_its_slot_is_not_made(world, fake_clock):
    runs = []
    f = opero.opero(retries=3, **SCARCE)(world.define(lambda: runs.append(1) or 1 / 0))
    with pytest.raises(ZeroDivisionError):
        world.run(f)
    assert len(runs) == 1


def test_each_candidate_takes_a_slot(world):
    tried = []

    def function(server):
        tried.append(server)
        raise ValueError(server)

    f = limited(world.define(function), arg_fallback="server", **ONE_AT_A_TIME)
    with Timed() as time_taken, pytest.raises(opero.AllFailedError):
        world.run(f, [1, 2, 3, 4])
    assert tried == [1, 2, 3, 4]
    assert time_taken.is_enough_for(4)


def test_a_failed_call_has_taken_its_slot(world, fake_clock):
    f = limited(world.define(lambda: 1 / 0), **SCARCE)
    with pytest.raises(ZeroDivisionError):
        world.run(f)
    with pytest.raises(CallTimeoutError):
        world.run(f)


# Time limits


def test_a_wait_that_would_pass_total_timeout_fails_at_once(world, fake_clock):
    runs = []
    f = limited(world.define(lambda: runs.append(1)), **SCARCE)
    world.run(f)
    before = fake_clock.now()
    with pytest.raises(CallTimeoutError, match=r"lambda.*total_timeout=60"):
        world.run(f)
    assert fake_clock.now() == before
    assert runs == [1]


def test_a_call_that_did_not_get_its_slot_is_a_timeout_and_an_opero_error(world, fake_clock):
    f = limited(world.define(lambda: None), **SCARCE)
    world.run(f)
    with pytest.raises(TimeoutError) as caught:
        world.run(f)
    assert isinstance(caught.value, opero.OperoError)
    assert f.stats.failures == 1


def test_a_call_that_gave_up_takes_no_place(world, fake_clock):
    f = limited(world.define(lambda: "result"), rate_limit=0.01, total_timeout=90)
    world.run(f)
    for _ in range(5):
        with pytest.raises(CallTimeoutError):
            world.run(f)
    fake_clock.tick(100)
    assert world.run(f) == "result"


def test_a_wait_that_ends_before_total_timeout_is_waited_for(world):
    f = limited(world.define(lambda: "result"), total_timeout=SECONDS, **ONE_AT_A_TIME)
    with Timed() as time_taken:
        assert [world.run(f) for _ in range(3)] == ["result"] * 3
    assert time_taken.is_enough_for(3)


def test_those_in_line_count_for_the_wait(fake_clock, joined):
    limiter = RateLimiter(1)
    limiter.take_now()
    joined(limiter, 5)
    assert limiter.limit.expected_wait() == pytest.approx(6)


def test_those_who_left_do_not_count_for_the_wait(fake_clock, joined):
    limiter = RateLimiter(1)
    limiter.take_now()
    _first, *gone = joined(limiter, 100)
    for ticket in gone:
        ticket.leave()
    assert limiter.limit.expected_wait() == pytest.approx(2)


def test_a_free_slot_has_no_wait(fake_clock):
    limiter = RateLimiter(1)
    assert limiter.limit.expected_wait() == 0
    limiter.take_now()
    fake_clock.tick(5)
    assert limiter.limit.expected_wait() == 0


# Statistics


def test_stats_tell_the_seconds_waited(world):
    f = limited(world.define(lambda: None), **ONE_AT_A_TIME)
    with Timed() as time_taken:
        for _ in range(3):
            world.run(f)
    assert 0 < f.stats.waited <= time_taken.seconds


def test_stats_tell_no_wait_for_a_free_slot(world, fake_clock):
    f = limited(world.define(lambda: None), rate_limit=4)
    for _ in range(3):
        world.run(f)
        fake_clock.tick(0.25)
    assert f.stats.waited == 0


def test_stats_count_a_call_that_waited_once(world):
    f = limited(world.define(lambda: None), **ONE_AT_A_TIME)
    for _ in range(3):
        world.run(f)
    assert (f.stats.calls, f.stats.attempts, f.stats.failures) == (3, 3, 0)


# Forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
class TestForks:
    def test_a_child_is_limited_and_does_not_hang(self, world):
        f = limited(world.define(lambda: None), **ONE_AT_A_TIME)

        def child():
            with Timed() as time_taken:
                for _ in range(5):
                    world.run(f)
            return time_taken.is_enough_for(5)

        world.run(f)
        assert forked(child) == "True"

    def test_a_child_does_not_wait_behind_its_parents_waiters(self, world, fake_clock, joined):
        f = limited(world.define(lambda: "result"), rate_limit="1/hour")
        world.run(f)
        tickets = joined(f.__opero__.plan.limit.limiter, 5)
        assert forked(lambda: world.run(f)) == "'result'"
        fake_clock.tick(3600)
        assert [ticket.poll() for ticket in tickets] == [True, False, False, False, False]

    @pytest.mark.soak
    def test_a_child_forked_at_any_moment_does_not_hang(self):
        limiter = RateLimiter(10_000)
        stop = threading.Event()

        def busy():
            while not stop.is_set():
                limiter.acquire()

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        threads = [started(busy) for _ in range(4)]
        try:
            answers = [forked(lambda: [limiter.acquire() for _ in range(3)]) for _ in range(20)]
        finally:
            sys.setswitchinterval(before)
            stop.set()
        results(threads)
        assert answers == ["[True, True, True]"] * 20


# How a limit is written


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("100/minute", 100 / 60),
        ("5/s", 5),
        ("1000/day", 1000 / 86_400),
        ("5/second", 5),
        ("30/m", 0.5),
        ("36/h", 0.01),
        ("36/hour", 0.01),
        ("864/d", 0.01),
        ("0.5/s", 0.5),
        (" 100 / minute ", 100 / 60),
        (5, 5),
        (0.5, 0.5),
    ],
)
def test_a_rate_is_a_number_or_text(text, rate):
    assert RateLimiter(text).rate == pytest.approx(rate)


MAKERS = {
    "RateLimiter": RateLimiter,
    "get_rate_limit_decorator": get_rate_limit_decorator,
    "opero": lambda rate: opero.opero(rate_limit=rate)(lambda: None),
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def make(request):
    return request.param


@pytest.mark.parametrize(
    "rate", [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, 10**400, "0/s", "0.0/minute"], ids=str
)
def test_a_rate_that_limits_nothing_or_all_is_refused(make, rate):
    with pytest.raises(ValueError, match="rate"):
        make(rate)


@pytest.mark.parametrize(
    "rate", ["", "5", "fast", "5/", "/s", "5/fortnight", "-5/s", "5/s/s", "nan/s", "inf/s", "1e3/s"]
)
def test_text_that_cannot_be_read_is_refused(make, rate):
    with pytest.raises(ValueError, match=r"'100/minute'"):
        make(rate)


@pytest.mark.parametrize("rate", [True, False, 5j, b"5/s", {5}, object()], ids=repr)
def test_a_rate_of_another_type_is_refused(make, rate):
    with pytest.raises(TypeError, match="rate"):
        make(rate)


@pytest.mark.parametrize(
    ("max_burst", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("5", TypeError)]
)
def test_a_wrong_max_burst_is_refused(max_burst, error):
    with pytest.raises(error, match="max_burst"):
        RateLimiter(5, max_burst=max_burst)
    with pytest.raises(error, match="max_burst"):
        get_rate_limit_decorator(5, max_burst=max_burst)
    with pytest.raises(error, match="max_burst"):
        opero.opero(rate_limit=5, rate_limit_options={"max_burst": max_burst})(lambda: None)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match=r"'maxburst'.*'max_burst'"):
        get_rate_limit_decorator(5, maxburst=5)


def test_options_without_a_limit_are_refused():
    with pytest.raises(ValueError, match="rate_limit_options"):
        opero.opero(rate_limit_options={"max_burst": 5})(lambda: None)


# The decorator of this policy alone


def test_the_rate_limit_decorator_limits(world):
    f = get_rate_limit_decorator(RATE, max_burst=1)(world.define(lambda x: x))
    with Timed() as time_taken:
        assert [world.run(f, x) for x in range(5)] == [0, 1, 2, 3, 4]
    assert time_taken.is_enough_for(5)


def test_the_rate_limit_decorator_does_not_retry(world, fake_clock):
    runs = []
    f = get_rate_limit_decorator(5)(world.define(lambda: runs.append(1) or 1 / 0))
    with pytest.raises(ZeroDivisionError):
        world.run(f)
    assert len(runs) == 1


def test_the_rate_limit_decorator_does_not_cache(world, fake_clock):
    runs = []
    f = get_rate_limit_decorator(5)(world.define(lambda: runs.append(1)))
    world.run(f)
    fake_clock.tick(1)
    world.run(f)
    assert len(runs) == 2


# What once broke it


def test_a_new_rate_and_the_garbage_collector_leave_those_who_wait_in_line():
    limiter = RateLimiter(2)
    limiter.acquire()

    async def main():
        await asyncio.gather(*[limiter.acquire_async() for _ in range(5)])

    waiting = [*[started(limiter.acquire) for _ in range(5)], started(asyncio.run, main())]
    until(lambda: limiter.limit.expected_wait() > 4)
    limiter.rate = 200
    gc.collect()
    results(waiting)


def test_callers_go_on_in_the_thread_of_an_event_loop_that_was_closed_over_its_waiters():
    limiter = RateLimiter(50, max_burst=1)
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(limiter.acquire_async()) for _ in range(4)]
    loop.run_until_complete(settle())
    loop.close()
    assert [limiter.acquire(timeout=SECONDS) for _ in range(3)] == [True] * 3
    for task in tasks:
        task._log_destroy_pending = False


def test_waiters_that_cannot_look_hold_the_others_up_only_for_a_moment():
    limiter = RateLimiter(100, max_burst=1)
    release = threading.Event()

    async def busy():
        tasks = [asyncio.create_task(limiter.acquire_async()) for _ in range(30)]
        await settle()
        release.wait(SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    loop = started(asyncio.run, busy())
    until(lambda: limiter.limit.expected_wait() > 0.25)
    with Timed() as time_taken:
        for _ in range(50):
            limiter.acquire()
    release.set()
    loop.result(SECONDS)
    assert time_taken.seconds < 3


# Python cannot raise what interrupts a destructor or a hook of the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["plain", "waiting", "per value"])
@pytest.mark.usefixtures("no_garbage_of_others")
@pytest.mark.soak
def test_ctrl_c_at_any_moment_stops_nobody_else(how):
    limiter = RateLimiter(20_000 if how == "waiting" else 1e9, max_burst=1)
    call = (lambda: limiter.per_value.of("key").take_now()) if how == "per value" else limiter.acquire

    armed = True

    def interrupt(*_):
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    generator = random.Random(0)
    interrupted = 0
    end = time.monotonic() + 2
    try:
        # The last one may come when the time is over.
        with contextlib.suppress(KeyboardInterrupt):
            while interrupted < 1_500 and time.monotonic() < end:
                try:
                    signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-6, 2e-4))
                    # An interrupt that a destructor swallowed is not waited for.
                    next_one = time.monotonic() + 0.005
                    while time.monotonic() < next_one:
                        call()
                except KeyboardInterrupt:
                    interrupted += 1
                    assert asyncio._get_running_loop() is None
            armed = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 100
    results([started(lambda: [call() for _ in range(20)]) for _ in range(3)])
    assert asyncio.run(limiter.acquire_async(timeout=SECONDS))


def test_requests_go_together_to_what_they_are_for():
    class Store:
        def __init__(self, name):
            self.name = name
            self.asked = 0

        def answers(self, requests):
            self.asked += 1
            return [f"{self.name}{request}" for request in requests]

    a, b = Store("a"), Store("b")
    steps = [Consult(a.answers, 1), Consult(b.answers, 2), Consult(a.answers, 3), Consult(b.answers, 4)]
    assert consult(steps) == ["a1", "b2", "a3", "b4"]
    assert (a.asked, b.asked) == (1, 1)
