"""What a fork server imports first, so that its workers need not: see `opero.concurrency.fork_server`."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys

# The variables of the environment by which the server is told, which are nobody else's.
PRELOADS = "OPERO_PRELOADS"
# By this one Python leaves the current folder out of those that it finds modules in.
SAFE_PATH = "PYTHONSAFEPATH"


def _preload(path: list[str], modules: list[str], safe_path: str | None) -> None:
    if safe_path is None:
        del os.environ[SAFE_PATH]
    else:
        os.environ[SAFE_PATH] = safe_path
    sys.path[:] = path
    for module in modules:
        # What is wrong with it, a worker that needs it will tell.
        with contextlib.suppress(Exception):
            importlib.import_module(module)


if PRELOADS in os.environ:
    _preload(*json.loads(os.environ.pop(PRELOADS)))
