"""What runs in a worker: the user's function on the items of a batch, and nothing of any policy."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from opero.core.clock import clock
from opero.core.signature import name_of, refuse_unfinished
from opero.core.steps import raise_or_return, run_in_time

if TYPE_CHECKING:
    import asyncio
    import contextvars
    from collections.abc import Callable

    from opero.core.parameters import ParameterSlot
    from opero.core.steps import TimeLimit


# How long a batch should keep a worker busy. What takes longer than the second is reported before the next item begins;
# what takes longer than the third is the last item of its batch.
BATCH_SECONDS = 0.02
SLOW_SECONDS = 0.001
LONG_SECONDS = 0.004
# A coroutine is cancelled when its time is up, and may need some to tidy up; one that ends no more is ended by force.
UNHEEDED_SECONDS = 5.0
# For workers that are far away, on a cluster.
FAR_BATCH_SECONDS = 0.1

# Results of these types are surely no awaitables.
_PLAIN_RESULTS = frozenset({int, float, str, bytes, bool, list, tuple, dict, set, type(None)})


@dataclass(frozen=True, slots=True)
class Shape:
    """What all calls of one map have in common: ``function(*head, item, *rest, **kwargs)``.

    ``is_starred``: items are tuples of arguments, ``function(*head, *item, **kwargs)``.
    """

    head: tuple[Any, ...]
    rest: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_starred: bool

    def arguments(self, item: Any) -> tuple[Any, ...]:
        return (*self.head, *item) if self.is_starred else (*self.head, item, *self.rest)

    def without(self, slot: ParameterSlot) -> Shape:
        """The same with None for one parameter, unless that is the item."""
        place = -1 if slot.position is None else slot.position - len(self.head) - 1
        if 0 <= place < len(self.rest):
            return replace(self, rest=(*self.rest[:place], None, *self.rest[place + 1 :]))
        if slot.keyword and slot.name in self.kwargs:
            return replace(self, kwargs={**self.kwargs, slot.name: None})
        return self


@dataclass(frozen=True)
class Work:
    """One map's function and all that its calls have in common; sent to a worker once.

    ``slot`` is the fallback parameter, unless there is none, or it is the item itself.
    """

    function: Callable[..., Any]
    is_async: bool
    shape: Shape
    slot: ParameterSlot | None

    def caller(self) -> Callable[[Any], Any]:
        """The function, with only the item left to give, or where there is a slot, a pair of item and candidate."""
        function, shape, slot = self.function, self.shape, self.slot
        if slot is not None:

            def call_with_candidate(pair: tuple[Any, Any]) -> Any:
                args, kwargs = slot.put(shape.arguments(pair[0]), shape.kwargs, pair[1])
                return function(*args, **kwargs)

            return call_with_candidate
        if not (shape.head or shape.rest or shape.kwargs or shape.is_starred):
            return function
        return lambda item: function(*shape.arguments(item), **shape.kwargs)


@dataclass(slots=True)
class How:
    """How the items of a batch are run.

    ``context``: what an item leaves in its copy of it is gone for the others; without one they share the worker's.
    ``mark``: its first element is set to the number of items that have begun.
    ``tell``: is told of what has been done so far after each slow item, so that no crash can make it run twice.
    ``longest``: an item that takes longer is the last one; without ``tell``, one that is slow has to be.
    ``seconds``: of a whole batch.
    """

    context: contextvars.Context | None = None
    mark: list[int] | memoryview = field(default_factory=[0].copy)
    tell: Callable[[Report], None] | None = None
    longest: float = LONG_SECONDS
    seconds: float = BATCH_SECONDS


@dataclass(slots=True)
class Report:
    """Results in order, of fewer items than were sent if time was up; errors by place, seconds of running.

    ``size``: its bytes, where it came from a process.
    """

    values: list[Any]
    errors: dict[int, Exception]
    seconds: float
    size: int = 0


def run_batch(work: Work, items: list[Any], limit: TimeLimit | None, runner: asyncio.Runner | None, how: How) -> Report:
    """Run a batch, or what can be run of it in its time.

    Whoever reads the mark twice, more than twice `LONG_SECONDS` apart, and finds the same number, knows that no further
    item will begin: each begins only if it is not long since the one before was marked, by a look at the time after it
    has been marked itself.

    Args:
        work: The function.
        items: What it is called with.
        limit: The time that one call of an async function has.
        runner: Of an async function; see `runner_for`.
        how: See there.
    """
    call, mark, tell = _one_call(work, limit, runner, how.context), how.mark, how.tell
    values: list[Any] = []
    errors: dict[int, Exception] = {}
    now = clock.real
    started = latest = now()
    ends = started + how.seconds
    # After each slow item it is past this: so most of the others cost one comparison.
    look_at = min(ends, started + SLOW_SECONDS)
    try:
        for place, item in enumerate(items, 1):
            mark[0] = place
            begun = now()
            if begun > look_at:
                if begun - latest > SLOW_SECONDS and tell is not None and values:
                    mark[0] = place - 1
                    tell(Report(values, errors, begun - started))
                    values, errors = [], {}
                    mark[0] = place
                    begun = now()
                if begun - latest > how.longest:
                    # What is not begun may be with others by now; but if nothing has, this worker was halted.
                    if place > 1:
                        mark[0] = place - 1
                        break
                    ends = begun
                if begun > ends:
                    mark[0] = place - 1
                    break
                look_at = min(ends, begun + SLOW_SECONDS)
            latest = begun
            try:
                value = call(item)
                if type(value) not in _PLAIN_RESULTS:
                    refuse_unfinished(work.function, value, is_cached=False)
            except Exception as error:  # noqa: BLE001 - the policies of the calling process decide about it
                errors[len(values)] = error
                value = None
            values.append(value)
        return Report(values, errors, now() - started)
    finally:
        # This frame is in the tracebacks of errors: without this they would keep each other, and all results, alive.
        del errors, values


def _one_call(
    work: Work, limit: TimeLimit | None, runner: asyncio.Runner | None, context: contextvars.Context | None
) -> Callable[[Any], Any]:
    call = work.caller()
    if runner is not None:
        copied = (lambda: None) if context is None else context.copy
        return lambda item: runner.run(in_time(call, item, limit, work), context=copied())
    return call if context is None else lambda item: context.copy().run(call, item)


def runner_for(work: Work) -> AbstractContextManager[asyncio.Runner | None]:
    """The event loop of a worker that runs one call of an async function after the other; None for a plain function."""
    if not work.is_async:
        return nullcontext()
    import asyncio

    return asyncio.Runner()


async def in_time(call: Callable[[Any], Any], item: Any, limit: TimeLimit | None, work: Work) -> Any:
    """Await one call, for at most the limit's seconds."""
    return raise_or_return(await run_in_time(call, (item,), {}, limit, name_of(work.function)))


async def run_one(work: Work, item: Any, limit: TimeLimit | None) -> Report:
    """Run one item of an async function, beside others in the same event loop."""
    started = clock.real()
    value, errors = None, {}
    try:
        call = work.caller()
        value = await (call(item) if limit is None else in_time(call, item, limit, work))
    except Exception as error:  # noqa: BLE001 - as above
        errors[0] = error
    try:
        return Report([value], errors, clock.real() - started)
    finally:
        # As above.
        del errors
