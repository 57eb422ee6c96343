"""What lies in a cache may be wrong, planted or out of reach; folders are looked at whenever something is opened."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
import traceback
import zlib

import pytest
from side_by_side import results, started

from opero import Cache, opero
from opero.__main__ import main
from opero.core.clock import clock
from opero.core.private_folder import private_folder
from opero.core.stores import disk, lasting
from opero.core.stores.lasting import DamagedEntryError, EntryFormat
from opero.exceptions import UnsafeCacheError

posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
FOREVER = float("inf")


def cached(function, folder, **options):
    options = {"cache_namespace": "trust", **options}
    return opero(cache=True, cache_backend="disk", retries=0, cache_options={"cache_dir": folder}, **options)(function)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


# Folders


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@posix
@pytest.mark.parametrize("mask", [0, 0o022, 0o777], ids=oct)
def test_folders_are_private_under_any_umask_those_above_included(tmp_path, mask):
    with umask(mask):
        cached(lambda x: "x" * 2_000_000, tmp_path / "a" / "b")(1)
    made = [path for path in (tmp_path / "a").rglob("*") if path.is_dir()]
    assert len(made) >= 3
    assert {mode_of(path) for path in [tmp_path / "a", *made]} == {0o700}


@posix
def test_what_is_written_is_for_its_owner_to_write_under_any_umask(tmp_path):
    with umask(0):
        f = cached(lambda x: "x" * 2_000_000, tmp_path)
        f(1)
        f.__opero__.plan.cache.store.close()
        again = cached(lambda x: "y", tmp_path)
        assert again(1)[0] == "x"
        modes = [mode_of(path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(modes) > 1
    assert [mode for mode in modes if mode & 0o022] == []


@posix
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o722], ids=oct)
def test_a_folder_above_that_others_can_write_to_is_refused(tmp_path, mode):
    above = tmp_path / "shared"
    above.mkdir()
    os.chown(above, -1, 65534 if os.geteuid() == 0 else -1)
    above.chmod(mode)
    (above / "mine").mkdir(mode=0o700)
    message = r"lies in .*shared, which can be written to by others.*cache_dir"
    for _ in range(2):
        with pytest.raises(UnsafeCacheError, match=message):
            private_folder(above / "mine" / "opero", "ns", "cache_dir")


@as_root
def test_a_folder_above_that_somebody_else_owns_is_refused(tmp_path):
    above = tmp_path / "theirs"
    above.mkdir(mode=0o755)
    os.chown(above, 65534, 65534)
    with pytest.raises(UnsafeCacheError, match=r"lies in .*theirs, which belongs to another user"):
        private_folder(above / "opero", "ns", "cache_dir")


@posix
def test_a_sticky_folder_may_lie_above(tmp_path):
    above = tmp_path / "sticky"
    above.mkdir()
    above.chmod(0o1777)
    assert private_folder(above / "opero", "ns", "cache_dir").is_dir()


@posix
def test_a_file_that_others_can_write_to_is_refused(tmp_path):
    folder = private_folder(tmp_path / "opero", "ns", "cache_dir")
    (folder / "cache.db").touch()
    (folder / "cache.db").chmod(0o666)
    with pytest.raises(UnsafeCacheError, match="has a file that can be written to by others"):
        private_folder(tmp_path / "opero", "ns", "cache_dir")


@posix
def test_a_link_in_the_folder_is_refused(tmp_path):
    folder = private_folder(tmp_path / "opero", "ns", "cache_dir")
    (folder / "cache.db").symlink_to(tmp_path / "elsewhere.db")
    with pytest.raises(UnsafeCacheError, match="has a file that is a link"):
        private_folder(tmp_path / "opero", "ns", "cache_dir")


@posix
def test_a_folder_that_was_exchanged_is_not_read_after_a_fork(tmp_path):
    f = cached(lambda x: x, tmp_path)
    f(1)
    (namespace,) = (tmp_path / "opero").iterdir()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        namespace.rename(tmp_path / "away")
        shutil.copytree(tmp_path / "away", namespace)
        namespace.chmod(0o777)
        try:
            f(1)
        except UnsafeCacheError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


# Out of reach


@as_root
@pytest.mark.parametrize("policy", ["fifo", "lru"])
def test_a_warm_cache_that_cannot_be_written_gives_its_hits(policy):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        folder = pathlib.Path(made)
        folder.chmod(0o755)
        options = {"cache_dir": folder, "policy": policy}
        decorate = opero(cache=True, cache_backend="disk", retries=0, cache_namespace="trust", cache_options=options)
        f = decorate(lambda x: [x, "stored"])
        f(1)
        f.__opero__.plan.cache.store.close()
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)

        def look():
            g = decorate(lambda x: [x, "computed"])
            assert [g(1), g(2)] == [[1, "stored"], [2, "computed"]]
            assert (g.stats.hits, g.stats.attempts, g.stats.cache_errors) == (1, 1, 1)

        in_a_child(look)


def test_who_cannot_write_to_a_cache_sees_what_others_write(tmp_path, monkeypatch):
    def decorate(name, policy):
        options = {"cache_dir": tmp_path, "policy": policy}
        return opero(cache=True, cache_backend="disk", retries=0, cache_namespace="trust", cache_options=options)(
            lambda x: name
        )

    writer, reader = decorate("written", "fifo"), decorate("computed", "lru")
    writer(1)
    writer.__opero__.plan.cache.store.close()
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)
        assert reader(1) == "written"
    writer(2)
    assert reader(2) == "written"
    writer.cache_delete(1)
    writer.__opero__.plan.cache.store.close()
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)
        assert [reader(1), reader(2)] == ["computed", "written"]


@as_root
def test_without_a_home_and_a_name_there_is_a_cache_all_the_same():
    decorate = opero(cache=True, cache_backend="disk", retries=0, cache_namespace="homeless")
    # The child may not read where Python's modules are.
    decorate(lambda x: x).cache_info()

    def use():
        f = decorate(lambda x: x)
        assert [f(1), f(1)] == [1, 1]
        assert (f.stats.hits, f.stats.cache_errors) == (1, 0)

    try:
        in_a_child(use)
    finally:
        shutil.rmtree(pathlib.Path(tempfile.gettempdir()) / "opero-12345", ignore_errors=True)


@as_root
def test_the_command_line_and_limits_of_a_machine_work_without_a_home(capfd):
    limited = opero(rate_limit=99, retries=0, rate_limit_options={"scope": "machine", "name": "homeless"})(lambda x: x)
    main([])

    def use():
        assert main([]) == 0
        assert limited(1) == 1

    try:
        in_a_child(use)
    finally:
        shutil.rmtree(pathlib.Path(tempfile.gettempdir()) / "opero-12345", ignore_errors=True)
    assert "opero-12345" in capfd.readouterr().out


def in_a_child(act):
    """Run it as a user of whom the system knows nothing, and who has no home."""
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        return
    try:
        signal.alarm(30)
        for name in ("HOME", "XDG_CACHE_HOME"):
            os.environ.pop(name, None)
        os.setgroups([])
        os.setgid(12345)
        os.setuid(12345)
        act()
        sys.stdout.flush()
        os._exit(0)
    except BaseException:  # noqa: BLE001 - the child ends here, whatever it is
        traceback.print_exc()
        os._exit(1)


@pytest.mark.skipif(not pathlib.Path("/proc/self/fd").exists(), reason="counts files by /proc")
@posix
def test_what_is_computed_after_the_folder_was_removed_is_found_by_others(world, tmp_path):
    runs = []
    f = cached(world.define(runs.append), tmp_path / "cache")
    world.run(f, 1)
    shutil.rmtree(tmp_path / "cache")
    world.run(f, 2)
    # Other options are another store.
    other = opero(
        cache=True,
        cache_backend="disk",
        cache_namespace="trust",
        cache_options={"cache_dir": tmp_path / "cache", "maxsize": 9},
    )(world.define(runs.append))
    world.run(other, 2)
    world.run(f, 1)
    assert runs == [1, 2, 1]


@posix
def test_the_entries_of_a_removed_folder_are_gone_after_a_second(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_LOOK_SECONDS", 0.0)
    runs = []
    f = cached(runs.append, tmp_path / "cache")
    f(1)
    f(1)
    shutil.rmtree(tmp_path / "cache")
    f(1)
    assert runs == [1, 1]


def test_many_namespaces_hold_few_files_open_and_all_work(tmp_path):
    open_files = pathlib.Path("/proc/self/fd")
    before = len(list(open_files.iterdir()))
    functions = [cached(lambda x, n=n: (n, x), tmp_path, cache_namespace=f"many {n}") for n in range(150)]
    for n, f in enumerate(functions):
        assert f(1) == (n, 1)
    assert len(list(open_files.iterdir())) - before < 300
    for n, f in enumerate(functions):
        assert f(1) == (n, 1)
    assert sum(f.stats.hits for f in functions) == 150


# Entries


def test_what_a_fault_says_stands_in_one_line_of_the_log(backend, warnings):
    class Odd:
        def __reduce__(self):
            raise RuntimeError("odd\nCRITICAL all is lost\x1b[31m")

    f = opero(**backend.options, retries=0, cache_namespace=backend.namespace())(lambda kind: kind())
    f(Odd)
    (line,) = warnings
    assert "odd CRITICAL all is lost" in line
    assert line.rstrip("\n").isprintable()


def test_an_entry_of_another_version_of_the_format_is_not_read(disk_backend, redis_backend):
    for backend in (disk_backend, redis_backend):
        namespace = backend.namespace()
        f = opero(**backend.options, retries=0, cache_namespace=namespace)(lambda x: f"marker {x}")
        f(1)
        assert backend.spoil(b"marker 1", lambda entry: b"o0" + entry[2:]) == 1
        assert (f(1), f.stats.hits, f.stats.cache_errors) == ("marker 1", 0, 1)
        assert [f(1), f(1)] == ["marker 1", "marker 1"]
        assert f.stats.hits > 0


def test_an_entry_that_would_grow_without_bound_is_damaged(monkeypatch):
    monkeypatch.setattr(lasting, "MOST_BYTES", 1_000_000)
    written = EntryFormat("json", compress=True).dumps("a" * 900_000, FOREVER)
    assert EntryFormat("json").loads(written) == ("a" * 900_000, FOREVER)
    rest = written[8:16] + zlib.compress(b'"' + b"a" * 2_000_000 + b'"')
    bomb = written[:4] + zlib.crc32(rest).to_bytes(4, "big") + rest
    with pytest.raises(DamagedEntryError, match="larger"):
        EntryFormat("json").loads(bomb)


def test_json_that_is_nested_too_deeply_is_damaged_under_a_raised_limit_of_recursion():
    written = EntryFormat("json").dumps([], FOREVER)
    rest = written[8:16] + b"[" * 300_000 + b"]" * 300_000
    deep = written[:4] + zlib.crc32(rest).to_bytes(4, "big") + rest
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)
    try:
        with pytest.raises(DamagedEntryError, match="deeply"):
            EntryFormat("json").loads(deep)
        assert EntryFormat("json").loads(EntryFormat("json").dumps(['[["', {"a": "]"}], FOREVER))[0] == [
            '[["',
            {"a": "]"},
        ]
    finally:
        sys.setrecursionlimit(limit)


# Clocks and servers


@pytest.mark.parametrize("jump", [-100.0, 0.0, 100.0])
def test_a_deletion_while_another_process_computes_holds_though_the_clock_jumps(disk_backend, start, jump):
    namespace = disk_backend.namespace()
    source = """
    def run(x):
        say("began")
        told()
        return "old"

    cached(run)(1)
    say("stored")
    """
    program = start(source, {**disk_backend.options, "cache_namespace": namespace, "retries": 0})
    assert program.heard() == "began"
    f = opero(**disk_backend.options, cache_namespace=namespace, retries=0)(lambda x: "new")
    now = time.time
    clock.wall = lambda: now() + jump
    try:
        f.cache_delete(1)
    finally:
        clock.reset()
    program.tell("go on")
    assert program.heard() == "stored"
    program.end()
    assert f(1) == "new"


class Answering:
    """A server that gives the same answer to whatever it is sent; one that drips sends a byte now and then."""

    def __init__(self, answer, *, seconds=0.0):
        self._answer = answer
        self._seconds = seconds

    def __enter__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._stop = threading.Event()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        # Who waits to accept does not notice that a socket is closed.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._socket.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._socket.accept()[0],), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection:
            while connection.recv(65_536):
                if not self._seconds:
                    connection.sendall(self._answer)
                    continue
                for byte in self._answer:
                    connection.sendall(bytes([byte]))
                    if self._stop.wait(self._seconds):
                        return


@pytest.mark.parametrize(
    ("who", "answer"),
    [("", b"+" + b"O" * 100), ("me:secret@", b"+OK\r\n")],
    ids=["an-answer-that-never-ends", "signing-in"],
)
def test_a_server_that_drips_costs_two_seconds_in_all(world, who, answer):
    with Answering(answer, seconds=0.2) as server:
        options = {"url": f"redis://{who}127.0.0.1:{server.port}/1?protocol=2"}
        f = opero(cache=True, cache_backend="redis", cache_options=options, retries=0)(world.define(lambda x: x))
        before = time.monotonic()
        assert [world.run(f, 1), world.run(f, 2)] == [1, 2]
        assert time.monotonic() - before < 3


def test_a_name_that_nobody_resolves_in_time_costs_two_seconds_in_all(world, monkeypatch):
    is_over, resolve = threading.Event(), socket.getaddrinfo

    def resolve_late(host, *args, **kwargs):
        if host == "cache.invalid":
            is_over.wait(10)
        return resolve("127.0.0.1" if host == "cache.invalid" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_late)
    options = {"redis_host": "cache.invalid", "redis_port": 1 + world.is_async}
    f = opero(cache=True, cache_backend="redis", cache_options=options, retries=0)(world.define(lambda x: x))

    async def call():
        got = [f(1), f(2)]
        got = [await one for one in got] if world.is_async else got
        # The loop ends when the threads of its own have ended, which resolve names.
        return got, time.monotonic(), is_over.set()

    before = time.monotonic()
    got, after, _ = asyncio.run(call())
    assert got == [1, 2]
    assert after - before < 3


def test_a_url_whose_query_cannot_be_meant_is_refused_when_decorating():
    with pytest.raises(ValueError, match="socket_timeout") as refused:
        opero(cache=Cache(backend="redis", url="redis://me:secret@127.0.0.1/0?socket_timeout=soon"))(lambda x: x)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("answer", [b":5\r\n", b"*3\r\n:1\r\n:2\r\n:3\r\n", b"#t\r\n", b"%1\r\n+a\r\n:1\r\n"])
def test_what_no_redis_would_answer_costs_the_cache_and_not_the_call(world, answer):
    with Answering(answer) as server:
        options = {"redis_host": "127.0.0.1", "redis_port": server.port}
        f = opero(cache=True, cache_backend="redis", cache_options=options, retries=0)(world.define(lambda x: x))
        assert [world.run(f, 1), world.run(f, 1)] == [1, 1]
        assert f.stats.cache_errors


@pytest.mark.parametrize("ends", [-FOREVER, float("nan")])
def test_an_entry_that_ends_at_no_time_is_damaged(world, backend, ends):
    text = f"ends at {backend.namespace()}"
    f = opero(**backend.options, retries=0, cache_namespace=backend.namespace())(world.define(lambda x: text))
    world.run(f, 1)
    assert backend.spoil(text.encode(), lambda _: EntryFormat().dumps("planted", ends)) == 1
    assert results([started(world.run, f, 1)]) == [text]


def test_a_damaged_entry_that_must_not_be_deleted_costs_the_cache_and_not_the_call(world, redis_backend):
    namespace = redis_backend.namespace()
    with redis_backend.client() as client:
        client.acl_setuser(namespace, enabled=True, nopass=True, keys=["*"], commands=["+@all", "-del"])
        url = f"redis://{namespace}:any@{redis_backend.server.host}:{redis_backend.server.port}"
        cache = Cache(backend="redis", url=url, namespace=namespace)
        f = opero(cache=cache, retries=0)(world.define(lambda x: "result"))
        world.run(f, 1)
        (key,) = [key for key in client.scan_iter(f"*{namespace}*") if not key.endswith(b":lease")]
        client.set(key, b"damaged")
        assert world.run(f, 1) == "result"
        client.acl_deluser(namespace)


def test_a_lease_without_an_end_is_nobodys(world, redis_backend):
    namespace = redis_backend.namespace()
    f = opero(**redis_backend.options, retries=0, cache_namespace=namespace)(world.define(lambda x: "result"))
    world.run(f, 1)
    with redis_backend.client() as client:
        (key,) = [key for key in client.scan_iter(f"*{namespace}*") if not key.endswith(b":lease")]
        for seconds in (None, 86_400):
            client.delete(key)
            client.set(key + b":lease", "somebody", ex=seconds)
            assert results([started(world.run, f, 1)]) == ["result"]
