"""`opero.concurrency`: maps without any policy, and the progress bar of all maps."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import itertools
import operator
import os
import pty
import re
import subprocess
import sys
import termios
import textwrap
import threading
from typing import Any

import numpy as np
import pytest
from side_by_side import eventually, hang

from conftest import as_async
from opero import CallStats, FailedItemsWarning, OperoError, opmap
from opero.concurrency import get_parallel_executor, get_parallel_map_decorator

MODES = ("thread", "process", "async", "async_process")


class SpoiledError(Exception):
    """A user's error."""


def double(item, *, plus=0):
    return item * 2 + plus


async def double_async(item, *, plus=0):
    return item * 2 + plus


def fail_on_odd(item):
    if item % 2:
        raise SpoiledError(item)
    return item


def execute(executor, function, items, /, **kwargs):
    """The executor's list, awaited where the function is ``async def``."""
    result = executor(function, items, **kwargs)
    if not inspect.isawaitable(result):
        return result

    async def wait():
        return await result

    return asyncio.run(wait())


def options_of(mode, **options):
    return {"mode": mode.name, "workers": 2, **options}


# Maps without policies


def test_the_decorator_makes_a_map(mode):
    mapped = get_parallel_map_decorator(**options_of(mode))(mode.define(double))
    assert mode.run(mapped, range(50)) == [n * 2 for n in range(50)]
    assert mode.run(mapped, [1, 2], plus=5) == [7, 9]


def test_the_executor_maps_any_function(mode):
    executor = get_parallel_executor(**options_of(mode))
    assert execute(executor, mode.define(double), range(50)) == [n * 2 for n in range(50)]
    assert execute(executor, mode.define(fail_on_odd), [0, 2]) == [0, 2]


def test_the_executor_gives_keyword_arguments_to_every_item(mode):
    def work(item, *, function, items, mode):
        return item, function, items, mode

    executor = get_parallel_executor(**options_of(mode))
    results = execute(executor, mode.define(work), [1, 2], function="f", items="i", mode="m")
    assert results == [(1, "f", "i", "m"), (2, "f", "i", "m")]


@pytest.mark.parametrize("name", MODES)
def test_the_executor_returns_an_awaitable_for_an_async_function(name):
    executor = get_parallel_executor(name, workers=2)
    assert execute(executor, double_async, [1, 2, 3]) == [2, 4, 6]


@pytest.mark.parametrize("name", ["thread", "process"])
def test_the_executor_returns_the_list_for_a_def_function(name):
    assert get_parallel_executor(name, workers=2)(double, [1, 2, 3]) == [2, 4, 6]


def test_the_mode_may_be_given_by_position(mode):
    mapped = get_parallel_map_decorator(mode.name, workers=2)(mode.define(double))
    assert mode.run(mapped, [1]) == [2]
    assert execute(get_parallel_executor(mode.name, workers=2), mode.define(double), [1]) == [2]


def test_the_default_mode_is_process():
    def process_of(item):
        return os.getpid()

    assert get_parallel_executor()(process_of, [1]) != [os.getpid()]
    assert get_parallel_map_decorator()(process_of)([1]) != [os.getpid()]


def test_the_decorator_adds_no_policy(mode, tmp_path):
    path = tmp_path / "runs"

    def work(item):
        with path.open("a") as file:
            file.write("ran\n")
        return fail_on_odd(item)

    mapped = get_parallel_map_decorator(**options_of(mode, return_exceptions=True))(mode.define(work))
    first, again, failed = mode.run(mapped, [2, 2, 1])
    assert (first, again) == (2, 2)
    assert isinstance(failed, SpoiledError)
    assert len(path.read_text().split()) == 3
    assert mapped.stats.snapshot() == CallStats(calls=3, attempts=3, failures=1)


def test_the_executor_adds_no_policy(mode, tmp_path):
    path = tmp_path / "runs"

    def work(item):
        with path.open("a") as file:
            file.write("ran\n")
        return fail_on_odd(item)

    executor = get_parallel_executor(**options_of(mode, return_exceptions=True))
    *_, failed = execute(executor, mode.define(work), [2, 2, 1])
    assert isinstance(failed, SpoiledError)
    assert len(path.read_text().split()) == 3


def test_a_failed_item_is_its_exception_or_raises(mode):
    kept = get_parallel_map_decorator(**options_of(mode, return_exceptions=True))(mode.define(fail_on_odd))
    assert [type(result) for result in mode.run(kept, [0, 1, 2])] == [int, SpoiledError, int]
    raised = get_parallel_map_decorator(**options_of(mode, return_exceptions=False))(mode.define(fail_on_odd))
    with pytest.raises(SpoiledError):
        mode.run(raised, itertools.count())
    with pytest.raises(SpoiledError):
        execute(
            get_parallel_executor(**options_of(mode, return_exceptions=False)),
            mode.define(fail_on_odd),
            itertools.count(),
        )


def test_none_for_return_exceptions_is_as_if_it_were_not_given():
    mapped = get_parallel_map_decorator("serial", return_exceptions=None)(fail_on_odd)
    with pytest.warns(FailedItemsWarning):
        assert [type(result) for result in mapped([0, 1])] == [int, SpoiledError]


@pytest.mark.parametrize(("ordered", "expected"), [(True, [0, 1]), (False, [1, 0])])
def test_ordered_decides_about_the_order(mode, ordered, expected):
    async def work(item):
        await asyncio.sleep(0 if item else 0.15)
        return item

    executor = get_parallel_executor(**options_of(mode, ordered=ordered))
    assert execute(executor, work, [0, 1]) == expected


def test_workers_decides_how_many_run_together(mode, tmp_path):
    path = tmp_path / "journal"
    path.touch()

    def add(text):
        with path.open("a") as file:
            file.write(f"{text}\n")

    async def work(item):
        add("+")
        await eventually(lambda: path.read_text().count("+") >= 3)
        await asyncio.sleep(0.02)
        add("-")

    options = options_of(mode, **({"concurrency": 1} if mode.name == "async_process" else {}))
    execute(get_parallel_executor(**{**options, "workers": 3}), work, range(7))
    steps = [{"+": 1, "-": -1}[line] for line in path.read_text().split()]
    assert max(itertools.accumulate(steps)) == 3


def test_the_decorated_function_has_streams_and_single_calls(mode):
    mapped = get_parallel_map_decorator(**options_of(mode))(mode.define(double))
    assert [outcome.result for outcome in mode.stream(mapped, [1, 2])] == [2, 4]
    single = mapped.one(5)
    assert (asyncio.run(single) if mode.is_async else single) == 10


def test_several_executors_work_at_the_same_time():
    executor = get_parallel_executor("thread", workers=2)
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda: results.append(executor(double, range(20)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[n * 2 for n in range(20)]] * 4


# Options of the pools

prepared = "no"


def prepare(text):
    global prepared  # noqa: PLW0603 - what an initializer does
    prepared = text


def look(item):
    return prepared, os.getppid()


async def look_async(item):
    return look(item)


@pytest.mark.parametrize("name", ["process", "async_process"])
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_pool_options_reach_the_pool(name, method):
    options: dict[str, Any] = {"start_method": method, "initializer": prepare, "initargs": ("yes",)}
    function = look if name == "process" else look_async
    by_executor = execute(get_parallel_executor(name, workers=1, **options), function, [1])
    by_decorator = get_parallel_map_decorator(name, workers=1, **options)(function).run([1])
    for ((seen, parent),) in (by_executor, by_decorator):
        assert seen == "yes"
        assert (parent == os.getpid()) is (method == "fork")
    assert prepared == "no"


@pytest.mark.parametrize("function", [double, double_async])
def test_an_initializer_prepares_each_thread_before_its_first_item(function):
    ready = threading.local()
    prepared_by = []

    def prepare_thread(text):
        ready.text = text
        prepared_by.append(threading.get_ident())

    def work(item):
        return ready.text, threading.get_ident()

    mapped = get_parallel_map_decorator("thread", workers=3, initializer=prepare_thread, initargs=("yes",))
    results = mapped(as_async(work) if function is double_async else work).run(range(100))
    assert {text for text, _ in results} == {"yes"}
    assert {thread for _, thread in results} <= set(prepared_by)


def test_an_initializer_that_raises_in_a_thread_ends_the_map():
    def refuse():
        raise ValueError("cannot prepare")

    with pytest.raises(OperoError, match="a worker thread cannot run double: ValueError: cannot prepare") as caught:
        get_parallel_map_decorator("thread", workers=3, initializer=refuse)(double)(range(100))
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("name", ["thread", "process", "async_process"])
def test_the_finalizer_runs_in_each_worker_at_its_end_and_before_exit_handlers(name, journal):
    def prepare_worker(item):
        journal.add(f"prepared with {item}")
        atexit.register(journal.add, "exit handler")

    def end():
        journal.add("finalizer")

    options = {"initializer": prepare_worker, "initargs": ("this",), "finalizer": end}
    function = double_async if name == "async_process" else double
    assert get_parallel_map_decorator(name, workers=1, **options)(function).run([1, 2]) == [2, 4]
    lines = journal.lines()
    if name == "thread":
        atexit.unregister(journal.add)
        assert lines == ["prepared with this", "finalizer"]
    else:
        assert lines == ["prepared with this", "finalizer", "exit handler"]


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_the_finalizer_runs_in_a_process_that_is_ended(method, journal):
    def end():
        journal.add("finalizer")

    def fail(item):
        if item:
            hang()
        raise ValueError("this ends the map")

    options = {"start_method": method, "finalizer": end}
    mapped = get_parallel_map_decorator("process", workers=2, return_exceptions=False, **options)(fail)
    with pytest.raises(ValueError, match="this ends the map"):
        mapped([1, 0])
    assert journal.lines() == ["finalizer"] * 2


@pytest.mark.parametrize("name", ["thread", "process"])
def test_kept_workers_run_their_finalizer_when_the_block_ends(name, journal):
    def end():
        journal.add("finalizer")

    mapped = get_parallel_map_decorator(name, workers=1, finalizer=end)(double)
    with mapped.pool():
        assert mapped([1]) + mapped([2]) == [2, 4]
        assert journal.lines() == []
    assert journal.lines() == ["finalizer"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mode": "threads"}, ValueError, "did you mean 'thread'"),
        ({"workers": 0}, ValueError, "workers"),
        ({"workers": 1.5}, TypeError, "workers"),
        ({"ordered": "no"}, TypeError, "ordered"),
        ({"progress": 5}, TypeError, "progress"),
        ({"return_exceptions": 1}, TypeError, "return_exceptions"),
        ({"mode": "async"}, TypeError, "double"),
        ({"mode": "async_process"}, TypeError, "double"),
        ({"unknown": 1}, TypeError, "unknown"),
        ({"start_method": "telepathy"}, ValueError, "'spawn'"),
        ({"initializer": "text"}, TypeError, "initializer"),
        ({"initializer": prepare, "initargs": ["yes"]}, TypeError, "initargs"),
        ({"initargs": ("yes",)}, ValueError, "initargs"),
        ({"finalizer": "text"}, TypeError, "finalizer"),
        ({"mode": "serial", "finalizer": prepare}, TypeError, "finalizer"),
        ({"mode": "thread", "start_method": "fork"}, TypeError, "start_method"),
        ({"mode": "serial", "initializer": prepare}, TypeError, "initializer"),
        ({"concurrency": 5}, TypeError, "concurrency"),
        ({"retries": 3}, TypeError, "retries"),
    ],
    ids=str,
)
def test_a_wrong_option_raises_and_is_named(options, error, words):
    with pytest.raises(error, match=words):
        get_parallel_map_decorator(**options)(double)
    with pytest.raises(error, match=words):
        get_parallel_executor(**options)(double, [1])


@pytest.mark.parametrize(
    ("options", "error"),
    [({"concurrency": 0}, ValueError), ({"concurrency": 1.5}, TypeError), ({"concurrency": True}, TypeError)],
    ids=str,
)
def test_a_wrong_concurrency_raises_and_is_named(options, error):
    with pytest.raises(error, match="concurrency"):
        get_parallel_map_decorator("async_process", **options)(double_async)


@pytest.mark.parametrize("wrong", [5, classmethod(double), staticmethod(double), iter([])], ids=type)
def test_what_is_no_function_is_refused(wrong):
    with pytest.raises(TypeError):
        get_parallel_map_decorator("thread")(wrong)
    with pytest.raises(TypeError):
        get_parallel_executor("thread")(wrong, [1])


def test_a_class_is_not_decorated():
    with pytest.raises(TypeError, match=r"the class .*; it decorates functions"):
        get_parallel_map_decorator("thread")(int)


class Point:
    def __init__(self, x, *, y=0):
        self.place = x, y

    async def __call__(self):
        """For calling an instance only."""


@pytest.mark.parametrize("name", ["thread", "process", "serial"])
@pytest.mark.parametrize(
    ("function", "items", "expected"),
    [
        (int, ["1", "2"], [1, 2]),
        (str.upper, ["a"], ["A"]),
        (operator.itemgetter(1), [[1, 2]], [2]),
        (", ".join, [["a", "b"]], ["a, b"]),
        (np.sqrt, [1, 4], [1, 2]),
        (max, [[1, 3, 2]], [3]),
        (type, [1], [int]),
    ],
    ids=["class", "descriptor", "callable object", "bound builtin", "ufunc", "without a signature", "type"],
)
def test_an_executor_maps_all_that_can_be_called(name, function, items, expected):
    assert get_parallel_executor(name)(function, items) == expected


@pytest.mark.parametrize("name", ["thread", "process", "serial"])
def test_an_executor_makes_instances_with_keyword_arguments(name):
    assert [point.place for point in get_parallel_executor(name)(Point, [1, 2], y=3)] == [(1, 3), (2, 3)]


# Progress

SCRIPT = """
    import json, sys, threading, time
    from opero import opmap
    from opero.concurrency import get_parallel_executor, get_parallel_map_decorator

    def work(item):
        if item < 0:
            raise ValueError("negative")
        return item

    async def work_async(item):
        return work(item)

    def slow(item):
        time.sleep(0.02)

    async def slow_async(item):
        slow(item)

    if __name__ == "__main__":
        function = work_async if {mode!r}.startswith("async") else work
        options = dict(mode={mode!r}, workers=2)
        {body}
        import tqdm
        json.dump([[t.name for t in threading.enumerate()], tqdm.tqdm.monitor_interval], sys.stdout)
"""
NOTHING_CHANGED = '[["MainThread"], 10]'


class Terminal:
    """Runs scripts whose stderr is a pseudo terminal, or a pipe."""

    def __init__(self, folder):
        self._path = folder / "script.py"

    def _command(self, body, mode):
        body = textwrap.indent(textwrap.dedent(body), "    ").strip()
        source = textwrap.dedent(SCRIPT).format(mode=mode, body=body)
        self._path.write_text(source)
        return [sys.executable, str(self._path)]

    def on_terminal(self, body, mode="thread"):
        """What was written to the terminal, and to stdout."""
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(ours, (24, 100))
        process = subprocess.Popen(
            self._command(body, mode),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
        )
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # Linux reports the end of a pseudo terminal as an error
            while piece := os.read(ours, 65536):
                written += piece
        os.close(ours)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0, written.decode()
        return written.decode(), out

    def on_pipe(self, body, mode="thread"):
        done = subprocess.run(
            self._command(body, mode), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=True
        )
        return done.stderr, done.stdout


@pytest.fixture
def terminal(tmp_path):
    return Terminal(tmp_path)


IN_EACH_MODE = f"""
    for mode in {MODES}:
        function = work_async if mode.startswith("async") else work
        opmap(mode=mode, workers=2, progress=f"fetching in {{mode}}")(function).run(range(50))
"""


def test_a_terminal_shows_a_bar_with_the_label(terminal):
    written, out = terminal.on_terminal(IN_EACH_MODE)
    for mode in MODES:
        assert re.search(rf"fetching in {mode}:[^\r]* 50/50 ", written)
    assert out == NOTHING_CHANGED


def test_without_a_terminal_there_is_no_bar(terminal):
    written, out = terminal.on_pipe(IN_EACH_MODE)
    assert written == ""
    assert out == NOTHING_CHANGED


def test_without_a_terminal_a_captured_map_writes_nothing(mode, capfd):
    mapped = opmap(**{**mode.options, "progress": True})(mode.define(double))
    mode.run(mapped, range(20))
    assert capfd.readouterr() == ("", "")


def test_by_default_the_bar_has_the_name_of_the_function(terminal):
    written, _ = terminal.on_terminal("opmap(**options)(function).run(range(50))")
    assert "work" in written
    assert "50/50" in written


def test_progress_false_shows_nothing(terminal):
    written, _ = terminal.on_terminal("opmap(**options, progress=False)(function).run(range(50))")
    assert written == ""


def test_the_bar_tells_how_many_items_failed(terminal):
    written, _ = terminal.on_terminal("opmap(**options, retries=0)(function).run([1, -1, -2, 3])")
    assert "4/4" in written
    assert "failed=2" in written


def test_the_bar_tells_how_many_items_were_retried_and_how_many_came_from_the_cache(terminal):
    body = f"""
        import pathlib

        def try_it(item, mode):
            mark = pathlib.Path(f"{{__file__}}.{{mode}}.{{item}}")
            if item < 3 and not mark.exists():
                mark.touch()
                raise ValueError(item)
            if item == 9:
                raise TypeError(item)

        async def try_it_async(item, mode):
            try_it(item, mode)

        for mode in {MODES}:
            options = dict(mode=mode, workers=2, cache=True, retry_on=ValueError, min_delay=0.01)
            mapped = opmap(**options, progress=f"in {{mode}}")(try_it_async if mode.startswith("async") else try_it)
            mapped.run((item for item in [0, 1, 2, 3, 3, 4, 4, 9]), mode)
    """
    written, _ = terminal.on_terminal(body)
    for mode in MODES:
        last = [line for line in written.split("\r") if f"in {mode}:" in line and "item/s" in line][-1]
        assert "8item" in last
        assert "failed=1, retried=3, cached=2" in last


def test_the_bar_tells_of_a_retry_before_any_item_has_ended(terminal):
    written, _ = terminal.on_terminal("opmap(**options, retries=1, min_delay=0.3)(function).run([-1])")
    shown = next(line for line in written.split("\r") if "retried=1" in line)
    assert "0/1" in shown


def test_the_bar_counts_items_of_an_input_without_a_length(terminal):
    written, _ = terminal.on_terminal("opmap(**options, progress='fetching')(function).run(item for item in range(50))")
    assert "fetching" in written
    assert "50item" in written


def test_a_stream_has_a_bar_too(terminal):
    written, out = terminal.on_terminal("list(opmap(**options, progress='streaming')(function).stream(range(50)))")
    assert "streaming" in written
    assert "50/50" in written
    assert out == NOTHING_CHANGED


def test_the_bar_ends_when_a_map_is_stopped_by_a_failure(terminal):
    body = """
        try:
            opmap(**options, progress='fetching', retries=0, return_exceptions=False)(function).run([1, -1])
        except ValueError:
            print("raised", file=sys.stderr)
    """
    written, out = terminal.on_terminal(body)
    assert "fetching" in written
    assert written.replace("\r", "").splitlines()[-1] == "raised"
    assert out == NOTHING_CHANGED


def screens(written):
    """What the terminal shows after each step: lines of text."""
    rows, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[A|\r|\n|[^\r\n\x1b]+", written):
        if piece == "\x1b[A":
            row -= 1
        elif piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1  # the terminal has made \r\n of it
            rows.extend([""] * (row + 1 - len(rows)))
        else:
            line = rows[row].ljust(column)
            rows[row] = line[:column] + piece + line[column + len(piece) :]
            column += len(piece)
            yield [line.rstrip() for line in rows if line.strip()]


# It is the caller that draws them, in every mode.
@pytest.mark.parametrize("mode", ["thread", "async_process"])
def test_the_bars_of_several_maps_at_once_do_not_mix(mode, terminal):
    body = """
        slowly = slow_async if function is work_async else slow
        maps = [opmap(**options, progress=label)(slowly) for label in ("first", "second", "third")]
        threads = [threading.Thread(target=one.run, args=(range(20 * n),)) for n, one in enumerate(maps, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    """
    written, _ = terminal.on_terminal(body, mode)
    labels = ("first:", "second:", "third:")
    for lines in screens(written):
        assert all(sum(line.count(label) for label in labels) <= 1 for line in lines)
    assert sorted(line.split(":")[0] for line in lines) == ["first", "second", "third"]
    assert all(
        f"{20 * n}/{20 * n}" in next(line for line in lines if label in line) for n, label in enumerate(labels, 1)
    )


def test_a_map_in_a_worker_process_of_another_map_shows_no_bar(terminal):
    body = """
        inner = opmap(mode="thread", progress="inner")(abs)

        def outer(item):
            return inner([item])

        opmap(**options, progress="outer", retries=0, return_exceptions=False)(outer)(range(4))
    """
    written, _ = terminal.on_terminal(body, "process")
    assert "outer" in written
    assert "inner" not in written


def test_a_single_call_has_no_bar(terminal):
    written, _ = terminal.on_terminal("opmap(**options, attempt_timeout=5)(function).one(1)", "process")
    assert written == ""


def test_maps_without_policies_show_a_bar_only_if_asked(terminal):
    body = """
        get_parallel_executor(**options)(function, range(50))
        get_parallel_executor(**options, progress="fetching first")(function, range(50))
        get_parallel_map_decorator(**options, progress="fetching later")(function)(range(50))
    """
    written, _ = terminal.on_terminal(body)
    assert written.startswith("\rfetching first:")
    assert "fetching later:" in written
