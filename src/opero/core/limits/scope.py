"""Who shares a limit, and where it is kept."""

from __future__ import annotations

import os
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opero.core.checks import check_choice, check_text
from opero.core.limits.line import Line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opero.core.limits.line import Gate
    from opero.core.limits.rates import Rates

_SCOPE_OPTIONS = {"process": (), "machine": ("folder", "name"), "redis": ("name", "url")}


class Scope:
    """Who shares a limit, and where it is kept."""

    def __init__(
        self, options: Mapping[str, Any], default_name: Callable[[], str] | None, spelled: str, rates: Rates
    ) -> None:
        """``spelled`` is how the user writes an option, with its name as ``{}``."""
        # Of lines that are made from now on.
        self.rates = rates
        self.kind = check_choice(spelled.format("scope"), options["scope"], sorted(_SCOPE_OPTIONS))
        for option in ("folder", "name", "url"):
            if options[option] is not None and option not in _SCOPE_OPTIONS[self.kind]:
                msg = f"{spelled.format(option)} has no effect with scope={self.kind!r}; leave it out"
                raise ValueError(msg)
        name, folder = options["name"], options["folder"]
        if name is not None:
            check_text(spelled.format("name"), name, "a name that no other limit has")
        self._name = default_name if name is None else lambda: name
        if self.kind != "process" and self._name is None:
            msg = f"scope={self.kind!r} needs name=, a name by which processes know the limit"
            raise ValueError(msg)
        self._folder = None if folder is None else _path(spelled.format("folder"), folder)
        self._url = _url(spelled.format("url"), options["url"]) if self.kind == "redis" else ""
        if self.kind == "machine" and find_spec("fcntl") is None:
            msg = "scope='machine' needs the file locks of POSIX, which this system has not; write scope='redis'"
            raise ValueError(msg)

    @cached_property
    def name(self) -> str:
        return "" if self._name is None else self._name()

    def line(self) -> Line:
        return self._line(lambda: self.name)

    def line_of_value(self, value: Any) -> Line:
        def name() -> str:
            from opero.core.digests import digest_of

            # A digest: the value may be a secret.
            return f"{self.name}:{digest_of(value).hex()}"

        return self._line(name)

    def _line(self, name: Callable[[], str]) -> Line:
        if self.kind == "process":
            return Line(self.rates)
        return Line(self.rates, lambda: self._open_gate(name()), f"the {self.kind}'s rate limit")

    def _open_gate(self, name: str) -> Gate:
        if self.kind == "machine":
            from opero.core.limits.machine import FileGate

            return FileGate(name, self._folder)
        from opero.core.limits.redis import RedisGate

        return RedisGate(name, self._url)


def _path(option: str, value: Any) -> Path:
    text = check_text(option, os.fspath(value) if isinstance(value, os.PathLike) else value, "a folder's path")
    # Known by one name, whatever the working directory will be.
    return Path(text).expanduser().resolve()


def _url(option: str, value: Any) -> str:
    if value is None:
        msg = f"scope='redis' needs {option}, such as 'redis://localhost:6379/0'"
        raise ValueError(msg)
    from opero.core.redis_server import check_url

    if find_spec("redis") is None:
        msg = "scope='redis' needs the package redis; install it with: pip install 'opero[redis]'"
        raise ModuleNotFoundError(msg, name="redis")
    return check_url(option, value)
