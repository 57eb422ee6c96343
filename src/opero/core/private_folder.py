"""Folders in which nobody else can put anything."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from opero.exceptions import UnsafeCacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MODE = 0o700
_WRITABLE = "can be written to by others"
# To look at a folder and to go on into it no right to list it is needed.
_LOOK = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)


def folder_of_user(find: Callable[[], Path]) -> Path:
    """What ``find`` gives; for a user without a home, one among the system's temporary folders."""
    try:
        found = find()
    except RuntimeError:
        found = Path()
    user = f"-{os.geteuid()}" if hasattr(os, "geteuid") else ""  # on Windows each has temporary folders of their own
    return found if found.is_absolute() else Path(tempfile.gettempdir()) / f"opero{user}" / found.name


def private_folder(root: Path, name: str, option: str, *, with_files: bool = True) -> Path:
    """Make the folder if need be, and see that nobody else can put entries there; see `held_private_folder`."""
    with held_private_folder(root, name, option, with_files=with_files):
        return root / name


@contextlib.contextmanager
def held_private_folder(root: Path, name: str, option: str, *, with_files: bool = True) -> Iterator[Path]:
    """Make the folder if need be, see that nobody else can put anything there, and at the end that it is still there.

    Each folder on the way is opened from the one before it and looked at by its descriptor, so that none can be
    exchanged meanwhile. Those up to the user's home or the system's folder for temporary files have to be the user's or
    root's, too: whoever can write to one of them could put another folder into the place of this one.

    ``option`` is what names another root. Without ``with_files`` whoever opens a file has to look whose it is.
    """
    folder = root / name
    if not hasattr(os, "geteuid"):  # Windows: the folders of a user are that user's by default
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    outer = Path(os.path.realpath(root.parent))
    trusted = max((len(place.parts) for place in _trusted_places() if outer.is_relative_to(place)), default=0)
    way = [*outer.parts, root.name, name]
    held = os.open(way[0], _LOOK)
    try:
        for place, part in enumerate(way[1:], 1):
            is_own = place >= len(outer.parts)
            try:
                found = _opened(held, part)
            except OSError as error:
                if is_own and (isinstance(error, NotADirectoryError) or Path(*way[: place + 1]).is_symlink()):
                    raise _unsafe(Path(*way[: place + 1]), "is not a folder", option) from error
                raise
            os.close(held)
            held = found
            if is_own or place >= trusted:
                _refuse_unsafe(os.fstat(held), Path(*way[: place + 1]), option, within=None if is_own else folder)
        if with_files:
            _refuse_foreign_files(held, folder, option)
        yield folder
        if not os.path.samestat(os.fstat(held), folder.stat()):
            raise _unsafe(folder, "was exchanged", option)
    finally:
        os.close(held)


def _trusted_places() -> list[Path]:
    places = [tempfile.gettempdir()]
    with contextlib.suppress(RuntimeError):  # the user has none
        places.append(str(Path.home()))
    # Not the root, which is where users without a home have theirs.
    return [place for place in map(Path, map(os.path.realpath, places)) if len(place.parts) > 1]


def _opened(held: int, part: str) -> int:
    try:
        return os.open(part, _LOOK, dir_fd=held)
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, _MODE, dir_fd=held)
            # The umask may have taken rights of the user's own.
            os.chmod(part, _MODE, dir_fd=held)
        return os.open(part, _LOOK, dir_fd=held)


def fault_of(found: os.stat_result) -> str | None:
    """Why what lies there cannot be trusted, if it cannot."""
    if found.st_uid not in {os.geteuid(), 0}:
        return "belongs to another user"
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    return _WRITABLE if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def refuse_unsafe(folder: Path, option: str) -> None:
    """Raise `UnsafeCacheError` if others own the folder or can write to it."""
    if hasattr(os, "geteuid"):
        _refuse_unsafe(folder.lstat(), folder, option)


def _refuse_unsafe(found: os.stat_result, folder: Path, option: str, *, within: Path | None = None) -> None:
    reason = fault_of(found) if stat.S_ISDIR(found.st_mode) else "is not a folder"
    if reason is None or (within is not None and reason == _WRITABLE and _keeps_others_out(found)):
        return
    if within is None:
        raise _unsafe(folder, reason, option)
    msg = f"opero's folder {within} lies in {folder}, which {reason}, who may exchange it; name another one in {option}"
    raise UnsafeCacheError(msg)


def _keeps_others_out(found: os.stat_result) -> bool:
    """Whether nobody else can exchange what is in a folder that more than its owner can write to."""
    if found.st_mode & (stat.S_ISVTX | stat.S_IWOTH):
        return bool(found.st_mode & stat.S_ISVTX)
    import grp
    import pwd

    with contextlib.suppress(KeyError):
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(found.st_gid)
        # Many systems make a group for each user, with that user's name and no other member.
        return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    return False


def _refuse_foreign_files(held: int, folder: Path, option: str) -> None:
    """Refuse what others have put there, who could once write to it, or can write to now."""
    listed = os.open(".", os.O_RDONLY, dir_fd=held)
    try:
        for name in os.listdir(listed):  # noqa: PTH208 - pathlib knows no descriptors
            # SQLite takes its files away when another process closes the database.
            with contextlib.suppress(FileNotFoundError):
                reason = fault_of(os.stat(name, dir_fd=listed, follow_symlinks=False))
                if reason is not None:
                    raise _unsafe(folder, f"has a file that {reason}", option)
    finally:
        os.close(listed)


def _unsafe(folder: Path, reason: str, option: str) -> UnsafeCacheError:
    # Not to change its mode or owner: what others have put there meanwhile would be trusted then.
    return UnsafeCacheError(
        f"opero's folder {folder} {reason}, so that somebody else may have written what is in it; delete it with all "
        f"that is in it, or name another one in {option}"
    )
