"""Rates as users write them, and what they mean."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opero.core.checks import UNITS, check_count, kind_of, plain_number, shown

Rate = float | str | Sequence[float | str] | Mapping[str, float | str | Sequence[float | str]]

CALLS = "calls"
# Rounding must not make a slot that has come look as if it had not.
EARLY = 1e-9
_RATE_TEXT = re.compile(r"\s*(?P<count>\d+(?:\.\d+)?)\s*/\s*(?P<times>\d+(?:\.\d+)?)?\s*(?P<unit>[a-z]+)\s*", re.ASCII)
# How long a process may be kept from looking without losing slots. A quarter of it would do while nothing else runs; a
# thread that two others compete with for the interpreter (5 ms for each) gets its turn after up to 40 ms.
_LEAST_BURST, _BURST_SECONDS = 5, 0.04


class Rates(NamedTuple):
    """What has to hold at once.

    Attributes:
        names: What is counted: calls, and what else costs are told of.
        paces: At most one for each name: its place among the names, the seconds for each unit, and how many missed
            units may be made up at once. Any T seconds see ``T / interval + burst`` at most, and one start's cost.
        quotas: A name's place, and how many units in how many seconds at most, however they are spread.
        most: What one call may cost of each name: what the rate itself allows in its time.
        per_second: The lowest rate of the first name.
    """

    names: tuple[str, ...]
    paces: tuple[tuple[int, float, int], ...]
    quotas: tuple[tuple[int, float, float], ...]
    most: tuple[float, ...]
    per_second: float = math.inf


def parse_rates(rate: Any, max_burst: Any = None, *, spread: bool = True) -> Rates:
    """Read a number of calls per second, text such as ``"100/minute"``, several of them that all hold, or a mapping.

    Of several, the lowest per second is the pace; those for longer times are quotas, but for the fastest of them if
    there is nothing else. Without ``spread`` all are quotas.
    """
    burst = None if max_burst is None else check_count("max_burst", max_burst, "calls", smallest=1)
    named: Mapping[Any, Any] = rate if isinstance(rate, Mapping) else {CALLS: rate}
    if not named or not all(isinstance(name, str) and name for name in named):
        msg = "rate_limit has to name what it limits; write {'calls': '500/minute', 'tokens': '90000/minute'}"
        raise ValueError(msg)
    paces, quotas, most, lowest = [], [], [], []
    for place, (name, rates) in enumerate(named.items()):
        parsed = _parse_list(rates, f"rate_limit[{shown(name)}]" if named is rate else "rate_limit")
        most.append(min(units for units, _ in parsed))
        lowest.append(min(units / seconds for units, seconds in parsed))
        if spread:
            fast = [each for each in parsed if each[1] == 1]
            units, seconds = min(fast) if fast else max(parsed, key=lambda each: each[0] / each[1])
            missed = max(_LEAST_BURST, math.ceil(units / seconds * _BURST_SECONDS)) if burst is None else burst
            paces.append((place, seconds / units, missed))
            parsed = [each for each in parsed if each != (units, seconds) and each not in fast]
        for units, seconds in parsed:
            # The same per second, in units that can be counted.
            whole = max(1, int(units))
            quotas.append((place, whole, seconds * whole / units))
    return Rates(tuple(named), tuple(paces), tuple(quotas), tuple(most), lowest[0])


def _parse_list(rates: Any, option: str) -> list[tuple[float, float]]:
    if isinstance(rates, (str, bytes)) or not isinstance(rates, Sequence):
        return [_parse(rates, option)]
    given = [plain_number(rate) for rate in rates]
    match given:
        case [int() | float() as units, int() | float() as seconds] if isinstance(rates, tuple):
            raise ValueError(
                f"{option}={shown(rates)} can be read in two ways; write text such as '{units:g}/{seconds:g} seconds' "
                "for a count and its time, or a list of rates per second that all hold"
            )
    if not rates:
        msg = f"{option} is empty and limits nothing; write a rate such as '100/minute', or None for no limit"
        raise ValueError(msg)
    return [_parse(rate, option) for rate in given]


def _parse(rate: Any, option: str) -> tuple[float, float]:
    """How much in how many seconds."""
    asked, seconds = plain_number(rate), 1.0
    rate = asked
    if isinstance(rate, str):
        match = _RATE_TEXT.fullmatch(rate)
        if match is None or match["unit"] not in UNITS:
            # What has the form of a rate is no secret.
            asked = shown(asked) if match is None else repr(asked)
            raise ValueError(
                f"{option}={asked} cannot be read; write calls per second, or text such as '100/minute', '5/s' or "
                "'900/15 minutes'"
            )
        rate, seconds = float(match["count"]), float(match["times"] or 1) * UNITS[match["unit"]]
    elif isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(
            f"{option}={shown(asked)} is {kind_of(asked)}; write calls per second, text such as '100/minute', or a "
            "list of them"
        )
    if not (0 < rate <= sys.float_info.max and seconds > 0 and rate / seconds > 0):
        msg = f"{option}={asked!r} limits nothing; write a number of calls per second above 0, or None for no limit"
        raise ValueError(msg)
    return float(rate), seconds
