"""The ledger of a limit of this process: asynciolimiter's pace, made to be shared by threads, tasks and event loops.

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

from opero.core.limits.ledger import Ledger, PaceMeter

if TYPE_CHECKING:
    from collections.abc import Callable


class _Moment:
    """All that asynciolimiter asks of a running event loop: a time, and one timer."""

    def __init__(self, now: float) -> None:
        self._now = self.next_slot = now

    def time(self) -> float:
        return self._now

    def call_at(self, when: float, _callback: Callable[[], None]) -> _Moment:
        self.next_slot = when
        return self


class _LimiterPace(PaceMeter):
    """Asks asynciolimiter for the next slot after one that was waited for."""

    __slots__ = ()

    def take_late(self, now: float, amount: float) -> None:
        if amount != 1:
            super().take_late(now, amount)
            return
        moment, outer = _Moment(max(self.free_at, now - self.tolerance)), _get_running_loop()
        waiting = Limiter(1 / self.interval, max_burst=self.burst).wait()
        try:
            _set_running_loop(moment)  # type: ignore[arg-type]  # it is all of a loop that asynciolimiter uses
            with contextlib.suppress(StopIteration):
                waiting.send(None)
        finally:
            _set_running_loop(outer)
            waiting.close()
        self.free_at = moment.next_slot


class LocalLedger(Ledger):
    """The ledger of this process."""

    __slots__ = ()
    _pace_meter = _LimiterPace
