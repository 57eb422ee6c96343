"""Folders in which nobody else can put anything."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

from opero.exceptions import UnsafeCacheError

if TYPE_CHECKING:
    from pathlib import Path


def private_folder(root: Path, name: str, option: str) -> Path:
    """Make the folder if need be, and see that nobody else can put entries there.

    Args:
        root: The folder of all; made if need be, and looked at as well.
        name: The folder inside.
        option: What the user can write to name another root.

    Raises:
        UnsafeCacheError: If others own it or can write to it.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    for folder in (root, root / name):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        refuse_unsafe(folder, option)
    return root / name


def refuse_unsafe(folder: Path, option: str) -> None:
    """Raise `UnsafeCacheError` if others own the folder or can write to it."""
    if not hasattr(os, "geteuid"):  # Windows: the folders of a user are that user's by default
        return
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        reason = "is not a folder"
    elif found.st_uid != os.geteuid():
        reason = "belongs to another user"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = "can be written to by others"
    else:
        return
    raise _unsafe(folder, reason, option)


def refuse_foreign_files(folder: Path, option: str) -> None:
    """Raise `UnsafeCacheError` if something in the folder belongs to others, who could once write to it."""
    if not hasattr(os, "geteuid"):
        return
    for path in folder.iterdir():
        # SQLite takes its files away when another process closes the database.
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_uid not in {os.geteuid(), 0}:
                raise _unsafe(folder, "has files of another user", option)


def _unsafe(folder: Path, reason: str, option: str) -> UnsafeCacheError:
    # Not to change its mode or owner: what others have put there meanwhile would be trusted then.
    return UnsafeCacheError(
        f"opero's folder {folder} {reason}, so that somebody else may have written what is in it; delete it with all "
        f"that is in it, or name another one in {option}"
    )
