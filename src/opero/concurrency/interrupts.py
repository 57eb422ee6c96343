"""Ctrl-C, while something is half made."""

from __future__ import annotations

import contextlib
import importlib
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended."""
    before = signal.getsignal(signal.SIGINT)
    # Python runs handlers in the main thread only, whichever thread the system gives the signal to.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[tuple[int, Any]] = []
    try:
        signal.signal(signal.SIGINT, lambda *signal_and_frame: pressed.append(signal_and_frame))
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        for signal_and_frame in pressed:
            before(*signal_and_frame)


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
    """In a process that began with Ctrl-C held back: let it through for the time of the block, but none from before."""
    if not hasattr(signal, "sigtimedwait") or signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        yield
        return
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main else None
    if isinstance(handler, partial) and type(getattr(handler.func, "__self__", None)).__name__ == "Runner":
        # That of asyncio.run, of which this process was forked in the middle: it would cancel a task that runs there.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    while signal.sigtimedwait({signal.SIGINT}, 0) is not None:
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
