"""Signal handlers and finalizers: they come between any two lines, and may call what they have interrupted."""

from __future__ import annotations

import itertools
import sys

import pytest
from side_by_side import started

from opero import RateLimiter, opero


def fail_or_not(value, key=("first", "second")):
    if value or key == "first":
        raise ValueError
    return key


@pytest.mark.parametrize(
    ("file", "policies"),
    [
        ("breaker.py", {"breaker": 2}),
        ("fallback.py", {"arg_fallback": "key", "fallback_cooldown": 0.001}),
        ("limits/line.py", {"rate_limit": 1_000_000, "per": "value"}),
    ],
)
def test_a_call_between_any_two_lines_of_another_one_waits_for_nothing(file, policies):
    function = opero(retries=0, default="failed", **policies)(fail_or_not)
    inside, values = [], itertools.count(1)

    def come_between(frame, _event, _argument):
        if not frame.f_code.co_filename.endswith(file):
            return None
        if not inside:
            inside.append(frame)
            function(next(values))
            function(0)
            inside.clear()
        return come_between

    def call():
        sys.settrace(come_between)
        try:
            return [function(next(values)) for _ in range(3)]
        finally:
            sys.settrace(None)

    assert started(call).result(20) == ["failed"] * 3


def test_who_waits_is_woken_between_any_two_lines_by_its_own_thread():
    limit = RateLimiter(200, max_burst=1)
    inside = []

    def come_between(frame, _event, _argument):
        if not frame.f_code.co_filename.endswith(("threading.py", "core/steps.py")):
            return None
        if not inside:
            inside.append(frame)
            limit.pause(0)
            inside.clear()
        return come_between

    def call():
        sys.settrace(come_between)
        try:
            return [limit.acquire() for _ in range(3)]
        finally:
            sys.settrace(None)

    assert started(call).result(20) == [True] * 3
