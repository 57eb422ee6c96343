"""A line for each value, such as one for each API key; what is idle is forgotten."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakValueDictionary

from opero.core.forks import ForkSafeLock
from opero.core.keys import identity_of, is_value
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opero.core.limits.line import Line

_LOOKED_AT = 2
# Those that are their own keys, which no key of another class is equal to.
_PLAIN = (str, int)

T = TypeVar("T", bound="Line")


class PerValue(Generic[T]):
    """Makes one for each value, and keeps as many as are not idle, and not many more.

    Each new one looks at two others, so that no call pays for all of them. Who has one in hand has the one that others
    will find, idle or not.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._busy: OrderedDict[Any, T] = OrderedDict()
        self._in_hand: WeakValueDictionary[Any, T] = WeakValueDictionary()
        self._lock = ForkSafeLock(threading.RLock)

    def __iter__(self) -> Iterator[T]:
        with self._lock.lock:
            return iter(list(self._in_hand.values()))

    def of(self, value: Any) -> T:
        """The one of this value."""
        key = value if value.__class__ in _PLAIN else _key(value)
        found = self._busy.get(key)
        if found is not None:
            return found
        with self._lock.lock:
            found = self._in_hand.get(key)
            if found is None:
                found = self._in_hand[key] = self._make(value)
            self._busy[key] = found
            for _ in range(min(_LOOKED_AT, len(self._busy) - 1)):
                oldest, other = self._busy.popitem(last=False)
                if not other.is_idle():
                    self._busy[oldest] = other
            return found


def _key(value: Any) -> Any:
    if type(value).__hash__ is None and not is_value(value):
        msg = f"per got a {type(value).__qualname__}, which cannot tell one limit from another; pass text"
        raise MisuseError(msg)
    return identity_of(value)
