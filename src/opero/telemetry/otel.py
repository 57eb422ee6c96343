"""opero's events as spans and metrics of OpenTelemetry."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from opero.__version__ import __version__
from opero.events import (
    AttemptFailed,
    AttemptStarted,
    CacheHit,
    CallDone,
    CallStarted,
    CandidateSwitched,
    RetryPlanned,
    SlotWaited,
    on_event,
)
from opero.telemetry import CANCELLED, function_name, outcome_of, type_name

try:
    from opentelemetry import metrics, trace
    from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, attach, detach, get_value
except ImportError as error:
    msg = "opero.telemetry.otel needs opentelemetry-api; install it with: pip install 'opero[opentelemetry]'"
    raise ImportError(msg) from error

if TYPE_CHECKING:
    from contextvars import Token

    from opentelemetry.context import Context
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from opero.events import Event, Subscription

__all__ = ["instrument"]


def instrument(
    tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
) -> Subscription:
    """Make a span of every call of all decorated functions of this process, and measure the calls.

    A span has the function's qualified name, kind ``INTERNAL``, and the attributes ``code.function.name`` (the full
    name, with the module), ``opero.outcome`` (``success``, ``failure``, ``cancelled``), ``opero.attempts``,
    ``opero.cached``, and ``opero.index`` (from 0) for an item of a map. Its events are ``opero.attempt``,
    ``opero.attempt.failed``, ``opero.retry``, ``opero.candidate``, ``opero.cache.hit`` and ``opero.rate_limit.wait``.

    The span of a failed call has the status ``ERROR``, ``error.type`` and the recorded exception: its text, its notes
    and its traceback, with those of its causes and, in an `AllFailedError`, of the error of each attempt. What opero
    says itself has no arguments, candidates or results in it. The texts of the function's own errors, and what
    `RemoteError` and `NotTransferableError` quote of them, are exported as they are: they may hold a URL with a key.

    While a single call runs, its span is the current one: spans that the function makes, and calls of other decorated
    functions, become its children. The items of a map run side by side: their spans have the caller's current span as
    parent and are never current, so that what workers do is not below them.

    The metrics are the counters ``opero.calls``, ``opero.attempts``, ``opero.retries`` and ``opero.cache.hits``, and
    the histogram ``opero.call.duration`` in seconds, waits included. All have ``code.function.name``; calls and
    durations have ``opero.outcome`` too, and ``error.type`` if they failed. No arguments and no results are told.

    Calls that an exporter makes have no spans. Each call of this makes spans and metrics of its own: call it once for
    each pair of providers.

    Args:
        tracer_provider: Where spans go; default: the global provider, even one that is set later.
        meter_provider: Where metrics go; default: the global provider, even one that is set later.

    Returns:
        A `Subscription`, to be closed, or used as a context, when there shall be no more spans; calls under way still
        end theirs.

    Raises:
        ImportError: By the import of this module, if opentelemetry-api is not installed.
    """
    return on_event(_Instrument(tracer_provider, meter_provider))


# Which call is current here. Its tokens tell in which context they were made, OpenTelemetry's do not: detaching one
# elsewhere (a coroutine that the garbage collector ends) logs an error.
_current_call: ContextVar[int] = ContextVar("opero_current_call")


class _LiveCall:
    """A call under way: its span, and how the span came to be the current one."""

    __slots__ = ("_attached", "_marked", "context", "span")

    def __init__(self, span: trace.Span) -> None:
        self.span = span
        self.context: Context = trace.set_span_in_context(span)
        self._attached: Any = None
        self._marked: Token[int] | None = None

    def become_current(self, number: int) -> None:
        self._marked = _current_call.set(number)
        self._attached = attach(self.context)

    def end(self) -> None:
        marked, self._marked = self._marked, None
        try:
            if marked is not None:
                _current_call.reset(marked)
                detach(self._attached)
        except ValueError:
            # Made current in a context that this code is not in, and cannot change.
            return
        finally:
            self.span.end()


class _Instrument:
    def __init__(self, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None) -> None:
        self._tracer = trace.get_tracer("opero", __version__, tracer_provider)
        meter = metrics.get_meter("opero", __version__, meter_provider)
        self._calls = meter.create_counter("opero.calls", "{call}", "Calls that have ended")
        self._attempts = meter.create_counter("opero.attempts", "{attempt}", "Executions of the function")
        self._retries = meter.create_counter("opero.retries", "{retry}", "Rounds planned after one that failed")
        self._hits = meter.create_counter("opero.cache.hits", "{hit}", "Results from the cache")
        self._durations = meter.create_histogram("opero.call.duration", "s", "Duration of calls, waits included")
        self._live: dict[int, _LiveCall] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, CallStarted):
            self._begin(event)
            return
        live = self._live.get(event.call)
        if live is None:
            return
        if isinstance(event, CallDone):
            self._end(live, event)
        else:
            self._note(live, event)

    def _begin(self, event: CallStarted) -> None:
        if get_value(_SUPPRESS_INSTRUMENTATION_KEY):
            # A call that an exporter makes: its span would have to be exported, too.
            return
        attributes = _function(event)
        if event.index is not None:
            attributes["opero.index"] = event.index
        live = self._live[event.call] = _LiveCall(self._tracer.start_span(event.function, attributes=attributes))
        if event.index is None:
            live.become_current(event.call)

    def _note(self, live: _LiveCall, event: Event) -> None:
        add = live.span.add_event
        match event:
            case AttemptStarted():
                add("opero.attempt", {"opero.attempt": event.attempt, "opero.round": event.round})
                self._attempts.add(1, _function(event), live.context)
            case AttemptFailed():
                add("opero.attempt.failed", {"opero.attempt": event.attempt, "error.type": type_name(event.error)})
            case RetryPlanned():
                add("opero.retry", {"opero.round": event.round + 1, "opero.delay": event.delay})
                self._retries.add(1, _function(event), live.context)
            case CandidateSwitched():
                add("opero.candidate", {"opero.place": event.place})
            case CacheHit():
                add("opero.cache.hit")
                self._hits.add(1, _function(event), live.context)
            case SlotWaited():
                add("opero.rate_limit.wait", {"opero.seconds": event.seconds})

    def _end(self, live: _LiveCall, done: CallDone) -> None:
        del self._live[done.call]
        try:
            self._describe(live.span, done)
            measured = {**_function(done), **_outcome(done)}
            self._calls.add(1, measured, live.context)
            self._durations.record(done.seconds, measured, live.context)
        finally:
            live.end()

    @staticmethod
    def _describe(span: trace.Span, done: CallDone) -> None:
        if not span.is_recording():
            return
        span.set_attributes({**_outcome(done), "opero.attempts": done.attempts, "opero.cached": done.cached})
        if done.error is not None:
            span.set_status(trace.StatusCode.ERROR)
            span.record_exception(done.error)


def _function(event: Event) -> dict[str, str | int | float | bool]:
    return {"code.function.name": function_name(event)}


def _outcome(done: CallDone) -> dict[str, str | int | float | bool]:
    outcome = outcome_of(done)
    if done.error is None or outcome == CANCELLED:
        return {"opero.outcome": outcome}
    return {"opero.outcome": outcome, "error.type": type_name(done.error)}
