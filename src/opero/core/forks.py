"""Locks and half-done work that a forked child must not inherit."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


class ForkSensitive(Protocol):
    """Something with a state that belongs to the threads of one process."""

    def after_fork(self) -> None:
        """Make new locks and forget what only the parent's threads could finish."""
        ...


class ForkHolder(ForkSensitive, Protocol):
    """Something that must not be in the middle of its work when another thread forks."""

    def before_fork(self) -> None:
        """Wait until no thread is in it, and let none in."""
        ...

    def after_fork_in_parent(self) -> None:
        """Go on."""
        ...


_watched: WeakSet[ForkSensitive] = WeakSet()
_holding: WeakSet[ForkHolder] = WeakSet()
# Those that were asked to wait for the fork that is being made, and the right to make one.
_held: list[ForkHolder] = []
# One that a thread can have more than once: the collector may call a finalizer that wants it in the midst of a fork.
_forking = threading.RLock()
_postponed: deque[Callable[[], None]] = deque()
# What only the parent may do: kept, because to free it would do it.
_of_parents: list[Any] = []


def watch_forks(thing: ForkSensitive) -> None:
    """Call ``thing.after_fork()`` in every child that this process forks from now on."""
    _watched.add(thing)


def hold_forks(thing: ForkHolder) -> None:
    """Let this process fork only between the uses of ``thing``, of which the first comes after this."""
    with _forking:
        _holding.add(thing)
    watch_forks(thing)


def between_forks(act: Callable[[], None]) -> None:
    """Call ``act`` now or, if another thread is forking, right after that; not in a forked child.

    For what a finalizer does: it may run while its thread has a lock that whoever forks waits for.
    """
    _postponed.append(act)
    _act_between_forks()


def _act_between_forks() -> None:
    while _postponed and _forking.acquire(blocking=False):
        try:
            while _postponed:
                _postponed.popleft()()
        finally:
            _forking.release()


def right_to_fork() -> AbstractContextManager[Any]:
    """A lock that keeps others from forking, for a few steps that take no other lock: whoever forks has many."""
    return _forking


# Threads of opero's own whose locks a child makes anew.
_fork_safe: WeakSet[threading.Thread] = WeakSet()


def allow_forks(thread: threading.Thread) -> None:
    """Promise that ``thread`` holds no lock that a forked child could miss."""
    _fork_safe.add(thread)


def foreign_threads() -> set[threading.Thread]:
    """The other threads, which may hold a lock when this one forks."""
    return set(threading.enumerate()) - set(_fork_safe) - {threading.current_thread()}


def has_native_threads() -> bool:
    """Whether threads run that Python does not know (of OpenMP, rayon), which may hold a lock when this one forks.

    OpenBLAS, which NumPy brings, ends its threads before each fork by itself and makes them anew when it needs them.
    So a fork for nothing shows whether others are left. Where the system does not list threads there seem to be none.
    """
    if _native_threads_go_within(0.005):
        return False
    _fork_for_nothing()
    return not _native_threads_go_within(0.05)


def _native_threads_go_within(seconds: float) -> bool:
    """Those of Python that have just ended are listed for a moment."""
    deadline = time.monotonic() + seconds
    while _native_threads():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.001)
    return True


def _native_threads() -> set[int]:
    try:
        running = {int(thread) for thread in os.listdir("/proc/self/task")}  # noqa: PTH208 - no paths are needed
    except FileNotFoundError:
        return set()
    return running - {thread.native_id for thread in threading.enumerate()}


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


class ForkSafeLock:
    """A lock that is free in a forked child, whoever held it in the parent; to be used by its ``lock``.

    It has no ``with`` of its own: an interrupt between Python's `__enter__` and the block would leave it locked.
    """

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        self.lock = threading.Lock()


def _members(things: WeakSet[Any]) -> list[Any]:
    while True:
        try:
            return list(things)
        except RuntimeError:
            # Another thread has freed one meanwhile.
            continue


def _before() -> None:
    _forking.acquire()
    _held[:] = _members(_holding)
    for thing in _held:
        thing.before_fork()


def _in_parent() -> None:
    for thing in _held:
        thing.after_fork_in_parent()
    _held.clear()
    _forking.release()
    _act_between_forks()


def _in_child() -> None:
    global _forking  # noqa: PLW0603 - held by a thread that is not here
    _forking = threading.RLock()
    _of_parents.extend(_postponed)
    _postponed.clear()
    for thing in _members(_watched):
        thing.after_fork()
    # Only now: what nobody else has is freed by that, and may want its locks, which were held during the fork.
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
