"""Draws what `run.py` has measured: one SVG for each table, which says when, where and how it was measured."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

WIDTH = 5.4  # inches: on a phone the text is still to be read
ROW, HEAD, FOOT = 0.4, 0.45, 0.75
OPERO, OTHERS = "#2962ff", "#9aa5b1"
LONGEST_LINE = 88


def draw(title: str, amounts: Mapping[str, float], told: Callable[[float], str], how: str, folder: Path) -> Path:
    """Draw one table; return the file.

    Args:
        title: Of the table.
        amounts: What was measured of each row, by its name.
        told: Writes an amount with its unit.
        how: Which of several measurements it is, and by which command.
        folder: Where the file goes; its name is made from the title.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = len(amounts)
    height = HEAD + ROW * rows + FOOT
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(WIDTH, height), facecolor="white")
        axes = figure.add_axes((0.02, FOOT / height, 0.96, ROW * rows / height))
        axes.set(xlim=(0, 1.25 * max(amounts.values())), ylim=(rows - 0.5, -0.5))
        axes.axis("off")
        for place, (name, amount) in enumerate(amounts.items()):
            is_ours = name.startswith(("opero", "opmap", "all four", "RateLimiter"))
            color = OPERO if is_ours else OTHERS
            axes.barh(place + 0.18, amount, height=0.34, color=color)
            axes.text(0, place - 0.16, name, va="center", weight="bold" if is_ours else "normal")
            axes.text(amount, place + 0.18, f" {told(amount)}", va="center", color="#333333")
        figure.text(0.02, 1 - 0.2 / height, title, va="center", size=10.5, weight="bold")
        figure.text(0.02, 0.1 / height, _circumstances(amounts, how), va="bottom", size=6.5, color="#555555")
        file = folder / f"{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.svg"
        figure.savefig(file, format="svg", metadata={"Date": None, "Title": title})
    return file


def _circumstances(names: Mapping[str, object], how: str) -> str:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    when = dt.datetime.now(dt.UTC).date().isoformat()
    where = f"{_cpu()}, {cpus} cores, {platform.system()}, Python {platform.python_version()}"
    lines = [f"{when}. {where}.", f"{', '.join(_versions(names))}.", how]
    return "\n".join(textwrap.fill(line, LONGEST_LINE) for line in lines)


def _cpu() -> str:
    told = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", told.read_text(), re.MULTILINE) if told.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _versions(names: Mapping[str, object]) -> list[str]:
    """Of opero, and of the packages that the names of the rows begin with."""
    packages = importlib.metadata.packages_distributions()
    words = [re.findall(r"[\w-]+", name)[0] for name in names]
    spelled = [spelling for word in words for spelling in (word.replace("-", "_"), word.partition("-")[0])]
    found = ["opero", *(packages[word][0] for word in spelled if word in packages)]
    return [f"{name} {importlib.metadata.version(name)}" for name in dict.fromkeys(found)]
