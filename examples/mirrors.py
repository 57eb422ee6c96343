"""Fetch the standard library of the running Python from three mirrors that misbehave, and check every byte.

The mirrors (`flaky_mirrors.py`) answer with 503 and 429, reset connections, are slow, and one is dead at first. They
count what comes too fast, and what comes while they rest. `fetch` below is all that it takes to cope. A second pass
over the same files is answered from the cache.

    python examples/mirrors.py             # threads and httpx.Client
    python examples/mirrors.py --async     # asyncio and httpx.AsyncClient
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import platform
import sys
import sysconfig
import time
from collections import Counter
from http import HTTPStatus
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import httpx
from flaky_mirrors import Answer, flaky_mirrors

from opero import opmap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flaky_mirrors import Mirror, Request

    from opero import CallStats

STDLIB = Path(sysconfig.get_path("stdlib"))
NOT_STDLIB = {"site-packages", "dist-packages"}
COUNTS = ("attempts", "retries", "fallbacks", "hits", "failures")
SHOWN_FAILURES = 10


def worth_retrying(error: Exception) -> bool | float:
    """Say whether to ask again: after the seconds the server names, for its own faults, for lost connections."""
    if isinstance(error, httpx.HTTPStatusError):
        response = error.response
        if response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
            return float(response.headers.get("Retry-After", "1"))
        return response.is_server_error
    return isinstance(error, httpx.TransportError)


def fetch_in_threads(paths: list[str], mirrors: list[Mirror], options: argparse.Namespace) -> list[Pass]:
    """Fetch every file twice, with threads."""
    # trust_env: a proxy named in the environment is not for loopback.
    with httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=options.workers)) as client:

        @opmap(
            mode="thread",
            workers=options.workers,
            arg_fallback="mirror",  # the parameter whose values are tried in turn
            retries=5,  # rounds through the mirrors, after the first
            retry_on=worth_retrying,
            rate_limit=options.rate,  # requests per second, whoever makes them,
            per="mirror",  # to each mirror: one that asks for a rest holds up no other
            cache=True,
            return_exceptions=True,  # a file that no mirror gives is its exception in the list
            progress="standard library",
        )
        def fetch(path: str, mirror: str | list[str]) -> bytes:
            """Fetch one file from one mirror: the call gives a list of mirrors, the function gets one of them."""
            return client.get(f"{mirror}/{path}").raise_for_status().content

        urls = [mirror.url for mirror in mirrors]
        passes = []
        for _ in range(2):
            meter = Meter(fetch.stats.snapshot, mirrors)
            passes.append(meter.read(fetch(paths, mirror=urls)))
        return passes


async def fetch_in_tasks(paths: list[str], mirrors: list[Mirror], options: argparse.Namespace) -> list[Pass]:
    """Fetch every file twice, with asyncio."""
    limits = httpx.Limits(max_keepalive_connections=options.workers)
    async with httpx.AsyncClient(trust_env=False, limits=limits) as client:

        @opmap(
            mode="async",
            workers=options.workers,
            arg_fallback="mirror",
            retries=5,
            retry_on=worth_retrying,
            rate_limit=options.rate,
            per="mirror",
            cache=True,
            return_exceptions=True,
            progress="standard library",
        )
        async def fetch(path: str, mirror: str | list[str]) -> bytes:
            """Fetch one file from one mirror."""
            return (await client.get(f"{mirror}/{path}")).raise_for_status().content

        urls = [mirror.url for mirror in mirrors]
        passes = []
        for _ in range(2):
            meter = Meter(fetch.stats.snapshot, mirrors)
            passes.append(meter.read(await fetch(paths, mirror=urls)))
        return passes


# From here on: choosing the files, measuring, checking, reporting.


class Pass(NamedTuple):
    """One pass over all files: what came back and what it took."""

    results: list[bytes | Exception]
    counts: dict[str, int]
    requests: int
    seconds: float


class Meter:
    """Counts during one pass, on both sides."""

    def __init__(self, stats: Callable[[], CallStats], mirrors: list[Mirror]) -> None:
        """Begin."""
        self._stats, self._mirrors = stats, mirrors
        self._before, self._asked, self._began = stats(), len(requests_to(mirrors)), time.perf_counter()

    def read(self, results: list[bytes | Exception]) -> Pass:
        """End, with what came back."""
        seconds = time.perf_counter() - self._began
        after = self._stats()
        counts = {name: getattr(after, name) - getattr(self._before, name) for name in COUNTS}
        return Pass(results, counts, len(requests_to(self._mirrors)) - self._asked, seconds)


def requests_to(mirrors: list[Mirror]) -> list[Request]:
    """Return the requests to all mirrors, in the order in which they started."""
    return sorted(chain.from_iterable(mirror.requests for mirror in mirrors))


def stdlib_files() -> list[str]:
    """Return the names of the standard library's source files, relative to its folder."""
    names = (file.relative_to(STDLIB) for file in STDLIB.rglob("*.py"))
    return sorted(name.as_posix() for name in names if NOT_STDLIB.isdisjoint(name.parts))


def problem(path: str, result: bytes | Exception) -> str | None:
    """Compare a result with the file on disk; say what is wrong, if anything."""
    if isinstance(result, Exception):
        return f"{path}: {type(result).__name__}: {result}"
    if hashlib.sha256(result).digest() != hashlib.sha256((STDLIB / path).read_bytes()).digest():
        return f"{path}: the body differs from the file"
    return None


def problems(paths: list[str], passes: list[Pass]) -> list[str]:
    """Return all that went wrong in both passes."""
    found: list[str] = []
    for number, done in enumerate(passes, 1):
        if len(done.results) != len(paths):
            found.append(f"pass {number}: {len(done.results)} results for {len(paths)} files")
        checked = map(problem, paths, done.results)
        found.extend(f"pass {number}: {text}" for text in checked if text)
    if passes[-1].requests:
        found.append(f"the second pass made {passes[-1].requests} requests; the cache should have answered")
    return found


def achieved_rate(requests: list[Request]) -> float:
    """Return requests per second from the first one until every file had been asked for: later ones are stragglers."""
    first_asked: dict[str, int] = {}
    for index, request in enumerate(requests):
        first_asked.setdefault(request.path, index)
    last = max(first_asked.values(), default=0)
    return last / (requests[last].started - requests[0].started) if last else 0.0


def busiest_second(requests: list[Request]) -> int:
    """Return how many requests started in the busiest second, wherever it began."""
    oldest = most = 0
    for index, request in enumerate(requests):
        while request.started - requests[oldest].started >= 1:
            oldest += 1
        most = max(most, index - oldest + 1)
    return most


def complaints(mirrors: list[Mirror], rate: float, workers: int) -> list[str]:
    """Return what the mirrors have to say against the client; what was under way at once may have arrived at once."""
    found: list[str] = []
    burst = max(5, 0.04 * rate)
    for number, mirror in enumerate(mirrors, 1):
        if (busiest := busiest_second(mirror.requests)) > rate + burst + workers:
            found.append(f"mirror {number} was asked {busiest} times in a second")
        rests = sum(request.answer is Answer.BUSY_SECOND for request in mirror.requests)
        if (asked := mirror.asked_while_resting()) > rests * workers:
            found.append(f"mirror {number} was asked {asked} times while it rested")
    return found


def report(paths: list[str], passes: list[Pass], mirrors: list[Mirror], rate: float) -> None:
    """Print what the two passes took and what the mirrors saw."""
    requests = requests_to(mirrors)
    python = f"{platform.python_implementation()} {platform.python_version()}"
    size = sum((STDLIB / path).stat().st_size for path in paths) / 1e6
    print(f"{len(paths)} files, {size:.1f} MB: the standard library of {python}")
    print("       ", *(f"{name:>9}" for name in ("files", *COUNTS, "requests", "seconds")))
    for number, done in enumerate(passes, 1):
        columns = (len(done.results), *done.counts.values(), done.requests)
        print(f"pass {number}:", *(f"{value:9}" for value in columns), f"{done.seconds:9.2f}")
    answers = Counter(str(request.answer) for request in requests)
    print("the mirrors answered with", ", ".join(f"{answer}: {count}" for answer, count in answers.most_common()))
    for number, mirror in enumerate(mirrors, 1):
        asked, busiest, resting = len(mirror.requests), busiest_second(mirror.requests), mirror.asked_while_resting()
        print(
            f"mirror {number}: {asked:4} requests, {busiest} in its busiest second (limit {rate:g}), {resting} at rest"
        )
    print(f"achieved rate: {achieved_rate(requests):.1f} requests per second")


def verdict(found: list[str]) -> int:
    """Print whether all went well; return the exit code."""
    if not found:
        print("ok: every body matches its file, the second pass asked no mirror, and no mirror was pressed")
        return 0
    for text in found[:SHOWN_FAILURES]:
        print(text)
    print(f"FAILED; problems: {len(found)}")
    return 1


def positive(text: str) -> int:
    """Read a whole number above zero."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above zero")
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fetch the standard library from three mirrors that misbehave.")
    parser.add_argument("--files", type=positive, help="how many files to fetch (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other mishaps (default: %(default)s)")
    parser.add_argument(
        "--rate", type=float, default=300, help="requests per second to each mirror (default: %(default)s)"
    )
    parser.add_argument("--workers", type=positive, default=16, help="requests at once (default: %(default)s)")
    parser.add_argument("--async", action="store_true", dest="tasks", help="asyncio tasks instead of threads")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch, check, report; return the exit code."""
    options = parse(arguments)
    paths = stdlib_files()[: options.files]
    with flaky_mirrors(STDLIB, paths, options.seed) as mirrors:
        if options.tasks:
            passes = asyncio.run(fetch_in_tasks(paths, mirrors, options))
        else:
            passes = fetch_in_threads(paths, mirrors, options)
    report(paths, passes, mirrors, options.rate)
    return verdict(problems(paths, passes) + complaints(mirrors, options.rate, options.workers))


if __name__ == "__main__":
    sys.exit(main())
