"""A limit for processes on any number of machines: one call of a script on a redis server, by the server's clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.core.limits.ledger import CLAIM_GRACE, EXACT_ENTRIES, FINEST_PART, LONGEST_CLAIM, LONGEST_PAUSE
from opero.core.redis_server import Server, server_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opero.core.limits.ledger import Request
    from opero.core.limits.rates import Rates

# What `opero.core.limits.ledger` does: there, not here, since a process that reads and writes by itself needs two ways
# to the server and back for each start, in which others are faster. KEYS: the state, then what was taken of each quota,
# as "first last amount", the newest first. ARGV: what is asked ("take", "correct", "pause"), for how long to pause, how
# long was waited, the number of paces; of each its interval, tolerance, most units and cost; of each quota its count,
# time and cost; at the end who asks, and whether the next slot is claimed. All times in microseconds, from a recent
# year on, so that a double holds their fractions. What cannot be true, as of a server whose clock was set back, is
# forgotten.
_SCRIPT = (
    f"local EXACT, PART, LONGEST_PAUSE = {EXACT_ENTRIES}, {FINEST_PART}, {LONGEST_PAUSE * 1e6:.0f}\n"
    f"local LONGEST_CLAIM, CLAIM_GRACE = {LONGEST_CLAIM * 1e6:.0f}, {CLAIM_GRACE * 1e6:.0f}"
    """
local time = redis.call('TIME')
local now = (time[1] - 1700000000) * 1000000 + time[2]
local function number(text, least, most)
  local found = tonumber(text or '')
  if found and found >= least and found <= most then return found end
end
local function kept(key, kind)
  local found = redis.call('TYPE', key)['ok']
  if found ~= kind and found ~= 'none' then redis.call('DEL', key) end
end
local asked, pause, waited, paces = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
kept(KEYS[1], 'hash')
local written = number(redis.call('HGET', KEYS[1], 'at'), 0, now)
if not written then redis.call('DEL', KEYS[1]) end
local paused = number(redis.call('HGET', KEYS[1], 'paused'), 0, now + LONGEST_PAUSE) or 0
local opened = number(redis.call('HGET', KEYS[1], 'opened'), 0, now) or 0
local opens, idle, state = paused, math.max(now, paused), {'at', string.format('%.0f', now)}
local function keep(name, value)
  state[#state + 1] = name
  state[#state + 1] = string.format('%.3f', value)
end
local free = {}
for i = 1, paces do
  local interval, tolerance, most = tonumber(ARGV[4 * i + 1]), tonumber(ARGV[4 * i + 2]), tonumber(ARGV[4 * i + 3])
  local at = tonumber(redis.call('HGET', KEYS[1], 'free:' .. i) or '0') or 0
  local each = tonumber(redis.call('HGET', KEYS[1], 'each:' .. i) or '') or interval
  if at ~= at or each ~= each or each <= 0 then at, each = 0, interval end
  if written and at > written then
    at = written + math.min(most * interval + tolerance, (at - written) * interval / each)
  end
  free[i] = at
  opens = math.max(opens, at)
end
local first = 4 + 4 * paces
local full = 0
local function entry(text)
  local from, to, amount = string.match(text or '', '^(%S+) (%S+) (%S+)$')
  from, to, amount = number(from, 0, now), number(to, 0, now), number(amount, 0, 1e15)
  if from and to and amount then return from, to, amount end
end
for i = 2, #KEYS do
  local count, seconds = tonumber(ARGV[first + 3 * i - 5]), tonumber(ARGV[first + 3 * i - 4])
  local amount = tonumber(ARGV[first + 3 * i - 3])
  kept(KEYS[i], 'list')
  local used, excess, from, to, taken = 0, nil, nil, nil, nil
  local all = redis.call('LRANGE', KEYS[i], 0, -1)
  local last = #all
  while last > 0 do
    from, to, taken = entry(all[last])
    if not from then
      redis.call('DEL', KEYS[i])
      all, last = {}, 0
    elseif to + seconds <= now then
      redis.call('RPOP', KEYS[i])
      last = last - 1
    else
      break
    end
  end
  for place = 1, last do
    from, to, taken = entry(all[place])
    if from then used = used + taken end
  end
  excess = used + amount - count
  if asked == 'take' and excess > 1e-9 then
    for place = last, 1, -1 do
      from, to, taken = entry(all[place])
      if from then excess = excess - taken end
      if from and excess <= 1e-9 then
        full = math.max(full, to + seconds)
        break
      end
    end
    if excess > 1e-9 then full = math.max(full, now + seconds * math.ceil(excess / count)) end
  end
end
opens = math.max(opens, full)
local who, claims = ARGV[#ARGV - 1], ARGV[#ARGV] == '1'
local claimed = number(redis.call('HGET', KEYS[1], 'claimed'), 0, now + LONGEST_CLAIM + CLAIM_GRACE) or 0
local is_mine = redis.call('HGET', KEYS[1], 'claimant') == who
if asked == 'take' and claimed > now and not is_mine then return math.ceil(math.max(opens, claimed) - now) end
if asked == 'take' and opens > now then
  if full > 0 then redis.call('HSET', KEYS[1], 'opened', string.format('%.0f', full)) end
  local wait = math.ceil(opens - now)
  if claims then
    wait = math.min(wait, LONGEST_CLAIM)
    redis.call('HSET', KEYS[1], 'claimant', who, 'claimed', string.format('%.0f', now + wait + CLAIM_GRACE))
  end
  return wait
end
if asked == 'take' and is_mine then redis.call('HDEL', KEYS[1], 'claimed') end
if asked == 'pause' then paused = math.max(paused, now + math.min(pause, LONGEST_PAUSE)) end
if paused > 0 then keep('paused', paused) end
local since = math.min(now, math.max(now - waited, paused, opened))
for i = 1, paces do
  local interval, tolerance, cost = tonumber(ARGV[4 * i + 1]), tonumber(ARGV[4 * i + 2]), tonumber(ARGV[4 * i + 4])
  if asked == 'take' then
    free[i] = math.max(free[i], since, now - tolerance) + cost * interval
  elseif asked == 'correct' then
    free[i] = math.max(free[i], now) + cost * interval
  end
  keep('free:' .. i, free[i])
  keep('each:' .. i, interval)
  idle = math.max(idle, free[i] + tolerance)
end
redis.call('HSET', KEYS[1], unpack(state))
for i = 2, #KEYS do
  local seconds, amount = tonumber(ARGV[first + 3 * i - 4]), tonumber(ARGV[first + 3 * i - 3])
  if asked ~= 'pause' and amount > 0 then
    local from, _, taken = entry(redis.call('LINDEX', KEYS[i], 0))
    if from and redis.call('LLEN', KEYS[i]) >= EXACT and now - from < seconds / PART then
      redis.call('LSET', KEYS[i], 0, string.format('%.0f %.0f %.17g', from, now, taken + amount))
    else
      redis.call('LPUSH', KEYS[i], string.format('%.0f %.0f %.17g', now, now, amount))
    end
  end
  while asked == 'correct' and amount < 0 do
    local from, to, taken = entry(redis.call('RPOP', KEYS[i]))
    if not from then break end
    local part = math.min(taken, -amount)
    amount = amount + part
    if taken > part then redis.call('RPUSH', KEYS[i], string.format('%.0f %.0f %.17g', from, to, taken - part)) end
  end
  redis.call('PEXPIRE', KEYS[i], math.ceil(seconds / 1000) + 1000)
  idle = math.max(idle, now + seconds)
end
redis.call('PEXPIRE', KEYS[1], math.ceil((idle - now) / 1000) + 1000)
return 0
"""
)


class RedisGate:
    """A `opero.core.limits.line.Gate` on a server. A server that fails is left alone for a while."""

    is_instant = False

    def __init__(self, name: str, rates: Rates, url: str) -> None:
        self._url = url
        # The braces keep all of it on one node of a cluster.
        self._server: Server | None = None
        self._key = f"opero:limit:{{{name}}}"
        self.change(rates)

    def change(self, rates: Rates) -> None:
        self._rates = rates
        self._keys = [self._key, *(f"{self._key}:{place}" for place in range(len(rates.quotas)))]

    def perform(self, requests: Sequence[Request]) -> list[Any]:
        try:
            # No cached_property, whose lock a fork would leave locked.
            server = self._server = self._server or server_at(self._url)
        except Exception as error:  # noqa: BLE001 - no redis-py: it costs the sharing and not the call
            return [error] * len(requests)
        reason = server.rest.reason()
        if reason is not None:
            return [reason] * len(requests)
        try:
            return [self._answer(server, request) for request in requests]
        except Exception as error:  # noqa: BLE001 - as above
            server.failed(error)
            return [error] * len(requests)

    def _answer(self, server: Server, request: Request) -> float:
        asked = "take" if request.takes else "pause" if request.pause else "correct"
        paces, quotas, amounts, most = self._rates.paces, self._rates.quotas, request.amounts, self._rates.most
        arguments: list[Any] = [asked, request.pause * 1e6, min(request.waited, 1e6) * 1e6, len(paces)]
        for pace in paces:
            units = max(1.0, most[pace.name])
            arguments += [pace.interval * 1e6, pace.tolerance * 1e6, units, amounts[pace.name]]
        for quota in quotas:
            arguments += [quota.units, quota.seconds * 1e6, amounts[quota.name]]
        arguments += [request.who, int(request.claims)]
        microseconds: int = server.script(_SCRIPT)(self._keys, arguments)
        server.rest.end()
        return min(microseconds / 1e6, LONGEST_PAUSE + max([quota.seconds * 2 for quota in quotas], default=0.0))
