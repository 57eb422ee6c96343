"""Ctrl-C, while something is half made."""

from __future__ import annotations

import contextlib
import signal
import threading
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
def held_back_in_children() -> Iterator[None]:
    """Let processes that are started in the block begin with Ctrl-C held back, until they ask for it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
