"""What a map may not leave behind, and a killer of its workers: what several test files need."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

# Threads that serve all caches of a program, and end by themselves or with it.
CACHE_THREADS = ("opero-cache", "opero-leases")
HELPERS = ("forkserver import main", "resource_tracker")


def descendants(ancestor: int | None = None) -> dict[int, str]:
    """Living processes below one (this one), but for the two helpers of multiprocessing that serve until its end."""
    ancestor = os.getpid() if ancestor is None else ancestor
    processes = _processes()
    below: dict[int, list[int]] = {}
    for pid, (_, parent) in processes.items():
        below.setdefault(parent, []).append(pid)
    found: dict[int, str] = {}
    generation = below.get(ancestor, [])
    while generation:
        found.update({pid: _command(pid, processes[pid][0]) for pid in generation})
        generation = [child for pid in generation for child in below.get(pid, [])]
    own = set(below.get(ancestor, []))
    helpers = {pid for pid in own if any(helper in found[pid] for helper in HELPERS)}
    # A worker of the fork server is the server's child, which needs a moment to notice its end.
    return {
        pid: command
        for pid, command in found.items()
        if pid not in helpers and not (pid not in own and command.startswith("Z "))
    }


def children() -> dict[int, str]:
    """Processes that this one started and that it has not reaped, but for the helpers of multiprocessing."""
    own = [pid for pid, (_, parent) in _processes().items() if parent == os.getpid()]
    commands = {pid: _command(pid) for pid in own}
    return {pid: command for pid, command in commands.items() if not any(helper in command for helper in HELPERS)}


def marked(mark: str) -> list[int]:
    """Processes with the mark in their environment; those that have ended but were not reaped have none."""
    return [pid for pid in _pids() if mark.encode() in _told_of(pid, "environ")]


def _processes() -> dict[int, tuple[str, int]]:
    """Of each process its state and its parent."""
    stats = {pid: _told_of(pid, "stat").rpartition(b")")[2].split(None, 2) for pid in _pids()}
    return {pid: (stat[0].decode(), int(stat[1])) for pid, stat in stats.items() if stat}


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _command(pid: int, state: str = "") -> str:
    command = _told_of(pid, "cmdline").replace(b"\0", b" ").decode()
    # Whether a living one runs or sleeps changes by itself; one without a command has just ended.
    return f"Z {command}" if state == "Z" or not command else command


def _told_of(pid: int, what: str) -> bytes:
    """What the system tells of a process, or nothing, if it has just ended.

    Without Python's files and paths, which take four times as long: hundreds of tests look twice at all processes.
    """
    try:
        file = os.open(f"/proc/{pid}/{what}", os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(file, 1 << 17)
    except OSError:
        return b""
    finally:
        os.close(file)


def surroundings() -> tuple[dict[int, str], list[str]]:
    """What a map may not leave behind: processes and threads."""
    return descendants(), threads()


def threads() -> list[str]:
    """The names of the threads that a map may not leave behind."""
    return sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith(CACHE_THREADS))


@contextlib.contextmanager
def storm(spared: Collection[int] | None = None, pause: float = 0.1) -> Iterator[list[int]]:
    """Kill a random process below this one, again and again; afterwards the list says which.

    The ``spared`` ones, such as the servers of other tests, are by default all that there are at the beginning.
    """
    victims: list[int] = []
    # A process and not a thread: maps start their workers in another way beside foreign threads.
    killer = subprocess.Popen(
        [
            sys.executable,
            __file__,
            str(os.getpid()),
            str(pause),
            *map(str, descendants() if spared is None else spared),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killer.stdin is not None
    assert killer.stdout is not None
    try:
        killer.stdout.readline()
        yield victims
    finally:
        killer.send_signal(signal.SIGTERM)
        out, _ = killer.communicate()
        victims.extend(json.loads(out))


def _kill_again_and_again(ancestor: int, pause: float, spared: set[int]) -> None:
    victims: list[int] = []
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    os.write(1, b"ready\n")
    next_kill = time.monotonic()
    while not ended.is_set():
        next_kill += pause
        while time.monotonic() < next_kill and not ended.is_set():
            time.sleep(0.005)
        targets = [pid for pid in descendants(ancestor) if pid not in spared]
        if targets and not ended.is_set():
            victims.append(random.choice(targets))
            with contextlib.suppress(ProcessLookupError):
                os.kill(victims[-1], signal.SIGKILL)
    os.write(1, json.dumps(victims).encode())


if __name__ == "__main__":
    _kill_again_and_again(int(sys.argv[1]), float(sys.argv[2]), {os.getpid(), *map(int, sys.argv[3:])})
