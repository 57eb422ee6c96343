"""Stores behind twat-cache's contract for engines.

The engines of twat-cache 2.7.5 cannot be made (`_get_cached_value` is missing, an empty cache counts as none), and
where completed take a miss for a hit, count bytes as entries (disk), or use ``hash`` as a key (redis). Here they are
completed: settings, name and statistics are theirs, the entries are a `Store`'s.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

from opero.core.keys import key_of_value
from opero.core.stores.contract import Claim, Found, Keep, Lease, managing
from opero.core.stores.twat import import_twat_cache
from opero.exceptions import OperoError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.core.stores.contract import Store
    from opero.core.stores.settings import CacheSettings


def make_engine(settings: CacheSettings, store: Store, decorate: Callable[..., Any]) -> CacheEngine:
    """The engine over a store; ``decorate`` makes a function use it."""
    base = {
        "memory": ("engines.base", "BaseCacheEngine"),
        "disk": ("engines.diskcache", "DiskCacheEngine"),
        "redis": ("engines.redis", "RedisCacheEngine"),
    }
    engine: CacheEngine = _engine_class(*base[settings.backend])(settings, store, decorate)
    return engine


class CacheEngine:
    """What `opero.core.get_cache_context` gives: stands before one of twat-cache's engines among the bases.

    It has what that lacks or gets wrong, and opens no files and connections with twat-cache's settings.
    """

    def __init__(self, settings: CacheSettings, store: Store, decorate: Callable[..., Any]) -> None:
        self._config = settings.config()
        self._ttl = None if callable(settings.ttl) else settings.ttl
        self._store = store
        self._decorate = decorate
        self._cache: dict[Any, Any] = {}
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
        facts: dict[str, Any] = import_twat_cache("engines.base").BaseCacheEngine.stats.fget(self)
        self._check_open()
        with managing(self._store, "count the entries of"):
            return {**facts, "size": len(self._store)}

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of a key; ``default`` if there is none."""
        lease = Lease(key_of_value(key))
        answer = self._ask(Claim(lease))
        self._store.let_go(lease)
        self._last_access = time.time()
        if not isinstance(answer, Found):
            self._misses += 1
            return default
        self._hits += 1
        return answer.value

    def set(self, key: Any, value: Any) -> None:
        """Store a value under a key."""
        self._ask(Keep(Lease(key_of_value(key)), value, self._ttl))
        self._last_update = time.time()

    def delete(self, key: Any) -> bool:
        """Forget the value of a key; tells whether there was one."""
        self._check_open()
        with managing(self._store, "delete from"):
            return self._store.delete(key_of_value(key))

    def clear(self) -> None:
        """Forget all values of the namespace."""
        self._check_open()
        with managing(self._store, "clear"):
            self._store.clear()

    def cache(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function to keep its results in the namespace."""
        decorated: Callable[..., Any] = self._decorate(func)
        return decorated

    def cleanup(self) -> None:
        """Close files and connections."""
        self._is_closed = True
        self._store.close()

    # twat-cache's contract has these two in place of `get` and `set`.

    def _get_cached_value(self, key: Any) -> Any:
        return self.get(key)

    def _set_cached_value(self, key: Any, value: Any) -> None:
        self.set(key, value)

    def _check_open(self) -> None:
        if self._is_closed:
            msg = "the cache engine is closed; use it inside of its `with` block"
            raise OperoError(msg)

    def _ask(self, request: Claim | Keep) -> Any:
        self._check_open()
        (answer,) = self._store.perform([request])
        if isinstance(answer, Exception):
            msg = f"the cache failed: {describe(answer)}"
            raise OperoError(msg) from answer
        return answer


@functools.cache
def _engine_class(module: str, name: str) -> Any:
    return type(name, (CacheEngine, getattr(import_twat_cache(module), name)), {})
