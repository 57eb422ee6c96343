"""Functions by value, through dill; what that cannot pickle goes through cloudpickle.

These are functions that call each other, enumerations and generic classes. Both would copy the classes of the main
module that a function mentions: these go by their names (`class_copies.py`). Both would give functions globals of their
own, where none sees what another has set. Those of functions of the main module are its own in the worker, too, or at
least one namespace for all that travel together.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import io
import pickle
import sys
import threading
from enum import EnumType
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NewType, ParamSpec, TypeVar, TypeVarTuple

import cloudpickle
import dill

from opero.concurrency.careful_dill import globals_used, raising
from opero.concurrency.main_module import (
    MAINS,
    find_in_main,
    globals_of_main,
    is_class_of_main,
    is_in_main,
    note_class,
)
from opero.core.signature import through_partials

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opero.concurrency.main_module import Classes

# Names of the main module that a worker which has them keeps as they are, when functions bring the parent's along; None
# for workers whose main module is not touched, because it may be another program's.
Kept = frozenset[str] | None


def dumps(
    thing: Any,
    mentioned: Classes,
    kept: Kept,
    *,
    by_value: Iterable[type] = (),
    is_here: Callable[[str], bool] | None = None,
    copies_locks: bool = True,
) -> bytes:
    """Pickle by value; notes which classes of the main module are mentioned.

    They go by name, but for those ``by_value``; so do functions of which ``is_here`` says that the worker has the name.
    Each process has locks of its own, unless there shall be none: ``copies_locks``.
    """
    identities = {id(cls) for cls in by_value}
    codes: set[_CodeKey] = set()

    def dumps_with(kind: Any) -> bytes:
        file = io.BytesIO()
        pickler = kind(file)
        pickler.by_value, pickler.mentioned, pickler.is_here, pickler.codes = identities, mentioned, is_here, codes
        pickler.globals_of_main, pickler.copies_locks = globals_of_main(), copies_locks
        pickler.dump(thing)
        return pickle.dumps((codes, kept, file.getvalue()), pickle.HIGHEST_PROTOCOL)

    try:
        with raising():
            return dumps_with(_DillPickler)
    except Exception as error:  # noqa: BLE001 - raised below
        try:
            return dumps_with(_CloudPickler)
        except Exception as others:
            # Where they go in circles, or dill would only have warned, cloudpickle tells the cause.
            if isinstance(error, (RecursionError, pickle.PicklingError)):
                raise others from None
            raise error from None


def loads(data: bytes) -> Any:
    codes, kept, pickled = pickle.loads(data)  # noqa: S301 - made by `dumps` in the parent process
    return _Unpickler(io.BytesIO(pickled), codes, kept).load()


def names_mentioned(function: Any) -> frozenset[str]:
    """The globals that a function of the main module, and those that it calls by their names, read or set."""
    mentioned: set[str] = set()
    coming = [_code_of(function)]
    while coming:
        code = coming.pop()
        names = set() if code is None else globals_used(code)
        coming.extend(_code_of(find_in_main(name)) for name in names - mentioned)
        mentioned |= names
    return frozenset(mentioned)


def _code_of(function: Any) -> CodeType | None:
    function = through_partials(function)
    is_function = inspect.isfunction(function) or inspect.ismethod(function)
    plain = inspect.unwrap(function if is_function else type(function).__call__)
    return getattr(plain, "__code__", None)


# Tells functions apart of which the pickles say no more.
_CodeKey = tuple[str, str, int, bytes]


def _key_of(code: CodeType) -> _CodeKey:
    return code.co_filename, code.co_name, code.co_firstlineno, code.co_code


class _ByNameInMain:
    by_value: set[int]
    mentioned: Classes
    is_here: Callable[[str], bool] | None
    codes: set[_CodeKey]
    globals_of_main: dict[str, Any]
    copies_locks: bool

    def reduced(self, obj: Any) -> Any:
        self.note_function(obj)
        if type(obj) not in _LOCKS:
            return _reduced(obj)
        if not self.copies_locks:
            msg = f"cannot pickle '{type(obj).__module__}.{type(obj).__name__}' object"
            raise TypeError(msg)
        # One that nobody holds: a copy of dill's of an RLock is held by nobody, and for ever.
        return _LOCKS[type(obj)], ()

    def note_function(self, obj: Any) -> None:
        # A decorator's wrapper calls itself one of the main module and has the globals of another.
        if isinstance(obj, FunctionType) and obj.__globals__ is self.globals_of_main:
            self.codes.add(_key_of(obj.__code__))

    def persistent_id(self, obj: Any) -> str | None:
        if isinstance(obj, FunctionType):
            is_here = self.is_here is not None and is_in_main(obj) and self.is_here(obj.__qualname__)
            return obj.__qualname__ if is_here else None
        if not is_class_of_main(obj):
            return None
        noted: Classes = {}
        if id(note_class(obj, noted)) in self.by_value:
            return None
        self.mentioned.update(noted)
        name: str = obj.__qualname__
        return name


def _reduced(obj: Any) -> Any:
    """What both would send as a name that the worker may not have."""
    if not isinstance(obj, (NewType, ParamSpec, TypeVarTuple)) or obj.__module__ not in MAINS:
        return NotImplemented
    supertype = (obj.__supertype__,) if isinstance(obj, NewType) else ()
    return _declare, (type(obj), obj.__name__, *supertype)


_LOCKS: dict[type, Callable[[], Any]] = {type(make()): make for make in (threading.Lock, threading.RLock)}


def _declare(kind: Callable[..., Any], *its: Any) -> Any:
    declared = kind(*its)
    declared.__module__ = "__main__"
    return declared


class _DillPickler(_ByNameInMain, dill.Pickler):  # type: ignore[misc]  # dill has no types
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, recurse=True)

    def reducer_override(self, obj: Any) -> Any:
        reduced = self.reduced(obj)
        if reduced is not NotImplemented:
            return reduced
        # dill would copy those that are not installed, with all that is in them.
        if isinstance(obj, ModuleType) and sys.modules.get(obj.__name__) is obj and obj.__name__ not in MAINS:
            return importlib.import_module, (obj.__name__,)
        if isinstance(obj, TypeVar) and obj.__module__ in MAINS:
            msg = f"dill sends the name of {obj} only"
            raise pickle.PicklingError(msg)
        if isinstance(obj, type) and obj.__module__ in MAINS and obj.__bases__ == (tuple,) and hasattr(obj, "_fields"):
            msg = f"dill leaves out the methods of {obj}"
            raise pickle.PicklingError(msg)
        return NotImplemented


class _CloudPickler(_ByNameInMain, cloudpickle.Pickler):  # type: ignore[misc]  # as above
    def reducer_override(self, obj: Any) -> Any:
        reduced: Any = self.reduced(obj)
        if reduced is NotImplemented:
            reduced = super().reducer_override(obj)
            if isinstance(obj, type) and isinstance(reduced, tuple) and reduced[-1] is _set_class_state:
                return _whole(obj, *reduced)
        return reduced


def _whole(cls: type, make: Any, its: tuple[Any, ...], state: Any, *_: Any) -> Any:
    """With what cloudpickle (3.1) leaves out: the qualified name, aliases, and what an ``__init__`` sets in members."""
    members: dict[str, dict[str, Any]] = {}
    aliases: dict[str, Any] = {}
    if isinstance(cls, EnumType):
        known = vars(cls)["_member_map_"]
        canonical = cls._member_names_
        members = {n: {k: v for k, v in vars(known[n]).items() if k not in _OF_ENUM} for n in canonical}
        aliases = {name: member.value for name, member in known.items() if name not in canonical}
    return make, its, (cls.__qualname__, state, members, aliases), None, None, _set_whole


def _set_whole(cls: Any, whole: tuple[str, Any, dict[str, dict[str, Any]], dict[str, Any]]) -> None:
    cls.__qualname__, state, members, aliases = whole
    _set_class_state(cls, state)
    for name, attributes in members.items():
        vars(cls.__members__[name]).update(attributes)
    for name, value in aliases.items():
        member = cls(value)
        if member.name not in members:  # a combination of flags
            member._name_ = name
        cls._member_map_[name] = member
        if name not in vars(cls):
            type.__setattr__(cls, name, member)


_OF_ENUM = {"_value_", "_name_", "__objclass__", "_sort_order_"}
_set_class_state: Any = cloudpickle.cloudpickle._class_setstate  # noqa: SLF001 - see `_Unpickler`


class _Unpickler(dill.Unpickler):  # type: ignore[misc]  # dill has no types
    """Gives the functions with these codes the globals that they share.

    It knows by what dill (0.4) and cloudpickle (3.1) make functions: neither can be told where their globals are.
    """

    def __init__(self, file: io.BytesIO, codes: set[_CodeKey], kept: Kept) -> None:
        super().__init__(file)
        self._codes = codes
        self._namespace = _Namespace.its_own() if kept is None else _Namespace.of_main(kept)
        # What dill would make globals of, and fills bit by bit; by their identity, with how much was in them.
        self._stand_ins: dict[int, tuple[dict[str, Any], int]] = {}

    def load(self) -> Any:
        loaded = super().load()
        self._share()
        return loaded

    def persistent_load(self, name: str) -> Any:
        self._share()
        found = find_in_main(name)
        if found is None:
            msg = f"the main module of this worker has no {name}"
            raise AttributeError(msg)
        return found

    def find_class(self, module: str, name: str) -> Any:
        self._share()
        found = super().find_class(module, name)
        # By identity: not all that is found can be compared.
        ours = _INSTEAD.get(id(found))
        return found if ours is None else partial(getattr(self, ours), found)

    def _make_function(self, make: Any, code: CodeType, its_globals: dict[str, Any], *others: Any) -> Any:
        if _key_of(code) not in self._codes:
            return make(code, its_globals, *others)
        self._stand_ins.setdefault(id(its_globals), (its_globals, 0))
        function = FunctionType(code, self._namespace.names, *others)
        function.__module__ = "__main__"
        return function

    def _make_class(self, make: Any, *its: Any) -> Any:
        # Its metaclass and what it is decorated with may be called.
        self._share()
        return make(*its)

    def _set_state(self, set_state: Any, function: Any, state: Any) -> None:
        names = function.__globals__
        if names is not self._namespace.names:
            set_state(function, state)
            return
        self._namespace.put(state[1]["__globals__"])
        state[1]["__globals__"] = {}
        before = names["__builtins__"]
        set_state(function, state)
        names["__builtins__"] = before

    def _share(self) -> None:
        for place, (filled, shared) in self._stand_ins.items():
            if len(filled) > shared:
                self._namespace.put(filled)
                self._stand_ins[place] = filled, len(filled)


_INSTEAD = {
    id(dill._dill._create_function): "_make_function",  # noqa: SLF001 - see `_Unpickler`
    id(dill._dill._create_type): "_make_class",  # noqa: SLF001 - as above
    id(cloudpickle.cloudpickle._make_function): "_make_function",  # noqa: SLF001 - as above
    id(cloudpickle.cloudpickle._function_setstate): "_set_state",  # noqa: SLF001 - as above
}


class _Namespace:
    """Globals that functions share, and what they bring along for it."""

    def __init__(self, names: dict[str, Any], kept: frozenset[str], put: set[str]) -> None:
        self.names = names
        self._kept = kept
        self._put = put

    @classmethod
    def its_own(cls) -> _Namespace:
        return cls({"__name__": "__main__", "__builtins__": builtins}, frozenset(), set())

    @classmethod
    def of_main(cls, kept: frozenset[str]) -> _Namespace:
        return cls(globals_of_main(), kept, _names_put)

    def put(self, brought: dict[str, Any]) -> None:
        for name, value in brought.items():
            # What was put here once may have been changed here since; and a module's own `__name__` stays.
            stays = name in self._put or name in self._kept or name.startswith("__")
            if name not in self.names or not stays:
                self.names[name] = value
                self._put.add(name)


# The names that functions have brought along to this process's main module.
_names_put: set[str] = set()
