"""Notes on exceptions."""

from __future__ import annotations

import contextlib


def add_note(error: BaseException, note: str, *, instead_of: str | None = None) -> None:
    """Add a note, in place of earlier ones that begin with ``instead_of``; never raises.

    One exception object can end many calls, and shall tell the story of the last one only. Some exceptions refuse
    attributes; a note is no reason to lose them.
    """
    with contextlib.suppress(Exception):
        if instead_of is not None:
            drop_notes(error, instead_of)
        error.add_note(note)


def drop_notes(error: BaseException, beginning: str) -> None:
    """Remove the notes that begin so; never raises."""
    with contextlib.suppress(Exception):
        if hasattr(error, "__notes__"):
            error.__notes__ = [note for note in error.__notes__ if not str(note).startswith(beginning)]


def describe(error: BaseException) -> str:
    """Class and text of an exception, whatever its ``__str__`` does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - the user's code
        return type(error).__name__
