"""What hits and misses of the caches cost, beside other caches and the bare clients."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import itertools
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_imports import ENVIRONMENT

from opero import opero

try:
    import async_lru
    import cachebox
    import cachetools
    import cashews
    import diskcache
    import joblib
    import redis
    import redis.asyncio
except ImportError as error:
    sys.exit(f"{error}; the group needs: pip install async-lru cachebox cachetools cashews diskcache joblib redis")

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# Calls of one measurement.
MEMORY_HITS, MEMORY_MISSES = 50_000, 10_000
DISK_HITS, DISK_MISSES = 1_000, 250
REDIS_CALLS = 1_500
# As many entries as opero's memory cache holds by default.
MAXSIZE = 10_000
HOST = "127.0.0.1"

# One loop for all: clients and caches belong to the loop in which they were first used.
loop = asyncio.Runner()
cleanup = contextlib.ExitStack()
atexit.register(cleanup.close)
# No two measurements of misses have a number in common, and none has the 1 of the hits.
blocks = itertools.count(1_000_000, 1_000_000)
# What was computed. A cache that failed and let everything through would else look like a fast one.
executed: list[int] = []

FIRST_CALL = """
import sys, time
from opero import opero
place, number, executed = sys.argv[1], int(sys.argv[2]), []
def same(number):
    executed.append(number)
    return number
started = time.perf_counter()
{code}
function(number)
print(time.perf_counter() - started, len(executed))
"""
IN_MEMORY = "function = opero(cache=True)(same)"
ON_DISK = "function = opero(cache=True, cache_backend='disk', cache_options={'cache_dir': place})(same)"
IN_REDIS = (
    "function = opero(cache=True, cache_backend='redis', "
    f"cache_options={{'redis_host': {HOST!r}, 'redis_port': int(place)}})(same)"
)
DISKCACHE = "import diskcache; function = diskcache.Cache(place).memoize()(same)"
RAW_REDIS = f"import pickle, redis; function = lambda _: pickle.loads(redis.Redis({HOST!r}, int(place)).get('raw:1'))"


def same(number: int) -> int:
    """Stand for a user's function."""
    executed.append(number)
    return number


async def same_async(number: int) -> int:
    """Stand for a user's async function."""
    executed.append(number)
    return number


class Holder:
    """Has methods that are cached."""

    @functools.lru_cache(MAXSIZE, typed=True)  # noqa: B019 - what is measured
    def kept(self, number: int) -> int:
        """As functools keeps it, with the instance."""
        return same(number)

    @opero(cache=True)
    def cached(self, number: int) -> int:
        """As opero keeps it."""
        return same(number)


def tables() -> list[Any]:
    """All tables of this group."""
    port = start_redis()
    cleanup.callback(loop.close)
    return [*memory_tables(), *disk_tables(), *redis_tables(port), first_call_table(port)]


def memory_tables() -> list[Any]:
    """Hits and misses in memory."""

    def functions() -> dict[str, Any]:
        return {
            "lru_cache(typed=True)": functools.lru_cache(MAXSIZE, typed=True)(same),
            "opero(cache=True)": opero(cache=True)(same),
            "cachebox.cached": cachebox.cached(cachebox.LRUCache(MAXSIZE))(same),
            "cachetools.cached": cachetools.cached(cachetools.LRUCache(MAXSIZE))(same),
            "cachetools.cached, with a lock": cachetools.cached(cachetools.LRUCache(MAXSIZE), lock=threading.Lock())(
                same
            ),
        }

    def with_an_end() -> dict[str, Any]:
        timed = cachetools.TTLCache(MAXSIZE, 3600)
        return {
            "opero(cache=True, cache_ttl=3600)": opero(cache=True, cache_ttl=3600)(same),
            "cachetools.cached, TTLCache, with a lock": cachetools.cached(timed, lock=threading.Lock())(same),
        }

    def methods() -> dict[str, Any]:
        holder = Holder()
        return {
            "lru_cache(typed=True), keeps the instance": holder.kept,
            "opero(cache=True)": holder.cached,
        }

    def async_functions() -> dict[str, Any]:
        peer = cashews.Cache()
        peer.setup(f"mem://?size={MAXSIZE}")
        cleanup.callback(lambda: loop.run(peer.close()))
        return {
            "opero(cache=True)": opero(cache=True)(same_async),
            "async_lru.alru_cache": async_lru.alru_cache(MAXSIZE)(same_async),
            "cashews, mem://": peer(ttl="1h")(same_async),
        }

    # Misses are measured in a full store, where each puts out an older entry.
    return [
        ("hit in memory, one int argument, sync", _rows(hit, functions(), MEMORY_HITS)),
        ("hit in memory, with an end, sync", _rows(hit, with_an_end(), MEMORY_HITS)),
        ("hit in memory, on a method", _rows(hit, methods(), MEMORY_HITS)),
        ("hit in memory, one int argument, async", _rows(async_hit, async_functions(), MEMORY_HITS)),
        ("miss in memory, store full, sync", _rows(miss, functions(), MEMORY_MISSES, MAXSIZE)),
        ("miss in memory, store full, async", _rows(async_miss, async_functions(), MEMORY_MISSES, MAXSIZE)),
    ]


def disk_tables() -> list[Any]:
    """Hits and misses on disk, each function with a folder of its own."""

    def functions() -> dict[str, Any]:
        on_disk = opero(cache=True, cache_backend="disk", cache_options={"cache_dir": _folder()})
        return {
            "diskcache.Cache.memoize": cleanup.enter_context(diskcache.Cache(_folder())).memoize()(same),
            "opero(cache_backend='disk')": on_disk(same),
            "joblib.Memory.cache": joblib.Memory(_folder(), verbose=0).cache(same),
        }

    return [
        ("hit on disk, sync", _rows(hit, functions(), DISK_HITS)),
        ("miss on disk, sync", _rows(miss, functions(), DISK_MISSES)),
    ]


def redis_tables(port: int) -> list[Any]:
    """Hits and misses in redis, beside the commands that any cache needs at least."""
    client = cleanup.enter_context(redis.Redis(HOST, port))
    async_client = redis.asyncio.Redis(host=HOST, port=port)
    cleanup.callback(lambda: loop.run(async_client.aclose()))
    peer = cashews.Cache()
    peer.setup(f"redis://{HOST}:{port}")
    cleanup.callback(lambda: loop.run(peer.close()))
    in_redis = opero(cache=True, cache_backend="redis", cache_options={"redis_host": HOST, "redis_port": port})
    name = "opero(cache_backend='redis')"
    client.set("raw:1", pickle.dumps(1))

    def raw_hit(number: int) -> Any:
        return pickle.loads(client.get(f"raw:{number}"))  # noqa: S301 - it was written above

    def raw_miss(number: int) -> int:
        client.get(f"raw:{number}")
        client.set(f"raw:{number}", pickle.dumps(same(number)))
        return number

    async def raw_async_hit(number: int) -> Any:
        return pickle.loads(await async_client.get(f"raw:{number}"))  # noqa: S301 - as above

    sync_hits = {"redis-py, get and unpickle": raw_hit, name: in_redis(same)}
    sync_misses = {"redis-py, get, pickle and set": raw_miss, name: in_redis(same)}
    async_hits = {
        "redis.asyncio, get and unpickle": raw_async_hit,
        name: in_redis(same_async),
        "cashews, redis://": peer(ttl="1h")(same_async),
    }
    return [
        ("hit in redis, sync", _rows(hit, sync_hits, REDIS_CALLS)),
        ("miss in redis, sync", _rows(miss, sync_misses, REDIS_CALLS)),
        ("hit in redis, async", _rows(async_hit, async_hits, REDIS_CALLS)),
    ]


def first_call_table(port: int) -> Any:
    """From `import opero` to the first result, each in a process of its own, which imports what its backend needs."""
    used, used_by_peer, server = _folder(), _folder(), str(port)
    rows: dict[str, Callable[[bool], float]] = {
        "opero, memory": lambda _: first_call(IN_MEMORY, "", 1, found=False),
        "opero, disk, entry found": lambda again: first_call(ON_DISK, used, 1, found=again),
        "opero, disk, new folder": lambda _: first_call(ON_DISK, _folder(), 1, found=False),
        "opero, redis, entry found": lambda again: first_call(IN_REDIS, server, 1, found=again),
        "opero, redis, new entry": lambda _: first_call(IN_REDIS, server, next(blocks), found=False),
        "diskcache.memoize, entry found": lambda again: first_call(DISKCACHE, used_by_peer, 1, found=again),
        "redis-py, get and unpickle": lambda _: first_call(RAW_REDIS, server, 1, found=True),
    }
    # The first time puts entries and bytecode where the measurements find them.
    for measure in rows.values():
        measure(False)  # noqa: FBT003 - it is not "again"
    return (
        "first call in a fresh process, `import opero` done",
        [(name, functools.partial(measure, True)) for name, measure in rows.items()],  # noqa: FBT003 - as above
    )


def hit(function: Callable[[int], int], calls: int) -> float:
    """Seconds of a call whose result is stored."""
    function(1)
    with _executes(0):
        return timeit.timeit("function(1)", globals={"function": function}, number=calls) / calls


def async_hit(function: Callable[[int], Awaitable[int]], calls: int) -> float:
    """Like `hit`, awaiting one call after the other."""

    async def measure() -> float:
        await function(1)
        with _executes(0):
            started = time.perf_counter()
            for _ in range(calls):
                await function(1)
            return (time.perf_counter() - started) / calls

    return loop.run(measure())


def miss(function: Callable[[int], int], calls: int, before: int = 1) -> float:
    """Seconds of a call with a number that was never there, after ``before`` others."""
    start = next(blocks)
    for number in range(start, start + before):
        function(number)
    with _executes(calls):
        started = time.perf_counter()
        for number in range(start + before, start + before + calls):
            function(number)
        return (time.perf_counter() - started) / calls


def async_miss(function: Callable[[int], Awaitable[int]], calls: int, before: int = 1) -> float:
    """Like `miss`, awaiting one call after the other."""

    async def measure() -> float:
        start = next(blocks)
        for number in range(start, start + before):
            await function(number)
        with _executes(calls):
            started = time.perf_counter()
            for number in range(start + before, start + before + calls):
                await function(number)
            return (time.perf_counter() - started) / calls

    return loop.run(measure())


def first_call(code: str, place: str, number: int, *, found: bool) -> float:
    """Seconds that a new process needs to make ``function`` by ``code`` and to call it once."""
    script = Path(_scripts(), f"{abs(hash(code))}.py")
    script.write_text(FIRST_CALL.format(code=code), encoding="utf-8")
    command = [sys.executable, str(script), place, str(number)]
    seconds, executions = subprocess.check_output(command, env=ENVIRONMENT, text=True).split()
    _check_executions(int(executions), 0 if found else 1)
    return float(seconds)


def start_redis() -> int:
    """Start a server without persistence that ends with this process, and give its port."""
    program = shutil.which("redis-server")
    if program is None:
        sys.exit("redis-server is not on the PATH; the group needs: apt install redis-server")
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    options = {"--bind": HOST, "--port": str(port), "--save": "", "--appendonly": "no", "--dir": _folder()}
    server = subprocess.Popen([program, *itertools.chain(*options.items())], stdout=subprocess.DEVNULL)
    cleanup.callback(server.wait)
    cleanup.callback(server.terminate)
    deadline = time.monotonic() + 10
    with redis.Redis(HOST, port) as client:
        while server.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(redis.ConnectionError):
                client.ping()
                return port
            time.sleep(0.01)
    sys.exit(f"{program} did not answer on port {port} within 10 s")


@contextlib.contextmanager
def _executes(expected: int) -> Any:
    executed.clear()
    yield
    _check_executions(len(executed), expected)


def _check_executions(executions: int, expected: int) -> None:
    if executions != expected:
        raise RuntimeError(f"the function ran {executions} times in place of {expected}: this is no measurement")


def _rows(measure: Callable[..., float], functions: dict[str, Any], *counts: int) -> list[Any]:
    return [(name, functools.partial(measure, function, *counts)) for name, function in functions.items()]


def _folder() -> str:
    return cleanup.enter_context(tempfile.TemporaryDirectory(prefix="opero-bench-"))


_scripts = functools.cache(_folder)
