"""How long the items of a map may take and wait."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from opero import opmap

PATIENCE = 20.0


def echo(item):
    return item


def test_an_item_that_waits_for_a_worker_ends_when_its_total_timeout_is_over():
    release, starts = threading.Event(), []

    @opmap(mode="thread", workers=1, retries=1, min_delay=0.001, total_timeout=0.3, ordered=False, progress=False)
    def work(item):
        starts.append(item)
        if item == 0:
            raise ValueError
        release.wait(PATIENCE)

    with contextlib.closing(work.stream([0, 1])) as stream:
        ended = next(stream)
        assert (ended.index, type(ended.error), ended.attempts) == (0, ValueError, 1)
        release.set()
        assert next(stream).index == 1
    assert starts == [0, 1]


def test_what_an_item_has_waited_for_a_worker_counts_for_its_total_timeout():
    hold = 0.7

    @opmap(mode="async", workers=1, retries=1, min_delay=0.001, total_timeout=1.0, progress=False)
    async def work(item):
        if item == 1:
            await asyncio.sleep(hold)
            return
        if len(tries) == 0:
            tries.append(item)
            raise ValueError
        await asyncio.Event().wait()

    tries: list[int] = []

    async def main():
        return [outcome async for outcome in work.stream([0, 1])]

    first, _ = asyncio.run(main())
    assert "total_timeout" in str(first.error)
    assert first.seconds < 1.0 + hold / 2


@pytest.mark.parametrize("seconds", [3e6, 1e300])
@pytest.mark.parametrize("options", ["attempt_timeout", "total_timeout"])
def test_a_map_in_processes_may_have_any_time(options, seconds):
    assert opmap(mode="process", workers=1, progress=False, **{options: seconds})(echo)([1, 2]) == [1, 2]


class BusyError(Exception):
    retry_after = 99_999_999


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_an_item_that_has_to_wait_for_years_holds_up_no_other(mode):
    def work(item):
        if item == 1:
            raise BusyError
        return item

    mapped = opmap(
        mode=mode, workers=2, retries=1, retry_on=lambda error: error.retry_after, ordered=False, progress=False
    )(work)
    with contextlib.closing(mapped.stream(range(5))) as stream:
        assert sorted(next(stream).result for _ in range(4)) == [0, 2, 3, 4]
