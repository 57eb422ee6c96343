"""Checks of options: an error says what came in, as far as it can be no secret, and what to write instead."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from opero.core.showing import kind_of, listed, nearest, shown
from opero.core.signature import is_async

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    Duration = float | timedelta


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        msg = f"{name}={shown(value)} is {kind_of(value)}; write True or False"
        raise TypeError(msg)
    return value


def check_seconds(name: str, value: Any, *, zero: bool) -> float:
    """A duration as a finite number of seconds, above 0 or (with ``zero``) not below it."""
    return check_number(name, seconds_of(value), "seconds or a timedelta", smallest=0, exclusive=not zero)


def seconds_of(value: Any) -> Any:
    """A `datetime.timedelta` in seconds, anything else as it is."""
    if isinstance(value, (int, float)):
        return value
    from datetime import timedelta

    return value.total_seconds() if isinstance(value, timedelta) else value


def check_number(name: str, value: Any, what: str, *, smallest: float, exclusive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"{name}={shown(value)} is {kind_of(value)}; write a number of {what}"
        raise TypeError(msg)
    if not _is_finite(value) or value < smallest or (exclusive and value == smallest):
        bound = "above" if exclusive else "of at least"
        msg = f"{name}={shown(value)} is out of range; write a finite number of {what} {bound} {smallest:g}"
        raise ValueError(msg)
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def check_count(name: str, value: Any, what: str, *, smallest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{name}={shown(value)} is {kind_of(value)}; write a whole number of {what}"
        raise TypeError(msg)
    if value < smallest:
        msg = f"{name}={shown(value)} is out of range; write a whole number of {what}, {smallest} or more"
        raise ValueError(msg)
    return value


def check_text(name: str, value: Any, what: str) -> str:
    if not isinstance(value, str):
        msg = f"{name}={shown(value)} is {kind_of(value)}; write {what} as text"
        raise TypeError(msg)
    if not value:
        msg = f"{name}='' is empty; write {what}"
        raise ValueError(msg)
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    if not isinstance(value, str):
        msg = f"{name}={shown(value)} is {kind_of(value)}; write one of {listed(choices)}"
        raise TypeError(msg)
    if value not in choices:
        near = nearest(value, choices)
        hint = "" if near is None else f"did you mean {near!r}? "
        msg = f"{name}={shown(value)} is not known; {hint}write one of {listed(choices)}"
        raise ValueError(msg)
    return value


def check_mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping of option names to values, or None for an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        msg = f"{name}={shown(value)} is {kind_of(value)}; write a mapping of option names to values"
        raise TypeError(msg)
    for key in value:
        if not isinstance(key, str):
            msg = f"{name} has a key {shown(key)}, which is {kind_of(key)}; write option names as text"
            raise TypeError(msg)
    return dict(value)


def check_callable(name: str, value: Any, what: str) -> Callable[..., Any]:
    if not callable(value):
        msg = f"{name}={shown(value)} is {kind_of(value)}, which cannot be called; write {what}"
        raise TypeError(msg)
    if is_async(value):
        msg = f"{name}={shown(value)} is an async function; write a plain one, for async functions too"
        raise TypeError(msg)
    checked: Callable[..., Any] = value
    return checked


_RENAMED = {"rate_limit_per": "per"}


def check_known(where: str, names: Collection[str], known: Collection[str]) -> None:
    """Refuse names that are not known, with the nearest one that is."""
    for name in names:
        if name in _RENAMED and _RENAMED[name] in known:
            msg = f"{where} got {name!r}, which is gone; write {_RENAMED[name]}=…"
            raise TypeError(msg)
        if name not in known:
            near = nearest(name, known)
            hint = f"write any of {listed(known)}" if near is None else f"did you mean {near!r}?"
            msg = f"{where} got the unknown option {name!r}; {hint}"
            raise TypeError(msg)
