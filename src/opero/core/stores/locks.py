"""Locks on keys between the processes of one machine.

A lock is one byte of a file, locked by the system for this process and freed by the system when it ends, however it
ends. Nothing is written, and a forked child holds none of its parent's locks. The file is open while a key is locked.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

try:
    import fcntl
except ImportError:  # Windows: one run per key in each process, but not across processes
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from pathlib import Path

_FILE = "leases.lock"
_OFFSET_BITS = 62


class KeyLocks:
    """The locks of one store, which lets one thread at a time use them.

    When a file is closed the system frees all locks that the process has on it: a second store of the same folder, with
    other options, may cost a key one more run in another process.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._file: int | None = None
        # How often each byte was taken.
        self._takings: Counter[int] = Counter()

    def take(self, key: bytes) -> bool:
        """Lock a key unless another process has it; in one process it can be taken more than once."""
        place = _place(key)
        try:
            if self._takings[place] or self._lock_byte(place):
                self._takings[place] += 1
            return place in self._takings
        finally:
            self._close_if_unused()

    def release(self, key: bytes) -> None:
        """Give one of the takings back."""
        place = _place(key)
        self._takings[place] -= 1
        if self._takings[place] <= 0:
            del self._takings[place]
            if fcntl is not None and self._file is not None:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)
        self._close_if_unused()

    def _lock_byte(self, place: int) -> bool:
        if fcntl is None:
            return True
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (PermissionError, BlockingIOError):
            # Another process has it; which of the two errors it is depends on the system.
            return False
        return True

    def _close_if_unused(self) -> None:
        if not self._takings and self._file is not None:
            file, self._file = self._file, None
            os.close(file)

    def __del__(self) -> None:
        self._takings.clear()
        self._close_if_unused()


def _place(key: bytes) -> int:
    return int.from_bytes(key[:8], "big") >> (64 - _OFFSET_BITS)
