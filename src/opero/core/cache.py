"""The cache: which key, which entry, and who computes it."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

from opero.core.clock import clock
from opero.core.decoration import F, decorator
from opero.core.digests import lasting_identity
from opero.core.faults import managing
from opero.core.keys import KeyMaker
from opero.core.plan import Plan
from opero.core.retry import RetryPolicy
from opero.core.signature import MISSING, is_async, name_of, refuse_generator, refuse_unfinished
from opero.core.stats import CallStats, Stats
from opero.core.steps import Consult, Failed, Flow, Pause, leaders, part_of
from opero.core.stores.flights import BUSY, CLAIMED, FOUND, Flight, Keep, Seat
from opero.core.stores.settings import Cache, check_lifetime, flat_cache, store_class, store_of
from opero.events import CacheHit
from opero.exceptions import AllFailedError, CallTimeoutError, MisuseError, OperoError, RejectedResultError
from opero.utils.notes import copied

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from opero.core.checks import Duration
    from opero.core.plan import Call
    from opero.core.stores.settings import Backend
    from opero.core.stores.twat import CacheEngine

__all__ = ["Cache", "clear_cache", "get_cache_context", "get_cache_decorator"]


# How often to look whether another process has finished.
_FIRST_LOOK, _LAST_LOOK = 0.002, 0.1


class CacheInfo(NamedTuple):
    """What `functools.lru_cache` tells of itself, told by an opero cache."""

    hits: int
    misses: int
    maxsize: int | None
    currsize: int


class ResultCache:
    """Key, entry, and who computes: one function's view of a store."""

    def __init__(self, function: Callable[..., Any], settings: Cache) -> None:
        refuse_generator(function, "cache")
        self.is_lasting = settings.backend != "memory"
        self.keys = KeyMaker(function, settings)
        # Those of the function, from its decoration on.
        self.stats = Stats()
        self._function = function
        self._is_async = is_async(function)
        self._settings = settings
        # A first call that imported the backend's module could be forked, or be called by a finalizer, meanwhile.
        self._make_store = store_class(settings)
        self._store: Any = None
        self._namespace = settings.namespace
        # What had been counted when it was cleared.
        self._counted = CallStats()
        _caches[id(self)] = self

    @property
    def store(self) -> Any:
        """The `Store` where the entries live; one that outlives the process is made at the first call."""
        # No `cached_property`, whose lock of Python 3.11 a forked child would wait for. Two that come at once find one.
        if self._store is None:
            namespace = self.namespace if self.is_lasting else self._settings.namespace
            self._store = store_of(self._settings, namespace, self._make_store)
        return self._store

    @property
    def namespace(self) -> str:
        """The name under which the entries live."""
        if self._namespace is None and self.is_lasting:
            self._namespace = lasting_identity(self._function)
        return self._namespace or f"{getattr(self._function, '__module__', None)}.{name_of(self._function)}"

    # Looks that are worth it before a call gets its flow

    def look_up(self, key: Any) -> tuple[Any, ...] | None:
        """The entry of a key, a tuple that begins with the result; None where there is none, or a look could block."""
        # An event loop is not to wait until it is open, or free; `through` asks in a thread.
        found: tuple[Any, ...] | None = self.store.look_up(key) if not self._is_async or self.store.is_ready else None
        return found

    async def fetch(self, key: Any) -> tuple[Any, ...] | None:
        """The same where it has to be awaited."""
        entry: tuple[Any] | None = await self.store.fetch(key) if self._settings.backend == "redis" else None
        return entry

    def finder(self, tick: Callable[[], object]) -> Callable[..., Any] | None:
        """See `KeyMaker.finder`; None where a look takes longer."""
        return None if self.is_lasting else self.keys.finder(self.store, tick)

    # What users manage

    def info(self, stats: CallStats) -> CacheInfo:
        """Hits and misses since it was cleared, and sizes."""
        hits, calls = stats.hits - self._counted.hits, stats.calls - self._counted.calls
        with managing(self.store, "count the entries of"):
            return CacheInfo(hits, calls - hits, self._settings.options.get("maxsize"), len(self.store))

    def delete(self, key: Any) -> bool:
        """Forget one entry; tells whether there was one."""
        self.store.flights.invalidate(key)
        with managing(self.store, "delete from"):
            return bool(self.store.delete(key))

    def clear(self) -> None:
        """Forget all entries, do not store what is being computed now, and start counting anew."""
        self.store.flights.invalidate()
        with managing(self.store, "clear"):
            self.store.clear()
        self._counted = self.stats.snapshot()

    # The layer of a flow

    def through(self, call: Call, compute: Callable[[], Flow]) -> Flow:
        """The call's result from the cache, from an identical call under way, or from ``compute()``."""
        flights = self.store.flights
        if call.key is MISSING:
            call.key = self.keys.key_of(*call.args, **call.kwargs)
        elif type(call.key) is Failed:
            raise call.key.error
        # Others get the old entry while it is refreshed, and do not wait for that.
        own = Flight(call.key, call.presence, stale=self._settings.stale, refreshes=call.refreshes)
        try:
            while (flight := flights.board(own)) is not own:
                seat = yield from self._wait(flight, call)
                if seat is None:
                    return (yield from compute())
                if not flight.is_over:
                    return self._out_of_time()
                if seat.outcome is not MISSING:
                    return self._joined(call, seat)
            try:
                return (yield from self._lead(own, call, compute))
            finally:
                self.store.let_go(own)
        finally:
            # Ctrl-C may come between any two steps: nobody is to wait for what will not land.
            flights.land(own)

    def _wait(self, flight: Flight, call: Call) -> Generator[Seat, Any, Seat | None]:
        """Wait until somebody else's flight has landed; None if that may wait for this call."""
        seat = Seat(flight, call.time_left)
        leads = [leader for leader in leaders() if isinstance(leader, Flight)]
        # Let others know before looking at them: of two that come to wait for each other one has to see it.
        for leader in leads:
            leader.waits_for.append(flight)
        try:
            # As a signal handler, or a blocking call of a task's, that waits for what its own thread computes.
            is_held_up = call.presence is None and not self._is_async and flight.thread == threading.get_ident()
            is_left_alone = flight.presence is not None and flight.presence.is_away
            if is_held_up or is_left_alone or flight.needs(leads):
                return None
            yield seat
            return seat
        finally:
            flight.seats.remove(seat)
            for leader in leads:
                leader.waits_for.remove(flight)

    def _joined(self, call: Call, seat: Seat) -> Any:
        outcome = seat.outcome
        if type(outcome) is Failed:
            # Without the frames of the others who wait for the same, where it is no copy.
            outcome.error.with_traceback(seat.traceback)
            return outcome
        self.stats.joined.tick()
        if seat.written is not None:
            try:
                outcome, _ = self.store.format.loads(seat.written)
            except Exception as error:  # noqa: BLE001 - a result that cannot be read costs the cache and not the call
                self._note_fault(error)
        return _hit(call, outcome)

    def _lead(self, flight: Flight, call: Call, compute: Callable[[], Flow]) -> Flow:
        """The entry, which another leader may have stored meanwhile, or what is computed, when it has been kept."""
        claim = CLAIMED if call.refreshes else (yield from self._claim(flight, call))
        if claim is BUSY:
            return self._out_of_time()
        if claim is FOUND:
            self.stats.joined.tick()
            found = flight.found
            self.store.flights.land(flight, found)
            return _hit(call, found)
        self._note_fault(claim)
        try:
            with part_of(flight) if call.presence is None else contextlib.nullcontext():
                outcome = yield from compute()
        except Exception as error:
            # Of a policy, such as a limit that is full.
            if flight.old is None:
                raise
            outcome = Failed(error)
        if not call.is_made_up:
            outcome = yield from self._kept(flight, call, outcome, can_be_kept=claim is CLAIMED or flight.held)
        self.store.flights.land(flight, outcome)
        return outcome

    def _kept(self, flight: Flight, call: Call, outcome: Any, *, can_be_kept: bool) -> Generator[Any, Any, Any]:
        """What becomes of an outcome: an entry that has ended stands for an error, any other one may be kept."""
        try:
            life = self._life(call, outcome)
        except Exception as error:  # noqa: BLE001 - of the user's functions, or a result that can be used only once
            outcome, life = Failed(error), _NOT_KEPT
        is_error = type(outcome) is Failed
        if is_error and flight.old is not None:
            value, flight.written = flight.old
            return _hit(call, value)
        if life != _NOT_KEPT and can_be_kept:
            value, stale = (Failed(copied(outcome.error)), 0.0) if is_error else (outcome, self._settings.stale)
            keep = Keep(flight, value, life, stale, call.time_left())
            self._note_fault((yield from self._ask(self.store.keep, keep)))
        return outcome

    def _claim(self, flight: Flight, call: Call) -> Generator[Any, Any, Any]:
        """What the store answers, once no other process computes, or too late."""
        look = _FIRST_LOOK
        while (claim := (yield from self._ask(self.store.claim, flight))) is BUSY:
            left = call.deadline - clock.now()
            if left <= 0:
                break
            yield Pause(min(look, left), is_real=True)
            look = min(_LAST_LOOK, look * 2)
        return claim

    def _life(self, call: Call, outcome: Any) -> float | None:
        """How long an outcome is to be kept: seconds, None for ever, or `_NOT_KEPT`."""
        settings, value = self._settings, outcome
        if type(outcome) is Failed:
            value = outcome.error
            # What opero raises of its own says nothing of the function. A refresh that fails keeps what was there.
            is_own = isinstance(value, OperoError) and not isinstance(value, (AllFailedError, RejectedResultError))
            is_kept = isinstance(value, settings.exceptions) and not (is_own or call.refreshes)
        else:
            refuse_unfinished(self._function, outcome, is_cached=True)
            is_kept = settings.keep_if is None or bool(settings.keep_if(outcome))
        if not is_kept:
            return _NOT_KEPT
        if not callable(settings.ttl):
            return settings.ttl
        said = settings.ttl(value)
        return None if said is None else check_lifetime("what ttl=… returned", said, zero=True)

    def _out_of_time(self) -> Failed:
        name = name_of(self._function)
        msg = f"{name} was not started: total_timeout ended it during the wait for the same call of somebody else's"
        return Failed(CallTimeoutError(msg))

    def _ask(self, ask: Callable[[Sequence[Any]], list[Any]], request: Flight | Keep) -> Generator[Any, Any, Any]:
        return ask([request])[0] if self.store.is_instant else (yield Consult(ask, request))

    def _note_fault(self, answer: Any) -> None:
        if isinstance(answer, Exception):
            self.stats.cache_errors.tick()
            self.store.complain(answer)


_NOT_KEPT = 0.0


def _hit(call: Call, value: Any) -> Any:
    call.cached = True
    if call.tell is not None:
        call.tell(CacheHit)
    # One that is raised again and again would hold the frames of all who got it.
    return Failed(copied(value.error)) if type(value) is Failed else value


_caches: WeakValueDictionary[int, ResultCache] = WeakValueDictionary()


def get_cache_decorator(
    *,
    cache_ttl: Duration | None = None,
    cache_backend: Backend = "memory",
    cache_key: Callable[..., Any] | None = None,
    cache_namespace: str | None = None,
    **options: Any,
) -> Callable[[F], F]:
    """Make a decorator that caches, and does nothing else.

    Its options are those of `opero.opero`, and are checked before there is a function; all others are those of
    ``cache_options`` there, such as ``maxsize`` or ``cache_dir``.
    """
    own: dict[str, Any] = {name: value for name, value in locals().items() if name != "options"}
    settings = flat_cache(**own, cache_options=options)

    def plan(function: Callable[..., Any]) -> Plan:
        return Plan(function, RetryPolicy(), cache=ResultCache(function, settings))

    return decorator(plan, (get_cache_decorator, {**own, **options}))


@contextlib.contextmanager
def get_cache_context(
    cache_namespace: str, *, cache_backend: Backend = "memory", cache_ttl: Duration | None = None, **options: Any
) -> Iterator[CacheEngine]:
    """Give the cache engine of a namespace for a ``with`` block, and close its files and connections at the end.

    Functions that are decorated with the same namespace, backend and options share its entries by ``engine.cache``;
    ``engine.get`` and ``engine.set`` have keys of their own. In memory, entries go when nothing uses the namespace. The
    options are those of `get_cache_decorator`.

    Yields:
        A `twat_cache.engines.base.BaseCacheEngine` with ``get(key, default=None)``, ``set(key, value)``,
        ``delete(key)``, ``clear()``, ``cache(function)``, ``stats`` and ``name``.

    Raises:
        TypeError: If an option has the wrong type, or a key cannot be one.
        ValueError: If an option's value is out of range.
        OperoError: By the engine, if the backend failed.
    """
    from opero.core.stores.twat import CacheEngine

    own: dict[str, Any] = {"cache_namespace": cache_namespace, "cache_backend": cache_backend, "cache_ttl": cache_ttl}
    settings, decorate = flat_cache(**own, cache_options=options), get_cache_decorator(**own, **options)
    engine = CacheEngine(settings, store_of(settings, cache_namespace, store_class(settings)), decorate)
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
        OperoError: If a backend failed.
    """
    for cache in [cache for known in _caches.valuerefs() if (cache := known()) is not None]:
        # One that has no name to keep anything under has kept nothing.
        with contextlib.suppress(MisuseError):
            if namespace in {None, cache.namespace}:
                cache.clear()
