"""How objects are pickled for workers and by them: by cloudpickle's rules, with additions.

What a worker has of the main module goes by its name: there it is the worker's own, with what an initializer has set.
A class that goes by value is made once in each process and found again by its id: so it is one class in the caller
and in the worker, for `except` and ``retry_on``, whichever of them names it. Exceptions arrive with what they were
raised from.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import mmap
import os
import pickle
import symtable
import sys
import threading
import traceback
import typing
import weakref
from abc import ABCMeta
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from multiprocessing.reduction import ForkingPickler
from operator import attrgetter
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any, NewType, ParamSpec, TypeVar, TypeVarTuple

import cloudpickle

from opero.concurrency.worker import Report, Work
from opero.core.signature import find_by_name, name_of
from opero.exceptions import NotTransferableError, RemoteError
from opero.utils.notes import (
    IN_THE_WORKER,
    add_note,
    describe,
    drop_notes,
    link,
    reduced_error,
    users_part,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opero.concurrency.pool import Batch
    from opero.core.steps import TimeLimit

T = TypeVar("T")

# What a worker runs: the work of its maps, the initializer and its arguments, the finalizer.
WorkerLife = tuple[Work, "Callable[..., Any] | None", tuple[Any, ...], "Callable[[], Any] | None"]

PROTOCOL = pickle.HIGHEST_PROTOCOL
loads = pickle.loads
_NOTHING = pickle.dumps(None, PROTOCOL)
# What a pickle that mentions the main module has in it.
_MENTIONS_MAIN = b"_main__"
# Values of these types can be pickled and unpickled in any company.
PLAIN = frozenset({int, float, str, bytes, bool, type(None)})
# Below that a pipe is as fast as a file that is shared.
_LEAST_SHARED = 1_000_000
_LOCKS: dict[type, Callable[[], Any]] = {type(make()): make for make in (threading.Lock, threading.RLock)}
# Names of the main module; the second is that in a process that has imported it again.
MAINS = ("__main__", "__mp_main__")


# The main module


def names_in_fresh_workers() -> frozenset[str]:
    """Names of the main module that a process which is started afresh has, too: as `spawn.prepare` decides there."""
    # Streamlit, IPython and debuggers may have put another one there since multiprocessing did this; results name it.
    main = sys.modules["__mp_main__"] = sys.modules["__main__"]
    # The debugger pdb forgets it, and multiprocessing looks at it.
    spec = vars(main).setdefault("__spec__", None)
    path = getattr(main, "__file__", None)
    is_left_out = Path(path or "").stem == "ipython" if spec is None else spec.name.split(".")[-1] == "__main__"
    return frozenset() if path is None or is_left_out else _names_bound(path)


@lru_cache(maxsize=1)
def _names_bound(path: str) -> frozenset[str]:
    """Names that the file binds where it is imported: not those below ``if __name__ == "__main__":``."""
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        file = ast.parse(Path(path).read_bytes())
        file.body = [
            node for node in file.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))
        ]
        symbols = symtable.symtable(ast.unparse(file), path, "exec").get_symbols()
        return frozenset(symbol.get_name() for symbol in symbols if symbol.is_assigned())
    return frozenset()


# Functions, classes, arrays


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
            # Before the pickler in C looks for it. Cloudpickle first: a class may hold its own methods, by no name yet.
            self.dispatch_table: Any = ChainMap(of_cloudpickle, ForkingPickler(io.BytesIO()).dispatch_table)
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
        if kind in _NAMED and obj.__module__ in MAINS and not self._goes_by_name(obj):
            return _reduce_named(obj)
        return NotImplemented

    def _goes_by_name(self, thing: Any) -> bool:
        name = getattr(thing, "__qualname__", thing.__name__)
        return thing.__module__ in MAINS and self._has(name) and find_by_name("__main__", name) is thing

    def _has(self, name: str) -> bool:
        return self._names is None or name.partition(".")[0] in self._names

    def _reduce_class(self, cls: type) -> Any:
        reduced: Any = NotImplemented if self._goes_by_name(cls) else super().reducer_override(cls)
        # What is made by name, or as a built-in one, has no state.
        if not isinstance(reduced, tuple) or len(reduced) == len(("make", "arguments")):
            return reduced
        make, its, state, *_, set_state = reduced
        its_id = its[-2]
        where = cls.__base__, id(cls), cls.__qualname__
        if self._is_answer and its_id in _arrived:
            return _class_by_value, (its_id, where)
        if type(cls) in {type, ABCMeta} and vars(cls).get("__slots__"):
            # cloudpickle (3.1.3) makes it without, and its instances, which have a `__dict__` then, do not come back.
            its[-3]["__slots__"] = vars(cls)["__slots__"]
        _classes[its_id] = cls
        return _class_by_value, (its_id, where, make, its), (its_id, set_state, state), None, None, _fill_class

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


# What Python itself pickles by name only; and the aliases of Python 3.12.
_NAMED = {NewType, ParamSpec, TypeVarTuple, type(lru_cache(len)), getattr(typing, "TypeAliasType", NewType)}


def _reduce_named(thing: Any) -> Any:
    kind: Any = type(thing)
    if kind.__name__ == "TypeAliasType":
        return partial(kind, type_params=thing.__type_params__), (thing.__name__, thing.__value__)
    if hasattr(thing, "cache_parameters"):
        return lru_cache(**thing.cache_parameters()), (thing.__wrapped__,)
    supertype = (thing.__supertype__,) if kind is NewType else ()
    # As of slots: some have no `__dict__`.
    return kind, (thing.__name__, *supertype), (None, {"__module__": "__main__"})


def _undecorated(module: str, qualname: str, depth: int) -> Any:
    found = attrgetter(qualname)(import_module(module))
    for _ in range(depth):
        found = getattr(found, "__wrapped__", found)
    return found


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


# Classes by value, by cloudpickle's ids of them: those that this process has sent or that have arrived, the latter also
# alone.
_classes: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
_arrived: dict[str, type] = {}


def _class_by_value(its_id: str, where: tuple[type, int, str], make: Any = None, its: tuple[Any, ...] = ()) -> type:
    if its_id in _classes:
        return _classes[its_id]
    base, address, qualname = where
    subclasses: list[type] = type.__subclasses__(base)
    for cls in subclasses:
        # In a process that was forked from the other, or the reverse, the same class is where it was.
        if id(cls) == address and cls.__qualname__ == qualname:
            _classes[its_id] = cls
            return cls
    made: type = make(*its)
    made.__qualname__ = qualname
    return made


def _fill_class(cls: type, state: tuple[str, Callable[..., None], Any]) -> None:
    """Fill a class that has just been made; one that was here keeps what has been changed here."""
    its_id, set_state, its = state
    if its_id not in _classes:
        _classes[its_id] = _arrived[its_id] = cls
        set_state(cls, its)


# What goes to workers, and comes back


@dataclass(frozen=True)
class Packer:
    """Pickles what is sent to the workers of one pool; they have these names of the main module, or with None all.

    Its methods raise `NotTransferableError` if something cannot be pickled. ``is_answer``: see `Pickler`.
    """

    names: frozenset[str] | None = frozenset()
    is_answer: bool = False

    def start(self, life: WorkerLife, large: list[memoryview] | None = None) -> bytes:
        """Pickle a map's work and what a worker does before and after it, for `unpack_start`.

        One pickler has all, so that functions share their globals there, as they do here. While a process is being
        started, ``large`` gets large arrays, and pipes and locks can be inherited.
        """
        work, initializer, initargs, finalizer = life
        pickler = Pickler(self.names, large=large)
        its = work.is_async, work.shape, work.slot
        the_initializer = f"the initializer {initializer and name_of(initializer)} or its initargs"
        for what, function, arguments in (
            (f"{name_of(work.function)} or its keyword arguments", work.function, its),
            (the_initializer, initializer, initargs),
            ("the finalizer", finalizer, ()),
        ):
            pickler.copies_locks = True
            _or_refuse(what, pickler.dump, function)
            pickler.copies_locks = False
            _or_refuse(what, pickler.dump, arguments)
        return pickler.file.getvalue()

    def arguments(self, work: Work) -> bytes:
        """Pickle what all calls of a map have in common, for workers that have the function."""
        what = f"the keyword arguments of {name_of(work.function)}"
        return _or_refuse(what, Pickler(self.names).dumps, work.shape)

    def batch(self, batch: Batch) -> bytes:
        """Pickle what a batch sends."""
        # Of several, each is tried alone.
        item, *candidate = batch.items[0] if batch.has_candidates else batch.items[:1]
        what = f"the item {type(item).__qualname__}"
        if candidate:
            what += f" or the candidate {type(candidate[0]).__qualname__}"
        data = _or_refuse(what, self.dumps, (batch.items, batch.time_limit))
        batch.size = len(data)
        return data

    def dumps(self, thing: Any) -> bytes:
        """Pickle it; in C alone if nothing in it has to go by value."""
        if self.names is None or not cloudpickle.list_registry_pickle_by_value():
            with contextlib.suppress(Exception):
                data = pickle.dumps(thing, PROTOCOL)
                if self.names is None or _MENTIONS_MAIN not in data:
                    return data
        return Pickler(self.names, is_answer=self.is_answer).dumps(thing)


# That of a worker.
_answers = Packer(None, is_answer=True)


def _or_refuse(what: str, pickle_it: Callable[[Any], T], thing: Any) -> T:
    try:
        return pickle_it(thing)
    except Exception as error:
        ways = "give what can be pickled, or use threads"
        if "SemLock created in a fork context" in str(error):
            ways = "make it by multiprocessing.get_context('spawn'), or give pool_options={'start_method': 'fork'}"
        raise NotTransferableError(f"{what} cannot be sent to a worker process: {describe(error)}; {ways}") from error


def unpack_start(data: bytes, buffers: Iterable[memoryview] = ()) -> WorkerLife:
    unpickler = pickle.Unpickler(io.BytesIO(data), buffers=buffers)  # noqa: S301 - made by `Packer.start`
    function, its, initializer, initargs, finalizer, _ = (unpickler.load() for _ in range(6))
    return Work(function, *its), initializer, initargs, finalizer


def unpack_batch(payload: bytes | memoryview) -> tuple[list[Any], TimeLimit | None] | Report:
    """Items and time limit; if an item cannot be unpickled, a report that says so and has no values."""
    try:
        items, limit = loads(payload)
    except Exception as error:  # noqa: BLE001 - anything may happen in a user's __setstate__
        return Report([], {0: NotTransferableError(f"the item cannot be unpickled: {describe(error)}")}, 0.0)
    return items, limit


def pack_report(report: Report) -> bytes:
    """Pickle a worker's report; what cannot be pickled becomes the error of its item."""
    errors = {place: pack_error(error) for place, error in report.errors.items()}
    values, is_plain = report.values, PLAIN.issuperset(map(type, report.values))
    if not is_plain:
        # Each by itself: one that cannot be unpickled shall not take the others with it.
        values = [_NOTHING] * len(values)
        for place, value in enumerate(report.values):
            try:
                values[place] = _answers.dumps(value)
            except Exception as error:  # noqa: BLE001 - anything may happen in a user's __getstate__
                text = f"the result {type(value).__qualname__} cannot be pickled: {describe(error)}"
                errors[place] = pack_error(NotTransferableError(text))
    return pickle.dumps((values, is_plain, errors, report.seconds), PROTOCOL)


def unpack_report(payload: bytes | memoryview) -> Report:
    """What `pack_report` has packed; what cannot be unpickled here becomes the error of its item."""
    values, is_plain, errors, seconds = loads(payload)
    for place, data in errors.items():
        errors[place] = _unpacked(loads(data))
    if not is_plain:
        for place, data in enumerate(values):
            try:
                values[place] = loads(data)
            except Exception as error:  # noqa: BLE001 - anything may happen in a user's __setstate__
                values[place] = None
                errors[place] = NotTransferableError(f"the result cannot be unpickled: {describe(error)}")
    return Report(values, errors, seconds, len(payload))


# Exceptions, with what they were raised from


def pack_error(error: Exception) -> bytes:
    """Pickle an exception, for `_unpacked`; what cannot be pickled arrives as a `RemoteError` that says the same."""
    if error.__traceback__ is not None:
        # The function may raise one object again and again, with what it got here before.
        drop_notes(error, IN_THE_WORKER)
        error.with_traceback(users_part(error.__traceback__))
        add_note(error, f"{IN_THE_WORKER}{''.join(traceback.format_exception(error)).rstrip()}")
        error.with_traceback(None)
    return pickle.dumps(_packed(error), PROTOCOL)


def _packed(error: BaseException) -> list[Any]:
    """An exception and those that it was raised from, for `_unpacked`: each by itself, so that each may be lost."""
    errors = [error]
    for one in errors:
        before = one.__cause__, one.__context__
        errors.extend(new for new in before if new is not None and all(new is not known for known in errors))
    places = {id(one): place for place, one in enumerate(errors)}
    packed = []
    for one in errors:
        links = places.get(id(one.__cause__)), places.get(id(one.__context__)), one.__suppress_context__
        packed.append((_dumps_alone(one), links, [str(note) for note in getattr(one, "__notes__", ())]))
    return packed


def _unpacked(packed: list[Any]) -> BaseException:
    errors = [_loads_alone(*alone) for alone, _, _ in packed]
    for error, (_, (*links, hides_context), notes) in zip(errors, packed, strict=True):
        cause, context = (None if place is None else errors[place] for place in links)
        link(error, cause=cause, context=context, hides_context=hides_context)
        # A class that says by itself how it is pickled, as `json.JSONDecodeError` does, may have left them out.
        for note in notes:
            if note not in getattr(error, "__notes__", ()):
                add_note(error, note)
    return errors[0]


class _ErrorPickler(Pickler):
    """Pickles one exception without what cannot be sent, such as the open response in an `HTTPError`."""

    has_left_out = False

    def __init__(self, error: BaseException) -> None:
        super().__init__(None, is_answer=True)
        self._error = error

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, BaseException):
            return reduced_error(obj) if obj is self._error else (_unpacked, (_packed(obj),))
        reduced = super().reducer_override(obj)
        goes_by_name = isinstance(obj, (type, FunctionType, BuiltinFunctionType))
        if reduced is not NotImplemented or goes_by_name or type(obj) in self.dispatch_table:
            return reduced
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
    data = kind = b""
    text = None
    # Anything may happen in a user's __getstate__ and __str__.
    with contextlib.suppress(Exception):
        kind = _answers.dumps(type(error))
    with contextlib.suppress(Exception):
        pickler = _ErrorPickler(error)
        packed = pickler.dumps(error)
        text = str(error) if pickler.has_left_out else None
        data = packed
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
        fields["exc_info"] = record.exc_info[1] and _packed(record.exc_info[1])
        fields["exc_text"] = record.exc_text or logging.Formatter().formatException(record.exc_info)
    for name, value in fields.items():
        if type(value) not in PLAIN:
            try:
                fields[name] = [_answers.dumps(value)]
                loads(*fields[name])
            except Exception:  # noqa: BLE001 - anything may happen in a user's __getstate__
                fields[name] = repr(value)
    return pickle.dumps(fields, PROTOCOL)


def unpack_record(data: bytes) -> logging.LogRecord:
    """What `pack_record` has packed."""
    fields = loads(data)
    for name, value in fields.items():
        if type(value) is list:
            # Where a worker has read it, this process may not know its module.
            fields[name] = "cannot be unpickled"
            with contextlib.suppress(Exception):
                fields[name] = loads(*value)
    if fields["exc_info"]:
        error = _unpacked(fields["exc_info"])
        # For handlers that do not look at the record's text of it.
        add_note(error, f"{IN_THE_WORKER}{fields['exc_text']}")
        fields["exc_info"] = type(error), error, None
    return logging.makeLogRecord(fields)
