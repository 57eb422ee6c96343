"""What the system tells of threads and processes: whether a fork is safe, and who has to end with a worker."""

from __future__ import annotations

import contextlib
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

from opero.concurrency import fork_server
from opero.core.clock import clock
from opero.core.forks import fork_safe_threads

if TYPE_CHECKING:
    from collections.abc import Callable

# How long an ended process may tidy up, and how long others may take to say how it ended.
GRACE_SECONDS = 1.0
_SAYING_SECONDS = 0.05
# Between two looks at processes that have not ended.
_LOOKING_SECONDS = 0.005
# What a worker exits with that was asked to end, as a shell's command would.
ENDED_CODE = 128 + signal.SIGTERM

# Threads of jemalloc, which pyarrow brings (and pandas imports): it takes all their locks before a fork by itself.
_SAFE_THREADS = {"jemalloc_bg_thd"}

# Processes by their ids, with the times of their starts: an id may be another's later.
Family = dict[int, str]


def end(processes: list[Any], patience: float = 0.0, meanwhile: Callable[[], object] = lambda: None) -> None:
    """End processes that have not ended after so many seconds, and what they have started.

    They can raise `SystemExit`; those that have not ended a second later are killed. ``meanwhile`` is called again and
    again while they are waited for.
    """
    running = _wait_for(processes, patience, meanwhile)
    if not running:
        return
    family: Family = {}
    for order in ("terminate", "kill"):
        family |= family_of(*(process.pid for process in running))
        for process in running:
            getattr(process, order)()
        running = _wait_for(running, GRACE_SECONDS, meanwhile)
    end_family(family)


def _wait_for(processes: list[Any], seconds: float, meanwhile: Callable[[], object]) -> list[Any]:
    """Wait at most so long; gives those that still run.

    The end of a process is the end of its sentinel, a pipe, but a child of the program's own may have that open.
    """
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
    if os.name == "posix":
        try:
            os.kill(process.pid, 0)
        except OSError:
            # The system keeps no exit codes, or whoever was told of it may say so in a moment.
            process.join(_SAYING_SECONDS)
            return False
    return True


def family_of(*pids: int) -> Family:
    """The descendants of processes, where the system lists them."""
    children: dict[int, Family] = {}
    for path in Path("/proc").glob("[0-9]*") if pids else ():
        started, parent = _status(path.name)
        children.setdefault(parent, {})[int(path.name)] = started
    family: Family = {}
    coming = list(pids)
    while coming:
        found = children.get(coming.pop(), {})
        coming.extend(found)
        family |= found
    return family


def end_family(family: Family) -> None:
    """End those of them that are left, by force if they have not ended a second later."""
    if not family:  # always on Windows, which has no SIGKILL either
        return
    for order in (signal.SIGTERM, signal.SIGKILL):
        deadline = clock.real() + GRACE_SECONDS
        left = _left_of(family)
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, order)
        while left and clock.real() < deadline:
            time.sleep(0.001)
            left = _left_of(left)


def _left_of(family: Family) -> Family:
    return {pid: started for pid, started in family.items() if started and _status(str(pid))[0] == started}


def _status(pid: str) -> tuple[str, int]:
    """When a process has started, and its parent; the first is empty for one that has ended."""
    with contextlib.suppress(OSError):
        state, parent, *others = Path("/proc", pid, "stat").read_text(errors="replace").rpartition(")")[2].split()
        if state != "Z":
            return others[17], int(parent)
    return "", 0


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
    # The first one, the system's own, need not have been set: it is noted, too, when a program makes a lock of
    # multiprocessing. One that is not its own is of a worker of loky's.
    if method in multiprocessing.get_all_start_methods()[1:]:
        return method, True
    if sys.platform == "linux" and not has_other_threads():
        return "fork", False
    return "spawn" if sys.platform == "win32" else "forkserver", False


# Threads, also those that Python does not know (of OpenMP, rayon), which may hold a lock when this process forks


def has_other_threads() -> bool:
    """Whether there are any of Python's or of the system's; where it does not list them, only of Python's.

    Those of OpenBLAS, which NumPy brings, do not count: it ends them before each fork by itself, and makes them anew
    when it needs them. So a fork for nothing shows whether others are left.
    """
    if set(threading.enumerate()) - set(fork_safe_threads) - {threading.current_thread()}:
        return True
    if not _stay(0.005):
        return False
    _fork_for_nothing()
    return _stay(0.05)


def fork_server_has_threads() -> bool:
    """Whether the fork server of multiprocessing, if there is one, has begun threads with what it has imported.

    To be asked when it has just forked: OpenBLAS has ended its own for that.
    """
    pid = fork_server.known()["_forkserver_pid"]
    return pid is not None and _stay(0.05, pid)


def _stay(seconds: float, pid: int | None = None) -> bool:
    """Whether there are any for so long: those of Python that have just ended are listed for a moment."""
    deadline, tasks = clock.real() + seconds, Path(f"/proc/{pid or 'self'}/task")
    while True:
        count = 0
        for name in tasks.glob("*/comm"):
            # One that has just ended has none.
            with contextlib.suppress(OSError):
                count += name.read_text().strip() not in _SAFE_THREADS
        if count <= (1 if pid else threading.active_count()):
            return False
        if clock.real() >= deadline:
            return True
        time.sleep(0.001)


def _fork_for_nothing() -> None:
    """By C's own function: Python's hooks, and the warnings of programs in them, are for forks that somebody uses."""
    import ctypes

    fork, parent = ctypes.PyDLL(None).fork, os.getpid()
    try:
        child = fork()
    finally:
        # A signal of the parent's may raise even here.
        if os.getpid() != parent:
            os._exit(0)
    # The program may wait for all of its children by itself.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
