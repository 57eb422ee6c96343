"""What importing costs, in processes of their own."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from typing import Any

MODULES = ("tenacity", "opero", "loguru", "asyncio")


def tables() -> list[Any]:
    """All tables of this group."""
    return [("import, beside an empty process", [(name, functools.partial(import_time, name)) for name in MODULES])]


def import_time(module: str) -> float:
    """Seconds by which a process that imports ``module`` takes longer than one that does not."""
    return process_time(f"import {module}") - process_time("pass")


def process_time(code: str) -> float:
    """Seconds that a new interpreter needs for ``code``."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started
