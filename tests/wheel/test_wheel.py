"""What the wheel has to do in an environment that holds nothing else: `python cleanup.py build` runs this.

It runs twice, without extras and with all of them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import opero
from opero import opero as resilient
from opero import opmap

SOURCE = Path(__file__).parent.parent.parent / "src"
MODULES_OF_EXTRAS = {
    "redis": "redis",
    "dask": "distributed",
    "ray": "ray",
    "opentelemetry": "opentelemetry",
    "prometheus": "prometheus_client",
}
INSTALLED = {extra for extra, module in MODULES_OF_EXTRAS.items() if importlib.util.find_spec(module)}


def cached_on_redis():
    @resilient(cache=True, cache_backend="redis", cache_options={"redis_port": 1}, retries=0)
    def double(number: int) -> int:
        return 2 * number

    assert double(2) == 4  # nobody listens at that port: it costs the cache, and not the call


def traced():
    from opero.telemetry import otel

    otel.instrument().close()


def counted():
    from opero.telemetry import prometheus

    prometheus.instrument().close()


def mapped_on(engine: str):
    @opmap(mode=engine)
    def double(number: int) -> int:
        return 2 * number

    if engine not in INSTALLED:  # a cluster is more than a test of the wheel should start
        double([1, 2])


def limited_on_redis():
    @resilient(rate_limit=5, rate_limit_options={"scope": "redis", "url": "redis://127.0.0.1:1/0"}, retries=0)
    def double(number: int) -> int:
        return 2 * number

    assert double(2) == 4  # nobody listens at that port: it costs the share in the limit


USES = {
    "redis": [cached_on_redis, limited_on_redis],
    "dask": [lambda: mapped_on("dask")],
    "ray": [lambda: mapped_on("ray")],
    "opentelemetry": [traced],
    "prometheus": [counted],
}


def test_it_is_the_wheel_that_is_tested():
    assert not Path(opero.__file__).is_relative_to(SOURCE)


def test_the_environment_has_no_extra_or_all_of_them():
    assert INSTALLED in (set(), set(MODULES_OF_EXTRAS))
    named = importlib.metadata.metadata("opero").get_all("Provides-Extra")
    assert set(named) == {*MODULES_OF_EXTRAS, "all"}


@pytest.mark.parametrize(("extra", "use"), [(extra, use) for extra, uses in USES.items() for use in uses])
def test_what_needs_an_extra_works_with_it_and_without_it_names_it(extra, use):
    if extra in INSTALLED:
        use()
        return
    with pytest.raises(ImportError, match=rf"pip install 'opero\[{extra}\]'"):
        use()


def test_coroutines_are_mapped_in_event_loops_of_processes():
    @opmap(mode="async_process", workers=1)
    async def double(number: int) -> int:
        return 2 * number

    assert double.run([1, 2]) == [2, 4]


def test_lambdas_are_mapped_in_processes():
    assert opmap(mode="process", workers=2)(lambda number: 2 * number)([1, 2, 3]) == [2, 4, 6]


def test_entries_on_disk_outlive_the_object(tmp_path):
    def double(number: int) -> int:
        return 2 * number

    for hits in (0, 1):
        cached = resilient(cache=True, cache_backend="disk", cache_options={"cache_dir": tmp_path})(double)
        assert cached(2) == 4
        assert cached.stats.hits == hits


def test_the_command_tells_the_versions(tmp_path):
    command = [sys.executable, "-m", "opero", "--cache-dir", str(tmp_path)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert opero.__version__ in told


def test_type_checkers_find_the_mark_of_a_typed_package():
    assert Path(opero.__file__).with_name("py.typed").is_file()
