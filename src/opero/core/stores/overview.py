"""What lies in a disk cache, found out without making, changing or unpickling anything."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opero.core.clock import clock
from opero.core.private_folder import refuse_unsafe
from opero.core.stores.contract import slug
from opero.core.stores.disk import COUNT, DATABASE, connect_to_read, is_of_this_format
from opero.exceptions import OperoError, UnsafeCacheError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from pathlib import Path

_OPTION = "--cache-dir"


@dataclass(frozen=True)
class Namespace:
    """One folder of a disk cache.

    With a ``problem``, ``name`` and ``entries`` are not known; of one that another version of opero made, which is
    emptied when it is used next, the name is not.
    """

    folder: Path
    size: int
    name: str | None = None
    entries: int | None = None
    problem: str | None = None


def namespaces_in(root: Path) -> list[Namespace]:
    """The namespaces of a disk cache, by folder; none if there is no such folder.

    Raises:
        UnsafeCacheError: If others could have put something there.
        OperoError: If it cannot be read.
    """
    try:
        refuse_unsafe(root, _OPTION)
        folders = [folder for folder in root.iterdir() if _may_have_entries(folder)]
    except UnsafeCacheError:
        raise
    except FileNotFoundError:
        return []
    except OSError as error:
        msg = f"the folder {root} cannot be read: {error.strerror}"
        raise OperoError(msg) from error
    return [_namespace(folder) for folder in sorted(folders)]


def _may_have_entries(folder: Path) -> bool:
    # Of one that cannot be entered a line that tells why is better than none.
    return os.path.lexists(folder / DATABASE) or (folder.is_dir() and not os.access(folder, os.X_OK))


def _namespace(folder: Path) -> Namespace:
    try:
        refuse_unsafe(folder, _OPTION)
        size = _size_of(folder)
        with contextlib.closing(_opened(folder / DATABASE)) as connection:
            if not is_of_this_format(connection):
                return Namespace(folder, size, entries=0)
            ((name,),) = connection.execute("SELECT namespace FROM Settings").fetchall()
            ((entries,),) = connection.execute(COUNT, (clock.wall(),)).fetchall()
        told = name.decode("utf-8", "surrogatepass")
        if slug(told) == folder.name:
            return Namespace(folder, size, told, entries)
        return Namespace(folder, size, problem="is not the folder of the namespace that it tells")
    except UnsafeCacheError as error:
        return Namespace(folder, 0, problem=str(error))
    except (sqlite3.Error, OSError, AttributeError, UnicodeDecodeError) as error:
        return Namespace(folder, _size_of(folder), problem=f"cannot be read ({describe(error)})")


def _opened(database: Path) -> sqlite3.Connection:
    if not stat.S_ISREG(database.lstat().st_mode):
        msg = f"{database.name} is not a file"
        raise OSError(msg)
    return connect_to_read(database.parent)


def _size_of(folder: Path) -> int:
    """Bytes of the files, and of nothing that a link leads to."""
    size = 0
    # Another process may take a file away meanwhile.
    with contextlib.suppress(OSError):
        for entry in [*os.scandir(folder)]:
            found = entry.stat(follow_symlinks=False)
            size += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return size
