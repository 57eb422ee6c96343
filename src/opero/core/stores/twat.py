"""twat-cache's settings and locations, without what its import does to the program.

Importing twat-cache 2.7.5 removes the program's loguru sinks (``twat_cache/logging.py``), warns through pydantic, and
logs its settings, passwords included. When a release mends that, `twat_cache` becomes a plain import.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opero.core.private_folder import folder_of_user

if TYPE_CHECKING:
    from collections.abc import Mapping

# Options of opero's own beside the fields of twat-cache's `CacheConfig`.
OWN_OPTIONS = frozenset({"client", "serializer", "size_limit", "url"})


def import_twat_cache(module: str) -> Any:
    """A module of twat-cache, imported without side effects on the host program."""
    name = f"twat_cache.{module}"
    if name in sys.modules:
        return sys.modules[name]
    stand_in = types.ModuleType("twat_cache.logging")
    stand_in.__dict__["logger"] = _logger()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = "twat_cache.logging" not in sys.modules
        if fresh:
            sys.modules["twat_cache.logging"] = stand_in
        try:
            return importlib.import_module(name)
        finally:
            # A host that asks for the real one shall get it.
            if fresh and sys.modules.get("twat_cache.logging") is stand_in:
                del sys.modules["twat_cache.logging"]


def _logger() -> Any:
    from loguru import logger

    logger.disable("twat_cache")
    return logger


def cache_config(options: Mapping[str, Any], *, ttl: float | None = None) -> Any:
    """twat-cache's `CacheConfig` for checked ``cache_options``."""
    known = {name: value for name, value in options.items() if name not in OWN_OPTIONS}
    return import_twat_cache("config").create_cache_config(ttl=ttl, **known)


def cache_folder(config: Any) -> Path:
    """The folder in which the namespaces of these settings lie; it is not made."""
    name: str = config.get_folder_name()
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser() / name
    get_cache_path = import_twat_cache("paths").get_cache_path
    return folder_of_user(lambda: get_cache_path(name, create=False))
