"""Ask a language model many prompts with three keys, of which one is revoked and one has no credit left.

The service (`services/paid_model.py`, on loopback) imitates a paid API: each key has requests and tokens per minute, it
answers 429 with Retry-After when one asks too fast, fails now and then, and hangs at times. `ask` below is all that it
takes to cope: costs, limits and circuits of each key, a cache on disk, and a budget that no call may exceed.

    python examples/llm_batch.py
    python examples/llm_batch.py --prompts 1000 --budget 20000
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from typing import Any

import httpx
from services.paid_model import KEYS, MINUTE, REQUESTS, TOKENS, Model, service

from opero import GIVE_UP, AllFailedError, Breaker, Cache, RateLimiter, opmap
from opero.http import retry_after

WORKERS = 20


class OutOfBudgetError(Exception):
    """The next prompt would cost more than is left."""


def count_tokens(prompt: str, api_key: str = "") -> int:  # noqa: ARG001 - it is called as `ask` is
    """Say what a call costs, as far as that is known before it."""
    return len(prompt) // 4 + 20


def worth_retrying(error: Exception) -> Any:
    """Say what an error tells of the key, of the service and of the request."""
    return GIVE_UP if isinstance(error, OutOfBudgetError) else retry_after(error)  # another key would cost as much


async def ask_all(url: str, prompts: list[str], folder: str, budget: RateLimiter) -> tuple[list[Any], Any]:
    """Ask every prompt; identical ones, and those of an earlier run, are answered from the cache."""
    async with httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=WORKERS)) as client:

        @opmap(
            mode="async",
            workers=WORKERS,
            cache=Cache(backend="disk", namespace="answers", ignore="api_key", cache_dir=folder),  # whoever pays for it
            arg_fallback="api_key",
            fallback_cooldown=3_600,  # a key that failed is tried last for so long
            retries=6,
            min_delay=0.05,
            retry_on=worth_retrying,
            per="api_key",  # limits and circuits of each key
            rate_limit={"calls": f"{REQUESTS}/{MINUTE} s", "tokens": f"{TOKENS}/{MINUTE} s"},
            rate_limit_cost={"tokens": (count_tokens, lambda answer: answer["usage"]["total_tokens"])},
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

        return await ask(prompts, api_key=list(KEYS.values())), ask.stats.snapshot()


def main() -> int:
    """Ask, report by key, check; return the exit code."""
    parser = argparse.ArgumentParser(description="Ask many prompts with three keys of which two are of no use.")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--budget", type=int, default=1_000_000, help="tokens (default: %(default)s)")
    options = parser.parse_args()
    generator = random.Random(1)
    prompts = [f"Question {number}: {'why ' * generator.randrange(1, 30)}?" for number in range(options.prompts)]
    budget = RateLimiter({"tokens": f"{options.budget}/day"}, spread=False)
    with tempfile.TemporaryDirectory() as folder, service() as model:
        began = time.perf_counter()
        results, stats = asyncio.run(ask_all(model.url, prompts, folder, budget))
        seconds = time.perf_counter() - began
        again, stats_again = asyncio.run(ask_all(model.url, prompts, folder, budget))
    failed = sorted({type(outcome.error).__name__ for outcome in results.failed})
    print(f"{len(prompts)} prompts in {seconds:.1f} s: {len(results.ok)} answered, {stats.retries} retries", *failed)
    print(f"again: {stats_again.hits} of {len(prompts)} from the cache")
    model.report()
    found = problems(options.budget, results, again, model)
    print(*found or ["ok"], sep="\n")
    return bool(found)


def problems(budget: int, results: Any, again: Any, model: Model) -> list[str]:
    """Say what went wrong, if anything."""
    too_often = 2 * (WORKERS + 5)  # in two runs
    useless = [name for name in ("revoked", "no credit") if model.count(KEYS[name]) > too_often]
    found = [f"the {name} key was asked again and again" for name in useless]
    if sum(model.tokens.values()) > budget:
        found.append("the budget was exceeded")
    if any(before != after for before, after in zip(results, again, strict=True) if isinstance(before, dict)):
        found.append("an answer was lost between the two runs")
    errors = [outcome.error for outcome in results.failed]
    lost = [error for error in errors if not (isinstance(error, AllFailedError) and error.split(OutOfBudgetError)[0])]
    return [*found, *[f"not answered: {error!r}" for error in lost[:5]]]


if __name__ == "__main__":
    sys.exit(main())
