"""Limits that processes share: who shares one, and how the gate is asked behind which it is kept."""

from __future__ import annotations

import math
import os
import random
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from opero.core.checks import check_choice, check_text, check_url
from opero.core.clock import clock
from opero.core.faults import Complaints
from opero.core.limits.ledger import changed
from opero.core.steps import Consult

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from opero.core.limits.ledger import Ledger
    from opero.core.limits.machine import FileGate
    from opero.core.limits.rates import Rates
    from opero.core.limits.redis import RedisGate

# Where the bytes are that processes share. It answers a list of `opero.core.limits.ledger.Change`: for each 0 if it was
# done, seconds until a slot comes, or the exception that prevents it. One that ``is_instant`` blocks for microseconds.
Gate: TypeAlias = "FileGate | RedisGate"

# Others were faster for so long: then the first of this process claims the next slot.
_REFUSED_SECONDS = 0.1
# By this and their numbers processes tell each other apart, on whatever machines they run.
_ORIGIN = random.SystemRandom().random()
_OPTIONS_OF_SCOPES = {"process": (), "machine": ("folder", "name"), "redis": ("name", "url")}


class Share:
    """This process's share in one limit. When the gate fails, the process goes on with a limit of its own."""

    def __init__(self, gate: Gate, what: str) -> None:
        """``what`` is what the log calls the gate."""
        self._gate = gate
        self._complaints = Complaints(what, "going on with a limit of this process alone")
        self._refused_since = math.inf

    def ask(self, rates: Rates, act: Callable[[Ledger, float], float | None]) -> Generator[Any, Any, float | None]:
        """The gate's answer; None if it failed."""
        gate, request = self._gate, partial(changed, rates, act)
        (answer,) = gate.perform([request]) if gate.is_instant else [(yield Consult(gate, request))]
        if isinstance(answer, Exception):
            self._complaints.tell(answer)
            return None
        seconds: float = answer
        return seconds

    def ask_for(self, rates: Rates, amounts: Sequence[float], *, is_late: bool) -> Generator[Any, Any, float | None]:
        """Ask for a slot: 0, or seconds to wait; None if the gate failed."""
        now, who = clock.now(), os.getpid() + _ORIGIN
        claims = now - self._refused_since >= _REFUSED_SECONDS
        wait = yield from self.ask(
            rates, lambda ledger, now: ledger.ask(now, amounts, who, is_late=is_late, claims=claims)
        )
        self._refused_since = min(self._refused_since, now) if wait else math.inf
        return wait


def sharing(
    scope: str, *, name: str | None, url: str | None, folder: str | os.PathLike[str] | None
) -> Callable[..., Share | None]:
    """Give a function that gives the share in a limit, or in that of a value; None where the process has it for itself.

    Raises:
        ModuleNotFoundError: If redis-py is missing.
        TypeError: If an option has the wrong type.
        ValueError: If one is missing, or has no effect.
    """
    check_choice("scope", scope, sorted(_OPTIONS_OF_SCOPES))
    for option, value in {"folder": folder, "name": name, "url": url}.items():
        if value is not None and option not in _OPTIONS_OF_SCOPES[scope]:
            raise ValueError(f"{option} has no effect with scope={scope!r}; leave it out")
    if scope == "process":
        return lambda *_value: None
    if name is None:
        raise ValueError(f"scope={scope!r} needs name=, a name by which processes know the limit")
    known_as = check_text("name", name, "a name that no other limit has")
    gate_of = _files(folder) if scope == "machine" else _server(url)

    def share(*value: Any) -> Share:
        gate = gate_of(f"{known_as}:{_digest_of(*value)}" if value else known_as)
        return Share(gate, f"the {scope}'s rate limit")

    return share


def _digest_of(value: Any) -> str:
    """What stands for a value of ``per``, which may be a secret."""
    from opero.core.digests import digest_of

    return digest_of(value).hex()


def _files(folder: Any) -> Callable[[str], Gate]:
    if find_spec("fcntl") is None:
        msg = "scope='machine' needs the file locks of POSIX, which this system has not; write scope='redis'"
        raise ValueError(msg)
    from opero.core.limits.machine import FileGate

    if folder is None:
        return lambda name: FileGate(name, None)
    text = check_text("folder", os.fspath(folder) if isinstance(folder, os.PathLike) else folder, "a folder's path")
    # Known by one name, whatever the working directory will be.
    root = Path(text).expanduser().resolve()
    return lambda name: FileGate(name, root)


def _server(url: Any) -> Callable[[str], Gate]:
    if url is None:
        raise ValueError("scope='redis' needs url=, such as url='redis://localhost:6379/0'")
    if find_spec("redis") is None:
        msg = "scope='redis' needs the package redis; install it with: pip install 'opero[redis]'"
        raise ModuleNotFoundError(msg, name="redis")
    check_url("url", url)
    from opero.core.limits.redis import RedisGate

    return lambda name: RedisGate(name, url)
