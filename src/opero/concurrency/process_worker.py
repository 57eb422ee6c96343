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
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opero.concurrency.transport import pack_report, pack_singly, unpack_batch, unpack_work
from opero.concurrency.worker import AsyncCaller, Report, Work, in_time, run_batch
from opero.core.forks import watch_forks
from opero.utils.notes import describe

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from opero.concurrency.preparation import AnyPreparation

# Messages: a kind, the number of the batch, the oldest batch that the parent waits for, a payload.
HELLO, BROKEN, BATCH, BEGUN, REPORT, AGAIN, SINGLES, STOP, ARGUMENTS = range(9)
_HEADER = struct.Struct("<BII")
# A worker that has nothing to do may take so long to end: the interpreter tidies up, and the user's threads and exit
# handlers run.
PEACE_SECONDS = 30.0


def pack_message(kind: int, number: int, payload: bytes = b"", *, oldest: int = 0) -> bytes:
    return _HEADER.pack(kind, number, oldest) + payload


def unpack_message(data: bytes) -> tuple[int, int, int, bytes]:
    kind, number, oldest = _HEADER.unpack_from(data)
    return kind, number, oldest, data[_HEADER.size :]


class _PipeOfWorker:
    """The worker's end of its pipe."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        watch_forks(self)

    def after_fork(self) -> None:
        """Leave it to the worker: as long as a child of its has it open, too, a dead worker is not noticed."""
        self.connection.close()


def serve(connection: Connection, work: Work | bytes, preparation: AnyPreparation | None) -> None:
    """Run batches, one after the other, until the pipe ends; the whole life of a worker."""
    pipe = _PipeOfWorker(connection)
    ready = _get_ready(pipe, work, preparation)
    if ready is not None:
        caller = AsyncCaller() if ready.is_async else None
        # Without a parent there is nobody to report to.
        with contextlib.suppress(EOFError, OSError):
            _serve_batches(pipe.connection, ready, caller)
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
        server = library.forkserver._forkserver  # noqa: SLF001 - there is no function for it
        inherited = server._inherited_fds  # noqa: SLF001 - what the initializer's arguments may need
        server.__init__()
        server._inherited_fds = inherited  # noqa: SLF001 - as above


async def serve_async(connection: Connection, work: Work | bytes, preparation: AnyPreparation | None) -> None:
    """Run batches, as many as come at the same time, until the pipe ends; the whole life of a worker."""
    pipe = _PipeOfWorker(connection)
    ready = _get_ready(pipe, work, preparation)
    if ready is not None:
        with contextlib.suppress(EOFError, OSError):
            await _AsyncServer(pipe.connection, ready).serve()
        _end_within(PEACE_SECONDS)


def _get_ready(pipe: _PipeOfWorker, work: Work | bytes, preparation: AnyPreparation | None) -> Work | None:
    """Load the work and say hello; None if the parent has been told that this cannot be done."""
    # Ctrl-C goes to the whole process group; the caller's process alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A forked worker has the one of its parent's event loop, which would take this one's signals for its own.
    signal.set_wakeup_fd(-1)
    _become_independent()
    if hasattr(signal, "pthread_sigmask"):
        # Held back by the parent until here, where it can do no harm any more.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        loaded = unpack_work(work) if isinstance(work, bytes) else work
        if preparation is not None:
            preparation.run()
    except Exception as error:  # noqa: BLE001 - the parent raises it
        pipe.connection.send_bytes(pack_message(BROKEN, 0, describe(error).encode(errors="backslashreplace")))
        return None
    with contextlib.suppress(OSError):
        pipe.connection.send_bytes(pack_message(HELLO, 0))
    return loaded


class _Reports:
    """What a worker has reported, for a parent that has to ask again, until that has understood it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._sent: dict[int, Report] = {}

    def begin(self, number: int) -> None:
        """A batch has been read. Who dies before that was not ended by it."""
        self._pipe.send_bytes(pack_message(BEGUN, number))

    def send(self, number: int, report: Report) -> None:
        self._sent[number] = report
        self._pipe.send_bytes(pack_message(REPORT, number, pack_report(report)))

    def send_singly(self, number: int) -> None:
        self._pipe.send_bytes(pack_message(SINGLES, number, pack_singly(self._sent[number])))

    def forget_before(self, oldest: int) -> None:
        for number in [number for number in self._sent if number < oldest]:
            del self._sent[number]


def _serve_batches(pipe: Connection, work: Work, caller: AsyncCaller | None) -> None:
    reports = _Reports(pipe)
    while True:
        kind, number, oldest, payload = unpack_message(pipe.recv_bytes())
        reports.forget_before(oldest)
        if kind == STOP:
            return
        if kind == AGAIN:
            reports.send_singly(number)
            continue
        if kind == ARGUMENTS:
            changed = _with_arguments(work, payload)
            if changed is None:
                return
            work = changed
            continue
        reports.begin(number)
        arrived = unpack_batch(payload)
        if isinstance(arrived, Report):
            reports.send(number, arrived)
            continue
        reports.send(number, run_batch(work, *arrived, caller))


def _with_arguments(work: Work, payload: bytes) -> Work | None:
    """The work of the next map; None if its arguments cannot be unpickled.

    This worker ends then, and the one that replaces it has them from the start if it is forked, or says what is wrong.
    """
    try:
        return replace(work, shape=pickle.loads(payload))  # noqa: S301 - from the parent process
    except Exception:  # noqa: BLE001 - see above
        return None


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
            kind, number, oldest, payload = unpack_message(data)
            self._reports.forget_before(oldest)
            if kind == AGAIN:
                self._reports.send_singly(number)
            elif kind == ARGUMENTS:
                changed = _with_arguments(self._work, payload)
                if changed is None:
                    return
                self._work = changed
            else:
                self._reports.begin(number)
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
        try:
            self._reports.send(number, await self._report_on(payload))
        except BaseException as error:  # noqa: BLE001 - as in a worker that runs plain functions, it ends the worker
            self._end = error
            self._messages.put_nowait(None)

    async def _report_on(self, payload: bytes) -> Report:
        arrived = unpack_batch(payload)
        if isinstance(arrived, Report):
            return arrived
        (item,), candidate, limit = arrived
        started = time.perf_counter()
        value, errors = None, {}
        try:
            value = await in_time(self._work.caller(candidate), item, limit, self._work)
        except Exception as error:  # noqa: BLE001 - the policies of the calling process decide about it
            errors[0] = error
        return Report([value], errors, time.perf_counter() - started)
