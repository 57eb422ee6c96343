"""What was taken of a limit, and when it lets the next call start: the arithmetic, without any wait.

A limit is measured by meters, one for each of its rates. All of a ledger can be packed, for processes that share it.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections import deque
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from opero.core.limits.rates import EARLY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asynciolimiter import Limiter

    from opero.core.limits.rates import Rates

    # Of the bytes that processes share, and the time, it makes seconds until a slot comes (0: it was done), the bytes
    # to be kept in their place, if any, and the seconds for which they tell something.
    Change = Callable[[bytes, float], tuple[float, bytes, float]]

# Who comes so late after a slot has missed it as one that has waited may have.
_LATE_SECONDS = 0.04
# A quota remembers so many starts one by one; beyond that, those within a small part of its time are one entry, which
# counts until its last start is old enough: never too few, and for less than a hundredth of the time too many.
_EXACT_ENTRIES, _PARTS = 128, 128
# No shared state may close a limit for longer: it could be a fault, or planted.
LONGEST_PAUSE = 3600.0
# The most of one entry that can be true.
_MOST = 1e15
# Who claims the next slot has to ask again by then, or a little after the slot has come, or loses the claim.
_LONGEST_CLAIM, _CLAIM_GRACE = 1.0, 0.02
# How many numbers of a packed ledger stand before those of its meters.
_HEAD = 5


class PaceMeter:
    """What is known of a pace, by the "generic cell rate algorithm" (ITU-T I.371).

    Each start has a slot of its own, ``cost * interval`` after the one before it, and may begin a bounded time after
    its slot, so that what passed while callers could not look is made up for.
    """

    __slots__ = ("free_at", "interval", "longest", "make_limiter", "name", "short", "tolerance")

    # By which it is told apart from a quota of the same name.
    seconds = 0.0

    def __init__(self, name: int, interval: float, burst: int, most: float) -> None:
        """``most`` is what one call may cost."""
        self.name, self.interval = name, interval
        self.make_limiter = partial(_pacing()[0], 1 / self.interval, max_burst=burst)
        # How many seconds ahead of the pace a start may be; and that of one who has not waited.
        self.tolerance = (burst - 1) * self.interval
        self.short = min(self.tolerance, _LATE_SECONDS)
        self.longest = max(1.0, most) * self.interval + self.tolerance
        self.free_at = 0.0

    def has_room(self, now: float, _amount: float) -> bool:
        return now + EARLY >= self.free_at

    def opens_at(self, now: float, _amount: float, ahead: float) -> float:
        """When a call may start, after others that cost ``ahead``; what it costs itself only others wait for."""
        return max(now, self.free_at) + ahead * self.interval

    def take(self, now: float, amount: float, is_late: bool, _age: float) -> None:  # noqa: FBT001 - a loop calls it
        is_made_up = is_late or now - self.free_at <= self.short
        slot = max(self.free_at, now - self.tolerance) if is_made_up else now
        if is_late and amount == 1:
            self.free_at = _next_slot(slot, self.make_limiter())
        else:
            self.free_at = slot + amount * self.interval

    def idle_from(self) -> float:
        # Those who have waited could make up for what passed before.
        return self.free_at + self.tolerance

    def state(self) -> list[float]:
        return [self.free_at, self.interval]

    def go_on_from(self, state: Sequence[float], now: float) -> None:
        free_at, interval = state
        if interval <= 0:
            raise ValueError
        # As much as was taken ahead, at this rate.
        ahead = (free_at - now) * self.interval / interval
        self.free_at = free_at if ahead <= 0 else now + min(self.longest, ahead)


class QuotaMeter:
    """What was taken of a quota within its time: entries of a moment, and the amount."""

    __slots__ = ("entries", "joins_until", "name", "seconds", "units", "used")

    def __init__(self, name: int, units: float, seconds: float) -> None:
        self.name, self.units, self.seconds = name, units, seconds
        self.entries: deque[list[float]] = deque()
        # Until when more is added to the last entry; it follows from that one.
        self.joins_until = self.used = 0.0

    def has_room(self, now: float, amount: float) -> bool:
        entries = self.entries
        if self.used + amount > self.units:
            while entries and entries[0][0] + self.seconds <= now:
                self.used -= entries.popleft()[1]
            if not entries:
                self.used = 0.0
            # Who was let in at a higher rate takes all that there is at this one.
            amount = min(amount, self.units)
        return self.used + amount <= self.units + EARLY

    def opens_at(self, now: float, amount: float, ahead: float) -> float:
        """When so much more would fit."""
        excess = self.used + min(amount, self.units) + ahead - self.units
        if excess <= EARLY:
            return now
        for moment, taken in self.entries:
            excess -= taken
            if excess <= EARLY:
                return moment + self.seconds
        # Those that would start before it fill the quota again, maybe more than once.
        return now + self.seconds * math.ceil(excess / self.units)

    def take(self, now: float, amount: float, _is_late: bool, age: float) -> None:  # noqa: FBT001 - as of a pace
        entries = self.entries
        if amount > 0 and now < self.joins_until and entries:
            entries[-1] = [now, entries[-1][1] + amount]
        elif amount > 0:
            entries.append([now, amount])
            self._end_part(now)
        self.used += max(0.0, amount)
        # What is given back was taken until then: what is too old to count makes room for nothing.
        for entry in reversed(entries) if amount < 0 else ():
            if entry[0] <= now - age + EARLY:
                back = min(entry[1], -amount)
                entry[1] -= back
                self.used -= back
                amount += back

    def _end_part(self, now: float) -> None:
        """Where there are many entries, the last one is that of all starts in this part of the time."""
        if len(self.entries) > _EXACT_ENTRIES:
            part = self.seconds / _PARTS
            self.joins_until = (now // part + 1) * part

    def idle_from(self) -> float:
        return self.entries[-1][0] + self.seconds if self.entries else 0.0

    def state(self) -> list[float]:
        return [number for entry in self.entries for number in entry]

    def go_on_from(self, state: Sequence[float], now: float) -> None:
        moments, amounts = state[::2], state[1::2]
        if max(moments, default=0) > now or not 0 <= min(amounts, default=0) <= max(amounts, default=0) <= _MOST:
            raise ValueError
        self.entries = deque([moment, amount] for moment, amount in zip(moments, amounts, strict=True))
        self.used = sum(amounts)
        self._end_part(moments[-1] if moments else 0.0)


class Ledger:
    """The state of one limit."""

    __slots__ = ("claimed_by", "claimed_until", "meters", "only_pace", "paces", "paused_until", "rates")

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.paces = [PaceMeter(*pace, self.rates.most[pace[0]]) for pace in self.rates.paces]
        self.meters: list[PaceMeter | QuotaMeter] = [*self.paces, *[QuotaMeter(*quota) for quota in self.rates.quotas]]
        # None where there is more to look at.
        self.only_pace = self.paces[0] if len(self.paces) == len(self.meters) == 1 else None
        self.paused_until = self.claimed_until = self.claimed_by = 0.0

    def opens_at(self, now: float, amounts: Sequence[float], ahead: Sequence[float] | None = None) -> float:
        """When a call that costs so much may start, after others that cost ``ahead`` together."""
        ahead = ahead or [0.0] * len(amounts)
        moments = [meter.opens_at(now, amounts[meter.name], ahead[meter.name]) for meter in self.meters]
        return max([self.paused_until, *moments])

    def is_open(self, now: float, amounts: Sequence[float]) -> bool:
        for meter in self.meters:
            if not meter.has_room(now, amounts[meter.name]):
                return False
        return now + EARLY >= self.paused_until

    def wait(self, now: float, amounts: Sequence[float]) -> float:
        """Seconds until a slot comes; 0 if one is there."""
        # Rounding must not make a refusal look like a slot.
        return 0.0 if self.is_open(now, amounts) else max(2 * EARLY, self.opens_at(now, amounts) - now)

    def take(self, now: float, amounts: Sequence[float], *, is_late: bool = False, age: float = 0.0) -> None:
        """Take a slot, whether it has come or not; or, with amounts below 0, give some back that is of such an age.

        ``is_late``: the caller could not look when the slot came, and may make up for what has passed.
        """
        for meter in self.meters:
            meter.take(now, amounts[meter.name], is_late, age)

    def pause(self, until: float) -> None:
        self.paused_until = max(self.paused_until, until)
        for pace in self.paces:
            # Nobody makes up for what has passed meanwhile.
            pace.free_at = max(pace.free_at, until)

    def idle_from(self, now: float) -> float:
        """From when on a new ledger would not behave any differently."""
        return max([now, self.paused_until, *[meter.idle_from() for meter in self.meters]])

    def change(self, now: float, rates: Rates) -> None:
        """Go on at other rates."""
        data, paused_until, self.rates = self.pack(now), self.paused_until, rates
        self.forget()
        self.unpack(data, now)
        self.pause(paused_until)

    # Of processes that share it

    def ask(self, now: float, amounts: Sequence[float], who: float, *, is_late: bool, claims: bool) -> float:
        """Take a slot, and give 0; or give the seconds until ``who`` may ask again.

        ``claims``: whether the next slot has to be its own, since others were faster again and again.
        """
        wait = self.wait(now, amounts)
        if now < self.claimed_until and who != self.claimed_by:
            return max(wait, self.claimed_until - now)
        if not wait:
            self.take(now, amounts, is_late=is_late)
            if who == self.claimed_by:
                self.claimed_until = 0.0
        elif claims:
            wait = min(wait, _LONGEST_CLAIM)
            self.claimed_by, self.claimed_until = who, now + wait + _CLAIM_GRACE
        return wait

    def pack(self, now: float) -> bytes:
        """All of it as numbers: from when on it tells nothing any more, when it was written, and the rest."""
        numbers = [self.idle_from(now), now, self.paused_until, self.claimed_until, self.claimed_by]
        for meter in self.meters:
            state = meter.state()
            numbers += [meter.name, meter.seconds, len(state), *state]
        return struct.pack(f"<{len(numbers)}d", *numbers)

    def unpack(self, data: bytes, now: float) -> None:
        """Take over what was written, maybe at other rates, as far as there are such meters.

        It raises ValueError if that cannot be true; of another start of the machine nothing is.
        """
        numbers = struct.unpack(f"<{len(data) // 8}d", data)
        _, written_at, paused_until, claimed_until, claimed_by = numbers[:_HEAD]
        if not (0 <= written_at <= now and math.isfinite(sum(numbers))):
            raise ValueError
        if paused_until <= written_at + LONGEST_PAUSE:
            self.paused_until = paused_until
        if claimed_until <= written_at + _LONGEST_CLAIM + _CLAIM_GRACE:
            self.claimed_by, self.claimed_until = claimed_by, claimed_until
        state, end = {}, _HEAD
        while end < len(numbers):
            name, seconds, count = numbers[end : end + 3]
            if count < 0:
                raise ValueError
            begin, end = end + 3, end + 3 + int(count)
            state[name, seconds] = numbers[begin:end]
        for meter in self.meters:
            if (meter.name, meter.seconds) in state:
                meter.go_on_from(state[meter.name, meter.seconds], written_at)


def changed(
    rates: Rates, act: Callable[[Ledger, float], float | None], data: bytes, now: float
) -> tuple[float, bytes, float]:
    """Do something with the ledger that processes share, as a `Change`.

    ``act`` gives 0 or None if it has changed the ledger, or seconds until a slot comes.
    """
    ledger = Ledger(rates)
    try:
        ledger.unpack(data, now)
    except (struct.error, ValueError, OverflowError):
        ledger.forget()
    claimed_until = ledger.claimed_until
    wait = act(ledger, now) or 0.0
    if wait and ledger.claimed_until == claimed_until:
        return wait, b"", 0.0
    return wait, ledger.pack(now), ledger.idle_from(now) - now


def is_over(data: bytes, now: float) -> bool:
    """Whether a state tells nothing any more."""
    if len(data) < _HEAD * 8:
        return True
    idle_from, written_at = struct.unpack_from("<2d", data)
    return not written_at <= now < idle_from


# asynciolimiter (1.2.0) says when the next one in line gets its slot. Its `Limiter` belongs to one event loop: used
# from a second loop, thread or forked child it hangs or limits nothing, and it grants no more than one slot to each
# look that comes late. So it is stepped on a stand-in for a loop, whose time is the slot's. Delete the stand-in when a
# release of asynciolimiter can be shared.


@lru_cache(maxsize=1)
def _pacing() -> tuple[Any, ...]:
    # Not with this module, since it imports asyncio, and kept: when a program ends nothing can be imported. The public
    # way to get the running loop raises where there is none.
    from asyncio import _get_running_loop, _set_running_loop

    from asynciolimiter import Limiter

    return Limiter, _get_running_loop, _set_running_loop


def _next_slot(slot: float, limiter: Limiter) -> float:
    _, get_running_loop, set_running_loop = _pacing()
    slots: list[float] = []
    # All that it asks of a running event loop: a time, and one timer.
    loop: Any = SimpleNamespace(time=lambda: slot, call_at=lambda when, _callback: slots.append(when))
    outer = get_running_loop()
    try:
        set_running_loop(loop)
        with contextlib.suppress(StopIteration):
            limiter.wait().send(None)
    finally:
        set_running_loop(outer)
    return slots[0]
