"""How many functions and files of opero's a reader of one call passes: they are not to become more."""

from __future__ import annotations

import sys
from pathlib import Path

import opero

ROOT = Path(opero.__file__).parent


def passed(call):
    """The functions of opero's that a call passes, each by its file and name."""
    seen = set()

    def note(frame, event, _arg):
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(ROOT):
            seen.add((str(file.relative_to(ROOT)), frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def test_a_call_that_fails_once_passes_few_functions_in_few_files(monkeypatch):
    # Where it was imported, opero asks it whether anybody listens.
    monkeypatch.delitem(sys.modules, "loguru", raising=False)
    failures = []

    @opero.opero(retries=3, min_delay=0)
    def flaky():
        if failures:
            raise failures.pop()

    flaky()
    failures.append(ConnectionError())
    functions = passed(flaky)
    assert flaky.stats.retries == 1
    assert len(functions) <= 23
    assert len({file for file, _ in functions}) <= 5


def test_a_call_that_succeeds_passes_the_wrapper_only():
    @opero.opero
    def work():
        """Do nothing."""

    work()
    assert len(passed(work)) == 1


def test_an_item_of_a_map_passes_few_functions_in_few_files():
    """Those of the calling process; the first map of a program imports and prepares more than the second."""

    @opero.opmap(progress=False)
    def double(item):
        return 2 * item

    double([1])
    # Disk caches that other tests have left open are told of the fork.
    functions = {place for place in passed(lambda: double([2])) if not place[0].startswith("core/stores")}
    assert double.stats.calls == 2
    assert len(functions) <= 80
    assert len({file for file, _ in functions}) <= 15
