"""Log records of worker processes, on their way to the handlers of the parent."""

from __future__ import annotations

import contextlib
import logging
import pickle
from logging.handlers import QueueHandler
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from opero.utils.logging import log
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def levels_here() -> dict[str, int]:
    """The levels of those loggers that have one of their own."""
    return {logger.name: logger.level for logger in _loggers() if logger.level}


@contextlib.contextmanager
def taken_from_handlers(levels: dict[str, int], send: Callable[[bytes], None]) -> Iterator[None]:
    """Take the parent's handlers from a worker's loggers, and let ``send`` have what they would have got.

    If the initializer, which runs in the block, gives any logger a handler, the program does that by itself.
    """
    for logger in _loggers():
        # Not closed: in a forked worker their files are the parent's, too.
        logger.handlers.clear()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    yield
    if any(logger.handlers for logger in _loggers()):
        return
    # Of a record it sends what it says now: its arguments may not be picklable.
    queue: Any = SimpleNamespace(put_nowait=lambda record: send(pickle.dumps(record)))
    handler = QueueHandler(queue)
    for logger in _loggers():
        if logger.parent is None or not logger.propagate:
            logger.addHandler(handler)


def hand_on(data: Any) -> None:
    """Let the handlers of this process have a record of a worker's."""
    try:
        record = pickle.loads(data)  # noqa: S301 - from a worker
    except Exception as error:  # noqa: BLE001 - what the program has added to a record may not be known here
        log("WARNING", "a log record of a worker cannot be unpickled: {}", describe(error))
        return
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def _loggers() -> list[logging.Logger]:
    known = list(logging.Logger.manager.loggerDict.values())
    return [logging.getLogger(), *(logger for logger in known if isinstance(logger, logging.Logger))]
