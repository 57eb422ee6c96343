"""Which calls share a cache entry: those of equal arguments, however passed, and no others."""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import gc
import http.cookiejar
import importlib
import io
import itertools
import json
import logging
import math
import os
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
import types
import typing
import urllib.request
import uuid
import weakref
import zoneinfo
from typing import Any, NamedTuple
from unittest import mock

import attrs
import numpy as np
import pandas as pd
import pydantic
import pytest
import requests
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

import opero
from opero import MisuseError
from opero.core.digests import spelling_of
from opero.core.keys import KeyMaker

thoroughly = settings(deadline=None, max_examples=80)


def cached(function, **options):
    return opero.opero(cache=True, retries=0, **options)(function)


def share_an_entry(first, second) -> bool:
    """Whether a call with ``second`` is answered by the entry of ``first``."""
    f = cached(lambda x: object())
    return f(first) is f(second)


# However passed


def test_positional_keyword_and_default_give_one_entry(world):
    runs = []

    def function(x=1):
        runs.append(x)

    f = cached(world.define(function))
    world.run(f, 1)
    world.run(f, x=1)
    world.run(f)
    assert runs == [1]


def test_int_float_and_bool_are_three_entries(world):
    f = cached(world.define(lambda x: [x]))
    assert [world.run(f, x) for x in (1, 1.0, True)] == [[1], [1.0], [True]]
    assert f.cache_info().misses == 3


def test_every_way_to_pass_the_arguments_gives_one_entry():
    def function(a, b, /, c, d="d", *, e, f="f"):
        return object()

    ways = [
        ((1, 2, 3), {"e": 5}),
        ((1, 2, 3, "d"), {"e": 5}),
        ((1, 2), {"c": 3, "e": 5}),
        ((1, 2), {"e": 5, "c": 3, "f": "f"}),
        ((1, 2, 3), {"f": "f", "d": "d", "e": 5}),
    ]
    decorated = cached(function)
    assert len({decorated(*args, **kwargs) for args, kwargs in ways}) == 1


@thoroughly
@given(data=st.data())
def test_any_arguments_give_one_entry_in_any_form(data):
    names = ["a", "b", "c", "d"]
    values = {name: data.draw(arguments, label=name) for name in names}
    namespace: dict[str, Any] = {f"default_{name}": values[name] for name in names[2:]}
    exec("def function(a, b, c=default_c, *, d=default_d):\n    return object()", namespace)
    f = cached(namespace["function"])
    first = f(*[values[name] for name in names[:3]], d=values["d"])

    positional = data.draw(st.integers(0, 3), label="passed by position")
    defaults = [name for name in names[2:] if name not in names[:positional]]
    omitted = data.draw(st.sets(st.sampled_from(defaults)), label="omitted")
    rest = data.draw(st.permutations([n for n in names[positional:] if n not in omitted]), label="passed by keyword")
    args = [copied(values[name]) for name in names[:positional]]
    assert f(*args, **{name: copied(values[name]) for name in rest}) is first


def test_arguments_do_not_change_places():
    f = cached(lambda a, b: (a, b))
    assert [f(1, 2), f(2, 1), f(b=1, a=2)] == [(1, 2), (2, 1), (2, 1)]
    assert f.cache_info().currsize == 2


def test_a_default_that_cannot_be_hashed_is_an_argument_like_any_other():
    f = cached(lambda x={"a": [1]}: object())
    assert f() is f({"a": [1]})
    assert f() is not f({"a": [2]})


@pytest.mark.parametrize(
    "names",
    [("self", "cls"), ("args", "kwargs"), ("function", "key"), ("value", "values"), ("call", "call_"), ("type", "int")],
)
def test_parameters_can_have_any_name(names):
    one, two = names
    f = cached(eval(f"lambda {one}, {two}=2: [{one}, {two}]"))
    assert f(1) is f(**{two: 2, one: 1})
    assert f([1]) == [[1], 2]
    assert f.cache_info().currsize == 2


# Variadic functions


@pytest.fixture
def variadic(world):
    return cached(world.define(lambda *args, **kwargs: [args, kwargs]))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (((1, 2), {}), (((1, 2),), {})),
        (((1, 2), {}), ((1,), {"x": 2})),
        (((), {"a": 1}), ((("a", 1),), {})),
        (((), {"a": 1}), (({"a": 1},), {})),
        (((), {}), (((),), {})),
        (((), {}), (({},), {})),
        (((), {}), ((None,), {})),
        (((1,), {}), ((True,), {})),
        (((1, 2), {}), ((2, 1), {})),
        (((), {"a": 1, "b": 2}), ((), {"a": 2, "b": 1})),
        (((), {"a": 1}), ((), {"a": 1.0})),
        ((([1],), {}), (((1,),), {})),
    ],
)
def test_a_variadic_function_tells_unequal_calls_apart(world, variadic, first, second):
    for args, kwargs in (first, second, first, second):
        assert world.run(variadic, *args, **kwargs) == [args, kwargs]
    assert variadic.cache_info()[:2] == (2, 2)


def test_a_variadic_function_takes_keywords_in_any_order(world, variadic):
    assert world.run(variadic, 1, a=1, b=[2]) is world.run(variadic, 1, b=[2], a=1)


def test_a_keyword_can_have_the_name_of_a_positional_only_parameter():
    f = cached(lambda a, /, **more: (a, more))
    assert [f(1, a=2), f(2, a=1), f(1)] == [(1, {"a": 2}), (2, {"a": 1}), (1, {})]


def test_named_and_variadic_parameters_are_told_apart():
    f = cached(lambda a, *more, b=0: (a, more, b))
    calls = [((1, 2), {}), ((1,), {"b": 2}), ((1, (2,)), {}), ((1,), {}), ((1, 2), {"b": 2})]
    for args, kwargs in calls * 2:
        assert f(*args, **kwargs) == (args[0], args[1:], kwargs.get("b", 0))
    assert f.cache_info().currsize == len(calls)


# Any values of the built-in types

LEAVES = [
    *(None, True, False, 0, 1, -1, -2, 2, 0.0, -0.0, 1.0, math.nan, math.inf, 1j, 0j, complex(0.0, -0.0)),
    *("", "a", "1", "None", b"", b"a", b"1", ..., decimal.Decimal(1), decimal.Decimal("1.0"), range(2)),
]
hashables = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
    max_leaves=4,
)
arguments = st.recursive(
    st.one_of(hashables, st.sampled_from([b"", b"a", b"1"]).map(bytearray)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(hashables, inner, max_size=3),
        st.sets(hashables, max_size=3),
    ),
    max_leaves=5,
)


def are_alike(one, two) -> bool:
    """Whether two values are one argument: of the same type and equal, at every depth; slow and plain."""
    if type(one) is not type(two):
        return False
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", two)
    if isinstance(one, (complex, decimal.Decimal)):
        return repr(one) == repr(two)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(are_alike, one, two))
    if isinstance(one, (dict, set, frozenset)):
        ones, twos = (list(value.items() if isinstance(value, dict) else value) for value in (one, two))
        return len(ones) == len(twos) and all(any(are_alike(a, b) for b in twos) for a in ones)
    return one == two


def copied(value):
    """An equal value made anew, dicts and sets in another order."""
    if type(value) is dict:
        return {copied(k): copied(v) for k, v in reversed(value.items())}
    if type(value) in {set, frozenset}:
        return type(value)([copied(v) for v in list(value)[::-1]])
    if type(value) in {list, tuple}:
        return type(value)([copied(v) for v in value])
    if type(value) is bytearray:
        return bytearray(value)
    return value


@thoroughly
@given(arguments)
def test_a_value_and_its_copy_share_an_entry(value):
    assert share_an_entry(value, copied(value))


@thoroughly
@given(arguments, arguments)
def test_two_values_share_an_entry_when_they_are_alike_and_only_then(one, two):
    assert share_an_entry(one, two) == are_alike(one, two)


@thoroughly
@given(st.lists(st.sampled_from(LEAVES), min_size=2, max_size=2), st.lists(st.sampled_from(LEAVES), min_size=2))
def test_two_arguments_are_told_apart_like_one(ones, twos):
    f = cached(lambda a, b: object())
    one, two = ones[:2], twos[:2]
    assert (f(*one) is f(*two)) == are_alike(one, two)


@thoroughly
@given(arguments, st.data())
def test_a_value_with_one_part_changed_has_an_entry_of_its_own(value, data):
    leaf = data.draw(st.sampled_from(LEAVES))
    changed = with_first_leaf_changed(copied(value), leaf)
    assert share_an_entry(value, changed) == are_alike(value, changed)


def with_first_leaf_changed(value, leaf):
    if isinstance(value, (list, tuple)) and value:
        return type(value)([with_first_leaf_changed(value[0], leaf), *value[1:]])
    if isinstance(value, dict) and value:
        key = next(iter(value))
        return {**value, key: with_first_leaf_changed(value[key], leaf)}
    return leaf


# Values that are easily taken for each other


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = 0


def made_with_super():
    """An object of a class whose functions know it, and which has what cannot be pickled."""

    class Made:
        lock = threading.Lock()
        kinds = ("a", {"b"})

        def __init__(self):
            super().__init__()

        def me(self):
            return self

    return Made()


@dataclasses.dataclass
class Place:
    x: Any
    y: Any = 0


@dataclasses.dataclass(frozen=True)
class FrozenPoint:
    x: Any


@dataclasses.dataclass(slots=True)
class SlottedPoint:
    x: Any


class PointTuple(NamedTuple):
    x: Any
    y: Any = 0


class PlaceTuple(NamedTuple):
    x: Any
    y: Any = 0


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Signal(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


class Word(enum.StrEnum):
    A = "a"


class Permission(enum.IntFlag):
    READ = 1
    WRITE = 2


class Text(str):
    __slots__ = ()


class Integer(int):
    pass


class Real(float):
    pass


class Members(list):
    pass


class Table(dict):
    pass


class Amount(decimal.Decimal):
    pass


class Wave(complex):
    pass


class Clock(dt.time):
    pass


class Buffer(bytearray):
    pass


@dataclasses.dataclass(eq=False)
class Session:
    """Equal to itself only; what matters is not in its fields."""

    url: str
    token: dataclasses.InitVar[str]

    def __post_init__(self, token):
        self._token = token


class Label(str):  # noqa: SLOT000 - its attributes are what is tried
    """Text that knows its language."""


def label(language):
    made = Label("chat")
    made.language = language
    return made


class Quantity(np.ndarray):
    """An array that knows its unit, made as NumPy's documentation tells."""

    def __new__(cls, values, unit):
        made = np.asarray(values, float).view(cls)
        made.unit = unit
        return made

    def __array_finalize__(self, other):
        self.unit = getattr(other, "unit", None)


class Money(decimal.Decimal):
    """A number that keeps its currency in a slot, of which pickle knows nothing."""

    __slots__ = ("__currency",)

    def __new__(cls, amount, currency):
        made = super().__new__(cls, amount)
        made.__currency = currency
        return made


class Ratio(fractions.Fraction):
    """A number that keeps its name where pickle does not look."""


def ratio(name):
    made = Ratio(1, 2)
    made.name = name
    return made


@functools.total_ordering
class Length:
    """Equal to those of the same length in another unit."""

    def __init__(self, amount, unit):
        self.amount = amount
        self.unit = unit

    def metres(self):
        return self.amount * {"m": 1, "km": 1000}[self.unit]

    def __eq__(self, other):
        return isinstance(other, Length) and self.metres() == other.metres()

    def __lt__(self, other):
        return self.metres() < other.metres()

    def __hash__(self):
        return hash(self.metres())


def defined(source, name="step"):
    """What a cell of a notebook defines, or a script."""
    namespace = {"__name__": "__main__", "__file__": "a script"}
    exec(source, namespace)
    return namespace[name]


class Zone(dt.tzinfo):
    """A time zone of a user's own, an hour ahead until 2030 and ``later`` hours from then on."""

    def __init__(self, later):
        self.later = later

    def utcoffset(self, moment):
        return dt.timedelta(hours=self.later if moment is not None and moment.year >= 2030 else 1)

    def dst(self, moment):
        return dt.timedelta(0)

    def tzname(self, moment):
        return "zone"


class UnhashableZone(Zone):
    """Equal to those with the same rules, and not hashable, like the zones of dateutil."""

    __hash__ = None

    def __eq__(self, other):
        return isinstance(other, UnhashableZone) and self.later == other.later


class Keyed:
    """Unhashable, and knows its key."""

    __hash__ = None

    def __init__(self, key):
        self.key = key

    def __eq__(self, other):
        return isinstance(other, Keyed) and self.key == other.key

    def __cache_key__(self):
        return self.key


class KeyedToo(Keyed):
    __hash__ = None


class Valued:
    """Equal by value and hashable, by Python code."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Valued) and self.value == other.value

    def __hash__(self):
        return hash(self.value)


class Query(collections.abc.Mapping):
    """Cannot be pickled, and may have a name twice, as the queries of aiohttp."""

    def __init__(self, *pairs):
        self.pairs = pairs

    def __reduce__(self):
        raise TypeError

    def __getitem__(self, name):
        return dict(self.pairs)[name]

    def __iter__(self):
        return iter(dict(self.pairs))

    def __len__(self):
        return len(self.pairs)

    def items(self):
        return self.pairs


def captures(n):
    return lambda: n


PROTOCOL = "import typing\nclass step(typing.Protocol): x: {}"
USED = "from decimal import Decimal\nfrom enum import Enum\nfrom functools import partial\nfrom numpy import array\n"


def described(function, text):
    function.__doc__ = text
    return function


def saying(text):
    return pydantic.create_model("Model", x=(int, pydantic.Field(description=text)))


def checking(field):
    validators = {"check": pydantic.field_validator(field)(abs)}
    return pydantic.create_model("Model", __validators__=validators, x=int, y=int)


def moment(zone=None, fold=0):
    return dt.datetime(2025, 10, 26, 2, 30, tzinfo=zone, fold=fold)


def hours(n, name=None):
    delta = dt.timedelta(hours=n)
    return dt.timezone(delta) if name is None else dt.timezone(delta, name)


OBJECTS = np.array([1, "a", None], dtype=object)
OTHER_OBJECTS = np.array([True, "a", None], dtype=object)

UNLIKE = {
    "lists of two types": (list[int], list[str]),
    "list of a type and class": (list[int], list),
    "int and bool": (1, True),
    "int and float": (1, 1.0),
    "float and bool": (1.0, True),
    "int and complex": (1, 1 + 0j),
    "int and text": (1, "1"),
    "minus one and minus two, whose hashes are equal": (-1, -2),
    "zero and False": (0, False),
    "None and False": (None, False),
    "None and empty text": (None, ""),
    "None and its text": (None, "None"),
    "zeros of both signs": (0.0, -0.0),
    "complex zeros of both signs": (0j, complex(0.0, -0.0)),
    "NaN and infinity": (math.nan, math.inf),
    "text and bytes": ("a", b"a"),
    "bytes and bytearray": (b"a", bytearray(b"a")),
    "text composed and decomposed": ("\u00e9", "e\u0301"),
    "int and Decimal": (1, decimal.Decimal(1)),
    "int and Fraction": (1, fractions.Fraction(1)),
    "Decimals of two scales": (decimal.Decimal("1.0"), decimal.Decimal("1.00")),
    "Decimal zeros of both signs": (decimal.Decimal("0.0"), decimal.Decimal("-0.0")),
    "list and tuple": ([1], (1,)),
    "empty list and empty tuple": ([], ()),
    "empty list and empty dict": ([], {}),
    "list of a list and list": ([[1]], [1]),
    "lists in two orders": ([1, 2], [2, 1]),
    "set and frozenset": ({1}, frozenset({1})),
    "set and list": ({1}, [1]),
    "set and dict": (set(), {}),
    "dict and list of its items": ({1: 2}, [(1, 2)]),
    "dict and its keys": ({1: 2}, {1}),
    "dicts with other keys": ({1: "a"}, {True: "a"}),
    "dicts with values exchanged": ({1: 2, 3: 4}, {1: 4, 3: 2}),
    "dict and OrderedDict": ({1: 2}, collections.OrderedDict({1: 2})),
    "OrderedDicts in two orders": (collections.OrderedDict(a=1, b=2), collections.OrderedDict(b=2, a=1)),
    "dict and a class of dicts": ({1: 2}, Table({1: 2})),
    "list and a class of lists": ([1], Members([1])),
    "text and a class of text": ("a", Text("a")),
    "int and a class of ints": (1, Integer(1)),
    "float and a class of floats": (1.0, Real(1.0)),
    "a class of floats, zeros of both signs": (Real(0.0), Real(-0.0)),
    "a class of Decimals, two scales": (Amount("1.0"), Amount("1.00")),
    "a class of complex numbers, zeros of both signs": (Wave(0), Wave(0.0, -0.0)),
    "a class of times of day, both moments": (Clock(1, fold=0), Clock(1, fold=1)),
    "bytearray and a class of bytearrays": (bytearray(b"a"), Buffer(b"a")),
    "dataclass instances that are equal to themselves only": (Session("a", "b"), Session("a", "c")),
    "text with two attributes": (label("fr"), label("en")),
    "arrays with two units": (Quantity([1], "m"), Quantity([1], "s")),
    "numbers with two values in a slot": (Money("1", "EUR"), Money("1", "USD")),
    "numbers with two attributes": (ratio("a"), ratio("b")),
    "objects that are equal in their own opinion": (Length(1, "km"), Length(1000, "m")),
    "objects with values of two types": (Valued(1), Valued(True)),
    "queries with a name twice": (Query(("a", 1), ("a", 2)), Query(("a", 2))),
    "deques": (collections.deque([1]), collections.deque([1], maxlen=2)),
    "slices": (slice(1, 2), slice(1, 2, 1)),
    "functions of two scripts": (defined("def step(x): return x + 1"), defined("def step(x): return x * 10")),
    "classes of two scripts": (defined("class step: n = 1"), defined("class step: n = 2")),
    "objects of two scripts' classes": (defined("class step: n = 1")(), defined("class step: n = 2")()),
    "classes with two annotations": (defined("class step: x: int"), defined("class step: x: str")),
    "classes with annotations in two orders": (defined("class step: x: 1; y: 1"), defined("class step: y: 1; x: 1")),
    "classes with two docstrings": (defined("class step: 'a'"), defined("class step: 'b'")),
    "classes with two attributes for a library": (
        defined("class step: __tablename__ = 'a'"),
        defined("class step: __tablename__ = 'b'"),
    ),
    "typed dicts": (typing.TypedDict("Fields", {"x": int}), typing.TypedDict("Fields", {"x": str})),
    "classes of named tuples": (NamedTuple("Fields", [("x", int)]), NamedTuple("Fields", [("x", str)])),
    "protocols": (defined(PROTOCOL.format("int")), defined(PROTOCOL.format("str"))),
    "classes of dataclasses": (
        dataclasses.make_dataclass("Fields", [("x", int)]),
        dataclasses.make_dataclass("Fields", [("x", str)]),
    ),
    "models of two types": (pydantic.create_model("Model", x=int), pydantic.create_model("Model", x=str)),
    "models of two defaults": (pydantic.create_model("Model", x=(int, 1)), pydantic.create_model("Model", x=(int, 2))),
    "models that check two fields": (checking("x"), checking("y")),
    "classes of two metaclasses": (
        defined("class Meta(type): n = 1\nclass step(metaclass=Meta): pass"),
        defined("class Meta(type): n = 2\nclass step(metaclass=Meta): pass"),
    ),
    "models that say two things of a field": (saying("a"), saying("b")),
    "lists of two models": (list[pydantic.create_model("Model", x=int)], list[pydantic.create_model("Model", x=str)]),
    "functions with two annotations": (defined("def step(x: int): pass"), defined("def step(x: str): pass")),
    "functions with annotations in text that mean two classes": (
        defined("class Part: n = 1\ndef step(x: 'list[Part]'): pass"),
        defined("class Part: n = 2\ndef step(x: 'list[Part]'): pass"),
    ),
    "functions with two docstrings": (described(captures(1), "a"), described(captures(1), "b")),
    **{
        f"functions that use two of their script: {value}": (
            defined(f"{USED}F = {value}\ndef step(x): return F"),
            defined(f"{USED}F = {value.replace('2', '3')}\ndef step(x): return F"),
        )
        for value in ("(2,)", "[2]", "{'a': [2]}", "Decimal(2)", "Enum('E', {'a': 2}).a", "partial(pow, 2)", "array(2)")
    },
    "functions that have captured two values": (captures(1), captures(True)),
    "functions with two defaults": (lambda x=1: x, lambda x=2: x),
    "partials": (functools.partial(captures, 1), functools.partial(captures, 2)),
    "bound methods": (Keyed(1).__cache_key__, Keyed(2).__cache_key__),
    "methods of two objects": ([1].index, [2].index),
    "tuple and named tuple": ((1, 0), PointTuple(1)),
    "two classes of named tuples": (PointTuple(1), PlaceTuple(1)),
    "two dataclasses": (Point(1), Place(1)),
    "dataclasses of two values": (Point(1), Point(1.0)),
    "frozen dataclasses of two values": (FrozenPoint(1), FrozenPoint(True)),
    "slotted dataclasses of two values": (SlottedPoint(1), SlottedPoint(True)),
    "dataclass and dict": (Point(1), {"x": 1, "y": 0}),
    "enum member and its value": (Color.RED, 1),
    "enum member and its name": (Color.RED, "RED"),
    "members of two enums": (Color.RED, Signal.RED),
    "members of one enum": (Color.RED, Color.BLUE),
    "int enum member and its value": (Number.ONE, 1),
    "text enum member and its value": (Word.A, "a"),
    "flags": (Permission.READ, Permission.READ | Permission.WRITE),
    "flags without a name": (Permission(8), Permission(16)),
    "path and text": (pathlib.PurePosixPath("a"), "a"),
    "paths of two systems": (pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("a")),
    "paths": (pathlib.Path("a"), pathlib.Path("b")),
    "date and datetime": (dt.date(2025, 1, 1), dt.datetime(2025, 1, 1)),  # noqa: DTZ001
    "datetime with and without zone": (moment(), moment(dt.UTC)),
    "datetimes of one moment in two zones": (moment(dt.UTC), moment(dt.UTC).astimezone(hours(1))),
    "datetimes of one offset in two zones": (moment(hours(1, "CET")), moment(hours(1, "WAT"))),
    "datetimes in zones of a user's own": (moment(Zone(1)), moment(Zone(2))),
    "datetimes in zones of a user's own that cannot be hashed": (moment(UnhashableZone(1)), moment(UnhashableZone(2))),
    "both moments of one repeated hour": (moment(fold=0), moment(fold=1)),
    "times of day of one offset in two zones": (dt.time(1, tzinfo=hours(1, "CET")), dt.time(1, tzinfo=hours(1, "WAT"))),
    "both moments of one repeated time of day": (dt.time(1, fold=0), dt.time(1, fold=1)),
    "range and list": (range(2), [0, 1]),
    "class and instance": (int, 0),
    "classes": (int, bool),
    "objects with keys of two types": (Keyed(1), Keyed(1.0)),
    "objects of two classes with one key": (Keyed(1), KeyedToo(1)),
    "object and its key": (Keyed(1), 1),
    "objects that are told apart by their own equality": (Valued(1), Valued(2)),
    "arrays of two lengths": (np.zeros(2), np.zeros(3)),
    "arrays of two shapes": (np.zeros((2, 3)), np.zeros((3, 2))),
    "arrays of one row and one column": (np.zeros((1, 3)), np.zeros((3, 1))),
    "arrays of two types": (np.zeros(2, "int64"), np.zeros(2, "float64")),
    "arrays of two byte orders": (np.array([1], "<i4"), np.array([16_777_216], ">i4")),
    "arrays with zeros of both signs": (np.array([0.0]), np.array([-0.0])),
    "arrays that differ in the middle of many": (
        np.arange(10_000),
        np.where(np.arange(10_000) == 5_000, 0, np.arange(10_000)),
    ),
    "array and list": (np.array([1]), [1]),
    "array without dimensions and number": (np.array(1), np.int64(1)),
    "NumPy number and int": (np.int64(1), 1),
    "NumPy number and float": (np.float64(1), 1.0),
    "NumPy numbers": (np.int32(1), np.int64(1)),
    "NumPy dates of two units": (np.datetime64("2025-01-01", "D"), np.datetime64("2025-01-01", "s")),
    "arrays of objects": (OBJECTS, OTHER_OBJECTS),
    "arrays with fields of two names": (np.zeros(1, [("a", "i4")]), np.zeros(1, [("b", "i4")])),
    "masked arrays": (np.ma.array([999_999, 1], mask=[0, 0]), np.ma.array([5, 1], mask=[1, 0])),
    "array and masked array": (np.array([1]), np.ma.array([1])),
}


class Nest(NamedTuple):
    name: str
    put: Any
    hashable_only: bool = False

    def __repr__(self):
        return self.name


NESTS = [
    Nest("alone", lambda value: value),
    Nest("in a list", lambda value: [0, value]),
    Nest("in a tuple of lists", lambda value: ([0], [[value]])),
    Nest("as a dict's value", lambda value: {"a": value}),
    Nest("as a dict's key", lambda value: {value: "a"}, hashable_only=True),
    Nest("in a set", lambda value: {value}, hashable_only=True),
    Nest("in a dataclass", lambda value: Point([value])),
    Nest("in a named tuple", PointTuple),
    Nest("in an array of objects", lambda value: np.array([value, None], dtype=object)),
]


def is_hashable(value) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def nested(nest, *values):
    """Each value in the nest; a nest for hashable values is left out for others."""
    if nest.hashable_only and not all(map(is_hashable, values)):
        return values
    if "array" in nest.name:
        made = [np.empty(1, dtype=object) for _ in values]
        for array, value in zip(made, values, strict=True):
            array[0] = value
        return made
    return [nest.put(value) for value in values]


@pytest.mark.parametrize("pair", UNLIKE.values(), ids=UNLIKE)
def test_unlike_arguments_are_told_apart_at_every_depth(pair):
    assert [nest for nest in NESTS if share_an_entry(*nested(nest, *pair))] == []


LIKE = {
    "text": lambda: str(10**20),
    "large int": lambda: int("1" + "0" * 50),
    "NaN": lambda: float("nan"),
    "bytearray": lambda: bytearray(b"a"),
    "Decimal": lambda: decimal.Decimal("1.00"),
    "Decimal NaN": lambda: decimal.Decimal("NaN"),
    "Decimal signaling NaN": lambda: decimal.Decimal("sNaN"),
    "Fraction": lambda: fractions.Fraction(1, 3),
    "list": lambda: [1, [2, [3]]],
    "range": lambda: range(3),
    "OrderedDict": lambda: collections.OrderedDict(a=1, b=2),
    "defaultdict": lambda: collections.defaultdict(list, a=[1]),
    "read-only dict": lambda: types.MappingProxyType({"a": [1]}),
    "dataclass": lambda: Point([1], {2}),
    "frozen dataclass": lambda: FrozenPoint([1]),
    "slotted dataclass": lambda: SlottedPoint([1]),
    "named tuple": lambda: PointTuple([1]),
    "enum member": lambda: Color(1),
    "flag without a name": lambda: Permission(8),
    "class of bytearrays": lambda: Buffer(b"a"),
    "path": lambda: pathlib.Path("a") / "b",
    "date": lambda: dt.date(2025, 1, 1),
    "datetime": moment,
    "datetime with a zone": lambda: moment(hours(1)),
    "datetime with a named zone": lambda: moment(hours(1, "CET")),
    "time of day": lambda: dt.time(1, 2, 3, tzinfo=hours(1)),
    "duration": lambda: dt.timedelta(seconds=5),
    "UUID": lambda: uuid.UUID(int=5),
    "class": lambda: Point,
    "list of a type": lambda: list[int],
    "one of two types": lambda: int | list[str],
    "class that has keys for its instances": lambda: Keyed,
    "class of enum members": lambda: Color,
    "function": lambda: math.sqrt,
    "function made anew": lambda: captures([1]),
    "function that has captured nothing yet": lambda: types.FunctionType(
        captures(1).__code__, {}, "f", None, (types.CellType(),)
    ),
    "function of a script": lambda: defined("def step(x): return x"),
    "function of a script that uses what cannot be told": lambda: defined(
        "import threading\nF = [threading.Lock()]\ndef step(x): return F"
    ),
    "function of a script that uses a mark": lambda: defined("F = {1: object()}\ndef step(x): return F"),
    "functions of a script that find each other in a table": lambda: defined(
        "def other(x): return F\ndef step(x): return F\nF = [step, other, {1: (step, other)}]\nF.append(F)"
    ),
    "function with an annotation that names nothing": lambda: defined("def step(x: 'Nothing'): pass"),
    "function with an annotation that cannot be told": lambda: defined(
        "import threading, typing\ndef step(x: typing.Annotated[int, threading.Lock()]): pass"
    ),
    "class with an annotation of itself": lambda: defined("class step:\n def me(self) -> 'list[step]': return self"),
    "class of a script with what cannot be told": lambda: defined(
        "import threading\nclass step:\n lock = threading.Lock()\n mark = object()"
    ),
    "model": lambda: checking("x"),
    "model of others": lambda: pydantic.create_model("Model", x=list[saying("a")], y=(int, 1)),
    "typed dict": lambda: typing.TypedDict("Fields", {"x": "list[Point]"}),
    "object of a script's class": defined("class step: n = {1}"),
    "function of a class that calls super": lambda: made_with_super().me,
    "partial": lambda: functools.partial(captures, {1}),
    "object": lambda: Named([1]),
    "object with slots": lambda: SlottedPoint(Named("a")),
    "array with a unit": lambda: Quantity([1], "m"),
    "number with a value in a slot": lambda: Money("1", "EUR"),
    "text with an attribute": lambda: label("fr"),
    "deque": lambda: collections.deque([1]),
    "slice": lambda: slice(1, [2]),
    "keys of a dict": {"a": 1, "b": 2}.keys,
    "items of a dict": {"a": [1], "b": 2}.items,
    "pairs of a query": lambda: Query(("a", 1), ("a", 2)),
    "logger": lambda: logging.getLogger("a"),
    "module": lambda: math,
    "object with a key": lambda: Keyed([1, {2}]),
    "object with a key in an object with a key": lambda: Keyed(Keyed(1)),
    "object with equality of its own": lambda: Valued(1),
    "array": lambda: np.arange(6).reshape(2, 3),
    "empty array": lambda: np.zeros((0, 3)),
    "array with NaN": lambda: np.array([math.nan]),
    "array of text": lambda: np.array(["a", "bc"]),
    "array of objects": lambda: np.array([1, "a", [2]], dtype=object),
    "array of fields": lambda: np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
    "array of fields with gaps": lambda: np.zeros(1, np.dtype({"names": ["a"], "formats": ["i4"], "offsets": [4]})),
    "array of fields out of order": lambda: np.zeros(
        1, np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [4, 0]})
    ),
    "array of records with a field called mask": lambda: np.array([(1, 2)], [("mask", "i4"), ("data", "i4")]).view(
        np.recarray
    ),
    "masked array": lambda: np.ma.array([1, 2], mask=[1, 0]),
    "NumPy number": lambda: np.float32(1.5),
    "NumPy date": lambda: np.datetime64("2025-01-01"),
}


@pytest.mark.parametrize("make", LIKE.values(), ids=LIKE)
def test_like_arguments_share_an_entry_at_every_depth(make):
    assert [nest for nest in NESTS if not share_an_entry(*nested(nest, make(), make()))] == []


def test_a_class_whose_objects_have_been_copied_is_the_same():
    fresh, used = (defined("class step: x: int") for _ in range(2))
    copy.copy(used())
    assert share_an_entry(fresh, used)


def test_flags_that_have_been_combined_are_the_same():
    fresh, used = (enum.Flag("Flags", "A B") for _ in range(2))
    used(3)
    assert share_an_entry(fresh, used)


def test_a_dicts_order_does_not_matter():
    assert share_an_entry({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1})


def test_a_sets_order_does_not_matter():
    # Numbers that collide in the set's table are kept in the order in which they came.
    assert list({8, 16}) != list({16, 8})
    assert share_an_entry({8, 16}, {16, 8})


def test_a_view_of_an_array_is_the_same_as_its_copy():
    rows = np.arange(6).reshape(2, 3)
    assert share_an_entry(rows[:, ::2], rows[:, ::2].copy())


def test_a_key_takes_no_copy_of_an_array():
    array = np.ones(1_000_000)
    tracemalloc.start()
    try:
        spelling_of(array)
        assert tracemalloc.get_traced_memory()[1] < array.nbytes / 2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["U0", "V3", "M8[s]", "m8[ns]", "?", "g", "S2", "f2", "i4,f8"])
def test_arrays_of_all_kinds_are_arguments(dtype):
    one, same, other, column = (np.zeros(shape, dtype) for shape in [(2, 3), (2, 3), (3, 2), (0,)])
    assert share_an_entry(one, same)
    assert not share_an_entry(one, other)
    assert not share_an_entry(one, column)


def test_an_array_in_a_mapped_file_is_an_argument(tmp_path):
    for name, value in [("one.npy", 1), ("two.npy", 2)]:
        np.save(tmp_path / name, np.full(3, value))
    one, again, two = (np.load(tmp_path / name, mmap_mode="r") for name in ("one.npy", "one.npy", "two.npy"))
    assert share_an_entry(one, again)
    assert not share_an_entry(one, two)


def test_a_path_that_a_folder_lists_is_told_by_its_name(tmp_path):
    """From Python 3.14 on it knows what it is, from the listing."""
    (tmp_path / "a").touch()
    assert share_an_entry(*tmp_path.iterdir(), tmp_path / "a")


class Column(np.ndarray):
    """Knows its table, as astropy's does, which pickle leaves out."""

    def __reduce__(self):
        return np.ndarray.__reduce__(self)


def test_an_array_that_knows_its_owner_by_a_weak_reference_is_an_argument():
    class Table:
        pass

    def column(name):
        made = np.arange(3).view(Column)
        table = Table()
        table.name, table.column = name, made
        made.table = weakref.ref(table)
        return table, made

    (one, first), (two, second), (three, third) = column("a"), column("a"), column("b")
    assert share_an_entry(first, second)
    assert not share_an_entry(first, third)
    assert share_an_entry(one, two)
    assert not share_an_entry(one, three)


def test_an_array_by_columns_is_another_argument():
    flat = cached(lambda array: array.ravel("K").tolist())
    rows = np.arange(6).reshape(2, 3)
    assert flat(rows) == [0, 1, 2, 3, 4, 5]
    assert flat(np.asfortranarray(rows)) == [0, 3, 1, 4, 2, 5]


def test_a_changed_array_is_another_argument():
    f = cached(lambda array: int(array.sum()))
    array = np.ones(3)
    assert f(array) == 3
    array[0] = 5
    assert f(array) == 7


def test_a_changed_list_is_another_argument(world):
    f = cached(world.define(sum))
    values = [1, 2]
    assert world.run(f, values) == 3
    values.append(3)
    assert [world.run(f, values), world.run(f, [1, 2])] == [6, 3]
    assert f.cache_info()[:2] == (1, 2)


def test_an_argument_that_the_function_changes_counts_as_it_came(world):
    f = cached(world.define(lambda values: values.pop()))
    assert [world.run(f, [1, 2]), world.run(f, [1, 2]), world.run(f, [1])] == [2, 2, 1]
    assert f.cache_info()[:2] == (1, 2)


def test_a_dataclass_with_a_key_is_told_by_its_key():
    @dataclasses.dataclass
    class Request:
        url: str
        trace_id: object

        def __cache_key__(self):
            return self.url

    assert share_an_entry(Request("a", object()), Request("a", object()))
    assert not share_an_entry(Request("a", None), Request("b", None))


def test_a_dataclass_with_a_field_not_yet_set_is_an_argument():
    @dataclasses.dataclass
    class Job:
        name: str
        result: int = dataclasses.field(init=False)

    done = Job("a")
    done.result = 1
    assert share_an_entry(Job("a"), Job("a"))
    assert not share_an_entry(Job("a"), done)


class NotHere:
    """As a proxy outside of its context: every attribute that it is asked for is an error of its own."""

    __slots__ = ("empty",)

    def __getattr__(self, name):
        raise TypeError("not here")


def test_an_object_of_a_script_may_have_a_class_that_holds_one_whose_attributes_cannot_be_read(world):
    class Row:
        listener = NotHere()

        def __init__(self, name):
            self.name = name

        f = opero.opero(cache=True, retries=0)(world.define(lambda row: row.name))

    g = cached(world.define(lambda row: row.name))
    rows = [Row("a"), Row("a"), Row("b")]
    assert [world.run(g, row) for row in rows] == ["a", "a", "b"]
    assert g.cache_info()[:2] == (1, 2)
    assert [world.run(Row.f, row) for row in rows] == ["a", "a", "b"]


def test_an_argument_whose_own_code_fails_is_refused_with_the_ways_out(world):
    class Broken:
        def __cache_key__(self):
            raise LookupError("no key")

    f = opero.opero(cache=True, retries=3)(world.define(lambda value: value))
    for value in (Broken(), [Broken()]):
        with pytest.raises(
            MisuseError, match=r"'value' of .* cannot be part of a cache key: .*LookupError.*__cache_key__.*ignore="
        ) as caught:
            world.run(f, value)
        assert isinstance(caught.value.__cause__.__cause__, LookupError)
    assert f.stats.attempts == 0


@pytest.mark.skipif(sys.version_info < (3, 12), reason="has no syntax for type parameters")
def test_an_alias_with_parameters_is_an_argument(world, monkeypatch):
    module = types.ModuleType("aliases")
    monkeypatch.setitem(sys.modules, "aliases", module)
    names = vars(module)
    exec("type Pair[A] = tuple[A, A]\ntype Flipped[A, B] = tuple[B, A]\ntype Kept[A, B] = tuple[A, B]", names)
    f = cached(world.define(lambda kind: f"{kind}"))
    kinds = [names["Pair"], names["Pair"][int], names["Pair"][str], names["Flipped"], names["Kept"]]
    for kind in kinds * 2:
        assert world.run(f, kind) == str(kind)
    assert f.cache_info()[:2] == (len(kinds), len(kinds))


def test_a_moment_may_be_in_a_zone_that_cannot_be_hashed():
    zone = UnhashableZone(1)
    assert share_an_entry(moment(zone), moment(zone))


def test_a_moment_in_a_named_zone_is_told_by_the_zones_name():
    try:
        one, two = (zoneinfo.ZoneInfo.no_cache("Europe/Berlin") for _ in range(2))
    except zoneinfo.ZoneInfoNotFoundError:
        pytest.skip("no time zones on this system")
    assert share_an_entry(moment(one), moment(two))
    assert not share_an_entry(moment(one), moment(zoneinfo.ZoneInfo("Europe/Paris")))


def test_a_moment_is_told_by_the_zone_that_it_is_in_and_not_by_the_zones_address():
    f = cached(lambda start: start.replace(year=2030).utcoffset().total_seconds() / 3600)
    assert [f(moment(Zone(n))) for n in range(24)] == list(range(24))


# Objects that opero does not know


class Named:
    def __init__(self, name):
        self.name = name


class Slotted:
    __slots__ = ("name",)

    def __init__(self, name):
        self.name = name


@pytest.mark.parametrize("nest", NESTS, ids=repr)
@pytest.mark.parametrize("kind", [Named, Slotted])
def test_an_object_is_told_by_its_state(kind, nest):
    assert share_an_entry(*nested(nest, kind("a"), kind("a")))
    assert not share_an_entry(*nested(nest, kind("a"), kind("b")))


@pytest.mark.parametrize("kind", [Named, Slotted])
def test_a_changed_object_is_another_argument(kind):
    f = cached(lambda x: x.name)
    changing = kind("a")
    assert f(changing) == "a"
    changing.name = "b"
    assert f(changing) == "b"


@pytest.mark.parametrize("nest", NESTS, ids=repr)
@pytest.mark.parametrize("kind", [Named, Slotted])
def test_a_new_object_at_the_address_of_an_old_one_is_not_taken_for_it(kind, nest):
    f = cached(lambda x, name: name)
    addresses = set()
    for n in range(200):
        obj = kind(n)
        addresses.add(id(obj))
        f(*nested(nest, obj), None)
        del obj
    assert f.cache_info().hits == 0
    # The test has indeed met old addresses.
    assert len(addresses) < 200


def test_a_new_instance_at_the_address_of_an_old_one_is_not_taken_for_it(world):
    class Owner(Named):
        method = cached(world.define(lambda self: self.name))

    addresses = set()
    for n in range(200):
        obj = Owner(n)
        addresses.add(id(obj))
        assert world.run(obj.method) == n
        del obj
    assert len(addresses) < 200


class Client:
    def __init__(self, url):
        self.url = url

    @functools.cached_property
    def session(self):
        return threading.Lock()


def test_what_a_cached_property_keeps_is_no_part_of_the_key():
    used = Client("a")
    assert used.session is used.session
    assert share_an_entry(Client("a"), used)
    assert not share_an_entry(used, Client("b"))


class Stateless:
    @functools.cached_property
    def size(self):
        return 1


@attrs.frozen(slots=False, cache_hash=True)
class Hashed:
    url: str


class Matrix:
    """Notes, as SciPy's do, what it has found out of itself."""

    def __init__(self, values):
        self.values = values

    def sum(self):
        self._has_canonical_format = self._has_sorted_indices = True
        return sum(self.values)


def test_what_an_object_has_found_out_of_itself_is_no_part_of_the_key():
    used = Stateless(), Hashed("a"), Matrix([1])
    assert (used[0].size, hash(used[1]) is None, used[2].sum()) == (1, False, 1)
    assert share_an_entry(used, (Stateless(), Hashed("a"), Matrix([1])))
    assert not share_an_entry(used, (Stateless(), Hashed("a"), Matrix([2])))


class Dataset:
    """As xarray's: pickle looks for what has not been set, and that fills in something else."""

    __slots__ = ("attributes", "unset")

    def __init__(self):
        self.attributes = None

    def __getattr__(self, name):
        self.attributes = {}
        raise AttributeError(name)


def test_an_object_that_changes_when_it_is_looked_at_is_one_argument():
    f = cached(lambda x: 1)
    dataset = Dataset()
    f(dataset)
    f(dataset)
    f(Dataset())
    assert f.stats.hits == 2


@pytest.mark.parametrize("drawn", [np.random.rand, np.random.mtrand._rand, random.random, random.choice])
def test_what_the_program_has_drawn_is_no_part_of_the_key(drawn):
    before = spelling_of(drawn)
    np.random.rand()  # noqa: NPY002 - the one that it is about
    random.random()
    assert spelling_of(drawn) == before


@pytest.mark.parametrize("made", [http.cookiejar.CookieJar, requests.cookies.RequestsCookieJar])
def test_cookies_are_the_same_after_they_were_looked_at(made):
    jar, changed = made(), made()
    before = spelling_of(jar)
    jar.add_cookie_header(urllib.request.Request("http://example.org"))
    assert spelling_of(jar) == before
    changed.set_cookie(requests.cookies.create_cookie("name", "value"))
    assert spelling_of(changed) != before


@pytest.mark.parametrize("made", [random.Random, np.random.RandomState])
def test_what_an_own_generator_has_drawn_is_part_of_the_key(made):
    fresh, used = made(0), made(0)
    assert share_an_entry(fresh, used)
    used.random()
    assert not share_an_entry(fresh, used)
    assert not share_an_entry(fresh.random, used.random)


def raised(cause=None):
    with pytest.raises(ValueError, match="1") as caught:
        raise ValueError(1) from cause
    return caught.value


def test_an_exception_is_told_by_where_it_came_from_too():
    assert share_an_entry(ValueError(1), ValueError(1))
    assert share_an_entry(raised(KeyError(2)), raised(KeyError(2)))
    assert not share_an_entry(raised(KeyError(2)), raised(KeyError(3)))
    assert not share_an_entry(raised(), ValueError(1))


class Unhashable:
    __hash__ = None

    def __eq__(self, other):
        return isinstance(other, Unhashable)


def test_an_object_that_cannot_be_hashed_is_an_argument_like_any_other():
    assert share_an_entry([Unhashable()], [Unhashable()])


UNUSABLE = {
    "generator": (n for n in range(2)),
    "bare object": object(),
    "in a list": [1, threading.Lock()],
    "in a dict in a tuple": ({"a": threading.Lock()},),
    "in a dataclass": Point(threading.Lock()),
    "in an array": np.array([threading.Lock(), 1], dtype=object),
    "as a key": Keyed(threading.Lock()),
    "captured by a function": captures(threading.Lock()),
    "file": io.TextIOWrapper(io.BytesIO()),
    "writable memoryview, whose hash raises a ValueError": memoryview(bytearray(b"a")),
}


@pytest.mark.parametrize("value", UNUSABLE.values(), ids=UNUSABLE)
def test_an_argument_that_cannot_be_told_is_refused_by_its_name(world, value):
    runs = []
    f = opero.opero(cache=True, retries=3)(world.define(lambda a, b=None, *, c=None: runs.append(1)))
    for args, kwargs, name in (
        ((value,), {}, "a"),
        ((1, value), {}, "b"),
        ((1,), {"b": value}, "b"),
        ((1,), {"c": value}, "c"),
    ):
        with pytest.raises(TypeError, match=rf"argument '{name}' of .*lambda.*cache_key="):
            world.run(f, *args, **kwargs)
    assert runs == []


def test_the_refusal_names_the_type(world):
    f = cached(world.define(lambda x: x))
    with pytest.raises(TypeError, match=r": object cannot be pickled \(a bare object has no state\);"):
        world.run(f, [object()])
    with pytest.raises(TypeError, match=r"memoryview.*Cache\(ignore='x'\)"):
        world.run(f, [memoryview(b"a")])


def test_a_variadic_argument_that_cannot_be_told_is_refused_by_its_name(world, variadic):
    with pytest.raises(TypeError, match=r"argument 'args' of .*cache_key="):
        world.run(variadic, memoryview(b"a"))
    with pytest.raises(TypeError, match=r"argument 'kwargs' of .*cache_key="):
        world.run(variadic, x=memoryview(b"a"))


def test_cache_delete_refuses_what_a_call_refuses():
    with pytest.raises(TypeError, match=r"argument 'x' of .*cache_key="):
        cached(lambda x: x).cache_delete(memoryview(b"a"))


def test_a_bare_object_that_marks_a_missing_argument_is_known_by_that(world):
    missing = object()
    f = cached(world.define(lambda x=missing: [x]))
    assert world.run(f) is world.run(f, missing) is not world.run(f, None)


class Proxy:
    """Stands for what its function gives at the time, whose class it shows, as those of werkzeug and wrapt do."""

    def __init__(self, get):
        self.get = get

    __class__ = property(lambda self: type(self.get()))

    def __eq__(self, other):
        return self.get() == other

    def __hash__(self):
        return hash(self.get())

    def __len__(self):
        return len(self.get())

    def __str__(self):
        return str(self.get())


PLAIN_VALUES = [-1, -2, True, None, "a", "b", b"a"]


@pytest.mark.parametrize("backend", ["memory", "disk"])
@pytest.mark.parametrize("others", [(), (1,), ("a", None)], ids=str)
def test_a_proxy_of_a_plain_value_is_told_by_what_it_stands_for_now(world, backend, others, tmp_path):
    current = [None]
    proxy = Proxy(lambda: current[0])
    options = {"cache_dir": tmp_path} if backend == "disk" else {}
    f = opero.opero(cache=opero.Cache(backend=backend, **options), retries=0)(
        world.define(lambda x, y=None, z=None: str(x))
    )
    for current[0] in PLAIN_VALUES * 2:
        assert world.run(f, proxy, *others) == str(current[0])
    assert f.cache_info().hits == len(PLAIN_VALUES)


def test_an_item_of_a_map_that_is_a_proxy_is_told_by_what_it_stands_for_now(world):
    current = [None]
    proxy = Proxy(lambda: current[0])
    mode = "async" if world.is_async else "thread"
    mapped = opero.opmap(mode=mode, workers=1, cache=True, progress=False)(world.define(lambda x: [str(x)]))
    for current[0] in PLAIN_VALUES:
        assert mapped.run([proxy, current[0]]) == [[str(current[0])]] * 2


@pytest.mark.parametrize("backend", ["memory", "disk"])
@pytest.mark.parametrize("spec", [int, str, bytes, bool])
def test_a_mock_of_a_plain_value_is_not_kept_alive_by_a_key(world, backend, spec, tmp_path):
    options = {"cache_dir": tmp_path} if backend == "disk" else {}
    f = opero.opero(cache=opero.Cache(backend=backend, **options), retries=0)(world.define(lambda x: 1))

    def call():
        made = mock.Mock(spec=spec)
        assert world.run(f, made) == 1
        return weakref.ref(made)

    gone = call()
    gc.collect()
    assert gone() is None


def containing_itself(kind):
    if kind is dict:
        made = {}
        made["me"] = made
    elif kind is list:
        made = []
        made.append(made)
    elif kind is Point:
        made = Point(None)
        made.x = [made]
    elif kind is Keyed:
        made = Keyed(None)
        made.key = made
    else:
        made = np.empty(1, dtype=object)
        made[0] = made
    return made


@pytest.mark.parametrize("kind", [list, dict, Point, Keyed, np.ndarray], ids=lambda kind: kind.__name__)
def test_an_argument_that_contains_itself_is_told_by_its_shape(world, kind):
    f = cached(world.define(lambda a, b: object()))
    assert world.run(f, 1, containing_itself(kind)) is world.run(f, 1, containing_itself(kind))
    assert world.run(f, 1, containing_itself(kind)) is not world.run(f, 1, [containing_itself(kind)])


def test_what_is_met_again_within_itself_is_told_by_which_one_it_is():
    back_to_outer, back_to_inner = [[]], [[]]
    back_to_outer[0].append(back_to_outer)
    back_to_inner[0].append(back_to_inner[0])
    assert not share_an_entry(back_to_outer, back_to_inner)


def test_a_function_of_a_module_is_told_by_its_signature(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    seen = set()
    for parameter in ("x: int = 1", "x: str = 1", "x: int = 2"):
        (tmp_path / "tools.py").write_text(f"def step({parameter}): return x")
        monkeypatch.delitem(sys.modules, "tools", raising=False)
        importlib.invalidate_caches()
        seen.add(spelling_of(importlib.import_module("tools").step))
    assert len(seen) == 3


def test_a_function_of_a_module_is_told_by_its_code_and_by_that_of_what_it_wraps(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = "def {name}(x): return x + {n}\nstep = functools.wraps({name})(lambda x: {name}(x) + {m})"
    seen = set()
    for n, m in [(1, 1), (2, 1), (1, 2)]:
        (tmp_path / "steps.py").write_text("import functools\n" + source.format(name="step", n=n, m=m))
        monkeypatch.delitem(sys.modules, "steps", raising=False)
        importlib.invalidate_caches()
        seen.add(spelling_of(importlib.import_module("steps").step))
    assert len(seen) == 3


def nested_so_deeply(levels):
    return functools.reduce(lambda inner, _n: [inner], range(levels), [])


def test_an_argument_may_be_nested_as_deeply_as_the_stack_allows(world):
    f = cached(world.define(lambda x: object()))
    deep = [nested_so_deeply(levels) for levels in (15_000, 15_000, 15_001)]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)
    try:
        one, two, other = [world.run(f, argument) for argument in deep]
    finally:
        sys.setrecursionlimit(limit)
    assert one is two is not other
    for argument in deep:
        left = argument
        while left:
            left = left.pop()


# The user's own key


def test_the_users_key_stands_for_the_arguments(world):
    f = cached(world.define(lambda x, trace=None: [x]), cache_key=lambda x, trace=None: x)
    assert world.run(f, 1, trace=object()) is world.run(f, 1, trace=memoryview(b"a"))
    assert world.run(f, 1) is not world.run(f, 2)


def test_the_users_key_function_gets_every_argument():
    got = []

    def key(*args, **kwargs):
        got.append((args, kwargs))
        return 1

    cached(lambda a, b=2, *more, c=3, **others: None, cache_key=key)(1, c=5, d=6)
    assert got == [((1, 2), {"c": 5, "d": 6})]


KEYS_OF_SOME = {
    "any name": lambda a, **others: (a, others["c"]),
    "a name only": lambda a, *, b, c: (a, c),
    "the name of a later one second": lambda a, c, **others: (a, c),
}


@pytest.mark.parametrize("key", KEYS_OF_SOME.values(), ids=KEYS_OF_SOME)
def test_the_users_key_function_may_know_the_first_arguments_by_place_and_others_by_name(world, key):
    f = cached(world.define(lambda a, b=2, c=3: [a, c]), cache_key=key)
    assert world.run(f, 1) is world.run(f, 1, 5) is world.run(f, a=1, b=7, c=3)
    assert [world.run(f, 1, 2, 4), world.run(f, 2)] == [[1, 4], [2, 3]]


@pytest.mark.parametrize("nest", NESTS, ids=repr)
@pytest.mark.parametrize("pair", [(1, True), (0.0, -0.0), ([1], (1,))], ids=repr)
def test_the_users_keys_are_told_apart_like_arguments(pair, nest):
    f = cached(lambda x: object(), cache_key=lambda x: x)
    one, two = nested(nest, *pair)
    assert f(one) is not f(two)
    assert f(one) is f(copied(one))


def test_the_users_key_is_asked_once_for_a_call(world):
    asked = []
    f = cached(world.define(lambda x: x), cache_key=asked.append)
    world.run(f, 1)
    world.run(f, 1)
    assert asked == [1, 1]


def test_a_users_key_that_cannot_be_told_is_refused(world):
    f = cached(world.define(lambda x: x), cache_key=lambda x: memoryview(b"a"))
    with pytest.raises(TypeError, match=r"cache_key= of .*lambda.*memoryview"):
        world.run(f, 1)


def test_an_error_of_the_users_key_function_goes_to_the_caller(world):
    runs = []
    f = cached(world.define(runs.append), cache_key=lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.run(f, 1)
    assert runs == []


def test_a_wrong_call_of_a_function_with_a_users_key_raises_a_type_error(world):
    f = cached(world.define(lambda x: x), cache_key=lambda x: x)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        world.run(f)


def test_keys_of_many_arguments_do_not_meet():
    values = [0, 1, "", "0", None, b"", True, False, 0.0, (), [], {}]
    f = cached(lambda a, b, c: (a, b, c))
    for abc in itertools.product(values, repeat=3):
        assert are_alike(f(*abc), abc)
    assert f.cache_info().hits == 0


def test_what_a_subclass_of_a_builtin_knows_besides_tells_its_objects_apart():
    class Labelled(dict):
        pass

    first, second = Labelled(a=1), Labelled(a=1)
    first.label, second.label = "first", "second"

    assert not share_an_entry(first, second)


def test_a_slot_may_have_the_name_of_what_its_base_has():
    class Tagged(set):
        __slots__ = ("copy",)

    first, second = Tagged({1}), Tagged({1})
    first.copy, second.copy = "first", "second"

    assert not share_an_entry(first, second)


METHODS = ["fork", "spawn", "forkserver"]


def test_digests_of_objects_are_the_same_under_every_hash_seed_and_start_method_and_tell_them_apart():
    program = pathlib.Path(__file__).with_name("digests_of_objects.py")
    seen = []
    for seed, methods in [("0", METHODS), ("1", []), ("2", [])]:
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        output = subprocess.check_output([sys.executable, program, *methods], env=environment)
        seen += json.loads(output).values()
    assert len(seen) == len(METHODS) + 3
    assert all(digests == seen[0] for digests in seen)
    assert len(set(seen[0])) == len(seen[0])


class Node:
    pass


def test_a_long_chain_of_objects_is_as_good_a_key_as_its_pickle():
    def chain(length):
        node = None
        for _ in range(length):
            node, node.next = Node(), node
        return node

    def function(x):
        pass

    key_of = KeyMaker(function, opero.Cache(backend="disk")).key_of
    assert key_of(chain(150)) == key_of(chain(150)) != key_of(chain(151))


def test_objects_that_all_know_each_other_are_a_key_after_bounded_work():
    nodes = [Node() for _ in range(60)]
    for node in nodes:
        node.all = nodes

    def function(x):
        pass

    # Followed along every path, these would be 60! objects.
    assert KeyMaker(function, opero.Cache(backend="disk")).key_of(nodes[0])


# Against an oracle: pickle, of a form that is the same for equal values


@attrs.define
class Defined:
    x: Any


class Model(pydantic.BaseModel):
    x: Any = None


class Tagged(list):
    """A list that knows a tag."""


def tagged(values, tag):
    made = Tagged(values)
    made.tag = tag
    return made


def series(values, unit):
    made = pd.Series(values)
    made.attrs["unit"] = unit
    return made


scalars = st.one_of(
    st.sampled_from(LEAVES),
    st.sampled_from([Color.RED, Signal.RED, Number.ONE, hours(1), hours(1, "CET"), moment(), moment(dt.UTC)]),
    st.sampled_from([np.int32(1), np.int64(1), np.float64(1), slice(1), slice(True), Money("1", "EUR"), label("fr")]),
)
things = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.sampled_from([1, True, "a", None]), inner, max_size=2),
        st.lists(inner, max_size=2).map(collections.deque),
        inner.map(Point),
        inner.map(SlottedPoint),
        inner.map(Named),
        inner.map(Defined),
        inner.map(lambda value: Model(x=value)),
        inner.map(lambda value: functools.partial(captures, value)),
        inner.map(lambda value: tagged([1], value)),
        st.sampled_from(["<i4", "<i8", "<f8", ">i4"]).map(lambda kind: np.ones(2, kind)),
        inner.map(lambda value: np.array([value, None], dtype=object)),
        st.sampled_from(["m", "s"]).map(lambda unit: Quantity([1], unit)),
        st.sampled_from(["m", "s"]).map(lambda unit: series([1], unit)),
        st.sampled_from(["int64", "float64", "Int64", "category"]).map(lambda kind: pd.Series([1, 2]).astype(kind)),
    ),
    max_leaves=4,
)


def canonical(value):  # noqa: PLR0911 - one for each kind
    """The type of a value and all that can be seen of it, in one order; slow and plain."""
    kind = (type(value).__module__, type(value).__qualname__)
    if isinstance(value, (float, complex, decimal.Decimal, int, str, bytes, enum.Enum, type(None), type(...))):
        held = {} if isinstance(value, enum.Enum) else vars_of(value)
        return (kind, repr(value), canonical(held) if held else None)
    if type(value) is dict:
        return (kind, sorted(pickle.dumps((canonical(k), canonical(v)), 4) for k, v in value.items()))
    if isinstance(value, (list, tuple, collections.deque)):
        return (kind, [canonical(v) for v in value], canonical(vars_of(value)), getattr(value, "maxlen", None))
    if isinstance(value, (set, frozenset)):
        return (kind, sorted(pickle.dumps(canonical(v), 4) for v in value))
    if isinstance(value, np.ndarray):
        return (kind, str(value.dtype), value.shape, [canonical(v) for v in value.tolist()], vars_of(value))
    if isinstance(value, np.generic):
        return (kind, str(value.dtype), repr(value))
    if isinstance(value, pd.Series):
        return (kind, str(value.dtype), [canonical(v) for v in value.tolist()], canonical(value.attrs))
    if isinstance(value, functools.partial):
        return (kind, value.func.__qualname__, canonical(value.args))
    if isinstance(value, (bytearray, range, slice, dt.date, dt.time, dt.timedelta, dt.tzinfo)):
        return (kind, repr(value), getattr(value, "fold", None))
    return (kind, canonical(vars_of(value)))


def vars_of(value):
    slots = [name for owner in type(value).__mro__ for name in vars(owner).get("__slots__", ()) if name[:2] != "__"]
    private = {"currency": value._Money__currency} if isinstance(value, Money) else {}
    held = {name: getattr(value, name) for name in slots if hasattr(value, name) and type(value).__module__ == __name__}
    return {**getattr(value, "__dict__", {}), **held, **private}


@thoroughly
@given(things, things)
def test_two_things_have_one_key_when_their_canonical_pickles_are_equal_and_only_then(one, two):
    seen = [pickle.dumps(canonical(value), 4) for value in (one, two)]
    digests = [spelling_of(value) for value in (one, two)]
    assert (digests[0] == digests[1]) == (seen[0] == seen[1])


@thoroughly
@given(things)
def test_a_thing_and_its_copy_have_one_key(value):
    try:
        copied_by_pickle = pickle.loads(pickle.dumps(value))
    except TypeError:
        reject()  # it has something that pickle loses
    assume(pickle.dumps(canonical(copied_by_pickle)) == pickle.dumps(canonical(value)))
    assert spelling_of(value) == spelling_of(copied_by_pickle)


PROGRAM = """
import functools, threading
from opero.core.digests import digest_of
COUNT = 0
SHIFT = {shift}
def double(x): return {factor} * x
class Square:
    def of(self, x): return x ** {power}
@functools.lru_cache
def kept(x): return x + {kept}
def scaling(n, lock): return lambda x: x * n if lock else 0
scale = scaling({scale}, threading.Lock())
def shifted(x): return x + SHIFT
def doubled(x): return [double(y) for y in x]
def squared(x): return Square().of(x)
def indirect(x): return kept(x) if x else indirect(shifted(x))
LIMITS = {{"most": [{limit}]}}
def limited(x: "Answer"): return min(x, LIMITS["most"][0])
class Answer:
    score: "Score"
Score = {score}
def scaled(x): return scale(x)
def counting(x):
    global COUNT
    COUNT += 1
    return x
for function in (shifted, doubled, squared, kept, indirect, scaled, counting, limited, Answer):
    counting(1)
    print(digest_of(function).hex())
"""
SAME = {"shift": 1, "factor": 2, "power": 2, "kept": 1, "scale": 1, "limit": 1, "score": "int"}


@pytest.mark.parametrize(
    ("changed", "differing"),
    [
        ({}, []),
        ({"shift": 2}, [0, 4]),
        ({"factor": 3}, [1]),
        ({"power": 3}, [2]),
        ({"kept": 2}, [3, 4]),
        ({"scale": 2}, [5]),
        ({"limit": 2}, [7]),
        ({"score": "float"}, [7, 8]),
    ],
    ids=str,
)
def test_a_function_of_a_script_is_told_by_what_it_uses_there(changed, differing):
    """Two scripts may each have their own, and nobody finds it by name."""
    digests = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM.format(**SAME | change)], capture_output=True, text=True, check=True
        ).stdout.split()
        for change in ({}, changed)
    ]
    assert [place for place, pair in enumerate(zip(*digests, strict=True)) if len({*pair}) > 1] == differing
