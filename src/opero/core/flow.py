"""The flow of one call: every decision, in the order of the layers, without sleeping, awaiting or calling.

`call_flow` is default, cache and total_timeout; then `Layers` has retry, fallback, breaker, max_concurrent,
rate limit and attempt_timeout. This order is part of opero's contract.
"""

from __future__ import annotations

import contextlib
import math
import sys
from enum import Enum
from typing import TYPE_CHECKING, Any

from opero import events
from opero.core.clock import LONGEST_WAIT, clock
from opero.core.plan import Call, Plan, Verdict
from opero.core.signature import MISSING
from opero.core.steps import NOT_RUN, Candidate, Failed, Flow, Pause, Prepare, Share, is_in_asyncio, part_of
from opero.exceptions import AllFailedError, CallTimeoutError, CircuitOpenError, MisuseError, NotTransferableError
from opero.utils.logging import log, standard
from opero.utils.notes import add_note, class_counts, describe, duration, folded, package_of, raised_in

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from opero.core.breaker import Passage
    from opero.core.fallback import FallbackOverParameter
    from opero.core.rate_limit import FunctionLimit

# Less than this is no wait, but the time it takes to ask.
_TOLD_WAIT = 0.001


class NoAttempt(Enum):
    """In place of an outcome: why there was no attempt; of two, how that is told where it ends the call."""

    OUT_OF_TIME = "total_timeout={:g} s ended it"
    CIRCUIT_OPEN = "its circuit is open"
    GAVE_WAY = "the candidate was put to rest while its place or slot was waited for"


OUT_OF_TIME, CIRCUIT_OPEN, GAVE_WAY = NoAttempt
_ALONE = contextlib.nullcontext()


def call_flow(plan: Plan, call: Call) -> Flow:
    """One call from cache to function."""
    if plan.total_timeout is not None:
        # It bounds the wait for somebody else's computation, too.
        call.deadline = call.started + plan.total_timeout
    layers = Layers(plan, call)
    outcome: Any = NOT_RUN
    try:
        if call.failure is None:
            # Otherwise it was told of, and counted, with its first attempt.
            events.begin_telling(plan, call)
        try:
            if call.failure is None:
                plan.stats.flown.tick()
            outcome = yield from layers.retry() if plan.cache is None else plan.cache.through(call, layers.retry)
        except Exception as error:  # raised by a policy or a driver: a call that failed like others
            outcome = Failed(_in_context_of(None if call.failed is None else call.failed.error, error))
        if type(outcome) is Failed:
            outcome = _replaced_by_default(plan, call, outcome)
        return outcome
    finally:
        # It holds the last error, whose traceback may lead to a frame that holds the call.
        call.retry_state = call.failed = None
        if call.tell is not None:
            is_failed = type(outcome) is Failed
            events.tell_of_the_end(call, error=outcome.error if is_failed else None, cancelled=outcome is NOT_RUN)
        # From Python 3.13 on the traceback of its error may lead to this frame.
        del outcome


def item_flow(plan: Plan, call: Call) -> Flow:
    """One item of a function that takes lists: the layers that are by item, around what is by call."""
    plan.stats.flown.tick()

    def share() -> Any:
        return (yield Share())

    try:
        outcome = yield from share() if plan.cache is None else plan.cache.through(call, share)
    except Exception as error:  # arguments that cannot be a key, a user's function
        outcome = Failed(error)
    return _replaced_by_default(plan, call, outcome) if type(outcome) is Failed else outcome


class Layers:
    """The layers around the function of one call.

    Attributes:
        candidates: Those that may be tried again; without fallback one, for the arguments as they are.
        left: Those of this round that have not been tried.
        has_own_limit: Whether a limit holds for one candidate only, so that it can be held up while others are tried.
        has_slot: Whether the next attempt has its slot of the rate limit.
        patient_until: How long it waits until a trial of an open circuit begins.
        errors: Those of all attempts, with fallback.
        earlier_failure: What a time limit at the end should not hide.
        cancellations: Of the running task, when they were counted last; None if nobody has before the first attempt.
    """

    has_own_limit = True
    has_slot = False
    patient_until: float | None = None
    earlier_failure = ""
    ended_by: NoAttempt | None = None

    def __init__(self, plan: Plan, call: Call) -> None:
        self.plan = plan
        self.call = call
        self.candidates = [Candidate(plan, call, (call.args, call.kwargs))]
        self.left: list[Candidate] = []
        self.errors: list[Exception] = []
        self.cancellations = _cancellations() if plan.is_async and call.failure is None else None

    def retry(self) -> Flow:
        """One round after another until one succeeds or no other may follow."""
        plan, call = self.plan, self.call
        if plan.fallback is not None:
            self._look_for_candidates(plan.fallback)
        while True:
            if "before" in plan.retry.options:
                plan.retry.tell_before(plan, call)
            while (outcome := (yield from self.fallback())) is CIRCUIT_OPEN and (pause := self._pause_for_trial()):
                yield pause
            if type(outcome) is NoAttempt:
                return self._without_attempt(outcome)
            if type(outcome) is not Verdict:
                return outcome
            step = plan.retry.after(plan, call, outcome, self._must_end)
            if type(step) is not Pause:
                return self._finish(step)
            if standard or "loguru" in sys.modules:
                log("DEBUG", "{} failed, next round in {}", plan.name, duration(step.seconds))
            if call.tell is not None:
                call.tell(events.RetryPlanned, round=call.rounds, delay=step.seconds, error=outcome.error)
            del outcome
            yield step

    def _look_for_candidates(self, fallback: FallbackOverParameter) -> None:
        args, kwargs, limit = self.call.args, self.call.kwargs, self.plan.limit
        values = fallback.values(args, kwargs)
        if limit is not None and len(values) > 1:
            self.has_own_limit = limit.per is not None and limit.per.depends_on(fallback.parameter)
        self.candidates = [
            Candidate(self.plan, self.call, fallback.slot.put(args, kwargs, value), value, number)
            for number, value in enumerate(values)
        ]

    def fallback(self) -> Generator[Any, Any, Any]:
        """One round through the candidates; gives the `Verdict` that speaks for it where none succeeded."""
        plan = self.plan
        speaks: Verdict | None = None
        self.has_slot = False
        self.left = list(self.candidates)
        if self.errors:
            # Those that have rested for as long as they asked for, or the first that will have: a sleep may end early.
            rested = [c for c in self.left if c.ready_at <= clock.now()]
            self.left = rested or [min(self.left, key=lambda c: c.ready_at)]
        while self.left:
            is_chosen = plan.fallback is None or self.call.failure is not None
            candidate = self.left[0] if is_chosen else self._choose(plan.fallback, speaks)
            if candidate is None:
                break
            outcome = yield from self.breaker(candidate)
            if outcome is not GAVE_WAY:
                self.left.remove(candidate)
            if outcome is GAVE_WAY or outcome is CIRCUIT_OPEN:
                continue
            if type(outcome) is not Verdict or outcome.ends:
                return outcome
            if outcome.delay and plan.limit is not None and self.has_own_limit:
                yield from plan.limit.pause(candidate, min(outcome.delay, LONGEST_WAIT))
            if speaks is None or outcome.again or not speaks.again:
                speaks = outcome
        if speaks is None:
            return CIRCUIT_OPEN
        return speaks if plan.fallback is None or not self.candidates else self._for_the_round(plan.fallback, speaks)

    def breaker(self, candidate: Candidate) -> Generator[Any, Any, Any]:
        """One attempt through the candidate's circuit: the call's outcome, or the `Verdict` on its failure."""
        passage = None
        if self.plan.breaker is not None:
            passage = self.plan.breaker.shared.enter(self.plan.breaker.key_of(candidate.args, candidate.kwargs))
            if passage is None and self.call.failure is None:
                return CIRCUIT_OPEN
        candidate.passage, candidate.place, candidate.limit, candidate.has_begun = passage, None, None, False
        try:
            outcome = yield from self.attempt(candidate)
            return outcome if type(outcome) is NoAttempt else self._judge(candidate, outcome)
        finally:
            if passage is not None:
                passage.end()
            if candidate.place is not None:
                candidate.place.give_back()

    def attempt(self, candidate: Candidate) -> Generator[Any, Any, Any]:
        """max_concurrent, the rate limit, attempt_timeout, and one execution."""
        plan, call = self.plan, self.call
        if call.failure is not None:
            outcome, call.failure = Failed(call.failure), None
            candidate.tries = call.attempts = call.rounds = 1
            return outcome
        if plan.places is not None:
            candidate.place = yield from plan.places.take(candidate, call.deadline)
            if candidate.place is None or candidate.is_shut():
                return OUT_OF_TIME if clock.now() >= call.deadline else CIRCUIT_OPEN
            if plan.fallback is not None and candidate not in plan.fallback.awake(self.left):
                return GAVE_WAY
        if plan.limit is not None and not self.has_slot:
            missed = yield from self._take_slot(plan.limit, candidate)
            if missed is not None:
                return missed
        self.has_slot, outcome = False, NOT_RUN
        is_part = call.presence is None and (candidate.passage or candidate.place)
        with part_of(candidate.passage, candidate.place) if is_part else _ALONE:
            if clock.now() < call.deadline:
                outcome = yield candidate
        if outcome is NOT_RUN:
            return OUT_OF_TIME if clock.now() >= call.deadline else CIRCUIT_OPEN
        if plan.limit is not None:
            yield from plan.limit.ended(candidate, outcome, clock.now() - call.began)
        return outcome

    def _take_slot(self, limit: FunctionLimit, candidate: Candidate) -> Generator[Any, Any, NoAttempt | None]:
        """Wait for a slot; gives why there is none, if so."""
        call, fallback = self.call, self.plan.fallback
        if call.presence is not None:
            # A slot that is taken while a worker starts would be used when it is over, together with the next one.
            yield Prepare()
        asked = clock.now()
        news = yield from limit.take(
            candidate,
            call.deadline,
            is_over=lambda: candidate.is_shut() or (self.has_own_limit and self._gives_way(candidate)),
            # A call that has failed needs no worker before a candidate that rests wakes.
            is_turn=not (self.errors and self.has_own_limit and fallback and fallback.rest_of(candidate.value)),
        )
        waited = clock.now() - asked
        self.plan.stats.waited.add(waited)
        if candidate.is_shut():
            return CIRCUIT_OPEN
        if news != "taken":
            return GAVE_WAY if news == "over" else OUT_OF_TIME
        if call.tell is not None and waited >= _TOLD_WAIT:
            call.tell(events.SlotWaited, seconds=waited)
        # A slot that all candidates share is as good for another one: to wait anew could take too long.
        self.has_slot = not self.has_own_limit and self._gives_way(candidate)
        return GAVE_WAY if self.has_slot else None

    def _judge(self, candidate: Candidate, outcome: Any) -> Any:
        """The call's outcome, or the `Verdict` on an attempt that failed."""
        plan, call = self.plan, self.call
        error = outcome.error if type(outcome) is Failed else None
        if error is not None and call.tell is not None:
            self._tell_of_failure(call.tell, error)
        is_misuse = isinstance(error, TypeError) and _is_misuse(plan, call, error)
        if is_misuse or isinstance(error, NotTransferableError):
            # No other attempt could end otherwise.
            return outcome
        try:
            verdict = plan.retry.judge(plan, call, outcome)
        except Exception as raised:  # the user's predicate: what it cannot judge ends the call
            # Not its text, which may hold arguments.
            log("WARNING", "{} ended: what judges its attempts raised {}", plan.name, type(raised).__name__)
            return Failed(_in_context_of(error, raised))
        if verdict is not None and plan.is_async and call.presence is None and self._is_being_cancelled(error):
            add_note(verdict.error, f"opero: {plan.name} was not tried again: its task is being cancelled")
            return Failed(verdict.error)
        if candidate.passage is not None:
            self._tell_circuit(candidate, candidate.passage, verdict)
        if verdict is not None:
            self._note(candidate, verdict)
            return verdict
        if plan.kind.endswith("generator") and outcome[0] is not None:
            # It has begun, and keeps its place until it ends or is closed.
            outcome, candidate.place = (*outcome[:2], candidate.place), None
        return outcome

    def _is_being_cancelled(self, error: Exception | None) -> bool:
        """Whether the running task was cancelled since the call began, whatever the function made of that.

        Of a first attempt that was made without a flow the error has to tell; and before Python 3.13, where a task
        group that has failed leaves a cancellation of its own behind.
        """
        before, self.cancellations = self.cancellations, _cancellations()
        if self.cancellations <= (before or 0):
            return False
        if before is not None and sys.version_info >= (3, 13):
            return True
        # A call in a `finally` block of a task that was cancelled before is retried as ever.
        return _comes_of_cancellation(error) and (before is not None or not _comes_of_cancellation(sys.exception()))

    def _note(self, candidate: Candidate, verdict: Verdict) -> None:
        """Remember a failure for the rounds that follow, and for the end."""
        self.call.failed, fallback = verdict, self.plan.fallback
        if self.call.tell is not None and type(verdict.outcome) is not Failed:
            self._tell_of_failure(self.call.tell, verdict.error)
        is_timed = self.call.deadline < math.inf or self.plan.attempt_timeout is not None
        if is_timed and not isinstance(verdict.error, CallTimeoutError):
            self.earlier_failure = describe(verdict.error)
        if fallback is None:
            return
        self.errors.append(verdict.error)
        if not verdict.again:
            self.candidates.remove(candidate)
        candidate.ready_at = -math.inf if verdict.delay is None else clock.now() + verdict.delay
        if verdict.rests:
            fallback.failed(candidate.value, verdict.delay, again=verdict.again)

    def _tell_of_failure(self, tell: Callable[..., None], error: Exception) -> None:
        seconds = clock.now() - self.call.began
        tell(events.AttemptFailed, attempt=self.call.attempts, error=error, seconds=seconds)

    def _tell_circuit(self, candidate: Candidate, passage: Passage, verdict: Verdict | None) -> None:
        """Whether it speaks against the service, of which an attempt that had too little time says nothing."""
        failed, limit = verdict is not None and verdict.counts, candidate.limit
        if verdict is not None and isinstance(verdict.error, CallTimeoutError):
            if limit is not None and limit[1] == "total_timeout" and limit[0] < (self.plan.total_timeout or 0.0) / 2:
                return
            failed = True
        changed = passage.breaker.passed(passage, failed=failed)
        if changed is not None and self.call.tell is not None:
            place = None if self.plan.fallback is None else candidate.number
            self.call.tell(events.CircuitChanged, state=changed, place=place)

    # Which candidates may be tried, and when

    def _for_the_round(self, fallback: FallbackOverParameter, verdict: Verdict) -> Verdict:
        """The next round begins as soon as a candidate is ready that nobody has given up and no circuit shuts off."""
        kept = [c for c in self.candidates if not fallback.is_given_up(c.value)] or self.candidates
        admitted = [c for c in kept if not self._wait_of(c)] or kept
        wait = min(c.ready_at for c in admitted) - clock.now()
        return verdict._replace(again=True, delay=None if wait == -math.inf else max(0.0, wait))

    def _choose(self, fallback: Any, speaks: Verdict | None) -> Candidate | None:
        """The first that does not rest, or, if asked, the one that has a slot soonest.

        None if it was given up and another may be tried again: it has time until the last round.
        """
        limit, retry = self.plan.limit, self.plan.retry
        awake = fallback.awake(self.left)
        candidate = awake[0] if limit is None or self.has_slot else limit.choose(awake)
        has_time = self.call.rounds <= retry.retries and "stop" not in retry.options
        is_for_later = has_time and speaks is not None and speaks.again and fallback.is_given_up(candidate.value)
        return None if is_for_later else candidate

    def _gives_way(self, candidate: Candidate) -> bool:
        """Whether, while it was waited for, it was put to rest, or its slots were taken by others."""
        fallback, limit = self.plan.fallback, self.plan.limit
        if fallback is None or limit is None:
            return False
        awake = fallback.awake(self.left)
        return candidate not in awake or limit.gives_way(candidate, awake)

    def _wait_of(self, candidate: Candidate) -> float:
        """Seconds until its circuit lets an attempt, or a trial, through; infinite during a trial."""
        breaker = self.plan.breaker
        if breaker is None:
            return 0.0
        return breaker.shared.wait_of(breaker.key_of(candidate.args, candidate.kwargs)) or 0.0

    def _pause_for_trial(self) -> Pause | None:
        """All circuits are open: a call by itself fails, an item of a map waits until one may be tried."""
        breaker, call, now = self.plan.breaker, self.call, clock.now()
        if call.presence is None or breaker is None or now >= call.deadline:
            return None
        recovery, waits = breaker.shared.recovery, [self._wait_of(c) for c in self.candidates]
        until = self.patient_until
        if until is None:
            until = self.patient_until = now + recovery if call.deadline == math.inf else call.deadline
        if math.inf not in waits and now + min(waits) > until:
            return None
        # Nobody knows when a trial that is under way will end, or whether somebody resets the circuit.
        return Pause(min(*waits, max(0.1 * recovery, 0.1), call.deadline - now))

    # How a call ends that has not succeeded

    def _must_end(self, seconds: float) -> bool:
        """Whether no other round can begin after so many seconds."""
        if seconds >= self.call.deadline - clock.now():
            self.ended_by = OUT_OF_TIME
        elif self.plan.breaker is not None and self.call.presence is None:
            is_shut = all(self._wait_of(candidate) > seconds for candidate in self.candidates)
            self.ended_by = CIRCUIT_OPEN if is_shut else None
        return self.ended_by is not None

    def _without_attempt(self, cause: NoAttempt) -> Any:
        """No attempt can follow: the call ends as the last one did, or tells why there was none."""
        plan, self.ended_by = self.plan, cause
        if self.call.failed is not None:
            return self._finish(plan.retry.end(plan, self.call, self.call.failed))
        if cause is CIRCUIT_OPEN:
            return Failed(self._circuit_open())
        turns = {"a place": plan.places, "a rate slot": plan.limit, "a worker": self.call.presence}
        waited_for = " or ".join(turn for turn, has in turns.items() if has is not None)
        when = f"during the wait for {waited_for}" if waited_for else "before it began"
        reason = cause.value.format(plan.total_timeout)
        return Failed(CallTimeoutError(f"{plan.name} was not started: {reason} {when}"))

    def _circuit_open(self) -> Exception:
        breaker: Any = self.plan.breaker
        # One whose trial is under way may be next.
        waits = [-1.0 if wait == math.inf else wait for wait in map(self._wait_of, self.candidates)]
        wait = min(waits)
        place = None if self.plan.fallback is None else self.candidates[waits.index(wait)].number
        trial = "a trial call is under way" if wait < 0 else f"the next trial is in {duration(wait)}"
        whose = "its circuit" if len(waits) == 1 else "the circuit of every candidate"
        failures = _counted(breaker.shared.failures, "failure")
        message = f"{self.plan.name} was not called: {whose} opened after {failures} in a row; {trial}"
        return CircuitOpenError(message, None if wait < 0 else wait, place)

    def _finish(self, end: Any) -> Any:
        """The end after some attempts: what the user is told of them."""
        if type(end) is not Failed:
            return end
        call, plan, error = self.call, self.plan, end.error
        attempts, took = _counted(call.attempts, "attempt"), duration(clock.now() - call.started)
        reason = "" if self.ended_by is None else f"; {self.ended_by.value.format(plan.total_timeout)}"
        if plan.fallback is not None:
            whom = f"every candidate of {plan.fallback.parameter!r}"
            gave_up = self.call.failed is not None and self.call.failed.ends
            message = (
                f"{plan.name}: {f'gave up on {whom}' if gave_up else f'{whom} failed'} in "
                f"{_counted(call.rounds, 'round')} ({attempts}, {took}{reason}): {class_counts(self.errors)}"
            )
            log("WARNING", "{}", message)
            failed = AllFailedError(message, folded(self.errors))
            failed.errors = self.errors
            return Failed(failed)
        if isinstance(error, CallTimeoutError) and self.earlier_failure:
            # The library's own error must not hide the function's.
            add_note(error, f"opero: an attempt before that failed with {self.earlier_failure}")
        summary = f"{plan.name} failed after {attempts} in {took}{reason}"
        log("WARNING", "{}", summary)
        add_note(error, f"opero: {summary}", instead_of=f"opero: {plan.name} failed after ")
        return end


def _replaced_by_default(plan: Plan, call: Call, failed: Failed) -> Failed:
    """Count the call that failed; its default, if there is one, hides no misuse and no wrong call."""
    plan.stats.failures.tick()
    is_raised = plan.default is MISSING or _is_misuse(plan, call, failed.error)
    return failed if is_raised else Failed(failed.error, instead=plan.default)


def _is_misuse(plan: Plan, call: Call, error: Exception) -> bool:
    """Whether the function cannot be called so, or was decorated as it cannot be."""
    return isinstance(error, MisuseError) or (isinstance(error, TypeError) and plan.is_wrong(call))


def _cancellations() -> int:
    """How many cancellations of the running asyncio task are under way; 0 where none runs."""
    task = sys.modules["asyncio"].current_task() if is_in_asyncio() else None
    return 0 if task is None else task.cancelling()


def _comes_of_cancellation(error: BaseException | None) -> bool:
    """Whether it is a cancellation, or was raised while one was handled that no time limit has made and taken back."""
    cancelled = sys.modules["asyncio"].CancelledError
    while error is not None and not isinstance(error, cancelled):
        if isinstance(error, TimeoutError) and package_of(raised_in(error)) in _HAVE_TIME_LIMITS:
            return False
        error = error.__context__
    return error is not None


_HAVE_TIME_LIMITS = {"asyncio", "anyio", "aiohttp", "async_timeout"}


def _in_context_of(error: Exception | None, raised: Exception) -> Exception:
    """What was raised while an error was handled, with that as its context, as Python would have it."""
    if raised.__context__ is None and raised is not error:
        raised.__context__ = error
    return raised


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
