"""The mistakes that are made most, and what is said to whoever makes one."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys

import pytest

from opero import Cache, opero, opmap


def fetch(url, key="k"):
    return url


async def fetch_later(url):
    return url


def add(a, b):
    return a + b


def returns_a_coroutine(url):
    return fetch_later(url)


async def run_in_a_loop():
    return opmap(mode="async")(fetch_later).run(["url"])


class Client:
    @staticmethod
    def get(url):
        return url


THREADS = {"mode": "thread", "progress": False}

MISTAKES = {
    "a name of tenacity's": (lambda: opero(attempts=5), "write retries=…, the attempts after the first"),
    "a name of joblib's": (lambda: opmap(n_jobs=4), "write workers=…"),
    "which time limit": (lambda: opero(timeout=5), "write attempt_timeout=… for one execution, or total_timeout=…"),
    "a function that cannot be stopped": (
        lambda: opero(attempt_timeout=5)(fetch),
        "write `async def`, use the function's own timeout, or map it with @opmap(mode='process')",
    ),
    "a coroutine that is returned": (lambda: opero(returns_a_coroutine)("url"), "write `async def` and await inside"),
    "run in a notebook": (lambda: asyncio.run(run_in_a_loop()), "write await in place of .run"),
    "one item": (lambda: opmap(**THREADS)(fetch)("https://a.test"), "fetch.one("),
    "no items": (opmap(**THREADS)(fetch), "fetch() is a map and got no items; write fetch([item, …])"),
    "a number of items": (
        lambda: opmap(**THREADS)(fetch)(5),
        "write fetch.one(item) for one item, fetch([item, …]) for several",
    ),
    "a mapping of items": (lambda: opmap(**THREADS)(add)({"a": 1}, b=2), "add.starmap(mapping.items())"),
    "tuples of arguments": (lambda: opmap(**THREADS)(add)([(1, 2)]), "add.starmap(tuples) if each item is a tuple"),
    "the wrong order of decorators": (lambda: opero(vars(Client)["get"]), "put @opero below @staticmethod"),
    "a cache that is off": (lambda: opero(cache_ttl=60)(fetch), "add cache=True"),
    "a lifetime as the cache": (lambda: opero(cache=60)(fetch), "or a Cache, such as cache=Cache(ttl='15 minutes')"),
    "a typo in a Cache": (lambda: Cache(bakend="disk"), "did you mean 'backend'?"),
    "a backend as the cache": (lambda: opero(cache="disk")(fetch), "beside it cache_backend='disk'"),
    "an option that is no keyword": (lambda: opmap("thread"), "its options are keywords"),
    "a list of classes": (lambda: opero(retry_on=[OSError])(fetch), "write an Exception class, a tuple of them"),
    "a typo": (lambda: opero(retires=3), "did you mean 'retries'?"),
    "options of a map": (lambda: opero(workers=8), "maps have it: write @opmap(workers=…)"),
}


@pytest.mark.parametrize(("make", "answer"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_answered_with_what_to_write(make, answer):
    with pytest.raises(Exception, match=re.escape(answer)):
        make()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_main_module_that_is_not_guarded_is_told_once(tmp_path, method):
    program = tmp_path / "program.py"
    program.write_text(
        "from opero import opmap\n"
        f"@opmap(mode='process', workers=3, pool_options={{'start_method': {method!r}}})\n"
        "def double(x):\n    return 2 * x\n"
        "print(double([1, 2, 3]))\n"
    )
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert "put what shall run only once below `if __name__ == '__main__':`" in run.stderr
    assert len(run.stderr.splitlines()) <= 10


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_map_that_its_own_module_calls_while_it_is_imported_ends_soon(tmp_path, method):
    (tmp_path / "loads.py").write_text(
        "import os\nos.write(1, b'x')\nfrom opero import opmap\n"
        f"@opmap(workers=1, pool_options={{'start_method': {method!r}}})\n"
        "def double(x):\n    return 2 * x\n"
        "double([1, 2, 3])\n"
    )
    (tmp_path / "program.py").write_text("if __name__ == '__main__':\n    import loads\n")
    command = [sys.executable, tmp_path / "program.py"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "each imports the main module and that of the function" in run.stderr
    # Here and in one worker, and in the server, which imports for all of them.
    assert run.stdout == ("xxx" if method == "forkserver" else "xx")


NEIGHBOURS = {
    "retry_on=": "on exception exceptions",
    "retries=": "retry attempts tries max_tries",
    "attempt_timeout=": "timeout",
    "cache_ttl=": "ttl",
    "workers=": "n_jobs jobs max_workers concurrency",
    "max_concurrent=": "concurrency",
    "rate_limit=": "rate calls period",
    "min_delay=": "delay wait base_delay",
    "retry_options=": "stop before_sleep",
    "progress=": "desc",
    "batch_size=": "chunksize",
    "mode=": "backend executor pool",
    "pool_options=": "initializer worker_init",
}


@pytest.mark.parametrize(
    ("ours", "name"), [(ours, name) for ours, names in NEIGHBOURS.items() for name in names.split()]
)
def test_a_name_of_a_neighbour_is_answered_with_operos(ours, name):
    with pytest.raises(TypeError) as caught:
        opmap(**{name: 1})
    assert repr(name) in str(caught.value)
    assert f"write {ours}" in str(caught.value) or f" {ours}" in str(caught.value)


def test_a_backend_of_a_single_function_is_that_of_its_cache():
    with pytest.raises(TypeError, match=r"write cache_backend=… of the cache, or mode=… of a map"):
        opero(cache=True, backend="disk")
