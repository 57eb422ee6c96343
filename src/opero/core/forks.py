"""Locks and half-done work that a forked child must not inherit."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Any
from weakref import WeakSet, finalize

_watched: WeakSet[Any] = WeakSet()
# Those that hold no lock which a forked child could miss.
fork_safe_threads: WeakSet[threading.Thread] = WeakSet()


def watch_forks(thing: Any) -> None:
    """Call ``thing.after_fork()`` in every child that this process forks from now on.

    It makes new locks, and forgets what only the parent's threads could finish.
    """
    _watched.add(thing)


class ForkSafeLock:
    """A lock that is free in a forked child, whoever held it in the parent; to be used by its ``lock``.

    It has no ``with`` of its own: an interrupt between Python's `__enter__` and the block would leave it locked. A
    thread can have it more than once: in a signal handler, or a finalizer that the garbage collector runs in its block.
    """

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        self.lock = threading.RLock()


def forget_exit_handlers() -> None:
    """Let a forked worker have exit handlers of its own, but none of the process that it was forked from."""
    if sys.version_info < (3, 13):
        # Newer ones do so already, and use exit handlers of their own.
        atexit._clear()  # noqa: SLF001 - see above
    its: Any = finalize
    for finalizer in its._registry:  # noqa: SLF001 - as above
        finalizer.atexit = False
    its._registered_with_atexit = False  # noqa: SLF001 - as above


def _in_child() -> None:
    for thing in list(_watched):
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
