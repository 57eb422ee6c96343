"""Locks and half-done work that a forked child must not inherit."""

from __future__ import annotations

import os
import threading
from typing import Any
from weakref import WeakSet

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


def _in_child() -> None:
    for thing in list(_watched):
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
