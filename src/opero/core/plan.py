"""The plan of one decorated function: which policies are on, and what each of them is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeVar

from opero.core.clock import clock
from opero.core.signature import MISSING, Kind, kind_of, module_of, name_of
from opero.core.stats import Stats
from opero.core.steps import Failed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from opero.core.cache import ResultCache
    from opero.core.flights import Presence
    from opero.core.listeners import Listener, Teller

C = TypeVar("C", bound="Candidate")


class Call:
    """What belongs to one call and to nothing else."""

    __slots__ = (
        "args",
        "attempts",
        "blocks",
        "cached",
        "deadline",
        "flight",
        "index",
        "key",
        "kwargs",
        "presence",
        "refreshes",
        "rounds",
        "started",
        "tell",
    )

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        started: float | None = None,
        attempts: int = 0,
        key: Any = MISSING,
        blocks: bool = False,
        presence: Presence | None = None,
    ) -> None:
        self.blocks = blocks
        self.presence = presence
        self.args = args
        self.kwargs = kwargs
        self.started = clock.now() if started is None else started
        self.attempts = attempts
        self.rounds = 0
        self.key = key
        self.cached = False
        # Whether the function runs, whatever the cache has.
        self.refreshes = False
        self.flight: object = None
        # When ``total_timeout`` ends; None without one.
        self.deadline: float | None = None
        # Its place in a map.
        self.index: int | None = None
        self.tell: Teller | None = None

    def end_after(self, seconds: float) -> None:
        """Set the `deadline`."""
        self.deadline = self.started + seconds

    def time_left(self) -> float | None:
        """Seconds until ``total_timeout`` ends; None without one."""
        return None if self.deadline is None else self.deadline - clock.now()


@dataclass(slots=True)
class Verdict:
    """What a failed attempt means for its candidate, for the call and for the circuit.

    Attributes:
        error: Why it failed.
        outcome: What the attempt gave: `Failed`, or the result that was rejected.
        again: The candidate may be tried again in the next round.
        delay: Seconds until then; None for the usual backoff.
        rests: The candidate is put to rest (``fallback_cooldown``).
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


class Final:
    """The end of a call: `Failed`, or a result that a user's hook supplied in place of the function."""

    __slots__ = ("outcome",)

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome


class CacheInfo(NamedTuple):
    """What `functools.lru_cache` tells of itself, told by an opero cache."""

    hits: int
    misses: int
    maxsize: int | None
    currsize: int


class RetryRounds(Protocol):
    """Retry's view of one call."""

    def begin(self) -> None:
        """A round starts."""
        ...

    def judge(self, outcome: Any) -> Verdict | None:
        """What a failed execution means, None if it gave the call's result; raises what the user's predicate raises."""
        ...

    def after(self, verdict: Verdict, may_wait: Callable[[float], bool], /) -> float | Final:
        """Seconds until the next round, or the end of the call; ``verdict`` speaks for the whole round.

        ``may_wait`` tells whether another round can begin after so many seconds.
        """
        ...

    def cut_short(self, verdict: Verdict) -> Final:
        """The end of the call within a round; ``verdict`` is the last one."""
        ...


class Once:
    """The rounds of a call that is not retried."""

    def begin(self) -> None:
        """There is one round only."""

    def judge(self, outcome: Any) -> Verdict | None:
        return Verdict(outcome.error, outcome) if outcome.__class__ is Failed else None

    def after(self, verdict: Verdict, _may_wait: Callable[[float], bool]) -> Final:
        return Final(Failed(verdict.error))

    def cut_short(self, verdict: Verdict) -> Final:
        return Final(Failed(verdict.error))


class RetryPolicy(Protocol):
    """How long until the next round, or give up."""

    @property
    def watches_every_attempt(self) -> bool:
        """Whether good results and first attempts have to be shown to it too."""
        ...

    def rounds(self, call: Call, function: Callable[..., Any]) -> RetryRounds:
        """Start the bookkeeping of one call."""
        ...


class FallbackPolicy(Protocol):
    """Which values, in which order, for this call."""

    @property
    def parameter(self) -> str:
        """Name of the parameter that holds the candidates."""
        ...

    @property
    def position(self) -> int | None:
        """Its place among the positional arguments, None if it is passed by keyword only."""
        ...

    def values(self, call: Call) -> list[Any]:
        """The candidates as they were given; raises ValueError if there are none."""
        ...

    def arguments(self, call: Call, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with one candidate in the place of all."""
        ...

    def failed(self, value: Any, asked_for: float | None) -> None:
        """Remember that this candidate has just failed, and how many seconds of rest it asked for."""
        ...

    def rests_until(self, value: Any) -> float | None:
        """When this candidate has rested enough, after what all calls heard of it; None if it does not rest."""
        ...


class FirstCandidate:
    """A fallback that never falls back: the function still gets one value."""

    def __init__(self, policy: FallbackPolicy) -> None:
        self._policy = policy
        self.parameter = policy.parameter
        self.position = policy.position
        self.arguments = policy.arguments
        self.failed = policy.failed
        self.rests_until = policy.rests_until

    def values(self, call: Call) -> list[Any]:
        return self._policy.values(call)[:1]


class Candidate(Protocol):
    """The arguments of one attempt."""

    @property
    def args(self) -> tuple[Any, ...]: ...

    @property
    def kwargs(self) -> dict[str, Any]: ...


class Passage(Protocol):
    """One attempt through a circuit, a context to be left in any case."""

    def may_start(self) -> bool:
        """Whether the attempt may still begin, after it waited for something else."""
        ...

    def waiting(self, wait: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Go through a wait, which gives None as soon as the circuit opens."""
        ...

    def tell(self, *, failed: bool | None) -> None:
        """How it ended; None if that says nothing of the service."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_exc: object) -> None: ...


class BreakerPolicy(Protocol):
    """Is it any use to call now?"""

    @property
    def failures(self) -> int:
        """How many failures in a row open a circuit."""
        ...

    def admits(self, value: Any, *, after: float = 0.0) -> bool:
        """Whether an attempt with this candidate could go through, so many seconds from now."""
        ...

    def enter(self, value: Any) -> Passage | None:
        """Let an attempt through; None if the circuit is open."""
        ...

    def trial_in(self, values: Iterable[Any]) -> float | None:
        """Seconds until one of these candidates may be tried again; None while one of them is being tried."""
        ...


class LimitPolicy(Protocol):
    """When may this start?"""

    @property
    def parameter(self) -> str | None:
        """Name of the parameter whose values have limits of their own; None if one limit is for all calls."""
        ...

    @property
    def take_now(self) -> Callable[..., bool] | None:
        """Takes a free slot, for `value_of` the call; None if asking could block."""
        ...

    def value_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The value that has a limit of its own, alone in a tuple; nothing in it if one limit is for all calls."""
        ...

    def choose(self, candidates: Sequence[C]) -> Generator[Any, Any, tuple[C, bool]]:
        """The one of several `Candidate` to try next, and whether its slot has been taken already."""
        ...

    def take(self, candidate: Candidate, deadline: float | None) -> Generator[Any, Any, bool]:
        """Wait for a slot; False, at once, if it would come after the ``deadline``."""
        ...

    def pause(self, candidate: Candidate, seconds: float) -> Generator[Any, Any, None]:
        """Let nothing of this candidate's limit start for so long."""
        ...


@dataclass(frozen=True, repr=False)
class Plan:
    """Frozen settings of one decorated function: one policy per layer, None where it is off."""

    function: Callable[..., Any]
    cache: ResultCache | None = None
    total_timeout: float | None = None
    retry: RetryPolicy | None = None
    fallback: FallbackPolicy | None = None
    breaker: BreakerPolicy | None = None
    limit: LimitPolicy | None = None
    attempt_timeout: float | None = None
    on_event: Listener | None = None
    default: Any = MISSING
    stats: Stats = field(default_factory=Stats)
    name: str = field(init=False)
    module: str = field(init=False)
    kind: Kind = field(init=False)
    is_async: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", name_of(self.function))
        object.__setattr__(self, "module", module_of(self.function))
        object.__setattr__(self, "kind", kind_of(self.function))
        object.__setattr__(self, "is_async", self.kind in {"async def", "async generator"})

    def __repr__(self) -> str:
        layers = ("cache", "total_timeout", "retry", "fallback", "breaker", "limit", "attempt_timeout", "on_event")
        return f"<plan of {self.name}: {', '.join(n for n in layers if getattr(self, n) is not None) or 'no policy'}>"

    @property
    def first_attempt_is_direct(self) -> bool:
        """Whether, apart from cache and rate limit, nothing has to be decided before the function runs first."""
        timed = self.total_timeout is not None or self.attempt_timeout is not None
        watched = self.retry is not None and self.retry.watches_every_attempt
        asks = self.limit is not None and self.limit.take_now is None
        return (
            self.fallback is None
            and self.breaker is None
            and not (timed or watched or asks or self.on_event is not None)
        )

    @property
    def bare(self) -> Plan:
        """The same function without any policy, for the time in which opero is disabled."""
        fallback = None if self.fallback is None else FirstCandidate(self.fallback)
        return Plan(self.function, fallback=fallback, stats=self.stats)
