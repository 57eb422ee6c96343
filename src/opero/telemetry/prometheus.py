"""opero's events as metrics of Prometheus."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from opero.events import AttemptStarted, CacheHit, CallDone, RetryPlanned, SlotWaited, on_event
from opero.telemetry import function_name, outcome_of

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

    May be called several times for one registry: the metrics are there once, every call is counted once, and the last
    subscription takes the place of those before. When it is closed, the metrics stay there with their numbers.

    Args:
        registry: Where the metrics are registered; default: ``prometheus_client.REGISTRY``.

    Returns:
        A `Subscription`, to be closed, or used as a context, when nothing shall be counted any more; calls under way
        still are.

    Raises:
        ValueError: If somebody else has metrics of these names in the registry.
        ImportError: By the import of this module, if prometheus-client is not installed.
    """
    registry = REGISTRY if registry is None else registry
    if registry in _counting:
        metrics, earlier = _counting[registry]
        earlier.close()
    else:
        metrics = _Metrics(registry)
    subscription = on_event(metrics)
    _counting[registry] = metrics, subscription
    return subscription


class _Metrics:
    """The metrics of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter = partial(Counter, labelnames=["function"], registry=registry)
        self.calls = counter("opero_calls", "Calls that have ended", labelnames=["function", "outcome"])
        self.attempts = counter("opero_attempts", "Executions of the function")
        self.retries = counter("opero_retries", "Rounds planned after one that failed")
        self.hits = counter("opero_cache_hits", "Results from the cache")
        self.waited = counter("opero_rate_limit_wait_seconds", "Seconds waited for rate limits")
        self.durations = Histogram("opero_call_duration_seconds", "Duration of calls", ["function"], registry=registry)

    def __call__(self, event: Event) -> None:
        function = function_name(event)
        match event:
            case AttemptStarted():
                self.attempts.labels(function).inc()
            case RetryPlanned():
                self.retries.labels(function).inc()
            case CacheHit():
                self.hits.labels(function).inc()
            case SlotWaited():
                self.waited.labels(function).inc(event.seconds)
            case CallDone():
                self.calls.labels(function, outcome_of(event)).inc()
                self.durations.labels(function).observe(event.seconds)


# Of each registry its metrics, and who was told of calls last.
_counting: WeakKeyDictionary[CollectorRegistry, tuple[_Metrics, Subscription]] = WeakKeyDictionary()
