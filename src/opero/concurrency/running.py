"""The two ways of driving a map, by blocking and by awaiting: how they pull the input, wait and hand out."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from opero.concurrency.scheduler import Scheduler
from opero.core.checks import kind_of
from opero.core.clock import clock, wait_really_async
from opero.core.interrupts import Hold
from opero.core.steps import consult, consult_async
from opero.utils.notes import shorten

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from multiprocessing.connection import Connection

    from opero.concurrency.outcome import Outcome, Sink
    from opero.concurrency.pool import MapSettings
    from opero.concurrency.scheduler import Event
    from opero.concurrency.worker import Shape
    from opero.core.plan import Plan

# Whoever has to wait longer is woken and waits again: Ctrl-C that came just before the thread was put to sleep is heard
# then.
_LONGEST = 1.0
# Between two looks at pipes that an event loop cannot hear.
_POLLING_SECONDS = 0.005
# Iterators over what is there already.
_AT_HAND = tuple(type(iter(kind())) for kind in (list, tuple, dict, set, str, bytes, lambda: range(0)))


# What a running map has to be told


class BlockingInbox:
    """Events for a thread that blocks until there are some, and reads the pipes of its workers meanwhile."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque()
        # A pipe to this thread itself, for those who put an event there while it waits.
        self._own, self._door = multiprocessing.connection.Pipe(duplex=False)
        self._heard: dict[Connection, Callable[[], object]] = {self._own: self._own.recv_bytes}
        self._waits = False

    def put(self, handle: Callable[..., object], *about: Any, **more: Any) -> None:
        """Let the map's own thread call ``handle`` with its scheduler and these; from any thread or signal handler."""
        self.events.append((handle, about, more))
        # Whoever calls this may go on later than the map, and shall not keep the results alive meanwhile.
        del about
        if self._waits:
            self._waits = False
            self._door.send_bytes(b"")

    def listen(self, pipe: Connection, heard: Callable[[], None]) -> None:
        """Call ``heard`` as long as there is something to read in ``pipe``, while the map waits."""
        self._heard[pipe] = heard

    def forget(self, pipe: Connection) -> None:
        """Listen to it no longer; it is still open."""
        self._heard.pop(pipe, None)

    def wait(self, seconds: float | None, *, is_real: bool = False) -> None:
        """Wait for events, at most so many seconds of opero's clock, or real ones."""
        if is_real:
            self._wait(seconds)
        else:
            clock.wait(self._wait, seconds)

    def _wait(self, seconds: float | None) -> bool:
        """Tells whether there are events."""
        if self.events and len(self._heard) == 1:
            return True
        self._waits = True
        try:
            timeout = _LONGEST if seconds is None else min(seconds, _LONGEST)
            ready: Any = multiprocessing.connection.wait(list(self._heard), 0 if self.events else timeout)
        finally:
            self._waits = False
        for pipe in ready:
            # The pool of a thread that maps while the program ends may have ended.
            if pipe in self._heard:
                self._heard[pipe]()
        return bool(self.events)

    def close(self) -> None:
        self._own.close()
        self._door.close()


class AsyncInbox:
    """Events for a coroutine, from its own thread or any other."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._arrived = asyncio.Event()
        self._polled: dict[Connection, Callable[[], None]] = {}

    def put(self, handle: Callable[..., object], *about: Any, **more: Any) -> None:
        self.events.append((handle, about, more))
        if threading.get_ident() == self._thread:
            self._arrived.set()
        else:
            # A closed loop has no map to tell anything any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._arrived.set)

    def listen(self, pipe: Connection, heard: Callable[[], None]) -> None:
        try:
            self._loop.add_reader(pipe.fileno(), heard)
        except NotImplementedError:  # Windows' default loop cannot
            self._polled[pipe] = heard

    def forget(self, pipe: Connection) -> None:
        if self._polled.pop(pipe, None) is None and not self._loop.is_closed():
            self._loop.remove_reader(pipe.fileno())

    async def wait(self, seconds: float | None, *, is_real: bool = False) -> None:
        """Wait for events, at most so many seconds of opero's clock, or real ones."""
        if self._polled:
            seconds, is_real = _POLLING_SECONDS, True
        if not self.events:
            await (wait_really_async if is_real else clock.wait_async)(self._arrived, seconds)
        self._arrived.clear()
        for pipe in multiprocessing.connection.wait(list(self._polled), 0) if self._polled else ():
            self._polled[pipe]()  # type: ignore[index]  # it is one of these


# The input


class IteratorSource:
    """A plain iterator, pulled in the thread of whoever calls the map.

    ``late_by``: how long after ``turn_ends`` it has given something; nothing more is taken before the map has looked at
    its results. ``exhausted``: there will be no more items. ``error``: what the iterator has raised at its end.
    """

    turn_ends = math.inf
    late_by = 0.0
    exhausted = False
    error: BaseException | None = None

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._is_at_hand = isinstance(iterator, _AT_HAND)

    def take(self, count: int) -> list[Any]:
        """Up to ``count`` items; fewer, or none, if there are no more now."""
        taken: list[Any] = []
        try:
            # While batches are small, workers start: what the first ones report may make others needless.
            if self._is_at_hand and count > 1:
                taken.extend(itertools.islice(self._iterator, count))
            else:
                for _ in range(count):
                    # As in a `for` loop, an iterator needs no more than this.
                    taken.append(next(self._iterator))
                    self.late_by = max(0.0, clock.real() - self.turn_ends)
                    if self.late_by:
                        break
        except StopIteration:
            pass
        except Exception as error:  # noqa: BLE001 - raised when what has been taken has its outcomes
            self.error = error
        self.exhausted = len(taken) < count and not self.late_by
        return taken


class AsyncSource:
    """An async iterable, pulled by a task of its own, one item ahead of what was asked for; ``row`` makes each item."""

    # Nothing here blocks.
    late_by, turn_ends = 0.0, math.inf
    error: BaseException | None = None

    def __init__(self, iterator: AsyncIterator[Any], row: Callable[[Any], Any], wake: Callable[[], None]) -> None:
        self._iterator, self._row, self._wake = iterator, row, wake
        self._wanted = asyncio.Event()
        self._ahead: deque[Any] = deque()
        self._task: asyncio.Task[None] | None = None
        self._at_end = self._closing = False

    @property
    def exhausted(self) -> bool:
        return self._at_end and not self._ahead

    def take(self, count: int) -> list[Any]:
        taken = [self._ahead.popleft() for _ in range(min(count, len(self._ahead)))]
        if not self._at_end and len(taken) < count:
            self._wanted.set()
            if self._task is None:
                self._task = asyncio.get_running_loop().create_task(self._pull())
        return taken

    async def close(self) -> None:
        """Stop pulling, and close a generator that has begun."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            # Not awaited itself: its cancellation is of no interest, but one of who waits here is.
            await asyncio.wait({self._task})
            if not self._task.cancelled():
                self._task.result()

    async def _pull(self) -> None:
        coming, row = self._iterator, self._row
        # Here, because what a generator has entered can be left only by the same task.
        closing: Any = contextlib.aclosing(coming) if isinstance(coming, AsyncGenerator) else contextlib.nullcontext()
        try:
            async with closing:
                while not self._closing:
                    await self._wanted.wait()
                    # In no variable, which would keep it until there is another one.
                    self._ahead.append(row(await anext(coming)))
                    self._wanted.clear()
                    self._wake()
        except StopAsyncIteration:
            pass
        except BaseException as error:
            if self._closing:
                raise
            # Raised by the map, a cancellation of something that the input waited for, too.
            self.error = error
        self._at_end = True
        self._wake()


Inbox: TypeAlias = BlockingInbox | AsyncInbox
Source: TypeAlias = IteratorSource | AsyncSource


def _row(name: str, item: Any) -> tuple[Any, ...]:
    """The arguments of one call of `starmap`."""
    if isinstance(item, (str, bytes, Mapping)) or not isinstance(item, Iterable):
        raise TypeError(f"{name}.starmap got {kind_of(item)} as an item; each item is a tuple of arguments")
    return item if isinstance(item, tuple) else tuple(item)


# The drivers


def run_blocking(
    plan: Plan, settings: MapSettings, shape: Shape, sink: Sink, *, items: Iterator[Any], total: int | None
) -> Iterator[Outcome[Any, Any]]:
    """Run a map by blocking; yields what the sink hands out."""
    process = os.getpid()
    # The first one imports packages; and an idle pool that is taken must be given back.
    with Hold():
        inbox = BlockingInbox()
        source = IteratorSource(map(partial(_row, plan.name), items) if shape.is_starred else items)
        run = Scheduler(plan, settings, shape=shape, source=source, sink=sink, inbox=inbox, total=total)
    try:
        while True:
            while questions := run.send():
                run.answered(consult(questions))
            ready = run.outcomes()
            while ready:
                # Nothing here keeps what has been given out.
                yield ready.popleft()
            if run.is_done():
                return
            seconds, is_real = run.patience()
            inbox.wait(seconds, is_real=is_real)
            run.take_note()
    except (Exception, KeyboardInterrupt) as error:
        shorten(error)
        run.tell(error)
        raise
    finally:
        with Hold() as hold, contextlib.closing(inbox):
            # In a child that was forked meanwhile, all of it belongs to the parent.
            if process == os.getpid():
                is_kept = False
                try:
                    is_kept = run.close()
                finally:
                    if not is_kept:
                        # Ctrl-C that comes again meanwhile leaves what cannot be ended.
                        run.pool.stop(lambda: bool(hold.pressed))


async def run_awaiting(
    plan: Plan, settings: MapSettings, shape: Shape, sink: Sink, *, items: Any, total: int | None
) -> AsyncIterator[Outcome[Any, Any]]:
    """Run a map over an iterator or an async one by awaiting; yields what the sink hands out."""
    inbox, row = AsyncInbox(), partial(_row, plan.name) if shape.is_starred else (lambda item: item)
    source: Source
    if hasattr(items, "__anext__"):
        source = AsyncSource(items, row, lambda: inbox.put(lambda _run: None))
    else:
        source = IteratorSource(map(row, items) if shape.is_starred else items)
    with Hold():
        run = Scheduler(plan, settings, shape=shape, source=source, sink=sink, inbox=inbox, total=total)
    try:
        while True:
            while questions := run.send():
                run.answered(await consult_async(questions))
            ready = run.outcomes()
            while ready:
                yield ready.popleft()
            if run.is_done():
                return
            seconds, is_real = run.patience()
            await inbox.wait(seconds, is_real=is_real)
            run.take_note()
    except (Exception, KeyboardInterrupt, asyncio.CancelledError) as error:
        shorten(error)
        run.tell(error)
        raise
    finally:
        is_kept = False
        try:
            is_kept = run.close()
            if isinstance(source, AsyncSource):
                await source.close()
        finally:
            if not is_kept:
                await run.pool.stop_async()
