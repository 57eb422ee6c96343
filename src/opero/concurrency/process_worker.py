"""The life of a worker process."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import struct
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from opero.concurrency.transport import pack_report, pack_singly, unpack_work
from opero.concurrency.worker import AsyncCaller, Report, Work, run_items
from opero.core.signature import MISSING
from opero.exceptions import NotTransferableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

# Messages: a kind, a number (of the batch; of the process in HELLO), a payload.
HELLO, BROKEN, BATCH, REPORT, AGAIN, SINGLES, STOP = range(7)
_HEADER = struct.Struct("<BI")
# Reports that the parent may still ask for again: it never has more batches than this with one worker.
_KEPT_REPORTS = 4


def pack_message(kind: int, number: int, payload: bytes = b"") -> bytes:
    return _HEADER.pack(kind, number) + payload


def unpack_message(data: bytes) -> tuple[int, int, bytes]:
    kind, number = _HEADER.unpack_from(data)
    return kind, number, data[_HEADER.size :]


class Door:
    """The worker's end of a pipe, as an argument of its process.

    When a worker dies, its pool starts another one with the same arguments before opero can end the pool; the pipe is
    closed by then, and such a worker finds no door and leaves.
    """

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def __getstate__(self) -> Any:
        return None if self.connection.closed else self.connection

    def __setstate__(self, state: Any) -> None:
        self.connection = state

    @property
    def locked(self) -> bool:
        return self.connection is None or self.connection.closed


def serve(
    door: Door, work: Work | bytes, initializer: Callable[..., Any] | None = None, initargs: tuple[Any, ...] = ()
) -> None:
    """Run batches until the pipe ends; the whole life of a worker."""
    import multiprocess

    if door.locked:
        os._exit(0)
    # Ctrl-C goes to the whole process group; the caller's process alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocess.current_process().daemon = False  # a worker may have workers of its own
    pipe = door.connection
    try:
        work = unpack_work(work) if isinstance(work, bytes) else work
        if initializer is not None:
            initializer(*initargs)
        caller = AsyncCaller(work) if work.is_async else None
    except Exception as error:  # noqa: BLE001 - the parent raises it
        pipe.send_bytes(pack_message(BROKEN, 0, f"{type(error).__name__}: {error}".encode()))
        return
    # Without a parent there is nobody to report to.
    with contextlib.suppress(EOFError, OSError):
        pipe.send_bytes(pack_message(HELLO, os.getpid()))
        _serve_batches(pipe, work, caller)
    if caller is not None:
        caller.close()


def _serve_batches(pipe: Connection, work: Work, caller: AsyncCaller | None) -> None:
    reports: OrderedDict[int, Report] = OrderedDict()
    while True:
        kind, number, payload = unpack_message(pipe.recv_bytes())
        if kind == STOP:
            return
        if kind == AGAIN:
            pipe.send_bytes(pack_message(SINGLES, number, pack_singly(reports[number])))
            continue
        reports[number] = report = _run(payload, work, caller)
        if len(reports) > _KEPT_REPORTS:
            reports.popitem(last=False)
        pipe.send_bytes(pack_message(REPORT, number, pack_report(report)))


def _run(payload: bytes, work: Work, caller: AsyncCaller | None) -> Report:
    try:
        items, has_candidate, candidate, limit = pickle.loads(payload)  # noqa: S301 - from the parent process
    except Exception as error:  # noqa: BLE001 - anything may happen in a user's __setstate__
        return Report([], {0: NotTransferableError(f"the item cannot be unpickled: {error}")}, 0.0)
    given = candidate if has_candidate else MISSING
    return run_items(work, items, given) if caller is None else caller.run(items, given, limit)
