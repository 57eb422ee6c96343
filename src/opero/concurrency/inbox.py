"""Where a running map finds what its pool and others have to tell it, and how it waits for that."""

from __future__ import annotations

import multiprocessing.connection
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
# Between two looks at pipes that an event loop cannot hear.
_POLLING_SECONDS = 0.005


class _Events:
    _events: deque[Any]

    def drain(self) -> list[Any]:
        """The events that are there already."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events


class BlockingInbox(_Events):
    """Events for a thread that blocks until there are some, and reads the pipes of its workers meanwhile."""

    def __init__(self) -> None:
        self._events = deque()
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
            # The pool of a thread that maps while the program ends may have ended.
            if pipe in self._heard:
                self._heard[pipe]()
        return bool(self._events)

    def close(self) -> None:
        self._own.close()
        self._door.close()


class AsyncInbox(_Events):
    """Events for a coroutine, from its own thread or any other."""

    def __init__(self) -> None:
        import asyncio

        self._events = deque()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._arrived = asyncio.Event()
        self._polled: dict[Connection, Callable[[], None]] = {}

    def put(self, event: Any) -> None:
        self._events.append(event)
        if threading.get_ident() == self._thread:
            self._arrived.set()
        else:
            # A closed loop has no map to tell anything any more.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._arrived.set)

    def listen(self, pipe: Connection, heard: Callable[[], None]) -> None:
        try:
            self._loop.add_reader(pipe.fileno(), heard)
        except NotImplementedError:  # Windows' default loop cannot
            self._polled[pipe] = heard
            if len(self._polled) == 1:
                self._poll()

    def _poll(self) -> None:
        for pipe in multiprocessing.connection.wait(list(self._polled), 0):
            self._polled[pipe]()  # type: ignore[index]  # it is one of these
        if self._polled:
            self._loop.call_later(_POLLING_SECONDS, self._poll)

    def forget(self, pipe: Connection) -> None:
        if self._polled.pop(pipe, None) is None and not self._loop.is_closed():
            self._loop.remove_reader(pipe.fileno())

    async def collect(self, seconds: float | None, *, is_real: bool = False) -> list[Any]:
        """Wait for events, at most so many seconds of opero's clock, or real ones."""
        if not self._events:
            wait = wait_really_async if is_real else clock.wait_async
            await wait(self._arrived, seconds)
        self._arrived.clear()
        return self.drain()


Inbox: TypeAlias = BlockingInbox | AsyncInbox
