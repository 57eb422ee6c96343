"""What became of one item, and where a map's outcomes are gathered."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from opero.core.signature import MISSING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

T = TypeVar("T")
R = TypeVar("R")
if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    D = TypeVarWithDefault("D", default=Exception)
else:
    D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T, R]):
    """What became of one item of a map.

    Attributes:
        index: Place of the item in the input, from 0.
        item: The item.
        error: What the call raised, None if it succeeded.
        attempts: Executions of the function; 0 for a cache hit.
        seconds: From the item's start to its end, waits included; items that travelled to a worker together share the
            average of their batch.
        cached: Whether the result came from the cache.
    """

    index: int
    item: T
    # Of a failed item its default, `MISSING` if it has none.
    _value: R = field(repr=False)
    error: Exception | None
    attempts: int
    seconds: float
    cached: bool

    @property
    def result(self) -> R:
        """What the function returned.

        Raises:
            Exception: The item's `error`, if it failed.
        """
        if self.error is not None:
            raise self.error
        return self._value

    @property
    def is_excused(self) -> bool:
        """Whether it failed, and has a default."""
        return self.error is not None and self._value is not MISSING

    @property
    def returned(self) -> R:
        """What a single call would have returned: the default of an item that failed, if it has one.

        Raises:
            Exception: The item's `error`, if there is no default.
        """
        return self.result if self._value is MISSING else self._value


class Results(list[R | D]):
    """What a map returns: a list of its results, in which a failed item is its exception, or its ``default``.

    ``Results[R]`` is a ``list[R | Exception]``; with a default of type ``D``, ``Results[R, D]`` is a ``list[R | D]``.

    Attributes:
        failed: An `Outcome` for each item that failed, in the order of the list.
    """

    failed: list[Outcome[Any, R]]

    def __init__(self, values: Iterable[R | D] = (), failed: Mapping[int, Outcome[Any, R]] | None = None) -> None:
        """``failed`` has outcomes by their places in the list."""
        super().__init__(values)
        places = sorted(failed or ())
        self._failed_places = frozenset(places)
        self.failed = [failed[place] for place in places] if failed else []

    @property
    def ok(self) -> list[R]:
        """The results of all other items, of the list as the map returned it."""
        values: list[Any] = [value for place, value in enumerate(self) if place not in self._failed_places]
        return values


class Sink(Protocol):
    """Takes the outcomes of a map in the order in which they happen."""

    def put(self, outcome: Outcome[Any, Any]) -> None:
        """One item has ended."""
        ...

    def put_results(self, start: int, items: Sequence[Any], values: list[Any], seconds: float, /) -> None:
        """Consecutive items from ``start`` on have all succeeded at the first attempt."""
        ...

    def take(self) -> deque[Outcome[Any, Any]]:
        """What can be handed to a consumer now."""
        ...

    def backlog(self) -> int:
        """How many outcomes wait for an earlier one."""
        ...


class ListSink:
    """Gathers plain results for a call that returns a list."""

    def __init__(self, *, ordered: bool) -> None:
        self.results: list[Any] = []
        # By their places in the list.
        self.failed: dict[int, Outcome[Any, Any]] = {}
        self._ordered = ordered

    def put(self, outcome: Outcome[Any, Any]) -> None:
        if outcome.error is not None:
            self.failed[outcome.index if self._ordered else len(self.results)] = outcome
        value = outcome._value  # noqa: SLF001 - `result` would raise
        self._place(outcome.index, [outcome.error if value is MISSING else value])

    def put_results(self, start: int, _items: Sequence[Any], values: list[Any], _seconds: float, /) -> None:
        self._place(start, values)

    def take(self) -> deque[Outcome[Any, Any]]:
        return deque()

    def backlog(self) -> int:
        return 0

    def _place(self, start: int, values: list[Any]) -> None:
        results = self.results
        if not self._ordered:
            results.extend(values)
            return
        missing = start + len(values) - len(results)
        if missing > 0:
            results.extend([None] * missing)
        results[start : start + len(values)] = values


class StreamSink:
    """Hands outcomes to a consumer, in input order if asked."""

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._ready: deque[Outcome[Any, Any]] = deque()
        self._early: dict[int, Outcome[Any, Any]] = {}
        self._next = 0

    def put(self, outcome: Outcome[Any, Any]) -> None:
        if not self._ordered:
            self._ready.append(outcome)
            return
        self._early[outcome.index] = outcome
        while self._next in self._early:
            self._ready.append(self._early.pop(self._next))
            self._next += 1

    def put_results(self, start: int, items: Sequence[Any], values: list[Any], seconds: float, /) -> None:
        for place, (item, value) in enumerate(zip(items, values, strict=False), start):
            self.put(Outcome(place, item, value, None, 1, seconds, False))  # noqa: FBT003 - a dataclass of plain facts

    def take(self) -> deque[Outcome[Any, Any]]:
        taken, self._ready = self._ready, deque()
        return taken

    def backlog(self) -> int:
        return len(self._early)
