"""Who is told of what happens during calls.

Nobody listens by default, and then nothing here runs: see `opero.core.switches`. The events themselves are in
`opero.events`, which is imported when somebody begins to listen.
"""

from __future__ import annotations

import itertools
import os
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, Self

from opero.core.checks import check_callable
from opero.core.clock import clock
from opero.core.forks import ForkSafeLock
from opero.core.signature import name_of
from opero.utils.logging import is_logged

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.core.plan import Call, Plan

Kind = Literal[
    "AttemptFailed",
    "AttemptStarted",
    "CacheHit",
    "CallDone",
    "CallStarted",
    "CandidateSwitched",
    "CircuitChanged",
    "RetryPlanned",
    "SlotWaited",
]

_numbers = itertools.count(1)
# The callbacks that are being told of something by the running code, each by what the one before it called. Not by
# thread: tasks that a callback starts are its doing, too.
_telling: ContextVar[tuple[Callable[[Any], object], ...]] = ContextVar("opero_telling", default=())


class Listener:
    """A callback, and whether its errors have been complained of."""

    __slots__ = ("_is_complained_of", "callback", "events")

    def __init__(self, callback: Callable[[Any], object]) -> None:
        from opero import events

        self.events: Any = events
        self.callback = callback
        self._is_complained_of = False

    @property
    def is_telling(self) -> bool:
        """Whether the running code was called by the callback, while it was told of something."""
        return any(self.callback is callback for callback in _telling.get())

    def tell(self, event: Any) -> None:
        token = _telling.set((*_telling.get(), self.callback))
        try:
            self.callback(event)
        except Exception as error:  # noqa: BLE001 - who listens must not change what happens
            self._complain(error)
        finally:
            _telling.reset(token)

    def _complain(self, error: Exception) -> None:
        if not self._is_complained_of:
            # Not its text, which may hold what the callback was made with.
            text = "on_event={} raised {}, and goes on being told"
            self._is_complained_of = is_logged("WARNING", text, name_of(self.callback), type(error).__name__)


class Switches:
    """Looked at by every call.

    Attributes:
        are_on: Whether any of the others is.
        listeners: Who is told of the calls of all functions.
        is_disabled: Whether the bare functions are called.
    """

    __slots__ = ("_disablers", "_lock", "are_on", "is_disabled", "listeners")

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._disablers = 1 if _is_on(os.environ.get("OPERO_DISABLED", "")) else 0
        self.listeners: tuple[Listener, ...] = ()
        self._set()

    def listening(self, listener: Listener, *, begins: bool) -> None:
        """Somebody begins or ends to listen to all functions."""
        with self._lock.lock:
            others = tuple(other for other in self.listeners if other is not listener)
            self.listeners = (*others, listener) if begins else others
            self._set()

    def disabling(self, *, begins: bool) -> None:
        """Somebody turns all decorators off, or on again."""
        with self._lock.lock:
            self._disablers += 1 if begins else -1
            self._set()

    def _set(self) -> None:
        self.is_disabled = self._disablers > 0
        self.are_on = self.is_disabled or bool(self.listeners)


def _is_on(text: str) -> bool:
    return text.strip().lower() not in {"", "0", "false", "no", "off"}


switches = Switches()


class Subscription:
    """A callback that is told of all functions' events until this is closed; also a context for a ``with`` block."""

    def __init__(self, callback: Callable[[Any], object]) -> None:
        self._listener: Listener | None = Listener(callback)
        switches.listening(self._listener, begins=True)

    def close(self) -> None:
        """Tell the callback of nothing any more; calls under way still tell it of their ends."""
        listener, self._listener = self._listener, None
        if listener is not None:
            switches.listening(listener, begins=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def on_event(callback: Callable[[Any], object]) -> Subscription:
    """Tell ``callback`` of what happens during the calls of all decorated functions of this process.

    It gets one `opero.events.Event` at a time, in the thread (or event loop) that makes the call, and should be quick.
    Several are told in the order in which they began to listen, of the end of a call in the opposite order.
    An `Exception` that it raises is logged once and changes nothing. While somebody listens, every call takes the
    slower way (some microseconds more).

    It may call decorated functions itself: of calls that it makes, in its own thread or in tasks that it starts, the
    others are told, but it is not. This does not reach calls that another thread makes for it. A forked child inherits
    it, as it inherits all objects: its copy is told of the child's calls.

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

    __slots__ = ("_call", "_events", "_listeners", "_number", "_plan")

    def __init__(self, plan: Plan, call: Call, listeners: list[Listener]) -> None:
        self._events = listeners[0].events
        self._plan = plan
        self._call = call
        self._listeners = listeners
        self._number = next(_numbers)

    def __call__(self, kind: Kind, **facts: Any) -> None:
        plan, event = self._plan, object.__new__(getattr(self._events, kind))
        # Not by the `__init__` of a frozen dataclass, which takes three times as long.
        event.__dict__.update(
            facts,
            function=plan.name,
            module=plan.module,
            call=self._number,
            index=self._call.index,
            time=clock.wall(),
        )
        if kind == "CallDone":
            self._tell_of_the_end(event, len(self._listeners))
            return
        for listener in self._listeners:
            listener.tell(event)

    def _tell_of_the_end(self, event: Any, count: int) -> None:
        """As contexts are left: who begins something around the call ends it inside of what others began before."""
        try:
            while count:
                count -= 1
                self._listeners[count].tell(event)
        finally:
            # Ctrl-C in one must not leave open what the others began.
            if count:
                self._tell_of_the_end(event, count)


def teller_of(plan: Plan, call: Call) -> Teller | None:
    """Who tells of a call; None if nobody listens."""
    if not is_listened_to(plan):
        return None
    everybody = switches.listeners if plan.on_event is None else (plan.on_event, *switches.listeners)
    listeners = [listener for listener in everybody if not listener.is_telling]
    return Teller(plan, call, listeners) if listeners else None


def is_listened_to(plan: Plan) -> bool:
    """Whether the calls of a function have to be told of."""
    return plan.on_event is not None or bool(switches.listeners)
