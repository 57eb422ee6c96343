"""Those who ask `../web_service.py`: many at once, and the last one while the service ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn

if TYPE_CHECKING:
    from collections.abc import Callable


async def ask_service(app: Any, calls: Callable[[], int]) -> SimpleNamespace:
    """Serve an application on a free port and ask it; ``calls`` counts those of the function behind it."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    await _until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    answers = SimpleNamespace()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as client:
        answers.same = await asyncio.gather(*[client.get("/price/tea?count=2") for _ in range(30)])
        answers.many = await asyncio.gather(*[client.get(f"/price/item{number}") for number in range(150)])
        answers.quote = await client.get("/quote/tea")
        answers.metrics = (await client.get("/metrics")).json()
        calls_before = calls()
        last = asyncio.create_task(client.get("/price/last"))
        await _until(lambda: calls() > calls_before)
        server.should_exit = True
        answers.last = await last
        await serving
    return answers


async def _until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.002)
