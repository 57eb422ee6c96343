"""What worker processes hold, and what others hold of them: forks of the program's own, descriptors, threads, time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from leftovers import surroundings

from opero import OperoError, WorkerCrashedError, opmap
from opero.concurrency import processes, system
from opero.core import CallTimeoutError

PATIENCE = 60.0


@pytest.fixture(autouse=True)
def clean_surroundings():
    before = surroundings()
    yield before
    assert surroundings() == before


# Processes that the program forks

FORKS = """
    import os, sys, time
    from opero import opmap

    @opmap(mode="process", workers=2, retries=0, progress=False, pool_options={"start_method": METHOD})
    def work(item):
        time.sleep(0.05)
        return item

    def read_with_a_child(way):
        seen = []
        stream = work.stream(range(12))
        child = None
        for outcome in stream:
            seen.append(outcome.result)
            if outcome.index == 3:
                child = os.fork()
                if child == 0:
                    way(stream)
                    sys.exit(7)
        status = os.waitpid(child, 0)[1]
        print(way.__name__, seen == list(range(12)), os.waitstatus_to_exitcode(status))

    def exits(stream):
        sys.exit(7)

    def raises(stream):
        sys.stderr = open(os.devnull, "w")
        raise LookupError

    def closes_it(stream):
        stream.close()

    def drops_it(stream):
        del stream

    def maps_itself(stream):
        assert work(range(3)) == [0, 1, 2]

    if __name__ == "__main__":
        for way in WAYS:
            read_with_a_child(way)
"""
# The codes with which the children exit.
WAYS = {"exits": 7, "raises": 1, "closes_it": 7, "drops_it": 7, "maps_itself": 7}


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_child_that_the_program_forks_leaves_an_open_stream_to_its_parent(tmp_path, method):
    # Python's fork server can be waited for only by the process that started it.
    ways = {way: code for way, code in WAYS.items() if (method, way) != ("forkserver", "maps_itself")}
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(FORKS).replace("METHOD", repr(method)).replace("WAYS", f"[{', '.join(ways)}]"))
    run = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", script],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert (run.stdout, run.stderr) == ("".join(f"{way} True {code}\n" for way, code in ways.items()), "")


FORKING = """
    import os, threading
    from opero import opmap
    import concurrent.futures.thread  # later than opero: its lock is taken before a fork, too

    def fork():
        while not is_over.is_set():
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)

    def echo(item):
        return item

    mapped = opmap(mode="process", workers=2, progress=False, pool_options={"start_method": "fork"})(echo)
    is_over = threading.Event()
    threads = [threading.Thread(target=fork) for _ in range(2)]
    for thread in threads:
        thread.start()
    done = [mapped(range(5)) for _ in range(10)]
    is_over.set()
    print(done == 10 * [[0, 1, 2, 3, 4]])
"""


def test_a_map_that_starts_workers_and_threads_that_fork_do_not_wait_for_each_other():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(FORKING)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert run.stdout == "True\n"


# Who is told how a worker ended

CHILDREN = """
    import os, signal, threading, time
    from opero import opmap

    def reap():
        while True:
            try:
                os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                pass
            time.sleep(0.001)

    options = {"pool_options": {"start_method": METHOD}, "return_exceptions": True}

    async def work(item):
        if item == 3:
            os._exit(4)
        return item

    if __name__ == "__main__":
        HOW
        for mode in ("process", "async_process"):
            mapped = opmap(mode=mode, workers=2, retries=0, progress=False, **options)(work)
            for _ in range(2):
                results = mapped.run(range(5))
                print(type(results.pop(3)).__name__, results)
"""
WHO = {
    "nobody": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "a thread of the program": "threading.Thread(target=reap, daemon=True).start()",
}


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("who", WHO)
def test_a_map_is_right_whoever_is_told_how_its_workers_ended(tmp_path, method, who):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(CHILDREN).replace("METHOD", repr(method)).replace("HOW", WHO[who]))
    command = [sys.executable, "-W", "ignore::DeprecationWarning", script]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert (run.stdout, run.stderr) == ("WorkerCrashedError [0, 1, 2, 4]\n" * 4, "")


# What is open


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("mode", ["process", "async_process"])
@pytest.mark.parametrize("options", [{}, {"max_tasks_per_worker": 1}], ids=str)
def test_the_files_of_workers_that_have_ended_are_closed_at_once(mode, options):
    @opmap(mode=mode, workers=2, progress=False, pool_options={"start_method": "fork", **options})
    async def work(item):
        return item

    work.run([1])
    gc.collect()
    before = open_files()
    gc.disable()
    try:
        most = 0

        async def watch():
            nonlocal most
            async for outcome in work.stream(range(30)):
                most = max(most, open_files())
                assert outcome.result == outcome.index

        for _ in range(2):
            asyncio.run(watch())
        assert open_files() == before
        assert most < before + 60
    finally:
        gc.enable()


# Who is charged

IDLE_KILLS = 5


def living_workers(before):
    return [pid for pid, command in surroundings()[0].items() if pid not in before[0] and not command.startswith("Z")]


@pytest.mark.parametrize("mode", ["process", "async_process"])
def test_an_item_that_comes_to_a_worker_that_was_killed_when_idle_is_not_charged(mode, clean_surroundings):
    @opmap(mode=mode, workers=2, retries=0, progress=False)
    async def work(item):
        return item

    for _ in range(IDLE_KILLS):
        with work.pool():
            assert work.run(range(5)) == list(range(5))
            for pid in living_workers(clean_surroundings):
                os.kill(pid, signal.SIGKILL)
            assert work.run(range(5)) == list(range(5))


def allow_little_more_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000, used + 50_000_000))


def test_an_item_that_no_worker_can_read_is_charged_in_the_end():
    options = {"start_method": "fork", "initializer": allow_little_more_memory}
    mapped = opmap(mode="process", workers=2, retries=0, progress=False, pool_options=options, return_exceptions=True)(
        len
    )
    results = mapped([b"1", bytes(100_000_000), b"22", b"333"])
    assert isinstance(results.pop(1), WorkerCrashedError)
    assert results == [1, 2, 3]


# What cannot be made, and what does not end


@pytest.mark.parametrize("which", [1, 2, 3])
def test_nothing_is_left_of_workers_for_which_no_thread_can_be_started(monkeypatch, which):
    start, started = threading.Thread.start, []

    def start_or_fail(thread):
        started.append(thread)
        if len(started) == which:
            raise RuntimeError("can't start new thread")
        start(thread)

    mapped = opmap(mode="thread", workers=3, retries=0, progress=False)(abs)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_or_fail)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            mapped(range(30))
    assert mapped(range(3)) == [0, 1, 2]


WITHOUT_FILES = """
    import os, resource, time
    from opero import opmap

    def work(item):
        if item < WORKERS:
            # Each worker has one of these.
            open(f"begun {item}", "w").close()
            while not all(os.path.exists(f"begun {each}") for each in range(WORKERS)):
                time.sleep(0.001)
        if item == 30:
            os._exit(1)
        return item

    def items():
        for item in range(100):
            if item == 29:
                use_up_all_files()
            yield item

    def use_up_all_files():
        try:
            while True:
                os.open(os.devnull, os.O_RDONLY)
        except OSError:
            return

    if __name__ == "__main__":
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        try:
            options = {"workers": WORKERS, "pool_options": {"start_method": "fork"}, "return_exceptions": True}
            results = opmap(retries=0, progress=False, **options)(work)(items())
            print([type(result).__name__ if isinstance(result, Exception) else result for result in results])
        except OSError as error:
            print(error.strerror)
"""


def results_without_files(folder, workers):
    script = folder / "script.py"
    script.write_text(textwrap.dedent(WITHOUT_FILES).replace("WORKERS", str(workers)))
    command = [sys.executable, script]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=PATIENCE)
    return run.stdout, run.stderr


def test_a_worker_that_cannot_be_replaced_ends_the_map_if_there_is_no_other(tmp_path):
    assert results_without_files(tmp_path, 1) == ("Too many open files\n", "")


def test_a_map_goes_on_with_the_workers_that_there_are(tmp_path):
    results, warnings = results_without_files(tmp_path, 2)
    assert results == f"{[*range(30), 'WorkerCrashedError', *range(31, 100)]}\n"
    assert "RuntimeWarning: no more than 1 of work's workers can be started: OSError: [Errno 24] Too many" in warnings
    assert "script.py" in warnings


@pytest.mark.parametrize("mode", ["process", "async_process"])
def test_an_idle_worker_that_does_not_end_is_killed(mode, monkeypatch):
    monkeypatch.setattr(processes, "PEACE_SECONDS", 0.2)

    @opmap(mode=mode, workers=1, progress=False)
    async def work(_):
        return os.getpid()

    async def main():
        async for outcome in work.stream(range(3)):
            if outcome.index == 2:
                os.kill(outcome.result, signal.SIGSTOP)

    asyncio.run(main())


# Workers that take long to start


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("mode", ["process", "executor"])
def test_no_call_uses_its_slot_late_because_its_worker_was_starting(cache, mode):
    """Two calls would start together when the worker is ready."""
    hooks = {"initializer": time.sleep, "initargs": (0.5,)}
    options = {"mode": "process", "pool_options": {"start_method": "fork", **hooks}}
    if mode == "executor":
        options = {"mode": lambda: ProcessPoolExecutor(2, **hooks)}
    mapped = opmap(**options, workers=2, progress=False, retries=0, cache=cache, rate_limit=4)(tell_the_time)
    first, second = mapped([1, 2])
    assert second - first > 0.125


def test_total_timeout_bounds_the_wait_for_the_first_worker():
    options = {"start_method": "fork", "initializer": time.sleep, "initargs": (PATIENCE,)}
    limits = {"rate_limit": 1000, "total_timeout": 0.3, "retries": 0}
    mapped = opmap(workers=1, progress=False, return_exceptions=True, pool_options=options, **limits)(tell_the_time)
    assert [type(error) for error in mapped([1, 2])] == [CallTimeoutError] * 2


def tell_the_time(_item):
    return time.monotonic()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_that_an_initializer_ends_are_told_of_by_how_they_ended_and_what_to_look_at(method):
    options = {"start_method": method, "initializer": os._exit, "initargs": (5,)}
    mapped = opmap(workers=1, progress=False, pool_options=options)(abs)
    with pytest.raises(OperoError, match="end before they are ready \\(exit code 5\\)") as caught:
        mapped([1])
    assert str(caught.value).endswith("see what their initializer does")


def end_if_it_is_one_of_the_first(count, folder):
    for place in range(count):
        with contextlib.suppress(FileExistsError):
            (folder / str(place)).touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_map_outlives_that_all_its_workers_are_killed_before_they_are_ready(tmp_path):
    count = processes.MOST_STILLBIRTHS + 2
    hooks = {"initializer": end_if_it_is_one_of_the_first, "initargs": (count, tmp_path)}
    mapped = opmap(workers=count, progress=False, pool_options={"start_method": "fork", **hooks})(abs)
    assert mapped(range(count)) == list(range(count))


def test_a_process_that_another_thread_is_just_starting_is_not_waited_for():
    system.end([multiprocessing.Process(target=time.sleep, args=(PATIENCE,))])
