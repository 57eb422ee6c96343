"""A line for each value, such as one for each API key; what is idle is forgotten."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from opero.core.forks import ForkSafeLock
from opero.core.keys import identity_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opero.core.limits.line import Line

_LOOKED_AT = 2
# Those that are their own keys, which no key of another class is equal to.
_PLAIN = (str, int)

T = TypeVar("T", bound="Line")


class PerValue(Generic[T]):
    """Makes one for each value, and keeps as many as are not idle, and not many more.

    Each new one looks at two others, so that no call pays for all of them.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._lines: OrderedDict[Any, T] = OrderedDict()
        self._lock = ForkSafeLock(threading.RLock)

    def __iter__(self) -> Iterator[T]:
        with self._lock.lock:
            return iter(list(self._lines.values()))

    def of(self, value: Any) -> T:
        """The one of this value."""
        key = value if value.__class__ in _PLAIN else identity_of(value)
        found = self._lines.get(key)
        if found is not None:
            return found
        with self._lock.lock:
            found = self._lines.get(key)
            if found is None:
                for _ in range(min(_LOOKED_AT, len(self._lines))):
                    oldest, other = self._lines.popitem(last=False)
                    if not other.is_idle():
                        self._lines[oldest] = other
                found = self._lines[key] = self._make(value)
            return found
