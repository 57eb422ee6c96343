"""Tasks, as a program with celery has them; the tests call them, and a worker of celery imports them."""

from __future__ import annotations

import os

import celery
from celery.exceptions import SoftTimeLimitExceeded

from opero import opero, opmap

REDIS = os.environ.get("OPERO_TEST_REDIS", "redis://127.0.0.1:1/0")

app = celery.Celery("celery_jobs", broker=REDIS, backend=REDIS)
app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)

tries: dict[str, int] = {}


@app.task
@opero(min_delay=0)
def fetch(name: str, *, fails: int = 1) -> list[object]:
    """Fetch one thing."""
    tries[name] = tries.get(name, 0) + 1
    if tries[name] <= fails:
        raise ConnectionError
    return [name, tries[name]]


@app.task(bind=True)
@opero(min_delay=0)
def bound(self: celery.Task, name: str) -> list[object]:
    tries[name] = tries.get(name, 0) + 1
    if tries[name] == 1:
        raise ConnectionError
    return [self.name, tries[name]]


@app.task
@opero(min_delay=0)
def out_of_time(name: str) -> None:
    tries[name] = tries.get(name, 0) + 1
    raise SoftTimeLimitExceeded


@celery.shared_task
@opero(cache=True)
def shared(name: str) -> int:
    tries[name] = tries.get(name, 0) + 1
    return tries[name]


@opmap(retries=0, workers=2, progress=False)
def square(x: int) -> int:
    return x * x


@opmap(mode="thread", retries=0, workers=2, progress=False)
def square_in_threads(x: int) -> int:
    return x * x


@app.task
def squares(numbers: list[int], *, processes: bool) -> list[int]:
    return list((square if processes else square_in_threads)(numbers))
