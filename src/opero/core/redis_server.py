"""Connections to redis servers, shared by all that use one server in this process."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from types import NoneType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, WeakValueDictionary

from opero.core.faults import Rest
from opero.core.forks import ForkSafeLock

if TYPE_CHECKING:
    from collections.abc import Callable

# A server that is away or frozen costs no more than the two of them, once.
CONNECT_SECONDS = 0.9
ANSWER_SECONDS = 0.9
CONNECTIONS = 32


class Server:
    """One database of one server: connections, and a rest when it fails, that all who use it share."""

    def __init__(self, make_client: Callable[[], Any]) -> None:
        self.client = make_client()
        self._process = os.getpid()
        self.rest = Rest()
        self.users: WeakSet[Any] = WeakSet()
        self._scripts: dict[str, Any] = {}

    def script(self, source: str) -> Callable[[list[str], list[Any]], Any]:
        """A Lua script, to be called with its keys and its arguments."""
        script: Any = self._scripts.get(source)
        if script is None:
            self._scripts[source] = script = self.client.register_script(source)
        found: Callable[[list[str], list[Any]], Any] = script
        return found

    def failed(self, error: Exception) -> None:
        """Leave the server alone for a while if it was its fault, or its network's."""
        import redis

        if isinstance(error, (redis.ConnectionError, redis.TimeoutError, OSError)):
            self.rest.begin(error)

    def leave(self, user: Any) -> None:
        """Close the connections when nobody uses them any more."""
        self.users.discard(user)
        if not self.users:
            self.close()

    def close(self) -> None:
        """Close the connections; they are made anew when needed."""
        if os.getpid() != self._process:
            # redis-py would wait for a lock that a thread of the parent may have held.
            return
        self.client.close()
        self.client.connection_pool.disconnect()

    def __del__(self) -> None:
        # What redis-py leaves open warns when it is collected.
        with contextlib.suppress(Exception):
            self.close()


_lock = ForkSafeLock()
_servers: WeakValueDictionary[str, Server] = WeakValueDictionary()


def server_of(**place: Any) -> Server:
    """The server at a host, port, db and password, as far as this process is concerned."""

    def make_client() -> Any:
        return _client(_pool_class()(**place, **_settings()))

    return _known(repr(sorted(place.items())), make_client)


def server_at(url: str) -> Server:
    """The server that a URL names, as far as this process is concerned."""
    return _known(url, lambda: _client(_pool_class().from_url(url, **_settings())))


def _known(place: str, make_client: Callable[[], Any]) -> Server:
    # A forked child has connections of its own.
    name = f"{os.getpid()} {place}"
    with _lock.lock:
        server = _servers.get(name)
        if server is None:
            _servers[name] = server = Server(make_client)
        return server


@functools.cache
def _pool_class() -> Any:
    import redis

    class Pool(redis.BlockingConnectionPool):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]  # redis-py's
            self.connection_class = _bounded(self.connection_class)

        def get_connection(self, *args: Any, **kwargs: Any) -> Any:
            _command.ends = time.monotonic() + CONNECT_SECONDS + ANSWER_SECONDS
            return super().get_connection(*args, **kwargs)  # type: ignore[no-untyped-call]  # as above

        def release(self, connection: Any) -> None:
            if not isinstance(sys.exc_info()[1], (Exception, NoneType)):
                # Ctrl-C came in the middle of a command, whose answer the next one would read.
                connection.disconnect()
            super().release(connection)  # type: ignore[no-untyped-call]  # as above

    return Pool


class _Command(threading.local):
    """When the command ends at the latest that this thread waits for."""

    ends: float = 0.0


_command = _Command()


@functools.cache
def _bounded(connection: type[Any]) -> type[Any]:
    """A class of connections on which no command takes longer in all than it may: redis-py bounds each read."""

    class Bounded(connection):  # type: ignore[misc]  # any of redis-py's
        def _connect(self) -> Any:
            return _BoundedSocket(super()._connect())

    return Bounded


class _BoundedSocket:
    """A socket whose reads and writes end when the command does that they are part of."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self.recv = functools.partial(self._in_time, socket.recv)
        self.recv_into = functools.partial(self._in_time, socket.recv_into)
        self.sendall = functools.partial(self._in_time, socket.sendall)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def _in_time(self, act: Callable[..., Any], *args: Any) -> Any:
        timeout, left = self._socket.gettimeout(), _command.ends - time.monotonic()
        if timeout is not None and timeout <= max(0.0, left):
            return act(*args)
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        try:
            return act(*args)
        finally:
            self._socket.settimeout(timeout)


def _client(pool: Any) -> Any:
    """A client that has not connected yet."""
    import redis

    return redis.Redis(connection_pool=pool)


def _settings() -> dict[str, Any]:
    return {
        "max_connections": CONNECTIONS,
        "timeout": ANSWER_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        "socket_timeout": ANSWER_SECONDS,
        "retry": _retry(),
        "decode_responses": False,
    }


@functools.cache
def _retry() -> Any:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    # A connection that the server has closed meanwhile is made anew, once; redis-py's default retries take seconds.
    return Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
