"""Pools that outlive a map: ``with fn.pool():``."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from leftovers import descendants, threads
from side_by_side import hang, until

from conftest import World
from opero import WorkerCrashedError, opmap

PATIENCE = 20.0


def children() -> set[int]:
    """Processes that this one or its fork server started, but for the helpers of multiprocessing."""
    return set(descendants())


@pytest.fixture(autouse=True)
def clean_surroundings():
    """Every test here is also a test that no process and no thread is left."""
    before = children(), threads()
    yield
    # The system takes a moment to end a process that was told to.
    until(lambda: (children(), threads()) == before)


class Keeping:
    """A mode with workers that can be kept, for functions of one world."""

    def __init__(self, mode, world):
        self.mode = mode
        self.world = world
        self.has_processes = "process" in mode

    def map(self, function, **options):
        mode = (lambda: ThreadPoolExecutor(options["workers"])) if self.mode == "executor" else self.mode
        one_by_one = {"pool_options": {"concurrency": 1}} if self.mode == "async_process" else {}
        options = {"workers": 2, "retries": 0, "progress": False, "return_exceptions": True, **one_by_one, **options}
        return opmap(**{"mode": mode, **options})(self.world.define(function))

    def ran_in(self):
        """Names the worker that it runs in."""
        return os.getpid() if self.has_processes else threading.get_ident()


def in_both_worlds(*modes):
    """Parameters of a fixture; async_process mode is in the async world only."""
    pairs = [(mode, is_async) for mode in modes for is_async in (False, True) if is_async or mode != "async_process"]
    return [pytest.param(pair, id=f"{pair[0]}-{'async' if pair[1] else 'sync'}") for pair in pairs]


@pytest.fixture(params=in_both_worlds("thread", "process", "async_process", "executor"))
def keeping(request):
    mode, is_async = request.param
    return Keeping(mode, World(is_async=is_async))


@pytest.fixture(params=in_both_worlds("process", "async_process"))
def processes(request):
    mode, is_async = request.param
    return Keeping(mode, World(is_async=is_async))


def workers_of(keeping, journal):
    """A map that tells in which workers it ran, and makes sure that both of two have a part in it."""

    def work(item, *, meeting):
        journal.add(meeting)
        until(lambda: journal.lines().count(meeting) >= 2)
        return keeping.ran_in()

    mapped = keeping.map(work)
    return lambda meeting: set(mapped.run([1, 2], meeting=meeting)), mapped


def test_two_calls_in_a_block_use_the_same_workers(keeping, journal):
    workers, mapped = workers_of(keeping, journal)
    with mapped.pool():
        first = workers("a")
        assert len(first) == 2
        assert workers("b") == first
        assert workers("c") == first


def test_calls_outside_of_a_block_have_workers_of_their_own(processes, journal):
    workers, mapped = workers_of(processes, journal)
    before = workers("a")
    with mapped.pool():
        inside = workers("b")
    after = workers("c")
    assert not before & inside
    assert not inside & after


def test_the_workers_have_ended_when_the_block_is_left(processes, journal):
    workers, mapped = workers_of(processes, journal)
    with mapped.pool():
        pids = workers("a")
        assert pids <= children()
    assert not pids & children()


def test_each_call_has_its_own_arguments(keeping):
    mapped = keeping.map(lambda item, plus=0, *, times=1: (item + plus) * times)
    with mapped.pool():
        assert mapped.run([1, 2]) == [1, 2]
        assert mapped.run([1, 2], 10, times=2) == [22, 24]
        assert mapped.run([1, 2], times=3) == [3, 6]
        assert mapped.run([1, 2]) == [1, 2]


def test_results_of_large_maps_are_right(keeping):
    mapped = keeping.map(lambda item: item + 1)
    with mapped.pool():
        for size in (3, 2000, 0, 500):
            assert mapped.run(range(size)) == list(range(1, size + 1))


def test_a_block_can_be_entered_by_async_with(processes, journal):
    _, mapped = workers_of(processes, journal)

    async def call(meeting):
        found = mapped([1, 2], meeting=meeting)
        return set(await found if inspect.isawaitable(found) else found)

    async def main():
        async with mapped.pool():
            return await call("a"), await call("b")

    first, second = asyncio.run(main())
    assert first == second


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_of_every_start_method_are_kept(processes, journal, method):
    mapped = processes.map(lambda item: os.getpid(), workers=1, pool_options={"start_method": method})
    with mapped.pool():
        (first,), (second,) = mapped.run([1]), mapped.run([1])
    assert first == second


class Counter:
    """Counts in the instance that is at hand."""

    def __init__(self, step):
        self.step = step

    @opmap(mode="process", workers=1, progress=False, retries=0)
    def add(self, item):
        return item + self.step, os.getpid()


def test_methods_of_all_instances_use_the_same_workers():
    one, ten = Counter(1), Counter(10)
    with one.add.pool():
        ((first, worker),) = one.add([1])
        ((second, same),) = ten.add([1])
    assert (first, second) == (2, 11)
    assert worker == same


def test_async_mode_has_nothing_to_keep_and_works():
    @opmap(mode="async", progress=False)
    async def work(item):
        return item * 2

    with work.pool():
        assert work.run([1, 2]) == [2, 4]
        assert work.run([3]) == [6]


variable = contextvars.ContextVar("variable", default="unset")


def test_threads_see_the_context_variables_of_each_call(world):
    mapped = Keeping("thread", world).map(lambda item: variable.get())
    with mapped.pool():
        for value in ("a", "b"):
            token = variable.set(value)
            assert mapped.run([1, 2]) == [value, value]
            variable.reset(token)


# Blocks in blocks, and maps at the same time


def test_the_inner_block_does_not_end_the_workers_of_the_outer(processes, journal):
    workers, mapped = workers_of(processes, journal)
    with mapped.pool():
        first = workers("a")
        with mapped.pool():
            assert workers("b") == first
        assert workers("c") == first


def test_maps_at_the_same_time_have_workers_of_their_own_which_are_kept(processes, journal):
    def work(item, *, wait):
        journal.add(os.getpid())
        if wait:
            until(lambda: len(set(journal.lines())) == 2)
        return os.getpid()

    mapped = processes.map(work, workers=1)
    results: list[int] = []

    def call():
        results.extend(mapped.run([1], wait=True))

    with mapped.pool():
        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(results)) == 2
        assert set(mapped.run([1], wait=False)) <= set(results)


def test_a_stream_that_outlives_its_block_ends_its_workers_itself():
    mapped = Keeping("process", World(is_async=False)).map(lambda item: os.getpid(), ordered=False)
    with mapped.pool():
        stream = mapped.stream(iter(int, 1))
        pid = next(stream).result
    assert pid in children()
    stream.close()
    assert pid not in children()


# What goes wrong


def test_a_worker_that_crashes_in_a_block_is_replaced(processes, journal):
    def work(item):
        if item == "bad":
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    mapped = processes.map(work)
    with mapped.pool():
        assert mapped.run([1, 2]) == [1, 2]
        first, crash, last = mapped.run([1, "bad", 2])
        assert (first, last) == (1, 2)
        assert isinstance(crash, WorkerCrashedError)
        assert mapped.run([1, 2, 3, 4]) == [1, 2, 3, 4]


def test_a_worker_that_is_killed_between_two_calls_is_replaced(processes, journal):
    mapped = processes.map(lambda item: (item, os.getpid()), workers=1)
    with mapped.pool():
        ((_, pid),) = mapped.run([1])
        os.kill(pid, signal.SIGKILL)
        until(lambda: pid not in children() or _is_zombie(pid))
        time.sleep(0.1)  # until its end is known
        ((item, another),) = mapped.run([2])
    assert item == 2
    assert another != pid


def _is_zombie(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_a_map_that_is_stopped_by_a_failure_leaves_usable_workers(keeping):
    def work(item):
        if item == 3:
            raise ValueError(item)
        return item

    mapped = keeping.map(work, return_exceptions=False)
    with mapped.pool():
        for _ in range(5):
            with pytest.raises(ValueError, match="3"):
                mapped.run(iter([1, 2, 3, *range(4, 500)]))
            assert mapped.run([1, 2, 4, 5]) == [1, 2, 4, 5]


def test_what_runs_when_a_map_ends_is_ended_and_charged_to_nobody(processes, journal):
    """The stuck item of the first map holds one worker, which has to be replaced for the second one."""

    def work(item):
        journal.add(item)
        if item == "stuck":
            hang()
        if item == "bad":
            until(lambda: "stuck" in journal.lines())
            raise ValueError(item)
        return item

    mapped = processes.map(work, return_exceptions=False)
    with mapped.pool():
        begun = time.monotonic()
        with pytest.raises(ValueError, match="bad"):
            mapped.run(["stuck", "bad"])
        assert mapped.run(range(20)) == list(range(20))
        assert time.monotonic() - begun < PATIENCE / 2


def test_an_exception_in_the_block_ends_the_workers(processes, journal):
    workers, mapped = workers_of(processes, journal)
    pids = set()

    def use_and_fail():
        with mapped.pool():
            pids.update(workers("a"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use_and_fail()
    assert len(pids) == 2
    assert not pids & children()


def test_a_worker_that_becomes_ready_when_the_map_has_ended_runs_items_of_the_next(journal, tmp_path):
    go, first = tmp_path / "go", tmp_path / "first"

    def prepare():
        try:
            first.mkdir()
        except FileExistsError:
            until(go.exists)
            journal.add("ready")

    async def work(item, *, meeting):
        journal.add(meeting)
        until(lambda: not meeting or journal.lines().count(meeting) == 2)
        return item

    mapped = opmap(workers=2, progress=False, pool_options={"start_method": "fork", "initializer": prepare})(work)

    async def twice():
        async with mapped.pool():
            async for outcome in mapped.stream([1, 2], meeting=""):
                if outcome.result == 2:
                    go.touch()
                    until(lambda: "ready" in journal.lines())
                    await asyncio.sleep(0.2)
            return await mapped([3, 4], meeting="both")

    assert asyncio.run(twice()) == [3, 4]


def test_exit_in_a_thread_costs_the_pool_and_not_the_block():
    def work(item):
        if item == "exit":
            raise SystemExit
        return item

    mapped = opmap(mode="thread", workers=2, progress=False, retries=0)(work)
    with mapped.pool():
        with pytest.raises(SystemExit):
            mapped.run(["exit"])
        assert mapped.run(range(10)) == list(range(10))


def test_arguments_that_only_forked_workers_can_have_are_given_to_new_ones():
    mapped = opmap(mode="process", workers=1, progress=False, pool_options={"start_method": "fork"})(
        lambda item, *, lock=None: (item, lock is None)
    )
    with mapped.pool():
        assert mapped([1]) == [(1, True)]
        assert mapped([1], lock=threading.Lock()) == [(1, False)]
        assert mapped([1]) == [(1, True)]


def test_a_forked_child_does_not_use_the_workers_of_its_parent(journal):
    @opmap(mode="process", workers=1, progress=False, pool_options={"start_method": "fork"})
    def work(item):
        return os.getppid()

    with work.pool():
        assert work([1]) == [os.getpid()]
        child = os.fork()
        if not child:
            journal.add(work([1]) == [os.getpid()])
            os._exit(0)
        os.waitpid(child, 0)
        assert journal.lines() == ["True"]
        assert work([1]) == [os.getpid()]


def test_workers_that_are_replaced_after_so_many_items_are_in_a_block_too(processes):
    mapped = processes.map(lambda item: os.getpid(), workers=1, pool_options={"max_tasks_per_worker": 3})
    with mapped.pool():
        pids = [pid for _ in range(6) for pid in mapped.run([1])]
    assert pids == [pid for pid in dict.fromkeys(pids) for _ in range(3)]
    assert len(set(pids)) == 2


INTERRUPTED = """
    import os, threading
    from opero import opmap

    @opmap(mode=MODE, workers=2, progress=False, retries=0)
    DEF work(item):
        note("begun")
        if item:
            threading.Event().wait(20)
        return os.getpid()

    if __name__ == "__main__":
        try:
            with work.pool():
                workers = work.run([0, 0])
                say(len(workers))
                work.run([1, 1])
        except KeyboardInterrupt:
            left = sum(os.path.exists(f"/proc/{pid}") for pid in workers)
            say(("interrupted", left, threading.active_count()))
"""


def test_ctrl_c_in_a_block_leaves_no_process_and_no_thread(start, processes, journal):
    program = start(INTERRUPTED.replace("MODE", repr(processes.mode)), {}, world=processes.world)
    assert program.heard() == 2
    until(lambda: journal.lines().count("begun") >= 3)
    os.kill(program.pid, signal.SIGINT)
    assert program.heard() == ("interrupted", 0, 1)
    program.end()


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_workers_whose_message_ctrl_c_lost_are_not_used_again(lost, monkeypatch):
    receive, heard = Connection.recv, []

    def interrupted(pipe):
        message = receive(pipe)
        heard.append(message)
        if len(heard) == lost + 1:
            raise KeyboardInterrupt
        return message

    monkeypatch.setattr(Connection, "recv", interrupted)
    spawning = {"start_method": "spawn"}
    double = opmap(mode="process", workers=1, retries=0, pool_options=spawning)(plain_double)
    with double.pool():
        with pytest.raises(KeyboardInterrupt):
            double(range(5))
        assert double(range(5)) == [0, 2, 4, 6, 8]


def plain_double(item):
    return item * 2


def test_a_block_that_is_entered_twice_ends_when_it_is_left_twice():
    mapped = opmap(mode="process", workers=1, progress=False)(get_process)
    block = mapped.pool()
    with block:
        (first,) = mapped([1])
        with block:
            assert mapped([1]) == [first]
        assert mapped([1]) == [first]
    assert mapped([1]) != [first]


def get_process(_item):
    return os.getpid()
