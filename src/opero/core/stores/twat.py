"""twat-cache: its settings, its folders, and its contract for engines, without what its import does to the program.

Importing twat-cache 2.7.5 removes the program's loguru sinks (``twat_cache/logging.py``), warns through pydantic, and
logs its settings, passwords included. When a release mends that, `twat_cache` becomes a plain import.

Its engines cannot be made (`_get_cached_value` is missing, an empty cache counts as none), and where completed take a
miss for a hit, count bytes as entries (disk), or use ``hash`` as a key (redis). Here its contract is completed: name
and statistics are twat-cache's, the entries are a `Store`'s.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import time
import types
import warnings
from typing import TYPE_CHECKING, Any

from opero.core.digests import digest_of
from opero.core.faults import managing
from opero.core.flights import Flight, Keep
from opero.exceptions import OperoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opero.core.stores.settings import CacheSettings, Store


def twat_cache(module: str) -> Any:
    """A module of twat-cache, imported without side effects on the host program."""
    name = f"twat_cache.{module}"
    if name in sys.modules:
        return sys.modules[name]
    from loguru import logger

    logger.disable("twat_cache")
    stand_in: Any = types.ModuleType("twat_cache.logging")
    stand_in.logger = logger
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = sys.modules.setdefault("twat_cache.logging", stand_in) is stand_in
        try:
            return importlib.import_module(name)
        finally:
            # A host that asks for the real one shall get it.
            if fresh and sys.modules.get("twat_cache.logging") is stand_in:
                del sys.modules["twat_cache.logging"]


@functools.cache
def engine_class() -> Any:
    """A `CacheEngine` that is one of twat-cache's, too."""
    return type("CacheEngine", (CacheEngine, twat_cache("engines.base").BaseCacheEngine), {})


class CacheEngine:
    """What `opero.core.get_cache_context` gives: stands before twat-cache's `BaseCacheEngine` among the bases.

    It has what that lacks, and opens no files and connections with twat-cache's settings.
    """

    def __init__(self, settings: CacheSettings, store: Store, decorate: Callable[..., Any]) -> None:
        self._config = settings.config()
        self._ttl: Any = settings.ttl
        self._store = store
        self._decorate = decorate
        self._cache_path = getattr(store, "folder", None)
        self._is_closed = False
        self._hits = self._misses = self._size = 0
        self._last_access = self._last_update = 0.0
        self._created_at = time.time()

    @classmethod
    def is_available(cls) -> bool:
        return True

    @property
    def name(self) -> str:
        """What kind of engine it is."""
        return type(self).__name__

    @property
    def stats(self) -> dict[str, Any]:
        """Hits, misses and size, and twat-cache's other facts."""
        facts: dict[str, Any] = twat_cache("engines.base").BaseCacheEngine.stats.fget(self)
        with self._managed("count the entries of") as store:
            return {**facts, "size": len(store)}

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of a key; ``default`` if there is none."""
        with self._managed("read from") as store:
            found = store.find(digest_of(key))
        self._last_access = time.time()
        if found is None:
            self._misses += 1
            return default
        self._hits += 1
        return found[0]

    def set(self, key: Any, value: Any) -> None:
        """Store a value under a key."""
        with self._managed("write to") as store:
            (fault,) = store.perform([Keep(Flight(digest_of(key)), value, self._ttl)])
            if fault is not None:
                raise fault
        self._last_update = time.time()

    # twat-cache's contract has these two in place of `get` and `set`.

    def _get_cached_value(self, key: Any) -> Any:
        return self.get(key)

    def _set_cached_value(self, key: Any, value: Any) -> None:
        self.set(key, value)

    def delete(self, key: Any) -> bool:
        """Forget the value of a key; tells whether there was one."""
        with self._managed("delete from") as store:
            return store.delete(digest_of(key))

    def clear(self) -> None:
        """Forget all values of the namespace."""
        with self._managed("clear") as store:
            store.clear()

    def cache(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function to keep its results in the namespace."""
        decorated: Callable[..., Any] = self._decorate(func)
        return decorated

    def cleanup(self) -> None:
        """Close files and connections."""
        self._is_closed = True
        self._store.close()

    @contextlib.contextmanager
    def _managed(self, what: str) -> Iterator[Store]:
        if self._is_closed:
            raise OperoError("the cache engine is closed; use it inside of its `with` block")
        with managing(self._store, what):
            yield self._store
