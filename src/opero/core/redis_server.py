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
from weakref import WeakKeyDictionary, WeakValueDictionary

from opero.core.faults import Rest
from opero.core.forks import ForkSafeLock

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

# A server that is away or frozen costs no more than the two of them, once.
CONNECT_SECONDS = 0.9
ANSWER_SECONDS = 0.9
# Of one event loop at once, and of threads between commands; in the middle of commands there are as many as threads.
_CONNECTIONS = 32


class Server:
    """One database of one server: connections, and a rest when it fails, that all who use it share.

    Args:
        make_client: Makes the client for threads, when it is first asked for something.
        make_async_client: Makes one for an event loop; None if there can be none.
        is_ours: Whether the client for threads is opero's own, to be closed at the end.
    """

    def __init__(
        self,
        make_client: Callable[[], Any],
        make_async_client: Callable[[], Any] | None = None,
        *,
        is_ours: bool = True,
    ) -> None:
        self._make_client = make_client
        self._make_async_client = make_async_client
        self._client: Any = None
        self._async_clients: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._is_ours = is_ours
        self._process = os.getpid()
        self._scripts: dict[str, Any] = {}
        self.rest = Rest()

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

    async def get_async(self, key: bytes) -> bytes | None:
        """What is there under a key, asked in the running event loop."""
        assert self._make_async_client is not None  # noqa: S101 - for the type checkers
        import asyncio

        loop = asyncio.get_running_loop()
        known = self._async_clients.get(loop)
        if known is None:
            client = self._make_async_client()
            # An event loop closes its generators when it ends, while it can still close connections.
            closing = self._closing_at_the_end(client)
            self._async_clients[loop] = known = client, asyncio.Semaphore(_CONNECTIONS), closing
            await anext(closing)
        client, places, _ = known
        # Not by a pool that lets tasks wait by itself, which takes a third of the time of a command.
        async with places, asyncio.timeout(CONNECT_SECONDS + ANSWER_SECONDS):
            entry: bytes | None = await client.get(key)
            return entry

    async def _closing_at_the_end(self, client: Any) -> AsyncGenerator[None, None]:
        import asyncio

        try:
            yield
        finally:
            self._async_clients.pop(asyncio.get_running_loop(), None)
            await client.aclose(close_connection_pool=True)

    def failed(self, error: Exception) -> None:
        """Leave the server alone for a while if it was its fault, or its network's."""
        import redis
        from redis.exceptions import ClusterError, RedisClusterException

        if isinstance(error, (redis.ConnectionError, redis.TimeoutError, RedisClusterException, ClusterError, OSError)):
            self.rest.begin(error)

    def __del__(self) -> None:
        # What redis-py leaves open warns when it is collected. In a forked child it would wait for a lock that a thread
        # of the parent may have held.
        with contextlib.suppress(Exception):
            if self._is_ours and self._client is not None and os.getpid() == self._process:
                self._client.close()
                self._client.connection_pool.disconnect()


# The servers that are in use


_lock = ForkSafeLock(threading.RLock)
_servers: WeakValueDictionary[str, Server] = WeakValueDictionary()


def server_at(url: str) -> Server:
    """The server that a URL names, as far as this process is concerned."""
    from redis.connection import parse_url

    return server_of(**parse_url(url))  # type: ignore[no-untyped-call]  # redis-py's


def server_of(**place: Any) -> Server:
    """The server at a place, which is told by the keywords of a connection of redis-py and by its class."""

    def make() -> Server:
        return Server(lambda: _client(**place), lambda: _async_client(**place))

    return _known(repr(sorted(place.items(), key=str)), make)


def server_with(client: Any) -> Server:
    """The server that a client of the program's own is connected to."""
    place = _place_of(client)
    if place is not None:
        return server_of(**place)
    make = _maker_of_own(client)
    name = f"client {id(client)}"
    return _known(name, lambda: Server(make) if make else Server(lambda: client, is_ours=False))


def _known(place: str, make: Callable[[], Server]) -> Server:
    # A forked child has connections of its own.
    name = f"{os.getpid()} {place}"
    with _lock.lock:
        server = _servers.get(name)
        if server is None:
            _servers[name] = server = make()
        return server


# Clients of a program's own: they may wait for a frozen server for ever, and those of asyncio belong to an event loop.
# They tell how to connect.


def _place_of(client: Any) -> dict[str, Any] | None:
    """Where a client's server is, and how to sign in; None if it finds servers by itself, or in a way of its own."""
    pool: Any = getattr(client, "connection_pool", None)
    kind: type = getattr(pool, "connection_class", object)
    if kind.__module__ not in {"redis.connection", "redis.asyncio.connection"}:
        return None
    where = {name: pool.connection_kwargs[name] for name in ("host", "port", "path") if name in pool.connection_kwargs}
    return {"connection_class": kind, **where, **_signed_in_as(pool.connection_kwargs)}


def _maker_of_own(client: Any) -> Callable[[], Any] | None:
    """Makes a client for threads for the same cluster or the same sentinels; None if it is for neither."""
    import redis.asyncio.sentinel
    from redis import sentinel
    from redis.cluster import ClusterNode

    if isinstance(client, (redis.RedisCluster, redis.asyncio.RedisCluster)):
        nodes = [ClusterNode(node.host, node.port) for node in client.startup_nodes]  # type: ignore[no-untyped-call]  # redis-py's
        held: Any = client if hasattr(client, "connection_kwargs") else client.nodes_manager
        # A cluster is asked again at another node, twice at each.
        given = {**_signed_in_as(held.connection_kwargs), **_settings(share=0.5)}
        return lambda: redis.RedisCluster(startup_nodes=nodes, **given)
    pool: Any = getattr(client, "connection_pool", None)
    if isinstance(pool, (sentinel.SentinelConnectionPool, redis.asyncio.sentinel.SentinelConnectionPool)):
        told = [watcher.connection_pool.connection_kwargs for watcher in pool.sentinel_manager.sentinels]
        given = {**_signed_in_as(pool.connection_kwargs, pool.connection_class), **_settings()}
        of_sentinels = {**_signed_in_as(told[0]), **_settings()}
        places = [(one["host"], one["port"]) for one in told]
        twin: Any = sentinel.Sentinel(places, sentinel_kwargs=of_sentinels, **given)  # type: ignore[no-untyped-call]  # as above
        return functools.partial(twin.master_for if pool.is_master else twin.slave_for, pool.service_name)
    return None


def _signed_in_as(given: Mapping[str, Any], kind: type | None = None) -> dict[str, Any]:
    """How to sign in, to which database, and how the connection is secured."""
    names = {"db", "username", "password", "credential_provider"}
    told = {name: value for name, value in given.items() if name in names or name.startswith("ssl")}
    kind = kind or given.get("connection_class")
    return {**told, "ssl": True} if kind is not None and "SSL" in kind.__name__ else told


# opero's own clients


def _client(*, connection_class: type | None = None, **place: Any) -> Any:
    """A client for threads that has not connected yet."""
    import redis.connection

    name = "Connection" if connection_class is None else connection_class.__name__
    kind = _bounded(getattr(redis.connection, name))
    # Not by `from_pool`: such a client closes its pool by itself, in a forked child, too.
    return redis.Redis(connection_pool=_pool_class()(connection_class=kind, **{**place, **_pool_settings()}))


def _async_client(*, connection_class: type | None = None, **place: Any) -> Any:
    """The same for an event loop."""
    import redis.asyncio.connection
    from redis.asyncio.retry import Retry

    name = "Connection" if connection_class is None else connection_class.__name__
    # What is read is bounded as a whole.
    settings = {**_pool_settings(), "retry": Retry(*_once()), "socket_timeout": None}
    kind = getattr(redis.asyncio.connection, name)
    return redis.asyncio.Redis(connection_pool=redis.asyncio.ConnectionPool(kind, **{**place, **settings}))


def _settings(share: float = 1.0) -> dict[str, Any]:
    from redis.retry import Retry

    return {
        "socket_connect_timeout": CONNECT_SECONDS * share,
        "socket_timeout": ANSWER_SECONDS * share,
        "retry": Retry(*_once()),
        "decode_responses": False,
    }


def _pool_settings() -> dict[str, Any]:
    # redis-py's pools raise beyond a hundred connections; a URL may say fewer.
    return {**_settings(), "max_connections": 2**31}


@functools.cache
def _once() -> tuple[Any, ...]:
    """A connection that the server has closed meanwhile is made anew; redis-py's default retries take seconds."""
    import redis
    from redis.backoff import NoBackoff

    return NoBackoff(), 1, (redis.ConnectionError,)


@functools.cache
def _pool_class() -> Any:
    import redis

    class Pool(redis.ConnectionPool):
        """Has no lock and no counters, which take as long as a command; all connections are in use for redis-py."""

        def reset(self) -> None:
            self._free: list[Any] = []
            # In a child that was forked another thread of the parent's may have held the lock.
            self._lock = threading.RLock()
            super().reset()

        def make_connection(self) -> Any:
            connection: Any = super().make_connection()
            connection.ends = time.monotonic() + CONNECT_SECONDS + ANSWER_SECONDS
            return connection

        def get_connection(self, *_args: Any, **_options: Any) -> Any:
            try:
                connection = self._free.pop() if self.pid == os.getpid() else None
            except IndexError:
                connection = None
            if connection is None:
                return super().get_connection()
            connection.ends = time.monotonic() + CONNECT_SECONDS + ANSWER_SECONDS
            return connection

        def release(self, connection: Any) -> None:
            if not isinstance(sys.exc_info()[1], (Exception, NoneType)):
                # Ctrl-C came in the middle of a command, whose answer the next one would read.
                connection.disconnect()
            if len(self._free) < _CONNECTIONS:
                self._free.append(connection)
            else:
                connection.disconnect()
                self._in_use_connections.discard(connection)

    return Pool


@functools.cache
def _bounded(connection: type[Any]) -> type[Any]:
    """A class of connections on which no command takes longer in all than it may: redis-py bounds each read."""

    class Bounded(connection):  # type: ignore[misc]  # any of redis-py's
        ends: float

        def _connect(self) -> Any:
            return _BoundedSocket(super()._connect(), self)

    return Bounded


class _BoundedSocket:
    """A socket whose reads end when the command does that they are part of."""

    def __init__(self, socket: Any, connection: Any) -> None:
        self._socket = socket
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def recv(self, *args: Any) -> Any:
        return self._in_time(self._socket.recv, args)

    def recv_into(self, *args: Any) -> Any:
        return self._in_time(self._socket.recv_into, args)

    def _in_time(self, read: Callable[..., Any], args: Any) -> Any:
        timeout, left = self._socket.gettimeout(), self._connection.ends - time.monotonic()
        if timeout is not None and (timeout <= left or timeout == 0):
            return read(*args)
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        try:
            return read(*args)
        finally:
            self._socket.settimeout(timeout)


# Options


def check_client(option: str, client: Any) -> Any:
    """Refuse what is no client of redis-py, or gives text in place of bytes."""
    if not hasattr(type(client), "execute_command"):
        msg = f"{option} is {type(client).__name__}; give a client of redis-py (redis.Redis, redis.asyncio.Redis)"
        raise TypeError(msg)
    is_async = any(base.__module__.startswith("redis.asyncio") for base in type(client).__mro__)
    if is_async and _place_of(client) is None and _maker_of_own(client) is None:
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
