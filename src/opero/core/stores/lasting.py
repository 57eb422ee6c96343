"""What the stores have in common that outlive the process: entries as bytes, and that a fault costs no call.

An entry says how it was written: two letters for the version of this format, one for the kind (a pickle, JSON, or an
error in place of a result), one for the compression, a checksum, when the result ends (seconds since the epoch), then
the payload. So functions with different options can share a namespace, an entry of another version is never misread,
and a damaged one is noticed before it is unpickled. A function that writes JSON takes an entry that says it is a pickle
for damaged: whoever can write to the cache could have put it there to run code.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import struct
import sys
import zlib
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from opero.core.clock import clock
from opero.core.digests import UncacheableError, spelling_of
from opero.core.faults import Complaints, Rest
from opero.core.steps import Failed
from opero.core.stores.flights import Flights
from opero.exceptions import UnsafeCacheError
from opero.utils.notes import reduced_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.core.stores.flights import Flight, Keep
    from opero.core.stores.settings import Cache

_VERSION = b"o2"
# Version and kind, checksum, end.
_HEAD = struct.Struct(">4sId")
_ENDS = struct.Struct(">d")
_PICKLE_PROTOCOL = 5
# What a few kilobytes could grow to when they are decompressed.
MOST_BYTES = 2**28
# As deep as JSON is read where the program has raised the limit of recursion: the stack of C has a limit of its own.
_MOST_LEVELS = 1_000
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{\]}]')


def slug(namespace: str) -> str:
    """A name for files and redis keys: readable, and different for different namespaces."""
    readable = re.sub(r"[^A-Za-z0-9_.]+", "-", namespace)[-48:].strip("-.")
    return f"{readable}-{blake2b(namespace.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"


class LastingStore:
    """A store of bytes that other processes use, too; the backends fill in the access to it."""

    is_instant: ClassVar[bool] = False

    def __init__(self, what: str, settings: Cache, rest: Rest) -> None:
        self.settings = settings
        self.flights = Flights()
        self.format = EntryFormat(settings.options["serializer"], settings.options["compress"])
        # Tells the log, the first time loudly.
        self.complain = Complaints(what).tell
        # Leaves the backend alone while it is not well.
        self.rest = rest
        self._what = what

    def read(self, key: bytes) -> bytes | None:
        """The entry of a key."""
        raise NotImplementedError

    def failed(self, error: Exception) -> None:
        """Decide whether the backend needs a rest."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self._what

    def look_up(self, key: bytes) -> tuple[Any] | None:
        """The result of a key; faults are None, and come to light when it is claimed."""
        try:
            found = self.in_spite_of_faults(self.find, key)
        except UnsafeCacheError:
            return None
        return None if isinstance(found, Exception) else found

    def find(self, key: bytes) -> tuple[Any] | None:
        """As `look_up`, but raises what the backend raises."""
        entry = self.read(key)
        return None if entry is None else self.fresh(entry)

    def fresh(self, entry: bytes) -> tuple[Any] | None:
        """The result in an entry that has not ended."""
        value, ends = self.format.loads(entry)
        return None if type(value) is Failed or ends <= clock.wall() else (value,)

    def in_spite_of_faults(self, work: Callable[..., Any], *args: Any) -> Any:
        """What some work with the backend gives; an exception if that failed, or is not tried now."""
        reason = self.rest.reason()
        if reason is not None:
            return reason
        try:
            done = work(*args)
        except UnsafeCacheError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it costs the cache and not the call
            self.failed(error)
            return error
        self.rest.end()
        return done

    def write_down(self, keep: Keep) -> Exception | None:
        """Write the entry for what is to be kept; gives why that failed."""
        ends = math.inf if keep.ttl is None else clock.wall() + keep.ttl
        try:
            keep.flight.written = self.format.dumps(keep.value, ends)
        except Exception as error:  # noqa: BLE001 - a result that cannot be written costs the cache and not the call
            return error
        return None

    def is_found(self, flight: Flight, entry: bytes) -> bool:
        """Note what was found for a claim; tells whether it is the answer, or only of use if the call fails."""
        value, ends = self.format.loads(entry)
        ago = clock.wall() - ends
        if ago < 0:
            flight.found, flight.written = value, entry
        elif ago < flight.stale and type(value) is not Failed:
            flight.old = value, entry
        return ago < 0


class DamagedEntryError(ValueError):
    """Bytes that opero did not write, or that have changed since, or a pickle where none is trusted."""


class EntryFormat(NamedTuple):
    """How one function's results are written, and which entries it reads: those of JSON, and pickles if it pickles."""

    serializer: str = "pickle"
    compress: bool = False

    def dumps(self, value: Any, ends: float) -> bytes:
        """The entry for a result, or for the error in a `Failed`; raises whatever the serializer raises."""
        if type(value) is Failed:
            kind, payload = b"E", _error(value.error)
        elif self.serializer == "json":
            kind, payload = b"J", _json(value)
        else:
            kind, payload = b"P", pickle.dumps(value, _PICKLE_PROTOCOL)
        if self.compress:
            payload = zlib.compress(payload)
        rest = _ENDS.pack(ends) + payload
        return _VERSION + kind + (b"Z" if self.compress else b"-") + zlib.crc32(rest).to_bytes(4, "big") + rest

    def loads(self, entry: bytes) -> tuple[Any, float]:
        """The result in an entry, and when it ends.

        Raises:
            DamagedEntryError: If these are not bytes that `dumps` made, or a pickle where the serializer is JSON.
        """
        kind, checksum, ends = _HEAD.unpack_from(entry) if len(entry) >= _HEAD.size else (b"", 0, 0.0)
        checked = memoryview(entry)[_HEAD.size - _ENDS.size :]
        # An end before 1970, or one that is no number, is in no order with the times that a server compares it with.
        if kind not in _KINDS or zlib.crc32(checked) != checksum or not ends >= 0:
            raise DamagedEntryError("the entry is damaged, or was not written by this version of opero")
        is_json = kind[2:3] == b"J"
        if self.serializer == "json" and not is_json:
            raise DamagedEntryError("the entry is a pickle, which is never read with the serializer 'json'")
        payload: memoryview | bytes = checked[_ENDS.size :]
        if kind[3:] == b"Z":
            decompressor = zlib.decompressobj()
            payload = decompressor.decompress(payload, MOST_BYTES)
            if not decompressor.eof:
                raise DamagedEntryError("the entry is damaged, or larger than any that opero compresses")
        if is_json:
            return _of_json(str(payload, "utf-8")), ends
        value = pickle.loads(payload)  # noqa: S301 - the folder is the user's alone; a redis server is trusted by whoever names it
        return (Failed(value) if kind[2:3] == b"E" else value), ends


_KINDS = frozenset(_VERSION + kind for kind in (b"P-", b"PZ", b"J-", b"JZ", b"E-", b"EZ"))


class _ErrorPickler(pickle.Pickler):
    """Pickles an exception, and those in it, whatever their `__init__` takes."""

    def reducer_override(self, obj: Any) -> Any:
        return reduced_error(obj) if isinstance(obj, BaseException) else NotImplemented


def _error(error: Exception) -> bytes:
    file = io.BytesIO()
    _ErrorPickler(file, _PICKLE_PROTOCOL).dump(error)
    return file.getvalue()


def _of_json(text: str) -> Any:
    if sys.getrecursionlimit() > _MOST_LEVELS:
        level = 0
        for found in _BRACKETS.finditer(text):
            level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
            if level > _MOST_LEVELS:
                raise DamagedEntryError("the entry is nested too deeply")
    return json.loads(text)


def _json(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":"))
    # What JSON changes (tuples, keys that are not text) would make a cached result differ from a fresh one.
    if spelling_of(json.loads(text)) != spelling_of(value):
        msg = f"JSON cannot hold this {type(value).__qualname__} unchanged; use the serializer 'pickle'"
        raise UncacheableError(msg)
    return text.encode()
