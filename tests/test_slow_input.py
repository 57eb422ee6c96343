"""An input that takes its time: what it holds up, and what not."""

from __future__ import annotations

import time

import pytest

from opero import opmap

PATIENCE = 10.0


def pulled(given, gates):
    """Items, each of which is there only when its gate is open; notes what had been given out before each pull."""
    seen = []

    def source():
        for item, gate in enumerate(gates):
            seen.append(len(given))
            assert gate.wait(PATIENCE)
            yield item

    return source(), seen


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "as completed"])
def test_finished_results_are_given_out_before_the_next_item_is_pulled(mode, ordered):
    given = []
    gates = []

    def source():
        for item in range(4):
            if item:
                # The item before that one, and all earlier ones, end meanwhile.
                time.sleep(0.1)
            gates.append(len(given))
            yield item

    mapped = opmap(**mode.options, ordered=ordered)(mode.define(lambda item: item))
    mode.each(given.append, mapped, source())
    # When the last one was pulled, those that ended during the pulls before had been seen.
    assert len(given) == 4
    assert gates[2:] == [1, 2]
