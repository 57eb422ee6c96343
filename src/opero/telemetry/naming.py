"""What spans and metrics call the things that they tell of."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opero.events import CallDone, Event

SUCCESS = "success"
FAILURE = "failure"
CANCELLED = "cancelled"


def outcome_of(done: CallDone) -> str:
    if done.cancelled:
        return CANCELLED
    return SUCCESS if done.error is None else FAILURE


def function_name(event: Event) -> str:
    """The function's full name, by which series and spans of same-named functions are told apart."""
    return f"{event.module}.{event.function}" if event.module else event.function


def type_name(error: BaseException) -> str:
    """The full name of an exception's class; never its text, which may hold arguments."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
