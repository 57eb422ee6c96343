"""What turns all decorated functions of a process to another way at once, and costs nothing while it does not.

A compiled wrapper has one body for each way; to switch is to give it another body. So the way that is taken needs no
test at each call.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

from opero.core.forks import ForkSafeLock, watch_forks

if TYPE_CHECKING:
    from typing import Literal

    from opero.core.listeners import Listener

    Way = Literal["usual", "told", "bare"]


class Switched(Protocol):
    """Something that has a body for each way."""

    def go(self, way: Way) -> None:
        """Take this way from the next call on."""
        ...


class _Switches:
    """Which way calls take: ``"usual"``, ``"told"`` while somebody listens, ``"bare"`` while opero is disabled.

    Attributes:
        listeners: Who is told of the calls of all functions.
    """

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._switched: WeakSet[Switched] = WeakSet()
        self.listeners: tuple[Listener, ...] = ()
        self._disablers = 1 if _is_on(os.environ.get("OPERO_DISABLED", "")) else 0
        self._is_switching = False
        watch_forks(self)

    def after_fork(self) -> None:
        """Finish what another thread of the parent was at; its place in the set would be kept for it for ever."""
        if self._is_switching:
            self._switched = WeakSet(list(self._switched))
            self._go()

    @property
    def way(self) -> Way:
        if self._disablers:
            return "bare"
        return "told" if self.listeners else "usual"

    @property
    def is_disabled(self) -> bool:
        return self._disablers > 0

    def register(self, switched: Switched) -> None:
        with self._lock.lock:
            self._switched.add(switched)
            if self.way != "usual":
                switched.go(self.way)

    def listening(self, listener: Listener, *, begins: bool) -> None:
        """Somebody begins or ends to listen to all functions."""
        with self._lock.lock:
            others = tuple(other for other in self.listeners if other is not listener)
            self.listeners = (*others, listener) if begins else others
            self._go()

    def disabling(self, *, begins: bool) -> None:
        """Somebody turns all decorators off, or on again."""
        with self._lock.lock:
            self._disablers += 1 if begins else -1
            self._go()

    def _go(self) -> None:
        self._is_switching = True
        for switched in list(self._switched):
            switched.go(self.way)
        self._is_switching = False


def _is_on(text: str) -> bool:
    return text.strip().lower() not in {"", "0", "false", "no", "off"}


switches = _Switches()
