"""Digests: keys that are the same in every process, and from which no argument can be read."""

from __future__ import annotations

import marshal
import pickle
import re
import types
from hashlib import blake2b
from typing import Any

from opero.core.keys import PLAIN_TYPES, Opaque, UncacheableError
from opero.utils.notes import describe

SIZE = 20
# Old enough for every supported Python, so that they share their entries.
_PICKLE_PROTOCOL = 4
# Later versions of the format note which objects are one and the same, so that equal values look different.
_MARSHAL_VERSION = 2
# One module under two names: in worker processes, and in Python 3.13.
_SAME_MODULES = {"__mp_main__": "__main__", "pathlib._local": "pathlib"}
_NAMED = (type, types.FunctionType)
_OF_NAMES = re.compile(r"\w+: (cannot pickle '[^']*' object|Can't (pickle|get) local object '[^']*')")


def digest_of_plain(values: tuple[Any, ...]) -> bytes:
    """The digest of values that are all of exactly the `PLAIN_TYPES`, which `marshal` tells apart."""
    try:
        spelt = marshal.dumps(values, _MARSHAL_VERSION)
    except ValueError as error:
        msg = "an argument only pretends to be of a plain type; give cache_key="
        raise UncacheableError(msg) from error
    return blake2b(spelt, digest_size=SIZE, person=b"plain").digest()


def digest_of(frozen: Any) -> bytes:
    """The digest of what `opero.core.keys.freeze` made within ``values_only``."""
    return blake2b(marshal.dumps(_spell(frozen), _MARSHAL_VERSION), digest_size=SIZE, person=b"frozen").digest()


def _spell(frozen: Any) -> Any:
    """Values for `marshal`: lists, which never occur in a frozen form, say what is not a plain value or a tuple."""
    kind = frozen.__class__
    if kind in PLAIN_TYPES:
        return frozen
    if kind is tuple:
        return tuple([_spell(part) for part in frozen])
    if kind is frozenset:
        return ["set", sorted(marshal.dumps(_spell(part), _MARSHAL_VERSION) for part in frozen)]
    if isinstance(frozen, type):
        return _spell_name("type", frozen)
    if kind is not Opaque:
        return ["pickle", _pickle(frozen)]
    pickled = _pickle(frozen.value)
    # A pickle has the name, too, but the module as it is called in this process.
    return _spell_name("named", frozen.value) if isinstance(frozen.value, _NAMED) else ["pickle", pickled]


def _spell_name(what: str, named: Any) -> Any:
    return [what, _SAME_MODULES.get(named.__module__, named.__module__), named.__qualname__]


def _pickle(value: Any) -> bytes:
    try:
        return pickle.dumps(value, _PICKLE_PROTOCOL)
    except Exception as error:
        msg = f"a {type(value).__qualname__} cannot be pickled ({_reason(error)})"
        raise UncacheableError(msg) from error


def _reason(error: Exception) -> str:
    """Why something cannot be pickled; the text only where it has no more than names, others may show the value."""
    text = describe(error)
    return text if _OF_NAMES.fullmatch(text) else type(error).__name__
