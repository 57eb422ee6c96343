"""The cache: which key, which entry, and who computes it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from weakref import WeakSet, WeakValueDictionary

from opero.core.checks import (
    check_callable,
    check_choice,
    check_count,
    check_known,
    check_mapping,
    check_seconds,
    check_text,
)
from opero.core.clock import clock
from opero.core.flights import Flight, Flights, Seat
from opero.core.keys import KeyMaker
from opero.core.plan import CacheInfo, Final, Plan
from opero.core.resilient import OperoFunction, decorator
from opero.core.signature import MISSING, name_of
from opero.core.steps import Await, Failed, Flow, leading

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opero.core.plan import Call
    from opero.core.stats import CallStats, Stats

__all__ = ["clear_cache", "get_cache_decorator"]

P = ParamSpec("P")
R = TypeVar("R")

FOREVER = float("inf")
MEMORY_MAXSIZE = 10_000
MEMORY_POLICIES = {"lru": "LRUCache", "lfu": "LFUCache", "fifo": "FIFOCache"}


class MemoryStore:
    """Entries in this process: a cachebox cache behind opero's contract.

    The caches of cachebox expire by their own clocks or not at all; here every entry has its own end, so that functions
    with different ``cache_ttl`` can share a namespace.
    """

    def __init__(self, maxsize: int = MEMORY_MAXSIZE, policy: str = "lru") -> None:
        import cachebox

        self.maxsize = maxsize
        self.policy = policy
        self.flights = Flights()
        self._entries = getattr(cachebox, MEMORY_POLICIES[policy])(maxsize)
        self.look_up: Callable[[Any], tuple[Any, float] | None] = self._entries.get

    def get(self, key: Any) -> tuple[Any, float] | None:
        entry = self.look_up(key)
        # An expired entry is left to its successor: deleting it here could hit one that was stored just now.
        return entry if entry is None or entry[1] > clock.now() else None

    def put(self, key: Any, value: Any, ttl: float | None) -> None:
        self._entries[key] = (value, FOREVER if ttl is None else clock.now() + ttl)

    def delete(self, key: Any) -> bool:
        entry = self._entries.pop(key, None)
        return entry is not None and entry[1] > clock.now()

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


class CacheInMemory:
    """Key, entry, and who computes: one function's view of a store."""

    def __init__(self, store: MemoryStore, keys: KeyMaker, *, namespace: str, ttl: float | None) -> None:
        self.store = store
        self.keys = keys
        self.namespace = namespace
        self.ttl = ttl
        self.flights = store.flights
        with _lock:
            _policies.add(self)

    @property
    def look_up(self) -> Callable[[Any], tuple[Any, float] | None]:
        return self.store.look_up

    def info(self, stats: CallStats) -> CacheInfo:
        return CacheInfo(stats.hits, stats.calls - stats.hits, self.store.maxsize, len(self.store))

    @property
    def entries_may_expire(self) -> bool:
        return self.ttl is not None or self.store in _shared_stores.values()

    def through(self, call: Call, compute: Callable[[], Flow], stats: Stats) -> Flow:
        key = call.key = self.keys.key_of(*call.args, **call.kwargs) if call.key is MISSING else call.key
        while True:
            entry = self.store.get(key)
            if entry is not None:
                return self._hit(call, entry[0], stats)
            flight, is_leader = self.flights.board(key)
            if is_leader:
                return (yield from self._lead(flight, call, compute, stats))
            # To wait for a call that this one is part of, or that this thread has to go on for, would be for ever.
            if flight.badge in leading.get() or (call.blocks and flight.thread == threading.get_ident()):
                stats.flown.tick()
                return (yield from compute())
            yield Await(Seat(self.flights, flight))
            if not flight.abandoned:
                return self._joined(call, flight, stats)

    def delete(self, key: Any) -> bool:
        self.flights.invalidate(key)
        return self.store.delete(key)

    def clear(self) -> None:
        self.flights.invalidate()
        self.store.clear()

    def _hit(self, call: Call, value: Any, stats: Stats) -> Any:
        stats.hits.tick()
        call.cached = True
        return value

    def _joined(self, call: Call, flight: Flight, stats: Stats) -> Any:
        if flight.outcome.__class__ is not Failed:
            return self._hit(call, flight.outcome, stats)
        stats.flown.tick()
        return flight.outcome

    def _lead(self, flight: Flight, call: Call, compute: Callable[[], Flow], stats: Stats) -> Flow:
        try:
            # Another leader may have stored and landed between this call's look and its boarding.
            entry = self.store.get(flight.key)
            if entry is not None:
                self.flights.land(flight, entry[0])
                return self._hit(call, entry[0], stats)
            stats.flown.tick()
            call.flight = flight.badge
            outcome = yield from compute()
            if outcome.__class__ is Final:
                # A hook made this result up; it is the call's, but not the function's to be remembered.
                self.flights.land(flight, outcome.outcome)
                return outcome
            if outcome.__class__ is not Failed:
                self._store(flight, outcome)
            self.flights.land(flight, outcome)
            return outcome
        finally:
            self.flights.abandon(flight)

    def _store(self, flight: Flight, value: Any) -> None:
        with self.flights.lock:
            if not flight.stale:
                self.store.put(flight.key, value, self.ttl)


_lock = threading.Lock()
_policies: WeakSet[CacheInMemory] = WeakSet()
_shared_stores: WeakValueDictionary[str, MemoryStore] = WeakValueDictionary()


def memory_store(namespace: str | None, *, maxsize: int = MEMORY_MAXSIZE, policy: str = "lru") -> MemoryStore:
    """A store of its own, or with a ``namespace`` the one that all functions of that namespace share."""
    if namespace is None:
        return MemoryStore(maxsize, policy)
    with _lock:
        store = _shared_stores.get(namespace)
        if store is None:
            _shared_stores[namespace] = store = MemoryStore(maxsize, policy)
        elif (store.maxsize, store.policy) != (maxsize, policy):
            msg = (
                f"cache_namespace={namespace!r} is in use with maxsize={store.maxsize} and policy={store.policy!r}, "
                f"but now got maxsize={maxsize} and policy={policy!r}; give both functions the same cache_options"
            )
            raise ValueError(msg)
        return store


_BACKENDS = ("memory",)
_MEMORY_OPTIONS = ("maxsize", "policy")


def cache_policy(
    function: Callable[..., Any],
    *,
    ttl: float | None = None,
    backend: str = "memory",
    key: Callable[..., Any] | None = None,
    namespace: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> CacheInMemory:
    """Check the cache's options and make the policy for ``function``."""
    check_choice("cache_backend", backend, _BACKENDS)
    if ttl is not None:
        check_seconds("cache_ttl", ttl, zero=False)
    if key is not None:
        check_callable("cache_key", key, "a function of the same arguments that returns the key")
    if namespace is not None:
        check_text("cache_namespace", namespace, "a name for where the entries live")
    given = check_mapping("cache_options", options)
    check_known("cache_options", given, _MEMORY_OPTIONS)
    maxsize = check_count("cache_options['maxsize']", given.get("maxsize", MEMORY_MAXSIZE), "entries", smallest=1)
    policy = check_choice("cache_options['policy']", given.get("policy", "lru"), MEMORY_POLICIES)
    identity = f"{getattr(function, '__module__', None)}.{name_of(function)}"
    return CacheInMemory(
        memory_store(namespace, maxsize=maxsize, policy=policy),
        KeyMaker(function, key),
        namespace=identity if namespace is None else namespace,
        ttl=ttl,
    )


def get_cache_decorator(
    *,
    cache_ttl: float | None = None,
    cache_backend: str = "memory",
    cache_key: Callable[..., Any] | None = None,
    cache_namespace: str | None = None,
    **options: Any,
) -> Callable[[Callable[P, R]], OperoFunction[P, R]]:
    """Make a decorator that caches, and does nothing else.

    Args:
        cache_ttl: Seconds an entry lives; None keeps it for ever.
        cache_backend: ``"memory"``.
        cache_key: Function of the same arguments that returns the key to use in their place.
        cache_namespace: Functions with one namespace share entries. Default: each function has its own.
        **options: As ``cache_options`` of `opero.opero`: ``maxsize`` (entries, 10 000 by default), ``policy``
            (``"lru"``, ``"lfu"`` or ``"fifo"``).

    Raises:
        TypeError: If an option has the wrong type or is not known.
        ValueError: If an option's value is out of range.
    """

    def plan(function: Callable[..., Any]) -> Plan:
        cache = cache_policy(
            function,
            ttl=cache_ttl,
            backend=cache_backend,
            key=cache_key,
            namespace=cache_namespace,
            options=options,
        )
        return Plan(function, cache=cache)

    recipe = {
        "cache_ttl": cache_ttl,
        "cache_backend": cache_backend,
        "cache_key": cache_key,
        "cache_namespace": cache_namespace,
        **options,
    }
    return decorator("get_cache_decorator", plan, (get_cache_decorator, recipe))


def clear_cache(namespace: str | None = None) -> None:
    """Empty the caches of all decorated functions of this process, or those of one namespace.

    Args:
        namespace: A ``cache_namespace``, or the identity that a function without one has
            (``"module.qualified_name"``). Default: every namespace.
    """
    with _lock:
        chosen = [policy for policy in _policies if namespace is None or policy.namespace == namespace]
    for policy in chosen:
        policy.clear()
