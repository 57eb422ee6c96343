"""The fork server of multiprocessing, whose workers shall be as those that are started afresh, only sooner."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver, spawn
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from opero.concurrency.main_module import MAINS, is_imported_again
from opero.concurrency.preloading import PRELOADS, SAFE_PATH

if TYPE_CHECKING:
    from collections.abc import Iterable
    from multiprocessing.process import BaseProcess

# pytest sets it anew for each test.
_ALWAYS_NEW = {"PYTEST_CURRENT_TEST"}
# Folders of modules that nobody changes while a program runs: Python's own, and those of installed packages.
_PYTHON = Path(os.__file__).parent
_INSTALLED = {"site-packages", "dist-packages"}

# The server that opero has started: its id, and what a worker that is started afresh would meet otherwise by now.
_started: tuple[int, dict[str, str], dict[Path, tuple[int, int]]] | None = None
# Processes that it has forked: only it hears how they end.
_its_workers: WeakSet[BaseProcess] = WeakSet()


def known() -> dict[str, Any]:
    """What multiprocessing knows of its fork server."""
    return vars(forkserver._forkserver)  # noqa: SLF001 - there is no function that tells


def is_fit_for(module: str) -> bool:
    """Have a fork server that knows what each worker needs for a function of that module.

    One that opero has started is replaced when variables of the environment, or files of modules that are not
    installed, have changed since: its workers would not know of that.

    Returns:
        Whether there can be one: not while others live that an old one has forked.
    """
    global _started  # noqa: PLW0603 - there is one server
    server = known()
    if server["_forkserver_pid"] is not None:
        if _started is None or server["_forkserver_pid"] != _started[0] or _started[1:] == _met(_started[2]):
            return True
        if multiprocessing.active_children() or any(process.exitcode is None for process in _its_workers):
            return False
        # Not by the end of its pipe, which a child of the program's may have open, too.
        os.kill(server["_forkserver_pid"], signal.SIGTERM)
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # noqa: SLF001 - as above
    elif server["_preload_modules"] == ["__main__"]:
        forkserver.set_forkserver_preload(["__main__", "opero.concurrency.preloading"])
    else:
        # The program has chosen.
        return True
    _start(_modules_for(module))
    _started = server["_forkserver_pid"], *_met(_files_that_may_change())
    return True


def note(process: BaseProcess) -> None:
    """A process has been started by the server."""
    _its_workers.add(process)


def _start(modules: list[str]) -> None:
    """Start the server, which imports the modules from where this program has them.

    It is a program of its own, whose first folder of modules would be the current one, with whatever is there.
    """
    path = spawn.get_preparation_data("fork server")["sys_path"]
    told = json.dumps([path, modules, os.environ.get(SAFE_PATH)])
    before = {name: os.environ.get(name) for name in (PRELOADS, SAFE_PATH)}
    os.environ.update({PRELOADS: told, SAFE_PATH: "1"})
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _modules_for(module: str) -> list[str]:
    """Those that each worker imports; not the main one, which a fork server finds from Python 3.14 on (gh-126631)."""
    modules = {"opero.concurrency.process_worker", module}
    if module in MAINS and is_imported_again():
        named = list(vars(sys.modules["__main__"]).values())
        modules |= {value.__name__ for value in named if isinstance(value, ModuleType)}
        modules |= {value.__module__ for value in named if isinstance(value, (type, FunctionType))}
    found = [sys.modules[name] for name in modules.difference(MAINS).intersection(sys.modules)]
    # A module that maps while it is imported would do so in the server, too.
    return [module.__name__ for module in found if not getattr(module.__spec__, "_initializing", False)]


def _files_that_may_change() -> list[Path]:
    files = [Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))]
    return [file for file in files if not (_INSTALLED.intersection(file.parts) or file.is_relative_to(_PYTHON))]


def _met(files: Iterable[Path]) -> tuple[dict[str, str], dict[Path, tuple[int, int]]]:
    """What a worker that is started afresh meets now: the environment, and when these files were changed."""
    environ = {name: value for name, value in os.environ.items() if name not in _ALWAYS_NEW}
    changes = {}
    for file in files:
        try:
            found = file.stat()
        except OSError:
            changes[file] = 0, 0
        else:
            changes[file] = found.st_mtime_ns, found.st_size
    return environ, changes
