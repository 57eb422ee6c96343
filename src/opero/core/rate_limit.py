"""The rate limit: when may this start?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from opero.core.checks import (
    check_callable,
    check_choice,
    check_flag,
    check_known,
    check_mapping,
    check_number,
    check_seconds,
    plain_number,
    wrong_type,
)
from opero.core.clock import clock
from opero.core.decoration import F, decorator
from opero.core.frozen import itself
from opero.core.limits.gates import gates
from opero.core.limits.ledger import Ledger
from opero.core.limits.line import ONE, Line, PerValue, Turn, Wants
from opero.core.limits.rates import CALLS, Rate, parse_rates
from opero.core.parameters import Per, asked_of_call
from opero.core.plan import Plan
from opero.core.retry import RetryPolicy
from opero.core.signature import name_of
from opero.core.steps import Failed, drive, drive_async
from opero.exceptions import RateLimitedError
from opero.utils.notes import duration

if TYPE_CHECKING:
    import os
    from collections.abc import Generator

    from opero.core.checks import Duration
    from opero.core.steps import Candidate

__all__ = ["RateLimiter", "get_rate_limit_decorator"]

PerOption = str | tuple[str, ...] | Callable[..., Any] | None

_OPTIONS = ("folder", "max_burst", "max_wait", "name", "scope", "spread", "url", "when_full")
_HOW_TO_WAIT = ("max_wait", "when_full")
_WHEN_FULL = ("next", "raise", "wait")


class RateLimiter:
    """A limit on starts per second, shared by every thread, task and event loop of the process, or by more.

    Slots are granted first come, first served, when they come due, never ahead. In any window of T seconds at most
    ``rate * T + max_burst`` calls start; bursts only make up for slots that passed while callers waited, or just now.
    It can be given to several functions as ``rate_limit``, which then share it, and used by itself::

        with limit: ...              # blocks until a slot has come
        async with limit: ...        # the same without blocking the event loop
        limit.acquire(timeout=2.5)   # False, at once, if the slot would come later
        limit.acquire(tokens=900)    # of RateLimiter({"calls": "500/minute", "tokens": "90000/minute"})

    A limiter of the process cannot be pickled: a copy would be another limit.

    Args:
        rate: Calls per second (fractions too), text such as ``"100/minute"``, ``"5/s"``, ``"900/15 minutes"``, or a
            list of these that all hold. Of a list, the lowest rate per second is the pace; those for longer times are
            quotas: never more than so many calls in any such time, however they are spread. (The fastest of them is
            the pace if there is nothing else.) Or a mapping of names to such rates: of each, ``calls`` apart, a call
            takes what ``rate_limit_cost`` or `acquire` says.
        when_full: What a call does that finds no slot free: ``"wait"``; ``"raise"`` a `RateLimitedError`; ``"next"``,
            try a candidate that has a slot free now first (with ``arg_fallback`` and ``per``).
        max_wait: Seconds, or a `datetime.timedelta`; a call whose slot would come later raises `RateLimitedError` at
            once. Default: no bound.
        spread: Whether starts are spread over the time of the rate. If not, every rate is a quota: as many at once as
            are left of it.
        max_burst: How many missed slots may be made up at once. Default: 40 ms worth of calls, at least 5.
        scope: Who shares the limit: ``"process"``; ``"machine"``, all processes of this user that give the same
            ``name`` (POSIX); ``"redis"``, all that give the same ``name`` and ``url``. When the file or the server
            fails, each process goes on with a limit of its own.
        name: The name of a limit that processes share.
        url: Of the redis server: ``"redis://host:6379/0"``.
        folder: Where a limit of the machine is kept. Default: the user's cache folder.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If a rate is not finite and above 0, or its text cannot be read, or ``max_burst`` is below 1, or an
            option does not apply to the scope.
    """

    def __init__(
        self,
        rate: Rate,
        *,
        when_full: Literal["wait", "next", "raise"] = "wait",
        max_wait: Duration | None = None,
        spread: bool = True,
        max_burst: int | None = None,
        scope: Literal["process", "machine", "redis"] = "process",
        name: str | None = None,
        url: str | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.when_full = check_choice("when_full", when_full, _WHEN_FULL)
        self.max_wait = math.inf if max_wait is None else check_seconds("max_wait", max_wait, zero=True)
        self.scope = scope
        self._rate = rate
        self._read = partial(parse_rates, max_burst=max_burst, spread=check_flag("spread", spread))
        whose: dict[str, Any] = {"scope": scope, "name": name, "url": url, "folder": folder}
        gate_of = gates(**whose)
        how: dict[str, Any] = {"when_full": when_full, "max_wait": max_wait, "spread": spread, "max_burst": max_burst}
        self._recipe = partial(RateLimiter, **how, **whose)
        self.limit = limit = Line(Ledger(self._read(rate)), gate_of())
        # Of the values of ``per``, at the same rate and as long paused.
        self.per_value: PerValue[Line] = PerValue(lambda value: limit.another(gate_of(value)))
        self.take_now = limit.take_now

    @property
    def names(self) -> tuple[str, ...]:
        """What is counted."""
        return self.limit.ledger.rates.names

    @property
    def rate(self) -> float:
        """Calls per second, of a mapping the first name's; may be set, as in ``RateLimiter``, while callers wait."""
        return self.limit.ledger.rates.per_second

    @rate.setter
    def rate(self, rate: Rate) -> None:
        rates = self._read(rate)
        if rates.names != self.names:
            msg = f"rate limits {list(rates.names)}, this limiter {list(self.names)}; write a rate of the same names"
            raise ValueError(msg)
        self._rate = rate
        for line in (self.limit, *self.per_value):
            line.change(rates)

    def __repr__(self) -> str:
        return f"RateLimiter({self._rate!r})"

    def __reduce__(self) -> Any:
        if self.scope == "process":
            raise TypeError(
                f"{self!r} belongs to its process, a copy would be another limit; give it scope='machine' or "
                "scope='redis' and a name to share it"
            )
        return self._recipe, (self._rate,)

    __copy__ = __deepcopy__ = itself

    def pause(self, seconds: Duration) -> None:
        """Let nothing start for so many seconds, or a `datetime.timedelta`; with ``per``, no value's calls either.

        Processes that share the limit hear of it, for at most an hour.
        """
        checked = check_seconds("seconds", seconds, zero=True)
        for line in (self.limit, *self.per_value):
            drive(line.pause(checked), _no_function)

    def acquire(self, *, timeout: Duration | None = None, **costs: float) -> bool:
        """Block until a slot has come, and take it.

        Args:
            timeout: Most seconds to wait, or a `datetime.timedelta`; 0 takes a slot only if one is free now. Default:
                no bound but ``max_wait``.
            **costs: What it takes of each name of the rate, ``calls`` is 1 if it is left out.

        Returns:
            Whether a slot was taken; False, at once, if it would not come in time.

        Raises:
            RateLimitedError: Without ``timeout``: ``when_full`` or ``max_wait`` lets it wait for no longer.
            TypeError: If a cost is missing, not known or no number.
            ValueError: If a cost is negative, or more than the whole rate.
        """
        if timeout is None and not costs and self._take_one_now():
            return True
        return bool(drive(self._acquire(timeout, costs), _no_function))

    async def acquire_async(self, *, timeout: Duration | None = None, **costs: float) -> bool:  # noqa: ASYNC109 - as of `acquire`
        """Wait for a slot without blocking the event loop, and take it; otherwise like `acquire`."""
        if timeout is None and not costs and self._take_one_now():
            return True
        return bool(await drive_async(self._acquire(timeout, costs), _no_function, "acquire_async"))

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_exc: object) -> None:
        """A slot is used up by the start."""

    async def __aenter__(self) -> Self:
        await self.acquire_async()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """A slot is used up by the start."""

    def _take_one_now(self) -> bool:
        return self.names == (CALLS,) and self.limit.gate is None and self.take_now()

    def _acquire(self, timeout: Duration | None, costs: Mapping[str, float]) -> Generator[Any, Any, bool]:
        check_known("acquire", costs, self.names)
        missing = [name for name in self.names if name not in costs and name != CALLS]
        if missing:
            raise TypeError(f"acquire has to be told the cost of {', '.join(missing)}; write acquire({missing[0]}=1)")
        amounts = self.checked({CALLS: 1, **costs}, "acquire")
        seconds = self.longest_wait({}) if timeout is None else check_seconds("timeout", timeout, zero=True)
        latest = clock.now() + seconds
        taken = (yield from Turn([(self.limit, amounts)], lambda: latest).wait()) == "taken"
        if taken or timeout is not None:
            return taken
        raise _full(self.limit.expected_wait(amounts), repr(self))

    def longest_wait(self, options: Mapping[str, Any]) -> float:
        """Seconds for which a call waits whose function has such ``rate_limit_options``."""
        max_wait = options.get("max_wait")
        if max_wait is not None:
            max_wait = check_seconds("rate_limit_options['max_wait']", max_wait, zero=True)
        if options.get("when_full", self.when_full) == "raise":
            return 0.0
        return self.max_wait if max_wait is None else max_wait

    def checked(self, costs: Mapping[str, Any], option: str = "rate_limit_cost") -> tuple[float, ...]:
        """Costs by name, in the order of the names; ``option`` is where they were given."""
        amounts = []
        for name, most in zip(self.names, self.limit.ledger.rates.most, strict=True):
            cost = check_number(f"{option}[{name!r}]", costs[name], "units", smallest=0)
            if cost > max(1.0, most):
                raise ValueError(
                    f"{option}[{name!r}]={cost:g} is more than the whole rate, {most:g}: such a call could never "
                    "start; split it, or raise the rate"
                )
            amounts.append(cost)
        return ONE if amounts == [1] else tuple(amounts)


Limits = Rate | RateLimiter | Sequence[Rate | RateLimiter]


def _no_function(*_args: Any, **_kwargs: Any) -> Any:
    raise AssertionError("taking a slot calls no function")


class FunctionLimit:
    """One function's view of its limiters: which of their lines apply to a call, and what it takes of each.

    Attributes:
        limiter: That of the function itself, or the first.
        per: What tells calls apart that have limits of their own.
        is_told_results: Whether results tell what calls have really cost.
    """

    def __init__(self, function: Callable[..., Any], per: Per | None = None, **options: Any) -> None:
        """``options`` are those of `opero.opero`: of the limit, and ``arg_fallback``."""
        given = check_mapping("rate_limit_options", options.get("rate_limit_options"))
        check_known("rate_limit_options", given, _OPTIONS)
        self._name = name_of(function)
        self._limiters = limiters = _limiters(options["rate_limit"], given, function)
        self.limiter = limiters[0]
        self.per = per
        # How long executions take, an average that forgets, and how far from it single ones are.
        self._mean = self._spread = 0.0
        # How a call waits may also be said for each function that shares a limiter.
        hows = [given.get("when_full", limiter.when_full) for limiter in limiters]
        check_choice("rate_limit_options['when_full']", hows[0], _WHEN_FULL)
        self._is_next = "next" in hows
        fallback = options.get("arg_fallback")
        if self._is_next and not (fallback is not None and per is not None and per.depends_on(fallback)):
            raise ValueError(
                "rate_limit_options={'when_full': 'next'} has no effect without candidates that have limits of their "
                "own; add arg_fallback='parameter' and per='parameter', or leave it out"
            )
        self._max_waits = [limiter.longest_wait(given) for limiter in limiters]
        names = {name for limiter in limiters for name in limiter.names}
        before, self._after = _costs(options.get("rate_limit_cost"), names)
        self._before = {n: asked_of_call(function, cost) if callable(cost) else cost for n, cost in before.items()}
        self.is_told_results = bool(self._after)
        # Known once for all, they are refused when decorating.
        is_asked = any(callable(cost) for cost in before.values())
        self._fixed = None if is_asked else [limiter.checked(before) for limiter in limiters]

    @property
    def take_now(self) -> Callable[[tuple[Any, ...], dict[str, Any]], bool] | None:
        """Takes a free slot for a call's arguments, and tells whether there was one; None if more has to be done."""
        limiter, per = self.limiter, self.per
        if len(self._limiters) > 1 or limiter.scope != "process" or self._fixed is None or self._after:
            return None
        (amounts,), of = self._fixed, limiter.per_value.of
        if per is None:
            return partial(limiter.take_now, amounts)

        def take_now(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
            try:
                line = of(per.get(args, kwargs))
            except Exception:  # noqa: BLE001 - the flow meets it again, and counts the call as one that failed
                return False
            return line.take_now(amounts)

        return take_now

    def learn(self, seconds: float) -> None:
        """An execution has taken so long."""
        # As TCP estimates round trips (RFC 6298).
        if not self._mean:
            self._mean, self._spread = seconds, seconds / 2
            return
        self._spread += (abs(seconds - self._mean) - self._spread) / 4
        self._mean += (seconds - self._mean) / 8

    @property
    def usual(self) -> float:
        """As long as nearly all executions take."""
        return self._mean and 1.1 * self._mean + 4 * self._spread

    def choose(self, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate to try next: the first, or with ``when_full="next"`` the one whose slot comes first."""
        return min(candidates, key=self._expected_wait) if self._is_next else candidates[0]

    def gives_way(self, candidate: Candidate, others: Sequence[Candidate]) -> bool:
        """Whether, with ``when_full="next"``, other processes have taken its slots and maybe not those of another."""
        if not self._is_next or self.limiter.scope == "process" or not self._expected_wait(candidate):
            return False
        return not all(self._expected_wait(other) for other in others)

    def take(
        self, candidate: Candidate, deadline: float, *, is_over: Callable[[], bool], is_turn: bool
    ) -> Generator[Any, Any, str]:
        """Wait for a slot; ``"late"``, at once, if it would come too late to be of use before the ``deadline``.

        A slot that is free is never refused, so that what is usual can change. ``"over"`` once ``is_over`` says that it
        is of no use; ``is_turn`` is of `opero.core.steps.Arrival`.
        """
        untils = [clock.now() + seconds for seconds in self._max_waits]
        turn = Turn(
            self._wants(candidate), lambda: -math.inf if is_over() else deadline - self.usual, untils, is_turn=is_turn
        )
        news = yield from turn.wait()
        if news == "full":
            raise _full(self._expected_wait(candidate), self._name)
        return news

    def ended(self, candidate: Candidate, outcome: Any, seconds: float) -> Generator[Any, Any, None]:
        """An execution has ended after so long: what its result has really cost is taken."""
        self.learn(seconds)
        if type(outcome) is Failed or not self._after:
            return
        truly = {
            name: check_number(f"the cost in {name!r} afterwards", after(outcome), "units", smallest=0)
            for name, after in self._after.items()
        }
        for limiter, (line, amounts) in zip(self._limiters, self._wants(candidate), strict=True):
            more = [truly.get(name, amount) - amount for name, amount in zip(limiter.names, amounts, strict=True)]
            if any(more):
                yield from line.correct(more, seconds)

    def pause(self, candidate: Candidate, seconds: float) -> Generator[Any, Any, None]:
        """Let nothing of this candidate's limit start for so long."""
        for line, _ in self._wants(candidate):
            yield from line.pause(seconds)

    def _expected_wait(self, candidate: Candidate) -> float:
        return max([line.expected_wait(amounts) for line, amounts in self._wants(candidate)])

    def _wants(self, candidate: Candidate) -> Wants:
        """The lines that a call stands in, and what it takes of each."""
        args, kwargs = candidate.args, candidate.kwargs
        if candidate.costs is None:
            costs = {n: cost(args, kwargs) if callable(cost) else cost for n, cost in self._before.items()}
            candidate.costs = self._fixed or [limiter.checked(costs) for limiter in self._limiters]
        if self.per is None:
            lines = [limiter.limit for limiter in self._limiters]
        else:
            value = self.per.get(args, kwargs)
            lines = [limiter.per_value.of(value) for limiter in self._limiters]
        return list(zip(lines, candidate.costs, strict=True))


def _full(wait: float, whose: str) -> RateLimitedError:
    """The error of a call that must not wait for so long."""
    return RateLimitedError(f"{whose}: the rate limit has no slot free; the next one is in {duration(wait)}", wait)


# What a function is decorated with


def _limiters(rate_limit: Any, options: Mapping[str, Any], function: Callable[..., Any]) -> list[RateLimiter]:
    """Those of the function itself first."""
    are_several = isinstance(rate_limit, Sequence) and not isinstance(rate_limit, (str, bytes))
    several: list[Any] = list(rate_limit) if are_several else [rate_limit]
    shared = [each for each in several if isinstance(each, RateLimiter)]
    if len({id(limiter) for limiter in shared}) < len(shared):
        raise ValueError("rate_limit has one RateLimiter twice; leave out one of the two")
    own = [each for each in several if not isinstance(each, RateLimiter)]
    if shared and not own:
        others = sorted(set(options) - set(_HOW_TO_WAIT))
        if others:
            raise ValueError(
                f"rate_limit_options has {others}, which belong to the limiter; write RateLimiter(rate, …)"
            )
        return shared
    if options.get("scope", "process") != "process" and options.get("name") is None:
        from opero.core.digests import lasting_identity

        options = {**options, "name": lasting_identity(function, "rate_limit_options={'name': …}")}
    rate = rate_limit if not shared else own[0] if len(own) == 1 else own
    return [RateLimiter(rate, **options), *shared]


def _costs(option: Any, names: set[str]) -> tuple[dict[str, Any], dict[str, Callable[[Any], Any]]]:
    """What a call takes by the names of the rates, and functions of the result that tell what it has really cost."""
    costs: dict[str, Any] = {}
    option = plain_number(option)
    if isinstance(option, Mapping):
        costs = check_mapping("rate_limit_cost", option)
        check_known("rate_limit_cost", costs, tuple(sorted(names)))
    elif callable(option) or isinstance(option, (int, float, tuple)):
        if len(names) > 1:
            raise ValueError(f"rate_limit_cost has to say of which rate; write a mapping with any of {sorted(names)}")
        costs = dict.fromkeys(names, option)
    elif option is not None:
        instead = (
            "a number, a function of the call's arguments, a pair of what a call takes before and after it ran, or a "
            "mapping by the names of the rates"
        )
        raise wrong_type("rate_limit_cost", option, instead)
    before: dict[str, Any] = {CALLS: 1}
    after: dict[str, Callable[[Any], Any]] = {}
    for name, cost in costs.items():
        where = f"rate_limit_cost[{name!r}]" if isinstance(option, Mapping) else "rate_limit_cost"
        before[name] = cost
        if isinstance(cost, tuple):
            if len(cost) != 2:  # noqa: PLR2004 - a pair
                msg = f"{where} is a tuple of {len(cost)}; write a pair, what a call takes before and after it ran"
                raise ValueError(msg)
            before[name], after[name] = cost[0], check_callable(f"{where}[1]", cost[1], "a function of the result")
        if callable(before[name]):
            check_callable(where, before[name], "a number, or a function of the call's arguments")
    missing = sorted(names - set(before))
    if missing:
        msg = f"rate_limit limits {', '.join(missing)}; add rate_limit_cost={{{missing[0]!r}: …}}, what a call takes"
        raise ValueError(msg)
    return before, after


def get_rate_limit_decorator(
    rate_limit: Limits, *, per: PerOption = None, rate_limit_cost: Any = None, **options: Any
) -> Callable[[F], F]:
    """Make a decorator that limits how often calls start, and does nothing else.

    Its options are those of `opero.opero`, and are checked before there is a function; all others are those of
    ``rate_limit_options`` there.
    """
    own = {"rate_limit": rate_limit, "rate_limit_cost": rate_limit_cost}
    # Here, too: what is wrong whatever the function is told before there is one.
    FunctionLimit(get_rate_limit_decorator, **own, rate_limit_options=options)

    def plan(function: Callable[..., Any]) -> Plan:
        values = None if per is None else Per(function, per)
        return Plan(function, RetryPolicy(), limit=FunctionLimit(function, values, **own, rate_limit_options=options))

    return decorator(plan, (get_rate_limit_decorator, {**own, "per": per, **options}))
