"""An event loop that is not asyncio's."""

from __future__ import annotations

import pytest
import trio
import trio.lowlevel

from opero import MisuseError, opero


def test_a_call_that_succeeds_needs_no_asyncio():
    @opero(retries=3)
    async def fetch(x):
        await trio.lowlevel.checkpoint()
        return x

    assert trio.run(fetch, 1) == 1


def test_a_retry_that_must_wait_is_refused_beside_the_users_error():
    down = ConnectionError("down")

    @opero(retries=3, min_delay=0.01)
    async def fetch():
        await trio.lowlevel.checkpoint()
        raise down

    with pytest.raises(MisuseError, match=r"(?i)asyncio") as caught:
        trio.run(fetch)
    assert caught.value.__context__ is down


def test_a_cancellation_by_trio_passes():
    tries = []

    @opero(retries=3)
    async def fetch():
        tries.append(1)
        await trio.sleep_forever()

    async def main():
        with trio.move_on_after(0.01) as scope:
            await fetch()
        return scope.cancelled_caught

    assert trio.run(main)
    assert tries == [1]


def test_a_blocking_function_is_retried_in_a_thread_of_trio():
    tries = []

    @opero(min_delay=0.001)
    def fetch(x):
        tries.append(x)
        if len(tries) == 1:
            raise ConnectionError
        return x

    async def main():
        return await trio.to_thread.run_sync(fetch, 1)

    assert trio.run(main) == 1
    assert tries == [1, 1]
