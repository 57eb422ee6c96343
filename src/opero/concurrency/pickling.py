"""How objects are pickled for workers and by them: by cloudpickle's rules, with additions.

What a worker has of the main module goes by its name: there it is the worker's own, with what an initializer has set.
A class that goes by value is made once in each process and found again by its id: so it is one class in the caller
and in the worker, for `except` and ``retry_on``, whichever of them names it. Exceptions arrive with what they were
raised from.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import logging
import mmap
import os
import pickle
import threading
import traceback
import weakref
from abc import ABCMeta
from collections import ChainMap
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from multiprocessing.reduction import ForkingPickler
from operator import attrgetter
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any, NewType, ParamSpec, TypeVarTuple

import cloudpickle

from opero.concurrency.main_module import MAINS
from opero.core.signature import find_by_name
from opero.exceptions import RemoteError
from opero.utils.notes import (
    IN_THE_WORKER,
    add_note,
    describe,
    drop_notes,
    fields_of,
    link,
    says_how_it_is_pickled,
    set_error,
    users_part,
)

if TYPE_CHECKING:
    from collections.abc import Callable

PROTOCOL = pickle.HIGHEST_PROTOCOL
loads = pickle.loads
# Values of these types can be pickled and unpickled in any company.
PLAIN = frozenset({int, float, str, bytes, bool, type(None)})
# Below that a pipe is as fast as a file that is shared.
_LEAST_SHARED = 1_000_000

_LOCKS: dict[type, Callable[[], Any]] = {type(make()): make for make in (threading.Lock, threading.RLock)}


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """Pickles for processes that have some names of the main module.

    Args:
        names: Those; None for processes that have all of it, because they were forked, or are the parent.
        large: Gets large arrays, while a process is being started: pipes and locks can be inherited then.
        is_answer: Whoever unpickles it has sent the classes that have arrived here.
    """

    # Each process has locks of its own: what a function or class of the program's holds is made anew.
    copies_locks = False

    def __init__(
        self, names: frozenset[str] | None, *, large: list[memoryview] | None = None, is_answer: bool = False
    ) -> None:
        buffer_callback = None
        if large is not None:
            buffer_callback = partial(_stays, large)
            of_cloudpickle: Any = cloudpickle.Pickler.dispatch_table
            # Before the pickler in C looks for it.
            self.dispatch_table: Any = ChainMap(ForkingPickler(io.BytesIO()).dispatch_table, of_cloudpickle)
        self.file = io.BytesIO()
        super().__init__(self.file, PROTOCOL, buffer_callback=buffer_callback)
        self._names = names
        self._is_answer = is_answer

    def dumps(self, thing: Any) -> bytes:
        """Pickle one more thing; gives all of them."""
        self.dump(thing)
        return self.file.getvalue()

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if issubclass(kind, type):
            return self._reduce_class(obj)
        if kind is FunctionType:
            return self._reduce_function(obj)
        if kind in _LOCKS and self.copies_locks:
            return _LOCKS[kind], ()
        if kind.__module__ == "numpy" and kind.__name__ == "memmap" and not self._is_answer:
            return _reduce_memmap(obj)
        if kind in (NewType, ParamSpec, TypeVarTuple) and obj.__module__ in MAINS and not self._goes_by_name(obj):
            supertype = (obj.__supertype__,) if kind is NewType else ()
            # As of slots: some have no `__dict__`.
            return kind, (obj.__name__, *supertype), (None, {"__module__": "__main__"})
        return NotImplemented

    def _goes_by_name(self, thing: Any) -> bool:
        name = getattr(thing, "__qualname__", thing.__name__)
        return thing.__module__ in MAINS and self._has(name) and find_by_name("__main__", name) is thing

    def _has(self, name: str) -> bool:
        return self._names is None or name.partition(".")[0] in self._names

    def _reduce_class(self, cls: type) -> Any:
        if self._goes_by_name(cls):
            return NotImplemented
        reduced: Any = super().reducer_override(cls)
        if not isinstance(reduced, tuple):
            return reduced
        make, its, *by_value = reduced
        if not by_value:
            return reduced
        state, *_, set_state = by_value
        its_id = its[-2]
        where = (cls.__base__, id(cls), cls.__qualname__)
        if type(cls) in {type, ABCMeta} and vars(cls).get("__slots__"):
            # cloudpickle (3.1.3) makes it without, and its instances, which have a `__dict__` then, do not come back.
            its[-3]["__slots__"] = vars(cls)["__slots__"]
        if self._is_answer and its_id in _arrived:
            return _class_by_value, (its_id, where)
        _classes[its_id] = cls
        state = (its_id, cls.__qualname__, set_state, state)
        return _class_by_value, (its_id, where, make, its), state, None, None, _fill_class

    def _reduce_function(self, function: FunctionType) -> Any:
        """By name, if workers have it, also where what has that name now is wrapped around it; else as cloudpickle."""
        module, name = function.__module__, function.__qualname__
        found, depth = find_by_name(module, name), 0
        while found is not None and found is not function:
            found, depth = getattr(found, "__wrapped__", None), depth + 1
        # Those of other modules, unless the program has told cloudpickle to send what the module has by value.
        by_value = () if module in MAINS else cloudpickle.list_registry_pickle_by_value()
        is_there = self._has(name) if module in MAINS else depth > 0
        if found is function and is_there and not any(f"{module}.".startswith(f"{sent}.") for sent in by_value):
            return _undecorated, (module, name, depth)
        return super().reducer_override(function)


def _reduce_memmap(array: Any) -> Any:
    """By its file: each worker maps that, as one that was forked has done, and what it writes is there."""
    whole = array
    while isinstance(whole.base, type(array)):
        whole = whole.base
    file = array.filename
    if file is None or array.mode == "c" or not isinstance(whole.base, mmap.mmap):
        return NotImplemented
    # A temporary file may be removed while it is mapped.
    if not (array.size and array.flags.forc and Path(file).exists()):
        return NotImplemented
    offset = whole.offset + array.ctypes.data - whole.ctypes.data
    order = "C" if array.flags.c_contiguous else "F"
    mode = "r" if array.mode == "r" else "r+"
    return type(array), (file, array.dtype, mode, offset, array.shape, order)


def _stays(large: list[memoryview], buffer: pickle.PickleBuffer) -> bool:
    """As a pickler's ``buffer_callback``: whether it stays in the pickle, because it is small."""
    if os.name != "posix" or memoryview(buffer).nbytes < _LEAST_SHARED:
        return True
    large.append(buffer.raw())
    return False


def report_dumps(thing: Any) -> bytes:
    """Pickle in a worker; in C if that can do it."""
    with contextlib.suppress(Exception):
        return pickle.dumps(thing, PROTOCOL)
    return Pickler(None, is_answer=True).dumps(thing)


def _undecorated(module: str, qualname: str, depth: int) -> Any:
    found = attrgetter(qualname)(import_module(module))
    for _ in range(depth):
        found = getattr(found, "__wrapped__", found)
    return found


# Classes by value, by cloudpickle's ids of them: those that this process has sent or that have arrived, the latter also
# alone.
_classes: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
_arrived: dict[str, type] = {}


def _class_by_value(its_id: str, where: tuple[type, int, str], make: Any = None, its: tuple[Any, ...] = ()) -> type:
    if its_id not in _classes:
        base, address, qualname = where
        classes: list[type] = type.__subclasses__(base)
        # In a process that was forked from the other, or the reverse, the same class is where it was.
        same = [cls for cls in classes if id(cls) == address and cls.__qualname__ == qualname]
        if not same:
            made: type = make(*its)
            return made
        _classes[its_id] = same[0]
    return _classes[its_id]


def _fill_class(cls: Any, state: tuple[str, str, Callable[..., None], Any]) -> None:
    """Fill a class that has just been made; one that was here keeps what has been changed here."""
    its_id, qualname, set_state, its = state
    if its_id not in _classes:
        _classes[its_id] = _arrived[its_id] = cls
        cls.__qualname__ = qualname
        set_state(cls, its)


# Exceptions, with what they were raised from


def pack_error(error: Exception) -> bytes:
    """Pickle an exception, for `loads`; what cannot be pickled arrives as a `RemoteError` that says the same."""
    if error.__traceback__ is not None:
        # The function may raise one object again and again, with what it got here before.
        drop_notes(error, IN_THE_WORKER)
        error.with_traceback(users_part(error.__traceback__))
        add_note(error, f"{IN_THE_WORKER}{''.join(traceback.format_exception(error)).rstrip()}")
        error.with_traceback(None)
    try:
        return _ErrorPickler().dumps(error)
    except pickle.PicklingError:
        # It comes from hundreds of others.
        link(error, cause=None, context=None, hides_context=error.__suppress_context__)
        return _ErrorPickler().dumps(error)


class _ErrorPickler(Pickler):
    """Pickles each exception by itself, so that one that cannot travel does not take with it what hangs on it.

    Unless its program says how it is pickled, it is made again without its `__init__`, which may take what ``args``
    does not hold. What cannot be sent is left out, such as the open response in an `HTTPError`; its status can be.

    Args:
        alone: The one that this pickle is of, if it is of one.
    """

    has_left_out = False

    def __init__(self, alone: Any = None) -> None:
        super().__init__(None, is_answer=True)
        self._alone = alone

    def reducer_override(self, obj: Any) -> Any:
        if obj is self._alone:
            if says_how_it_is_pickled(obj):
                return NotImplemented
            state = obj.args, fields_of(obj), vars(obj)
            return copyreg.__newobj__, (type(obj), *obj.args), state, None, None, set_error  # type: ignore[attr-defined]
        if isinstance(obj, BaseException):
            notes = [str(note) for note in getattr(obj, "__notes__", ())]
            links = obj.__cause__, obj.__context__, obj.__suppress_context__, notes
            return _loads_alone, _dumps_alone(obj), links, None, None, _link
        reduced = super().reducer_override(obj)
        goes_by_name = isinstance(obj, (type, FunctionType, BuiltinFunctionType))
        if reduced is not NotImplemented or self._alone is None or goes_by_name or type(obj) in self.dispatch_table:
            return reduced
        return self._without_what_cannot_be_sent(obj)

    def _without_what_cannot_be_sent(self, obj: Any) -> Any:
        try:
            obj.__reduce_ex__(4)
        except Exception:  # noqa: BLE001 - anything may happen in a user's __getstate__
            self.has_left_out = True
            if isinstance(obj, io.IOBase):
                # An empty one: Python 3.12 closes that of an `HTTPError`, which cannot be None, and handlers read it.
                return (io.StringIO if isinstance(obj, io.TextIOBase) else io.BytesIO), ()
            # Headers are often read-only mappings, which cannot be pickled; of anything else there is a None.
            return (dict, (dict(obj),)) if isinstance(obj, Mapping) else (type(None), ())
        return NotImplemented


def _dumps_alone(error: BaseException) -> tuple[bytes, bytes, str, str | None]:
    """What `_loads_alone` takes."""
    pickler = _ErrorPickler(error)
    data = kind = b""
    text = None
    # Anything may happen in a user's __getstate__ and __str__.
    with contextlib.suppress(Exception):
        packed = pickler.dumps(error)
        text = str(error) if pickler.has_left_out else None
        data = packed
    with contextlib.suppress(Exception):
        kind = report_dumps(type(error))
    return data, kind, f"{type(error).__module__}.{describe(error)}", text


def _loads_alone(data: bytes, kind: bytes, story: str, text: str | None) -> BaseException:
    """The exception, if it can be read, and shown, and has the text that may be given; else a `RemoteError`."""
    with contextlib.suppress(Exception):
        error = loads(data)
        if isinstance(error, BaseException) and text in {None, str(error)}:
            return error
    remote = RemoteError(story)
    with contextlib.suppress(Exception):
        remote.error_class = loads(kind)
    return remote


def _link(error: BaseException, links: tuple[Any, ...]) -> None:
    cause, context, hides_context, notes = links
    link(error, cause=cause, context=context, hides_context=hides_context)
    # A class that says by itself how it is pickled, as `json.JSONDecodeError` does, may have left them out.
    for note in notes:
        if note not in getattr(error, "__notes__", ()):
            add_note(error, note)


# Log records


def pack_record(record: logging.LogRecord) -> bytes:
    """Pickle a log record as it is now, for `unpack_record`; what of it cannot be pickled becomes its ``repr``."""
    fields = dict(vars(record))
    args: Any = record.args or ()
    values = [*args, *args.values()] if type(args) is dict else args
    is_plain = type(args) in {tuple, dict} and PLAIN.issuperset(map(type, values))
    if type(record.msg) not in {str, dict} or not is_plain:
        # They may say something else there, or cannot be sent.
        fields.update(msg=record.getMessage(), args=None)
    if record.exc_info:
        # Its traceback cannot travel.
        fields["exc_info"] = record.exc_info[1]
        fields["exc_text"] = record.exc_text or logging.Formatter().formatException(record.exc_info)
    by_themselves = {}
    for name, value in fields.items():
        if type(value) not in PLAIN and name != "args":
            by_themselves[name] = _dumps_or_text(value)
    for name in by_themselves:
        del fields[name]
    return pickle.dumps((fields, by_themselves), PROTOCOL)


def _dumps_or_text(value: Any) -> bytes:
    # Anything may happen in a user's __getstate__ and __repr__.
    with contextlib.suppress(Exception):
        is_builtin = isinstance(value, BaseException) and type(value).__module__ == "builtins"
        # Without others that hang on it, it needs no help, and takes a tenth of the time.
        if is_builtin and value.__cause__ is value.__context__ is None and PLAIN.issuperset(map(type, value.args)):
            return pickle.dumps(value, PROTOCOL)
        return _ErrorPickler().dumps(value)
    text = object.__repr__(value)
    with contextlib.suppress(Exception):
        text = repr(value)
    return pickle.dumps(text, PROTOCOL)


def unpack_record(data: bytes) -> logging.LogRecord:
    """What `pack_record` has packed; what cannot be unpickled here becomes a text that says why."""
    fields, by_themselves = loads(data)
    for name, packed in by_themselves.items():
        try:
            fields[name] = loads(packed)
        except Exception as error:  # noqa: BLE001 - anything may happen in a user's __setstate__
            fields[name] = f"cannot be unpickled: {describe(error)}"
    logged = fields["exc_info"]
    if isinstance(logged, BaseException):
        # For handlers that do not look at the record's text of it.
        add_note(logged, f"{IN_THE_WORKER}{fields['exc_text']}")
        fields["exc_info"] = type(logged), logged, None
    return logging.makeLogRecord(fields)
