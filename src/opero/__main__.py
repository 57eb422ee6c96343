"""``python -m opero``: what opero finds on this machine, and what lies in the disk cache."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import platform
import sys
from typing import TYPE_CHECKING, Any

from opero import __version__
from opero.core.faults import managing
from opero.core.stores.lasting import slug
from opero.core.stores.settings import cache_settings
from opero.exceptions import OperoError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from opero.core.stores.overview import Namespace

_DONE, _FAILED = 0, 1

# Package and what it is for, in opero's words for it.
_PACKAGES = (
    ("twat-cache", "cache_backend='disk', 'redis'"),
    ("redis", "cache_backend='redis', pip install 'opero[redis]'"),
    ("tenacity", "retries"),
    ("asynciolimiter", "rate_limit"),
    ("twat-mp", "mode='process', 'thread'"),
    ("cloudpickle", "mode='process'"),
    ("distributed", "mode='dask', pip install 'opero[dask]'"),
    ("ray", "mode='ray', pip install 'opero[ray]'"),
    ("tqdm", "progress"),
    ("loguru", "logging"),
    ("numpy", "arrays as arguments"),
    ("pandas", "frames as arguments"),
    ("httpx", "opero.http"),
    ("requests", "opero.http"),
    ("aiohttp", "opero.http"),
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
    parser = _parser()
    given = parser.parse_args(arguments)
    # Names of namespaces and folders may hold anything.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    places = {"cache_dir": given.cache_dir, "folder_name": given.folder_name}
    options = {name: value for name, value in places.items() if value is not None}
    try:
        folder = cache_settings(backend="disk", options=options).disk_folder()
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    try:
        return _show(folder) if given.clear is None else _clear(parser, folder, options, given.clear)
    except OperoError as error:
        _say(f"{parser.prog}: {error}", sys.stderr)
        return _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m opero",
        description="Show what opero finds on this machine and what lies in the disk cache; nothing is changed.",
    )
    parser.add_argument("--clear", metavar="NAMESPACE", help="instead, remove all entries of one namespace")
    parser.add_argument("--cache-dir", metavar="DIR", help="the cache_dir of cache_options, if not the default")
    parser.add_argument("--folder-name", metavar="NAME", help="the folder_name of cache_options, if not the default")
    return parser


def _show(folder: Path) -> int:
    _say(f"opero {__version__}, Python {platform.python_version()} ({sys.executable})\n")
    width = max(len(package) for package, _ in _PACKAGES)
    versions = [(package, _version(package), use) for package, use in _PACKAGES]
    _say("\n".join(f"{package:<{width}}  {version:<13}  {use}" for package, version, use in versions))
    return _show_cache(folder)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _show_cache(folder: Path) -> int:
    from opero.core.stores.overview import namespaces_in

    _say(f"\nDisk cache: {folder}")
    found = namespaces_in(folder)
    if not found:
        _say("empty")
        return _DONE
    lines = [_line(namespace) for namespace in sorted(found, key=lambda n: (n.name is None, n.name, n.folder))]
    total = sum(namespace.size for namespace in found)
    _say("\n".join([f"{'entries':>10}  {'bytes':>14}  namespace", *lines, f"{'':>10}  {total:>14}  in all"]))
    return _FAILED if any(namespace.problem for namespace in found) else _DONE


def _line(namespace: Namespace) -> str:
    text = namespace.name
    if text is None:
        text = f"{namespace.folder.name}: {namespace.problem or 'made by another version of opero'}"
    entries = "?" if namespace.entries is None else namespace.entries
    return f"{entries:>10}  {namespace.size:>14}  {_printable(text)}"


def _clear(parser: argparse.ArgumentParser, folder: Path, options: dict[str, Any], name: str) -> int:
    from opero.core.stores.overview import namespaces_in

    found = {namespace.folder.name: namespace for namespace in namespaces_in(folder)}
    namespace = found.get(slug(name))
    if namespace is None:
        parser.error(_unknown(name, folder, list(found.values())))
    store = cache_settings(backend="disk", options=options).store(name)
    with managing(store, "clear"):
        store.clear()
    store.close()
    _say(f"cleared {_printable(name)} (entries: {'unknown' if namespace.entries is None else namespace.entries})")
    return _DONE


def _unknown(name: str, folder: Path, found: Sequence[Namespace]) -> str:
    from opero.core.showing import nearest

    near = nearest(name, [namespace.name for namespace in found if namespace.name is not None])
    hint = "leave out --clear to see which it has" if near is None else f"did you mean {_printable(near)}?"
    return f"--clear: no namespace {_printable(name)} in {folder}; {hint}"


def _printable(text: str) -> str:
    """The text, or its repr where it could not be seen, or taken for a command by a terminal."""
    return text if text and text.isprintable() else ascii(text)


def _say(text: str, stream: Any = None) -> None:
    print(text, file=stream or sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
