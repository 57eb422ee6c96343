"""What holds on dask alone."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import warnings
from pathlib import Path

import jobs
import pytest
from distributed import Client, LocalCluster, Nanny

from opero import OperoError, WorkerCrashedError, opmap

pytestmark = pytest.mark.parametrize("engine", ["dask"], indirect=True, scope="session")


def test_the_current_client_is_used(engine, path):
    pids = set(engine.map(jobs.pid)(range(20)))
    assert pids <= set(engine.client.run(os.getpid).values())


def test_the_given_client_is_used(engine):
    assert engine.map(jobs.double, pool_options={"client": engine.client})([1, 2]) == [2, 4]


def test_what_is_no_client_is_refused(engine):
    with pytest.raises(TypeError, match=r"pool_options\['client'\] is int"):
        engine.map(jobs.double, pool_options={"client": 5})([1])


def test_a_client_of_an_event_loop_serves_maps_of_coroutines(engine):
    async def body():
        async with Client(engine.address, asynchronous=True) as client:
            return await opmap(mode="dask", progress=False, pool_options={"client": client})(jobs.double_later)([1, 2])

    assert asyncio.run(body()) == [2, 4]


def test_a_worker_that_comes_is_used_and_one_that_is_retired_is_left(engine, path, eventually):
    added = {}

    async def add():
        added["nanny"] = await Nanny(engine.address, nthreads=1, host="127.0.0.1", dashboard_address="127.0.0.1:0")

    def look():
        eventually(lambda: len(jobs.noted(path)) > 5)
        engine.cluster.sync(add)
        worker = added["nanny"].worker_address
        pid = engine.client.run(os.getpid, workers=[worker])[worker]
        eventually(lambda: sum(line.endswith(f" {pid}") for line in jobs.noted(path)) > 5)
        engine.client.retire_workers([worker])

    looking = threading.Thread(target=look)
    looking.start()
    outcomes = []
    for outcome in engine.map(jobs.noted_nap, retries=0).stream(range(2_000), path, 0.05):
        outcomes.append(outcome)
        if not looking.is_alive() and len(outcomes) > 20:
            break
    looking.join()
    engine.cluster.sync(added["nanny"].close)
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    assert {outcome.attempts for outcome in outcomes} == {1}


def test_a_retired_worker_charges_nobody(engine, path, eventually):
    """What it ran runs again elsewhere."""
    added = {}

    async def add():
        added["nanny"] = await Nanny(engine.address, nthreads=1, host="127.0.0.1", dashboard_address="127.0.0.1:0")

    engine.cluster.sync(add)
    worker = added["nanny"].worker_address
    pid = engine.client.run(os.getpid, workers=[worker])[worker]

    def retire():
        eventually(lambda: any(line.endswith(f" {pid}") for line in jobs.noted(path)))
        engine.client.retire_workers([worker])

    retiring = threading.Thread(target=retire)
    retiring.start()
    outcomes = list(engine.map(jobs.noted_nap, retries=0).stream(range(9), path, 1.0))
    retiring.join()
    engine.cluster.sync(added["nanny"].close)
    assert [(outcome.error, outcome.attempts) for outcome in outcomes] == [(None, 1)] * 9


@pytest.fixture(scope="module")
def threads():
    """The address of a cluster whose only worker has four threads, and that has resources."""
    options = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "silence_logs": 50}
    with LocalCluster(n_workers=1, threads_per_worker=4, resources={"licence": 2}, **options) as cluster:
        yield cluster.scheduler_address


def on(address, function, **more):
    options = {"address": address, **more.pop("pool_options", {})}
    quick = {} if more.get("retries") == 0 else {"min_delay": 0.01}
    return opmap(mode="dask", progress=False, return_exceptions=True, pool_options=options, **quick, **more)(function)


def test_of_several_items_in_one_worker_only_the_guilty_one_is_charged(engine, threads, path):
    outcomes = list(on(threads, jobs.nap_and_kill_if_three, retries=0).stream(range(12), path))
    assert [outcome.attempts for outcome in outcomes] == [1] * 12
    assert [outcome.index for outcome in outcomes if outcome.error] == [3]
    assert isinstance(outcomes[3].error, WorkerCrashedError)


def test_all_threads_of_a_worker_run_items(engine, threads, path):
    def body(item):
        time.sleep(0.05)
        return threading.get_ident()

    assert len(set(on(threads, body)(range(40)))) == 4


def test_no_more_items_run_than_there_are_resources(engine, threads, path):
    def body(item):
        jobs.note(path, f"+ {time.monotonic()}")
        time.sleep(0.05)
        jobs.note(path, f"- {time.monotonic()}")

    function = on(threads, body, pool_options={"resources": {"licence": 1}})
    function(range(12))
    running = most = 0
    for line in jobs.noted(path):
        running += 1 if line[0] == "+" else -1
        most = max(most, running)
    assert most == 2


@pytest.mark.parametrize("function", [jobs.sleep_if_one, jobs.compute_if_one])
def test_a_worker_may_be_restarted_when_an_item_takes_too_long(engine, threads, function):
    limited = on(threads, function, retries=0, attempt_timeout=0.5, pool_options={"restart_workers": True})
    outcomes = list(limited.stream(range(4)))
    assert [type(outcome.error).__name__ for outcome in outcomes] == ["NoneType", "CallTimeoutError", *["NoneType"] * 2]
    assert any("jobs.py" in note for note in outcomes[1].error.__notes__)
    assert {outcome.attempts for outcome in outcomes} == {1}


def test_restart_workers_is_a_flag(engine):
    with pytest.raises(TypeError, match="restart_workers"):
        engine.map(jobs.double, pool_options={"restart_workers": "yes"})


def test_an_item_with_a_time_limit_runs_in_a_child_that_ends_with_the_map(engine, path):
    workers = set(engine.client.run(os.getpid).values())
    pids = set(engine.map(jobs.pid, attempt_timeout=30)(range(4)))
    assert not pids & workers
    assert not any(Path(f"/proc/{pid}").exists() and is_alive(pid) for pid in pids)


def is_alive(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


SCHEDULER = """
    import os, sys, time
    from distributed import LocalCluster
    if __name__ == "__main__":
        options = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
        with LocalCluster(n_workers=2, threads_per_worker=1, silence_logs=50, **options) as cluster:
            print("address", cluster.scheduler_address, flush=True)
            time.sleep(600)
    """


WORLDS = [(function, mode) for function in (jobs.noted_nap, jobs.noted_nap_async) for mode in ("mode", "executor")]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"{world[0].__name__}-{world[1]}")
def test_a_scheduler_that_is_killed_ends_the_map_at_once(script, path, eventually, world):
    function, by_executor = world[0], world[1] == "executor"
    program = script(SCHEDULER)
    address = program.wait_for("address")
    killed = []

    def kill():
        eventually(lambda: jobs.noted(path))
        killed.append(time.monotonic())
        os.kill(program.process.pid, signal.SIGKILL)

    killing = threading.Thread(target=kill)
    killing.start()
    client = Client(address, set_as_default=False) if by_executor else None
    mode = {"mode": client.get_executor()} if by_executor else {"mode": "dask", "pool_options": {"address": address}}
    try:
        with pytest.raises(OperoError, match="away"):
            opmap(progress=False, **mode)(function).run(range(100), path, 0.2)
        assert time.monotonic() - killed[0] < 8
    finally:
        killing.join()
        if client is not None:
            client.close(timeout=1)


def test_a_scheduler_that_is_killed_while_all_items_back_off_ends_the_map(engine, script, path, eventually):
    program = script(SCHEDULER)
    address = program.wait_for("address")

    def kill():
        eventually(lambda: len(jobs.noted(path)) >= 2)
        os.kill(program.process.pid, signal.SIGKILL)

    killing = threading.Thread(target=kill)
    killing.start()
    function = opmap(
        mode="dask", progress=False, retries=2, min_delay=60, max_delay=60, pool_options={"address": address}
    )
    with pytest.raises(OperoError, match="away"):
        function(jobs.fail_twice)([1, 2], path)
    killing.join()


def test_an_executor_of_a_client_has_as_many_slots_as_the_cluster_has_threads(engine, threads):
    def body(item):
        time.sleep(0.05)
        return threading.get_ident()

    with Client(threads, set_as_default=False) as client:
        assert len(set(opmap(mode=client.get_executor(), progress=False)(body)(range(40)))) == 4


def test_a_cluster_that_is_made_for_a_map_listens_on_the_loopback_only_and_ends_with_it(engine, script):
    program = script(
        """
        import os, subprocess
        from pathlib import Path
        from opero import opmap

        def addresses(_item):
            text = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
            lines = [line.split() for line in text.splitlines()]
            return {parts[1].rpartition(":")[0] for parts in lines if parts[3] == "0A"}

        if __name__ == "__main__":
            (found,) = opmap(mode="dask", workers=2, progress=False)(addresses)([1])
            print("listening", sorted(found), flush=True)
            command = ["pgrep", "-P", str(os.getpid()), "-f", "spawn_main"]
            print("left", subprocess.run(command, capture_output=True, text=True).stdout.split(), flush=True)
        """
    )
    listening = program.wait_for("listening")
    assert "00000000" not in listening.replace("00000000000000000000000001000000", "")
    assert program.wait_for("left") == "[]"
    program.end()


def test_workers_stay_between_the_maps_of_a_block(engine):
    function = engine.map(jobs.double)
    with function.pool(), warnings.catch_warnings():
        for number in range(3):
            assert function([number]) == [number * 2]


def test_a_cluster_that_adapts_starts_its_first_worker_for_a_map(engine):
    options = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "silence_logs": 50}
    with LocalCluster(n_workers=0, threads_per_worker=1, **options) as cluster:
        cluster.adapt(minimum=0, maximum=1, interval="100 ms")
        address = {"address": cluster.scheduler_address}
        assert engine.map(jobs.double, pool_options=address, total_timeout=50)([1, 2]) == [2, 4]


def test_a_map_inside_the_items_of_a_map_runs_on_the_same_cluster(engine):
    def outer(item):
        return sum(opmap(mode="dask", progress=False)(jobs.pid)(range(item))) > 0, os.getpid()

    results = engine.map(outer)([1, 2, 3, 4])
    assert {pid for _, pid in results} <= set(engine.client.run(os.getpid).values())
    assert all(has_run for has_run, _ in results)


def test_clusters_are_made_for_maps_of_several_threads_at_once(engine, script):
    program = script(
        """
        from concurrent.futures import ThreadPoolExecutor
        from opero import opmap

        @opmap(mode="dask", workers=1, progress=False)
        def double(item):
            return item * 2

        if __name__ == "__main__":
            with ThreadPoolExecutor(2) as threads:
                print("said", list(threads.map(double, [[1], [2]])), flush=True)
        """
    )
    assert program.wait_for("said") == "[[2], [4]]"
    program.end()
