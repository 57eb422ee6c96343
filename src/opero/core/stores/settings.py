"""The options of a cache, checked when decorating, and the store that they describe."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, Unpack
from weakref import WeakValueDictionary

from opero.core.checks import (
    UNITS,
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_known,
    check_mapping,
    check_seconds,
    check_text,
    check_url,
    shown,
)
from opero.core.forks import ForkSafeLock
from opero.core.stores.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opero.core.checks import Duration
    from opero.core.stores.disk import DiskStore
    from opero.core.stores.redis import RedisStore

    Store: TypeAlias = MemoryStore | DiskStore | RedisStore

Backend: TypeAlias = Literal["memory", "disk", "redis"]

# The options of each backend and their defaults; None is left to twat-cache.
_WRITTEN = {"compress": False, "folder_name": "opero", "serializer": "pickle"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "memory": {"maxsize": 10_000, "policy": "lru"},
    "disk": {"cache_dir": None, "maxsize": None, "policy": "fifo", "size_limit": 16 * 2**30, **_WRITTEN},
    "redis": {**dict.fromkeys(("client", "redis_db", "redis_host", "redis_password", "redis_port", "url")), **_WRITTEN},
}
# For which None says something, where it is the default: no bound, no password.
_NONE_IS_SAID = frozenset({"maxsize", "redis_password"})
_OF_ANY_CACHE = ("backend", "exceptions", "ignore", "keep_if", "key", "namespace", "stale", "ttl")
_HIGHEST_PORT = 65_535


class BackendSettings(TypedDict, total=False):
    """Types of the settings of backends, for type checkers."""

    maxsize: int | None
    policy: Literal["lru", "lfu", "fifo"]
    cache_dir: str | os.PathLike[str]
    folder_name: str
    size_limit: int
    serializer: Literal["pickle", "json"]
    compress: bool
    url: str
    client: Any
    redis_host: str
    redis_port: int
    redis_db: int
    redis_password: str | None


def _name(option: str, value: Any) -> str:
    name = check_text(option, value, "one folder's name")
    if name in {".", ".."} or "/" in name or os.sep in name:
        raise ValueError(f"{option}={shown(value)} is a path; write one folder's name, and the rest as 'cache_dir'")
    return name


def _path(option: str, value: Any) -> str:
    text = check_text(option, os.fspath(value) if isinstance(value, os.PathLike) else value, "a folder's path")
    # The same one, whatever the working directory will be.
    return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111 - pathlib takes long to import


def _host(option: str, value: Any) -> str:
    host = check_text(option, value, "the server's name")
    if any(mark in host for mark in "@/"):
        # It would stand in messages, with the password in it.
        raise ValueError(f"{option} is no server's name; write a URL as 'url', or the name alone")
    return host


def _port(option: str, value: Any) -> int:
    port = check_count(option, value, "the port's number", smallest=1)
    if port > _HIGHEST_PORT:
        raise ValueError(f"{option}={value!r} is out of range; write a port between 1 and {_HIGHEST_PORT}")
    return port


def _password(option: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{option} is {type(value).__name__}; write the password as text")
    return value


def _client(option: str, value: Any) -> Any:
    from opero.core.stores.redis import check_client

    return check_client(option, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "cache_dir": _path,
    "client": _client,
    "compress": check_flag,
    "folder_name": _name,
    "maxsize": lambda option, value: check_count(option, value, "entries", smallest=1),
    "policy": lambda option, value: check_choice(option, value, ("lru", "lfu", "fifo")),
    "redis_db": lambda option, value: check_count(option, value, "the database's number", smallest=0),
    "redis_host": _host,
    "redis_password": _password,
    "redis_port": _port,
    "serializer": lambda option, value: check_choice(option, value, ("pickle", "json")),
    "size_limit": lambda option, value: check_count(option, value, "bytes", smallest=1),
    "url": check_url,
}


class Cache:
    """Settings of a cache, for ``cache=`` of `opero.opero` and `opero.opmap`; they never change.

    Functions that are given one object keep entries of their own (unless it has a ``namespace``).

    Args:
        ttl: How long a result lives: seconds, a `datetime.timedelta`, text such as ``"90 s"``, ``"15 minutes"`` or
            ``"2 h"``, or a function of the result that returns one of these, None (for ever) or 0 (not kept). Default:
            for ever.
        backend: ``"memory"``, ``"disk"`` or ``"redis"``.
        key: Function of the same arguments that returns the key to use in their place.
        namespace: Functions with one namespace share entries. Default: each function has its own.
        ignore: Name of a parameter that is not part of the key, or several; such as an API key.
        keep_if: Function of a result; only results for which it is true are kept.
        exceptions: Class of exceptions that are remembered like results, or a tuple of them.
        stale: How long after its end a result is still given if the call fails (``stale-if-error`` of RFC 5861).
        **settings: Of the backend, as ``cache_options`` of `opero.opero`.

    An error of a function that is given here is raised by the call, and nothing is kept.

    Raises:
        TypeError: If something has the wrong type or does not belong to the backend.
        ValueError: If a value is out of range.
    """

    # As they were checked, durations in seconds; of the backend all of its options.
    ttl: float | Callable[[Any], Any] | None
    backend: str
    key: Callable[..., Any] | None
    namespace: str | None
    ignore: tuple[str, ...]
    keep_if: Callable[[Any], object] | None
    exceptions: tuple[type[Exception], ...]
    stale: float
    options: Mapping[str, Any]
    _given: dict[str, Any]

    def __init__(
        self,
        ttl: Duration | str | Callable[[Any], Duration | str | None] | None = None,
        *,
        backend: Backend = "memory",
        key: Callable[..., Any] | None = None,
        namespace: str | None = None,
        ignore: str | Iterable[str] = (),
        keep_if: Callable[[Any], object] | None = None,
        exceptions: type[Exception] | tuple[type[Exception], ...] = (),
        stale: Duration | str | None = None,
        **settings: Unpack[BackendSettings],
    ) -> None:
        policy: dict[str, Any] = {"ignore": ignore, "keep_if": keep_if, "exceptions": exceptions, "stale": stale}
        given: dict[str, Any] = {"ttl": ttl, "backend": backend, "key": key, "namespace": namespace}
        checked = _checked(given, settings, is_flat=False)
        vars(self).update(checked | _checked_policy(checked, **policy), _given=given | policy | {**settings})

    def __setattr__(self, name: str, _value: Any) -> None:
        msg = f"a Cache does not change, so {name!r} cannot be set; make another one"
        raise AttributeError(msg)

    def __repr__(self) -> str:
        shown_ones = [f"{name}={shown(value)}" for name, value in self._given.items() if value not in (None, ())]
        return f"Cache({', '.join(shown_ones)})"


def flat_cache(cache_options: Mapping[str, Any] | None = None, **given: Any) -> Cache:
    """The same, of the options of `opero.opero`, such as ``cache_ttl``.

    Raises:
        TypeError: If an option has the wrong type or does not belong to the backend.
        ValueError: If an option's value is out of range.
        ModuleNotFoundError: If the backend needs a package that is not installed.
    """
    made = Cache()
    named = {name.removeprefix("cache_"): value for name, value in given.items()}
    vars(made).update(_checked({**vars(made), **named}, cache_options, is_flat=True))
    return made


def _checked(given: Mapping[str, Any], options: Any, *, is_flat: bool) -> dict[str, Any]:
    """The attributes of a `Cache` that flat options have, too."""
    prefix = "cache_" if is_flat else ""
    ttl, backend, key, namespace = (given[name] for name in ("ttl", "backend", "key", "namespace"))
    check_choice(f"{prefix}backend", backend, _OPTIONS)
    if backend == "redis" and importlib.util.find_spec("redis") is None:
        msg = "cache_backend='redis' needs the package redis; install it with: pip install 'opero[redis]'"
        raise ModuleNotFoundError(msg, name="redis")
    if callable(ttl) and not is_flat:
        check_callable("ttl", ttl, "a function of the result")
    elif ttl is not None:
        ttl = (check_seconds if is_flat else check_lifetime)(f"{prefix}ttl", ttl, zero=False)
    if namespace is not None:
        check_text(f"{prefix}namespace", namespace, "a name for where the entries live")
    if key is not None:
        check_callable(f"{prefix}key", key, "a function of the same arguments that returns the key")
    options = _checked_options(backend, check_mapping("cache_options", options), is_flat=is_flat)
    return {"ttl": ttl, "backend": backend, "key": key, "namespace": namespace, "options": options}


def _checked_policy(
    checked: Mapping[str, Any], *, ignore: Any, keep_if: Any, exceptions: Any, stale: Any
) -> dict[str, Any]:
    """Those that only a `Cache` has, beside the others, which are ``checked``."""
    names = (ignore,) if isinstance(ignore, str) or not isinstance(ignore, Iterable) else tuple(ignore)
    for name in names:
        check_text("ignore", name, "names of parameters")
    if names and checked["key"] is not None:
        raise ValueError("ignore=… has no effect beside key=…, which alone makes the key; leave one of them out")
    if keep_if is not None:
        check_callable("keep_if", keep_if, "a function of the result")
    classes = exceptions if isinstance(exceptions, tuple) else (exceptions,)
    if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in classes):
        raise TypeError(f"exceptions={shown(exceptions)} is not a class of exceptions or a tuple of them")
    if classes and checked["options"].get("serializer") == "json":
        raise ValueError("exceptions=… cannot apply with serializer='json', which can write no exception")
    if stale is not None:
        stale = check_lifetime("stale", stale, zero=False)
        if checked["ttl"] is None:
            raise ValueError(f"stale={shown(stale)} has no effect without ttl=…: such an entry never ends")
    return {"ignore": names, "keep_if": keep_if, "exceptions": classes, "stale": stale or 0.0}


def _checked_options(backend: str, given: Mapping[str, Any], *, is_flat: bool) -> dict[str, Any]:
    known = _OPTIONS[backend]
    if is_flat:
        check_known(f"cache_options of cache_backend={backend!r}", given, tuple(known))
    else:
        check_known(f"Cache(backend={backend!r})", given, (*known, *_OF_ANY_CACHE))
    checked = {
        name: _CHECKS[name](f"cache_options[{name!r}]" if is_flat else name, value)
        for name, value in given.items()
        if value is not None or known[name] is not None or name not in _NONE_IS_SAID
    }
    named = [name for name in ("client", "url") if name in checked]
    places = [*named, *(name for name in checked if name.startswith("redis_"))]
    if named and len(places) > 1:
        raise ValueError(f"{places[0]}=… says which server it is, and so does {places[1]}=…; leave one of them out")
    return {**known, **checked}


_LIFETIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


def check_lifetime(name: str, value: Any, *, zero: bool) -> float:
    """Seconds, told as a number, as a `datetime.timedelta`, or as text with a unit."""
    if isinstance(value, str):
        found = _LIFETIME.fullmatch(value)
        unit = None if found is None else UNITS.get(found[2].lower())
        if found is None or unit is None:
            msg = f"{name}={shown(value)} is no duration; write seconds, a timedelta, or text like '15 minutes'"
            raise ValueError(msg)
        value = float(found[1]) * unit
    return check_seconds(name, value, zero=zero)


# Where the entries live


_lock = ForkSafeLock()
# For as long as one of the functions is there.
_lasting_stores: WeakValueDictionary[str, Any] = WeakValueDictionary()


def store_of(cache: Cache, namespace: str | None, make: Callable[[Cache, str], Store]) -> Store:
    """The store of a namespace, which functions share; in memory, without one, a store of its own."""
    if namespace is None:
        return MemoryStore(cache, None)
    # In memory all functions of a namespace share one store, elsewhere those that have the same options.
    options = {name: id(value) if name == "client" else value for name, value in cache.options.items()}
    key = repr((cache.backend, namespace, None if cache.backend == "memory" else options))
    with _lock.lock:
        store: Store | None = _lasting_stores.get(key)
        if store is None:
            _lasting_stores[key] = store = make(cache, namespace)
    if isinstance(store, MemoryStore) and (store.maxsize, store.policy) != (options["maxsize"], options["policy"]):
        raise ValueError(
            f"cache_namespace={namespace!r} is in use with maxsize={store.maxsize} and policy={store.policy!r}, "
            f"but now got maxsize={options['maxsize']} and policy={options['policy']!r}; give both functions the "
            "same cache_options"
        )
    return store


def store_class(cache: Cache) -> Callable[[Cache, str], Store]:
    """What makes stores; imports what would be left to a first call, but twat-cache for where a disk cache lies."""
    if cache.backend == "memory":
        return MemoryStore
    if cache.backend == "disk":
        from opero.core.stores.disk import DiskStore

        return DiskStore
    from opero.core.stores.redis import RedisStore, server_at

    if cache.options["url"] is not None:
        # What its query says is read now, and refused when decorating.
        server_at(cache.options["url"])
    elif cache.options["client"] is None:
        # Its settings say where the server is.
        importlib.import_module("opero.core.stores.twat")
    return RedisStore
