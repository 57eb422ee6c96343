"""What happens during calls, who is told of it, and the two switches that every call looks at.

One class for each kind of event comes first; then `on_event`, ``on_event=`` of the decorators, and `switches`. Nobody
listens by default, and then a call looks at one flag.
"""

from __future__ import annotations

import itertools
import os
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self

from opero.core.checks import check_callable
from opero.core.clock import clock
from opero.core.forks import ForkSafeLock
from opero.core.frozen import Frozen
from opero.core.signature import name_of
from opero.utils.logging import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.core.plan import Call, Plan

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


class Event(Frozen):
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


class CallStarted(Event):
    """A call begins."""


class CacheHit(Event):
    """The result came from the cache, or from an identical call under way."""


class SlotWaited(Event):
    """The rate limit made the call wait.

    Attributes:
        seconds: For how long.
    """

    seconds: float


class AttemptStarted(Event):
    """The function begins; in a map, its item is sent to a worker.

    Attributes:
        attempt: Number of the execution in this call, from 1.
        round: Number of the round, from 1.
    """

    attempt: int
    round: int


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


class CandidateSwitched(Event):
    """The next candidate of the fallback is tried; its value is not told, it may be a secret.

    Attributes:
        place: Its place among the candidates of this call, from 0.
    """

    place: int


class CircuitChanged(Event):
    """How an attempt ended has opened a circuit, or closed it again.

    Attributes:
        state: ``"open"`` or ``"closed"``.
        place: Which candidate it is of, by its place in this call, from 0; None without candidates. (With ``per``, the
            circuit is that of the call's value, which is not told.)
    """

    state: str
    place: int | None


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


_numbers = itertools.count(1)
# Whether a callback has called the running code, while it was told of something: nobody is told of what that causes.
# Not by thread: tasks that a callback starts are its doing, too.
_telling: ContextVar[bool] = ContextVar("opero_telling", default=False)


class Subscription:
    """A callback that is told of events until this is closed; also a context for a ``with`` block."""

    def __init__(self, callback: Callable[[Any], object]) -> None:
        self.callback = check_callable("on_event", callback, "a function of one event")
        self._is_complained_of = False

    def tell(self, event: Event) -> None:
        token = _telling.set(True)
        try:
            self.callback(event)
        except Exception as error:  # noqa: BLE001 - who listens must not change what happens
            # Not its text, which may hold what the callback was made with.
            level, self._is_complained_of = "DEBUG" if self._is_complained_of else "WARNING", True
            log(level, "on_event={} raised {}, and goes on being told", name_of(self.callback), type(error).__name__)
        finally:
            _telling.reset(token)

    def close(self) -> None:
        """Tell the callback of nothing any more; calls under way still tell it of their ends."""
        switches.change(ends=self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class Switches:
    """Looked at by every call.

    Attributes:
        are_on: Whether any of the others is.
        listeners: Who is told of the calls of all functions.
        is_disabled: Whether the bare functions are called.
    """

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._disablers = 0
        self.listeners: tuple[Subscription, ...] = ()
        is_off = os.environ.get("OPERO_DISABLED", "").strip().lower() in {"", "0", "false", "no", "off"}
        self.change(disablers=0 if is_off else 1)

    def change(
        self, *, begins: Subscription | None = None, ends: Subscription | None = None, disablers: int = 0
    ) -> None:
        """Somebody begins or ends to listen to all functions, or so many more, or fewer, turn all decorators off."""
        with self._lock.lock:
            self._disablers += disablers
            self.listeners = tuple(each for each in (*self.listeners, begins) if each is not None and each is not ends)
            self.is_disabled = self._disablers > 0
            self.are_on = self.is_disabled or bool(self.listeners)


switches = Switches()


def on_event(callback: Callable[[Any], object]) -> Subscription:
    """Tell ``callback`` of what happens during the calls of all decorated functions of this process.

    It gets one `opero.events.Event` at a time, in the thread (or event loop) that makes the call, and should be quick.
    Several are told in the order in which they began to listen, of the end of a call in the opposite order.
    An `Exception` that it raises changes nothing; of the first a warning is logged. While somebody listens, every call
    takes some microseconds more.

    It may call decorated functions itself: of calls that it makes, in its own thread or in tasks that it starts, nobody
    is told. This does not reach calls that another thread makes for it. A forked child inherits it, as it inherits all
    objects: its copy is told of the child's calls.

    Args:
        callback: A plain function of one event.

    Returns:
        A `Subscription`, to be closed, or used as a context, when the callback shall hear no more.

    Raises:
        TypeError: If it cannot be called, or is async.
    """
    subscription = Subscription(callback)
    switches.change(begins=subscription)
    return subscription


def begin_telling(plan: Plan, call: Call) -> None:
    """Tell those who listen, if anybody does, that the call has started; ``call.tell`` is for what follows."""
    listeners = switches.listeners if plan.on_event is None else (plan.on_event, *switches.listeners)
    if not listeners or _telling.get():
        return
    same: dict[str, Any] = {"function": plan.name, "module": plan.module, "call": next(_numbers), "index": call.index}

    def tell(kind: type[Event], **facts: Any) -> None:
        # Not by the constructor, which takes twice as long.
        event = object.__new__(kind)
        attributes = event.__dict__
        attributes.update(same)
        attributes.update(facts)
        attributes["time"] = clock.wall()
        # Of the end the last one first, as contexts are left: who begins something around the call ends it inside of
        # what others began before.
        for listener in reversed(listeners) if kind is CallDone else listeners:
            listener.tell(event)

    call.tell = tell
    tell(CallStarted)


def tell_of_the_end(call: Call, *, error: Exception | None = None, cancelled: bool = False) -> None:
    """Tell those who listen, if anybody does, that the call is over."""
    if call.tell is not None:
        seconds = clock.now() - call.started
        call.tell(
            CallDone, error=error, attempts=call.attempts, seconds=seconds, cached=call.cached, cancelled=cancelled
        )
