"""Ctrl-C, while something is half made."""

from __future__ import annotations

import importlib
import signal
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

# Those of `signal` make an enum of all that goes in and out, which takes ten times as long as the rest.
_signal = importlib.import_module("_signal")


class Hold:
    """Lets Ctrl-C wait until the block has ended.

    No generator: what Ctrl-C may hit before it is held back shall be as little as possible.
    """

    def __init__(self) -> None:
        # In whose place it hears Ctrl-C, and what it has heard.
        self._before: Callable[..., Any] | None = None
        self.pressed: list[tuple[Any, ...]] = []

    def __call__(self, *signal_and_frame: Any) -> None:
        self.pressed.append(signal_and_frame)

    def __enter__(self) -> Self:
        before = _signal.getsignal(signal.SIGINT)
        # Python runs handlers in the main thread only, whichever thread the system gives the signal to.
        if threading.current_thread() is threading.main_thread() and callable(before):
            self._before = before
            _signal.signal(signal.SIGINT, self)
        return self

    def __exit__(self, _kind: object, error: object, _traceback: object) -> None:
        if self._before is None:
            return
        _signal.signal(signal.SIGINT, self._before)
        if not isinstance(error, KeyboardInterrupt):
            # Who was there before hears what has waited.
            for signal_and_frame in self.pressed:
                self._before(*signal_and_frame)
