"""What runs in a worker: the user's function on the items of a batch, and nothing of any policy."""

from __future__ import annotations

import contextvars
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opero.core.signature import MISSING, ParameterSlot, name_of, refuse_unfinished
from opero.core.steps import Attempt, raise_or_return, run_attempt_async

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.scheduler import Shape

# Results of these types are surely no awaitables.
_PLAIN_RESULTS = frozenset({int, float, str, bytes, bool, list, tuple, dict, set, type(None)})


TimeLimit = tuple[float, str]  # seconds, and the option that set them


@dataclass(frozen=True)
class Work:
    """One map's function and all that its calls have in common; sent to a worker once.

    ``slot`` is the fallback parameter that a batch's candidate goes to, None where there is none to put.
    """

    function: Callable[..., Any]
    is_async: bool
    shape: Shape
    slot: ParameterSlot | None

    def caller(self, candidate: Any = MISSING) -> Callable[[Any], Any]:
        """The function, with only the item left to give."""
        function, shape, slot = self.function, self.shape, self.slot
        if candidate is not MISSING and slot is not None:

            def call_with_candidate(item: Any) -> Any:
                args, kwargs = slot.put(shape.arguments(item), shape.kwargs, candidate)
                return function(*args, **kwargs)

            return call_with_candidate
        if shape.is_starred:
            return lambda item: function(*shape.arguments(item), **shape.kwargs)
        if not (shape.head or shape.rest or shape.kwargs):
            return function
        head, rest, kwargs = shape.head, shape.rest, shape.kwargs
        return lambda item: function(*head, item, *rest, **kwargs)


@dataclass(slots=True)
class Report:
    """Results in order, errors by place, seconds of running."""

    values: list[Any]
    errors: dict[int, Exception]
    seconds: float


def run_items(
    work: Work,
    items: list[Any],
    candidate: Any,
    *,
    call: Callable[[Any], Any] | None = None,
    context: contextvars.Context | None = None,
) -> Report:
    """Run a batch; ``call`` takes the place of the bare function, as for async functions.

    What an item leaves in its copy of ``context`` is gone for the others. Without one they share the worker's.
    """
    bare = work.caller(candidate) if call is None else call
    call = bare if context is None else lambda item: context.copy().run(bare, item)
    values: list[Any] = []
    errors: dict[int, Exception] = {}
    started = time.perf_counter()
    try:
        for item in items:
            try:
                value = call(item)
                if value.__class__ not in _PLAIN_RESULTS:
                    refuse_unfinished(work.function, value, is_cached=False)
            except Exception as error:  # noqa: BLE001 - the policies of the calling process decide about it
                errors[len(values)] = error
                value = None
            values.append(value)
        return Report(values, errors, time.perf_counter() - started)
    finally:
        # This frame is in the tracebacks of errors: without this they would keep each other, and all results, alive.
        del errors, values


class AsyncCaller:
    """Runs an async function to its end in a worker that has no loop of its own."""

    def __init__(self) -> None:
        import asyncio

        self._runner = asyncio.Runner()
        self._work: Work | None = None
        self._context = contextvars.copy_context()

    def run(
        self,
        work: Work,
        items: list[Any],
        candidate: Any,
        limit: TimeLimit | None,
        context: contextvars.Context | None,
    ) -> Report:
        if work is not self._work:
            self._work, self._context = work, contextvars.copy_context()
        call, shared = work.caller(candidate), self._context

        def run(item: Any) -> Any:
            mine = shared if context is None else context.copy()
            return self._runner.run(in_time(call, item, limit, work), context=mine)

        return run_items(work, items, candidate, call=run)

    def close(self) -> None:
        self._runner.close()


def run_batch(
    work: Work,
    items: list[Any],
    candidate: Any,
    limit: TimeLimit | None,
    caller: AsyncCaller | None,
    *,
    context: contextvars.Context | None = None,
) -> Report:
    """Run a batch of a plain function, or with ``caller`` one of an async function; ``context``: see `run_items`."""
    if caller is None:
        return run_items(work, items, candidate, context=context)
    return caller.run(work, items, candidate, limit, context)


async def in_time(call: Callable[[Any], Any], item: Any, limit: TimeLimit | None, work: Work) -> Any:
    """Await one call, for at most the limit's seconds."""
    attempt = Attempt((item,), {}, MISSING)
    if limit is not None:
        attempt.timeout, attempt.limit = limit
    return raise_or_return(await run_attempt_async(call, attempt, name_of(work.function)))
