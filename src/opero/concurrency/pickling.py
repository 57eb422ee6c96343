"""How objects are pickled for workers and by them: by cloudpickle's rules, with two additions.

What a worker has of the main module goes by its name: there it is the worker's own, with what an initializer has set.
A class that goes by value is made once in each process and found again by its id: so it is one class in the caller
and in the worker, for `except` and ``retry_on``, whichever of them names it.
"""

from __future__ import annotations

import io
import pickle
import threading
import weakref
from collections import ChainMap
from types import FunctionType
from typing import TYPE_CHECKING, Any, NewType, ParamSpec, TypeVarTuple

import cloudpickle

from opero.concurrency.main_module import MAINS, everything
from opero.core.signature import find_by_name

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
    # Whoever unpickles it has sent the classes that have arrived here.
    is_answer = False

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
        return thing.__module__ in MAINS and self._has(name) and find_by_name("__main__", name) is thing

    def _reduce_class(self, cls: type) -> Any:
        if self._goes_by_name(cls):
            return NotImplemented
        reduced: Any = super().reducer_override(cls)
        if not isinstance(reduced, tuple) or len(reduced) != len(_STATED):
            return reduced
        make, its, state, _, _, set_state = reduced
        its_id = its[-2]
        if self.is_answer and its_id in _arrived:
            return _known_class, (its_id,)
        _classes[its_id] = cls
        where = (cls.__base__, id(cls), cls.__qualname__)
        state = (set_state, state, cls.__qualname__)
        return _class_by_value, (its_id, where, make, its), state, None, None, _fill_class

    def _reduce_function(self, function: FunctionType) -> Any:
        """By name, if workers have it, also where what has that name now is wrapped around it; else as cloudpickle."""
        module, name = function.__module__, function.__qualname__
        found, depth = find_by_name(module, name), 0
        while found is not None and found is not function:
            found, depth = getattr(found, "__wrapped__", None), depth + 1
        if found is function:
            if module in MAINS:
                is_there = self._has(name)
            else:
                # Unless the program has told cloudpickle to send what the module, or its package, has by value.
                is_there = depth > 0 and not any(
                    f"{module}.".startswith(f"{registered}.")
                    for registered in cloudpickle.list_registry_pickle_by_value()
                )
            if is_there:
                return undecorated, (module, name, depth)
        return super().reducer_override(function)


# What cloudpickle gives for a class by value: with a state, and a function that sets it.
_STATED = ("make", "arguments", "state", "items", "pairs", "set_state")


class ReportPickler(Pickler):
    """Pickles in a worker for its parent, which knows the classes that it has sent."""

    is_answer = True

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, everything)


def report_dumps(thing: Any) -> bytes:
    """Pickle in a worker; in C if that can do it."""
    try:
        return pickle.dumps(thing, PROTOCOL)
    except Exception:  # noqa: BLE001 - anything may happen in a user's __getstate__; below it is raised again
        file = io.BytesIO()
        ReportPickler(file).dump(thing)
        return file.getvalue()


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


# Classes by value, by cloudpickle's ids of them: those that this process has sent or that have arrived, the latter also
# alone; and those that arrive at the moment.
_classes: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
_arrived: dict[str, type] = {}
_unfilled: list[type] = []


def _known_class(its_id: str) -> type:
    return _classes[its_id]


def _class_by_value(its_id: str, where: tuple[type, int, str], make: Callable[..., type], its: tuple[Any, ...]) -> type:
    known = _classes.get(its_id)
    if known is None:
        known = _found_in_place(*where)
    if known is None:
        known = _arrived[its_id] = make(*its)
        _unfilled.append(known)
    _classes[its_id] = known
    return known


def _found_in_place(base: type, address: int, qualname: str) -> type | None:
    """The same class in a process that was forked from the other, or the reverse: it is where it was."""
    classes: list[type] = type.__subclasses__(base)
    return next((cls for cls in classes if id(cls) == address and cls.__qualname__ == qualname), None)


def _fill_class(cls: Any, state: tuple[Callable[..., None], Any, str]) -> None:
    """Fill a class that has just been made; one that was here keeps what has been changed here."""
    if cls in _unfilled:
        _unfilled.remove(cls)
        set_state, its, cls.__qualname__ = state
        set_state(cls, its)
