"""Exceptions on their way out of a worker process, with what they were raised from."""

from __future__ import annotations

import contextlib
import copyreg
import io
import traceback
from collections.abc import Mapping
from types import MemberDescriptorType
from typing import Any

from opero.concurrency.pickling import ReportPickler, loads, report_dumps
from opero.core.signature import MISSING, find_by_name
from opero.exceptions import RemoteError
from opero.utils.notes import IN_THE_WORKER, add_note, describe, drop_notes, users_part

# Causes of causes.
_MOST_LINKS = 10

# An exception pickled, what it says, and what hangs on it: cause, context, whether that is hidden, those in a group.
Packed = tuple[bytes, str, "Links"]
Links = tuple[Packed | None, Packed | None, bool, list["Links"]]
_NO_LINKS: Links = (None, None, False, [])


def pack_error(error: Exception) -> Packed:
    """Pickle an exception; what cannot be pickled arrives as a `RemoteError` that says the same."""
    if error.__traceback__ is not None:
        # The function may raise one object again and again, with what it got here before.
        drop_notes(error, IN_THE_WORKER)
        error.__traceback__ = users_part(error.__traceback__)
        add_note(error, f"{IN_THE_WORKER}{_trace(error)}")
        error.__traceback__ = None
    return _pack(error, ())


def unpack_error(packed: Packed) -> Exception:
    data, story, links = packed
    try:
        error: Exception = loads(data)
    except Exception:  # noqa: BLE001 - anything may happen in a user's __setstate__
        error = RemoteError(story)
    _link(error, links)
    return error


def _pack(error: BaseException, above: tuple[int, ...]) -> Packed:
    return _dumps(error), story_of(error), _links_of(error, above)


def _links_of(error: BaseException, above: tuple[int, ...]) -> Links:
    if id(error) in above or len(above) >= _MOST_LINKS:
        return _NO_LINKS
    above = (*above, id(error))
    cause, context = error.__cause__, error.__context__
    return (
        None if cause is None else _pack(cause, above),
        # Mostly what it was raised from is what was being handled.
        None if context is None or context is cause else _pack(context, above),
        error.__suppress_context__,
        [_links_of(member, above) for member in getattr(error, "exceptions", ())],
    )


def _link(error: BaseException, links: Links) -> None:
    cause, context, is_hidden, members = links
    error.__cause__ = None if cause is None else unpack_error(cause)
    error.__context__ = error.__cause__ if context is None else unpack_error(context)
    error.__suppress_context__ = is_hidden
    for member, its in zip(getattr(error, "exceptions", ()), members, strict=False):
        _link(member, its)


def _dumps(error: BaseException) -> bytes:
    plain = _copy_of(error)
    if _is_like(plain, error):
        return report_dumps(error)
    if find_by_name(type(error).__module__, type(error).__qualname__) is not type(error) and _is_a_base(plain, error):
        # Its class was made at run time, and it says by itself what it is elsewhere.
        return report_dumps(error)
    for pickler in (_RemakingPickler, _LossyPickler):
        with contextlib.suppress(Exception):
            written = io.BytesIO()
            pickler(written).dump(error)
            copy = loads(written.getvalue())
            # Whoever prints one whose text raises would raise, too.
            if _is_like(copy, error) and str(copy) == str(error):
                return written.getvalue()
    if type(plain) is type(error):
        # Its text may be another each time.
        return report_dumps(error)
    remote = RemoteError(story_of(error))
    if _copy_of(type(error)) is type(error):
        remote.error_class = type(error)
    for note in getattr(error, "__notes__", ()):
        add_note(remote, note)
    return report_dumps(remote)


def _copy_of(thing: Any) -> Any:
    """What arrives of it; None if nothing does."""
    try:
        return loads(report_dumps(thing))
    except Exception:  # noqa: BLE001 - anything may happen in a user's __getstate__
        return None


def _is_a_base(copy: Any, error: BaseException) -> bool:
    """Whether it says the same as an exception of a class from which the error's own one is derived."""
    return isinstance(copy, Exception) and isinstance(error, type(copy)) and str(copy) == str(error)


def _is_like(copy: Any, error: BaseException) -> bool:
    """Whether it says the same, and has its slots: plain pickle runs `__init__` again, with ``args``, and no slots."""
    if type(copy) is not type(error) or describe(copy) != describe(error):
        return False
    if _fields(copy).keys() != _fields(error).keys():
        return False
    if isinstance(error, BaseExceptionGroup) and isinstance(copy, BaseExceptionGroup):
        return all(map(_is_like, copy.exceptions, error.exceptions))
    return True


class _RemakingPickler(ReportPickler):
    """Makes exceptions again without their `__init__`, which takes what ``args`` does not hold; in a group, too."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, BaseException) or _is_like(_copy_of(obj), obj):
            return super().reducer_override(obj)
        state = obj.args, _fields(obj), vars(obj)
        return copyreg.__newobj__, (type(obj), *obj.args), state, None, None, _set_error  # type: ignore[attr-defined]


class _LossyPickler(_RemakingPickler):
    """Leaves out what cannot be sent, such as the open response in an `HTTPError`, and keeps what can: the status."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, BaseException) or _copy_of(obj) is not None:
            return super().reducer_override(obj)
        try:
            obj.__reduce_ex__(4)
        except Exception:  # noqa: BLE001 - as in _copy_of
            if isinstance(obj, io.IOBase):
                # An empty one: Python 3.12 closes that of an `HTTPError`, which cannot be None, and handlers read it.
                return (io.StringIO if isinstance(obj, io.TextIOBase) else io.BytesIO), ()
            # Headers are often read-only mappings, which cannot be pickled.
            return (dict, (dict(obj),)) if isinstance(obj, Mapping) else (_left_out, ())
        # Something in it cannot, and comes here by itself.
        return super().reducer_override(obj)


def _left_out() -> None:
    """In place of what cannot be sent."""


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


def story_of(error: BaseException) -> str:
    return f"{type(error).__module__}.{text_of(error)}"


def text_of(error: BaseException) -> str:
    try:
        return f"{type(error).__qualname__}: {error}"
    except Exception:  # noqa: BLE001 - anything may happen in a user's __str__
        return f"{type(error).__qualname__} (it has no text)"


def _trace(error: Exception) -> str:
    try:
        return "".join(traceback.format_exception(error)).rstrip()
    except Exception:  # noqa: BLE001 - it asks the exception for its text
        return "".join(traceback.format_tb(error.__traceback__)).rstrip()
