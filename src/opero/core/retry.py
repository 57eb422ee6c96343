"""Retry: tenacity's policy, asked from outside one round at a time.

tenacity costs about 15 µs a call, which is paid after a first failure only (unless its hooks want to see every
attempt), and 30 ms to import, which is paid when the first policy is made: a call may fail deep in a recursion, in a
signal handler or when the program ends, where nothing can be imported. It is driven through `tenacity.Retrying.iter`,
on a private copy for each failing call: the `statistics` of a shared one are one dict for all threads (tenacity 9.2.1,
its issue 701).
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from opero.core.checks import (
    check_callable,
    check_count,
    check_flag,
    check_known,
    check_mapping,
    check_number,
    check_seconds,
)
from opero.core.clock import clock
from opero.core.decoration import F, decorator
from opero.core.plan import ACCEPTED, Call, Final, Plan, Verdict
from opero.core.showing import shown
from opero.core.signature import name_of
from opero.core.steps import Failed
from opero.exceptions import RemoteError
from opero.utils.logging import log
from opero.utils.notes import add_note

if TYPE_CHECKING:
    import tenacity  # noqa: TC004 - imported by `_import_tenacity`

__all__ = ["get_retry_decorator"]

RetryOn = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool | float]


def backoff_delay(failures: int, *, factor: float, smallest: float, largest: float) -> float:
    """Seconds to wait after the ``failures``-th failed round: ``min(largest, smallest * factor**(failures - 1))``."""
    try:
        return min(largest, smallest * factor ** (failures - 1))
    except OverflowError:
        return largest if smallest else 0.0


def jittered(delay: float, random_unit: float) -> float:
    """Spread a delay over its upper half, so that callers that failed together do not come back together.

    "Equal jitter" of M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return delay * (0.5 + 0.5 * random_unit)


def _import_tenacity() -> None:
    """Not at the top, so that `import opero` stays quick; for good, because ``import`` fails when the program ends."""
    global tenacity  # noqa: PLW0603 - as above
    import tenacity


class RetryWithTenacity:
    """How many rounds, which errors, how long between."""

    def __init__(
        self,
        *,
        retries: int,
        backoff_factor: float,
        min_delay: float,
        max_delay: float,
        jitter: bool,
        retry_on: RetryOn,
        options: dict[str, Any],
    ) -> None:
        self.retries = retries
        self.backoff_factor = backoff_factor
        self.min_delay = min_delay
        self.max_delay = max_delay
        self.jitter = jitter
        self.retry_on = retry_on
        self.options = options
        self.retrying = self._make_retrying()

    @property
    def watches_every_attempt(self) -> bool:
        """Tenacity's ``retry`` may judge results, and ``before`` is told of every attempt."""
        return "retry" in self.options or "before" in self.options

    def rounds(self, call: Call, function: Callable[..., Any]) -> TenacityRounds:
        return TenacityRounds(self, call, function)

    def may_retry(self, error: Exception) -> bool | float:
        """``retry_on``'s answer: yes, no, or yes after so many seconds."""
        if isinstance(self.retry_on, (type, tuple)):
            remote = error.error_class if isinstance(error, RemoteError) else None
            return isinstance(error, self.retry_on) or (remote is not None and issubclass(remote, self.retry_on))
        answer = self.retry_on(error)
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            return max(0.0, float(answer)) if not math.isnan(answer) else True
        return bool(answer)

    def _make_retrying(self) -> tenacity.Retrying:
        _import_tenacity()
        ours: dict[str, Any] = {
            "stop": tenacity.stop_after_attempt(self.retries + 1),
            "wait": self._wait,
            "reraise": True,
        }
        if self.options:
            check_known("retry_options", self.options, inspect.signature(tenacity.Retrying).parameters)
        return tenacity.Retrying(**{**ours, **self.options})

    def _wait(self, state: tenacity.RetryCallState) -> float:
        delay = backoff_delay(
            state.attempt_number, factor=self.backoff_factor, smallest=self.min_delay, largest=self.max_delay
        )
        return jittered(delay, random.random()) if self.jitter else delay  # noqa: S311 - spreads load, guards nothing


class TenacityRounds:
    """tenacity's state for one call, made when it is first needed."""

    def __init__(self, policy: RetryWithTenacity, call: Call, function: Callable[..., Any]) -> None:
        self._policy = policy
        self._call = call
        self._function = function
        self._retrying: tenacity.Retrying | None = None
        self._state: tenacity.RetryCallState | None = None
        self._rejected: Exception | None = None

    def begin(self) -> None:
        if self._policy.watches_every_attempt:
            retrying, state = self._tenacity()
            self._guarded("before", lambda: retrying.iter(state), None)

    def judge(self, outcome: Any) -> Verdict:
        if outcome.__class__ is not Failed:
            if "retry" not in self._policy.options or not self._predicate_says_again(outcome):
                return ACCEPTED
            _retrying, state = self._tenacity()
            assert state.outcome is not None  # noqa: S101 - for the type checkers
            self._rejected = tenacity.RetryError(state.outcome)
            return Verdict(accepted=False, error=self._rejected, retryable=True)
        error = outcome.error
        if "retry" in self._policy.options:
            return Verdict(accepted=False, error=error, retryable=self._predicate_says_again(outcome))
        answer = self._guarded("retry_on", lambda: self._policy.may_retry(error), False)  # noqa: FBT003 - a predicate's answer
        if isinstance(answer, bool):
            return Verdict(accepted=False, error=error, retryable=answer)
        return Verdict(accepted=False, error=error, retryable=True, delay=answer)

    def after(self, verdict: Verdict) -> float | Final:
        if not verdict.retryable:
            return Final(Failed(verdict.error))
        retrying, state = self._tenacity()
        if not retrying.enabled:
            return Final(Failed(verdict.error))
        if verdict.error is not self._rejected:
            _set_outcome(state, Failed(verdict.error))
        retrying.retry = _always
        retrying.wait = self._policy.retrying.wait if verdict.delay is None else _constant(verdict.delay)
        return self._next_step(retrying, state, verdict.error)

    def _next_step(
        self, retrying: tenacity.Retrying, state: tenacity.RetryCallState, error: Exception
    ) -> float | Final:
        traceback = error.__traceback__
        try:
            step = retrying.iter(state)
        except Exception as raised:  # noqa: BLE001 - tenacity raises to give up: the call's own error, or its own
            if raised is not error:
                if isinstance(raised, retrying.retry_error_cls) or isinstance(error, tenacity.TryAgain):
                    return Final(Failed(raised))
                self._complain("retry_options", raised, error)
            return Final(Failed(error.with_traceback(traceback)))
        if not isinstance(step, tenacity.DoSleep):
            return Final(step)
        state.prepare_for_next_attempt()
        return float(step)

    def _predicate_says_again(self, outcome: Any) -> bool:
        _retrying, state = self._tenacity()
        _set_outcome(state, outcome)
        if outcome.__class__ is Failed and isinstance(outcome.error, tenacity.TryAgain):
            return True
        predicate = self._policy.retrying.retry
        return bool(self._guarded("retry", lambda: predicate(state), False))  # noqa: FBT003 - a predicate's answer

    def _tenacity(self) -> tuple[tenacity.Retrying, tenacity.RetryCallState]:
        if self._retrying is None or self._state is None:
            self._retrying = self._policy.retrying.copy()
            self._retrying.begin()
            self._state = tenacity.RetryCallState(
                self._retrying, fn=self._function, args=self._call.args, kwargs=self._call.kwargs
            )
            # It is made after the first attempt, but its clock shall tell of the whole call.
            self._state.start_time -= clock.now() - self._call.started
        return self._retrying, self._state

    def _guarded(self, hook: str, ask: Callable[[], Any], otherwise: Any) -> Any:
        """A user's hook that raises must not replace the error that the user's function raised."""
        try:
            return ask()
        except Exception as raised:  # noqa: BLE001 - whatever it is, it is logged
            self._complain(hook, raised, None)
            return otherwise

    def _complain(self, hook: str, raised: Exception, error: Exception | None) -> None:
        # Not its text, which may hold arguments.
        text = f"{hook} of {name_of(self._function)} raised {type(raised).__name__}; not retried"
        log("WARNING", "{}", text)
        if error is not None:
            add_note(error, f"opero: {text}")


def _set_outcome(state: tenacity.RetryCallState, outcome: Any) -> None:
    if outcome.__class__ is Failed:
        error = outcome.error
        state.set_exception((type(error), error, error.__traceback__))
    else:
        state.set_result(outcome)


def _always(_state: tenacity.RetryCallState) -> bool:
    return True


def _constant(seconds: float) -> Callable[[tenacity.RetryCallState], float]:
    return lambda _state: seconds


def retry_policy(
    *,
    retries: int = 3,
    backoff_factor: float = 2.0,
    min_delay: float = 0.1,
    max_delay: float = 30.0,
    jitter: bool = True,
    retry_on: RetryOn = Exception,
    options: Mapping[str, Any] | None = None,
    judges_for_others: bool = False,
) -> RetryWithTenacity | None:
    """Check retry's options and make the policy; None where nothing is ever retried.

    ``judges_for_others``: ``retry_on`` has a meaning without retries, too.
    """
    check_count("retries", retries, "extra rounds", smallest=0)
    check_number("backoff_factor", backoff_factor, "times", smallest=1)
    check_seconds("min_delay", min_delay, zero=True)
    check_seconds("max_delay", max_delay, zero=True)
    if max_delay < min_delay:
        msg = f"max_delay={max_delay!r} is below min_delay={min_delay!r}; write a max_delay that is not"
        raise ValueError(msg)
    check_flag("jitter", jitter)
    _check_retry_on(retry_on)
    given = check_mapping("retry_options", options)
    if "sleep" in given:
        msg = "retry_options['sleep'] cannot apply: opero waits by itself, sync or async; write 'wait' to say how long"
        raise ValueError(msg)
    for name in _HOOKS:
        if given.get(name) is not None or (name in given and name not in _OPTIONAL_HOOKS):
            _check_hook(name, given[name])
    if retries == 0 and not given and (retry_on is Exception or not judges_for_others):
        return None
    return RetryWithTenacity(
        retries=retries,
        backoff_factor=backoff_factor,
        min_delay=min_delay,
        max_delay=max_delay,
        jitter=jitter,
        retry_on=retry_on,
        options=given,
    )


_HOOKS = ("stop", "wait", "retry", "before", "after", "before_sleep", "retry_error_callback")
_OPTIONAL_HOOKS = ("before", "after", "before_sleep", "retry_error_callback")


def _check_hook(name: str, hook: Any) -> None:
    wanted = "a function of tenacity's retry state, or one of tenacity's own objects for it"
    if isinstance(hook, type) and issubclass(hook, BaseException):
        msg = f"retry_options[{name!r}]={shown(hook)} is a class of exceptions; write retry_on={hook.__name__}"
        raise TypeError(msg)
    if isinstance(hook, type):
        msg = f"retry_options[{name!r}]={shown(hook)} is a class; write {wanted}"
        raise TypeError(msg)
    check_callable(f"retry_options[{name!r}]", hook, wanted)


def _check_retry_on(retry_on: Any) -> None:
    wanted = "an Exception class, a tuple of them, or a function of the exception that returns a bool or seconds"
    if isinstance(retry_on, (type, tuple)):
        for cls in retry_on if isinstance(retry_on, tuple) else (retry_on,):
            if not (isinstance(cls, type) and issubclass(cls, BaseException)):
                what = f"the class {cls.__qualname__}" if isinstance(cls, type) else type(cls).__qualname__
                msg = f"retry_on has {what}, which is no class of exceptions; write {wanted}"
                raise TypeError(msg)
            if not issubclass(cls, Exception):
                msg = (
                    f"retry_on has {cls.__name__}, which is never handled (Ctrl-C, cancellation, exit); write {wanted}"
                )
                raise ValueError(msg)  # noqa: TRY004 - it is a class, but none of these
    else:
        check_callable("retry_on", retry_on, wanted)


def get_retry_decorator(
    *,
    retries: int = 3,
    backoff_factor: float = 2.0,
    min_delay: float = 0.1,
    max_delay: float = 30.0,
    jitter: bool = True,
    retry_on: RetryOn = Exception,
    **options: Any,
) -> Callable[[F], F]:
    """Make a decorator that retries, and does nothing else.

    Args:
        retries: Extra executions after the first.
        backoff_factor: By how much each delay is longer than the one before.
        min_delay: Seconds before the first retry.
        max_delay: Seconds that no delay exceeds.
        jitter: Whether each delay is drawn from its upper half at random.
        retry_on: Exception class, tuple of classes, or ``callable(exception)`` returning a bool or seconds to wait.
        **options: For `tenacity.Retrying` (``stop``, ``wait``, ``retry``, ``before_sleep``, …); these win.

    Raises:
        TypeError: If an option has the wrong type or is not known.
        ValueError: If an option's value is out of range.
    """
    policy = retry_policy(
        retries=retries,
        backoff_factor=backoff_factor,
        min_delay=min_delay,
        max_delay=max_delay,
        jitter=jitter,
        retry_on=retry_on,
        options=options,
    )
    recipe = {
        "retries": retries,
        "backoff_factor": backoff_factor,
        "min_delay": min_delay,
        "max_delay": max_delay,
        "jitter": jitter,
        "retry_on": retry_on,
        **options,
    }
    return decorator(
        "get_retry_decorator", lambda function: Plan(function, retry=policy), (get_retry_decorator, recipe)
    )
