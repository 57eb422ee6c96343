"""Entries on disk: an SQLite database for each namespace, in a folder of its own."""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from opero.core.clock import clock
from opero.core.faults import Rest
from opero.core.forks import ForkSafeLock
from opero.core.private_folder import folder_of_user, held_private_folder
from opero.core.stores.flights import BUSY, CLAIMED, FOUND
from opero.core.stores.lasting import LastingStore, slug

try:
    import fcntl
except ImportError:  # Windows: one run per key in each process, but not across processes
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opero.core.stores.flights import Answer, Flight, Keep
    from opero.core.stores.settings import Cache

R = TypeVar("R")

DATABASE, _LOCKS = "cache.db", "leases.lock"
# How long to wait for another process that writes; in steps, between which others can read, and this process fork.
_LOCK_SECONDS = 5.0
_LOCK_STEP = 0.01
_LOOK_SECONDS = 1.0
# An open namespace has some file handles; beyond so many, those that were opened first are closed until they are used.
_MOST_OPEN = 32
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
    CREATE TABLE Settings (namespace BLOB NOT NULL);
"""
# The log keeps the size of the largest results otherwise, also when the cache has been cleared.
_MANNERS = "PRAGMA synchronous = NORMAL", "PRAGMA journal_size_limit = 4000000"
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
                # Another process may have done it meanwhile.
                if not is_of_this_format(connection):
                    for statement in _SCHEMA.strip().splitlines():
                        connection.execute(statement)
                    connection.execute("INSERT INTO Settings VALUES (?)", (namespace.encode("utf-8", "surrogatepass"),))
                    connection.execute(f"PRAGMA application_id = {_FORMAT}")
        for manner in _MANNERS:
            connection.execute(manner)
    except BaseException:
        connection.close()
        raise
    return connection


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


def _size(connection: sqlite3.Connection) -> int:
    pages = _number(connection, "page_count") - _number(connection, "freelist_count")
    return pages * _number(connection, "page_size")


def _begin_generation(connection: sqlite3.Connection) -> None:
    connection.execute(f"PRAGMA {_GENERATION} = {_number(connection, _GENERATION) + 1}")


def _is(error: Exception, *codes: int) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in codes


# Another process writes, for longer than it was waited for.
_BUSY = sqlite3.SQLITE_BUSY
# What lies there is no database, or one that has been written into or cut.
_DAMAGE = sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB
# To remove entries takes room, too.
_NO_ROOM = sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR


# Held for a statement or a transaction, and never while another process is waited for.
_guard = ForkSafeLock()
_open_stores: WeakValueDictionary[int, DiskStore] = WeakValueDictionary()


def _close_before_fork() -> None:
    """Let no thread in, and leave nothing open.

    SQLite takes the locks of files for the child's that it has seen its parent take, also on a connection that the
    child makes itself: other processes then remove or overwrite what it writes.
    """
    _guard.lock.acquire()
    for known in _open_stores.valuerefs():
        # Whatever is wrong with the database is told to those who use it.
        with contextlib.suppress(Exception):
            if (store := known()) is not None:
                store.close()


if hasattr(os, "register_at_fork"):
    # In a child it is another lock.
    os.register_at_fork(before=_close_before_fork, after_in_parent=lambda: _guard.lock.release())  # noqa: PLW0108


def disk_folder(settings: Cache) -> Path:
    """The folder in which the namespaces lie; it is not made."""
    name: str = settings.options["folder_name"]
    if settings.options["cache_dir"] is not None:
        return Path(settings.options["cache_dir"]) / name
    from opero.core.stores.twat import get_cache_path

    return folder_of_user(lambda: get_cache_path(name, create=False))


class DiskStore(LastingStore):
    """The entries of one namespace in a folder of their own."""

    def __init__(self, settings: Cache, namespace: str) -> None:
        super().__init__(f"the disk cache {slug(namespace)}", settings, Rest())
        self._namespace = namespace
        self._root = disk_folder(settings)
        # Where the entries lie.
        self.folder = self._root / slug(namespace)
        self._file = str(self.folder / DATABASE)
        self._touch = _TOUCH[settings.options["policy"]]
        self._connection: sqlite3.Connection | None = None
        # Who cannot write may hear nothing of those who write, and opens the database for each look.
        self._can_write = False
        # The number of the file that was opened, and when to look again whether it is there, which takes half a hit.
        self._inode, self._looks_at = 0, 0.0
        self._lock_file: int | None = None

    @property
    def is_ready(self) -> bool:
        if self._connection is None or not _guard.lock.acquire(blocking=False):
            return False
        _guard.lock.release()
        return True

    def read(self, key: bytes) -> bytes | None:
        with _guard.lock:
            connection = self._open(looks=False)
            row = connection.execute(_GET, (key,)).fetchone()
            if row is not None and self._touch is not None and self._can_write:
                # Where another process writes, this hit does not count for the order of eviction.
                with contextlib.suppress(sqlite3.OperationalError):
                    connection.execute(self._touch, {"now": clock.wall(), "key": key})
        entry: bytes | None = None if row is None else row[0]
        return entry

    def claim(self, flights: Sequence[Flight]) -> list[Any]:
        return [self.in_spite_of_faults(self._patiently, partial(self._claim, flight)) for flight in flights]

    def keep(self, keeps: Sequence[Keep]) -> list[Exception | None]:
        """All of it is written down first, and then stored in one transaction."""
        faults = [self.write_down(keep) for keep in keeps]
        stored = self.in_spite_of_faults(self._keep, keeps)
        return [fault or stored for fault in faults]

    def let_go(self, flight: Flight) -> None:
        flight.dropped = True
        with _guard.lock:
            if flight.held:
                self._unlock_key(flight.key)
                flight.held = False

    def failed(self, error: Exception) -> None:
        if _is(error, *_DAMAGE):
            self._take_away()
        # What is wrong with one entry is no reason to leave the others alone; a database that cannot be opened is.
        if self._connection is None and not _is(error, _BUSY):
            self.rest.begin(error)

    def _take_away(self) -> None:
        """Remove the database: whoever opens it next makes it anew. Others who have it open find that it is gone."""
        self.close()
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.remove(f"{self._file}{suffix}")  # noqa: PTH107 - it is a str

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
            if not _is(error, *_DAMAGE, *_NO_ROOM):
                raise
            self._take_away()

    def __len__(self) -> int:
        with _guard.lock:
            ((count,),) = self._open().execute(COUNT, (clock.wall(),)).fetchall()
            return int(count)

    def close(self) -> None:
        """Close what is open, until it is used again."""
        with _guard.lock:
            self._disconnect()

    def __del__(self, suppress: Any = contextlib.suppress) -> None:
        # Left open, SQLite's connections warn when they are collected; at the end of a program, when globals are gone.
        with suppress(Exception):
            self._disconnect()

    def _disconnect(self) -> None:
        _open_stores.pop(id(self), None)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if self._lock_file is not None and not self.flights.held():
            file, self._lock_file = self._lock_file, None
            os.close(file)

    def _claim(self, flight: Flight) -> Answer:
        connection = self._open()
        if self._can_write and not flight.dropped:
            # After Ctrl-C it is given back, whether it was locked by then or not.
            flight.held = True
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
        options = self.settings.options

        def insert(connection: sqlite3.Connection) -> None:
            generation, now = _number(connection, _GENERATION), clock.wall()
            connection.execute(_REMOVE_EXPIRED, (now,))
            for keep in keeps:
                flight = keep.flight
                if flight.written is not None and not flight.is_void and flight.ticket in {None, generation}:
                    ends = math.inf if keep.seconds is None else now + keep.seconds
                    rank = 0.0 if options["policy"] == "lfu" else now
                    connection.execute(_PUT, (flight.key, flight.written, ends, rank))
            if options["maxsize"] is not None:
                ((count,),) = connection.execute("SELECT COUNT(*) FROM Cache").fetchall()
                connection.execute(_EVICT, (max(0, count - options["maxsize"]),))
            while _size(connection) > options["size_limit"]:
                if not connection.execute(_EVICT, (_EVICTED_AT_ONCE,)).rowcount:
                    break

        patience = [keep.patience for keep in keeps if keep.patience is not None]
        self._transact(insert, min(patience, default=math.inf))

    def _transact(self, work: Callable[[sqlite3.Connection], R], seconds: float = math.inf) -> R:
        """Do some work in a transaction, as soon as no other process writes."""

        def transact() -> R:
            connection = self._open()
            if not self._can_write:
                raise PermissionError(f"{self.folder} cannot be written to")
            # At the end the connection commits, or rolls back: after Ctrl-C, too.
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                return work(connection)

        return self._patiently(transact, seconds)

    def _patiently(self, work: Callable[[], R], seconds: float = math.inf) -> R:
        """Do some work, as soon as no other process writes; wait for that no longer than ``seconds``."""
        deadline = clock.real() + min(seconds, _LOCK_SECONDS)
        while True:
            try:
                with _guard.lock:
                    return work()
            except sqlite3.OperationalError as error:
                if not _is(error, _BUSY):
                    raise
                if clock.real() >= deadline:
                    if seconds >= _LOCK_SECONDS:
                        self.rest.begin(error)
                    raise
            time.sleep(_LOCK_STEP)

    def _open(self, *, looks: bool = True) -> sqlite3.Connection:
        """The connection; a new one if the database was taken away: folders are removed while programs run."""
        if self._connection is not None:
            now = clock.real()
            if now < self._looks_at and not looks:
                return self._connection
            with contextlib.suppress(FileNotFoundError):
                if self._can_write and os.stat(self._file).st_ino == self._inode:  # noqa: PTH116 - it is a str
                    self._looks_at = now + _LOOK_SECONDS
                    return self._connection
            self._disconnect()
        # Looked at each time: after a fork, or an hour, another folder may have been put into its place.
        try:
            with held_private_folder(self._root, self.folder.name, _OPTION) as folder:
                self._can_write = os.access(folder, os.W_OK) or not (folder / DATABASE).exists()
                self._connection = _connect(folder, self._namespace) if self._can_write else connect_to_read(folder)
                self._inode, self._looks_at = (folder / DATABASE).stat().st_ino, 0.0
        except BaseException:
            # It may have been exchanged while it was opened.
            self._disconnect()
            raise
        _open_stores[id(self)] = self
        for known in _open_stores.valuerefs()[:-_MOST_OPEN]:
            if (first := known()) is not None:
                first.close()
        return self._connection
