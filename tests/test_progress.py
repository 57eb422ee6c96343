"""Where a progress bar is shown, and where none is."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
from typing import ClassVar

import pytest
from tqdm import tqdm

import opero
from opero import opmap
from opero.concurrency.progress import Tally, make_progress


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


def fail_on_odd(item):
    if item % 2:
        raise ValueError(item)
    return item


QUIET = {"retries": 0, "return_exceptions": True}


def bar_of(monkeypatch, function=echo, items=range(8), **options):
    """What a terminal shows of a map."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    opmap(mode="serial", **QUIET, **options)(function)(items)
    return sys.stderr.getvalue()


# What ``progress`` may be


def test_text_is_the_label(monkeypatch):
    assert "pages: 100%" in bar_of(monkeypatch, progress="pages")


def test_a_mapping_has_options_of_the_bar(monkeypatch):
    shown = bar_of(monkeypatch, progress={"desc": "pages", "unit": "page", "bar_format": "{desc} {n_fmt} {unit}"})
    assert "pages 8 page" in shown


def test_options_of_the_bar_can_show_it_elsewhere(monkeypatch):
    tee = Tee()
    monkeypatch.setattr(sys, "stderr", tee)
    opmap(mode="serial", progress={"disable": False})(echo)(range(8))
    assert "8/8" in tee.text


class Bars(tqdm):
    made: ClassVar = []

    def __init__(self, **options):
        super().__init__(**options)
        self.made.append((self, options))


@pytest.mark.parametrize("progress", [Bars, functools.partial(Bars, unit="page")], ids=["class", "partial"])
def test_a_class_takes_the_place_of_tqdms(monkeypatch, progress):
    Bars.made.clear()
    shown = bar_of(monkeypatch, progress=progress)
    ((bar, options),) = Bars.made
    assert "8/8" in shown
    assert (options["total"], options["desc"], bar.n) == (8, "echo", 8)
    assert options["unit"] == ("item" if progress is Bars else "page")


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_the_bar_of_rich_can_be_used(capsys):
    bar = pytest.importorskip("tqdm.rich", reason="needs rich").tqdm
    opmap(mode="serial", progress=functools.partial(bar, disable=False), **QUIET)(fail_on_odd)(range(8))
    shown = capsys.readouterr()
    assert "8/8" in shown.out + shown.err


def test_a_function_is_told_how_far_the_map_has_come(mode):
    told = []
    mapped = opmap(**{**mode.options, "progress": told.append}, **QUIET)(mode.define(fail_on_odd))
    mode.run(mapped, range(8))
    assert (told[0].finished, told[-1].finished, told[-1].failed) == (0, 8, 4)
    assert {tally.total for tally in told} == {8}
    assert [tally.finished for tally in told] == sorted(tally.finished for tally in told)


def test_what_a_function_raises_ends_the_map():
    def tell(tally):
        if tally.finished == 3:
            raise KeyError

    with pytest.raises(KeyError):
        opmap(mode="serial", progress=tell)(echo)(range(8))


async def tell_later(tally):
    """Never awaited."""


@pytest.mark.parametrize("progress", [None, 3, [], tell_later, {1: 2}], ids=str)
def test_anything_else_is_refused_with_all_that_it_may_be(progress):
    with pytest.raises(TypeError, match=r"progress.* (a label, a mapping|plain one|text)"):
        opmap(mode="serial", progress=progress)(echo)


# Failures


@pytest.mark.parametrize(
    ("function", "options", "is_red"),
    [(fail_on_odd, {}, True), (echo, {}, False), (fail_on_odd, {"progress": {"colour": "blue"}}, False)],
    ids=["failures", "none", "its own colour"],
)
def test_a_bar_turns_red_when_items_have_failed(monkeypatch, function, options, is_red):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert ("\x1b[31m" in bar_of(monkeypatch, function, **options)) is is_red


def test_a_bar_says_how_many_failed_where_colours_are_not_wanted(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    shown = bar_of(monkeypatch, fail_on_odd)
    assert "\x1b[31m" not in shown
    assert "failed=4" in shown


def test_a_bar_is_not_drawn_again_while_nothing_ends(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = make_progress("label", "name", 9)
    for _ in range(50):
        bar.show(Tally(finished=3, failed=1, total=9))
    drawn = sys.stderr.getvalue().count("\r")
    bar.close()
    assert drawn < 5


# Off a terminal


def test_where_nobody_would_see_a_bar_the_log_has_a_line_now_and_then(monkeypatch, fake_clock):
    from loguru import logger

    lines = []
    sink = logger.add(lines.append, format="{message}", level="INFO", filter="opero")
    opero.configure_logging()
    try:

        def work(item):
            fake_clock.tick(1)
            return fail_on_odd(item)

        monkeypatch.setattr(sys, "stderr", Tee())
        opmap(mode="serial", **QUIET)(work)(range(100))
        with_bar = len(lines)
        opmap(mode="serial", progress=False, **QUIET)(work)(range(100))
    finally:
        logger.remove(sink)
        logger.disable("opero")
    lines = [line.partition("<locals>.")[2] for line in lines if "items done" in line]
    assert lines == [
        "work: 10 of 100 items done in 10 s, 5 failed\n",
        "work: 30 of 100 items done in 30 s, 15 failed\n",
        "work: 70 of 100 items done in 1.2 min, 35 failed\n",
    ]
    assert with_bar > len(lines)


def test_a_bar_leaves_the_start_method_of_multiprocessing_to_the_program():
    source = """if True:
        import multiprocessing
        from opero import opmap

        opmap(mode="thread", progress={"disable": False}, retries=0)(abs)([1])
        multiprocessing.set_start_method("spawn")
    """
    subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, timeout=60)
