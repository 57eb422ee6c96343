"""opero's events as lines of loguru."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.events import AttemptFailed, CallDone, CandidateSwitched, RetryPlanned, SlotWaited, on_event
from opero.telemetry.naming import function_name, type_name
from opero.utils.logging import let_through
from opero.utils.notes import duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from loguru import Logger

    from opero.events import Event, Subscription

__all__ = ["log_events"]

# Below this a wait is how a rate limit works, and not worth a line.
_TOLD_WAIT = 0.1


def log_events(level: str = "INFO") -> Subscription:
    """Log what goes wrong in the calls of all decorated functions of this process, and what opero does about it.

    ``WARNING``: a call failed. ``INFO``: an attempt failed, a retry is planned, another candidate is tried. ``DEBUG``:
    a rate limit made a call wait for 0.1 s or more. A line has the function's full name, the number of the call, the
    place of the item if it is one of a map (from 0), seconds, and the classes of exceptions; no arguments, no results,
    and no texts of exceptions, which may quote arguments.

    The lines go to the program's loguru sinks as those of ``opero.telemetry.lines``; no sink is added, removed or
    changed. They are let through by this call even if opero is silent otherwise, and opero's other messages stay as
    silent as they were. ``loguru.logger.disable("opero")`` after this call silences the lines as well.

    Args:
        level: The lowest loguru level that is logged, such as ``"DEBUG"`` or ``"WARNING"``.

    Returns:
        A `Subscription`, to be closed, or used as a context, when there shall be no more lines.

    Raises:
        ValueError: If loguru has no such level.
    """
    from loguru import logger

    try:
        threshold = logger.level(level).no
    except (ValueError, TypeError) as error:
        msg = f"log_events got level={level!r}; write a loguru level such as 'DEBUG', 'INFO' or 'WARNING'"
        raise ValueError(msg) from error
    let_through(__name__)
    return on_event(_writer(logger, threshold))


def _writer(logger: Logger, threshold: int) -> Callable[[Event], None]:
    def write(event: Event) -> None:
        level, text = _line(event)
        if text and logger.level(level).no >= threshold:
            item = "" if event.index is None else f", item {event.index}"
            logger.log(level, "{} (call {}{}) {}", function_name(event), event.call, item, text)

    return write


def _line(event: Any) -> tuple[str, str]:
    """Level and text; without a text there is nothing to say."""
    match event:
        case AttemptFailed():
            return (
                "INFO",
                f"failed in attempt {event.attempt} after {duration(event.seconds)}: {type_name(event.error)}",
            )
        case RetryPlanned():
            return "INFO", f"begins round {event.round + 1} in {duration(event.delay)}"
        case CandidateSwitched():
            return "INFO", f"goes on with candidate {event.place + 1}"
        case SlotWaited() if event.seconds >= _TOLD_WAIT:
            return "DEBUG", f"waited {duration(event.seconds)} for the rate limit"
        case CallDone() if event.error is not None:
            attempts = "1 attempt" if event.attempts == 1 else f"{event.attempts} attempts"
            return "WARNING", f"failed after {attempts} in {duration(event.seconds)}: {type_name(event.error)}"
    return "DEBUG", ""
