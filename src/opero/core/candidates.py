"""The values to try for one parameter, in a form that type checkers take for one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from opero.core.signature import is_async, name_of, refuse_unfinished
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["candidates", "candidates_from"]

T = TypeVar("T")


class Candidates:
    """Values that are often secrets: nothing of them is shown."""

    __slots__ = ("_values",)

    def __init__(self, values: tuple[Any, ...]) -> None:
        self._values = values

    def values(self) -> list[Any] | tuple[Any, ...]:
        return self._values

    def __cache_key__(self) -> tuple[Any, ...]:
        return self._values

    def __reduce__(self) -> Any:
        return Candidates, (self._values,)

    def __repr__(self) -> str:
        count = len(self._values)
        return f"candidates(<{count} value{'' if count == 1 else 's'}>)"


class CandidatesFrom:
    """Values that a function gives when they are needed."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[[], list[Any] | tuple[Any, ...]]) -> None:
        self._function = function

    def values(self) -> list[Any] | tuple[Any, ...]:
        given = self._function()
        refuse_unfinished(self._function, given, is_cached=False)
        if not isinstance(given, (list, tuple)):
            name = name_of(self._function)
            msg = f"candidates_from({name}): {name} returned {type(given).__name__}; return a list or a tuple of values"
            raise MisuseError(msg)
        return given

    def __cache_key__(self) -> Any:
        # Not what it gives: that may be another value each time, and to ask for it may take long.
        return self._function

    def __reduce__(self) -> Any:
        # Decisions are made where the function is. A worker is sent one value, and must not fail for the rest.
        return _left_behind, (name_of(self._function),)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __repr__(self) -> str:
        return f"candidates_from({name_of(self._function)})"


def _left_behind(name: str) -> CandidatesFrom:
    def gone() -> list[Any]:
        msg = (
            f"candidates_from({name}) was carried to another process, where {name} is not; decorate a function that is "
            "imported there, or give it candidates(…)"
        )
        raise MisuseError(msg)

    gone.__qualname__ = name
    return CandidatesFrom(gone)


def candidates(*values: T) -> T:
    """Give the parameter of ``arg_fallback`` several values to try in order; type checkers see one of them.

    As the default or as an argument, it means what a list or tuple of the values means. It shows none of them: its
    ``repr`` has their number only. In a cache's key it counts as its values, in their order, apart from a list and a
    tuple of them.

    Args:
        *values: The candidates. Without any, the call raises the `ValueError` of an empty list.

    Returns:
        An object for functions decorated with ``arg_fallback``, and for no others: they would take it for a value.
    """
    return cast("T", Candidates(values))


def candidates_from(function: Callable[[], list[T] | tuple[T, ...]]) -> T:
    """Give the parameter of ``arg_fallback`` values that a function tells at each call; type checkers see one of them.

    For keys that rotate and services that move. The function is called once for each call of the decorated function
    that gets to the first attempt, for each item of a map, not again for later rounds, and not on a hit of the cache;
    in async functions it runs in the event loop, and should be quick. What it raises is raised by the call and not
    retried. It is never called for a cache's key, which has the function itself in place of the values: results of
    earlier values are found again. On disk and redis it has to be a function that can be imported by its name.

    It stays in its process. The workers of a map are sent one value at a time; inside of another function that runs in
    a worker process, a copy that was carried there raises `MisuseError`.

    Args:
        function: Takes no arguments and returns a list or tuple of candidates; a plain function, for async functions
            too. If what it returns is empty, the call raises the `ValueError` of an empty list; if it is no list or
            tuple, `opero.core.MisuseError`.

    Returns:
        An object for functions decorated with ``arg_fallback``, and for no others: they would take it for a value.

    Raises:
        TypeError: If it is not a function, or an async one.
    """
    # What came in may be the secrets themselves: its type has to do.
    if not callable(function):
        msg = (
            f"candidates_from got {type(function).__name__}, which cannot be called; write a function that returns the "
            "values, or candidates(…) for values that are known"
        )
        raise TypeError(msg)
    if is_async(function):
        msg = f"candidates_from got the async function {name_of(function)}; write a plain one, for async functions too"
        raise TypeError(msg)
    return cast("T", CandidatesFrom(function))
