"""What importing costs, in processes of their own."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

# Compiled once, as after any installation, wherever the caller's settings would keep bytecode from being written.
BYTECODE = tempfile.TemporaryDirectory()
ENVIRONMENT = {**os.environ, "PYTHONPYCACHEPREFIX": BYTECODE.name, "PYTHONDONTWRITEBYTECODE": ""}
MODULES = ("tenacity", "opero", "loguru", "asyncio")


def tables() -> list[Any]:
    """All tables of this group."""
    for module in MODULES:
        process_time(f"import {module}")
    return [("import, beside an empty process", [(name, functools.partial(import_time, name)) for name in MODULES])]


def import_time(module: str) -> float:
    """Seconds by which a process that imports ``module`` takes longer than one that does not."""
    return process_time(f"import {module}") - process_time("pass")


def process_time(code: str) -> float:
    """Seconds that a new interpreter needs for ``code``."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)
    return time.perf_counter() - started
