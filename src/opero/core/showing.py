"""What messages, logs and representations may show of values, any of which may be a secret: numbers and names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.core.signature import name_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

_HIDDEN = "…"
_NUMBERS = (bool, int, float, type(None))
_CONTAINERS = (list, tuple, dict, set, frozenset)


def shown(value: Any) -> str:
    """A number as it is, a function or class by its name, an empty text; nothing of anything else."""
    if type(value) in _NUMBERS:
        try:
            return repr(value)
        except ValueError:  # an int of thousands of digits
            return _HIDDEN
    if callable(value):
        return name_of(value)
    return "''" if value == "" and isinstance(value, str) else _HIDDEN


def kind_of(value: Any) -> str:
    """The name of its type, of the usual containers with the number of elements."""
    name = type(value).__name__
    return f"{name} of {len(value)}" if type(value) in _CONTAINERS else name


def listed(names: Collection[str]) -> str:
    """Names to choose from."""
    return ", ".join(repr(name) for name in sorted(names))


def nearest(name: str, names: Collection[str]) -> str | None:
    """The one of the names that may have been meant."""
    import difflib

    near = difflib.get_close_matches(name, names, n=1)
    return near[0] if near else None


def brief(value: Any) -> str:
    """The start of a representation: for those who ask for a value at a prompt, and never for a message or a log."""
    import reprlib

    if isinstance(value, float):
        return f"{value:.6g}"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


def html_table(title: str, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table for notebooks, of the starts of representations."""
    import html

    def row(cells: Iterable[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(row(map(brief, cells), "td") for cells in rows)
    return f"<table><caption>{html.escape(title)}</caption>{row(columns, 'th')}{body}</table>"
