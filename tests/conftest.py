"""What the tests share: the sync and the async world, the modes of a map, and a clock that only moves when told."""

from __future__ import annotations

import asyncio
import functools
import inspect
import signal
from typing import TYPE_CHECKING, Any

import pytest

from opero.core.clock import clock
from opero.core.signature import compile_function, forwarding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# A run in the background of a shell inherits an ignored Ctrl-C, and so would the programs that the tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def as_async(function: Callable[..., Any]) -> Callable[..., Any]:
    """An ``async def`` function with the same signature that calls ``function``."""
    shape = forwarding(function)
    source = f"async def call({shape.parameters}):\n    return _opero_function({shape.call})\n"
    made = compile_function(source, "call", {**shape.defaults, "_opero_function": function})
    functools.update_wrapper(made, function)
    del made.__wrapped__
    made.__signature__ = inspect.signature(function)
    return made


class World:
    """Runs one test body with ``def`` functions or with ``async def`` functions."""

    def __init__(self, *, is_async: bool) -> None:
        self.is_async = is_async

    def define(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a plain function one of this world."""
        return as_async(function) if self.is_async else function

    def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of this world and give its result."""
        if not self.is_async:
            return function(*args, **kwargs)

        async def call() -> Any:
            return await function(*args, **kwargs)

        return asyncio.run(call())


@pytest.fixture(params=["sync", "async"])
def world(request: pytest.FixtureRequest) -> World:
    return World(is_async=request.param == "async")


class Mode:
    """Runs one test body in one mode of `opero.opmap`; ``options`` go to the decorator."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_async = name.startswith("async")
        self.shares_memory = name in {"thread", "async"}

    @property
    def options(self) -> dict[str, Any]:
        return {"mode": self.name, "workers": 2, "progress": False}

    def define(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a plain function one that fits the mode."""
        return as_async(function) if self.is_async else function

    def run(self, mapped: Any, items: Any, /, **kwargs: Any) -> Any:
        """Call a map by blocking."""
        return mapped.run(items, **kwargs)

    def stream(self, mapped: Any, items: Any, /, **kwargs: Any) -> list[Any]:
        """All outcomes of a stream."""
        if not self.is_async:
            return list(mapped.stream(items, **kwargs))

        async def collect() -> list[Any]:
            return [outcome async for outcome in mapped.stream(items, **kwargs)]

        return asyncio.run(collect())


MODES = ("thread", "process", "async", "async_process")


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    return Mode(request.param)


class FakeClock:
    """Time that moves only by sleeping, or by `tick`."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.sleeps: list[float] = []

    def now(self) -> float:
        return self.time

    def tick(self, seconds: float) -> None:
        self.time += seconds

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.tick(seconds)

    async def async_sleep(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture
def fake_clock() -> Iterator[FakeClock]:
    fake = FakeClock()
    clock.now, clock.sleep, clock.async_sleep = fake.now, fake.sleep, fake.async_sleep
    yield fake
    clock.reset()
