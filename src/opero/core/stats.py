"""Counters of one decorated function."""

from __future__ import annotations

import itertools
from typing import Any

from opero.core.checks import html_table
from opero.core.forks import ForkSafeLock
from opero.core.frozen import Frozen


class CallStats(Frozen):
    """What a decorated function has done so far, frozen at the moment of asking.

    Attributes:
        calls: Calls made, cache hits included; in a map every item is one call.
        hits: Calls answered from the cache, those that joined an identical call under way included.
        attempts: Executions of the user's function.
        retries: Rounds after the first.
        fallbacks: Candidates tried after the first.
        failures: Calls that raised.
        cache_errors: Times the cache's backend failed and was passed over.
        waited: Seconds spent waiting for the rate limit.
    """

    calls: int = 0
    hits: int = 0
    attempts: int = 0
    retries: int = 0
    fallbacks: int = 0
    failures: int = 0
    cache_errors: int = 0
    waited: float = 0.0

    def _repr_html_(self) -> str:
        return html_table("", self.names, [self._values()])


_adding = ForkSafeLock()


class Counter:
    """A counter whose `tick` is one C call: cheap, and exact under any number of threads."""

    __slots__ = ("_added", "_ticks", "tick")

    def __init__(self) -> None:
        self._ticks = itertools.count()
        self.tick = self._ticks.__next__
        self._added: float = 0

    def add(self, amount: float) -> None:
        with _adding.lock:
            self._added += amount

    def value(self) -> Any:
        # Its representation, as ``count(3)``, tells how far it is without counting on.
        return int(repr(self._ticks)[len("count(") : -1]) + self._added


class Stats:
    """The live counters behind `CallStats`.

    A call that goes straight to the function costs one tick (`direct`), a hit one (`hits`), any other two at most: all
    of these have a flow (`flown`), and some the result of somebody else (`joined`). What users see are sums.
    """

    def __init__(self) -> None:
        self.attempts = Counter()
        self.cache_errors = Counter()
        self.direct = Counter()
        self.failures = Counter()
        self.fallbacks = Counter()
        self.flown = Counter()
        self.hits = Counter()
        self.joined = Counter()
        self.retries = Counter()
        self.waited = Counter()

    def of_calls_for_many(self) -> Stats:
        """Counters of calls that are made for many items each: these attempts are counted here, and the calls not."""
        made = Stats()
        made.attempts, made.retries, made.fallbacks = self.attempts, self.retries, self.fallbacks
        made.waited = self.waited
        return made

    def snapshot(self) -> CallStats:
        direct, hits = self.direct.value(), self.hits.value()
        return CallStats(
            calls=direct + self.flown.value() + hits,
            hits=hits + self.joined.value(),
            attempts=direct + self.attempts.value(),
            retries=self.retries.value(),
            fallbacks=self.fallbacks.value(),
            failures=self.failures.value(),
            cache_errors=self.cache_errors.value(),
            waited=float(self.waited.value()),
        )
