"""A web service whose answers depend on another service that is slow, limited and fails now and then.

FastAPI sees a decorated function's own parameters, so `price_of` below can be called or injected like any other.
Identical requests share one call downstream, and hot answers come from memory. The other service is not asked more
often than it allows; a request that could not be answered in time is refused at once with 503 and Retry-After.
`/metrics` tells what happened. At the end uvicorn waits for the requests that are under way.

    python examples/web_service.py            # serves on port 8000 until Ctrl-C
    python examples/web_service.py --check    # asks itself for a second, and tells whether all went well
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from http import HTTPStatus
from typing import Annotated, Any

import fastapi
import uvicorn
from fastapi.responses import JSONResponse
from services.clients import ask_service

from opero import CallTimeoutError, CircuitOpenError, RateLimitedError, control, opero

mishaps = random.Random(1)


async def ask_downstream(item: str) -> float:
    """Stand for a request to the other service."""
    await asyncio.sleep(0.02)
    if mishaps.random() < 0.1:  # one in ten
        raise ConnectionError
    return 10.0 + len(item)


@opero(
    cache=True,
    cache_ttl=30,
    retries=3,
    min_delay=0.02,
    retry_on=ConnectionError,
    total_timeout=1,
    rate_limit=20,
    rate_limit_options={"max_wait": 0.5},
    max_concurrent=10,
    breaker=10,
)
async def price_of(item: str) -> float:
    """Ask for a price; a parameter of the endpoint below."""
    return await ask_downstream(item)


def service() -> fastapi.FastAPI:
    """Make the application."""
    app = fastapi.FastAPI()

    @app.get("/price/{item}")
    async def price(item: str, count: int = 1) -> dict[str, float]:
        return {"price": count * await price_of(item)}

    @app.get("/quote/{item}")
    async def quote(found: Annotated[float, fastapi.Depends(price_of)]) -> dict[str, float]:
        return {"quote": found}

    @app.get("/metrics")
    async def metrics() -> dict[str, Any]:
        it = control(price_of)
        counts = {
            name: getattr(it.stats, name) for name in ("calls", "hits", "attempts", "retries", "failures", "waited")
        }
        return {**counts, "entries": it.cache_info().currsize, "circuit": it.circuit.state}

    @app.exception_handler(RateLimitedError)
    @app.exception_handler(CircuitOpenError)
    @app.exception_handler(CallTimeoutError)
    @app.exception_handler(ConnectionError)
    async def try_later(_request: fastapi.Request, error: Exception) -> JSONResponse:
        seconds = getattr(error, "retry_in", None) or 1
        status = HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"error": "try later"}, status, headers={"Retry-After": f"{seconds:.0f}"})

    return app


async def check() -> int:
    """Ask the service many times at once, and see what it did; return the exit code."""
    answers = await ask_service(service(), calls=lambda: control(price_of).stats.calls)
    refused = sum(answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE for answer in answers.many)
    print(f"{answers.metrics}\n{refused} of {len(answers.many)} were refused, with Retry-After")
    is_well = (
        {answer.json()["price"] for answer in answers.same} == {26.0}
        and answers.quote.json() == {"quote": 13.0}
        and {answer.status_code for answer in answers.many} <= {HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE}
        and answers.metrics["hits"] >= 30  # those who asked for the same
        and answers.last.status_code == HTTPStatus.OK
    )
    print("ok" if is_well else "FAILED")
    return not is_well


def main() -> int:
    """Serve, or check; return the exit code."""
    parser = argparse.ArgumentParser(description="A web service in front of one that is limited and fails.")
    parser.add_argument("--check", action="store_true", help="ask it for a second, and tell whether all went well")
    options = parser.parse_args()
    if options.check:
        return asyncio.run(check())
    uvicorn.run(service(), port=8000)
    return 0


if __name__ == "__main__":
    sys.exit(main())
