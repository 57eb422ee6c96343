"""Results as bytes and back.

An entry says how it was written: one letter for the serializer, one for the compression, a checksum, then the payload.
So functions with different options can share a namespace, and a damaged entry is noticed before it is unpickled. A
function that writes JSON takes an entry that says it is a pickle for damaged: whoever can write to the cache could have
put it there to run code.
"""

from __future__ import annotations

import json
import pickle
import zlib
from typing import Any

from opero.core.digests import UncacheableError, spelling_of

_HEAD = 6
_PICKLE_PROTOCOL = 5


class DamagedEntryError(ValueError):
    """Bytes that opero did not write, or that have changed since, or a pickle where none is trusted."""


class EntryFormat:
    """How one function's results are written, and which entries it reads: those of JSON, and pickles if it pickles."""

    def __init__(self, serializer: str = "pickle", *, compress: bool = False) -> None:
        self._serializer = serializer
        self._compress = compress

    def dumps(self, value: Any) -> bytes:
        """The entry for a result; raises whatever the serializer raises."""
        kind, payload = (b"J", _json(value)) if self._serializer == "json" else (b"P", _pickle(value))
        if self._compress:
            payload = zlib.compress(payload)
        return kind + (b"Z" if self._compress else b"-") + zlib.crc32(payload).to_bytes(4, "big") + payload

    def loads(self, entry: bytes) -> Any:
        """The result in an entry.

        Raises:
            DamagedEntryError: If these are not bytes that `dumps` made, or a pickle where the serializer is JSON.
        """
        payload = entry[_HEAD:]
        if entry[:2] not in _HEADS or zlib.crc32(payload) != int.from_bytes(entry[2:_HEAD], "big"):
            msg = "the entry is damaged, or was not written by opero"
            raise DamagedEntryError(msg)
        is_pickle = entry[:1] == b"P"
        if is_pickle and self._serializer == "json":
            msg = "the entry is a pickle, which is never read with the serializer 'json'"
            raise DamagedEntryError(msg)
        if entry[1:2] == b"Z":
            payload = zlib.decompress(payload)
        return pickle.loads(payload) if is_pickle else json.loads(payload)  # noqa: S301 - the folder is the user's alone; a redis server is trusted by whoever names it


_HEADS = frozenset({b"P-", b"PZ", b"J-", b"JZ"})


def _pickle(value: Any) -> bytes:
    return pickle.dumps(value, _PICKLE_PROTOCOL)


def _json(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":"))
    # What JSON changes (tuples, keys that are not text) would make a cached result differ from a fresh one.
    if spelling_of(json.loads(text)) != spelling_of(value):
        msg = f"JSON cannot hold this {type(value).__qualname__} unchanged; use the serializer 'pickle'"
        raise UncacheableError(msg)
    return text.encode()
