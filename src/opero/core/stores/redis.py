"""Entries on a redis server.

An entry is a key of its own, its lease another one beside it; both carry the namespace in front. A lease ends by itself
when its owner is gone, and is renewed while its owner computes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import struct
import threading
from typing import TYPE_CHECKING, Any
from weakref import ref

from opero.core.clock import clock
from opero.core.flights import BUSY, CLAIMED, FOUND, Flight, Keep
from opero.core.forks import allow_forks, watch_forks
from opero.core.redis_server import Server, server_at, server_of, server_with
from opero.core.stores.lasting import LastingStore, slug

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from opero.core.faults import Rest
    from opero.core.stores.settings import CacheSettings

LEASE_SECONDS = 10.0
_IDLE_SECONDS = 1.0
_SCAN_COUNT = 1_000

# KEYS: entry, lease. ARGV: token, milliseconds, the time in the form that entries have of their end: as bytes these are
# in the order of the times. A lease that would live longer than any that opero makes is nobody's.
_CLAIM = """
local entry = redis.call('GET', KEYS[1])
if entry and string.sub(entry, 9, 16) > ARGV[3] then return {entry, 0} end
local left = redis.call('PTTL', KEYS[2])
if left == -2 or left == -1 or left > tonumber(ARGV[2]) then
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
# KEYS: lease. ARGV: token.
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
# KEYS: lease. ARGV: token, milliseconds.
_RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"


class RedisStore(LastingStore):
    """The entries of one namespace on one server."""

    def __init__(self, settings: CacheSettings, namespace: str) -> None:
        prefix = f"{slug(settings.options['folder_name'])}:{slug(namespace)}"
        super().__init__(f"the redis cache {prefix}", settings)
        self._settings = settings
        self._prefix = prefix.encode()
        self._server: Server | None = None
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """Hold none of the parent's leases."""
        self._keeper = LeaseKeeper(self)

    @property
    def server(self) -> Server:
        """The server, which is connected to when it is asked for something."""
        server = self._server
        if server is None:
            self._server = server = self._find_server()
        return server

    def _find_server(self) -> Server:
        client, url = (self._settings.options[name] for name in ("client", "url"))
        if client is not None:
            return server_with(client)
        if url is not None:
            return server_at(url)
        # twat-cache's settings know of the environment, too.
        known = self._settings.config()
        place = {"host": known.get_redis_host(), "port": known.get_redis_port(), "db": known.get_redis_db()}
        return server_of(**place, password=known.get_redis_password())

    @property
    def client(self) -> Any:
        """The connections to the server."""
        return self.server.client

    @property
    def rest(self) -> Rest:
        """All namespaces on a server leave it alone together."""
        return self.server.rest

    def read(self, key: bytes) -> bytes | None:
        entry: bytes | None = self.client.get(self._entry(key))
        return entry

    async def fetch(self, key: bytes) -> tuple[Any] | None:
        """As `look_up`, in the running event loop; None as long as nothing is open, which takes long."""
        server = self._server
        if server is None or not server.has_async_client or server.rest.reason() is not None:
            return None
        try:
            entry = await server.get_async(self._entry(key))
            server.rest.end()
            return None if entry is None else self.fresh(entry)
        except Exception as error:  # noqa: BLE001 - the call asks again, and is told
            self.failed(error)
            return None

    def perform(self, requests: Sequence[Flight | Keep]) -> list[Any]:
        """Answer requests in order, in one exchange with the server."""
        commands = [self._command(request) for request in requests]
        asked = [command for command in commands if isinstance(command, tuple)]
        answers = self.in_spite_of_faults(self.server.perform, asked) if asked else []
        coming = itertools.repeat(answers) if isinstance(answers, Exception) else iter(answers)
        return [
            self._understood(request, next(coming)) if isinstance(command, tuple) else command
            for request, command in zip(requests, commands, strict=True)
        ]

    def let_go(self, flight: Flight) -> None:
        # One that is still being claimed is given back as soon as it is.
        flight.dropped = True
        if flight.held:
            flight.held = False
            self._keeper.watch(flight)

    def failed(self, error: Exception) -> None:
        self.server.failed(error)

    def delete(self, key: bytes) -> bool:
        entry = self._entry(key)
        # First the lease: what is being computed now will not be stored.
        self.client.delete(entry + b":lease")
        return bool(self.client.delete(entry))

    def clear(self) -> None:
        # The leases go too, as above.
        keys = self._keys()
        while found := list(itertools.islice(keys, _SCAN_COUNT)):
            self.client.unlink(*found)

    def __len__(self) -> int:
        return len({key for key in self._keys() if not key.endswith(b":lease")})

    def close(self) -> None:
        self._server = None

    def for_each(self, flights: Sequence[Flight], script: str, *arguments: int) -> None:
        """Run a script on the lease of each."""
        if flights:
            leases = [(self._entry(flight.key) + b":lease", flight.ticket) for flight in flights]
            self.server.perform([("EVAL", script, 1, *lease, *arguments) for lease in leases])

    def _entry(self, key: bytes) -> bytes:
        # The braces keep entry and lease on one node of a cluster.
        return b"%b:{%b}" % (self._prefix, key.hex().encode())

    def _command(self, request: Flight | Keep) -> tuple[Any, ...] | Exception | None:
        """What the server is to do, or the answer if it has not to be asked."""
        if isinstance(request, Flight):
            request.ticket = os.urandom(12).hex().encode()
            # Until the answer says otherwise: after Ctrl-C it is given back, if it was granted.
            request.held = True
            entry, now = self._entry(request.key), struct.pack(">d", clock.wall())
            return ("EVAL", _CLAIM, 2, entry, entry + b":lease", request.ticket, int(LEASE_SECONDS * 1000), now)
        fault = self.write_down(request)
        flight, entry = request.flight, self._entry(request.flight.key)
        if fault is not None or flight.is_void:
            return fault
        milliseconds = 0 if request.seconds is None else max(1, int(request.seconds * 1000))
        if flight.ticket is None:
            return ("SET", entry, flight.written, *(("PX", milliseconds) if milliseconds else ()))
        return ("EVAL", _KEEP, 2, entry, entry + b":lease", flight.ticket, flight.written, milliseconds)

    def _understood(self, request: Flight | Keep, answer: Any) -> Any:
        if isinstance(request, Keep):
            if not isinstance(answer, Exception):
                request.flight.held = False
                self._keeper.forget(request.flight)
                return None
            return answer
        request.held = not isinstance(answer, Exception) and bool(answer[1])
        if isinstance(answer, Exception):
            return answer
        entry, granted = answer
        if granted:
            self._keeper.watch(request)
        try:
            if entry is not None and self.is_found(request, entry):
                return FOUND
        except Exception as error:  # noqa: BLE001 - one damaged entry says nothing about the others
            self.client.delete(self._entry(request.key))
            return error
        return CLAIMED if granted else BUSY

    def _keys(self) -> Iterator[bytes]:
        keys: Iterator[bytes] = self.client.scan_iter(match=self._prefix + b":*", count=_SCAN_COUNT)
        return keys


class LeaseKeeper:
    """Renews the leases that this process holds, and gives back those that nobody wants any more.

    Its thread runs while there are leases, and a little longer.
    """

    def __init__(self, store: RedisStore) -> None:
        # Not to keep a store, and its connections, that nobody uses any more.
        self._store = ref(store)
        self._flights: set[Flight] = set()
        # Not an event or a lock, which a finalizer may come in the middle of, and drop a lease itself.
        self._hurry: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None

    def watch(self, flight: Flight) -> None:
        """Renew a lease, or give it back if it was dropped."""
        self._flights.add(flight)
        if flight.dropped:
            self._hurry.put(None)
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._keep, name="opero-leases", daemon=True)
                allow_forks(self._thread)
                self._thread.start()

    def forget(self, flight: Flight) -> None:
        """The lease is given back already."""
        self._flights.discard(flight)

    def _keep(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                self._hurry.get(timeout=LEASE_SECONDS / 3 if self._flights else _IDLE_SECONDS)
                while True:
                    self._hurry.get_nowait()
            flights = [*self._flights]
            dropped = [flight for flight in flights if flight.dropped]
            self._flights.difference_update(dropped)
            self._tell(dropped, [flight for flight in flights if not flight.dropped])
            with self._lock:
                if not flights and not self._flights:
                    self._thread = None
                    return

    def _tell(self, dropped: Sequence[Flight], held: Sequence[Flight]) -> None:
        store = self._store()
        if store is None:
            return
        try:
            store.for_each(dropped, _RELEASE)
            store.for_each(held, _RENEW, int(LEASE_SECONDS * 1000))
        except Exception as error:  # noqa: BLE001 - the leases end by themselves
            store.complain(error)
