"""Fetch the standard library of the running Python from three mirrors that misbehave, and check every byte.

The mirrors (`services/flaky_mirrors.py`) answer with 503 and 429, reset connections, are slow, and one is dead at
first. They count what comes too fast, and what comes while they rest. `coping` below is all that it takes. A second
pass over the same files is answered from the cache.

    python examples/mirrors.py             # threads and httpx.Client
    python examples/mirrors.py --async     # asyncio and httpx.AsyncClient
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import httpx
from services.flaky_mirrors import complaints, flaky_mirrors, report

from opero import opmap
from opero.http import retry_after

STDLIB = Path(sysconfig.get_path("stdlib"))
NOT_STDLIB = {"site-packages", "dist-packages"}
COUNTS = ("attempts", "retries", "fallbacks", "hits", "failures")


def coping(options: argparse.Namespace) -> dict[str, Any]:
    """Say how to cope with the mirrors: the same for threads and tasks."""
    return {
        "workers": options.workers,
        "arg_fallback": "mirror",  # the parameter whose values are tried in turn
        "retries": 5,  # rounds through the mirrors, after the first
        "retry_on": retry_after,  # what is worth another request, and when the mirror wants it
        "rate_limit": options.rate,  # requests per second, whoever makes them,
        "per": "mirror",  # to each mirror: one that asks for a rest holds up no other
        "cache": True,
        "return_exceptions": True,  # a file that no mirror gives is its exception in the list
        "progress": "standard library",
    }


def fetch_in_threads(paths: list[str], urls: list[str], options: argparse.Namespace) -> list[tuple[list[Any], Any]]:
    """Fetch every file twice, with threads; return the results and the statistics after each pass."""
    # trust_env: a proxy named in the environment is not for loopback.
    with httpx.Client(trust_env=False) as client:

        @opmap(mode="thread", **coping(options))
        def fetch(path: str, mirror: str | list[str]) -> bytes:
            """Fetch one file from one mirror: the call gives a list of mirrors, the function gets one of them."""
            return client.get(f"{mirror}/{path}").raise_for_status().content

        return [(fetch(paths, mirror=urls), fetch.stats.snapshot()) for _ in range(2)]


async def fetch_in_tasks(paths: list[str], urls: list[str], options: argparse.Namespace) -> list[tuple[list[Any], Any]]:
    """Fetch every file twice, with asyncio."""
    async with httpx.AsyncClient(trust_env=False) as client:

        @opmap(mode="async", **coping(options))
        async def fetch(path: str, mirror: str | list[str]) -> bytes:
            """Fetch one file from one mirror."""
            return (await client.get(f"{mirror}/{path}")).raise_for_status().content

        return [(await fetch(paths, mirror=urls), fetch.stats.snapshot()) for _ in range(2)]


def stdlib_files() -> list[str]:
    """Return the names of the standard library's source files, relative to its folder."""
    names = (file.relative_to(STDLIB) for file in STDLIB.rglob("*.py"))
    return sorted(name.as_posix() for name in names if NOT_STDLIB.isdisjoint(name.parts))


def problems(paths: list[str], results: list[Any]) -> list[str]:
    """Compare what came with the files on disk."""
    found = [] if len(results) == len(paths) else [f"{len(results)} results for {len(paths)} files"]
    for path, result in zip(paths, results, strict=False):
        if result != (STDLIB / path).read_bytes():
            found.append(f"{path}: {result!r}" if isinstance(result, Exception) else f"{path}: another text")
    return found


def main() -> int:
    """Fetch, report, check; return the exit code."""
    parser = argparse.ArgumentParser(description="Fetch the standard library from three mirrors that misbehave.")
    parser.add_argument("--files", type=int, help="how many files to fetch (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other mishaps (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=300, help="requests a second to a mirror (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=16, help="requests at once (default: %(default)s)")
    parser.add_argument("--async", action="store_true", dest="tasks", help="asyncio tasks instead of threads")
    options = parser.parse_args()
    paths = stdlib_files()[: options.files]
    print(f"{len(paths)} files: the standard library of Python {platform.python_version()}")
    began = time.perf_counter()
    with flaky_mirrors(STDLIB, paths, options.seed) as mirrors:
        urls = [mirror.url for mirror in mirrors]
        if options.tasks:
            passes = asyncio.run(fetch_in_tasks(paths, urls, options))
        else:
            passes = fetch_in_threads(paths, urls, options)
    (first, after_first), (second, after_both) = passes
    for name, stats in (("first pass ", after_first), ("both passes", after_both)):
        print(name, *(f"{count}: {getattr(stats, count)}" for count in COUNTS))
    print(f"{time.perf_counter() - began:.1f} s")
    report(mirrors, options.rate)
    found = problems(paths, first) + problems(paths, second) + complaints(mirrors, options.rate, options.workers)
    if after_both.attempts > after_first.attempts:
        found.append("the second pass asked a mirror; the cache should have answered")
    print(*found[:10] or ["ok: every body matches its file, and no mirror was pressed"], sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
