"""How a map and its workers hear of each other: the ends of pipes, and the inbox that a map waits at."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import select
import signal
import struct
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from side_by_side import started

from opero import opmap
from opero.concurrency import pipe_end
from opero.concurrency.inbox import AsyncInbox, BlockingInbox
from opero.concurrency.pipe_end import BlockingEnd, NonBlockingEnd

SIZES = [0, 1, 5, 65_531, 65_532, 65_533, 300_000, 3_000_000]


@pytest.fixture(params=[NonBlockingEnd, BlockingEnd])
def ends(request):
    ours, theirs = multiprocessing.Pipe()
    with closing(ours), closing(theirs):
        yield request.param(ours), theirs


def receive_all(end, count):
    messages = []
    while len(messages) < count:
        select.select([end.connection], [], [])
        messages += [bytes(message) for message in end.receive()]
    return messages


def send(end, message):
    is_all_sent = end.send(message)
    while not is_all_sent:
        select.select([], [end.connection], [])
        is_all_sent = end.send_on()


def test_an_end_receives_messages_of_every_size(ends):
    end, theirs = ends
    sent = [os.urandom(size) for size in SIZES]
    writer = threading.Thread(target=lambda: [theirs.send_bytes(message) for message in sent])
    writer.start()
    assert receive_all(end, len(sent)) == sent
    writer.join()


def test_an_end_sends_messages_of_every_size(ends):
    end, theirs = ends
    sent, received = [os.urandom(size) for size in SIZES], []
    reader = threading.Thread(target=lambda: received.extend(theirs.recv_bytes() for _ in sent))
    reader.start()
    for message in sent:
        send(end, message)
    reader.join()
    assert received == sent


def test_an_end_with_nothing_to_read_gives_nothing(ends):
    assert ends[0].receive() == []


def test_what_was_said_before_the_end_of_the_pipe_is_heard(ends):
    end, theirs = ends
    theirs.send_bytes(b"last words")
    theirs.close()
    assert receive_all(end, 1) == [b"last words"]
    with pytest.raises(EOFError):
        end.receive()


def test_a_message_that_breaks_off_is_the_end_of_the_pipe():
    ours, theirs = multiprocessing.Pipe()
    with closing(ours):
        end = NonBlockingEnd(ours)
        os.write(theirs.fileno(), struct.pack("!i", 100) + b"half")
        theirs.close()
        assert end.receive() == []
        with pytest.raises(EOFError):
            end.receive()


def test_a_message_is_arriving_as_long_as_more_of_it_has_come():
    ours, theirs = multiprocessing.Pipe()
    with closing(ours), closing(theirs):
        end = NonBlockingEnd(ours)
        assert not end.is_arriving()
        for piece in (struct.pack("!i", 12) + b"once", b"more"):
            os.write(theirs.fileno(), piece)
            assert end.receive() == []
            assert end.is_arriving()
            assert not end.is_arriving()
        os.write(theirs.fileno(), b"done")
        assert end.receive() == [b"oncemoredone"]
        assert not end.is_arriving()


def test_sending_to_nobody_raises(ends):
    end, theirs = ends
    theirs.close()
    with pytest.raises(OSError, match=r".+"):
        end.send(b"hello")


def test_what_a_pipe_does_not_take_at_once_is_sent_later_in_order():
    ours, theirs = multiprocessing.Pipe()
    with closing(ours), closing(theirs):
        end = NonBlockingEnd(ours)
        assert end.send(b"small")
        assert not end.send(bytes(3_000_000))
        assert not end.send(b"small, too")
        received = started(lambda: [len(theirs.recv_bytes()) for _ in range(3)])
        while not end.send_on():
            select.select([], [ours], [])
        assert received.result() == [5, 3_000_000, 10]


def test_messages_above_two_gibibytes_have_the_length_of_connections(monkeypatch):
    # As if they began at ten bytes: the real ones would fill the memory.
    monkeypatch.setattr(pipe_end, "_LONGEST", 10)
    ours, theirs = multiprocessing.Pipe()
    with closing(ours), closing(theirs):
        end = NonBlockingEnd(ours)
        assert end.send(b"more than ten bytes")
        assert theirs.recv_bytes() == b"more than ten bytes"
        os.write(theirs.fileno(), struct.pack("!iQ", -1, 19) + b"more than ten bytes" + struct.pack("!i", 1) + b"x")
        assert receive_all(end, 2) == [b"more than ten bytes", b"x"]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.lists(st.binary(max_size=40), max_size=6))
def test_however_messages_are_cut_into_pieces_they_arrive_whole(data, messages):
    ours, theirs = multiprocessing.Pipe()
    with closing(ours), closing(theirs):
        end = NonBlockingEnd(ours)
        stream = b"".join(struct.pack("!i", len(message)) + message for message in messages)
        received = []
        while stream:
            piece = data.draw(st.integers(1, len(stream)))
            os.write(theirs.fileno(), stream[:piece])
            stream = stream[piece:]
            while arrived := end.receive():
                received += [bytes(message) for message in arrived]
        assert received == messages


@pytest.fixture(params=["queue", "pipes"])
def inbox(request):
    ours, theirs = multiprocessing.Pipe()
    with closing(BlockingInbox()) as made, closing(ours), closing(theirs):
        if request.param == "pipes":
            made.listen(ours, pytest.fail)
        yield made


def test_an_event_of_another_thread_ends_the_wait(inbox):
    for number in range(200):
        putting = started(inbox.put, number)
        assert inbox.collect(None) == [number]
        putting.result()


def test_an_event_of_a_signal_handler_ends_the_wait(inbox):
    before = signal.signal(signal.SIGALRM, lambda *_: inbox.put("alarm"))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert inbox.collect(None) == ["alarm"]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_wait_without_events_ends_in_time(inbox):
    assert inbox.collect(0.002) == []
    assert inbox.collect(0.02) == []
    assert inbox.collect(0.002, is_real=True) == []


def test_a_pipe_that_is_forgotten_is_not_heard(inbox):
    ours, theirs = multiprocessing.Pipe()
    with closing(ours), closing(theirs):
        inbox.listen(ours, pytest.fail)
        inbox.forget(ours)
        theirs.send_bytes(b"too late")
        assert inbox.collect(0.01) == []


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


@pytest.fixture
def as_on_windows(monkeypatch):
    """Pipes that cannot be waited for beside other things, nor read in parts."""
    monkeypatch.setattr("opero.concurrency.inbox.sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr("opero.concurrency.pipe_end.sys", SimpleNamespace(platform="win32"))


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
            for _ in range(1_000):
                if path.stat().st_size > 200:
                    break
                time.sleep(0.01)
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


@pytest.mark.usefixtures("as_on_windows")
@pytest.mark.parametrize("run", [run_map, run_async_map])
def test_maps_work_where_pipes_are_heard_by_a_thread(run):
    assert run() == [item * 2 for item in ITEMS]
    assert "opero-pipes" not in [thread.name for thread in threading.enumerate()]


def test_an_async_inbox_hears_until_it_forgets():
    asyncio.run(hear_and_forget())


async def hear_and_forget():
    ours, theirs = multiprocessing.Pipe()
    with closing(AsyncInbox()) as inbox, closing(ours), closing(theirs):
        inbox.listen(ours, lambda: inbox.put(ours.recv_bytes()))
        theirs.send_bytes(b"first")
        assert await inbox.collect(None) == [b"first"]
        inbox.forget(ours)
        theirs.send_bytes(b"second")
        assert await inbox.collect(0.01) == []
