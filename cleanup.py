"""Run opero's development tasks in a virtual environment that this script makes and keeps up to date."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
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


DEVELOPMENT = Environment(".venv", extras=("redis", "aiomultiprocess"), groups=("test", "lint", "bench"))
# Of its own, because what it holds is heavy, and nobody who only runs the tests needs it.
WILD = Environment(".venv-wild", extras=("redis",), groups=("wild",))
# The reference is made by importing what it is about, telemetry included.
DOCS = Environment(".venv-docs", extras=("opentelemetry", "prometheus"), groups=("docs",))
SITE = "docs/_build/html"


def demo(*arguments: str) -> int:
    """Run examples/mirrors.py; further arguments go to it."""
    return _run(_python_of(DEVELOPMENT), "examples/mirrors.py", *arguments)


def test(*arguments: str) -> int:
    """Run the tests, those with other people's programs apart; further arguments go to pytest."""
    return _pytest(DEVELOPMENT, *arguments)


def wild(*arguments: str) -> int:
    """Run the tests of opero in frameworks, SDKs and other decorators; further arguments go to pytest."""
    return _pytest(WILD, "--override-ini", "testpaths=tests/wild", *arguments)


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


def bench(*arguments: str) -> int:
    """Run benchmarks/run.py; further arguments go to it."""
    return _run(_python_of(DEVELOPMENT), "benchmarks/run.py", *arguments)


def status() -> int:
    """Show the state of git, of the environments and of the tools."""
    installed = _installed_versions(DEVELOPMENT)
    report = {
        "python": f"{sys.version.split()[0]} ({sys.executable})",
        ".venv": "fresh" if _is_fresh(DEVELOPMENT) else "missing or out of date: run `python cleanup.py venv`",
        ".venv-wild": "fresh" if _is_fresh(WILD) else "missing or out of date: `python cleanup.py wild` makes it",
        ".venv-docs": "fresh" if _is_fresh(DOCS) else "missing or out of date: `python cleanup.py docs` makes it",
        **{name: installed.get(name, "missing") for name in ("opero", *TOOLS)},
        "redis-server": shutil.which("redis-server") or "missing",
    }
    _say("\n".join(f"{name:<13} {state}" for name, state in report.items()))
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
    "wild": wild,
    "lint": lint,
    "docs": docs,
    "bench": bench,
    "status": status,
    "venv": venv,
    "install": install,
}
PASS_ARGUMENTS_ON = {"demo", "test", "wild", "bench"}


def _pytest(environment: Environment, *arguments: str) -> int:
    python = _python_of(environment)
    if not shutil.which("redis-server"):
        _say("redis-server is missing; the tests that start one will fail. To install it: apt-get install redis-server")
    return _run(python, "-m", "pytest", *arguments)


def _python_of(environment: Environment) -> Path:
    """The environment's Python; the environment is made or brought up to date where it is not."""
    if not _is_fresh(environment):
        if not _has_this_python(environment):
            _create(environment)
        _install_packages(environment)
        environment.stamp.write_text(_fingerprint(), encoding="utf-8")
    return environment.python


def _is_fresh(environment: Environment) -> bool:
    complete = environment.python.exists() and VERSION_FILE.exists() and environment.stamp.exists()
    return complete and environment.stamp.read_text(encoding="utf-8") == _fingerprint()


def _fingerprint() -> str:
    made_for = f"{ROOT} {sys.version_info[:2]}"  # an editable install holds the absolute path
    return hashlib.sha256(PYPROJECT.read_bytes() + made_for.encode()).hexdigest()


def _has_this_python(environment: Environment) -> bool:
    if not environment.python.exists():
        return False
    version = sys.version_info[:2]
    probe = f"import sys, pip; sys.exit(sys.prefix == sys.base_prefix or sys.version_info[:2] != {version})"
    return _run(environment.python, "-c", probe, quiet=True) == 0


def _create(environment: Environment) -> None:
    _say(f"Making {environment.name} ...")
    if _run(sys.executable, "-m", "venv", "--clear", environment.folder) != 0:
        raise CleanupError(
            "The virtual environment could not be made; the reason stands above."
            " On Debian and Ubuntu the package python3-venv is needed: apt-get install python3-venv."
        )


def _install_packages(environment: Environment) -> None:
    _say(f"Installing opero and what it is developed with into {environment.name} ...")
    wanted = ["--editable", f".[{','.join(environment.extras)}]", *_group_requirements(environment)]
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
