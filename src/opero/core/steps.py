"""The steps a flow asks for, and the two drivers that carry them out for one call.

A flow is a generator: it decides, and yields steps; whoever drives it acts, and sends back what happened. `drive`
blocks, `drive_async` awaits; the scheduler of a map is the third driver. None of them holds policy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from opero.core.clock import LONGEST_WAIT, asyncio_sleep, clock
from opero.core.forks import allow_forks, watch_forks
from opero.core.signature import MISSING
from opero.exceptions import CallTimeoutError

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor


class Failed:
    """An exception as a value, so that flows can pass it on without raising it.

    ``instead`` is what the call returns in place of raising it, if anything.
    """

    __slots__ = ("error", "instead")

    def __init__(self, error: Exception, instead: Any = MISSING) -> None:
        self.error = error
        self.instead = instead


class _NotRun:
    """In place of an outcome: the attempt was called off before it began."""

    __slots__ = ()


NOT_RUN = _NotRun()


class Attempt:
    """Step: run the user's function once; sent back: its result, or `Failed`.

    ``timeout`` seconds are left to it, by the option named ``limit``; a blocking driver cannot stop a function and lets
    it run. ``candidate`` is the fallback value in ``args`` or ``kwargs``, for drivers that send only what differs.
    ``flight`` is the badge of the computation that others may be waiting for, see `opero.core.flights`. A driver that
    does not run it at once asks `may_start`, and sends back `NOT_RUN` if the answer is no, or takes what `time_limit`
    says then: the whole call ends at ``deadline``. It calls `begin` when it runs it.
    """

    __slots__ = ("_begins", "_may_start", "args", "candidate", "deadline", "flight", "kwargs", "limit", "timeout")

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        candidate: Any,
        *,
        flight: object = None,
        timeout: float | None = None,
        limit: str = "",
        deadline: float | None = None,
        may_start: Callable[[], bool] | None = None,
        begins: Callable[[], None] | None = None,
    ) -> None:
        self.args = args
        self.kwargs = kwargs
        self.candidate = candidate
        self.flight = flight
        self.timeout = timeout
        self.limit = limit
        self.deadline = deadline
        self._may_start = may_start
        self._begins = begins

    def begin(self) -> None:
        """Let go of the attempt before this one."""
        if self._begins is not None:
            self._begins()
            self._begins = None

    def may_start(self) -> bool:
        return not self.is_late() and (self._may_start is None or self._may_start())

    def is_late(self) -> bool:
        return self.deadline is not None and clock.now() >= self.deadline

    def time_limit(self) -> tuple[float, str] | None:
        """The seconds that it has from now on, and by which option; None if it has as many as it needs."""
        if self.timeout is None:
            return None
        if self.deadline is not None:
            left = max(0.0, self.deadline - clock.now())
            if left < self.timeout:
                self.timeout, self.limit = left, "total_timeout"
        return self.timeout, self.limit

    def timed_out(self, name: str) -> Failed:
        return Failed(CallTimeoutError(f"{name} was stopped: {self.limit} left it {self.timeout:.3g} s"))


class Pause:
    """Step: let ``seconds`` pass; sent back: None.

    ``is_real``: it is somebody else who is waited for, and not time.
    """

    __slots__ = ("is_real", "seconds")

    def __init__(self, seconds: float, *, is_real: bool = False) -> None:
        if not seconds >= 0:
            msg = f"a wait of {seconds} seconds was asked for; let it be 0 or more"
            raise ValueError(msg)
        self.seconds = min(seconds, LONGEST_WAIT)
        self.is_real = is_real


class Arrival(Protocol):
    """Something that comes by itself, or is fetched by whoever looks at the right time."""

    def poll(self) -> bool:
        """Whether it is here; looking may bring it about."""
        ...

    def due_in(self) -> float | None:
        """Seconds until the next look is worth it; None: only `notify` can tell."""
        ...

    def notify(self, wake: Callable[[], None] | None) -> None:
        """Call ``wake``, from any thread, when it may be here."""
        ...

    def withdraw(self) -> None:
        """Nobody waits for it any more."""
        ...


class Await:
    """Step: wait for an `Arrival`; sent back: None.

    ``is_turn``: an attempt begins when it comes, so that somebody should be free for it.
    """

    __slots__ = ("arrival", "is_turn")

    def __init__(self, arrival: Arrival, *, is_turn: bool = False) -> None:
        self.arrival = arrival
        self.is_turn = is_turn


class _Unless:
    """An `Arrival` of another one, or of the moment in which there is no use in waiting for it."""

    __slots__ = ("_arrival", "_is_over")

    def __init__(self, arrival: Arrival, is_over: Callable[[], bool]) -> None:
        self._arrival = arrival
        self._is_over = is_over

    def poll(self) -> bool:
        return self._is_over() or self._arrival.poll()

    def due_in(self) -> float | None:
        return 0.0 if self._is_over() else self._arrival.due_in()

    def notify(self, wake: Callable[[], None] | None) -> None:
        self._arrival.notify(wake)

    def withdraw(self) -> None:
        self._arrival.withdraw()


def waiting_until(
    is_over: Callable[[], bool], wait: Generator[Any, Any, Any], *, is_turn: bool
) -> Generator[Any, Any, Any]:
    """Go through a wait, which gives None once ``is_over`` says so at one of its looks."""
    try:
        step = next(wait)
        while True:
            if step.__class__ is Await:
                step = Await(_Unless(step.arrival, is_over), is_turn=is_turn)
            sent = yield step
            if is_over():
                return None
            step = wait.send(sent)
    except StopIteration as end:
        return end.value
    finally:
        wait.close()


class Asked(Protocol):
    """Something that answers requests, and may block while it does so."""

    def perform(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests in order."""
        ...


class Consult:
    """Step: put one request to ``store``; sent back: its answer. Many may be put at once."""

    __slots__ = ("request", "store")

    def __init__(self, store: Asked, request: Any) -> None:
        self.store = store
        self.request = request


def consult(steps: Sequence[Consult]) -> list[Any]:
    """Put the requests of steps, those to one store together; the answers are in the order of the steps."""
    places: dict[int, list[int]] = {}
    for place, step in enumerate(steps):
        places.setdefault(id(step.store), []).append(place)
    answers: list[Any] = [None] * len(steps)
    for of_one_store in places.values():
        store = steps[of_one_store[0]].store
        for place, answer in zip(of_one_store, store.perform([steps[n].request for n in of_one_store]), strict=True):
            answers[place] = answer
    return answers


async def consult_async(steps: Sequence[Consult]) -> list[Any]:
    """The same in a thread, so that the event loop goes on; a request goes on to its end even if this is cancelled."""
    import asyncio

    return await asyncio.get_running_loop().run_in_executor(_threads.executor(), consult, steps)


class _Threads:
    """Threads for what event loops must not wait for; not the loop's own, which may all be waiting for one of these."""

    def __init__(self) -> None:
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None

    def executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None:
                from concurrent.futures import ThreadPoolExecutor

                self._executor = ThreadPoolExecutor(16, "opero-cache", lambda: allow_forks(threading.current_thread()))
            return self._executor


_threads = _Threads()


Step = Attempt | Pause | Await | Consult
Flow = Generator[Step, Any, Any]


def raise_or_return(outcome: Any) -> Any:
    """Turn a flow's last word into what the user's call does."""
    if outcome.__class__ is not Failed:
        return outcome
    if outcome.instead is not MISSING:
        return outcome.instead
    try:
        raise outcome.error
    finally:
        # This frame, and the caller's, are in the error's traceback: without this they would keep each other alive.
        del outcome


# The computations that the running code is part of: a call of its own that needs one of them must not wait for it.
leading: ContextVar[frozenset[Any]] = ContextVar("opero_leading", default=frozenset())


def run_attempt(function: Callable[..., Any], attempt: Attempt) -> Any:
    attempt.begin()
    token = None if attempt.flight is None else leading.set(leading.get() | {attempt.flight})
    try:
        return function(*attempt.args, **attempt.kwargs)
    except Exception as error:  # noqa: BLE001 - the flow decides what becomes of it
        return Failed(error)
    finally:
        if token is not None:
            leading.reset(token)


async def run_attempt_async(function: Callable[..., Awaitable[Any]], attempt: Attempt, name: str) -> Any:
    attempt.begin()
    token = None if attempt.flight is None else leading.set(leading.get() | {attempt.flight})
    try:
        return await _run_in_time(function, attempt, name)
    finally:
        if token is not None:
            leading.reset(token)


async def _run_in_time(function: Callable[..., Awaitable[Any]], attempt: Attempt, name: str) -> Any:
    if attempt.timeout is None:
        try:
            return await function(*attempt.args, **attempt.kwargs)
        except Exception as error:  # noqa: BLE001 - the flow decides what becomes of it
            return Failed(error)
    import asyncio

    try:
        async with asyncio.timeout(attempt.timeout):
            # Inside the timeout, so that a TimeoutError of the function's own is not taken for the library's.
            try:
                return await function(*attempt.args, **attempt.kwargs)
            except Exception as error:  # noqa: BLE001 - as above
                return Failed(error)
    except TimeoutError:
        return attempt.timed_out(name)


def await_arrival(arrival: Arrival) -> None:
    event = threading.Event()
    try:
        if arrival.poll():
            return
        arrival.notify(event.set)
        while not arrival.poll():
            clock.wait(event.wait, arrival.due_in())
            event.clear()
    finally:
        arrival.notify(None)
        arrival.withdraw()


async def await_arrival_async(arrival: Arrival) -> None:
    import asyncio

    loop = asyncio.get_running_loop()
    event = asyncio.Event()

    def look() -> None:
        # Others that wait in this loop may be woken by this, and go on together with this one.
        arrival.due_in()
        event.set()

    def wake() -> None:
        if asyncio._get_running_loop() is loop:  # noqa: SLF001 - the public way raises where there is none
            event.set()
            return
        try:
            loop.call_soon_threadsafe(event.set)
        except RuntimeError:
            # The loop was closed with this waiter still in it; `withdraw` follows when its task is destroyed.
            return

    try:
        if arrival.poll():
            return
        arrival.notify(wake)
        while not arrival.poll():
            await clock.wait_async(event, arrival.due_in(), look)
            event.clear()
    finally:
        arrival.notify(None)
        arrival.withdraw()


def drive(flow: Flow, function: Callable[..., Any]) -> Any:
    """Carry out a flow by blocking."""
    sent: Any = None
    try:
        step = flow.send(None)
        while True:
            if isinstance(step, Attempt):
                sent = run_attempt(function, step)
            elif isinstance(step, Pause):
                (time.sleep if step.is_real else clock.sleep)(step.seconds)
            elif isinstance(step, Consult):
                try:
                    (sent,) = consult([step])
                except Exception as error:  # noqa: BLE001 - the flow decides what becomes of the call
                    step = flow.throw(error)
                    continue
            else:
                await_arrival(step.arrival)
            step = flow.send(sent)
            # It may hold an error, and with it the frames of an attempt.
            sent = None
    except StopIteration as end:
        outcome = end.value
    finally:
        del sent
        flow.close()
    try:
        return raise_or_return(outcome)
    finally:
        del outcome


async def drive_async(flow: Flow, function: Callable[..., Awaitable[Any]], name: str) -> Any:
    """Carry out a flow by awaiting."""
    sent: Any = None
    try:
        step = flow.send(None)
        while True:
            if isinstance(step, Attempt):
                sent = await run_attempt_async(function, step, name)
            elif isinstance(step, Pause):
                await (asyncio_sleep if step.is_real else clock.async_sleep)(step.seconds)
            elif isinstance(step, Consult):
                try:
                    (sent,) = await consult_async([step])
                except Exception as error:  # noqa: BLE001 - as above
                    step = flow.throw(error)
                    continue
            else:
                await await_arrival_async(step.arrival)
            step = flow.send(sent)
            # It may hold an error, and with it the frames of an attempt.
            sent = None
    except StopIteration as end:
        outcome = end.value
    finally:
        del sent
        flow.close()
    try:
        return raise_or_return(outcome)
    finally:
        del outcome
