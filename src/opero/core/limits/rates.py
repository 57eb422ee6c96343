"""Rates as users write them, and what they mean."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from opero.core.checks import check_count
from opero.core.showing import kind_of, shown

Rate = float | str | Sequence[float | str]

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
# Each call that a quota counts is remembered.
_MOST_CALLS = 10_000_000
# How long a process may be kept from looking without losing slots. A quarter of it would do while nothing else runs; a
# thread that two others compete with for the interpreter (5 ms for each) gets its turn after up to 40 ms.
_LEAST_BURST, _BURST_SECONDS = 5, 0.04


class Quota(NamedTuple):
    """No more than ``calls`` in any ``seconds``, however they are spread."""

    calls: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Rates:
    """What has to hold at once.

    Attributes:
        per_second: The pace: starts are spread so that any T seconds see at most ``per_second * T + burst`` of them.
        burst: How many missed slots may be made up at once.
        quotas: Bounds over longer times, without a pace of their own.
    """

    per_second: float
    burst: int
    quotas: tuple[Quota, ...] = ()

    @property
    def interval(self) -> float:
        """Seconds between two slots."""
        return 1 / self.per_second

    @property
    def tolerance(self) -> float:
        """How many seconds ahead of the pace a start may be."""
        # Rounding must not make a slot that has come look as if it had not.
        return (self.burst - 1) * self.interval + 1e-9


def parse_rates(rate: Any, max_burst: Any = None, *, option: str = "rate_limit", options: str = "") -> Rates:
    """Read a number of calls per second, text such as ``"100/minute"``, or several of them that all hold.

    Of several, the lowest per second is the pace; those per minute, hour or day are quotas, but for the fastest of them
    if there is nothing else. ``option`` and ``options`` are what the user knows the two as.

    Raises:
        TypeError: If it is none of these, or ``max_burst`` is not an int.
        ValueError: If a rate cannot be read, or is not finite and above 0, or ``max_burst`` is below 1.
    """
    if isinstance(rate, (list, tuple)):
        if not rate:
            msg = f"{option} is an empty {type(rate).__name__}; write at least one rate, or None for no limit"
            raise ValueError(msg)
        parsed = sorted((_parse(part, option) for part in rate), key=_per_second)
    else:
        parsed = [_parse(rate, option)]
    pace = next((part for part in parsed if part[1] == 1), parsed[-1])
    per_second = _per_second(pace)
    if max_burst is None:
        burst = max(_LEAST_BURST, math.ceil(per_second * _BURST_SECONDS))
    else:
        if isinstance(max_burst, int) and max_burst > _MOST_CALLS:
            msg = f"max_burst has {len(str(max_burst))} digits; write a number up to {_MOST_CALLS:,}"
            raise ValueError(msg)
        burst = check_count(f"{options}['max_burst']" if options else "max_burst", max_burst, "calls", smallest=1)
    quotas = [_quota(part, option) for part in parsed if part is not pace and part[1] != 1]
    return Rates(per_second, burst, tuple(quotas))


def _parse(rate: Any, option: str) -> tuple[float, float]:
    """Calls, and in how many seconds."""
    asked, seconds = rate, 1.0
    if isinstance(rate, str):
        match = _RATE_TEXT.fullmatch(rate)
        if match is None or match["unit"] not in _UNITS:
            # What has the form of a rate is no secret.
            asked = shown(asked) if match is None else repr(asked)
            msg = f"{option}={asked} cannot be read; write calls per second, or text such as '100/minute' or '5/s'"
            raise ValueError(msg)
        rate, seconds = float(match["calls"]), _UNITS[match["unit"]]
    elif isinstance(rate, bool) or not isinstance(rate, (int, float)):
        msg = (
            f"{option}={shown(asked)} is {kind_of(asked)}; write calls per second, text such as '100/minute', or a "
            "list of them"
        )
        raise TypeError(msg)
    try:
        calls = float(rate)
    except OverflowError:
        calls = math.inf
    if not (math.isfinite(calls) and calls / seconds > 0):
        msg = f"{option}={asked!r} limits nothing; write a number of calls per second above 0, or None for no limit"
        raise ValueError(msg)
    return calls, seconds


def _per_second(parsed: tuple[float, float]) -> float:
    return parsed[0] / parsed[1]


def _quota(parsed: tuple[float, float], option: str) -> Quota:
    if parsed[0] > _MOST_CALLS:
        msg = (
            f"{option} has a quota of {parsed[0]:.3g} calls, too many to count; write up to {_MOST_CALLS:,}, for "
            "a shorter time"
        )
        raise ValueError(msg)
    calls = max(1, int(parsed[0]))
    return Quota(calls, calls / _per_second(parsed))
