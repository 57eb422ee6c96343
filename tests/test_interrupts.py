"""Ctrl-C that comes again, and Ctrl-C at the worst moment."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from leftovers import surroundings
from side_by_side import started, until

from opero import Cache, opmap
from opero.concurrency import system
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


def test_ctrl_c_lets_what_is_cancelled_tidy_up():
    steps = []

    async def work(item):
        press()
        try:
            await asyncio.Event().wait()
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
            await asyncio.Event().wait()
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


def test_no_item_begins_when_ctrl_c_has_broken_into_the_loop():
    begun = []

    async def work(item):
        begun.append(item)
        press()
        time.sleep(0.15)  # noqa: ASYNC251 - longer than a turn of the loop may take
        press()

    with pytest.raises(KeyboardInterrupt):
        opmap(mode="async", workers=2, retries=0, progress=False)(work).run([1, 2])
    assert begun == [1]


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

    leave_at(2, blocked, lambda: run(work))


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


def test_ctrl_c_ends_a_map_whose_input_goes_on_when_it_is_cancelled():
    async def items():
        press()
        try:
            await asyncio.Event().wait()
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


def die(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.parametrize("keeps", [False, True])
def test_ctrl_c_while_a_dead_worker_is_replaced_leaves_nothing_of_it(monkeypatch, keeps):
    mapped = opmap(mode="process", workers=2, retries=0, progress=False)(die)
    end = system.end

    def press_and_end(*arguments):
        monkeypatch.setattr(system, "end", end)
        press()
        end(*arguments)

    def interrupted():
        monkeypatch.setattr(system, "end", press_and_end)
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

    def press_and_stop(pool, is_left):
        press()
        stop(pool, is_left)
        stopped.append(pool)

    monkeypatch.setattr(ThreadPool, "stop", press_and_stop)

    @opmap(mode="thread", workers=2, progress=False)
    def work(item):
        if item == 5:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return item

    with pytest.raises(KeyboardInterrupt):
        work(itertools.count())
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


def echo(item):
    return item


# What is said


def pressing(after):
    """A function that presses Ctrl-C when so many items are done."""
    done = []

    def work(item):
        if len(done) == after:
            press()
            # It is heard within this, or when the event loop goes on.
            time.sleep(0.1)
        done.append(item)

    return work


STREAM = ".stream(items) hands out each that is done, "
KEEP = "cache=True with cache_backend='disk' keeps their results for the next run"


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_ctrl_c_tells_how_much_was_done_and_how_to_keep_it(is_async):
    async def work_async(item):
        work(item)

    work = pressing(after=3)
    mapped = opmap(mode="serial", progress=False)(work_async if is_async else work)
    with pytest.raises(KeyboardInterrupt) as raised:
        mapped.run(range(8))
    (note,) = raised.value.__notes__
    assert note.startswith("opero: 3 of 8 items of ")
    assert note.endswith(f"were done; {STREAM}{KEEP}")


def test_a_stream_that_is_interrupted_names_the_cache_only():
    with pytest.raises(KeyboardInterrupt) as raised:
        list(opmap(mode="serial", progress=False)(pressing(after=0)).stream(iter("ab")))
    (note,) = raised.value.__notes__
    assert note.startswith("opero: 0")
    assert note.endswith(f"were done; {KEEP}")


def test_a_map_with_a_cache_that_lasts_says_that_the_next_run_has_it(tmp_path):
    cache = Cache(backend="disk", cache_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt) as raised:
        opmap(mode="serial", progress=False, cache=cache)(pressing(after=1))([1, 2])
    (note,) = raised.value.__notes__
    assert note.endswith("were done; the next run finds their results in the cache")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO], ids=["terminal", "file"])
def test_a_terminal_is_told_what_is_waited_for(monkeypatch, stream):
    monkeypatch.setattr("sys.stderr", stream())
    looks = iter([False] * 15)
    assert system.wait_unless_left(lambda _: next(looks, True), lambda: False)
    told = "opero: waiting for running items to end; Ctrl-C, pressed now, leaves them\n"
    assert system.sys.stderr.getvalue() == (told if stream is Terminal else "")
