"""What opero offers by name, and nothing else."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import opero
import opero.concurrency
import opero.core
import opero.exceptions

# The names of the design's section 3.
TOP = [
    "GIVE_UP",
    "NEXT",
    "AllFailedError",
    "Breaker",
    "Cache",
    "CallStats",
    "CallTimeoutError",
    "CircuitOpenError",
    "FailedItemsWarning",
    "MisuseError",
    "OperoError",
    "Outcome",
    "RateLimitedError",
    "RateLimiter",
    "RejectedResultError",
    "Results",
    "WorkerCrashedError",
    "__version__",
    "candidates",
    "candidates_from",
    "clear_cache",
    "configure_logging",
    "control",
    "on_event",
    "opero",
    "opmap",
]
CORE = [
    "RateLimiter",
    "get_cache_context",
    "get_cache_decorator",
    "get_fallback_decorator",
    "get_rate_limit_decorator",
    "get_retry_decorator",
]
CONCURRENCY = ["get_parallel_executor", "get_parallel_map_decorator"]


def modules():
    """Every module of the package."""
    names = [found.name for found in pkgutil.walk_packages(opero.__path__, "opero.")]
    return [opero, *(importlib.import_module(name) for name in names)]


def test_opero_exports_its_public_names_and_no_other():
    assert opero.__all__ == TOP


def test_opero_sorts_its_public_names():
    assert opero.__all__ == sorted(opero.__all__, key=lambda name: (not name.isupper(), name))


@pytest.mark.parametrize("name", TOP)
def test_opero_has_each_public_name(name):
    assert hasattr(opero, name)


@pytest.mark.parametrize(
    "name", ["concurrency.get_parallel_executor", "http.retry_after", "telemetry.lines.log_events", "testing.instant"]
)
def test_what_a_module_has_needs_no_import_but_that_of_opero(name):
    """As the README writes it."""
    program = f"import opero; print(opero.{name}.__name__)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout == f"{name.rpartition('.')[2]}\n", run.stderr


@pytest.mark.parametrize("package", ["opero", "opero.core", "opero.telemetry"])
def test_a_shell_completes_also_names_that_nobody_has_asked_for(package):
    program = f"import {package} as it; print(*dir(it))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = {
        "opero": opero.__all__,
        "opero.core": opero.core.__all__,
        "opero.telemetry": ["lines", "otel", "prometheus"],
    }
    assert set(names[package]) <= set(run.stdout.split())


def test_a_star_import_gives_the_public_names():
    namespace: dict[str, object] = {}
    exec("from opero import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(TOP)


@pytest.mark.parametrize("name", CORE)
def test_core_exports_each_single_policy(name):
    assert name in opero.core.__all__
    assert callable(getattr(opero.core, name))


@pytest.mark.parametrize("name", opero.exceptions.__all__)
def test_core_exports_each_exception(name):
    assert name in opero.core.__all__
    assert getattr(opero.core, name) is getattr(opero.exceptions, name)


def test_core_sorts_its_public_names():
    assert opero.core.__all__ == sorted(opero.core.__all__)


def test_concurrency_exports_its_public_names_and_no_other():
    assert opero.concurrency.__all__ == CONCURRENCY
    assert all(callable(getattr(opero.concurrency, name)) for name in CONCURRENCY)


def test_there_is_no_fallback_error():
    assert [module.__name__ for module in modules() if hasattr(module, "FallbackError")] == []


def test_every_exception_of_opero_is_an_opero_error():
    defined = [
        kind
        for _, kind in inspect.getmembers(opero.exceptions, inspect.isclass)
        if issubclass(kind, BaseException) and kind.__module__ == "opero.exceptions"
    ]
    assert {kind.__name__ for kind in defined} == set(opero.exceptions.__all__)
    assert all(issubclass(kind, opero.OperoError) for kind in defined)


def test_an_opero_error_is_an_ordinary_exception():
    assert opero.OperoError.__mro__[1] is Exception


def test_an_all_failed_error_is_an_exception_group():
    assert issubclass(opero.AllFailedError, ExceptionGroup)


@pytest.mark.parametrize("module", [opero, opero.core, opero.concurrency, opero.exceptions], ids=lambda m: m.__name__)
def test_every_public_name_is_documented(module):
    objects = {name: getattr(module, name) for name in module.__all__ if name != "__version__"}
    assert [name for name, value in objects.items() if not (value.__doc__ or "").strip()] == []


def test_the_version_is_one_that_packaging_tools_understand():
    assert re.fullmatch(r"\d+(\.\d+)+((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[\w.]+)?", opero.__version__)


def test_type_checkers_find_the_mark_of_a_typed_package():
    assert Path(opero.__file__).with_name("py.typed").is_file()


def test_the_name_of_the_decorator_survives_the_import_of_its_module():
    source = (
        "import opero.decorators.opero, opero.decorators.opmap, opero\n"
        "assert callable(opero.opero) and callable(opero.opmap)\n"
        "from opero import opero as decorator\n"
        "assert decorator is opero.opero\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", source], check=True)
