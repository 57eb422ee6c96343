"""opero's one logger: loguru, or one of the standard library; silent until somebody asks for it."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import logging

    from loguru import Logger

    StandardLogger: TypeAlias = "logging.Logger | logging.LoggerAdapter[Any]"

__all__ = ["configure_logging"]

_NAME = "opero"
# Those of opero's lines, which have the same numbers in loguru and in the standard library.
LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30}
_threshold = LEVELS["DEBUG"]
# The logger that gets messages in place of loguru, if there is one.
standard: list[StandardLogger] = []


def configure_logging(level: str = "INFO", *, to: StandardLogger | None = None) -> None:
    """Let opero's messages through to the program's loguru sinks, or to a logger of the standard library.

    No sink and no handler is added, removed or changed, so calling it twice changes nothing but what it was told the
    last time. With loguru the same can be had with ``loguru.logger.enable("opero")``; ``logger.disable("opero")``
    silences opero again.

    Args:
        level: The lowest level that opero logs, such as ``"DEBUG"`` or ``"WARNING"``.
        to: Where messages go in place of loguru, as ``logging.getLogger("myapp")``, by its level and handlers.

    Raises:
        TypeError: If ``to`` is no such logger.
        ValueError: If there is no such level.
    """
    global _threshold  # noqa: PLW0603 - one setting of one process, like loguru's own
    _threshold = number_of(level, to, "configure_logging")
    standard[:] = [] if to is None else [to]
    if to is None:
        from loguru import logger

        logger.enable(_NAME)


def number_of(level: Any, to: Any, where: str) -> int:
    """A level as a number: one of loguru's, or of the standard library's, which are the same for what both know."""
    if to is not None and not (hasattr(to, "isEnabledFor") and hasattr(to, "log")):
        kind = type(to).__name__
        msg = f"{where} got a {kind} as to; write a logger of the standard library, or leave it out for loguru"
        raise TypeError(msg)
    try:
        if to is None:
            from loguru import logger

            return logger.level(level).no
        import logging

        return logging.getLevelNamesMapping()[level]
    except (ValueError, TypeError, KeyError) as error:
        whose = "loguru" if to is None else "logging"
        msg = f"{where} got level={level!r}; write a {whose} level such as 'DEBUG', 'INFO' or 'WARNING'"
        raise ValueError(msg) from error


def log(level: str, message: str, *values: object) -> None:
    """Log one line of opero's; never raises."""
    number = LEVELS[level]
    # A sink of the host's that raises (loguru's `catch=False`) must not end the call that is told of.
    with contextlib.suppress(Exception):
        if number < _threshold:
            return
        if standard:
            standard[0].log(number, message.format(*values))
        elif (logger := _listening_logger()) is not None:
            # loguru asks for the text where opero is enabled and a sink takes the level.
            logger.opt(lazy=True).log(level, "{}", lambda: message.format(*values))


def _listening_logger() -> Logger | None:
    """loguru's, if somebody has enabled opero by its name; whether it was disabled since, loguru knows."""
    # A program that never imported loguru has no sink of its own and cannot have enabled opero.
    if "loguru" not in sys.modules:
        return None
    from loguru import logger

    # loguru (0.7.3) has no public way to ask whether a name was enabled, and enables what nobody has named.
    activations = getattr(getattr(logger, "_core", None), "activation_list", ())
    return logger if any(name == f"{_NAME}." for name, _status in activations) else None
