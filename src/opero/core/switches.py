"""What turns all decorated functions of a process to another way at once, and costs nothing while it does not.

A compiled wrapper has one body for each way; to switch is to give it another body. So the way that is taken needs no
test at each call.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

from opero.core.forks import ForkSafeLock

if TYPE_CHECKING:
    from typing import Literal

    Way = Literal["usual", "told", "bare"]


class Switched(Protocol):
    """Something that has a body for each way."""

    def go(self, way: Way) -> None:
        """Take this way from the next call on."""
        ...


class _Switches:
    """Which way calls take: ``"usual"``, ``"told"`` while somebody listens, ``"bare"`` while opero is disabled."""

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._switched: WeakSet[Switched] = WeakSet()
        self._listeners = 0
        self._disablers = 1 if _is_on(os.environ.get("OPERO_DISABLED", "")) else 0

    @property
    def way(self) -> Way:
        if self._disablers:
            return "bare"
        return "told" if self._listeners else "usual"

    @property
    def is_disabled(self) -> bool:
        return self._disablers > 0

    def register(self, switched: Switched) -> None:
        with self._lock.lock:
            self._switched.add(switched)
            if self.way != "usual":
                switched.go(self.way)

    def listening(self, *, begins: bool) -> None:
        """Somebody begins or ends to listen to all functions."""
        with self._lock.lock:
            self._listeners += 1 if begins else -1
            self._go()

    def disabling(self, *, begins: bool) -> None:
        """Somebody turns all decorators off, or on again."""
        with self._lock.lock:
            self._disablers += 1 if begins else -1
            self._go()

    def _go(self) -> None:
        for switched in list(self._switched):
            switched.go(self.way)


def _is_on(text: str) -> bool:
    return text.strip().lower() not in {"", "0", "false", "no", "off"}


switches = _Switches()
