"""Ctrl-C in the processes that a map starts, and waits that have to come to their end in spite of it."""

from __future__ import annotations

import contextlib
import importlib
import math
import signal
import sys
import threading
from typing import TYPE_CHECKING

from opero.concurrency.progress import is_terminal
from opero.core.interrupts import Hold

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# So often in vain, and somebody asks what the program waits for.
_MANY_LOOKS = 10


@contextlib.contextmanager
def held_back_in_children(start_method: str) -> Iterator[None]:
    """Let processes that are started in the block begin with Ctrl-C held back, until they ask for it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if start_method != "fork" or "multiprocessing.shared_memory" in sys.modules:
        # Whoever starts it lets Ctrl-C through again: not while a worker starts, or the server of the workers. One of a
        # forked worker would end with that, and delete the shared memory that the program has from it.
        importlib.import_module("multiprocessing.resource_tracker").ensure_running()
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
    if threading.current_thread() is threading.main_thread():
        # A process that was forked in the middle of something has a handler for that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    while signal.sigtimedwait({signal.SIGINT}, 0) is not None:
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def wait_unless_left(has_ended: Callable[[float], bool], is_left: Callable[[], bool]) -> bool:
    """Wait until something has ended, or nobody wants to wait for it any more; tells whether it has ended.

    ``has_ended`` waits for so many seconds. A terminal is told after a while what is waited for, and how not to.
    """
    looks = 0
    while not has_ended(0.05):
        if is_left():
            return False
        looks += 1
        if looks == _MANY_LOOKS and is_terminal(sys.stderr):
            sys.stderr.write("opero: waiting for running items to end; Ctrl-C, pressed now, leaves them\n")
    return True


async def in_own_thread(stop: Callable[[Callable[[], bool]], None]) -> None:
    """Run ``stop`` in a thread that ends with it; not interrupted by cancellation, which is passed on afterwards.

    ``stop`` is given what tells whether the task was cancelled again meanwhile, as by Ctrl-C pressed twice.
    """
    import asyncio
    from concurrent.futures import Future

    over: Future[None] = Future()
    is_left = False

    def run() -> None:
        try:
            stop(lambda: is_left)
            over.set_result(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the awaiting task
            over.set_exception(error)

    # Not of an executor: these take nothing any more once the main thread has ended, while others still run maps.
    ended = asyncio.wrap_future(over)
    thread = threading.Thread(target=run, name="opero-stop", daemon=True)
    with Hold():
        thread.start()
    interrupted: BaseException | None = None
    while not ended.done():
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError as error:
            interrupted = interrupted or error
            task, anyio = asyncio.current_task(), sys.modules.get("anyio")
            # A scope of anyio's cancels again and again until it is left, and means once.
            is_once = anyio is not None and anyio.current_effective_deadline() == -math.inf
            is_left = task is not None and task.cancelling() > 1 and not is_once
    thread.join()
    if interrupted is not None:
        raise interrupted
    ended.result()
