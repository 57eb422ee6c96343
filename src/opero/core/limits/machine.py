"""A limit for all processes of one machine: a file, which the system unlocks when its holder dies.

The file holds the state and nothing of the arguments. It is opened, locked, read and written for each start, so that it
may vanish at any time, and so that no descriptor has to survive a fork.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

from opero.core.clock import LONGEST_WAIT, clock
from opero.core.forks import ForkSafeLock
from opero.core.private_folder import folder_of_user, private_folder
from opero.exceptions import UnsafeCacheError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from opero.core.limits.rates import Rates
    from opero.core.limits.shared import Request

IS_SUPPORTED = fcntl is not None
_FOLDER = "limits"
_TIME = struct.Struct("<d")
# Which quotas the file is for, when it was written, when it will tell nothing any more; when all slots taken so far
# will have passed, the end of a pause.
_HEADER = struct.Struct("<8s4d")
_PLACE = struct.Struct("<q")
_NEW_FILES_PER_TIDYING = 256
# Who holds a file holds it for microseconds, unless it was stopped: then others come again, and do not block.
_LOCK_TRIES, _LOCK_SECONDS = 20, 0.00005
_BUSY_SECONDS = 0.005


def default_root() -> Path:
    """Where opero keeps the limits of this user and machine."""
    import platformdirs

    return folder_of_user(lambda: Path(platformdirs.user_cache_dir("opero", appauthor=False)))


class FileGate:
    """A `opero.core.limits.shared.Gate` in a file.

    The times in it are those of the system's monotonic clock, which all processes share until the next start of the
    machine.
    """

    is_instant: ClassVar[bool] = True

    def __init__(self, name: str, rates: Rates, folder: Path | None) -> None:
        self._root = default_root() if folder is None else folder
        self._file_name = blake2b(name.encode(), digest_size=16).hexdigest()
        self.change(rates)

    @cached_property
    def _path(self) -> str:
        folder = private_folder(self._root, _FOLDER, "rate_limit_options={'folder': …}")
        _tidying.file_opened(folder)
        return str(folder / self._file_name)

    @cached_property
    def _lock(self) -> ForkSafeLock:
        return _lock_for(self._path)

    def change(self, rates: Rates) -> None:
        self._rates = rates
        self._kind = blake2b(repr(rates.quotas).encode(), digest_size=8).digest()

    def perform(self, requests: Sequence[Request]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Any:
        try:
            return self._ask(request)
        except UnsafeCacheError:
            raise
        except FileNotFoundError:
            # The folder has gone; it is made anew.
            self.__dict__.pop("_path", None)
        except OSError as error:
            return error
        try:
            return self._ask(request)
        except FileNotFoundError as error:
            return error

    def _ask(self, request: Request) -> float:
        with self._lock.lock, _locked(self._path) as file:
            if file is None:
                return _BUSY_SECONDS
            now = clock.machine()
            state = _State(file, self._kind, self._rates, now)
            if request.pause:
                state.pause(now + request.pause)
                return 0.0
            opens_at = state.opens_at(now)
            if opens_at > now:
                return opens_at - now
            state.start(now)
            return 0.0


class _State:
    """What a file says, and what is to be said there."""

    def __init__(self, file: int, kind: bytes, rates: Rates, now: float) -> None:
        self._file = file
        self._kind = kind
        self._rates = rates
        self._places_at = _HEADER.size
        self._starts_at = _HEADER.size + _PLACE.size * len(rates.quotas)
        self._all_taken_at = self._paused_until = 0.0
        self._places = [0] * len(rates.quotas)
        data = os.pread(file, self._starts_at, 0)
        if len(data) < _HEADER.size:
            return
        written_kind, written_at, _, all_taken_at, paused_until = _HEADER.unpack_from(data)
        if not 0 <= written_at <= now or not max(all_taken_at, paused_until) <= now + LONGEST_WAIT:
            # Written by a clock that began anew since, or damaged.
            os.ftruncate(file, 0)
            return
        self._all_taken_at, self._paused_until = all_taken_at, paused_until
        places = [
            place for (place,) in _PLACE.iter_unpack(data[_HEADER.size :].ljust(self._starts_at - _HEADER.size, b"\0"))
        ]
        if written_kind != kind or not all(0 <= place < q.calls for place, q in zip(places, rates.quotas, strict=True)):
            os.ftruncate(file, 0)
            return
        self._places = places

    def opens_at(self, now: float) -> float:
        # Slots taken at a slower rate are no more than a full burst of these.
        most = now + self._rates.tolerance + self._rates.interval
        if self._all_taken_at > most:
            self._all_taken_at = most
            self._write(now)
        moments = [self._all_taken_at - self._rates.tolerance, self._paused_until]
        for quota, offset in self._oldest():
            data = os.pread(self._file, _TIME.size, offset)
            (oldest,) = _TIME.unpack(data) if len(data) == _TIME.size else (0.0,)
            if 0 < oldest <= now:
                moments.append(oldest + quota.seconds)
        return max(moments)

    def start(self, now: float) -> None:
        self._all_taken_at = max(self._all_taken_at, now) + self._rates.interval
        oldest = [offset for _, offset in self._oldest()]
        self._places = [(place + 1) % q.calls for place, q in zip(self._places, self._rates.quotas, strict=True)]
        # In this order: killed in between, this process has counted a start that it will not make as none.
        self._write(now)
        for offset in oldest:
            os.pwrite(self._file, _TIME.pack(now), offset)

    def pause(self, until: float) -> None:
        self._paused_until = max(self._paused_until, until)
        self._write(clock.machine())

    def _oldest(self) -> Iterator[Any]:
        """Each quota, and where in the file its oldest start is, which the next one will replace."""
        offset = self._starts_at
        for quota, place in zip(self._rates.quotas, self._places, strict=True):
            yield quota, offset + place * _TIME.size
            offset += quota.calls * _TIME.size

    def _write(self, now: float) -> None:
        longest = max((quota.seconds for quota in self._rates.quotas), default=0.0)
        idle_from = max(self._all_taken_at, self._paused_until, now + longest)
        header = _HEADER.pack(self._kind, now, idle_from, self._all_taken_at, self._paused_until)
        os.pwrite(self._file, header + b"".join(map(_PLACE.pack, self._places)), 0)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[int | None]:
    """The open file, locked for this process; None if somebody else keeps it for longer than it takes to read."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _lock(file):
                yield None
                return
            # Somebody may have tidied it away between the two.
            if os.fstat(file).st_nlink:
                yield file
                return
        finally:
            # This unlocks it, too.
            os.close(file)


def _lock(file: int) -> bool:
    assert fcntl is not None  # noqa: S101 - for the type checkers
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        except OSError as error:
            if error.errno not in {errno.EACCES, errno.EAGAIN}:
                raise
        else:
            return True
        time.sleep(_LOCK_SECONDS)
    return False


class _Tidying:
    """Removes the files of limits that are idle."""

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._opened = 0

    def file_opened(self, folder: Path) -> None:
        """Once in a while, look through the folder."""
        with self._lock.lock:
            self._opened += 1
            if self._opened % _NEW_FILES_PER_TIDYING != 1:
                return
        for path in folder.iterdir():
            # Another process may be faster.
            with contextlib.suppress(OSError):
                self._remove_if_idle(str(path))

    def _remove_if_idle(self, path: str) -> None:
        with _lock_for(path).lock, _locked(path) as file:
            if file is None:
                return
            data = os.pread(file, _HEADER.size, 0)
            now = clock.machine()
            idle = len(data) < _HEADER.size
            if not idle:
                _, written_at, idle_from, *_ = _HEADER.unpack(data)
                idle = written_at > now or idle_from < now
            if idle:
                os.unlink(path)  # noqa: PTH108 - it is a str


_tidying = _Tidying()
_registry_lock = ForkSafeLock()
_locks: WeakValueDictionary[str, ForkSafeLock] = WeakValueDictionary()


def _lock_for(path: str) -> ForkSafeLock:
    """One lock for all that use a file in this process: to close it anywhere unlocks it everywhere."""
    with _registry_lock.lock:
        lock = _locks.get(path)
        if lock is None:
            _locks[path] = lock = ForkSafeLock()
        return lock
