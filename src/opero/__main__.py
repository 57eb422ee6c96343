"""``python -m opero``: what opero finds on this machine, and what lies in the disk cache."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import platform
import sqlite3
import stat
import sys
from typing import TYPE_CHECKING, Any

from opero import __version__
from opero.core.checks import nearest
from opero.core.clock import clock
from opero.core.faults import managing
from opero.core.private_folder import refuse_unsafe
from opero.core.stores.disk import COUNT, DATABASE, DiskStore, connect_to_read, disk_folder, is_of_this_format
from opero.core.stores.lasting import slug
from opero.core.stores.settings import flat_cache
from opero.exceptions import OperoError, UnsafeCacheError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_DONE, _FAILED = 0, 1
_OPTION = "--cache-dir"

# What opero uses or knows of.
_PACKAGES = (
    *("twat-cache", "redis", "tenacity", "asynciolimiter", "twat-mp", "cloudpickle", "distributed", "ray", "tqdm"),
    *("loguru", "numpy", "pandas", "httpx", "requests", "aiohttp"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those of the command line by default.

    Returns:
        0, or 1 if the cache, or a namespace of it, is not safe, cannot be read, or cannot be cleared.

    Raises:
        SystemExit: With 2 if the arguments are wrong or ``--clear`` names no namespace, with 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m opero",
        description="Show what opero finds on this machine and what lies in the disk cache; nothing is changed.",
    )
    parser.add_argument("--clear", metavar="NAMESPACE", help="instead, remove all entries of one namespace")
    parser.add_argument(_OPTION, metavar="DIR", help="the cache_dir of cache_options, if not the default")
    parser.add_argument("--folder-name", metavar="NAME", help="the folder_name of cache_options, if not the default")
    given = parser.parse_args(arguments)
    # Names of namespaces and folders may hold anything.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    places = {"cache_dir": given.cache_dir, "folder_name": given.folder_name}
    options = {name: value for name, value in places.items() if value is not None}
    try:
        folder = disk_folder(flat_cache(cache_backend="disk", cache_options=options))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    try:
        return _show(folder) if given.clear is None else _clear(parser, folder, options, given.clear)
    except OperoError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return _FAILED


def _show(root: Path) -> int:
    print(f"opero {__version__}, Python {platform.python_version()} ({sys.executable})\n")
    for package in _PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<14}  {version}")
    print(f"\nDisk cache: {root}")
    rows = [_row(folder) for folder in _namespaces_in(root)]
    if not rows:
        print("empty")
        return _DONE
    print(f"{'entries':>10}  {'bytes':>14}  namespace")
    for entries, size, name in sorted(rows, key=lambda row: row[2]):
        print(f"{entries:>10}  {size:>14}  {_printable(name)}")
    print(f"{'':>10}  {sum(size for _, size, _ in rows):>14}  in all")
    return _FAILED if any(entries == "?" for entries, _, _ in rows) else _DONE


def _clear(parser: argparse.ArgumentParser, root: Path, options: dict[str, Any], name: str) -> int:
    found = _namespaces_in(root)
    if slug(name) not in [folder.name for folder in found]:
        near = nearest(name, [told for _, _, told in map(_row, found)])
        hint = "leave out --clear to see which it has" if near is None else f"did you mean {_printable(near)}?"
        parser.error(f"--clear: no namespace {_printable(name)} in {root}; {hint}")
    store = DiskStore(flat_cache(cache_backend="disk", cache_options=options), name)
    with managing(store, "clear"):
        store.clear()
    store.close()
    print(f"cleared {_printable(name)}")
    return _DONE


def _printable(text: str) -> str:
    """The text, or its repr where it could not be seen, or taken for a command by a terminal."""
    return text if text and text.isprintable() else ascii(text)


# What lies in the cache, found out without making, changing or unpickling anything


def _namespaces_in(root: Path) -> list[Path]:
    try:
        refuse_unsafe(root, _OPTION)
        # Of one that cannot be entered a line that tells why is better than none.
        folders = [each for each in root.iterdir() if each.is_dir()]
        return [each for each in folders if os.path.lexists(each / DATABASE) or not os.access(each, os.X_OK)]
    except FileNotFoundError:
        return []
    except UnsafeCacheError:
        raise
    except OSError as error:
        raise OperoError(f"the folder {root} cannot be read: {error.strerror}") from error


def _row(folder: Path) -> tuple[str, int, str]:
    """The entries of a namespace, its bytes and its name; with a remark where the name is not known."""
    size = 0
    try:
        refuse_unsafe(folder, _OPTION)
        # Another process may take a file away meanwhile.
        with contextlib.suppress(FileNotFoundError):
            size = sum(file.lstat().st_size for file in folder.iterdir() if stat.S_ISREG(file.lstat().st_mode))
        with contextlib.closing(connect_to_read(folder)) as connection:
            if not is_of_this_format(connection):
                # It is emptied when it is used next.
                return "0", size, f"{folder.name}: made by another version of opero"
            ((name,),) = connection.execute("SELECT namespace FROM Settings").fetchall()
            ((entries,),) = connection.execute(COUNT, (clock.wall(),)).fetchall()
            return str(entries), size, name.decode("utf-8", "surrogatepass")
    except UnsafeCacheError as error:
        return "?", size, f"{folder.name}: {error}"
    except (sqlite3.Error, OSError, ValueError) as error:
        return "?", size, f"{folder.name}: cannot be read ({describe(error)})"


if __name__ == "__main__":
    sys.exit(main())
