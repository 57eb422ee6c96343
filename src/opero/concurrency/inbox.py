"""Where a running map finds what its pool and others have to tell it, and how it waits for that."""

from __future__ import annotations

import multiprocessing.connection
import queue
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from opero.core.clock import clock, wait_really_async
from opero.core.interrupts import Hold

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

# Whoever has to wait longer is woken and waits again.
_LONGEST = 86_400.0


class BlockingInbox:
    """Events for a thread that blocks until there are some, and reads the pipes of its workers meanwhile."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._heard: dict[Any, Callable[[], object]] = {}
        # A pipe to this thread itself, for those who put an event there while it waits for others.
        self._ends: tuple[Connection, ...] = ()
        self._waits = False

    def put(self, event: Any) -> None:
        """Leave an event there, from any thread, and from a signal handler."""
        self._events.put(event)
        if self._waits:
            self._waits = False
            self._ends[1].send_bytes(b"")

    def listen(self, pipe: Connection, heard: Callable[[], None]) -> None:
        """Call ``heard`` as long as there is something to read in ``pipe``, while the map waits."""
        if not self._ends:
            # Half made, they would not be closed.
            with Hold():
                self._ends = multiprocessing.connection.Pipe(duplex=False)
                self._heard[self._ends[0]] = self._ends[0].recv_bytes
        self._heard[pipe] = heard

    def forget(self, pipe: Connection) -> None:
        """Listen to it no longer; it is still open."""
        self._heard.pop(pipe, None)

    def collect(self, seconds: float | None, *, is_real: bool = False) -> list[Any]:
        """Wait for events, at most so many seconds of opero's clock, or real ones."""
        events: list[Any] = []

        def get(timeout: float | None) -> bool:
            # The system counts in milliseconds, and not for ever.
            timeout = None if timeout is None else min(timeout, _LONGEST)
            if self._heard:
                self._hear(timeout)
            else:
                with suppress(queue.Empty):
                    events.append(self._events.get(timeout=timeout))
            events.extend(self.drain())
            return bool(events)

        if is_real:
            get(seconds)
        else:
            clock.wait(get, seconds)
        return events

    def drain(self) -> list[Any]:
        """The events that are there already."""
        return [self._events.get_nowait() for _ in range(self._events.qsize())]

    def _hear(self, timeout: float | None) -> None:
        self._waits = True
        try:
            ready = multiprocessing.connection.wait(self._heard, timeout if self._events.empty() else 0)
        finally:
            self._waits = False
        for pipe in ready:
            # One of them may be forgotten by another.
            if pipe in self._heard:
                self._heard[pipe]()

    def close(self) -> None:
        for end in self._ends:
            end.close()


class AsyncInbox:
    """Events for a coroutine, from its own thread or any other."""

    def __init__(self) -> None:
        import asyncio

        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._events: deque[Any] = deque()
        self._arrived = asyncio.Event()
        self._ears: _ListeningThread | None = None

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
                self._ears = _ListeningThread()
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


Inbox: TypeAlias = BlockingInbox | AsyncInbox


class _ListeningThread:
    """Hears pipes in a thread, for those who cannot wait for pipes themselves."""

    def __init__(self) -> None:
        self._heard: dict[Any, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._own, self._door = multiprocessing.connection.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._listen, name="opero-pipes", daemon=True)
        self._thread.start()

    def listen(self, pipe: Connection, heard: Callable[[], None]) -> None:
        with self._lock:
            self._heard[pipe] = heard
        self._door.send_bytes(b"")

    def forget(self, pipe: Connection) -> None:
        with self._lock:
            self._heard.pop(pipe, None)
        if threading.current_thread() is not self._thread:
            self._door.send_bytes(b"")

    def close(self) -> None:
        self._door.close()
        self._thread.join()
        self._own.close()

    def _listen(self) -> None:
        while True:
            with self._lock:
                pipes = list(self._heard)
            for pipe in multiprocessing.connection.wait([self._own, *pipes]):
                if pipe is self._own:
                    try:
                        self._own.recv_bytes()
                    except EOFError:
                        return
                    continue
                with self._lock:
                    heard = self._heard.get(pipe)
                if heard is not None:
                    heard()
