"""Ctrl-C, while something is half made, and the ones that came before another."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, Self

from opero.utils.notes import add_note

if TYPE_CHECKING:
    from collections.abc import Callable

# Those of `signal` make an enum of all that goes in and out, which takes ten times as long as the rest.
_signal = importlib.import_module("_signal")

# By which a map that waits, pulls its input or is closed is told so: nothing has gone wrong when Ctrl-C comes then.
# Named, because `import opero` imports neither of the modules.
_PASSING = (KeyboardInterrupt, GeneratorExit, StopIteration, BlockingIOError)
_PASSING_ELSEWHERE = (("queue", "Empty"), ("asyncio", "CancelledError"))


def forget_earlier_interrupts(interrupt: KeyboardInterrupt) -> None:
    """Let one traceback be shown for Ctrl-C, however often it was pressed; asyncio passes it on as a cancellation.

    It has the notes of those that are forgotten.
    """
    known = [(sys.modules[module], name) for module, name in _PASSING_ELSEWHERE if module in sys.modules]
    passing = (*_PASSING, *(getattr(module, name) for module, name in known))
    earlier = interrupt.__context__
    while earlier is not None and isinstance(earlier, passing):
        for note in getattr(earlier, "__notes__", ()):
            add_note(interrupt, note)
        earlier = earlier.__context__
    interrupt.__context__ = earlier


class Hold:
    """Lets Ctrl-C wait until the block has ended.

    No generator: what Ctrl-C may hit before it is held back shall be as little as possible.
    """

    def __init__(self) -> None:
        self.before: Callable[..., Any] = signal.default_int_handler
        self.pressed: list[tuple[Any, ...]] = []
        self._is_set = False

    def __call__(self, *signal_and_frame: Any) -> None:
        self.pressed.append(signal_and_frame)

    def __enter__(self) -> Self:
        before = _signal.getsignal(signal.SIGINT)
        # Python runs handlers in the main thread only, whichever thread the system gives the signal to.
        if threading.current_thread() is threading.main_thread() and callable(before):
            self.before = before
            self._is_set = True
            _signal.signal(signal.SIGINT, self)
        return self

    def __exit__(self, _kind: object, error: object, _traceback: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            forget_earlier_interrupts(error)
            self.pressed.clear()
        if self._is_set:
            self._is_set = False
            _signal.signal(signal.SIGINT, self.before)
        if self.pressed:
            try:
                self.hand_on()
            except KeyboardInterrupt as interrupt:
                forget_earlier_interrupts(interrupt)
                raise

    def hand_on(self) -> None:
        """Let who was there before hear what has waited."""
        pressed = self.pressed.copy()
        self.pressed.clear()
        for signal_and_frame in pressed:
            self.before(*signal_and_frame)
