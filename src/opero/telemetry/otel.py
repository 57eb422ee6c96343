"""opero's events as spans and metrics of OpenTelemetry."""

from __future__ import annotations

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
from opero.telemetry import function_name, outcome_of, type_name

try:
    from opentelemetry import metrics, trace
    from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, attach, detach, get_value
except ImportError as error:
    msg = "opero.telemetry.otel needs opentelemetry-api; install it with: pip install 'opero[opentelemetry]'"
    raise ImportError(msg) from error

if TYPE_CHECKING:
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


class _Instrument:
    def __init__(self, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None) -> None:
        self._tracer = trace.get_tracer("opero", __version__, tracer_provider)
        meter = metrics.get_meter("opero", __version__, meter_provider)
        self._calls = meter.create_counter("opero.calls", "{call}", "Calls that have ended")
        self._attempts = meter.create_counter("opero.attempts", "{attempt}", "Executions of the function")
        self._retries = meter.create_counter("opero.retries", "{retry}", "Rounds planned after one that failed")
        self._hits = meter.create_counter("opero.cache.hits", "{hit}", "Results from the cache")
        self._durations = meter.create_histogram("opero.call.duration", "s", "Duration of calls, waits included")
        # Of each call under way its span, the context that the span is in, and what detaches that.
        self._live: dict[int, tuple[trace.Span, Context, Any]] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, CallStarted):
            self._begin(event)
        elif event.call in self._live:
            if isinstance(event, CallDone):
                self._end(event)
            else:
                self._note(event)

    def _begin(self, event: CallStarted) -> None:
        if get_value(_SUPPRESS_INSTRUMENTATION_KEY):
            # A call that an exporter makes: its span would have to be exported, too.
            return
        attributes = _function(event)
        if event.index is not None:
            attributes["opero.index"] = event.index
        span = self._tracer.start_span(event.function, attributes=attributes)
        context = trace.set_span_in_context(span)
        self._live[event.call] = span, context, attach(context) if event.index is None else None

    def _note(self, event: Event) -> None:
        span, context, _ = self._live[event.call]
        add = span.add_event
        match event:
            case AttemptStarted():
                add("opero.attempt", {"opero.attempt": event.attempt, "opero.round": event.round})
                self._attempts.add(1, _function(event), context)
            case AttemptFailed():
                add("opero.attempt.failed", {"opero.attempt": event.attempt, "error.type": type_name(event.error)})
            case RetryPlanned():
                add("opero.retry", {"opero.round": event.round + 1, "opero.delay": event.delay})
                self._retries.add(1, _function(event), context)
            case CandidateSwitched():
                add("opero.candidate", {"opero.place": event.place})
            case CacheHit():
                add("opero.cache.hit")
                self._hits.add(1, _function(event), context)
            case SlotWaited():
                add("opero.rate_limit.wait", {"opero.seconds": event.seconds})

    def _end(self, done: CallDone) -> None:
        span, context, token = self._live.pop(done.call)
        try:
            outcome = {"opero.outcome": outcome_of(done)}
            if done.error is not None and not done.cancelled:
                outcome["error.type"] = type_name(done.error)
            span.set_attributes({**outcome, "opero.attempts": done.attempts, "opero.cached": done.cached})
            if done.error is not None and span.is_recording():
                span.set_status(trace.StatusCode.ERROR)
                span.record_exception(done.error)
            self._calls.add(1, {**_function(done), **outcome}, context)
            self._durations.record(done.seconds, {**_function(done), **outcome}, context)
        finally:
            # A coroutine that the garbage collector ends is in another context, and cannot change that of its own.
            if token is not None and trace.get_current_span() is span:
                detach(token)
            span.end()


def _function(event: Event) -> dict[str, str | int | float | bool]:
    return {"code.function.name": function_name(event)}
