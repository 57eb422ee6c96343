"""Where a running map finds what its pool and others have to tell it, and how it waits for that."""

from __future__ import annotations

import multiprocessing.connection
import queue
import select
import selectors
import socket
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from opero.core.clock import clock, wait_really_async
from opero.core.interrupts import Hold

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

# `poll` counts in milliseconds; `select` is exact, but knows only so many open files.
_EXACT_BELOW = 0.01
_MOST_FOR_SELECT = 1024
# Whoever has to wait longer is woken and waits again.
_LONGEST = 86_400.0


class Inbox(Protocol):
    """Where a running map finds events."""

    def put(self, event: Any) -> None:
        """Leave an event there, from any thread."""
        ...

    def listen(self, pipe: Connection, heard: Callable[[], None]) -> None:
        """Call ``heard`` as long as there is something to read in ``pipe``, while the map waits."""
        ...

    def forget(self, pipe: Connection) -> None:
        """Listen to it no longer; it is still open."""
        ...


class BlockingInbox:
    """Events for a thread that blocks until there are some."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ears: _PolledPipes | _ListeningThread | None = None
        self._polled: _PolledPipes | None = None

    def put(self, event: Any) -> None:
        """From any thread, and from a signal handler."""
        self._events.put(event)
        if self._polled is not None:
            self._polled.wake()

    def listen(self, pipe: Connection, heard: Callable[[], None]) -> None:
        if self._ears is None:
            # Half made, they would not be closed.
            with Hold():
                if sys.platform == "win32":
                    self._ears = _ListeningThread()
                else:
                    self._ears = self._polled = _PolledPipes()
        self._ears.listen(pipe, heard)

    def forget(self, pipe: Connection) -> None:
        if self._ears is not None:
            self._ears.forget(pipe)

    def collect(self, seconds: float | None, *, is_real: bool = False) -> list[Any]:
        """Wait for events, at most so many seconds of opero's clock, or real ones."""
        events: list[Any] = []

        def get(timeout: float | None) -> bool:
            # The system counts in milliseconds, and not for ever.
            timeout = None if timeout is None else min(timeout, _LONGEST)
            if self._polled is None:
                with suppress(queue.Empty):
                    events.append(self._events.get(timeout=timeout))
            else:
                self._polled.hear(timeout, is_needed=self._events.empty)
            with suppress(queue.Empty):
                while True:
                    events.append(self._events.get_nowait())
            return bool(events)

        if is_real:
            get(seconds)
        else:
            clock.wait(get, seconds)
        return events

    def close(self) -> None:
        if self._ears is not None:
            self._ears.close()


class _PolledPipes:
    """Pipes that are waited for, and read, by the thread that the messages are for."""

    def __init__(self) -> None:
        self._selector = selectors.PollSelector()
        self._waits = False
        self._waker, self._awoken = socket.socketpair()
        for end in (self._waker, self._awoken):
            end.settimeout(0)
        self._selector.register(self._awoken, selectors.EVENT_READ, self._wake_up)

    def listen(self, pipe: Connection, heard: Callable[[], None]) -> None:
        self._selector.register(pipe, selectors.EVENT_READ, heard)

    def forget(self, pipe: Connection) -> None:
        with suppress(KeyError):
            self._selector.unregister(pipe)

    def hear(self, timeout: float | None, *, is_needed: Callable[[], bool]) -> None:
        """Wait until a pipe has something, and read it."""
        self._waits = True
        try:
            ready = self._wait(timeout if is_needed() else 0)
        finally:
            self._waits = False
        for act in ready:
            act()

    def wake(self) -> None:
        if self._waits:
            with suppress(OSError):  # it is full: who waits will wake up
                self._waker.send(b"\0")

    def close(self) -> None:
        self._selector.close()
        self._waker.close()
        self._awoken.close()

    def _wait(self, timeout: float | None) -> list[Callable[[], None]]:
        if timeout is not None and 0 < timeout < _EXACT_BELOW:
            pipes = {key.fd: key.data for key in self._selector.get_map().values()}
            if max(pipes) < _MOST_FOR_SELECT:
                return [pipes[fd] for fd in select.select(pipes, (), (), timeout)[0]]
        return [key.data for key, _ in self._selector.select(timeout)]

    def _wake_up(self) -> None:
        with suppress(BlockingIOError):
            self._awoken.recv(4096)


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
        """From any thread."""
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
        return [self._events.popleft() for _ in range(len(self._events))]

    def close(self) -> None:
        if self._ears is not None:
            self._ears.close()


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
