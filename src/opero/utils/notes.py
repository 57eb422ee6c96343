"""What opero tells of exceptions: their notes, their classes, how long they took."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from types import MemberDescriptorType
from typing import TYPE_CHECKING, Any

from opero.core.signature import MISSING
from opero.exceptions import OperoError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

IN_THE_WORKER = "in the worker:\n"


def add_note(error: BaseException, note: str, *, instead_of: str | None = None) -> None:
    """Add a note, in place of earlier ones that begin with ``instead_of``; never raises.

    One exception object can end many calls, and shall tell the story of the last one only. Some exceptions refuse
    attributes; a note is no reason to lose them.
    """
    with contextlib.suppress(Exception):
        if instead_of is not None:
            drop_notes(error, instead_of)
        error.add_note(note)


def drop_notes(error: BaseException, beginning: str) -> None:
    """Remove the notes that begin so; never raises."""
    with contextlib.suppress(Exception):
        if hasattr(error, "__notes__"):
            error.__notes__ = [note for note in error.__notes__ if not str(note).startswith(beginning)]


def link(
    error: BaseException, *, cause: BaseException | None, context: BaseException | None, hides_context: bool
) -> None:
    """Say what an exception was raised from, also of one that is frozen."""
    BaseException.__setattr__(error, "__cause__", cause)
    BaseException.__setattr__(error, "__context__", context)
    BaseException.__setattr__(error, "__suppress_context__", hides_context)


def state_of(error: BaseException) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """For `set_error`: ``args``; fields, that is slots and what built-in exceptions have, as ``errno``; attributes."""
    members = [member for cls in type(error).__mro__ for member in vars(cls).values()]
    names = {member.__name__ for member in members if isinstance(member, MemberDescriptorType)}
    # The object that lacked an attribute may be anything.
    names -= {"obj", "__suppress_context__"}
    return error.args, {name: getattr(error, name) for name in names if hasattr(error, name)}, vars(error)


def new_error(kind: type[Any], args: tuple[Any, ...]) -> Any:
    """An exception made without its `__init__`; lxml's inherit a `__new__` that refuses them, where another serves."""
    for cls in kind.__mro__:
        with contextlib.suppress(TypeError):
            return cls.__new__(kind, *args)
    raise TypeError(kind)


def set_error(error: BaseException, state: tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]) -> None:
    """Give an exception the ``args``, the fields and the attributes of another of its class."""
    args, fields, attributes = state
    BaseException.__setattr__(error, "args", args)  # also of one that is frozen
    vars(error).update(attributes)
    for name, value in fields.items():
        # What `__new__` has set cannot always be set again, and a None of an OSError's would be shown.
        if getattr(error, name, MISSING) is not value:
            with contextlib.suppress(AttributeError, TypeError):
                object.__setattr__(error, name, value)


def says_how_it_is_pickled(error: BaseException) -> bool:
    """Whether its class does, and not only a built-in one."""
    names = {"__reduce__", "__reduce_ex__"}
    return next(cls for cls in type(error).__mro__ if vars(cls).keys() & names).__module__ != "builtins"


def reduced_error(error: BaseException) -> Any:
    """For a pickler's `reducer_override`: it is made without its `__init__`, as by `copied`."""
    if says_how_it_is_pickled(error):
        return NotImplemented
    return new_error, (type(error), error.args), state_of(error), None, None, set_error


def copied(error: Exception, *, context: BaseException | None = None) -> Exception:
    """The same error without the frames that it has come through; a copy, if its class can be copied.

    Made without its `__init__`, which may take what ``args`` does not hold, unless its class says how.
    """
    made = error
    with contextlib.suppress(Exception):
        kind = type(error)
        made = copy.copy(error) if says_how_it_is_pickled(error) else new_error(kind, error.args)
        set_error(made, state_of(error))
        link(made, cause=error.__cause__, context=context, hides_context=error.__suppress_context__)
        if hasattr(error, "__notes__"):
            made.__notes__ = [*error.__notes__]
    return made.with_traceback(None)


def describe(error: BaseException) -> str:
    """Class and text of an exception, whatever its ``__str__`` does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - the user's code
        return type(error).__name__


def class_counts(errors: Iterable[BaseException]) -> str:
    """How many of which classes, most frequent first: ``TimeoutError (3), ValueError (1)``."""
    kinds = Counter(type(error).__name__ for error in errors).most_common()
    return ", ".join(f"{kind} ({count})" for kind, count in kinds)


def folded(errors: Sequence[Exception]) -> list[Exception]:
    """One of those that have the same class and text and were raised in the same line, with a note of how many."""
    alike: dict[Any, list[Exception]] = {}
    for error in errors:
        error.with_traceback(users_part(error.__traceback__))
        end = raised_in(error)
        place = end and (end.tb_frame.f_code, end.tb_lineno)
        alike.setdefault((type(error), describe(error), place), []).append(error)
    for first, *others in alike.values():
        if others:
            add_note(first, f"opero: raised {len(others) + 1} times", instead_of="opero: raised ")
    return [same[0] for same in alike.values()]


def shorten(error: BaseException) -> None:
    """Leave one frame of opero's in a traceback: that in which this is called, which the error passes through.

    Where nothing of the user's follows, the frame that raised stays, too, unless the error is one of opero's own, or
    one of a worker's, which tells in a note where it was raised.
    """
    # Whatever the error's attributes do, it is the error that is raised.
    with contextlib.suppress(Exception):
        trace = error.__traceback__
        assert trace is not None  # noqa: S101 - for the type checkers
        rest = users_part(trace.tb_next)
        notes = getattr(error, "__notes__", ())
        is_told = isinstance(error, OperoError) or any(str(note).startswith(IN_THE_WORKER) for note in notes)
        if rest is None and trace.tb_next is not None and not is_told:
            rest = raised_in(error)
        trace.tb_next = rest


class Shortened:
    """A block from which errors come with no other frame of opero's than its own; see `shorten`."""

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, (Exception, KeyboardInterrupt)):
            shorten(error)


def users_part(trace: TracebackType | None) -> TracebackType | None:
    """What follows the frames of opero's, and of the event loop in a worker thread, with which a traceback begins."""
    while trace is not None and package_of(trace) in {"opero", "asyncio"}:
        trace = trace.tb_next
    return trace


def package_of(trace: TracebackType | None) -> str:
    """The package whose code is there in a traceback."""
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]


def raised_in(error: BaseException) -> TracebackType | None:
    """The end of a traceback, where the error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


_UNITS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def duration(seconds: float) -> str:
    """Seconds as a person would say it: ``86 µs``, ``1.2 s``, ``3 min``."""
    if not seconds:
        return "0 s"
    # What would be rounded up to the next unit is told in that one.
    size, unit = next((known for known in _UNITS if seconds >= 0.9995 * known[0]), _UNITS[-1])
    number = seconds / size
    digits = f"{number:.1f}" if number < 9.95 else f"{number:.0f}"  # noqa: PLR2004
    return f"{digits.removesuffix('.0')} {unit}"
