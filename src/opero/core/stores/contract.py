"""What the cache asks of a store, and what it may answer.

A store is asked in lists, so that a map can ask for many keys at once. `perform` never raises for what is wrong with
the backend: it answers with a `Fault`, and the call goes on without the cache.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from opero.exceptions import OperoError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from opero.core.flights import Flight, Flights

FOREVER = float("inf")


class Found:
    """Answer: the entry's value, or the error that is remembered in place of one (`Failed`).

    Where results are kept as bytes, ``written`` is them: of which all others get a copy of their own.
    """

    __slots__ = ("value", "written")

    def __init__(self, value: Any, written: bytes | None = None) -> None:
        self.value = value
        self.written = written


class Fault:
    """Answer: the backend could not do it."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Answer:
    """An answer that says all by its identity."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


CLAIMED = _Answer("CLAIMED")
BUSY = _Answer("BUSY")
DONE = _Answer("DONE")


class Lease:
    """The right to compute the result for one key, against all processes that share the store.

    ``dropped`` may be set while a thread is still on its way to claim it, which then gives it back at once. ``old`` is
    an entry that has ended, not more than ``stale`` seconds ago, for the case that the call fails. ``seen`` is what the
    store has noted of the key's past: whether somebody has forgotten the entry since the claim.
    """

    __slots__ = ("dropped", "held", "key", "old", "seen", "stale", "token")

    def __init__(self, key: Any, stale: float = 0.0) -> None:
        self.key = key
        self.stale = stale
        self.token = b""
        self.held = False
        self.dropped = False
        self.old: Found | None = None
        self.seen: Any = None

    def renew_token(self) -> None:
        self.token = os.urandom(12).hex().encode()


class Claim:
    """Request: the entry, or else the right to compute it; answered by `Found`, `CLAIMED` or `BUSY`."""

    __slots__ = ("lease",)

    def __init__(self, lease: Lease) -> None:
        self.lease = lease


class Keep:
    """Request: store a result unless it is stale by now, and give the lease back; answered by `DONE`.

    It lives for ``ttl`` seconds, and for ``stale`` more it may be given if the call fails. With a lease that was never
    claimed it is stored in any case. ``written`` is filled in by stores of bytes.
    """

    __slots__ = ("flight", "lease", "stale", "ttl", "value", "written")

    def __init__(
        self, lease: Lease, value: Any, ttl: float | None, *, flight: Flight | None = None, stale: float = 0.0
    ) -> None:
        self.lease = lease
        self.value = value
        self.ttl = ttl
        self.stale = stale
        self.flight = flight
        self.written: bytes | None = None

    @property
    def seconds(self) -> float | None:
        """How long it is to be kept in all."""
        return None if self.ttl is None else self.ttl + self.stale

    @property
    def is_stale(self) -> bool:
        return self.flight is not None and self.flight.stale


class Release:
    """Request: give a lease back without a result; answered by `DONE`."""

    __slots__ = ("lease",)

    def __init__(self, lease: Lease) -> None:
        self.lease = lease


Request = Claim | Keep | Release


class Store(Protocol):
    """Entries under keys. ``is_instant``: no request ever blocks."""

    is_instant: ClassVar[bool]
    flights: Flights
    maxsize: int | None

    @property
    def look_up(self) -> Callable[[Any], Any]:
        """The entry of a key, ``(result, expires_at, …)``, or None; faults are None, and come to light in `perform`."""
        ...

    def perform(self, requests: Sequence[Request]) -> list[Any]:
        """Answer requests in order."""
        ...

    def let_go(self, lease: Lease) -> None:
        """Give a lease back soon, from any thread or event loop, whether it has been claimed yet or not."""
        ...

    def delete(self, key: Any) -> bool:
        """Forget one entry; tells whether there was one. Raises what the backend raises, as do the following."""
        ...

    def clear(self) -> None:
        """Forget all entries, and refuse what is being computed now."""
        ...

    def __len__(self) -> int:
        """Number of entries."""
        ...

    def close(self) -> None:
        """Give back files and connections; they are opened again when needed."""
        ...

    def copy_of(self, written: bytes) -> Any:
        """The value of an entry once more, where entries are bytes."""
        ...

    def complain(self, error: Exception) -> None:
        """Tell the log, the first time loudly."""
        ...


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
