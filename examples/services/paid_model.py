"""A paid model behind HTTP, on loopback: the service that `../llm_batch.py` has to cope with.

Each key has requests and tokens per minute; who asks too fast is answered with 429 and Retry-After. It fails now and
then, and hangs at times. One key is revoked, one has no credit left. A minute lasts two seconds here.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

MINUTE = 2.0  # seconds
REQUESTS, TOKENS = 400, 8_000  # per minute and key
KEYS = {"revoked": "sk-1", "no credit": "sk-2", "good": "sk-3"}


class Model(ThreadingHTTPServer):
    """Counts what each key asks, and answers as a paid API does."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        """Listen on a free port."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.generator = random.Random(2)
        self.answers: dict[str, Counter[int]] = defaultdict(Counter)
        self.tokens: Counter[str] = Counter()
        self.recent: dict[str, list[tuple[float, int]]] = defaultdict(list)

    @property
    def url(self) -> str:
        """Where to ask."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1/answers"

    def count(self, key: str) -> int:
        """How many requests came with this key."""
        return sum(self.answers[key].values())

    def report(self) -> None:
        """Print what each key asked."""
        for name, key in KEYS.items():
            told = ", ".join(f"{status}: {count}" for status, count in sorted(self.answers[key].items()))
            print(f"{name:10} {self.count(key):5} requests, {self.tokens[key]:6} tokens; {told}")

    def answer(self, key: str, prompt: str) -> tuple[int, dict[str, Any], float]:
        """Status, body, and how long it takes."""
        with self.lock:
            status, tokens, chance = self._status(key, prompt), 0, self.generator.random()
            if status == HTTPStatus.OK and chance < 0.04:  # one in 25
                status = HTTPStatus.INTERNAL_SERVER_ERROR
            if status == HTTPStatus.OK:
                tokens = len(prompt) // 4 + len(prompt) % 20
                self.recent[key].append((time.monotonic(), tokens))
                self.tokens[key] += tokens
            self.answers[key][int(status)] += 1
        hangs = status == HTTPStatus.OK and chance > 0.99  # one in a hundred
        body = {"answer": f"because of {prompt}", "usage": {"total_tokens": tokens}}
        return int(status), body, 1.5 if hangs else 0.02

    def _status(self, key: str, prompt: str) -> HTTPStatus:
        if key == KEYS["revoked"]:
            return HTTPStatus.UNAUTHORIZED
        if key == KEYS["no credit"]:
            return HTTPStatus.PAYMENT_REQUIRED
        now = time.monotonic()
        recent = self.recent[key] = [(moment, tokens) for moment, tokens in self.recent[key] if moment > now - MINUTE]
        # A little more than it promises, for what was long on its way.
        too_many = (
            len(recent) >= 1.1 * REQUESTS or sum(tokens for _, tokens in recent) + len(prompt) // 4 > 1.1 * TOKENS
        )
        return HTTPStatus.TOO_MANY_REQUESTS if too_many else HTTPStatus.OK


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Model

    def do_POST(self) -> None:
        key = self.headers["Authorization"].removeprefix("Bearer ")
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, body, seconds = self.server.answer(key, request["prompt"])
        time.sleep(seconds)
        data = json.dumps(body).encode()
        try:
            self.send_response(status)
            if status == HTTPStatus.TOO_MANY_REQUESTS:
                self.send_header("Retry-After", "1")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError:  # the client has waited long enough
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as of its base
        """Say nothing."""


@contextmanager
def service() -> Iterator[Model]:
    """Run it while the block runs."""
    with Model() as model:
        threading.Thread(target=model.serve_forever, daemon=True).start()
        yield model
        model.shutdown()
