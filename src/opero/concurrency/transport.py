"""How a map's function and its items travel to worker processes, and what comes back."""

from __future__ import annotations

import importlib
import pickle
import sys
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opero.concurrency.worker import Report
from opero.core.signature import MISSING, name_of
from opero.exceptions import NotTransferableError, RemoteError
from opero.utils.notes import add_note

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
    """Any other function, through dill."""

    dilled: bytes

    def load(self) -> Callable[..., Any]:
        import dill

        function: Callable[..., Any] = dill.loads(self.dilled)  # noqa: S301 - made in the parent process
        return function


def pack_work(work: Work, *, main_is_shared: bool = True) -> bytes:
    """Pickle a map's work for a process that shares no memory with this one.

    ``main_is_shared``: the process has this program's main module, if it has a file.

    Raises:
        NotTransferableError: If the function or the arguments that all items have in common cannot be pickled.
    """
    try:
        function = _by_name(work.function, main_is_shared=main_is_shared) or _by_value(work.function)
        return pickle.dumps((function, work.is_async, work.shape, work.slot), PROTOCOL)
    except Exception as error:
        msg = f"{name_of(work.function)} or its keyword arguments cannot be sent to a worker process: {_text(error)}"
        raise NotTransferableError(msg) from error


def pack_arguments(work: Work) -> bytes:
    """Pickle what all calls of a map have in common, for workers that have the function.

    Raises:
        NotTransferableError: If it cannot be pickled.
    """
    try:
        return pickle.dumps(work.shape, PROTOCOL)
    except Exception as error:
        msg = f"the keyword arguments of {name_of(work.function)} cannot be sent to a worker process: {_text(error)}"
        raise NotTransferableError(msg) from error


def unpack_work(data: bytes) -> Work:
    from opero.concurrency.worker import Work

    function, is_async, shape, slot = pickle.loads(data)  # noqa: S301 - made by `pack_work` in the parent process
    return Work(function.load(), is_async, shape, slot)


def _by_name(function: Callable[..., Any], *, main_is_shared: bool) -> ByName | None:
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module is None or qualname is None:
        return None
    if module == "__main__" and not (main_is_shared and _main_is_imported_again()):
        return None
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if found is function:
        return ByName(module, qualname, decorated=False)
    if getattr(found, "__wrapped__", None) is function:
        return ByName(module, qualname, decorated=True)
    return None


def _main_is_imported_again() -> bool:
    """Whether a process that is started afresh has the same main module."""
    main = sys.modules["__main__"]
    return getattr(main, "__spec__", None) is not None or getattr(main, "__file__", None) is not None


def _by_value(function: Callable[..., Any]) -> ByValue:
    import dill

    return ByValue(dill.dumps(function, recurse=True))


def pack_batch(batch: Batch) -> bytes:
    """Pickle what a batch sends.

    Raises:
        NotTransferableError: If an item cannot be pickled.
    """
    # MISSING is one object in one process; it does not travel.
    has_candidate = batch.candidate is not MISSING
    candidate = batch.candidate if has_candidate else None
    try:
        return pickle.dumps((batch.items, has_candidate, candidate, batch.time_limit), PROTOCOL)
    except Exception as error:
        msg = f"the item {type(batch.items[0]).__qualname__} cannot be sent to a worker process: {_text(error)}"
        raise NotTransferableError(msg) from error


def unpack_batch(payload: bytes) -> tuple[list[Any], Any, TimeLimit | None] | Report:
    """Items, candidate and time limit; if an item cannot be unpickled, a report that says so and has no values."""
    try:
        items, has_candidate, candidate, limit = pickle.loads(payload)  # noqa: S301 - from the parent process
    except Exception as error:  # noqa: BLE001 - anything may happen in a user's __setstate__
        return Report([], {0: NotTransferableError(f"the item cannot be unpickled: {error}")}, 0.0)
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


def _portable_error(error: Exception) -> Exception:
    """The error with the worker's traceback as a note; its text alone if it cannot be pickled and unpickled."""
    try:
        copy = pickle.loads(pickle.dumps(error, PROTOCOL))  # noqa: S301 - just made here
        faithful = type(copy) is type(error)
    except Exception:  # noqa: BLE001 - many exceptions cannot: their __init__ takes what args does not hold
        faithful = False
    portable = error if faithful else RemoteError(_story(error))
    add_note(portable, f"in the worker:\n{_trace(error)}")
    return portable


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
