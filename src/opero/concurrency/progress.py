"""The progress bar of a map."""

from __future__ import annotations

from typing import Any, Protocol


class Progress(Protocol):
    """Shows how far a map has come."""

    def show(self, finished: int, failed: int) -> None:
        """So many items have ended, so many of them failed."""
        ...

    def close(self) -> None:
        """The map has ended."""
        ...


class NoProgress:
    """For maps that show nothing."""

    def show(self, finished: int, failed: int) -> None:
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
        from tqdm.std import tqdm as terminal_bar

        class Bar(tqdm):  # type: ignore[type-arg]  # generic for type checkers only
            # tqdm's monitor is a thread that would outlive the map.
            monitor_interval = 0

        # On a terminal tqdm itself finds out whether there is one; a notebook is none and shows the bar all the same.
        in_notebook = not issubclass(tqdm, terminal_bar) or "notebook" in tqdm.__module__
        self._bar: Any = Bar(desc=label, total=total, disable=False if in_notebook else None, unit="item")

    def show(self, finished: int, failed: int) -> None:
        if failed:
            self._bar.set_postfix(failed=failed, refresh=False)
        self._bar.update(finished - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def make_progress(progress: bool | str, name: str, total: int | None) -> Progress:  # noqa: FBT001 - the option's type
    """The bar that the ``progress`` option asks for, labelled by it or by the function's name."""
    if progress is False:
        return NoProgress()
    return TqdmProgress(progress if isinstance(progress, str) else name, total)
