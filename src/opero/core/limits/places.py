"""How many executions are under way at once: places, given to those in line first come, first served."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from opero.core.clock import clock
from opero.core.limits.ledger import Ledger
from opero.core.limits.line import ONE, Line, PerValue, take
from opero.core.limits.rates import CALLS, Rates
from opero.core.steps import PartOf, leaders, leading, not_over
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Sequence

    from opero.core.breaker import Passage
    from opero.core.parameters import Per
    from opero.core.steps import Part

# No process could have more executions under way than that.
_MOST = 1_000_000


class _FreePlaces(Ledger):
    """A limit without a rate, which opens when somebody leaves, and nobody knows when that will be.

    Attributes:
        free: One element for each free place: to add one to a list, or to take one off, is one step, and needs no lock.
    """

    __slots__ = ("count", "free")

    def __init__(self, count: int) -> None:
        self.count = min(count, _MOST)
        self.free: list[None] = []
        super().__init__(Rates((CALLS,), (), (), (math.inf,)))

    def forget(self) -> None:
        super().forget()
        self.free[:] = [None] * self.count

    def wait(self, now: float, amounts: Sequence[float]) -> float:  # noqa: ARG002
        """Take a place, if one is free: who finds it does not ask again."""
        try:
            self.free.pop()
        except IndexError:
            return math.inf
        return 0.0

    def idle_from(self, now: float) -> float:
        return now if len(self.free) == self.count else math.inf


class Places(Line):
    """The places, and those who wait for one.

    A place is what its execution is part of (`opero.core.steps.Part`), with what ends that: `enter` begins it at once.
    """

    def __init__(self, count: int) -> None:
        places = _FreePlaces(count)
        super().__init__(places)
        self._free, self._count = places.free, places.count

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

    def resume(self, place: Part, step: Callable[..., Any], *given: Any) -> Any:
        """Take a step of a generator that has a place."""
        with PartOf(place):
            return step(*given)

    async def resume_async(self, place: Part, step: Callable[..., Awaitable[Any]], *given: Any) -> Any:
        """The same of an async generator."""
        with PartOf(place):
            return await step(*given)


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
