"""What the tests with other people's programs share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 60  # seconds for what takes a few


class Flaky:
    """Gives back what it is called with, but fails the first time."""

    def __init__(self) -> None:
        self.tries = 0

    def __call__(self, value):
        self.tries += 1
        if self.tries == 1:
            raise ConnectionError
        return value


@pytest.fixture
def flaky() -> Flaky:
    return Flaky()


@pytest.fixture
def program(tmp_path) -> Callable[..., str]:
    """Runs source text as a script that ends within `PATIENCE` with exit code 0; gives what it printed."""

    def run(source: str, *arguments: str) -> str:
        path = tmp_path / "program.py"
        path.write_text(textwrap.dedent(source))
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, str(path), *arguments]
        with subprocess.Popen(command, cwd=tmp_path, text=True, start_new_session=True, **pipes) as started:
            try:
                printed, complaints = started.communicate(timeout=PATIENCE)
            finally:
                if started.returncode is None:
                    os.killpg(started.pid, signal.SIGKILL)  # its workers, too
        assert started.returncode == 0, complaints
        return printed.strip()

    return run
