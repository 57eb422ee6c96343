"""Exceptions on their way out of a worker process, with what they were raised from."""

from __future__ import annotations

import contextlib
import copyreg
import io
import traceback
from collections.abc import Mapping
from pickle import PicklingError
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType
from typing import Any

from opero.concurrency.pickling import ReportPickler, loads, report_dumps
from opero.core.signature import MISSING
from opero.exceptions import RemoteError
from opero.utils.notes import IN_THE_WORKER, add_note, describe, drop_notes, link, users_part


def pack_error(error: Exception) -> bytes:
    """Pickle an exception, for `loads`; what cannot be pickled arrives as a `RemoteError` that says the same."""
    if error.__traceback__ is not None:
        # The function may raise one object again and again, with what it got here before.
        drop_notes(error, IN_THE_WORKER)
        error.with_traceback(users_part(error.__traceback__))
        add_note(error, f"{IN_THE_WORKER}{_trace(error)}")
        error.with_traceback(None)
    try:
        return _dumps(error)
    except PicklingError:
        # It comes from hundreds of others.
        link(error, cause=None, context=None, hides_context=error.__suppress_context__)
        return _dumps(error)


def _dumps(error: BaseException) -> bytes:
    file = io.BytesIO()
    _ErrorPickler(file).dump(error)
    return file.getvalue()


class _ErrorPickler(ReportPickler):
    """Pickles each exception by itself, so that one that cannot travel does not take with it what hangs on it."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is FunctionType and obj.__module__ == __name__:
            return NotImplemented
        if not isinstance(obj, BaseException):
            return super().reducer_override(obj)
        links = obj.__cause__, obj.__context__, obj.__suppress_context__
        return _alone, (_dumps_alone(obj), _story_of(obj)), links, None, None, _link


def _alone(data: bytes, story: str) -> BaseException:
    try:
        error: BaseException = loads(data)
    except Exception:  # noqa: BLE001 - anything may happen in a user's __setstate__
        return RemoteError(story)
    return error


def _link(error: BaseException, links: tuple[Any, ...]) -> None:
    cause, context, hides_context = links
    link(error, cause=cause, context=context, hides_context=hides_context)


def _dumps_alone(error: BaseException) -> bytes:
    """The first pickle of it that can be read, and whose text can be shown; see `_LossyPickler` for the last one."""
    ways = [_OwnPickler, _RemakingPickler, _LossyPickler][0 if _says_how(type(error)) else 1 :]
    for way in ways:
        with contextlib.suppress(Exception):
            file = io.BytesIO()
            way(file, error).dump(error)
            copy = loads(file.getvalue())
            text = str(copy)
            if isinstance(copy, BaseException) and (way is not _LossyPickler or text == str(error)):
                return file.getvalue()
    remote = RemoteError(_story_of(error))
    with contextlib.suppress(Exception):
        remote.error_class = loads(report_dumps(type(error)))
    for note in getattr(error, "__notes__", ()):
        add_note(remote, note)
    return report_dumps(remote)


def _says_how(kind: type) -> bool:
    """Whether its program says by itself how it is pickled."""
    defining = [cls for cls in kind.__mro__ if vars(cls).keys() & {"__reduce__", "__reduce_ex__"}]
    return defining[0].__module__ != "builtins"


class _OwnPickler(_ErrorPickler):
    """Pickles one exception as it says by itself."""

    def __init__(self, file: io.BytesIO, error: BaseException) -> None:
        super().__init__(file)
        self._error = error

    def reducer_override(self, obj: Any) -> Any:
        return super().reducer_override(obj) if obj is not self._error else NotImplemented


class _RemakingPickler(_OwnPickler):
    """Makes one exception again without its `__init__`, which may take what ``args`` does not hold."""

    def reducer_override(self, obj: Any) -> Any:
        if obj is not self._error:
            return super().reducer_override(obj)
        state = obj.args, _fields(obj), vars(obj)
        return copyreg.__newobj__, (type(obj), *obj.args), state, None, None, _set_error  # type: ignore[attr-defined]


class _LossyPickler(_RemakingPickler):
    """Leaves out what cannot be sent, such as the open response in an `HTTPError`, and keeps what can: the status."""

    def reducer_override(self, obj: Any) -> Any:
        reduced = super().reducer_override(obj)
        if reduced is not NotImplemented or isinstance(obj, (type, FunctionType, BuiltinFunctionType)):
            return reduced
        try:
            obj.__reduce_ex__(4)
        except Exception:  # noqa: BLE001 - anything may happen in a user's __getstate__
            if isinstance(obj, io.IOBase):
                # An empty one: Python 3.12 closes that of an `HTTPError`, which cannot be None, and handlers read it.
                return (io.StringIO if isinstance(obj, io.TextIOBase) else io.BytesIO), ()
            # Headers are often read-only mappings, which cannot be pickled.
            return (dict, (dict(obj),)) if isinstance(obj, Mapping) else (_left_out, ())
        return reduced


def _left_out() -> None:
    """In place of what cannot be sent."""


def _set_error(error: BaseException, state: tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]) -> None:
    args, fields, attributes = state
    BaseException.__setattr__(error, "args", args)  # also of one that is frozen
    vars(error).update(attributes)
    for name, value in fields.items():
        # What `__new__` has set cannot always be set again, and a None of an OSError's would be shown.
        if getattr(error, name, MISSING) is not value:
            with contextlib.suppress(AttributeError, TypeError):
                object.__setattr__(error, name, value)


def _fields(error: BaseException) -> dict[str, Any]:
    """What is neither in ``args`` nor in its `__dict__`: slots, and what built-in exceptions have, as ``errno``."""
    members = [member for cls in type(error).__mro__ for member in vars(cls).values()]
    names = {member.__name__ for member in members if isinstance(member, MemberDescriptorType)}
    # The object that lacked an attribute may be anything.
    names -= {"obj", "__suppress_context__"}
    return {name: getattr(error, name) for name in names if hasattr(error, name)}


def _story_of(error: BaseException) -> str:
    return f"{type(error).__module__}.{describe(error)}"


def _trace(error: Exception) -> str:
    try:
        return "".join(traceback.format_exception(error)).rstrip()
    except Exception:  # noqa: BLE001 - it asks the exception for its text
        return "".join(traceback.format_tb(error.__traceback__)).rstrip()
