"""A real redis server for the tests: on a port of its own, to be stopped, killed, frozen and started again."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Self

import pytest
from side_by_side import until

if TYPE_CHECKING:
    from pathlib import Path

EXECUTABLE = shutil.which("redis-server")
HOST = "127.0.0.1"
PATIENCE = 10.0  # seconds for what takes milliseconds


def free_port() -> int:
    """Below those that the system gives to clients, which would take it while a server is started again."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


class RedisServer:
    """Keeps nothing on disk: after a stop it starts empty. ``settings`` are of the server's own."""

    def __init__(self, folder: Path, **settings: object) -> None:
        if EXECUTABLE is None:
            pytest.fail("redis-server is missing; install it, on Debian with: apt-get install redis-server")
        self.host = HOST
        self.port = free_port()
        self._folder = folder
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._is_frozen = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()

    @property
    def options(self) -> dict[str, object]:
        """What to give as ``cache_options``."""
        return {"redis_host": self.host, "redis_port": self.port}

    def start(self) -> None:
        """Return when the server answers."""
        assert self._process is None
        self._folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        until(self._answers)

    @property
    def command(self) -> list[str]:
        """What starts it."""
        settings = {"port": self.port, "bind": self.host, "dir": self._folder, "save": "", "appendonly": "no"}
        settings |= {name.replace("_", "-"): value for name, value in self._settings.items()}
        return [str(EXECUTABLE), *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]

    def stop(self) -> None:
        """End as an administrator would; return when the port is closed."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop, and start on the same port."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Keep the connections, and answer nothing until `thaw`."""
        self._send(signal.SIGSTOP)
        self._is_frozen = True

    def thaw(self) -> None:
        self._send(signal.SIGCONT)
        self._is_frozen = False

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "redis-server ended at once"
        try:
            with socket.create_connection((self.host, self.port), timeout=PATIENCE) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(100).startswith(b"+PONG")
        except OSError:
            return False

    def _send(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        self._send(number)
        if self._is_frozen:
            self.thaw()
        self._process.wait(PATIENCE)
        self._process = None


def make_cluster(node: RedisServer) -> None:
    """Make a cluster of the one server, which has to have ``cluster_enabled="yes"``."""
    import redis

    with redis.Redis(node.host, node.port) as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
        until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")


class Sentinel(RedisServer):
    """Watches over a server, under the name ``main``."""

    def __init__(self, folder: Path, watched: RedisServer) -> None:
        super().__init__(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "sentinel.conf"
        lines = [f"port {self.port}", f"bind {HOST}", f"dir {folder}", f"sentinel monitor main {HOST} {watched.port} 1"]
        self._file.write_text("\n".join(lines))

    @property
    def command(self) -> list[str]:
        return [str(EXECUTABLE), str(self._file), "--sentinel"]
