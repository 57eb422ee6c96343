"""What a traceback, a note and the message of a group show."""

from __future__ import annotations

import copy
import pickle
import traceback

import pytest

from opero import AllFailedError, opero
from opero.utils.notes import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (8.6e-5, "86 µs"),
        (0.00099996, "1 ms"),
        (0.0123, "12 ms"),
        (1.2, "1.2 s"),
        (9.96, "10 s"),
        (59.98, "1 min"),
        (180, "3 min"),
        (5400, "1.5 h"),
        (172_800, "2 d"),
    ],
)
def test_a_duration_reads_as_a_person_would_say_it(seconds, text):
    assert duration(seconds) == text


# Groups


def ask(key):
    if key == "b":
        raise ValueError
    raise ConnectionError("no route")


@pytest.fixture
def group(world, fake_clock):
    """The error of a call that asked each of three keys twice."""
    with pytest.raises(AllFailedError) as caught:
        world.run(opero(retries=1, min_delay=3, jitter=False, arg_fallback="key")(world.define(ask)), ["a", "b", "c"])
    return caught.value


def test_the_message_of_a_group_says_how_many_errors_of_which_classes(group):
    assert group.message == (
        "ask: every candidate of 'key' failed in 2 rounds (6 attempts, 3 s): ConnectionError (4), ValueError (2)"
    )


def test_errors_that_are_alike_are_shown_once_and_kept_all(group):
    assert [type(error) for error in group.exceptions] == [ConnectionError, ValueError]
    assert [type(error) for error in group.errors] == [ConnectionError, ValueError, ConnectionError] * 2
    shown = "".join(traceback.format_exception(group))
    assert shown.count("ConnectionError: no route") == 1
    assert "opero: raised 4 times" in shown


@pytest.mark.parametrize("duplicate", [copy.copy, lambda group: pickle.loads(pickle.dumps(group))])
def test_a_copy_of_a_group_has_all_errors(group, duplicate):
    assert list(map(repr, duplicate(group).errors)) == list(map(repr, group.errors))


def test_errors_with_different_texts_are_all_in_the_group(fake_clock):
    @opero(retries=1, arg_fallback="key")
    def refuse(key):
        raise ValueError(key)

    with pytest.raises(AllFailedError) as caught:
        refuse(["a", "b"])
    assert [str(error) for error in caught.value.exceptions] == ["a", "b"]
