"""The options of a cache, checked when decorating, and the store that they describe."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from opero.core.checks import (
    check_choice,
    check_count,
    check_flag,
    check_known,
    check_mapping,
    check_seconds,
    check_text,
)
from opero.core.forks import ForkSafeLock
from opero.core.showing import shown
from opero.core.stores.memory import MEMORY_MAXSIZE, MEMORY_POLICIES, memory_store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from opero.core.checks import Duration
    from opero.core.stores.contract import Store

BACKENDS = ("memory", "disk", "redis")
FOLDER_NAME = "opero"
DISK_SIZE_LIMIT = 16 * 2**30
# opero's names for what diskcache evicts first.
DISK_POLICIES = {"fifo": "least-recently-stored", "lru": "least-recently-used", "lfu": "least-frequently-used"}

_WRITTEN = ("compress", "folder_name", "serializer")
_OPTIONS = {
    "memory": ("maxsize", "policy"),
    "disk": ("cache_dir", "maxsize", "policy", "size_limit", *_WRITTEN),
    "redis": ("redis_db", "redis_host", "redis_password", "redis_port", *_WRITTEN),
}
_HIGHEST_PORT = 65_535


def _name(option: str, value: Any) -> str:
    name = check_text(option, value, "one folder's name")
    if os.path.basename(name) != name or name in {".", ".."}:  # noqa: PTH119 - pathlib takes long to import
        msg = f"{option}={shown(value)} is a path; write one folder's name, and the rest as 'cache_dir'"
        raise ValueError(msg)
    return name


def _path(option: str, value: Any) -> str:
    return check_text(option, os.fspath(value) if isinstance(value, os.PathLike) else value, "a folder's path")


def _port(option: str, value: Any) -> int:
    port = check_count(option, value, "the port's number", smallest=1)
    if port > _HIGHEST_PORT:
        msg = f"{option}={value!r} is out of range; write a port between 1 and {_HIGHEST_PORT}"
        raise ValueError(msg)
    return port


def _password(option: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        msg = f"{option} is {type(value).__name__}; write the password as text"
        raise TypeError(msg)
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "cache_dir": _path,
    "compress": check_flag,
    "folder_name": _name,
    "maxsize": lambda option, value: check_count(option, value, "entries", smallest=1),
    "redis_db": lambda option, value: check_count(option, value, "the database's number", smallest=0),
    "redis_host": lambda option, value: check_text(option, value, "the server's name"),
    "redis_password": _password,
    "redis_port": _port,
    "serializer": lambda option, value: check_choice(option, value, ("pickle", "json")),
    "size_limit": lambda option, value: check_count(option, value, "bytes", smallest=1),
}


@dataclass(frozen=True)
class CacheSettings:
    """Checked options of one cache."""

    backend: str
    ttl: float | None
    namespace: str | None
    options: Mapping[str, Any] = field(repr=False)

    @property
    def maxsize(self) -> int | None:
        """Most entries, None for no bound."""
        size: int | None = self.options.get("maxsize", MEMORY_MAXSIZE if self.backend == "memory" else None)
        return size

    @property
    def reads_at_once(self) -> bool:
        """Whether a hit is so quick that an event loop need not be spared."""
        return self.backend == "memory" or (self.backend == "disk" and self.options.get("policy", "fifo") == "fifo")

    def store(self, namespace: str | None) -> Store:
        """The store of a namespace; in memory, without one, a store of its own."""
        if self.backend == "memory":
            policy = self.options.get("policy", "lru")
            return memory_store(namespace, maxsize=self.maxsize or MEMORY_MAXSIZE, policy=policy)
        assert namespace is not None  # noqa: S101 - what outlives the process has a name
        key = repr((self.backend, namespace, sorted(self.options.items())))
        with _lock.lock:
            found: Store | None = _lasting_stores.get(key)
            if found is not None:
                return found
            made: Store = self._disk_store(namespace) if self.backend == "disk" else self._redis_store(namespace)
            _lasting_stores[key] = made
            return made

    def _disk_store(self, namespace: str) -> Any:
        from opero.core.stores.disk import DiskStore

        return DiskStore(
            self.disk_folder,
            namespace,
            self._format(),
            maxsize=self.maxsize,
            policy=self.options.get("policy", "fifo"),
            size_limit=self.options.get("size_limit", DISK_SIZE_LIMIT),
        )

    def disk_folder(self) -> Path:
        """The folder in which the namespaces lie; it is not made."""
        from opero.core.stores.twat import cache_folder

        return cache_folder(self.config())

    def _redis_store(self, namespace: str) -> Any:
        from opero.core.stores.lasting import slug
        from opero.core.stores.redis import RedisStore

        folder = self.options.get("folder_name", FOLDER_NAME)
        return RedisStore(self.config, f"{slug(folder)}:{slug(namespace)}", self._format())

    def config(self) -> Any:
        """twat-cache's `CacheConfig` for these settings."""
        from opero.core.stores.twat import cache_config

        return cache_config({"folder_name": FOLDER_NAME, **self.options}, ttl=self.ttl)

    def _format(self) -> Any:
        from opero.core.stores.entries import EntryFormat

        return EntryFormat(self.options.get("serializer", "pickle"), compress=self.options.get("compress", False))


_lock = ForkSafeLock()
_lasting_stores: WeakValueDictionary[str, Any] = WeakValueDictionary()


def _is_missing(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is None


def cache_settings(
    *,
    ttl: Duration | None = None,
    backend: str = "memory",
    namespace: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> CacheSettings:
    """Check the options.

    Raises:
        TypeError: If an option has the wrong type or does not belong to the backend.
        ValueError: If an option's value is out of range.
        ModuleNotFoundError: If the backend needs a package that is not installed.
    """
    check_choice("cache_backend", backend, BACKENDS)
    if backend == "redis" and _is_missing("redis"):
        msg = "cache_backend='redis' needs the package redis; install it with: pip install 'opero[redis]'"
        raise ModuleNotFoundError(msg, name="redis")
    if ttl is not None:
        ttl = check_seconds("cache_ttl", ttl, zero=False)
    if namespace is not None:
        check_text("cache_namespace", namespace, "a name for where the entries live")
    given = check_mapping("cache_options", options)
    check_known(f"cache_options of cache_backend={backend!r}", given, _OPTIONS[backend])
    policies = MEMORY_POLICIES if backend == "memory" else DISK_POLICIES
    checks: dict[str, Any] = {**_CHECKS, "policy": functools.partial(check_choice, choices=policies)}
    checked = {name: checks[name](f"cache_options[{name!r}]", value) for name, value in given.items()}
    return CacheSettings(backend, ttl, namespace, checked)
