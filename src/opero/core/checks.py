"""Checks of options, and what messages, logs and representations may show of values, any of which may be a secret.

An error says what came in, as far as it can be no secret, and what to write instead.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from opero.core.signature import is_async, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import timedelta

    Duration = float | timedelta

_HIDDEN = "…"
_NUMBERS = (bool, int, float, type(None))
_CONTAINERS = (list, tuple, dict, set, frozenset)


def shown(value: Any) -> str:
    """A number as it is, a function or class by its name, an empty text; nothing of anything else."""
    if type(value) in _NUMBERS:
        return repr(value)
    if callable(value):
        return name_of(value)
    return "''" if value == "" and isinstance(value, str) else _HIDDEN


def kind_of(value: Any) -> str:
    """The name of its type, of the usual containers with the number of elements."""
    name = type(value).__name__
    return f"{name} of {len(value)}" if type(value) in _CONTAINERS else name


def listed(names: Collection[str]) -> str:
    """Names to choose from."""
    return ", ".join(repr(name) for name in sorted(names))


def nearest(name: str, names: Collection[str]) -> str | None:
    """The one of the names that may have been meant."""
    import difflib

    near = difflib.get_close_matches(name, names, n=1)
    return near[0] if near else None


def brief(value: Any) -> str:
    """The start of a representation: for those who ask for a value at a prompt, and never for a message or a log."""
    import reprlib

    if isinstance(value, float):
        return f"{value:.6g}"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


def html_table(title: str, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table for notebooks, of the starts of representations."""
    import html

    def row(cells: Iterable[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(row(map(brief, cells), "td") for cells in rows)
    return f"<table><caption>{html.escape(title)}</caption>{row(columns, 'th')}{body}</table>"


def wrong_type(name: str, value: Any, instead: str) -> TypeError:
    return TypeError(f"{name}={shown(value)} is {kind_of(value)}; write {instead}")


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(name, value, "True or False")
    return value


# Seconds in the units of durations and rates that are told as text.
UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86_400.0),
    **dict.fromkeys(("w", "week", "weeks"), 604_800.0),
}


def check_seconds(name: str, value: Any, *, zero: bool) -> float:
    """A duration as a finite number of seconds, above 0 or (with ``zero``) not below it."""
    return check_number(name, seconds_of(value), "seconds or a timedelta", smallest=0, exclusive=not zero)


def plain_number(value: Any) -> Any:
    """A number or truth value of NumPy's as Python has it, anything else as it is."""
    is_number = getattr(getattr(value, "dtype", None), "kind", None) in {"b", "i", "u", "f"}
    return value.item() if is_number and value.shape == () else value


def seconds_of(value: Any) -> Any:
    """A `datetime.timedelta` in seconds, anything else as `plain_number` gives it."""
    return value.total_seconds() if hasattr(value, "total_seconds") else plain_number(value)


def check_number(name: str, value: Any, what: str, *, smallest: float, exclusive: bool = False) -> float:
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_type(name, value, f"a number of {what}")
    if not smallest <= value <= sys.float_info.max or (exclusive and value == smallest):
        bound = "above" if exclusive else "of at least"
        raise ValueError(f"{name}={shown(value)} is out of range; write a finite number of {what} {bound} {smallest:g}")
    return value


def check_count(name: str, value: Any, what: str, *, smallest: int) -> int:
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, value, f"a whole number of {what}")
    if value < smallest:
        raise ValueError(f"{name}={shown(value)} is out of range; write a whole number of {what}, {smallest} or more")
    return value


def check_text(name: str, value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(name, value, f"{what} as text")
    if not value:
        raise ValueError(f"{name}='' is empty; write {what}")
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    if not isinstance(value, str):
        raise wrong_type(name, value, f"one of {listed(choices)}")
    if value not in choices:
        near = nearest(value, choices)
        hint = "" if near is None else f"did you mean {near!r}? "
        raise ValueError(f"{name}={shown(value)} is not known; {hint}write one of {listed(choices)}")
    return value


def check_mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping of option names to values; None is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise wrong_type(name, value, "a mapping of option names to values")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{name} has a key {shown(key)}, which is {kind_of(key)}; write option names as text")
    return dict(value)


def check_callable(name: str, value: Any, what: str) -> Callable[..., Any]:
    if not callable(value):
        raise TypeError(f"{name}={shown(value)} is {kind_of(value)}, which cannot be called; write {what}")
    if is_async(value):
        raise TypeError(f"{name}={shown(value)} is an async function; write a plain one, for async functions too")
    checked: Callable[..., Any] = value
    return checked


def check_url(option: str, value: Any) -> str:
    """Check a URL without showing it: it may hold a password."""
    example = "write one such as 'redis://localhost:6379/0', 'rediss://user:password@host/0' or 'unix:///path'"
    if not isinstance(value, str):
        raise TypeError(f"{option} is {type(value).__name__}; {example}")
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(value)
        has_server = parts.scheme in {"redis", "rediss"} and parts.hostname is not None and parts.port != 0
        # A password that is not encoded can end up in what stands behind the server.
        is_good = parts.scheme == "unix" or (has_server and "@" not in f"{parts.path}{parts.query}{parts.fragment}")
    except ValueError:
        is_good = False
    if not is_good:
        encoded = "and '/', '?', '#' and '@' in a password as %2F, %3F, %23, %40"
        raise ValueError(f"{option} is no URL of a redis server; {example}, {encoded}")
    return value


# What to write for names that tenacity, backoff, joblib, concurrent.futures, tqdm and cachetools have for what is here,
# and for options of maps where there is no map.
_NEIGHBOURS = {
    "retries=…, the attempts after the first": "retry attempts tries max_attempts max_tries max_retries num_retries",
    "attempt_timeout=… for one execution, or total_timeout=… for all": "timeout deadline max_time time_limit",
    "retry_on=…, a class of exceptions, several, or a function of one": "on exception exceptions retry_exceptions",
    "min_delay=…, the seconds before the first retry": ("delay wait wait_initial initial_delay base_delay wait_fixed"),
    "max_delay=…, the longest wait between two attempts": "wait_max max_wait",
    "backoff_factor=…, by which each delay is longer": "backoff factor multiplier wait_exp_base",
    "retry_options={…}, for tenacity": "stop before_sleep before after reraise retry_error_callback",
    "cache_ttl=…, or cache=Cache(ttl=…)": "ttl expire expires expiry max_age",
    "cache_key=…, or cache=Cache(key=…)": "key key_builder",
    "cache_options={'maxsize': …}": "maxsize max_size",
    "rate_limit=…, as 5 (a second) or '100/minute'": "rate rps calls calls_per_second period throttle",
    "max_concurrent=… for all callers, or workers=… of a map": "concurrency max_concurrency parallelism semaphore",
    "arg_fallback='parameter', whose values are tried, or default=…": "fallback fallbacks fallback_value",
    "breaker=…, failures in a row": "circuit_breaker fail_max failure_threshold",
    "on_event=…": "callback on_retry on_backoff on_giveup hooks logger",
    "per=…": "rate_limit_per",
    "workers=…": "workers n_jobs max_workers num_workers n_workers jobs processes threads nodes",
    "mode=…, 'thread', 'process', 'async' or an executor": "mode executor pool prefer",
    "cache_backend=… of the cache, or mode=… of a map": "backend",
    "return_exceptions=…": "return_exceptions raise_on_error ignore_errors on_error errors",
    "progress='label', or a mapping of options": "progress desc progress_bar tqdm show_progress verbose",
    "ordered=False": "ordered unordered",
    "batch_size=… if the function takes lists; opero sizes batches by itself": "batch_size chunksize chunk_size",
    "pool_options={…}": "pool_options initializer initargs start_method mp_context maxtasksperchild worker_init",
    "total=…": "total length",
}
_BY_NEIGHBOUR = {name: ours for ours, names in _NEIGHBOURS.items() for name in names.split()}


def check_known(where: str, names: Collection[str], known: Collection[str]) -> None:
    """Refuse names that are not known, with what may have been meant."""
    for name in names:
        if name not in known:
            ours, near = _BY_NEIGHBOUR.get(name, ""), nearest(name, known)
            if any(f"{option}=" in ours for option in known):
                hint = f"write {ours}"
            elif ours and where == "@opero":
                hint = f"maps have it: write @opmap({ours.partition(',')[0].partition(' ')[0]})"
            else:
                hint = f"write any of {listed(known)}" if near is None else f"did you mean {near!r}?"
            raise TypeError(f"{where} got the unknown option {name!r}; {hint}")
