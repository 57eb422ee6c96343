"""Locks and half-done work that a forked child must not inherit."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class ForkSensitive(Protocol):
    def after_fork(self) -> None:
        """Make new locks and forget what only the parent's threads could finish."""


_watched: WeakSet[ForkSensitive] = WeakSet()


def watch_forks(thing: ForkSensitive) -> None:
    """Call ``thing.after_fork()`` in every child that this process forks from now on."""
    _watched.add(thing)


def _in_child() -> None:
    for thing in list(_watched):
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
