"""A limit for all processes of one machine: a file, which the system unlocks when its holder dies.

The file holds the state and nothing of the arguments. It is opened, locked, read and written for each start, so that it
may vanish at any time, and so that no descriptor has to survive a fork.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opero.core.clock import clock
from opero.core.limits.ledger import is_over
from opero.core.private_folder import OTHERS_WRITE, folder_of_user, private_folder
from opero.exceptions import UnsafeCacheError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from opero.core.limits.ledger import Change

_FOLDER = "limits"
# Who holds a file holds it for microseconds, unless it was stopped: then others come again, and do not block.
_LOCK_TRIES, _LOCK_SECONDS = 10, 0.00005
_BUSY_SECONDS = 0.005
# After so long it is a fault of the limit.
_LONGEST_LOCK = 1.0
# The most of a state that can be true.
_MOST_BYTES = 1_000_000
# Idle files that each new one is looked for among.
_TIDIED_AT_ONCE = 2


class FileGate:
    """A `opero.core.limits.shared.Gate` in a file.

    The times in it are those of the system's monotonic clock, which all processes share until the next start of the
    machine.
    """

    is_instant = True

    def __init__(self, name: str, folder: Path | None) -> None:
        if folder is None:
            import platformdirs

            folder = folder_of_user(lambda: Path(platformdirs.user_cache_dir("opero", appauthor=False)))
        self._root = folder
        self._file_name = blake2b(name.encode(), digest_size=16).hexdigest()
        self._path: str | None = None
        # Since when somebody else has been found to keep the file locked.
        self._locked_since: float | None = None

    def perform(self, requests: Sequence[Change]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, change: Change) -> float | OSError:
        try:
            if self._path is None:
                # Not with its files: with one for each value, each new one would take ever longer.
                folder = private_folder(self._root, _FOLDER, "rate_limit_options={'folder': …}", with_files=False)
                _tidy(str(folder))
                self._path = str(folder / self._file_name)
            with _locked(self._path) as file:
                if file is None:
                    return self._locked_by_others()
                self._locked_since = None
                wait, made, _ = change(os.pread(file, _MOST_BYTES, 0), clock.machine())
                if made:
                    os.pwrite(file, made, 0)
                    os.ftruncate(file, len(made))
                return wait
        except UnsafeCacheError:
            raise
        except OSError as error:
            # The folder may have gone; the next one makes it anew.
            self._path = None
            return error

    def _locked_by_others(self) -> float:
        now = clock.machine()
        self._locked_since = now if self._locked_since is None else self._locked_since
        if now - self._locked_since < _LONGEST_LOCK:
            return _BUSY_SECONDS
        raise TimeoutError(errno.ETIMEDOUT, f"another process has kept its file locked for {_LONGEST_LOCK:g} s")


@contextlib.contextmanager
def _locked(path: str) -> Iterator[int | None]:
    """The open file, locked; None if that has to be tried again: somebody else has it, or has removed it."""
    # Here, since Windows has none.
    from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock

    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    is_locked = False
    try:
        for _ in range(_LOCK_TRIES):
            try:
                # Of this opening, and not of the process as `fcntl.lockf`: threads keep each other out, too.
                flock(file, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOCK_SECONDS)
            else:
                is_locked = True
                break
        found = os.fstat(file)
        if found.st_uid not in {os.geteuid(), 0} or found.st_mode & OTHERS_WRITE:
            what = "can be written to by others" if found.st_mode & OTHERS_WRITE else "belongs to another user"
            raise UnsafeCacheError(f"{path} {what}; delete it, or name another folder for limits")
        # Somebody may have tidied it away between the two; then it is to be asked for again.
        yield file if is_locked and found.st_nlink else None
    finally:
        if is_locked:
            # A child that was forked meanwhile has it open, too.
            flock(file, LOCK_UN)
        os.close(file)


def _tidy(folder: str) -> None:
    """Remove some of the files whose limits are idle; each new one goes on where the one before has stopped."""
    paths = _being_tidied.setdefault(folder, [])
    with contextlib.suppress(OSError, IndexError):
        if not paths:
            paths += os.listdir(folder)  # noqa: PTH208 - thousands of names
        for _ in range(_TIDIED_AT_ONCE):
            path = f"{folder}/{paths.pop()}"
            if not os.path.exists(path):  # noqa: PTH110 - it is a str
                continue
            with _locked(path) as file:
                if file is not None and is_over(os.pread(file, _MOST_BYTES, 0), clock.machine()):
                    os.unlink(path)  # noqa: PTH108 - as above


# By folder: to pop a name is one step, and needs no lock.
_being_tidied: dict[str, list[str]] = {}
