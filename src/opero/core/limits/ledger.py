"""What was taken of a limit, and when it lets the next call start: the arithmetic, without any wait.

A pace is the "generic cell rate algorithm" (ITU-T I.371): each start has a slot of its own, ``cost * interval`` after
the one before it, and may begin a bounded time after its slot, so that what passed while callers could not look is made
up for.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from opero.core.limits.rates import Quota, Rates

# Rounding must not make a slot that has come look as if it had not.
EARLY = 1e-9
# A quota remembers so many starts one by one; beyond that, those within a small part of its time are one entry, which
# counts until its last start is old enough: never too few, and for less than a hundredth of the time too many.
_EXACT_ENTRIES, _PARTS = 128, 128
# No shared state may close a limit for longer: it could be a fault, or planted.
LONGEST_PAUSE = 3600.0
# The most of one entry that can be true.
_MOST = 1e15
# Who claims the next slot has to ask again by then, or a little after the slot has come, or loses the claim.
_LONGEST_CLAIM, _CLAIM_GRACE = 1.0, 0.02
# What processes know of a server's time may differ by so much.
_SKEW = 0.001


class _Log:
    """What was taken of one quota within its time: entries of a moment, and the amount."""

    __slots__ = ("entries", "name", "part", "seconds", "units", "used")

    def __init__(self, quota: Quota) -> None:
        self.name, self.units, self.seconds = quota
        self.entries: deque[list[float]] = deque()
        self.part = self.seconds / _PARTS
        self.used = 0.0

    def forget_old(self, now: float) -> None:
        while self.entries and self.entries[0][0] + self.seconds <= now:
            self.used -= self.entries.popleft()[1]
        if not self.entries:
            self.used = 0.0

    def opens_at(self, now: float, amount: float) -> float:
        """When so much more would fit."""
        self.forget_old(now)
        excess = self.used + amount - self.units
        if excess <= EARLY:
            return -math.inf
        for moment, taken in self.entries:
            excess -= taken
            if excess <= EARLY:
                return moment + self.seconds
        # Those that would start before it fill the quota again, maybe more than once.
        return now + self.seconds * math.ceil(excess / self.units)

    def add(self, now: float, amount: float) -> None:
        entries, part = self.entries, self.part
        if amount <= 0:
            self._give_back(-amount)
        elif len(entries) >= _EXACT_ENTRIES and entries[-1][0] // part == now // part:
            entries[-1][0] = now
            entries[-1][1] += amount
            self.used += amount
        else:
            entries.append([now, amount])
            self.used += amount

    def _give_back(self, amount: float) -> None:
        """From the oldest, so that no window looks emptier than it is."""
        while amount > 0 and self.entries:
            oldest = self.entries[0]
            back = min(oldest[1], amount)
            oldest[1] -= back
            amount -= back
            self.used -= back
            if not oldest[1]:
                self.entries.popleft()


class Ledger:
    """The state of one limit."""

    __slots__ = ("claimed_by", "claimed_until", "free_at", "interval", "logs", "paused_until", "rates")

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.free_at = [0.0] * len(self.rates.paces)
        self.logs = [_Log(quota) for quota in self.rates.quotas]
        # Of the only pace; 0 where there is more to look at.
        self.interval = self.rates.paces[0].interval if len(self.free_at) == 1 and not self.logs else 0.0
        self.paused_until = self.claimed_until = self.claimed_by = 0.0

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

    def is_open(self, now: float, amounts: Sequence[float]) -> bool:
        late = now + EARLY
        if late < self.paused_until:
            return False
        for free_at in self.free_at:
            if late < free_at:
                return False
        for log in self.logs:
            if log.entries and log.entries[0][0] + log.seconds <= now:
                log.forget_old(now)
            if log.used + amounts[log.name] > log.units + EARLY:
                return False
        return True

    def wait(self, now: float, amounts: Sequence[float]) -> float:
        """Seconds until a slot comes that is not there yet."""
        # Rounding must not make a refusal look like a slot.
        return max(2 * EARLY, self.opens_at(now, amounts) - now)

    def take(self, now: float, amounts: Sequence[float], *, is_late: bool = False) -> None:
        """Take a slot, whether it has come or not; or, with amounts below 0, give some back.

        ``is_late``: the caller could not look when the slot came, and may make up for what has passed.
        """
        if is_late:
            self._take_late(now, amounts)
        else:
            free_at = self.free_at
            for place, (name, interval, _) in enumerate(self.rates.paces):
                slot = free_at[place]
                free_at[place] = max(slot, now) + amounts[name] * interval
        for log in self.logs:
            log.add(now, amounts[log.name])

    def _take_late(self, now: float, amounts: Sequence[float]) -> None:
        for place, pace in enumerate(self.rates.paces):
            slot = max(self.free_at[place], min(now, self.paused_until), now - pace.tolerance)
            self.free_at[place] = slot + amounts[pace.name] * pace.interval

    def pause(self, until: float) -> None:
        self.paused_until = max(self.paused_until, until)

    def idle_from(self, now: float) -> float:
        """From when on a new ledger would not behave any differently."""
        ends = [log.entries[-1][0] + log.seconds for log in self.logs if log.entries]
        # Those who have waited could make up for what passed before.
        ends += [free_at + pace.tolerance for free_at, pace in zip(self.free_at, self.rates.paces, strict=True)]
        return max([now, self.paused_until, *ends])

    def change(self, now: float, rates: Rates) -> None:
        """Go on at other rates."""
        paces = [(free_at, pace.interval) for free_at, pace in zip(self.free_at, self.rates.paces, strict=True)]
        entries = {(float(log.name), log.seconds): log.entries for log in self.logs}
        paused_until, self.rates = self.paused_until, rates
        self.forget()
        self.paused_until = paused_until
        self._go_on_from(now, paces, entries)

    def _go_on_from(
        self,
        now: float,
        paces: Iterable[tuple[float, float]],
        entries: Mapping[tuple[float, float], Iterable[Iterable[float]]],
    ) -> None:
        """Take over what was taken at rates of these intervals, and of quotas of these names and times."""
        for place, ((free_at, interval), pace) in enumerate(zip(paces, self.rates.paces, strict=False)):
            # As much as was taken ahead, at this rate.
            self.free_at[place] = free_at if free_at <= now else now + (free_at - now) * pace.interval / interval
        for log in self.logs:
            log.entries = deque(map(list, entries.get((log.name, log.seconds), ())))
            log.used = sum([amount for _, amount in log.entries])

    # Of processes that share it

    def ask(self, now: float, amounts: Sequence[float], who: float, *, is_late: bool, claims: bool) -> float:
        """Take a slot, and give 0; or give the seconds until ``who`` may ask again.

        ``claims``: whether the next slot has to be its own, since others were faster again and again.
        """
        is_kept = now < self.claimed_until and who != self.claimed_by
        if not is_kept and self.is_open(now, amounts):
            self.take(now, amounts, is_late=is_late)
            if who == self.claimed_by:
                self.claimed_until = 0.0
            return 0.0
        wait = self.wait(now, amounts)
        if is_kept:
            return max(wait, self.claimed_until - now)
        if claims:
            wait = min(wait, _LONGEST_CLAIM)
            self.claimed_by, self.claimed_until = who, now + wait + _CLAIM_GRACE
        return wait

    def pack(self, now: float) -> bytes:
        """All of it as numbers: from when on it tells nothing any more, when it was written, and the rest."""
        paces = zip(self.free_at, [pace.interval for pace in self.rates.paces], strict=True)
        times = [self.idle_from(now), now, self.paused_until, self.claimed_until, self.claimed_by]
        numbers = [*times, len(self.free_at), len(self.logs), *itertools.chain.from_iterable(paces)]
        for log in self.logs:
            numbers += [log.name, log.seconds, len(log.entries), *itertools.chain.from_iterable(log.entries)]
        return struct.pack(f"<{len(numbers)}d", *numbers)

    @classmethod
    def unpack(cls, data: bytes, rates: Rates, now: float) -> Self:
        """What others have written, as far as it can be true; of another start of the machine nothing is."""
        ledger = cls(rates)
        try:
            ledger._read(struct.unpack(f"<{len(data) // 8}d", data), now)
        except (struct.error, ValueError, OverflowError):
            return cls(rates)
        return ledger

    def _read(self, numbers: tuple[float, ...], now: float) -> None:
        _, written_at, paused_until, claimed_until, claimed_by, paces, logs = numbers[:_HEAD]
        if not (0 <= written_at <= now + _SKEW and math.isfinite(sum(numbers))):
            raise ValueError
        if paused_until <= written_at + LONGEST_PAUSE:
            self.paused_until = paused_until
        if claimed_until <= written_at + _LONGEST_CLAIM + _CLAIM_GRACE:
            self.claimed_by, self.claimed_until = claimed_by, claimed_until
        end = _HEAD + 2 * int(paces)
        intervals = numbers[_HEAD + 1 : end : 2]
        entries = {}
        for _ in range(int(logs)):
            name, seconds, count = numbers[end : end + 3]
            begin, end = end + 3, end + 3 + 2 * int(count)
            moments, amounts = numbers[begin:end:2], numbers[begin + 1 : end : 2]
            if count < 0 or max(moments, default=0) > written_at or not 0 <= min(amounts, default=0) <= _MOST:
                raise ValueError
            entries[name, seconds] = list(zip(moments, amounts, strict=True))
        if min(intervals, default=1) <= 0:
            raise ValueError
        self._go_on_from(written_at, zip(numbers[_HEAD:end:2], intervals, strict=False), entries)
        for place, pace in enumerate(self.rates.paces):
            most = max(1.0, self.rates.most[pace.name]) * pace.interval + pace.tolerance
            self.free_at[place] = min(self.free_at[place], written_at + most)


# How many numbers stand before those of the paces, and the first two of them.
_HEAD, _STAMPS = 7, struct.Struct("<2d")


# Of the bytes that processes share, and the time, it makes seconds until a slot comes (0: it was done), the bytes to be
# kept in their place, if any, and the seconds for which they tell something.
Change = Callable[[bytes, float], tuple[float, bytes, float]]


def changed(rates: Rates, act: Callable[[Ledger, float], float | None], data: bytes, now: float) -> Any:
    """Do something with the ledger that processes share, as a `Change`.

    ``act`` gives 0 or None if it has changed the ledger, or seconds until a slot comes.
    """
    ledger = Ledger.unpack(data, rates, now)
    claimed_until = ledger.claimed_until
    wait = act(ledger, now) or 0.0
    if wait and ledger.claimed_until == claimed_until:
        return wait, b"", 0.0
    return wait, ledger.pack(now), ledger.idle_from(now) - now


def is_over(data: bytes, now: float) -> bool:
    """Whether a state tells nothing any more."""
    if len(data) < _STAMPS.size:
        return True
    idle_from, written_at = _STAMPS.unpack_from(data)
    return not written_at <= now < idle_from
