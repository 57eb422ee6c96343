"""Retry: tenacity's policy, asked from outside one round at a time.

Its strategies and hooks are those of one `tenacity.Retrying` for each function, and are called in tenacity's order with
a state of tenacity's for each failing call. (Its ``iter`` would call them by itself, but waits in one way only for each
object, and keeps statistics in one dict for all threads.) tenacity takes 30 ms to import, which is paid when the first
policy is made: a call may fail deep in a recursion, in a signal handler or when the program ends, where nothing can be
imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from opero.core.checks import (
    check_callable,
    check_count,
    check_flag,
    check_known,
    check_mapping,
    check_number,
    check_seconds,
    kind_of,
    seconds_of,
    shown,
)
from opero.core.clock import LONGEST_WAIT, clock
from opero.core.decoration import F, decorator
from opero.core.plan import Call, Plan, Verdict
from opero.core.signature import MISSING
from opero.core.steps import Failed, Pause
from opero.exceptions import MisuseError, RejectedResultError, RemoteError
from opero.utils.logging import log
from opero.utils.notes import add_note

if TYPE_CHECKING:
    import tenacity

    from opero.core.checks import Duration

__all__ = ["get_retry_decorator"]


class Answer(Enum):
    """What ``retry_on`` can answer beside a bool and a delay."""

    NEXT = "this candidate cannot help, another one may"
    GIVE_UP = "the call is none that any candidate could answer"

    def __repr__(self) -> str:
        return f"opero.{self.name}"


NEXT, GIVE_UP = Answer.NEXT, Answer.GIVE_UP

RetryOn = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], "bool | Duration | Answer | None"]

# No service is at fault, and no second try can mend it.
PROGRAM_ERRORS = (NameError, ImportError, SyntaxError, NotImplementedError, RecursionError, MemoryError)

# What is raised to steer a framework, or when it ends a task: an answer, a message to its queue, and not a failure.
_STEERING = {
    "aiohttp.web_exceptions": {"HTTPException"},
    "airflow.exceptions": {"AirflowFailException", "AirflowRescheduleException", "AirflowSkipException"},
    "arq.worker": {"Retry", "RetryJob"},
    "billiard.exceptions": {"SoftTimeLimitExceeded"},
    "celery.exceptions": {"TaskPredicate"},
    "click.exceptions": {"Abort", "ClickException", "Exit"},
    "django.core.exceptions": {"BadRequest", "PermissionDenied", "SuspiciousOperation"},
    "django.http.response": {"Http404"},
    "dramatiq.errors": {"Retry"},
    "huey.exceptions": {"CancelExecution", "RetryTask"},
    "rest_framework.exceptions": {"APIException"},
    "rq.timeouts": {"BaseTimeoutException"},
    "starlette.exceptions": {"HTTPException", "WebSocketException"},
    "tornado.web": {"Finish", "HTTPError"},
    "typer.exceptions": {"Abort", "Exit", "TyperException"},
    "unittest.case": {"SkipTest"},
    "werkzeug.exceptions": {"HTTPException"},
}


def matches(error: Exception, classes: type[Exception] | tuple[type[Exception], ...]) -> bool:
    """Whether an exception is one of these, or a group of nothing but these."""
    if isinstance(error, classes):
        return True
    if isinstance(error, RemoteError):
        return error.error_class is not None and issubclass(error.error_class, classes)
    return isinstance(error, ExceptionGroup) and all(matches(part, classes) for part in error.exceptions)


def retry_unless_of_the_program(error: Exception) -> bool | Answer:
    """What stands for ``retry_on`` where it was not given."""
    if matches(error, PROGRAM_ERRORS):
        return GIVE_UP
    for cls in type(error).__mro__:
        if cls.__name__ in _STEERING.get(cls.__module__, ()):
            return GIVE_UP
    return True


class RetryPolicy:
    """How many rounds, which errors, how long between: the options of `get_retry_decorator`, which are checked here.

    A failing call has a state of tenacity's of its own, ``call.retry_state``, which is made when it is first needed.

    Attributes:
        watches_every_attempt: Whether results may be rejected, or tenacity's ``before`` is told of every attempt.
        tells_before: Whether it is.
    """

    def __init__(
        self,
        *,
        retries: int = 0,
        backoff_factor: float = 2.0,
        min_delay: Duration = 0.1,
        max_delay: Duration = 30.0,
        jitter: bool = True,
        retry_on: RetryOn = MISSING,
        retry_if_result: Callable[[Any], Any] | None = None,
        retry_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.retries = check_count("retries", retries, "extra rounds", smallest=0)
        self.backoff_factor = check_number("backoff_factor", backoff_factor, "times", smallest=1)
        self.min_delay = check_seconds("min_delay", min_delay, zero=True)
        self.max_delay = check_seconds("max_delay", max_delay, zero=True)
        if self.max_delay < self.min_delay:
            raise ValueError(f"max_delay={max_delay!r} is below min_delay={min_delay!r}; write a max_delay that is not")
        self.jitter = check_flag("jitter", jitter)
        self.retry_on = retry_unless_of_the_program if retry_on is MISSING else retry_on
        _check_retry_on(self.retry_on)
        self.retry_if_result = retry_if_result
        self.options = check_mapping("retry_options", retry_options)
        _check_hooks(self.options, retry_if_result)
        # Asked here, since tenacity before 9.2, which google-genai asks for, does not know it.
        self._is_enabled = self.options.get("enabled", True)
        self.tells_before = self.options.get("before") is not None
        self.watches_every_attempt = self.tells_before or retry_if_result is not None or "retry" in self.options
        # Of one round tenacity need not be asked whether there is another one.
        self._retrying: Any = self._make_retrying() if retries or self.options else None

    def _make_retrying(self) -> tenacity.Retrying:
        # Not at the top, so that `import opero` stays quick, and kept, see above.
        import random

        import tenacity

        from opero.core.retry_error import RetryError

        self._tenacity, self._random = tenacity, random.random
        # Where the first delay is none, the exponential one would be the largest after a thousand rounds.
        exponential = tenacity.wait_exponential(self.min_delay, self.max_delay, self.backoff_factor)
        self._backoff = exponential if self.min_delay else tenacity.wait_none()
        ours = {
            "retry_error_cls": RetryError,
            "stop": tenacity.stop_after_attempt(self.retries + 1),
            "wait": self._wait,
        }
        if self.options:
            import inspect

            check_known("retry_options", self.options, inspect.signature(tenacity.Retrying).parameters)
        return tenacity.Retrying(**{"reraise": True, **ours, **self.options})

    def _wait(self, state: tenacity.RetryCallState) -> float:
        delay = self._backoff(state)
        # Anywhere in its upper half, so that callers that failed together do not come back together: "equal jitter" of
        # M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
        return delay * (0.5 + 0.5 * self._random()) if self.jitter and delay else delay

    def tell_before(self, plan: Plan, call: Call) -> None:
        """Tell tenacity's ``before`` of a round that begins."""
        try:
            self._retrying.before(self._state(plan, call))
        except Exception as raised:  # noqa: BLE001 - the user's hook, which must not end the call
            log("WARNING", "{}", _fault_of_hook(plan, raised))

    def judge(self, plan: Plan, call: Call, outcome: Any) -> Verdict | None:
        """What an attempt that ended so means; None if it has succeeded. Raises what the user's predicate raises."""
        if "retry" in self.options:
            return self._judged_by_tenacity(plan, call, outcome)
        if type(outcome) is not Failed:
            return None if self.retry_if_result is None else self._judge_result(plan, call, outcome)
        error, retry_on = outcome.error, self.retry_on
        if isinstance(retry_on, (type, tuple)):
            is_known = matches(error, retry_on)
            return Verdict(error, outcome, again=is_known, counts=is_known)
        answer = retry_on(error)
        if isinstance(answer, Answer):
            return Verdict(error, outcome, rests=False, counts=False, ends=answer is GIVE_UP)
        if answer is None or isinstance(answer, bool):
            return Verdict(error, outcome, again=bool(answer))
        delay = seconds_of(answer)
        if not isinstance(delay, (int, float)):
            raise MisuseError(
                f"retry_on={shown(retry_on)} answered with {kind_of(answer)}; let it return True, False, seconds, "
                "a timedelta, opero.NEXT or opero.GIVE_UP"
            )
        delay = None if math.isnan(delay) else float(min(max(delay, 0), LONGEST_WAIT))
        return Verdict(error, outcome, again=True, delay=delay)

    def _judge_result(self, plan: Plan, call: Call, result: Any) -> Verdict | None:
        rejects: Any = self.retry_if_result
        answer = rejects(result)
        if isinstance(answer, Answer):
            raise MisuseError(f"retry_if_result={shown(rejects)} answered with {answer!r}; let it return True or False")
        if not answer:
            return None
        what = f"retry_if_result rejects what {plan.name} returned at attempt {call.attempts}"
        return Verdict(RejectedResultError(what, result), result, again=True)

    def _judged_by_tenacity(self, plan: Plan, call: Call, outcome: Any) -> Verdict | None:
        state, is_failed = self._state(plan, call, outcome), type(outcome) is Failed
        again = (is_failed and isinstance(outcome.error, self._tenacity.TryAgain)) or bool(self._retrying.retry(state))
        if is_failed:
            return Verdict(outcome.error, outcome, again=again)
        return Verdict(self._retrying.retry_error_cls(state.outcome), outcome, again=True) if again else None

    def after(self, plan: Plan, call: Call, verdict: Verdict, must_end: Callable[[float], bool]) -> Any:
        """A `Pause` until the next round, or the end of the call: `Failed`, or a result that a hook supplies.

        Args:
            plan: Of the function.
            call: Whose round has failed.
            verdict: What the round means.
            must_end: Whether no other round can begin after so many seconds.

        Raises:
            ValueError: If a wait of less than nothing was asked for.
            Exception: What ``retry_error_callback`` raises in place of a result.
        """
        error, settings = verdict.error, self._retrying
        if not verdict.again or settings is None or not self._is_enabled:
            return Failed(error)
        try:
            seconds = self._seconds_before_next(plan, call, verdict, must_end)
        except Exception as raised:  # noqa: BLE001 - a hook with a bug ends the retries, but hides no error of the function's
            text = f"{_fault_of_hook(plan, raised)}; not retried"
            log("WARNING", "{}", text)
            add_note(error, f"opero: {text}")
            return Failed(error)
        if seconds is None:
            return self.end(plan, call, verdict)
        if not seconds >= 0:
            raise ValueError(f"a wait of {seconds} seconds was asked for; let it be 0 or more")
        return Pause(min(seconds, LONGEST_WAIT))

    def _seconds_before_next(
        self, plan: Plan, call: Call, verdict: Verdict, must_end: Callable[[float], bool]
    ) -> float | None:
        """Ask tenacity's strategies and hooks, in its order; None if no round follows."""
        settings, state = self._retrying, self._state(plan, call, verdict.outcome)
        if settings.after is not None:
            settings.after(state)
        seconds: float = settings.wait(state) if verdict.delay is None else verdict.delay
        state.upcoming_sleep = seconds
        if must_end(seconds) or settings.stop(state):
            return None
        state.next_action = self._tenacity.RetryAction(seconds)
        state.idle_for += seconds
        if settings.before_sleep is not None:
            settings.statistics.update(idle_for=state.idle_for, attempt_number=state.attempt_number + 1)
            settings.before_sleep(state)
        state.prepare_for_next_attempt()
        return seconds

    def end(self, plan: Plan, call: Call, verdict: Verdict) -> Any:
        """The end of a call that no other round follows: `Failed`, or a result that a hook supplies."""
        settings = self._retrying
        if settings is None or not self._is_enabled or not verdict.again:
            return Failed(verdict.error)
        state = self._state(plan, call, verdict.outcome)
        if settings.retry_error_callback is not None:
            call.is_made_up = True
            return settings.retry_error_callback(state)
        if settings.reraise:
            return Failed(verdict.error)
        told = settings.retry_error_cls(state.outcome)
        told.__cause__ = verdict.error
        return Failed(told)

    def _state(self, plan: Plan, call: Call, outcome: Any = MISSING) -> tenacity.RetryCallState:
        """What tenacity's strategies and hooks are told, of an attempt that ended so."""
        state = call.retry_state
        if state is None:
            state = self._tenacity.RetryCallState(self._retrying, fn=plan.function, args=call.args, kwargs=call.kwargs)
            # It is made after the first attempt, but shall tell of the whole call, in the time that passes here.
            state.start_time = call.started
            call.retry_state = state
        if self.options:
            # Hooks look at them, too, as soon as this has returned.
            told = {"attempt_number": state.attempt_number, "delay_since_first_attempt": clock.now() - call.started}
            self._retrying.statistics.update(told, start_time=state.start_time, idle_for=state.idle_for)
        if outcome is MISSING:
            return state
        # A pass through candidates of which some still rested is no round of its own.
        state.attempt_number = call.rounds
        if self.options:
            if type(outcome) is Failed:
                error = outcome.error
                state.set_exception((type(error), error, error.__traceback__))
            else:
                # Of a generator its first item.
                state.set_result(outcome[1] if plan.kind.endswith("generator") else outcome)
            state.outcome_timestamp = clock.now()
        return state


def _fault_of_hook(plan: Plan, raised: Exception) -> str:
    # Not its text, which may hold arguments.
    return f"a hook of retry_options of {plan.name} raised {type(raised).__name__}"


_HOOKS = ("stop", "wait", "retry", "before", "after", "before_sleep", "retry_error_callback")
_OPTIONAL_HOOKS = _HOOKS[3:]


def _check_hooks(options: Mapping[str, Any], retry_if_result: Any) -> None:
    if "sleep" in options:
        raise ValueError(
            "retry_options['sleep'] cannot apply: opero waits by itself, sync or async; write 'wait' to say how long"
        )
    wanted = "a function of tenacity's retry state, or one of tenacity's own objects for it"
    for name in _HOOKS:
        hook, what = options.get(name), f"retry_options[{name!r}]"
        if isinstance(hook, type):
            instead = f"retry_on={hook.__name__}" if issubclass(hook, BaseException) else wanted
            raise TypeError(f"{what}={shown(hook)} is a class; write {instead}")
        if hook is not None or (name in options and name not in _OPTIONAL_HOOKS):
            check_callable(what, hook, wanted)
    if retry_if_result is not None:
        check_callable("retry_if_result", retry_if_result, "a function of the result that returns a bool")
        if "retry" in options:
            raise ValueError(
                "retry_if_result cannot apply beside retry_options['retry'], which judges results, too; "
                "write retry_on in place of that, or tenacity.retry_any(…, tenacity.retry_if_result(…)) there"
            )


def _check_retry_on(retry_on: Any) -> None:
    wanted = "an Exception class, a tuple of them, or a function of the exception that returns a bool or a delay"
    if not isinstance(retry_on, (type, tuple)):
        kind = type(retry_on)
        if kind.__module__.partition(".")[0] == "tenacity":
            raise TypeError(f"retry_on got tenacity's {kind.__name__}; write retry_options={{'retry': …}}, or {wanted}")
        check_callable("retry_on", retry_on, wanted)
        return
    for cls in retry_on if isinstance(retry_on, tuple) else (retry_on,):
        if not (isinstance(cls, type) and issubclass(cls, BaseException)):
            what = f"the class {cls.__qualname__}" if isinstance(cls, type) else type(cls).__qualname__
            raise TypeError(f"retry_on has {what}, which is no class of exceptions; write {wanted}")
        if not issubclass(cls, Exception):
            raise ValueError(  # noqa: TRY004 - it is a class, but none of these
                f"retry_on has {cls.__name__}, which is never handled (Ctrl-C, cancellation, exit); write {wanted}"
            )


def get_retry_decorator(
    *,
    retries: int = 3,
    backoff_factor: float = 2.0,
    min_delay: Duration = 0.1,
    max_delay: Duration = 30.0,
    jitter: bool = True,
    retry_on: RetryOn = MISSING,
    retry_if_result: Callable[[Any], object] | None = None,
    **options: Any,
) -> Callable[[F], F]:
    """Make a decorator that retries, and does nothing else.

    Args:
        retries: Extra executions after the first.
        backoff_factor: By how much each delay is longer than the one before.
        min_delay: Seconds before the first retry, or a `datetime.timedelta`.
        max_delay: Seconds that no delay exceeds, or a `datetime.timedelta`.
        jitter: Whether each delay is drawn from its upper half at random.
        retry_on: Exception class, tuple of classes, or ``callable(exception)`` that answers with True, False, a delay
            (seconds or a `datetime.timedelta`), `opero.NEXT` or `opero.GIVE_UP`. One that raises ends the call.
            Default: every `Exception` but those of the program itself (`NameError`, `ImportError`, `SyntaxError`,
            `NotImplementedError`, `RecursionError`, `MemoryError`).
        retry_if_result: ``callable(result)``: whether to reject a result, as if the execution had failed. When retries
            have run out then, `opero.RejectedResultError` is raised.
        **options: For `tenacity.Retrying` (``stop``, ``wait``, ``retry``, ``before_sleep``, …); these win.

    Raises:
        TypeError: If an option has the wrong type or is not known; when decorating, of a generator function if there is
            a ``retry_if_result`` or a ``retry_error_callback``.
        ValueError: If an option's value is out of range.
    """
    flat: dict[str, Any] = {
        "retries": retries,
        "backoff_factor": backoff_factor,
        "min_delay": min_delay,
        "max_delay": max_delay,
        "jitter": jitter,
        "retry_on": retry_on,
        "retry_if_result": retry_if_result,
    }
    policy = RetryPolicy(**flat, retry_options=options)
    return decorator(lambda function: Plan(function, policy), (get_retry_decorator, {**flat, **options}))
