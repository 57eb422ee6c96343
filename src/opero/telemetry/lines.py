"""opero's events as lines of a log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from opero.events import AttemptFailed, CallDone, CandidateSwitched, RetryPlanned, SlotWaited, on_event
from opero.telemetry import function_name, type_name
from opero.utils.logging import LEVELS, number_of
from opero.utils.notes import duration

if TYPE_CHECKING:
    from opero.events import Event, Subscription
    from opero.utils.logging import StandardLogger

__all__ = ["log_events"]

# Below this a wait is how a rate limit works, and not worth a line.
_TOLD_WAIT = 0.1


def log_events(level: str | StandardLogger = "INFO", *, to: StandardLogger | None = None) -> Subscription:
    """Log what goes wrong in the calls of all decorated functions of this process, and what opero does about it.

    ``WARNING``: a call failed. ``INFO``: an attempt failed, a retry is planned, another candidate is tried. ``DEBUG``:
    a rate limit made a call wait for 0.1 s or more. A line has the function's full name, the number of the call, the
    place of the item if it is one of a map (from 0), seconds, and the classes of exceptions; no arguments, no results,
    and no texts of exceptions, which may quote arguments.

    The lines go to the logger that is given, or to the program's loguru sinks as those of ``opero.telemetry.lines``; no
    sink or handler is added, removed or changed. They are let through by this call even if opero is silent otherwise,
    and opero's other messages stay as silent as they were. ``loguru.logger.disable("opero")`` after this call silences
    the lines in loguru as well.

    Args:
        level: The lowest level that is logged, such as ``"DEBUG"`` or ``"WARNING"``; or the logger itself, for what
            its own level lets through: ``log_events(logging.getLogger("myapp"))``.
        to: A logger of the standard library, which gets the lines in place of loguru.

    Returns:
        A `Subscription`, to be closed, or used as a context, when there shall be no more lines.

    Raises:
        TypeError: If ``to`` is no such logger.
        ValueError: If there is no such level.
    """
    if to is None and hasattr(level, "log"):
        level, to = "DEBUG", cast("StandardLogger", level)
    threshold = number_of(level, to, "log_events")
    logger: Any = to
    if to is None:
        from loguru import logger

        logger.enable(__name__)

    def write(event: Event) -> None:
        name, text = _line(event)
        number = LEVELS[name]
        if text and number >= threshold:
            item = "" if event.index is None else f", item {event.index}"
            logger.log(name if to is None else number, f"{function_name(event)} (call {event.call}{item}) {text}")

    return on_event(write)


def _line(event: Any) -> tuple[str, str]:
    """Level and text; without a text there is nothing to say."""
    match event:
        case AttemptFailed():
            seconds, kind = duration(event.seconds), type_name(event.error)
            return "INFO", f"failed in attempt {event.attempt} after {seconds}: {kind}"
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
