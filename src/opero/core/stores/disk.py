"""Entries on disk: a diskcache database per namespace.

diskcache 5.6.3 is used for what it does well (a schema, transactions, eviction), and kept from the rest: it unpickles
whatever lies in its folder (CVE-2025-69872), and its connections belong to threads and do not survive a fork.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import diskcache

from opero.core.clock import clock
from opero.core.faults import Rest
from opero.core.forks import hold_forks
from opero.core.interrupts import Hold
from opero.core.private_folder import held_private_folder
from opero.core.stores.contract import BUSY, CLAIMED, DONE, Claim, Keep, Lease
from opero.core.stores.lasting import LastingStore, slug
from opero.core.stores.locks import KeyLocks, key_locks
from opero.core.stores.settings import DISK_POLICIES
from opero.exceptions import UnsafeCacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opero.core.stores.contract import Request
    from opero.core.stores.entries import EntryFormat

R = TypeVar("R")

# How long to wait for another process that writes; in steps, between which this process may fork.
_LOCK_SECONDS = 5.0
_LOCK_STEP = 0.1
_GRAVE_SECONDS = 86_400.0
NAMESPACE_SETTING = "opero_namespace"
# An open namespace has some file handles; beyond so many, those that were opened first are closed until they are used.
_MOST_OPEN = 32

# When an entry has ended it says itself.
_SELECT = "SELECT value FROM Cache WHERE key = ? AND raw = 1"
_GRAVE = "SELECT value FROM Cache WHERE key = ? AND raw = 1"
_TOUCH = "UPDATE Cache SET access_time = ?, access_count = access_count + 1 WHERE key = ? AND raw = 1"
# The entry that makes one too many has not been used yet, and is not the one to go.
_CULL = (
    "DELETE FROM Cache WHERE rowid IN "
    "(SELECT rowid FROM Cache WHERE rowid != last_insert_rowid() ORDER BY {order} LIMIT ?)"
)
_ORDER = {"fifo": "store_time", "lru": "access_time", "lfu": "access_count"}


class _Bytes(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Keys and values as bytes in the database; diskcache's own are pickled, or large ones files of their own."""

    def put(self, key: Any) -> Any:
        return sqlite3.Binary(key), True

    def store(self, value: Any, *_read_and_key: Any, **_key: Any) -> Any:
        # The size is for what lies outside of the database, whose own is known.
        return 0, diskcache.core.MODE_RAW, None, sqlite3.Binary(value)


class _Database(diskcache.Cache):  # type: ignore[misc]  # as above
    """One connection for writing, of the process and not of a thread, and a bound on the number of entries."""

    def __init__(self, folder: Path, namespace: str, *, maxsize: int | None, policy: str, size_limit: int) -> None:
        self._connection: sqlite3.Connection | None = None
        self._maxsize = maxsize
        self._cull_surplus = _CULL.format(order=_ORDER[policy])
        super().__init__(
            str(folder),
            timeout=1,
            disk=_Bytes,
            eviction_policy=DISK_POLICIES[policy],
            size_limit=size_limit,
            statistics=0,
            tag_index=0,
            # No setting of diskcache's, which keeps it beside its own: the folder's name does not always tell.
            **{NAMESPACE_SETTING: namespace.encode("utf-8", "surrogatepass")},
        )

    @property
    def _con(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = connect(self.directory, _LOCK_STEP)
            self._connection.execute("PRAGMA synchronous = NORMAL")
        return self._connection

    def close(self) -> None:
        connection, self._connection = self._connection, None
        # The thread in whose transaction it may have been interrupted.
        self._txn_id = None
        if connection is not None:
            connection.close()

    def _cull(self, now: float, sql: Any, cleanup: Callable[[Any], None], limit: int | None = None) -> None:
        super()._cull(now, sql, cleanup, limit)
        if self._maxsize is None:
            return
        ((count,),) = sql("SELECT value FROM Settings WHERE key = 'count'").fetchall()
        if count > self._maxsize:
            sql(self._cull_surplus, (count - self._maxsize,))


def _is_busy(error: Exception) -> bool:
    """Whether another process writes, for longer than it was waited for."""
    return isinstance(error, diskcache.Timeout) or (
        isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
    )


def connect(folder: str, timeout: float) -> sqlite3.Connection:
    """A connection that any thread may use; it waits so many seconds for other processes."""
    return sqlite3.connect(_path(folder), timeout=timeout, isolation_level=None, check_same_thread=False)


def connect_to_read(folder: Path, timeout: float) -> sqlite3.Connection:
    """A connection that writes nothing, to what may lie where nothing can be written."""
    database = folder / diskcache.core.DBNAME
    log = folder / f"{diskcache.core.DBNAME}-wal"
    # Where no process has left anything in the log, SQLite would make one, and an index to it, just to read.
    manner = "mode=ro" if log.exists() and log.stat().st_size else "immutable=1"
    uri = f"{database.absolute().as_uri()}?{manner}"
    return sqlite3.connect(uri, timeout=timeout, isolation_level=None, check_same_thread=False, uri=True)


def _path(folder: str) -> Path:
    return Path(folder, diskcache.core.DBNAME)


class DiskStore(LastingStore):
    """The entries of one namespace in a folder of their own."""

    def __init__(
        self,
        root: Callable[[], Path],
        namespace: str,
        entry_format: EntryFormat,
        *,
        maxsize: int | None,
        policy: str,
        size_limit: int,
    ) -> None:
        name = slug(namespace)
        super().__init__(f"the disk cache {name}", entry_format, maxsize)
        self._root = root
        self._rest = Rest()
        self._name = name
        self._namespace = namespace
        self._policy = policy
        self._size_limit = size_limit
        self._database: _Database | None = None
        self._reading: sqlite3.Connection | None = None
        self._cursor: sqlite3.Cursor | None = None
        self._locks: KeyLocks | None = None
        # For writing, which may wait for other processes; readers have a lock of their own and wait for nobody.
        self._lock = threading.RLock()
        self._reading_lock = threading.RLock()
        hold_forks(self)

    def before_fork(self) -> None:
        """Let no thread in, and leave nothing open.

        SQLite takes the locks of files for the child's that it has seen its parent take, also on a connection that the
        child makes itself: other processes then remove or overwrite what it writes.
        """
        self._lock.acquire()
        self._reading_lock.acquire()
        # Whatever is wrong with the database is told to those who use it.
        with contextlib.suppress(Exception):
            self._disconnect()

    def after_fork_in_parent(self) -> None:
        self._reading_lock.release()
        self._lock.release()

    def after_fork(self) -> None:
        self._lock = threading.RLock()
        self._reading_lock = threading.RLock()

    @property
    def folder(self) -> Path:
        """Where the entries lie."""
        return self._root() / self._name

    @property
    def rest(self) -> Rest:
        return self._rest

    @property
    def is_open(self) -> bool:
        """Whether a look needs no opening first, which takes long."""
        return self._reading is not None

    @property
    def reads_only(self) -> bool:
        """Whether a hit writes nothing, and so waits for nobody."""
        return self._policy == "fifo"

    def read(self, key: bytes) -> bytes | None:
        while True:
            cursor = self._cursor
            if cursor is None:
                self._open()
                continue
            with self._reading_lock:
                try:
                    # One cursor for all: the row is the only one, after which SQLite lets go of the database.
                    row = cursor.execute(_SELECT, (key,)).fetchone()
                    break
                except sqlite3.ProgrammingError:
                    if cursor is self._cursor:
                        raise
                    # Somebody has closed it since.
        if row is None:
            return None
        if not self.reads_only and self._database is not None:
            self._touch(key)
        entry: bytes | None = row[0]
        return entry

    def answer(self, requests: Sequence[Request]) -> list[Any]:
        self._open()
        faults = self._keep([request for request in requests if isinstance(request, Keep) and request.written])
        return [self._answer_one(request, faults) for request in requests]

    def let_go(self, lease: Lease) -> None:
        with Hold(), self._lock:
            lease.dropped = True
            held, lease.held = lease.held, False
            if held and self._locks is not None:
                self._locks.release(lease.key)

    def failed(self, error: Exception) -> None:
        # What is wrong with one entry is no reason to leave the others alone; a database that cannot be opened is.
        if self._reading is None:
            self.rest.begin(error)

    def delete(self, key: bytes) -> bool:
        def bury(database: _Database) -> bool:
            assert self._locks is not None  # noqa: S101 - for the type checkers
            if self._locks.take(key):
                self._locks.release(key)
            else:
                # Another process computes it now, and shall not store it later: see `_past_of`.
                database.set(_grave(key), os.urandom(16), expire=_GRAVE_SECONDS)
            return bool(database.delete(key, retry=False))

        return self._patiently(bury)

    def clear(self) -> None:
        def empty(database: _Database) -> None:
            # What other processes compute now must not be stored later: see `_past_of`.
            with database.transact():
                database._sql(f"PRAGMA user_version = {_generation(database._sql) + 1}")  # noqa: SLF001 - the connection, inside the transaction
            database.clear()

        self._patiently(empty)

    def __len__(self) -> int:
        with self._lock:
            count: Any = self._opened().reset("count")
            return int(count)

    def close(self) -> None:
        with self._lock, self._reading_lock:
            try:
                self._disconnect()
            finally:
                self._database = None

    def _disconnect(self) -> None:
        reading, self._reading, self._cursor = self._reading, None, None
        try:
            if self._database is not None:
                self._database.close()
        finally:
            if reading is not None:
                reading.close()

    def __del__(self, suppress: Any = contextlib.suppress) -> None:
        # Left open, SQLite's connections warn when they are collected; at the end of a program, when globals are gone.
        with suppress(Exception):
            self.close()

    def _answer_one(self, request: Request, faults: dict[int, Exception]) -> Any:
        if isinstance(request, Claim):
            try:
                return self._claim(request.lease)
            except Exception as error:  # noqa: BLE001 - one damaged entry says nothing about the others
                return error
        self.let_go(request.lease)
        return faults.get(id(request), DONE)

    def hibernate(self) -> None:
        """Close what is open, unless somebody writes at this moment."""
        if self._lock.acquire(blocking=False):
            try:
                with self._reading_lock:
                    self._disconnect()
            finally:
                self._lock.release()

    def _claim(self, lease: Lease) -> Any:
        # A key that is locked and not noted could not be given back.
        with Hold(), self._lock:
            if self._database is not None and self._locks is not None and not lease.dropped:
                lease.held = self._locks.take(lease.key)
            if lease.held:
                lease.seen = _past_of(lease.key, self._open().execute)
        # If the entry is damaged the lease is kept: whoever asked computes, and overwrites it.
        entry = self.read(lease.key)
        found = None if entry is None else self.found(lease, entry)
        if found is not None:
            self.let_go(lease)
            return found
        if self._database is None:
            return PermissionError(f"{self.folder} cannot be written to")
        return CLAIMED if lease.held or lease.dropped else BUSY

    def _keep(self, keeps: Sequence[Keep]) -> dict[int, Exception]:
        """Store many in one transaction; if that fails, each in its own, so that one does not cost the others."""
        if not keeps:
            return {}
        try:
            self._write(keeps)
        except Exception as error:  # noqa: BLE001 - whatever it is, it costs the cache and not the call
            if len(keeps) == 1 or _is_busy(error):
                self.failed(error)
                return {id(keep): error for keep in keeps}
            return {name: answer for keep in keeps for name, answer in self._keep([keep]).items()}
        return {}

    def _write(self, keeps: Sequence[Keep]) -> None:
        def write(database: _Database) -> None:
            with database.transact():
                sql = database._sql  # noqa: SLF001 - the connection, inside the transaction
                for keep in keeps:
                    seen = keep.lease.seen
                    if not keep.is_stale and (seen is None or seen == _past_of(keep.lease.key, sql)):
                        database.set(keep.lease.key, keep.written, expire=keep.seconds)

        self._patiently(write, min([_LOCK_SECONDS, *(keep.patience for keep in keeps if keep.patience is not None)]))

    def _patiently(self, write: Callable[[_Database], R], seconds: float = _LOCK_SECONDS) -> R:
        """Write, as soon as no other process does."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                with self._lock:
                    database = self._opened()
                    try:
                        return write(database)
                    except Exception:
                        raise
                    except BaseException:
                        # Ctrl-C may have left a transaction open, which would keep everybody else from writing.
                        database.close()
                        raise
            except (diskcache.Timeout, sqlite3.OperationalError) as error:
                if not _is_busy(error) or time.monotonic() >= deadline:
                    raise

    def _touch(self, key: bytes) -> None:
        with self._lock:
            database = self._opened()
            try:
                database._sql(_TOUCH, (clock.wall(), key))  # noqa: SLF001 - one statement, and no way for it in diskcache
            except sqlite3.OperationalError:
                # Another process writes: this hit does not count for the order of eviction.
                return

    def _opened(self) -> _Database:
        self._open()
        if self._database is None:
            msg = f"{self.folder} cannot be written to"
            raise PermissionError(msg)
        return self._database

    def _open(self) -> sqlite3.Connection:
        with self._lock:
            if self._reading is None:
                # Looked at each time: after a fork, or an hour, another folder may have been put into its place.
                try:
                    with held_private_folder(self._root(), self._name, "cache_options={'cache_dir': …}") as folder:
                        self._reading = self._connected(folder)
                        self._cursor = self._reading.cursor()
                except UnsafeCacheError:
                    # It may have been exchanged while it was opened.
                    self._disconnect()
                    self._database = None
                    raise
                self.rest.end()
                _note_opened(self)
            return self._reading

    def _connected(self, folder: Path) -> sqlite3.Connection:
        """A connection for reading; one for writing is made where that is possible."""
        exists = _path(str(folder)).exists()
        if exists and not os.access(folder, os.W_OK):
            self._database = None
            return connect_to_read(folder, _LOCK_SECONDS)
        if self._database is None or not exists:
            self._database = _Database(
                folder,
                self._namespace,
                maxsize=self.maxsize,
                policy=self._policy,
                size_limit=self._size_limit,
            )
        self._locks = self._locks or key_locks(folder)
        return connect(str(folder), _LOCK_SECONDS)


_open_stores: deque[weakref.ref[DiskStore]] = deque()


def _note_opened(store: DiskStore) -> None:
    _open_stores.append(weakref.ref(store))
    while len(_open_stores) > _MOST_OPEN:
        first = _open_stores.popleft()()
        if first is not None and first is not store:
            first.hibernate()


def _grave(key: bytes) -> bytes:
    return key + b"!"


def _past_of(key: bytes, sql: Callable[..., Any]) -> tuple[int, list[Any]]:
    """What changes when the entry of a key is forgotten, by any process: no clock is asked, which could be set back."""
    return _generation(sql), sql(_GRAVE, (_grave(key),)).fetchall()


def _generation(sql: Callable[[str], Any]) -> int:
    """How often the namespace was cleared; SQLite keeps this number for whoever wants it."""
    ((generation,),) = sql("PRAGMA user_version").fetchall()
    return int(generation)
