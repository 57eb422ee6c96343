"""twat-cache: its settings, its folders, and its contract for engines, without what its import does to the program.

Importing twat-cache 2.7.5 removes the program's loguru sinks (``twat_cache/logging.py``), warns through pydantic, and
logs its settings, passwords included. When a release mends that, `_without_side_effects` can go.

Its engines cannot be made (`_get_cached_value` is missing, an empty cache counts as none), and where completed take a
miss for a hit, count bytes as entries (disk), or use ``hash`` as a key (redis). Here its contract is completed: name
and statistics are twat-cache's, the entries are a `Store`'s.
"""

from __future__ import annotations

import contextlib
import sys
import time
import types
import warnings
from typing import TYPE_CHECKING, Any

from loguru import logger

from opero.core.digests import digest_of
from opero.core.faults import managing
from opero.core.stores.flights import Flight, Keep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opero.core.stores.settings import Cache, Store

__all__ = ["CacheEngine", "config_of", "get_cache_path"]


@contextlib.contextmanager
def _without_side_effects() -> Iterator[None]:
    logger.disable("twat_cache")
    name = "twat_cache.logging"
    stand_in: Any = types.ModuleType(name)
    stand_in.logger = logger
    found = sys.modules.setdefault(name, stand_in)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            # A host that asks for the real one shall get it.
            if found is stand_in:
                sys.modules.pop(name, None)


with _without_side_effects():
    from twat_cache.config import create_cache_config
    from twat_cache.engines.base import BaseCacheEngine
    from twat_cache.paths import get_cache_path


# Those that twat-cache has not, or takes for something else.
_OWN_OPTIONS = frozenset({"client", "serializer", "size_limit", "url"})


def config_of(settings: Cache) -> Any:
    """twat-cache's `CacheConfig` for these settings."""
    known = {n: value for n, value in settings.options.items() if n not in _OWN_OPTIONS and value is not None}
    return create_cache_config(**known, ttl=None if callable(settings.ttl) else settings.ttl)


class CacheEngine(BaseCacheEngine[..., Any]):
    """What `opero.core.get_cache_context` gives."""

    def __init__(self, settings: Cache, store: Store, decorate: Callable[..., Any]) -> None:
        super().__init__(create_cache_config())
        # Later, since twat-cache would make a folder by these settings, and log them.
        self._config, self._cache_path = config_of(settings), getattr(store, "folder", None)
        self._ttl: Any = settings.ttl
        self._store = store
        self._decorate = decorate

    @classmethod
    def is_available(cls) -> bool:
        return True

    @property
    def stats(self) -> dict[str, Any]:
        """Hits, misses and size, and twat-cache's other facts."""
        with managing(self._store, "count the entries of"):
            return {**super().stats, "size": len(self._store)}

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of a key; ``default`` if there is none."""
        with managing(self._store, "read from"):
            found = self._store.find(digest_of(key))
        self._last_access = time.time()
        if found is None:
            self._misses += 1
            return default
        self._hits += 1
        return found[0]

    def set(self, key: Any, value: Any) -> None:
        """Store a value under a key."""
        with managing(self._store, "write to"):
            (fault,) = self._store.keep([Keep(Flight(digest_of(key)), value, self._ttl)])
            if fault is not None:
                raise fault
        self._last_update = time.time()

    # What twat-cache's contract has in place of these.
    _get_cached_value = get

    def _set_cached_value(self, key: Any, value: Any) -> None:
        self.set(key, value)

    def delete(self, key: Any) -> bool:
        """Forget the value of a key; tells whether there was one."""
        with managing(self._store, "delete from"):
            return self._store.delete(digest_of(key))

    def clear(self) -> None:
        """Forget all values of the namespace."""
        with managing(self._store, "clear"):
            self._store.clear()

    def cache(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function to keep its results in the namespace."""
        decorated: Callable[..., Any] = self._decorate(func)
        return decorated

    def cleanup(self) -> None:
        """Close files and connections."""
        self._store.close()
