"""What the cache asks of a store, and what it may answer.

A store is asked in lists, so that a map can ask for many keys at once. `perform` never raises for what is wrong with
the backend: it answers with an exception, and the call goes on without the cache.
"""

from __future__ import annotations

import contextlib
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opero.exceptions import OperoError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from opero.core.flights import Flight
    from opero.core.stores.disk import DiskStore
    from opero.core.stores.memory import MemoryStore
    from opero.core.stores.redis import RedisStore

    Store: TypeAlias = MemoryStore | DiskStore | RedisStore

FOREVER = float("inf")


# Requests


@dataclass(slots=True, eq=False)
class Lease:
    """The right to compute the result for one key, against all processes that share the store.

    Attributes:
        key: What it is for.
        stale: For how many seconds after its end an entry is of use if the call fails.
        token: Tells this lease from others of the key.
        held: Whether it was claimed and not given back.
        dropped: Whether it is wanted no more; a thread that is still on its way to claim it then gives it back at once.
        old: An entry that has ended, not more than ``stale`` seconds ago.
        seen: What the store has noted of the key's past: whether somebody has forgotten the entry since the claim.
    """

    key: Any
    stale: float = 0.0
    token: bytes = b""
    held: bool = False
    dropped: bool = False
    old: Found | None = None
    seen: Any = None


@dataclass(slots=True, eq=False)
class Claim:
    """Request: the entry, or else the right to compute it; answered by `Found`, `CLAIMED` or `BUSY`.

    Whoever has asked gives the lease back in the end, by ``let_go`` of the store.
    """

    lease: Lease


@dataclass(slots=True, eq=False)
class Keep:
    """Request: store a result unless it is stale by now, and give the lease back; answered by `DONE`.

    It lives for ``ttl`` seconds, and for ``stale`` more it may be given if the call fails. With a lease that was never
    claimed it is stored in any case. ``written`` is filled in by stores of bytes. ``patience``: seconds that may be
    waited for others who write; None for as long as the store thinks right.
    """

    lease: Lease
    value: Any
    ttl: float | None
    flight: Flight | None = None
    stale: float = 0.0
    patience: float | None = None
    written: bytes | None = None

    @property
    def seconds(self) -> float | None:
        """How long it is to be kept in all."""
        return None if self.ttl is None else self.ttl + self.stale

    @property
    def is_stale(self) -> bool:
        return self.flight is not None and self.flight.stale


Request = Claim | Keep


# Answers


@dataclass(slots=True, eq=False)
class Found:
    """The entry's value, or the error that is remembered in place of one (`Failed`).

    Where results are kept as bytes, ``written`` is them: of which all others get a copy of their own.
    """

    value: Any
    written: bytes | None = None


class Answer(enum.Enum):
    """One that says all by its name."""

    CLAIMED = enum.auto()
    BUSY = enum.auto()
    DONE = enum.auto()


CLAIMED, BUSY, DONE = Answer


@contextlib.contextmanager
def managing(store: Store, what: str) -> Iterator[None]:
    """Who manages a cache is told when that failed: it is not a call that could go on without."""
    try:
        yield
    except OperoError:
        raise
    except Exception as error:
        msg = f"could not {what} {store}: {describe(error)}"
        raise OperoError(msg) from error
