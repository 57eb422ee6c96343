"""Where a progress bar is shown, and where none is."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from opero import opmap


class Tee:
    """Something that text can be written to, and no more."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def echo(item):
    return item


def test_a_map_of_a_program_without_stderr_runs(mode):
    source = f"{'async ' if mode.is_async else ''}def work(item): return item\n"
    source += f"from opero import opmap\nprint(opmap(mode={mode.name!r}, retries=0)(work).run([1]))"
    command = f"exec '{sys.executable}' -c \"$SOURCE\" 2>&-"
    environment = {"SOURCE": source}
    run = subprocess.run(
        ["sh", "-c", command], stdout=subprocess.PIPE, text=True, timeout=30, check=True, env=environment
    )
    assert run.stdout == "[1]\n"


def test_a_map_runs_when_stderr_is_closed(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    assert opmap(mode="thread")(echo)([1]) == [1]


def test_what_does_not_say_that_it_is_a_terminal_shows_no_bar(monkeypatch):
    tee = Tee()
    monkeypatch.setattr(sys, "stderr", tee)
    assert opmap(mode="thread")(echo)([1]) == [1]
    assert tee.text == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Hinting:
    def __init__(self, hint):
        self.hint = hint

    def __iter__(self):
        return iter(range(8))

    def __length_hint__(self):
        return self.hint


class Sized(Hinting):
    def __len__(self):
        return 8


@pytest.mark.parametrize(
    ("make", "options", "bar"),
    [
        (lambda: iter(range(8)), {}, "8/8"),
        (lambda: reversed(range(8)), {}, "8/8"),
        (lambda: Hinting(8), {"total": 9}, "8/9"),
        (lambda: Sized(5), {"total": 9}, "8/8"),
        (lambda: (item for item in range(8)), {"total": 8}, "8/8"),
        (lambda: (item for item in range(8)), {}, "8item"),
        (lambda: Hinting(-1), {}, "8item"),
        (lambda: Hinting("many"), {}, "8item"),
    ],
    ids=["hint", "reversed", "total before hint", "length before total", "total", "unknown", "bad hint", "no number"],
)
def test_the_bar_knows_the_number_of_items_that_can_be_known(monkeypatch, make, options, bar):
    monkeypatch.setattr(sys, "stderr", Terminal())
    opmap(mode="thread", **options)(echo)(make())
    assert bar in sys.stderr.getvalue()


@pytest.mark.parametrize(("value", "is_shown"), [("", True), ("1", False)])
def test_tqdms_own_variables_are_heeded(value, is_shown):
    source = "import io, sys\nclass Terminal(io.StringIO):\n    isatty = lambda self: True\nsys.stderr = Terminal()\n"
    source += "from opero import opmap\nopmap(mode='thread')(abs)([1])\nprint('1/1' in sys.stderr.getvalue())"
    environment = {"TQDM_DISABLE": value} if value else {}
    command = [sys.executable, "-c", source]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=30, check=True, env=environment)
    assert run.stdout == f"{is_shown}\n"
