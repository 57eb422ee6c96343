"""opero's events as log lines, OpenTelemetry spans and metrics, or Prometheus metrics: one module for each.

Each is imported where it is first asked for, and imports the library that it speaks to and no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opero.utils import importing_lazily

if TYPE_CHECKING:
    from opero.events import CallDone, Event
    from opero.telemetry import lines as lines
    from opero.telemetry import otel as otel
    from opero.telemetry import prometheus as prometheus
else:
    __getattr__, __dir__ = importing_lazily(
        __name__, {f"{__name__}.{name}": [name] for name in ("lines", "otel", "prometheus")}
    )


def outcome_of(done: CallDone) -> str:
    """What spans and metrics call the end of a call."""
    if done.cancelled:
        return "cancelled"
    return "success" if done.error is None else "failure"


def function_name(event: Event) -> str:
    """The function's full name, by which series and spans of same-named functions are told apart."""
    return f"{event.module}.{event.function}" if event.module else event.function


def type_name(error: BaseException) -> str:
    """The full name of an exception's class; never its text, which may hold arguments."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
