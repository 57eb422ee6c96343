"""Locks and half-done work that a forked child must not inherit."""

from __future__ import annotations

import os
import threading
from typing import Protocol
from weakref import WeakSet


class ForkSensitive(Protocol):
    """Something with a state that belongs to the threads of one process."""

    def after_fork(self) -> None:
        """Make new locks and forget what only the parent's threads could finish."""
        ...


_watched: WeakSet[ForkSensitive] = WeakSet()


def watch_forks(thing: ForkSensitive) -> None:
    """Call ``thing.after_fork()`` in every child that this process forks from now on."""
    _watched.add(thing)


# Threads of opero's own whose locks a child makes anew.
_fork_safe: WeakSet[threading.Thread] = WeakSet()


def allow_forks(thread: threading.Thread) -> None:
    """Promise that ``thread`` holds no lock that a forked child could miss."""
    _fork_safe.add(thread)


def foreign_threads() -> set[threading.Thread]:
    """The other threads, which may hold a lock when this one forks."""
    return set(threading.enumerate()) - set(_fork_safe) - {threading.current_thread()}


class ForkSafeLock:
    """A lock that is free in a forked child, whoever held it in the parent."""

    __slots__ = ("__weakref__", "_lock")

    def __init__(self) -> None:
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_exc: object) -> None:
        self._lock.release()


def _in_child() -> None:
    for thing in list(_watched):
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
