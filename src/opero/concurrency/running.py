"""The two ways of driving a map: by blocking and by awaiting. They only pull the input, wait and hand out."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from opero.concurrency.inbox import AsyncInbox, BlockingInbox
from opero.concurrency.scheduler import Scheduler
from opero.core.checks import kind_of
from opero.core.clock import clock
from opero.core.interrupts import Hold
from opero.core.steps import consult, consult_async
from opero.utils.notes import add_note, shorten

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from opero.concurrency.outcome import Outcome, Sink
    from opero.concurrency.pool import MapSettings
    from opero.concurrency.worker import Shape
    from opero.core.plan import Plan


# Iterators over what is there already.
_AT_HAND = tuple(type(iter(kind())) for kind in (list, tuple, dict, set, str, bytes, lambda: range(0)))


class IteratorSource:
    """A plain iterator, pulled in the thread of whoever calls the map.

    ``late_by``: how long after ``turn_ends`` it has given something; nothing more is taken before the map has looked at
    its results. ``exhausted``: there will be no more items. ``error``: what the iterator has raised at its end.
    ``row``: what makes an item of what the iterator gives; an error of it is the end of the input, too.
    """

    def __init__(self, iterator: Iterator[Any], row: Callable[[Any], Any] | None) -> None:
        self._iterator = iterator
        self._row = row
        self._is_at_hand = isinstance(iterator, _AT_HAND)
        self.turn_ends = math.inf
        self.late_by = 0.0
        self.exhausted = False
        self.error: BaseException | None = None

    def take(self, count: int) -> list[Any]:
        """Up to ``count`` items; fewer, or none, if there are no more now."""
        taken: list[Any] = []
        coming, row, now, turn_ends = self._iterator, self._row, clock.real, self.turn_ends
        try:
            if self._is_at_hand and count > 1:
                several = itertools.islice(coming, count)
                taken.extend(several if row is None else map(row, several))
            else:
                # As in a `for` loop, an iterator needs no more than `__next__`.
                with contextlib.suppress(StopIteration):
                    for _ in range(count):
                        item = next(coming)
                        taken.append(item if row is None else row(item))
                        if (taken_at := now()) > turn_ends:
                            self.late_by = taken_at - turn_ends
                            break
        except Exception as error:  # noqa: BLE001 - raised when what has been taken has its outcomes
            self.error = error
            self.late_by = 0.0
        self.exhausted = len(taken) < count and not self.late_by
        return taken


class AsyncSource:
    """An async iterable, pulled by a task of its own, one item ahead of what was asked for; ``row``: as above."""

    # Nothing here blocks.
    late_by, turn_ends = 0.0, math.inf

    def __init__(
        self, iterator: AsyncIterator[Any], row: Callable[[Any], Any] | None, wake: Callable[[], None]
    ) -> None:
        import asyncio

        self._iterator = iterator
        self._row = row
        self._wanted = asyncio.Event()
        self._wake = wake
        self._ahead: deque[Any] = deque()
        self._task: Any = None
        self.error: BaseException | None = None
        self._at_end = self._closing = False

    @property
    def exhausted(self) -> bool:
        return self._at_end and not self._ahead

    def take(self, count: int) -> list[Any]:
        import asyncio

        taken = [self._ahead.popleft() for _ in range(min(count, len(self._ahead)))]
        if not self._at_end and len(taken) < count:
            self._wanted.set()
            if self._task is None:
                self._task = asyncio.get_running_loop().create_task(self._pull())
        return taken

    async def close(self) -> None:
        """Stop pulling, and close a generator that has begun."""
        import asyncio

        self._closing = True
        if self._task is not None:
            self._task.cancel()
            # Not awaited itself: its cancellation is of no interest, but one of who waits here is.
            await asyncio.wait({self._task})
            if not self._task.cancelled():
                self._task.result()

    async def _pull(self) -> None:
        coming, row = self._iterator, self._row
        closing: Any = contextlib.nullcontext()
        if isinstance(coming, AsyncGenerator):
            # Here, because what a generator has entered can be left only by the same task.
            closing = contextlib.aclosing(coming)
        try:
            async with closing:
                while not self._closing:
                    await self._wanted.wait()
                    # In no variable, which would keep it until there is another one.
                    self._ahead.append(await anext(coming) if row is None else row(await anext(coming)))
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


Source: TypeAlias = IteratorSource | AsyncSource


def _row(name: str, item: Any) -> tuple[Any, ...]:
    """The arguments of one call of `starmap`."""
    if isinstance(item, (str, bytes, Mapping)) or not isinstance(item, Iterable):
        raise TypeError(f"{name}.starmap got {kind_of(item)} as an item; each item is a tuple of arguments")
    return item if isinstance(item, tuple) else tuple(item)


def run_blocking(
    plan: Plan, settings: MapSettings, shape: Shape, sink: Sink, *, items: Iterator[Any], total: int | None
) -> Iterator[Outcome[Any, Any]]:
    """Run a map by blocking; yields what the sink hands out."""
    row = partial(_row, plan.name) if shape.is_starred else None
    # The first one imports packages; and an idle pool that is taken must be given back.
    with Hold():
        inbox, source = BlockingInbox(), IteratorSource(items, row)
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
            run.take_note(inbox.collect(seconds, is_real=is_real))
    except BaseException as error:
        _note_end(run, error)
        raise
    finally:
        with Hold() as hold, contextlib.closing(inbox):
            if run.process == os.getpid():
                try:
                    run.close()
                finally:
                    if not run.keeps_pool():
                        # Ctrl-C that comes again meanwhile leaves what cannot be ended.
                        run.pool.stop(lambda: bool(hold.pressed))


def _note_end(run: Scheduler, error: BaseException) -> None:
    if isinstance(error, (Exception, KeyboardInterrupt)):
        shorten(error)
    if not isinstance(error, (Exception, GeneratorExit)):
        # Something may be half done, and an event lost.
        run.is_sound = False
        if type(error).__name__ in {"KeyboardInterrupt", "CancelledError"}:
            add_note(error, run.story())
    run.forget()


async def run_awaiting(
    plan: Plan, settings: MapSettings, shape: Shape, sink: Sink, *, items: Any, total: int | None
) -> AsyncIterator[Outcome[Any, Any]]:
    """Run a map over an iterator or an async one by awaiting; yields what the sink hands out."""
    inbox, row = AsyncInbox(), partial(_row, plan.name) if shape.is_starred else None
    is_async = hasattr(items, "__anext__")
    source = AsyncSource(items, row, lambda: inbox.put(None)) if is_async else IteratorSource(items, row)
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
            run.take_note(await inbox.collect(seconds, is_real=is_real))
    except BaseException as error:
        _note_end(run, error)
        raise
    finally:
        if run.process == os.getpid():
            try:
                run.close()
                if isinstance(source, AsyncSource):
                    await source.close()
            finally:
                if not run.keeps_pool():
                    await run.pool.stop_async()
