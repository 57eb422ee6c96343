"""Entries on a redis server, and the connections to servers, which limits use, too.

An entry is a key of its own, its lease another one beside it; both carry the namespace in front. A lease ends by itself
when its owner is gone, and is renewed while its owner computes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import struct
import sys
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import redis.asyncio.connection
import redis.connection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import ClusterError, RedisClusterException
from redis.retry import Retry

from opero.core.clock import clock
from opero.core.faults import Rest
from opero.core.forks import fork_safe_threads, watch_forks
from opero.core.stores.flights import BUSY, CLAIMED, FOUND
from opero.core.stores.lasting import LastingStore, slug

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

    from opero.core.stores.flights import Flight, Keep
    from opero.core.stores.settings import Cache

# A server that is away or frozen costs half a second or 0.7; one that drips its answers costs two.
READ_SECONDS = 0.7
ANSWER_SECONDS = 1.9
LEASE_SECONDS = 10.0
# Of one event loop at once; of threads there are as many as threads in the middle of commands.
_CONNECTIONS = 32
_SCAN_COUNT = 1_000
_SETTINGS: dict[str, Any] = {
    "socket_connect_timeout": 0.5,
    "socket_timeout": READ_SECONDS,
    "decode_responses": False,
    # redis-py's pools raise beyond a hundred connections; a URL may say fewer.
    "max_connections": 2**31,
}
# A connection that the server has closed meanwhile is made anew; redis-py's default retries take seconds.
_ONCE: Any = NoBackoff(), 1, (redis.ConnectionError,)

# KEYS: entry, lease. ARGV: token, milliseconds, the time in the form that entries have of their end: as bytes these are
# in the order of the times. A lease that would live longer than any that opero makes is nobody's.
_CLAIM = """
local entry = redis.call('GET', KEYS[1])
if entry and string.sub(entry, 9, 16) > ARGV[3] then return {entry, 0} end
local left = redis.call('PTTL', KEYS[2])
if left < 0 or left > tonumber(ARGV[2]) then
    redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
    return {entry, 1}
end
return {entry, 0}
"""
# KEYS: entry, lease. ARGV: token, entry, milliseconds or 0. Without the lease somebody has cleared since.
_KEEP = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
if ARGV[3] == '0' then redis.call('SET', KEYS[1], ARGV[2]) else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
redis.call('DEL', KEYS[2])
return 1
"""
# KEYS: lease. ARGV: token, milliseconds; none are left of one that is given back.
_RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"


class RedisStore(LastingStore):
    """The entries of one namespace on one server."""

    # An event loop does not wait for a look, it awaits `fetch`.
    is_ready: ClassVar[bool] = False

    def __init__(self, settings: Cache, namespace: str) -> None:
        prefix = f"{slug(settings.options['folder_name'])}:{slug(namespace)}"
        # Shared, and connected to by the first command; all namespaces on a server leave it alone together.
        self.server = _server_for(settings)
        super().__init__(f"the redis cache {prefix}", settings, self.server.rest)
        self._prefix = prefix.encode()
        _stores.add(self)

    def read(self, key: bytes) -> bytes | None:
        client: Any = self.server.client
        entry: bytes | None = client.get(self._names(key)[0])
        return entry

    async def fetch(self, key: bytes) -> tuple[Any] | None:
        """As `look_up`, in the running event loop."""
        if not self.server.has_async_client or self.rest.reason() is not None:
            return None
        try:
            entry = await self.server.get_async(self._names(key)[0])
            self.rest.end()
            return None if entry is None else self.fresh(entry)
        except TimeoutError:
            # It may be the event loop that was held up; the call asks again, in a thread.
            return None
        except Exception as error:  # noqa: BLE001 - the call asks again, and is told
            self.failed(error)
            return None

    def claim(self, flights: Sequence[Flight]) -> list[Any]:
        commands, lasting, now = [], int(LEASE_SECONDS * 1000), struct.pack(">d", clock.wall())
        for flight in flights:
            flight.ticket = os.urandom(12).hex().encode()
            # Until the answer says otherwise: after Ctrl-C it is given back, if it was granted.
            flight.held = True
            commands.append(("EVAL", _CLAIM, 2, *self._names(flight.key), flight.ticket, lasting, now))
        return [self._claimed(*answered) for answered in zip(flights, self._exchange(commands), strict=True)]

    def keep(self, keeps: Sequence[Keep]) -> list[Exception | None]:
        answers = [self.write_down(keep) for keep in keeps]
        sent = [place for place, fault in enumerate(answers) if fault is None and not keeps[place].flight.is_void]
        for place, answer in zip(sent, self._exchange([self._keeping(keeps[n]) for n in sent]), strict=True):
            if isinstance(answer, Exception):
                answers[place] = answer
            else:
                keeps[place].flight.held = False
        return answers

    def let_go(self, flight: Flight) -> None:
        # One that is still being claimed is given back as soon as it is.
        flight.dropped = True
        if flight.held and not sys.is_finalizing():
            flight.held = False
            _keeper(os.getpid()).put((self, flight))

    def failed(self, error: Exception) -> None:
        self.server.failed(error)

    def delete(self, key: bytes) -> bool:
        entry, lease = self._names(key)
        # First the lease: what is being computed now will not be stored.
        self.server.client.delete(lease)
        return bool(self.server.client.delete(entry))

    def clear(self) -> None:
        # The leases go too, as above.
        keys = self._keys()
        while found := list(itertools.islice(keys, _SCAN_COUNT)):
            self.server.client.unlink(*found)

    def __len__(self) -> int:
        return len({key for key in self._keys() if not key.endswith(b":lease")})

    def close(self) -> None:
        """Close connections that nobody uses at this moment; others are made when there is a need."""
        self.server.close()

    def renew(self, leases: Sequence[tuple[Flight, int]]) -> None:
        """Let leases go on for so many milliseconds, or end; where that fails they end by themselves."""
        commands = [("EVAL", _RENEW, 1, self._names(flight.key)[1], flight.ticket, left) for flight, left in leases]
        self._exchange(commands)

    def _names(self, key: bytes) -> tuple[bytes, bytes]:
        """Those of the entry and its lease."""
        # The braces keep both on one node of a cluster.
        entry = b"%b:{%b}" % (self._prefix, key.hex().encode())
        return entry, entry + b":lease"

    def _keys(self) -> Iterator[bytes]:
        return iter(self.server.client.scan_iter(match=self._prefix + b":*", count=_SCAN_COUNT))

    def _exchange(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The server's answers to commands, all in one exchange; exceptions if that failed, or is not tried now."""
        answers: Any = self.in_spite_of_faults(self.server.perform, commands) if commands else []
        return [answers] * len(commands) if isinstance(answers, Exception) else answers

    def _keeping(self, keep: Keep) -> tuple[Any, ...]:
        """The command that stores what is to be kept."""
        flight, names = keep.flight, self._names(keep.flight.key)
        milliseconds = 0 if keep.seconds is None else max(1, int(keep.seconds * 1000))
        if flight.ticket is None:
            return ("SET", names[0], flight.written, *(("PX", milliseconds) if milliseconds else ()))
        return ("EVAL", _KEEP, 2, *names, flight.ticket, flight.written, milliseconds)

    def _claimed(self, flight: Flight, answer: Any) -> Any:
        flight.held = False
        if isinstance(answer, Exception):
            return answer
        try:
            entry, is_granted = answer
            flight.held = bool(is_granted)
            if flight.dropped:
                self.let_go(flight)
            elif is_granted:
                _keeper(os.getpid())
            if entry is not None and self.is_found(flight, entry):
                return FOUND
        except Exception as error:  # noqa: BLE001 - one damaged entry says nothing about the others
            self.in_spite_of_faults(self.server.client.delete, self._names(flight.key)[0])
            return error
        return CLAIMED if is_granted else BUSY


_stores: WeakSet[RedisStore] = WeakSet()


@lru_cache(maxsize=1)
def _keeper(_process: int) -> queue.SimpleQueue[tuple[RedisStore, Flight]]:
    """Where to put leases that are to be given back, which a thread does; it also renews those that are held."""
    # Not an event or a lock, which a finalizer may come in the middle of, and drop a lease itself.
    dropped: queue.SimpleQueue[tuple[RedisStore, Flight]] = queue.SimpleQueue()

    def keep_all() -> None:
        while True:
            _keep_leases(dropped)

    thread = threading.Thread(target=keep_all, name="opero-leases", daemon=True)
    fork_safe_threads.add(thread)
    thread.start()
    return dropped


def _keep_leases(dropped: queue.SimpleQueue[tuple[RedisStore, Flight]]) -> None:
    """Give back leases that nobody wants any more, and renew those of what is being computed."""
    found = []
    with contextlib.suppress(queue.Empty):
        found.append(dropped.get(timeout=LEASE_SECONDS / 3))
        while True:
            found.append(dropped.get_nowait())
    for store in list(_stores):
        leases = [(flight, 0) for owner, flight in found if owner is store]
        leases += [(flight, int(LEASE_SECONDS * 1000)) for flight in store.flights.held()]
        store.renew(leases)


# Servers


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
        self.client = self._own
        if self._own is None:
            bounded = type("Bounded", (_Bounded, getattr(redis.connection, self._kind)), {})
            pool = _Pool(connection_class=bounded, **{**self._place, **_SETTINGS, "retry": Retry(*_ONCE)})
            self.client = redis.Redis(connection_pool=pool)

    def close(self) -> None:
        """Close what nobody uses at this moment, unless it is the program's own."""
        if self._own is None:
            self.client.connection_pool.disconnect(inuse_connections=False)

    def __del__(self, suppress: Any = contextlib.suppress) -> None:
        # redis-py's pool is part of a cycle: its connections would be open until the garbage collector comes. When the
        # program ends, globals may be gone.
        with suppress(Exception):
            self.close()

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

            async def close_at_the_end() -> AsyncGenerator[None, None]:
                try:
                    yield
                finally:
                    self._async_clients.pop(loop, None)
                    await client.aclose(close_connection_pool=True)

            # An event loop closes its generators when it ends, while it can still close connections.
            closing = close_at_the_end()
            self._async_clients[loop] = client, asyncio.Semaphore(_CONNECTIONS), closing
            await anext(closing)
        client, places, _ = self._async_clients[loop]
        # Not by a pool that lets tasks wait by itself, which takes a third of the time of a command.
        async with places, asyncio.timeout(READ_SECONDS):
            entry: bytes | None = await client.get(key)
            return entry

    def failed(self, error: Exception) -> None:
        """Leave the server alone for a while if it was its fault, or its network's."""
        if isinstance(error, (redis.ConnectionError, redis.TimeoutError, RedisClusterException, ClusterError, OSError)):
            self.rest.begin(error)


# Those that are in use.
_servers: WeakValueDictionary[str, Server] = WeakValueDictionary()


def _server_for(settings: Cache) -> Server:
    client, url = settings.options["client"], settings.options["url"]
    if client is not None:
        place = _place_of(client)
        return _servers.setdefault(f"client {id(client)}", Server(own=client)) if place is None else _server_of(**place)
    if url is not None:
        return server_at(url)
    from opero.core.stores.twat import config_of

    # They know of the environment, too.
    known = config_of(settings)
    place = {"host": known.get_redis_host(), "port": known.get_redis_port(), "db": known.get_redis_db()}
    return _server_of(**place, password=known.get_redis_password())


def server_at(url: str) -> Server:
    """The server that a URL names, as far as this process is concerned."""
    return _server_of(**redis.connection.parse_url(url))  # type: ignore[no-untyped-call]  # redis-py's


def _server_of(*, connection_class: type = redis.Connection, **place: Any) -> Server:
    """The server at a place, which is told by the keywords of a connection of redis-py and by its class."""
    kind = connection_class.__name__
    return _servers.setdefault(repr((kind, sorted(place.items()))), Server(kind, place))


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


# opero's own connections


class _Pool(redis.ConnectionPool):
    """Has no lock and no counters, which take as long as a command."""

    def get_connection(self, *_args: Any, **_options: Any) -> Any:
        connection: Any
        try:
            connection = self._available_connections.pop()
        except IndexError:
            # It connects when a command is sent.
            connection = self.make_connection()
        connection.last_read_at = clock.real() + ANSWER_SECONDS - READ_SECONDS
        return connection

    def release(self, connection: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, Exception):
            # Ctrl-C came in the middle of a command, whose answer the next one would read.
            connection.disconnect()
        self._available_connections.append(connection)


class _Bounded:
    """A connection that spends no more time on an exchange in all than it may, signing in included."""

    # When the last read of the exchange has to begin.
    last_read_at = 0.0

    def _connect(self) -> Any:
        """Connect in a thread, which is left alone if that takes too long: nothing bounds how a name is looked up."""
        made: list[Any] = []
        outer = super()._connect  # type: ignore[misc]  # of a class of connections

        def connect() -> None:
            try:
                made.append(outer())
            except Exception as error:  # noqa: BLE001 - told below
                made.append(error)

        thread = threading.Thread(target=connect, name="opero-connecting", daemon=True)
        thread.start()
        thread.join(max(0.0, self.last_read_at - clock.real()))
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
        if name.startswith("recv") and clock.real() >= self._connection.last_read_at:
            raise TimeoutError
        return getattr(self._socket, name)
