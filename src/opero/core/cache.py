"""The cache: which key, which entry, and who computes it."""

from __future__ import annotations

import contextlib
import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from opero.core.checks import check_callable
from opero.core.decoration import F, decorator
from opero.core.flights import Flight, Seat
from opero.core.keys import KeyMaker
from opero.core.plan import CacheInfo, Final, Plan
from opero.core.signature import MISSING, is_async, name_of, refuse_generator, refuse_unfinished
from opero.core.steps import Await, Consult, Failed, Flow, Pause, leading
from opero.core.stores.contract import BUSY, CLAIMED, Claim, Fault, Found, Keep, Lease, Release, managing
from opero.core.stores.memory import is_shared
from opero.core.stores.settings import cache_settings
from opero.exceptions import MisuseError, OperoError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from opero.core.checks import Duration
    from opero.core.plan import Call
    from opero.core.stats import CallStats, Stats
    from opero.core.stores.contract import Request, Store
    from opero.core.stores.engines import CacheEngine
    from opero.core.stores.settings import CacheSettings

__all__ = ["clear_cache", "get_cache_context", "get_cache_decorator"]


# How often to look whether another process has finished.
_FIRST_LOOK, _LAST_LOOK = 0.002, 0.1


class Cache:
    """Key, entry, and who computes: one function's view of a store."""

    def __init__(self, function: Callable[..., Any], keys: KeyMaker, settings: CacheSettings) -> None:
        self.keys = keys
        self.ttl = settings.ttl
        self._function = function
        self._settings = settings
        with _lock:
            _caches.add(self)

    @cached_property
    def store(self) -> Store:
        """Where the entries live; of what outlives the process, opened at the first call."""
        in_memory = self._settings.backend == "memory"
        return self._settings.store(self._settings.namespace if in_memory else self.namespace)

    @cached_property
    def namespace(self) -> str:
        """The name under which the entries live."""
        if self._settings.namespace is not None:
            return self._settings.namespace
        if self._settings.backend == "memory":
            return f"{getattr(self._function, '__module__', None)}.{name_of(self._function)}"
        from opero.core.digests import lasting_identity

        return lasting_identity(self._function)

    @property
    def look_up(self) -> Callable[[Any], tuple[Any, float] | None] | None:
        if self._settings.backend == "memory":
            return self.store.look_up
        if not is_async(self._function):
            return self._look_up
        return self._look_up_if_open if self._settings.reads_at_once else None

    def _look_up(self, key: Any) -> tuple[Any, float] | None:
        # Not the store's own: it is made at the first call.
        try:
            return self.store.look_up(key)
        except MisuseError:
            # It has no name to keep anything under; `through` meets the same, and counts a call that failed.
            return None

    def _look_up_if_open(self, key: Any) -> tuple[Any, float] | None:
        # An event loop is not to wait for the opening; `through` asks in a thread.
        store: Any = self.__dict__.get("store")
        return store.look_up(key) if store is not None and store.is_open else None

    @property
    def entries_may_expire(self) -> bool:
        # The other stores hand out no entry that has expired.
        return self._settings.backend == "memory" and (self.ttl is not None or is_shared(self.store))

    def info(self, stats: CallStats) -> CacheInfo:
        return CacheInfo(stats.hits, stats.calls - stats.hits, self._settings.maxsize, self._count())

    def through(self, call: Call, compute: Callable[[], Flow], stats: Stats) -> Flow:
        key = call.key = self._key_of(call)
        if key.__class__ is Failed:
            stats.flown.tick()
            return key
        flights = self.store.flights
        own = Flight(key, call.presence)
        try:
            while True:
                flight = flights.board(own)
                if flight is own:
                    return (yield from self._lead(flight, call, compute, stats))
                if _would_wait_for_ever(call, flight):
                    stats.flown.tick()
                    return (yield from compute())
                yield Await(Seat(flight))
                if not flight.abandoned:
                    return self._joined(call, flight, stats)
        finally:
            # Ctrl-C may come between any two steps: nobody is to wait for what will not land.
            flights.abandon(own)

    def _key_of(self, call: Call) -> Any:
        """The key, or why nothing can be kept under any."""
        try:
            _ = self.store
            return self.keys.key_of(*call.args, **call.kwargs) if call.key is MISSING else call.key
        except Exception as error:  # noqa: BLE001 - the call's own: arguments that cannot be a key, a user's function
            return Failed(error)

    def delete(self, key: Any) -> bool:
        self.store.flights.invalidate(key)
        with managing(self.store, "delete from"):
            return self.store.delete(key)

    def clear(self) -> None:
        self.store.flights.invalidate()
        with managing(self.store, "clear"):
            self.store.clear()

    def _hit(self, call: Call, value: Any, stats: Stats) -> Any:
        stats.hits.tick()
        call.cached = True
        if call.tell is not None:
            call.tell("CacheHit")
        return value

    def _joined(self, call: Call, flight: Flight, stats: Stats) -> Any:
        if flight.outcome.__class__ is not Failed:
            return self._hit(call, flight.outcome, stats)
        stats.flown.tick()
        return flight.outcome

    def _lead(self, flight: Flight, call: Call, compute: Callable[[], Flow], stats: Stats) -> Flow:
        flights, lease = self.store.flights, Lease(flight.key)
        try:
            # Another leader, here or elsewhere, may have stored between this call's look and its boarding.
            try:
                claim = yield from self._claim(lease)
            except Exception:
                stats.flown.tick()
                raise
            if claim.__class__ is Found:
                flights.land(flight, claim.value)
                return self._hit(call, claim.value, stats)
            self._note_fault(claim, stats)
            stats.flown.tick()
            call.flight = flight.badge
            outcome = yield from compute()
            if outcome.__class__ is not Failed:
                outcome = self._finished(outcome)
            if outcome.__class__ is Final:
                # A hook made this result up; it is the call's, but not the function's to be remembered.
                flights.land(flight, outcome.outcome)
                return outcome
            if outcome.__class__ is not Failed and (claim is CLAIMED or lease.held):
                self._note_fault((yield from self._ask(Keep(lease, outcome, self.ttl, flight))), stats)
            elif lease.held:
                self._note_fault((yield from self._ask(Release(lease))), stats)
            flights.land(flight, outcome)
            return outcome
        finally:
            self.store.let_go(lease)

    def _finished(self, outcome: Any) -> Any:
        """The result, or why it cannot be kept: it has not happened yet, or can be used only once."""
        try:
            refuse_unfinished(self._function, outcome, is_cached=True)
        except MisuseError as error:
            return Failed(error)
        return outcome

    def _claim(self, lease: Lease) -> Generator[Any, Any, Any]:
        look = _FIRST_LOOK
        while True:
            answer = yield from self._ask(Claim(lease))
            if answer is not BUSY or lease.key in self.store.flights.inherited:
                return answer
            yield Pause(look, is_real=True)
            look = min(_LAST_LOOK, look * 2)

    def _ask(self, request: Request) -> Generator[Any, Any, Any]:
        if self.store.is_instant:
            return self.store.perform([request])[0]
        return (yield Consult(self.store, request))

    def _note_fault(self, answer: Any, stats: Stats) -> None:
        if answer.__class__ is Fault:
            stats.cache_errors.tick()
            self.store.complain(answer.error)

    def _count(self) -> int:
        with managing(self.store, "count the entries of"):
            return len(self.store)


def _would_wait_for_ever(call: Call, flight: Flight) -> bool:
    """Whether it is part of that call, or its thread has to go on for that, or a stream that nobody pulls leads it."""
    if flight.badge in leading.get() or (call.blocks and flight.thread == threading.get_ident()):
        return True
    return flight.presence is not None and flight.presence.is_away


# A lock that a thread can have more than once: a finalizer, which may come at any moment, can clear caches.
_lock = threading.RLock()
_caches: WeakSet[Cache] = WeakSet()


def cache_policy(
    function: Callable[..., Any],
    *,
    ttl: Duration | None = None,
    backend: str = "memory",
    key: Callable[..., Any] | None = None,
    namespace: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Cache:
    """Check the cache's options and make the policy for ``function``."""
    refuse_generator(function, "cache")
    settings = cache_settings(ttl=ttl, backend=backend, namespace=namespace, options=options)
    if key is not None:
        check_callable("cache_key", key, "a function of the same arguments that returns the key")
    cache = Cache(function, KeyMaker(function, key, digest=backend != "memory"), settings)
    if backend == "memory":
        _ = cache.store  # a namespace that others use with other options is refused when decorating
    return cache


def get_cache_decorator(
    *,
    cache_ttl: Duration | None = None,
    cache_backend: str = "memory",
    cache_key: Callable[..., Any] | None = None,
    cache_namespace: str | None = None,
    **options: Any,
) -> Callable[[F], F]:
    """Make a decorator that caches, and does nothing else.

    Args:
        cache_ttl: Seconds an entry lives, or a `datetime.timedelta`; None keeps it for ever.
        cache_backend: ``"memory"``, ``"disk"`` or ``"redis"``.
        cache_key: Function of the same arguments that returns the key to use in their place.
        cache_namespace: Functions with one namespace share entries. Default: each function has its own.
        **options: As ``cache_options`` of `opero.opero`, such as ``maxsize`` or ``cache_dir``.

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


@contextlib.contextmanager
def get_cache_context(
    cache_namespace: str, *, cache_backend: str = "memory", cache_ttl: Duration | None = None, **options: Any
) -> Iterator[CacheEngine]:
    """Give the cache engine of a namespace for a ``with`` block, and close its files and connections at the end.

    Functions that are decorated with the same namespace, backend and options share its entries by ``engine.cache``;
    ``engine.get`` and ``engine.set`` have keys of their own. In memory, entries go when nothing uses the namespace.

    Args:
        cache_namespace: Where the entries live.
        cache_backend: ``"memory"``, ``"disk"`` or ``"redis"``.
        cache_ttl: Seconds an entry lives, or a `datetime.timedelta`; None keeps it for ever.
        **options: As ``cache_options`` of `opero.opero`.

    Yields:
        A `twat_cache.engines.base.BaseCacheEngine` with ``get(key, default=None)``, ``set(key, value)``,
        ``delete(key)``, ``clear()``, ``cache(function)``, ``stats`` and ``name``.

    Raises:
        TypeError: If an option has the wrong type, or a key cannot be one.
        ValueError: If an option's value is out of range.
        OperoError: By the engine, if the backend failed.
    """
    from opero.core.stores.engines import make_engine

    settings = cache_settings(ttl=cache_ttl, backend=cache_backend, namespace=cache_namespace, options=options)
    decorate = get_cache_decorator(
        cache_ttl=cache_ttl, cache_backend=cache_backend, cache_namespace=cache_namespace, **options
    )
    engine = make_engine(settings, settings.store(cache_namespace), decorate)
    try:
        yield engine
    finally:
        engine.cleanup()


def clear_cache(namespace: str | None = None) -> None:
    """Empty the caches of all decorated functions of this process, or those of one namespace.

    Args:
        namespace: A ``cache_namespace``, or the identity that a function without one has
            (``"module.qualified_name"``). Default: every namespace.

    Raises:
        OperoError: If a backend failed; the caches of the others are empty all the same.
    """
    with _lock:
        caches = list(_caches)
    errors = []
    for cache in caches:
        try:
            if namespace in {None, cache.namespace}:
                cache.clear()
        except MisuseError:
            # It has no name to keep anything under, and so has kept nothing.
            continue
        except OperoError as error:
            errors.append(error)
    if errors:
        raise errors[0]
