"""Ask a language model many prompts with three keys, of which one is revoked and one has no credit left.

The service (at the end of this file, on loopback) imitates a paid API: each key has requests and tokens per minute, it
answers 429 with Retry-After when one asks too fast, fails now and then, and hangs at times. `ask` below is all that it
takes to cope: costs, limits and circuits of each key, a cache on disk, and a budget that no call may exceed. A minute
lasts two seconds here.

    python examples/llm_batch.py
    python examples/llm_batch.py --prompts 1000 --budget 20000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import httpx

from opero import GIVE_UP, AllFailedError, Breaker, RateLimiter, opmap
from opero.http import retry_after

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MINUTE = 2.0  # seconds
REQUESTS, TOKENS = 400, 8_000  # per minute and key
WORKERS = 20
KEYS = {"revoked": "sk-1", "no credit": "sk-2", "good": "sk-3"}


class OutOfBudgetError(Exception):
    """The next prompt would cost more than is left."""


def count_tokens(prompt: str, api_key: str = "") -> int:  # noqa: ARG001 - it is called as `ask` is
    """Say what a call costs, as far as that is known before it."""
    return len(prompt) // 4 + 20


def used_tokens(answer: dict[str, Any]) -> int:
    """Say what it has cost."""
    used: int = answer["usage"]["total_tokens"]
    return used


def worth_retrying(error: Exception) -> Any:
    """Say what an error tells of the key, of the service and of the request."""
    if isinstance(error, OutOfBudgetError):
        return GIVE_UP  # another key would cost as much
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.PAYMENT_REQUIRED}:
            return False  # this key is of no use: the next one, and this one last from now on
    return retry_after(error)


async def ask_all(url: str, prompts: Sequence[str], folder: str, budget: RateLimiter) -> tuple[list[Any], Any]:
    """Ask every prompt; identical ones, and those of an earlier run, are answered from the cache."""
    async with httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=WORKERS)) as client:

        @opmap(
            mode="async",
            workers=WORKERS,
            cache=True,
            cache_backend="disk",
            cache_options={"cache_dir": folder},
            cache_namespace="answers",
            cache_key=lambda prompt, _key: prompt,  # whichever key pays for it
            arg_fallback="api_key",
            fallback_cooldown=3_600,  # a key that failed is tried last for so long
            retries=6,
            min_delay=0.05,
            retry_on=worth_retrying,
            per="api_key",  # limits and circuits of each key
            rate_limit={"calls": f"{REQUESTS}/{MINUTE} s", "tokens": f"{TOKENS}/{MINUTE} s"},
            rate_limit_cost={"tokens": (count_tokens, used_tokens)},
            breaker=Breaker(10, recovery=1),
            attempt_timeout=1,
            progress=False,
            return_exceptions=True,
        )
        async def ask(prompt: str, api_key: str) -> dict[str, Any]:
            if not await budget.acquire_async(timeout=0, tokens=count_tokens(prompt)):
                raise OutOfBudgetError
            headers = {"Authorization": f"Bearer {api_key}"}
            response = await client.post(url, json={"prompt": prompt}, headers=headers)
            answer: dict[str, Any] = response.raise_for_status().json()
            return answer

        results = await ask(prompts, api_key=list(KEYS.values()))
        return list(results), ask.stats.snapshot()


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, report by key, check; return the exit code."""
    parser = argparse.ArgumentParser(description="Ask many prompts with three keys of which two are of no use.")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--budget", type=int, default=1_000_000, help="tokens (default: %(default)s)")
    options = parser.parse_args(arguments)
    generator = random.Random(1)
    prompts = [f"Question {number}: {'why ' * generator.randrange(1, 30)}?" for number in range(options.prompts)]
    budget = RateLimiter({"tokens": f"{options.budget}/day"}, spread=False)
    with tempfile.TemporaryDirectory() as folder, service() as model:
        began = time.perf_counter()
        results, stats = asyncio.run(ask_all(model.url, prompts, folder, budget))
        seconds = time.perf_counter() - began
        again, stats_again = asyncio.run(ask_all(model.url, prompts, folder, budget))
    answered = sum(isinstance(result, dict) for result in results)
    failed = Counter(type(result).__name__ for result in results if not isinstance(result, dict))
    print(f"{len(prompts)} prompts in {seconds:.1f} s: {answered} answered, {stats.retries} retries, {dict(failed)}")
    print(f"again: {stats_again.hits} of {len(prompts)} from the cache")
    for name, key in KEYS.items():
        told = ", ".join(f"{status}: {count}" for status, count in sorted(model.answers[key].items()))
        print(f"{name:10} {model.count(key):5} requests, {model.tokens[key]:6} tokens; {told}")
    found = problems(options, results, again, model)
    print(*found or ["ok"], sep="\n")
    return bool(found)


def problems(options: argparse.Namespace, results: list[Any], again: list[Any], model: Model) -> list[str]:
    """Say what went wrong, if anything."""
    useless = ["revoked", "no credit"]
    too_often = 2 * (WORKERS + 5)  # in two runs
    found = [f"the {name} key was asked again and again" for name in useless if model.count(KEYS[name]) > too_often]
    if sum(model.tokens.values()) > options.budget:
        found.append("the budget was exceeded")
    if [result for result in results if isinstance(result, dict)] != [
        answer for result, answer in zip(results, again, strict=True) if isinstance(result, dict)
    ]:
        found.append("an answer was lost between the two runs")
    spent = [error for error in results if isinstance(error, AllFailedError) and error.split(OutOfBudgetError)[0]]
    lost = [result for result in results if not isinstance(result, dict) and result not in spent]
    return [*found, *[f"not answered: {error!r}" for error in lost[:5]]]


# From here on: the service.


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


if __name__ == "__main__":
    sys.exit(main())
