"""What `opero.on_event` and ``on_event=`` tell of: one class for each kind of event."""

from __future__ import annotations

from dataclasses import dataclass

from opero.core.listeners import Subscription, on_event

__all__ = [
    "AttemptFailed",
    "AttemptStarted",
    "CacheHit",
    "CallDone",
    "CallStarted",
    "CandidateSwitched",
    "CircuitChanged",
    "Event",
    "RetryPlanned",
    "SlotWaited",
    "Subscription",
    "on_event",
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened during a call; arguments and results are never in it, they may be secrets.

    Attributes:
        function: Qualified name of the decorated function.
        module: Name of the module that it was defined in, ``""`` if there is none.
        call: Number of the call, the same in all its events and in no other call of this process.
        index: Place of the item in its map, from 0; None for a single call.
        time: Seconds since the epoch.
    """

    function: str
    module: str
    call: int
    index: int | None
    time: float


@dataclass(frozen=True, kw_only=True)
class CallStarted(Event):
    """A call begins."""


@dataclass(frozen=True, kw_only=True)
class CacheHit(Event):
    """The result came from the cache, or from an identical call under way."""


@dataclass(frozen=True, kw_only=True)
class SlotWaited(Event):
    """The rate limit made the call wait.

    Attributes:
        seconds: For how long.
    """

    seconds: float


@dataclass(frozen=True, kw_only=True)
class AttemptStarted(Event):
    """The function begins; in a map, its item is sent to a worker.

    Attributes:
        attempt: Number of the execution in this call, from 1.
        round: Number of the round, from 1.
    """

    attempt: int
    round: int


@dataclass(frozen=True, kw_only=True)
class AttemptFailed(Event):
    """The function raised, was stopped by a time limit, or lost its worker.

    Attributes:
        attempt: Number of the execution in this call, from 1.
        error: What it raised.
        seconds: Since the attempt started.
    """

    attempt: int
    error: Exception
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CandidateSwitched(Event):
    """The next candidate of the fallback is tried; its value is not told, it may be a secret.

    Attributes:
        place: Its place among the candidates of this call, from 0.
    """

    place: int


@dataclass(frozen=True, kw_only=True)
class CircuitChanged(Event):
    """How an attempt ended has opened a circuit, or closed it again.

    Attributes:
        state: ``"open"`` or ``"closed"``.
        place: Which candidate it is of, by its place in this call, from 0; None without candidates. (With ``per``, the
            circuit is that of the call's value, which is not told.)
    """

    state: str
    place: int | None


@dataclass(frozen=True, kw_only=True)
class RetryPlanned(Event):
    """A round has failed, another one will follow.

    Attributes:
        round: Number of the round that failed, from 1.
        delay: Seconds until the next one.
        error: The error that speaks for the round.
    """

    round: int
    delay: float
    error: Exception


@dataclass(frozen=True, kw_only=True)
class CallDone(Event):
    """A call has ended.

    Attributes:
        error: What it raises, None if it succeeded or was cancelled.
        attempts: Executions of the function.
        seconds: Since it started, waits included.
        cached: Whether the result came from the cache.
        cancelled: Whether it was given up: cancellation, Ctrl-C, a map that was closed.
    """

    error: Exception | None
    attempts: int
    seconds: float
    cached: bool
    cancelled: bool
