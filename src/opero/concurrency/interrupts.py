"""Ctrl-C, while something is half made."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def forget_earlier_interrupts(interrupt: KeyboardInterrupt) -> None:
    """Let one traceback be shown for Ctrl-C, however often it was pressed; asyncio passes it on as a cancellation."""
    earlier = interrupt.__context__
    while isinstance(earlier, KeyboardInterrupt) or _is_cancellation(earlier):
        earlier = earlier.__context__
    interrupt.__context__ = earlier


def _is_cancellation(error: BaseException | None) -> TypeGuard[BaseException]:
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and isinstance(error, asyncio.CancelledError)


class OwnHandler:
    """A handler of Ctrl-C that opero has set for a while; nothing for a process that was forked meanwhile."""


class _Hold(OwnHandler):
    """Keeps Ctrl-C for the handler that was there before."""

    def __init__(self, before: Callable[..., Any]) -> None:
        self.before = before
        self.pressed: list[tuple[Any, ...]] = []

    def __call__(self, *signal_and_frame: Any) -> None:
        self.pressed.append(signal_and_frame)

    def hand_on(self) -> None:
        pressed = self.pressed.copy()
        self.pressed.clear()
        for signal_and_frame in pressed:
            self.before(*signal_and_frame)


@contextlib.contextmanager
def held_back() -> Iterator[list[tuple[Any, ...]]]:
    """Let Ctrl-C wait until the block has ended; yields what waits, which may be thrown away."""
    before = signal.getsignal(signal.SIGINT)
    # Python runs handlers in the main thread only, whichever thread the system gives the signal to.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield []
        return
    hold = _Hold(before)
    try:
        signal.signal(signal.SIGINT, hold)
        yield hold.pressed
    finally:
        signal.signal(signal.SIGINT, before)
        hold.hand_on()


@contextlib.contextmanager
def let_through() -> Iterator[None]:
    """Where Ctrl-C is held back: hear it for the time of the block, which may be long, and what has waited before."""
    hold = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not isinstance(hold, _Hold):
        yield
        return
    try:
        signal.signal(signal.SIGINT, hold.before)
        hold.hand_on()
        # It may be held back there, too.
        with let_through():
            yield
    finally:
        signal.signal(signal.SIGINT, hold)


@contextlib.contextmanager
def held_back_in_children(start_method: str, library: str = "multiprocessing") -> Iterator[None]:
    """Let processes that are started in the block begin with Ctrl-C held back, until they ask for it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if start_method != "fork":
        # Whoever starts it lets Ctrl-C through again: not while a worker starts, or the server of the workers.
        importlib.import_module(f"{library}.resource_tracker").ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def hearing_interrupts() -> Iterator[None]:
    """In a process that began with Ctrl-C held back: hear one for the time of the block, but none from before."""
    if not hasattr(signal, "sigtimedwait") or signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        yield
        return
    before = _hear_once_in_place_of_pythons() if threading.current_thread() is threading.main_thread() else None
    while signal.sigtimedwait({signal.SIGINT}, 0) is not None:
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _hear_once_in_place_of_pythons() -> Any:
    """Set `_hear_once`, and return what was there before; None if it is a handler of the user's own."""
    handler = signal.getsignal(signal.SIGINT)
    # Of asyncio.run and of opero: those of a process that was forked in the middle of something.
    is_asyncios = isinstance(handler, partial) and type(getattr(handler.func, "__self__", None)).__name__ == "Runner"
    if is_asyncios or isinstance(handler, OwnHandler):
        handler = signal.default_int_handler
    if handler is not signal.default_int_handler:
        return None
    signal.signal(signal.SIGINT, _hear_once)
    return handler


def _hear_once(_signal: int, _frame: Any) -> None:
    """End what runs, and hold back the next Ctrl-C, which would interrupt the tidying up."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    asyncio = sys.modules.get("asyncio")
    try:
        loop = asyncio.get_running_loop() if asyncio is not None else None
    except RuntimeError:
        loop = None
    if asyncio is None or loop is None:
        raise KeyboardInterrupt
    for task in asyncio.all_tasks(loop):
        task.cancel()
    # It may be in the middle of a long wait.
    loop.call_soon_threadsafe(lambda: None)
