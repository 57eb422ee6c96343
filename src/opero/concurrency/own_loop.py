"""A coroutine that is run to its end in a loop of its own, and Ctrl-C meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from opero.concurrency.interrupts import HeardOnce
from opero.core.interrupts import OwnHandler, forget_earlier_interrupts

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

# A loop that has not turned for so many seconds is blocked by what runs in it.
_BLOCKED_SECONDS = 0.1

T = TypeVar("T")


def run_in_own_loop(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """As `asyncio.run`, but Ctrl-C cancels, however often it is pressed, as long as the loop turns.

    asyncio raises the second one wherever the loop is. Between two steps of a task one of them gets lost by that, and
    whoever waits for the task waits for ever.

    Args:
        call: Gives the coroutine; one that was there before could be left without anybody's having awaited it.
    """
    before = signal.getsignal(signal.SIGINT)
    # In the input of a map that blocks, that one has a handler in place of Python's.
    would_be_asyncios = before is signal.default_int_handler or isinstance(before, HeardOnce)
    if not would_be_asyncios or threading.current_thread() is not threading.main_thread():
        return asyncio.run(call())
    presses = _Presses()
    try:
        try:
            signal.signal(signal.SIGINT, presses)
            runner = asyncio.Runner()
            presses.loop = runner.get_loop()
            try:
                ended = runner.run(presses.cancel_when_pressed(call))
            finally:
                presses.is_closing = True
                runner.close()
        finally:
            presses.is_over = True
            signal.signal(signal.SIGINT, before)
    except KeyboardInterrupt as raised:
        interrupt = raised
    except BaseException as error:
        if presses.count == 0:
            raise
        interrupt = KeyboardInterrupt()
        interrupt.__context__ = error
    else:
        if isinstance(ended, KeyboardInterrupt):
            interrupt = ended
        elif presses.count == 0:
            return ended
        else:
            interrupt = KeyboardInterrupt()
    forget_earlier_interrupts(interrupt)
    # Here, where no other error is on its way that would become its context.
    raise interrupt


class _Presses(OwnHandler):
    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._unanswered_since: float | None = None
        self._heard_in_closing = False
        self.count = 0
        self.is_closing = False
        self.is_over = False

    async def cancel_when_pressed(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T | KeyboardInterrupt:
        self._task = asyncio.current_task()
        if self.count and self._task is not None:
            self._task.cancel()
        try:
            return await call()
        except KeyboardInterrupt as interrupt:
            # asyncio would complain of it, too, as an exception that nobody has seen.
            return interrupt

    def __call__(self, _signal: int, _frame: Any) -> None:
        self.count += 1
        if self.loop is None or self.is_over:
            return
        now = time.monotonic()
        if self._unanswered_since is None:
            self._unanswered_since = now
        # A loop that closes waits for the threads of the function's own.
        is_waiting = self.is_closing and self._heard_in_closing
        self._heard_in_closing = self.is_closing
        if is_waiting or now - self._unanswered_since > _BLOCKED_SECONDS:
            raise KeyboardInterrupt
        if self._task is not None:
            self._task.cancel()
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._unanswered_since = None
