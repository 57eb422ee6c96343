"""How a map's function and its items travel to worker processes, and what comes back."""

from __future__ import annotations

import contextlib
import copyreg
import importlib
import io
import pickle
import traceback
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from types import CellType, CodeType, FunctionType, MemberDescriptorType
from typing import TYPE_CHECKING, Any

from opero.concurrency.main_module import surely_nothing
from opero.concurrency.worker import Report
from opero.core.signature import MISSING, find_by_name, name_of
from opero.exceptions import NotTransferableError, RemoteError
from opero.utils.notes import add_note, describe, drop_notes

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.scheduler import Batch
    from opero.concurrency.worker import TimeLimit, Work

PROTOCOL = pickle.HIGHEST_PROTOCOL
_NONE = pickle.dumps(None, PROTOCOL)


@dataclass(frozen=True)
class ByName:
    """An importable function: its module, its name, and whether that name now stands for its decorated form."""

    module: str
    qualname: str
    decorated: bool

    def load(self) -> Callable[..., Any]:
        found: Any = importlib.import_module(self.module)
        for part in self.qualname.split("."):
            found = getattr(found, part)
        function: Callable[..., Any] = found.__wrapped__ if self.decorated else found
        return function


@dataclass(frozen=True)
class ByValue:
    """Anything else, through dill."""

    dilled: bytes

    def load(self) -> Any:
        from opero.concurrency.by_value import loads

        return loads(self.dilled)


@dataclass(frozen=True)
class ByEither:
    """A function of the main module, for workers of which nobody knows whether they have that."""

    named: ByName
    fingerprint: bytes
    valued: ByValue | None
    problem: str

    def load(self) -> Any:
        try:
            function = self.named.load()
            if self.valued is None or _fingerprint(function) == self.fingerprint:
                return function
        except AttributeError as error:
            if self.valued is None:
                msg = f"{error}, and it cannot be sent by value: {self.problem}"
                raise AttributeError(msg) from None
        return self.valued.load()


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


class refusing:  # noqa: N801 - used as a function
    """Where something is pickled for a worker: say what cannot be sent if that fails.

    No generator, which every batch would have to make and to end.
    """

    def __init__(self, what: str | Callable[[], str]) -> None:
        self._what = what

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, _kind: object, error: object, _traceback: object) -> None:
        if isinstance(error, Exception):
            what = self._what if isinstance(self._what, str) else self._what()
            msg = f"{what} cannot be sent to a worker process: {_text(error)}; give what can be pickled, or use threads"
            raise NotTransferableError(msg) from error


class Packer:
    """Pickles what is sent to the workers of one pool.

    Args:
        is_unknown: Tells of a qualified name of the main module whether a worker may have none such: then functions go
            by value, and classes travel along where items mention them. None if the workers have them all.
        is_sure: Whether they surely have none such.
        is_surely_there: Tells of a qualified name of the main module whether every worker has it.
        initializer: What the workers call first, if anything: what it has set in their main module stays there.
    """

    def __init__(
        self,
        is_unknown: Callable[[str], bool] | None,
        *,
        is_sure: bool = True,
        is_surely_there: Callable[[str], bool] = surely_nothing,
        initializer: Callable[..., Any] | None = None,
    ) -> None:
        self._is_unknown = is_unknown
        self._is_sure = is_sure
        self._is_surely_there = is_surely_there
        self._initializer = initializer
        self._copies: Any = None

    def work(self, work: Work) -> bytes:
        """Pickle a map's work.

        Raises:
            NotTransferableError: If the function or the arguments that all items have in common cannot be pickled.
        """
        mentioned: dict[int, type] = {}
        with refusing(f"{name_of(work.function)} or its keyword arguments"):
            function = self.function(work.function, mentioned)
            return self.dumps((function, work.is_async, work.shape, work.slot), mentioned)

    def arguments(self, work: Work) -> bytes:
        """Pickle what all calls of a map have in common, for workers that have the function.

        Raises:
            NotTransferableError: If it cannot be pickled.
        """
        with refusing(f"the keyword arguments of {name_of(work.function)}"):
            return self.dumps(work.shape)

    def batch(self, batch: Batch) -> bytes:
        """Pickle what a batch sends.

        Raises:
            NotTransferableError: If an item cannot be pickled.
        """
        # MISSING is one object in one process; it does not travel.
        has_candidate = batch.candidate is not MISSING
        candidate = batch.candidate if has_candidate else None
        with refusing(lambda: self._culprit(batch)):
            return self.dumps((batch.items, has_candidate, candidate, batch.time_limit))

    def _culprit(self, batch: Batch) -> str:
        for what, thing in [("candidate", batch.candidate), *(("item", item) for item in batch.items)]:
            try:
                self.dumps(thing)
            except Exception:  # noqa: BLE001 - anything may happen in a user's __getstate__
                return f"the {what} {type(thing).__qualname__}"
        return f"an item of {len(batch.items)}"

    def dumps(self, thing: Any, mentioned: dict[int, type] | None = None, reducers: Any = None) -> bytes:
        """Pickle it, with functions that cannot be imported, and copies of the classes that are mentioned.

        Args:
            thing: What is pickled.
            mentioned: Classes by their identity; those of ``thing`` are added.
            reducers: A pickler's ``dispatch_table``, for what prepares a worker.
        """
        if self._is_unknown is None and reducers is None and not mentioned:
            # It takes longer to look at everything for functions, of which there are seldom any.
            with contextlib.suppress(Exception):
                return pickle.dumps(thing, PROTOCOL)
        from opero.concurrency.class_copies import Collector, Copies

        file = io.BytesIO()
        pickler = Collector(file, PROTOCOL)
        pickler.mentioned = {} if mentioned is None else mentioned
        if reducers is not None:
            pickler.dispatch_table = reducers
            pickler.carry = self._carry
        else:
            pickler.carry = self._refuse
        try:
            pickler.dump(thing)
            data = file.getvalue()
        except _FunctionByValueError:
            from opero.concurrency import by_value

            # All together: it may change what the objects have that hold it.
            dilled = by_value.dumps(thing, pickler.mentioned, self._kept, copies_locks=False)
            data = pickle.dumps(_Instead(_load, ByValue(dilled)), PROTOCOL)
        if not pickler.mentioned:
            return data
        if self._copies is None:
            self._copies = Copies(self._kept, self._is_surely_there)
        return pickle.dumps(_Instead(_load_after, self._copies.of(pickler.mentioned), data), PROTOCOL)

    def function(
        self, function: Callable[..., Any], mentioned: dict[int, type], *, prepares: bool = False
    ) -> ByName | ByValue | ByEither:
        """What stands for a function; adds to ``mentioned`` the classes that it mentions.

        ``prepares``: it is called for what it does to the worker's main module, whose functions are not copied then.
        """
        named = _by_name(function)
        if named is not None and self._can_import(named):
            return named
        from opero.concurrency.by_value import dumps

        is_here = self._has if prepares else None
        kept = frozenset[str]() if prepares else self._kept
        if named is None or self._is_sure:
            return ByValue(dumps(function, mentioned, kept, is_here=is_here))
        try:
            valued, problem = ByValue(dumps(function, mentioned, kept, is_here=is_here)), ""
        except Exception as error:  # noqa: BLE001 - it may mention what is of no use elsewhere, as a connection
            valued, problem = None, describe(error)
        return ByEither(named, _fingerprint(function), valued, problem)

    def _carry(self, function: Callable[..., Any], mentioned: dict[int, type]) -> Any:
        carried = self.function(function, mentioned, prepares=True)
        return NotImplemented if isinstance(carried, ByName) else (_load, (carried,))

    def _refuse(self, function: Callable[..., Any], _mentioned: dict[int, type]) -> Any:
        named = _by_name(function)
        if named is None or named.decorated or not self._can_import(named):
            raise _FunctionByValueError
        return NotImplemented

    @cached_property
    def _kept(self) -> frozenset[str] | None:
        """Names of the workers' main module that keep their values; None if nothing of it may be changed."""
        if not self._is_sure:
            return None
        from opero.concurrency.by_value import names_mentioned

        return frozenset() if self._initializer is None else names_mentioned(self._initializer)

    def _can_import(self, named: ByName) -> bool:
        return named.module != "__main__" or self._has(named.qualname)

    def _has(self, qualname: str) -> bool:
        """Whether the workers have this of the main module."""
        return self._is_unknown is None or not self._is_unknown(qualname)


class _Instead:
    """Is unpickled as what ``make`` returns."""

    def __init__(self, make: Callable[..., Any], *its: Any) -> None:
        self._parts = make, its

    def __reduce__(self) -> Any:
        return self._parts


def _load_after(copies: tuple[Any, ...], data: bytes) -> Any:
    """What can be unpickled only after the copies of classes that come with it."""
    from opero.concurrency.class_copies import provide

    provide(copies)
    return pickle.loads(data)  # noqa: S301 - made by the same `Packer` in the parent process


class _FunctionByValueError(Exception):
    """What is pickled holds a function that no worker can import."""


def _load(carried: ByValue | ByEither) -> Any:
    return carried.load()


def unpack_work(data: bytes) -> Work:
    from opero.concurrency.worker import Work

    function, is_async, shape, slot = pickle.loads(data)  # noqa: S301 - made by `Packer.work` in the parent process
    return Work(function.load(), is_async, shape, slot)


def _by_name(function: Callable[..., Any]) -> ByName | None:
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module is None or qualname is None:
        return None
    found = find_by_name(module, qualname)
    if found is function:
        return ByName(module, qualname, decorated=False)
    if getattr(found, "__wrapped__", None) is function:
        return ByName(module, qualname, decorated=True)
    return None


def unpack_batch(payload: bytes) -> tuple[list[Any], Any, TimeLimit | None] | Report:
    """Items, candidate and time limit; if an item cannot be unpickled, a report that says so and has no values."""
    try:
        items, has_candidate, candidate, limit = pickle.loads(payload)  # noqa: S301 - from the parent process
    except Exception as error:  # noqa: BLE001 - anything may happen in a user's __setstate__
        return Report([], {0: NotTransferableError(f"the item cannot be unpickled: {_text(error)}")}, 0.0)
    return items, candidate if has_candidate else MISSING, limit


def pack_report(report: Report) -> bytes:
    """Pickle a worker's report; what cannot be pickled becomes the error of its item."""
    errors = {place: _portable_error(error) for place, error in report.errors.items()}
    try:
        return pickle.dumps((report.values, errors, report.seconds), PROTOCOL)
    except Exception:  # noqa: BLE001 - found out below, item by item
        values = list(report.values)
        for place, value in enumerate(values):
            problem = _why_not_portable(value)
            if problem is not None:
                values[place] = None
                errors[place] = problem
        return pickle.dumps((values, errors, report.seconds), PROTOCOL)


def pack_singly(report: Report) -> bytes:
    """Pickle each result and each error by itself, for a parent that might not be able to unpickle them together."""
    values: list[bytes] = []
    errors = dict(report.errors)
    for place, value in enumerate(report.values):
        try:
            values.append(pickle.dumps(value, PROTOCOL))
        except Exception as error:  # noqa: BLE001 - anything may happen in a user's __getstate__
            values.append(_NONE)
            errors[place] = _not_portable(value, error)
    told = {place: (pickle.dumps(_portable_error(error), PROTOCOL), _story(error)) for place, error in errors.items()}
    return pickle.dumps((values, told, report.seconds), PROTOCOL)


def unpack_singly(values: list[bytes], errors: dict[int, tuple[bytes, str]]) -> tuple[list[Any], dict[int, Exception]]:
    """Unpickle each by itself; what cannot be unpickled here becomes the error of its item."""
    unpacked: list[Any] = []
    found: dict[int, Exception] = {}
    for place, data in enumerate(values):
        value = None
        try:
            value = pickle.loads(data)  # noqa: S301 - made by `pack_singly` in a worker
        except Exception as error:  # noqa: BLE001 - anything may happen in a user's __setstate__
            found[place] = NotTransferableError(f"the result cannot be unpickled: {_text(error)}")
        unpacked.append(value)
    for place, (data, story) in errors.items():
        try:
            found[place] = pickle.loads(data)  # noqa: S301 - as above
        except Exception:  # noqa: BLE001 - as above
            found[place] = RemoteError(story)
    return unpacked, found


def _why_not_portable(value: Any) -> NotTransferableError | None:
    try:
        pickle.dumps(value, PROTOCOL)
    except Exception as error:  # noqa: BLE001 - anything may happen in a user's __getstate__
        return _not_portable(value, error)
    return None


def _not_portable(value: Any, error: Exception) -> NotTransferableError:
    return NotTransferableError(f"the result {type(value).__qualname__} cannot be pickled: {_text(error)}")


def _portable_error(error: Exception) -> Any:
    """The error, or what is unpickled as such, with the worker's traceback as a note; if need be, its text alone."""
    if error.__traceback__ is not None:
        # The function may raise one object again and again, with what it got here before.
        drop_notes(error, _NOTE)
        add_note(error, f"{_NOTE}{_trace(error)}")
        error.__traceback__ = None
    plain = _copy_of(error)
    if _is_like(plain, error):
        return error
    remade = _remade(error)
    if _is_like(_copy_of(remade), error):
        return remade
    if type(plain) is type(error):
        # Its text may be another each time.
        return error
    remote = RemoteError(_story(error))
    if _copy_of(type(error)) is type(error):
        remote.error_class = type(error)
    for note in getattr(error, "__notes__", ()):
        add_note(remote, note)
    return remote


_NOTE = "in the worker:\n"


def _copy_of(thing: Any) -> Any:
    """What arrives of it; None if nothing does."""
    try:
        return pickle.loads(pickle.dumps(thing, PROTOCOL))  # noqa: S301 - just made here
    except Exception:  # noqa: BLE001 - anything may happen in a user's __getstate__
        return None


def _is_like(copy: Any, error: BaseException) -> bool:
    """Whether it says the same, and has its slots: plain pickle runs `__init__` again, with ``args``, and no slots."""
    if type(copy) is not type(error) or describe(copy) != describe(error):
        return False
    if _fields(copy).keys() != _fields(error).keys():
        return False
    if isinstance(error, BaseExceptionGroup) and isinstance(copy, BaseExceptionGroup):
        return all(map(_is_like, copy.exceptions, error.exceptions))
    return True


def _remade(error: Exception) -> _Instead | None:
    """Is unpickled as an exception of the class, without its `__init__`, which takes what ``args`` does not hold."""
    written = io.BytesIO()
    try:
        _RemakingPickler(written, PROTOCOL).dump(error)
    except Exception:  # noqa: BLE001 - anything may happen in a user's __getstate__
        return None
    return _Instead(pickle.loads, written.getvalue())


class _RemakingPickler(pickle.Pickler):
    """Reaches the parts of an exception group, too."""

    def reducer_override(self, thing: Any) -> Any:
        if not isinstance(thing, BaseException) or _is_like(_copy_of(thing), thing):
            return NotImplemented
        state = thing.args, _fields(thing), vars(thing)
        return copyreg.__newobj__, (type(thing), *thing.args), state, None, None, _set_error  # type: ignore[attr-defined]


def _set_error(error: BaseException, state: tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]) -> None:
    error.args, fields, attributes = state
    vars(error).update(attributes)
    descriptors = _descriptors(type(error))
    for name, value in fields.items():
        # What `__new__` has set cannot always be set again, and a None of an OSError's would be shown.
        if getattr(error, name, MISSING) is not value:
            with contextlib.suppress(AttributeError, TypeError):
                descriptors[name].__set__(error, value)


def _fields(error: BaseException) -> dict[str, Any]:
    """What is neither in ``args`` nor in its `__dict__`: slots, and what built-in exceptions have, as ``errno``."""
    return {name: getattr(error, name) for name in _descriptors(type(error)) if hasattr(error, name)}


def _descriptors(kind: type) -> dict[str, MemberDescriptorType]:
    found = {name: member for cls in reversed(kind.__mro__) for name, member in vars(cls).items()}
    # The object that lacked an attribute may be anything.
    return {
        name: member
        for name, member in found.items()
        if isinstance(member, MemberDescriptorType) and not name.endswith("__") and name != "obj"
    }


def _story(error: Exception) -> str:
    return f"{type(error).__module__}.{_text(error)}"


def _trace(error: Exception) -> str:
    try:
        return "".join(traceback.format_exception(error)).rstrip()
    except Exception:  # noqa: BLE001 - it asks the exception for its text
        return "".join(traceback.format_tb(error.__traceback__)).rstrip()


def _text(error: Exception) -> str:
    try:
        return f"{type(error).__qualname__}: {error}"
    except Exception:  # noqa: BLE001 - anything may happen in a user's __str__
        return f"{type(error).__qualname__} (it has no text)"
