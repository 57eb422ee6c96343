"""What the tests share: the sync and the async world, the modes of a map, and a clock that only moves when told."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import functools
import gc
import inspect
import json
import multiprocessing
import os
import queue
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from program_server import ProgramServer
from redis_server import RedisServer, Sentinel, free_port, make_cluster
from side_by_side import until

from opero.core.clock import clock
from opero.core.parameters import Forwarding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


# A run in the background of a shell inherits an ignored Ctrl-C, and so would the programs that the tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests start hundreds of programs and workers, each of which would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Fork servers import what the workers of the tests need once, and not in each worker.
multiprocessing.set_forkserver_preload(["pytest", "numpy", "loky", "opero.concurrency.processes"])


def pytest_collection_finish() -> None:
    """Let the garbage collector, and forked workers, leave alone what thousands of collected tests are made of."""
    gc.collect()
    gc.freeze()


def as_async(function: Callable[..., Any]) -> Callable[..., Any]:
    """An ``async def`` function with the same signature that calls ``function``."""
    shape, namespace = Forwarding(function), {"_opero_function": function}
    exec(f"async def made({shape.parameters}): return _opero_function({shape.call})", namespace)
    made, plain = namespace.pop("made"), shape.compiled(["pass"], {})
    made.__defaults__, made.__kwdefaults__ = plain.__defaults__, plain.__kwdefaults__
    functools.update_wrapper(made, function)
    del made.__wrapped__
    made.__signature__ = inspect.signature(function)
    return made


class World:
    """Runs one test body with ``def`` functions or with ``async def`` functions."""

    def __init__(self, *, is_async: bool) -> None:
        self.is_async = is_async

    def define(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a plain function one of this world."""
        return as_async(function) if self.is_async else function

    def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of this world and give its result."""
        if not self.is_async:
            return function(*args, **kwargs)

        async def call() -> Any:
            return await function(*args, **kwargs)

        return asyncio.run(call())


@pytest.fixture(params=["sync", "async"])
def world(request: pytest.FixtureRequest) -> World:
    return World(is_async=request.param == "async")


class Mode:
    """Runs one test body in one mode of `opero.opmap`; ``options`` go to the decorator."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_async = name.startswith("async")
        self.shares_memory = name in {"thread", "async"}

    @property
    def options(self) -> dict[str, Any]:
        return {"mode": self.name, "workers": 2, "progress": False}

    def define(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a plain function one that fits the mode."""
        return as_async(function) if self.is_async else function

    def run(self, mapped: Any, items: Any, /, **kwargs: Any) -> Any:
        """Call a map by blocking."""
        return mapped.run(items, **kwargs)

    def stream(self, mapped: Any, items: Any, /, **kwargs: Any) -> list[Any]:
        """All outcomes of a stream."""
        outcomes: list[Any] = []
        self.each(outcomes.append, mapped, items, **kwargs)
        return outcomes

    def each(self, see: Callable[[Any], Any], mapped: Any, items: Any, /, **kwargs: Any) -> None:
        """Call ``see`` with each outcome of a stream as it is handed out."""
        if not self.is_async:
            for outcome in mapped.stream(items, **kwargs):
                see(outcome)
            return

        async def consume() -> None:
            async for outcome in mapped.stream(items, **kwargs):
                see(outcome)

        asyncio.run(consume())


MODES = ("thread", "process", "async", "async_process")


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    return Mode(request.param)


class FakeClock:
    """Time that moves only by sleeping, or by `tick`."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.sleeps: list[float] = []

    def now(self) -> float:
        return self.time

    def tick(self, seconds: float) -> None:
        self.time += seconds

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.tick(seconds)

    async def async_sleep(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture
def fake_clock() -> Iterator[FakeClock]:
    fake = FakeClock()
    clock.now = clock.machine = fake.now
    clock.sleep, clock.async_sleep = fake.sleep, fake.async_sleep
    yield fake
    clock.reset()


# Caches that outlive the process


class Backend:
    """A cache outside the process: where it is, and what lies in it."""

    name: str
    cache_options: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """For `opero.opero` and `opero.opmap`."""
        return {"cache": True, "cache_backend": self.name, "cache_options": dict(self.cache_options)}

    def namespace(self) -> str:
        """One that no other test uses."""
        return f"test.{uuid.uuid4().hex}"

    def stored(self) -> list[bytes]:
        """All that an intruder could read: names, keys and values."""
        raise NotImplementedError

    def spoil(self, marker: bytes, damage: Callable[[bytes], bytes]) -> int:
        """Damage every stored value that contains ``marker``; tells how many there were."""
        raise NotImplementedError


class DiskBackend(Backend):
    name = "disk"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache_options = {"cache_dir": str(folder)}

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def databases(self) -> list[Path]:
        return [path for path in self.files() if path.read_bytes().startswith(b"SQLite format 3")]

    def stored(self) -> list[bytes]:
        contents = [path.read_bytes() for path in self.files()]
        return [*(str(path).encode() for path in self.folder.rglob("*")), *contents]

    def spoil(self, marker: bytes, damage: Callable[[bytes], bytes]) -> int:
        count = 0
        databases = self.databases()
        for path in self.files():
            if not any(path.name.startswith(database.name) for database in databases):
                content = path.read_bytes()
                if marker in content:
                    path.write_bytes(damage(content))
                    count += 1
        for database in databases:
            with contextlib.closing(sqlite3.connect(database, timeout=10)) as connection, connection:
                rows = connection.execute("SELECT rowid, value FROM Cache WHERE instr(value, ?)", (marker,)).fetchall()
                for row, value in rows:
                    connection.execute("UPDATE Cache SET value = ? WHERE rowid = ?", (damage(value), row))
                count += len(rows)
        return count


class RedisBackend(Backend):
    name = "redis"

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.cache_options = server.options

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        import redis

        with redis.Redis(host=self.server.host, port=self.server.port) as client:
            yield client

    def stored(self) -> list[bytes]:
        with self.client() as client:
            return [part for key in client.scan_iter() for part in (key, *self._parts(client, key))]

    def spoil(self, marker: bytes, damage: Callable[[bytes], bytes]) -> int:
        count = 0
        with self.client() as client:
            for key in list(client.scan_iter()):
                kind = client.type(key)
                fields = client.hgetall(key) if kind == b"hash" else {}
                if kind == b"string" and marker in (value := client.get(key)):
                    client.set(key, damage(value), keepttl=True)
                    count += 1
                for field, value in fields.items():
                    if marker in value:
                        client.hset(key, field, damage(value))
                        count += 1
        return count

    @staticmethod
    def _parts(client: Any, key: bytes) -> list[bytes]:
        readers = {
            b"string": lambda: [client.get(key)],
            b"hash": lambda: [part for pair in client.hgetall(key).items() for part in pair],
            b"set": lambda: list(client.smembers(key)),
            b"zset": lambda: client.zrange(key, 0, -1),
            b"list": lambda: client.lrange(key, 0, -1),
            b"none": list,  # expired since it was listed
        }
        return [part for part in readers[client.type(key)]() if part is not None]


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for all tests that leave it alone."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A cluster of one node."""
    with RedisServer(tmp_path_factory.mktemp("cluster"), cluster_enabled="yes", cluster_port=free_port()) as server:
        make_cluster(server)
        yield server


@pytest.fixture(scope="session")
def redis_sentinel(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[Sentinel]:
    with Sentinel(tmp_path_factory.mktemp("sentinel"), redis_server) as server:
        yield server


@pytest.fixture
def disk_backend(tmp_path: Path) -> DiskBackend:
    return DiskBackend(tmp_path / "cache")


@pytest.fixture
def redis_backend(redis_server: RedisServer) -> RedisBackend:
    return RedisBackend(redis_server)


@pytest.fixture(params=["disk", "redis"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.getfixturevalue(f"{request.param}_backend")


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisBackend]:
    """A server that the test may maltreat."""
    with RedisServer(tmp_path / "redis") as server:
        yield RedisBackend(server)


@dataclass(frozen=True)
class Journal:
    """Lines that every process of a test can add and read."""

    path: Path

    def add(self, text: object) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(file, f"{text}\n".encode())
        os.close(file)

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def count(self, text: object) -> int:
        return self.lines().count(str(text))

    def wait_for(self, text: object) -> None:
        until(lambda: self.count(text))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What opero logs from WARNING on."""
    from loguru import logger

    heard: list[str] = []
    sink = logger.add(lambda message: heard.append(str(message)), level="WARNING", filter="opero")
    logger.enable("opero")
    yield heard
    logger.disable("opero")
    logger.remove(sink)


PRELUDE = """
import inspect, json, os, sys, time
import opero

OPTIONS, JOURNAL = json.loads({settings!r})

def cached(function, **more):
    return opero.opero(**{{**OPTIONS, **more}})(function)

def run(f, *args, **kwargs):
    result = f(*args, **kwargs)
    if not inspect.iscoroutine(result):
        return result
    import asyncio
    return asyncio.run(result)

def say(value):
    os.write(1, (repr(value) + "\\n").encode())

def told():
    line = sys.stdin.readline()
    assert line, "the test has gone"
    return line.strip()

def note(text):
    file = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, f"{{text}}\\n".encode())
    os.close(file)

def noted(text):
    return os.path.exists(JOURNAL) and open(JOURNAL).read().split().count(str(text))

def listen():
    from loguru import logger
    heard = []
    logger.add(lambda message: heard.append(str(message)), level="WARNING", filter="opero")
    logger.enable("opero")
    return heard
"""


class Program:
    """A Python process that says values, line by line, and can be told lines."""

    patience = 20.0

    def __init__(self, server: ProgramServer, path: Path, *, environment: dict[str, str]) -> None:
        pipes = [os.pipe() for _ in range(3)]
        (stdin, given), (said, stdout), (complained, stderr) = pipes
        files = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
        self._process = server.start([str(path)], cwd=path.parent, env={**os.environ, **environment}, **files)
        for file in files.values():
            os.close(file)
        self._stdin = os.fdopen(given, "wb")
        self._said: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._errors: list[bytes] = []
        streams = [(os.fdopen(said, "rb"), self._said.put), (os.fdopen(complained, "rb"), self._errors.append)]
        self._readers = [threading.Thread(target=self._read, args=stream, daemon=True) for stream in streams]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def heard(self) -> Any:
        """The next value that it says."""
        try:
            line = self._said.get(timeout=self.patience)
        except queue.Empty:
            line = b""
        if not line:
            pytest.fail(f"the program says no more: {b''.join(self._errors).decode()}")
        return ast.literal_eval(line.decode())

    def tell(self, text: str) -> None:
        self._stdin.write(f"{text}\n".encode())
        self._stdin.flush()

    def end(self) -> list[Any]:
        """Wait for its end; what it has said since."""
        try:
            code = self._process.wait(self.patience)
        except subprocess.TimeoutExpired:
            code = "never"
        rest = self._close()
        assert code == 0, b"".join(self._errors).decode()
        return rest

    def kill(self) -> list[Any]:
        """End it with no chance to tidy up; what it has said since."""
        self._process.kill()
        return self._close()

    def _close(self) -> list[Any]:
        self._process.kill()
        self._process.wait(self.patience)
        for reader in self._readers:
            reader.join(self.patience)
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        rest = []
        while line := (self._said.get() if not self._said.empty() else b""):
            rest.append(ast.literal_eval(line.decode()))
        return rest

    @staticmethod
    def _read(stream: Any, put: Callable[[bytes], None]) -> None:
        with stream:
            for line in stream:
                put(line)
        put(b"")


@pytest.fixture(scope="session")
def program_server() -> Iterator[ProgramServer]:
    """What starts programs sooner than a new interpreter would."""
    with contextlib.closing(ProgramServer()) as server:
        yield server


@pytest.fixture
def start(program_server: ProgramServer, tmp_path: Path, journal: Journal) -> Iterator[Callable[..., Program]]:
    """Start source text as a program; ``DEF`` stands for ``def`` or, in the async world, for ``async def``."""
    programs: list[Program] = []

    def started(
        source: str, options: dict[str, Any], *, world: World | None = None, environment: dict[str, str] | None = None
    ) -> Program:
        settings = json.dumps([{"retries": 0, **options}, str(journal.path)])
        word = "async def" if world is not None and world.is_async else "def"
        path = tmp_path / f"program{len(programs)}.py"
        path.write_text(PRELUDE.format(settings=settings) + textwrap.dedent(source).replace("DEF ", f"{word} "))
        programs.append(Program(program_server, path, environment=environment or {}))
        return programs[-1]

    yield started
    for program in programs:
        program.kill()


@pytest.fixture
def no_garbage_of_others():
    """Lets the collector find nothing that other tests have left.

    Ctrl-C is lost in what it finalizes; within `logging`, a lock that all threads need may stay taken.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
