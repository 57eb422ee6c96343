"""Waiting for something that blocks and has to come to its end, whatever interrupts the wait."""

from __future__ import annotations

import math
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from opero.core.interrupts import Hold

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
    with Hold():
        try:
            thread.start()
        except RuntimeError:  # the interpreter is about to end, and starts no more threads
            run()
        else:
            thread.join()
    for error in errors:
        raise error


def not_waited_for(block: Callable[[], None]) -> None:
    """Run ``block`` in a thread of its own, because it waits for this one."""
    thread = threading.Thread(target=block, name="opero-stop", daemon=True)
    with Hold(), suppress(RuntimeError):  # the interpreter is about to end, and starts no more threads
        thread.start()


async def in_own_thread(block: Callable[[], None], *, may_be_left: Callable[[], bool] | None = None) -> None:
    """Run ``block`` in a thread that ends with it; not interrupted by cancellation, which is passed on afterwards.

    ``may_be_left``: asked when it is cancelled twice, as by Ctrl-C twice; true leaves the thread to itself.
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
    interrupted: BaseException | None = None
    try:
        with Hold():
            thread.start()
    except KeyboardInterrupt as again:
        if may_be_left is not None and may_be_left():
            raise
        interrupted = again
    while not ended.done():
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError as error:
            interrupted = interrupted or error
            if may_be_left is not None and _is_cancelled_twice() and may_be_left():
                raise
    thread.join()
    if interrupted is not None:
        raise interrupted
    ended.result()


def _is_cancelled_twice() -> bool:
    import asyncio

    task = asyncio.current_task()
    if task is None or task.cancelling() <= 1:
        return False
    # A scope of anyio's cancels again and again until it is left, and means once.
    anyio = sys.modules.get("anyio")
    return anyio is None or anyio.current_effective_deadline() != -math.inf


def _settle(ended: asyncio.Future[None], error: BaseException | None) -> None:
    if error is None:
        ended.set_result(None)
    else:
        ended.set_exception(error)
