"""Connections to redis servers, shared by all that use one server in this process."""

from __future__ import annotations

import codecs
import contextlib
import sys
import threading
from types import NoneType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import redis.asyncio.connection
import redis.connection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import ClusterError, RedisClusterException
from redis.retry import Retry

from opero.core.clock import clock
from opero.core.faults import Rest
from opero.core.forks import watch_forks

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

# What is left to the first connection is imported now: a child that was forked meanwhile would wait for that.
codecs.lookup("idna")
redis.Redis().connection_pool.make_connection()

# A server that is away or frozen costs half a second or 0.7; one that drips its answers costs two.
CONNECT_SECONDS = 0.5
READ_SECONDS = 0.7
ANSWER_SECONDS = 1.9
# An event loop that looks so much later was held up by something else.
_LATE = 0.1
# Of one event loop at once; of threads there are as many as threads in the middle of commands.
_CONNECTIONS = 32

_SETTINGS: dict[str, Any] = {
    "socket_connect_timeout": CONNECT_SECONDS,
    "socket_timeout": READ_SECONDS,
    "decode_responses": False,
    # redis-py's pools raise beyond a hundred connections; a URL may say fewer.
    "max_connections": 2**31,
}
# A connection that the server has closed meanwhile is made anew; redis-py's default retries take seconds.
_ONCE: Any = NoBackoff(), 1, (redis.ConnectionError,)


class Server:
    """One database of one server: connections, and a rest when it fails, that all who use it share.

    Args:
        kind: Name of the class of redis-py's connections.
        place: How to connect, as keywords of that class.
        own: A client of the program's own, which does that in its own way, in place of the others.
    """

    def __init__(self, kind: str = "", place: Mapping[str, Any] | None = None, own: Any = None) -> None:
        self._kind = kind
        self._place = place or {}
        self._own = own
        # By event loop: a client, places for those who ask at once, and what closes its connections.
        self._async_clients: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self.has_async_client = own is None
        self.rest = Rest()
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """Use none of the parent's connections, and wait for none of its locks."""
        if self._own is not None:
            self.client = self._own
            return
        bounded = type("Bounded", (_Bounded, getattr(redis.connection, self._kind)), {})
        pool = _Pool(connection_class=bounded, **{**self._place, **_SETTINGS, "retry": Retry(*_ONCE)})
        self.client = redis.Redis(connection_pool=pool)

    def __del__(self, suppress: Any = contextlib.suppress) -> None:
        # redis-py's pool is part of a cycle: its connections would be open until the garbage collector comes. When the
        # program ends, globals may be gone.
        with suppress(Exception):
            if self._own is None:
                self.client.connection_pool.disconnect()

    def perform(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers to commands; of several in one exchange an error that the server answers with is one."""
        client = self.client
        if len(commands) > 1 and hasattr(client, "connection_pool"):
            pipeline = client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = pipeline.execute(raise_on_error=False)
            return answers
        # A cluster takes no scripts in a pipeline.
        return [client.execute_command(*command) for command in commands]

    async def get_async(self, key: bytes) -> bytes | None:
        """What is there under a key, asked in the running event loop."""
        import asyncio

        loop = asyncio.get_running_loop()
        if loop not in self._async_clients:
            # What is read is bounded as a whole.
            settings = {**self._place, **_SETTINGS, "retry": AsyncRetry(*_ONCE), "socket_timeout": None}
            pool = redis.asyncio.ConnectionPool(getattr(redis.asyncio.connection, self._kind), **settings)
            client = redis.asyncio.Redis(connection_pool=pool)
            # An event loop closes its generators when it ends, while it can still close connections.
            closing = self._closing_at_the_end(loop, client)
            self._async_clients[loop] = client, asyncio.Semaphore(_CONNECTIONS), closing
            await anext(closing)
        client, places, _ = self._async_clients[loop]
        # Not by a pool that lets tasks wait by itself, which takes a third of the time of a command.
        async with places:
            began = loop.time()
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    entry: bytes | None = await client.get(key)
                    return entry
            except (TimeoutError, redis.RedisError) as error:
                if loop.time() - began > ANSWER_SECONDS + _LATE:
                    raise RuntimeError("the event loop was held up, so that nothing is known of the server") from error
                raise

    async def _closing_at_the_end(self, loop: Any, client: Any) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._async_clients.pop(loop, None)
            await client.aclose(close_connection_pool=True)

    def failed(self, error: Exception) -> None:
        """Leave the server alone for a while if it was its fault, or its network's."""
        if isinstance(error, (redis.ConnectionError, redis.TimeoutError, RedisClusterException, ClusterError, OSError)):
            self.rest.begin(error)


# Those that are in use.
_servers: WeakValueDictionary[str, Server] = WeakValueDictionary()


def server_at(url: str) -> Server:
    """The server that a URL names, as far as this process is concerned."""
    return server_of(**redis.connection.parse_url(url))  # type: ignore[no-untyped-call]  # redis-py's


def server_of(*, connection_class: type = redis.Connection, **place: Any) -> Server:
    """The server at a place, which is told by the keywords of a connection of redis-py and by its class."""
    kind = connection_class.__name__
    return _servers.setdefault(repr((kind, sorted(place.items()))), Server(kind, place))


def server_with(client: Any) -> Server:
    """The server that a client of the program's own is connected to."""
    place = _place_of(client)
    return _servers.setdefault(f"client {id(client)}", Server(own=client)) if place is None else server_of(**place)


def _place_of(client: Any) -> dict[str, Any] | None:
    """Where a client's server is, and how to sign in; None if it finds servers by itself, or in a way of its own.

    A client may wait for a frozen server for ever, and one of asyncio belongs to an event loop.
    """
    pool: Any = getattr(client, "connection_pool", None)
    kind: type = getattr(pool, "connection_class", object)
    if kind.__module__ not in {"redis.connection", "redis.asyncio.connection"}:
        return None
    names = {"host", "port", "path", "db", "username", "password", "credential_provider"}
    given = {name: value for name, value in pool.connection_kwargs.items() if name in names or name.startswith("ssl")}
    return {"connection_class": kind, **given}


# opero's own clients


class _Pool(redis.ConnectionPool):
    """Has no lock and no counters, which take as long as a command; all connections are in use for redis-py."""

    def __init__(self, **settings: Any) -> None:
        self._free: list[Any] = []
        super().__init__(**settings)

    def get_connection(self, *_args: Any, **_options: Any) -> Any:
        try:
            connection = self._free.pop()
        except IndexError:
            return super().get_connection()
        connection.begun_at = clock.real()
        return connection

    def make_connection(self) -> Any:
        connection: Any = super().make_connection()
        connection.begun_at = clock.real()
        return connection

    def release(self, connection: Any) -> None:
        if not isinstance(sys.exc_info()[1], (Exception, NoneType)):
            # Ctrl-C came in the middle of a command, whose answer the next one would read.
            connection.disconnect()
        self._free.append(connection)


class _Bounded:
    """A connection that spends no more time on an exchange in all than it may, signing in included."""

    # Of the exchange that is under way.
    begun_at = 0.0

    def time_left(self) -> float:
        """Seconds within which the last read has to begin."""
        return self.begun_at + ANSWER_SECONDS - READ_SECONDS - clock.real()

    def _connect(self) -> Any:
        """Connect in a thread, which is left alone if that takes too long: nothing bounds how a name is looked up."""
        made: list[Any] = []

        def connect() -> None:
            try:
                made.append(outer())
            except Exception as error:  # noqa: BLE001 - told below
                made.append(error)

        outer = super()._connect  # type: ignore[misc]  # of a class of connections
        thread = threading.Thread(target=connect, name="opero-connecting", daemon=True)
        thread.start()
        thread.join(max(0.0, self.time_left()))
        if not made:
            raise TimeoutError
        if isinstance(made[0], Exception):
            raise made[0]
        return _BoundedSocket(made[0], self)


class _BoundedSocket:
    """The socket of a connection, from which nothing is read too late: redis-py bounds each read."""

    def __init__(self, socket: Any, connection: _Bounded) -> None:
        self._socket = socket
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        if name.startswith("recv") and self._connection.time_left() <= 0:
            raise TimeoutError
        return getattr(self._socket, name)


# Options


def check_client(option: str, client: Any) -> Any:
    """Refuse what is no client of redis-py, or one that would be used itself and cannot be."""
    if not hasattr(type(client), "execute_command"):
        msg = f"{option} is {type(client).__name__}; give a client of redis-py (redis.Redis, redis.asyncio.Redis)"
        raise TypeError(msg)
    if _place_of(client) is not None:
        return client
    if isinstance(client, (redis.asyncio.Redis, redis.asyncio.RedisCluster)):
        what = f"a {type(client).__name__} of redis.asyncio for a cluster, for sentinels or with connections of its own"
        msg = f"{option} is {what}; give one for threads, such as redis.RedisCluster, for async functions too"
        raise TypeError(msg)
    if client.get_encoder().decode_responses:
        raise ValueError(f"{option} gives text in place of bytes; make it without decode_responses=True")
    return client
