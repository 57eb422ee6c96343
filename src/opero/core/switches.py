"""What turns all decorated functions of a process to another way at once: somebody listens, or opero is disabled."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from opero.core.forks import ForkSafeLock

if TYPE_CHECKING:
    from opero.core.listeners import Listener


class Switches:
    """Looked at by every call.

    Attributes:
        are_on: Whether any of the others is.
        listeners: Who is told of the calls of all functions.
        is_disabled: Whether the bare functions are called.
    """

    __slots__ = ("_disablers", "_lock", "are_on", "is_disabled", "listeners")

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._disablers = 1 if _is_on(os.environ.get("OPERO_DISABLED", "")) else 0
        self.listeners: tuple[Listener, ...] = ()
        self._set()

    def listening(self, listener: Listener, *, begins: bool) -> None:
        """Somebody begins or ends to listen to all functions."""
        with self._lock.lock:
            others = tuple(other for other in self.listeners if other is not listener)
            self.listeners = (*others, listener) if begins else others
            self._set()

    def disabling(self, *, begins: bool) -> None:
        """Somebody turns all decorators off, or on again."""
        with self._lock.lock:
            self._disablers += 1 if begins else -1
            self._set()

    def _set(self) -> None:
        self.is_disabled = self._disablers > 0
        self.are_on = self.is_disabled or bool(self.listeners)


def _is_on(text: str) -> bool:
    return text.strip().lower() not in {"", "0", "false", "no", "off"}


switches = Switches()
