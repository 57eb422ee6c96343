"""`opero.http.retry_after`: with real clients, against a real server on this machine."""

from __future__ import annotations

import datetime as dt
import email.utils
import http.server
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http import HTTPStatus

import aiohttp
import httpx
import pytest
import requests
import urllib3
from hypothesis import example, given
from hypothesis import strategies as st

from opero import GIVE_UP, AllFailedError, opero
from opero.core.clock import LONGEST_WAIT, clock
from opero.http import retry_after

NOW = 1_700_000_000
TLS = ssl.create_default_context()  # which httpx would make anew for each client, and none of them uses here
PATIENCE = 10.0  # seconds for what a server on this machine answers in milliseconds, unless the machine is busy


class Server(http.server.ThreadingHTTPServer):
    """Gives the answers that it was told to, one for each request, the last one again and again."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = [(200, {}, b"fine")]
        self.requests = []
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def answer(self, *answers):
        """Each a status, or a status and its ``Retry-After``, or a status, headers and a body."""
        self.answers = [_complete(answer) for answer in answers]


def _complete(answer):
    if isinstance(answer, int):
        return answer, {}, b"fine"
    return answer if len(answer) == 3 else (answer[0], {"Retry-After": answer[1]}, b"fine")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.headers.get("Key"))
        answers = self.server.answers
        status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
        if status == 0:
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """The test knows."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get_by_urllib(url, key="", seconds=PATIENCE):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Key": key}), timeout=seconds) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        # It is the response, too.
        error.close()
        raise


def get_by_requests(url, key="", seconds=PATIENCE):
    with requests.get(url, headers={"Key": key}, timeout=seconds) as response:
        response.raise_for_status()
        return response.content


def get_by_httpx(url, key="", seconds=PATIENCE):
    with httpx.Client(follow_redirects=True, timeout=seconds, verify=TLS) as client:
        return client.get(url, headers={"Key": key}).raise_for_status().content


async def get_by_httpx_async(url, key="", seconds=PATIENCE):
    async with httpx.AsyncClient(follow_redirects=True, timeout=seconds, verify=TLS) as client:
        return (await client.get(url, headers={"Key": key})).raise_for_status().content


async def get_by_aiohttp(url, key="", seconds=PATIENCE):
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=seconds), raise_for_status=True) as session,
        session.get(url, headers={"Key": key}) as response,
    ):
        return await response.read()


@pytest.fixture(params=["urllib", "requests", "httpx", "httpx async", "aiohttp"])
def get(request):
    """A function that fetches a URL, by one of the clients."""
    return {
        "urllib": get_by_urllib,
        "requests": get_by_requests,
        "httpx": get_by_httpx,
        "httpx async": get_by_httpx_async,
        "aiohttp": get_by_aiohttp,
    }[request.param]


@pytest.fixture
def world(get):
    """That of the client."""
    from conftest import World

    return World(is_async="async" in get.__name__ or "aiohttp" in get.__name__)


@pytest.fixture
def failure(world, get, server):
    """What a request of the client raises."""

    def failed(url=server.url, **options):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - each client has its own
            world.run(get, url, **options)
        return caught.value

    return failed


# Answers


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_statuses_that_pass_are_retried(server, failure, status):
    server.answer(status)
    assert retry_after(failure()) is True


ABOUT_THE_REQUEST = [400, 404, 405, 406, 409, 410, 411, 412, 413, 414, 415, 416, 417, 422, 423, 424, 426, 428, 431, 451]


@pytest.mark.parametrize("status", ABOUT_THE_REQUEST)
def test_an_answer_about_the_request_ends_the_call_whatever_it_asks_for(server, failure, status):
    server.answer((status, "5"))
    assert retry_after(failure()) is GIVE_UP


@pytest.mark.parametrize("status", [401, 402, 403, 407, 418, 421, 499])
def test_an_answer_about_who_asks_or_that_nobody_knows_is_for_the_next_candidate(server, failure, status):
    server.answer(status)
    assert retry_after(failure()) is False


@pytest.mark.parametrize("status", [401, 402])
def test_a_key_that_is_refused_is_not_tried_again_whatever_the_server_asks_for(server, failure, status):
    server.answer((status, "5"))
    assert retry_after(failure()) is False


def test_who_is_forbidden_only_for_now_is_asked_to_wait(server, failure):
    server.answer((403, "5"))
    assert retry_after(failure()) == 5.0


def test_too_many_redirects_are_not_retried(server, failure):
    server.answer((302, {"Location": server.url}, b""))
    assert retry_after(failure()) is False


def test_seconds_are_waited_for(server, failure):
    server.answer((503, "7"))
    answer = retry_after(failure())
    assert (answer, type(answer)) == (7.0, float)


def test_a_date_is_waited_for(server, failure, fake_clock):
    clock.wall = lambda: NOW
    server.answer((429, email.utils.formatdate(NOW + 90, usegmt=True)))
    assert retry_after(failure()) == 90.0


def test_a_date_in_the_past_means_now(server, failure, fake_clock):
    clock.wall = lambda: NOW
    server.answer((503, email.utils.formatdate(NOW - 90, usegmt=True)))
    answer = retry_after(failure())
    assert (answer, type(answer)) == (0.0, float)


def test_garbage_is_ignored(server, failure):
    server.answer((503, "soon"))
    assert retry_after(failure()) is True


def test_milliseconds_are_waited_for_rather_than_whole_seconds(server, failure):
    server.answer((429, {"retry-after-ms": "1500", "Retry-After": "2"}, b""))
    assert retry_after(failure()) == 1.5


@pytest.mark.parametrize("status", [403, 429])
def test_the_end_of_a_limit_is_waited_for(server, failure, fake_clock, status):
    clock.wall = lambda: NOW
    server.answer((status, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(NOW + 90)}, b""))
    assert retry_after(failure()) == 90.0


def test_a_limit_of_which_something_is_left_is_not_waited_for(server, failure):
    left = {"X-RateLimit-Remaining": "4999", "X-RateLimit-Reset": "90"}
    server.answer((429, left, b""))
    assert retry_after(failure()) is True
    server.answer((403, left, b""))
    assert retry_after(failure()) is False


def test_a_server_that_fails_is_not_left_alone_until_its_limit_ends(server, failure):
    server.answer((502, {"X-RateLimit-Reset": "90"}, b""))
    assert retry_after(failure()) is True


def answered(text="", status=503, **headers):
    """An error without a server: requests' own, with this ``Retry-After`` and with headers in which ``_`` is ``-``."""
    response = requests.Response()
    response.status_code = status
    response.headers.update({"Retry-After": text, **{name.replace("_", "-"): value for name, value in headers.items()}})
    return requests.HTTPError(response=response)


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0.0), (" 5 ", 5.0), ("0.25", 0.25), ("1.", 1.0), ("31536000", LONGEST_WAIT)]
)
def test_seconds_may_be_written_in_these_ways(text, seconds):
    assert retry_after(answered(text)) == seconds


@pytest.mark.parametrize("name", ["X_RateLimit", "RateLimit", "X_Rate_Limit"])
@pytest.mark.parametrize(
    ("reset", "seconds"),
    [
        ("9", 9.0),  # reddit
        (str(NOW + 9), 9.0),  # GitHub
        (f"{NOW + 9}000", 9.0),  # OpenRouter
        ("Tue, 14 Nov 2023 22:13:29 GMT", 9.0),
        ("2023-11-14T22:13:29Z", 9.0),  # anthropic
        ("6m0s", 360.0),  # openai
        ("1d2h1m1.5s", 93_661.5),
        ("250ms", 0.25),
        (str(NOW - 9), 0.0),
        ("31536001", True),
        (str(NOW + 31_536_001), True),
        ("soon", True),
    ],
)
def test_the_end_of_a_limit_may_be_written_in_these_ways(fake_clock, name, reset, seconds):
    clock.wall = lambda: NOW
    assert retry_after(answered(status=429, **{f"{name}_Remaining": "0.0", f"{name}_Reset": reset})) == seconds
    assert retry_after(answered(status=429, **{f"{name}_Reset": reset})) == seconds


def test_of_several_limits_the_last_one_is_waited_for_of_which_nothing_is_left():
    requests_left = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "8.64s"}
    tokens_left = {"x-ratelimit-remaining-tokens": "7", "x-ratelimit-reset-tokens": "6m0s"}
    assert retry_after(answered(status=429, **requests_left, **tokens_left)) == 8.64
    tokens_left["x-ratelimit-remaining-tokens"] = "0"
    assert retry_after(answered(status=429, **requests_left, **tokens_left)) == 360.0
    discord = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset-After": "1.5", "X-RateLimit-Limit": "5"}
    assert retry_after(answered(status=429, **discord)) == 1.5
    assert retry_after(answered(status=429, **{**discord, "X-RateLimit-Remaining": "3"})) is True


@pytest.mark.parametrize(
    ("told", "answer"),
    [(7, 7.0), (0.5, 0.5), (dt.timedelta(minutes=1), 60.0), (True, False), (-1, False), (1e300, False), ("7", False)],
)
def test_an_error_may_tell_the_seconds_itself(told, answer):
    error = RuntimeError("flood control")
    error.retry_after = told
    found = retry_after(error)
    assert (found, type(found)) == (answer, type(answer))
    error.http_status = 401
    assert retry_after(error) is False


def test_what_cannot_be_read_leaves_it_to_the_next_header():
    headers = {"retry_after_ms": "soon", "X_RateLimit_Reset": "9"}
    assert retry_after(answered("5", status=429, **headers)) == 5.0
    assert retry_after(answered("later", status=429, **headers)) == 9.0


@pytest.fixture
def far_from_greenwich(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Pacific/Kiritimati")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    "date",
    [
        "Tue, 14 Nov 2023 22:13:25 GMT",
        "Tuesday, 14-Nov-23 22:13:25 GMT",
        "Tue Nov 14 22:13:25 2023",
        "Tue, 14 Nov 2023 22:13:25 -0000",
        "Tue, 14 Nov 2023 23:13:25 +0100",
    ],
)
def test_a_date_may_be_written_in_these_ways(fake_clock, far_from_greenwich, date):
    clock.wall = lambda: NOW
    assert retry_after(answered(date)) == 5.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-5",
        "+5",
        "nan",
        "inf",
        "-inf",
        "1e3",
        "5, 5",
        "5 s",
        "\u0665",
        "1_000",
        "0x10",
        "31536001",
        "9" * 400,
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "Tue, 14 Nov 2023 22:13:25 +9999",
        "Tue, 99 Nov 2023 22:13:25 GMT",
    ],
)
def test_what_is_no_time_to_wait_for_leaves_it_to_the_backoff(text):
    assert retry_after(answered(text)) is True


@given(st.text())
@example("Mon, 01 Jan 0001 00:00:00 +2359")
@example("Mon, 01 Jan")
def test_whatever_a_server_writes_the_answer_is_yes_or_a_time_that_can_be_waited_for(text):
    answer = retry_after(answered(text))
    assert answer is True or (isinstance(answer, float) and 0 <= answer <= LONGEST_WAIT)


# No answer


def test_a_refused_connection_is_retried(failure):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert retry_after(failure(f"http://127.0.0.1:{port}/")) is True


@pytest.mark.parametrize(
    "error",
    [
        ssl.SSLEOFError(8, "EOF occurred in violation of protocol"),
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
        http.client.BadStatusLine("HTP"),
        urllib3.exceptions.SSLError("[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC]"),
    ],
)
def test_a_connection_that_breaks_below_a_client_is_retried(error):
    assert retry_after(error) is True


def test_a_server_that_says_nothing_is_retried(failure):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert retry_after(failure(f"http://127.0.0.1:{silent.getsockname()[1]}/", seconds=0.05)) is True


def test_a_server_that_hangs_up_is_retried(server, failure):
    server.answer((0, {}, b""))
    assert retry_after(failure()) is True


def test_a_body_that_breaks_off_is_retried(server, failure):
    server.answer((200, {"Content-Length": "100"}, b"not a hundred bytes"))
    assert retry_after(failure()) is True


def test_a_server_that_is_still_not_well_after_the_retries_of_a_session_is_retried(server):
    server.answer(503)
    with requests.Session() as session:
        session.mount("http://", requests.adapters.HTTPAdapter(max_retries=urllib3.Retry(1, status_forcelist=[503])))
        with pytest.raises(requests.exceptions.RetryError) as caught:
            session.get(server.url)
    assert retry_after(caught.value) is True


@pytest.mark.parametrize(
    "error", [ConnectionResetError(), BrokenPipeError(), TimeoutError(), urllib.error.URLError("")]
)
def test_connections_and_timeouts_of_python_itself_are_retried(error):
    assert retry_after(error) is True


@pytest.mark.parametrize(
    "error",
    [
        ValueError(),
        OSError(),
        FileNotFoundError(),
        httpx.InvalidURL(""),
        httpx.UnsupportedProtocol(""),
        httpx.LocalProtocolError(""),
        httpx.DecodingError(""),
        requests.exceptions.InvalidURL(),
        requests.exceptions.MissingSchema(),
        requests.exceptions.JSONDecodeError("", "", 0),
        aiohttp.InvalidURL("x"),
    ],
    ids=repr,
)
def test_any_other_error_is_not_retried(error):
    assert retry_after(error) is False


# Errors of others


class ForeignError(Exception):
    def __init__(self, response):
        super().__init__()
        self.response = response


@pytest.mark.parametrize(("status", "answer"), [(429, 3.0), (401, False), (404, GIVE_UP), (200, False)])
def test_an_error_that_holds_a_response_is_judged_by_it(status, answer):
    response = httpx.Response(status, headers={"retry-after": "3"})
    assert retry_after(ForeignError(response)) == answer


def test_a_subclass_of_a_clients_error_is_judged_like_it():
    class Mine(requests.ConnectionError):
        pass

    assert retry_after(Mine()) is True


@pytest.mark.parametrize("name", ["status_code", "status"])
@pytest.mark.parametrize(("status", "answer"), [(503, True), (429, 3.0), (401, False), (404, GIVE_UP), (200, False)])
def test_any_error_with_a_status_of_http_is_judged_by_it(name, status, answer):
    described = {name: status, "headers": {"Retry-After": "3"} if status == 429 else {}}
    assert retry_after(type("ApiError", (Exception,), described)()) == answer
    response = type("Response", (), described)()
    assert retry_after(ForeignError(response)) == answer


@pytest.mark.parametrize(
    "described", [{"code": 503}, {"status": "503"}, {"status": 5}, {"status_code": True}], ids=repr
)
def test_a_number_that_is_no_status_of_http_says_nothing(described):
    assert retry_after(type("NetworkError", (Exception,), described)()) is False


# Causes


class OwnError(Exception):
    pass


def raised_from(cause, *, how="cause", depth=1):
    """An `OwnError` as Python makes it by ``raise … from cause``, ``raise`` below ``except``, ``raise … from None``."""
    for _ in range(depth):
        error = OwnError()
        error.__cause__ = cause if how == "cause" else None
        error.__context__ = cause
        error.__suppress_context__ = how != "context"
        cause = error
    return cause


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("how", ["cause", "context"])
def test_an_error_is_judged_by_what_it_was_raised_from(server, failure, how, depth):
    server.answer((0, {}, b""))
    assert retry_after(raised_from(failure(), how=how, depth=depth)) is True
    server.answer((503, "5"))
    assert retry_after(raised_from(failure(), how=how, depth=depth)) == 5.0
    server.answer(404)
    assert retry_after(raised_from(failure(), how=how, depth=depth)) is GIVE_UP


@pytest.mark.parametrize(
    ("statuses", "answer"),
    [((503,), True), ((503, 429), 3.0), ((429, 401), False), ((404, 401, 503), GIVE_UP)],
)
def test_a_group_is_judged_by_the_worst_in_it(statuses, answer):
    errors = [ForeignError(httpx.Response(s, headers={"retry-after": "3"} if s == 429 else {})) for s in statuses]
    assert retry_after(ExceptionGroup("", errors)) == answer
    group = ExceptionGroup("", [ConnectionError(), ExceptionGroup("", errors)])
    assert retry_after(raised_from(group)) == answer


def test_a_context_that_was_suppressed_does_not_count():
    assert retry_after(raised_from(ConnectionError(), how="none")) is False


def test_the_outermost_error_that_says_something_is_heard():
    error = httpx.ReadTimeout("")
    error.__cause__ = answered("5")
    assert retry_after(error) is True
    error = answered("5")
    error.__context__ = httpx.ReadTimeout("")
    assert retry_after(raised_from(error)) == 5.0


def test_causes_that_go_in_circles_have_an_end():
    one, other = OwnError(), OwnError()
    one.__cause__, other.__cause__ = other, one
    assert retry_after(one) is False
    other.__cause__ = None
    other.__context__ = one
    assert retry_after(one) is False


def test_an_attempt_is_not_judged_by_the_one_before(world, fake_clock):
    errors = [ConnectionError(), OwnError("stop"), ConnectionError()]

    def fail():
        raise errors.pop(0)

    async def fail_async():
        raise errors.pop(0)

    with pytest.raises(OwnError, match="stop"):
        world.run(opero(retry_on=retry_after)(fail_async if world.is_async else fail))
    assert len(errors) == 1


# SDKs. These classes have the attributes that those of openai 3.57.0, anthropic 2.14.0, boto3 1.44.8, google-api-core
# 2.44.0 and google-genai 3.6.1 had when they were asked for what a server on this machine would not give.


def sdk_error(full_name, **attributes):
    module, _, name = full_name.rpartition(".")
    error = type(name, (Exception,), {"__module__": module})()
    vars(error).update(attributes)
    return error


def httpx2_response(status, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return type("Response", (), {"__module__": "httpx2", "status_code": status, "headers": httpx.Headers(named)})()


@pytest.mark.parametrize("sdk", ["openai", "anthropic"])
@pytest.mark.parametrize(
    ("status", "headers", "answer"),
    [
        (429, {"retry_after": "3"}, 3.0),
        (429, {"retry_after_ms": "300"}, 0.3),
        (529, {}, True),
        (401, {}, False),
        (400, {}, GIVE_UP),
    ],
)
def test_sdks_on_httpx2_are_understood(sdk, status, headers, answer):
    error = sdk_error(f"{sdk}.APIStatusError", response=httpx2_response(status, **headers), status_code=status)
    assert retry_after(error) == answer


def test_httpx2_and_the_sdks_on_it_are_retried_without_an_answer():
    for name in ("NetworkError", "ProxyError", "RemoteProtocolError", "TimeoutException"):
        assert retry_after(sdk_error(f"httpx2.{name}")) is True
        assert retry_after(raised_from(sdk_error(f"httpx2.{name}"))) is True
    assert retry_after(sdk_error("httpx2.UnsupportedProtocol")) is False
    # As they come back from a worker process, without a cause.
    assert retry_after(sdk_error("openai.APIConnectionError")) is True
    assert retry_after(sdk_error("anthropic.APIConnectionError")) is True


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (429, {"code": "insufficient_quota", "type": "insufficient_quota"}),
        (429, {"code": "billing_not_active"}),
        (400, {"code": "billing_hard_limit_reached"}),
        (400, {"type": "billing_error"}),
    ],
)
def test_a_key_that_is_used_up_is_not_tried_again_whatever_the_status(status, said):
    error = sdk_error("openai.APIStatusError", response=httpx2_response(status, retry_after="3"), **said)
    assert retry_after(error) is False


def client_error(status, code, **headers):
    """botocore's, with the dict that it makes of an answer."""
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": {k.replace("_", "-"): v for k, v in headers.items()}}
    response = {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": metadata}
    return sdk_error("botocore.exceptions.ClientError", response=response, operation_name="Get")


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (client_error(400, "ThrottlingException"), True),
        (client_error(400, "ThrottlingException", retry_after="3"), 3.0),
        (client_error(429, "TooManyRequestsException"), True),
        (client_error(503, "SlowDown"), True),
        (client_error(500, "InternalError"), True),
        (client_error(400, "ExpiredTokenException"), False),
        (client_error(403, "AccessDenied"), False),
        (client_error(400, "ValidationException"), GIVE_UP),
        (client_error(404, "NoSuchKey"), GIVE_UP),
        (sdk_error("botocore.exceptions.EventStreamError", response={"Error": {}}), False),
    ],
)
def test_errors_of_boto3_are_understood(error, answer):
    assert retry_after(error) == answer


@pytest.mark.parametrize("name", ["ConnectionError", "HTTPClientError", "IncompleteReadError"])
def test_boto3_is_retried_without_an_answer(name):
    assert retry_after(sdk_error(f"botocore.exceptions.{name}", response=None)) is True


RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.07s"}
KEY_INVALID = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}


def message(**fields):
    """As protobuf has it: fields are attributes, and no others."""
    return type("Message", (), fields)()


@pytest.mark.parametrize(
    ("status", "details", "answer"),
    [
        (503, [], True),
        (429, [{"@type": "QuotaFailure"}, RETRY_INFO], 34.07),
        (429, [message(), message(retry_delay=message(seconds=12, nanos=500_000_000))], 12.5),
        (400, [KEY_INVALID], False),
        (401, [], False),
        (404, [RETRY_INFO], GIVE_UP),
    ],
)
def test_errors_of_google_are_understood(status, details, answer):
    error = sdk_error("google.api_core.exceptions.Some", code=HTTPStatus(status), details=details, response=None)
    assert retry_after(error) == answer
    body = {"error": {"code": status, "details": details}}
    error = sdk_error("google.genai.errors.APIError", code=status, details=body, response=httpx2_response(status))
    assert retry_after(error) == answer


def test_google_is_retried_without_an_answer():
    assert retry_after(sdk_error("google.auth.exceptions.TransportError")) is True


def test_urllib3_is_retried_without_an_answer():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with urllib3.PoolManager() as pool:
        for retries in (False, 0):
            with pytest.raises(urllib3.exceptions.HTTPError) as caught:
                pool.request("GET", f"http://127.0.0.1:{port}/", retries=retries)
            assert retry_after(caught.value) is True


# With the decorator


def test_a_function_waits_as_long_as_the_server_asks_for(world, get, server, fake_clock):
    clock.wall = lambda: NOW
    server.answer((503, "7"), (429, email.utils.formatdate(NOW + 90, usegmt=True)), 500, 200)
    function = opero(retry_on=retry_after, min_delay=0.5, jitter=False)(get)

    assert world.run(function, server.url) == b"fine"
    assert fake_clock.sleeps == [7.0, 90.0, 2.0]


def test_a_function_gives_up_where_a_retry_is_no_use(world, get, server, fake_clock):
    server.answer((503, "1"), (404, "1"), 200)
    with pytest.raises(Exception, match="404"):
        world.run(opero(retry_on=retry_after)(get), server.url)
    assert fake_clock.sleeps == [1.0]


def test_a_key_that_is_over_its_quota_rests_and_the_other_one_is_asked(world, get, server, fake_clock):
    server.answer((429, "60"), 401, (200, {}, b"fine"))
    function = opero(retry_on=retry_after, arg_fallback="key")(get)

    assert world.run(function, server.url, ["tired", "revoked"]) == b"fine"
    assert server.requests == ["tired", "revoked", "tired"]
    assert fake_clock.sleeps == pytest.approx([60.0])


def test_no_other_key_is_tried_where_the_answer_would_be_the_same(world, get, server, fake_clock):
    server.answer(404, 200)
    with pytest.raises(AllFailedError):
        world.run(opero(retry_on=retry_after, arg_fallback="key")(get), server.url, ["one", "other"])
    assert server.requests == ["one"]
    assert fake_clock.sleeps == []


def test_total_timeout_ends_what_a_server_would_make_wait_for_long(world, get, server, fake_clock):
    server.answer((503, "86400"))
    with pytest.raises(Exception, match="503"):
        world.run(opero(retry_on=retry_after, total_timeout=60)(get), server.url)
    with pytest.raises(AllFailedError):
        world.run(opero(retry_on=retry_after, total_timeout=60, arg_fallback="key")(get), server.url)
    assert fake_clock.sleeps == []


# Imports

CLIENTS = "{'httpx', 'requests', 'aiohttp', 'urllib.request', 'urllib.error', 'urllib3', 'http.client'}"


@pytest.mark.parametrize(("imported", "unwanted"), [("opero", "{'opero.http'} | " + CLIENTS), ("opero.http", CLIENTS)])
def test_nothing_is_imported_for_it(imported, unwanted):
    source = f"import sys, {imported}\nfound = sys.modules.keys() & ({unwanted})\nassert not found, found"
    subprocess.run([sys.executable, "-W", "error", "-c", source], check=True)


def test_an_error_whose_attributes_raise_is_judged_by_what_it_is():
    class OddError(Exception):
        @property
        def response(self):
            raise RuntimeError

    assert retry_after(OddError()) is False


# Errors that only look like those of a client


def looking_like(library, **attributes):
    """An exception of a class that says it is the library's."""
    status = {"requests": "status_code", "httpx": "status_code", "aiohttp": "status", "urllib": "code"}[library]
    made = type("Odd", (Exception,), {"__module__": f"{library}.odd", status: 503})()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


class Breaking:
    def get(self, name):
        raise RuntimeError(name)

    @property
    def headers(self):
        raise RuntimeError


ODD_HEADERS = {
    "none": None,
    "a list": [("Retry-After", "5")],
    "breaking": Breaking(),
    "get that is none": type("Headers", (), {"get": None})(),
    **{
        repr(value): {"Retry-After": value}
        for value in (None, 5, -5, b"5", float("nan"), ["5"], "", "\x00", "9" * 5000)
    },
    **{text: {"Retry-After": text} for text in ("-5", "nan", "inf", "1e999", "Wed, 99 Oct 2015 99:99:99 GMT")},
}


@pytest.mark.parametrize("library", ["requests", "httpx", "aiohttp", "urllib"])
@pytest.mark.parametrize("headers", ODD_HEADERS)
def test_odd_headers_are_ignored(library, headers):
    assert retry_after(looking_like(library, headers=ODD_HEADERS[headers])) is True


@pytest.mark.parametrize("library", ["requests", "httpx", "aiohttp", "urllib"])
def test_an_answer_without_headers_is_retried_after_the_usual_backoff(library):
    assert retry_after(looking_like(library)) is True
    assert retry_after(type("Odd", (Exception,), {"response": looking_like(library)})()) is True


def test_an_error_whose_attributes_raise_is_not_retried():
    class Odd(Exception):  # noqa: N818 - not one to be caught
        @property
        def response(self):
            raise RuntimeError

    assert retry_after(Odd()) is False


def test_a_response_whose_headers_raise_is_retried():
    response = type("Odd", (Breaking,), {"__module__": "requests", "status_code": 503})()
    assert retry_after(type("OddError", (Exception,), {"response": response})()) is True


@pytest.mark.parametrize("module", [None, 5, ""])
def test_an_error_of_a_class_without_a_module_is_not_retried(module):
    assert retry_after(type("Odd", (Exception,), {"__module__": module})()) is False


@pytest.mark.parametrize("zone", ["GMT", "-0000", "+0000"])
def test_a_date_is_in_utc_also_where_its_zone_is_said_to_be_unknown(fake_clock, zone):
    clock.wall = lambda: NOW
    for offset, seconds in ((90, 90.0), (-90, 0.0)):
        date = email.utils.formatdate(NOW + offset, usegmt=True).replace("GMT", zone)
        assert retry_after(answered(date)) == seconds
