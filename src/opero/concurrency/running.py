"""The two ways of driving a map: by blocking and by awaiting. They only wait and hand out."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from opero.concurrency.batches import Wake
from opero.concurrency.ctrl_c import telling
from opero.concurrency.inbox import AsyncInbox, BlockingInbox
from opero.concurrency.scheduler import Scheduler
from opero.concurrency.sources import AsyncSource, IteratorSource
from opero.core.interrupts import Hold
from opero.core.steps import consult, consult_async
from opero.utils.notes import add_note, shorten

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from opero.concurrency.kept import MapSettings
    from opero.concurrency.outcome import Outcome, Sink
    from opero.concurrency.sources import Source
    from opero.concurrency.worker import Shape
    from opero.core.plan import Plan


def run_blocking(
    plan: Plan, settings: MapSettings, shape: Shape, sink: Sink, *, items: Iterator[Any], total: int | None
) -> Iterator[Outcome[Any, Any]]:
    """Run a map by blocking; yields what the sink hands out."""
    run = inbox = None
    try:
        # The first one imports packages; and an idle pool that is taken must be given back.
        with Hold():
            inbox, source = BlockingInbox(), IteratorSource(items)
            run = Scheduler(plan, settings, shape=shape, source=source, sink=sink, inbox=inbox, total=total)
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
            elif isinstance(step, list):
                events = consult(step)
            else:
                events = inbox.collect(step.seconds, is_real=step.is_real)
    except BaseException as error:
        _note_end(run, error)
        raise
    finally:
        with Hold() as hold:
            _tidy_up(run, inbox, hold)


def _note_end(run: Scheduler | None, error: BaseException) -> None:
    if isinstance(error, (Exception, KeyboardInterrupt)):
        shorten(error)
    if run is not None and not isinstance(error, (Exception, GeneratorExit)):
        # Something may be half done, and an event lost.
        run.is_sound = False
        if type(error).__name__ in {"KeyboardInterrupt", "CancelledError"}:
            add_note(error, run.story())


def _tidy_up(run: Scheduler | None, inbox: BlockingInbox | None, hold: Hold) -> None:
    try:
        if run is not None and not run.is_inherited:
            try:
                run.close()
            finally:
                if not run.keeps_pool():
                    # Ctrl-C that comes again meanwhile leaves what cannot be ended.
                    run.pool.stop(telling(lambda: bool(hold.pressed)))
    finally:
        if inbox is not None:
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
    shape: Shape,
    sink: Sink,
    *,
    items: Any,
    total: int | None,
) -> AsyncIterator[Outcome[Any, Any]]:
    """Run a map over an iterator or an async one by awaiting; yields what the sink hands out."""
    inbox = AsyncInbox()
    source: Source = (
        AsyncSource(items, lambda: inbox.put(Wake())) if hasattr(items, "__anext__") else IteratorSource(items)
    )
    run: Scheduler | None = None
    try:
        with Hold():
            run = Scheduler(plan, settings, shape=shape, source=source, sink=sink, inbox=inbox, total=total)
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
            elif isinstance(step, list):
                events = await consult_async(step)
            else:
                events = await inbox.collect(step.seconds, is_real=step.is_real)
    except BaseException as error:
        _note_end(run, error)
        raise
    finally:
        if run is not None and not run.is_inherited:
            await _tidy_up_async(run, inbox, source)


async def _tidy_up_async(run: Scheduler, inbox: AsyncInbox, source: Source) -> None:
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
