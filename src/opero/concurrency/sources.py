"""Where the items of a map come from: a plain iterator, or an async one."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, TypeAlias

from opero.concurrency.worker import BATCH_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

# Iterators over what is there already.
_AT_HAND = tuple(type(iter(kind())) for kind in (list, tuple, dict, set, str, bytes, lambda: range(0)))


class IteratorSource:
    """A plain iterator, pulled in the thread of whoever calls the map.

    ``is_late``: what was taken since `start_turn` has taken so long that nothing more shall be taken. ``exhausted``:
    there will be no more items. ``error``: what the iterator has raised; there will be no more items then.
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._is_at_hand = isinstance(iterator, _AT_HAND)
        self._turn_ends = 0.0
        self.is_late = False
        self.exhausted = False
        self.error: BaseException | None = None

    def start_turn(self) -> None:
        """The map has looked at its results."""
        self.is_late = False
        if not self._is_at_hand:
            self._turn_ends = time.monotonic() + BATCH_SECONDS

    def take(self, count: int) -> list[Any]:
        """Up to ``count`` items; fewer, or none, if there are no more now."""
        taken: list[Any] = []
        try:
            if self._is_at_hand:
                taken.extend(itertools.islice(self._iterator, count))
            else:
                self._take_in_time(count, taken)
        except Exception as error:  # noqa: BLE001 - raised when what has been taken has its outcomes
            self.error = error
            self.is_late = False
        self.exhausted = len(taken) < count and not self.is_late
        return taken

    def _take_in_time(self, count: int, taken: list[Any]) -> None:
        coming, now, turn_ends = self._iterator, time.monotonic, self._turn_ends
        # As in a `for` loop, an iterator needs no more than `__next__`.
        with contextlib.suppress(StopIteration):
            for _ in range(count):
                taken.append(next(coming))
                if now() > turn_ends:
                    self.is_late = True
                    break


class AsyncSource:
    """An async iterable, pulled by a task of its own, one item ahead of what was asked for."""

    def __init__(self, iterator: AsyncIterator[Any], wake: Callable[[], None]) -> None:
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
                    self._wake()
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
        self._wake()

    async def _close_iterator(self) -> None:
        if isinstance(self._iterator, AsyncGenerator):
            await self._iterator.aclose()


Source: TypeAlias = IteratorSource | AsyncSource
