"""A limit for processes on any number of machines: one call of a script on a redis server, by the server's clock."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from opero.core.redis_server import Server, server_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opero.core.limits.rates import Rates
    from opero.core.limits.shared import Request

# KEYS: the state, the starts that each quota counts. ARGV: how long to pause, interval, tolerance, then calls and
# length of each quota. All times in microseconds, from a recent year on, so that a double holds their fractions.
_SCRIPT = """
local time = redis.call('TIME')
local now = (time[1] - 1700000000) * 1000000 + time[2]
local state = redis.call('HMGET', KEYS[1], 'taken', 'paused')
local taken, paused = tonumber(state[1] or 0), tonumber(state[2] or 0)
local pause, interval, tolerance = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local function keep()
  redis.call('HSET', KEYS[1], 'taken', string.format('%.3f', taken), 'paused', string.format('%.3f', paused))
  redis.call('PEXPIRE', KEYS[1], math.ceil((math.max(taken, paused, now) - now) / 1000) + 1000)
end
if pause > 0 then
  paused = math.max(paused, now + pause)
  keep()
  return 0
end
if taken > now + tolerance + interval then
  taken = now + tolerance + interval
  keep()
end
local opens = math.max(taken - tolerance, paused)
for i = 2, #KEYS do
  local oldest = redis.call('LINDEX', KEYS[i], ARGV[2 * i] - 1)
  if oldest then opens = math.max(opens, oldest + ARGV[2 * i + 1]) end
end
if opens > now then return math.ceil(opens - now) end
taken = math.max(taken, now) + interval
keep()
for i = 2, #KEYS do
  redis.call('LPUSH', KEYS[i], now)
  redis.call('LTRIM', KEYS[i], 0, ARGV[2 * i] - 1)
  redis.call('PEXPIRE', KEYS[i], math.ceil(ARGV[2 * i + 1] / 1000) + 1000)
end
return 0
"""


class RedisGate:
    """A `opero.core.limits.shared.Gate` on a server. A server that fails is left alone for a while."""

    is_instant: ClassVar[bool] = False

    def __init__(self, name: str, rates: Rates, url: str) -> None:
        self._url = url
        # The braces keep all of it on one node of a cluster.
        self._key = f"opero:limit:{{{name}}}"
        self.change(rates)

    def change(self, rates: Rates) -> None:
        self._keys = [self._key, *(f"{self._key}:{place}" for place in range(len(rates.quotas)))]
        quotas = [value for quota in rates.quotas for value in (quota.calls, quota.seconds * 1e6)]
        self._arguments = [rates.interval * 1e6, rates.tolerance * 1e6, *quotas]

    @cached_property
    def _server(self) -> Server:
        return server_at(self._url)

    def perform(self, requests: Sequence[Request]) -> list[Any]:
        try:
            server = self._server
        except Exception as error:  # noqa: BLE001 - no redis-py: it costs the sharing and not the call
            return [error] * len(requests)
        reason = server.rest.reason()
        if reason is not None:
            return [reason] * len(requests)
        try:
            return [self._answer(request) for request in requests]
        except Exception as error:  # noqa: BLE001 - as above
            server.failed(error)
            return [error] * len(requests)

    def _answer(self, request: Request) -> float:
        script = self._server.script(_SCRIPT)
        microseconds: int = script(self._keys, [request.pause * 1e6, *self._arguments])
        self._server.rest.end()
        return microseconds / 1e6
