"""What a map and its pools agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from multiprocessing.connection import Connection

    from opero.concurrency.pool_source import PoolSource
    from opero.concurrency.scheduler import Batch
    from opero.concurrency.worker import Work


class Inbox(Protocol):
    """Where a running map finds events."""

    def put(self, event: Any) -> None:
        """Leave an event there, from any thread."""
        ...

    def listen(self, pipe: Connection, heard: Callable[[], None]) -> None:
        """Call ``heard`` as long as there is something to read in ``pipe``, while the map waits."""
        ...

    def write_when_ready(self, pipe: Connection, write: Callable[[], None] | None) -> bool:
        """Call ``write`` as long as ``pipe``, which is listened to, takes more; None: no longer.

        Gives False where nobody can be told: then there is only to wait.
        """
        ...

    def forget(self, pipe: Connection) -> None:
        """Listen to it no longer, nor wait for it; it is still open."""
        ...


class Pool(Protocol):
    """Runs a function on the items of batches, and tells each outcome."""

    queues_batches: bool

    @property
    def largest_batch(self) -> int:
        """Items that may be sent in one go now; 0 to wait until an event comes."""
        ...

    @property
    def kill(self) -> Callable[[Batch], bool] | None:
        """Stops the worker that runs a batch; None where a worker cannot be stopped.

        Gives False if the worker has ended the batch and its report is arriving: it may be asked again soon.
        """
        ...

    @property
    def slots(self) -> int:
        """Batches that can run at the same time."""
        ...

    def start(self, inbox: Inbox) -> None:
        """Begin; events go to the ``inbox``."""
        ...

    def submit(self, batch: Batch) -> None:
        """Run a batch as soon as a worker is free."""
        ...

    def receive(self, event: Any) -> Any:
        """Make a scheduler's event of what was delivered; None if it is of no interest."""
        ...

    def runs_here(self) -> bool:
        """Whether the pool waits for this thread when it is stopped."""
        ...

    def stop(self) -> None:
        """End the workers; blocks until they have ended."""
        ...

    async def stop_async(self) -> None:
        """End the workers without blocking the event loop."""
        ...


@runtime_checkable
class KeepablePool(Pool, Protocol):
    """A pool whose workers can run one map after the other."""

    def give_up(self) -> Collection[Batch]:
        """End what runs as soon as it can be ended, and tell which batches will not be reported any more."""
        ...

    def take_on(self, work: Work) -> None:
        """Be ready for another map of the same function; nothing runs.

        Raises:
            NotTransferableError: If its arguments cannot be sent to the workers.
        """
        ...


@dataclass(frozen=True)
class MapSettings:
    """How a map runs; the options of `opero.opmap` that are no policies."""

    pools: PoolSource
    ordered: bool = True
    progress: bool | str = True
    return_exceptions: bool = True
    # Whether items that failed are worth a warning, because nobody said what shall become of them.
    warns: bool = False
    # Number of items where it cannot be seen.
    total: int | None = None


# The arguments before the item, those after it, those by keyword, and whether items are tuples of arguments.
Arguments = tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any], bool]
