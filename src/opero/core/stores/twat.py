"""twat-cache: its settings, its folders, and its contract for engines, without what its import does to the program.

Importing twat-cache 2.7.5 removes the program's loguru sinks (``twat_cache/logging.py``), warns through pydantic, and
logs its settings, passwords included. When a release mends that, `twat_cache` becomes a plain import.

Its engines cannot be made (`_get_cached_value` is missing, an empty cache counts as none), and where completed take a
miss for a hit, count bytes as entries (disk), or use ``hash`` as a key (redis). Here they are completed: settings, name
and statistics are theirs, the entries are a `Store`'s.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import time
import types
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opero.core.digests import digest_of
from opero.core.flights import Flight
from opero.core.private_folder import folder_of_user
from opero.core.stores.contract import Keep, managing
from opero.exceptions import OperoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from opero.core.stores.contract import Store
    from opero.core.stores.settings import CacheSettings

# Options of opero's own beside the fields of twat-cache's `CacheConfig`.
_OWN_OPTIONS = frozenset({"client", "serializer", "size_limit", "url"})
_ENGINES = {
    "memory": ("engines.base", "BaseCacheEngine"),
    "disk": ("engines.diskcache", "DiskCacheEngine"),
    "redis": ("engines.redis", "RedisCacheEngine"),
}


def _import_twat_cache(module: str) -> Any:
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


def cache_config(options: Mapping[str, Any], *, ttl: float | None = None) -> Any:
    """twat-cache's `CacheConfig` for checked ``cache_options``."""
    known = {name: value for name, value in options.items() if name not in _OWN_OPTIONS}
    return _import_twat_cache("config").create_cache_config(ttl=ttl, **known)


def cache_folder(config: Any) -> Path:
    """The folder in which the namespaces of these settings lie; it is not made."""
    name: str = config.get_folder_name()
    if config.cache_dir is not None:
        return Path(config.cache_dir) / name
    get_cache_path = _import_twat_cache("paths").get_cache_path
    return folder_of_user(lambda: get_cache_path(name, create=False))


def make_engine(settings: CacheSettings, store: Store, decorate: Callable[..., Any]) -> CacheEngine:
    """The engine over a store; ``decorate`` makes a function use it."""
    engine: CacheEngine = _engine_class(*_ENGINES[settings.backend])(settings, store, decorate)
    return engine


@functools.cache
def _engine_class(module: str, name: str) -> Any:
    return type(name, (CacheEngine, getattr(_import_twat_cache(module), name)), {})


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
        facts: dict[str, Any] = _import_twat_cache("engines.base").BaseCacheEngine.stats.fget(self)
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
            (answer,) = store.perform([Keep(Flight(digest_of(key)), value, self._ttl)])
            if isinstance(answer, Exception):
                raise answer
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
            msg = "the cache engine is closed; use it inside of its `with` block"
            raise OperoError(msg)
        with managing(self._store, what):
            yield self._store
