"""What holds on ray alone."""

from __future__ import annotations

import jobs
import pytest

from opero import OperoError

pytestmark = pytest.mark.parametrize("engine", ["ray"], indirect=True, scope="session")


@pytest.mark.parametrize("options", [{"address": "127.0.0.1:1"}, {"init": {"num_cpus": 3}}], ids=str)
def test_options_of_a_start_are_refused_where_ray_is_initialised(engine, options):
    with pytest.raises(OperoError, match="ray is initialised already"):
        engine.map(jobs.double, pool_options=options)([1])


def test_no_more_items_run_than_have_the_cpus_that_they_need(engine, path):
    def body(item):
        jobs.note(path, "+")
        jobs.time.sleep(0.05)
        jobs.note(path, "-")

    engine.map(body, pool_options={"num_cpus": 2})(range(6))
    assert "".join(jobs.noted(path)) == "+-" * 6


def test_workers_says_how_many_items_run_at_the_same_time(engine, path):
    def body(item):
        jobs.note(path, "+")
        jobs.time.sleep(0.05)
        jobs.note(path, "-")

    engine.map(body, workers=1, attempt_timeout=30)(range(6))
    assert "".join(jobs.noted(path)) == "+-" * 6


def test_where_an_item_was_stuck_is_told(engine):
    (error,) = engine.map(jobs.sleep_if_one, retries=0, attempt_timeout=0.3)([1])
    assert any("jobs.py" in note for note in error.__notes__)


def test_workers_stay_between_the_maps_of_a_block(engine):
    function = engine.map(jobs.double)
    with function.pool():
        for number in range(3):
            assert function([number]) == [number * 2]


# Of a ray of its own

MAP = """
    import os, signal, threading, time
    import ray
    from jobs import noted, noted_nap
    from opero import OperoError, opmap

    def started(name):
        return ray._private.worker._global_node.all_processes[name][0].process.pid

    def kill():
        while not noted(os.environ["LINES"]):
            time.sleep(0.02)
        killed.append(time.monotonic())
        os.kill(started(os.environ["VICTIM"]), signal.SIGKILL)

    killed = []
    if __name__ == "__main__":
        threading.Thread(target=kill, daemon=True).start()
        try:
            opmap(mode="ray", workers=2, progress=False)(noted_nap)(range(1_000), os.environ["LINES"], 0.2)
        except OperoError as error:
            print("error", time.monotonic() - killed[0], error, flush=True)
        print("goes on", flush=True)
    """


@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_a_head_that_is_killed_ends_the_map_and_not_the_program(engine, script, path, victim):
    program = script(MAP, LINES=path, VICTIM=victim)
    seconds, _, text = program.wait_for("error").partition(" ")
    assert float(seconds) < 10
    assert "away" in text
    program.wait_for("goes on")
    program.end()


def test_a_ray_that_is_started_for_a_map_ends_with_it(engine, script):
    program = script(
        """
        import os, subprocess
        from opero import opmap

        def length(text):
            return len(text)

        if __name__ == "__main__":
            mapped = opmap(mode="ray", progress=False, pool_options={"init": {"num_cpus": 1}})(length)
            print("result", mapped(["a", "bb"]), flush=True)
            import ray
            command = ["ps", "--ppid", str(os.getpid()), "-o", "args="]
            children = subprocess.run(command, capture_output=True, text=True).stdout
            print("initialised", ray.is_initialized(), "raylet" in children, flush=True)
        """
    )
    assert program.wait_for("result") == "[1, 2]"
    assert program.wait_for("initialised") == "False False"
    program.end()
