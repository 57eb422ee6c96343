"""The fork server of multiprocessing, whose workers shall be as those that are started afresh, only sooner."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from multiprocessing import forkserver, process, spawn
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from opero.concurrency.main_module import MAINS, is_imported_again
from opero.concurrency.preloading import PRELOADS, put_back

if TYPE_CHECKING:
    from collections.abc import Iterable

# What a server imports whose workers are opero's business; any other list is the program's choice.
_PRELOADED = ["__main__", "opero.concurrency.preloading"]
# pytest sets it anew for each test.
_ALWAYS_NEW = {"PYTEST_CURRENT_TEST"}
# Folders of modules that nobody changes while a program runs: Python's own, and those of installed packages.
_PYTHON = Path(os.__file__).parent
_INSTALLED = {"site-packages", "dist-packages"}


class _Server:
    """The server that opero has started last."""

    def __init__(self) -> None:
        # Those before it, which serve the processes that they have forked, by their ids: what they live by, None for
        # those that may end.
        self._replaced: dict[int, int | None] = {}
        self._pid: int | None = None
        # What a worker that is started afresh would have met when it was started.
        self._environ: dict[str, str] = {}
        self._files: dict[Path, tuple[int, int]] = {}
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """It belongs to the parent; a process that was forked has its own."""
        known()["_forkserver_pid"] = self._pid = None
        self._replaced.clear()

    def has_changed(self) -> bool:
        """Whether another one runs, or its workers would not know of what has changed meanwhile."""
        is_there = self._pid is not None and self._pid == known()["_forkserver_pid"]
        return not is_there or (self._environ, self._files) != (_environ(), _changes(self._files))

    def replace(self, modules: list[str]) -> None:
        """Start another one, which imports the modules from where this program has them.

        It is a program of its own, whose first folder of modules would be the current one, with whatever is there.
        """
        made = forkserver.ForkServer()
        made.set_forkserver_preload(_PRELOADED)
        path = [part for part in spawn.get_preparation_data("fork server")["sys_path"] if isinstance(part, str)]
        told = {"PYTHONSAFEPATH": "1"}
        package = Path(__file__).parents[2]
        if not _INSTALLED.intersection(package.parts):
            # Only this program may know where opero is.
            told["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(package)])
        before = {name: os.environ.get(name) for name in told}
        os.environ.update({**told, PRELOADS: json.dumps([os.getpid(), path, modules, before])})
        paths = sys.path[:]
        try:
            # A `Path` among them, which an import passes over, would be code there (gh-145898).
            sys.path[:] = path
            made.ensure_running()
        finally:
            sys.path[:] = paths
            put_back({**before, PRELOADS: None})
        self._let_go()
        server = known()
        if server["_forkserver_pid"] is not None:
            self._replaced[server["_forkserver_pid"]] = server["_forkserver_alive_fd"]
        # Not to none in between: somebody else may be about to start a process.
        server.update((name, value) for name, value in vars(made).items() if name not in {"_lock", "_inherited_fds"})
        self._pid = server["_forkserver_pid"]
        named = [_attributes(module).get("__file__") for module in list(sys.modules.values())]
        files = [Path(file) for file in named if isinstance(file, str)]
        self._files = _changes(f for f in files if not (_INSTALLED.intersection(f.parts) or f.is_relative_to(_PYTHON)))
        self._environ = _environ()

    def _let_go(self) -> None:
        """Let those end that were replaced, as soon as their processes have; the program asks for exit codes of its.

        The newest one may just be starting a process that the program does not list yet.
        """
        for pid, alive in list(self._replaced.items())[:-1]:
            # Not by `active_children`, which may read an exit code that the program is just reading.
            if alive is not None and not process._children:  # type: ignore[attr-defined]  # noqa: SLF001
                os.close(alive)
                self._replaced[pid] = None
            # Somebody else may have waited for it.
            with contextlib.suppress(ChildProcessError):
                if not os.waitpid(pid, os.WNOHANG)[0]:
                    continue
            del self._replaced[pid]


_server = _Server()


def known() -> dict[str, Any]:
    """What multiprocessing knows of its fork server."""
    return vars(forkserver._forkserver)  # noqa: SLF001 - there is no function that tells


def be_fit_for(module: str) -> None:
    """Have a fork server that knows what each worker needs for a function of that module.

    One that the program has started or set up stays as it is. One that opero has started is replaced when variables of
    the environment, or files of modules that are not installed, have changed since: its workers would not know of that.
    """
    server = known()
    is_of_the_program = server["_preload_modules"] != _PRELOADED and (
        server["_forkserver_pid"] is not None or server["_preload_modules"] != ["__main__"]
    )
    if not is_of_the_program and _server.has_changed():
        _server.replace(_modules_for(module))


def _modules_for(module: str) -> list[str]:
    """Those that each worker imports; not the main one, which a fork server finds from Python 3.14 on (gh-126631)."""
    modules = {"opero.concurrency.process_worker", module}
    if module in MAINS and is_imported_again():
        # By their types: a proxy says that it is another thing, or raises.
        named = [(type(value), value) for value in vars(sys.modules["__main__"]).values()]
        modules |= {value.__name__ for kind, value in named if issubclass(kind, ModuleType)}
        modules |= {value.__module__ for kind, value in named if issubclass(kind, (type, FunctionType))}
    found = {name: _attributes(sys.modules[name]) for name in modules.difference(MAINS).intersection(sys.modules)}
    # A module that maps while it is imported would do so in the server, too.
    return [name for name, its in found.items() if not getattr(its.get("__spec__"), "_initializing", False)]


def _attributes(module: Any) -> dict[str, Any]:
    # Whatever else a program has put among its modules may answer to anything.
    return vars(module) if isinstance(module, ModuleType) else {}


def _environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _ALWAYS_NEW}


def _changes(files: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """When files were changed, and their sizes."""
    changes = {}
    for file in files:
        try:
            found = file.stat()
        except OSError:
            changes[file] = 0, 0
        else:
            changes[file] = found.st_mtime_ns, found.st_size
    return changes
