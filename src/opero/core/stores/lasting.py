"""What the stores that outlive the process have in common: names, and answers in place of exceptions."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar

from opero.core.faults import Complaints, Rest
from opero.core.flights import Flights
from opero.core.stores.contract import FOREVER, Fault, Keep, Lease
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
        self._complaints.tell(error)

    def look_up(self, key: bytes) -> tuple[Any, float] | None:
        if self.rest.reason() is not None:
            return None
        try:
            entry = self.read(key)
            self.rest.end()
            return None if entry is None else (self._format.loads(entry), FOREVER)
        except UnsafeCacheError:
            return None
        except Exception as error:  # noqa: BLE001 - a map or a call asks again by `perform`, and is told
            self.failed(error)
            return None

    def perform(self, requests: Sequence[Request]) -> list[Any]:
        resting = self.rest.reason()
        if resting is not None:
            return [Fault(resting)] * len(requests)
        written = {id(r): self._dump(r.value) for r in requests if isinstance(r, Keep)}
        fine = [r for r in requests if not isinstance(written.get(id(r)), Fault)]
        try:
            answers = self.answer(fine, {r: d for r, d in written.items() if isinstance(d, bytes)})
        except UnsafeCacheError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it costs the cache and not the call
            self.failed(error)
            answers = [Fault(error)] * len(fine)
        told = dict(zip(map(id, fine), answers, strict=True))
        for request in requests:
            if id(request) not in told:
                self.let_go(request.lease)
        return [told.get(id(r)) or written[id(r)] for r in requests]

    def _dump(self, value: Any) -> bytes | Fault:
        try:
            return self._format.dumps(value)
        except Exception as error:  # noqa: BLE001 - as above
            return Fault(error)

    # To be filled in.

    @property
    @abstractmethod
    def rest(self) -> Rest:
        """Leaves the backend alone while it is not well."""

    @abstractmethod
    def read(self, key: bytes) -> bytes | None:
        """The entry of a key."""

    @abstractmethod
    def answer(self, requests: Sequence[Request], written: dict[int, bytes]) -> list[Any]:
        """Answer in order; ``written`` has the entries to keep, by the ``id`` of their requests."""

    @abstractmethod
    def let_go(self, lease: Lease) -> None:
        """See `Store.let_go`."""

    @abstractmethod
    def failed(self, error: Exception) -> None:
        """Decide whether the backend needs a rest."""
