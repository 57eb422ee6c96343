"""Every way in which a map can end leaves nothing behind, and Ctrl-C ends it, at the second press at once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import anyio
import pytest
from leftovers import marked, surroundings
from side_by_side import until
from test_process_mode import INTERRUPTED

from opero import opmap
from opero.concurrency.pool import Batch
from opero.concurrency.processes import ProcessPool
from opero.concurrency.running import BlockingInbox
from opero.concurrency.worker import Shape, Work

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
    ends(mode, opmap(**mode.options, retries=0, return_exceptions=True)(mode.define(fail_on_seven)))


# Without anybody's closing it

MAPS_IN_THREADS = {
    "thread": {"mode": "thread", "workers": 2},
    "executor": {"mode": partial(ThreadPoolExecutor, 2)},
}


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("options", MAPS_IN_THREADS.values(), ids=MAPS_IN_THREADS)
def test_a_stream_that_the_garbage_collector_ends_in_one_of_its_own_workers_ends(options, keeps):
    is_dropped, is_collected = threading.Event(), threading.Event()

    def work(item):
        if item >= 1:
            is_dropped.wait(PATIENCE)
            gc.collect()
            is_collected.set()
        return item

    mapped = opmap(**options, retries=0, progress=False)(work)
    gc.disable()
    try:
        with mapped.pool() if keeps else contextlib.nullcontext():
            before = surroundings()
            cycle = [mapped.stream(endless())]
            next(cycle[0])
            cycle.append(cycle)
            del cycle
            is_dropped.set()
            assert is_collected.wait(PATIENCE)
            assert mapped(range(3)) == [0, 1, 2]
        until(lambda: surroundings() == before)
    finally:
        gc.enable()


LEFT_OPEN = """
    import time
    from opero import opmap

    def work(item):
        time.sleep(0.1)
        return item

    stream = opmap(mode=MODE, workers=2, retries=0, progress=False)(work).stream(range(1000))
    print(next(stream).result)
"""


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_a_program_ends_though_it_has_left_a_stream_open(tmp_path, mode):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(LEFT_OPEN).replace("MODE", repr(mode)))
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert (run.stdout, run.stderr) == ("0\n", "")


# Ctrl-C

EXECUTORS = {
    "threads of an executor": "lambda: __import__('concurrent.futures').futures.ThreadPoolExecutor(2)",
    "reusable loky": "lambda: __import__('loky').get_reusable_executor(2, timeout=60)",
    **{
        f"processes of an executor, {method}": "lambda: __import__('concurrent.futures').futures.ProcessPoolExecutor("
        f"2, mp_context=__import__('multiprocessing').get_context({method!r}))"
        for method in ("fork", "spawn", "forkserver")
    },
}
IN_EXECUTORS = [
    *[(name, "work", None) for name in EXECUTORS],
    ("processes of an executor, spawn", "work_async", None),
    ("reusable loky", "work_async", None),
]
KINDS = [
    ("thread", "work", None),
    ("thread", "work_async", None),
    ("async", "work_async", None),
    *[("process", "work", method) for method in ("fork", "spawn", "forkserver")],
    ("process", "work_async", "fork"),
    *[("async_process", "work_async", method) for method in ("fork", "spawn", "forkserver")],
    *IN_EXECUTORS,
]


class Interrupted:
    """A program that maps, and what it has while it runs."""

    def __init__(self, folder, mode, function, seconds, method=None, *, on_a_terminal=False):
        self._mark = uuid.uuid4().hex
        self._folder = folder / "temporary"
        self._folder.mkdir()
        options = {"start_method": method} if method else None
        source = textwrap.dedent(INTERRUPTED).replace("SECONDS", str(seconds)).replace("OPTIONS", repr(options))
        path = folder / "script.py"
        path.write_text(source.replace("MODE", EXECUTORS.get(mode, repr(mode))).replace("FUNCTION", function))
        self._terminal, stderr = os.openpty() if on_a_terminal else (None, subprocess.PIPE)
        self._shown = ""
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "OPERO_TEST_MARK": self._mark, "TMPDIR": str(self._folder), "PYTHON_COLORS": "0"},
            start_new_session=True,
        )
        if on_a_terminal:
            os.close(stderr)

    def read_terminal(self, wanted=None):
        """Until it shows that, or its program has ended."""
        # At the end Linux has no more to read, but an error.
        with contextlib.suppress(OSError):
            while wanted is None or wanted not in self._shown:
                readable, _, _ = select.select([self._terminal], [], [], PATIENCE)
                assert readable, self._shown
                self._shown += os.read(self._terminal, 4096).decode()

    def wait_for(self, running):
        for _ in range(running):
            assert self._process.stdout.readline() == "running\n"
        maps = Path(f"/proc/{self._process.pid}/maps").read_text()
        self._shared = {Path(line.split()[5]) for line in maps.splitlines() if "/dev/shm/" in line}

    def press(self):
        os.killpg(self._process.pid, signal.SIGINT)

    def end(self, presses=1):
        """Wait for its end; what it has written to stdout."""
        if self._terminal is not None:
            self.read_terminal()
        out, err = self._process.communicate(timeout=PATIENCE)
        err = err or self._shown
        assert self._process.returncode == -signal.SIGINT, err
        tracebacks = err.count("Traceback")
        assert 1 <= tracebacks <= presses, err
        assert err.splitlines().count("KeyboardInterrupt") == tracebacks, err
        # The servers of multiprocessing end a moment later, and remove what is left of semaphores.
        until(lambda: not marked(self._mark))
        assert not any(path.exists() for path in self._shared)
        assert list(self._folder.iterdir()) == []
        return out

    def close(self):
        for pid in marked(self._mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.communicate()
        if self._terminal is not None:
            os.close(self._terminal)


@pytest.fixture
def start(tmp_path):
    """Start a map of items that take so many seconds, in a program of its own."""
    started = []

    def start(mode, function, seconds, method=None, **options):
        started.append(Interrupted(tmp_path, mode, function, seconds, method, **options))
        started[-1].wait_for(2)
        return started[-1]

    yield start
    for program in started:
        program.close()


@pytest.mark.parametrize(("mode", "function", "method"), [kind for kind in KINDS if kind[0] != "thread"])
def test_ctrl_c_ends_a_map_with_one_traceback_and_leaves_nothing(start, mode, function, method):
    # Python itself waits for the threads of its executors.
    program = start(mode, function, 0.5 if mode == "threads of an executor" else 60, method)
    program.press()
    program.end()


@pytest.mark.parametrize(
    ("mode", "function", "seconds"),
    [("thread", "work", 60), ("thread", "work_async", 60), ("threads of an executor", "work", 1)],
)
def test_ctrl_c_again_while_a_map_waits_for_its_threads_ends_it(start, mode, function, seconds):
    program = start(mode, function, seconds, on_a_terminal=True)
    program.press()
    program.read_terminal("waiting for running items to end; Ctrl-C, pressed now, leaves them")
    program.press()
    program.end(presses=2)


def test_ctrl_c_again_ends_coroutines_in_forked_processes_of_an_executor(start):
    """They have the handler of the event loop that has forked them."""
    program = start("processes of an executor, fork", "work_async", 60, on_a_terminal=True)
    program.press()
    program.read_terminal("waiting for running items to end; Ctrl-C, pressed now, leaves them")
    program.press()
    program.end(presses=2)


@pytest.mark.parametrize("function", ["work", "work_async"])
def test_ctrl_c_once_waits_for_the_items_that_run_in_threads_and_starts_no_other(start, function):
    program = start("thread", function, 0.5)
    started = time.monotonic()
    program.press()
    assert program.end() == ""
    assert time.monotonic() - started > 0.2


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


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize(
    "kind", ["thread", "async", partial(ThreadPoolExecutor, 2)], ids=["thread", "async", "executor"]
)
def test_a_scope_of_anyio_that_is_cancelled_waits_for_what_runs(kind):
    running: list[int] = []

    @opmap(mode=kind, workers=2, retries=0, progress=False)
    async def work(item):
        running.append(item)
        time.sleep(0.2)  # noqa: ASYNC251 - what blocks a thread is to be waited for
        running.remove(item)

    async def main():
        with anyio.move_on_after(0.05):
            await work(range(20))
        return running.copy()

    assert asyncio.run(main()) == []


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="starts no thread and no process when the program ends")
@pytest.mark.parametrize("mode", ["thread", "process", "async_process"])
def test_a_map_in_a_thread_goes_on_and_ends_when_the_main_thread_has_ended(mode):
    """Executors take nothing any more then."""
    source = f"""
        import asyncio, threading
        from opero import opmap

        @opmap(mode={mode!r}, workers=1, progress=False)
        async def work(item):
            return item

        async def main():
            while threading.main_thread().is_alive():
                await asyncio.sleep(0.001)
            print(await work([1]))

        if __name__ == "__main__":
            threading.Thread(target=lambda: asyncio.run(main())).start()
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (run.stdout, run.stderr) == ("[1]\n", "")


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("mode", ["thread", "process"])
def test_a_stream_that_is_open_at_the_end_of_the_program_is_silent(mode, retries, tmp_path):
    source = f"""
        from opero import opmap

        @opmap(mode={mode!r}, workers=2, retries={retries})
        def double(item):
            return 2 * item

        if __name__ == "__main__":
            stream = double.stream(range(10**9))
            print(next(stream).result)
    """
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(source))
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=30, check=False)
    assert (run.stdout, run.stderr) == ("0\n", "")


def test_all_batches_with_a_worker_that_is_ended_are_out_of_time():
    """What is heard from a worker that has been told to end is its end, and no report."""
    pool = ProcessPool(Work(time.sleep, is_async=False, shape=Shape((), (), {}, is_starred=False), slot=None), 1)
    inbox = BlockingInbox()
    pool.start(inbox)
    batches = [Batch([60], 0), Batch([60], 1)]

    def has_begun():
        inbox.wait(0.01, is_real=True)
        while inbox.events:
            handle, about, _ = inbox.events.popleft()
            handle(None, *about)
        return batches[0].mark[0]

    try:
        pool.submit(batches[0])
        until(has_begun)
        (worker,) = pool._workers
        worker.batches[2] = batches[1]
        assert pool.kill(batches[0])
        until(worker.pipe.poll)
        assert pool.kill(batches[1])
    finally:
        pool.stop()
        inbox.close()


class Kept:
    """Something that can be seen to be gone."""


@contextlib.contextmanager
def without_collector():
    """What large and few objects leave behind, nothing makes the garbage collector look for."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def first_of(item, _shared):
    return item


@pytest.mark.parametrize("mode", ["serial", "thread", "process"])
def test_what_all_items_share_is_free_when_the_map_has_ended(mode):
    shared = Kept()
    known = weakref.ref(shared)
    with without_collector():
        assert opmap(mode=mode, progress=False)(first_of)(range(3), shared) == [0, 1, 2]
        del shared
        assert known() is None


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("mode", ["serial", "thread"])
def test_an_error_that_ends_a_map_keeps_nothing_of_it(mode, is_stream):
    known = []

    def work(item):
        if item == 3:
            raise SpoiledError
        result = Kept()
        known.append(weakref.ref(result))
        return result

    f = opmap(mode=mode, progress=False, retries=0, return_exceptions=False)(work)
    with without_collector():
        try:
            if is_stream:
                for outcome in f.stream(range(9)):
                    del outcome
            else:
                f(range(9))
        except SpoiledError:
            pass
        until(lambda: not any(each() for each in known))
