"""How far a map has come: a bar, lines in the log, or what the program makes of it."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from opero.core.checks import check_callable, check_mapping, wrong_type
from opero.core.clock import clock
from opero.core.interrupts import Hold
from opero.utils.logging import log
from opero.utils.notes import duration

if TYPE_CHECKING:
    from collections.abc import Callable

ProgressOption: TypeAlias = "bool | str | Mapping[str, Any] | Callable[..., Any]"

# Seconds until the first line in the log, and the longest time without one.
_FIRST_LINE = 10.0
_LONGEST_SILENCE = 600.0


@dataclass(slots=True)
class Tally:
    """Items of one map: those that have ended, and how many of them failed or came from the cache.

    ``retried`` are those that needed more than one round, ended or not; ``total`` is None where it is not known.
    """

    finished: int = 0
    failed: int = 0
    retried: int = 0
    cached: int = 0
    total: int | None = None


class Progress:
    """Where nobody would see a bar: a line in the log now and then, at longer and longer intervals."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._interval = _FIRST_LINE
        self._begun = clock.now()
        self._due = self._begun + self._interval

    def show(self, tally: Tally) -> None:
        """The map has come so far."""
        now = clock.now()
        if now >= self._due:
            self._interval = min(2 * self._interval, _LONGEST_SILENCE)
            self._due = now + self._interval
            whole = "" if tally.total is None else f" of {tally.total}"
            took = duration(now - self._begun)
            log("INFO", "{}: {}{} items done in {}, {} failed", self._name, tally.finished, whole, took, tally.failed)

    def close(self) -> None:
        """The map has ended."""


class ToldProgress(Progress):
    """A function of the program's that is called with each new `Tally`."""

    def __init__(self, tell: Callable[[Tally], object]) -> None:
        self._tell = tell
        self._last: Tally | None = None

    def show(self, tally: Tally) -> None:
        if tally != self._last:
            self._last = replace(tally)
            self._tell(replace(tally))


class TqdmProgress(ToldProgress):
    """A bar of tqdm's."""

    def __init__(self, kind: type[Any], options: Mapping[str, Any]) -> None:
        import multiprocessing

        super().__init__(self._draw)
        start_method = multiprocessing.get_start_method(allow_none=True)
        # tqdm's monitor is a thread that would outlive the map.
        self._bar: Any = type("Bar", (kind,), {"monitor_interval": 0})(**options)
        if start_method is None:
            # tqdm makes a lock, by which the system's own start method counts as chosen by the program.
            multiprocessing.set_start_method(None, force=True)
        self._turns_red = "colour" not in options and not os.environ.get("NO_COLOR")

    def _draw(self, tally: Tally) -> None:
        if self._bar.disable:
            return
        # tqdm does not give its lock back, which is the same for all bars, when Ctrl-C comes while it draws.
        with Hold():
            if tally.failed and self._turns_red:
                self._bar.colour = "red"
            notes = {"failed": tally.failed, "retried": tally.retried, "cached": tally.cached}
            notes = {name: count for name, count in notes.items() if count}
            self._bar.set_postfix(notes, refresh=bool(notes) and tally.finished == self._bar.n)
            self._bar.update(tally.finished - self._bar.n)

    def close(self) -> None:
        if not self._bar.disable:
            # The last line stays above the bars of other maps: else those would leave parts of themselves behind.
            with Hold(), self._bar.external_write_mode(file=self._bar.fp):
                self._bar.close()


def check_progress(progress: Any) -> None:
    """Refuse what is neither a flag, a label, options of a bar, nor something to call."""
    if isinstance(progress, Mapping):
        check_mapping("progress", progress)
    elif callable(progress):
        if not _is_bar(progress):
            check_callable("progress", progress, "a function of one tally, or a class such as tqdm.rich.tqdm")
    elif not isinstance(progress, (bool, str)):
        raise wrong_type(
            "progress", progress, "True, False, a label, a mapping of tqdm's options, a function or a class like tqdm"
        )


def make_progress(progress: ProgressOption, name: str, total: int | None) -> Progress | None:
    """What the ``progress`` option asks for, labelled by it or by the function's name, if anybody would see that."""
    if callable(progress) and not _is_bar(progress):
        return ToldProgress(progress)
    if progress is False or _is_child_process():
        return None
    options: dict[str, Any] = {"desc": progress if isinstance(progress, str) else name, "total": total, "unit": "item"}
    kind: Any = progress if callable(progress) else None
    if isinstance(kind, functools.partial):
        options.update(kind.keywords)
        kind = kind.func
    elif isinstance(progress, Mapping):
        options.update(progress)
    if not (_is_in_notebook() or is_terminal(sys.stderr) or options.get("disable", True) is False):
        return Progress(options["desc"])
    if kind is None:
        with warnings.catch_warnings():
            # In a notebook without ipywidgets: there it is a bar of text.
            warnings.filterwarnings("ignore", "IProgress not found")
            from tqdm.auto import tqdm as kind
    return TqdmProgress(kind, options)


def _is_bar(progress: Any) -> bool:
    """Whether it is a class like tqdm's, or a partial of one."""
    kind = progress.func if isinstance(progress, functools.partial) else progress
    return isinstance(kind, type) and hasattr(kind, "update") and hasattr(kind, "set_postfix")


def _is_in_notebook() -> bool:
    """Whether a Jupyter kernel runs this, which shows what is written to stderr below the cell."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def is_terminal(stream: Any) -> bool:
    """Whether somebody sees at once what is written there."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError):  # something like a file, or a file that is closed
        return False


def _is_child_process() -> bool:
    """Whether other processes, such as those of an outer map, write to the same terminal: their bars would mix."""
    libraries = [sys.modules.get(f"{name}.process") for name in ("multiprocessing", "multiprocess")]
    return any(library is not None and library.parent_process() is not None for library in libraries)
