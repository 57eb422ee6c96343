"""What a running map uses: memory, tasks, threads and processes; and what its workers are given."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import os
import subprocess
import sys
import textwrap
import threading

import pytest
from leftovers import descendants, surroundings

from opero import opmap
from opero.concurrency import scheduler

PATIENCE = 10.0  # seconds until a test gives up waiting for something that must happen


class SpoiledError(Exception):
    """A user's error."""


@pytest.fixture(autouse=True)
def clean_surroundings():
    before = surroundings()
    yield
    assert surroundings() == before


# Memory

PEAK = """
    import asyncio, sys
    from opero import opmap

    def work(item):
        return item

    async def work_async(item):
        return item

    def count(mode, items):
        mapped = opmap(mode=mode, workers=2, progress=False)
        if not mode.startswith("async"):
            return sum(1 for _ in mapped(work).stream(items))

        async def consume():
            return len([None async for _ in mapped(work_async).stream(items)])

        return asyncio.run(consume())

    if __name__ == "__main__":
        mode, wanted = sys.argv[1], int(sys.argv[2])
        assert count(mode, (item for item in range(wanted))) == wanted
        # Not from getrusage: that remembers the program that started this one.
        print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("mode", "many"),
    # As many as take half a second: an item of async mode is a step of an event loop, one of async_process a message.
    [("thread", 100_000), ("process", 100_000), ("async", 50_000), ("async_process", 10_000)],
)
def test_the_peak_of_memory_does_not_grow_with_the_number_of_items(tmp_path, mode, many):
    script = tmp_path / "peak.py"
    script.write_text(textwrap.dedent(PEAK))

    def peak(count):
        run = subprocess.run(
            [sys.executable, script, mode, str(count)], capture_output=True, text=True, timeout=100, check=True
        )
        return int(run.stdout) / 1024

    few = peak(5_000)
    assert peak(many) - few < 8  # MiB


# What workers are given

setting = contextvars.ContextVar("setting", default="nobody has set it")


@pytest.mark.parametrize("name", ["thread", "async"])
def test_an_async_function_sees_the_context_variables_of_whoever_called_the_map(name):
    @opmap(mode=name, workers=2, progress=False)
    async def look(item):
        await asyncio.sleep(0)
        return setting.get()

    async def main():
        setting.set("of the caller")
        return await look(range(20))

    assert asyncio.run(main()) == ["of the caller"] * 20


def test_a_def_function_in_a_thread_sees_the_context_variables_of_whoever_called_the_map():
    @opmap(mode="thread", workers=2, progress=False)
    def look(item):
        return setting.get()

    def call(value):
        setting.set(value)
        return look(range(20))

    assert contextvars.copy_context().run(call, "first") == ["first"] * 20
    assert contextvars.copy_context().run(call, "second") == ["second"] * 20


@pytest.mark.parametrize("name", ["thread", "async"])
def test_what_a_function_sets_in_its_context_does_not_reach_the_caller(name):
    @opmap(mode=name, workers=2, progress=False)
    async def change(item):
        setting.set(item)

    async def main():
        setting.set("of the caller")
        await change(range(20))
        return setting.get()

    assert asyncio.run(main()) == "of the caller"


# Items in backoff

WAITING = 1_000
WORKERS = 3


def test_items_in_backoff_hold_no_task():
    """Nor do the items that have not begun: there is one task for each worker, and the caller's."""
    tried = set()
    most_tasks = most_waiting = 0

    @opmap(mode="async", workers=WORKERS, progress=False, retries=1, min_delay=0.5, jitter=False)
    async def work(item):
        nonlocal most_tasks, most_waiting
        most_tasks = max(most_tasks, len(asyncio.all_tasks()))
        if item in tried:
            tried.remove(item)
            return item
        tried.add(item)
        most_waiting = max(most_waiting, len(tried))
        raise SpoiledError(item)

    assert work.run(range(WAITING)) == list(range(WAITING))
    assert most_waiting > WAITING / 2
    assert most_tasks == WORKERS + 1


def test_items_in_backoff_hold_no_thread():
    lock = threading.Lock()
    tried = set()
    most_threads = most_waiting = 0

    @opmap(mode="thread", workers=WORKERS, progress=False, retries=1, min_delay=0.5, jitter=False)
    def work(item):
        nonlocal most_threads, most_waiting
        with lock:
            most_threads = max(most_threads, len({name for name in threads() if "Thread-" in name}))
            if item in tried:
                tried.remove(item)
                return item
            tried.add(item)
            most_waiting = max(most_waiting, len(tried))
        raise SpoiledError(item)

    def threads():
        return [thread.name for thread in threading.enumerate()]

    assert work(range(WAITING)) == list(range(WAITING))
    assert most_waiting > WAITING / 2
    assert most_threads <= WORKERS + 3  # the three by which a thread pool is run


def test_items_in_backoff_hold_no_process(tmp_path):
    parent = os.getpid()
    marks = tmp_path / "marks"
    marks.mkdir()
    # A fork server of earlier maps may be among them.
    before = descendants(parent)
    options = {"pool_options": {"start_method": "fork"}}

    @opmap(mode="process", workers=2, progress=False, retries=1, min_delay=0.5, jitter=False, **options)
    def work(item):
        mark = marks / str(item)
        if mark.exists():
            return len(descendants(parent).keys() - before.keys())
        mark.touch()
        raise SpoiledError(item)

    assert set(work(range(200))) == {2}


def test_the_number_of_items_in_backoff_is_bounded(mode, monkeypatch):
    """Whatever the input still has: it is not taken up before some of them have ended."""
    assert scheduler.MOST_WAITING <= 5_000
    monkeypatch.setattr(scheduler, "MOST_WAITING", 500)
    pulled = 0

    def items():
        nonlocal pulled
        for number in itertools.count():
            pulled += 1
            yield number

    @opmap(**mode.options, min_delay=1_000, max_delay=1_000, jitter=False)
    async def work(item):
        raise SpoiledError(item)

    async def main():
        stream = work.stream(items())
        first = asyncio.ensure_future(anext(stream))
        before = -1
        while before < pulled or pulled < 500:
            before = pulled
            await asyncio.sleep(0.3)
        assert not first.done()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await stream.aclose()

    asyncio.run(main())
    # Those that run when the bound is reached come on top, and batches that are on their way.
    assert pulled < 5_000


# Maps in maps


def innermost(item):
    return os.getpid(), item


@pytest.mark.parametrize("names", list(itertools.product(["thread", "process"], repeat=3)), ids="-".join)
def test_maps_of_threads_and_processes_can_be_nested_to_any_depth(names):
    outer, middle, inner = (
        opmap(mode=name, workers=1, progress=False, retries=0, return_exceptions=False) for name in names
    )
    map_of_items = inner(innermost)

    def in_the_middle(items):
        return map_of_items(items)

    map_of_lists = middle(in_the_middle)

    @outer
    def outermost(lists):
        return map_of_lists(lists)

    results = outermost([[[1, 2], [3]], [[4]]])
    assert [[[item for _, item in part] for part in lists] for lists in results] == [[[1, 2], [3]], [[4]]]
    pids = {pid for lists in results for part in lists for pid, _ in part}
    assert (os.getpid() in pids) is ("process" not in names)
