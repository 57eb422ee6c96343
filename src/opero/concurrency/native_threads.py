"""Threads, also those that Python does not know (of OpenMP, rayon), which may hold a lock when this process forks."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

from opero.core.forks import foreign_threads


def has_other_threads() -> bool:
    """Whether there are any of Python's or of the system's; where it does not list them, only of Python's.

    Those of OpenBLAS, which NumPy brings, do not count: it ends them before each fork by itself, and makes them anew
    when it needs them. So a fork for nothing shows whether others are left.
    """
    if foreign_threads():
        return True
    if not _stay(0.005):
        return False
    _fork_for_nothing()
    return _stay(0.05)


def fork_server_has_threads() -> bool:
    """Whether the fork server of multiprocessing, if there is one, has begun threads with what it has imported.

    To be asked when it has just forked: OpenBLAS has ended its own for that.
    """
    from multiprocessing import forkserver

    server: Any = forkserver._forkserver  # noqa: SLF001 - there is no function that tells
    pid: int | None = server._forkserver_pid  # noqa: SLF001 - as above
    return pid is not None and _stay(0.05, pid)


def _stay(seconds: float, pid: int | None = None) -> bool:
    """Whether there are any for so long: those of Python that have just ended are listed for a moment."""
    deadline, tasks = time.monotonic() + seconds, f"/proc/{pid or 'self'}/task"
    with contextlib.suppress(FileNotFoundError):
        while True:
            known = {pid} if pid else {thread.native_id for thread in threading.enumerate()}
            if not set(map(int, os.listdir(tasks))) - known:  # noqa: PTH208 - no paths are needed
                return False
            if time.monotonic() >= deadline:
                return True
            time.sleep(0.001)
    return False


def _fork_for_nothing() -> None:
    """By C's own function: Python's hooks, and the warnings of programs in them, are for forks that somebody uses."""
    import ctypes

    fork, parent = ctypes.PyDLL(None).fork, os.getpid()
    try:
        child = fork()
    finally:
        # A signal of the parent's may raise even here.
        if os.getpid() != parent:
            os._exit(0)
    # The program may wait for all of its children by itself.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
