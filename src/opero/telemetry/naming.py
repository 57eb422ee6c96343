"""What spans, metrics and lines call the things that they tell of."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opero.events import CallDone

SUCCESS = "success"
FAILURE = "failure"
CANCELLED = "cancelled"


def outcome_of(done: CallDone) -> str:
    if done.cancelled:
        return CANCELLED
    return SUCCESS if done.error is None else FAILURE


def type_name(error: BaseException) -> str:
    """The full name of an exception's class; never its text, which may hold arguments."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
