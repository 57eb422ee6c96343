"""Waiting, in an event loop, for something that blocks."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


async def in_own_thread(block: Callable[[], None]) -> None:
    """Run ``block`` in a thread that ends with it; not interrupted by cancellation, which is passed on afterwards."""
    import asyncio

    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def run() -> None:
        error: BaseException | None = None
        try:
            block()
        except BaseException as raised:  # noqa: BLE001 - raised again in the awaiting task
            error = raised
        loop.call_soon_threadsafe(_settle, ended, error)

    thread = threading.Thread(target=run, name="opero-stop", daemon=True)
    thread.start()
    cancelled: asyncio.CancelledError | None = None
    while not ended.done():
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError as error:
            cancelled = error
    thread.join()
    if cancelled is not None:
        raise cancelled
    ended.result()


def _settle(ended: asyncio.Future[None], error: BaseException | None) -> None:
    if error is None:
        ended.set_result(None)
    else:
        ended.set_exception(error)
