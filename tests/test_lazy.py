"""Attributes that are computed when they are first read."""

from __future__ import annotations

import threading

import pytest
from side_by_side import SECONDS, forked, forks, results, started

from opero.core.lazy import lazy_attribute


class Slow:
    """Its attribute is there at once for the main thread; others compute it until they may go on."""

    def __init__(self) -> None:
        self.is_computing = threading.Event()
        self.may_go_on = threading.Event()

    @lazy_attribute
    def value(self) -> object:
        """What it is."""
        if threading.current_thread() is not threading.main_thread():
            self.is_computing.set()
            assert self.may_go_on.wait(SECONDS)
        return [threading.get_ident()]


@pytest.fixture
def slow():
    slow = Slow()
    yield slow
    slow.may_go_on.set()


def test_it_is_computed_once(slow):
    assert slow.value is slow.value


def test_a_class_shows_its_documentation():
    assert Slow.value.__doc__ == "What it is."


def test_nobody_waits_for_another_thread_and_all_get_the_first_value(slow):
    other = started(lambda: slow.value)
    assert slow.is_computing.wait(SECONDS)
    mine = slow.value
    slow.may_go_on.set()
    assert results([other])[0] is mine


class TestForks:
    pytestmark = forks

    def test_a_child_forked_while_a_thread_computes_it_waits_for_nobody(self, slow):
        started(lambda: slow.value)
        assert slow.is_computing.wait(SECONDS)
        assert forked(lambda: len(slow.value)) == "1"
