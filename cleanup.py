"""Run opero's development tasks in a virtual environment that this script makes and keeps up to date."""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import tomllib
except ImportError:
    sys.exit(f"cleanup.py needs Python 3.11 or newer, this is {sys.version.split()[0]}: run it with a newer python3.")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent
PYPROJECT = ROOT / "pyproject.toml"
VERSION_FILE = ROOT / "src" / "opero" / "__version__.py"
LINTERS = (("ruff", "check"), ("ruff", "format", "--check"), ("mypy",), ("pyright",))
OLDEST_PYTHON = (3, 11)
# What differs between versions of Python would show in these.
SMOKE_TESTS = (
    "tests/test_cache.py",
    "tests/test_cache_object.py",
    "tests/test_command_line.py",
    "tests/test_control.py",
    "tests/test_detection.py",
    "tests/test_function_identity.py",
    "tests/test_generators.py",
    "tests/test_interrupts.py",
    "tests/test_kept_pools.py",
    "tests/test_layers.py",
    "tests/test_overload.py",
    "tests/test_process_mode.py",
    "tests/test_serial.py",
    "tests/test_signals.py",
    "tests/test_starmap.py",
    "tests/test_timeouts.py",
)
SOAK_SECONDS = 600
# So few may have failed because the machine had other work: they wait for processes, sockets and each other.
MOST_AGAIN = 5
FAILED_TEST = re.compile(r"^(?:FAILED|ERROR) (\S+?::[^\[\s]+(?:\[.*?\])?)(?: - .*)?$", re.MULTILINE)
NO_TESTS = 5  # pytest's exit code where none was selected
PIP_INSTALL = ("-m", "pip", "install", "--disable-pip-version-check", "--quiet")
TOOLS = ("uv", "pytest", "ruff", "mypy", "pyright")

INTERRUPTED = 130


class CleanupError(Exception):
    """A task cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment in this folder, with opero and these of its extras and dependency groups in it."""

    name: str
    extras: tuple[str, ...]
    groups: tuple[str, ...]
    made_by: Path = Path(sys.executable)
    version: tuple[int, int] = sys.version_info[:2]

    @property
    def folder(self) -> Path:
        """Where it is."""
        return ROOT / self.name

    @property
    def python(self) -> Path:
        """The interpreter in it."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def stamp(self) -> Path:
        """A file that tells what it was last installed from."""
        return self.folder / "installed-from"


DEVELOPMENT = Environment(".venv", extras=("redis",), groups=("test", "lint", "bench"))
# Of its own, because what it holds is heavy, and nobody who only runs the tests needs it.
WILD = Environment(".venv-wild", extras=("redis",), groups=("wild",))
# Of its own, because both engines are large; named apart from the versions that the tests of executors need.
CLUSTERS = Environment(".venv-clusters", extras=("dask", "ray"), groups=("clusters",))
# The reference is made by importing what it is about, telemetry included.
DOCS = Environment(".venv-docs", extras=("opentelemetry", "prometheus"), groups=("docs",))
SITE = "docs/_build/html"
RELEASE = Environment(".venv-release", extras=(), groups=("release",))
# Each with the command that makes it.
ENVIRONMENTS = {DEVELOPMENT: "venv", WILD: "wild", CLUSTERS: "clusters", DOCS: "docs", RELEASE: "build"}
DIST = ROOT / "dist"
# What the wheel is tried by in an environment without anything else: examples, and tests of its own.
TESTS_OF_WHEEL = ("tests/wheel", "README.md", "docs/tutorial.md", "docs/topics", "--ignore=docs/topics/events.md")
NEEDED_BY_TESTS_OF_WHEEL = ("pytest", "pytest-timeout", "sybil")


def demo(*arguments: str) -> int:
    """Run examples/mirrors.py; further arguments go to it."""
    return _run(_python_of(DEVELOPMENT), "examples/mirrors.py", *arguments)


def test(*arguments: str) -> int:
    """Run the tests, in two processes for each CPU; with further arguments, pytest gets them in one process.

    Those with other people's programs and those that take long on purpose are apart: `wild`, `soak`.
    """
    return _pytest(DEVELOPMENT, *arguments) if arguments else _pytest_side_by_side(DEVELOPMENT)


def soak(*arguments: str) -> int:
    """Run the tests that try again and again what seldom goes wrong; further arguments go to pytest."""
    return _pytest(DEVELOPMENT, "-m", "soak", f"--session-timeout={SOAK_SECONDS}", *arguments)


def pythons() -> int:
    """Run some of the tests in each other CPython from 3.11 on that is in `PATH` or in pyenv's folder."""
    others = _other_pythons()
    if not others:
        _say("This machine has no other CPython from 3.11 on, neither in PATH nor in pyenv's folder.")
    failed = []
    for (major, minor), python in sorted(others.items()):
        _say(f"== Python {major}.{minor} ({python})")
        environment = Environment(
            f".venv-{major}.{minor}", DEVELOPMENT.extras, ("test",), made_by=python, version=(major, minor)
        )
        if _pytest(environment, *SMOKE_TESTS) != 0:
            failed.append(f"{major}.{minor}")
    if failed:
        _say(f"Failed: {', '.join(failed)}")
    return 1 if failed else 0


def wild(*arguments: str) -> int:
    """Run the tests of opero in frameworks, SDKs and other decorators; further arguments go to pytest."""
    return _pytest(WILD, "--override-ini", "testpaths=tests/wild", *arguments)


def clusters(*arguments: str) -> int:
    """Run the tests on clusters, in a network of their own; further arguments go to pytest."""
    python = _python_of(CLUSTERS)
    # Both engines listen on all interfaces that there are.
    unshare = shutil.which("unshare")
    if unshare is None:
        raise CleanupError("`unshare` is missing: it is of util-linux; the tests of clusters run on Linux only.")
    alone = [unshare, "--net", *(["--map-root-user"] if os.geteuid() else [])]
    own = ["--override-ini", "testpaths=tests/clusters", "--override-ini", "norecursedirs=.*"]
    return _run(*alone, python, "-m", "pytest", *own, *arguments)


def lint() -> int:
    """Run ruff, mypy and pyright, all of them even when one fails."""
    python = _python_of(DEVELOPMENT)
    failed = []
    for linter in LINTERS:
        _say(f"== {' '.join(linter)}")
        if _run(python, "-m", *linter) != 0:
            failed.append(" ".join(linter))
    _say(f"Failed: {', '.join(failed)}" if failed else "All linters passed.")
    return 1 if failed else 0


def docs() -> int:
    """Build the site into docs/_build/html; warnings are errors, and links within it are checked."""
    python = _python_of(DOCS)
    code = _run(python, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-b", "html", "docs", SITE)
    return code or _run(python, "docs/check_links.py", SITE)


def build() -> int:
    """Build wheel and sdist into dist/, and try the wheel in empty environments, without extras and with all."""
    python = _python_of(RELEASE)
    shutil.rmtree(DIST, ignore_errors=True)
    code = _run(python, "-m", "build", "--outdir", DIST)
    code = code or _run(python, "-m", "twine", "check", "--strict", *DIST.iterdir())
    return code or _try_wheel("") or _try_wheel("[all]")


def bench(*arguments: str) -> int:
    """Run benchmarks/run.py; further arguments go to it."""
    return _run(_python_of(DEVELOPMENT), "benchmarks/run.py", *arguments)


def status() -> int:
    """Show the state of git, of the environments and of the tools."""
    installed = _installed_versions(DEVELOPMENT)
    report = {
        "python": f"{sys.version.split()[0]} ({sys.executable})",
        **{
            made.name: "fresh" if _is_fresh(made) else f"missing or out of date: `python cleanup.py {by}` makes it"
            for made, by in ENVIRONMENTS.items()
        },
        **{name: installed.get(name, "missing") for name in ("opero", *TOOLS)},
        "redis-server": shutil.which("redis-server") or "missing",
    }
    _say("\n".join(f"{name:<14} {state}" for name, state in report.items()))
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        _say("git           missing, or this folder is no git checkout")
        return 0
    return _run(git, "status", "--short", "--branch")


def venv() -> int:
    """Make or update .venv, and nothing else."""
    _python_of(DEVELOPMENT)
    return 0


def install() -> int:
    """Install opero into the Python that runs this script."""
    if Path(sys.prefix) == DEVELOPMENT.folder:
        return venv()  # a plain install would replace the editable one
    if sys.prefix == sys.base_prefix and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists():
        raise CleanupError(
            "This Python belongs to the system, which does not let pip install into it. Make a virtual environment and"
            " use its Python: `python3 -m venv ENV`, then `ENV/bin/python cleanup.py install`."
        )
    return _run(sys.executable, "-m", "pip", "install", ".")


COMMANDS: dict[str, Callable[..., int]] = {
    "demo": demo,
    "test": test,
    "soak": soak,
    "pythons": pythons,
    "wild": wild,
    "clusters": clusters,
    "lint": lint,
    "docs": docs,
    "build": build,
    "bench": bench,
    "status": status,
    "venv": venv,
    "install": install,
}
PASS_ARGUMENTS_ON = {"demo", "test", "soak", "wild", "clusters", "bench"}


def _try_wheel(extras: str) -> int:
    """Install the wheel in dist/ where nothing else is, and test it; the exit code."""
    (wheel,) = DIST.glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        empty = Environment(folder, extras=(), groups=())
        _create(empty)
        _say(f"Trying {wheel.name}{extras} there ...")
        _install(empty, [f"{wheel}{extras}", *NEEDED_BY_TESTS_OF_WHEEL])
        return _run(empty.python, "-m", "pytest", "-p", "no:cacheprovider", *TESTS_OF_WHEEL)


def _pytest(environment: Environment, *arguments: str) -> int:
    python = _python_of(environment)
    _miss_redis()
    return _run(python, "-m", "pytest", *arguments)


def _miss_redis() -> None:
    if not shutil.which("redis-server"):
        _say("redis-server is missing; the tests that start one will fail. To install it: apt-get install redis-server")


def _pytest_side_by_side(environment: Environment) -> int:
    """Not by threads or workers of one pytest: maps start their processes in another way where threads are."""
    python = _python_of(environment)
    _miss_redis()
    began = time.monotonic()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # They wait for nearly half of their time: for processes, servers and moments.
    jobs = 2 * cpus
    shares = _shares([*ROOT.glob("tests/test_*.py"), ROOT / "README.md", ROOT / "docs"], jobs)
    counts: Counter[str] = Counter()
    failed = []
    again: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            started = {pool.submit(_run_share, python, share): share for share in shares}
            for done, ended in enumerate(as_completed(started), 1):
                names = " ".join(path.name for path in started[ended])
                code, output = ended.result()
                summary = output.strip().rpartition("\n")[2]
                counts.update({word: int(count) for count, word in re.findall(r"(\d+) ([a-z]+)", summary)})
                if code:
                    tests = FAILED_TEST.findall(output)
                    again.extend(tests)
                    if not tests:
                        failed.append(names)
                    _say(output)
                _say(f"[{done}/{len(shares)}] {names}: {summary.strip('= ')}")
        finally:
            pool.shutdown(cancel_futures=True)
    failures = sum(counts[word] for word in ("failed", "error", "errors"))
    _say("".join(f"Failed: {names}\n" for names in failed) + f"{time.monotonic() - began:.0f} s on {cpus} CPUs")
    _say(f"{counts['passed']} passed, {failures} failed, {counts['skipped']} skipped")
    if again and not failed and len(again) <= MOST_AGAIN:
        _say("Once more, with the machine for themselves:\n" + "\n".join(again))
        return _run(python, "-m", "pytest", "-p", "no:cacheprovider", *again)
    return 1 if failed or again else 0


def _shares(files: list[Path], jobs: int) -> list[list[Path]]:
    """What each pytest process gets: much at first, little at the end, so that all have work until then."""
    sizes = {path: path.stat().st_size for path in files}
    waiting = sorted(files, key=lambda path: sizes[path])
    left = sum(sizes.values())
    # Each process takes a second to begin, and one more for the servers of its tests.
    least = left / (5 * jobs)
    shares: list[list[Path]] = []
    while waiting:
        wanted = max(least, left / (2 * jobs))
        share = [waiting.pop()]
        while waiting and sum(sizes[path] for path in share) + sizes[waiting[-1]] <= wanted:
            share.append(waiting.pop())
        left -= sum(sizes[path] for path in share)
        shares.append(share)
    return shares


def _run_share(python: Path, share: list[Path]) -> tuple[int, str]:
    # Processes side by side would overwrite what they remember for `pytest --last-failed`.
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *share]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    ended = subprocess.run(command, cwd=ROOT, check=False, text=True, stdin=subprocess.DEVNULL, **output)
    return (0 if ended.returncode == NO_TESTS else ended.returncode), ended.stdout


def _other_pythons() -> dict[tuple[int, int], Path]:
    """One for each minor version but this one, the newest."""
    folders = [Path(folder) for folder in os.get_exec_path()]
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [path for folder in (*folders, *versions.glob("*/bin")) for path in folder.glob("python3.*")]
    found: dict[tuple[int, ...], Path] = {}
    for python in candidates:
        if re.fullmatch(r"python3\.\d+", python.name):
            version = _version_of(python)
            if version[:2] >= OLDEST_PYTHON and version[:2] != sys.version_info[:2]:
                found.setdefault(version, python)
    return {(version[0], version[1]): python for version, python in sorted(found.items())}


@functools.cache
def _version_of(python: Path) -> tuple[int, ...]:
    """Of a released CPython that can make environments; of anything else (), as of pyenv's stand-ins."""
    probe = (
        "import ensurepip, sys;"
        "is_released = sys.implementation.name == 'cpython' and sys.version_info.releaselevel == 'final';"
        "print(*(sys.version_info[:3] if is_released and not sys.abiflags else ()))"
    )
    ended = subprocess.run([python, "-c", probe], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return tuple(map(int, ended.stdout.split())) if ended.returncode == 0 else ()


def _python_of(environment: Environment) -> Path:
    """The environment's Python; the environment is made or brought up to date where it is not."""
    if not _is_fresh(environment):
        if not _has_this_python(environment):
            _create(environment)
        _install_packages(environment)
        environment.stamp.write_text(_fingerprint(environment), encoding="utf-8")
    return environment.python


def _is_fresh(environment: Environment) -> bool:
    complete = environment.python.exists() and VERSION_FILE.exists() and environment.stamp.exists()
    return complete and environment.stamp.read_text(encoding="utf-8") == _fingerprint(environment)


def _fingerprint(environment: Environment) -> str:
    made_for = f"{ROOT} {environment.version}"  # an editable install holds the absolute path
    return hashlib.sha256(PYPROJECT.read_bytes() + made_for.encode()).hexdigest()


def _has_this_python(environment: Environment) -> bool:
    if not environment.python.exists():
        return False
    probe = f"import sys, pip; sys.exit(sys.prefix == sys.base_prefix or sys.version_info[:2] != {environment.version})"
    return _run(environment.python, "-c", probe, quiet=True) == 0


def _create(environment: Environment) -> None:
    _say(f"Making {environment.name} ...")
    if _run(environment.made_by, "-m", "venv", "--clear", environment.folder) != 0:
        raise CleanupError(
            "The virtual environment could not be made; the reason stands above."
            " On Debian and Ubuntu the package python3-venv is needed: apt-get install python3-venv."
        )


def _install_packages(environment: Environment) -> None:
    _say(f"Installing opero and what it is developed with into {environment.name} ...")
    _install(environment, ["--editable", f".[{','.join(environment.extras)}]", *_group_requirements(environment)])


def _install(environment: Environment, wanted: list[str]) -> None:
    if not (_install_with_uv(environment.python, wanted) or _install_with_pip(environment.python, wanted)):
        raise CleanupError(
            "The packages could not be installed; the reason stands above."
            " If it is the network, check pip's index and proxy settings; then run the same command again."
        )


def _install_with_uv(python: Path, wanted: list[str]) -> bool:
    if _run(python, *PIP_INSTALL, "uv", quiet=True) != 0:
        _say("uv cannot be installed; going on with pip, which takes longer.")
        return False
    # Without the reinstall uv would not build opero again, and only a build writes __version__.py.
    options = ["--quiet", "--python", str(python), "--reinstall-package", "opero"]
    if _run(python, "-m", "uv", "pip", "install", *options, *wanted) == 0:
        return True
    _say("uv failed; trying the same with pip.")
    return False


def _install_with_pip(python: Path, wanted: list[str]) -> bool:
    return _run(python, *PIP_INSTALL, *wanted) == 0


def _group_requirements(environment: Environment) -> list[str]:
    groups = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["dependency-groups"]
    return [requirement for name in environment.groups for requirement in _expand_group(name, groups)]


def _expand_group(name: str, groups: dict[str, Any]) -> Iterator[str]:
    # By hand, because pip has `--group` only since 25.1.
    for entry in groups[name]:
        if isinstance(entry, str):
            yield entry
        else:
            yield from _expand_group(entry["include-group"], groups)


def _installed_versions(environment: Environment) -> dict[str, str]:
    site_packages = sysconfig.get_path("purelib", "venv", {"base": str(environment.folder)})
    return {found.name: found.version for found in importlib.metadata.distributions(path=[site_packages])}


def _run(*command: str | Path, quiet: bool = False) -> int:
    code = subprocess.run(command, cwd=ROOT, check=False, capture_output=quiet).returncode
    return code if code >= 0 else 128 - code  # a shell's number for "killed by a signal"


def _say(message: str) -> None:
    print(message, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cleanup.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.__doc__, description=command.__doc__)
    return parser


def main(argv: list[str]) -> int:
    """Run the command that `argv` names and return its exit code."""
    passed_on = argv[1:] if argv and argv[0] in PASS_ARGUMENTS_ON else []
    arguments = _parser().parse_args(argv[: len(argv) - len(passed_on)])
    try:
        return COMMANDS[arguments.command](*passed_on)
    except CleanupError as error:
        print(f"cleanup.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
