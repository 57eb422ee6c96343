"""The gate of a limit of this process: asynciolimiter's pace, made to be shared by threads, tasks and event loops.

asynciolimiter (1.2.0) says when the next one in line gets its slot. Its `Limiter` belongs to one event loop: used from
a second loop, thread or forked child it hangs or limits nothing, and it grants no more than one slot to each look that
comes late. So it is stepped on a stand-in for a loop, whose time is the slot's. Delete the stand-in when a release of
asynciolimiter can be shared.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from opero.core.limits.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opero.core.limits.rates import Pace, Rates


class LocalLedger(Ledger):
    """A ledger that asks asynciolimiter for the next slot after one that was waited for."""

    __slots__ = ("_limiters",)

    def __init__(self, rates: Rates) -> None:
        # Not at the first wait: in a recursion that is too deep it would stay half imported.
        import asynciolimiter  # noqa: F401

        super().__init__(rates)

    def forget(self) -> None:
        super().forget()
        self._limiters: dict[Pace, _SteppedLimiter] = {}

    def _take_late(self, now: float, waited: float, amounts: Sequence[float]) -> None:
        super()._take_late(now, waited, amounts)
        for place, pace in enumerate(self.rates.paces):
            if amounts[pace.name] == 1:
                if pace not in self._limiters:
                    self._limiters[pace] = _SteppedLimiter(pace)
                self.free_at[place] = self._limiters[pace].slot_after(self.free_at[place] - pace.interval)


class _SteppedLimiter:
    """asynciolimiter's `Limiter`, and all that it asks of a running event loop: a time, and one timer."""

    __slots__ = ("_get_loop", "_limiter", "_now", "_set_loop", "_when")

    def __init__(self, pace: Pace) -> None:
        # Kept: while the interpreter ends, nothing can be imported. The public way raises where there is no loop.
        from asyncio import _get_running_loop, _set_running_loop

        from asynciolimiter import Limiter

        self._get_loop, self._set_loop = _get_running_loop, _set_running_loop
        self._limiter = Limiter(1 / pace.interval, max_burst=pace.burst)
        self._now = self._when = 0.0

    def slot_after(self, slot: float) -> float:
        """Let one pass at the time of its slot; gives the time of the next one."""
        self._now = slot
        # Nobody waits in it: it is free again.
        self._limiter.reset()
        outer, waiting = self._get_loop(), self._limiter.wait()
        try:
            self._set_loop(self)  # type: ignore[arg-type]  # it is all of a loop that asynciolimiter uses
            with contextlib.suppress(StopIteration):
                waiting.send(None)
        finally:
            self._set_loop(outer)
            waiting.close()
        return self._when

    def time(self) -> float:
        return self._now

    def call_at(self, when: float, _callback: Callable[[], None]) -> _SteppedLimiter:
        self._when = when
        return self

    def cancel(self) -> None:
        """Of the timer that `call_at` gave: it never rings."""
