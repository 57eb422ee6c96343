"""Keep rate limits busy, and tell how much of the rate was used and how full the fullest windows were.

``python benchmarks/soak_limits.py [--seconds 2] [--rates 10 1000] [--callers thread redis] [--busy]
[--switch-interval 0.0005]``. For every row: what part of the rate was used, and for windows of 0.1, 0.5 and 1 s how
many starts the fullest had above what ``rate * T + burst`` allows (0 or less is right; of ``costs``, where each unit is
a start, 8 or less: the largest cost may come on top). ``--busy`` puts two CPU-bound
threads beside the callers. Unrelated processes share by a file in a temporary folder, or by a redis-server of this run.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import json
import math
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

from opero import opero, opmap
from opero.core import RateLimiter
from opero.core.limits.rates import parse_rates

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOWS = (0.1, 0.5, 1.0)
RATES = (10.0, 100.0, 1_000.0, 10_000.0)
PROCESSES = 4


def start(_number: int = 0) -> float:
    """Stand for a user's function; tells when it began."""
    return time.monotonic()


async def start_async(_number: int = 0) -> float:
    """Stand for a user's async function; tells when it began."""
    return time.monotonic()


def in_threads(rate: float, seconds: float, count: int) -> list[float]:
    """Call one limited function from so many threads."""
    limited = opero(retries=0, rate_limit=rate)(start)
    end = time.monotonic() + seconds
    starts: list[list[float]] = [[] for _ in range(count)]

    def work(mine: list[float]) -> None:
        while time.monotonic() < end:
            mine.append(limited())

    threads = [threading.Thread(target=work, args=(mine,)) for mine in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [moment for mine in starts for moment in mine]


def in_tasks(rate: float, seconds: float, loops: int, tasks: int) -> list[float]:
    """Call one limited function from so many tasks in each of so many event loops."""
    limited = opero(retries=0, rate_limit=rate)(start_async)
    end = time.monotonic() + seconds
    starts: list[float] = []

    async def work() -> None:
        while time.monotonic() < end:
            starts.append(await limited())

    async def loop() -> None:
        await asyncio.gather(*[work() for _ in range(tasks)])

    threads = [threading.Thread(target=lambda: asyncio.run(loop())) for _ in range(loops)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return starts


def with_costs(rate: float, seconds: float) -> list[float]:
    """Call from threads a function whose calls cost one to nine units each; every unit counts as a start."""
    costs = random.Random(1)
    limited = opero(
        retries=0, rate_limit={"units": rate}, rate_limit_cost=lambda cost: cost, rate_limit_options={"max_burst": 5}
    )(lambda _cost: time.monotonic())
    end = time.monotonic() + seconds
    starts: list[float] = []

    def work() -> None:
        while time.monotonic() < end:
            cost = costs.randrange(1, 10)
            starts.extend([limited(cost)] * cost)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return starts


def in_places(rate: float, seconds: float) -> list[float]:
    """Call a limited function from more threads than may run at once, each for two intervals."""

    def run() -> float:
        began = time.monotonic()
        time.sleep(2 / rate)
        return began

    limited = opero(retries=0, rate_limit=rate, max_concurrent=8)(run)
    end = time.monotonic() + seconds
    starts: list[float] = []

    def work() -> None:
        while time.monotonic() < end:
            starts.append(limited())

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return starts


def in_workers(rate: float, seconds: float) -> list[float]:
    """Map a limited function over worker processes."""
    mapped = opmap(mode="process", workers=PROCESSES, retries=0, rate_limit=rate, progress=False)(start)
    return [outcome.result for outcome in mapped.stream(range(int(rate * seconds) + 1))]


def in_processes(rate: float, seconds: float, options: dict[str, Any]) -> list[float]:
    """Share a limiter between processes that know nothing of each other."""
    command = [sys.executable, __file__, "--share", json.dumps({"rate": rate, "seconds": seconds, **options})]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, **pipes) for _ in range(PROCESSES)]
    for child in children:
        child.stdout.readline()  # it has imported what it needs
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    return [moment for child in children for moment in json.loads(child.communicate()[0])]


def share(rate: float, seconds: float, **options: Any) -> None:
    """What each of these processes does."""
    limiter = RateLimiter(rate, name="soak", **options)
    limiter.acquire(timeout=0)  # imports what is needed
    print(flush=True)
    sys.stdin.readline()
    end = time.monotonic() + seconds
    starts = []
    while time.monotonic() < end:
        limiter.acquire()
        starts.append(time.monotonic())
    json.dump(starts, sys.stdout)


def by_file(rate: float, seconds: float) -> list[float]:
    """Processes of one machine."""
    with tempfile.TemporaryDirectory() as folder:
        return in_processes(rate, seconds, {"scope": "machine", "folder": folder})


def by_redis(rate: float, seconds: float) -> list[float]:
    """Processes that share a server."""
    program = shutil.which("redis-server")
    if program is None:
        sys.exit("soak_limits needs redis-server; install it, or leave the caller 'redis' out")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([program, "--port", str(port), "--save", ""], stdout=subprocess.DEVNULL)
    try:
        time.sleep(0.3)
        return in_processes(rate, seconds, {"scope": "redis", "url": f"redis://127.0.0.1:{port}"})
    finally:
        server.terminate()
        server.wait()


CALLERS: dict[str, Callable[[float, float], list[float]]] = {
    "thread": lambda rate, seconds: in_threads(rate, seconds, 1),
    "threads": lambda rate, seconds: in_threads(rate, seconds, 8),
    "tasks": lambda rate, seconds: in_tasks(rate, seconds, 1, 100),
    "loops": lambda rate, seconds: in_tasks(rate, seconds, 2, 50),
    "costs": with_costs,
    "places": in_places,
    "workers": in_workers,
    "machine": by_file,
    "redis": by_redis,
}


def excess(starts: list[float], rate: float, window: float) -> int:
    """By how many starts the fullest window of this length has too many."""
    ((_, _, burst),) = parse_rates(rate).paces
    allowed = rate * window + burst
    fullest = max(bisect.bisect_left(starts, moment + window) - place for place, moment in enumerate(starts))
    return math.ceil(fullest - allowed - 1e-9)


def spin(stop: threading.Event) -> None:
    """Keep a CPU busy."""
    while not stop.is_set():
        sum(range(1_000))


def turns_per_second() -> float:
    """How often a thread that waits gets the interpreter."""
    begin, turns = time.monotonic(), 0
    while time.monotonic() < begin + 1:
        time.sleep(1e-6)
        turns += 1
    return turns / (time.monotonic() - begin)


def main() -> None:
    """Run the chosen rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--callers", nargs="+", choices=CALLERS, default=list(CALLERS))
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--switch-interval", type=float, help="seconds, for sys.setswitchinterval")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.share is not None:
        share(**json.loads(arguments.share))
        return
    if arguments.switch_interval is not None:
        sys.setswitchinterval(arguments.switch_interval)
    stop = threading.Event()
    busy: list[Any] = []
    if arguments.busy:
        busy = [threading.Thread(target=spin, args=(stop,), daemon=True) for _ in range(2)]
        for thread in busy:
            thread.start()
        print(f"beside them a thread gets the interpreter {turns_per_second():.0f} times a second")
    print(f"{'callers':10} {'rate':>8} {'starts':>8} {'used':>8}   excess in {WINDOWS}")
    for callers in arguments.callers:
        for rate in arguments.rates:
            starts = sorted(CALLERS[callers](rate, max(arguments.seconds, 20 / rate)))
            used = (len(starts) - 1) / (rate * (starts[-1] - starts[0]))
            found = [excess(starts, rate, window) for window in WINDOWS]
            print(f"{callers:10} {rate:8g} {len(starts):8} {used:8.1%}   {found}", flush=True)
    stop.set()


if __name__ == "__main__":
    main()
