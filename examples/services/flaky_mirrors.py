"""HTTP mirrors of one folder, on loopback, that misbehave: the service that `../mirrors.py` has to cope with.

A mirror answers some requests with 503 or 429, resets some connections and is slow at times. Which answer a request
gets is a hash of the seed, the mirror, the path and how often that path was asked for there, so it depends neither on
timing nor on the order of requests. One mirror is dead at first: it resets every connection.
"""

from __future__ import annotations

import hashlib
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

MIRRORS = (1, 2, 3)
DEAD_MIRROR = 2
DEAD_FOR = 100  # requests
SLOW_SECONDS = 0.2


class Answer(StrEnum):
    """How a mirror answers one request."""

    FILE = "file"
    SLOW = "slow"
    UNAVAILABLE = "503"
    BUSY_NOW = "429 with Retry-After 0"
    BUSY_SECOND = "429 with Retry-After 1"
    RESET = "reset"


SHARES = {
    Answer.UNAVAILABLE: 0.08,
    Answer.BUSY_NOW: 0.035,
    Answer.BUSY_SECOND: 0.005,
    Answer.RESET: 0.03,
    Answer.SLOW: 0.03,
}  # all other requests get the file


class Request(NamedTuple):
    """A request as the mirror saw it; `started` is a `time.monotonic()`."""

    started: float
    path: str
    answer: Answer


def decide(seed: int, mirror: int, path: str, times_asked: int) -> Answer:
    """Choose the answer to a request, always the same one for the same arguments."""
    digest = hashlib.sha256(f"{seed} {mirror} {path} {times_asked}".encode()).digest()
    point = int.from_bytes(digest[:8]) / 2**64
    for answer, share in SHARES.items():
        if point < share:
            return answer
        point -= share
    return Answer.FILE


class Mirror(ThreadingHTTPServer):
    """One mirror on a free loopback port; `requests` holds what it was asked for."""

    daemon_threads = False  # server_close() then waits for the answers under way
    request_queue_size = 128  # with the default of 5 a burst of connections waits a second for its retransmission

    def __init__(self, number: int, root: Path, names: Collection[str], seed: int, *, dead_for: int = 0) -> None:
        """Serve the files `names` below `root`; reset the first `dead_for` requests."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[Request] = []
        self._number, self._root, self._names = number, root, frozenset(names)
        self._seed, self._dead_for = seed, dead_for
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()

    def admit(self, path: str) -> Answer:
        """Write a request down and choose its answer."""
        with self._lock:
            dead = len(self.requests) < self._dead_for
            answer = Answer.RESET if dead else decide(self._seed, self._number, path, self._asked[path])
            self._asked[path] += 1
            self.requests.append(Request(time.monotonic(), path, answer))
        return answer

    def asked_while_resting(self) -> int:
        """Return how many requests came within the second of rest that an answer had asked for."""
        asked, rests_until = 0, 0.0
        for request in self.requests:
            asked += request.started < rests_until
            if request.answer is Answer.BUSY_SECOND:
                rests_until = request.started + 1
        return asked

    def read(self, path: str) -> bytes | None:
        """Return the file's bytes, or `None` if this mirror has no such file."""
        return (self._root / path).read_bytes() if path in self._names else None

    def server_bind(self) -> None:
        """Bind without the base class's name lookup, which may leave the machine."""
        socketserver.TCPServer.server_bind(self)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection without the base class's orderly goodbye, which would turn a reset into an end of file."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report errors, except that a client went away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections alive
    disable_nagle_algorithm = True  # headers and body are two writes
    timeout = 30.0  # a client that forgets its connection must not keep server_close() waiting for ever

    def do_GET(self) -> None:
        mirror = cast("Mirror", self.server)
        path = unquote(self.path).removeprefix("/")
        match mirror.admit(path):
            case Answer.RESET:
                self._reset()
            case Answer.UNAVAILABLE:
                self._send(HTTPStatus.SERVICE_UNAVAILABLE)
            case Answer.BUSY_NOW:
                self._send(HTTPStatus.TOO_MANY_REQUESTS, retry_after=0)
            case Answer.BUSY_SECOND:
                self._send(HTTPStatus.TOO_MANY_REQUESTS, retry_after=1)
            case Answer.SLOW:
                time.sleep(SLOW_SECONDS)
                self._send_file(mirror.read(path))
            case Answer.FILE:
                self._send_file(mirror.read(path))

    def _send_file(self, body: bytes | None) -> None:
        if body is None:
            self._send(HTTPStatus.NOT_FOUND)
        else:
            self._send(HTTPStatus.OK, body)

    def _send(self, status: HTTPStatus, body: bytes = b"", *, retry_after: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/x-python")
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        # Lingering for 0 seconds makes the close that follows send a TCP reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Say nothing: the requests are counted instead."""


@contextmanager
def _running(mirror: Mirror) -> Iterator[Mirror]:
    thread = threading.Thread(target=mirror.serve_forever, kwargs={"poll_interval": 0.05})
    with mirror:
        thread.start()
        try:
            yield mirror
        finally:
            mirror.shutdown()
            thread.join()


@contextmanager
def flaky_mirrors(root: Path, names: Collection[str], seed: int) -> Iterator[list[Mirror]]:
    """Run the mirrors of the files `names` below `root`; close the client before leaving."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                _running(Mirror(number, root, names, seed, dead_for=DEAD_FOR if number == DEAD_MIRROR else 0))
            )
            for number in MIRRORS
        ]


def complaints(mirrors: list[Mirror], rate: float, workers: int) -> list[str]:
    """Return what the mirrors have to say against the client; what was under way at once may have arrived at once."""
    found: list[str] = []
    burst = max(5, 0.04 * rate)
    for number, mirror in enumerate(mirrors, 1):
        if (busiest := busiest_second(mirror.requests)) > rate + burst + workers:
            found.append(f"mirror {number} was asked {busiest} times in a second")
        rests = sum(request.answer is Answer.BUSY_SECOND for request in mirror.requests)
        if (asked := mirror.asked_while_resting()) > rests * workers:
            found.append(f"mirror {number} was asked {asked} times while it rested")
    return found


def report(mirrors: list[Mirror], rate: float) -> None:
    """Print what the mirrors saw."""
    answers = Counter(str(request.answer) for mirror in mirrors for request in mirror.requests)
    print("the mirrors answered with", ", ".join(f"{answer}: {count}" for answer, count in answers.most_common()))
    for number, mirror in enumerate(mirrors, 1):
        busiest, resting = busiest_second(mirror.requests), mirror.asked_while_resting()
        print(
            f"mirror {number}: {len(mirror.requests):4} requests, {busiest} in its busiest second (limit {rate:g}), "
            f"{resting} at rest"
        )
    requests = sorted(request for mirror in mirrors for request in mirror.requests)
    rests = sum(request.answer is Answer.BUSY_SECOND for request in requests)
    seconds = requests[-1].started - requests[0].started
    # Each rest of a second costs a mirror so much time: with 2 in 100 requests, three mirrors answer 129 a second.
    possible = len(mirrors) / (1 / rate + rests / len(requests))
    print(f"{len(requests) / seconds:.0f} requests a second; {possible:.0f} are possible with so many rests")


def busiest_second(requests: list[Request]) -> int:
    """Return how many requests started in the busiest second, wherever it began."""
    oldest = most = 0
    for index, request in enumerate(requests):
        while request.started - requests[oldest].started >= 1:
            oldest += 1
        most = max(most, index - oldest + 1)
    return most
