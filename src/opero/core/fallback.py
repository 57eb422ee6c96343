"""Fallback: the values of one named parameter, tried in order."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from opero.core.checks import check_callable, check_seconds, check_text, kind_of
from opero.core.clock import clock
from opero.core.decoration import F, decorator
from opero.core.digests import apart_from_globals
from opero.core.frozen import itself
from opero.core.keys import identity_of
from opero.core.parameters import ParameterSlot
from opero.core.plan import Plan
from opero.core.retry import RetryPolicy
from opero.core.signature import name_of, refuse_unfinished
from opero.events import switches
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opero.core.checks import Duration
    from opero.core.steps import Candidate

__all__ = ["candidates", "candidates_from", "get_fallback_decorator"]

T = TypeVar("T")

_MOST_KEPT = 10_000
_NO_REST = (False, 0.0)


class Candidates:
    """Values that are often secrets: nothing of them is shown."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self._values = values

    def values(self) -> list[Any] | tuple[Any, ...]:
        return self._values

    def __cache_key__(self) -> tuple[Any, ...]:
        return self._values

    def __repr__(self) -> str:
        count = len(self._values)
        return f"candidates(<{count} value{'' if count == 1 else 's'}>)"


class CandidatesFrom:
    """Values that a function gives when they are needed."""

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
        # Not what it gives, nor the globals of a script by which it does: those may be others each time, and to ask for
        # it may take long.
        return apart_from_globals(self._function)

    def __reduce__(self) -> Any:
        # Decisions are made where the function is. A worker is sent one value, and must not fail for the rest.
        return CandidatesFrom, (partial(_not_here, name_of(self._function)),)

    __copy__ = __deepcopy__ = itself

    def __repr__(self) -> str:
        return f"candidates_from({name_of(self._function)})"


def _not_here(name: str) -> list[Any]:
    raise MisuseError(
        f"candidates_from({name}) was carried to another process, where {name} is not; decorate a function that is "
        "imported there, or give it candidates(…)"
    )


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
    retried. It is never called for a cache's key, which has the function itself in place of the values, by its name,
    its code, what it has captured and its attributes: results of earlier values are found again. On disk and redis it
    has to be a function that can be imported by its name.

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
    wanted = "a function that returns the values, or candidates(…) for values that are known"
    if not callable(function):
        # No number either, which may be one of the values.
        raise TypeError(f"candidates_from got {kind_of(function)}, which cannot be called; write {wanted}")
    return cast("T", CandidatesFrom(check_callable("candidates_from", function, wanted)))


class FallbackOverParameter:
    """Which values, in which order, for this call.

    A list or tuple, or what `opero.core.candidates` makes, holds candidates; any other value, text included, is the
    only one. All calls know which candidates rest: those that asked for it, for as long as they did, and with a
    cooldown all that failed, for so many seconds. Those that were given up, by an error that is not retried, come
    after the others: with a key that was revoked nothing is won.
    """

    def __init__(
        self, function: Callable[..., Any], arg_fallback: str, fallback_cooldown: Duration | None = None
    ) -> None:
        check_text("arg_fallback", arg_fallback, "the name of the parameter that holds the candidates")
        self._cooldown = (
            0.0 if fallback_cooldown is None else check_seconds("fallback_cooldown", fallback_cooldown, zero=False)
        )
        self._function_name = name_of(function)
        self.slot = ParameterSlot(function, arg_fallback, "arg_fallback")
        self.parameter, self.position = arg_fallback, self.slot.position
        # Whether it was given up, and until when it rests.
        self._rests: dict[Any, tuple[bool, float]] = {}

    def values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        given = self.slot.get(args, kwargs)
        if isinstance(given, (Candidates, CandidatesFrom)):
            given = given.values()
        if not isinstance(given, (list, tuple)):
            return [given]
        if not given:
            raise ValueError(
                f"{self._function_name} got an empty {type(given).__name__} for {self.parameter!r}; "
                "give at least one candidate"
            )
        # Disabled, the function still gets one value.
        return list(given[:1] if switches.is_disabled else given)

    def first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments with the first candidate; None if that cannot be told at once."""
        given: Any = self.slot.get(args, kwargs)
        if type(given) is Candidates:
            given = given.values()
        if type(given) not in {list, tuple} or not given or (self._rests and len(given) > 1):
            return None
        return self.slot.put(args, kwargs, given[0])

    def failed(self, value: Any, asked_for: float | None, *, again: bool = True) -> None:
        """Put a candidate to rest, for as long as it asked for or the cooldown lasts; not ``again``: for good."""
        seconds = max(self._cooldown, asked_for or 0.0)
        if not seconds:
            return
        if len(self._rests) >= _MOST_KEPT:
            # Each call has others; a candidate that all have will be known again when it fails again.
            self._rests.clear()
        key = identity_of(value)
        _, before = self._rests.get(key, _NO_REST)
        self._rests[key] = not again, max(clock.now() + seconds, before)

    def rest_of(self, value: Any) -> tuple[bool, float] | None:
        """Whether a candidate was given up, and until when it rests, if it does."""
        rest = self._rests.get(identity_of(value), _NO_REST) if self._rests else _NO_REST
        return rest if rest[1] > clock.now() else None

    def is_given_up(self, value: Any) -> bool:
        """Whether it rests after an error that is not retried, such as that of a key that was revoked."""
        return (self.rest_of(value) or _NO_REST)[0]

    def awake(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that do not rest, in their order; if all do, the one to be tried first."""
        awake = [candidate for candidate in candidates if self.rest_of(candidate.value) is None]
        return awake or [min(candidates, key=lambda candidate: self.rest_of(candidate.value) or _NO_REST)]


def get_fallback_decorator(arg_fallback: str, *, fallback_cooldown: Duration | None = None) -> Callable[[F], F]:
    """Make a decorator that tries the candidate values of one parameter in order, and does nothing else.

    Its options are those of `opero.opero`.
    """
    options: dict[str, Any] = {"arg_fallback": arg_fallback, "fallback_cooldown": fallback_cooldown}
    return decorator(
        lambda function: Plan(function, RetryPolicy(), fallback=FallbackOverParameter(function, **options)),
        (get_fallback_decorator, options),
    )
