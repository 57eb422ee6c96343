"""What happens during calls, told to those who want to know.

Nobody listens by default, and then nothing here runs: see `opero.core.switches`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from opero.core.checks import check_callable
from opero.core.clock import clock
from opero.core.forks import ForkSafeLock
from opero.core.switches import switches
from opero.utils.logging import log
from opero.utils.notes import describe

if TYPE_CHECKING:
    from opero.core.plan import Call, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened during a call; arguments and results are never in it, they may be secrets.

    Attributes:
        function: Qualified name of the decorated function.
        call: Number of the call, the same in all its events and in no other call of this process.
        index: Place of the item in its map, from 0; None for a single call.
        time: Seconds since the epoch.
    """

    function: str
    call: int
    index: int | None
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStarted(Event):
    """A call begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheHit(Event):
    """The result came from the cache, or from an identical call under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotWaited(Event):
    """The rate limit made the call wait.

    Attributes:
        seconds: For how long.
    """

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStarted(Event):
    """The function is about to run; in a map, as soon as a worker is free.

    Attributes:
        attempt: Number of the execution in this call, from 1.
        round: Number of the round, from 1.
    """

    attempt: int
    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateSwitched(Event):
    """The next candidate of the fallback is tried; its value is not told, it may be a secret.

    Attributes:
        place: Its place among the candidates of this call, from 0.
    """

    place: int


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
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


Listener = Callable[[Any], object]

_numbers = itertools.count(1)
_lock = ForkSafeLock()
_everybody: tuple[Listener, ...] = ()
_complained = threading.Event()


class Subscription:
    """A callback that is told of all functions' events until this is closed; also a context for a ``with`` block."""

    def __init__(self, callback: Listener) -> None:
        global _everybody  # noqa: PLW0603 - one list for all functions
        self._callback: Listener | None = callback
        with _lock.lock:
            _everybody = (*_everybody, callback)
        switches.listening(begins=True)

    def close(self) -> None:
        """Tell the callback of nothing any more; calls under way still tell it of their ends."""
        global _everybody  # noqa: PLW0603 - as above
        callback, self._callback = self._callback, None
        if callback is None:
            return
        with _lock.lock:
            # By identity: callbacks may be equal to others, or to none.
            place = next(place for place, other in enumerate(_everybody) if other is callback)
            _everybody = (*_everybody[:place], *_everybody[place + 1 :])
        switches.listening(begins=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def on_event(callback: Callable[[Any], object]) -> Subscription:
    """Tell ``callback`` of what happens during the calls of all decorated functions of this process.

    It gets one `Event` at a time, in the thread (or event loop) that makes the call, and should be quick. An
    `Exception` that it raises is logged once and changes nothing. While somebody listens, every call takes the slower
    way (some microseconds more).

    Args:
        callback: A plain function of one event.

    Returns:
        A `Subscription`, to be closed, or used as a context, when the callback shall hear no more.

    Raises:
        TypeError: If it cannot be called, or is async.
    """
    return Subscription(check_callable("on_event", callback, "a function of one event"))


class Teller:
    """Tells the listeners of one call."""

    __slots__ = ("_call", "_listeners", "_name", "_number", "attempt_started")

    def __init__(self, plan: Plan, call: Call, listeners: tuple[Listener, ...]) -> None:
        self._name = plan.name
        self._call = call
        self._listeners = listeners
        self._number = next(_numbers)
        self.attempt_started = 0.0

    def __call__(self, kind: type[Event], **facts: Any) -> None:
        event = kind(function=self._name, call=self._number, index=self._call.index, time=clock.wall(), **facts)
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as error:  # noqa: BLE001 - who listens must not change what happens
                _complain(listener, error)


def teller_of(plan: Plan, call: Call) -> Teller | None:
    """Who tells of a call; None if nobody listens."""
    listeners = _everybody if plan.on_event is None else (plan.on_event, *_everybody)
    return Teller(plan, call, listeners) if listeners else None


def is_listened_to(plan: Plan) -> bool:
    """Whether the calls of a function have to be told of."""
    return plan.on_event is not None or bool(_everybody)


def _complain(listener: Listener, error: Exception) -> None:
    if not _complained.is_set():
        _complained.set()
        log("WARNING", "on_event={!r} raised, and goes on being told: {}", listener, describe(error))
