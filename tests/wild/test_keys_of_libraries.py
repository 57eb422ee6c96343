"""What other libraries make as arguments of cached functions: alike ones have one key, all others do not."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from typing import Annotated, Any

import attrs
import msgspec
import numba
import numpy as np
import polars as pl
import pydantic
import pytest

from opero.core.digests import digest_of


class Model(pydantic.BaseModel):
    value: Any
    _private: int = pydantic.PrivateAttr(0)

    @functools.cached_property
    def length(self) -> int:
        return len(repr(self.value))


@attrs.define
class Attrs:
    value: Any
    note: Any = attrs.field(default=None, eq=False)


@attrs.frozen(cache_hash=True)
class FrozenAttrs:
    value: Any


class Struct(msgspec.Struct):
    value: Any


class FrozenStruct(msgspec.Struct, frozen=True, cache_hash=True):
    value: Any


class Measured(pl.DataFrame):
    """Has a unit."""


def measured(unit):
    made = Measured({"a": [1, 2]})
    made.unit = unit
    return made


def private(number):
    made = Model(value=1)
    made._private = number
    return made


def made_with(field):
    return msgspec.defstruct("Made", [("x", Any, field)])


def one_more(x):
    return x + 1


def one_less(x):
    return x - 1


MAKERS = {
    "pydantic": lambda: Model(value=1),
    "pydantic, bool": lambda: Model(value=True),
    "pydantic, private": lambda: private(1),
    "pydantic, secret": lambda: pydantic.SecretStr("a"),
    "pydantic, URL": lambda: pydantic.HttpUrl("https://a.example"),
    "attrs": lambda: Attrs(1),
    "attrs, bool": lambda: Attrs(True),
    "attrs, left out of the comparison": lambda: Attrs(1, 2),
    "attrs, frozen": lambda: FrozenAttrs(1),
    "msgspec": lambda: Struct(1),
    "msgspec, bool": lambda: Struct(True),
    "msgspec, frozen": lambda: FrozenStruct(1),
    "msgspec, class": lambda: msgspec.defstruct("Made", [("x", int)]),
    "msgspec, class of another type": lambda: msgspec.defstruct("Made", [("x", str)]),
    "msgspec, class with a default": lambda: msgspec.defstruct("Made", [("x", int, 1)]),
    "msgspec, class with another default": lambda: msgspec.defstruct("Made", [("x", int, 2)]),
    "msgspec, class with a limit": lambda: msgspec.defstruct("Made", [("x", Annotated[int, msgspec.Meta(gt=1)])]),
    "msgspec, class with another limit": lambda: msgspec.defstruct("Made", [("x", Annotated[int, msgspec.Meta(gt=2)])]),
    "msgspec, limit": lambda: list[Annotated[int, msgspec.Meta(gt=1)]],
    "msgspec, another limit": lambda: list[Annotated[int, msgspec.Meta(gt=2)]],
    "msgspec, class with a tag": lambda: msgspec.defstruct("Made", [("x", int)], tag="a"),
    "msgspec, class with another tag": lambda: msgspec.defstruct("Made", [("x", int)], tag="b"),
    "msgspec, class with other names": lambda: msgspec.defstruct("Made", [("x", int)], rename="upper"),
    "msgspec, class that makes a default": lambda: made_with(msgspec.field(default_factory=list)),
    "msgspec, class that makes another default": lambda: made_with(msgspec.field(default_factory=dict)),
    "attrs, class": lambda: attrs.make_class("Made", {"x": attrs.field(type=int, default=1)}),
    "attrs, class of another type": lambda: attrs.make_class("Made", {"x": attrs.field(type=str, default=1)}),
    "attrs, class with a converter": lambda: attrs.make_class("Made", {"x": attrs.field(type=int, converter=abs)}),
    "NumPy, masked": lambda: np.ma.array([1, 2], mask=[0, 1]),
    "NumPy, masked elsewhere": lambda: np.ma.array([1, 2], mask=[1, 0]),
    "NumPy, masked by another value": lambda: np.ma.array([1, 2], mask=[0, 1], fill_value=7),
    "NumPy, not masked": lambda: np.array([1, 2]),
    "numba": lambda: numba.njit(one_more),
    "numba, other function": lambda: numba.njit(one_less),
    "numba, other options": lambda: numba.njit(fastmath=True)(one_more),
    "polars": lambda: pl.DataFrame({"a": [1, 2], "b": ["x", None]}),
    "polars, other type": lambda: pl.DataFrame({"a": [1, 2], "b": ["x", None]}, schema_overrides={"a": pl.Int8}),
    "polars, other value": lambda: pl.DataFrame({"a": [1, 3], "b": ["x", None]}),
    "polars, other name": lambda: pl.DataFrame({"a": [1, 2], "c": ["x", None]}),
    "polars, in meters": lambda: measured("m"),
    "polars, in feet": lambda: measured("ft"),
    "polars, column": lambda: pl.Series("a", [1, 2]),
    "polars, names": lambda: pl.Series("a", ["x"], dtype=pl.Enum(["x", "y"])),
    "polars, names in another order": lambda: pl.Series("a", ["x"], dtype=pl.Enum(["y", "x"])),
    "polars, moments": lambda: pl.Series("a", [1, None], dtype=pl.Datetime("us")),
    "polars, finer moments": lambda: pl.Series("a", [1, None], dtype=pl.Datetime("ns")),
    "polars, later moments": lambda: pl.Series("a", [2, None], dtype=pl.Datetime("ns")),
    "polars, moments in a zone": lambda: pl.Series("a", [1, None], dtype=pl.Datetime("ns", "UTC")),
    "polars, days": lambda: pl.Series("a", [1, None], dtype=pl.Date),
    "polars, lists of moments": lambda: pl.Series("a", [[1]], dtype=pl.List(pl.Datetime("ns"))),
    "polars, lists of later moments": lambda: pl.Series("a", [[2]], dtype=pl.List(pl.Datetime("ns"))),
    "polars, money": lambda: pl.Series("a", [1], dtype=pl.Decimal(10, 2)),
    "polars, finer money": lambda: pl.Series("a", [1], dtype=pl.Decimal(10, 3)),
    "polars, categories": lambda: pl.Series("a", ["x"], dtype=pl.Categorical),
    "polars, other categories": lambda: pl.Series("a", ["y"], dtype=pl.Categorical),
    "polars, expression": lambda: pl.col("a") + 1,
}


@pytest.mark.parametrize("name", MAKERS)
def test_alike_ones_have_one_key(name):
    assert digest_of(MAKERS[name]()) == digest_of(MAKERS[name]())


def test_unlike_ones_never_have():
    keys = {name: digest_of(make()) for name, make in MAKERS.items()}

    assert [pair for pair in itertools.combinations(keys, 2) if keys[pair[0]] == keys[pair[1]]] == []


USES = {
    "hash of attrs": (lambda: FrozenAttrs(1), hash),
    "hash of msgspec": (lambda: FrozenStruct(1), hash),
    "cached property of pydantic": (lambda: Model(value=1), lambda model: model.length),
    "fill value of NumPy": (lambda: np.ma.array([1, 2], mask=[0, 1]), lambda array: array.filled()),
    "order that polars has found": (lambda: pl.Series("a", [1, 2]), lambda series: series.sort(in_place=True)),
}


@pytest.mark.parametrize(("make", "use"), USES.values(), ids=USES)
def test_what_an_object_keeps_of_its_use_is_no_part_of_its_key(make, use):
    used = make()
    use(used)

    assert digest_of(used) == digest_of(make())


def test_the_chunks_of_a_polars_frame_do_not_matter():
    parts = [pl.DataFrame({"a": [number]}) for number in (2, 1)]

    assert digest_of(pl.concat(parts, rechunk=False)) == digest_of(pl.DataFrame({"a": [2, 1]}))


def test_what_lies_under_the_missing_values_of_a_polars_column_does_not_matter():
    frame = pl.DataFrame({"a": [5, None, 3]})
    hidden = frame.select(pl.when(pl.col("a") == 5).then(None).otherwise(pl.col("a")).alias("a"))["a"]

    assert digest_of(hidden) == digest_of(pl.Series("a", [None, None, 3]))
    assert digest_of(hidden.drop_nulls()) == digest_of(pl.Series("a", [3]))


ATTRS = """
import attrs
from opero.core.digests import digest_of
@attrs.frozen
class Part:
    x: int
print(digest_of(Part(1)).hex())
"""


def test_a_frozen_class_of_a_script_has_one_key_in_each_process():
    runs = [
        subprocess.run([sys.executable, "-c", ATTRS], env=os.environ | {"PYTHONHASHSEED": seed}, check=True, stdout=-1)
        for seed in "12"
    ]

    assert runs[0].stdout == runs[1].stdout


# Too large for the environment of these tests; they run where it is.
OF_TORCH = """
import torch
from opero.core.digests import digest_of
torch.manual_seed(0)
ones = torch.ones(2, 3)
made = [
    ones, ones.double(), ones.bfloat16(), ones + 1, ones.t(), ones[0], ones.to_sparse(), torch.tensor(1.0),
    torch.empty(0), torch.ones(2, 3, requires_grad=True), torch.nn.Parameter(ones),
    torch.ones(2, dtype=torch.complex64).conj(), torch.nn.Linear(3, 1),
    torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.BatchNorm1d(1)),
]
keys = [digest_of(value).hex() for value in made]
assert len({*keys}) == len(keys)
assert digest_of(ones.clone()) == digest_of(ones) and digest_of(ones * 2) == digest_of(ones + 1)
print(keys)
"""


def test_tensors_and_modules_of_torch_are_told_by_their_contents_in_each_process():
    pytest.importorskip("torch")
    runs = [subprocess.run([sys.executable, "-c", OF_TORCH], check=True, stdout=-1) for _ in range(2)]

    assert runs[0].stdout == runs[1].stdout
