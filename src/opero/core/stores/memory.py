"""Entries in this process: a cachebox cache."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

from opero.core.clock import clock
from opero.core.flights import Flights
from opero.core.stores.contract import CLAIMED, DONE, FOREVER, Claim, Found, Keep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opero.core.stores.contract import Lease, Request

MEMORY_MAXSIZE = 10_000
MEMORY_POLICIES = {"lru": "LRUCache", "lfu": "LFUCache", "fifo": "FIFOCache"}


class MemoryStore:
    """Entries in this process.

    The caches of cachebox expire by their own clocks or not at all; here every entry has its own end, so that functions
    with different ``cache_ttl`` can share a namespace.
    """

    is_instant: ClassVar[bool] = True

    def __init__(self, maxsize: int = MEMORY_MAXSIZE, policy: str = "lru") -> None:
        import cachebox

        self.maxsize: int | None = maxsize
        self.policy = policy
        self.flights = Flights()
        self._entries = getattr(cachebox, MEMORY_POLICIES[policy])(maxsize)
        self.look_up: Callable[[Any], tuple[Any, float] | None] = self._entries.get

    def perform(self, requests: Sequence[Request]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def let_go(self, lease: Lease) -> None:
        """Nobody outside this process waits for it."""

    def delete(self, key: Any) -> bool:
        entry = self._entries.pop(key, None)
        return entry is not None and entry[1] > clock.now()

    def clear(self) -> None:
        self._entries.clear()

    def __repr__(self) -> str:
        return "the memory cache"

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        """There is nothing to give back."""

    def complain(self, error: Exception) -> None:
        """Memory does not fail."""

    def _answer(self, request: Request) -> Any:
        key = request.lease.key
        if isinstance(request, Claim):
            entry = self.look_up(key)
            # An expired entry is left to its successor: deleting it here could hit one that was stored just now.
            return CLAIMED if entry is None or entry[1] <= clock.now() else Found(entry[0])
        if isinstance(request, Keep):
            with self.flights.lock:
                if not request.is_stale:
                    end = FOREVER if request.ttl is None else clock.now() + request.ttl
                    self._entries[key] = (request.value, end)
        return DONE


_lock = threading.Lock()
_shared: WeakValueDictionary[str, MemoryStore] = WeakValueDictionary()


def memory_store(namespace: str | None, *, maxsize: int = MEMORY_MAXSIZE, policy: str = "lru") -> MemoryStore:
    """A store of its own, or with a ``namespace`` the one that all functions of that namespace share."""
    if namespace is None:
        return MemoryStore(maxsize, policy)
    with _lock:
        store = _shared.get(namespace)
        if store is None:
            _shared[namespace] = store = MemoryStore(maxsize, policy)
        elif (store.maxsize, store.policy) != (maxsize, policy):
            msg = (
                f"cache_namespace={namespace!r} is in use with maxsize={store.maxsize} and policy={store.policy!r}, "
                f"but now got maxsize={maxsize} and policy={policy!r}; give both functions the same cache_options"
            )
            raise ValueError(msg)
        return store


def is_shared(store: Any) -> bool:
    """Whether functions with other lifetimes may put entries there."""
    return any(store is shared for shared in _shared.values())
