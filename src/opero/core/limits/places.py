"""How many executions are under way at once: places, given to those in line first come, first served."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from opero.core.clock import clock
from opero.core.limits.ledger import Ledger
from opero.core.limits.line import ONE, Line, PerValue, take
from opero.core.limits.rates import CALLS, Rates
from opero.core.steps import leaders, leading, not_over
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from opero.core.breaker import Passage
    from opero.core.parameters import Per
    from opero.core.steps import Part

# No process could have more executions under way than that.
_MOST = 1_000_000


class Places(Line):
    """The places, and those who wait for one.

    It opens when somebody leaves, and nobody knows when that will be. A place is what its execution is part of
    (`opero.core.steps.Part`), with what ends that: `enter` begins it at once.
    """

    def __init__(self, count: int) -> None:
        self._count = min(count, _MOST)
        super().__init__(Ledger(Rates((CALLS,), (), (), (math.inf,))))

    def after_fork(self) -> None:
        super().after_fork()
        # One element for each free place: to add one to a list, or to take one off, is one step, and needs no lock.
        self._free: list[None] = [None] * self._count

    def wait_alone(self, amounts: Sequence[float], now: float) -> float:  # noqa: ARG002 - as of a line
        """Take a place, if one is free: who finds it does not ask again."""
        try:
            self._free.pop()
        except IndexError:
            self.opens_at = math.inf
            return math.inf
        return 0.0

    def is_idle(self) -> bool:
        return len(self._free) == self._count

    def enter(self, _args: Any = (), _kwargs: Any = None) -> Part | None:
        """Take a place for the running code; None if that has to wait, or must not."""
        outer = leading.get()
        if outer is not None:
            outer = not_over(outer)
            if self in leaders():
                return None
        if self.waiting:
            return None
        try:
            self._free.pop()
        except IndexError:
            return None
        place: Part = [self, outer, None]
        place[2] = leading.set(place)
        return place

    def give_back(self, place: Part) -> None:
        """Somebody leaves: the next one may come."""
        _, outer, token = place
        place[0] = place[2] = None
        if outer is not None:
            # Of a task that starts another one, and so on, no chain of parts that are over is left.
            place[1] = not_over(outer)
        # What a forked child does in a place of its parent takes none here.
        if len(self._free) < self._count:
            self._free.append(None)
        if self.waiting:
            self.reopen()
        if token is not None:
            try:
                leading.reset(token)
            except ValueError:
                # A task of a loop that was closed ends where it is collected, in another context.
                return


class PlacesForFunction:
    """The places of one function, for each value of ``per`` if there is one."""

    def __init__(self, count: int, per: Per | None, name: str) -> None:
        self._per = per
        self._name = name
        self._places = Places(count)
        self._of_values: PerValue[Places] = PerValue(lambda _: Places(count))
        # As `Places.enter`, for a call's arguments.
        self.enter = self._places.enter if per is None else lambda *call: self._of(*call).enter()

    def _of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Places:
        return self._places if self._per is None else self._of_values.of(self._per.get(args, kwargs))

    def take(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float, passage: Passage | None
    ) -> Generator[Any, Any, Part | None]:
        """Wait for a place; gives None at the ``deadline`` or when the circuit opens."""
        places = self._of(args, kwargs)
        if places in leaders():
            raise MisuseError(
                f"{self._name} was called within one of its own executions, and would wait for that one's place of "
                "max_concurrent; call the undecorated function there"
            )
        if clock.now() >= deadline:
            return None
        news = yield from take(
            [(places, ONE)],
            lambda: -math.inf if passage is not None and passage.is_shut() else deadline,
        )
        return [places, None, None] if news == "taken" else None
