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
from opero.core.stores.disk import COUNT, DATABASE, connect_to_read, is_of_this_format
from opero.core.stores.lasting import slug
from opero.exceptions import OperoError, UnsafeCacheError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from pathlib import Path

_OPTION = "--cache-dir"


@dataclass
class Namespace:
    """One folder of a disk cache.

    With a ``problem``, ``name`` and ``entries`` are not known; of one that another version of opero made, which is
    emptied when it is used next, the name is not.
    """

    folder: Path
    size: int = 0
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
    except FileNotFoundError:
        return []
    except UnsafeCacheError:
        raise
    except OSError as error:
        raise OperoError(f"the folder {root} cannot be read: {error.strerror}") from error
    return [_namespace(folder) for folder in sorted(folders)]


def _may_have_entries(folder: Path) -> bool:
    # Of one that cannot be entered a line that tells why is better than none.
    return os.path.lexists(folder / DATABASE) or (folder.is_dir() and not os.access(folder, os.X_OK))


def _namespace(folder: Path) -> Namespace:
    found = Namespace(folder)
    try:
        refuse_unsafe(folder, _OPTION)
        with contextlib.suppress(OSError):
            # Another process may take a file away meanwhile.
            found.size = sum(file.lstat().st_size for file in folder.iterdir() if stat.S_ISREG(file.lstat().st_mode))
        _look_into(found)
    except UnsafeCacheError as error:
        found.problem = str(error)
    except (sqlite3.Error, OSError, AttributeError, UnicodeDecodeError) as error:
        found.problem = f"cannot be read ({describe(error)})"
    return found


def _look_into(found: Namespace) -> None:
    database = found.folder / DATABASE
    if not stat.S_ISREG(database.lstat().st_mode):
        found.problem = f"cannot be read ({DATABASE} is not a file)"
        return
    with contextlib.closing(connect_to_read(found.folder)) as connection:
        if not is_of_this_format(connection):
            found.entries = 0
            return
        ((name,),) = connection.execute("SELECT namespace FROM Settings").fetchall()
        ((entries,),) = connection.execute(COUNT, (clock.wall(),)).fetchall()
    told = name.decode("utf-8", "surrogatepass")
    if slug(told) == found.folder.name:
        found.name, found.entries = told, entries
    else:
        found.problem = "is not the folder of the namespace that it tells"
