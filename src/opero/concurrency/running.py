"""A running map, and the two ways of driving it: by blocking and by awaiting."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from opero.concurrency.inbox import AsyncInbox, BlockingInbox
from opero.concurrency.outcome import Outcome, StreamSink
from opero.concurrency.progress import make_progress
from opero.concurrency.scheduler import IteratorSource, Scheduler, Shape, Wake
from opero.concurrency.worker import Work
from opero.core.interrupts import Hold
from opero.core.listeners import switches
from opero.core.signature import parameter_slot
from opero.core.steps import consult, consult_async
from opero.exceptions import OperoError
from opero.utils.notes import shorten

if TYPE_CHECKING:
    from opero.concurrency.inbox import Inbox
    from opero.concurrency.kept import Arguments, MapSettings
    from opero.concurrency.outcome import Sink
    from opero.concurrency.scheduler import Source
    from opero.core.flights import Presence
    from opero.core.plan import Plan
    from opero.core.steps import Consult

# Outcomes that a stream in input order keeps back for an earlier one.
STREAM_WINDOW = 10_000


class AsyncSource:
    """An async iterable, pulled by a task of its own, one item ahead of what was asked for."""

    def __init__(self, iterator: AsyncIterator[Any], wake: Callable[[Wake], None]) -> None:
        import asyncio

        self._iterator = iterator
        self._wanted = asyncio.Event()
        self._wake = wake
        self._ahead: deque[Any] = deque()
        self._task: Any = None
        self.error: BaseException | None = None
        self._at_end = False
        self._closing = False

    @property
    def exhausted(self) -> bool:
        return self._at_end and not self._ahead

    @property
    def is_late(self) -> bool:
        return False

    def start_turn(self) -> None:
        """Nothing here blocks."""

    def take(self, count: int) -> list[Any]:
        import asyncio

        taken = [self._ahead.popleft() for _ in range(min(count, len(self._ahead)))]
        if not self._at_end and len(taken) < count:
            self._wanted.set()
            if self._task is None:
                self._task = asyncio.get_running_loop().create_task(self._pull())
        return taken

    async def close(self) -> None:
        """Stop pulling, and close a generator."""
        import asyncio

        self._closing = True
        task = self._task
        if task is None:
            await self._close_iterator()
            return
        task.cancel()
        # Not awaited itself: its cancellation is of no interest, but one of who waits here is.
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    async def _pull(self) -> None:
        try:
            try:
                while not self._closing:
                    await self._wanted.wait()
                    self._ahead.append(await anext(self._iterator))
                    self._wanted.clear()
                    self._wake(Wake())
            finally:
                # Here, because what a generator has entered can be left only by the same task.
                await self._close_iterator()
        except StopAsyncIteration:
            self._at_end = True
        except BaseException as error:
            if self._closing:
                raise
            # Raised by the map, a cancellation of something that the input waited for, too.
            self.error = error
            self._at_end = True
        self._wake(Wake())

    async def _close_iterator(self) -> None:
        if isinstance(self._iterator, AsyncGenerator):
            await self._iterator.aclose()


class _Wait:
    """Step of a running map: wait for events, at most so many seconds of opero's clock, or real ones.

    Sent back: the events.
    """

    __slots__ = ("is_real", "seconds")

    def __init__(self, seconds: float | None, real_seconds: float | None, *, is_idle: bool) -> None:
        # What a worker or another process does takes real time, in which no time is skipped.
        self.is_real = real_seconds is not None or not is_idle
        self.seconds = min((s for s in (seconds, real_seconds) if s is not None), default=None)


class _Ask:
    """Step of a running map: put these to the cache's store; sent back: the answers."""

    __slots__ = ("steps",)

    def __init__(self, steps: list[Consult]) -> None:
        self.steps = steps


class _Run:
    """One running map. Its two drivers, below, only wait and hand out."""

    def __init__(
        self,
        plan: Plan,
        settings: MapSettings,
        *,
        arguments: Arguments,
        source: Source,
        total: int | None,
        sink: Sink,
        inbox: Inbox,
    ) -> None:
        plan = plan.bare if switches.is_disabled else plan
        shape = Shape(*arguments)
        self.is_closed = False
        self._name = plan.name
        self._process = os.getpid()
        slot = None if plan.fallback is None else parameter_slot(plan.function, plan.fallback.parameter, "arg_fallback")
        # A worker is sent each candidate when it is its turn, and never all of them, which are often secrets.
        sent = shape if slot is None else shape.without(slot)
        self._pools = settings.pools
        self.pool = settings.pools.pool_for(Work(plan.function, plan.is_async, sent, slot))
        self._inbox = inbox
        self._source = source
        self._sink = sink
        self._total = total
        self._plan = plan
        self._progress = make_progress(settings.progress, plan.name, total)
        self._scheduler = Scheduler(
            plan,
            shape,
            source,
            sink,
            pool=self.pool,
            stop_at_failure=not settings.return_exceptions,
            window=STREAM_WINDOW if isinstance(sink, StreamSink) and settings.ordered else None,
            wake=inbox.put,
            list_size=settings.batch_size,
        )

    @property
    def is_inherited(self) -> bool:
        """Whether it runs in the process that this one was forked from; then all of it belongs to that one."""
        return os.getpid() != self._process

    @property
    def presence(self) -> Presence:
        return self._scheduler.presence

    def steps(self) -> Generator[_Wait | _Ask | deque[Outcome[Any, Any]], Any, None]:
        """Yields outcomes to hand out, what to ask the cache's store, and waits."""
        scheduler, pool = self._scheduler, self.pool
        pool.start(self._inbox, most_batches=self._total, is_paced=self._plan.limit is not None)
        while True:
            if self._source.is_late:
                # The input may take long again.
                yield self._sink.take()
            yield from self._give_out()
            self._progress.show(scheduler.tally)
            yield self._sink.take()
            if self.is_inherited:
                msg = f"this stream of {self._name} was begun by the process that forked this one; begin another here"
                raise OperoError(msg)
            if scheduler.failure is not None:
                raise scheduler.failure
            error = self._source.error
            if error is not None and (scheduler.done or not isinstance(self._sink, StreamSink)):
                raise error
            if scheduler.done:
                return
            wait = _Wait(scheduler.due_in(), scheduler.really_due_in(), is_idle=scheduler.is_idle)
            self._take_note((yield wait))
            scheduler.run_real_timers()

    def _take_note(self, events: list[Any]) -> None:
        for event in events:
            known = self.pool.receive(event)
            if known is not None:
                self._scheduler.handle(known)
        # An error among them, and with it the frames of an attempt, shall not outlast this.
        events.clear()

    def _give_out(self) -> Generator[_Ask, Any, None]:
        """Send what can be sent, and ask the cache's store on the way."""
        scheduler = self._scheduler
        self._source.start_turn()
        while True:
            while asked := scheduler.consultations():
                scheduler.answered((yield _Ask(asked)))
            batch = scheduler.next_batch()
            if batch is not None:
                self.pool.submit(batch)
            elif not scheduler.consultations():
                return

    def keeps_pool(self) -> bool:
        """Let another map have the pool, if somebody wants to keep it and nothing runs in it."""
        return self._scheduler.is_sound and self._scheduler.is_idle and self._pools.keep(self.pool)

    def is_interrupted(self) -> None:
        """Something may be half done, and an event lost."""
        self._scheduler.is_sound = False

    def close(self) -> None:
        """Give up what has not ended; the pool is stopped by the driver."""
        self.is_closed = True
        self._scheduler.close()
        self._progress.close()


def run_blocking(
    plan: Plan, settings: MapSettings, arguments: Arguments, sink: Sink, *, items: Iterator[Any], total: int | None
) -> Iterator[Outcome[Any, Any]]:
    """Run a map by blocking; yields what the sink hands out."""
    inbox = BlockingInbox()
    source = IteratorSource(items)
    run: _Run | None = None
    try:
        # The first one imports packages; and an idle pool that is taken must be given back.
        with Hold():
            run = _Run(plan, settings, arguments=arguments, source=source, total=total, sink=sink, inbox=inbox)
        yield from _drive_blocking(run, inbox)
    except BaseException as error:
        _note_end(run, error)
        raise
    finally:
        with Hold() as hold:
            _tidy_up(run, inbox, hold)


def _drive_blocking(run: _Run, inbox: BlockingInbox) -> Iterator[Outcome[Any, Any]]:
    steps, events = run.steps(), None
    while True:
        try:
            step = steps.send(events)
        except StopIteration:
            return
        events = None
        if isinstance(step, deque):
            run.presence.is_away = True
            while step:
                # Nothing here keeps what has been given out.
                yield step.popleft()
            run.presence.is_away = False
        elif isinstance(step, _Ask):
            events = consult(step.steps)
        else:
            events = inbox.collect(step.seconds, is_real=step.is_real)


def _note_end(run: _Run | None, error: BaseException) -> None:
    if isinstance(error, Exception):
        shorten(error)
    elif run is not None and not isinstance(error, GeneratorExit):
        # Something may be half done, and an event lost.
        run.is_interrupted()


def _tidy_up(run: _Run | None, inbox: BlockingInbox, hold: Hold) -> None:
    if run is None or run.is_closed or run.is_inherited:
        return
    try:
        run.close()
    finally:
        try:
            if not run.keeps_pool():
                # Ctrl-C that comes again meanwhile leaves what cannot be ended.
                run.pool.stop(lambda: bool(hold.pressed))
        finally:
            inbox.close()


def has_running_loop() -> bool:
    """Whether this thread is inside an event loop."""
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def run_awaiting(
    plan: Plan,
    settings: MapSettings,
    arguments: Arguments,
    sink: Sink,
    *,
    items: Iterator[Any] | AsyncIterator[Any],
    total: int | None,
) -> AsyncIterator[Outcome[Any, Any]]:
    """Run a map by awaiting; yields what the sink hands out."""
    inbox = AsyncInbox()
    source: Source = AsyncSource(items, inbox.put) if isinstance(items, AsyncIterator) else IteratorSource(items)
    run: _Run | None = None
    try:
        with Hold():
            run = _Run(plan, settings, arguments=arguments, source=source, total=total, sink=sink, inbox=inbox)
        steps, events = run.steps(), None
        while True:
            try:
                step = steps.send(events)
            except StopIteration:
                return
            events = None
            if isinstance(step, deque):
                run.presence.is_away = True
                while step:
                    yield step.popleft()
                run.presence.is_away = False
            elif isinstance(step, _Ask):
                events = await consult_async(step.steps)
            else:
                events = await inbox.collect(step.seconds, is_real=step.is_real)
    except BaseException as error:
        _note_end(run, error)
        raise
    finally:
        if run is not None and not run.is_inherited:
            await _tidy_up_async(run, inbox, source)


async def _tidy_up_async(run: _Run, inbox: AsyncInbox, source: Source) -> None:
    try:
        run.close()
        if isinstance(source, AsyncSource):
            await source.close()
    finally:
        try:
            if not run.keeps_pool():
                await run.pool.stop_async()
        finally:
            inbox.close()
