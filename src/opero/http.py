"""Which errors of HTTP clients are worth a retry, and when the server wants it.

No client is imported here: its errors are known by the names of their classes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from opero.core.clock import LONGEST_WAIT, clock

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["retry_after"]

# 408 Request Timeout, 425 Too Early, 429 Too Many Requests; those of the server's own are added below.
_PASSING = frozenset({408, 425, 429})

# What each client calls the number, on its responses or on the errors that stand for one.
_STATUS = {"aiohttp": "status", "httpx": "status_code", "requests": "status_code", "urllib": "code"}

# Not here: what no second try can mend, such as a wrong URL or too many redirects.
_NO_ANSWER = frozenset(
    {
        ("aiohttp", "ClientConnectionError"),
        ("aiohttp", "ClientPayloadError"),
        ("http", "IncompleteRead"),  # urllib leaves it to http.client to say that the body broke off
        ("httpx", "NetworkError"),
        ("httpx", "ProxyError"),
        ("httpx", "RemoteProtocolError"),
        ("httpx", "TimeoutException"),
        ("requests", "ChunkedEncodingError"),
        ("requests", "ConnectionError"),
        ("requests", "Timeout"),
        ("urllib", "URLError"),
    }
)

_SECONDS = re.compile(r"[0-9]+(\.[0-9]*)?")


def retry_after(error: Exception) -> bool | float:
    """Tell whether a failed HTTP request is worth a retry, and after how many seconds; for ``retry_on=``.

    Understands the errors of httpx, requests, aiohttp and urllib, and any exception with one of their responses as its
    ``response``. Of the answers of servers, 408, 425, 429 and 5xx are retried, no others. ``Retry-After`` may be a
    number of seconds or a date, which is compared with this machine's clock; what is neither, or more than a year
    away, is ignored. ``max_delay`` does not shorten what a server asks for: where it may ask for long, set
    ``total_timeout``, which ends the call at once if the wait would exceed it.

    Args:
        error: What the function raised.

    Returns:
        False: do not retry. True: retry after the usual backoff; an answer without ``Retry-After``, a connection that
        failed, a timeout (the builtin `ConnectionError` and `TimeoutError` too). A number: retry after so many
        seconds, 0.0 for a date that has passed. It never raises, whatever the error or its response is made of.
    """
    for answer in (error, _attribute(error, "response")):
        status = _status(answer)
        if status is not None:
            return _wanted_delay(answer) if status in _PASSING or status // 100 == 5 else False  # noqa: PLR2004 - 5xx
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return not _NO_ANSWER.isdisjoint(_names(error))


def _attribute(value: object, name: str) -> Any:
    try:
        return getattr(value, name, None)
    except Exception:  # noqa: BLE001 - a property that raises where there is nothing to give
        return None


def _names(value: object) -> Iterator[tuple[str, str]]:
    """Library and name of each class that it is an instance of."""
    return ((str(cls.__module__).partition(".")[0], cls.__name__) for cls in type(value).__mro__)


def _status(answer: Any) -> int | None:
    for library, _ in _names(answer):
        status = _attribute(answer, _STATUS.get(library, ""))
        if isinstance(status, int):
            return status
    return None


def _wanted_delay(answer: Any) -> bool | float:
    get = _attribute(_attribute(answer, "headers"), "get")
    try:
        text = get("Retry-After")
        delay = _delay(text.strip()) if isinstance(text, str) else None
    except Exception:  # noqa: BLE001 - headers that are none, or break
        return True
    return True if delay is None or delay > LONGEST_WAIT else delay


def _delay(text: str) -> float | None:
    return float(text) if _SECONDS.fullmatch(text) else _seconds_until(text)


def _seconds_until(date: str) -> float | None:
    import datetime as dt
    from email.utils import parsedate_to_datetime

    try:
        moment = parsedate_to_datetime(date)
        if moment.tzinfo is None:
            # "-0000" says of a zone that it is not known; dates of HTTP are all in UTC.
            moment = moment.replace(tzinfo=dt.UTC)
        return max(0.0, moment.timestamp() - clock.wall())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
