"""What opero raises by itself; every other exception comes from the user's function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "AllFailedError",
    "CallTimeoutError",
    "CircuitOpenError",
    "FailedItemsWarning",
    "MisuseError",
    "NotTransferableError",
    "OperoError",
    "RateLimitedError",
    "RejectedResultError",
    "RemoteError",
    "UnsafeCacheError",
    "WorkerCrashedError",
]


class OperoError(Exception):
    """Base of every exception class that opero defines."""


class AllFailedError(OperoError, ExceptionGroup[Exception]):
    """Every candidate of an ``arg_fallback`` parameter failed in every round.

    It is an `ExceptionGroup`, so ``except*`` and ``split`` reach the single errors. Of those that are alike (of one
    class, with one text, raised in one line) only the first is in the group, with a note that says how often it was
    raised. The message names the function, the parameter, the number of rounds and how many errors of which classes,
    never a candidate's value (candidates are often secrets).

    Attributes:
        errors: All underlying exceptions, in the order in which they happened.
    """

    errors: list[Exception]

    def __init__(self, message: str, exceptions: Sequence[Exception]) -> None:
        super().__init__(message, exceptions)
        self.errors = list(exceptions)

    def derive(self, excs: Sequence[Exception], /) -> AllFailedError:  # type: ignore[override]  # typeshed's is generic
        """Keep the class when ``split`` or ``except*`` makes a part of this group."""
        return AllFailedError(self.message, excs)


class CallTimeoutError(OperoError, TimeoutError):
    """``attempt_timeout`` or ``total_timeout`` ended a call; the function's own `TimeoutError` is never this class."""


class RejectedResultError(OperoError):
    """The function returned, but ``retry_if_result`` rejected what; the message does not show it.

    Attributes:
        result: What was rejected.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class MisuseError(OperoError, TypeError):
    """A call showed that the function cannot be used in the way it was decorated; ends the call without a retry."""


class WorkerCrashedError(OperoError):
    """The worker process that ran an item ended in the middle of it; the message has the exit code or the signal."""


class NotTransferableError(OperoError):
    """An item, a result or an exception cannot be pickled on its way to or from a worker; the message has its text."""


class RemoteError(OperoError):
    """An exception of a worker process that cannot be pickled; the message has its class and its text.

    Attributes:
        error_class: Its class, by which ``retry_on`` knows it; None if that cannot be pickled either.
    """

    error_class: type[BaseException] | None = None


class UnsafeCacheError(OperoError, PermissionError):
    """The folder of a disk cache could have been filled by somebody else."""


class FailedItemsWarning(OperoError, UserWarning):  # noqa: N818 - a warning, which is raised where warnings are errors
    """Items of a map failed, and ``return_exceptions`` does not say that their exceptions shall be in its list.

    It is a warning, shown once for each map. Where warnings are errors it is raised in place of the list.

    Attributes:
        results: The list that the map returns, an `opero.Results`.
    """

    def __init__(self, message: str, results: Any = None) -> None:
        super().__init__(message)
        self.results = results


class CircuitOpenError(OperoError):
    """The function was not called: it failed too often in a row, and ``breaker`` lets the service rest.

    Attributes:
        retry_in: Seconds until the next trial may be made; None while one is under way, or if nobody knows.
        place: Which candidate of ``arg_fallback`` that is, from 0; None without candidates.
    """

    def __init__(self, message: str, retry_in: float | None = None, place: int | None = None) -> None:
        super().__init__(message)
        self.retry_in = retry_in
        self.place = place


class RateLimitedError(OperoError):
    """The rate limit has no slot free, and ``when_full`` or ``max_wait`` lets the call not wait for it.

    Attributes:
        retry_in: Seconds until a slot should come.
    """

    def __init__(self, message: str, retry_in: float = 0.0) -> None:
        super().__init__(message)
        self.retry_in = retry_in
