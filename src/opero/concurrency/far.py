"""What pools of workers that are not opero's have in common: what goes to a worker, and what is made of its answer.

A worker keeps a journal of each batch: how many of its items have begun, and the reports on those that were slow. That
is a file on the worker's machine, so it outlives a worker that is killed, and whoever is still there reads it for the
map: a crash is charged to the item that was running, without a message for each item that begins.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import mmap
import os
import pickle
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from opero.concurrency.mapping import level_of_the_user
from opero.concurrency.pickling import Packer, pack_report, unpack_batch, unpack_report, unpack_start
from opero.concurrency.pool import Batch, Pool
from opero.concurrency.scheduler import Scheduler
from opero.concurrency.worker import FAR_BATCH_SECONDS, UNHEEDED_SECONDS, How, Report, Work, run_batch, runner_for
from opero.core.clock import clock
from opero.core.forks import ForkSafeLock
from opero.core.private_folder import folder_of_user, private_folder
from opero.core.steps import stopped
from opero.exceptions import NotTransferableError, OperoError
from opero.utils.notes import IN_THE_WORKER, add_note, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opero.core.steps import TimeLimit

# A connection that is not made within so long is not made at all.
CONNECTING_SECONDS = 5.0
# What is told to end does so within milliseconds.
ENDING_SECONDS = 5.0
# Without a worker that has what the items need, a warning is given.
_WARNING_SECONDS = 30.0
# A batch that takes longer than it was made for goes on for so long: what is given back costs a message.
_MOST_SECONDS = 2 * FAR_BATCH_SECONDS
# Maps whose work a worker remembers.
_MOST_REMEMBERED = 16
# Journals that each thread of a worker keeps: the last reports may not have reached the map yet.
_MOST_KEPT = 3
# Those of workers that were killed are removed by others that start later than so.
_STALE_SECONDS = 7 * 86_400.0
_MARK_BYTES = 8
# So begins what `faulthandler` writes into a journal when the time is up.
_STUCK = b"Timeout ("


class Found(NamedTuple):
    """What became of a batch: how many of its items have begun, and the reports so far.

    ``reason``: why it ended early; ``stuck``: where the item was whose time was up.
    """

    begun: int
    reports: list[bytes]
    reason: str = ""
    stuck: str = ""


class FarPool(Pool):
    """What the pools on clusters have in common, and partly that of an executor.

    Attributes:
        engine: What runs their workers.
        needs: What an item takes of a worker.
    """

    is_far = True
    largest_batch = 10_000
    engine = ""
    needs: Mapping[str, float]
    _packer = Packer()
    _has_begun = _has_warned = False
    # Since when no worker has what the items need.
    _roomless_since: float | None = None

    def __init__(self, work: Work, workers: int | None) -> None:
        super().__init__(work, workers)
        self.take_on(work)
        self.rest()

    def take_on(self, work: Work) -> None:
        super().take_on(work)
        self._packed = self._packer.start((work, None, (), None))
        # By which workers know it.
        self._digest = blake2b(self._packed, digest_size=16).digest()

    def rest(self) -> None:
        """What is told of the cluster is of no interest."""
        self.deliver = lambda *_about, **_more: None

    @property
    def slots(self) -> int:
        if not self._has_begun:
            return 0 if self._is_paced else 1
        room = self.room()
        return room if self._most is None else min(room, self._most)

    def prepare(self) -> None:
        """Connect to the cluster, which a map does only if it has an item that is to be run."""
        if not self._has_begun:
            self._has_begun = True
            # A forgotten stream is ended while the engine can still do that.
            atexit.register(self.ends.close)
            self.ends.callback(atexit.unregister, self.ends.close)
            self.begin()

    def submit(self, batch: Batch) -> None:
        self.prepare()
        payload = self.pack(batch)
        if payload is not None:
            self.send(batch, uuid4().hex, payload)

    # What each engine does

    def begin(self) -> None:
        """Connect to the cluster, or start one."""
        raise NotImplementedError

    def room(self) -> int:
        """Items that the cluster can run at the same time."""
        raise NotImplementedError

    def send(self, batch: Batch, name: str, payload: bytes) -> None:
        """Let a worker run a packed batch, which keeps a journal of that name."""
        raise NotImplementedError

    # Batches

    def pack(self, batch: Batch) -> bytes | None:
        """Pickle a batch; None if one of its items cannot be, which the map is told."""
        try:
            return self._packer.batch(batch)
        except NotTransferableError as error:
            self.deliver(Scheduler.not_sent, batch, error)
            return None

    # What the thread of the map makes of the answers

    def opened(self, run: Scheduler, batch: Batch, answer: Found) -> None:
        """A worker has answered."""
        if answer.reason:
            self.recovered(run, {batch: answer}, answer.reason)
            return
        _tell_parts(run, batch, answer.reports[:-1])
        run.done(batch, unpack_report(answer.reports[-1]))

    def recovered(
        self, run: Scheduler, left: Mapping[Batch, Found | None], reason: str, *, is_innocent: bool = False
    ) -> None:
        """A worker is gone, and this is what it has left of its batches; of nothing, it has not begun, or is lost.

        The item that was running is charged, if it was the only one, and its worker has not left as it should. One that
        was stuck has ended its worker, and explains all others.
        """
        is_innocent = is_innocent or any(found and found.stuck for found in left.values())
        running: dict[Batch, int] = {}
        for batch, its in left.items():
            found = its or Found(0, [])
            done = _tell_parts(run, batch, found.reports)
            if found.stuck and batch.time_limit is not None:
                error = stopped(self._name, *batch.time_limit)
                add_note(error, f"{IN_THE_WORKER}{found.stuck}")
                run.done(batch, Report([None], {0: error}, batch.time_limit[0]))
            elif found.begun > done and not is_innocent:
                running[batch] = found.begun
            else:
                run.lost([batch], reason, [batch])
        for batch, begun in running.items():
            run.lost([batch], reason, sure=False, begun=begun if len(running) == 1 else None)

    def refused(self, _run: Scheduler, error: BaseException | str) -> None:
        """The end of a map whose batches cannot be run; no error of the function's, which are in the reports."""
        msg = (
            f"{self.engine} cannot run {self._name}: {error if isinstance(error, str) else describe(error)}; "
            f"the whole cluster needs opero, and its workers what {self._name} imports"
        )
        raise OperoError(msg)

    def see_room(self, _run: Scheduler, has_room: object) -> None:
        """Take note of whether any worker has what the items need, as far as is known now.

        The map ends if its calls have waited for one as long as they may.
        """
        if has_room:
            self._roomless_since = None
            return
        self._roomless_since = self._roomless_since or clock.real()
        waited = clock.real() - self._roomless_since
        needed = ", ".join(f"{name}={need:g}" for name, need in self.needs.items())
        lacking = f"{self.engine} has no worker for {self._name}, which needs {needed or 'a thread'}"
        if self._patience is not None and waited > self._patience:
            raise OperoError(f"{lacking}, for {self._patience:g} s")
        if waited > _WARNING_SECONDS and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"{lacking}; the map waits for one", RuntimeWarning, stacklevel=level_of_the_user())


def _tell_parts(run: Scheduler, batch: Batch, reports: list[bytes]) -> int:
    """Tell the map of reports after which the worker has gone on; gives how many items these are about."""
    count = 0
    for report in map(unpack_report, reports):
        count += len(report.values)
        run.done(batch, report, is_part=True)
    return count


# In the workers


def run_parcel(
    name: str, digest: bytes, fetch: Callable[[], bytes], payload: bytes, run_limited: Callable[..., Report]
) -> Found:
    """Run one batch in a worker, which keeps a journal of that name.

    It raises only if the work cannot be loaded, which ``fetch`` gets for a worker that lacks it: what the function
    raises is in the reports. ``run_limited`` runs an item that has a time limit.
    """
    work = load(digest, fetch)
    arrived = unpack_batch(payload)
    if isinstance(arrived, Report):
        return Found(0, [pack_report(arrived)])
    items, limit = arrived
    journal, reason = _begin_journal(name), ""
    how = How(mark=journal.mark, tell=journal.add, longest=_MOST_SECONDS, seconds=_MOST_SECONDS)
    try:
        run: Any = _run_here if limit is None else run_limited
        journal.add(run(work, items, limit, how))
    except BaseException as error:  # noqa: BLE001 - as in process mode exit ends the item, but not this process
        reason = describe(error)
    return Found(journal.mark[0], journal.reports, reason)


def _run_here(work: Work, items: list[Any], limit: TimeLimit | None, how: How) -> Report:
    """Run a batch; coroutines in the event loop that this thread has for all of them."""
    if not work.is_async:
        return run_batch(work, items, limit, None, how)
    runner: Any = getattr(_thread, "runner", None) or runner_for(work)
    _thread.runner = runner
    return run_batch(work, items, limit, runner, how)


_thread = threading.local()
_watching = ForkSafeLock()


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


def _folder() -> Path:
    """The folder of all workers of this user on this machine, which nobody else can write to."""
    folder = folder_of_user(lambda: Path("workers"))
    return private_folder(folder.parent, folder.name, "TMPDIR")


class _Journal:
    """The file with what a batch has come to: how many items have begun, and after that the reports.

    It is removed when nobody has this object any more, and when the program ends.
    """

    def __init__(self, path: Path) -> None:
        self.reports: list[bytes] = []
        self.file = open(path, "x+b", buffering=0, opener=partial(os.open, mode=0o600))  # noqa: SIM115
        self.file.write(bytes(_MARK_BYTES))
        # What is written there is in the file even if the process is killed.
        self.mark: Any = memoryview(mmap.mmap(self.file.fileno(), _MARK_BYTES)).cast("Q")
        weakref.finalize(self, path.unlink, missing_ok=True)

    def add(self, report: Report) -> None:
        data = pack_report(report)
        self.reports.append(data)
        self.file.write(pickle.dumps(data))


def _begin_journal(name: str) -> _Journal:
    """Begin one, and forget the oldest of this thread."""
    if not hasattr(_thread, "journals"):
        _thread.journals, _thread.folder = deque(maxlen=_MOST_KEPT), _folder()
        for path in _thread.folder.iterdir():
            # Another worker may do the same.
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
    try:
        journal = _Journal(_thread.folder / name)
    except FileNotFoundError:
        # Somebody has tidied up.
        journal = _Journal(_folder() / name)
    _thread.journals.append(journal)
    return journal


def recover(names: list[str]) -> list[Found | None]:
    """Read journals that are on this machine; None for those that are not."""
    return [_read(name) for name in names]


def _read(name: str) -> Found | None:
    try:
        data = (_folder() / name).read_bytes()
    except OSError:
        return None
    begun = int.from_bytes(data[:_MARK_BYTES], sys.byteorder)
    file = io.BytesIO(data)
    file.seek(_MARK_BYTES)
    reports: list[bytes] = []
    # The last one may be half written.
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        while not data.startswith(_STUCK, file.tell()):
            reports.append(pickle.load(file))  # noqa: S301 - nobody else can write there
    rest = file.read()
    return Found(begun, reports, stuck=rest.decode(errors="replace") if rest.startswith(_STUCK) else "")


def run_watched(work: Work, items: list[Any], limit: TimeLimit, how: How) -> Report:
    """Run an item in this process, which ends when the time is up, even if no other thread is ever let run."""
    # Not at the top: interpreters of `InterpreterPoolExecutor` cannot have it.
    import faulthandler

    # A process has only one such timer.
    with _watching.lock:
        seconds = max(0.001, limit[0] + UNHEEDED_SECONDS * work.is_async)
        faulthandler.dump_traceback_later(seconds, exit=True, file=_thread.journals[-1].file)
        try:
            return _run_here(work, items, limit, how)
        finally:
            faulthandler.cancel_dump_traceback_later()
