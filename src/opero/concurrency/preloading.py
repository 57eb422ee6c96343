"""What a fork server imports first, so that its workers need not: see `opero.concurrency.fork_server`."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys

# The variable of the environment by which the server is told, which is nobody else's.
PRELOADS = "OPERO_PRELOADS"


def put_back(environ: dict[str, str | None]) -> None:
    """Give variables of the environment the values that they had; None to those that were not set."""
    for name, value in environ.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _preload(program: int, path: list[str], modules: list[str], environ: dict[str, str | None]) -> None:
    """Be as the ``program`` is, whose workers have this environment; in a worker, only the latter."""
    put_back(environ)
    if os.getppid() != program:
        return
    sys.path[:] = path
    for module in modules:
        # What is wrong with it, a worker that needs it will tell.
        with contextlib.suppress(Exception):
            importlib.import_module(module)


if PRELOADS in os.environ:
    _preload(*json.loads(os.environ.pop(PRELOADS)))
