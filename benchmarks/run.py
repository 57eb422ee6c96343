"""Measure opero beside its peers, in one run, and print ratios.

``python benchmarks/run.py [group …] [--repeat N] [--plot FOLDER]``; a group is ``calls``, ``caches``, ``limits``,
``maps``, ``imports`` or, only when it is asked for, ``clusters``, which needs both engines. Machines differ and are
shared: trust the ratio to the peer in the same group, not a single time.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GROUPS = ("calls", "caches", "limits", "maps", "imports")
# Those that need more than the others: they run when they are named.
MORE_GROUPS = ("clusters",)

# A benchmark measures once and gives seconds; the first of its table is what the others are compared with. A third part
# of a table is the unit of what is measured, if that is not seconds.
Row = tuple[str, "Callable[[], float]"]
Table = tuple[str, "Sequence[Row]"] | tuple[str, "Sequence[Row]", str]


def main() -> None:
    """Run the chosen groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    more = f"(default: all but {', '.join(MORE_GROUPS)})"
    parser.add_argument("groups", nargs="*", default=GROUPS, help=f"any of {', '.join(GROUPS + MORE_GROUPS)} {more}")
    parser.add_argument("--repeat", type=int, default=5, help="measurements of each row (default: 5)")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw an SVG of each table into this folder")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.groups) - set(GROUPS + MORE_GROUPS))
    if unknown:
        parser.error(f"unknown group {unknown[0]!r}; write any of {', '.join(GROUPS + MORE_GROUPS)}")
    sys.path.insert(0, str(Path(__file__).parent))
    for group in arguments.groups:
        for title, rows, *unit in importlib.import_module(f"bench_{group}").tables():
            times = show(title, rows, arguments.repeat, *unit)
            if arguments.plot is not None:
                from plots import draw

                # What else the machine does makes a time longer, and never shorter.
                best, which = (median, "median") if unit else (min, "best")
                amounts = {name: best(measured) for name, measured in times.items()}
                command = f"python benchmarks/run.py {group} --repeat {arguments.repeat} --plot …"
                draw(
                    title,
                    amounts,
                    functools.partial(_shown, unit=unit[0] if unit else "s"),
                    f"{which} of {arguments.repeat}: {command}",
                    arguments.plot,
                )


def show(title: str, rows: Sequence[Row], repeat: int, unit: str = "s") -> dict[str, list[float]]:
    """Measure a table, the rows in turn so that all share the machine's moods, print it, and return the times."""
    times: dict[str, list[float]] = {name: [] for name, _ in rows}
    for _ in range(repeat):
        for name, measure in rows:
            times[name].append(measure())
    best = max if unit.endswith("/s") else min
    base = median(times[rows[0][0]])
    print(f"\n{title}\n{'':44} {'median':>12} {'best':>12} {'ratio':>8}")
    for name, seconds in times.items():
        middle = median(seconds)
        print(f"  {name:42} {_shown(middle, unit):>12} {_shown(best(seconds), unit):>12} {middle / base:8.2f}")
    return times


def _shown(amount: float, unit: str = "s") -> str:
    return _time(amount) if unit == "s" else f"{amount:.3g} {unit}"


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


if __name__ == "__main__":
    main()
