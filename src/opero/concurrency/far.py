"""What the pools on clusters have in common: what goes to a worker, how it runs there, and what a dead one has left.

A worker keeps a journal of each batch: how many of its items have begun, and the reports on those that were slow. That
is a file on the worker's machine, so it outlives a worker that is killed, and whoever is still there reads it for the
map: a crash is charged to the item that was running, without a message for each item that begins.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import mmap
import pickle
import shutil
import socket
import struct
import tempfile
import threading
import time
import warnings
from collections import deque
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from opero.concurrency.batches import Batch, Done, Fatal, Lost, Pool, not_run
from opero.concurrency.transport import Packer, pack_report, unpack_batch, unpack_report, unpack_start
from opero.concurrency.worker import (
    FAR_BATCH_SECONDS,
    FAR_LONG_SECONDS,
    AsyncCaller,
    How,
    Report,
    Work,
    run_batch,
)
from opero.core.forks import ForkSafeLock
from opero.core.private_folder import refuse_unsafe
from opero.core.signature import name_of
from opero.core.steps import stopped
from opero.exceptions import NotTransferableError, OperoError
from opero.utils.logging import log
from opero.utils.notes import IN_THE_WORKER, add_note, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opero.core.steps import TimeLimit

# What a worker answers: reports, that it cannot load the work, or that something has ended the batch.
REPORTS, BROKEN, ENDED = range(3)
Answer: TypeAlias = tuple[int, Any]
# How an item is run that has a time limit.
RunLimited: TypeAlias = "Callable[[Work, list[Any], TimeLimit, How], Report]"

# A connection that is not made within so long is not made at all.
CONNECTING_SECONDS = 5.0
# What is told to end does so within milliseconds.
ENDING_SECONDS = 5.0
# Without a worker that has what the items need, a warning is given.
_WARNING_SECONDS = 30.0
# Maps whose work a worker remembers.
_MOST_REMEMBERED = 8
# Journals that each thread of a worker keeps: the last reports may not have reached the map yet.
_MOST_KEPT = 3
_FOLDERS = "opero-worker-"
LARGEST_BATCH = 10_000
# Those of workers that were killed are removed by others that start later than so.
_STALE_SECONDS = 7 * 86_400.0
_MARK = struct.Struct("=Q")
_STUCK = b"Timeout ("
# A coroutine is cancelled when its time is up, and may need some to tidy up.
UNHEEDED_SECONDS = 5.0


class Found(NamedTuple):
    """What a journal says: how many items have begun, the reports so far, and where one was whose time was up."""

    begun: int
    reports: list[bytes]
    stuck: str


# In the map


def check_reachable(engine: str, host: str, port: int) -> None:
    """Say at once if nothing answers there: the engines themselves try for minutes."""
    try:
        socket.create_connection((host.strip("[]"), port), CONNECTING_SECONDS).close()
    except OSError as error:
        msg = f"{engine} is away: nothing answers at {host}:{port} ({describe(error)})"
        raise OperoError(msg) from error


def tell_of_dashboard(engine: str, url: str | None) -> None:
    """Log where it is, once."""
    if url and url not in _told:
        _told.add(url)
        log("INFO", "the dashboard of {} is at {}", engine, url)


_told: set[str] = set()


class FarPool(Pool):
    """What the pools on clusters have in common.

    Args:
        work: What their workers run.
        engine: What runs them.
    """

    is_far = can_rest = True
    who_needs_opero = "its workers"

    def __init__(self, work: Work, engine: str) -> None:
        self._name = name_of(work.function)
        self._engine = engine
        self._patience: float | None = None
        # Since when no worker has what the items need.
        self._roomless_since: float | None = None
        self._has_warned = False
        # An inbox, in which others leave what the thread of the map shall do; between two maps nobody listens.
        self.deliver = _ignore
        self.take_on(work)

    def take_on(self, work: Work) -> None:
        self._packer = Packer()
        self._packed = self._packer.start((work, None, (), None))
        self._digest = blake2b(self._packed, digest_size=16).digest()

    def rest(self) -> None:
        """What is told of the cluster is of no interest."""
        self.deliver = _ignore

    def end_at_exit(self) -> None:
        """End what a forgotten stream has left, while its engine can still do that."""
        atexit.register(self.stop, _never)

    def not_at_exit(self) -> None:
        """It has ended before."""
        atexit.unregister(self.stop)

    @property
    def largest_batch(self) -> int:
        return LARGEST_BATCH

    def pack(self, batch: Batch) -> bytes | None:
        """Pickle a batch; None if one of its items cannot be, which the map is told."""
        try:
            return self._packer.batch(batch)
        except NotTransferableError as error:
            self.deliver(not_run(batch, error))
            return None

    def opened(self, batch: Batch, answer: Answer, size: int) -> list[Any]:
        """Events of what a worker has answered."""
        kind, content = answer
        if kind == BROKEN:
            needs = f"it needs opero, and what {self._name} imports"
            msg = f"a worker of the cluster cannot run {self._name}: {content}; {needs}"
            return [Fatal(OperoError(msg))]
        if kind == ENDED:
            found, reason = content
            return self.recovered(batch, found, reason)
        report = merged(content)
        if not report.values:
            return [not_run(batch, report.errors[0])]
        return [Done(batch, report, max(size, sum(map(len, content))))]

    def recovered(
        self, batch: Batch, found: Found | None, reason: str, *, is_sure: bool = True, is_innocent: bool = False
    ) -> list[Any]:
        """Events of what a worker that is gone has left of a batch; of nothing, it has not begun, or is lost.

        ``is_sure``: no other item can have ended the worker. ``is_innocent``: it was something else.
        """
        innocent = Lost([batch], reason, innocent=[batch])
        if found is None or (not found.begun and not found.reports):
            return [innocent]
        events: list[Any] = []
        if found.reports:
            events.append(Done(batch, merged(found.reports), is_part=True))
        if found.stuck:
            seconds, option = batch.time_limit or (0.0, "")
            error = stopped(self._name, seconds, option)
            add_note(error, f"{IN_THE_WORKER}{found.stuck}")
            events.append(Done(batch, Report([None], {0: error}, seconds)))
        elif is_innocent:
            events.append(innocent)
        elif is_sure:
            events.append(Lost([batch], reason, begun=found.begun))
        else:
            events.append(Lost([batch], reason, sure=False))
        return events

    def later(self, handle: Callable[..., list[Any]], *about: Any) -> None:
        """Let the thread of the map call ``handle``, which gives events for its scheduler."""
        self.deliver((handle, about))

    def receive(self, event: Any) -> Any:
        """Make a scheduler's event of what was delivered; None if it is of no interest."""
        if not isinstance(event, tuple):
            return event
        handle, about = event
        first, *others = handle(*about) or [None]
        for other in others:
            self.deliver(other)
        return first

    def see_room(self, has_room: object, needs: str) -> Fatal | None:
        """Take note of whether any worker has what the items need, as far as is known now.

        Returns:
            The end of the map, if its calls have waited for one as long as they may.
        """
        if has_room:
            self._roomless_since = None
            return None
        self._roomless_since = self._roomless_since or time.monotonic()
        waited = time.monotonic() - self._roomless_since
        lacking = f"{self._engine} has no worker for {self._name}{needs}"
        if self._patience is not None and waited > self._patience:
            return Fatal(OperoError(f"{lacking}, for {self._patience:g} s"))
        if waited > _WARNING_SECONDS and not self._has_warned:
            self._has_warned = True
            self.later(_warn, f"{lacking}; the map waits for one")
        return None

    def refused(self, error: Exception) -> Fatal:
        """The end of a map whose batches cannot be run; no error of the function's, which are in the reports."""
        msg = (
            f"{self._engine} cannot run {self._name}: {describe(error)}; {self.who_needs_opero} need opero, and its "
            f"workers what {self._name} imports"
        )
        made = OperoError(msg)
        made.__cause__ = error
        return Fatal(made)


def wait_for_the_end(has_ended: Callable[[], bool], is_left: Callable[[], bool]) -> None:
    """Wait until what was told to end has ended, for some seconds, or until nobody wants to wait any more."""
    ends = time.monotonic() + ENDING_SECONDS
    while not has_ended() and time.monotonic() < ends and not is_left():
        time.sleep(0.005)


def _never() -> bool:
    """Nobody leaves a pool that ends with the program."""
    return False


def _ignore(_event: Any) -> None:
    """Nobody listens between two maps."""


def _warn(message: str) -> list[Any]:
    """In the thread of the map."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return []


def merged(reports: list[bytes]) -> Report:
    """One report of several that follow each other."""
    whole = Report([], {}, 0.0)
    for data in reports:
        report = unpack_report(data)
        whole.errors.update({len(whole.values) + place: error for place, error in report.errors.items()})
        whole.values.extend(report.values)
        whole.seconds = report.seconds
    return whole


# In the workers


def run_parcel(
    name: str, digest: bytes, fetch: Callable[[], bytes], payload: bytes, run_limited: RunLimited | None = None
) -> Answer:
    """Run one batch in a worker.

    Args:
        name: The name of its journal.
        digest: The name of the map's work.
        fetch: Gets the work, for a worker that does not have it.
        payload: The batch.
        run_limited: Runs an item that has a time limit; without it this process is ended when the time is up.
    """
    try:
        work = works.get(digest, fetch)
    except Exception as error:  # noqa: BLE001 - the map raises it
        return BROKEN, describe(error)
    arrived = unpack_batch(payload)
    if isinstance(arrived, Report):
        return REPORTS, [pack_report(arrived)]
    items, limit = arrived
    journal = _begin_journal(name)
    how = How(mark=journal.mark, tell=journal.add, longest=FAR_LONG_SECONDS, seconds=FAR_BATCH_SECONDS)
    try:
        if limit is None:
            report = run_in_this_thread(work, items, limit, how)
        elif run_limited is not None:
            report = run_limited(work, items, limit, how)
        else:
            with _watchdog.watching(journal, limit[0] + UNHEEDED_SECONDS * work.is_async):
                report = run_in_this_thread(work, items, limit, how)
    except BaseException as error:  # noqa: BLE001 - as in process mode exit ends the item, but not this process
        return ENDED, (Found(journal.mark[0], journal.reports, ""), describe(error))
    journal.add(report)
    return REPORTS, journal.reports


def load(digest: bytes, fetch: Callable[[], bytes]) -> str | None:
    """Load a map's work; tells why that cannot be done."""
    try:
        works.get(digest, fetch)
    except Exception as error:  # noqa: BLE001 - the map raises it
        return describe(error)
    return None


def run_in_this_thread(work: Work, items: list[Any], limit: TimeLimit | None, how: How) -> Report:
    """Run a batch; coroutines in the event loop that this thread has for all of them."""
    caller = None
    if work.is_async:
        if not hasattr(_thread, "caller"):
            _thread.caller = AsyncCaller()
        caller = _thread.caller
    return run_batch(work, items, limit, caller, how)


_thread = threading.local()


class _Works:
    """The work of the latest maps."""

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._works: dict[bytes, Work] = {}

    def known(self, digest: bytes) -> Work | None:
        """A map's work, if this worker has it."""
        return self._works.get(digest)

    def get(self, digest: bytes, fetch: Callable[[], bytes]) -> Work:
        # Threads of one worker that begin together unpickle it once.
        with self._lock.lock:
            work = self._works.get(digest)
            if work is None:
                work = self._works[digest] = unpack_start(fetch())[0]
                if len(self._works) > _MOST_REMEMBERED:
                    del self._works[next(iter(self._works))]
            return work


works = _Works()


class Journal:
    """What a batch has come to: how many items have begun, and after that the reports.

    Where no file can be written it is known as long as the worker lives.
    """

    def __init__(self, path: Path) -> None:
        self.reports: list[bytes] = []
        self.mark: Any = [0]
        self.file: Any = None
        self._path = path
        with contextlib.suppress(OSError):
            self.file = path.open("x+b", buffering=0)
            self.file.write(bytes(_MARK.size))
            # What is written there is in the file even if the process is killed.
            self.mark = memoryview(mmap.mmap(self.file.fileno(), _MARK.size)).cast("Q")

    def add(self, report: Report) -> None:
        data = pack_report(report)
        self.reports.append(data)
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.write(pickle.dumps(data))

    def remove(self) -> None:
        if self.file is not None:
            self.file.close()
            self._path.unlink(missing_ok=True)


def _begin_journal(name: str) -> Journal:
    """Begin one in the folder of this process, and remove the oldest of this thread."""
    global _folder  # noqa: PLW0603 - each process has one, which is made with its first journal
    with _lock.lock:
        if _folder is None:
            _remove_stale()
            # Only this user can read or write there.
            _folder = Path(tempfile.mkdtemp(prefix=_FOLDERS))
            atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    kept: deque[Journal] = _thread.__dict__.setdefault("journals", deque())
    while len(kept) >= _MOST_KEPT:
        kept.popleft().remove()
    kept.append(Journal(_folder / name))
    return kept[-1]


_folder: Path | None = None
_lock = ForkSafeLock()


def recover(name: str) -> Found | None:
    """Read a journal on this machine; None if there is none."""
    for folder in _folders():
        with contextlib.suppress(OSError), (folder / name).open("rb") as file:
            return _read(file)
    return None


def _read(file: Any) -> Found | None:
    mark = file.read(_MARK.size)
    if len(mark) < _MARK.size:
        return None
    (begun,) = _MARK.unpack(mark)
    reports: list[bytes] = []
    # Behind them may be what the watchdog has written, or one that is half written.
    while file.peek(1)[:1] == pickle.PROTO:
        try:
            reports.append(pickle.load(file))  # noqa: S301 - of this user's, see `_folders`
        except (EOFError, pickle.UnpicklingError):
            break
    rest = file.read()
    return Found(begun, reports, rest.decode(errors="replace") if rest.startswith(_STUCK) else "")


def _folders() -> Iterator[Path]:
    """Folders of workers on this machine that nobody else can write to."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*"):
        try:
            refuse_unsafe(folder, "")
        except OSError:
            continue
        yield folder


def _remove_stale() -> None:
    for folder in _folders():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


class _Watchdog:
    """Ends this process when the time of an item is up, even if it never lets another thread run.

    That is done by `faulthandler`, whose timer needs no interpreter; it writes into the journal where the item was.
    """

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._due: dict[Journal, float] = {}

    @contextlib.contextmanager
    def watching(self, journal: Journal, seconds: float) -> Iterator[None]:
        with self._lock.lock:
            self._due[journal] = time.monotonic() + seconds
            self._wind_up()
        try:
            yield
        finally:
            with self._lock.lock:
                del self._due[journal]
                self._wind_up()

    def _wind_up(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._due:
            # Of several threads' the one that is due first.
            journal = min(self._due, key=lambda each: self._due[each])
            left = max(0.001, self._due[journal] - time.monotonic())
            file = {} if journal.file is None else {"file": journal.file}
            faulthandler.dump_traceback_later(left, exit=True, **file)


_watchdog = _Watchdog()
