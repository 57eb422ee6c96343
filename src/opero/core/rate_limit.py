"""The rate limit: when may this start?"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from opero.core.checks import check_count, check_known, check_mapping
from opero.core.pacer import Pacer, Place
from opero.core.plan import Plan
from opero.core.resilient import OperoFunction, decorator
from opero.core.steps import await_arrival, await_arrival_async

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["RateLimiter", "get_rate_limit_decorator"]

P = ParamSpec("P")
R = TypeVar("R")

_UNITS = {
    "s": 1.0,
    "second": 1.0,
    "m": 60.0,
    "minute": 60.0,
    "h": 3600.0,
    "hour": 3600.0,
    "d": 86_400.0,
    "day": 86_400.0,
}
_RATE_TEXT = re.compile(r"\s*(?P<calls>\d+(?:\.\d+)?)\s*/\s*(?P<unit>[a-z]+)\s*", re.ASCII)


def parse_rate(rate: Any, option: str = "rate_limit") -> float:
    """Calls per second, from a number or from text such as ``"100/minute"``."""
    asked = rate
    if isinstance(rate, str):
        match = _RATE_TEXT.fullmatch(rate)
        if match is None or match["unit"] not in _UNITS:
            msg = f"{option}={asked!r} cannot be read; write calls per second, or text such as '100/minute' or '5/s'"
            raise ValueError(msg)
        rate = float(match["calls"]) / _UNITS[match["unit"]]
    elif isinstance(rate, bool) or not isinstance(rate, (int, float)):
        msg = f"{option}={asked!r} is {type(asked).__name__}; write calls per second, or text such as '100/minute'"
        raise TypeError(msg)
    try:
        per_second = float(rate)
    except OverflowError:
        per_second = math.inf
    if not (math.isfinite(per_second) and per_second > 0):
        msg = f"{option}={asked!r} limits nothing; write a number of calls per second above 0, or None for no limit"
        raise ValueError(msg)
    return per_second


class RateLimiter:
    """A limit on starts per second that every thread, task and event loop of the process shares.

    Slots are granted first come, first served, when they come due, never ahead. In any window of T seconds at most
    ``rate * T + max_burst`` calls start; bursts only make up for slots that passed while the process could not run.

    Args:
        rate: Calls per second (fractions too), or text such as ``"100/minute"``, ``"5/s"``, ``"1000/day"``.
        max_burst: How many missed slots may be made up at once. Default: 10 ms worth of calls, at least 5.

    Raises:
        TypeError: If ``rate`` is neither a number nor text, or ``max_burst`` is not an int.
        ValueError: If ``rate`` is not finite and above 0, or its text cannot be read, or ``max_burst`` is below 1.
    """

    def __init__(self, rate: float | str, *, max_burst: int | None = None) -> None:
        self.rate = parse_rate(rate, "rate")
        if max_burst is None:
            max_burst = max(5, math.ceil(self.rate / 100))
        self._pacer = Pacer(self.rate, check_count("max_burst", max_burst, "calls", smallest=1))
        self.take_now = self._pacer.take_now
        self.expected_wait = self._pacer.expected_wait

    def __repr__(self) -> str:
        return f"RateLimiter({self.rate:g})"

    def ticket(self) -> Ticket:
        """Ask for a slot without waiting for it here."""
        return Ticket(self._pacer)

    def acquire(self) -> None:
        """Block until a slot has come, and take it."""
        await_arrival(self.ticket())

    async def acquire_async(self) -> None:
        """Wait for a slot without blocking the event loop, and take it."""
        await await_arrival_async(self.ticket())


class Ticket:
    """One caller's wait for one slot; an `opero.core.steps.Arrival`."""

    __slots__ = ("_pacer", "_place", "_taken", "_wake")

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer
        self._place: Place | None = None
        self._taken = False
        self._wake: Callable[[], None] | None = None

    def poll(self) -> bool:
        if not self._taken:
            if self._place is None:
                self._place = self._pacer.join(self._wake)
                self._taken = self._place is None
            else:
                self._taken = self._pacer.look(self._place)
        return self._taken

    def due_in(self) -> float | None:
        return 0.0 if self._taken or self._place is None else self._pacer.due_in(self._place)

    def notify(self, wake: Callable[[], None] | None) -> None:
        self._wake = wake
        if self._place is not None:
            self._pacer.set_wake(self._place, wake)

    def withdraw(self) -> None:
        if self._place is not None and not self._taken:
            self._pacer.leave(self._place)
            self._place = None


def limit_policy(rate_limit: float | str, options: Mapping[str, Any] | None = None) -> RateLimiter:
    """Check the rate limit's options and make the limiter."""
    rate = parse_rate(rate_limit)
    given = check_mapping("rate_limit_options", options)
    check_known("rate_limit_options", given, ("max_burst",))
    if "max_burst" in given:
        check_count("rate_limit_options['max_burst']", given["max_burst"], "calls", smallest=1)
    return RateLimiter(rate, **given)


def get_rate_limit_decorator(
    rate_limit: float | str, **options: Any
) -> Callable[[Callable[P, R]], OperoFunction[P, R]]:
    """Make a decorator that limits how often calls start, and does nothing else.

    Args:
        rate_limit: Calls per second (fractions too), or text such as ``"100/minute"``. Each decorated function has a
            limit of its own, shared by all its callers in the process.
        **options: For `asynciolimiter.Limiter`: ``max_burst``, how many missed slots may be made up at once.

    Raises:
        TypeError: If an option has the wrong type or is not known.
        ValueError: If the rate is not finite and above 0, or its text cannot be read.
    """
    limit_policy(rate_limit, options)
    return decorator(
        "get_rate_limit_decorator",
        lambda function: Plan(function, limit=limit_policy(rate_limit, options)),
        (get_rate_limit_decorator, {"rate_limit": rate_limit, **options}),
    )
