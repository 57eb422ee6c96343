"""What became of one item, and where a map's outcomes are gathered."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from opero.core.checks import brief, html_table
from opero.core.signature import MISSING
from opero.utils.notes import class_counts, duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

T = TypeVar("T")
R = TypeVar("R")
if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    D = TypeVarWithDefault("D", default=Exception)
else:
    D = TypeVar("D")


_COLUMNS = ("index", "item", "result", "error", "attempts", "seconds", "cached")
# Outcomes that a stream in input order keeps back for an earlier one.
STREAM_WINDOW = 10_000
# Failed items that a notebook shows of one map.
_MOST_SHOWN = 20


@dataclass(frozen=True, slots=True, repr=False)
class Outcome(Mapping[str, Any], Generic[T, R]):
    """What became of one item of a map.

    It can be read as a mapping of these names, too, in which the ``result`` of an item that failed is its default or
    None: so ``pandas.DataFrame(fn.stream(items))`` has these columns.

    Attributes:
        index: Place of the item in the input, from 0.
        item: The item.
        result: What the function returned; of an item that failed, this raises its ``error``.
        error: What the call raised, None if it succeeded.
        attempts: Executions of the function; 0 for a cache hit.
        seconds: From the item's start to its end, waits included; items that travelled to a worker together share the
            average of their batch.
        cached: Whether the result came from the cache.
    """

    index: int
    item: T
    # Of a failed item its default, `MISSING` if it has none.
    _value: R
    error: Exception | None
    attempts: int
    seconds: float
    cached: bool

    def __getitem__(self, name: str) -> Any:
        if name not in _COLUMNS:
            raise KeyError(name)
        if name == "result":
            return None if self._value is MISSING else self._value
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(_COLUMNS)

    def __len__(self) -> int:
        return len(_COLUMNS)

    def __repr__(self) -> str:
        what = f"result={brief(self._value)}" if self.error is None else f"error={brief(self.error)}"
        source = "from the cache" if self.cached else f"attempts={self.attempts}"
        return f"<Outcome {self.index}: item={brief(self.item)}, {what}, {source}, {duration(self.seconds)}>"

    def _repr_html_(self) -> str:
        return html_table("", _COLUMNS, [self.values()])

    def __reduce__(self) -> Any:
        values = (self.index, self.item, self._value, self.error, self.attempts, self.seconds, self.cached)
        return Outcome, values

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


# pandas and `dataclasses.asdict` would take it for one, and copy each result deeply.
del Outcome.__dataclass_fields__


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

    def _repr_html_(self) -> str:
        title = f"{len(self)} items, {len(self.failed)} failed"
        if not self.failed:
            return html_table(title, ("result",), [[value] for value in self[:_MOST_SHOWN]])
        errors = [outcome.error for outcome in self.failed if outcome.error is not None]
        shown = ("index", "item", "error", "attempts")
        rows = [[outcome[name] for name in shown] for outcome in self.failed[:_MOST_SHOWN]]
        return html_table(f"{title}: {class_counts(errors)}", shown, rows)


class ListSink:
    """Gathers plain results for a call that returns a list."""

    is_stream = False
    # How many more items may be begun.
    room = sys.maxsize

    def __init__(self, *, ordered: bool) -> None:
        self.results: list[Any] = []
        # As a stream has it; nothing is handed out before the end.
        self.ready: deque[Outcome[Any, Any]] = deque()
        # By their places in the list.
        self.failed: dict[int, Outcome[Any, Any]] = {}
        self._ordered = ordered

    def put(self, outcome: Outcome[Any, Any]) -> None:
        """One item has ended; of all items that end, in any order."""
        if outcome.error is not None:
            self.failed[outcome.index if self._ordered else len(self.results)] = outcome
        value = outcome._value  # noqa: SLF001 - `result` would raise
        self.put_results(outcome.index, (), [outcome.error if value is MISSING else value], 0.0)

    def put_results(self, start: int, _items: Sequence[Any], values: list[Any], _seconds: float, /) -> None:
        """Consecutive items from ``start`` on have all succeeded at the first attempt."""
        results = self.results
        if not self._ordered:
            results.extend(values)
            return
        missing = start + len(values) - len(results)
        if missing > 0:
            results.extend([None] * missing)
        results[start : start + len(values)] = values

    def forget(self) -> None:
        """Nobody will ask for the results."""
        self.results.clear()
        self.failed.clear()


class StreamSink:
    """Hands outcomes to a consumer, in input order if asked."""

    is_stream = True

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        # What can be handed to a consumer now.
        self.ready: deque[Outcome[Any, Any]] = deque()
        self._early: dict[int, Outcome[Any, Any]] = {}
        self._next = 0

    def put(self, outcome: Outcome[Any, Any]) -> None:
        if not self._ordered:
            self.ready.append(outcome)
            return
        self._early[outcome.index] = outcome
        while self._next in self._early:
            self.ready.append(self._early.pop(self._next))
            self._next += 1

    def put_results(self, start: int, items: Sequence[Any], values: list[Any], seconds: float, /) -> None:
        for place, (item, value) in enumerate(zip(items, values, strict=False), start):
            self.put(Outcome(place, item, value, None, 1, seconds, False))  # noqa: FBT003 - a dataclass of plain facts

    def forget(self) -> None:
        """Nobody will ask for more outcomes."""
        self.ready.clear()
        self._early.clear()

    @property
    def room(self) -> int:
        """How many more items may be begun."""
        return STREAM_WINDOW - len(self._early)


Sink: TypeAlias = ListSink | StreamSink
