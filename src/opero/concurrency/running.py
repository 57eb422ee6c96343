"""A running map, and the two ways of driving it: by blocking and by awaiting."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from opero.concurrency.inbox import AsyncInbox, BlockingInbox
from opero.concurrency.interrupts import forget_earlier_interrupts, held_back
from opero.concurrency.outcome import Outcome, StreamSink
from opero.concurrency.progress import make_progress
from opero.concurrency.scheduler import IteratorSource, Scheduler, Shape, Wake
from opero.concurrency.worker import Work
from opero.core.signature import parameter_slot
from opero.core.steps import consult, consult_async
from opero.core.switches import switches

if TYPE_CHECKING:
    from opero.concurrency.contract import Arguments, Inbox, MapSettings
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
        self._iterator = iterator
        self._wake = wake
        self._ahead: deque[Any] = deque()
        self._task: Any = None
        self._error: BaseException | None = None
        self._at_end = False
        self._closing = False

    @property
    def exhausted(self) -> bool:
        return self._at_end and not self._ahead

    def take(self, count: int) -> list[Any]:
        import asyncio

        if self._error is not None:
            raise self._error
        taken = [self._ahead.popleft() for _ in range(min(count, len(self._ahead)))]
        if not self._at_end and len(taken) < count and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._pull())
        return taken

    async def close(self) -> None:
        import asyncio

        self._closing = True
        task = self._task
        if task is not None:
            task.cancel()
            # Not awaited itself: its cancellation is of no interest, but one of who waits here is.
            await asyncio.wait({task})
            if not task.cancelled():
                task.result()

    async def _pull(self) -> None:
        try:
            self._ahead.append(await anext(self._iterator))
        except StopAsyncIteration:
            self._at_end = True
        except BaseException as error:
            if self._closing:
                raise
            # Raised where the map takes its input, a cancellation of something that the input waited for, too.
            self._error = error
        self._task = None
        self._wake(Wake())


class _Wait:
    """Step of a running map: wait for events, at most so long by opero's clock and by the real one.

    ``is_idle``: no worker has anything to do. Sent back: the events.
    """

    __slots__ = ("is_idle", "real_seconds", "seconds")

    def __init__(self, seconds: float | None, real_seconds: float | None, *, is_idle: bool) -> None:
        self.is_idle = is_idle
        self.seconds = seconds
        self.real_seconds = real_seconds
        if seconds is not None and not is_idle:
            # What a worker does takes real time, in which no time is skipped.
            self.real_seconds = seconds if real_seconds is None else min(seconds, real_seconds)


class _Ask:
    """Step of a running map: put these to the cache's store; sent back: the answers."""

    __slots__ = ("steps",)

    def __init__(self, steps: list[Consult]) -> None:
        self.steps = steps


class _Run:
    """One running map. Its two drivers, below, only wait and hand out."""

    # A package whose first import is cut short stays broken.
    @held_back()
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
        slot = None if plan.fallback is None else parameter_slot(plan.function, plan.fallback.parameter, "arg_fallback")
        # A worker is sent each candidate when it is its turn, and never all of them, which are often secrets.
        sent = shape if slot is None else shape.without(slot)
        self.pool = settings.pools.pool_for(Work(plan.function, plan.is_async, sent, slot))
        self._inbox = inbox
        self._sink = sink
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
        )

    @property
    def presence(self) -> Presence:
        return self._scheduler.presence

    def steps(self) -> Generator[_Wait | _Ask | list[Outcome[Any, Any]], Any, None]:
        """Yields outcomes to hand out, what to ask the cache's store, and waits."""
        scheduler, pool = self._scheduler, self.pool
        pool.start(self._inbox)
        while True:
            yield from self._give_out()
            self._progress.show(scheduler.tally)
            outcomes = self._sink.take()
            if outcomes:
                yield outcomes
            if scheduler.failure is not None:
                raise scheduler.failure
            if scheduler.done:
                return
            wait = _Wait(scheduler.due_in(), scheduler.really_due_in(), is_idle=scheduler.is_idle)
            for event in (yield wait):
                known = pool.receive(event)
                if known is not None:
                    scheduler.handle(known)
            scheduler.run_real_timers()

    def _give_out(self) -> Generator[_Ask, Any, None]:
        """Send what can be sent, and ask the cache's store on the way."""
        scheduler = self._scheduler
        while True:
            while asked := scheduler.consultations():
                scheduler.answered((yield _Ask(asked)))
            batch = scheduler.next_batch()
            if batch is not None:
                self.pool.submit(batch)
            elif not scheduler.consultations():
                return

    def close(self) -> None:
        """Give up what has not ended; the pool is stopped by the driver."""
        self._scheduler.close()
        self._progress.close()


def run_blocking(
    plan: Plan, settings: MapSettings, arguments: Arguments, sink: Sink, *, items: Iterator[Any], total: int | None
) -> Iterator[Outcome[Any, Any]]:
    """Run a map by blocking; yields what the sink hands out."""
    inbox = BlockingInbox()
    source = IteratorSource(items)
    run = _Run(plan, settings, arguments=arguments, source=source, total=total, sink=sink, inbox=inbox)
    steps, events = run.steps(), None
    is_interrupted = False
    try:
        try:
            while True:
                step = steps.send(events)
                events = None
                if isinstance(step, list):
                    run.presence.is_away = True
                    yield from step
                    run.presence.is_away = False
                elif isinstance(step, _Ask):
                    events = consult(step.steps)
                else:
                    events = inbox.collect(step.seconds, step.real_seconds, pushes=step.is_idle)
        except StopIteration:
            return
        except KeyboardInterrupt:
            is_interrupted = True
            raise
        finally:
            with held_back() as pressed:
                try:
                    run.close()
                finally:
                    try:
                        run.pool.stop()
                    finally:
                        inbox.close()
                if is_interrupted:
                    pressed.clear()
    except KeyboardInterrupt as interrupt:
        forget_earlier_interrupts(interrupt)
        raise


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
    run = _Run(plan, settings, arguments=arguments, source=source, total=total, sink=sink, inbox=inbox)
    steps, events = run.steps(), None
    try:
        while True:
            try:
                step = steps.send(events)
            except StopIteration:
                return
            events = None
            if isinstance(step, list):
                run.presence.is_away = True
                for outcome in step:
                    yield outcome
                run.presence.is_away = False
            elif isinstance(step, _Ask):
                events = await consult_async(step.steps)
            else:
                events = await inbox.collect(step.seconds, step.real_seconds, pushes=step.is_idle)
    finally:
        try:
            run.close()
            if isinstance(source, AsyncSource):
                await source.close()
        finally:
            try:
                await run.pool.stop_async()
            finally:
                inbox.close()
