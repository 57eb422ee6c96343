"""Fallback: the values of one named parameter, tried in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.core.candidates import Candidates, CandidatesFrom
from opero.core.checks import check_seconds, check_text
from opero.core.clock import clock
from opero.core.decoration import F, decorator
from opero.core.forks import ForkSafeLock
from opero.core.keys import identity_of
from opero.core.parameters import ParameterSlot
from opero.core.plan import Plan
from opero.core.retry import RetryPolicy
from opero.core.signature import MISSING, name_of
from opero.events import switches

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opero.core.checks import Duration
    from opero.core.flow import Candidate

__all__ = ["get_fallback_decorator"]


class FallbackOverParameter:
    """Which values, in which order, for this call.

    A list or tuple, or what `opero.core.candidates` makes, holds candidates; any other value, text included, is the
    only one. All calls know which candidates rest: those that asked for it, for as long as they did, and with a
    ``cooldown`` all that failed, for so many seconds. Those that were given up, by an error that is not retried, come
    after the others: with a key that was revoked nothing is won.
    """

    def __init__(self, slot: ParameterSlot, function_name: str, cooldown: float | None) -> None:
        self.parameter = slot.name
        self.position = slot.position
        self.slot = slot
        self._function_name = function_name
        self._cooldown = cooldown or 0.0
        # Whether it was given up, and until when it rests.
        self._rests: dict[Any, tuple[bool, float]] = {}
        self._lock = ForkSafeLock()

    def values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        given = self.slot.get(args, kwargs)
        if isinstance(given, (Candidates, CandidatesFrom)):
            given = given.values()
        if not isinstance(given, (list, tuple)):
            return [given]
        if not given:
            msg = (
                f"{self._function_name} got an empty {type(given).__name__} for {self.parameter!r}; "
                "give at least one candidate"
            )
            raise ValueError(msg)
        # Disabled, the function still gets one value.
        return list(given[:1] if switches.is_disabled else given)

    def first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments with the first candidate; None if that cannot be told at once."""
        given = self.slot.get(args, kwargs)
        if given.__class__ is Candidates:
            given = given.values()
        if given.__class__ is not list and given.__class__ is not tuple:
            return None if isinstance(given, (CandidatesFrom, list, tuple)) else (args, kwargs)
        if not given or (self._rests and len(given) > 1):
            return None
        return self.slot.put(args, kwargs, given[0])

    def arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with this value."""
        return (args, kwargs) if value is MISSING else self.slot.put(args, kwargs, value)

    def failed(self, value: Any, asked_for: float | None, *, again: bool = True) -> None:
        """Put a candidate to rest, for as long as it asked for or the cooldown lasts; not ``again``: for good."""
        seconds = max(self._cooldown, asked_for or 0.0)
        if not seconds:
            return
        key, now = identity_of(value), clock.now()
        with self._lock.lock:
            self._rests = {other: rest for other, rest in self._rests.items() if rest[1] > now}
            _, before = self._rests.get(key, (False, 0.0))
            self._rests[key] = not again, max(now + seconds, before)

    def rest_of(self, value: Any) -> tuple[bool, float] | None:
        """Whether a candidate was given up, and until when it rests, if it does."""
        rest = self._rests.get(identity_of(value)) if self._rests else None
        return None if rest is None or rest[1] <= clock.now() else rest

    def is_given_up(self, value: Any) -> bool:
        """Whether it rests after an error that is not retried, such as that of a key that was revoked."""
        rest = self.rest_of(value)
        return rest is not None and rest[0]

    def awake(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that do not rest, in their order; if all do, the one to be tried first."""
        rests = [(self.rest_of(candidate.value), candidate) for candidate in candidates]
        awake = [candidate for rest, candidate in rests if rest is None]
        return awake or [min(rests, key=lambda each: each[0] or (False, 0.0))[1]]


def fallback_policy(
    function: Callable[..., Any], arg_fallback: str, *, cooldown: Duration | None = None
) -> FallbackOverParameter:
    """Check fallback's options and make the policy for ``function``."""
    check_text("arg_fallback", arg_fallback, "the name of the parameter that holds the candidates")
    if cooldown is not None:
        cooldown = check_seconds("fallback_cooldown", cooldown, zero=False)
    return FallbackOverParameter(ParameterSlot(function, arg_fallback, "arg_fallback"), name_of(function), cooldown)


def get_fallback_decorator(arg_fallback: str, *, fallback_cooldown: Duration | None = None) -> Callable[[F], F]:
    """Make a decorator that tries the candidate values of one parameter in order, and does nothing else.

    Args:
        arg_fallback: Name of the parameter. A list or tuple passed for it (by position, by keyword or as the default)
            holds the candidates and the function gets one of them at a time; `opero.candidates` and
            `opero.candidates_from` do the same for type checkers; any other value is the only candidate.
        fallback_cooldown: Seconds (or a `datetime.timedelta`) for which a candidate that failed is tried last. Default:
            it is tried in its turn.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If the function has no such parameter, or the cooldown is not above 0; at a call, if the sequence of
            candidates is empty.
        AllFailedError: At a call, when every candidate failed.
    """
    return decorator(
        "get_fallback_decorator",
        lambda function: Plan(
            function, RetryPolicy(), fallback=fallback_policy(function, arg_fallback, cooldown=fallback_cooldown)
        ),
        (get_fallback_decorator, {"arg_fallback": arg_fallback, "fallback_cooldown": fallback_cooldown}),
    )
