"""The steps a flow asks for, and the two drivers that carry them out for one call.

A flow is a generator: it decides, and yields steps; whoever drives it acts, and sends back what happened. `drive`
blocks, `drive_async` awaits; the scheduler of a map is the third driver. None of them holds policy.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextvars import ContextVar, Token
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from opero.core.clock import asyncio_sleep, clock
from opero.core.forks import fork_safe_threads
from opero.core.signature import MISSING
from opero.exceptions import CallTimeoutError, MisuseError
from opero.utils.notes import duration, package_of, raised_in

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from opero.core.breaker import Passage
    from opero.core.flow import Candidate, Layers
    from opero.core.limits.gates import Gate
    from opero.core.limits.line import Turn
    from opero.core.stores.flights import Seat
    from opero.core.stores.settings import Store


class Failed(NamedTuple):
    """An exception as a value, so that flows can pass it on without raising it.

    ``instead`` is what the call returns in place of raising it, if anything.
    """

    error: Exception
    instead: Any = MISSING


# In place of an outcome: the attempt was called off before it began.
NOT_RUN: Any = object()

TimeLimit = tuple[float, str]  # seconds, and the option that set them


class Attempt:
    """Step: run the user's function once; sent back: its result, or `Failed`.

    A driver calls ``begins`` when it runs it, and ends it when it has taken as long as `time_limit` says then; one that
    blocks cannot do that. One that does not run it at once asks `may_start`, and sends back `NOT_RUN` if it may not.

    Attributes:
        passage: Through the circuit, if there is one.
        place: Of ``max_concurrent``, while it has one.
        has_begun: Whether ``begins`` was called, by a driver that may have to hand it out twice.
        limit: What `time_limit` has said last.
        is_last: Set by the driver if its task was cancelled meanwhile: whatever the function made of that, nothing is
            tried again.
    """

    has_begun = False
    limit: TimeLimit | None = None
    is_last = False
    place: Part | None = None

    def __init__(self, layers: Layers, candidate: Candidate, passage: Passage | None) -> None:
        self.args = candidate.args
        self.kwargs = candidate.kwargs
        self.candidate = candidate
        self.passage = passage
        self.begins = partial(layers.begin, candidate)
        self.is_timed = layers.is_timed
        self._layers = layers

    def is_shut(self) -> bool:
        return self.passage is not None and self.passage.is_shut()

    def may_start(self) -> bool:
        return clock.now() < self._layers.call.deadline and not self.is_shut()

    def time_limit(self) -> TimeLimit | None:
        """The seconds that it has from now on, and by which option; None if it has as many as it needs."""
        if self.is_timed:
            left, timeout = self._layers.call.deadline - clock.now(), self._layers.plan.attempt_timeout
            self.limit = max(0.0, left), "total_timeout"
            if timeout is not None and timeout <= left:
                self.limit = timeout, "attempt_timeout"
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
    """Step: put one request to ``store``, which may block; sent back: its answer. Many may be put at once."""

    store: Store | Gate
    request: Any


def consult(steps: Sequence[Consult]) -> list[Any]:
    """Put the requests of steps, those to one store together; the answers are in the order of the steps."""
    answers: list[Any] = [None] * len(steps)
    for store in {id(step.store): step.store for step in steps}.values():
        places = [place for place, step in enumerate(steps) if step.store is store]
        for place, answer in zip(places, store.perform([steps[n].request for n in places]), strict=True):
            answers[place] = answer
    return answers


async def consult_async(steps: Sequence[Consult]) -> list[Any]:
    """The same in a thread, so that the event loop goes on; a request goes on to its end even if this is cancelled."""
    import asyncio

    return await asyncio.get_running_loop().run_in_executor(_threads(os.getpid()), consult, steps)


@lru_cache(maxsize=1)
def _threads(_process: int) -> ThreadPoolExecutor:
    """Threads for what event loops must not wait for; not the loop's own, which may all be waiting for one of these.

    A process that was forked has none of its parent's.
    """
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(16, "opero-cache", lambda: fork_safe_threads.add(threading.current_thread()))


class Share:
    """Step of an item, in a map of lists: call the function with this item among others; sent back as by `Attempt`."""


class Prepare:
    """Step of a call in a map, before it takes its slot: wait until a worker can begin it at once; sent back: None."""


Step: TypeAlias = "Attempt | Pause | Consult | Arrival"
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


# What the running code is part of, so that a call of its own must not wait for it: a computation, or a place by whose
# places it is one of; then the part that this is within. The first is None when it is over, as tasks and threads that
# were left behind find it in their copies of the context. A list, as it is made for each call.
Part: TypeAlias = "list[Any]"
leading: ContextVar[Part | None] = ContextVar("opero_leading", default=None)


def not_over(part: Part | None) -> Part | None:
    """The part, or the innermost around it that is not over."""
    while part is not None and part[0] is None:
        part = part[1]
    return part


def leaders() -> list[Any]:
    """The computations and places that the running code is part of, innermost first."""
    found: list[Any] = []
    part = leading.get()
    while (part := not_over(part)) is not None:
        found.append(part[0])
        part = part[1]
    return found


class PartOf:
    """A block that is part of a computation, or has a place; not for items of a map, which share one context."""

    __slots__ = ("_part", "_token")

    def __init__(self, part: Part) -> None:
        self._part = part
        self._token: Token[Part | None] | None = None

    def __enter__(self) -> None:
        # A generator may be gone on with from within a step of its own.
        if self._part[0] not in leaders():
            self._part[1] = not_over(leading.get())
            self._token = leading.set(self._part)

    def __exit__(self, *_error: object) -> None:
        try:
            if self._token is not None:
                leading.reset(self._token)
        except ValueError:
            # A task of a loop that was closed ends where it is collected, in another context.
            return


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
    try:
        step: Any = flow.send(None)
        while True:
            # The last one may hold an error, and with it the frames of an attempt.
            sent: Any = None
            if isinstance(step, Attempt):
                step.begins()
                # Here and not in a function of its own, whose frame each level of a recursion would have.
                try:
                    sent = function(*step.args, **step.kwargs)
                except Exception as error:  # the flow decides what becomes of it
                    sent = Failed(error)
            else:
                try:
                    sent = _carry_out(step)
                except Exception as error:
                    step = flow.throw(error)
                    continue
            step = flow.send(sent)
    except StopIteration as end:
        outcome = end.value
    finally:
        step = sent = None
        flow.close()
    try:
        return raise_or_return(outcome)
    finally:
        del outcome


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
    event = threading.Event()
    try:
        step.notify(event.set)
        while not step.poll():
            clock.wait(event.wait, step.due_in())
            event.clear()
    finally:
        step.notify(None)
    return None


_NO_LOOP = (
    "opero waits with asyncio, and no asyncio loop is running here: call {name} under asyncio, or decorate a plain "
    "function and call that in a thread (trio.to_thread.run_sync), or leave out what has to wait (retries=0, no limits)"
)


async def drive_async(flow: Flow, function: Callable[..., Awaitable[Any]], name: str) -> Any:
    """Carry out a flow by awaiting."""
    before = _cancellations()
    try:
        step: Any = flow.send(None)
        while True:
            # The last one may hold an error, and with it the frames of an attempt.
            sent: Any = None
            if (not isinstance(step, Attempt) or step.is_timed) and not is_in_asyncio():
                # Under another library only what needs no wait can be done.
                step = flow.throw(MisuseError(_NO_LOOP.format(name=name)))
                continue
            try:
                if isinstance(step, Attempt):
                    step.begins()
                    sent = await run_in_time(function, step.args, step.kwargs, step.time_limit(), name)
                    step.is_last = was_cancelled(sent, before)
                    before = _cancellations()
                else:
                    sent = await _carry_out_async(step)
            except Exception as error:
                step = flow.throw(error)
                continue
            step = flow.send(sent)
    except StopIteration as end:
        outcome = end.value
    finally:
        step = sent = None
        flow.close()
    try:
        return raise_or_return(outcome)
    finally:
        del outcome


async def _carry_out_async(step: Consult | Pause | Arrival) -> Any:
    """The same by awaiting."""
    if isinstance(step, Consult):
        return (await consult_async([step]))[0]
    if isinstance(step, Pause):
        return await (asyncio_sleep if step.is_real else clock.async_sleep)(step.seconds)
    import asyncio

    loop = asyncio.get_running_loop()
    event = asyncio.Event()

    def wake() -> None:
        if asyncio._get_running_loop() is loop:  # noqa: SLF001 - the public way raises where there is none
            event.set()
            return
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


def _cancellations() -> int:
    """How many cancellations of the running asyncio task are under way; 0 where none runs."""
    task = sys.modules["asyncio"].current_task() if is_in_asyncio() else None
    return 0 if task is None else task.cancelling()


def was_cancelled(outcome: Any, before: int | None) -> bool:
    """Whether the running task was cancelled since there were so many cancellations, whatever became of that.

    None is for an attempt before which nobody has counted: then the error tells. It does so before Python 3.13, too,
    where a task group that has failed leaves a cancellation of its own behind.
    """
    if _cancellations() <= (before or 0):
        return False
    if before is not None and sys.version_info >= (3, 13):
        return True
    is_made_of_it = type(outcome) is Failed and _comes_of_cancellation(outcome.error)
    # A call in a `finally` block of a task that was cancelled before is retried as ever.
    return is_made_of_it and (before is not None or not _comes_of_cancellation(sys.exception()))


def _comes_of_cancellation(error: BaseException | None) -> bool:
    """Whether it is a cancellation, or was raised while one was handled that no time limit has made and taken back."""
    cancelled = sys.modules["asyncio"].CancelledError
    while error is not None and not isinstance(error, cancelled):
        if isinstance(error, TimeoutError) and package_of(raised_in(error)) in _HAVE_TIME_LIMITS:
            return False
        error = error.__context__
    return error is not None


_HAVE_TIME_LIMITS = {"asyncio", "anyio", "aiohttp", "async_timeout"}
