"""What a traceback, a note and the message of a group show."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import traceback

import pytest

from conftest import as_async
from opero import AllFailedError, opero, opmap
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


# Tracebacks


def frames_of(error):
    """The files of a traceback, opero's each by ``opero``, others by what they are to the test."""
    names = [frame.f_globals.get("__name__", "user") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return ["opero" if name.startswith("opero.") else "user" for name in names if not name.startswith("asyncio")]


def divide(item):
    return 1 // item


def divide_deeper(item):
    return divide(item)


OPTIONS = {
    "first attempt": {"retries": 0},
    "retries": {"retries": 2, "min_delay": 0},
    "cache": {"cache": True, "retries": 0},
    "limits": {"rate_limit": 1000, "max_concurrent": 2, "breaker": 9, "total_timeout": 9, "retries": 0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_traceback_has_the_frames_of_the_user_and_one_of_operos(world, options):
    function = opero(**options)(divide_deeper)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) as caught:
            function(0)
        assert frames_of(caught.value) == ["user", "opero", "user", "user"]


def test_a_traceback_of_an_async_function_has_one_frame_of_operos():
    @opero(retries=1, min_delay=0)
    async def fail():
        return divide(0)

    with pytest.raises(ZeroDivisionError) as caught:
        asyncio.run(fail())
    assert frames_of(caught.value) == ["user", "opero", "user", "user"]


def test_each_of_two_nested_functions_has_one_frame():
    @opero(retries=0)
    def outer(item):
        return opero(retries=1, min_delay=0)(divide)(item)

    with pytest.raises(ZeroDivisionError) as caught:
        outer(0)
    assert frames_of(caught.value) == ["user", "opero", "user", "opero", "user"]


def test_a_generator_that_fails_at_once_has_one_frame_of_operos():
    @opero(retries=1, min_delay=0)
    def items():
        yield divide(0)

    with pytest.raises(ZeroDivisionError) as caught:
        next(items())
    assert frames_of(caught.value) == ["user", "opero", "user", "user"]


def test_an_error_of_operos_own_has_one_frame(world):
    def fail():
        """Not called: there is no time."""

    with pytest.raises(AllFailedError) as caught:
        opero(retries=0, arg_fallback="item")(divide)([0, 0])
    assert frames_of(caught.value) == ["user", "opero"]
    assert frames_of(caught.value.exceptions[0]) == ["user"]


def test_a_wrong_call_shows_where_it_was_made():
    with pytest.raises(TypeError) as caught:
        opero(divide)(1, 2)
    assert frames_of(caught.value)[0] == "user"
    assert len(frames_of(caught.value)) <= 3


@pytest.mark.parametrize("decorator", [opero, opmap])
def test_a_refused_option_shows_where_the_decorator_stands(decorator):
    with pytest.raises(ValueError, match="cache=True") as caught:
        decorator(cache_ttl=5)(divide)
    assert frames_of(caught.value)[0] == "user"
    assert len(frames_of(caught.value)) <= 3


def stopping(mode, **options):
    return opmap(**{**mode.options, "retries": 0, "return_exceptions": False, **options})(mode.define(divide))


def test_the_failure_that_stops_a_map_has_one_frame_of_operos(mode):
    with pytest.raises(ZeroDivisionError) as caught:
        mode.run(stopping(mode), [1, 0])
    shown = frames_of(caught.value)
    assert shown.count("opero") == 1
    text = "".join(traceback.format_exception(caught.value))
    assert "return 1 // item" in text
    assert f"opero{os.sep}concurrency{os.sep}worker.py" not in text


@pytest.mark.parametrize("options", [{}, {"attempt_timeout": 30}], ids=["here", "in a worker"])
def test_a_single_call_of_a_map_has_one_frame_of_operos(options):
    with pytest.raises(ZeroDivisionError) as caught:
        opmap(mode="process", retries=0, **options)(divide).one(0)
    assert frames_of(caught.value).count("opero") == 1


def test_the_error_of_an_item_has_no_frame_of_operos(mode):
    (failed,) = mode.run(stopping(mode, return_exceptions=True), [1, 0]).failed
    assert "opero" not in frames_of(failed.error)
    with pytest.raises(ZeroDivisionError) as caught:
        failed.result  # noqa: B018 - it raises
    assert frames_of(caught.value)[:2] == ["user", "opero"]
    assert "opero" not in frames_of(caught.value)[2:]


def test_an_error_whose_notes_cannot_be_read_is_raised_all_the_same():
    class ShyError(Exception):
        @property
        def __notes__(self):
            raise RuntimeError

    @opero(retries=0)
    def fail():
        raise ShyError

    with pytest.raises(ShyError):
        fail()


def loading():
    try:
        raise ConnectionError("the database is away")  # noqa: TRY301 - it stands for a call that raises
    except ConnectionError:
        raise ValueError("cannot load")  # noqa: B904 - as most programs do


@pytest.mark.parametrize("options", [{}, {"cache": True}, {"breaker": 5}, {"max_concurrent": 1}, {"total_timeout": 60}])
@pytest.mark.parametrize("is_async", [False, True])
def test_what_an_error_was_raised_during_stays_when_the_call_is_made_in_an_except_block(is_async, options, fake_clock):
    f = opero(retries=1, retry_on=ValueError, **options)(as_async(loading) if is_async else loading)

    async def load():
        try:
            raise KeyError("not in the cache")  # noqa: TRY301 - as above
        except KeyError:
            await f() if is_async else f()

    with pytest.raises(ValueError, match="cannot load") as caught:
        asyncio.run(load())
    assert isinstance(caught.value.__context__, ConnectionError)
    assert isinstance(caught.value.__context__.__context__, KeyError)
