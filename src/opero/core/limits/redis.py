"""A limit for processes on any number of machines: a value on a redis server, by the server's clock."""

from __future__ import annotations

from hashlib import sha1
from typing import TYPE_CHECKING, Any

from opero.core.clock import clock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opero.core.limits.ledger import Change
    from opero.core.redis_server import Server

# A process reckons with what it knows, and its answer holds if that is still so: of a state with this digest it makes
# the given one, if there is one; of any other state it gives the server's time and what is there.
# In a field of a hash: what somebody writes beside it, or in its place, does no harm.
_SWAP = """
local size = redis.pcall('HSTRLEN', KEYS[1], 'state')
local data = ''
if type(size) ~= 'number' then
  redis.call('DEL', KEYS[1])
elseif size > 0 and size < 1000000 then
  data = redis.call('HGET', KEYS[1], 'state')
end
if redis.sha1hex(data) ~= ARGV[1] then
  local time = redis.call('TIME')
  return {time[1], time[2], data}
end
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[1], 'state', ARGV[2])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
"""
# Others may be faster so often; then they are let go on for so long.
_TRIES, _BUSY_SECONDS = 20, 0.005
# For so long what a process knows of the server's time is good enough.
_FRESH_SECONDS = 1.0
_LASTING_SECONDS = 1.0


class RedisGate:
    """A `opero.core.limits.shared.Gate` on a server. A server that fails is left alone for a while."""

    is_instant = False

    def __init__(self, name: str, url: str) -> None:
        self._url = url
        # The braces keep all of it on one node of a cluster.
        self._key = f"opero:limit:{{{name}}}"
        self._server: Server | None = None
        # The state that was found last, and the server's time and this machine's at that moment.
        self._found = b"", 0.0, -_FRESH_SECONDS

    def perform(self, requests: Sequence[Change]) -> list[Any]:
        try:
            from opero.core.redis_server import server_at

            server = self._server = self._server or server_at(self._url)
        except Exception as error:  # noqa: BLE001 - no redis-py: it costs the sharing and not the call
            return [error] * len(requests)
        reason = server.rest.reason()
        if reason is not None:
            return [reason] * len(requests)
        try:
            return [self._answer(server, change) for change in requests]
        except Exception as error:  # noqa: BLE001 - as above
            server.failed(error)
            return [error] * len(requests)

    def _answer(self, server: Server, change: Change) -> float:
        data, found_at, heard_at = self._found
        for times in range(_TRIES):
            # No later than the server's own.
            now = found_at + clock.machine() - heard_at
            wait, made, lasts = change(data, now)
            if times and not made:
                return wait
            is_known = times or clock.machine() - heard_at < _FRESH_SECONDS
            digest = sha1(data, usedforsecurity=False).hexdigest() if is_known else ""
            arguments = [digest, made, round((lasts + _LASTING_SECONDS) * 1000)]
            (other,) = server.perform([("EVAL", _SWAP, 1, self._key, *arguments)])
            server.rest.end()
            if other is None:
                self._found = made or data, found_at, heard_at
                return wait
            data, found_at, heard_at = other[2], float(other[0]) + float(other[1]) / 1e6, clock.machine()
            self._found = data, found_at, heard_at
        return _BUSY_SECONDS
