"""A function as a map: the objects that `opero.opmap` makes, and the two ways of driving a running map."""

from __future__ import annotations

import inspect
import queue
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, overload

from opero.concurrency.outcome import ListSink, Outcome, StreamSink
from opero.concurrency.progress import make_progress
from opero.concurrency.scheduler import Batch, IterableSource, Scheduler, Shape, Wake
from opero.concurrency.worker import Work
from opero.core.resilient import make_resilient, reduce_decorated
from opero.core.signature import parameter_slot

if TYPE_CHECKING:
    from opero.concurrency.outcome import Sink
    from opero.concurrency.scheduler import Source
    from opero.core.plan import CacheInfo, Plan
    from opero.core.stats import CallStats

T = TypeVar("T")
R = TypeVar("R")
E = TypeVar("E")
S = TypeVar("S")
P = ParamSpec("P")
Q = ParamSpec("Q")

# Outcomes that a stream in input order keeps back for an earlier one.
STREAM_WINDOW = 10_000


class Pool(Protocol):
    """Runs a function on the items of batches, and tells each outcome."""

    largest_batch: int

    @property
    def kill(self) -> Callable[[Batch], None] | None:
        """Stops the worker that runs a batch; None where a worker cannot be stopped."""
        ...

    @property
    def slots(self) -> int:
        """Batches that can run at the same time."""
        ...

    def start(self, deliver: Callable[[Any], None]) -> None:
        """Begin; events go to ``deliver``, from any thread."""
        ...

    def submit(self, batch: Batch) -> None:
        """Run a batch as soon as a worker is free."""
        ...

    def receive(self, event: Any) -> Any:
        """Make a scheduler's event of what was delivered; None if it is of no interest."""
        ...

    def stop(self) -> None:
        """End the workers; blocks until they have ended."""
        ...

    async def stop_async(self) -> None:
        """End the workers without blocking the event loop."""
        ...


@dataclass(frozen=True)
class MapSettings:
    """How a map runs; the options of `opero.opmap` that are no policies."""

    make_pool: Callable[[Work], Pool]
    ordered: bool = True
    progress: bool | str = True
    return_exceptions: bool = True
    runs_in_other_process: bool = False


class AsyncSource:
    """An async iterable, pulled by a task of its own, one item ahead of what was asked for."""

    def __init__(self, items: AsyncIterable[Any], wake: Callable[[Wake], None]) -> None:
        self._iterator = aiter(items)
        self._wake = wake
        self._ahead: deque[Any] = deque()
        self._task: Any = None
        self._error: BaseException | None = None
        self._at_end = False

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
        if self._task is not None:
            self._task.cancel()
            with suppress(BaseException):
                await self._task

    async def _pull(self) -> None:
        try:
            self._ahead.append(await anext(self._iterator))
        except StopAsyncIteration:
            self._at_end = True
        except Exception as error:  # noqa: BLE001 - raised where the map takes its input
            self._error = error
        self._task = None
        self._wake(Wake())


class _Wait:
    """Step of a running map: wait for events, at most so many seconds; sent back: the events."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds


class _Run:
    """One running map. Its two drivers, below, only wait and hand out."""

    def __init__(
        self,
        plan: Plan,
        settings: MapSettings,
        *,
        shape: Shape,
        source: Source,
        total: int | None,
        sink: Sink,
        deliver: Callable[[Any], None],
    ) -> None:
        slot = None if plan.fallback is None else parameter_slot(plan.function, plan.fallback.parameter, "arg_fallback")
        self.pool = settings.make_pool(Work(plan.function, plan.is_async, shape, slot))
        self._deliver = deliver
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
            wake=deliver,
        )

    def steps(self) -> Generator[_Wait | list[Outcome[Any, Any]], Any, None]:
        """Yields outcomes to hand out, and waits."""
        scheduler, pool = self._scheduler, self.pool
        pool.start(self._deliver)
        while True:
            while (batch := scheduler.next_batch()) is not None:
                pool.submit(batch)
            self._progress.show(scheduler.finished_items, scheduler.failed_items)
            outcomes = self._sink.take()
            if outcomes:
                yield outcomes
            if scheduler.failure is not None:
                raise scheduler.failure
            if scheduler.done:
                return
            for event in (yield _Wait(scheduler.due_in())):
                known = pool.receive(event)
                if known is not None:
                    scheduler.handle(known)

    def close(self) -> None:
        """Give up what has not ended; the pool is stopped by the driver."""
        self._scheduler.close()
        self._progress.close()


def _drive_map(make_run: Callable[[Callable[[Any], None]], _Run]) -> Iterator[Outcome[Any, Any]]:
    """Run a map by blocking."""
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    run = make_run(inbox.put)
    steps, events = run.steps(), None
    try:
        while True:
            step = steps.send(events)
            events = None
            if isinstance(step, list):
                yield from step
            else:
                events = _collect(inbox, step.seconds)
    except StopIteration:
        return
    finally:
        try:
            run.close()
        finally:
            run.pool.stop()


def _collect(inbox: queue.SimpleQueue[Any], seconds: float | None) -> list[Any]:
    events = []
    with suppress(queue.Empty):
        events.append(inbox.get(timeout=seconds))
        while True:
            events.append(inbox.get_nowait())
    return events


class _AsyncInbox:
    """Events for a coroutine, from its own thread or any other."""

    def __init__(self) -> None:
        import asyncio

        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._events: deque[Any] = deque()
        self._arrived = asyncio.Event()

    def put(self, event: Any) -> None:
        self._events.append(event)
        if threading.get_ident() == self._thread:
            self._arrived.set()
        else:
            # A closed loop has no map to tell anything any more.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._arrived.set)

    async def collect(self, seconds: float | None) -> list[Any]:
        if not self._events:
            timer = None if seconds is None else self._loop.call_later(seconds, self._arrived.set)
            try:
                await self._arrived.wait()
            finally:
                if timer is not None:
                    timer.cancel()
        self._arrived.clear()
        return [self._events.popleft() for _ in range(len(self._events))]


async def _drive_map_async(
    make_run: Callable[[Callable[[Any], None]], tuple[_Run, AsyncSource | None]],
) -> AsyncIterator[Outcome[Any, Any]]:
    """Run a map by awaiting."""
    inbox = _AsyncInbox()
    run, source = make_run(inbox.put)
    steps, events = run.steps(), None
    try:
        while True:
            try:
                step = steps.send(events)
            except StopIteration:
                return
            events = None
            if isinstance(step, list):
                for outcome in step:
                    yield outcome
            else:
                events = await inbox.collect(step.seconds)
    finally:
        try:
            run.close()
            if source is not None:
                await source.close()
        finally:
            await run.pool.stop_async()


class _Map(Generic[T, P, R, E]):
    """A function that takes many items; what both kinds have in common."""

    def __init__(self, plan: Plan, settings: MapSettings, single: Any, head: tuple[Any, ...] = ()) -> None:
        self.plan = plan
        self.settings = settings
        self.single = single
        self._head = head

    @property
    def stats(self) -> CallStats:
        """A snapshot of what this function has done so far, in maps and in single calls."""
        return self.plan.stats.snapshot()

    def cache_info(self) -> CacheInfo:
        """Hits, misses, largest and current number of entries; zeros without a cache."""
        info: CacheInfo = self.single.cache_info()
        return info

    def cache_clear(self) -> None:
        """Forget all results."""
        self.single.cache_clear()

    def cache_delete(self, item: T, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Forget the result for this item and these arguments; tells whether there was one."""
        deleted: bool = self.single.cache_delete(item, *args, **kwargs)
        return deleted

    def __reduce__(self) -> Any:
        if self._head:
            return _bind, (self._unbound(), *self._head)
        return reduce_decorated(self)

    def __repr__(self) -> str:
        return f"<opmap {self.plan.function!r}>"

    def __set_name__(self, owner: type, name: str) -> None:
        self.single.__set_name__(owner, name)

    def _bound_to(self, instance: Any) -> Self:
        bound = type(self)(self.plan, self.settings, self.single.__get__(instance), (instance,))
        bound.__dict__.update({k: v for k, v in self.__dict__.items() if k.startswith("__")})
        bound.__dict__["unbound"] = self
        return bound

    def _unbound(self) -> Any:
        return self.__dict__["unbound"]

    def _shape(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Shape:
        """What all calls have in common; a wrong call raises its TypeError before anything starts."""
        shape = Shape(self._head, rest, kwargs)
        with suppress(ValueError):
            inspect.signature(self.plan.function).bind(*shape.arguments(None), **kwargs)
        return shape


class SyncMap(_Map[T, P, R, E]):
    """A ``def`` function as a map; made by `opero.opmap`."""

    def __call__(self, items: Iterable[T], /, *args: P.args, **kwargs: P.kwargs) -> list[E]:
        """Call the function with each item, and these arguments, and return all results.

        A failed item is its exception in the list, or with ``return_exceptions=False`` raises it and stops the map.
        """
        sink = ListSink(ordered=self.settings.ordered)
        for _ in self._outcomes(items, self._shape(args, kwargs), sink):
            pass  # a ListSink hands nothing out
        return sink.results

    def run(self, items: Iterable[T], /, *args: P.args, **kwargs: P.kwargs) -> list[E]:
        """The same as calling the map; scripts can treat ``def`` and ``async def`` alike."""
        return self(items, *args, **kwargs)

    def stream(self, items: Iterable[T], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[Outcome[T, R]]:
        """Yield the `Outcome` of each item as it ends, in input order unless ``ordered=False``; may be closed early."""
        return self._outcomes(items, self._shape(args, kwargs), StreamSink(ordered=self.settings.ordered))

    def one(self, item: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function with one item, under the same policies."""
        if self.plan.attempt_timeout is None:
            result: R = self.single(item, *args, **kwargs)
            return result
        # Only in a process of its own can a running function be stopped.
        quiet = replace(self.settings, progress=False)
        (outcome,) = type(self)(self.plan, quiet, self.single, self._head).stream([item], *args, **kwargs)
        return outcome.result

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(
        self: SyncMap[S, Concatenate[T, Q], R, E], instance: S, owner: type | None = None
    ) -> SyncMap[T, Q, R, E]: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self._bound_to(instance)

    def _outcomes(self, items: Iterable[T], shape: Shape, sink: Sink) -> Iterator[Outcome[T, R]]:
        if isinstance(items, AsyncIterable) and not isinstance(items, Iterable):
            msg = f"{self.plan.name} is a `def` function and got the async iterable {items!r}; make it `async def`"
            raise TypeError(msg)
        source = IterableSource(items)

        def make_run(deliver: Callable[[Any], None]) -> _Run:
            return _Run(
                self.plan,
                self.settings,
                shape=shape,
                source=source,
                total=_length(items),
                sink=sink,
                deliver=deliver,
            )

        return _drive_map(make_run)


class AsyncMap(_Map[T, P, R, E]):
    """An ``async def`` function as a map; made by `opero.opmap`."""

    async def __call__(self, items: Iterable[T] | AsyncIterable[T], /, *args: P.args, **kwargs: P.kwargs) -> list[E]:
        """Call the function with each item, and these arguments, and return all results.

        A failed item is its exception in the list, or with ``return_exceptions=False`` raises it and stops the map.
        """
        sink = ListSink(ordered=self.settings.ordered)
        async for _ in self._outcomes(items, self._shape(args, kwargs), sink):
            pass  # a ListSink hands nothing out
        return sink.results

    def run(self, items: Iterable[T] | AsyncIterable[T], /, *args: P.args, **kwargs: P.kwargs) -> list[E]:
        """The blocking form, for scripts; inside a running event loop write ``await`` instead."""
        import asyncio

        return asyncio.run(self(items, *args, **kwargs))

    def stream(
        self, items: Iterable[T] | AsyncIterable[T], /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncIterator[Outcome[T, R]]:
        """Yield the `Outcome` of each item as it ends, in input order unless ``ordered=False``; may be closed early."""
        return self._outcomes(items, self._shape(args, kwargs), StreamSink(ordered=self.settings.ordered))

    def one(self, item: T, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the function with one item, under the same policies, in this event loop."""
        call: Coroutine[Any, Any, R] = self.single(item, *args, **kwargs)
        return call

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(
        self: AsyncMap[S, Concatenate[T, Q], R, E], instance: S, owner: type | None = None
    ) -> AsyncMap[T, Q, R, E]: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self._bound_to(instance)

    def _outcomes(
        self, items: Iterable[T] | AsyncIterable[T], shape: Shape, sink: Sink
    ) -> AsyncIterator[Outcome[T, R]]:
        plain = None if isinstance(items, AsyncIterable) else IterableSource(items)

        def make_run(deliver: Callable[[Any], None]) -> tuple[_Run, AsyncSource | None]:
            pulled = AsyncSource(items, deliver) if isinstance(items, AsyncIterable) else None
            source: Any = pulled or plain
            run = _Run(
                self.plan,
                self.settings,
                shape=shape,
                source=source,
                total=_length(items),
                sink=sink,
                deliver=deliver,
            )
            return run, pulled

        return _drive_map_async(make_run)


def _length(items: Any) -> int | None:
    return len(items) if hasattr(items, "__len__") else None


def _bind(unbound: Any, instance: Any) -> Any:
    return unbound.__get__(instance)


def make_map(plan: Plan, settings: MapSettings, remake: Callable[..., Any]) -> Any:
    """Make the map object for a plan; ``remake`` makes it again from the bare function, in another process."""
    kind = AsyncMap if plan.is_async else SyncMap
    made: Any = kind(plan, settings, make_resilient(plan, remake))
    for name in ("__module__", "__name__", "__qualname__", "__doc__", "__wrapped__"):
        made.__dict__[name] = getattr(made.single, name)
    made.__dict__["remake"] = remake
    return made
