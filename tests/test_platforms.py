"""Programs on systems that lack what POSIX or Linux has, as far as a Linux without it can tell."""

from __future__ import annotations

import errno
import multiprocessing.heap
import subprocess
import sys

import numpy as np
import pytest

import opero

HIDE = """
import asyncio, multiprocessing.connection, multiprocessing.popen_spawn_posix, multiprocessing.resource_tracker
import multiprocessing.forkserver, multiprocessing.heap, os, signal, sqlite3, subprocess, sys, tempfile
import diskcache, loguru, platformdirs, prometheus_client, opentelemetry.sdk.trace, redis.asyncio, tenacity, tqdm.auto
import twat_cache, twat_mp

multiprocessing.resource_tracker._HAVE_SIGMASK = False  # it looked for it when it was imported
asyncio.run(asyncio.sleep(0))  # by which Python 3.14 finds out what the system's event loop is
MODULES = {modules}
NAMES = {names}
for name in MODULES:
    sys.modules[name] = None
for module, names in ((os, NAMES), (signal, NAMES)):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
sys.platform = {platform!r}
multiprocessing.set_start_method("spawn", force=True)  # the default on both
"""
HIDDEN = {
    "win32": {
        "modules": ["fcntl", "grp", "pwd", "resource", "termios"],
        "names": [
            *("fork", "register_at_fork", "geteuid", "getuid", "getgid", "sched_getaffinity", "killpg"),
            *("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_PATH", "O_NONBLOCK", "fchmod"),
            *("SIGHUP", "SIGALRM", "pthread_sigmask", "sigtimedwait", "sigwait", "setitimer"),
        ],
    },
    "darwin": {"modules": [], "names": ["sched_getaffinity", "O_PATH", "sigtimedwait", "memfd_create", "pidfd_open"]},
}
PROGRAM = """
import importlib, pkgutil, time
import opero
from opero import opmap

def double(x):
    if x == 3:
        raise ValueError("three")
    return 2 * x

async def double_later(x):
    return double(x)

QUIET = {"retries": 0, "return_exceptions": True, "progress": False, "workers": 2}

if __name__ == "__main__":
    for module in pkgutil.walk_packages(opero.__path__, "opero."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for mode, function in (("thread", double), ("process", double), ("async", double_later), ("process", double_later)):
        mapped = opmap(mode=mode, **QUIET)(function)
        assert mapped.run(range(5)).ok == [0, 2, 4, 8], mode
    folder = sys.argv[1]
    cached = opero.opero(cache=opero.Cache(backend="disk", cache_dir=folder))(double)
    assert [cached(1), cached(1), cached.stats.hits] == [2, 2, 1]
    large = opero.opero(cache=opero.Cache(backend="disk", cache_dir=folder))(lambda size: bytes(size))
    assert len(large(1_000_000)) == len(large(1_000_000)) == 1_000_000 * large.stats.hits
    cached.cache_clear()
    limited = opero.opero(rate_limit=1000, max_concurrent=2, breaker=3, total_timeout=5)(double)
    assert limited(2) == 4
    try:
        shared = opero.RateLimiter(1000, scope="machine", name="n", folder=folder)
        assert opero.opero(rate_limit=shared)(double)(2) == 4
        print("machine")
    except ValueError as error:
        print(error)
    # A worker that has to be ended by force.
    try:
        opmap(mode="process", attempt_timeout=0.5, **{**QUIET, "return_exceptions": False})(time.sleep)([30])
    except opero.CallTimeoutError:
        print("timeout")
"""


@pytest.mark.parametrize("platform", HIDDEN)
def test_opero_works_without_what_a_system_lacks(tmp_path, platform):
    program = tmp_path / "program.py"
    program.write_text(HIDE.format(platform=platform, **HIDDEN[platform]) + PROGRAM)
    run = subprocess.run(
        [sys.executable, program, tmp_path / "cache"], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stderr == ""
    assert run.stdout.splitlines()[-1:] == ["timeout"]
    if platform == "win32":
        assert "scope='machine'" in run.stdout
    else:
        assert "machine\n" in run.stdout


@pytest.mark.parametrize("place", ["missing", "read-only"])
def test_processes_need_no_shared_memory_of_the_system(monkeypatch, tmp_path, place):
    """AWS Lambda has no /dev/shm, and some containers have one that cannot be written."""
    if place == "read-only":
        monkeypatch.setattr(multiprocessing.heap.tempfile, "mkstemp", refuse)
        monkeypatch.setattr(multiprocessing.heap.Arena, "_dir_candidates", [str(tmp_path)])
    else:
        monkeypatch.setattr(multiprocessing.heap.Arena, "_dir_candidates", [str(tmp_path / "nowhere")])
    total = opero.opmap(workers=1, retries=0, progress=False, pool_options={"start_method": "spawn"})(sum_from)
    assert total([1, 2], array=np.ones(200_000)) == [199_999, 199_998]


def refuse(*args, **kwargs):
    raise OSError(errno.EROFS, "Read-only file system")


def sum_from(start, array):
    return array[start:].sum()
