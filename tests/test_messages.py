"""How a map and its workers hear of each other: pipes, and the inbox that a map waits at."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
from contextlib import closing

import pytest
from side_by_side import started, until

from opero import opmap
from opero.concurrency.running import AsyncInbox, BlockingInbox


@pytest.fixture(params=["queue", "pipes"])
def inbox(request):
    ours, theirs = multiprocessing.Pipe()
    with closing(BlockingInbox()) as made, closing(ours), closing(theirs):
        if request.param == "pipes":
            made.listen(ours, pytest.fail)
        yield made


def waited(inbox, seconds, **options):
    inbox.wait(seconds, **options)
    return [inbox.events.popleft() for _ in range(len(inbox.events))]


def test_an_event_of_another_thread_ends_the_wait(inbox):
    for number in range(200):
        putting = started(inbox.put, print, number)
        assert waited(inbox, None) == [(print, (number,), {})]
        putting.result()


def test_an_event_of_a_signal_handler_ends_the_wait(inbox):
    before = signal.signal(signal.SIGALRM, lambda *_: inbox.put(print, "alarm"))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert waited(inbox, None) == [(print, ("alarm",), {})]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_wait_without_events_ends_in_time(inbox):
    assert waited(inbox, 0.002) == []
    assert waited(inbox, 0.02) == []
    assert waited(inbox, 0.002, is_real=True) == []


def test_a_pipe_that_is_forgotten_is_not_heard(inbox):
    ours, theirs = multiprocessing.Pipe()
    with closing(ours), closing(theirs):
        inbox.listen(ours, pytest.fail)
        inbox.forget(ours)
        theirs.send_bytes(b"too late")
        assert waited(inbox, 0.01) == []


class LoopWithoutReaders(asyncio.SelectorEventLoop):
    """As the default loop of Windows; its own pipe to itself is all that it hears."""

    def add_reader(self, fd, callback, *args):
        raise NotImplementedError


def large(item):
    return item * 2


async def large_async(item):
    return item * 2


ITEMS = [bytes([number]) * 700_000 for number in range(30)]


def run_map(**options):
    return opmap(mode="process", workers=1, retries=0, return_exceptions=False, **options)(large)(ITEMS)


def run_async_map():
    mapped = opmap(mode="process", workers=1, retries=0, return_exceptions=False)(large_async)
    with asyncio.Runner(loop_factory=LoopWithoutReaders) as runner:

        async def twice():
            async with mapped.pool():
                return [await mapped(ITEMS), await mapped(ITEMS)][1]

        return runner.run(twice())


@pytest.mark.parametrize("run", [run_map, run_async_map])
def test_large_items_and_large_results_do_not_wait_for_each_other(run):
    # A batch for a worker that has not got rid of its last report: each could wait for the other to read.
    assert run() == [item * 2 for item in ITEMS]


def test_a_worker_that_reads_nothing_for_a_while_holds_up_neither_the_others_nor_the_event_loop(world, tmp_path):
    """What is sent ahead to a worker that is busy with one slow item may be more than its pipe takes."""
    path = tmp_path / "done"
    path.touch()

    def work(item):
        if item[0] == 100:
            until(lambda: path.stat().st_size > 200)
        with path.open("a") as file:
            file.write(".")
        return item[0], path.stat().st_size

    @opmap(mode="process", workers=2, retries=0, return_exceptions=False)
    async def work_async(item):
        return work(item)

    async def turns():
        turned = 0
        mapping = asyncio.create_task(work_async(items()))
        while not mapping.done():
            await asyncio.sleep(0.005)
            turned += 100 < path.stat().st_size < 200
        assert turned > 1
        return mapping.result()

    def items():
        return ((number, bytes(400_000)) for number in range(300))

    if world.is_async:
        results = asyncio.run(turns())
    else:
        results = opmap(mode="process", workers=2, retries=0, return_exceptions=False)(work)(items())
    assert [number for number, _ in results] == list(range(300))
    assert results[100][1] > 200


def test_async_maps_work_where_the_loop_hears_no_pipes():
    assert run_async_map() == [item * 2 for item in ITEMS]


def test_an_async_inbox_hears_until_it_forgets():
    asyncio.run(hear_and_forget())


async def hear_and_forget():
    ours, theirs = multiprocessing.Pipe()
    inbox = AsyncInbox()
    with closing(ours), closing(theirs):
        inbox.listen(ours, lambda: inbox.put(print, ours.recv_bytes()))
        theirs.send_bytes(b"first")
        await inbox.wait(None)
        assert inbox.events.pop() == (print, (b"first",), {})
        inbox.forget(ours)
        theirs.send_bytes(b"second")
        await inbox.wait(0.01)
        assert not inbox.events
