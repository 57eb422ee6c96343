"""Maps over tuples, each of which is the arguments of one call."""

from __future__ import annotations

import asyncio
import itertools
import pickle

import pytest

from conftest import Mode
from opero import opmap


def join(a, b, mark="-"):
    return f"{a}{mark}{b}"


def quote(text, key):
    if key == "bad":
        raise ConnectionError
    return f"{text} by {key}"


@opmap(mode="thread", progress=False)
def joined(a, b):
    return f"{a}{b}"


PAIRS = [("a", 1), ("b", 2), ("c", 3)]


@pytest.mark.parametrize("kind", [tuple, list, iter])
def test_each_tuple_is_the_arguments_of_one_call(mode, kind):
    mapped = opmap(**mode.options)(mode.define(join))
    assert mode.run(mapped.starmap, map(kind, PAIRS)) == ["a-1", "b-2", "c-3"]


def test_keyword_arguments_go_to_every_call(mode):
    mapped = opmap(**mode.options)(mode.define(join))
    assert mode.run(mapped.starmap, PAIRS, mark="+") == ["a+1", "b+2", "c+3"]


def test_a_stream_over_tuples_has_them_as_its_items(mode):
    mapped = opmap(**mode.options)(mode.define(join))
    outcomes = mode.stream(mapped.starmap, PAIRS)
    assert [(outcome.item, outcome.result) for outcome in outcomes] == [
        (("a", 1), "a-1"),
        (("b", 2), "b-2"),
        (("c", 3), "c-3"),
    ]


def test_tuples_may_differ_in_length(mode):
    mapped = opmap(**mode.options)(mode.define(join))
    assert mode.run(mapped.starmap, [("a", 1), ("b", 2, "+")]) == ["a-1", "b+2"]


def test_a_tuple_that_does_not_fit_the_function_is_the_error_of_its_item(mode):
    mapped = opmap(**mode.options, return_exceptions=True)(mode.define(join))
    wrong, right = mode.run(mapped.starmap, [("a",), ("b", 2)])
    assert isinstance(wrong, TypeError)
    assert right == "b-2"
    assert mapped.stats.retries == 0


def test_the_cache_knows_a_call_from_tuples_and_from_items(mode):
    mapped = opmap(**mode.options, cache=True)(mode.define(join))
    mode.run(mapped.starmap, [("a", 1)])
    assert mode.run(mapped, ["a"], b=1) == ["a-1"]
    assert (mapped.stats.hits, mapped.stats.attempts) == (1, 1)
    assert mapped.starmap.cache_delete(("a", 1))


@pytest.mark.parametrize(
    "items",
    [[("a", ["bad", "good"]), ("b", ["good"]), ("c", "good")], [("a",), ("b",), ("c",)]],
    ids=["in the tuple", "by keyword"],
)
def test_candidates_are_found_in_the_tuple_and_beside_it(mode, items):
    mapped = opmap(**mode.options, arg_fallback="key", retries=0)(mode.define(quote))
    given = {} if len(items[0]) == 2 else {"key": ["bad", "good"]}
    assert mode.run(mapped.starmap, items, **given) == ["a by good", "b by good", "c by good"]


def test_failed_tuples_are_tried_again(mode, journal):
    def flaky(a, b):
        journal.add(a)
        if journal.lines().count(str(a)) < 2:
            raise ConnectionError
        return a + b

    mapped = opmap(**mode.options, retries=2, min_delay=0)(mode.define(flaky))
    assert mode.run(mapped.starmap, [(1, 10), (2, 20)]) == [11, 22]
    assert mapped.stats.retries == 2


def test_tuples_keep_their_places_under_a_rate_limit(mode):
    mapped = opmap(**mode.options, rate_limit=1000)(mode.define(join))
    assert mode.run(mapped.starmap, PAIRS) == ["a-1", "b-2", "c-3"]


class Joiner:
    def __init__(self, mark):
        self.mark = mark

    @opmap(mode="thread", progress=False)
    def join(self, a, b):
        return f"{a}{self.mark}{b}"

    @opmap(mode="async", progress=False)
    async def join_async(self, a, b):
        return f"{a}{self.mark}{b}"


@pytest.mark.parametrize("name", ["join", "join_async"])
def test_a_method_is_called_with_each_tuple(name):
    assert getattr(Joiner("/"), name).starmap.run(PAIRS) == ["a/1", "b/2", "c/3"]


def test_the_single_call_takes_one_tuple():
    assert joined.starmap.one(("a", 1)) == "a1"
    assert asyncio.run(Joiner("/").join_async.starmap.one(("a", 1))) == "a/1"


def test_a_map_over_tuples_can_be_pickled():
    assert pickle.loads(pickle.dumps(joined.starmap))(PAIRS) == ["a1", "b2", "c3"]


def test_an_async_generator_of_tuples_is_closed_in_its_task():
    tasks = []

    async def pairs():
        tasks.append(asyncio.current_task())
        try:
            for pair in itertools.cycle(PAIRS):
                yield pair
        finally:
            tasks.append(asyncio.current_task())

    async def main():
        stream = Joiner("/").join_async.starmap.stream(pairs())
        async for outcome in stream:
            assert outcome.result == "a/1"
            break
        await stream.aclose()

    asyncio.run(main())
    assert len(tasks) == 2
    assert tasks[0] is tasks[1]


@pytest.mark.parametrize("wrong", ["ab", b"ab", 5, {"a": 1}], ids=type)
def test_an_item_that_is_no_tuple_of_arguments_is_refused(mode, wrong):
    mapped = opmap(**mode.options)(mode.define(join))
    with pytest.raises(TypeError, match=r"join\.starmap got .*each item is a tuple of arguments"):
        mode.run(mapped.starmap, [wrong])


def streamed_to_the_error(mode, items):
    """The results of a stream that ends with a `TypeError`."""
    results = []
    with pytest.raises(TypeError, match=r"join\.starmap got int as an item"):
        mode.each(
            lambda outcome: results.append(outcome.result), opmap(**mode.options)(mode.define(join)).starmap, items
        )
    return results


@pytest.mark.parametrize(
    "kind", [list, iter, lambda items: (item for item in items)], ids=["list", "iter", "generator"]
)
def test_a_stream_gives_what_came_before_an_item_that_is_no_tuple(mode, kind):
    assert streamed_to_the_error(mode, kind([*PAIRS * 20, 7, *PAIRS])) == ["a-1", "b-2", "c-3"] * 20


def test_a_stream_gives_what_an_async_input_gave_before_an_item_that_is_no_tuple():
    async def items():
        for item in [*PAIRS * 20, 7, *PAIRS]:
            yield item

    assert streamed_to_the_error(Mode("async"), items()) == ["a-1", "b-2", "c-3"] * 20


def test_positional_arguments_beside_the_tuples_are_refused():
    with pytest.raises(TypeError, match="by keyword"):
        joined.starmap(PAIRS, 1)


def test_a_keyword_that_no_call_takes_is_refused_before_anything_starts():
    with pytest.raises(TypeError, match="unexpected keyword"):
        joined.starmap(PAIRS, c=1)


@pytest.mark.parametrize("name", ["join", "join_async"])
def test_tuples_for_a_function_with_a_parameter_left_over_name_starmap(name):
    with pytest.raises(
        TypeError, match=rf"missing a required argument: 'b'; write {name}\(items, b=…\).* or {name}\.starmap"
    ):
        getattr(Joiner("/"), name).run(PAIRS)


def test_what_starmap_cannot_mend_does_not_name_it():
    with pytest.raises(TypeError) as caught:
        joined(PAIRS, 1, 2)
    assert "starmap" not in str(caught.value)
