"""What the system is asked about threads and processes: whether a fork is safe, who ends with a worker, and Ctrl-C."""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import wait
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opero.concurrency.progress import is_terminal
from opero.core.clock import clock
from opero.core.forks import fork_safe_threads
from opero.core.interrupts import Hold

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# How long an ended process may tidy up, and how long others may take to say how it ended.
GRACE_SECONDS = 1.0
_SAYING_SECONDS = 0.05
# Between two looks at processes that have not ended.
_LOOKING_SECONDS = 0.005
# What a worker exits with that was asked to end, as a shell's command would.
ENDED_CODE = 128 + signal.SIGTERM

# So often in vain, and somebody asks what the program waits for.
_MANY_LOOKS = 10

# Threads of jemalloc, which pyarrow brings (and pandas imports): it takes all their locks before a fork by itself.
_SAFE_THREADS = {"jemalloc_bg_thd"}
# The one that a queue of multiprocessing has once something was put there, which makes its locks anew in a child.
_FEEDER = "QueueFeederThread"


def end(processes: list[Any], patience: float = 0.0, meanwhile: Callable[[], object] = lambda: None) -> None:
    """End processes that have not ended after so many seconds, and what they have started.

    They can raise `SystemExit`; those that have not ended a second later are killed. ``meanwhile`` is called again and
    again while they are waited for.
    """
    running = _wait_for(processes, patience, meanwhile)
    if not running:
        return
    family: set[int] = set()
    for order in ("terminate", "kill"):
        for process in running:
            family |= family_of(process.pid)
            getattr(process, order)()
        running = _wait_for(running, GRACE_SECONDS, meanwhile)
    end_family(family)


def _wait_for(processes: list[Any], seconds: float, meanwhile: Callable[[], object]) -> list[Any]:
    """Wait at most so long; gives those that still run."""
    deadline = clock.real() + seconds
    while True:
        processes = list(filter(_runs, processes))
        if not processes or clock.real() >= deadline:
            return processes
        meanwhile()
        wait(map(attrgetter("sentinel"), processes), _LOOKING_SECONDS)


def _runs(process: Any) -> bool:
    # A thread of a program that ends may just be starting it.
    if process.pid is None or process.exitcode is not None:
        return False
    if wait([process.sentinel], 0):
        # Its exit code comes in a moment, or has been told to somebody else.
        process.join(_SAYING_SECONDS)
        return False
    return True


def family_of(pid: int) -> set[int]:
    """The descendants of a process, where the system lists them."""
    family: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        # It may just have ended.
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                family |= {child} | family_of(child)
    return family


def end_family(family: set[int]) -> None:
    """End those of them that are left, by force if they have not ended a second later."""
    for order in (signal.SIGTERM, signal.SIGKILL) if family else ():  # never on Windows, which has no SIGKILL
        deadline = clock.real() + GRACE_SECONDS
        for pid in filter(_is_left, family):
            with contextlib.suppress(OSError):
                os.kill(pid, order)
        while any(map(_is_left, family)) and clock.real() < deadline:
            time.sleep(0.001)


def _is_left(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    return False


def how_it_ended(process: Any) -> str:
    """What a sentence about a crash says."""
    code = -signal.SIGTERM if process.exitcode == ENDED_CODE else process.exitcode
    if code is None:
        return "its exit code is not known"
    if code >= 0:
        return f"exit code {code}"
    names = {each.value: each.name for each in signal.Signals}
    return f"killed by signal {-code} ({names.get(-code, 'a real-time one')})"


# Whether a fork is safe


def start_method() -> tuple[str, bool]:
    """What the program has set by `multiprocessing.set_start_method`, and whether it has set anything.

    Else ``fork`` where it is safe, that is with no other thread that could hold a lock; else a fresh process.
    """
    method = multiprocessing.get_start_method(allow_none=True)
    # The first of all, the system's own, need not have been set: it is noted, too, when a program makes a lock of
    # multiprocessing, and ``fork``, which Linux had before Python 3.14, is no wish then. Others are of loky's workers.
    is_a_wish = method != "fork" or multiprocessing.get_all_start_methods()[0] != "fork"
    if method in {"fork", "spawn", "forkserver"} and is_a_wish:
        return method, True
    if sys.platform == "linux" and not has_other_threads():
        return "fork", False
    return "spawn" if sys.platform == "win32" else "forkserver", False


def has_other_threads() -> bool:
    """Whether there are any of Python's, or of the system's (of OpenMP, rayon), which may hold a lock in a fork.

    Those of OpenBLAS, which NumPy brings, do not count: it ends them before each fork by itself, and makes them anew
    when it needs them. So a fork for nothing shows whether others are left. By C's own function: Python's hooks, and
    the warnings of programs in them, are for forks that somebody uses.
    """
    for thread in set(threading.enumerate()) - set(fork_safe_threads) - {threading.current_thread()}:
        if thread.name != _FEEDER:
            return True
    if not _are_there_for(0.005):
        return False
    import ctypes

    child = ctypes.PyDLL(None).fork()
    if child == 0:
        os._exit(0)
    # The program may wait for all of its children by itself.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
    return _are_there_for(0.05)


def _are_there_for(seconds: float) -> bool:
    """Whether there are threads that Python does not know for so long: its own that have just ended take a moment."""
    deadline = clock.real() + seconds
    while True:
        count = 0
        for name in Path("/proc/self/task").glob("*/comm"):
            # One that has just ended has none.
            with contextlib.suppress(OSError):
                count += name.read_text().strip() not in _SAFE_THREADS
        if count <= threading.active_count():
            return False
        if clock.real() >= deadline:
            return True
        time.sleep(0.001)


# Ctrl-C in processes that a map starts, and waits that have to come to their end in spite of it


@contextlib.contextmanager
def held_back_in_children(start_method: str, *signals: signal.Signals) -> Iterator[None]:
    """Let processes that are started in the block begin with Ctrl-C, and these, held back, until they ask for it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if start_method != "fork" or "multiprocessing.shared_memory" in sys.modules:
        # Whoever starts it lets Ctrl-C through again: not while a worker starts, or the server of the workers. One of a
        # forked worker would end with that, and delete the shared memory that the program has from it.
        importlib.import_module("multiprocessing.resource_tracker").ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *signals})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def wait_unless_left(has_ended: Callable[[float], bool], is_left: Callable[[], bool]) -> bool:
    """Wait until something has ended, or nobody wants to wait for it any more; tells whether it has ended.

    ``has_ended`` waits for so many seconds. A terminal is told after a while what is waited for, and how not to.
    """
    looks = 0
    while not has_ended(0.05):
        if is_left():
            return False
        looks += 1
        if looks == _MANY_LOOKS and is_terminal(sys.stderr):
            sys.stderr.write("opero: waiting for running items to end; Ctrl-C, pressed now, leaves them\n")
    return True


async def in_own_thread(stop: Callable[[Callable[[], bool]], None]) -> None:
    """Run ``stop`` in a thread that ends with it; not interrupted by cancellation, which is passed on afterwards.

    ``stop`` is given what tells whether the task was cancelled again meanwhile, as by Ctrl-C pressed twice.
    """
    import asyncio
    from concurrent.futures import Future

    over: Future[None] = Future()
    is_left = False

    def run() -> None:
        try:
            stop(lambda: is_left)
            over.set_result(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the awaiting task
            over.set_exception(error)

    # Not of an executor: these take nothing any more once the main thread has ended, while others still run maps.
    ended = asyncio.wrap_future(over)
    thread = threading.Thread(target=run, name="opero-stop", daemon=True)
    with Hold():
        thread.start()
    interrupted: BaseException | None = None
    while not ended.done():
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError as error:
            interrupted = interrupted or error
            task, anyio = asyncio.current_task(), sys.modules.get("anyio")
            # A scope of anyio's cancels again and again until it is left, and means once.
            is_once = anyio is not None and anyio.current_effective_deadline() == -math.inf
            is_left = task is not None and task.cancelling() > 1 and not is_once
    thread.join()
    if interrupted is not None:
        raise interrupted
    ended.result()
