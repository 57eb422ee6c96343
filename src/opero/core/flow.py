"""The flow of one call: every decision, in the order of the layers, without sleeping, awaiting or calling.

`_CallFlow` has one method per layer, outermost first; this order is part of opero's contract.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.core.clock import LONGEST_WAIT, clock
from opero.core.listeners import teller_of
from opero.core.plan import Call, Final, Once, Plan, RetryRounds, Verdict
from opero.core.signature import MISSING, own_signature
from opero.core.steps import NOT_RUN, Attempt, Failed, Flow, Pause, waiting_until
from opero.exceptions import (
    AllFailedError,
    CallTimeoutError,
    CircuitOpenError,
    MisuseError,
    NotTransferableError,
    WorkerCrashedError,
)
from opero.utils.logging import log
from opero.utils.notes import add_note, describe

if TYPE_CHECKING:
    from collections.abc import Generator

    from opero.core.listeners import Teller
    from opero.core.plan import Passage

# Less than this is no wait, but the time it takes to ask.
_TOLD_WAIT = 0.001
# No attempt could end otherwise.
FINAL_ERRORS = (MisuseError, NotTransferableError)


class _Candidate:
    """One value to try, and how it has fared in this call."""

    __slots__ = ("args", "kwargs", "place", "ready_at", "value")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any, place: int = 0) -> None:
        self.place = place
        self.args = args
        self.kwargs = kwargs
        self.value = value
        self.ready_at: float | None = None


def call_flow(plan: Plan, call: Call, failure: Exception | None = None) -> Flow:
    """One call from cache to function; with ``failure``, the first attempt has already been made and failed so."""
    flow = _outcome(plan, call, failure)
    tell = call.tell = teller_of(plan, call)
    return flow if tell is None else _told(call, tell, flow)


def _outcome(plan: Plan, call: Call, failure: Exception | None) -> Flow:
    outcome: Any
    layers = _CallFlow(plan, call, failure)
    del failure
    try:
        outcome = yield from layers.cache()
    except Exception as error:  # noqa: BLE001 - raised by a policy before any attempt: a call that failed like others
        outcome = Failed(error)
    if outcome.__class__ is Final:
        outcome = outcome.outcome
    if outcome.__class__ is Failed:
        plan.stats.failures.tick()
        is_misuse = isinstance(outcome.error, MisuseError)
        if plan.default is not MISSING and not is_misuse and not _is_wrong_call(plan, call, outcome.error):
            return Failed(outcome.error, instead=plan.default)
    return outcome


def _told(call: Call, tell: Teller, flow: Flow) -> Flow:
    """A call whose beginning and end are told, whatever ends it."""
    error: Exception | None = None
    cancelled = True
    try:
        tell("CallStarted")
        outcome = yield from flow
        error = outcome.error if outcome.__class__ is Failed else None
        cancelled = False
        return outcome
    finally:
        seconds = clock.now() - call.started
        tell("CallDone", error=error, attempts=call.attempts, seconds=seconds, cached=call.cached, cancelled=cancelled)


class _CallFlow:
    """The layers around one call: each method is one layer and hands on to the next."""

    def __init__(self, plan: Plan, call: Call, failure: Exception | None) -> None:
        self.plan = plan
        self.call = call
        self.first_failure = failure
        self.is_new_round = True
        self.attempt_started = call.started
        self.has_slot = False
        self.candidates: list[_Candidate] = []
        # Those of this round that have not been tried.
        self.left: list[_Candidate] = []
        # All of them with fallback; else the last one, until the next attempt begins.
        self.errors: list[Exception] = []
        # The last attempt that failed, and what else than that ended the call.
        self.failed: Verdict | None = None
        self.ended_by = ""
        self.earlier_failure = ""

    def cache(self) -> Flow:
        if self.plan.cache is not None:
            return self.plan.cache.through(self.call, self.total_timeout, self.plan.stats)
        if self.first_failure is None:
            self.plan.stats.flown.tick()
        return self.total_timeout()

    def total_timeout(self) -> Flow:
        if self.plan.total_timeout is not None:
            self.call.end_after(self.plan.total_timeout)
        return self.retry()

    def retry(self) -> Flow:
        try:
            self.candidates = self._make_candidates()
        except Exception as error:  # noqa: BLE001 - none, or what the function of `candidates_from` raised
            return Failed(error)
        self.has_own_limit = self._has_own_limit()
        retry = self.plan.retry
        rounds = Once() if retry is None else retry.rounds(self.call, self.plan.function)
        while True:
            rounds.begin()
            self.is_new_round = True
            outcome = yield from self.fallback(rounds)
            if outcome.__class__ is not Verdict:
                return outcome
            wait = rounds.after(outcome, self._may_wait)
            if isinstance(wait, Final):
                return self._finish(wait, gave_up=outcome.ends)
            log("DEBUG", "{} failed, next round in {:.3g} s", self.plan.name, wait)
            if self.call.tell is not None:
                self.call.tell("RetryPlanned", round=self.call.rounds, delay=wait, error=outcome.error)
            del outcome
            yield Pause(wait)

    def fallback(self, rounds: RetryRounds) -> Generator[Any, Any, Any]:
        """One round; gives the `Verdict` that speaks for it when no candidate succeeded."""
        verdict = None
        self.left = self._ready_candidates()
        while left := self._admitted(self.left):
            self.left = left
            awake = self._awake(left)
            candidate = awake[0]
            if self.plan.limit is not None and self.first_failure is None and not self.has_slot:
                candidate, self.has_slot = yield from self.plan.limit.choose(awake)
            judged = yield from self.breaker(candidate, rounds)
            if judged is GAVE_WAY:
                continue
            left.remove(candidate)
            if judged is CIRCUIT_OPEN:
                self.has_slot = False
                continue
            if judged.__class__ is not Verdict:
                return judged
            if judged.ends:
                return judged
            if verdict is None or judged.again or not verdict.again:
                verdict = judged
        if verdict is None:
            return self._circuit_open(rounds)
        return self._for_the_round(verdict)

    def breaker(self, candidate: _Candidate, rounds: RetryRounds) -> Generator[Any, Any, Any]:
        """One attempt; gives the call's outcome, or the `Verdict` on a failure."""
        breaker = self.plan.breaker
        if breaker is None:
            return (yield from self._judged(candidate, rounds, None))
        passage = breaker.enter(candidate.value)
        if passage is None:
            return CIRCUIT_OPEN
        with passage:
            return (yield from self._judged(candidate, rounds, passage))

    def _judged(self, candidate: _Candidate, rounds: RetryRounds, passage: Passage | None) -> Generator[Any, Any, Any]:
        outcome = yield from self.rate_limit(candidate, passage)
        if outcome is CIRCUIT_OPEN or outcome is GAVE_WAY:
            return outcome
        if outcome is OUT_OF_TIME:
            return self._out_of_time(rounds)
        if outcome.__class__ is Failed and self._is_final(outcome.error):
            return outcome
        try:
            judged = rounds.judge(outcome)
        except Exception as raised:  # noqa: BLE001 - the user's predicate: what it cannot judge ends the call
            # Not its text, which may hold arguments.
            log("WARNING", "{} ended: what judges its attempts raised {}", self.plan.name, type(raised).__name__)
            return Failed(_in_context_of(outcome, raised))
        if passage is not None:
            passage.tell(failed=_speaks_against_the_service(judged))
        if judged is None:
            return outcome
        if self.call.tell is not None and outcome.__class__ is not Failed:
            seconds = clock.now() - self.attempt_started
            self.call.tell("AttemptFailed", attempt=self.call.attempts, error=judged.error, seconds=seconds)
        self._candidate_failed(candidate, judged)
        if self.plan.limit is not None and judged.delay and self.has_own_limit:
            yield from self.plan.limit.pause(candidate, min(judged.delay, LONGEST_WAIT))
        return judged

    def _is_final(self, error: Exception) -> bool:
        """Whether no attempt could end otherwise, whatever the service does."""
        # Arguments that fit at the first attempt fit at all.
        is_first = self.call.attempts == 1
        return isinstance(error, FINAL_ERRORS) or (is_first and _is_wrong_call(self.plan, self.call, error))

    def rate_limit(self, candidate: _Candidate, passage: Passage | None) -> Generator[Any, Any, Any]:
        if self.first_failure is not None:
            failure, self.first_failure = Failed(self.first_failure), None
            self._round_begins()
            return failure
        if self.plan.limit is not None and not self.has_slot:
            asked = clock.now()
            wait = self.plan.limit.take(candidate, self.call.deadline)
            if self.has_own_limit and self.plan.fallback is not None:
                # Whoever stands in the line of a candidate that is put to rest meanwhile turns to another one.
                is_turn = not self._waits_like_a_failed_round(candidate)
                wait = waiting_until(lambda: self._gives_way(candidate), wait, is_turn=is_turn)
            taken = yield from (wait if passage is None else passage.waiting(wait))
            waited = clock.now() - asked
            self.plan.stats.add_waited(waited)
            if passage is not None and not passage.may_start():
                return CIRCUIT_OPEN
            if taken is None:
                return GAVE_WAY
            if not taken:
                return OUT_OF_TIME
            if self.call.tell is not None and waited >= _TOLD_WAIT:
                self.call.tell("SlotWaited", seconds=waited)
            if not self.has_own_limit and self._gives_way(candidate):
                self.has_slot = True
                return GAVE_WAY
        self.has_slot = False
        return (yield from self.attempt_timeout(candidate, passage))

    def attempt_timeout(self, candidate: _Candidate, passage: Passage | None) -> Generator[Any, Any, Any]:
        timeout, option = self.plan.attempt_timeout, "attempt_timeout"
        left = self.call.time_left()
        if left is not None and (timeout is None or left < timeout):
            timeout, option = left, "total_timeout"
        if timeout is not None and timeout <= 0:
            return OUT_OF_TIME
        self.call.attempts += 1
        self.plan.stats.attempts.tick()
        is_first = self._round_begins()
        if not is_first:
            self.plan.stats.fallbacks.tick()
            if self.call.tell is not None:
                self.call.tell("CandidateSwitched", place=candidate.place)
        attempt = Attempt(
            candidate.args,
            candidate.kwargs,
            candidate.value,
            flight=self.call.flight,
            timeout=timeout,
            limit=option,
            deadline=self.call.deadline,
            may_start=None if passage is None else passage.may_start,
            begins=self._forget_failure if self.plan.fallback is None and self.errors else None,
        )
        if self.call.tell is None:
            outcome = yield attempt
        else:
            outcome = yield from self._told_attempt(attempt, self.call.tell)
        if outcome is NOT_RUN:
            self.call.attempts -= 1
            self.plan.stats.attempts.add(-1)
            if is_first:
                self._round_did_not_begin()
            return OUT_OF_TIME if self._is_out_of_time() else CIRCUIT_OPEN
        return outcome

    def _forget_failure(self) -> None:
        """Free what the attempt before this one held: its frames, and all that is in them."""
        failure = self.errors.pop()
        self.failed = None
        is_timed = self.plan.attempt_timeout is not None or self.plan.total_timeout is not None
        if is_timed and not isinstance(failure, CallTimeoutError):
            self.earlier_failure = describe(failure)

    def _round_begins(self) -> bool:
        """Count the round of an attempt, which is none before one begins; tells whether this attempt is the first."""
        if not self.is_new_round:
            return False
        self.is_new_round = False
        self.call.rounds += 1
        if self.call.rounds > 1:
            self.plan.stats.retries.tick()
        return True

    def _round_did_not_begin(self) -> None:
        self.is_new_round = True
        if self.call.rounds > 1:
            self.plan.stats.retries.add(-1)
        self.call.rounds -= 1

    def _told_attempt(self, attempt: Attempt, tell: Teller) -> Generator[Any, Any, Any]:
        number, started = self.call.attempts, clock.now()
        self.attempt_started = started
        tell("AttemptStarted", attempt=number, round=self.call.rounds)
        outcome = yield attempt
        if outcome.__class__ is Failed:
            tell("AttemptFailed", attempt=number, error=outcome.error, seconds=clock.now() - started)
        elif outcome is NOT_RUN:
            kind: type[Exception] = CircuitOpenError
            why = "its circuit opened"
            if self._is_out_of_time():
                kind, why = CallTimeoutError, "total_timeout was over"
            error = kind(f"{self.plan.name} was not called: {why} before a worker was free")
            tell("AttemptFailed", attempt=number, error=error, seconds=clock.now() - started)
        return outcome

    def _make_candidates(self) -> list[_Candidate]:
        call, fallback = self.call, self.plan.fallback
        if fallback is None:
            return [_Candidate(call.args, call.kwargs, MISSING)]
        values = enumerate(fallback.values(call))
        return [_Candidate(*fallback.arguments(call, value), value, place) for place, value in values]

    def _ready_candidates(self) -> list[_Candidate]:
        if not self.errors:
            return list(self.candidates)
        now = clock.now()
        # A sleep can end a little early; those that asked for a longer rest are left alone all the same.
        admitted = self._admitted(self.candidates)
        ready = [c for c in admitted if c.ready_at is None or c.ready_at <= now]
        return ready or sorted(admitted, key=lambda c: c.ready_at or 0.0)[:1]

    def _candidate_failed(self, candidate: _Candidate, verdict: Verdict) -> None:
        self.errors.append(verdict.error)
        self.failed = verdict
        if not verdict.again:
            self.candidates.remove(candidate)
        candidate.ready_at = None if verdict.delay is None else clock.now() + verdict.delay
        if self.plan.fallback is not None and verdict.rests:
            self.plan.fallback.failed(candidate.value, verdict.delay)

    def _for_the_round(self, verdict: Verdict | None) -> Verdict:
        assert verdict is not None  # noqa: S101 - a round has at least one candidate
        if not self.candidates:
            return verdict
        # Some may have asked for a rest: the next round begins as soon as one of them can be tried.
        times = [c.ready_at for c in self._admitted(self.candidates) or self.candidates]
        soonest = None if None in times else max(0.0, min(t for t in times if t is not None) - clock.now())
        return Verdict(verdict.error, verdict.outcome, again=True, delay=soonest)

    def _awake(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """Those that do not rest, in their order; if all do, the one that wakes first."""
        fallback = self.plan.fallback
        if fallback is None or len(candidates) == 1:
            return candidates
        ends = [(fallback.rests_until(candidate.value), candidate) for candidate in candidates]
        awake = [candidate for end, candidate in ends if end is None]
        return awake or [min(ends, key=lambda pair: pair[0] or 0.0)[1]]

    def _gives_way(self, candidate: _Candidate) -> bool:
        return candidate not in self._awake(self.left)

    def _waits_like_a_failed_round(self, candidate: _Candidate) -> bool:
        """Whether this call has failed, and needs no worker before a candidate that rests wakes."""
        fallback = self.plan.fallback
        return not self.is_new_round and fallback is not None and fallback.rests_until(candidate.value) is not None

    def _has_own_limit(self) -> bool:
        """Whether a limit holds for one candidate only, so that it can be held up while others are tried."""
        fallback, limit = self.plan.fallback, self.plan.limit
        if fallback is None or limit is None or len(self.candidates) == 1:
            return True
        return limit.parameter == fallback.parameter

    def _admitted(self, candidates: list[_Candidate]) -> list[_Candidate]:
        breaker = self.plan.breaker
        return candidates if breaker is None else [c for c in candidates if breaker.admits(c.value)]

    def _some_circuit_admits(self, *, after: float) -> bool:
        breaker = self.plan.breaker
        return breaker is None or any(breaker.admits(c.value, after=after) for c in self.candidates)

    def _may_wait(self, seconds: float) -> bool:
        """Whether another round can begin after so many seconds."""
        left = self.call.time_left()
        if left is not None and seconds >= left:
            self.ended_by = self._time_is_over()
        elif not self._some_circuit_admits(after=seconds):
            self.ended_by = _CIRCUIT_IS_OPEN
        return not self.ended_by

    def _circuit_open(self, rounds: RetryRounds) -> Failed | Final:
        if self.failed is not None:
            self.ended_by = _CIRCUIT_IS_OPEN
            return self._finish(rounds.cut_short(self.failed))
        breaker = self.plan.breaker
        assert breaker is not None  # noqa: S101 - for the type checkers
        whose = "its circuit" if len(self.candidates) == 1 else "the circuit of every candidate"
        wait = breaker.trial_in(candidate.value for candidate in self.candidates)
        trial = "a trial call is under way" if wait is None else f"the next trial is in {wait:.3g} s"
        failures = _count(breaker.failures, "failure")
        return Failed(
            CircuitOpenError(f"{self.plan.name} was not called: {whose} opened after {failures} in a row; {trial}")
        )

    def _out_of_time(self, rounds: RetryRounds) -> Failed | Final:
        self.ended_by = self._time_is_over()
        if self.failed is not None:
            return self._finish(rounds.cut_short(self.failed))
        turn = "a worker" if self.plan.limit is None else "a rate slot"
        message = f"{self.plan.name} was not started: {self.ended_by} during the wait for {turn}"
        return Failed(CallTimeoutError(message))

    def _time_is_over(self) -> str:
        return f"total_timeout={self.plan.total_timeout:g} s ended it"

    def _is_out_of_time(self) -> bool:
        left = self.call.time_left()
        return left is not None and left <= 0

    def _finish(self, final: Final, *, gave_up: bool = False) -> Failed | Final:
        failed = final.outcome
        if not isinstance(failed, Failed):
            return final
        call, plan = self.call, self.plan
        seconds = clock.now() - call.started
        reason = self.ended_by and f"; {self.ended_by}"
        if plan.fallback is not None:
            whom = f"every candidate of {plan.fallback.parameter!r}"
            message = (
                f"{plan.name}: {f'gave up on {whom}' if gave_up else f'{whom} failed'} in "
                f"{_count(call.rounds, 'round')} ({_count(len(self.errors), 'attempt')}, {seconds:.3g} s{reason})"
            )
            log("WARNING", "{}", message)
            return Failed(AllFailedError(message, self.errors))
        if isinstance(failed.error, CallTimeoutError) and self.earlier_failure:
            # The library's own error must not hide the function's.
            add_note(failed.error, f"opero: an attempt before that failed with {self.earlier_failure}")
        summary = f"{plan.name} failed after {_count(call.attempts, 'attempt')} in {seconds:.3g} s{reason}"
        log("WARNING", "{}", summary)
        add_note(failed.error, f"opero: {summary}", instead_of=f"opero: {plan.name} failed after ")
        return failed


class _NoAttempt:
    """In place of an outcome: there was none, and why."""

    __slots__ = ("_reason",)

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __repr__(self) -> str:
        return self._reason


OUT_OF_TIME = _NoAttempt("total_timeout leaves no time for another attempt")
CIRCUIT_OPEN = _NoAttempt("this candidate's circuit is open")
GAVE_WAY = _NoAttempt("this candidate was put to rest while its slot was waited for")


_CIRCUIT_IS_OPEN = "its circuit is open"


def _is_wrong_call(plan: Plan, call: Call, error: Exception) -> bool:
    """Whether the call's arguments do not fit the function, so that the function never began."""
    if not isinstance(error, TypeError):
        return False
    try:
        signature = own_signature(plan.function)
    except (ValueError, TypeError):  # not known, as of some builtins
        return False
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError:
        return True
    return False


def _speaks_against_the_service(judged: Verdict | None) -> bool | None:
    if judged is None:
        return False
    if judged.counts or isinstance(judged.error, CallTimeoutError):
        return True
    # A worker that ended gave no answer.
    return None if isinstance(judged.error, WorkerCrashedError) else False


def _in_context_of(outcome: Any, raised: Exception) -> Exception:
    """The error of a predicate, with the one that it was asked about as its context, as Python would have it."""
    if outcome.__class__ is Failed and outcome.error is not raised and raised.__context__ is None:
        raised.__context__ = outcome.error
    return raised


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
