"""The progress bar of a map."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Protocol

from opero.core.interrupts import Hold


@dataclass(slots=True)
class Tally:
    """Items of one map: those that have ended, and how many of them failed or came from the cache.

    ``retried`` are those that needed more than one round, ended or not.
    """

    finished: int = 0
    failed: int = 0
    retried: int = 0
    cached: int = 0


class Progress(Protocol):
    """Shows how far a map has come."""

    def show(self, tally: Tally) -> None:
        """The map has come so far."""
        ...

    def close(self) -> None:
        """The map has ended."""
        ...


class NoProgress:
    """For maps that show nothing."""

    def show(self, tally: Tally) -> None:
        """Nothing to show."""

    def close(self) -> None:
        """Nothing to close."""


class TqdmProgress:
    """A tqdm bar on a terminal or in a notebook, and nothing elsewhere."""

    def __init__(self, label: str, total: int | None) -> None:
        import warnings

        with warnings.catch_warnings():
            # In a notebook without ipywidgets: there it shows no bar, and the map needs none.
            warnings.filterwarnings("ignore", "IProgress not found")
            from tqdm.auto import tqdm

        class Bar(tqdm):  # type: ignore[type-arg]  # generic for type checkers only
            # tqdm's monitor is a thread that would outlive the map.
            monitor_interval = 0

        # A notebook is no terminal, and shows the bar all the same.
        in_notebook = any("notebook" in kind.__module__ for kind in tqdm.__mro__)
        unseen: dict[str, Any] = {} if in_notebook or _is_terminal(sys.stderr) else {"disable": True}
        self._bar: Any = Bar(desc=label, total=total, unit="item", **unseen)
        self._notes: dict[str, int] = {}

    def show(self, tally: Tally) -> None:
        if not self._bar.disable:
            # tqdm does not give its lock back, which is the same for all bars, when Ctrl-C comes while it draws.
            with Hold():
                self._draw(tally)

    def _draw(self, tally: Tally) -> None:
        notes = {"failed": tally.failed, "retried": tally.retried, "cached": tally.cached}
        notes = {name: count for name, count in notes.items() if count}
        if notes != self._notes:
            self._notes = notes
            self._bar.set_postfix(notes, refresh=False)
            if tally.finished == self._bar.n:
                self._bar.refresh()
        self._bar.update(tally.finished - self._bar.n)

    def close(self) -> None:
        if self._bar.disable:
            return
        # The last line stays above the bars of other maps: without this, those would leave parts of themselves behind.
        with Hold(), self._bar.external_write_mode(file=self._bar.fp):
            self._bar.close()


def make_progress(progress: bool | str, name: str, total: int | None) -> Progress:  # noqa: FBT001 - the option's type
    """The bar that the ``progress`` option asks for, labelled by it or by the function's name."""
    if progress is False or sys.stderr is None or _is_child_process():
        return NoProgress()
    return TqdmProgress(progress if isinstance(progress, str) else name, total)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError):  # something like a file, or a file that is closed
        return False


def _is_child_process() -> bool:
    """Whether other processes, such as those of an outer map, write to the same terminal: their bars would mix."""
    libraries = [sys.modules.get(f"{name}.process") for name in ("multiprocessing", "multiprocess")]
    return any(library is not None and library.parent_process() is not None for library in libraries)
