"""Entries on disk: an SQLite database for each namespace, in a folder of its own."""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from opero.core.clock import clock
from opero.core.forks import hold_forks
from opero.core.interrupts import Hold
from opero.core.private_folder import held_private_folder
from opero.core.stores.flights import BUSY, CLAIMED, FOUND, Keep
from opero.core.stores.lasting import LastingStore, slug

try:
    import fcntl
except ImportError:  # Windows: one run per key in each process, but not across processes
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from opero.core.stores.flights import Answer, Flight
    from opero.core.stores.settings import CacheSettings

R = TypeVar("R")

DATABASE, _LOCKS = "cache.db", "leases.lock"
# How long to wait for another process that writes; in steps, between which others can read, and this process fork.
_LOCK_SECONDS = 5.0
_LOCK_STEP = 0.01
_LOOK_SECONDS = 1.0
# An open namespace has some file handles; beyond so many, those that were opened first are closed until they are used.
_MOST_OPEN = 32
_LARGEST_LOG = 2**22
# By which another folder could be named.
_OPTION = "cache_options={'cache_dir': …}"

# Tells this format from all others, those of earlier versions of opero included.
_FORMAT = 0x6F70_0003
# An entry with the lowest rank is the first to go when there are too many.
_SCHEMA = """
    DROP TABLE IF EXISTS Cache;
    DROP TABLE IF EXISTS Settings;
    CREATE TABLE Cache (key BLOB PRIMARY KEY, value BLOB NOT NULL, ends REAL NOT NULL, rank REAL NOT NULL);
    CREATE INDEX ByEnd ON Cache (ends);
    CREATE INDEX ByRank ON Cache (rank);
    CREATE TABLE Settings (namespace BLOB NOT NULL, count INTEGER NOT NULL);
    CREATE TRIGGER Came AFTER INSERT ON Cache BEGIN UPDATE Settings SET count = count + 1; END;
    CREATE TRIGGER Went AFTER DELETE ON Cache BEGIN UPDATE Settings SET count = count - 1; END;
"""
COUNT = "SELECT COUNT(*) FROM Cache WHERE ends > ?"
_GET = "SELECT value FROM Cache WHERE key = ?"
_REMOVE = "DELETE FROM Cache WHERE key = ?"
_PUT = (
    "INSERT INTO Cache VALUES (?, ?, ?, ?) "
    "ON CONFLICT DO UPDATE SET value = excluded.value, ends = excluded.ends, rank = excluded.rank"
)
_REMOVE_EXPIRED = "DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM Cache WHERE ends <= ? LIMIT 100)"
# The entry that makes one too many has not been used yet, and is not the one to go.
_EVICT = (
    "DELETE FROM Cache WHERE rowid IN "
    "(SELECT rowid FROM Cache WHERE rowid != last_insert_rowid() ORDER BY rank, rowid LIMIT ?)"
)
_EVICTED_AT_ONCE = 10
# What a hit does to the rank.
_TOUCH = {
    "fifo": None,
    "lru": "UPDATE Cache SET rank = :now WHERE key = :key",
    "lfu": "UPDATE Cache SET rank = rank + 1 WHERE key = :key",
}
# How often the namespace was cleared; SQLite keeps this number for whoever wants it. What has been computed since an
# earlier one is not stored: no clock is asked for that, which could be set back.
_GENERATION = "user_version"


def _connect(folder: Path, namespace: str) -> sqlite3.Connection:
    """A connection that any thread may use to read and write; the database is made if need be."""
    connection = sqlite3.connect(folder / DATABASE, timeout=_LOCK_STEP, isolation_level=None, check_same_thread=False)
    try:
        if not is_of_this_format(connection):
            connection.execute("PRAGMA auto_vacuum = FULL")
            connection.execute("PRAGMA journal_mode = WAL")
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                _make_tables(connection, namespace)
        connection.execute("PRAGMA synchronous = NORMAL")
        # The log keeps the size of the largest results otherwise, also when the cache has been cleared.
        connection.execute(f"PRAGMA journal_size_limit = {_LARGEST_LOG}")
    except BaseException:
        connection.close()
        raise
    return connection


def _make_tables(connection: sqlite3.Connection, namespace: str) -> None:
    if is_of_this_format(connection):
        # Another process has done it meanwhile.
        return
    for statement in _SCHEMA.strip().splitlines():
        connection.execute(statement)
    connection.execute("INSERT INTO Settings VALUES (?, 0)", (namespace.encode("utf-8", "surrogatepass"),))
    connection.execute(f"PRAGMA application_id = {_FORMAT}")


def connect_to_read(folder: Path) -> sqlite3.Connection:
    """A connection that writes nothing, to what may lie where nothing can be written."""
    log = folder / f"{DATABASE}-wal"
    # Where no process has left anything in the log, SQLite would make one, and an index to it, just to read.
    manner = "mode=ro" if log.exists() and log.stat().st_size else "immutable=1"
    uri = f"{(folder / DATABASE).absolute().as_uri()}?{manner}"
    return sqlite3.connect(uri, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False, uri=True)


def is_of_this_format(connection: sqlite3.Connection) -> bool:
    """Whether its tables are those that this version makes."""
    return _number(connection, "application_id") == _FORMAT


def _number(connection: sqlite3.Connection, name: str) -> int:
    ((number,),) = connection.execute(f"PRAGMA {name}").fetchall()
    return int(number)


def _begin_generation(connection: sqlite3.Connection) -> None:
    connection.execute(f"PRAGMA {_GENERATION} = {_number(connection, _GENERATION) + 1}")


def _is(error: Exception, *codes: int) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in codes


def _is_busy(error: Exception) -> bool:
    """Whether another process writes, for longer than it was waited for."""
    return _is(error, sqlite3.SQLITE_BUSY)


def _is_damage(error: Exception) -> bool:
    """Whether what lies there is no database, or one that has been written into or cut."""
    return _is(error, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


_open_stores: deque[weakref.ref[DiskStore]] = deque()


class DiskStore(LastingStore):
    """The entries of one namespace in a folder of their own."""

    def __init__(self, settings: CacheSettings, namespace: str) -> None:
        self._name = slug(namespace)
        super().__init__(f"the disk cache {self._name}", settings)
        self._namespace = namespace
        self._touch = _TOUCH[settings.options["policy"]]
        self._connection: sqlite3.Connection | None = None
        self._can_write = False
        # Which file was opened, as what, and when to look whether it still is that, which takes a tenth of a hit.
        self._file, self._looks_at = "", 0.0
        self._seen: list[Any] = []
        self._lock_file: int | None = None
        # Held for a statement or a transaction, and never while another process is waited for.
        self._lock = threading.RLock()
        hold_forks(self)

    def before_fork(self) -> None:
        """Let no thread in, and leave nothing open.

        SQLite takes the locks of files for the child's that it has seen its parent take, also on a connection that the
        child makes itself: other processes then remove or overwrite what it writes.
        """
        self._lock.acquire()
        # Whatever is wrong with the database is told to those who use it.
        with contextlib.suppress(Exception):
            self._disconnect()

    def after_fork_in_parent(self) -> None:
        self._lock.release()

    def after_fork(self) -> None:
        self._lock = threading.RLock()

    @property
    def folder(self) -> Path:
        """Where the entries lie."""
        return self.settings.disk_folder() / self._name

    @property
    def is_ready(self) -> bool:
        if self._connection is None or not self._lock.acquire(blocking=False):
            return False
        self._lock.release()
        return True

    def read(self, key: bytes) -> bytes | None:
        with self._lock:
            connection = self._open()
            row = connection.execute(_GET, (key,)).fetchone()
            if row is not None and self._touch is not None and self._can_write:
                # Where another process writes, this hit does not count for the order of eviction.
                with contextlib.suppress(sqlite3.OperationalError):
                    connection.execute(self._touch, {"now": clock.wall(), "key": key})
        entry: bytes | None = None if row is None else row[0]
        return entry

    def perform(self, requests: Sequence[Flight | Keep]) -> list[Any]:
        """Answer requests in order; what is to be kept is written down first, and then stored in one transaction."""
        keeps = [request for request in requests if isinstance(request, Keep)]
        faults = iter([self.write_down(keep) for keep in keeps])
        stored = self.in_spite_of_faults(self._keep, keeps) if keeps else None
        return [
            next(faults) or stored
            if isinstance(request, Keep)
            else self.in_spite_of_faults(self._patiently, self._claim, request)
            for request in requests
        ]

    def let_go(self, flight: Flight) -> None:
        with Hold(), self._lock:
            flight.dropped = True
            if flight.held:
                flight.held = False
                self._unlock_key(flight.key)

    def failed(self, error: Exception) -> None:
        if _is_damage(error):
            self._take_away()
        # What is wrong with one entry is no reason to leave the others alone; a database that cannot be opened is.
        if self._connection is None and not _is_busy(error):
            self.rest.begin(error)

    def _take_away(self) -> None:
        """Remove the database: whoever opens it next makes it anew. Others who have it open find that it is gone."""
        with self._lock, contextlib.suppress(OSError):
            self._disconnect()
            with held_private_folder(self.settings.disk_folder(), self._name, _OPTION) as folder:
                for suffix in ("", "-wal", "-shm"):
                    (folder / f"{DATABASE}{suffix}").unlink(missing_ok=True)

    def delete(self, key: bytes) -> bool:
        def remove(connection: sqlite3.Connection) -> bool:
            if self._lock_key(key):
                self._unlock_key(key)
            else:
                # Another process computes it now, and shall not store it later.
                _begin_generation(connection)
            return connection.execute(_REMOVE, (key,)).rowcount > 0

        return self._transact(remove)

    def clear(self) -> None:
        def remove_all(connection: sqlite3.Connection) -> None:
            _begin_generation(connection)
            connection.execute("DELETE FROM Cache")

        try:
            self._transact(remove_all)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            self._take_away()
            self._transact(remove_all)

    def __len__(self) -> int:
        with self._lock:
            ((count,),) = self._open().execute(COUNT, (clock.wall(),)).fetchall()
            return int(count)

    def close(self, *, waits: bool = True) -> None:
        """Close what is open, unless somebody uses it at this moment and is not to be waited for."""
        if self._lock.acquire(blocking=waits):
            try:
                self._disconnect()
            finally:
                self._lock.release()

    def __del__(self, suppress: Any = contextlib.suppress) -> None:
        # Left open, SQLite's connections warn when they are collected; at the end of a program, when globals are gone.
        with suppress(Exception):
            self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if self._lock_file is not None and not self.flights.held():
            file, self._lock_file = self._lock_file, None
            os.close(file)

    def _claim(self, flight: Flight) -> Answer:
        connection = self._open(looks=True)
        if self._can_write and not flight.dropped:
            # A key that is locked and not noted could not be given back.
            with Hold():
                flight.held = self._lock_key(flight.key)
            flight.ticket = _number(connection, _GENERATION)
        # If the entry is damaged the lease is kept: whoever asked computes, and overwrites it.
        entry = self.read(flight.key)
        if entry is not None and self.is_found(flight, entry):
            return FOUND
        if not self._can_write:
            raise PermissionError(f"{self.folder} cannot be written to")
        return CLAIMED if flight.held or flight.dropped else BUSY

    def _lock_key(self, key: bytes) -> bool:
        """Lock a key unless another process has it.

        A lock is one byte of a file, locked by the system for this process and freed by the system when it ends,
        however it ends; a forked child holds none of its parent's. When a process closes the file the system frees all
        locks that it has on it: a second store of the same folder, with other options, may cost a key one more run in
        another process.
        """
        if fcntl is None:
            return True
        if self._lock_file is None:
            how = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._lock_file = os.open(self.folder / _LOCKS, how, 0o600)
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int.from_bytes(key[:7]))
        except (PermissionError, BlockingIOError):
            # Another process has it; which of the two errors it is depends on the system.
            return False
        return True

    def _unlock_key(self, key: bytes) -> None:
        if fcntl is not None and self._lock_file is not None:
            fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1, int.from_bytes(key[:7]))

    def _keep(self, keeps: Sequence[Keep]) -> None:
        def insert(connection: sqlite3.Connection) -> None:
            generation, now = _number(connection, _GENERATION), clock.wall()
            connection.execute(_REMOVE_EXPIRED, (now,))
            for keep in keeps:
                flight = keep.flight
                if flight.written is not None and not flight.is_void and flight.ticket in {None, generation}:
                    ends = math.inf if keep.seconds is None else now + keep.seconds
                    rank = 0.0 if self.settings.options["policy"] == "lfu" else now
                    connection.execute(_PUT, (flight.key, flight.written, ends, rank))
                    self._evict(connection)

        patience = [keep.patience for keep in keeps if keep.patience is not None]
        self._transact(insert, min(patience, default=None))

    def _evict(self, connection: sqlite3.Connection) -> None:
        maxsize, size_limit = self.settings.options["maxsize"], self.settings.options["size_limit"]
        if maxsize is not None:
            ((count,),) = connection.execute("SELECT count FROM Settings").fetchall()
            if count > maxsize:
                connection.execute(_EVICT, (count - maxsize,))
        pages = _number(connection, "page_count") - _number(connection, "freelist_count")
        if pages * _number(connection, "page_size") > size_limit:
            connection.execute(_EVICT, (_EVICTED_AT_ONCE,))

    def _transact(self, work: Callable[[sqlite3.Connection], R], seconds: float | None = None) -> R:
        """Do some work in a transaction, as soon as no other process writes."""

        def transact() -> R:
            connection = self._open(looks=True)
            if not self._can_write:
                raise PermissionError(f"{self.folder} cannot be written to")
            if connection.in_transaction:
                # A finalizer or a signal handler has come in the middle of one.
                return work(connection)
            # At the end the connection commits, or rolls back: after Ctrl-C, too.
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                return work(connection)

        return self._patiently(transact, seconds=seconds)

    def _patiently(self, work: Callable[..., R], *args: Any, seconds: float | None = None) -> R:
        """Do some work, as soon as no other process writes; wait for that no longer than ``seconds``."""
        seconds = _LOCK_SECONDS if seconds is None else min(seconds, _LOCK_SECONDS)
        deadline = clock.real() + seconds
        while True:
            try:
                with self._lock:
                    return work(*args)
            except sqlite3.OperationalError as error:
                if not _is_busy(error):
                    raise
                if clock.real() >= deadline:
                    if seconds == _LOCK_SECONDS:
                        self.rest.begin(error)
                    raise
            time.sleep(_LOCK_STEP)

    def _open(self, *, looks: bool = False) -> sqlite3.Connection:
        if self._connection is not None:
            now = clock.real()
            if self._can_write and now < self._looks_at and not looks:
                return self._connection
            self._looks_at = now + _LOOK_SECONDS
            if self._seen == self._as_it_lies():
                return self._connection
            self._disconnect()
        # Looked at each time: after a fork, or an hour, another folder may have been put into its place.
        try:
            root = self.settings.disk_folder()
            with held_private_folder(root, self._name, _OPTION) as folder:
                self._can_write = os.access(folder, os.W_OK) or not (folder / DATABASE).exists()
                self._file = str(folder / DATABASE)
                self._seen = self._as_it_lies()
                self._connection = _connect(folder, self._namespace) if self._can_write else connect_to_read(folder)
                if self._can_write:
                    # It may have been made just now.
                    self._seen = self._as_it_lies()
        except BaseException:
            # It may have been exchanged while it was opened.
            self._disconnect()
            raise
        self.rest.end()
        _open_stores.append(weakref.ref(self))
        while len(_open_stores) > _MOST_OPEN:
            first = _open_stores.popleft()()
            if first is not None and first is not self:
                first.close(waits=False)
        return self._connection

    def _as_it_lies(self) -> list[Any]:
        """Tells the file from another one in its place, or none: folders are removed while programs run.

        Who only reads may hear nothing of those who write: then it tells what is in it, too.
        """
        found: list[Any] = []
        for suffix in ("",) if self._can_write else ("", "-wal"):
            with contextlib.suppress(OSError):
                file = os.stat(self._file + suffix)  # noqa: PTH116 - it is a str
                found.append(file.st_ino if self._can_write else (file.st_ino, file.st_mtime_ns, file.st_size))
        return found
