"""Context variables in maps: each item sees those of the caller, and nothing of the other items."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial

import pytest

from opero import opmap

user: ContextVar[str] = ContextVar("user", default="nobody")

MODES = {"thread": "thread", "async": "async", "executor": partial(ThreadPoolExecutor, 1)}


def handle(item):
    before = user.get()
    user.set(f"user {item}")
    return before


async def handle_async(item):
    token = user.set(f"user {item}")
    await asyncio.sleep(0)
    assert user.get() == f"user {item}"
    user.reset(token)
    return handle(item)


CASES = [
    *((kind, handle, {}) for kind in MODES if kind != "async"),
    *((kind, handle_async, options) for kind in MODES for options in ({}, {"attempt_timeout": 10})),
]


@pytest.mark.parametrize(("kind", "function", "options"), CASES)
def test_an_item_sees_the_callers_variables_and_none_of_another_item(kind, function, options):
    mapped = opmap(mode=MODES[kind], workers=1, progress=False, **options)(function)
    token = user.set("caller")
    try:
        assert mapped.run(range(40)) == ["caller"] * 40
        assert user.get() == "caller"
    finally:
        user.reset(token)
    assert mapped.run(range(3)) == ["nobody"] * 3


@pytest.mark.parametrize("kind", ["thread", "async"])
def test_a_cancelled_item_tidies_up_with_its_own_variables(kind):
    seen = []

    async def wait(item):
        user.set(f"user {item}")
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            seen.append(user.get())

    mapped = opmap(mode=kind, workers=2, retries=0, attempt_timeout=0.02, progress=False, return_exceptions=True)(wait)
    assert [type(result).__name__ for result in mapped.run(range(2))] == ["CallTimeoutError"] * 2
    assert sorted(seen) == ["user 0", "user 1"]
