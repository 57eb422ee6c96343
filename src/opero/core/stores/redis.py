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
import sys
import threading
from typing import TYPE_CHECKING, Any

from opero.core.clock import clock
from opero.core.forks import fork_safe_threads, watch_forks
from opero.core.redis_server import Server, server_at, server_of, server_with
from opero.core.stores.flights import BUSY, CLAIMED, FOUND, Keep
from opero.core.stores.lasting import LastingStore, slug

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from opero.core.faults import Rest
    from opero.core.stores.flights import Flight
    from opero.core.stores.settings import CacheSettings

LEASE_SECONDS = 10.0
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
        self._prefix = prefix.encode()
        # Shared, and connected to by the first command.
        self.server = self._find_server()
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """Hold none of the parent's leases."""
        # Not an event or a lock, which a finalizer may come in the middle of, and drop a lease itself.
        self._dropped: queue.SimpleQueue[Flight] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._keeper: threading.Thread | None = None

    def _find_server(self) -> Server:
        client, url = (self.settings.options[name] for name in ("client", "url"))
        if client is not None:
            return server_with(client)
        if url is not None:
            return server_at(url)
        # twat-cache's settings know of the environment, too.
        known = self.settings.config()
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
        entry: bytes | None = self.client.get(self._names(key)[0])
        return entry

    async def fetch(self, key: bytes) -> tuple[Any] | None:
        """As `look_up`, in the running event loop."""
        if not self.server.has_async_client or self.rest.reason() is not None:
            return None
        try:
            entry = await self.server.get_async(self._names(key)[0])
            self.rest.end()
            return None if entry is None else self.fresh(entry)
        except Exception as error:  # noqa: BLE001 - the call asks again, and is told
            self.failed(error)
            return None

    def perform(self, requests: Sequence[Flight | Keep]) -> list[Any]:
        """Answer requests in order, in one exchange with the server."""
        answers: list[Any] = [self.write_down(request) if isinstance(request, Keep) else None for request in requests]
        commands = {
            place: self._command(request)
            for place, request in enumerate(requests)
            if answers[place] is None and not (isinstance(request, Keep) and request.flight.is_void)
        }
        got = self.in_spite_of_faults(self.server.perform, [*commands.values()])
        for number, place in enumerate(commands):
            answers[place] = self._understood(requests[place], got if isinstance(got, Exception) else got[number])
        return answers

    def let_go(self, flight: Flight) -> None:
        # One that is still being claimed is given back as soon as it is.
        flight.dropped = True
        if flight.held:
            flight.held = False
            self._dropped.put(flight)
            self._have_keeper()

    def failed(self, error: Exception) -> None:
        self.server.failed(error)

    def delete(self, key: bytes) -> bool:
        entry, lease = self._names(key)
        # First the lease: what is being computed now will not be stored.
        self.client.delete(lease)
        return bool(self.client.delete(entry))

    def clear(self) -> None:
        # The leases go too, as above.
        keys = self._keys()
        while found := list(itertools.islice(keys, _SCAN_COUNT)):
            self.client.unlink(*found)

    def __len__(self) -> int:
        return len({key for key in self._keys() if not key.endswith(b":lease")})

    def close(self) -> None:
        """The server's connections are closed with the last who use it."""

    def _have_keeper(self) -> None:
        if sys.is_finalizing():
            # No thread begins any more; the leases end by themselves.
            return
        with self._lock:
            if self._keeper is None or not self._keeper.is_alive():
                self._keeper = threading.Thread(target=self._keep_leases, name="opero-leases", daemon=True)
                fork_safe_threads.add(self._keeper)
                self._keeper.start()

    def _keep_leases(self) -> None:
        """Renew the leases, give back those that nobody wants any more, and end a little after the last one."""
        milliseconds = int(LEASE_SECONDS * 1000)
        while True:
            dropped = []
            with contextlib.suppress(queue.Empty):
                dropped.append(self._dropped.get(timeout=LEASE_SECONDS / 3))
                while True:
                    dropped.append(self._dropped.get_nowait())
            tasks = [(_RELEASE, flight) for flight in dropped] + [(_RENEW, flight) for flight in self.flights.held()]
            leases = [(script, 1, self._names(flight.key)[1], flight.ticket) for script, flight in tasks]
            try:
                self.server.perform([("EVAL", *lease, milliseconds) for lease in leases])
            except Exception as error:  # noqa: BLE001 - the leases end by themselves
                self.complain(error)
            with self._lock:
                if not self.flights.held() and self._dropped.empty():
                    self._keeper = None
                    return

    def _names(self, key: bytes) -> tuple[bytes, bytes]:
        """Those of the entry and its lease."""
        # The braces keep both on one node of a cluster.
        entry = b"%b:{%b}" % (self._prefix, key.hex().encode())
        return entry, entry + b":lease"

    def _keys(self) -> Iterator[bytes]:
        return iter(self.client.scan_iter(match=self._prefix + b":*", count=_SCAN_COUNT))

    def _command(self, request: Flight | Keep) -> tuple[Any, ...]:
        """What the server is to do."""
        if not isinstance(request, Keep):
            request.ticket = os.urandom(12).hex().encode()
            # Until the answer says otherwise: after Ctrl-C it is given back, if it was granted.
            request.held = True
            now = struct.pack(">d", clock.wall())
            return ("EVAL", _CLAIM, 2, *self._names(request.key), request.ticket, int(LEASE_SECONDS * 1000), now)
        flight, names = request.flight, self._names(request.flight.key)
        milliseconds = 0 if request.seconds is None else max(1, int(request.seconds * 1000))
        if flight.ticket is None:
            return ("SET", names[0], flight.written, *(("PX", milliseconds) if milliseconds else ()))
        return ("EVAL", _KEEP, 2, *names, flight.ticket, flight.written, milliseconds)

    def _understood(self, request: Flight | Keep, answer: Any) -> Any:
        if isinstance(answer, Exception):
            if not isinstance(request, Keep):
                request.held = False
            return answer
        if isinstance(request, Keep):
            request.flight.held = False
            return None
        try:
            entry, is_granted = answer
            request.held = bool(is_granted)
            if request.dropped:
                self.let_go(request)
            elif is_granted:
                self._have_keeper()
            if entry is not None and self.is_found(request, entry):
                return FOUND
        except Exception as error:  # noqa: BLE001 - one damaged entry says nothing about the others
            self.in_spite_of_faults(self.client.delete, self._names(request.key)[0])
            return error
        return CLAIMED if is_granted else BUSY
