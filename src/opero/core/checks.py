"""Checks of options: an error says what came in and what to write instead."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from opero.core.signature import is_async

if TYPE_CHECKING:
    from collections.abc import Callable


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        msg = f"{name}={value!r} is {type(value).__name__}; write True or False"
        raise TypeError(msg)
    return value


def check_seconds(name: str, value: Any, *, zero: bool) -> float:
    """A finite number of seconds, above 0 or (with ``zero``) not below it."""
    return check_number(name, value, "seconds", smallest=0, exclusive=not zero)


def check_number(name: str, value: Any, what: str, *, smallest: float, exclusive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"{name}={value!r} is {type(value).__name__}; write a number of {what}"
        raise TypeError(msg)
    if not _is_finite(value) or value < smallest or (exclusive and value == smallest):
        bound = "above" if exclusive else "of at least"
        msg = f"{name}={value!r} is out of range; write a finite number of {what} {bound} {smallest:g}"
        raise ValueError(msg)
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def check_count(name: str, value: Any, what: str, *, smallest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{name}={value!r} is {type(value).__name__}; write a whole number of {what}"
        raise TypeError(msg)
    if value < smallest:
        msg = f"{name}={value!r} is out of range; write a whole number of {what}, {smallest} or more"
        raise ValueError(msg)
    return value


def check_text(name: str, value: Any, what: str) -> str:
    if not isinstance(value, str):
        msg = f"{name}={value!r} is {type(value).__name__}; write {what} as text"
        raise TypeError(msg)
    if not value:
        msg = f"{name}={value!r} is empty; write {what}"
        raise ValueError(msg)
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    if not isinstance(value, str):
        msg = f"{name}={value!r} is {type(value).__name__}; write one of {_listed(choices)}"
        raise TypeError(msg)
    if value not in choices:
        msg = f"{name}={value!r} is not known; write one of {_listed(choices)}"
        raise ValueError(msg)
    return value


def check_mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping of option names to values, or None for an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        msg = f"{name}={value!r} is {type(value).__name__}; write a mapping of option names to values"
        raise TypeError(msg)
    for key in value:
        if not isinstance(key, str):
            msg = f"{name} has the key {key!r}, which is {type(key).__name__}; write option names as text"
            raise TypeError(msg)
    return dict(value)


def check_callable(name: str, value: Any, what: str) -> Callable[..., Any]:
    if not callable(value):
        msg = f"{name}={value!r} cannot be called; write {what}"
        raise TypeError(msg)
    if is_async(value):
        msg = f"{name}={value!r} is an async function; write a plain one, for async functions too"
        raise TypeError(msg)
    checked: Callable[..., Any] = value
    return checked


def check_known(where: str, names: Collection[str], known: Collection[str]) -> None:
    """Refuse names that are not known, with the nearest one that is."""
    for name in names:
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"write any of {_listed(known)}"
            msg = f"{where} got the unknown option {name!r}; {hint}"
            raise TypeError(msg)


def _listed(choices: Collection[str]) -> str:
    return ", ".join(repr(choice) for choice in sorted(choices))
