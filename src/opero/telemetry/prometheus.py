"""opero's events as metrics of Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from opero.core.forks import ForkSafeLock
from opero.events import AttemptStarted, CacheHit, CallDone, CallStarted, RetryPlanned, SlotWaited, on_event
from opero.telemetry.naming import function_name, outcome_of

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
except ImportError as error:
    msg = "opero.telemetry.prometheus needs prometheus-client; install it with: pip install 'opero[prometheus]'"
    raise ImportError(msg) from error

if TYPE_CHECKING:
    from opero.events import Event, Subscription

__all__ = ["instrument"]


def instrument(registry: CollectorRegistry | None = None) -> Subscription:
    """Count and time the calls of all decorated functions of this process.

    Counters: ``opero_calls_total`` (labels ``function`` and ``outcome``: ``success``, ``failure``, ``cancelled``),
    ``opero_attempts_total``, ``opero_retries_total``, ``opero_cache_hits_total`` and
    ``opero_rate_limit_wait_seconds_total``, with the label ``function``. Histogram: ``opero_call_duration_seconds``,
    with the label ``function``; waits, cache hits and failed calls included. A function is named with its module.

    May be called several times for one registry: the metrics are there once, and every call is counted once as long as
    one of the subscriptions is open. They stay in the registry, with their numbers, when all are closed.

    Args:
        registry: Where the metrics are registered; default: ``prometheus_client.REGISTRY``.

    Returns:
        A `Subscription`, to be closed, or used as a context, when nothing shall be counted any more; calls under way
        still are.

    Raises:
        ValueError: If somebody else has metrics of these names in the registry.
        ImportError: By the import of this module, if prometheus-client is not installed.
    """
    return on_event(_Listener(_metrics_in(REGISTRY if registry is None else registry)))


class _Metrics:
    """The metrics of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        made: list[Counter | Histogram] = []

        def counter(name: str, text: str, *more_labels: str) -> Counter:
            made.append(metric := Counter(name, text, ["function", *more_labels], registry=registry))
            return metric

        try:
            self.calls = counter("opero_calls", "Calls that have ended", "outcome")
            self.attempts = counter("opero_attempts", "Executions of the function")
            self.retries = counter("opero_retries", "Rounds planned after one that failed")
            self.hits = counter("opero_cache_hits", "Results from the cache")
            self.waited = counter("opero_rate_limit_wait_seconds", "Seconds waited for rate limits")
            self.durations = Histogram(
                "opero_call_duration_seconds", "Duration of calls", ["function"], registry=registry
            )
        except ValueError:
            for metric in made:
                registry.unregister(metric)
            raise
        # The listener that counts each call under way: the others of this registry leave it alone.
        self.counted_by: dict[int, _Listener] = {}


_lock = ForkSafeLock()
_metrics: WeakKeyDictionary[CollectorRegistry, _Metrics] = WeakKeyDictionary()


def _metrics_in(registry: CollectorRegistry) -> _Metrics:
    with _lock.lock:
        metrics = _metrics.get(registry)
        if metrics is None:
            metrics = _metrics[registry] = _Metrics(registry)
        return metrics


class _Listener:
    def __init__(self, metrics: _Metrics) -> None:
        self._metrics = metrics

    def __call__(self, event: Event) -> None:
        metrics = self._metrics
        if isinstance(event, CallStarted):
            metrics.counted_by.setdefault(event.call, self)
            return
        if metrics.counted_by.get(event.call) is not self:
            return
        match event:
            case AttemptStarted():
                metrics.attempts.labels(function_name(event)).inc()
            case RetryPlanned():
                metrics.retries.labels(function_name(event)).inc()
            case CacheHit():
                metrics.hits.labels(function_name(event)).inc()
            case SlotWaited():
                metrics.waited.labels(function_name(event)).inc(event.seconds)
            case CallDone():
                del metrics.counted_by[event.call]
                metrics.calls.labels(function_name(event), outcome_of(event)).inc()
                metrics.durations.labels(function_name(event)).observe(event.seconds)
