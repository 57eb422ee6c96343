"""A web service whose answers depend on another service that is slow, limited and fails now and then.

FastAPI sees a decorated function's own parameters, so `price_of` below can be called or injected like any other.
Identical requests share one call downstream, and hot answers come from memory. The other service is not asked more
often than it allows; a request that could not be answered in time is refused at once with 503 and Retry-After.
`/metrics` tells what happened. Requests that are under way at the end are answered.

    python examples/web_service.py            # serves on port 8000 until Ctrl-C
    python examples/web_service.py --check    # asks itself for a second, and tells whether all went well
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

import fastapi
import httpx
import uvicorn
from fastapi.responses import JSONResponse

from opero import CallTimeoutError, CircuitOpenError, RateLimitedError, control, opero

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

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
    rate_limit=100,
    rate_limit_options={"max_wait": 0.5},
    max_concurrent=120,
    breaker=10,
)
async def price_of(item: str) -> float:
    """Ask for a price; a parameter of the endpoint below."""
    return await ask_downstream(item)


class UnderWay:
    """Counts requests, so that the service ends when they have their answers."""

    def __init__(self) -> None:
        """Nothing is under way."""
        self.count = 0
        self.is_idle = asyncio.Event()
        self.is_idle.set()

    async def __call__(self) -> AsyncIterator[None]:
        """Accompany one request."""
        self.count += 1
        self.is_idle.clear()
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                self.is_idle.set()


def service() -> fastapi.FastAPI:
    """Make the application."""
    under_way = UnderWay()

    @asynccontextmanager
    async def life(_app: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.wait_for(under_way.is_idle.wait(), 5)

    app = fastapi.FastAPI(lifespan=life, dependencies=[fastapi.Depends(under_way)])

    @app.get("/price/{item}")
    async def price(item: str, count: int = 1) -> dict[str, float]:
        return {"price": count * await price_of(item)}

    @app.get("/quote/{item}")
    async def quote(found: Annotated[float, fastapi.Depends(price_of)]) -> dict[str, float]:
        return {"quote": found}

    @app.get("/metrics")
    async def metrics() -> dict[str, Any]:
        stats, it = control(price_of).stats.snapshot(), control(price_of)
        return {
            "calls": stats.calls,
            "hits": stats.hits,
            "attempts": stats.attempts,
            "retries": stats.retries,
            "failures": stats.failures,
            "waited": stats.waited,
            "entries": it.cache_info().currsize,
            "circuit": it.circuit.state,
        }

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
    config = uvicorn.Config(service(), port=0, log_level="warning")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn tells nobody
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as client:
        same = await asyncio.gather(*[client.get("/price/tea?count=2") for _ in range(30)])
        many = await asyncio.gather(*[client.get(f"/price/item{number}") for number in range(150)])
        quote = await client.get("/quote/tea")
        metrics = (await client.get("/metrics")).json()
        last = asyncio.create_task(client.get("/price/last"))
        await asyncio.sleep(0.01)
        server.should_exit = True
        ended = await last
        await serving
    refused = sum(answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE for answer in many)
    print(f"{metrics}\n{refused} of {len(many)} were refused, with Retry-After")
    is_well = (
        {answer.json()["price"] for answer in same} == {26.0}
        and quote.json() == {"quote": 13.0}
        and {answer.status_code for answer in many} == {HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE}
        and metrics["hits"] >= 30  # those who asked for the same
        and ended.status_code == HTTPStatus.OK
    )
    print("ok" if is_well else "FAILED")
    return not is_well


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, or check; return the exit code."""
    parser = argparse.ArgumentParser(description="A web service in front of one that is limited and fails.")
    parser.add_argument("--check", action="store_true", help="ask it for a second, and tell whether all went well")
    options = parser.parse_args(arguments)
    if options.check:
        return asyncio.run(check())
    uvicorn.run(service(), port=8000)
    return 0


if __name__ == "__main__":
    sys.exit(main())
