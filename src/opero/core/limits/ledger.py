"""What was taken of a limit, and when it lets the next call start: the arithmetic, without any wait.

A pace is the "generic cell rate algorithm" (ITU-T I.371): each start has a slot of its own, ``cost * interval`` after
the one before it, and may begin a bounded time after its slot, so that what passed while callers could not look is made
up for. The redis script says the same in Lua.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opero.core.limits.rates import Quota, Rates

# Rounding must not make a slot that has come look as if it had not.
EARLY = 1e-9
# A quota remembers so many starts one by one; beyond that, those within a small part of its time are one entry, which
# counts until its last start is old enough: never too few, and for less than a hundredth of the time too many.
EXACT_ENTRIES, FINEST_PART = 128, 128
# No shared state may close a limit for longer: it could be a fault, or planted.
LONGEST_PAUSE = 3600.0
# The most of one entry that can be true.
_MOST = 1e15
# Who claims the next slot has to ask again by then, or a little after the slot has come, or loses the claim.
LONGEST_CLAIM, CLAIM_GRACE = 1.0, 0.02
_HEADER = struct.Struct("<3d8s2H")
_PAIR = struct.Struct("<2d")
_ENTRY = struct.Struct("<3d")
_LENGTH = struct.Struct("<H")


class Request:
    """Asked of a limit that processes share: a slot, a pause, or a correction of what was taken.

    Attributes:
        amounts: What it costs.
        waited: For how long it has waited.
        takes: Whether a slot is to be taken.
        pause: Seconds in which nothing is to start.
        who: The process that asks.
        claims: Whether the next slot has to be its own, since others were faster again and again.
    """

    __slots__ = ("amounts", "claims", "pause", "takes", "waited", "who")

    def __init__(
        self,
        amounts: Sequence[float] = (1.0,),
        *,
        waited: float = 0.0,
        takes: bool = True,
        pause: float = 0.0,
        who: bytes = bytes(8),
        claims: bool = False,
    ) -> None:
        self.amounts = amounts
        self.waited = waited
        self.takes = takes
        self.pause = pause
        self.who = who
        self.claims = claims


class _Log:
    """What was taken of one quota within its time: entries of a first moment, a last one, and the amount."""

    __slots__ = ("entries", "name", "quota", "seconds", "units", "used")

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.name, self.units, self.seconds = quota
        self.entries: deque[tuple[float, float, float]] = deque()
        self.used = 0.0

    def opens_at(self, now: float, amount: float) -> float:
        """When so much more would fit."""
        self.forget_old(now)
        excess = self.used + amount - self.units
        if excess <= EARLY:
            return -math.inf
        for _, last, taken in self.entries:
            excess -= taken
            if excess <= EARLY:
                return last + self.seconds
        # Those that would start before it fill the quota again, maybe more than once.
        return now + self.seconds * math.ceil(excess / self.units)

    def add(self, now: float, amount: float) -> None:
        entries = self.entries
        if not amount:
            return
        self.used += amount
        if len(entries) >= EXACT_ENTRIES and now - entries[-1][0] < self.seconds / FINEST_PART:
            first, _, taken = entries.pop()
            entries.append((first, now, taken + amount))
        else:
            entries.append((now, now, amount))

    def give_back(self, amount: float) -> None:
        """From the oldest, so that no window looks emptier than it is."""
        while amount > 0 and self.entries:
            first, last, taken = self.entries.popleft()
            part = min(taken, amount)
            amount -= part
            self.used -= part
            if taken > part:
                self.entries.appendleft((first, last, taken - part))

    def forget_old(self, now: float) -> None:
        entries = self.entries
        while entries and entries[0][1] + self.seconds <= now:
            self.used -= entries.popleft()[2]
        if not entries:
            self.used = 0.0


class Ledger:
    """The state of one limit."""

    __slots__ = ("claimed_by", "claimed_until", "free_at", "is_changed", "logs", "opened_at", "paused_until", "rates")

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        rates = self.rates
        self.free_at = [-math.inf] * len(rates.paces)
        self.logs = [_Log(quota) for quota in rates.quotas]
        self.paused_until = self.claimed_until = -math.inf
        self.claimed_by = bytes(8)
        self.is_changed = False
        # When a quota that was full let somebody through again: what passed before was not missed.
        self.opened_at = -math.inf

    def opens_at(self, now: float, amounts: Sequence[float], ahead: Sequence[float] = ()) -> float:
        """When a call that costs so much may start, after others that cost ``ahead`` together."""
        moment = max(self.paused_until, *self.free_at) if self.free_at else self.paused_until
        if ahead:
            for pace, free_at in zip(self.rates.paces, self.free_at, strict=True):
                moment = max(moment, max(now, free_at, self.paused_until) + ahead[pace.name] * pace.interval)
        for log in self.logs:
            amount = amounts[log.name]
            moment = max(moment, log.opens_at(now, amount + ahead[log.name] if ahead else amount))
        return moment

    def ask(self, now: float, waited: float, amounts: Sequence[float]) -> float:
        """Take a slot, and give 0; or give the seconds until one comes.

        ``waited``: for how long the caller has been in line. So much of what has passed it may make up for.
        """
        if self.is_open(now, amounts):
            self.take(now, waited, amounts)
            return 0.0
        return self.wait(now, amounts)

    def wait(self, now: float, amounts: Sequence[float]) -> float:
        """Seconds until a slot comes that is not there yet."""
        opens_at = self.opens_at(now, amounts)
        if self.logs:
            self.opened_at = max(self.opened_at, opens_at)
        # Rounding must not make a refusal look like a slot.
        return max(2 * EARLY, opens_at - now)

    def is_open(self, now: float, amounts: Sequence[float]) -> bool:
        late = now + EARLY
        if late < self.paused_until:
            return False
        for free_at in self.free_at:
            if late < free_at:
                return False
        for log in self.logs:
            entries = log.entries
            if entries and entries[0][1] + log.seconds <= now:
                log.forget_old(now)
            if log.used + amounts[log.name] > log.units + EARLY:
                return False
        return True

    def take(self, now: float, waited: float, amounts: Sequence[float]) -> None:
        """Take a slot, whether it has come or not."""
        free_at = self.free_at
        if waited:
            self._take_late(now, waited, amounts)
        else:
            for place, (name, interval, _) in enumerate(self.rates.paces):
                free_at[place] = max(free_at[place], now) + amounts[name] * interval
        for log in self.logs:
            log.add(now, amounts[log.name])

    def _take_late(self, now: float, waited: float, amounts: Sequence[float]) -> None:
        """The paces of a slot that was waited for: what has passed meanwhile is made up for, within bounds."""
        since = max(now - waited, self.paused_until, self.opened_at)
        for place, pace in enumerate(self.rates.paces):
            slot = now if since >= now else max(since, now - pace.tolerance)
            self.free_at[place] = max(slot, self.free_at[place]) + amounts[pace.name] * pace.interval

    def correct(self, now: float, amounts: Sequence[float]) -> None:
        """A call has cost so much more than it had taken, or less."""
        for place, pace in enumerate(self.rates.paces):
            self.free_at[place] = max(self.free_at[place], now) + amounts[pace.name] * pace.interval
        for log in self.logs:
            amount = amounts[log.name]
            if amount > 0:
                log.add(now, amount)
            else:
                log.give_back(-amount)

    def pause(self, until: float) -> None:
        self.paused_until = max(self.paused_until, until)

    def idle_from(self, now: float) -> float:
        """From when on a new ledger would not behave any differently."""
        ends = [log.entries[-1][1] + log.seconds for log in self.logs if log.entries]
        # Those who have waited could make up for what passed before.
        ends += [free_at + pace.tolerance for free_at, pace in zip(self.free_at, self.rates.paces, strict=True)]
        return max([now, self.paused_until, *ends])

    def change(self, now: float, rates: Rates) -> None:
        """Go on at other rates."""
        for place, (old, new) in enumerate(zip(self.rates.paces, rates.paces, strict=False)):
            if self.free_at[place] > now:
                self.free_at[place] = now + (self.free_at[place] - now) * new.interval / old.interval
        self.free_at = [*self.free_at[: len(rates.paces)], *[now] * (len(rates.paces) - len(self.rates.paces))]
        kept = {log.name: log for log in sorted(self.logs, key=lambda log: log.seconds)}
        self.logs = [_Log(quota) for quota in rates.quotas]
        for log in self.logs:
            if log.name in kept:
                log.entries, log.used = deque(kept[log.name].entries), kept[log.name].used
        self.opened_at = -math.inf
        self.rates = rates

    # Of processes that share it

    def perform(self, request: Request, now: float) -> float:
        """Do what a process asks for: 0, or seconds until it may ask for a slot again."""
        wait = 0.0
        if request.pause:
            self.pause(now + min(request.pause, LONGEST_PAUSE))
        elif not request.takes:
            self.correct(now, request.amounts)
        elif now < self.claimed_until and request.who != self.claimed_by:
            # Others have passed it again and again.
            return max(self.opens_at(now, request.amounts), self.claimed_until) - now
        else:
            wait = self.ask(now, request.waited, request.amounts)
            if wait and request.claims:
                wait = min(wait, LONGEST_CLAIM)
                self.claimed_by, self.claimed_until = request.who, now + wait + CLAIM_GRACE
                self.is_changed = True
            elif request.who == self.claimed_by:
                self.claimed_until = -math.inf
        self.is_changed = self.is_changed or not wait
        return wait

    def pack(self, now: float) -> bytes:
        counts = len(self.free_at), len(self.logs)
        parts = [_HEADER.pack(now, self.paused_until, self.claimed_until, self.claimed_by, *counts)]
        parts += [
            _PAIR.pack(free_at, pace.interval) for free_at, pace in zip(self.free_at, self.rates.paces, strict=True)
        ]
        for log in self.logs:
            parts += [_PAIR.pack(log.units, log.seconds), _LENGTH.pack(len(log.entries))]
            parts += [_ENTRY.pack(*entry) for entry in log.entries]
        return b"".join(parts)

    @classmethod
    def unpack(cls, data: bytes, rates: Rates, now: float) -> Ledger:
        """What a file says, as far as it can be true: of another start of the machine, and of damage, nothing is."""
        ledger = cls(rates)
        try:
            ledger._read(data, now)
        except (struct.error, ValueError, IndexError):
            return cls(rates)
        return ledger

    def _read(self, data: bytes, now: float) -> None:
        written_at, paused_until, claimed_until, claimed_by, paces, logs = _HEADER.unpack_from(data)
        if not 0 <= written_at <= now + EARLY:
            raise ValueError
        if paused_until <= written_at + LONGEST_PAUSE:
            self.paused_until = paused_until
        if claimed_until <= written_at + LONGEST_CLAIM + CLAIM_GRACE:
            self.claimed_by, self.claimed_until = claimed_by, claimed_until
        offset = _HEADER.size
        for place in range(paces):
            free_at, interval = _PAIR.unpack_from(data, offset)
            offset += _PAIR.size
            if place < len(self.free_at) and free_at > written_at and interval > 0:
                # Taken at a slower rate, it is no more than as much at this one.
                pace = self.rates.paces[place]
                most = max(1.0, self.rates.most[pace.name]) * pace.interval + pace.tolerance
                self.free_at[place] = written_at + min(most, (free_at - written_at) * pace.interval / interval)
            elif place < len(self.free_at) and free_at <= written_at:
                self.free_at[place] = free_at
        left = list(self.logs)
        for _ in range(logs):
            count, seconds = _PAIR.unpack_from(data, offset)
            (length,) = _LENGTH.unpack_from(data, offset + _PAIR.size)
            offset += _PAIR.size + _LENGTH.size
            log = next((log for log in left if (log.units, log.seconds) == (count, seconds)), None)
            entries = [_ENTRY.unpack_from(data, offset + n * _ENTRY.size) for n in range(length)]
            offset += length * _ENTRY.size
            if log is None:
                continue
            left.remove(log)
            if all(0 <= first <= last <= written_at and 0 < amount <= _MOST for first, last, amount in entries):
                log.entries, log.used = deque(entries), sum(amount for *_, amount in entries)
