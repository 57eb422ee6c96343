"""What the stores that outlive the process have in common: names, bytes, and answers in place of exceptions."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar

from opero.core.clock import clock
from opero.core.faults import Complaints, Rest
from opero.core.flights import Flights
from opero.core.steps import Failed
from opero.core.stores.contract import FOREVER, Found, Keep, Lease
from opero.exceptions import UnsafeCacheError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opero.core.stores.contract import Request
    from opero.core.stores.entries import EntryFormat

_READABLE = 48


def slug(namespace: str) -> str:
    """A name for files and redis keys: readable, and different for different namespaces."""
    readable = re.sub(r"[^A-Za-z0-9_.]+", "-", namespace)[-_READABLE:].strip("-.")
    return f"{readable}-{blake2b(namespace.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"


class LastingStore(ABC):
    """A store of bytes that other processes use, too; the backends fill in the access to it."""

    is_instant: ClassVar[bool] = False

    def __init__(self, what: str, entry_format: EntryFormat, maxsize: int | None = None) -> None:
        self.maxsize = maxsize
        self.flights = Flights()
        self._format = entry_format
        self._complaints = Complaints(what)
        self._what = what

    def __repr__(self) -> str:
        return self._what

    def complain(self, error: Exception) -> None:
        """Tell the log, the first time loudly."""
        self._complaints.tell(error)

    def look_up(self, key: bytes) -> tuple[Any, float] | None:
        """The entry of a key, ``(result, expires_at)``; faults are None, and come to light in `perform`."""
        rest = self.rest
        if rest.error is not None and rest.reason() is not None:
            return None
        try:
            entry = self.read(key)
            if rest.error is not None:
                rest.end()
            return None if entry is None else self.fresh(entry)
        except UnsafeCacheError:
            return None
        except Exception as error:  # noqa: BLE001 - a map or a call asks again by `perform`, and is told
            self.failed(error)
            return None

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
        faults = [self._write_down(request) if isinstance(request, Keep) else None for request in requests]
        try:
            answers = self.answer(requests)
        except UnsafeCacheError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it costs the cache and not the call
            self.failed(error)
            answers = [error] * len(requests)
        return [answer if fault is None else fault for fault, answer in zip(faults, answers, strict=True)]

    def copy_of(self, written: bytes) -> Any:
        """The value of an entry once more."""
        return self._format.loads(written)[0]

    def _write_down(self, request: Keep) -> Exception | None:
        ends = FOREVER if request.ttl is None else clock.wall() + request.ttl
        try:
            request.written = self._format.dumps(request.value, ends)
        except Exception as error:  # noqa: BLE001 - as above
            return error
        return None

    def found(self, lease: Lease, entry: bytes) -> Found | None:
        """What was found for a claim; None if it has ended, and is only of use if the call fails."""
        value, ends = self._format.loads(entry)
        found = Found(value, entry)
        ago = clock.wall() - ends
        if ago < 0:
            return found
        lease.old = found if ago < lease.stale else None
        return None

    # To be filled in.

    @property
    @abstractmethod
    def rest(self) -> Rest:
        """Leaves the backend alone while it is not well."""

    @abstractmethod
    def read(self, key: bytes) -> bytes | None:
        """The entry of a key."""

    @abstractmethod
    def answer(self, requests: Sequence[Request]) -> list[Any]:
        """Answer in order; what is to be kept is written down, or cannot be: then its lease is given back."""

    @abstractmethod
    def failed(self, error: Exception) -> None:
        """Decide whether the backend needs a rest."""
