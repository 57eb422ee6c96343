"""opero's one logger: loguru, silent until somebody asks for it."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loguru import Logger

__all__ = ["configure_logging"]

_NAME = "opero"
_threshold = "DEBUG"
_decided = False


def configure_logging(level: str = "INFO") -> None:
    """Let opero's messages through to the program's loguru sinks.

    No sink is added, removed or changed, so calling it twice changes nothing but the level. The same can be had with
    ``loguru.logger.enable("opero")``; ``logger.disable("opero")`` silences opero again.

    Args:
        level: The lowest loguru level that opero logs, such as ``"DEBUG"`` or ``"WARNING"``.

    Raises:
        ValueError: If loguru has no such level.
    """
    from loguru import logger

    global _threshold, _decided  # noqa: PLW0603 - one setting of one process, like loguru's own
    try:
        logger.level(level)
    except (ValueError, TypeError) as error:
        msg = f"configure_logging got level={level!r}; write a loguru level such as 'DEBUG', 'INFO' or 'WARNING'"
        raise ValueError(msg) from error
    _threshold = level
    _decided = True
    logger.enable(_NAME)


def log(level: str, message: str, *values: object) -> None:
    """Log one line of opero's; never raises, and costs next to nothing while nobody listens."""
    # A sink of the host's that raises (loguru's `catch=False`) must not end the call that is told of.
    with contextlib.suppress(Exception):
        logger = _listening_logger()
        if logger is not None and logger.level(level).no >= logger.level(_threshold).no:
            logger.log(level, message, *values)


def is_logged(level: str, message: str, *values: object) -> bool:
    """The same, and tells whether anybody listens."""
    is_heard = False

    def text() -> str:
        nonlocal is_heard
        is_heard = True
        return message.format(*values)

    with contextlib.suppress(Exception):
        logger = _listening_logger()
        if logger is not None and logger.level(level).no >= logger.level(_threshold).no:
            # loguru asks for the text where opero is enabled and a sink takes the level.
            logger.opt(lazy=True).log(level, "{}", text)
    return is_heard


def let_through(name: str) -> None:
    """Let the lines of one module of opero's through; the others stay as they are."""
    from loguru import logger

    # Once it is decided that opero is silent: deciding later would take this back.
    _listening_logger()
    logger.enable(name)


def _listening_logger() -> Logger | None:
    global _decided  # noqa: PLW0603 - as above
    # A program that never imported loguru has no sink of its own and cannot have enabled opero.
    if "loguru" not in sys.modules:
        return None
    from loguru import logger

    if not _decided:
        if not _host_has_spoken(logger):
            logger.disable(_NAME)
        # Not before: where a recursion that is too deep ends the two lines above, opero has not been silenced.
        _decided = True
    return logger


def _host_has_spoken(logger: Logger) -> bool:
    # loguru (0.7.3) has no public way to ask whether a name was enabled; calling `disable` unasked would undo a host's
    # `logger.enable("opero")` that came before.
    activations = getattr(getattr(logger, "_core", None), "activation_list", ())
    return any(name == f"{_NAME}." for name, _status in activations)
