"""This process's end of the pipe to a worker: it never blocks in the middle of a message."""

from __future__ import annotations

import os
import struct
import sys
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# The other end is a `multiprocessing.connection.Connection`. Its messages, unchanged since Python 3.3, have their
# length before them: four bytes, or -1 and eight bytes.
_LENGTH = struct.Struct("!i")
_LONG_LENGTH = struct.Struct("!iQ")
_LONGEST = 0x7FFFFFFF
_READ_SIZE = 65_536


class PipeEnd(Protocol):
    """Sends and receives messages; the end of a message is the end of what a worker said."""

    connection: Connection

    def send(self, message: bytes) -> bool:
        """Send a message after those that have not been sent yet; see `send_on`."""
        ...

    def send_on(self) -> bool:
        """Send what the pipe takes now; tells whether nothing is left to send.

        Raises:
            OSError: If nobody is at the other end any more.
        """
        ...

    def receive(self) -> list[Any]:
        """The messages that have arrived, as bytes or something like it.

        Raises:
            EOFError: If there will not be any more.
        """
        ...

    def is_arriving(self) -> bool:
        """Whether there is part of a message, and more of it than when this was asked last."""
        ...


def pipe_end(connection: Any) -> PipeEnd:
    """This process's end, for one end of a `multiprocessing.Pipe`."""
    return BlockingEnd(connection) if sys.platform == "win32" else NonBlockingEnd(connection)


class NonBlockingEnd:
    """An end that can be read and written in parts."""

    __slots__ = ("_fd", "_filled", "_rest", "_seen", "_unfinished", "_unsent", "connection")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._fd = connection.fileno()
        os.set_blocking(self._fd, False)
        self._rest = b""
        self._unfinished: bytearray | None = None
        self._filled = 0
        self._seen = 0
        self._unsent: deque[memoryview] = deque()

    def send(self, message: bytes) -> bool:
        size = len(message)
        length = _LENGTH.pack(size) if size <= _LONGEST else _LONG_LENGTH.pack(-1, size)
        self._unsent.append(memoryview(length + message))
        return len(self._unsent) == 1 and self.send_on()

    def send_on(self) -> bool:
        try:
            while self._unsent:
                left = self._unsent[0]
                left = left[os.write(self._fd, left) :]
                if left:
                    self._unsent[0] = left
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            return False
        return True

    def receive(self) -> list[Any]:
        try:
            if self._unfinished is None:
                return self._split(self._read())
            return self._fill(self._unfinished)
        except BlockingIOError:
            return []
        except ConnectionError as error:
            raise EOFError from error

    def is_arriving(self) -> bool:
        if self._unfinished is None:
            return False
        seen, self._seen = self._seen, self._filled
        return self._filled > seen

    def _read(self) -> bytes:
        data = os.read(self._fd, _READ_SIZE)
        if not data:
            raise EOFError
        return self._rest + data if self._rest else data

    def _split(self, data: bytes) -> list[Any]:
        messages: list[Any] = []
        at, size = 0, len(data)
        while True:
            start = at + _LENGTH.size
            if start > size:
                break
            (length,) = _LENGTH.unpack_from(data, at)
            if length < 0:
                start = at + _LONG_LENGTH.size
                if start > size:
                    break
                length = _LONG_LENGTH.unpack_from(data, at)[1]
            at = start + length
            if at > size:
                self._rest = b""
                self._unfinished = bytearray(length)
                self._filled = size - start
                self._unfinished[: self._filled] = data[start:]
                self._seen = 0
                return messages
            messages.append(data[start:at])
        self._rest = data[at:]
        return messages

    def _fill(self, message: bytearray) -> list[Any]:
        view = memoryview(message)
        while self._filled < len(message):
            count = os.readv(self._fd, [view[self._filled :]])
            if not count:
                raise EOFError
            self._filled += count
        self._unfinished = None
        return [view]


class BlockingEnd:
    """An end for systems whose pipes cannot be read and written in parts."""

    __slots__ = ("connection",)

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def send(self, message: bytes) -> bool:
        self.connection.send_bytes(message)
        return True

    def send_on(self) -> bool:
        return True

    def receive(self) -> list[Any]:
        try:
            return [self.connection.recv_bytes()] if self.connection.poll() else []
        except OSError as error:
            raise EOFError from error

    def is_arriving(self) -> bool:
        return False
