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
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "installed-from"

EXTRAS = ("redis", "aiomultiprocess")
GROUPS = ("test", "lint", "bench")
LINTERS = (("ruff", "check"), ("ruff", "format", "--check"), ("mypy",), ("pyright",))
PIP_INSTALL = ("-m", "pip", "install", "--disable-pip-version-check", "--quiet")
TOOLS = ("uv", "pytest", "ruff", "mypy", "pyright")

INTERRUPTED = 130


class CleanupError(Exception):
    """A task cannot go on; the message says why and what to do."""


def demo(*arguments: str) -> int:
    """Run examples/mirrors.py; further arguments go to it."""
    _ensure_environment()
    return _run(VENV_PYTHON, "examples/mirrors.py", *arguments)


def test(*arguments: str) -> int:
    """Run the tests; further arguments go to pytest."""
    _ensure_environment()
    if not shutil.which("redis-server"):
        _say("redis-server is missing; the tests that start one will fail. To install it: apt-get install redis-server")
    return _run(VENV_PYTHON, "-m", "pytest", *arguments)


def lint() -> int:
    """Run ruff, mypy and pyright, all of them even when one fails."""
    _ensure_environment()
    failed = []
    for linter in LINTERS:
        _say(f"== {' '.join(linter)}")
        if _run(VENV_PYTHON, "-m", *linter) != 0:
            failed.append(" ".join(linter))
    _say(f"Failed: {', '.join(failed)}" if failed else "All linters passed.")
    return 1 if failed else 0


def bench(*arguments: str) -> int:
    """Run benchmarks/run.py; further arguments go to it."""
    _ensure_environment()
    return _run(VENV_PYTHON, "benchmarks/run.py", *arguments)


def status() -> int:
    """Show the state of git, of .venv and of the tools."""
    installed = _installed_versions()
    report = {
        "python": f"{sys.version.split()[0]} ({sys.executable})",
        ".venv": "fresh" if _environment_is_fresh() else "missing or out of date: run `python cleanup.py venv`",
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
    _ensure_environment()
    return 0


def install() -> int:
    """Install opero into the Python that runs this script."""
    if Path(sys.prefix) == VENV:
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
    "lint": lint,
    "bench": bench,
    "status": status,
    "venv": venv,
    "install": install,
}
PASS_ARGUMENTS_ON = {"demo", "test", "bench"}


def _ensure_environment() -> None:
    if _environment_is_fresh():
        return
    if not _environment_has_this_python():
        _create_environment()
    _install_packages()
    STAMP.write_text(_fingerprint(), encoding="utf-8")


def _environment_is_fresh() -> bool:
    complete = VENV_PYTHON.exists() and VERSION_FILE.exists() and STAMP.exists()
    return complete and STAMP.read_text(encoding="utf-8") == _fingerprint()


def _fingerprint() -> str:
    made_for = f"{ROOT} {sys.version_info[:2]}"  # an editable install holds the absolute path
    return hashlib.sha256(PYPROJECT.read_bytes() + made_for.encode()).hexdigest()


def _environment_has_this_python() -> bool:
    if not VENV_PYTHON.exists():
        return False
    version = sys.version_info[:2]
    probe = f"import sys, pip; sys.exit(sys.prefix == sys.base_prefix or sys.version_info[:2] != {version})"
    return _run(VENV_PYTHON, "-c", probe, quiet=True) == 0


def _create_environment() -> None:
    _say("Making .venv ...")
    if _run(sys.executable, "-m", "venv", "--clear", VENV) != 0:
        raise CleanupError(
            "The virtual environment could not be made; the reason stands above."
            " On Debian and Ubuntu the package python3-venv is needed: apt-get install python3-venv."
        )


def _install_packages() -> None:
    _say("Installing opero and its tools into .venv ...")
    wanted = ["--editable", f".[{','.join(EXTRAS)}]", *_group_requirements()]
    if not (_install_with_uv(wanted) or _install_with_pip(wanted)):
        raise CleanupError(
            "The packages could not be installed; the reason stands above."
            " If it is the network, check pip's index and proxy settings; then run the same command again."
        )


def _install_with_uv(wanted: list[str]) -> bool:
    if _run(VENV_PYTHON, *PIP_INSTALL, "uv", quiet=True) != 0:
        _say("uv cannot be installed; going on with pip, which takes longer.")
        return False
    # Without the reinstall uv would not build opero again, and only a build writes __version__.py.
    options = ["--quiet", "--python", str(VENV_PYTHON), "--reinstall-package", "opero"]
    if _run(VENV_PYTHON, "-m", "uv", "pip", "install", *options, *wanted) == 0:
        return True
    _say("uv failed; trying the same with pip.")
    return False


def _install_with_pip(wanted: list[str]) -> bool:
    return _run(VENV_PYTHON, *PIP_INSTALL, *wanted) == 0


def _group_requirements() -> list[str]:
    groups = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["dependency-groups"]
    return [requirement for name in GROUPS for requirement in _expand_group(name, groups)]


def _expand_group(name: str, groups: dict[str, Any]) -> Iterator[str]:
    # By hand, because pip has `--group` only since 25.1.
    for entry in groups[name]:
        if isinstance(entry, str):
            yield entry
        else:
            yield from _expand_group(entry["include-group"], groups)


def _installed_versions() -> dict[str, str]:
    site_packages = sysconfig.get_path("purelib", "venv", {"base": str(VENV)})
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
