"""Retry: tenacity's policy, asked from outside one round at a time.

Its strategies and hooks are those of one `tenacity.Retrying` for each function, and are called in tenacity's order with
a state of tenacity's for each failing call. (Its ``iter`` would call them by itself, but waits in one way only for each
object, and keeps statistics in one dict for all threads.) tenacity takes 30 ms to import, which is paid when the first
policy is made: a call may fail deep in a recursion, in a signal handler or when the program ends, where nothing can be
imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from functools import lru_cache
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
from opero.core.control import OPTIONS
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


NEXT, GIVE_UP = Answer.NEXT, Answer.GIVE_UP

RetryOn = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], "bool | Duration | Answer | None"]

# No service is at fault, and no second try can mend it.
PROGRAM_ERRORS = (NameError, ImportError, SyntaxError, NotImplementedError, RecursionError, MemoryError)

# What is raised to steer a framework, or when it ends a task: an answer, a message to its queue, and not a failure.
_STEERING_CLASSES = """
aiogram.dispatcher.event.bases.CancelHandler aiogram.dispatcher.event.bases.SkipHandler
aiohttp.web_exceptions.HTTPException airflow.exceptions.AirflowFailException
airflow.exceptions.AirflowRescheduleException airflow.exceptions.AirflowSkipException arq.worker.Retry
arq.worker.RetryJob billiard.exceptions.SoftTimeLimitExceeded bottle.HTTPResponse celery.exceptions.TaskPredicate
channels.exceptions.DenyConnection channels.exceptions.StopConsumer cherrypy._cperror.CherryPyException
click.exceptions.Abort click.exceptions.ClickException click.exceptions.Exit
dagster._core.definitions.events.RetryRequested django.core.exceptions.BadRequest
django.core.exceptions.PermissionDenied django.core.exceptions.SuspiciousOperation
django.core.management.base.CommandError django.http.response.Http404 dramatiq.errors.Retry falcon.http_error.HTTPError
falcon.http_status.HTTPStatus fastapi.exceptions.ValidationException grpc._cython.cygrpc.AbortError
huey.exceptions.CancelExecution huey.exceptions.RetryTask invoke.exceptions.Exit
litestar.exceptions.http_exceptions.HTTPException ninja.errors.HttpError pyramid.httpexceptions.HTTPException
rest_framework.exceptions.APIException rq.timeouts.BaseTimeoutException sanic.exceptions.SanicException
scrapy.exceptions.CloseSpider scrapy.exceptions.DropItem scrapy.exceptions.IgnoreRequest
starlette.exceptions.HTTPException starlette.exceptions.WebSocketException starlette.requests.ClientDisconnect
starlette.websockets.WebSocketDisconnect telegram.ext._application.ApplicationHandlerStop tornado.web.Finish
tornado.web.HTTPError typer.exceptions.Abort typer.exceptions.Exit typer.exceptions.TyperException
unittest.case.SkipTest werkzeug.exceptions.HTTPException
"""
_STEERING = frozenset(_STEERING_CLASSES.split())


def matches(error: Exception, classes: type[Exception] | tuple[type[Exception], ...]) -> bool:
    """Whether an exception is one of these, or a group of nothing but these."""
    if isinstance(error, classes):
        return True
    if isinstance(error, RemoteError):
        return error.error_class is not None and issubclass(error.error_class, classes)
    return isinstance(error, ExceptionGroup) and all(matches(part, classes) for part in error.exceptions)


def retry_unless_of_the_program(error: Exception) -> bool | Answer:
    """What stands for ``retry_on`` where it was not given."""
    if isinstance(error, ExceptionGroup):
        return True if any(retry_unless_of_the_program(part) is True for part in error.exceptions) else GIVE_UP
    is_steering = any(f"{cls.__module__}.{cls.__name__}" in _STEERING for cls in type(error).__mro__)
    return GIVE_UP if is_steering or matches(error, PROGRAM_ERRORS) else True


class RetryPolicy:
    """How many rounds, which errors, how long between: those options of `opero.opero`, which are checked here.

    A failing call has a state of tenacity's of its own, ``call.retry_state``, which is made when it is first needed.
    """

    def __init__(self, **options: Any) -> None:
        given = {**OPTIONS["retry"], "retries": 0, "retry_on": MISSING, **options}
        self.retries = check_count("retries", given["retries"], "extra rounds", smallest=0)
        factor = check_number("backoff_factor", given["backoff_factor"], "times", smallest=1)
        shortest = check_seconds("min_delay", given["min_delay"], zero=True)
        longest = check_seconds("max_delay", given["max_delay"], zero=True)
        if longest < shortest:
            raise ValueError(f"max_delay={longest!r} is below min_delay={shortest!r}; write a max_delay that is not")
        jitter = check_flag("jitter", given["jitter"])
        self.retry_on = retry_unless_of_the_program if given["retry_on"] is MISSING else given["retry_on"]
        _check_retry_on(self.retry_on)
        self.retry_if_result = judge = given["retry_if_result"]
        hooks = check_mapping("retry_options", given["retry_options"])
        self.options = {name: option for name, option in hooks.items() if option is not None}
        _check_hooks(self.options, judge)
        # Results may be rejected, or tenacity's `before` is told of every attempt.
        self.watches_every_attempt = judge is not None or not {"before", "retry"}.isdisjoint(self.options)
        self._retrying: Any = None
        # Of one round tenacity need not be asked whether there is another one.
        if self.retries or self.options:
            self._retrying = self._make_retrying(factor, shortest, longest, jitter=jitter)

    def _make_retrying(self, factor: float, shortest: float, longest: float, *, jitter: bool) -> tenacity.Retrying:
        # Not at the top, so that `import opero` stays quick, and kept, see above.
        import inspect
        import random

        import tenacity

        self._tenacity = tenacity
        check_known("retry_options", self.options, inspect.signature(tenacity.Retrying).parameters)
        # Where the first delay is none, the exponential one would be the largest after a thousand rounds.
        backoff: Any = tenacity.wait_exponential(shortest, longest, factor) if shortest else tenacity.wait_none()
        # Anywhere in its upper half, so that callers that failed together do not come back together: "equal jitter" of
        # M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
        wait = (lambda state: backoff(state) * (0.5 + 0.5 * random.random())) if jitter else backoff  # noqa: S311 - no secret
        stop = tenacity.stop_after_attempt(self.retries + 1)
        ours = {"reraise": True, "retry_error_cls": _retry_error_class(), "stop": stop, "wait": wait}
        return tenacity.Retrying(**{**ours, **self.options})

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
            is_rejected = self.retry_if_result is not None and self.retry_if_result(outcome)
            what = f"retry_if_result rejects what {plan.name} returned at attempt {call.attempts}"
            return Verdict(RejectedResultError(what, outcome), outcome, again=True) if is_rejected else None
        error, retry_on = outcome.error, self.retry_on
        if isinstance(retry_on, (type, tuple)):
            is_known = matches(error, retry_on)
            return Verdict(error, outcome, again=is_known, counts=is_known)
        answer = retry_on(error)
        if isinstance(answer, Answer):
            return Verdict(error, outcome, rests=False, counts=False, ends=answer is GIVE_UP)
        delay = answer if isinstance(answer, bool) else seconds_of(answer)
        if delay is None or isinstance(delay, bool):
            return Verdict(error, outcome, again=bool(delay))
        if not isinstance(delay, (int, float)):
            raise MisuseError(
                f"retry_on={shown(retry_on)} answered with {kind_of(answer)}; let it return True, False, seconds, "
                "a timedelta, opero.NEXT or opero.GIVE_UP"
            )
        return Verdict(error, outcome, again=True, delay=float(min(max(0.0, delay), LONGEST_WAIT)))

    def _judged_by_tenacity(self, plan: Plan, call: Call, outcome: Any) -> Verdict | None:
        state, is_failed = self._state(plan, call, outcome), type(outcome) is Failed
        again = (is_failed and isinstance(outcome.error, self._tenacity.TryAgain)) or bool(self._retrying.retry(state))
        if is_failed:
            return Verdict(outcome.error, outcome, again=again)
        return Verdict(self._retrying.retry_error_cls(state.outcome), outcome, again=True) if again else None

    def after(self, plan: Plan, call: Call, verdict: Verdict, must_end: Callable[[float], bool]) -> Any:
        """Ask tenacity's strategies and hooks, in its order: a `Pause` until the next round, or how the call ends.

        ``must_end`` tells whether no other round can begin after so many seconds.
        """
        settings = self._retrying
        if settings is None or not verdict.again:
            return Failed(verdict.error)
        try:
            state = self._state(plan, call, verdict.outcome)
            settings.after(state)
            seconds = state.upcoming_sleep = settings.wait(state) if verdict.delay is None else verdict.delay
            if not (must_end(seconds) or settings.stop(state)):
                state.next_action = self._tenacity.RetryAction(seconds)
                state.idle_for += seconds
                if settings.before_sleep is not None:
                    settings.statistics.update(idle_for=state.idle_for, attempt_number=state.attempt_number + 1)
                    settings.before_sleep(state)
                state.prepare_for_next_attempt()
                return Pause(min(max(0.0, seconds), LONGEST_WAIT))
        except Exception as raised:  # noqa: BLE001 - a hook with a bug ends the retries, but hides no error of the function's
            text = f"{_fault_of_hook(plan, raised)}; not retried"
            log("WARNING", "{}", text)
            add_note(verdict.error, f"opero: {text}")
            return Failed(verdict.error)
        return self.end(plan, call, verdict)

    def end(self, plan: Plan, call: Call, verdict: Verdict) -> Any:
        """How a call ends that no other round follows: `Failed`, or what ``retry_error_callback`` gives or raises."""
        settings = self._retrying
        if settings is None or not verdict.again:
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
        if outcome is MISSING:
            return state
        # A pass through candidates of which some still rested is no round of its own.
        state.attempt_number = call.rounds
        if not self.options:
            # The strategies of opero's own look at nothing else.
            return state
        if type(outcome) is Failed:
            error = outcome.error
            state.set_exception((type(error), error, error.__traceback__))
        else:
            # Of a generator its first item.
            state.set_result(outcome[1] if plan.kind.endswith("generator") else outcome)
        state.outcome_timestamp = clock.now()
        told = {"attempt_number": call.rounds, "delay_since_first_attempt": clock.now() - call.started}
        self._retrying.statistics.update(told, start_time=state.start_time, idle_for=state.idle_for)
        return state


@lru_cache(maxsize=1)
def _retry_error_class() -> Any:
    """Tenacity's `RetryError`, which cannot be pickled or copied, as one that can: its last attempt holds a lock."""
    import tenacity

    return type("RetryError", (tenacity.RetryError,), {"__module__": __name__, "__reduce__": _reduced_retry_error})


def _reduced_retry_error(error: tenacity.RetryError) -> Any:
    last = error.last_attempt
    value = last.exception() if last.failed else last.result()
    notes = {name: value for name, value in vars(error).items() if name != "last_attempt"}
    return _made_retry_error, (last.attempt_number, value, last.failed), notes


def _made_retry_error(*last_attempt: Any) -> Any:
    import tenacity

    return _retry_error_class()(tenacity.Future.construct(*last_attempt))


def _fault_of_hook(plan: Plan, raised: Exception) -> str:
    # Not its text, which may hold arguments.
    return f"a hook of retry_options of {plan.name} raised {type(raised).__name__}"


_HOOKS = ("stop", "wait", "retry", "before", "after", "before_sleep", "retry_error_callback")
_INSTEAD = {"sleep": "opero waits by itself, sync or async; write 'wait' to say how long", "enabled": "write retries=0"}


def _check_hooks(options: Mapping[str, Any], retry_if_result: Any) -> None:
    for name in _INSTEAD.keys() & options:
        raise ValueError(f"retry_options[{name!r}] cannot apply: {_INSTEAD[name]}")
    wanted = "a function of tenacity's retry state, or one of tenacity's own objects for it"
    for name in _HOOKS:
        hook, what = options.get(name), f"retry_options[{name!r}]"
        if isinstance(hook, type):
            instead = f"retry_on={hook.__name__}" if issubclass(hook, BaseException) else wanted
            raise TypeError(f"{what}={shown(hook)} is a class; write {instead}")
        if hook is not None:
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
            raise TypeError(f"retry_on has {shown(cls)} ({kind_of(cls)}), which is no exception class; write {wanted}")
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

    Its options are those of `opero.opero`, and are checked before there is a function; all others are for
    `tenacity.Retrying` (``stop``, ``wait``, ``retry``, ``before_sleep``, …), and win.
    """
    own = {name: value for name, value in locals().items() if name != "options"}
    policy = RetryPolicy(**own, retry_options=options)
    return decorator(lambda function: Plan(function, policy), (get_retry_decorator, {**own, **options}))
