"""How many executions are under way at once: places, given to those in line first come, first served."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from opero.core.clock import clock
from opero.core.limits.ledger import Ledger
from opero.core.limits.line import ONE, Line, PerValue, Turn
from opero.core.limits.rates import CALLS, Rates
from opero.core.steps import leaders, within
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from opero.core.parameters import Per
    from opero.core.steps import Candidate

# No process could have more executions under way than that.
_MOST = 1_000_000


class Place:
    """One of them, which an execution has; `opero.core.steps.within` knows what is part of it until it is over."""

    # Without an `__init__`, which would take as long as all the rest of a call.
    __slots__ = ("is_over", "places", "token")
    places: Places
    token: Any
    is_over: bool

    def give_back(self) -> None:
        """Somebody leaves: the next one may come."""
        places, token, self.is_over = self.places, self.token, True
        places.free.append(None)
        if places.waiting:
            places.reopen()
        if token is not None:
            try:
                within.reset(token)
            except ValueError:
                # A task of a loop that was closed ends where it is collected, in another context.
                return


class Places(Line):
    """The places, and those who wait for one; it opens when somebody leaves, and nobody knows when that will be."""

    def __init__(self, count: int) -> None:
        self.count = min(count, _MOST)
        super().__init__(Ledger(Rates((CALLS,), (), (), (math.inf,))))

    def after_fork(self) -> None:
        super().after_fork()
        # One element for each free place: to add one to a list, or to take one off, is one step, and needs no lock.
        self.free: list[None] = [None] * self.count

    def wait_alone(self, amounts: Sequence[float], now: float) -> float:  # noqa: ARG002 - as of a line
        """Take a place, if one is free: who finds it does not ask again."""
        try:
            self.free.pop()
        except IndexError:
            self.opens_at = math.inf
            return math.inf
        return 0.0

    def is_idle(self) -> bool:
        return len(self.free) >= self.count

    def enter(self, _args: Any = (), _kwargs: Any = None) -> Place | None:
        """Take a place for the running code, and begin it; None if that has to wait, or must not."""
        outer = within.get()
        if self.waiting or (outer and self.is_taken_by_caller()):
            return None
        try:
            self.free.pop()
        except IndexError:
            return None
        place = Place()
        place.places, place.is_over = self, False
        place.token = within.set((*leaders(), place) if outer else (place,))
        return place

    def is_taken_by_caller(self) -> bool:
        """Whether the running code has one of them."""
        return any(isinstance(part, Place) and part.places is self for part in leaders())


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

    def take(self, candidate: Candidate, deadline: float) -> Generator[Any, Any, Place | None]:
        """Wait for a place; gives None at the ``deadline`` or when the circuit opens."""
        places = self._of(candidate.args, candidate.kwargs)
        if places.is_taken_by_caller():
            raise MisuseError(
                f"{self._name} was called within one of its own executions, and would wait for that one's place of "
                "max_concurrent; call the undecorated function there"
            )
        if clock.now() >= deadline:
            return None
        if (yield from Turn([(places, ONE)], lambda: -math.inf if candidate.is_shut() else deadline).wait()) != "taken":
            return None
        place = Place()
        place.places, place.is_over, place.token = places, False, None
        return place
