"""Starts Python programs as `python -W error` does, but sooner: as forks of a process that has imported what they need.

Nothing of opero is imported before. Where the environment asks the interpreter for something, as a hash seed, a new one
is started.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

# What opero and its caches import, apart from each other.
_MODULES = [
    "asyncio",
    "concurrent.futures.process",
    "inspect",
    "multiprocessing.forkserver",
    "sqlite3",
    "cloudpickle",
    "dill",
    "diskcache",
    "joblib",
    "klepto",
    "loguru",
    "multiprocess.pool",
    "numpy",
    "pathos",
    "platformdirs",
    "pydantic",
    "redis.asyncio",
    "tenacity",
    "tqdm",
]
_LARGEST_REQUEST = 1 << 20


class ProgramServer:
    """The process that forks; `start` may be called until `close`."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                # Threads of numpy's own would not be there in the forks.
                [sys.executable, "-W", "error", __file__, str(theirs.fileno())],
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def start(
        self, arguments: Sequence[str], *, cwd: Path, env: dict[str, str], stdin: int, stdout: int, stderr: int
    ) -> StartedProgram | subprocess.Popen[bytes]:
        """Start ``PATH ARGUMENT ...`` or ``-m MODULE ARGUMENT ...``."""
        if any(name.startswith("PYTHON") and env[name] != os.environ.get(name) for name in env):
            command = [sys.executable, "-W", "error", *arguments]
            return subprocess.Popen(command, cwd=cwd, env=env, stdin=stdin, stdout=stdout, stderr=stderr)
        told, tells = os.pipe()
        request = json.dumps([list(arguments), str(cwd), env]).encode()
        socket.send_fds(self._requests, [request], [stdin, stdout, stderr, tells])
        os.close(tells)
        return StartedProgram(told)

    def run(self, arguments: Sequence[str], *, cwd: Path, env: dict[str, str], seconds: float) -> Any:
        """As `subprocess.run`, with nothing to read and with all output captured as text."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, Path(os.devnull).open() as nothing:
            files = {"stdin": nothing.fileno(), "stdout": out.fileno(), "stderr": err.fileno()}
            program = self.start(arguments, cwd=cwd, env=env, **files)
            program.wait(seconds)
            return subprocess.CompletedProcess(arguments, program.returncode, _text(out), _text(err))

    def close(self) -> None:
        self._requests.close()
        self.process.wait()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


class StartedProgram:
    """Has of `subprocess.Popen` what the tests use."""

    def __init__(self, told: int) -> None:
        self._told = os.fdopen(told)
        self.pid = int(self._told.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float) -> int:
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a program", timeout)
            self.returncode = int(self._told.readline())
            self._told.close()
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


# The process that forks


def _serve(requests: socket.socket) -> tuple[list[str], str] | None:
    """Start what is asked for; gives its arguments to each program, and None to the server at its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, files, _, _ = socket.recv_fds(requests, _LARGEST_REQUEST, 4)
        if not request:
            return None
        if os.fork() == 0:
            requests.close()
            return _become(json.loads(request), files)
        for file in files:
            os.close(file)


def _become(request: list[Any], files: list[int]) -> tuple[list[str], str]:
    arguments, cwd, env = request
    *standard, tells = files
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        for file in standard:
            os.close(file)
        os.write(tells, f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        os.write(tells, f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    os.close(tells)
    for number, file in enumerate(standard):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    return arguments, cwd


def _run(arguments: list[str], cwd: str) -> None:
    """Be the program; what it raises is shown by the interpreter."""
    if arguments[0] == "-m":
        sys.path[0] = cwd
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    path = arguments[0]
    sys.path[0] = str(Path(path).parent)
    sys.argv = arguments
    # It stays the main module until the interpreter has ended.
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = path
    exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)


def _main() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in _MODULES:
            importlib.import_module(module)
    # What lives as long as the programs do is not looked through again in each.
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        program = _serve(requests)
    if program is not None:
        _run(*program)


if __name__ == "__main__":
    _main()
