"""Time that jumps in place of every wait, for `opero.testing.instant`.

As in a simulation of events, all who wait have their moments in one heap, and time jumps to the earliest of them when
nothing else is ready to go on: waits side by side pass together. Of an event loop that is known, see `_LoopWatch`; of
other threads it is found out by looking whether they use the processor, see `_Lull`. Both have a bound, after which
time jumps all the same, so that nobody waits for ever for somebody who is busy.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from opero.core.clock import Bell
from opero.core.forks import watch_forks

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Collection, Iterator

# Moments that are so close to each other are one: those who begin to wait together do so one after the other.
_AT_ONCE = 0.001
# The other threads are at rest when they used no more than so much of the processor in so many looks in a row.
_LOOK_SECONDS = 0.00002
_RESTING_CPU_SECONDS = 0.00001
_LOOKS = 3
# Real seconds for which they are waited for at most.
_PATIENCE = 0.05
# Who does not look sees by itself, this often, whether the one who does is gone.
_SLICE = 0.25
_LOOK_AGAIN_SECONDS = 0.002
# A loop is idle after so many rounds in a row that had nothing else to do. It is taken for idle after so many that had,
# in case somebody spins until a wait has ended, and after so many where what there is to do cannot be seen (uvloop).
_IDLE_ROUNDS = 2
_MOST_BUSY_ROUNDS = 2_000
_BLIND_ROUNDS = 20

# Seconds that were jumped over by waits of the running thread or task.
_own_jumps: ContextVar[float] = ContextVar("opero_own_jumps", default=0.0)


class _Waiter:
    """Somebody who waits for a moment; any thread may call ``wake``, which has no effect but on a wait.

    ``pushes``: it lets time jump; else it only wants to know when the moment has come.
    """

    __slots__ = ("__weakref__", "has_left", "is_due", "moment", "pushes", "thread", "wake")

    def __init__(self, wake: Callable[[], None], *, pushes: bool) -> None:
        self.wake = wake
        self.pushes = pushes
        self.moment = 0.0
        self.thread = threading.get_ident()
        self.is_due = False
        self.has_left = False

    def is_in(self, loops: Collection[asyncio.AbstractEventLoop]) -> bool:  # noqa: ARG002 - a thread is in none
        return False


class VirtualTime:
    """Lets time jump in place of every wait; between the jumps it passes as ever."""

    def __init__(self) -> None:
        self._jumped = 0.0
        self._jumped_before = 0.0
        self._jumped_by_waits = 0.0
        self._ticks = itertools.count()
        self._heap: list[tuple[float, int, _Waiter]] = []
        self._watches: dict[asyncio.AbstractEventLoop, _LoopWatch] = {}
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """Forget the waits of threads that do not exist in this child; an event loop may go on in it."""
        here = threading.get_ident()
        self._lock = threading.Lock()
        self._heap = [entry for entry in self._heap if entry[2].thread == here and not entry[2].has_left]
        heapq.heapify(self._heap)
        self._left_in_heap = 0
        self._watches = {loop: watch for loop, watch in self._watches.items() if watch.thread == here}
        # Those who were told that their moment has come, and have not gone on yet; some never will.
        self._woken: weakref.WeakSet[_Waiter] = weakref.WeakSet()
        self._joined = 0
        self._lull: _Lull | None = None

    def begin(self) -> None:
        """From here on the time of day jumps, too; what was jumped over before is over."""
        self._jumped_before = self._jumped

    @property
    def skipped(self) -> float:
        """Seconds that were jumped over."""
        return self._jumped

    def now(self) -> float:
        return time.monotonic() + self._jumped

    def wall(self) -> float:
        return time.time() + self._jumped - self._jumped_before

    def jumped_by_others(self) -> float:
        """Seconds that were jumped over by waits of other threads and tasks than the running one."""
        return self._jumped_by_waits - _own_jumps.get()

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass, at once and for everybody."""
        with self._lock:
            self._jumped += max(0.0, seconds)
            due = self._take_due(self.now())
        for waiter in due:
            waiter.wake()

    def sleep(self, seconds: float) -> None:
        bell = Bell()
        self.wait(bell.wait, seconds, nudge=bell.nudge)

    async def sleep_async(self, seconds: float) -> None:
        import asyncio

        if seconds <= 0:
            await asyncio.sleep(0)
            return
        event = asyncio.Event()
        await self.wait_async(event, seconds, event.set)

    def wait(
        self,
        wait_for: Callable[[float | None], Any],
        seconds: float,
        *,
        nudge: Callable[[], None],
        patience: float | None = None,
        pushes: bool = True,
    ) -> None:
        """See `opero.core.clock.Clock.wait`."""
        if wait_for(0) or seconds <= 0:
            return
        end = None if patience is None else time.monotonic() + patience
        waiter = _Waiter(nudge, pushes=pushes)
        with self._counted(seconds):
            try:
                self._join(waiter, seconds)
                while not waiter.is_due:
                    looks = pushes and self.may_look(waiter)
                    if looks and is_alone():
                        self.move_on()
                        continue
                    timeout = _LOOK_SECONDS if looks else _SLICE
                    if end is not None:
                        timeout = max(0.0, min(timeout, end - time.monotonic()))
                    if wait_for(timeout) or (end is not None and time.monotonic() >= end):
                        return
                    if looks and self.others_rest():
                        self.move_on()
            finally:
                self._leave(waiter)

    async def wait_async(
        self, event: asyncio.Event, seconds: float, on_time: Callable[[], None], *, pushes: bool = True
    ) -> None:
        """See `opero.core.clock.Clock.wait_async`."""
        import asyncio

        loop = asyncio.get_running_loop()
        timer = _LoopTimer(loop, on_time, pushes=pushes)
        watch = None
        with self._counted(seconds):
            try:
                self._join(timer, seconds)
                if pushes:
                    watch = self._watch_of(loop)
                    watch.add()
                await event.wait()
            finally:
                self._leave(timer)
                if watch is not None and watch.discard():
                    self._watches.pop(loop, None)

    @contextlib.contextmanager
    def _counted(self, seconds: float) -> Iterator[None]:
        """A wait whose jumps are those of the running thread or task."""
        before = self._jumped_by_waits
        try:
            yield
        finally:
            _own_jumps.set(_own_jumps.get() + min(seconds, self._jumped_by_waits - before))

    # Who waits

    def _watch_of(self, loop: asyncio.AbstractEventLoop) -> _LoopWatch:
        watch = self._watches.get(loop)
        if watch is None:
            self._forget_closed_loops()
            watch = self._watches[loop] = _LoopWatch(self, loop)
        return watch

    def _forget_closed_loops(self) -> None:
        """Drop those that were closed with somebody in them, who never left."""
        closed = {loop for loop in tuple(self._watches) if loop.is_closed()}
        for loop in closed:
            self._watches.pop(loop, None)
        if closed:
            with self._lock:
                self._heap = [entry for entry in self._heap if not entry[2].is_in(closed)]
                heapq.heapify(self._heap)
                self._left_in_heap = sum(entry[2].has_left for entry in self._heap)

    def _join(self, waiter: _Waiter, seconds: float) -> None:
        with self._lock:
            self._joined += 1
            waiter.moment = self.now() + seconds
            heapq.heappush(self._heap, (waiter.moment, next(self._ticks), waiter))

    def _leave(self, waiter: _Waiter) -> None:
        with self._lock:
            self._woken.discard(waiter)
            waiter.has_left = True
            if not waiter.is_due:
                self._left_in_heap += 1
                if self._left_in_heap > len(self._heap) // 2:
                    self._heap = [entry for entry in self._heap if not entry[2].has_left]
                    heapq.heapify(self._heap)
                    self._left_in_heap = 0
        self.look_no_more(waiter)

    def move_on(self) -> None:
        """Jump to the next moment that somebody waits for, and wake all whose moment it is."""
        with self._lock:
            self._drop_left()
            if not self._heap:
                return
            now = self.now()
            due = self._take_due(max(now, self._heap[0][0]) + _AT_ONCE)
            seconds = max(0.0, due[-1].moment - now)
            self._jumped += seconds
            self._jumped_by_waits += seconds
        for waiter in due:
            waiter.wake()

    def _drop_left(self) -> None:
        while self._heap and self._heap[0][2].has_left:
            heapq.heappop(self._heap)
            self._left_in_heap -= 1

    def _take_due(self, moment: float) -> list[_Waiter]:
        due: list[_Waiter] = []
        self._drop_left()
        while self._heap and self._heap[0][0] <= moment:
            due.append(heapq.heappop(self._heap)[2])
            self._drop_left()
        for waiter in due:
            waiter.is_due = True
        self._woken.update(due)
        return due

    # Whether the other threads are at rest; one who waits looks for all

    def may_look(self, who: object) -> bool:
        """Whether it is ``who`` that looks."""
        with self._lock:
            lull = self._lull
            if lull is None or (lull.who is not who and time.monotonic() - lull.looked_at > _SLICE):
                self._lull = lull = _Lull(who)
            if lull.who is not who:
                return False
            lull.mark(self._joined)
            return True

    def others_rest(self) -> bool:
        """To be asked by the one who looks, a look after `may_look`."""
        with self._lock:
            lull = self._lull
            if lull is None:
                return False
            rests = lull.has_come(self._joined, is_waking=bool(self._woken))
            if rests:
                # Some may never go on: their loop was stopped, or is blocked by what waits here.
                self._woken.clear()
                self._lull = _Lull(lull.who)
            return rests

    def look_no_more(self, who: object) -> None:
        """Let somebody else look."""
        with self._lock:
            if self._lull is None or self._lull.who is not who:
                return
            waiting = (waiter for _, _, waiter in self._heap if waiter.pushes and not waiter.has_left)
            # The watch of an event loop comes by itself.
            heir = next((waiter for waiter in waiting if not isinstance(waiter, _LoopTimer)), None)
            self._lull = None if heir is None else _Lull(heir)
        if heir is not None:
            heir.wake()


class _LoopTimer(_Waiter):
    """Calls back in an event loop."""

    __slots__ = ("_callback", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None], *, pushes: bool) -> None:
        super().__init__(self._call_soon, pushes=pushes)
        self._loop = loop
        self._callback = callback

    def is_in(self, loops: Collection[asyncio.AbstractEventLoop]) -> bool:
        return self._loop in loops

    def _call_soon(self) -> None:
        is_here = threading.get_ident() == self.thread
        call_soon = self._loop.call_soon if is_here else self._loop.call_soon_threadsafe
        # A closed loop has nobody any more who waits.
        with contextlib.suppress(RuntimeError):
            call_soon(self._run)

    def _run(self) -> None:
        if not self.has_left:
            self._callback()


class _LoopWatch:
    """Lets time jump when an event loop, in which somebody waits for that, has nothing else to do.

    It runs once in each round of the loop. A round looks for what came in from outside, too, without waiting for it.
    """

    def __init__(self, of_time: VirtualTime, loop: asyncio.AbstractEventLoop) -> None:
        self.thread = threading.get_ident()
        self._time = of_time
        self._loop = loop
        self._waiting = 0
        self._rounds = 0
        self._idle_rounds = 0
        self._is_on = False

    def add(self) -> None:
        """One more waits."""
        self._waiting += 1
        if not self._is_on:
            self._go_on(0.0)

    def discard(self) -> bool:
        """One waits no more; tells whether it was the last."""
        self._waiting -= 1
        return not self._waiting

    def _go_on(self, seconds: float) -> None:
        self._is_on = True
        if seconds:
            self._loop.call_later(seconds, self._look)
        else:
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._is_on = False
        seconds = 0.0
        try:
            if self._waiting:
                seconds = self._step()
        finally:
            if self._waiting:
                self._go_on(seconds)
            else:
                self._time.look_no_more(self)

    def _step(self) -> float:
        """Look, and jump if it is time to; gives real seconds until the next look."""
        self._rounds += 1
        if not self._is_idle():
            self._time.look_no_more(self)
            return 0.0
        if not is_alone():
            if not self._time.may_look(self):
                return _LOOK_AGAIN_SECONDS
            time.sleep(_LOOK_SECONDS)
            if not self._time.others_rest() or self._has_more_to_do():
                return 0.0
        self._rounds = self._idle_rounds = 0
        self._time.move_on()
        return 0.0

    def _is_idle(self) -> bool:
        if not hasattr(self._loop, "_ready"):
            return self._rounds >= _BLIND_ROUNDS
        self._idle_rounds = 0 if self._has_more_to_do() else self._idle_rounds + 1
        return self._idle_rounds >= _IDLE_ROUNDS or self._rounds >= _MOST_BUSY_ROUNDS

    def _has_more_to_do(self) -> bool:
        return self._rounds < _MOST_BUSY_ROUNDS and bool(getattr(self._loop, "_ready", None))


class _Lull:
    """What one thread knows of the others: whether they have come to rest."""

    __slots__ = ("_calm_looks", "_joined", "_others_cpu", "_since", "looked_at", "who")

    def __init__(self, who: object) -> None:
        self.who = who
        self._since = self.looked_at = time.monotonic()
        self._calm_looks = 0
        self._joined = -1
        self._others_cpu = 0.0

    def mark(self, joined: int) -> None:
        """A look begins, unless one has."""
        if self._joined < 0:
            self._joined, self._others_cpu = joined, _cpu_of_others()

    def has_come(self, joined: int, *, is_waking: bool) -> bool:
        """A look ends, and the next begins."""
        others_cpu, self.looked_at = _cpu_of_others(), time.monotonic()
        if joined != self._joined:
            # They do get on.
            self._since = self.looked_at
        is_busy = is_waking or joined != self._joined or others_cpu - self._others_cpu > _RESTING_CPU_SECONDS
        is_calm = not (is_busy or _some_thread_starts())
        self._calm_looks = self._calm_looks + 1 if is_calm else 0
        self._joined, self._others_cpu = joined, others_cpu
        return self._calm_looks >= _LOOKS or self.looked_at - self._since > _PATIENCE


def _cpu_of_others() -> float:
    return time.process_time() - time.thread_time()


def _some_thread_starts() -> bool:
    return any(thread.ident is None for thread in threading.enumerate())


def is_alone() -> bool:
    """Whether this process has no other thread."""
    return threading.active_count() == 1
