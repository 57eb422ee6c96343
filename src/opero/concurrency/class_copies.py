"""The classes of the main module, for workers that do not have them.

Items and results are pickled by reference to the main module. If a function that travels by value brought copies of the
classes that it mentions, two of one name would meet: equal objects would differ, and no `except` or ``retry_on`` would
know its own errors. So such a class goes by its name; where the worker's main module has none, as in a worker of a
notebook, a copy that travels along is put there.
"""

from __future__ import annotations

import os
import pickle
import sys
import weakref
from dataclasses import dataclass
from graphlib import TopologicalSorter
from types import FunctionType
from typing import TYPE_CHECKING, Any

from opero.concurrency.by_value import dumps, loads
from opero.concurrency.main_module import find_in_main, globals_of_main, is_class_of_main, note_class
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opero.concurrency.by_value import Kept
    from opero.concurrency.main_module import Classes


@dataclass(frozen=True)
class Copy:
    """Classes that mention each other, by value; the tokens differ for different ones of the same names."""

    names: tuple[str, ...]
    tokens: tuple[bytes, ...]
    dilled: bytes
    problem: str


class Copies:
    """The copies of classes that travel along; a worker uses those that it lacks.

    ``is_surely_there`` tells of a name of the main module that the worker has it: such classes need no copy.
    """

    def __init__(self, kept: Kept, is_surely_there: Callable[[str], bool]) -> None:
        self._kept: Kept = kept
        self._is_surely_there = is_surely_there
        self._alone_of: dict[int, _Alone] = {}
        self._known: dict[frozenset[int], tuple[Copy, ...]] = {}

    def of(self, mentioned: Classes) -> tuple[Copy, ...]:
        """Copies of the classes and of those that they mention, each after those that it needs."""
        key = frozenset(mentioned)
        if key not in self._known:
            self._known[key] = self._make(mentioned)
        return self._known[key]

    def _make(self, mentioned: Classes) -> tuple[Copy, ...]:
        reach = self._reach(mentioned)
        copies: dict[int, Copy] = {}
        # What a class reaches reaches no more than that itself, and less unless they reach each other.
        for place in sorted(reach, key=lambda place: len(reach[place])):
            if place not in copies:
                circle = self._bases_first({other for other in reach[place] if place in reach[other]})
                copies.update(dict.fromkeys(circle, self._copy(circle)))
        return tuple(dict.fromkeys(copies.values()))

    def _reach(self, mentioned: Classes) -> dict[int, set[int]]:
        """Each class that may be lacking with all such that it needs, itself among them."""
        direct: dict[int, Classes] = {}
        coming = list(mentioned.values())
        while coming:
            cls = coming.pop()
            if id(cls) not in direct and not self._is_surely_there(cls.__qualname__):
                direct[id(cls)] = self._alone(cls).others
                coming.extend(direct[id(cls)].values())
        return {place: _reachable(place, direct) for place in direct}

    def _alone(self, cls: type) -> _Alone:
        if id(cls) not in self._alone_of:
            others: Classes = {}
            dilled, problem = self._try_to_copy([cls], others)
            self._alone_of[id(cls)] = _Alone(cls, dilled, problem, others)
        return self._alone_of[id(cls)]

    def _bases_first(self, circle: set[int]) -> list[int]:
        """Ordered so that no class is begun within one that it is made from: that one would be made twice."""
        classes = sorted((self._alone_of[place].cls for place in circle), key=lambda cls: cls.__qualname__)
        made_from = {
            id(cls): [id(other) for other in (*cls.__bases__, type(cls)) if id(other) in circle] for cls in classes
        }
        return list(TopologicalSorter(made_from).static_order())

    def _copy(self, circle: list[int]) -> Copy:
        classes = [self._alone_of[place].cls for place in circle]
        alone = self._alone_of[circle[0]]
        dilled, problem = (alone.dilled, alone.problem) if len(classes) == 1 else self._try_to_copy(classes, {})
        names = tuple(cls.__qualname__ for cls in classes)
        return Copy(names, tuple(_token_of(cls) for cls in classes), dilled, problem)

    def _try_to_copy(self, classes: list[type], others: Classes) -> tuple[bytes, str]:
        try:
            return dumps(tuple(classes), others, self._kept, by_value=classes), ""
        except Exception as error:  # noqa: BLE001 - anything may be in a class; a worker that lacks it will say so
            return b"", describe(error)


@dataclass(frozen=True)
class _Alone:
    """A class by value, with all others by name, and those; or why it cannot be copied."""

    cls: type
    dilled: bytes
    problem: str
    others: Classes


def _token_of(cls: type) -> bytes:
    """The same as long as the class lives: its pickles are not, it may count its instances."""
    known = _tokens.get(id(cls))
    if known is None or known[0]() is not cls:
        _tokens[id(cls)] = known = weakref.ref(cls), os.urandom(16)
    return known[1]


_tokens: dict[int, tuple[weakref.ref[type], bytes]] = {}


def _reachable(place: int, direct: dict[int, Classes]) -> set[int]:
    reached: set[int] = set()
    coming = [place]
    while coming:
        other = coming.pop()
        if other in direct and other not in reached:
            reached.add(other)
            coming.extend(direct[other])
    return reached


class Collector(pickle.Pickler):
    """Pickles as pickle does, and notes which classes of the main module are mentioned.

    ``carry`` reduces functions to what travels by value; it gives NotImplemented for those that can be imported.
    """

    mentioned: Classes
    carry: Callable[[Any, Classes], Any]

    def reducer_override(self, obj: Any) -> Any:
        if is_class_of_main(obj):
            note_class(obj, self.mentioned)
        elif isinstance(obj, FunctionType):
            return self.carry(obj, self.mentioned)
        return NotImplemented


def provide(copies: Iterable[Copy]) -> None:
    """Put the classes that this process lacks into its main module.

    Raises:
        AttributeError: If there is no copy of one that it lacks.
    """
    for copy in copies:
        if all(map(_is_here, copy.names, copy.tokens)):
            continue
        if not copy.dilled:
            names = ", ".join(copy.names)
            msg = f"the main module of this worker has no class {names}, and it cannot be copied: {copy.problem}"
            raise AttributeError(msg)
        for name, token, cls in zip(copy.names, copy.tokens, loads(copy.dilled), strict=True):
            setattr(sys.modules["__main__"], name, cls)
            globals_of_main()[name] = cls
            _put_here[name] = token


# The classes that were put into this process's main module; a notebook may send others of the same names later.
_put_here: dict[str, bytes] = {}


def _is_here(name: str, token: bytes) -> bool:
    found = find_in_main(name)
    return isinstance(found, type) and found.__qualname__ == name and _put_here.get(name, token) == token
