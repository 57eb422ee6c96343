"""A fork server of multiprocessing for the workers of maps: as if they were started afresh, only sooner."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import forkserver
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from opero.concurrency import system
from opero.concurrency.pickling import MAINS
from opero.core.forks import forget_exit_handlers

if TYPE_CHECKING:
    from collections.abc import Iterator

# The variable of the environment that tells a server what to import.
_PRELOADS = "OPERO_PRELOADS"


class Server(forkserver.ForkServer):
    """One for opero's workers only, which has imported these modules; it ends when nobody has this object any more."""

    def __init__(self, modules: set[str]) -> None:
        super().__init__()
        self.modules, self.files, self.owner = modules, _files(), os.getpid()
        self.set_forkserver_preload([__name__])
        before = sys.path[:]
        # An import passes over what is no string; multiprocessing would write a `Path` into code (gh-145898).
        sys.path[:] = [part for part in before if isinstance(part, str)]
        # Its first folder of modules is not the current one, but the program's.
        told = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(sys.path), _PRELOADS: " ".join(modules)}
        environ = {name: os.environ.get(name) for name in told}
        try:
            os.environ.update(told)
            self.ensure_running()
        finally:
            sys.path[:] = before
            for name, value in environ.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def __del__(self) -> None:
        its: dict[str, int] = vars(self)
        if its["_forkserver_pid"] and self.owner == os.getpid():
            os.close(its["_forkserver_alive_fd"])
            with contextlib.suppress(OSError):
                os.kill(its["_forkserver_pid"], signal.SIGTERM)
                os.waitpid(its["_forkserver_pid"], 0)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Let it make the processes that this thread starts in the block."""
        _serving.server = self
        try:
            yield
        finally:
            _serving.server = None


# Whether a thread starts a worker; the program's other threads may start processes of its own meanwhile.
_serving = threading.local()
_connect_to_the_programs = forkserver.connect_to_new_process


def _connect_to_new_process(fds: Any) -> tuple[int, int]:
    server: Server | None = getattr(_serving, "server", None)
    return _connect_to_the_programs(fds) if server is None else server.connect_to_new_process(fds)


forkserver.connect_to_new_process = _connect_to_new_process


# The one that was started last, if there is one.
_latest: list[Server] = []


def server_for(module: str) -> Server:
    """One that has imported what each worker needs for a function of that module, as the files are now."""
    modules = _modules_for(module)
    if _latest:
        server, files = _latest[0], _files()
        if server.owner == os.getpid() and modules <= server.modules and server.files.items() <= files.items():
            return server
    _latest[:] = [Server(modules)]
    return _latest[0]


def _modules_for(module: str) -> set[str]:
    """Those that each worker imports; what the main module imports in place of itself."""
    chosen: list[str] = vars(forkserver._forkserver)["_preload_modules"]  # noqa: SLF001 - nothing else tells
    modules = {"opero.concurrency.process_worker", module, *chosen}
    if module in MAINS:
        # By their types: a proxy says that it is another thing, or raises.
        named = [(type(value), value) for value in vars(sys.modules["__main__"]).values()]
        modules |= {value.__name__ for kind, value in named if issubclass(kind, ModuleType)}
        modules |= {value.__module__ for kind, value in named if issubclass(kind, (type, FunctionType))}
    return modules.intersection(sys.modules).difference(MAINS)


def _files() -> dict[str, int]:
    """When the files of modules were changed."""
    changes = {}
    for module in list(sys.modules.values()):
        # Whatever a program has put there may answer to anything.
        with contextlib.suppress(Exception):
            file = vars(module)["__file__"]
            changes[file] = Path(file).stat().st_mtime_ns
    return changes


def _preload(modules: list[str]) -> None:
    # A module that maps, or starts a process, while it is imported is told to leave that: workers will tell.
    this = multiprocessing.current_process()
    this._inheriting = True  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing does in each process
    for module in modules:
        with contextlib.suppress(Exception, SystemExit):
            importlib.import_module(module)
            # What it has printed is not to be printed by each worker, too.
            sys.stdout.flush()
    del this._inheriting  # type: ignore[attr-defined]  # noqa: SLF001 - as above
    if system.has_other_threads():
        # A worker could find a lock of theirs held for ever; let each import by itself.
        _begin_anew()


def _begin_anew() -> None:
    """Run the program of this server again, without imports."""
    main: Any = sys._getframe()  # noqa: SLF001 - nothing else knows
    while main.f_code is not forkserver.main.__code__:
        main = main.f_back
    its = main.f_locals
    if its.get("authkey") is not None:
        # From Python 3.14 on it has read from a pipe by what it knows its program.
        reader, writer = os.pipe()
        os.write(writer, its["authkey"])
        os.dup2(reader, its["authkey_r"])
    os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - the same


_told = os.environ.pop(_PRELOADS, None)
# Another process that the program has started in that moment has the variable, too.
if _told is not None and any(__name__ in argument for argument in sys.orig_argv):
    _preload(_told.split())
    # Before they import the main module, whose exit handlers are their own.
    os.register_at_fork(after_in_child=forget_exit_handlers)
