"""Where a running map finds what its pool and others have to tell it, and how it waits for that."""

from __future__ import annotations

import multiprocessing.connection
import os
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from opero.core.clock import clock, wait_really_async

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

# Whoever has to wait longer is woken and waits again.
_LONGEST = 86_400.0


def _occupy_standard_descriptors() -> None:
    """Open the null device in place of closed standard streams, as daemons have, so that no pipe of a map takes one.

    What the function writes to its standard output would be read as a message otherwise.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest number that is free.
            os.open(os.devnull, os.O_RDWR)


class BlockingInbox:
    """Events for a thread that blocks until there are some, and reads the pipes of its workers meanwhile."""

    def __init__(self) -> None:
        self._events: deque[Any] = deque()
        _occupy_standard_descriptors()
        # A pipe to this thread itself, for those who put an event there while it waits.
        self._own, self._door = multiprocessing.connection.Pipe(duplex=False)
        self._heard: dict[Connection, Callable[[], object]] = {self._own: self._own.recv_bytes}
        self._waits = False

    def put(self, event: Any) -> None:
        """Leave an event there, from any thread, and from a signal handler."""
        self._events.append(event)
        # Whoever puts it there may go on later than the map, and shall not keep the results alive meanwhile.
        del event
        if self._waits:
            self._waits = False
            self._door.send_bytes(b"")

    def listen(self, pipe: Connection, heard: Callable[[], None]) -> None:
        """Call ``heard`` as long as there is something to read in ``pipe``, while the map waits."""
        self._heard[pipe] = heard

    def forget(self, pipe: Connection) -> None:
        """Listen to it no longer; it is still open."""
        self._heard.pop(pipe, None)

    def collect(self, seconds: float | None, *, is_real: bool = False) -> list[Any]:
        """Wait for events, at most so many seconds of opero's clock, or real ones."""
        if is_real:
            self._wait(seconds)
        else:
            clock.wait(self._wait, seconds)
        return self.drain()

    def drain(self) -> list[Any]:
        """The events that are there already."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def _wait(self, seconds: float | None) -> bool:
        """Tells whether there are events."""
        if self._events and len(self._heard) == 1:
            return True
        self._waits = True
        try:
            # The system counts in milliseconds, and not for ever.
            timeout = None if seconds is None else min(seconds, _LONGEST)
            ready: Any = multiprocessing.connection.wait(list(self._heard), 0 if self._events else timeout)
        finally:
            self._waits = False
        for pipe in ready:
            # One of them may be forgotten by another.
            heard = self._heard.get(pipe)
            if heard is not None:
                heard()
        return bool(self._events)

    def close(self) -> None:
        self._own.close()
        self._door.close()


class AsyncInbox:
    """Events for a coroutine, from its own thread or any other."""

    def __init__(self) -> None:
        import asyncio

        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._events: deque[Any] = deque()
        self._arrived = asyncio.Event()
        self._ears: _Ears | None = None

    def put(self, event: Any) -> None:
        """Leave an event there, from any thread."""
        self._events.append(event)
        if threading.get_ident() == self._thread:
            self._arrived.set()
        else:
            # A closed loop has no map to tell anything any more.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._arrived.set)

    def listen(self, pipe: Connection, heard: Callable[[], None]) -> None:
        if self._ears is None:
            try:
                self._loop.add_reader(pipe.fileno(), heard)
            except NotImplementedError:  # not every loop can, as Windows' default one
                self._ears = _Ears()
            else:
                return
        self._ears.listen(pipe, heard)

    def forget(self, pipe: Connection) -> None:
        if self._ears is not None:
            self._ears.forget(pipe)
        elif not self._loop.is_closed():
            self._loop.remove_reader(pipe.fileno())

    async def collect(self, seconds: float | None, *, is_real: bool = False) -> list[Any]:
        """Wait for events, at most so many seconds of opero's clock, or real ones."""
        if not self._events:
            wait = wait_really_async if is_real else clock.wait_async
            await wait(self._arrived, seconds, self._arrived.set)
        self._arrived.clear()
        return self.drain()

    def drain(self) -> list[Any]:
        """The events that are there already."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def close(self) -> None:
        if self._ears is not None:
            self._ears.close()


class _Ears(BlockingInbox):
    """Hears pipes in a thread, for an event loop that cannot; an event makes it look which ones, None ends it."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.Thread(target=self._hear, name="opero-pipes", daemon=True)
        self._thread.start()

    def listen(self, pipe: Connection, heard: Callable[[], None]) -> None:
        super().listen(pipe, heard)
        self.put(pipe)

    def forget(self, pipe: Connection) -> None:
        super().forget(pipe)
        self.put(pipe)

    def _hear(self) -> None:
        while None not in self.collect(None, is_real=True):
            pass

    def close(self) -> None:
        self.put(None)
        self._thread.join()
        super().close()


Inbox: TypeAlias = BlockingInbox | AsyncInbox
