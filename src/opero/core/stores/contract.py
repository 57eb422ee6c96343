"""What the cache asks of a store, what it may answer, and what the stores of bytes have in common.

A store is asked in lists, so that a map can ask for many keys at once. `perform` never raises for what is wrong with
the backend: it answers with an exception, and the call goes on without the cache.
"""

from __future__ import annotations

import contextlib
import enum
import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar

from opero.core.clock import clock
from opero.core.faults import Complaints
from opero.core.flights import Flight, Flights
from opero.core.steps import Failed
from opero.exceptions import OperoError, UnsafeCacheError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TypeAlias

    from opero.core.faults import Rest
    from opero.core.stores.disk import DiskStore
    from opero.core.stores.memory import MemoryStore
    from opero.core.stores.redis import RedisStore
    from opero.core.stores.settings import CacheSettings

    Store: TypeAlias = MemoryStore | DiskStore | RedisStore

FOREVER = float("inf")


@dataclass(slots=True, eq=False)
class Keep:
    """Request: store the outcome of a flight unless it is void by now, and give its lease back; answered by `DONE`.

    Where the lease was never claimed it is stored in any case.

    Attributes:
        ttl: Seconds that it lives; for ``stale`` more it may be given if the call fails.
        patience: Seconds that may be waited for others who write; None for as long as the store thinks right.
        written: The entry; filled in by stores of bytes, or else why that failed: ``fault``.
    """

    flight: Flight
    value: Any
    ttl: float | None
    stale: float = 0.0
    patience: float | None = None
    written: bytes | None = None
    fault: Exception | None = None

    @property
    def seconds(self) -> float | None:
        """How long it is to be kept in all."""
        return None if self.ttl is None else self.ttl + self.stale


# A flight asks for the entry, or else the right to compute it: answered by `Found`, `CLAIMED` or `BUSY`. Whoever has
# asked gives that back in the end, by ``let_go`` of the store.
Request = Flight | Keep


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


# Stores that outlive the process


_READABLE = 48


def slug(namespace: str) -> str:
    """A name for files and redis keys: readable, and different for different namespaces."""
    readable = re.sub(r"[^A-Za-z0-9_.]+", "-", namespace)[-_READABLE:].strip("-.")
    return f"{readable}-{blake2b(namespace.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"


class LastingStore:
    """A store of bytes that other processes use, too; the backends fill in the access to it."""

    is_instant: ClassVar[bool] = False

    def __init__(self, what: str, settings: CacheSettings) -> None:
        from opero.core.stores.entries import EntryFormat

        self.maxsize = settings.maxsize
        self.flights = Flights()
        self._format = EntryFormat(settings.options.get("serializer"), compress=settings.options.get("compress", False))
        self._complaints = Complaints(what)
        self._what = what

    def __repr__(self) -> str:
        return self._what

    def complain(self, error: Exception) -> None:
        """Tell the log, the first time loudly."""
        self._complaints.tell(error)

    def look_up(self, key: bytes) -> tuple[Any, float] | None:
        """The entry of a key, ``(result, expires_at)``; faults are None, and come to light in `perform`."""
        if self.rest.reason() is not None:
            return None
        try:
            found = self.find(key)
        except UnsafeCacheError:
            return None
        except Exception as error:  # noqa: BLE001 - a map or a call asks again by `perform`, and is told
            self.failed(error)
            return None
        self.rest.end()
        return found

    def find(self, key: bytes) -> tuple[Any, float] | None:
        """As `look_up`, but raises what the backend raises."""
        entry = self.read(key)
        return None if entry is None else self.fresh(entry)

    def fresh(self, entry: bytes) -> tuple[Any, float] | None:
        """The value of an entry, as `look_up` gives it."""
        value, ends = self._format.loads(entry)
        if value.__class__ is Failed or (ends != FOREVER and ends <= clock.wall()):
            return None
        return (value, FOREVER)

    def perform(self, requests: Sequence[Request]) -> list[Any]:
        """Answer requests in order."""
        resting = self.rest.reason()
        if resting is not None:
            return [resting] * len(requests)
        for request in requests:
            if isinstance(request, Keep):
                self._write_down(request)
        try:
            return self.answer(requests)
        except UnsafeCacheError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it costs the cache and not the call
            self.failed(error)
            return [error] * len(requests)

    def copy_of(self, written: bytes) -> Any:
        """The value of an entry once more."""
        return self._format.loads(written)[0]

    def found(self, flight: Flight, entry: bytes) -> Found | None:
        """What was found for a claim; None if it has ended, and is only of use if the call fails."""
        value, ends = self._format.loads(entry)
        found = Found(value, entry)
        ago = clock.wall() - ends
        if ago < 0:
            return found
        flight.old = found if ago < flight.stale else None
        return None

    def _write_down(self, keep: Keep) -> None:
        ends = FOREVER if keep.ttl is None else clock.wall() + keep.ttl
        try:
            keep.written = self._format.dumps(keep.value, ends)
        except Exception as error:  # noqa: BLE001 - as above
            keep.fault = error

    # To be filled in.

    @property
    def rest(self) -> Rest:
        """Leaves the backend alone while it is not well."""
        raise NotImplementedError

    def read(self, key: bytes) -> bytes | None:
        """The entry of a key."""
        raise NotImplementedError

    def answer(self, requests: Sequence[Request]) -> list[Any]:
        """Answer in order; what is to be kept is written down, or cannot be: then its lease is given back."""
        raise NotImplementedError

    def failed(self, error: Exception) -> None:
        """Decide whether the backend needs a rest."""
        raise NotImplementedError
