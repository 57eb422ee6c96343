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
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from opero.core.faults import Rest
from opero.core.forks import ForkSafeLock

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

# A server that is away or frozen costs no more than the two of them, once.
CONNECT_SECONDS = 0.9
ANSWER_SECONDS = 0.9
CONNECTIONS = 32


# Connections that are kept apart for what is only read, of those that the server has.
_READERS = 8


class Server:
    """One database of one server: connections, and a rest when it fails, that all who use it share.

    Args:
        make_client: Makes the client for threads, when it is first asked for something.
        make_async_client: Makes one for an event loop; None if there can be none.
        is_ours: Whether the client for threads is opero's own, to be closed at the end.
        is_async_ours: The same of those for event loops.
    """

    def __init__(
        self,
        make_client: Callable[[], Any],
        make_async_client: Callable[[], Any] | None = None,
        *,
        is_ours: bool = True,
        is_async_ours: bool = True,
    ) -> None:
        self._make_client = make_client
        self._make_async_client = make_async_client
        self._client: Any = None
        self._async_clients: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._is_ours = is_ours
        self._is_async_ours = is_async_ours
        self._process = os.getpid()
        self._readers: list[Any] = []
        self.rest = Rest()
        self.users: WeakSet[Any] = WeakSet()
        self._scripts: dict[str, Any] = {}

    @property
    def client(self) -> Any:
        """The client for threads."""
        client = self._client
        if client is None:
            self._client = client = self._make_client()
        return client

    def script(self, source: str) -> Callable[[list[str], list[Any]], Any]:
        """A Lua script, to be called with its keys and its arguments."""
        script: Any = self._scripts.get(source)
        if script is None:
            self._scripts[source] = script = self.client.register_script(source)
        found: Callable[[list[str], list[Any]], Any] = script
        return found

    @property
    def has_async_client(self) -> bool:
        """Whether it can be asked in an event loop."""
        return self._make_async_client is not None

    def perform(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers to commands; an error that the server answers with is one, unless it is the only one."""
        client = self.client
        if len(commands) == 1:
            return [client.execute_command(*commands[0])]
        if hasattr(client, "connection_pool"):
            pipeline = client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = pipeline.execute(raise_on_error=False)
            return answers
        # A cluster takes no scripts in a pipeline.
        return [self._answer_of(command) for command in commands]

    def _answer_of(self, command: tuple[Any, ...]) -> Any:
        try:
            return self.client.execute_command(*command)
        except Exception as error:  # noqa: BLE001 - of one node; the others may be well
            return error

    def get(self, key: bytes) -> bytes | None:
        """What is there under a key: what redis-py does around a command takes longer than the command."""
        client = self.client
        entry: bytes | None = None
        # What finds its server by itself has other pools.
        if not isinstance(getattr(client, "connection_pool", None), _pool_class()):
            found: bytes | None = client.get(key)
            return found
        try:
            connection = self._readers.pop()
            _command.begin()
        except IndexError:
            connection = client.connection_pool.get_connection()
        for is_last in (False, True):
            try:
                connection.send_command("GET", key)
                entry = connection.read_response()
                break
            except BaseException as error:
                connection.disconnect()
                # The server may have closed it meanwhile: it is connected anew.
                if is_last or not _was_closed(error):
                    client.connection_pool.release(connection)
                    raise
        if len(self._readers) < _READERS:
            self._readers.append(connection)
        else:
            client.connection_pool.release(connection)
        return entry

    async def get_async(self, key: bytes) -> bytes | None:
        """The same in the running event loop."""
        assert self._make_async_client is not None  # noqa: S101 - for the type checkers
        import asyncio

        loop = asyncio.get_running_loop()
        known = self._async_clients.get(loop)
        if known is None:
            client = self._make_async_client()
            # An event loop closes its generators when it ends, while it can still close connections.
            closing = self._closing_at_the_end(client)
            self._async_clients[loop] = known = client, asyncio.Semaphore(CONNECTIONS), [], closing
            await anext(closing)
        client, places, readers, _ = known
        entry: bytes | None
        # Not by a pool that lets tasks wait by itself, which takes a third of the time of a command.
        async with places, asyncio.timeout(CONNECT_SECONDS + ANSWER_SECONDS):
            if not self._is_async_ours:
                entry = await client.get(key)
                return entry
            connection = readers.pop() if readers else await client.connection_pool.get_connection()
            try:
                await connection.send_command("GET", key)
                entry = await connection.read_response()
            except BaseException as error:
                await connection.disconnect(nowait=True)
                await client.connection_pool.release(connection)
                if not _was_closed(error):
                    raise
                entry = await client.get(key)
            else:
                readers.append(connection)
            return entry

    async def _closing_at_the_end(self, client: Any) -> AsyncGenerator[None, None]:
        import asyncio

        try:
            yield
        finally:
            self._async_clients.pop(asyncio.get_running_loop(), None)
            if self._is_async_ours:
                await client.aclose(close_connection_pool=True)

    def failed(self, error: Exception) -> None:
        """Leave the server alone for a while if it was its fault, or its network's."""
        import redis
        from redis.exceptions import ClusterError, RedisClusterException

        if isinstance(error, (redis.ConnectionError, redis.TimeoutError, RedisClusterException, ClusterError, OSError)):
            self.rest.begin(error)

    def leave(self, user: Any) -> None:
        """Close the connections when nobody uses them any more."""
        self.users.discard(user)
        if not self.users:
            self.close()

    def close(self) -> None:
        """Close the connections; they are made anew when needed."""
        if not self._is_ours or self._client is None or os.getpid() != self._process:
            # redis-py would wait for a lock that a thread of the parent may have held.
            return
        self._client.close()
        if hasattr(self._client, "connection_pool"):
            self._client.connection_pool.disconnect()

    def __del__(self) -> None:
        # What redis-py leaves open warns when it is collected.
        with contextlib.suppress(Exception):
            self.close()


def _was_closed(error: BaseException) -> bool:
    """Whether the server had closed the connection meanwhile, and another one may be made."""
    import redis

    return isinstance(error, redis.ConnectionError) and not isinstance(error, redis.AuthenticationError)


_lock = ForkSafeLock(threading.RLock)
_servers: WeakValueDictionary[str, Server] = WeakValueDictionary()


def server_of(**place: Any) -> Server:
    """The server at a host, port, db and password, as far as this process is concerned."""
    return _known(
        repr(sorted(place.items())),
        lambda: Server(
            lambda: _client(_pool_class()(**place, **_settings())),
            lambda: _async_client(_async_pool_class()(**place, **_async_settings())),
        ),
    )


def server_at(url: str) -> Server:
    """The server that a URL names, as far as this process is concerned."""
    return _known(
        url,
        lambda: Server(
            lambda: _client(_pool_class().from_url(url, **_settings())),
            lambda: _async_client(_async_pool_class().from_url(url, **_async_settings())),
        ),
    )


def server_with(client: Any) -> Server:
    """The server that a client of the program's own is connected to."""

    def make() -> Server:
        make_own = _maker_of_own(client)
        make_async = (lambda: client) if is_async_client(client) else None
        return Server(make_own or (lambda: client), make_async, is_ours=make_own is not None, is_async_ours=False)

    return _known(f"client {id(client)}", make)


def is_async_client(client: Any) -> bool:
    """Whether it is one of `redis.asyncio`."""
    return type(client).__module__.startswith("redis.asyncio") or any(
        base.__module__.startswith("redis.asyncio") for base in type(client).__mro__
    )


def check_client(option: str, client: Any) -> Any:
    """Refuse what is no client of redis-py, or gives text in place of bytes."""
    if not hasattr(type(client), "execute_command"):
        msg = f"{option} is {type(client).__name__}; give a client of redis-py (redis.Redis, redis.asyncio.Redis)"
        raise TypeError(msg)
    if is_async_client(client) and _maker_of_own(client) is None:
        what = f"a {type(client).__name__} of redis.asyncio"
        msg = f"{option} is {what}, and opero cannot tell how it is connected; give one for threads"
        raise TypeError(msg)
    # A cluster has no pool.
    encoder = getattr(client, "encoder", None) or getattr(client, "connection_pool", client)
    given = getattr(encoder, "connection_kwargs", {})
    if getattr(encoder, "decode_responses", given.get("decode_responses")):
        msg = f"{option} gives text in place of bytes; make it without decode_responses=True"
        raise ValueError(msg)
    return client


def check_url(option: str, value: Any) -> str:
    """Check a URL without showing it: it may hold a password."""
    example = "write one such as 'redis://localhost:6379/0', 'rediss://user:password@host/0' or 'unix:///path'"
    if not isinstance(value, str):
        msg = f"{option} is {type(value).__name__}; {example}"
        raise TypeError(msg)
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(value)
        has_server = parts.scheme in {"redis", "rediss"} and parts.hostname is not None and parts.port != 0
        # A password that is not encoded can end up in what stands behind the server.
        is_good = parts.scheme == "unix" or (has_server and "@" not in f"{parts.path}{parts.query}{parts.fragment}")
    except ValueError:
        is_good = False
    if not is_good:
        encoded = "and '/', '?', '#' and '@' in a password as %2F, %3F, %23, %40"
        msg = f"{option} is no URL of a redis server; {example}, {encoded}"
        raise ValueError(msg)
    return value


def _maker_of_own(client: Any) -> Callable[[], Any] | None:
    """Makes a client for threads that is connected as one of the program's own is; None if nothing tells how.

    The program's may wait for a frozen server for ever, and asyncio's belongs to its event loop.
    """
    import redis.asyncio.sentinel
    from redis import connection, sentinel
    from redis.cluster import ClusterNode

    bounds = {name: value for name, value in _settings().items() if name not in {"max_connections", "timeout"}}
    if isinstance(client, (redis.RedisCluster, redis.asyncio.RedisCluster)):
        # A cluster is asked again at another node, twice at each.
        bounds |= {"socket_timeout": ANSWER_SECONDS / 2, "socket_connect_timeout": CONNECT_SECONDS / 2}
        nodes = [ClusterNode(node.host, node.port) for node in client.startup_nodes]  # type: ignore[no-untyped-call]  # redis-py's
        held: Any = client if hasattr(client, "connection_kwargs") else client.nodes_manager
        given = _connected_as(held.connection_kwargs)
        return lambda: redis.RedisCluster(startup_nodes=nodes, **given, **bounds)
    pool: Any = getattr(client, "connection_pool", None)
    if isinstance(pool, (sentinel.SentinelConnectionPool, redis.asyncio.sentinel.SentinelConnectionPool)):
        told = [watcher.connection_pool.connection_kwargs for watcher in pool.sentinel_manager.sentinels]
        given = {**_connected_as(pool.connection_kwargs, pool.connection_class), **bounds}
        of_sentinels = {**_connected_as(told[0]), **bounds}
        places = [(one["host"], one["port"]) for one in told]
        twin: Any = sentinel.Sentinel(places, sentinel_kwargs=of_sentinels, **given)  # type: ignore[no-untyped-call]  # as above
        return functools.partial(twin.master_for if pool.is_master else twin.slave_for, pool.service_name)
    kind: type = getattr(pool, "connection_class", object)
    if kind.__module__ not in {"redis.connection", "redis.asyncio.connection"}:
        return None
    given = {name: value for name, value in pool.connection_kwargs.items() if name in {"host", "port", "path"}}
    given |= {"connection_class": getattr(connection, kind.__name__), **_connected_as(pool.connection_kwargs)}
    return lambda: _client(_pool_class()(**given, **_settings()))


def _connected_as(given: Mapping[str, Any], kind: type | None = None) -> dict[str, Any]:
    """How to sign in, to which database, and how the connection is secured."""
    names = {"db", "username", "password", "credential_provider"}
    told = {name: value for name, value in given.items() if name in names or name.startswith("ssl")}
    kind = kind or given.get("connection_class")
    return {**told, "ssl": True} if kind is not None and "SSL" in kind.__name__ else told


def _known(place: str, make: Callable[[], Server]) -> Server:
    # A forked child has connections of its own.
    name = f"{os.getpid()} {place}"
    with _lock.lock:
        server = _servers.get(name)
        if server is None:
            _servers[name] = server = make()
        return server


@functools.cache
def _pool_class() -> Any:
    import redis

    class Pool(redis.BlockingConnectionPool):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]  # redis-py's
            self.connection_class = _bounded(self.connection_class)

        def get_connection(self, *args: Any, **kwargs: Any) -> Any:
            _command.begin()
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

    def begin(self) -> None:
        self.ends = time.monotonic() + CONNECT_SECONDS + ANSWER_SECONDS


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
        self.recv = _in_time(socket, socket.recv)
        self.recv_into = _in_time(socket, socket.recv_into)
        self.sendall = _in_time(socket, socket.sendall)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def _in_time(socket: Any, act: Callable[..., Any]) -> Callable[..., Any]:
    get_timeout, now = socket.gettimeout, time.monotonic

    def act_in_time(*args: Any) -> Any:
        timeout, left = get_timeout(), _command.ends - now()
        if timeout is not None and (timeout <= left or timeout == 0):
            return act(*args)
        if left <= 0:
            raise TimeoutError
        socket.settimeout(left)
        try:
            return act(*args)
        finally:
            socket.settimeout(timeout)

    return act_in_time


def _client(pool: Any) -> Any:
    """A client that has not connected yet."""
    import redis

    return redis.Redis(connection_pool=pool)


def _async_pool_class() -> Any:
    import redis.asyncio

    return redis.asyncio.ConnectionPool


def _async_client(pool: Any) -> Any:
    import redis.asyncio

    return redis.asyncio.Redis(connection_pool=pool)


def _async_settings() -> dict[str, Any]:
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import ConnectionError as NoConnectionError

    retry = Retry(NoBackoff(), 1, supported_errors=(NoConnectionError,))
    # What is read is bounded as a whole.
    given = {name: value for name, value in _settings().items() if name not in {"max_connections", "timeout"}}
    return {**given, "retry": retry, "socket_timeout": None}


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
