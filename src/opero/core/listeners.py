"""Who is told of what happens during calls.

Nobody listens by default, and then nothing here runs: see `opero.core.switches`. The events themselves are in
`opero.events`, which is imported when somebody is told of one.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self

from opero.core.checks import check_callable
from opero.core.clock import clock
from opero.core.forks import ForkSafeLock
from opero.core.switches import switches
from opero.utils.logging import log
from opero.utils.notes import describe

if TYPE_CHECKING:
    from opero.core.plan import Call, Plan

Listener = Callable[[Any], object]
Kind = Literal[
    "AttemptFailed",
    "AttemptStarted",
    "CacheHit",
    "CallDone",
    "CallStarted",
    "CandidateSwitched",
    "RetryPlanned",
    "SlotWaited",
]

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

    It gets one `opero.events.Event` at a time, in the thread (or event loop) that makes the call, and should be quick.
    An `Exception` that it raises is logged once and changes nothing. While somebody listens, every call takes the
    slower way (some microseconds more).

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

    __slots__ = ("_call", "_events", "_listeners", "_name", "_number")

    def __init__(self, plan: Plan, call: Call, listeners: tuple[Listener, ...]) -> None:
        from opero import events

        self._events: Any = events
        self._name = plan.name
        self._call = call
        self._listeners = listeners
        self._number = next(_numbers)

    def __call__(self, kind: Kind, **facts: Any) -> None:
        make = getattr(self._events, kind)
        event = make(function=self._name, call=self._number, index=self._call.index, time=clock.wall(), **facts)
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
