"""What is known of one decorated function, of one call of it, and of one attempt that failed: plain data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from opero.core.clock import clock
from opero.core.signature import MISSING, calling_kind, module_of, name_of, refuse_generator
from opero.core.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Callable

    from tenacity import RetryCallState

    from opero.core.breaker import FunctionBreaker
    from opero.core.cache import ResultCache
    from opero.core.fallback import FallbackOverParameter
    from opero.core.limits.places import PlacesForFunction
    from opero.core.rate_limit import FunctionLimit
    from opero.core.retry import RetryPolicy
    from opero.core.stores.flights import Presence
    from opero.events import Subscription


# The layers that `opero.core.decoration` asks before a first attempt without a flow.
ANSWER_AT_ONCE = ("fallback", "breaker", "places", "limit", "on_event")


class Plan:
    """The settings of one decorated function, which never change: one policy per layer, None where it is off."""

    cache: ResultCache | None = None
    total_timeout: float | None = None
    fallback: FallbackOverParameter | None = None
    breaker: FunctionBreaker | None = None
    places: PlacesForFunction | None = None
    limit: FunctionLimit | None = None
    attempt_timeout: float | None = None
    on_event: Subscription | None = None
    default: Any = MISSING

    def __init__(self, function: Callable[..., Any], retry: RetryPolicy, **layers: Any) -> None:
        # Not at the top, so that `import opero` stays quick, and not when a call fails: the program may be ending.
        from opero.core.parameters import own_signature

        self._signature_of = own_signature
        self.function = function
        self.retry = retry
        self.stats = Stats()
        self.name = name_of(function)
        self.module = module_of(function)
        self.kind = calling_kind(function)
        self.is_async = self.kind in {"async def", "async generator"}
        vars(self).update(layers)
        needs_result = {
            "retry_if_result=…": retry.retry_if_result is not None,
            "retry_error_callback": "retry_error_callback" in retry.options,
            "default=…": self.default is not MISSING,
            "a cost that is told by the result": self.limit is not None and self.limit.is_told_results,
        }
        for what, is_given in needs_result.items():
            if is_given:
                refuse_generator(function, what)

    @property
    def asks_first(self) -> set[str]:
        """The layers that decide about first attempts, apart from the cache and time limits."""
        asked = {name for name in ANSWER_AT_ONCE if getattr(self, name) is not None}
        return asked | {"retry"} if self.retry.watches_every_attempt else asked

    def is_wrong(self, call: Call) -> bool:
        """Whether the call's arguments do not fit the function, so that the function never began."""
        try:
            self._signature_of(self.function).bind(*call.args, **call.kwargs)
        except ValueError:  # its parameters are not known, as of some builtins
            return False
        except TypeError:
            return True
        return False

    @property
    def bare(self) -> Plan:
        """The same function without any policy, for the time in which opero is disabled."""
        one_round = type(self.retry)(retry_on=self.retry.retry_on)
        return Plan(self.function, one_round, fallback=self.fallback, stats=self.stats)

    def changed(self, **changes: Any) -> Plan:
        """The same with other values of these attributes."""
        new = object.__new__(Plan)
        vars(new).update(vars(self), **changes)
        return new


class Call:
    """What belongs to one call and to nothing else.

    Attributes:
        began: When its last attempt began.
        deadline: When ``total_timeout`` ends, if there is one.
        failure: How its first attempt, which was made before the flow began, has failed.
        failed: The last attempt that failed, until the next one begins.
        attempts: Executions that have begun; ``rounds`` is how often one candidate was.
        retry_state: tenacity's, made by the policy when it is first needed.
        key: Of the cache, if it has been made.
        cached: Whether the result came from the cache.
        is_made_up: Whether a user's hook supplied the result, which is not the function's, to be remembered.
        refreshes: Whether the function runs, whatever the cache has.
        presence: Of the map that it is part of, which goes on by itself.
        tell: Tells those who listen.
    """

    deadline = math.inf
    attempts = 0
    rounds = 0
    failed: Verdict | None = None
    retry_state: RetryCallState | None = None
    cached = False
    is_made_up = False
    presence: Presence | None = None
    index: int | None = None
    tell: Callable[..., None] | None = None

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        started: float | None = None,
        failure: Exception | None = None,
        key: Any = MISSING,
        refreshes: bool = False,
    ) -> None:
        self.args = args
        self.kwargs = kwargs
        self.started = self.began = clock.now() if started is None else started
        self.failure = failure
        self.key = key
        self.refreshes = refreshes

    def time_left(self) -> float | None:
        """Seconds until ``total_timeout`` ends; None without one."""
        return None if self.deadline == math.inf else self.deadline - clock.now()


class Verdict(NamedTuple):
    """What a failed attempt means for its candidate, for the call and for the circuit.

    Attributes:
        error: Why it failed.
        outcome: What the attempt gave: `opero.core.steps.Failed`, or the result that was rejected.
        again: The candidate may be tried again in the next round.
        delay: Seconds until then; None for the usual backoff.
        rests: The candidate is put to rest, so that other calls try it last for a while.
        ends: The call ends, whatever candidates and rounds are left.
        counts: It speaks against the service, and so counts for its circuit; otherwise it was an answer.
    """

    error: Exception
    outcome: Any
    again: bool = False
    delay: float | None = None
    rests: bool = True
    ends: bool = False
    counts: bool = True
