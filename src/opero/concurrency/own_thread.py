"""Waiting for something that blocks and has to come to its end, whatever interrupts the wait."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


def uninterrupted(block: Callable[[], None]) -> None:
    """Run ``block`` in a thread that ends with it; Ctrl-C meanwhile is raised afterwards."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            block()
        except BaseException as raised:  # noqa: BLE001 - raised again in the waiting thread
            errors.append(raised)

    thread = threading.Thread(target=run, name="opero-stop", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is about to end, and starts no more threads
        run()
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt as interrupt:
            errors.insert(0, interrupt)
    for error in errors:
        raise error


async def in_own_thread(block: Callable[[], None], *, may_be_left: bool = False) -> None:
    """Run ``block`` in a thread that ends with it; not interrupted by cancellation, which is passed on afterwards.

    ``may_be_left``: who is cancelled twice, as by Ctrl-C twice, leaves the thread to itself.
    """
    import asyncio

    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def run() -> None:
        error: BaseException | None = None
        try:
            block()
        except BaseException as raised:  # noqa: BLE001 - raised again in the awaiting task
            error = raised
        # The loop of a map that was left may be closed by now.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_settle, ended, error)

    thread = threading.Thread(target=run, name="opero-stop", daemon=True)
    thread.start()
    cancelled: asyncio.CancelledError | None = None
    while not ended.done():
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError as error:
            cancelled = error
            task = asyncio.current_task()
            if may_be_left and task is not None and task.cancelling() > 1:
                raise
    thread.join()
    if cancelled is not None:
        raise cancelled
    ended.result()


def _settle(ended: asyncio.Future[None], error: BaseException | None) -> None:
    if error is None:
        ended.set_result(None)
    else:
        ended.set_exception(error)
