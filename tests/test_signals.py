"""Signals other than Ctrl-C, for which the program has handlers that its worker processes may have, too."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from leftovers import surroundings

from opero import opmap

START_METHODS = ("fork", "spawn", "forkserver")


@pytest.fixture
def heard():
    """What this process has heard of SIGTERM, of which it only takes note."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(os.getpid()))
    yield heard
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("method", START_METHODS)
def test_a_map_ends_before_its_workers_are_ready_though_the_program_only_takes_note_of_sigterm(heard, method):
    before = surroundings()
    # Several of them are hardly started when the first has done it all.
    mapped = opmap(mode="process", workers=6, progress=False, pool_options={"start_method": method})(abs)
    for _ in range(5 if method == "fork" else 1):
        assert mapped([-1]) == [1]
    assert heard == []
    assert surroundings() == before


@pytest.mark.parametrize("mode", ["process", "async_process"])
@pytest.mark.parametrize("method", START_METHODS)
def test_the_event_loop_of_the_program_does_not_hear_the_signals_of_its_workers(mode, method):
    async def main():
        heard = []
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.append, os.getpid())

        @opmap(mode=mode, workers=2, progress=False, pool_options={"start_method": method})
        async def signal_itself(item):
            signal.signal(signal.SIGUSR1, lambda *_: None)
            os.kill(os.getpid(), signal.SIGUSR1)
            return item

        assert await signal_itself(range(5)) == [0, 1, 2, 3, 4]
        await asyncio.sleep(0.01)
        assert heard == []
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.sleep(0.01)
        assert heard == [os.getpid()]

    asyncio.run(main())
