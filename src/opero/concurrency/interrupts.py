"""Ctrl-C, while something is half made."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from opero.core.interrupts import Hold, OwnHandler

if TYPE_CHECKING:
    from collections.abc import Iterator

# Seconds that Ctrl-C may be held back while other code may be blocked.
_BRIEFLY = 1.0


class BriefHold(Hold):
    """Lets Ctrl-C wait while other code runs, whose locks it would leave taken; that may block, so not for long."""

    def __enter__(self) -> Self:
        self._until = time.monotonic() + _BRIEFLY
        return super().__enter__()

    def __call__(self, *signal_and_frame: Any) -> None:
        if time.monotonic() < self._until:
            super().__call__(*signal_and_frame)
        else:
            self.before(*signal_and_frame)


class HeardOnce(Hold):
    """Lets Ctrl-C raise once while a map is driven, and keeps what is pressed after that until all is tidied up.

    A hold that the tidying up sets for itself comes late: before that there is time for a second press.
    """

    def __init__(self) -> None:
        super().__init__()
        # Also while it is set and taken away: raised there, Ctrl-C would leave it in its place for ever.
        self._keeps = True

    def __call__(self, *signal_and_frame: Any) -> None:
        if self._keeps:
            super().__call__(*signal_and_frame)
            return
        self._keeps = True
        self.before(*signal_and_frame)
        # A handler of the program's own that only takes note.
        self.listen()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.keep()
        super().__exit__(kind, error, traceback)

    def listen(self) -> None:
        """Let Ctrl-C raise; after an earlier one, too, if somebody has caught it and the map goes on."""
        if self._keeps:
            self._keeps = False
            pressed = self.pressed.copy()
            self.pressed.clear()
            for signal_and_frame in pressed:
                self(*signal_and_frame)

    def keep(self) -> None:
        """Keep Ctrl-C until the end, as after one that has raised."""
        self._keeps = True

    def elsewhere(self) -> _Elsewhere:
        """While other code runs than the map's."""
        return _Elsewhere(self)


class _Elsewhere:
    """No generator: interrupted, it would be ended with the traceback, and set the handler when all is over."""

    def __init__(self, handler: HeardOnce) -> None:
        self._handler = handler

    def __enter__(self) -> None:
        self._handler.__exit__(None, None, None)

    def __exit__(self, *_raised: object) -> None:
        self._handler.__enter__()


class let_through:  # noqa: N801 - used as a function
    """Where Ctrl-C is held back: hear it for the time of the block, which may be long, and what has waited before.

    No generator: Ctrl-C would be lost in what the collector does with one.
    """

    def __init__(self) -> None:
        self._holds: list[Hold] = []

    def __enter__(self) -> None:
        try:
            self._hear()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_exc: object) -> None:
        if self._holds:
            signal.signal(signal.SIGINT, self._holds[0])

    def _hear(self) -> None:
        if threading.current_thread() is threading.main_thread():
            # It may be held back there, too.
            while isinstance(hold := signal.getsignal(signal.SIGINT), Hold):
                self._holds.append(hold)
                signal.signal(signal.SIGINT, hold.before)
                hold.hand_on()


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
