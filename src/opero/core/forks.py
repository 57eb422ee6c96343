"""Locks and half-done work that a forked child must not inherit."""

from __future__ import annotations

import os
import threading
from typing import Any
from weakref import WeakSet

_watched: WeakSet[Any] = WeakSet()
_holding: WeakSet[Any] = WeakSet()
# Those that wait for the fork that is being made.
_held: list[Any] = []
_forking = threading.RLock()
# Those that hold no lock which a forked child could miss.
fork_safe_threads: WeakSet[threading.Thread] = WeakSet()


def watch_forks(thing: Any) -> None:
    """Call ``thing.after_fork()`` in every child that this process forks from now on.

    It makes new locks, and forgets what only the parent's threads could finish.
    """
    _watched.add(thing)


def hold_forks(thing: Any) -> None:
    """Let this process fork only between the uses of ``thing``, of which the first comes after this.

    ``thing.before_fork()`` waits until no thread is in it and lets none in, until ``thing.after_fork_in_parent()`` or,
    in the child, ``thing.after_fork()``.
    """
    with _forking:
        _holding.add(thing)
    watch_forks(thing)


class ForkSafeLock:
    """A lock that is free in a forked child, whoever held it in the parent; to be used by its ``lock``.

    It has no ``with`` of its own: an interrupt between Python's `__enter__` and the block would leave it locked. A
    thread has it once, or with `threading.RLock` again: in a finalizer that the garbage collector runs in its block.
    """

    __slots__ = ("__weakref__", "_make", "lock")

    def __init__(self, make: Any = threading.Lock) -> None:
        self._make = make
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        self.lock = self._make()


def _before() -> None:
    _forking.acquire()
    _held.extend(_holding)
    for thing in _held:
        thing.before_fork()


def _in_parent() -> None:
    for thing in _held:
        thing.after_fork_in_parent()
    _held.clear()
    _forking.release()


def _in_child() -> None:
    global _forking  # noqa: PLW0603 - held by a thread that is not here
    _forking = threading.RLock()
    for thing in list(_watched):
        thing.after_fork()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
