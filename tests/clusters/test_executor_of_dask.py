"""Maps whose mode is the executor of a dask client, on a cluster of its own."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from typing import Any

import pytest

# A program of its own, because to close a cluster takes seconds, and for ever where it is about to replace a worker.
ON_DASK = """
    import os, signal
    import dask, distributed
    from opero import opmap

    def sync(function):
        return function

    def later(function):
        async def work(item, **kwargs):
            return function(item, **kwargs)
        return work

    def double(item):
        return item * 2

    def fail_twice(path):
        with open(path, "a") as file:
            file.write("x")
        if len(open(path).read()) < 3:
            raise OSError
        return path[-1]

    def kill(item):
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
        return item

    def told(error):
        return error if not isinstance(error, Exception) else type(error).__name__

    def maps(client):
        executor = client.get_executor()
        for world in (sync, later):
            def run(function, items, **options):
                mapped = opmap(**{"mode": executor, "progress": False, "retries": 0, **options})(world(function))
                return [told(result) for result in mapped.run(items)]

            journals = [f"{os.environ['JOURNAL']}-{world.__name__}-{item}" for item in (1, 2)]
            yield "results", run(double, range(300))
            yield "retries", run(fail_twice, journals, retries=3, min_delay=0.01)
            yield "crash", run(kill, range(6), workers=2)
            yield "made", run(double, [1, 2], mode=lambda: client.get_executor())
            yield "open", executor.submit(double, 4).result()

    if __name__ == "__main__":
        # By default an item that kills its worker is tried three times more.
        with (
            dask.config.set({"distributed.scheduler.allowed-failures": 0}),
            distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
            distributed.Client(cluster) as client,
        ):
            for name, value in maps(client):
                print((name, value))
            try:
                opmap(mode=client)(double)
            except TypeError as error:
                print(("client", str(error)), flush=True)
            os.killpg(0, signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def on_dask(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What came of the maps on a dask cluster: of a ``def`` function, and of an ``async def`` function."""
    folder = tmp_path_factory.mktemp("dask")
    path = folder / "program.py"
    path.write_text(textwrap.dedent(ON_DASK))
    with subprocess.Popen(
        [sys.executable, "-X", "faulthandler", path],
        env={**os.environ, "JOURNAL": str(folder / "journal"), "DASK_TEMPORARY_DIRECTORY": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        try:
            out, errors = program.communicate(timeout=80)
        except subprocess.TimeoutExpired:
            program.send_signal(signal.SIGABRT)  # tells where it stands
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(10)
            os.killpg(program.pid, signal.SIGKILL)
            out, errors = program.communicate()
    said: dict[str, list[Any]] = {}
    for line in out.splitlines():
        name, value = ast.literal_eval(line)
        said.setdefault(name, []).append(value)
    assert "client" in said, (said, errors)
    return said


def test_dask_workers_run_the_items(on_dask):
    assert on_dask["results"] == [[n * 2 for n in range(300)]] * 2


def test_an_item_that_fails_in_a_dask_worker_is_tried_again(on_dask):
    assert on_dask["retries"] == [["1", "2"]] * 2


def test_an_item_that_kills_its_dask_worker_is_charged_and_no_other(on_dask):
    assert on_dask["crash"] == [[0, 1, 2, "WorkerCrashedError", 4, 5]] * 2


def test_a_function_may_make_an_executor_of_dask(on_dask):
    assert on_dask["made"] == [[2, 4]] * 2


def test_a_given_executor_of_dask_stays_open(on_dask):
    assert on_dask["open"] == [8] * 2


def test_a_dask_client_as_mode_raises_and_says_what_to_write(on_dask):
    (message,) = on_dask["client"]
    assert "mode='dask', pool_options={'client': client}" in message
