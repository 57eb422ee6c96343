"""What pools of workers that are not opero's have in common: what goes to a worker, and what is made of its answer."""

from __future__ import annotations

import warnings
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from opero.concurrency.batches import Batch, Done, Fatal, Lost, Pool, not_run
from opero.concurrency.far_worker import Found
from opero.concurrency.mapping import level_of_the_user
from opero.concurrency.transport import Packer, unpack_report
from opero.concurrency.worker import Report
from opero.core.clock import clock
from opero.core.signature import name_of
from opero.core.steps import stopped
from opero.exceptions import NotTransferableError, OperoError
from opero.utils.notes import IN_THE_WORKER, add_note, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opero.concurrency.running import Inbox
    from opero.concurrency.worker import Work

# A connection that is not made within so long is not made at all.
CONNECTING_SECONDS = 5.0
# What is told to end does so within milliseconds.
ENDING_SECONDS = 5.0
# Without a worker that has what the items need, a warning is given.
_WARNING_SECONDS = 30.0


class FarPool(Pool):
    """What the pools on clusters have in common, and largely that of an executor.

    Attributes:
        engine: What runs their workers.
    """

    is_far = can_rest = True
    largest_batch = 10_000
    engine = ""
    _packer = Packer()

    def __init__(self, work: Work, workers: int | None) -> None:
        self._name = name_of(work.function)
        self._most = workers
        self._is_paced = self._has_warned = False
        self._patience: float | None = None
        # Since when no worker has what the items need.
        self._roomless_since: float | None = None
        self.take_on(work)
        self.rest()

    def take_on(self, work: Work) -> None:
        self._packed = self._packer.start((work, None, (), None))
        # By which workers know it.
        self._digest = blake2b(self._packed, digest_size=16).digest()

    def start(
        self, inbox: Inbox, *, is_paced: bool = False, patience: float | None = None, **_about_the_map: Any
    ) -> None:
        self.deliver = inbox.put
        self._is_paced, self._patience = is_paced, patience

    def rest(self) -> None:
        """What is told of the cluster is of no interest."""
        self.deliver = lambda _event: None

    def later(self, handle: Callable[..., list[Any]], *about: Any, **more: Any) -> None:
        """Let the thread of the map call ``handle``, which gives events for its scheduler."""
        self.deliver(partial(handle, *about, **more))

    def receive(self, event: Any) -> Any:
        """Make a scheduler's event of what was delivered; None if it is of no interest."""
        if not isinstance(event, partial):
            return event
        first, *others = event() or [None]
        for other in others:
            self.deliver(other)
        return first

    # Batches

    def pack(self, batch: Batch) -> bytes | None:
        """Pickle a batch; None if one of its items cannot be, which the map is told."""
        try:
            return self._packer.batch(batch)
        except NotTransferableError as error:
            self.deliver(not_run(batch, error))
            return None

    def opened(self, batch: Batch, answer: Found) -> list[Any]:
        """Events of what a worker has answered."""
        if answer.reason:
            return self.recovered({batch: answer}, answer.reason)
        *parts, last = _parts(batch, answer.reports)
        if last.report.errors and not last.report.values:
            return [not_run(batch, last.report.errors[0])]
        last.is_part, last.size = False, max(answer.size, len(answer.reports[-1]))
        return [*parts, last]

    def recovered(self, left: Mapping[Batch, Found | None], reason: str, *, is_innocent: bool = False) -> list[Any]:
        """Events of what a worker that is gone has left of its batches; of nothing, it has not begun, or is lost.

        The item that was running is charged, if it was the only one, and its worker has not left as it should. One that
        was stuck has ended its worker, and explains all others.
        """
        is_innocent = is_innocent or any(found and found.stuck for found in left.values())
        events: list[Any] = []
        running: dict[Batch, int] = {}
        for batch, its in left.items():
            found = its or Found(0, [])
            parts = _parts(batch, found.reports)
            events += parts
            done = sum(len(part.report.values) for part in parts)
            if found.stuck and batch.time_limit is not None:
                error = stopped(self._name, *batch.time_limit)
                add_note(error, f"{IN_THE_WORKER}{found.stuck}")
                events.append(Done(batch, Report([None], {0: error}, batch.time_limit[0])))
            elif found.begun > done and not is_innocent:
                running[batch] = found.begun
            else:
                events.append(Lost([batch], reason, innocent=[batch]))
        if len(running) == 1:
            ((batch, begun),) = running.items()
            return [*events, Lost([batch], reason, begun=begun)]
        return [*events, *(Lost([batch], reason, sure=False) for batch in running)]

    def refused(self, error: BaseException | str) -> list[Any]:
        """The end of a map whose batches cannot be run; no error of the function's, which are in the reports."""
        msg = (
            f"{self.engine} cannot run {self._name}: {error if isinstance(error, str) else describe(error)}; "
            f"the whole cluster needs opero, and its workers what {self._name} imports"
        )
        return [Fatal(OperoError(msg))]

    # The cluster

    def see_room(self, has_room: object, needs: Mapping[str, float]) -> list[Any]:
        """Take note of whether any worker has what the items need, as far as is known now.

        Gives the end of the map, if its calls have waited for one as long as they may.
        """
        if has_room:
            self._roomless_since = None
            return []
        self._roomless_since = self._roomless_since or clock.real()
        waited = clock.real() - self._roomless_since
        needed = ", ".join(f"{name}={need:g}" for name, need in needs.items())
        lacking = f"{self.engine} has no worker for {self._name}, which needs {needed or 'a thread'}"
        if self._patience is not None and waited > self._patience:
            return [Fatal(OperoError(f"{lacking}, for {self._patience:g} s"))]
        if waited > _WARNING_SECONDS and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"{lacking}; the map waits for one", RuntimeWarning, stacklevel=level_of_the_user())
        return []


def _parts(batch: Batch, reports: list[bytes]) -> list[Done]:
    return [Done(batch, unpack_report(data), is_part=True) for data in reports]
