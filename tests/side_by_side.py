"""Calls in threads and in forked children, and waiting for them: what several test files need."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import select
import signal
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

SECONDS = 20  # for what takes milliseconds; so long only where it hangs


def started(function, *args) -> Future:
    """The result-to-be of a call in a thread that nobody has to wait for."""
    future: Future = Future()

    def run():
        try:
            future.set_result(function(*args))
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def results(futures):
    return [future.result(SECONDS) for future in futures]


def errors(futures):
    return [future.exception(SECONDS) for future in futures]


def until(condition):
    """Wait for a state that nothing announces."""
    end, pause = time.monotonic() + SECONDS, 0.001
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(pause)
        pause = min(1.2 * pause, 0.02)  # what takes long leaves the processor to whoever is waited for


async def eventually(condition):
    """As `until`, while the event loop goes on."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not come"
        await asyncio.sleep(0.001)


def hang():
    """Block until the process is ended; not for ever, should nobody end it."""
    threading.Event().wait(60)


def assert_limited(starts, rate, *, since):
    """None came before its slot was due; later, where the machine was busy, several may come at once."""
    for number, start in enumerate(sorted(starts)):
        assert start - since >= 0.9 * number / rate


async def note_turns(turns):
    """Add to the list, until cancelled, at each turn of the event loop: 200 in a second in which nothing blocks it."""
    while True:
        await asyncio.sleep(0.005)
        turns.append(len(turns))


forks = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


_stacks = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the tests run


def _stack_of(child: int) -> str:
    before = os.fstat(_stacks.fileno()).st_size
    os.kill(child, signal.SIGUSR1)
    with contextlib.suppress(AssertionError):
        until(lambda: os.fstat(_stacks.fileno()).st_size > before)
    time.sleep(0.5)
    stack = os.pread(_stacks.fileno(), 100_000, before).decode()
    return stack or f"it does not hear a signal: {Path(f'/proc/{child}/status').read_text()}"


def forked(function) -> str:
    """What ``function`` returns in a forked child, as text; if it hangs it is ended, and the text says where it was."""
    reading, writing = os.pipe()
    # Registered here, so that it is told of the hooks of a fork, too.
    faulthandler.register(signal.SIGUSR1, file=_stacks)
    child = os.fork()
    if child == 0:
        try:
            answer = repr(function())
        except BaseException as error:  # noqa: BLE001 - the parent looks at it
            answer = repr(error)
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], SECONDS)
        return os.read(reading, 10_000).decode() if ready else f"it hangs: {_stack_of(child)}"
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
