"""Ctrl-C that comes again, and Ctrl-C at the worst moment."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from every_moment import EXECUTORS, OPERO, Presser
from leftovers import surroundings
from side_by_side import started, until

import opero
from opero import opmap
from opero.concurrency.interrupts import let_through
from opero.concurrency.processes import Worker
from opero.concurrency.threads import ThreadPool
from opero.concurrency.whole_pool import WholeThreads
from opero.core.interrupts import Hold

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


class BlockingExecutor(ThreadPoolExecutor):
    """Has no room, and Ctrl-C is pressed while it is waited for."""

    def submit(self, *args, **kwargs):
        threading.Timer(0.1, press).start()
        threading.Event().wait(PATIENCE)
        raise AssertionError("not interrupted")


def test_ctrl_c_once_breaks_into_an_executor_that_takes_long_to_take_work():
    with BlockingExecutor(1) as executor, pytest.raises(KeyboardInterrupt):
        opmap(mode=executor, progress=False)(echo)([1])


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
        with Hold(), Hold():
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
        with Hold(), let_through():
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


class PressingTerminal(io.StringIO):
    """A terminal at which Ctrl-C is pressed when something is written the n-th time."""

    def __init__(self, writes):
        super().__init__()
        self._writes = writes

    def isatty(self):
        return True

    def write(self, text):
        self._writes -= 1
        if self._writes == 0:
            press()
        return super().write(text)


def nap(item):
    time.sleep(0.03)  # the bar is drawn ten times a second
    return item


@pytest.mark.parametrize("writes", [1, 2, 3, 4])
def test_ctrl_c_while_the_bar_is_drawn_leaves_bars_to_maps_in_other_threads(monkeypatch, writes):
    mapped = opmap(mode="thread", workers=2)(nap)
    monkeypatch.setattr("sys.stderr", PressingTerminal(writes))
    with pytest.raises(KeyboardInterrupt):
        mapped(range(30))
    monkeypatch.setattr("sys.stderr", PressingTerminal(0))
    assert started(mapped, range(10)).result(PATIENCE) == list(range(10))


# At every moment

# Each kind, and each way of use, has other moments: of one that takes long to start, one of so many.
STEP = {"thread": 7, "process": 23, "executor": 11, "async": 7, "async_process": 23}
OWN_LOOPS = ("async", "async_process")


def echo(item):
    return item


async def echo_async(item):
    return item


def call_it(mapped):
    mapped.run(range(3))


def close_its_stream(mapped):
    stream = mapped.stream(range(10))
    next(stream)
    stream.close()


def keep_its_workers(mapped):
    with mapped.pool():
        mapped.run(range(3))
        mapped.run(range(3))


USES = [
    *((kind, use) for kind in STEP for use in (call_it, keep_its_workers)),
    *((kind, close_its_stream) for kind in STEP if kind not in OWN_LOOPS),
]


@pytest.mark.parametrize("again_after", [None, 1, 5])
@pytest.mark.parametrize(("kind", "use"), USES)
@pytest.mark.usefixtures("no_garbage_of_others")
def test_ctrl_c_at_any_moment_leaves_nothing_and_has_one_traceback(kind, use, again_after):
    mode = partial(ThreadPoolExecutor, 2) if kind == "executor" else kind
    mapped = opmap(mode=mode, workers=2, retries=0, progress=False)(echo_async if kind in OWN_LOOPS else echo)
    # Every one where the map's handler is taken away and set again, once.
    step = 1 if (kind, use) == ("thread", close_its_stream) else STEP[kind]
    moments = itertools.count(again_after or 0, step * (1 if again_after is None else 5))
    press_at(moments, mapped, use, again_after, OPERO)


@pytest.mark.parametrize("again_after", [None, 1, 5, 20])
@pytest.mark.parametrize("use", [call_it, close_its_stream, keep_its_workers])
@pytest.mark.usefixtures("no_garbage_of_others")
def test_ctrl_c_in_an_executors_own_code_leaves_none_of_its_locks_taken(use, again_after):
    @opmap(mode=partial(ThreadPoolExecutor, 2), workers=2, retries=0, progress=False)
    def work(item):
        time.sleep(0.003)  # it shall run when Ctrl-C comes, and want the locks after that
        return item

    press_at(itertools.count(again_after or 0, 1 if again_after is None else 3), work, use, again_after, EXECUTORS)


def press_at(moments, mapped, use, again_after, watched):
    use(mapped)
    gc.collect()
    before = surroundings()
    for moment in moments:
        presser = Presser(moment, again_after, watched=watched)
        interrupt = None
        try:
            with presser:
                use(mapped)
        except KeyboardInterrupt as raised:
            interrupt = raised
        # The second may come when the first has reached the program's own code.
        if interrupt is not None and is_of_opero(interrupt):
            assert interrupt.__context__ is None, moment
        interrupt = None
        if not presser.has_pressed:
            break
        until(lambda: surroundings() == before)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, moment
    assert mapped.run([1]) == [1]
    assert moment > 30


def test_no_code_in_which_ctrl_c_would_be_lost_runs_when_the_object_of_a_block_that_has_ended_is_freed():
    mapped = opmap(mode="thread", progress=False)(echo)
    block = mapped.pool()
    with block:
        pass
    entered = []
    sys.setprofile(lambda frame, event, _: entered.append(frame.f_code.co_name) if event == "call" else None)
    del block
    sys.setprofile(None)
    assert entered == []


def test_no_finalizer_in_which_ctrl_c_would_be_lost_ends_the_threads_of_a_map(monkeypatch):
    finalized = []
    monkeypatch.setattr(WholeThreads, "_terminate_pool", classmethod(lambda *_: finalized.append("a pool")))
    assert opmap(mode="thread", progress=False)(echo)([1]) == [1]
    gc.collect()
    assert finalized == []


def is_of_opero(error):
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename.startswith(str(Path(opero.__file__).parent))
