"""Tasks of celery: in the caller, and in a worker that gets them by redis."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import celery
import celery_jobs
import pytest
from celery.exceptions import SoftTimeLimitExceeded

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
PATIENCE = 20.0  # seconds for what takes a few
WORKER = "--pool solo --loglevel warning --without-gossip --without-mingle --without-heartbeat"


@pytest.fixture(autouse=True)
def counted_anew():
    celery_jobs.tries.clear()


@pytest.fixture
def eager() -> Iterator[None]:
    celery_jobs.app.conf.task_always_eager = celery_jobs.app.conf.task_eager_propagates = True
    yield
    celery_jobs.app.conf.task_always_eager = celery_jobs.app.conf.task_eager_propagates = False


def test_a_task_is_called_like_a_function():
    assert celery_jobs.fetch("a") == ["a", 2]


def test_an_eager_task_is_retried(eager):
    assert celery_jobs.fetch.delay("a").get() == ["a", 2]


def test_a_task_has_the_name_and_the_text_of_the_function():
    assert celery_jobs.fetch.name == "celery_jobs.fetch"
    assert celery_jobs.fetch.__doc__ == "Fetch one thing."
    assert "celery_jobs.shared" in celery_jobs.app.tasks


def test_a_bound_task_gets_itself(eager):
    assert celery_jobs.bound.delay("a").get() == ["celery_jobs.bound", 2]


def test_a_shared_task_is_cached(eager):
    assert [celery_jobs.shared.delay("a").get(), celery_jobs.shared.delay("a").get()] == [1, 1]


def test_a_task_whose_time_is_up_is_not_retried(eager):
    with pytest.raises(SoftTimeLimitExceeded):
        celery_jobs.out_of_time.delay("late").get()
    assert celery_jobs.tries == {"late": 1}


def test_wrong_arguments_are_not_retried(eager):
    with pytest.raises(TypeError, match="name"):
        celery_jobs.fetch.delay().get()
    assert celery_jobs.tries == {}


def test_the_last_error_of_a_task_is_its_own(eager):
    with pytest.raises(ConnectionError):
        celery_jobs.fetch.delay("a", fails=9).get()
    assert celery_jobs.tries["a"] == 4


@pytest.fixture(scope="module")
def worker(redis_server, tmp_path_factory) -> Iterator[celery.Celery]:
    """A sender of tasks, with a process that works on them."""
    url = f"redis://{redis_server.host}:{redis_server.port}/0"
    log = tmp_path_factory.mktemp("celery") / "log"
    with log.open("wb") as output, celery.Celery("sender", broker=url, backend=url, set_as_current=False) as sender:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "--app", "celery_jobs", "worker", *WORKER.split()],
            cwd=HERE,  # where it looks for celery_jobs
            env={**os.environ, "OPERO_TEST_REDIS": url},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            wait_until_ready(sender, process, log)
            yield sender
        finally:
            end(process)


def wait_until_ready(sender: celery.Celery, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not sender.control.ping(timeout=0.2):
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the worker does not answer: {log.read_text(errors='replace')}")


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def answer(sender: celery.Celery, task: str, *args: Any, **kwargs: Any) -> Any:
    return sender.send_task(f"celery_jobs.{task}", args, kwargs).get(timeout=PATIENCE)


def test_a_worker_retries_a_task(worker):
    assert answer(worker, "fetch", "sent") == ["sent", 2]


def test_a_worker_keeps_what_a_task_cached(worker):
    assert [answer(worker, "shared", "sent too"), answer(worker, "shared", "sent too")] == [1, 1]


def test_the_sender_gets_the_last_error_of_a_task(worker):
    with pytest.raises(ConnectionError):
        answer(worker, "fetch", "failing", fails=9)


@pytest.mark.parametrize("processes", [False, True], ids=["threads", "processes"])
def test_a_task_maps_in_a_worker(worker, processes):
    assert answer(worker, "squares", [1, 2, 3], processes=processes) == [1, 4, 9]
