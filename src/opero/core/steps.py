"""The steps a flow asks for, and the two drivers that carry them out for one call.

A flow is a generator: it decides, and yields steps; whoever drives it acts, and sends back what happened. `drive`
blocks, `drive_async` awaits; the scheduler of a map is the third driver. None of them holds policy.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from opero.core.clock import asyncio_sleep, clock
from opero.core.forks import fork_safe_threads
from opero.core.signature import MISSING
from opero.events import AttemptStarted, CandidateSwitched
from opero.exceptions import CallTimeoutError, MisuseError
from opero.utils.notes import duration

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from opero.core.breaker import Passage
    from opero.core.limits.line import Turn
    from opero.core.limits.places import Place
    from opero.core.plan import Call, Plan
    from opero.core.stores.flights import Seat


class Failed(NamedTuple):
    """An exception as a value, so that flows can pass it on without raising it.

    ``instead`` is what the call returns in place of raising it, if anything.
    """

    error: Exception
    instead: Any = MISSING


# In place of an outcome: the attempt was called off before it began.
NOT_RUN: Any = object()

TimeLimit = tuple[float, str]  # seconds, and the option that set them
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Candidate:
    """Step: run the user's function once with these arguments; sent back: its result, or `Failed`.

    A driver calls `begins` when it runs it, and ends it when it has taken as long as `time_limit` says then; one that
    blocks cannot do that. One that does not run it at once asks `may_start`, and sends back `NOT_RUN` if it may not.

    Attributes:
        value: That of the parameter which has several, and its ``number`` among them.
        tries: How often it was tried in this call.
        ready_at: When it may be tried again, if it has asked for a time of its own.
        costs: What it takes of each rate limit, once that is known.
        passage: Through the circuit, if there is one, in this attempt.
        place: Of ``max_concurrent``, while it has one.
        has_begun: Whether the attempt has, for a driver that may have to hand it out twice.
        limit: What `time_limit` has said last.
    """

    passage: Passage | None
    place: Place | None
    has_begun: bool
    limit: TimeLimit | None
    tries = 0
    ready_at = -math.inf
    costs: list[tuple[float, ...]] | None = None

    def __init__(self, plan: Plan, call: Call, given: Arguments, value: Any = MISSING, number: int = 0) -> None:
        self.args, self.kwargs = given
        self._plan = plan
        self._call = call
        self.value = value
        self.number = number

    def begins(self) -> None:
        """Count an attempt that begins now; it begins a round if this was tried as often as none before."""
        call, stats = self._call, self._plan.stats
        self.has_begun = True
        # Free what the attempt before this one held: its frames, and all that is in them.
        call.failed = None
        call.began = clock.now()
        call.attempts += 1
        stats.attempts.tick()
        self.tries += 1
        if self.tries <= call.rounds:
            stats.fallbacks.tick()
            if call.tell is not None:
                call.tell(CandidateSwitched, place=self.number)
        else:
            call.rounds = self.tries
            if call.rounds > 1:
                stats.retries.tick()
        if call.tell is not None:
            call.tell(AttemptStarted, attempt=call.attempts, round=call.rounds)

    def is_shut(self) -> bool:
        return self.passage is not None and self.passage.is_shut()

    def may_start(self) -> bool:
        return clock.now() < self._call.deadline and not self.is_shut()

    def time_limit(self) -> TimeLimit | None:
        """The seconds that it has from now on, and by which option; None if it has as many as it needs."""
        left, timeout = self._call.deadline - clock.now(), self._plan.attempt_timeout
        if timeout is not None and timeout <= left:
            self.limit = timeout, "attempt_timeout"
        elif left < math.inf:
            self.limit = max(0.0, left), "total_timeout"
        return self.limit


def stopped(name: str, seconds: float, option: str) -> CallTimeoutError:
    """The error of an execution that was ended after so many seconds, by an option."""
    return CallTimeoutError(f"{name} was stopped: {option} left it {duration(seconds)}")


class Pause(NamedTuple):
    """Step: let ``seconds`` pass; sent back: None.

    ``is_real``: it is somebody else who is waited for, and not time.
    """

    seconds: float
    is_real: bool = False


# Step: wait for something that comes by itself, or is fetched by whoever looks at the right time; sent back: None.
# `poll` tells whether it is here, and may bring it about; `due_in` says in how many seconds the next look is worth it,
# None if only `notify` can tell, which calls back from any thread when it may be here. ``is_turn``: an attempt begins
# when it comes, so that somebody should be free for it.
Arrival: TypeAlias = "Seat | Turn"


class Consult(NamedTuple):
    """Step: put one request to ``ask``, which answers many at once and may block; sent back: its answer."""

    ask: Callable[[Sequence[Any]], list[Any]]
    request: Any


def consult(steps: Sequence[Consult]) -> list[Any]:
    """Put the requests of steps, those of one kind together; the answers are in the order of the steps."""
    answers: list[Any] = [None] * len(steps)
    for ask in dict.fromkeys(step.ask for step in steps):
        places = [place for place, step in enumerate(steps) if step.ask == ask]
        for place, answer in zip(places, ask([steps[n].request for n in places]), strict=True):
            answers[place] = answer
    return answers


async def consult_async(steps: Sequence[Consult]) -> list[Any]:
    """The same in a thread, so that the event loop goes on; a request goes on to its end even if this is cancelled."""
    import asyncio

    try:
        answers = asyncio.get_running_loop().run_in_executor(_threads(os.getpid()), consult, steps)
    except RuntimeError:  # the program is at its end, where no thread begins any more
        return consult(steps)
    return await answers


@lru_cache(maxsize=1)
def _threads(_process: int) -> ThreadPoolExecutor:
    """Threads for what event loops must not wait for; not the loop's own, which may all be waiting for one of these.

    A process that was forked has none of its parent's.
    """
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(16, "opero-cache", lambda: fork_safe_threads.add(threading.current_thread()))


class Share:
    """Step of an item, in a map of lists: call the function with this item among others; sent back its outcome."""


class Prepare:
    """Step of a call in a map, before it takes its slot: wait until a worker can begin it at once; sent back: None."""


Step: TypeAlias = "Candidate | Pause | Consult | Arrival"
Flow = Generator["Step", Any, Any]


def raise_or_return(outcome: Any) -> Any:
    """Turn a flow's last word into what the user's call does."""
    if type(outcome) is not Failed:
        return outcome
    if outcome.instead is not MISSING:
        return outcome.instead
    error, context = outcome.error, outcome.error.__context__
    try:
        raise error
    finally:
        if context is not None:
            # What it was raised during; not what the caller is just handling, from which that has come.
            BaseException.__setattr__(error, "__context__", context)
        # This frame, and the caller's, are in the error's traceback: without this they would keep each other alive.
        del outcome, error, context


# What the running code is part of, innermost last: computations, trials of circuits and places, for which a call of its
# own must not wait. Tasks and threads that were left behind find what is over in their copies of the context.
within: ContextVar[tuple[Any, ...]] = ContextVar("opero_within", default=())


def leaders() -> list[Any]:
    """Those of them that are not over."""
    return [part for part in within.get() if not part.is_over]


@contextlib.contextmanager
def part_of(*parts: Any) -> Iterator[None]:
    """A block that is part of those that are not None; not for items of a map, which share one context."""
    token = within.set((*leaders(), *(part for part in parts if part is not None)))
    try:
        yield
    finally:
        # A task of a loop that was closed ends where it is collected, in another context.
        with contextlib.suppress(ValueError):
            within.reset(token)


_NO_LOOP = (
    "opero waits with asyncio, and no asyncio loop is running here: call {} under asyncio, or decorate a plain "
    "function and call that in a thread (trio.to_thread.run_sync), or leave out what has to wait (retries=0, no limits)"
)


async def run_in_time(
    function: Callable[..., Awaitable[Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    limit: TimeLimit | None,
    name: str,
) -> Any:
    """One execution of the function ``name``: its result, or `Failed`."""
    if limit is None:
        try:
            return await function(*args, **kwargs)
        except Exception as error:  # the flow decides what becomes of it
            return Failed(error)
    if not is_in_asyncio():
        return Failed(MisuseError(_NO_LOOP.format(name)))
    import asyncio

    try:
        async with asyncio.timeout(limit[0]):
            # Inside the timeout, so that a TimeoutError of the function's own is not taken for the library's.
            try:
                return await function(*args, **kwargs)
            except Exception as error:
                return Failed(error)
    except TimeoutError:
        return Failed(stopped(name, *limit))


def drive(flow: Flow, function: Callable[..., Any]) -> Any:
    """Carry out a flow by blocking."""
    go_on: Callable[[Any], Any] = flow.send
    step: Any = None
    sent: Any = None
    try:
        while True:
            step = go_on(sent)
            # The last one may hold an error, and with it the frames of an attempt.
            go_on, sent = flow.send, None
            try:
                if isinstance(step, Candidate):
                    step.begins()
                    # Not by a function of its own, whose frame each level of a recursion would have.
                    sent = function(*step.args, **step.kwargs)
                else:
                    sent = _carry_out(step)
            except Exception as error:  # the flow decides what becomes of it
                go_on, sent = (go_on, Failed(error)) if isinstance(step, Candidate) else (flow.throw, error)
    except StopIteration as end:
        outcome = [end.value]
    finally:
        step = sent = None
        flow.close()
    # Taken out of the list, since an error's traceback leads to this frame: they would keep each other alive.
    return raise_or_return(outcome.pop())


async def drive_async(flow: Flow, function: Callable[..., Awaitable[Any]], name: str) -> Any:
    """Carry out a flow by awaiting."""
    go_on: Callable[[Any], Any] = flow.send
    step: Any = None
    sent: Any = None
    try:
        while True:
            step = go_on(sent)
            go_on, sent = flow.send, None
            try:
                if isinstance(step, Candidate):
                    step.begins()
                    sent = await run_in_time(function, step.args, step.kwargs, step.time_limit(), name)
                else:
                    sent = await _carry_out_async(step, name)
            except Exception as error:
                go_on, sent = flow.throw, error
    except StopIteration as end:
        outcome = [end.value]
    finally:
        step = sent = None
        flow.close()
    # Taken out of the list, since an error's traceback leads to this frame: they would keep each other alive.
    return raise_or_return(outcome.pop())


def _carry_out(step: Consult | Pause | Arrival) -> Any:
    """Do what is asked for, and is no attempt."""
    if isinstance(step, Consult):
        return consult([step])[0]
    if isinstance(step, Pause):
        if clock.sleep is not None and not step.is_real:
            clock.sleep(step.seconds)
        elif step.seconds:
            time.sleep(step.seconds)
        return None
    # A bare lock, which lets it go on once it is released: that of an event of `threading` may be held by this very
    # thread, when a signal handler or a finalizer in it is the one that would set the event.
    asleep = threading.Lock()
    asleep.acquire()

    def wake() -> None:
        # It may be awake already.
        with contextlib.suppress(RuntimeError):
            asleep.release()

    try:
        step.notify(wake)
        while not step.poll():
            clock.wait(lambda seconds: asleep.acquire(timeout=-1 if seconds is None else seconds), step.due_in())
    finally:
        step.notify(None)
    return None


async def _carry_out_async(step: Consult | Pause | Arrival, name: str) -> Any:
    """The same by awaiting; under another library than asyncio only what needs no wait can be done."""
    if not is_in_asyncio():
        raise MisuseError(_NO_LOOP.format(name))
    if isinstance(step, Consult):
        return (await consult_async([step]))[0]
    if isinstance(step, Pause):
        return await (asyncio_sleep if step.is_real else clock.async_sleep)(step.seconds)
    import asyncio

    loop = asyncio.get_running_loop()
    event = asyncio.Event()

    def wake() -> None:
        # The loop may have been closed with this waiter still in it, which ends when its task is destroyed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(event.set)

    try:
        step.notify(wake)
        while not step.poll():
            await clock.wait_async(event, step.due_in())
            event.clear()
    finally:
        step.notify(None)
    return None


def is_in_asyncio() -> bool:
    asyncio = sys.modules.get("asyncio")
    # The public way raises where there is no loop.
    return asyncio is not None and asyncio._get_running_loop() is not None  # noqa: SLF001
