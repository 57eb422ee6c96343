"""More calls than the rate allows: slots go to calls that can still use them, and the rate is used."""

from __future__ import annotations

import random

import pytest

import opero
from opero.core.flow import call_flow
from opero.core.plan import Call
from opero.core.steps import Candidate, Failed, stopped

RATE, SECONDS, STEP = 50, 6.0, 0.004


class Simulation:
    """Calls that arrive at a steady pace, and a function whose executions take their time, by a fake clock."""

    def __init__(self, fake_clock, usual, **options):
        self.clock = fake_clock
        self.generator = random.Random(1)
        self.usual = usual

        @opero.opero(retries=0, total_timeout=1, rate_limit=RATE, **options)
        async def function():
            raise AssertionError

        self.plan = function.__opero__.plan
        self.circuit = opero.control(function).circuit if "breaker" in options else None
        self.waiting = []
        self.running = []
        self.begun = self.ended = self.cut = 0

    def run(self, load):
        begin = self.clock.now()
        arrived = 0
        while (now := self.clock.now()) < begin + SECONDS:
            while arrived < load * RATE * (now - begin):
                arrived += 1
                self.go_on(call_flow(self.plan, Call((), {})), None)
            for waiter in list(self.waiting):
                flow, arrival, due = waiter
                if now >= due[0] and arrival.poll():
                    self.waiting.remove(waiter)
                    self.go_on(flow, None)
                elif now >= due[0]:
                    due[0] = now + arrival.due_in()
            for ending in [each for each in self.running if each[0] <= now]:
                self.running.remove(ending)
                self.go_on(*ending[1:])
            self.clock.tick(STEP)
        for flow, *_ in self.waiting:
            flow.close()
        self.waiting.clear()

    def go_on(self, flow, sent):
        try:
            step = flow.send(sent)
        except StopIteration:
            return
        if not isinstance(step, Candidate):
            due = [0.0]
            step.notify(lambda: due.__setitem__(0, 0.0))
            self.waiting.append((flow, step, due))
            return
        self.begun += 1
        takes = self.usual * self.generator.uniform(0.8, 1.2)
        seconds, option = step.time_limit()
        if takes <= seconds:
            self.ended += 1
            self.running.append((self.clock.now() + takes, flow, "result"))
        else:
            self.cut += 1
            self.running.append((self.clock.now() + seconds, flow, Failed(stopped("f", seconds, option))))


@pytest.mark.parametrize("breaker", [{}, {"breaker": 5}], ids=["alone", "with breaker"])
@pytest.mark.parametrize("usual", [0.02, 0.3])
@pytest.mark.parametrize("load", [1.2, 2, 5])
def test_nearly_all_executions_end_in_time_and_the_rate_is_used(fake_clock, load, usual, breaker):
    simulation = Simulation(fake_clock, usual, **breaker)
    simulation.run(load)
    assert simulation.ended >= 0.95 * simulation.begun
    assert simulation.begun >= 0.98 * RATE * SECONDS
    assert simulation.circuit is None or simulation.circuit.state == "closed"


def test_the_estimate_follows_a_function_that_becomes_slower_and_faster_again(fake_clock):
    simulation = Simulation(fake_clock, 0.05)
    for usual in (0.05, 0.5, 0.05):
        simulation.usual = usual
        simulation.run(2)
        simulation.begun = simulation.ended = 0
        simulation.run(2)
        assert simulation.ended >= 0.95 * simulation.begun
        assert simulation.begun >= 0.98 * RATE * SECONDS


def test_a_slot_that_is_free_is_never_refused(fake_clock):
    simulation = Simulation(fake_clock, 0.05)
    simulation.plan.limit.learn(100)
    simulation.run(0.5)
    assert simulation.ended >= 0.98 * 0.5 * RATE * SECONDS


def test_a_service_that_hangs_is_held_against_it_all_the_same(fake_clock):
    simulation = Simulation(fake_clock, 5, breaker=5)
    simulation.run(0.5)
    assert simulation.circuit.state != "closed"


def test_calls_that_find_a_free_slot_at_once_tell_how_long_the_function_takes(world, fake_clock):
    f = opero.opero(retries=0, total_timeout=9, rate_limit=RATE)(world.define(lambda: fake_clock.tick(2)))
    for _ in range(3):
        world.run(f)
    usual = f.__opero__.plan.limit.usual
    assert 2 <= usual < 9
    for _ in range(30):
        world.run(f)
    assert f.__opero__.plan.limit.usual == pytest.approx(2.2, rel=0.01)
