"""pandas frames as arguments of cached functions: equal ones share an entry, all others do not."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from opero.core.digests import digest_of


def frame():
    return pd.DataFrame({"a": [1, 2], "b": ["x", None]}, index=["r", "s"])


def noted():
    made = frame()
    made.attrs["unit"] = "m"
    return made


def with_attribute():
    made = frame()
    object.__setattr__(made, "unit", "m")
    return made


def with_unit(made):
    made.unit = "m"
    return made


def dates(zone):
    return pd.Series(pd.to_datetime(["2020-01-01"]).tz_localize(zone))


def categories(*names, ordered=False):
    return pd.Series(pd.Categorical(["a"], categories=names, ordered=ordered))


MAKERS = {
    "frame": frame,
    "other value": lambda: pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}, index=["r", "s"]),
    "other type": lambda: frame().astype({"a": "int32"}),
    "other name": lambda: frame().rename(columns={"a": "c"}),
    "other index": lambda: frame().reset_index(drop=True),
    "other order": lambda: frame()[["b", "a"]],
    "category": lambda: frame().astype({"b": "category"}),
    "string": lambda: frame().astype({"b": "string"}),
    "empty": pd.DataFrame,
    "with a note": noted,
    "with an attribute": with_attribute,
    "each label once": lambda: frame().set_flags(allows_duplicate_labels=False),
    "index with an attribute": lambda: with_unit(pd.Index([0, 1, 2])),
    "several levels with an attribute": lambda: with_unit(pd.MultiIndex.from_tuples([(1, 2)])),
    "series with a note": lambda: noted()["a"],
    "missing float": lambda: pd.DataFrame({"a": [1.0, np.nan]}),
    "missing integer": lambda: pd.DataFrame({"a": pd.array([1, None], dtype="Int64")}),
    "one name twice": lambda: pd.DataFrame([[1, 2]], columns=["a", "a"]),
    "series": lambda: pd.Series([1, 2]),
    "series with a name": lambda: pd.Series([1, 2], name="a"),
    "series of dicts": lambda: pd.Series([{"z": [1]}]),
    "categories": lambda: categories("a", "b"),
    "categories in another order": lambda: categories("b", "a"),
    "categories with an order": lambda: categories("a", "b", ordered=True),
    "dates": lambda: dates(None),
    "dates in UTC": lambda: dates("UTC"),
    "dates in Rome": lambda: dates("Europe/Rome"),
    "periods": lambda: pd.Series(pd.period_range("2020", periods=1)),
    "intervals": lambda: pd.Series([pd.Interval(0, 1)]),
    "range": lambda: pd.RangeIndex(3),
    "index": lambda: pd.Index([0, 1, 2]),
    "several levels": lambda: pd.MultiIndex.from_tuples([(1, 2)]),
    "names of several levels": lambda: pd.MultiIndex.from_tuples([(1, 2)], names=["a", "b"]),
    "days": lambda: pd.date_range("2020", periods=3),
    "days without a frequency": lambda: pd.DatetimeIndex(["2020-01-01", "2020-01-02", "2020-01-03"]),
    "days in Rome": lambda: pd.date_range("2020", periods=3, tz="Europe/Rome"),
    "missing date": lambda: pd.Series(pd.to_datetime(["2020-01-01", None]).tz_localize("UTC")),
    "missing text": lambda: pd.Series(["a", None], dtype="string"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_equal_ones_have_one_key(name):
    assert digest_of(MAKERS[name]()) == digest_of(MAKERS[name]())


def test_unequal_ones_never_have():
    keys = {name: digest_of(make()) for name, make in MAKERS.items()}

    assert [pair for pair in itertools.combinations(keys, 2) if keys[pair[0]] == keys[pair[1]]] == []


def test_how_columns_are_grouped_in_memory_does_not_matter():
    one, two = pd.DataFrame({"a": [1, 2], "b": [3, 4]}), pd.DataFrame({"a": [1, 2]})
    two["b"] = [3, 4]

    assert digest_of(one) == digest_of(two)


ARRAYS = {
    "nullable": lambda: pd.array([1, None, 3], dtype="Int64"),
    "text": lambda: pd.array(["a", None, "c"], dtype="str"),
    "intervals": lambda: pd.array([pd.Interval(0, 1), None, pd.Interval(2, 3)]),
    "hidden": lambda: pd.arrays.IntegerArray(np.array([1, 7, 3]), np.array([False, True, False])),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_what_lies_beside_the_values_of_an_array_does_not_matter(name):
    known = ARRAYS[name]()
    part = pd.Series(known).iloc[:2]
    assert known.dtype.kind

    assert digest_of(part) == digest_of(pd.Series([part[0], None], dtype=known.dtype))


def test_what_an_index_has_found_out_of_itself_does_not_matter():
    fresh, used = (pd.DataFrame({"a": range(3)}, index=pd.date_range("2020", periods=3, tz="UTC")) for _ in range(2))
    assert used.loc["2020-01-02", "a"] == 1
    assert [*used.index.year] == [2020] * 3
    assert repr(used)

    assert digest_of(fresh) == digest_of(used)


def test_levels_of_an_index_that_no_label_has_do_not_matter():
    pairs = pd.Series([1, 2], index=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)]))

    assert digest_of(pairs.iloc[:1]) == digest_of(pd.Series([1], index=pd.MultiIndex.from_tuples([("a", 1)])))
