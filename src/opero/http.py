"""Which errors of HTTP clients are worth a retry, and when the server wants it.

No client is imported here: its errors are known by the names of their classes and by their attributes.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from opero.core.clock import LONGEST_WAIT, clock
from opero.core.retry import GIVE_UP, Answer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["retry_after"]

# 408 Request Timeout, 425 Too Early, 429 Too Many Requests; those of the server's own are added below.
_PASSING = frozenset({408, 425, 429})

# The same for whoever asks. The rest of 4xx is about who asks (401 Unauthorized, 402 Payment Required, 403 Forbidden,
# 407 Proxy Authentication Required), or means what a server makes of it.
_ABOUT_THE_REQUEST = frozenset(
    {400, 404, 405, 406, 409, 410, 411, 412, 413, 414, 415, 416, 417, 422, 423, 424, 426, 428, 431, 451}
)

_STATUSES = range(100, 600)

# What a service calls the error says more than its status: AWS throttles with 400, too. Those of AWS are botocore's,
# which retries them; those of anthropic and openai come within a stream that has begun with 200, too.
_PASSING_CODES = {
    *("api_error", "overloaded_error", "rate_limit_error", "timeout_error"),  # anthropic
    *("rate_limit_exceeded", "server_error", "server_is_overloaded"),  # openai
    *("BandwidthLimitExceeded", "EC2ThrottledException", "LimitExceededException", "PriorRequestNotComplete"),
    *("ProvisionedThroughputExceededException", "RequestLimitExceeded", "RequestThrottled"),
    *("RequestThrottledException", "RequestTimeout", "RequestTimeoutException", "SlowDown", "ThrottledException"),
    *("Throttling", "ThrottlingException", "TooManyRequestsException", "TransactionInProgressException"),
}

# These speak of the key, whether they come with 400 or with 429.
_KEY_CODES = {
    "API_KEY_INVALID",  # google
    *("AccessDeniedException", "ExpiredToken", "ExpiredTokenException", "InvalidToken"),  # AWS
    *("MissingAuthenticationTokenException", "UnrecognizedClientException"),
    *("billing_error", "billing_hard_limit_reached", "billing_not_active", "insufficient_quota"),  # anthropic, openai
}

# What clients call the number, on their responses or on the errors that stand for one.
_STATUS = ("status_code", "status", "http_status")

# Of these libraries it is also a plain ``code``; elsewhere that may be any number.
_STATUS_IS_CODE = ("google", "urllib")

# By library. Not here: what no second try can mend, such as a wrong URL or too many redirects.
_NO_ANSWER = {
    "aiohttp": {"ClientConnectionError", "ClientPayloadError"},
    # SDKs raise these from errors of their clients; from a worker process they come back without their causes.
    "anthropic": {"APIConnectionError"},
    "botocore": {"ConnectionError", "HTTPClientError", "IncompleteReadError"},
    "google": {"TransportError"},
    "http": {"BadStatusLine", "IncompleteRead"},  # urllib leaves it to http.client to say what broke off
    "httpx": {"NetworkError", "ProxyError", "RemoteProtocolError", "TimeoutException"},
    "httpx2": {"NetworkError", "ProxyError", "RemoteProtocolError", "TimeoutException"},
    "openai": {"APIConnectionError"},
    # The last: after the retries of an adapter of its own, for the sake of statuses.
    "requests": {"ChunkedEncodingError", "ConnectionError", "Timeout", "RetryError"},
    "socket": {"gaierror"},
    "ssl": {"SSLError"},  # while a body is read, clients let it through
    "urllib": {"URLError"},
    "urllib3": {"NewConnectionError", "ProtocolError", "ProxyError", "SSLError", "TimeoutError"},
}

# Causes may go in circles; nobody wraps an error that often.
_MOST_CAUSES = 20

_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|[smhd])")
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_RESET = re.compile(r".*rate-?limit.*reset.*")

# From here on a number is no delay but a time since 1970. In seconds the first is in 2001, in milliseconds the second.
_FIRST_MOMENT = 1e9
_FIRST_IN_MILLISECONDS = 1e12


def retry_after(error: Exception) -> bool | float | Answer:
    """Tell whether a failed HTTP request is worth a retry, and after how many seconds; for ``retry_on=``.

    Understands the errors of httpx, httpx2, requests, aiohttp, urllib and urllib3, those of the SDKs on top of them
    (openai, anthropic, boto3, google-api-core, google-genai), any exception that has a ``status_code`` or ``status``
    of HTTP, itself or on its ``response``, and what was raised from any of these, or while one of these was handled:

    ========================================================  ==========================================================
    What happened                                             Answer
    ========================================================  ==========================================================
    No answer: no connection, a broken one, a timeout         True: again, after the usual backoff
    (the builtin `ConnectionError` and `TimeoutError`, too)
    408, 425, 429, 5xx; AWS's codes of throttling             The seconds that the server asks for, or True
    403 that says when to come again                          The seconds
    400, 404, 405, 406, 409 to 417, 422 to 424, 426, 428,     `opero.GIVE_UP`: it is the same with every candidate
    431, 451
    401, 402, 403 and other 4xx; codes of a key that is       False: not with this candidate, which rests
    invalid, expired or used up (openai's 429
    ``insufficient_quota``)
    Anything else                                             False
    ========================================================  ==========================================================

    A server asks by the first of these that can be read and is not more than a year away: ``retry-after-ms``;
    ``Retry-After``; ``retry_after`` of the error itself, a number or a `datetime.timedelta` (chat clients have it on
    errors without a status); with 403 and 429 ``X-RateLimit-Reset`` and similar names, such as
    ``x-ratelimit-reset-tokens``, unless the ``Remaining`` beside it says that something is left (of several, the last
    to end); Google's ``RetryInfo``. It may write seconds, ``1m30s``, a date, or the seconds or milliseconds since
    1970; the last three are compared with this machine's clock. ``max_delay`` does not shorten what a server asks for:
    where it may ask for long, set ``total_timeout``, which ends the call at once if the wait would exceed it.

    Args:
        error: What the function raised.

    Returns:
        What the table says; 0.0 for a time that has passed. It never raises, whatever the error or its response is
        made of. Of a group of exceptions (as of a ``TaskGroup``) it says the worst that it says of any of them.
    """
    for link in _causes(error):
        judged = _of_all(link.exceptions) if isinstance(link, ExceptionGroup) else _judged(link)
        if judged is not None:
            return judged
    return False


def _of_all(errors: Sequence[Exception]) -> bool | float | Answer:
    answers = [retry_after(error) for error in errors]
    for worst in (GIVE_UP, False):
        if any(answer is worst for answer in answers):
            return worst
    return max((answer for answer in answers if isinstance(answer, float)), default=True)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on, as a traceback shows them."""
    link: BaseException | None = error
    for _ in range(_MOST_CAUSES):
        if link is None:
            return
        yield link
        follows_context = link.__cause__ is None and not link.__suppress_context__
        link = link.__context__ if follows_context else link.__cause__


def _judged(error: BaseException) -> bool | float | Answer | None:
    """None where the error says nothing of a request."""
    status, headers = _answer(error)
    is_no_answer = any(name in _NO_ANSWER.get(library, ()) for library, name in _names(error))
    if status is None and (is_no_answer or isinstance(error, (ConnectionError, TimeoutError))):
        return True
    codes = _codes(error)
    is_passing = not _PASSING_CODES.isdisjoint(codes)
    if status is None or status < HTTPStatus.BAD_REQUEST:
        # In the streams of openai and anthropic an error can come after the answer has begun.
        return True if is_passing else _told_delay(error)
    if not _KEY_CODES.isdisjoint(codes):
        return False
    delays = _asked_delays(error, status, headers)
    delay = next((delay for delay in delays if delay is not None and delay <= LONGEST_WAIT), None)
    is_passing = is_passing or status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    if delay is not None and (is_passing or status == HTTPStatus.FORBIDDEN):
        return delay
    if is_passing:
        return True
    return GIVE_UP if status in _ABOUT_THE_REQUEST else False


def _answer(error: BaseException) -> tuple[int | None, Any]:
    """Status and headers of the answer that the error stands for."""
    response = _attribute(error, "response")
    for holder in (response, error):
        status = _status(holder)
        if status is not None:
            return status, _attribute(holder, "headers")
    # botocore's response is a plain dict.
    metadata = _item(response, "ResponseMetadata")
    status = _item(metadata, "HTTPStatusCode")
    return (status if isinstance(status, int) else None), _item(metadata, "HTTPHeaders")


def _status(holder: object) -> int | None:
    code = _attribute(holder, "code")
    code_is_status = isinstance(code, HTTPStatus) or any(library in _STATUS_IS_CODE for library, _ in _names(holder))
    numbers = (*(_attribute(holder, name) for name in _STATUS), code if code_is_status else None)
    # Databases and job queues have a ``status``, too.
    return next((number for number in numbers if isinstance(number, int) and number in _STATUSES), None)


def _names(value: object) -> Iterator[tuple[str, str]]:
    """Library and name of each class that it is an instance of."""
    return ((str(cls.__module__).partition(".")[0], cls.__name__) for cls in type(value).__mro__)


def _codes(error: BaseException) -> set[str]:
    """What the service calls the error."""
    codes = [
        *(_attribute(error, name) for name in ("code", "type", "reason")),  # openai, anthropic, google-api-core
        _item(_item(_attribute(error, "response"), "Error"), "Code"),  # botocore
        *(_item(detail, "reason") for detail in _google_details(error)),  # google-genai
    ]
    return {code for code in codes if isinstance(code, str)}


def _asked_delays(error: BaseException, status: int, headers: Any) -> Iterator[float | None]:
    """Seconds until the server wants to be asked again, as it says in several places, or may say."""
    said = _by_name(headers)
    yield _number(said.get("retry-after-ms", ""), unit=0.001)
    yield _seconds(said.get("retry-after", ""))
    yield _told_delay(error)
    if status in {HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS}:
        # Many servers tell of their limits in every answer: those are the reason of which nothing is left.
        resets = [name for name in said if _RESET.match(name)]
        left = [_number(said.get(name.removesuffix("-after").replace("reset", "remaining"), "")) for name in resets]
        ends = [_seconds(said[name]) for name, some in zip(resets, left, strict=True) if not some]
        yield max((end for end in ends if end is not None), default=None)
    yield from map(_retry_info, _google_details(error))


def _told_delay(error: BaseException) -> float | None:
    """The seconds that the error itself tells."""
    told = _attribute(error, "retry_after")
    if isinstance(told, timedelta):
        told = told.total_seconds()
    is_delay = isinstance(told, (int, float)) and not isinstance(told, bool) and 0 <= told <= LONGEST_WAIT
    return float(told) if is_delay else None


def _by_name(headers: Any) -> dict[str, str]:
    """Text by names in lower case; of headers that are none, or break, nothing."""
    try:
        return {name.lower(): text.strip() for name, text in headers.items() if isinstance(text, str)}
    except Exception:  # noqa: BLE001 - whatever they are
        return {}


def _number(text: str, unit: float = 1.0) -> float | None:
    return float(text) * unit if _NUMBER.fullmatch(text) else None


def _seconds(text: str) -> float | None:
    parts = _DURATION.findall(text)
    if parts and "".join(map("".join, parts)) == text:
        return sum(float(number) * _UNITS[unit] for number, unit in parts)
    moment = _number(text)
    if moment is None:
        moment = _date(text)
    elif moment < _FIRST_MOMENT:
        return moment
    elif moment >= _FIRST_IN_MILLISECONDS:
        moment /= 1000
    return None if moment is None else max(0.0, moment - clock.wall())


def _date(text: str) -> float | None:
    """The seconds since 1970."""
    from email.utils import parsedate_to_datetime

    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            moment = read(text)
            # "-0000" says of a zone that it is not known; dates of HTTP are all in UTC.
            return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    return None


def _google_details(error: BaseException) -> list[Any]:
    """Dicts of JSON from REST, messages of protobuf from gRPC; google-genai keeps the whole body."""
    details = _attribute(error, "details")
    if isinstance(details, dict):
        details = _item(_item(details, "error"), "details")
    return details if isinstance(details, list) else []


def _retry_info(detail: Any) -> float | None:
    text = _item(detail, "retryDelay")
    if isinstance(text, str):
        return _number(text.removesuffix("s"))
    delay = _attribute(detail, "retry_delay")
    seconds, nanoseconds = _attribute(delay, "seconds"), _attribute(delay, "nanos")
    is_time = isinstance(seconds, int) and isinstance(nanoseconds, int)
    return max(0.0, seconds + nanoseconds / 1e9) if is_time else None


def _attribute(value: object, name: str) -> Any:
    try:
        return getattr(value, name, None)
    except Exception:  # noqa: BLE001 - a property that raises where there is nothing to give
        return None


def _item(value: object, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None
