"""What runs in the workers of clusters, and what one that was killed has left.

A worker keeps a journal of each batch: how many of its items have begun, and the reports on those that were slow. That
is a file on the worker's machine, so it outlives a worker that is killed, and whoever is still there reads it for the
map: a crash is charged to the item that was running, without a message for each item that begins.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import io
import math
import mmap
import pickle
import shutil
import struct
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from opero.concurrency.batches import Batch, Done, Fatal, Lost
from opero.concurrency.running import BlockingInbox
from opero.concurrency.system import GRACE_SECONDS
from opero.concurrency.transport import pack_report, unpack_batch, unpack_start
from opero.concurrency.worker import (
    FAR_BATCH_SECONDS,
    How,
    Report,
    Work,
    run_batch,
    runner_for,
)
from opero.core.clock import clock
from opero.core.forks import ForkSafeLock
from opero.core.private_folder import folder_of_user, private_folder
from opero.core.signature import name_of
from opero.core.steps import stopped
from opero.exceptions import WorkerCrashedError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.processes import ProcessPool
    from opero.core.steps import TimeLimit

# A batch that takes longer than it was made for goes on for so long: what is given back costs a message.
_MOST_SECONDS = 2 * FAR_BATCH_SECONDS
# Maps whose work a worker remembers.
_MOST_REMEMBERED = 16
# Journals that each thread of a worker keeps: the last reports may not have reached the map yet.
_MOST_KEPT = 3
# Those of workers that were killed are removed by others that start later than so.
_STALE_SECONDS = 7 * 86_400.0
_MARK = struct.Struct("=Q")
# So begins what `faulthandler` writes into a journal when the time is up.
_STUCK = b"Timeout ("
# A coroutine is cancelled when its time is up, and may need some to tidy up.
_UNHEEDED_SECONDS = 5.0


class Found(NamedTuple):
    """What became of a batch: how many of its items have begun, and the reports so far.

    ``size``: bytes of the batch; ``reason``: why it ended early; ``stuck``: where the item was whose time was up.
    """

    begun: int
    reports: list[bytes]
    size: int = 0
    reason: str = ""
    stuck: str = ""


# How an item is run that has a time limit.
RunLimited: TypeAlias = "Callable[[Work, list[Any], TimeLimit, How], Report]"


def run_parcel(name: str, digest: bytes, fetch: Callable[[], bytes], payload: bytes, run_limited: RunLimited) -> Found:
    """Run one batch in a worker, which keeps a journal of that name.

    It raises only if the work cannot be loaded, which ``fetch`` gets for a worker that lacks it: what the function
    raises is in the reports. ``run_limited`` runs an item that has a time limit.
    """
    work = load(digest, fetch)
    arrived = unpack_batch(payload)
    if isinstance(arrived, Report):
        return Found(0, [pack_report(arrived)], len(payload))
    items, limit = arrived
    journal = _begin_journal(name)
    how = How(mark=journal.mark, tell=journal.add, longest=_MOST_SECONDS, seconds=_MOST_SECONDS)
    try:
        run: Any = _run_here if limit is None else run_limited
        journal.add(run(work, items, limit, how))
    except BaseException as error:  # noqa: BLE001 - as in process mode exit ends the item, but not this process
        return Found(journal.mark[0], journal.reports, len(payload), describe(error))
    return Found(journal.mark[0], journal.reports, len(payload))


def _run_here(work: Work, items: list[Any], limit: TimeLimit | None, how: How) -> Report:
    """Run a batch; coroutines in the event loop that this thread has for all of them."""
    if not work.is_async:
        return run_batch(work, items, limit, None, how)
    runner: Any = _thread.__dict__.get("runner") or runner_for(work)
    _thread.runner = runner
    return run_batch(work, items, limit, runner, how)


_thread = threading.local()


# The work of the latest maps. Threads of one worker that begin together unpickle it once.
works: dict[bytes, Work] = {}
_loading = ForkSafeLock()


def load(digest: bytes, fetch: Callable[[], bytes]) -> Work:
    """A map's work, which is fetched if this worker does not have it."""
    with _loading.lock:
        if digest not in works:
            works[digest] = unpack_start(fetch())[0]
            if len(works) > _MOST_REMEMBERED:
                del works[next(iter(works))]
        return works[digest]


# Journals


class _Journal:
    """What a batch has come to: how many items have begun, and after that the reports.

    Where no file can be written it is known as long as the worker lives.
    """

    def __init__(self, name: str) -> None:
        self.reports: list[bytes] = []
        self.mark: Any = [0]
        self.descriptor = 2
        self._path = Path()
        self._file: io.RawIOBase | io.BytesIO = io.BytesIO()
        with contextlib.suppress(OSError):
            self._path = _folder() / name
            self._file = self._path.open("x+b", buffering=0)
            self.descriptor = self._file.fileno()
            self._file.write(bytes(_MARK.size))
            # What is written there is in the file even if the process is killed.
            self.mark = memoryview(mmap.mmap(self._file.fileno(), _MARK.size)).cast("Q")

    def add(self, report: Report) -> None:
        data = pack_report(report)
        self.reports.append(data)
        with contextlib.suppress(OSError):
            self._file.write(pickle.dumps(data))

    def remove(self) -> None:
        self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink()


def _begin_journal(name: str) -> _Journal:
    """Begin one, and remove the oldest of this thread."""
    kept: deque[_Journal] = _thread.__dict__.setdefault("journals", deque())
    while len(kept) >= _MOST_KEPT:
        kept.popleft().remove()
    kept.append(_Journal(name))
    return kept[-1]


def _folder_of_all() -> Path:
    """The folder of all workers of this user on this machine, which nobody else can write to."""
    folder = folder_of_user(lambda: Path("workers"))
    return private_folder(folder.parent, folder.name, "TMPDIR")


@functools.cache
def _folder() -> Path:
    """That of this process."""
    folder_of_all = _folder_of_all()
    for folder in folder_of_all.iterdir():
        if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
    own = Path(tempfile.mkdtemp(dir=folder_of_all))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def recover(names: list[str]) -> list[Found | None]:
    """Read journals that are on this machine; None for those that are not."""
    return [_read(name) for name in names]


def _read(name: str) -> Found | None:
    with contextlib.suppress(OSError, StopIteration, struct.error):
        data = next(_folder_of_all().glob(f"*/{name}")).read_bytes()
        (begun,) = _MARK.unpack_from(data)
        file = io.BytesIO(data)
        file.seek(_MARK.size)
        reports: list[bytes] = []
        # The last one may be half written.
        with contextlib.suppress(EOFError, pickle.UnpicklingError):
            while not data.startswith(_STUCK, file.tell()):
                reports.append(pickle.load(file))  # noqa: S301 - nobody else can write there
        rest = file.read()
        return Found(begun, reports, stuck=rest.decode(errors="replace") if rest.startswith(_STUCK) else "")
    return None


def _run_watched(work: Work, items: list[Any], limit: TimeLimit, how: How) -> Report:
    """Run an item in this process, which ends when the time is up, even if no other thread is ever let run."""
    _end_at(clock.real() + limit[0] + _UNHEEDED_SECONDS * work.is_async)
    try:
        return _run_here(work, items, limit, how)
    finally:
        _end_at(math.inf)


# By thread: when the time of its item is up, and the journal that is then told where that is.
_due: dict[int, tuple[float, int]] = {}
_due_lock = ForkSafeLock()


def _end_at(ends: float) -> None:
    """Set the timer, of which a process has only one, to the item of all threads that is due first."""
    with _due_lock.lock:
        _due[threading.get_ident()] = ends, _thread.journals[-1].descriptor
        first, descriptor = min(_due.values())
        faulthandler.cancel_dump_traceback_later()
        if first < math.inf:
            seconds = max(0.001, first - clock.real())
            faulthandler.dump_traceback_later(seconds, exit=True, file=descriptor)


# On ray


def run_on_ray(name: str, digest: bytes, work: list[Any], payload: bytes) -> Found:
    """One batch, in a task."""
    import ray

    return run_parcel(name, digest, lambda: ray.get(work[0]), payload, _run_watched)


def load_on_ray(digest: bytes, work: list[Any], seconds: float) -> None:
    """Load the work before there is something to do, and take so long that no other is loaded by the same worker."""
    import ray

    load(digest, lambda: ray.get(work[0]))
    time.sleep(seconds)


# On dask


def load_on_dask(digest: bytes, packed: bytes) -> str | None:
    """Load the work; tells why that cannot be done."""
    try:
        load(digest, lambda: packed)
    except Exception as error:  # noqa: BLE001 - the map raises it
        return describe(error)
    return None


def run_on_dask(name: str, digest: bytes, payload: bytes, *, restarts: bool) -> Found | None:
    """One batch, in a task; None if this worker has loaded the work of many other maps meanwhile."""
    if digest not in works:
        return None
    run_limited = _run_watched if restarts else functools.partial(_run_in_child, digest)
    return run_parcel(name, digest, bytes, payload, run_limited)


# Processes below a worker, for items that have a time limit: they can be ended. Of each map, those that run nothing.
_idle_children: dict[bytes, list[tuple[ProcessPool, BlockingInbox]]] = {}


def _run_in_child(digest: bytes, work: Work, items: list[Any], limit: TimeLimit, how: How) -> Report:
    """Run an item in a process below this one, which stays for the next one."""
    from opero.concurrency.processes import ProcessPool

    idle = _idle_children.setdefault(digest, [])
    pool, inbox = idle.pop() if idle else (ProcessPool(work, 1), BlockingInbox())
    pool.start(inbox)
    batch = Batch(items, 0, time_limit=limit, grace=_UNHEEDED_SECONDS * work.is_async)
    if limit[1] == "total_timeout":
        # That of an attempt begins when its process is ready.
        batch.ends_at = clock.real() + limit[0] + batch.grace
    how.mark[0] = 1
    try:
        pool.submit(batch)
        return _report_of(pool, inbox, batch, limit, name_of(work.function))
    finally:
        if _idle_children.get(digest) is idle:
            idle.append((pool, inbox))
        else:
            _end_child(pool, inbox)


def _report_of(pool: ProcessPool, inbox: BlockingInbox, batch: Batch, limit: TimeLimit, name: str) -> Report:
    """Wait for the report on a batch, and end its process when the time is up."""
    while True:
        patience = None if batch.ends_at == math.inf else max(0.0, batch.ends_at - clock.real())
        for event in inbox.collect(patience, is_real=True):
            known = pool.receive(event)
            if isinstance(known, Fatal):
                raise known.error
            if isinstance(known, Done):
                return known.report
            if isinstance(known, Lost):
                crash = WorkerCrashedError(f"the worker that ran {name} ended: {known.reason}")
                error = stopped(name, *limit) if batch.is_overdue else crash
                return Report([None], {0: error}, limit[0])
        if clock.real() >= batch.ends_at:
            batch.is_overdue = pool.kill(batch) or batch.is_overdue
            batch.ends_at = clock.real() + GRACE_SECONDS


def end_children(digest: bytes) -> None:
    """End the processes of a map that is over; one that runs an item when that has ended."""
    for child in _idle_children.pop(digest, []):
        _end_child(*child)


def _end_child(pool: ProcessPool, inbox: BlockingInbox) -> None:
    pool.stop()
    inbox.close()
