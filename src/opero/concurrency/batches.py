"""What a map and its pool say to each other: batches, and what is asked of a pool.

A pool answers by the methods of the `Scheduler` that tell what became of a batch: `done`, `lost`, `not_sent`, `fail`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opero.concurrency.ctrl_c import in_own_thread
from opero.core.clock import clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.running import Inbox
    from opero.concurrency.scheduler import Entry
    from opero.concurrency.worker import Work


@dataclass(slots=True, eq=False)
class Batch:
    """What is sent to a worker in one go.

    ``items`` are the varying first arguments, if it ``has_candidates`` each in a pair with its candidate;
    ``time_limit`` is the seconds one execution has, and the option that says so; ``grace`` is how many more its worker
    has until it is ended.
    ``alone``: nothing else may run in the worker's process meanwhile.
    ``look_at``, ``ends_at``: by `clock.real`, when its worker is looked at again, how many had ``begun`` then, and
    when the worker is ended; ``is_overdue``: that has been done.
    ``mark``: for workers of this process, see `worker.run_batch`; it counts the ``reported`` ones, too.
    """

    items: list[Any]
    start: int
    entries: list[Entry] | None = None
    has_candidates: bool = False
    time_limit: tuple[float, str] | None = None
    grace: float = 0.0
    alone: bool = False
    mark: list[int] = field(default_factory=[0].copy)
    reported: int = 0
    sent_at: float = 0.0
    look_at: float = math.inf
    begun: int = 0
    ends_at: float = math.inf
    is_overdue: bool = False

    def begins(self, seconds: float, option: str) -> None:
        """A worker gets it now, which may have taken long to start: that is no part of an attempt's time."""
        if option == "attempt_timeout":
            self.ends_at, self.is_overdue = clock.real() + seconds + self.grace, False

    def cut(self, place: int) -> tuple[list[Any], list[Entry] | None]:
        """Take the items from there on out of it, and their entries, if they have any."""
        items, entries = self.items[place:], None if self.entries is None else self.entries[place:]
        # A worker of this process may be iterating over the list.
        self.items = self.items[:place]
        self.entries = None if self.entries is None else self.entries[:place]
        return items, entries

    def drop(self, count: int) -> None:
        """Forget the first ones, which have been reported."""
        self.items, self.start, self.reported = self.items[count:], self.start + count, self.reported + count
        self.entries = None if self.entries is None else self.entries[count:]


class Pool:
    """Runs a function on the items of batches, and tells each outcome. Each kind of pool is one file.

    Attributes:
        is_far: Whether its workers are on a cluster: longer batches, of which some wait there for each of its slots.
        can_rest: Whether its workers can run one map after the other.
        can_kill: Whether a worker can be stopped while it runs a batch.
        isolates: Whether it lets a batch that is to be alone run so; otherwise no other is sent meanwhile.
        largest_batch: Items that may be sent in one go now.
        deliver: Lets the thread of the map call a function with its scheduler and these arguments.
    """

    is_far = can_rest = can_kill = False
    isolates = True
    largest_batch = 1
    deliver: Callable[..., None]

    @property
    def slots(self) -> int:
        """Batches that can run at the same time."""
        return 1

    @property
    def is_starting(self) -> bool:
        """Whether a batch waits for the first worker, and begins only if somebody listens when that is ready."""
        return False

    def start(self, inbox: Inbox, *, most_batches: int | None, is_paced: bool, patience: float | None) -> None:  # noqa: ARG002 - not all need them
        """Begin, or go on with the next map; events go to the ``inbox``.

        There will be at most so many batches. ``is_paced``: none is to be sent before a worker can begin it at once,
        and ``slots`` are those of workers that can. ``patience``: seconds that a call has in all.
        """
        self.deliver = inbox.put

    def prepare(self) -> None:
        """Start workers, if there are none that a batch could begin in."""

    def submit(self, batch: Batch) -> None:
        """Run a batch as soon as a worker is free."""
        raise NotImplementedError

    def begun(self, batch: Batch) -> int | None:  # noqa: ARG002 - as above
        """How many items of a batch have begun, see `worker.run_batch`; None if that cannot be known."""
        return None

    def kill(self, batch: Batch) -> bool:
        """End the worker that runs a batch, by force if it is asked again.

        Gives False if the worker has ended the batch and its report is arriving: it may be asked again soon.
        """
        raise NotImplementedError

    def rest(self) -> None:
        """The map has ended and nothing runs; listen to nobody until the next one starts."""

    def take_on(self, work: Work) -> None:
        """Be ready for another map of the same function, after a `rest`.

        Raises:
            NotTransferableError: If its arguments cannot be sent to the workers.
        """

    def stop(self, is_left: Callable[[], bool]) -> None:
        """End the workers; blocks until they have ended, unless it is called in one of them.

        What cannot be ended is waited for as long as ``is_left`` does not tell that nobody wants to any more.
        """

    async def stop_async(self) -> None:
        """End the workers without blocking the event loop."""
        await in_own_thread(self.stop)
