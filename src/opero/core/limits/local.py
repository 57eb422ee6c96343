"""The gate of a limit of this process: asynciolimiter's pace, made to be shared by threads, tasks and event loops.

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

from opero.core.limits.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opero.core.limits.rates import Pace


class LocalLedger(Ledger):
    """A ledger that asks asynciolimiter for the next slot after one that was waited for."""

    __slots__ = ()

    def _take_late(self, now: float, amounts: Sequence[float]) -> None:
        super()._take_late(now, amounts)
        for place, pace in enumerate(self.rates.paces):
            if amounts[pace.name] == 1:
                self.free_at[place] = _slot_after(self.free_at[place] - pace.interval, pace)


def _slot_after(slot: float, pace: Pace) -> float:
    """Let one pass at the time of its slot; gives the time of the next one."""
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


class _Moment:
    """All that asynciolimiter asks of a running event loop: a time, and one timer."""

    __slots__ = ("_now", "next_slot")

    def __init__(self, now: float) -> None:
        self._now = self.next_slot = now

    def time(self) -> float:
        return self._now

    def call_at(self, when: float, _callback: Callable[[], None]) -> _Moment:
        self.next_slot = when
        return self

    def cancel(self) -> None:
        """Of the timer that `call_at` gave: it never rings."""
