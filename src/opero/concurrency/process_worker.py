"""The life of a worker process."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import struct
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opero.concurrency.transport import pack_report, pack_singly, unpack_batch, unpack_work
from opero.concurrency.worker import AsyncCaller, Report, Work, in_time, run_batch
from opero.core.forks import watch_forks
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

# Messages: a kind, a number (of the batch; of the process in HELLO), a payload.
HELLO, BROKEN, BATCH, REPORT, AGAIN, SINGLES, STOP, ARGUMENTS = range(8)
_HEADER = struct.Struct("<BI")
# Reports that the parent may still ask for again: it never has more batches than this with one worker.
_KEPT_REPORTS = 64
_UNWANTED_SECONDS = 1.0
# A worker that has nothing to do may take so long to end: the interpreter tidies up, and the user's threads and exit
# handlers run.
PEACE_SECONDS = 30.0


def pack_message(kind: int, number: int, payload: bytes = b"") -> bytes:
    return _HEADER.pack(kind, number) + payload


def unpack_message(data: bytes) -> tuple[int, int, bytes]:
    kind, number = _HEADER.unpack_from(data)
    return kind, number, data[_HEADER.size :]


class Door:
    """The worker's end of a pipe, as an argument of its process.

    When a worker ends, its pool starts another one with the same arguments before opero can end the pool; the pipe is
    closed by then, and such a worker finds no door, waits a while to be ended with its pool, and leaves.
    """

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def __reduce__(self) -> Any:
        return Door, (None if self.locked else self.connection,)

    @property
    def locked(self) -> bool:
        return self.connection is None or self.connection.closed

    def after_fork(self) -> None:
        """Leave it to the worker: as long as a child of its has it open, too, a dead worker is not noticed."""
        self.connection.close()


def serve(
    door: Door, work: Work | bytes, initializer: Callable[..., Any] | None = None, initargs: tuple[Any, ...] = ()
) -> None:
    """Run batches, one after the other, until the pipe ends; the whole life of a worker."""
    ready = _get_ready(door, work, initializer, initargs)
    if ready is not None:
        caller = AsyncCaller() if ready.is_async else None
        # Without a parent there is nobody to report to.
        with contextlib.suppress(EOFError, OSError):
            _serve_batches(door.connection, ready, caller)
        _end_within(PEACE_SECONDS)
        if caller is not None:
            caller.close()
    # Not back to its pool's own loop: that waits with a lock held; whoever is killed then makes the pool's end hang.
    sys.exit(0)


def _end_within(seconds: float) -> None:
    """Wait no longer for threads that do not end; all reports have been sent."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()


def _become_independent() -> None:
    """Let this worker have workers of its own, for maps inside maps."""
    import multiprocessing.forkserver

    import multiprocess.forkserver

    for library in (multiprocessing, multiprocess):
        if library.process.current_process().daemon:
            library.process.current_process().daemon = False
        # A fork server that a forked worker inherited can be waited for only by the parent.
        library.forkserver._forkserver.__init__()  # noqa: SLF001 - there is no function for it


async def serve_async(
    door: Door, work: Work | bytes, initializer: Callable[..., Any] | None = None, initargs: tuple[Any, ...] = ()
) -> None:
    """Run batches, as many as come at the same time, until the pipe ends; the whole life of a worker."""
    ready = _get_ready(door, work, initializer, initargs)
    if ready is not None:
        with contextlib.suppress(EOFError, OSError):
            await _AsyncServer(door.connection, ready).serve()
        _end_within(PEACE_SECONDS)


def _get_ready(
    door: Door, work: Work | bytes, initializer: Callable[..., Any] | None, initargs: tuple[Any, ...]
) -> Work | None:
    """Load the work and say hello; None if the parent has been told that this cannot be done."""
    # Ctrl-C goes to the whole process group; the caller's process alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if door.locked:
        # Not at once: its pool would start the next one, and so on, as fast as it can.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_UNWANTED_SECONDS)
        os._exit(0)
    _become_independent()
    watch_forks(door)
    if hasattr(signal, "pthread_sigmask"):
        # Held back by the parent until here, where it can do no harm any more.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        loaded = unpack_work(work) if isinstance(work, bytes) else work
        if initializer is not None:
            initializer(*initargs)
    except Exception as error:  # noqa: BLE001 - the parent raises it
        door.connection.send_bytes(pack_message(BROKEN, 0, f"{type(error).__name__}: {error}".encode()))
        return None
    with contextlib.suppress(OSError):
        door.connection.send_bytes(pack_message(HELLO, os.getpid()))
    return loaded


class _Reports:
    """What a worker has reported lately, for a parent that has to ask again."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._latest: OrderedDict[int, Report] = OrderedDict()

    def send(self, number: int, report: Report) -> None:
        self._latest[number] = report
        if len(self._latest) > _KEPT_REPORTS:
            self._latest.popitem(last=False)
        self._pipe.send_bytes(pack_message(REPORT, number, pack_report(report)))

    def send_singly(self, number: int) -> None:
        self._pipe.send_bytes(pack_message(SINGLES, number, pack_singly(self._latest[number])))


def _serve_batches(pipe: Connection, work: Work, caller: AsyncCaller | None) -> None:
    reports = _Reports(pipe)
    while True:
        kind, number, payload = unpack_message(pipe.recv_bytes())
        if kind == STOP:
            return
        if kind == AGAIN:
            reports.send_singly(number)
            continue
        if kind == ARGUMENTS:
            work = _with_arguments(work, payload, pipe)
            continue
        arrived = unpack_batch(payload)
        if isinstance(arrived, Report):
            reports.send(number, arrived)
            continue
        reports.send(number, run_batch(work, *arrived, caller))


def _with_arguments(work: Work, payload: bytes, pipe: Connection) -> Work:
    """The work of the next map; the parent is told, and ends this worker, if the arguments cannot be unpickled."""
    try:
        return replace(work, shape=pickle.loads(payload))  # noqa: S301 - from the parent process
    except Exception as error:  # noqa: BLE001 - the parent raises it
        pipe.send_bytes(pack_message(BROKEN, 0, describe(error).encode()))
        return work


class _AsyncServer:
    """Runs every batch in a task of its own."""

    def __init__(self, pipe: Connection, work: Work) -> None:
        self._pipe = pipe
        self._work = work
        self._reports = _Reports(pipe)
        self._tasks: set[Any] = set()
        self._end: BaseException | None = None

    async def serve(self) -> None:
        import asyncio

        self._messages = messages = asyncio.Queue[bytes | None]()
        loop = asyncio.get_running_loop()
        reader = threading.Thread(target=self._read, args=(loop, messages), daemon=True)
        reader.start()
        while (data := await messages.get()) is not None:
            kind, number, payload = unpack_message(data)
            if kind == AGAIN:
                self._reports.send_singly(number)
            elif kind == ARGUMENTS:
                self._work = _with_arguments(self._work, payload, self._pipe)
            else:
                task = loop.create_task(self._run(number, payload))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        if self._end is not None:
            raise self._end

    def _read(self, loop: Any, messages: Any) -> None:
        data: bytes | None = b""
        while data is not None:
            try:
                data = self._pipe.recv_bytes()
                if unpack_message(data)[0] == STOP:
                    data = None
            except (EOFError, OSError):
                data = None
            loop.call_soon_threadsafe(messages.put_nowait, data)

    async def _run(self, number: int, payload: bytes) -> None:
        arrived = unpack_batch(payload)
        if isinstance(arrived, Report):
            self._reports.send(number, arrived)
            return
        (item,), candidate, limit = arrived
        started = time.perf_counter()
        value, errors = None, {}
        try:
            value = await in_time(self._work.caller(candidate), item, limit, self._work)
        except Exception as error:  # noqa: BLE001 - the policies of the calling process decide about it
            errors[0] = error
        except BaseException as error:  # noqa: BLE001 - as in a worker that runs plain functions, it ends the worker
            self._end = error
            self._messages.put_nowait(None)
            return
        self._reports.send(number, Report([value], errors, time.perf_counter() - started))
