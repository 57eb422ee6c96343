"""What failed in the opero that came before (PyPI 2.7.5 and its repository): each failure is a test that passes."""

from __future__ import annotations

import ast
import asyncio
import importlib
import io
import itertools
import os
import pkgutil
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from side_by_side import assert_limited, eventually

import opero as package
from opero import clear_cache, opero, opmap
from opero.core import RateLimiter

ROOT = Path(__file__).parent.parent


class SpoiledError(Exception):
    """A user's error."""


def run_script(source: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", source], check=True, capture_output=True, text=True)
    return done.stdout


def counting(function):
    """The function, and the list of what it was called with."""
    calls = []

    def counted(x):
        calls.append(x)
        return function(x)

    return counted, calls


# Earlier: the wheel on PyPI cannot be imported (No module named 'opero.__version__', then `apmap`).


def test_the_package_can_be_imported_without_a_warning():
    assert run_script("import opero; print(opero.__version__)").strip() == package.__version__


def modules():
    names = [found.name for found in pkgutil.walk_packages(package.__path__, "opero.")]
    return [package, *(importlib.import_module(name) for name in names)]


def test_every_module_can_be_imported():
    assert len(modules()) > 20


# Earlier: its documents imported 40 names that did not exist.


def test_every_exported_name_exists():
    missing = [
        f"{module.__name__}.{name}"
        for module in modules()
        for name in getattr(module, "__all__", ())
        if not hasattr(module, name)
    ]
    assert missing == []


def documents():
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def imported_names(source: str):
    """Names that source text imports from opero, as "module.name"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "opero":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "opero")


def exists(dotted: str) -> bool:
    module, _, name = dotted.rpartition(".")
    try:
        importlib.import_module(dotted)
    except ImportError:
        return bool(module) and exists(module) and hasattr(importlib.import_module(module), name)
    return True


def test_every_name_that_the_documents_import_exists():
    sources = [
        block
        for path in documents()
        for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    ]
    sources += [path.read_text() for folder in ("examples", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    names = {name for source in sources for name in imported_names(source)}
    assert {"opero.opero", "opero.opmap"} <= names
    assert sorted(name for name in names if not exists(name)) == []


def test_every_name_that_the_documents_mention_exists():
    names = {name for path in documents() for name in re.findall(r"`(opero(?:\.[A-Za-z_]\w*)+)", path.read_text())}
    assert "opero.core" in names
    assert sorted(name for name in names if not exists(name)) == []


# Earlier: no option of the cache worked, nor did clear_cache; a bare @opero() raised.


def test_opero_with_empty_parentheses_works(world):
    decorated = opero()(world.define(lambda x: x + 1))
    assert world.run(decorated, 1) == 2


def test_cache_works(world):
    function, calls = counting(lambda x: x + 1)
    decorated = opero(cache=True)(world.define(function))
    assert [world.run(decorated, x) for x in (1, 1, 2)] == [2, 2, 3]
    assert calls == [1, 2]


def test_cache_ttl_works(world, fake_clock):
    function, calls = counting(lambda x: x + 1)
    decorated = opero(cache=True, cache_ttl=10)(world.define(function))
    world.run(decorated, 1)
    fake_clock.tick(9.9)
    world.run(decorated, 1)
    assert calls == [1]
    fake_clock.tick(0.2)
    world.run(decorated, 1)
    assert calls == [1, 1]


def test_cache_backend_memory_works(world):
    function, calls = counting(lambda x: x + 1)
    decorated = opero(cache=True, cache_backend="memory")(world.define(function))
    assert [world.run(decorated, 1) for _ in range(3)] == [2, 2, 2]
    assert calls == [1]


def test_cache_key_works(world):
    function, calls = counting(str.upper)
    decorated = opero(cache=True, cache_key=lambda x: x.lower())(world.define(function))
    assert [world.run(decorated, x) for x in ("a", "A", "b")] == ["A", "A", "B"]
    assert calls == ["a", "b"]


def test_cache_namespace_works(world):
    first, calls_of_first = counting(lambda x: ("first", x))
    second, calls_of_second = counting(lambda x: ("second", x))
    namespace = f"shared by {world.is_async}"
    one = opero(cache=True, cache_namespace=namespace)(world.define(first))
    other = opero(cache=True, cache_namespace=namespace)(world.define(second))
    assert world.run(one, 1) == ("first", 1)
    assert world.run(other, 1) == ("first", 1)
    assert (calls_of_first, calls_of_second) == ([1], [])


def test_clear_cache_works(world):
    function, calls = counting(lambda x: x + 1)
    namespace = f"cleared in {world.is_async}"
    named = opero(cache=True, cache_namespace=namespace)(world.define(function))
    world.run(named, 1)
    clear_cache("another namespace")
    world.run(named, 1)
    assert calls == [1]
    clear_cache(namespace)
    world.run(named, 1)
    assert calls == [1, 1]
    clear_cache()
    world.run(named, 1)
    assert calls == [1, 1, 1]


# Earlier: rate_limit crashed for async and was four times too fast with four threads.


def test_the_rate_limit_works_for_async_functions():
    starts = []

    @opero(rate_limit=50, rate_limit_options={"max_burst": 1})
    async def call(x):
        starts.append(time.monotonic())
        return x

    async def main():
        return await asyncio.gather(*(call(x) for x in range(10)))

    began = time.monotonic()
    assert asyncio.run(main()) == list(range(10))
    assert_limited(starts, 50, since=began)


def test_the_rate_limit_is_right_with_four_threads():
    starts = []

    @opero(rate_limit=50, rate_limit_options={"max_burst": 1})
    def call():
        starts.append(time.monotonic())

    threads = [threading.Thread(target=lambda: [call() for _ in range(5)]) for _ in range(4)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(starts) == 20
    assert_limited(starts, 50, since=began)


# Earlier: one failing item of a map raised and lost all results.


def test_a_failing_item_of_a_map_loses_no_result(mode):
    def work(x):
        if x == 5:
            raise SpoiledError(x)
        return x

    mapped = opmap(**mode.options, retries=0, return_exceptions=True)(mode.define(work))
    results = mode.run(mapped, range(10))
    assert isinstance(results.pop(5), SpoiledError)
    assert results == [0, 1, 2, 3, 4, 6, 7, 8, 9]


# Earlier: configure_logging twice doubled every line.


def test_configuring_the_logging_twice_doubles_no_line():
    lines = run_script("""
import sys
from loguru import logger
from opero import configure_logging, opero

logger.remove()
logger.add(sys.stdout, format="{message}", level="DEBUG")
configure_logging("WARNING")
configure_logging("WARNING")

@opero(retries=0)
def broken():
    raise ValueError("the reason")

try:
    broken()
except ValueError:
    pass
""").splitlines()
    assert len([line for line in lines if "broken" in line]) == 1


# Earlier: the sync fallback replaced the first positional argument, the async one the named one.


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((["first"], ["bad", "good"], ["last"]), {}),
        ((["first"],), {"key": ["bad", "good"], "last": ["last"]}),
        ((), {"last": ["last"], "key": ["bad", "good"], "first": ["first"]}),
    ],
    ids=["by position", "mixed", "by name"],
)
def test_fallback_replaces_the_named_parameter_and_no_other(world, args, kwargs):
    def work(first, key, last):
        if key == "bad":
            raise SpoiledError(key)
        return first, key, last

    decorated = opero(arg_fallback="key", retries=0)(world.define(work))
    assert world.run(decorated, *args, **kwargs) == (["first"], "good", ["last"])


# Earlier: cache was documented as the outermost layer and built as the innermost.


def test_a_cached_call_waits_for_no_rate_limit(world, fake_clock):
    function, calls = counting(lambda x: x + 1)
    decorated = opero(cache=True, rate_limit="1/hour")(world.define(function))
    assert [world.run(decorated, 1) for _ in range(5)] == [2] * 5
    assert calls == [1]
    assert fake_clock.sleeps == []
    assert decorated.stats.waited == 0


# Earlier: limiter.acquire() does not exist.


def test_a_limiter_can_be_acquired():
    limiter = RateLimiter(100, max_burst=1)
    starts = []
    began = time.monotonic()
    for _ in range(4):
        limiter.acquire()
        starts.append(time.monotonic())

    async def main():
        for _ in range(4):
            await limiter.acquire_async()
            starts.append(time.monotonic())

    asyncio.run(main())
    assert_limited(starts, 100, since=began)


# Earlier: mode="async" called a process map.


def test_async_mode_runs_in_the_event_loop_that_awaits_it():
    @opmap(mode="async", progress=False)
    async def place(item):
        await asyncio.sleep(0)
        return os.getpid(), id(asyncio.get_running_loop())

    async def main():
        return await place(range(10)), (os.getpid(), id(asyncio.get_running_loop()))

    places, here = asyncio.run(main())
    assert Counter(places) == {here: 10}


# Earlier: workers, ordered, progress did nothing.


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_has_an_effect(mode, tmp_path, workers):
    path = tmp_path / "journal"
    path.touch()

    def add(text):
        with path.open("a") as file:
            file.write(f"{text}\n")

    one_at_a_time = {"pool_options": {"concurrency": 1}} if mode.name == "async_process" else {}

    @opmap(**{**mode.options, "workers": workers}, **one_at_a_time)
    async def work(item):
        add("+")
        await eventually(lambda: path.read_text().count("+") >= workers)
        await asyncio.sleep(0.02)
        add("-")

    work.run(range(6))
    steps = [{"+": 1, "-": -1}[line] for line in path.read_text().split()]
    assert max(itertools.accumulate(steps)) == workers


@pytest.mark.parametrize(("ordered", "expected"), [(True, [0, 1]), (False, [1, 0])])
def test_ordered_has_an_effect(mode, ordered, expected):
    @opmap(**mode.options, ordered=ordered)
    async def work(item):
        await asyncio.sleep(0 if item else 0.15)
        return item

    assert work.run([0, 1]) == expected


class TerminalText(io.StringIO):
    """A terminal, as far as a progress bar can tell."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", [True, "a label", False])
def test_progress_has_an_effect(mode, monkeypatch, progress):
    terminal = TerminalText()
    monkeypatch.setattr(sys, "stderr", terminal)

    def work(item):
        return item

    mode.run(opmap(**{**mode.options, "progress": progress})(mode.define(work)), range(5))
    if progress is False:
        assert terminal.getvalue() == ""
    else:
        assert "5/5" in terminal.getvalue()
        assert ("a label" if progress == "a label" else "work") in terminal.getvalue()
