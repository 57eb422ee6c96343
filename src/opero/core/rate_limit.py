"""The rate limit: when may this start?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, TypeVar

from opero.core.checks import check_choice, check_known, check_mapping, check_seconds, check_text
from opero.core.clock import clock
from opero.core.decoration import F, decorator
from opero.core.limits.local import LocalLimit, Ticket
from opero.core.limits.per_value import LimitsPerValue
from opero.core.limits.rates import Rate, Rates, parse_rates
from opero.core.limits.scope import Scope
from opero.core.plan import Plan
from opero.core.retry import RetryPolicy
from opero.core.signature import parameter_slot
from opero.core.steps import drive, drive_async
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    import contextlib
    import os
    from collections.abc import Callable, Generator, Mapping, Sequence

    from opero.core.checks import Duration
    from opero.core.flow import Candidate
    from opero.core.limits.contract import Limit
    from opero.core.signature import ParameterSlot

__all__ = ["RateLimiter", "get_rate_limit_decorator"]

C = TypeVar("C", bound="Candidate")

_LIMITER_OPTIONS = ("folder", "max_burst", "name", "scope", "url")
WHEN_FULL = ("next", "wait")


class RateLimiter:
    """A limit on starts per second, shared by every thread, task and event loop of the process, or by more.

    Slots are granted first come, first served, when they come due, never ahead. In any window of T seconds at most
    ``rate * T + max_burst`` calls start; bursts only make up for slots that passed while the process could not run.
    It can be given to several functions as ``rate_limit``, which then share it, and used by itself::

        with limit: ...              # blocks until a slot has come
        async with limit: ...        # the same without blocking the event loop
        limit.acquire(timeout=2.5)   # False, at once, if the slot would come later

    A limiter of the process cannot be pickled: a copy would be another limit.

    Args:
        rate: Calls per second (fractions too), text such as ``"100/minute"``, ``"5/s"``, ``"1000/day"``, or a list of
            these that all hold. Of a list, the lowest rate per second is the pace; those per minute, hour or day are
            quotas: never more than so many calls in any such time, however they are spread. (The fastest of them is
            the pace if there is nothing else.)
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
        max_burst: int | None = None,
        scope: str = "process",
        name: str | None = None,
        url: str | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        options = {"max_burst": max_burst, "scope": scope, "name": name, "url": url, "folder": folder}
        self._set_up(rate, options, parse_rates(rate, max_burst, option="rate"), Scope(options, None, "{}"))

    @classmethod
    def _for_function(cls, rate: Rate, options: Mapping[str, Any], name: Callable[[], str]) -> RateLimiter:
        self = cls.__new__(cls)
        rates = parse_rates(rate, options.get("max_burst"), options="rate_limit_options")
        self._set_up(rate, options, rates, Scope(options, name, "rate_limit_options[{!r}]"))
        return self

    def _set_up(self, rate: Rate, options: Mapping[str, Any], rates: Rates, scope: Scope) -> None:
        self._asked = rate
        self._options = {**options}
        self._rates = rates
        self._scope = scope
        self.limit = scope.limit(rates)
        # Of the values of ``rate_limit_per``, at this rate.
        self.per_value = LimitsPerValue(scope.limit_of_value, rates)
        self.take_now = self.limit.take_now
        self.expected_wait = self.limit.expected_wait

    @property
    def rate(self) -> float:
        """Calls per second; may be set, as in ``RateLimiter``, while callers wait."""
        return self._rates.per_second

    @rate.setter
    def rate(self, rate: Rate) -> None:
        rates = parse_rates(rate, self._options.get("max_burst"), option="rate")
        self._asked, self._rates = rate, rates
        self.limit.change(rates)
        self.per_value.change(rates)

    def __repr__(self) -> str:
        return f"RateLimiter({self._asked!r})"

    def __reduce__(self) -> Any:
        if self._scope.kind == "process":
            msg = (
                f"{self!r} belongs to its process, a copy would be another limit; give it scope='machine' or "
                "scope='redis' and a name to share it"
            )
            raise TypeError(msg)
        return _make_limiter, (self._asked, {**self._options, "name": self._scope.name})

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def ticket(self) -> Ticket:
        """Ask for a slot without waiting for it here; only for a limit of the process."""
        assert isinstance(self.limit, LocalLimit)  # noqa: S101 - for the type checkers
        return self.limit.ticket()

    def acquire(self, *, timeout: Duration | None = None) -> bool:
        """Block until a slot has come, and take it.

        Args:
            timeout: Most seconds to wait, or a `datetime.timedelta`; 0 takes a slot only if one is free now. Default:
                no bound.

        Returns:
            Whether a slot was taken; False, at once, if it would not come in time.
        """
        taken: bool = drive(self._acquire(timeout), _no_function)
        return taken

    async def acquire_async(self, *, timeout: Duration | None = None) -> bool:  # noqa: ASYNC109 - as of `acquire`
        """Wait for a slot without blocking the event loop, and take it; otherwise like `acquire`."""
        taken: bool = await drive_async(self._acquire(timeout), _no_function, "acquire_async")
        return taken

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

    def _acquire(self, timeout: Duration | None) -> Generator[Any, Any, bool]:
        if timeout is None:
            return (yield from self.limit.take(None))
        seconds = check_seconds("timeout", timeout, zero=True)
        if not seconds:
            return (yield from self.limit.try_to_take())
        return (yield from self.limit.take(clock.now() + seconds))


def _make_limiter(rate: Rate, options: dict[str, Any]) -> RateLimiter:
    return RateLimiter(rate, **options)


def _no_function(*_args: Any, **_kwargs: Any) -> Any:
    msg = "taking a slot calls no function"
    raise AssertionError(msg)


class FunctionLimit:
    """One function's view of a limiter: which of its limits applies to a call."""

    def __init__(self, limiter: RateLimiter, slot: ParameterSlot | None, *, prefers_free: bool) -> None:
        self.limiter = limiter
        self.parameter = None if slot is None else slot.name
        self._slot = slot
        self._prefers_free = prefers_free

    def has_slot_now(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Take a slot for a call if one is free now; False, too, where asking could block."""
        take_now = self.limiter.take_now
        if take_now is None or self._slot is None:
            return take_now is not None and take_now()
        try:
            return self.limiter.per_value.take_now(self._slot.get(args, kwargs))
        except MisuseError:
            # The flow asks again, and counts a value that has no limit as a call that failed.
            return False

    def choose(self, candidates: Sequence[C]) -> Generator[Any, Any, tuple[C, bool]]:
        """The candidate to try next, and whether its slot has been taken already."""
        if self._prefers_free and len(candidates) > 1:
            for candidate in candidates:
                with self._limit_of(candidate) as limit:
                    if (yield from limit.try_to_take()):
                        return candidate, True
            return min(candidates, key=self._wait_of), False
        return candidates[0], False

    def take(self, candidate: Candidate, deadline: float | None) -> Generator[Any, Any, bool]:
        """Wait for a slot; False, at once, if it would come after the ``deadline``."""
        with self._limit_of(candidate) as limit:
            return (yield from limit.take(deadline))

    def pause(self, candidate: Candidate, seconds: float) -> Generator[Any, Any, None]:
        """Let nothing of this candidate's limit start for so long."""
        with self._limit_of(candidate) as limit:
            yield from limit.pause(seconds)

    def _wait_of(self, candidate: Candidate) -> float:
        with self._limit_of(candidate) as limit:
            return limit.expected_wait()

    def _limit_of(self, candidate: Candidate) -> contextlib.AbstractContextManager[Limit]:
        if self._slot is None:
            return _Always(self.limiter.limit)
        return self.limiter.per_value.using(self._slot.get(candidate.args, candidate.kwargs))


class _Always:
    """`contextlib.nullcontext`, which takes long to import."""

    __slots__ = ("_limit",)

    def __init__(self, limit: Limit) -> None:
        self._limit = limit

    def __enter__(self) -> Limit:
        return self._limit

    def __exit__(self, *_exc: object) -> None:
        return None


def limit_policy(
    function: Callable[..., Any],
    rate_limit: Rate | RateLimiter,
    *,
    per: str | None = None,
    options: Mapping[str, Any] | None = None,
    has_candidates: bool = False,
) -> FunctionLimit:
    """Check the rate limit's options and make the policy for ``function``."""
    if isinstance(options, str) and "://" in options:
        # Not shown: it may hold a password.
        msg = "rate_limit_options is a URL; write a mapping of option names to values, with the URL as 'url'"
        raise TypeError(msg)
    given = check_mapping("rate_limit_options", options)
    check_known("rate_limit_options", given, (*_LIMITER_OPTIONS, "when_full"))
    when_full = check_choice("rate_limit_options['when_full']", given.pop("when_full", "wait"), WHEN_FULL)
    limiter = _limiter(rate_limit, given, lambda: _lasting_name(function))
    if per is not None:
        check_text("rate_limit_per", per, "the name of the parameter whose values have limits of their own")
    slot = None if per is None else parameter_slot(function, per, "rate_limit_per")
    if when_full == "next" and not (has_candidates and slot is not None):
        msg = (
            "rate_limit_options={'when_full': 'next'} has no effect without candidates that have limits of their own; "
            "add arg_fallback='parameter' and rate_limit_per='parameter', or leave it out"
        )
        raise ValueError(msg)
    return FunctionLimit(limiter, slot, prefers_free=when_full == "next")


def _limiter(rate_limit: Rate | RateLimiter, options: Mapping[str, Any], name: Callable[[], str]) -> RateLimiter:
    if not isinstance(rate_limit, RateLimiter):
        return RateLimiter._for_function(rate_limit, options, name)  # noqa: SLF001 - of this module
    if options:
        msg = f"rate_limit_options has {sorted(options)}, which belong to the limiter; write RateLimiter(rate, …)"
        raise ValueError(msg)
    return rate_limit


def _lasting_name(function: Callable[..., Any]) -> str:
    from opero.core.digests import lasting_identity

    return lasting_identity(function, "rate_limit_options={'name': …}")


def get_rate_limit_decorator(
    rate_limit: Rate | RateLimiter, *, rate_limit_per: str | None = None, **options: Any
) -> Callable[[F], F]:
    """Make a decorator that limits how often calls start, and does nothing else.

    Args:
        rate_limit: Calls per second (fractions too), text such as ``"100/minute"``, a list of such limits that all
            hold, or a `RateLimiter` that functions share. Without the last, each decorated function has a limit of its
            own, shared by all its callers in the process.
        rate_limit_per: Name of a parameter: each of its values has its own limit.
        **options: As ``rate_limit_options`` of `opero.opero`: ``max_burst``, ``scope``, ``name``, ``url``, ``folder``.

    Raises:
        TypeError: If an option has the wrong type or is not known.
        ValueError: If a rate is not finite and above 0, or its text cannot be read, or an option cannot apply.
    """
    check_known("rate_limit_options", options, _LIMITER_OPTIONS)
    _limiter(rate_limit, options, lambda: "")
    return decorator(
        "get_rate_limit_decorator",
        lambda function: Plan(
            function,
            RetryPolicy(),
            limit=limit_policy(function, rate_limit, per=rate_limit_per, options=options),
        ),
        (get_rate_limit_decorator, {"rate_limit": rate_limit, "rate_limit_per": rate_limit_per, **options}),
    )
