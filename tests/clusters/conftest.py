"""Real clusters of two workers, in a network of their own that has nothing but its loopback.

`python cleanup.py clusters` starts pytest in that network: both engines open ports on all interfaces that there are.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jobs import noted, pid

from opero import opmap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
WORKERS = 2
PATIENCE = 60.0  # seconds for what takes a few


def pytest_configure(config: pytest.Config) -> None:
    interfaces = {name for _, name in socket.if_nameindex()}
    if interfaces - {"lo", "tunl0", "sit0", "ip6tnl0"}:
        pytest.exit("the tests of clusters run in a network of their own: python cleanup.py clusters", 4)
    _bring_up("lo")
    # Ray writes a token below HOME, and its sockets' names may not be long.
    folder = tempfile.mkdtemp(prefix="opero-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ.update(
        HOME=folder,
        TMPDIR=folder,
        PYTHONPATH=os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        RAY_USAGE_STATS_ENABLED="0",
        PYTHONWARNINGS="ignore",
    )
    tempfile.tempdir = folder


def _bring_up(interface: str) -> None:
    # Linux' SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        request = struct.pack("16sh14x", interface.encode(), 0)
        _, flags = struct.unpack("16sh14x", fcntl.ioctl(asked, 0x8913, request))
        fcntl.ioctl(asked, 0x8914, struct.pack("16sh14x", interface.encode(), flags | 1))


class Engine:
    """A cluster with two workers, and maps on it."""

    name = ""
    address = ""

    def options(self, **more: Any) -> dict[str, Any]:
        quick = {} if more.get("retries") == 0 else {"min_delay": 0.01}
        return {"mode": self.name, "progress": False, "return_exceptions": True, **quick, **more}

    def map(self, function: Callable[..., Any], **more: Any) -> Any:
        return opmap(**self.options(**more))(function)

    def pids(self) -> set[int]:
        """The processes that run items now."""
        found: set[int] = set()
        ends = time.monotonic() + PATIENCE
        while len(found) < WORKERS and time.monotonic() < ends:
            found = set(self.map(pid, retries=9)(range(WORKERS * 4), seconds=0.05))
        return found


class Ray(Engine):
    name = "ray"

    @contextlib.contextmanager
    def running(self) -> Iterator[Engine]:
        import ray

        ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        self.address = ray.get_runtime_context().gcs_address
        yield self
        ray.shutdown()


class Dask(Engine):
    name = "dask"

    @contextlib.contextmanager
    def running(self) -> Iterator[Engine]:
        import dask
        from distributed import Client, LocalCluster

        # Else a worker that has died twice is given up, if it is not back when the first death is so long ago.
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1 hour"})
        options = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
        with LocalCluster(n_workers=WORKERS, threads_per_worker=1, silence_logs=50, **options) as cluster:
            self.cluster = cluster
            self.address = cluster.scheduler_address
            with Client(cluster) as self.client:
                yield self


ENGINES = {"ray": Ray, "dask": Dask}


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with ENGINES[request.param]().running() as engine:
        yield engine


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames and not any(
        mark.name == "parametrize" and mark.args[0] == "engine" for mark in metafunc.definition.iter_markers()
    ):
        metafunc.parametrize("engine", sorted(ENGINES), indirect=True, scope="session")


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Of a file in which all processes of a test write lines."""
    return str(tmp_path / "lines")


class Script:
    """A program of its own, which says things line by line into a file."""

    def __init__(self, source: str, folder: Path, **environment: str) -> None:
        path = folder / f"script{len(list(folder.iterdir()))}.py"
        path.write_text(textwrap.dedent(source))
        self.said = folder / f"{path.stem}.out"
        with self.said.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(path)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                cwd=folder,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.said.read_text()

    def wait_for(self, word: str) -> str:
        """The rest of the line that begins so."""
        ends = time.monotonic() + PATIENCE * 2
        while time.monotonic() < ends:
            for line in self.text().splitlines():
                if line.startswith(word):
                    return line.removeprefix(word).strip()
            if self.process.poll() is not None and word not in self.text():
                break
            time.sleep(0.02)
        pytest.fail(f"the script did not say {word!r}:\n{self.text()}")

    def end(self) -> str:
        """Wait for its end; all that it said."""
        self.process.wait(PATIENCE)
        assert self.process.returncode == 0, self.text()
        return self.text()

    def kill(self) -> None:
        """End it and what it has started, by their ids."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[..., Script]]:
    scripts: list[Script] = []

    def started(source: str, **environment: str) -> Script:
        scripts.append(Script(source, tmp_path, **environment))
        return scripts[-1]

    yield started
    for each in scripts:
        each.kill()


def wait_until(is_so: Callable[[], Any], what: str = "it") -> Any:
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends:
        value = is_so()
        if value:
            return value
        time.sleep(0.01)
    return pytest.fail(f"{what} has not happened")


@pytest.fixture
def eventually() -> Callable[..., Any]:
    return wait_until


@pytest.fixture
def lines(path: str) -> Callable[[], list[str]]:
    return lambda: noted(path)
