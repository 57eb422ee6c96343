"""What runs in the workers of a dask cluster, and in their nannies."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from opero.concurrency.batches import Batch, Done, Fatal, Lost
from opero.concurrency.far import UNHEEDED_SECONDS, Answer, Found, load, recover, run_parcel, works
from opero.concurrency.inbox import BlockingInbox
from opero.concurrency.worker import Report
from opero.core.forks import ForkSafeLock
from opero.core.signature import name_of
from opero.core.steps import stopped
from opero.exceptions import WorkerCrashedError

if TYPE_CHECKING:
    from opero.concurrency.worker import How, Work
    from opero.core.steps import TimeLimit

# The worker's process is not the one that the batch was sent to.
STALE = -1
_POLLING_SECONDS = 0.02


def load_on_dask(digest: bytes, packed: bytes) -> tuple[str, str | None]:
    """Load the work; tells which process this is, and why that cannot be done."""
    from distributed import get_worker

    return get_worker().id, load(digest, lambda: packed)


def run_on_dask(  # noqa: PLR0917 - as `submit` takes them
    name: str,
    process: str,
    digest: bytes,
    restarts: bool,  # noqa: FBT001 - as above
    payload: bytes,
    packed: bytes,
) -> Answer:
    """One batch, in a task; not in a worker that has come to the same address."""
    from distributed import get_worker

    if get_worker().id != process:
        return STALE, None
    return run_parcel(name, digest, lambda: packed, payload, None if restarts else run_in_child)


def is_starting(dask_worker: Any) -> bool:
    """Whether a nanny, which dask gives by this name, has not yet heard of its worker that it is there."""
    status = getattr(getattr(dask_worker, "process", None), "status", None)
    return getattr(status, "name", "") == "starting"


def recover_all(names: list[str]) -> list[Found | None]:
    """The journals of batches, read by their worker's nanny."""
    return [recover(name) for name in names]


class _Child:
    """A process below a thread of a worker, for items that have a time limit: it can be ended."""

    def __init__(self, work: Work) -> None:
        from opero.concurrency.processes import ProcessPool

        self.work = work
        self.is_over = False
        self.using = threading.Lock()
        self._inbox = BlockingInbox()
        self._pool = ProcessPool(work, 1)
        self._pool.start(self._inbox)

    def run(self, items: list[Any], limit: TimeLimit, how: How) -> Report:
        batch = Batch(items, 0)
        batch.time_limit = limit
        how.mark[0] = 1
        self._pool.submit(batch)
        # The time begins with the item, not with its process.
        ends: float | None = None
        is_late = False
        while not self.is_over:
            for event in self._inbox.collect(_POLLING_SECONDS, is_real=True):
                known = self._pool.receive(event)
                if isinstance(known, Fatal):
                    raise known.error
                if isinstance(known, Done) and known.batch is batch:
                    return known.report
                if isinstance(known, Lost):
                    if is_late:
                        return Report([None], {0: stopped(name_of(self.work.function), *limit)}, limit[0])
                    raise WorkerCrashedError(known.reason)
            if ends is None and self._pool.begun(batch):
                ends = time.monotonic() + limit[0] + UNHEEDED_SECONDS * self.work.is_async
            if ends is not None and time.monotonic() > ends:
                is_late = self._pool.kill(batch) or is_late
                ends = time.monotonic() + 1.0
        msg = "the map has ended"
        raise WorkerCrashedError(msg)

    def stop(self) -> None:
        self._pool.stop()
        self._inbox.close()


_children: dict[int, _Child] = {}
_children_lock = ForkSafeLock()


def run_in_child(work: Work, items: list[Any], limit: TimeLimit, how: How) -> Report:
    """Run an item that has a time limit in a process below this thread, which stays for the next one."""
    thread = threading.get_ident()
    with _children_lock.lock:
        child = _children.get(thread)
    if child is None or child.work is not work:
        if child is not None:
            child.stop()
        child = _Child(work)
        with _children_lock.lock:
            _children[thread] = child
    with child.using:
        try:
            return child.run(items, limit, how)
        finally:
            if child.is_over:
                child.stop()


def end_children(digest: bytes) -> None:
    """End the processes of a map that is over."""
    with _children_lock.lock:
        ended = {thread: child for thread, child in _children.items() if child.work is works.known(digest)}
        for thread in ended:
            del _children[thread]
    for child in ended.values():
        child.is_over = True
        # One that runs an item is ended by its own thread.
        if child.using.acquire(blocking=False):
            child.stop()
