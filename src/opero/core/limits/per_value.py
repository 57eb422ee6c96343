"""A limit for each value of something, such as an API key; those that are idle are forgotten."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from opero.core.forks import ForkSafeLock, watch_forks
from opero.core.keys import identity_of, is_value
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opero.core.limits.contract import Limit
    from opero.core.limits.rates import Rates

_FEWEST_TIDIED = 64


class _Entry:
    """A limit, and how many callers are on their way to it."""

    __slots__ = ("callers", "limit")

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.callers = 0


class LimitsPerValue:
    """Makes and forgets limits; as many are kept as are not idle, and not many more."""

    def __init__(self, make: Callable[[Rates, Any], Limit], rates: Rates) -> None:
        self._make = make
        self._rates = rates
        self._entries: dict[Any, _Entry] = {}
        self._tidy_at = _FEWEST_TIDIED
        self._lock = ForkSafeLock()
        watch_forks(self)

    def after_fork(self) -> None:
        """Forget the parent's callers."""
        for entry in self._entries.values():
            entry.callers = 0

    def __len__(self) -> int:
        return len(self._entries)

    def take_now(self, value: Any) -> bool:
        """Take a slot of this value's limit if one is free and nobody waits; only where asking does not block."""
        with self._lock.lock:
            take_now = self._entry(value).limit.take_now
            return take_now is not None and take_now()

    @contextlib.contextmanager
    def using(self, value: Any) -> Iterator[Limit]:
        """This value's limit, which is not forgotten meanwhile."""
        with self._lock.lock:
            entry = self._entry(value)
            entry.callers += 1
        try:
            yield entry.limit
        finally:
            with self._lock.lock:
                entry.callers -= 1

    def change(self, rates: Rates) -> None:
        """Go on at other rates, for all values."""
        with self._lock.lock:
            self._rates = rates
            for entry in self._entries.values():
                entry.limit.change(rates)

    def _entry(self, value: Any) -> _Entry:
        key = _key(value)
        found = self._entries.get(key)
        if found is None:
            if len(self._entries) >= self._tidy_at:
                self._tidy()
            self._entries[key] = found = _Entry(self._make(self._rates, value))
        return found

    def _tidy(self) -> None:
        self._entries = {k: entry for k, entry in self._entries.items() if entry.callers or not entry.limit.is_idle()}
        self._tidy_at = max(_FEWEST_TIDIED, 2 * len(self._entries))


def _key(value: Any) -> Any:
    if type(value).__hash__ is None and not is_value(value):
        msg = f"rate_limit_per got a {type(value).__qualname__}, which cannot tell one limit from another; pass text"
        raise MisuseError(msg)
    return identity_of(value)
