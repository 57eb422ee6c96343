"""What becomes of a backend that fails: it is left alone for a while, and complained about once."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from opero.core.clock import clock
from opero.exceptions import OperoError
from opero.utils.logging import log
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Iterator

# How long a backend that failed as a whole is left alone.
REST_SECONDS = 5.0


class Rest:
    """Leaves a backend alone for a while after it failed, so that it costs time only once."""

    # Why it is left alone, and until when.
    error: Exception | None = None
    _until = 0.0

    def begin(self, error: Exception) -> None:
        self.error, self._until = error, clock.now() + REST_SECONDS

    def end(self) -> None:
        self.error = None

    def reason(self) -> Exception | None:
        """Why the backend is left alone now; at the end of a rest one caller is let through to try."""
        error = self.error
        if error is not None and clock.now() >= self._until:
            self.begin(error)
            return None
        return error


class Complaints:
    """One WARNING about a backend; what follows is of interest to those who debug."""

    def __init__(self, what: str, consequence: str = "going on without it") -> None:
        self._what = what
        self._consequence = consequence
        self._told = False

    def tell(self, error: Exception) -> None:
        level, self._told = ("DEBUG" if self._told else "WARNING"), True
        # What a server or a result says must not look like a line of its own, or steer a terminal.
        text = "".join(char if char.isprintable() else " " for char in describe(error))
        log(level, "{} failed, {}: {}", self._what, self._consequence, text)


@contextlib.contextmanager
def managing(backend: object, what: str) -> Iterator[None]:
    """Who manages a cache is told when that failed: it is not a call that could go on without."""
    try:
        yield
    except OperoError:
        raise
    except Exception as error:
        raise OperoError(f"could not {what} {backend}: {describe(error)}") from error
