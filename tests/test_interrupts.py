"""Ctrl-C that comes again, and Ctrl-C at the worst moment."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import threading
import time

import pytest
from leftovers import surroundings
from side_by_side import until

from opero import opmap
from opero.concurrency.interrupts import held_back, let_through
from opero.concurrency.processes import Worker
from opero.concurrency.threads import ThreadPool

PATIENCE = 10.0


def press():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def handler_is_pythons_again():
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# In a loop of the map's own


def run(work):
    opmap(mode="async", workers=1, progress=False)(work).run([1])


@pytest.mark.parametrize("times", [1, 2, 5])
def test_ctrl_c_lets_what_is_cancelled_tidy_up_however_often_it_is_pressed(times):
    steps = []

    async def work(item):
        for _ in range(times):
            press()
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            for step in range(3):
                await asyncio.sleep(0)
                steps.append(step)

    with pytest.raises(KeyboardInterrupt) as raised:
        run(work)
    assert steps == [0, 1, 2]
    assert raised.value.__context__ is None


def test_ctrl_c_is_raised_though_the_function_goes_on_when_it_is_cancelled():
    async def work(item):
        press()
        try:
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            return item

    with pytest.raises(KeyboardInterrupt):
        run(work)


def test_ctrl_c_twice_breaks_into_a_function_that_blocks_the_loop():
    seen = []

    async def work(item):
        press()
        time.sleep(0.15)  # noqa: ASYNC251 - longer than a turn of the loop may take
        try:
            press()
        except KeyboardInterrupt:
            seen.append("broken")
            raise

    with pytest.raises(KeyboardInterrupt) as raised:
        run(work)
    assert seen == ["broken"]
    assert raised.value.__context__ is None


class Blocked:
    """Something that blocks a thread, while Ctrl-C is pressed until it is left."""

    def __init__(self):
        self._entered, self.left = threading.Event(), threading.Event()
        self.presses = 0

    def block(self):
        self._entered.set()
        self.left.wait(PATIENCE)

    def press_until_left(self):
        self._entered.wait(PATIENCE)
        while not self.left.wait(0.2):
            self.presses += 1
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.fixture
def blocked():
    before = surroundings()
    blocked = Blocked()
    presser = threading.Thread(target=blocked.press_until_left)
    presser.start()
    yield blocked
    blocked.left.set()
    presser.join()
    until(lambda: surroundings() == before)


def leave_at(presses, blocked, run):
    try:
        run()
    except KeyboardInterrupt:
        blocked.left.set()
        assert presses <= blocked.presses <= presses + 1  # one may be on its way
    else:
        pytest.fail("Ctrl-C was not heard")


def test_ctrl_c_again_leaves_the_threads_of_the_functions_own(blocked):
    async def work(item):
        await asyncio.to_thread(blocked.block)

    # The first cancels, the second is heard by a loop that closes, the third finds it still waiting.
    leave_at(3, blocked, lambda: run(work))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
def test_ctrl_c_twice_leaves_the_items_that_run_in_threads(blocked, keeps, is_async):
    def work(item):
        blocked.block()

    async def work_async(item):
        blocked.block()

    mapped = opmap(mode="thread", workers=1, progress=False)(work_async if is_async else work)

    def run_in_block():
        with mapped.pool() if keeps else contextlib.nullcontext():
            mapped.run([1])

    leave_at(2, blocked, run_in_block)


def test_an_error_while_ctrl_c_ends_a_map_is_shown_with_it():
    async def items():
        try:
            while True:
                press()
                await asyncio.sleep(PATIENCE)
                yield 1
        finally:
            raise LookupError

    @opmap(mode="async", workers=1, progress=False)
    async def work(item):
        return item

    with pytest.raises(KeyboardInterrupt) as raised:
        work.run(items())
    assert isinstance(raised.value.__context__, LookupError)


def test_ctrl_c_ends_a_map_whose_input_goes_on_when_it_is_cancelled():
    async def items():
        press()
        try:
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            yield 1

    @opmap(mode="async", workers=1, progress=False)
    async def work(item):
        return item

    with pytest.raises(KeyboardInterrupt) as raised:
        work.run(items())
    assert raised.value.__context__ is None


def test_a_handler_of_the_programs_own_hears_ctrl_c():
    heard = []

    async def work(item):
        press()

    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        run(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [1]


# While something is half made or half ended


def test_ctrl_c_that_is_held_back_is_heard_where_it_is_let_through():
    steps = []

    def go_on():
        with held_back(), held_back():
            press()
            steps.append("held back")
            with let_through():
                steps.append("never")

    with pytest.raises(KeyboardInterrupt):
        go_on()
    assert steps == ["held back"]


def test_ctrl_c_while_it_is_let_through_is_heard_at_once_and_once():
    steps = []

    def go_on():
        with held_back(), let_through():
            press()
            steps.append("never")

    with pytest.raises(KeyboardInterrupt) as raised:
        go_on()
    assert steps == []
    assert raised.value.__context__ is None


def die(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.parametrize("keeps", [False, True])
def test_ctrl_c_while_a_dead_worker_is_replaced_leaves_nothing_of_it(monkeypatch, keeps):
    mapped = opmap(mode="process", workers=2, retries=0, progress=False)(die)
    end = Worker.end

    def press_and_end(worker, *, in_peace):
        if not in_peace:
            monkeypatch.setattr(Worker, "end", end)
            press()
        end(worker, in_peace=in_peace)

    def interrupted():
        monkeypatch.setattr(Worker, "end", press_and_end)
        with pytest.raises(KeyboardInterrupt):
            mapped(itertools.count())

    mapped(range(3))
    before = surroundings()
    if keeps:
        with mapped.pool():
            interrupted()
            assert mapped(range(3)) == [0, 1, 2]
    else:
        interrupted()
    assert surroundings() == before


def test_ctrl_c_twice_while_a_map_ends_leaves_no_lock_taken(monkeypatch):
    before = surroundings()
    stop, stopped = ThreadPool.stop, []

    def press_and_stop(pool):
        press()
        stop(pool)
        stopped.append(pool)

    monkeypatch.setattr(ThreadPool, "stop", press_and_stop)

    @opmap(mode="thread", workers=2, progress=False)
    def work(item):
        if item == 5:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return item

    with pytest.raises(KeyboardInterrupt) as raised:
        work(itertools.count())
    assert raised.value.__context__ is None
    until(lambda: surroundings() == before)
