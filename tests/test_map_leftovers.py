"""Every way in which a map can end leaves nothing behind, and Ctrl-C ends it at once, also twice."""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
from leftovers import descendants, surroundings
from side_by_side import until
from test_process_mode import INTERRUPTED

from opero import opmap

PATIENCE = 10.0  # seconds until a test gives up waiting for something that must happen


class SpoiledError(Exception):
    """A user's error."""


def files() -> tuple[list[str], int]:
    """Temporary files, and pieces of shared memory that this process still has."""
    gc.collect()
    temporary = sorted(path.name for path in Path(tempfile.gettempdir()).iterdir())
    return temporary, Path("/proc/self/maps").read_text().count("/dev/shm/")


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    """So that other programs on the machine change nothing in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def nothing_is_left(own_temporary_folder):
    before = surroundings(), files()
    yield
    assert (surroundings(), files()) == before


def fail_on_seven(item):
    if item == 7:
        raise SpoiledError(item)
    return item


def endless():
    return itertools.count()


def breaks():
    yield from range(20)
    raise SpoiledError("input")


def to_its_end(mode, mapped):
    assert len(mode.run(mapped, range(20))) == 20


def by_a_failure(mode, mapped):
    strict = opmap(**mode.options, retries=0, return_exceptions=False)(mode.define(fail_on_seven))
    with pytest.raises(SpoiledError):
        mode.run(strict, endless())


def by_an_error_of_the_input(mode, mapped):
    with pytest.raises(SpoiledError, match="input"):
        mode.run(mapped, breaks())


def by_closing_the_stream(mode, mapped):
    def close():
        stream = mapped.stream(endless())
        next(stream)
        stream.close()

    async def close_async():
        stream = mapped.stream(endless())
        await anext(stream)
        await stream.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(close_async()) if mode.is_async else close()


def by_an_error_of_the_consumer(mode, mapped):
    def consume():
        for outcome in mapped.stream(endless()):
            if outcome.index == 12:
                raise SpoiledError("consumer")

    async def consume_async():
        async for outcome in mapped.stream(endless()):
            if outcome.index == 12:
                raise SpoiledError("consumer")

    with pytest.raises(SpoiledError, match="consumer"):
        asyncio.run(consume_async()) if mode.is_async else consume()


def by_cancelling(mode, mapped):
    async def work(item):
        await asyncio.sleep(0.001)

    async def main():
        task = asyncio.create_task(opmap(**mode.options)(work)(endless()))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


WAYS = [
    to_its_end,
    by_a_failure,
    by_an_error_of_the_input,
    by_closing_the_stream,
    by_an_error_of_the_consumer,
    by_cancelling,
]


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("ends", WAYS)
def test_a_map_that_ends_leaves_no_process_thread_task_file_or_shared_memory(mode, ends):
    ends(mode, opmap(**mode.options, retries=0)(mode.define(fail_on_seven)))


# Ctrl-C

KINDS = [
    ("thread", "work"),
    ("thread", "work_async"),
    ("process", "work"),
    ("process", "work_async"),
    ("async", "work_async"),
    ("async_process", "work_async"),
]


@pytest.fixture
def start(tmp_path):
    """Start a map of items that take so many seconds, in a program of its own."""
    started = []

    def start(mode, function, seconds):
        source = textwrap.dedent(INTERRUPTED).replace("SECONDS", str(seconds)).replace("OPTIONS", "None")
        path = tmp_path / "script.py"
        path.write_text(source.replace("MODE", repr(mode)).replace("FUNCTION", function))
        process = subprocess.Popen(
            [sys.executable, "-W", "error", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        for _ in range(2):
            assert process.stdout.readline() == "running\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def interrupt(process):
    process.send_signal(signal.SIGINT)


def end_of(process):
    """What the program has written to stderr at its end."""
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGINT
    return err


@pytest.mark.parametrize("pause", [0.001, 0.005, 0.03])
@pytest.mark.parametrize(("mode", "function"), KINDS)
def test_ctrl_c_twice_ends_a_map_at_once_and_leaves_no_process(start, mode, function, pause):
    process = start(mode, function, 60)
    workers = descendants(process.pid)
    interrupt(process)
    time.sleep(pause)
    interrupt(process)
    end_of(process)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.parametrize("function", ["work", "work_async"])
def test_ctrl_c_while_a_map_waits_for_its_threads_ends_it_with_one_traceback(start, function):
    process = start("thread", function, 60)
    interrupt(process)
    time.sleep(0.3)  # it waits for its running items now, and nothing tells so
    assert process.poll() is None
    interrupt(process)
    err = end_of(process)
    assert err.count("Traceback") == 1
    assert err.splitlines().count("KeyboardInterrupt") == 1


@pytest.mark.parametrize("function", ["work", "work_async"])
def test_ctrl_c_once_waits_for_the_items_that_run_in_threads_and_starts_no_other(start, function):
    process = start("thread", function, 0.5)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - started > 0.2
    assert out == ""


def test_cancelling_twice_leaves_a_map_whose_items_run_in_threads():
    entered, leave = threading.Event(), threading.Event()

    @opmap(mode="thread", workers=1, progress=False)
    async def work(item):
        entered.set()
        leave.wait(PATIENCE)

    async def main():
        task = asyncio.create_task(work([1]))
        await asyncio.to_thread(entered.wait, PATIENCE)
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = surroundings()
    asyncio.run(main())
    leave.set()
    until(lambda: surroundings() == before)
