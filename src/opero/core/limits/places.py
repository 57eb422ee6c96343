"""How many executions are under way at once: places, given to those in line first come, first served."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from opero.core.clock import clock
from opero.core.limits.ledger import Ledger
from opero.core.limits.line import ONE, Line
from opero.core.limits.per_value import PerValue
from opero.core.limits.rates import CALLS, Rates
from opero.core.steps import leading
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from opero.core.per import Per


class _FreePlaces(Ledger):
    """A limit that opens when somebody goes, and not with time.

    Attributes:
        free: Places that were left again: to add one to a list is one step, and needs no lock.
        made: How many there are, at most ``count``.
    """

    __slots__ = ("count", "free", "made")

    def __init__(self, count: int) -> None:
        super().__init__(Rates((CALLS,), (), (), (math.inf,)))
        self.count = count

    def forget(self) -> None:
        super().forget()
        self.free: list[None] = []
        self.made = 0

    def opens_at(self, now: float, amounts: Sequence[float], ahead: Sequence[float] = ()) -> float:  # noqa: ARG002
        # Nobody knows; those who have little time wait until that is over.
        return now

    def is_open(self, now: float, amounts: Sequence[float]) -> bool:  # noqa: ARG002
        return bool(self.free) or self.made < self.count

    def take(self, now: float, waited: float, amounts: Sequence[float]) -> None:  # noqa: ARG002
        if self.free:
            self.free.pop()
        else:
            self.made += 1

    def wait(self, now: float, amounts: Sequence[float]) -> float:  # noqa: ARG002
        return math.inf

    def idle_from(self, now: float) -> float:
        return now if len(self.free) == self.made else math.inf


class Places(Line):
    """The places, and those who wait for one.

    Attributes:
        badges: What the code that runs in one of them is known by.
    """

    def __init__(self, count: int) -> None:
        self._places = _FreePlaces(count)
        super().__init__(self._places.rates, ledger=self._places)
        self.badges = frozenset({self})

    def take_now(self, amounts: Sequence[float] = ONE) -> bool:
        """Take a place if one is free and nobody waits."""
        with self.lock:
            if self._places.free and not self._spots:
                self._places.free.pop()
                return True
        return super().take_now(amounts)

    def give_back(self) -> None:
        """Somebody leaves: the next one may come."""
        if len(self._places.free) < self._places.made:
            self._places.free.append(None)
        if self._spots:
            self.rouse_first()


class Place:
    """One place, until it is left: once, however often that is said."""

    __slots__ = ("_has_left", "_places")

    def __init__(self, places: Places) -> None:
        self._places = places
        self._has_left = False

    @property
    def badge(self) -> object:
        """What the code that runs in this place is known by."""
        return self._places

    def leave(self) -> None:
        if not self._has_left:
            self._has_left = True
            self._places.give_back()

    def kept_by(self, source: Any) -> Any:
        """A generator that leaves the place when it ends or is closed."""
        return _InPlace(source, self)


class _InPlace:
    """A generator of either kind that has begun."""

    __slots__ = ("_place", "_source")

    def __init__(self, source: Any, place: Place) -> None:
        self._source = source
        self._place = place

    def send(self, value: Any) -> Any:
        return self._step(self._source.send, value)

    def throw(self, error: BaseException) -> Any:
        return self._step(self._source.throw, error)

    def close(self) -> None:
        try:
            self._source.close()
        finally:
            self._place.leave()

    async def asend(self, value: Any) -> Any:
        return await self._step_async(self._source.asend, value)

    async def athrow(self, error: BaseException) -> Any:
        return await self._step_async(self._source.athrow, error)

    async def aclose(self) -> None:
        try:
            await self._source.aclose()
        finally:
            self._place.leave()

    def _step(self, step: Callable[[Any], Any], value: Any) -> Any:
        try:
            return step(value)
        except BaseException:
            self._place.leave()
            raise

    async def _step_async(self, step: Callable[[Any], Any], value: Any) -> Any:
        try:
            return await step(value)
        except BaseException:
            self._place.leave()
            raise


class PlacesForFunction:
    """The places of one function, for each value of ``per`` if there is one."""

    def __init__(self, count: int, per: Per | None, name: str) -> None:
        self._per = per
        self._name = name
        self._places = Places(count)
        self._of_values: PerValue[Places] = PerValue(lambda _: Places(count))

    def take_now(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Places | None:
        """The places of which a free one was taken, to be given back; None if the caller has to wait, or must not."""
        places = self._places if self._per is None else self._of_values.of(self._per.get(args, kwargs))
        return places if places not in leading.get() and places.take_now() else None

    def take(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None
    ) -> Generator[Any, Any, Place | None]:
        """Wait for a place; None once the clock shows ``deadline``.

        Raises:
            MisuseError: If the caller has one, and would wait for itself.
        """
        places = self._places if self._per is None else self._of_values.of(self._per.get(args, kwargs))
        if places in leading.get():
            msg = (
                f"{self._name} was called within one of its own executions, and would wait for that one's place of "
                "max_concurrent; call the undecorated function there"
            )
            raise MisuseError(msg)
        if deadline is not None and clock.now() >= deadline:
            return None
        latest = None if deadline is None else lambda: deadline
        return Place(places) if (yield from places.take(latest=latest)) else None
