"""Limits that processes share: who shares one, and how the gate is asked behind which it is kept."""

from __future__ import annotations

import math
import os
import random
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from opero.core.checks import check_choice, check_text, check_url
from opero.core.clock import clock
from opero.core.faults import Complaints
from opero.core.limits.ledger import changed
from opero.core.steps import Consult

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from opero.core.limits.ledger import Change, Ledger
    from opero.core.limits.rates import Rates

# Others were faster for so long: then the first of this process claims the next slot.
_REFUSED_SECONDS = 0.1
_OPTIONS_OF_SCOPES = {"process": (), "machine": ("folder", "name"), "redis": ("name", "url")}


class Gate(Protocol):
    """Where the bytes are that processes share. ``is_instant``: asking blocks for no longer than microseconds."""

    is_instant: bool

    def perform(self, requests: Sequence[Change]) -> list[Any]:
        """For each: 0 if it was done, seconds until a slot comes, or the exception that prevents it."""
        ...


class Share:
    """This process's share in one limit. When the gate fails, the process goes on with a limit of its own."""

    def __init__(self, open_gate: Callable[[], Gate], what: str) -> None:
        """``what`` is what the log calls the gate."""
        self._open_gate = open_gate
        self._gate: Gate | None = None
        self._complaints = Complaints(what, "going on with a limit of this process alone")
        self._refused_since = math.inf

    def ask(self, rates: Rates, act: Callable[[Ledger, float], float | None]) -> Generator[Any, Any, float | None]:
        """The gate's answer; None if it failed."""
        gate = self._gate = self._gate or self._open_gate()
        request = partial(changed, rates, act)
        (answer,) = gate.perform([request]) if gate.is_instant else [(yield Consult(gate, request))]
        if isinstance(answer, Exception):
            self._complaints.tell(answer)
            return None
        seconds: float = answer
        return seconds

    def ask_for(self, rates: Rates, amounts: Sequence[float], *, is_late: bool) -> Generator[Any, Any, float | None]:
        """Ask for a slot: 0, or seconds to wait; None if the gate failed."""
        now, who = clock.now(), _name_of(os.getpid())
        claims = now - self._refused_since >= _REFUSED_SECONDS
        wait = yield from self.ask(
            rates, lambda ledger, now: ledger.ask(now, amounts, who, is_late=is_late, claims=claims)
        )
        self._refused_since = min(self._refused_since, now) if wait else math.inf
        return wait


@lru_cache(maxsize=1)
def _name_of(_process: int) -> float:
    """By this processes tell each other apart, on whatever machines they run."""
    return random.SystemRandom().random()


class Scope:
    """Who shares a limit, and where it is kept."""

    def __init__(
        self,
        kind: str,
        *,
        name: str | None,
        url: str | None,
        folder: str | os.PathLike[str] | None,
        default_name: Callable[[], str] | None,
    ) -> None:
        """``default_name`` names the limit if the user has not."""
        self.kind = check_choice("scope", kind, sorted(_OPTIONS_OF_SCOPES))
        for option, value in {"folder": folder, "name": name, "url": url}.items():
            if value is not None and option not in _OPTIONS_OF_SCOPES[self.kind]:
                raise ValueError(f"{option} has no effect with scope={self.kind!r}; leave it out")
        if name is not None:
            check_text("name", name, "a name that no other limit has")
        elif self.kind != "process" and default_name is None:
            raise ValueError(f"scope={self.kind!r} needs name=, a name by which processes know the limit")
        self._name, self._default_name = name, default_name
        self._folder = None if folder is None else _path(folder)
        self._url = _checked_url(url) if self.kind == "redis" else ""
        if self.kind == "machine" and find_spec("fcntl") is None:
            msg = "scope='machine' needs the file locks of POSIX, which this system has not; write scope='redis'"
            raise ValueError(msg)

    @property
    def name(self) -> str:
        if self._name is None and self._default_name is not None:
            self._name = self._default_name()
        return self._name or ""

    def share(self, *value: Any) -> Share | None:
        """In the limit, or in that of a value; None where the process has it for itself."""
        if self.kind == "process":
            return None
        return Share(lambda: self._open_gate(*value), f"the {self.kind}'s rate limit")

    def _open_gate(self, *value: Any) -> Gate:
        name = self.name
        if value:
            from opero.core.digests import digest_of

            # A digest: the value may be a secret.
            name = f"{name}:{digest_of(value[0]).hex()}"
        if self.kind == "machine":
            from opero.core.limits.machine import FileGate

            return FileGate(name, self._folder)
        from opero.core.limits.redis import RedisGate

        return RedisGate(name, self._url)


def _path(folder: Any) -> Path:
    text = check_text("folder", os.fspath(folder) if isinstance(folder, os.PathLike) else folder, "a folder's path")
    # Known by one name, whatever the working directory will be.
    return Path(text).expanduser().resolve()


def _checked_url(url: Any) -> str:
    if url is None:
        raise ValueError("scope='redis' needs url=, such as url='redis://localhost:6379/0'")
    if find_spec("redis") is None:
        msg = "scope='redis' needs the package redis; install it with: pip install 'opero[redis]'"
        raise ModuleNotFoundError(msg, name="redis")
    return check_url("url", url)
