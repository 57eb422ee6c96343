"""When the next slot of a pace comes: asynciolimiter's, made to be shared by threads, tasks, event loops and processes.

asynciolimiter (1.2.0) says when the next one in line gets its slot. Its `Limiter` belongs to one event loop: used from
a second loop, thread or forked child it hangs or limits nothing, and it grants no more than one slot to each look that
comes late. So it is stepped on a stand-in for a loop, whose time is the slot's. Delete the stand-in when a release of
asynciolimiter can be shared.
"""

from __future__ import annotations

import contextlib

# The public way to get the running loop raises where there is none.
from asyncio import _get_running_loop, _set_running_loop
from typing import TYPE_CHECKING

from asynciolimiter import Limiter

from opero.core.limits.rates import EARLY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opero.core.limits.rates import Pace


class PaceMeter:
    """What is known of a pace, by the "generic cell rate algorithm" (ITU-T I.371).

    Each start has a slot of its own, ``cost * interval`` after the one before it, and may begin a bounded time after
    its slot, so that what passed while callers could not look is made up for.
    """

    __slots__ = ("burst", "free_at", "interval", "key", "longest", "name", "tolerance")

    def __init__(self, pace: Pace, most: float) -> None:
        """``most`` is what one call may cost."""
        self.name, self.interval, self.burst = pace
        self.key = self.name, 0.0
        self.tolerance = pace.tolerance
        self.longest = max(1.0, most) * self.interval + self.tolerance
        self.free_at = 0.0

    def has_room(self, now: float, _amount: float) -> bool:
        return now + EARLY >= self.free_at

    def opens_at(self, now: float, _amount: float, ahead: float) -> float:
        """When a call may start, after others that cost ``ahead``; what it costs itself only others wait for."""
        return max(now, self.free_at) + ahead * self.interval

    def take(self, now: float, amount: float) -> None:
        if self.free_at > now:
            self.free_at += amount * self.interval
        else:
            self.free_at = now + amount * self.interval

    def take_late(self, now: float, amount: float) -> None:
        slot = max(self.free_at, now - self.tolerance)
        self.free_at = _slot_after(slot, self) if amount == 1 else slot + amount * self.interval

    def idle_from(self) -> float:
        # Those who have waited could make up for what passed before.
        return self.free_at + self.tolerance

    def state(self) -> Sequence[float]:
        return self.free_at, self.interval

    def go_on_from(self, state: Sequence[float], now: float) -> None:
        free_at, interval = state
        if interval <= 0:
            raise ValueError
        # As much as was taken ahead, at this rate.
        ahead = (free_at - now) * self.interval / interval
        self.free_at = free_at if ahead <= 0 else now + min(self.longest, ahead)


class _Moment:
    """All that asynciolimiter asks of a running event loop: a time, and one timer."""

    def __init__(self, now: float) -> None:
        self._now = self.next_slot = now

    def time(self) -> float:
        return self._now

    def call_at(self, when: float, _callback: Callable[[], None]) -> _Moment:
        self.next_slot = when
        return self


def _slot_after(slot: float, pace: PaceMeter) -> float:
    moment, outer = _Moment(slot), _get_running_loop()
    waiting = Limiter(1 / pace.interval, max_burst=pace.burst).wait()
    try:
        _set_running_loop(moment)  # type: ignore[arg-type]  # it is all of a loop that asynciolimiter uses
        with contextlib.suppress(StopIteration):
            waiting.send(None)
    finally:
        _set_running_loop(outer)
        waiting.close()
    return moment.next_slot
