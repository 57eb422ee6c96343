"""Limits that processes share: behind a gate, a file of the machine or a redis server keeps the ledger as bytes."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from functools import partial
from hashlib import blake2b, sha1
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opero.core.checks import check_choice, check_text, check_url
from opero.core.clock import clock
from opero.core.digests import digest_of
from opero.core.faults import Complaints
from opero.core.limits.ledger import changed, is_over
from opero.core.private_folder import fault_of, folder_of_user, private_folder
from opero.core.steps import Consult
from opero.exceptions import UnsafeCacheError

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from opero.core.limits.ledger import Change, Ledger
    from opero.core.limits.rates import Rates
    from opero.core.stores.redis import Server

_OPTIONS_OF_SCOPES = {"process": (), "machine": ("folder", "name"), "redis": ("name", "url")}
# Who is kept from the ledger by others comes again after so long.
_BUSY_SECONDS = 0.005


def gates(
    scope: str, *, name: str | None, url: str | None, folder: str | os.PathLike[str] | None
) -> Callable[..., Gate | None]:
    """Give a function that gives the gate of a limit, or that of a value; None where the process has it for itself."""
    check_choice("scope", scope, sorted(_OPTIONS_OF_SCOPES))
    for option, value in {"folder": folder, "name": name, "url": url}.items():
        if value is not None and option not in _OPTIONS_OF_SCOPES[scope]:
            raise ValueError(f"{option} has no effect with scope={scope!r}; leave it out")
    if scope == "process":
        return lambda *_value: None
    if name is None:
        raise ValueError(f"scope={scope!r} needs name=, a name by which processes know the limit")
    known_as = check_text("name", name, "a name that no other limit has")
    make: Callable[[str], Gate]
    if scope == "machine":
        if find_spec("fcntl") is None:
            msg = "scope='machine' needs the file locks of POSIX, which this system has not; write scope='redis'"
            raise ValueError(msg)
        make = partial(FileGate, folder=_folder_of_limits(folder))
    else:
        if url is None:
            raise ValueError("scope='redis' needs url=, such as url='redis://localhost:6379/0'")
        if find_spec("redis") is None:
            msg = "scope='redis' needs the package redis; install it with: pip install 'opero[redis]'"
            raise ModuleNotFoundError(msg, name="redis")
        check_url("url", url)
        make = partial(RedisGate, url=url)
    # The value may be a secret.
    return lambda *value: make(f"{known_as}:{digest_of(*value).hex()}" if value else known_as)


def _folder_of_limits(folder: str | os.PathLike[str] | None) -> Path:
    if folder is None:
        import platformdirs

        return folder_of_user(lambda: Path(platformdirs.user_cache_dir("opero", appauthor=False)))
    text = check_text("folder", os.fspath(folder) if isinstance(folder, os.PathLike) else folder, "a folder's path")
    # Known by one name, whatever the working directory will be.
    return Path(text).expanduser().resolve()


class Gate(ABC):
    """Where the bytes are that processes share. When it fails, the process goes on with a limit of its own.

    Attributes:
        is_instant: Whether it blocks for microseconds only.
    """

    is_instant = False

    def __init__(self, scope: str) -> None:
        self._complaints = Complaints(f"the {scope}'s rate limit", "going on with a limit of this process alone")

    @abstractmethod
    def answer(self, change: Change) -> float | Exception:
        """0 if it was done, seconds until a slot comes, or the exception that prevents it."""

    def answers(self, changes: Sequence[Change]) -> list[float | Exception]:
        return [self.answer(change) for change in changes]

    def ask(self, rates: Rates, act: Callable[[Ledger, float], float | None]) -> Generator[Any, Any, float | None]:
        """What comes of doing something with the ledger; None if the gate failed, or this clock jumps."""
        if clock.is_virtual:
            return None
        change = partial(changed, rates, act)
        answer = self.answer(change) if self.is_instant else (yield Consult(self.answers, change))
        if isinstance(answer, Exception):
            self._complaints.tell(answer)
            return None
        seconds: float = answer
        return seconds


# In a file

_FOLDER = "limits"
# Who holds a file holds it for microseconds, unless it was stopped: then others come again, and do not block.
_LOCK_TRIES, _LOCK_SECONDS = 10, 0.00005
# After so long it is a fault of the limit.
_LONGEST_LOCK = 1.0
# The most of a state that can be true.
_MOST_BYTES = 1_000_000
# Idle files that each new one is looked for among.
_TIDIED_AT_ONCE = 2


class FileGate(Gate):
    """A file, which the system unlocks when its holder dies; it holds nothing of the arguments.

    It is opened, locked, read and written for each start, so that it may vanish at any time, and so that no descriptor
    has to survive a fork. The times in it are those of the system's monotonic clock, which all processes share until
    the next start of the machine.
    """

    is_instant = True

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__("machine")
        self._root = folder
        self._file_name = blake2b(name.encode(), digest_size=16).hexdigest()
        self._path: str | None = None
        # Since when somebody else has been found to keep the file locked.
        self._locked_since = math.inf

    def answer(self, change: Change) -> float | Exception:
        try:
            if self._path is None:
                # Not with its files: with one for each value, each new one would take ever longer.
                folder = private_folder(self._root, _FOLDER, "rate_limit_options={'folder': …}", with_files=False)
                _tidy(str(folder))
                self._path = str(folder / self._file_name)
            with _locked(self._path) as file:
                now = clock.machine()
                if file is None:
                    self._locked_since = min(self._locked_since, now)
                    if now - self._locked_since < _LONGEST_LOCK:
                        return _BUSY_SECONDS
                    fault = f"another process has kept its file locked for {_LONGEST_LOCK:g} s"
                    raise TimeoutError(errno.ETIMEDOUT, fault)
                self._locked_since = math.inf
                wait, made, _ = change(os.pread(file, _MOST_BYTES, 0), now)
                if made:
                    os.pwrite(file, made, 0)
                    os.ftruncate(file, len(made))
                return wait
        except UnsafeCacheError:
            raise
        except OSError as error:
            # The folder may have gone; the next one makes it anew.
            self._path = None
            return error


@contextlib.contextmanager
def _locked(path: str) -> Iterator[int | None]:
    """The open file, locked; None if that has to be tried again: somebody else has it, or has removed it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        found = os.fstat(file)
        fault = fault_of(found)
        if fault is not None:
            raise UnsafeCacheError(f"{path} {fault}; delete it, or name another folder for limits")
        for _ in range(_LOCK_TRIES):
            try:
                # Of this opening, and not of the process as `fcntl.lockf`: threads keep each other out, too.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOCK_SECONDS)
        else:
            yield None
            return
        # Somebody may have tidied it away between the two; then it is to be asked for again.
        yield file if os.fstat(file).st_nlink else None
    finally:
        # A child that was forked meanwhile has it open, too.
        fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


def _tidy(folder: str) -> None:
    """Remove some of the files whose limits are idle; each new one goes on where the one before has stopped."""
    paths = _being_tidied.setdefault(folder, [])
    with contextlib.suppress(OSError, IndexError):
        if not paths:
            paths += os.listdir(folder)  # noqa: PTH208 - thousands of names
        for _ in range(_TIDIED_AT_ONCE):
            path = f"{folder}/{paths.pop()}"
            with _locked(path) as file:
                if file is not None and is_over(os.pread(file, _MOST_BYTES, 0), clock.machine()):
                    os.unlink(path)  # noqa: PTH108 - it is a str


# By folder: to pop a name is one step, and needs no lock.
_being_tidied: dict[str, list[str]] = {}


# On a redis server

# Others may be faster so often; then they are let go on.
_TRIES = 20
_LASTING_SECONDS = 1.0
# The answer that a process has reckoned holds if the state is still the one with this digest, and is kept in its place;
# of any other state, which nobody knows or others have changed, it is told the server's time and what is there. It is a
# field of a hash: what somebody writes beside it, or in its place, does no harm.
_SWAP = """
local size, data = redis.pcall('HSTRLEN', KEYS[1], 'state'), ''
if type(size) ~= 'number' or size > 1000000 then
  redis.call('DEL', KEYS[1])
elseif size > 0 then
  data = redis.call('HGET', KEYS[1], 'state')
end
if redis.sha1hex(data) == ARGV[1] then
  redis.call('HSET', KEYS[1], 'state', ARGV[2])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  return
end
local time = redis.call('TIME')
return {time[1], time[2], data}
"""


class RedisGate(Gate):
    """A value on a server, by the server's clock. A server that fails is left alone for a while."""

    def __init__(self, name: str, url: str) -> None:
        super().__init__("redis")
        self._url = url
        # The braces keep all of it on one node of a cluster.
        self._key = f"opero:limit:{{{name}}}"
        self._server: Server | None = None

    def answer(self, change: Change) -> float | Exception:
        try:
            from opero.core.stores.redis import server_at

            server = self._server = self._server or server_at(self._url)
            return server.rest.reason() or self._exchange(server, change)
        except Exception as error:  # noqa: BLE001 - it costs the sharing and not the call
            if self._server is not None:
                self._server.failed(error)
            return error

    def _exchange(self, server: Server, change: Change) -> float:
        """Change the state, and again while others have changed it meanwhile."""
        digest, made, lasts, wait = "", b"", 0.0, 0.0
        for _ in range(_TRIES):
            milliseconds = round((lasts + _LASTING_SECONDS) * 1000)
            (other,) = server.perform([("EVAL", _SWAP, 1, self._key, digest, made, milliseconds)])
            server.rest.end()
            if other is None:
                return wait
            seconds, microseconds, data = other
            wait, made, lasts = change(data, float(seconds) + float(microseconds) / 1e6)
            if not made:
                return wait
            digest = sha1(data, usedforsecurity=False).hexdigest()
        return _BUSY_SECONDS
