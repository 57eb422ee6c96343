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
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from opero.core.clock import clock
from opero.core.forks import ForkSafeLock
from opero.core.limits.ledger import Ledger
from opero.core.private_folder import folder_of_user, private_folder
from opero.exceptions import UnsafeCacheError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from opero.core.limits.ledger import Request
    from opero.core.limits.rates import Rates

IS_SUPPORTED = fcntl is not None
_FOLDER = "limits"
# From when on the file tells nothing any more; the ledger follows.
_IDLE_FROM = struct.Struct("<d")
# That, and when it was written, with which the ledger begins.
_STAMPS = struct.Struct("<2d")
# Who holds a file holds it for microseconds, unless it was stopped: then others come again, and do not block.
_LOCK_TRIES, _LOCK_SECONDS = 10, 0.00005
_BUSY_SECONDS = 0.005
# After so long it is a fault of the limit.
_LONGEST_LOCK = 1.0
# Idle files that each new one is looked for among.
_TIDIED_AT_ONCE = 2


def default_root() -> Path:
    """Where opero keeps the limits of this user and machine."""
    import platformdirs

    return folder_of_user(lambda: Path(platformdirs.user_cache_dir("opero", appauthor=False)))


class FileGate:
    """A `opero.core.limits.line.Gate` in a file.

    The times in it are those of the system's monotonic clock, which all processes share until the next start of the
    machine.
    """

    is_instant = True

    def __init__(self, name: str, rates: Rates, folder: Path | None) -> None:
        self._root = default_root() if folder is None else folder
        self._file_name = blake2b(name.encode(), digest_size=16).hexdigest()
        self._rates = rates
        self._file: tuple[str, ForkSafeLock] | None = None
        # Since when somebody else has been found to keep the file locked.
        self._locked_since: float | None = None

    def _find_file(self) -> tuple[str, ForkSafeLock]:
        """Its path and its lock in this process; no cached_property, whose lock a fork would leave locked."""
        if self._file is not None:
            return self._file
        # Not with its files: with one for each value, each new one would take ever longer.
        folder = private_folder(self._root, _FOLDER, "rate_limit_options={'folder': …}", with_files=False)
        _tidy(str(folder))
        path = str(folder / self._file_name)
        self._file = path, _lock_for(path)
        return self._file

    def change(self, rates: Rates) -> None:
        self._rates = rates

    def perform(self, requests: Sequence[Request]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Any:
        try:
            return self._ask(request)
        except UnsafeCacheError:
            raise
        except FileNotFoundError:
            # The folder has gone; it is made anew.
            self._file = None
        except OSError as error:
            return error
        try:
            return self._ask(request)
        except FileNotFoundError as error:
            return error

    def _ask(self, request: Request) -> float:
        path, own_lock = self._find_file()
        with own_lock.lock, _locked(path) as file:
            now = clock.machine()
            if file is None:
                return self._is_locked(now)
            self._locked_since = None
            ledger = Ledger.unpack(_read(file)[_IDLE_FROM.size :], self._rates, now)
            wait = ledger.perform(request, now)
            if ledger.is_changed:
                data = _IDLE_FROM.pack(ledger.idle_from(now)) + ledger.pack(now)
                os.pwrite(file, data, 0)
                os.ftruncate(file, len(data))
            return wait

    def _is_locked(self, now: float) -> float:
        if self._locked_since is None:
            self._locked_since = now
        if now - self._locked_since < _LONGEST_LOCK:
            return _BUSY_SECONDS
        msg = f"another process has kept its file locked for {_LONGEST_LOCK:g} s"
        raise TimeoutError(errno.ETIMEDOUT, msg)


def _read(file: int) -> bytes:
    return os.pread(file, 1_000_000, 0)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[int | None]:
    """The open file, locked for this process; None if somebody else keeps it for longer than it takes to read."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not _lock(file):
                yield None
                return
            found = os.fstat(file)
            if found.st_uid not in {os.geteuid(), 0}:
                msg = f"{path} belongs to another user; delete it, or name another folder for limits"
                raise UnsafeCacheError(msg)
            # Somebody may have tidied it away between the two.
            if found.st_nlink:
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


def _tidy(folder: str) -> None:
    """Remove some of the files whose limits are idle; each new one goes on where the one before has stopped."""
    with _tidying.lock:
        paths = _being_tidied.get(folder, [])
        if not paths:
            # Another process may be faster.
            with contextlib.suppress(OSError):
                paths = os.listdir(folder)  # noqa: PTH208 - thousands of names
        _being_tidied[folder] = paths
        chosen = [paths.pop() for _ in range(min(_TIDIED_AT_ONCE, len(paths)))]
    for name in chosen:
        with contextlib.suppress(OSError):
            _remove_if_idle(f"{folder}/{name}")


def _remove_if_idle(path: str) -> None:
    if not os.path.exists(path):  # noqa: PTH110 - it is a str
        return
    with _lock_for(path).lock, _locked(path) as file:
        if file is None:
            return
        data, now = os.pread(file, _STAMPS.size, 0), clock.machine()
        idle_from, written_at = _STAMPS.unpack(data) if len(data) == _STAMPS.size else (now, now)
        if idle_from <= now or not written_at <= now:
            os.unlink(path)  # noqa: PTH108 - as above


_tidying = ForkSafeLock()
_being_tidied: dict[str, list[str]] = {}
_registry_lock = ForkSafeLock()
_locks: WeakValueDictionary[str, ForkSafeLock] = WeakValueDictionary()


def _lock_for(path: str) -> ForkSafeLock:
    """One lock for all that use a file in this process: to close it anywhere unlocks it everywhere."""
    with _registry_lock.lock:
        lock = _locks.get(path)
        if lock is None:
            _locks[path] = lock = ForkSafeLock()
        return lock
