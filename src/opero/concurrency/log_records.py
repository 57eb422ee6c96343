"""Log records of worker processes, on their way to the handlers of the parent."""

from __future__ import annotations

import contextlib
import pickle
import sys
from typing import TYPE_CHECKING, Any

from opero.utils.logging import log
from opero.utils.notes import describe

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterator


# Of each logger that is configured in the parent: its level, and whether loggers above it see its records, too.
Settings = dict[str, tuple[int, bool]]


def settings_here() -> Settings:
    if "logging" not in sys.modules:
        return {}
    return {name: (its.level, its.propagate) for name, its in _loggers() if its.level or not its.propagate}


@contextlib.contextmanager
def taken_from_handlers(settings: Settings, send: Callable[[bytes], None]) -> Iterator[None]:
    """Take the parent's handlers from a worker's loggers, and let ``send`` have what they would have got.

    If the initializer, which runs in the block, gives any logger a handler, the program does that by itself.
    """
    import logging

    for _, logger in _loggers():
        # Not closed: in a forked worker their files are the parent's, too.
        logger.handlers.clear()
    for name, (level, propagate) in settings.items():
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate = propagate
    yield
    if any(logger.handlers for _, logger in _loggers()):
        return
    from logging.handlers import QueueHandler

    class ToParent(QueueHandler):
        def enqueue(self, record: logging.LogRecord) -> None:
            # What it says now is all that is sent: its arguments may not be picklable.
            send(pickle.dumps(record))

    handler = ToParent(None)  # type: ignore[arg-type]  # a queue is needed for its own `enqueue` only
    logging.getLogger().addHandler(handler)
    for name, (_, propagate) in settings.items():
        if not propagate:
            logging.getLogger(name).addHandler(handler)


def hand_on(data: Any) -> None:
    """Let the handlers of this process have a record of a worker's."""
    import logging

    try:
        record = pickle.loads(data)  # noqa: S301 - from a worker
    except Exception as error:  # noqa: BLE001 - what the program has added to a record may not be known here
        log("WARNING", "a log record of a worker cannot be unpickled: {}", describe(error))
        return
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def _loggers() -> Iterator[tuple[str, logging.Logger]]:
    import logging

    yield "root", logging.getLogger()
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger):
            yield name, logger
