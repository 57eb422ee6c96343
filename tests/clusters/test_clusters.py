"""What holds on every cluster."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import jobs
import pytest

from opero import CallTimeoutError, OperoError, WorkerCrashedError, opmap
from opero.core import NotTransferableError


@pytest.fixture(params=["sync", "async"])
def nap(request):
    """A function that notes its item and its process, and sleeps."""
    return jobs.noted_nap if request.param == "sync" else jobs.noted_nap_async


EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "cluster.py"


# Results


@pytest.mark.parametrize("function", [jobs.double, jobs.double_later], ids=["sync", "async"])
def test_results_come_in_input_order(engine, function):
    assert engine.map(function).run(range(3_000)) == [n * 2 for n in range(3_000)]


def test_closures_and_lambdas_are_carried(engine):
    factor = 3
    assert engine.map(lambda item: item * factor)(range(5)) == [0, 3, 6, 9, 12]


def test_no_items_start_nothing(engine):
    assert engine.map(jobs.double)([]) == []


def test_both_workers_run_items(engine, path):
    assert len(set(engine.map(jobs.pid)(range(40), seconds=0.02))) == 2


def test_an_item_that_fails_is_tried_again(engine, path):
    outcomes = list(engine.map(jobs.fail_twice, retries=3).stream([1, 2], path))
    assert [(outcome.result, outcome.attempts) for outcome in outcomes] == [(1, 3), (2, 3)]


def test_results_that_cannot_be_pickled_are_errors_and_harm_no_other(engine):
    first, error, last = engine.map(jobs.lock_if_one, retries=0)(range(3))
    assert (first, last) == (0, 2)
    assert isinstance(error, NotTransferableError)


def test_an_item_that_cannot_be_pickled_is_an_error_and_harms_no_other(engine):
    first, error, last = engine.map(jobs.double, retries=0)([1, threading.Lock(), 2])
    assert (first, last) == (2, 4)
    assert isinstance(error, NotTransferableError)


def test_exceptions_with_two_arguments_arrive(engine):
    (error,) = engine.map(jobs.fail_with_two, retries=0)([7])
    assert isinstance(error, jobs.TwoArgumentsError)
    assert error.code == 7
    assert any("in the worker" in note for note in error.__notes__)


def test_functions_of_the_main_module_are_carried(engine, script):
    program = script(
        """
        import os
        from opero import opmap

        OFFSET = 10

        class Odd(Exception):
            def __init__(self, item, why):
                super().__init__(why)
                self.item = item

        def work(item):
            if item == 3:
                raise Odd(item, "odd")
            return item + OFFSET

        if __name__ == "__main__":
            options = {"address": os.environ["ADDRESS"]}
            mapped = opmap(mode=os.environ["MODE"], progress=False, retries=0, return_exceptions=True,
                           pool_options=options)(work)
            *results, error = mapped(range(4))
            print("said", results, type(error) is Odd, error.item, flush=True)
        """,
        MODE=engine.name,
        ADDRESS=engine.address,
    )
    assert program.wait_for("said") == "[10, 11, 12] True 3"
    program.end()


# Crashes


@pytest.mark.parametrize("function", [jobs.kill_if_three, jobs.nap_and_kill_if_three], ids=["fast", "slow"])
def test_only_the_item_that_kills_its_worker_is_charged(engine, path, function):
    outcomes = list(engine.map(function, retries=1).stream(range(12), path))
    assert [outcome.attempts for outcome in outcomes] == [2 if n == 3 else 1 for n in range(12)]
    assert isinstance(outcomes[3].error, WorkerCrashedError)
    assert [outcome.result for outcome in outcomes if outcome.index != 3] == [n for n in range(12) if n != 3]
    assert jobs.noted(path).count("3") == 2


# When a worker was seen first: a nanny of dask's does not replace one that dies while it is starting.
first_seen = {}


@pytest.mark.parametrize("seed", range(5))
def test_a_storm_of_kills_costs_the_items_that_were_running_an_attempt_each_and_no_other(engine, path, seed):
    spread = random.Random(seed)
    ends = threading.Event()
    killed = []

    def kill_again_and_again():
        due = time.monotonic() + spread.uniform(0.1, 0.5)
        while not ends.wait(0.01):
            now = time.monotonic()
            running = [int(line.split()[1]) for line in jobs.noted(path)[-2:]]
            for worker in running:
                first_seen.setdefault(worker, now)
            old = [worker for worker in running if now - first_seen[worker] > 1.5 and worker not in killed]
            if old and now > due:
                due = now + spread.uniform(0.1, 0.5)
                killed.append(spread.choice(old))
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_again_and_again)
    killer.start()
    try:
        outcomes = list(engine.map(jobs.noted_nap, retries=50).stream(range(50), path, 0.1))
    finally:
        ends.set()
        killer.join()
    assert [outcome.result for outcome in outcomes] == list(range(50))
    assert killed
    begun = Counter(int(line.split()[0]) for line in jobs.noted(path))
    assert {outcome.index: outcome.attempts for outcome in outcomes} == dict(begun)


# Ends


def test_a_closed_stream_lets_nothing_run_on_for_longer_than_its_item(engine, path, nap, eventually):
    outcomes = engine.map(nap).stream(range(1_000), path, 0.2)
    if nap is jobs.noted_nap:
        assert next(outcomes).index == 0
        outcomes.close()
    else:

        async def first():
            outcome = await anext(outcomes)
            await outcomes.aclose()
            return outcome.index

        assert asyncio.run(first()) == 0
    time.sleep(0.3)
    begun = len(jobs.noted(path))
    time.sleep(0.5)
    assert len(jobs.noted(path)) == begun <= 8


def test_the_first_failure_stops_the_map(engine, path):
    function = opmap(**{**engine.options(retries=0), "return_exceptions": False})(jobs.fail_twice)
    with pytest.raises(ConnectionError):
        function(range(1_000), path)
    assert len(jobs.noted(path)) < 100


def test_ctrl_c_ends_the_map(engine, path, script, lines, eventually):
    program = script(
        """
        import os
        from jobs import noted_nap
        from opero import opmap

        if __name__ == "__main__":
            options = {"address": os.environ["ADDRESS"]}
            mapped = opmap(mode=os.environ["MODE"], progress=False, pool_options=options)(noted_nap)
            try:
                mapped(range(10_000), os.environ["LINES"], 0.1)
            except KeyboardInterrupt:
                print("interrupted", flush=True)
        """,
        MODE=engine.name,
        ADDRESS=engine.address,
        LINES=path,
    )
    eventually(lambda: len(lines()) >= 4)
    os.kill(program.process.pid, signal.SIGINT)
    program.wait_for("interrupted")
    program.end()
    time.sleep(0.3)
    begun = len(lines())
    time.sleep(0.5)
    assert len(lines()) == begun


# Much


@pytest.mark.parametrize("mode", ["dask", "ray"])
def test_a_stream_that_is_forgotten_ends_with_the_program(mode, script):
    program = script(
        f"""
        from opero import opmap

        @opmap(mode={mode!r}, workers=1, progress=False)
        def double(item):
            return item * 2

        if __name__ == "__main__":
            stream = double.stream(range(10**9))
            print("said", next(stream).result, flush=True)
        """
    )
    assert program.wait_for("said") == "0"
    assert "Exception ignored" not in program.end()


def test_a_long_generator_takes_no_memory(engine):
    pulled = 0

    def items():
        nonlocal pulled
        for item in range(150_000):
            pulled = item
            yield item

    ahead = 0
    for outcome in engine.map(jobs.double).stream(items()):
        if outcome.index == 20_000:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ahead = max(ahead, pulled - outcome.index)
    assert outcome.index == 149_999
    # Two workers with four batches of at most 10 000 each, those that came early, and one that is handed out.
    assert ahead <= 120_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB


def test_a_large_argument_goes_to_each_worker_once(engine, path):
    large = jobs.Large(path, 100_000_000)
    results = engine.map(jobs.size_of, retries=0)(range(40), large)
    assert {size for size, _ in results} == {100_000_000}
    assert sorted(jobs.noted(path)) == sorted({f"unpickled {pid}" for _, pid in results})
    assert len(jobs.noted(path)) == 2


# Time limits


@pytest.mark.parametrize(
    "function", [jobs.sleep_if_one, jobs.compute_if_one, jobs.wait_if_one], ids=lambda f: f.__name__
)
def test_an_item_that_takes_too_long_is_ended_by_force(engine, function):
    *others, _ = results = engine.map(function, retries=0, attempt_timeout=0.3).run([0, 2, 3, 1])
    assert others == [0, 2, 3]
    assert isinstance(results[-1], CallTimeoutError)
    assert "attempt_timeout" in str(results[-1])


def test_what_is_ended_by_force_is_tried_again(engine, path):
    def stuck_once(item):
        jobs.note(path, item)
        if len(jobs.noted(path)) == 1:
            time.sleep(600)
        return item

    (outcome,) = engine.map(stuck_once, retries=2, attempt_timeout=0.5).stream([1])
    assert (outcome.result, outcome.attempts) == (1, 2)


# Policies, which are the caller's


def test_calls_start_at_the_limited_rate(engine, path):
    engine.pids()
    engine.map(jobs.noted_time, rate_limit=20, rate_limit_options={"max_burst": 1})(range(40), path)
    times = sorted(map(float, jobs.noted(path)))
    assert len(times) == 40
    # In no window of a second more than the rate, the burst and what the way may add.
    assert all(late - early > 0.85 for early, late in zip(times, times[21:], strict=False))


def test_equal_items_run_once(engine, path):
    assert engine.map(jobs.fail_once_if_odd, cache=True)([2] * 50, path) == [2] * 50
    assert len(jobs.noted(path)) == 1


def test_a_second_map_finds_on_disk_what_the_first_one_has_done(engine, path, tmp_path):
    options = {"cache": True, "cache_backend": "disk", "cache_options": {"cache_dir": str(tmp_path / "cache")}}
    for _ in range(2):
        function = engine.map(jobs.noted_nap, cache_namespace="test.clusters", **options)
        assert function(range(10), path, 0.01) == list(range(10))
    assert len(jobs.noted(path)) == 10


def test_an_item_that_waits_for_its_retry_holds_no_worker(engine, path):
    function = engine.map(jobs.fail_once_if_odd, retries=1, min_delay=2.0, jitter=False)
    assert function([1, 3, 5, 7, *range(0, 40, 2)], path) == [1, 3, 5, 7, *range(0, 40, 2)]
    assert set(jobs.noted(path)[-4:]) == {"1", "3", "5", "7"}


def test_functions_of_lists_get_lists(engine):
    function = engine.map(jobs.lengths, batch_size=4)
    assert function(["a", "bb", "ccc", "dddd", "eeeee"]) == [1, 2, 3, 4, 5]


def test_candidates_reach_the_workers(engine):
    def ask(item, key):
        if key == "bad":
            raise ConnectionError
        return item, key

    function = engine.map(ask, arg_fallback="key", retries=0)
    assert function([1, 2], key=["bad", "good"]) == [(1, "good"), (2, "good")]


def test_the_counts_are_those_of_the_caller(engine, path):
    function = engine.map(jobs.fail_twice, retries=3)
    function([1, 2], path)
    assert (function.stats.calls, function.stats.attempts, function.stats.failures) == (2, 6, 0)


def test_a_progress_bar_counts_the_items(engine, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert engine.map(jobs.double, progress="doubling")(range(10)) == [n * 2 for n in range(10)]
    assert "doubling" in capsys.readouterr().err


def test_the_example_ends_well(engine, tmp_path):
    command = [sys.executable, str(EXAMPLE), engine.name, "--address", engine.address]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "workers ended with it" in ended.stdout


# What cannot work


def test_a_resource_that_nobody_has_ends_the_map_after_total_timeout(engine):
    function = engine.map(jobs.double, total_timeout=1, pool_options={"resources": {"unobtainium": 1}})
    with pytest.raises(OperoError, match=r"unobtainium|resources"):
        function([1, 2])


def test_a_resource_that_nobody_has_is_warned_of(engine, monkeypatch):
    monkeypatch.setattr("opero.concurrency.far._WARNING_SECONDS", 0.3)
    function = engine.map(jobs.double, total_timeout=3, pool_options={"resources": {"unobtainium": 1}})
    with pytest.warns(RuntimeWarning, match="waits for one") as told, pytest.raises(OperoError):
        function([1, 2])
    assert {each.filename for each in told if each.category is RuntimeWarning} == {__file__}


def test_what_a_worker_cannot_load_ends_the_map(engine, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def work(item):\n    return item\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here

    with pytest.raises(OperoError, match="only_here"):
        engine.map(only_here.work)([1, 2])


@pytest.mark.parametrize("mode", ["dask", "ray"])
@pytest.mark.parametrize(
    ("options", "error"),
    [({"adress": "x"}, TypeError), ({"address": ""}, ValueError), ({"resources": 3}, TypeError)],
    ids=str,
)
def test_wrong_options_raise_when_decorating(mode, options, error):
    with pytest.raises(error, match="pool_options"):
        opmap(mode=mode, pool_options=options)(jobs.double)


@pytest.mark.parametrize("mode", ["dask", "ray"])
def test_a_cluster_at_a_dead_address_is_an_error_at_once(mode, script):
    program = script(
        """
        import os, time
        from jobs import double
        from opero import OperoError, opmap

        if __name__ == "__main__":
            options = {"address": "127.0.0.1:9"}
            began = time.monotonic()
            try:
                opmap(mode=os.environ["MODE"], progress=False, pool_options=options)(double)([1])
            except OperoError as error:
                print("error", time.monotonic() - began, error, flush=True)
        """,
        MODE=mode,
    )
    seconds, _, text = program.wait_for("error").partition(" ")
    assert float(seconds) < 10
    assert "127.0.0.1:9" in text
    program.end()
