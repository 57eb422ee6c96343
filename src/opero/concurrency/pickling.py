"""How objects are pickled for workers and by them: by cloudpickle's rules, with two additions.

What a worker has of the main module goes by its name: there it is the worker's own, with what an initializer has set.
A class that goes by value is made once in each process and found again by its token: so it is one class in the caller
and in the worker, for `except` and ``retry_on``, whichever of them names it.
"""

from __future__ import annotations

import io
import os
import pickle
import threading
import weakref
from collections import ChainMap
from hashlib import blake2b
from types import CellType, CodeType, FunctionType
from typing import TYPE_CHECKING, Any, NewType, ParamSpec, TypeVarTuple

import cloudpickle

from opero.concurrency.main_module import MAINS, find_in_main, path_of_main
from opero.core.signature import find_by_name
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable

PROTOCOL = pickle.HIGHEST_PROTOCOL
loads = pickle.loads

_LOCKS: dict[type, Callable[[], Any]] = {type(make()): make for make in (threading.Lock, threading.RLock)}


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """Pickles for processes of which ``has`` tells whether they have a qualified name of the main module.

    Args:
        file: Where to.
        has: See above.
        reducers: More of those that a pickler's ``dispatch_table`` has.
        buffer_callback: As in `pickle.Pickler`.
    """

    # Each process has locks of its own: what a function or class of the program's holds is made anew.
    copies_locks = False
    # The worker may be another program's, and may have the classes of this one's main module.
    asks_for_main = False

    def __init__(
        self, file: io.BytesIO, has: Callable[[str], bool], *, reducers: Any = None, buffer_callback: Any = None
    ) -> None:
        if reducers is not None:
            # Before the pickler in C looks for it.
            of_cloudpickle: Any = cloudpickle.Pickler.dispatch_table
            self.dispatch_table: Any = ChainMap(reducers, of_cloudpickle)
        super().__init__(file, PROTOCOL, buffer_callback=buffer_callback)
        self._has = has

    def dump_with_locks(self, thing: Any) -> None:
        """Pickle a function of the program's, which may hold locks."""
        self.copies_locks = True
        self.dump(thing)
        self.copies_locks = False

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if issubclass(kind, type):
            return self._reduce_class(obj)
        if kind is FunctionType:
            return self._reduce_function(obj)
        if kind in _LOCKS and self.copies_locks:
            return _LOCKS[kind], ()
        if kind in (NewType, ParamSpec, TypeVarTuple) and obj.__module__ in MAINS and not self._goes_by_name(obj):
            supertype = (obj.__supertype__,) if kind is NewType else ()
            return _declare, (kind, obj.__name__, *supertype)
        return NotImplemented

    def _goes_by_name(self, thing: Any) -> bool:
        name = getattr(thing, "__qualname__", thing.__name__)
        return thing.__module__ in MAINS and self._has(name) and find_in_main(name) is thing

    def _reduce_class(self, cls: type) -> Any:
        if self._goes_by_name(cls):
            return NotImplemented
        reduced: Any = super().reducer_override(cls)
        if not isinstance(reduced, tuple) or len(reduced) != len(_STATED):
            return reduced
        make, its, state, _, _, set_state = reduced
        where = (str(path_of_main()), cls.__qualname__) if self.asks_for_main and cls.__module__ in MAINS else None
        state = (set_state, state, cls.__qualname__)
        return _make_class, (_token_of(cls), where, make, its), state, None, None, _complete_class

    def _reduce_function(self, function: FunctionType) -> Any:
        if self._goes_by_name(function):
            return NotImplemented
        named = by_name(function)
        if named is not None and self._may_name(*named):
            return undecorated, named
        return super().reducer_override(function)

    def _may_name(self, module: str, qualname: str, depth: int) -> bool:
        if module in MAINS:
            return self._has(qualname)
        return depth > 0 and not is_registered_by_value(module)


# What cloudpickle gives for a class by value: with a state, and a function that sets it.
_STATED = ("make", "arguments", "state", "items", "pairs", "set_state")


class ReportPickler(Pickler):
    """Pickles in a worker for its parent, which knows the classes that it has sent."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, has=lambda _: True)

    def _reduce_class(self, cls: type) -> Any:
        token = _tokens.get(id(cls), (None, b""))[1]
        return (_known_class, (token,)) if token in _arrived else super()._reduce_class(cls)


def report_dumps(thing: Any) -> bytes:
    """Pickle in a worker; in C if that can do it."""
    try:
        return pickle.dumps(thing, PROTOCOL)
    except Exception:  # noqa: BLE001 - anything may happen in a user's __getstate__; below it is raised again
        file = io.BytesIO()
        ReportPickler(file).dump(thing)
        return file.getvalue()


def is_registered_by_value(module: str) -> bool:
    """Whether the program has told cloudpickle to send what a module, or the package that it is in, has by value."""
    registered: set[str] = cloudpickle.list_registry_pickle_by_value()
    return any(module == name or module.startswith(f"{name}.") for name in registered)


def by_name(function: Any) -> tuple[str, str, int] | None:
    """A function's module, its name, and how often what has that name now is wrapped around it."""
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str):
        return None
    found, depth = find_by_name(module, qualname), 0
    while found is not None and found is not function:
        found, depth = getattr(found, "__wrapped__", None), depth + 1
    return None if found is None else (module, qualname, depth)


def undecorated(module: str, qualname: str, depth: int) -> Any:
    found: Any = __import__(module, fromlist=["*"])
    for part in qualname.split("."):
        found = getattr(found, part)
    for _ in range(depth):
        found = getattr(found, "__wrapped__", found)
    return found


def _declare(kind: Callable[..., Any], *its: Any) -> Any:
    declared = kind(*its)
    declared.__module__ = "__main__"
    return declared


# Classes by value

# Those that this process has sent or that have arrived, by their identity (they need not be hashable); those by token.
_tokens: dict[int, tuple[weakref.ref[type] | None, bytes]] = {}
_sent: weakref.WeakValueDictionary[bytes, type] = weakref.WeakValueDictionary()
_arrived: dict[bytes, type] = {}
_unfinished: dict[int, bytes] = {}


def _token_of(cls: type) -> bytes:
    known, token = _tokens.get(id(cls), (None, b""))
    if known is None or known() is not cls:
        token = os.urandom(16)
        _tokens[id(cls)] = weakref.ref(cls), token
        _sent[token] = cls
    return token


def _known_class(token: bytes) -> type:
    return _arrived[token] if token in _arrived else _sent[token]


def _make_class(token: bytes, where: tuple[str, str] | None, make: Callable[..., type], its: tuple[Any, ...]) -> type:
    known = _arrived.get(token, _sent.get(token))
    if known is None and where is not None and where[0] == str(path_of_main()):
        known = find_in_main(where[1])
    if isinstance(known, type):
        return known
    made = make(*its)
    _unfinished[id(made)] = token
    return made


def _complete_class(cls: Any, state: tuple[Callable[..., None], Any, str]) -> None:
    """Fill a class that has just been made; one that was here keeps what has been changed here."""
    token = _unfinished.pop(id(cls), None)
    if token is not None:
        set_state, its, cls.__qualname__ = state
        set_state(cls, its)
        _arrived[token] = cls
        _tokens[id(cls)] = weakref.ref(cls), token


# Functions for workers of which nobody knows whether they have them


def either(function: Any, has: Callable[[str], bool]) -> Any:
    """What is unpickled as a worker's own function of the main module if that has the same one, else as a copy."""
    named = by_name(function)
    if named is None or named[0] not in MAINS:
        return function
    try:
        file = io.BytesIO()
        pickler = Pickler(file, has)
        pickler.copies_locks = pickler.asks_for_main = True
        pickler.dump(function)
        valued, problem = file.getvalue(), ""
    except Exception as error:  # noqa: BLE001 - it may mention what is of no use elsewhere, as a connection
        valued, problem = b"", describe(error)
    return _Either(named, _fingerprint(function), valued, problem)


class _Either:
    def __init__(self, *its: Any) -> None:
        self._its = its

    def __reduce__(self) -> Any:
        return _own_or_copy, self._its


def _own_or_copy(named: tuple[str, str, int], fingerprint: bytes, valued: bytes, problem: str) -> Any:
    try:
        own = undecorated("__main__", *named[1:])
        if not valued or _fingerprint(own) == fingerprint:
            return own
    except AttributeError as error:
        if not valued:
            msg = f"{error}, and it cannot be sent by value: {problem}"
            raise AttributeError(msg) from None
    return loads(valued)


def _fingerprint(function: Any) -> bytes:
    """The same for the same code and what it is bound to, wherever its file lies."""
    digest = blake2b(digest_size=16)
    seen: set[int] = set()
    coming: list[Any] = [function]
    while coming:
        thing = coming.pop()
        if isinstance(thing, CodeType):
            digest.update(thing.co_code + repr((thing.co_names, thing.co_varnames)).encode(errors="replace"))
            coming.extend(thing.co_consts)
        elif isinstance(thing, FunctionType):
            if id(thing) not in seen:
                seen.add(id(thing))
                cells = [cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell)]
                coming.extend([thing.__code__, thing.__defaults__, thing.__kwdefaults__, *cells])
        elif isinstance(thing, (tuple, frozenset, dict)):
            digest.update(type(thing).__name__.encode())
            # Of a set the order is another in each process.
            coming.extend(sorted(thing, key=repr) if isinstance(thing, frozenset) else thing)
            coming.extend(thing.values() if isinstance(thing, dict) else ())
        elif thing is None or isinstance(thing, (int, float, complex, str, bytes)):
            digest.update(repr(thing).encode(errors="replace"))
    return digest.digest()


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - asked whether there is one
    except ValueError:
        return False
    return True
