"""Threads that Python does not know (of OpenMP, rayon), which may hold a lock when this process forks."""

from __future__ import annotations

import contextlib
import os
import threading
import time


def has_native_threads() -> bool:
    """Whether there are any but those of OpenBLAS; where the system does not list threads there seem to be none.

    OpenBLAS, which NumPy brings, ends its threads before each fork by itself and makes them anew when it needs them.
    So a fork for nothing shows whether others are left.
    """
    if not _stay(0.005):
        return False
    _fork_for_nothing()
    return _stay(0.05)


def _stay(seconds: float) -> bool:
    """Whether there are any for so long: those of Python that have just ended are listed for a moment."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(FileNotFoundError):
        while set(map(int, os.listdir("/proc/self/task"))) - {thread.native_id for thread in threading.enumerate()}:  # noqa: PTH208 - no paths are needed
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
