"""Nested values of built-in and third-party kinds: one key for those that a function could not tell apart, else two.

The oracle is pickle, of a canonical form that says the type of each part and all that can be seen of it.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import pickle
import types
from typing import Any

import attrs
import geopandas as gpd
import msgspec
import numpy as np
import pandas as pd
import pint
import polars as pl
import pydantic
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opero.core.digests import digest_of

thoroughly = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])


# Kinds of values


class Unit(enum.Enum):
    METRE = 1
    FOOT = 2


class Level(enum.IntEnum):
    LOW = 1


class Access(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Data:
    value: Any


@dataclasses.dataclass(frozen=True, slots=True)
class SlottedData:
    value: Any


@attrs.define
class Attrs:
    value: Any


@attrs.frozen(cache_hash=True)
class FrozenAttrs:
    value: Any = attrs.field(eq=False)


class Struct(msgspec.Struct):
    value: Any


class FrozenStruct(msgspec.Struct, frozen=True, cache_hash=True):
    value: Any


class TaggedStruct(msgspec.Struct, tag="one", array_like=True):
    value: Any


class Model(pydantic.BaseModel):
    value: Any
    _private: Any = pydantic.PrivateAttr(None)

    @functools.cached_property
    def shown(self) -> str:
        return repr(self.value)


class FrozenModel(pydantic.BaseModel, frozen=True):
    value: Any


class OpenModel(pydantic.BaseModel, extra="allow"):
    """Takes any fields."""


class Quantity:
    """Equal to those of the same length in another unit, as pint's are."""

    def __init__(self, value: Any, unit: str) -> None:
        self.value = value
        self.unit = unit

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Quantity)

    def __hash__(self) -> int:
        return 1


class MeasuredArray(np.ndarray):
    """An array that knows its unit, as astropy's do."""

    def __array_finalize__(self, other: Any) -> None:
        self.unit = getattr(other, "unit", None)


class MeasuredFrame(pd.DataFrame):
    """A frame that knows its unit, as GeoPandas' know a coordinate system."""

    _metadata = ("unit",)

    @property
    def _constructor(self) -> Any:
        return MeasuredFrame


class MeasuredTable(pl.DataFrame):
    """The same of polars, which copies no attributes."""

    def __copy__(self) -> MeasuredTable:
        return with_unit(super().__copy__(), self.unit)

    def __deepcopy__(self, memo: Any = None) -> MeasuredTable:
        return with_unit(super().__deepcopy__(memo), self.unit)


class Tagged(list):
    """A list that knows a tag."""


class Named(str):
    __slots__ = ("name",)


REGISTRY = pint.UnitRegistry()

# Values are made of recipes, (kind, parameters…, recipes of the parts), so that one can be made twice, or be changed


def with_unit(made: Any, unit: Any) -> Any:
    made.unit = unit
    return made


def with_attrs(made: Any, value: Any) -> Any:
    made.attrs["a"] = value
    return made


def model_with_private(value: Any, private: Any) -> Model:
    made = Model(value=value)
    made._private = private
    return made


def objects(*values: Any) -> np.ndarray:
    made = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        made[place] = value
    return made


def named(text: str, name: Any) -> Named:
    made = Named(text)
    made.name = name
    return made


def tagged(value: Any, tag: Any) -> Tagged:
    made = Tagged([value])
    made.tag = tag
    return made


PLAIN = [None, True, False, 0, 1, -1, 2**70, 0.0, -0.0, 1.0, float("nan"), 1j, "", "a", "1", b"a", ..., Unit.METRE]
MOMENTS = ["2025-03-30", "2025-10-26 02:30"]
SCALARS = {
    "decimal": (decimal.Decimal, ["1", "1.0", "NaN"]),
    "date": (dt.date.fromisoformat, ["2025-03-30"]),
    "moment": (dt.datetime.fromisoformat, [*MOMENTS, "2025-10-26 02:30+00:00", "2025-10-26 03:30+01:00"]),
    "duration": (lambda days: dt.timedelta(days=days), [0, 1]),
    "member": (lambda member: member, [Unit.FOOT, Level.LOW, Access.READ, Access.READ | Access.WRITE, Access(0)]),
    "int8": (np.int8, [0, 1]),
    "int64": (np.int64, [0, 1]),
    "float32": (np.float32, [0.0, -0.0, 1.0, float("nan")]),
    "float64": (np.float64, [0.0, 1.0]),
    "bool_": (np.bool_, [0, 1]),
    "str_": (np.str_, ["a"]),
    "datetime64": (np.datetime64, MOMENTS[:1]),
    "datetime64[s]": (lambda text: np.datetime64(text, "s"), MOMENTS[:1]),
    "dtype": (np.dtype, ["int8", "<M8[s]", "<M8[D]"]),
    "Timestamp": (pd.Timestamp, MOMENTS),
    "Timestamp, in Rome": (lambda text: pd.Timestamp(text, tz="Europe/Rome"), MOMENTS[:1]),
    "Timestamp, of seconds": (lambda text: pd.Timestamp(text).as_unit("s"), MOMENTS[:1]),
    "Timedelta": (lambda days: pd.Timedelta(days=days), [0, 1]),
    "Period": (pd.Period, ["2025", "2025-03"]),
    "Interval": (lambda closed: pd.Interval(0, 1, closed), ["left", "right"]),
    "missing": (lambda value: value, [pd.NA, pd.NaT]),
    "pandas dtype": (pd.api.types.pandas_dtype, ["Int64", "category", "datetime64[ns, UTC]"]),
    "polars dtype": (lambda kind: kind, [pl.Int8, pl.Datetime("ms"), pl.Datetime("us"), pl.List(pl.Int8)]),
    "secret": (pydantic.SecretStr, ["a", "b"]),
    "length": (REGISTRY.Quantity, ["1 km", "1000 m", "1000.0 m"]),
    "lengths": (lambda unit: REGISTRY.Quantity(np.ones(2), unit), ["m", "km"]),
    "geometry": (shapely.from_wkt, ["POINT (0 1)", "POINT (0 -1)", "POINT Z (0 1 0)", "LINESTRING (0 1, 0 2)"]),
    "geometry with a system": (lambda srid: shapely.set_srid(shapely.Point(0, 1), srid), [4326, 3857]),
    "geometries": (lambda crs: gpd.GeoSeries([shapely.Point(0, 1), None], crs=crs), [None, 4326, 3857]),
    "places": (
        lambda names: gpd.GeoDataFrame({name: [shapely.Point(0, 1)] for name in ("a", "b")}, geometry=names),
        ["a", "b"],
    ),
    "text as NumPy has it": (lambda kind: np.array(["a", "bc"], kind), ["<U2", "<U3", "object"]),
    "numbers": (lambda kind: np.array([0, 1], kind), ["<i4", ">i4", "<f4", "<M8[s]", "<M8[ns]", "bool"]),
    "shape": (np.zeros, [0, 2, (2, 1), (1, 2), ()]),
    "unit": (lambda unit: with_unit(np.ones(2).view(MeasuredArray), unit), ["m", "ft", None]),
    "masked": (lambda mask: np.ma.array([1, 2], mask=mask), [[0, 0], [0, 1]]),
    "record": (lambda name: np.zeros(1, [(name, "i4")]), ["a", "b"]),
    "extension": (
        lambda kind: pd.array([0, 1, None], dtype=kind),
        ["Int8", "Int64", "Float64", "boolean", "category", "Sparse[float]"],
    ),
    "text of pandas": (
        lambda kind: pd.Series(["a", None], dtype=kind),
        ["string", "str", "object", "category", pd.CategoricalDtype(["a", "b"]), pd.CategoricalDtype(["b", "a"])],
    ),
    "times of pandas": (
        lambda kind: pd.Series(["2025-01-01", None], dtype="datetime64[ns]").astype(kind),
        ["datetime64[ns]", "datetime64[s]", "object"],
    ),
    "index": (
        lambda index: index(),
        [
            lambda: pd.RangeIndex(2),
            lambda: pd.RangeIndex(0, 4, 2),
            lambda: pd.Index([0, 1]),
            lambda: pd.Index([0, 1], name="a"),
            lambda: pd.Index([0, 1], dtype="int8"),
            lambda: pd.Index([False, True]),
            lambda: pd.MultiIndex.from_product([[0], [1, 2]]),
            lambda: pd.MultiIndex.from_product([[0], [1, 2]], names=["a", None]),
            lambda: pd.date_range("2025", periods=3),
            lambda: pd.date_range("2025", periods=3).as_unit("s"),
            lambda: pd.DatetimeIndex(["2025-01-01", "2025-01-02", "2025-01-03"]),
            lambda: pd.date_range("2025", periods=3, tz="UTC"),
            lambda: pd.period_range("2025", periods=2, freq="M"),
            lambda: pd.interval_range(0, 2),
            lambda: pd.CategoricalIndex(["a"], ["a", "b"]),
        ],
    ),
    "column of polars": (
        lambda kind: pl.Series("a", [0, 1, None]).cast(kind),
        [pl.Int8, pl.Int64, pl.Float64, pl.Boolean, pl.Duration("ms"), pl.Duration("us")],
    ),
    "nanoseconds of polars": (
        lambda number: pl.Series("a", [number, None]).cast(pl.Datetime("ns")),
        [0, 1],
    ),
    "names of polars": (
        lambda kind: pl.Series("a", ["x", None], kind),
        [pl.String, pl.Enum(["x", "y"]), pl.Enum(["y", "x"]), pl.Categorical],
    ),
    "lists of polars": (pl.Series, [[[1], [2, 3]], [[1, 2], [3]], [[1], None], [{"a": 1}]]),
    "expression": (lambda number: pl.col("a") + number, [1, 2]),
}
CONTAINERS = {
    "list": lambda *values: [*values],
    "tuple": lambda *values: values,
    "dict of text": lambda one, two: {"a": one, "b": two},
    "dict of bool": lambda one, two: {True: one, "b": two},
    "ordered dict": lambda one, two: collections.OrderedDict(a=one, b=two),
    "defaultdict": lambda value: collections.defaultdict(list, a=value),
    "deque": lambda *values: collections.deque(values),
    "bounded deque": lambda *values: collections.deque(values, maxlen=5),
    "slice": slice,
    "namespace": lambda value: types.SimpleNamespace(value=value),
    "partial": lambda value: functools.partial(len, value),
    "tagged list": tagged,
    "named text": lambda name: named("a", name),
    "dataclass": Data,
    "slotted dataclass": SlottedData,
    "attrs": Attrs,
    "frozen attrs": FrozenAttrs,
    "msgspec": Struct,
    "frozen msgspec": FrozenStruct,
    "tagged msgspec": TaggedStruct,
    "pydantic": lambda value: Model(value=value),
    "frozen pydantic": lambda value: FrozenModel(value=value),
    "pydantic, private": model_with_private,
    "pydantic, any fields": lambda one, two: OpenModel(a=one, b=two),
    "quantity": lambda value: Quantity(value, "m"),
    "quantity in feet": lambda value: Quantity(value, "ft"),
    "array of objects": objects,
    "array of objects in two dimensions": lambda one, two: objects(one, two).reshape(2, 1),
    "array with any unit": lambda unit: with_unit(np.ones(2).view(MeasuredArray), unit),
    "series of objects": lambda one, two: pd.Series(objects(one, two)),
    "series with a name": lambda value: pd.Series(objects(value), name="a"),
    "series with attributes": lambda value: with_attrs(pd.Series([1]), value),
    "frame": lambda one, two: pd.DataFrame({"a": objects(one), "b": objects(two)}),
    "frame in rows": lambda one, two: pd.DataFrame({"a": objects(one, two)}),
    "frame with an index": lambda value: pd.DataFrame({"a": objects(value)}, index=["r"]),
    "frame with attributes": lambda value: with_attrs(pd.DataFrame({"a": [1]}), value),
    "frame with a unit": lambda unit: with_unit(MeasuredFrame({"a": [1]}), unit),
    "polars with a unit": lambda unit: with_unit(MeasuredTable({"a": [1]}), unit),
}
PARTS = {"list": (0, 3), "tuple": (0, 3), "deque": (0, 3), "bounded deque": (0, 3), "slice": (1, 3)}
TWO = {
    name for name, make in CONTAINERS.items() if isinstance(make, types.FunctionType) and make.__code__.co_argcount == 2
}

plain_recipes = st.sampled_from([("plain", place) for place in range(len(PLAIN))])
scalar_recipes = st.sampled_from([(name, place) for name, (_, given) in SCALARS.items() for place in range(len(given))])


def containing(inner: Any) -> Any:
    def of_kind(name: str) -> Any:
        fewest, most = PARTS.get(name, (2, 2) if name in TWO else (1, 1))
        return st.lists(inner, min_size=fewest, max_size=most).map(lambda parts: (name, *parts))

    return st.sampled_from([*CONTAINERS]).flatmap(of_kind)


recipes = st.recursive(plain_recipes | scalar_recipes, containing, max_leaves=4)


def made_by(recipe: tuple[Any, ...]) -> Any:
    name, *rest = recipe
    if name == "plain":
        return PLAIN[rest[0]]
    if name in SCALARS:
        make, given = SCALARS[name]
        return make(given[rest[0]])
    return CONTAINERS[name](*map(made_by, rest))


@st.composite
def changes(draw: Any, recipe: tuple[Any, ...]) -> tuple[Any, ...]:
    """The recipe with another part in one place, mostly one that is easily taken for it."""
    name, *rest = recipe
    if name in CONTAINERS and rest and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(rest) - 1))
        return (name, *rest[:place], draw(changes(rest[place])), *rest[place + 1 :])
    if name in CONTAINERS:
        alike = [other for other in CONTAINERS if PARTS.get(other, other in TWO) == PARTS.get(name, name in TWO)]
        return (draw(st.sampled_from(alike)), *rest)
    if name in SCALARS:
        return draw(st.sampled_from([(name, place) for place in range(len(SCALARS[name][1]))]) | scalar_recipes)
    return draw(plain_recipes | scalar_recipes)


# What can be seen of a value


def canonical(value: Any) -> Any:  # noqa: C901, PLR0911, PLR0912 - one for each kind
    """The type of a value and all that can be seen of it, in one order; slow and plain."""
    kind = (type(value).__module__, type(value).__qualname__)
    if value is pd.NA or value is pd.NaT or isinstance(value, (type(None), type(...), enum.Enum)):
        return (kind, repr(value))
    if isinstance(value, (pd.Timestamp, pd.Timedelta)):
        return (kind, repr(value), value.unit, getattr(value, "tz", None) and str(value.tz))
    if isinstance(value, np.ma.MaskedArray):
        return (kind, canonical(value.data), canonical(value.mask), canonical(value.fill_value))
    if isinstance(value, np.ndarray):
        held = [canonical(one) for one in value.ravel().tolist()]
        return (kind, canonical(value.dtype), value.shape, held, of_vars(value))
    if isinstance(value, np.generic):
        return (kind, canonical(value.dtype), canonical(value.item()))
    if isinstance(value, np.dtype):
        return (kind, value.str, value.descr)
    if isinstance(value, (pd.DataFrame, pd.Series, pd.Index, pd.api.extensions.ExtensionArray)):
        return (kind, *of_pandas(value))
    if isinstance(value, pd.api.extensions.ExtensionDtype):
        return (kind, repr(value))
    if isinstance(value, (pl.DataFrame, pl.Series)):
        return (kind, *of_polars(value))
    if isinstance(value, (pl.Expr, pl.DataType)):
        return (kind, str(value))
    if type(value) is dict or isinstance(value, collections.defaultdict):
        factory = getattr(value, "default_factory", None)
        return (kind, sorted(as_bytes(pair) for pair in value.items()), factory is list)
    if isinstance(value, collections.OrderedDict):
        return (kind, [canonical(pair) for pair in value.items()])
    if isinstance(value, (list, tuple, collections.deque)):
        return (kind, [canonical(one) for one in value], getattr(value, "maxlen", None), of_vars(value))
    if isinstance(value, slice):
        return (kind, [canonical(one) for one in (value.start, value.stop, value.step)])
    if isinstance(value, functools.partial):
        return (kind, value.func.__name__, canonical(value.args))
    if isinstance(value, pydantic.SecretStr):
        return (kind, value.get_secret_value())
    if isinstance(value, pydantic.BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields} | (value.model_extra or {})
        return (kind, [canonical(held) for held in (fields, value.__pydantic_private__, value.model_fields_set)])
    if isinstance(value, set):
        return (kind, sorted(value))
    if isinstance(value, type):
        return (kind, value.__module__, value.__qualname__)
    if isinstance(value, shapely.Geometry):
        return (kind, shapely.to_wkb(value, hex=True, include_srid=True))
    if isinstance(value, pint.Quantity):
        return (kind, canonical(value.magnitude), str(value.units))
    if isinstance(value, Named):
        return (kind, str(value), of_vars(value))
    if isinstance(value, (msgspec.Struct, SlottedData, Attrs, FrozenAttrs, Data, Quantity, types.SimpleNamespace)):
        return (kind, of_vars(value))
    # Numbers, text, dates: what they show is all.
    return (kind, repr(value), getattr(value, "fold", None))


def as_bytes(value: Any) -> bytes:
    # As text: pickle notes which parts are one object.
    return repr(canonical(value)).encode()


def of_vars(value: Any) -> Any:
    held = {name: getattr(value, name) for name in ("value", "unit", "name", "tag") if hasattr(value, name)}
    return [(name, canonical(one)) for name, one in held.items()]


def of_pandas(value: Any) -> list[Any]:
    beside = [canonical(getattr(value, "attrs", None)), of_vars(value) if isinstance(value, MeasuredFrame) else None]
    if isinstance(value, gpd.GeoDataFrame):
        beside.append(value.active_geometry_name)
    if isinstance(value, pd.DataFrame):
        columns = [canonical(value.iloc[:, place].array) for place in range(value.shape[1])]
        return [canonical(value.index), canonical(value.columns), columns, beside]
    if isinstance(value, pd.Series):
        return [canonical(value.name), canonical(value.index), canonical(value.array), beside]
    held = [canonical(one) for one in value]
    if isinstance(value, pd.Index):
        # A frequency and what a range steps by can be seen, too.
        return [canonical([*value.names]), repr(value), [canonical(kind) for kind in of_levels(value)], held]
    return [repr(value.dtype), dtype_of(value.dtype), held, str(getattr(value, "crs", None))]


def of_levels(index: Any) -> list[Any]:
    return [*index.dtypes] if index.nlevels > 1 else [index.dtype]


def dtype_of(dtype: Any) -> Any:
    categories = getattr(dtype, "categories", None)
    return None if categories is None else ([canonical(one) for one in categories], dtype.ordered)


def of_polars(value: Any) -> list[Any]:
    columns = value.get_columns() if isinstance(value, pl.DataFrame) else [value]
    held = [(one.name, repr(one.dtype), canonical(one.to_list()), nanoseconds_of(one)) for one in columns]
    return [held, canonical(getattr(value, "unit", None)) if isinstance(value, MeasuredTable) else None]


def nanoseconds_of(column: pl.Series) -> Any:
    return column.to_physical().to_list() if column.dtype.is_temporal() else None


def seen(value: Any) -> bytes:
    return pickle.dumps(repr(canonical(value)))


# What a function cannot see


def used(value: Any) -> Any:
    """The value, after it has found out things of itself that it keeps."""
    for use in (repr, hash, lambda one: one.shown, lambda one: one.index.is_unique, lambda one: [*one]):
        try:
            use(value)
        except Exception:  # noqa: BLE001 - not of this kind
            continue
    return value


def laid_out_anew(value: Any) -> Any:
    """The value, in another order or other pieces in memory."""
    if type(value) is dict:
        return dict(reversed(value.items()))
    if type(value) is np.ndarray:
        return np.repeat(value, 2, axis=0)[::2] if value.ndim else value.copy(order="F")
    if type(value) is pd.DataFrame:
        return pd.concat([value.iloc[:, [place]] for place in range(value.shape[1])], axis=1).__finalize__(value)
    if type(value) is pl.Series and len(value) > 1:
        return pl.concat([value[:1], value[1:]], rechunk=False)
    return value


@thoroughly
@given(recipes, st.data())
def test_two_values_have_one_key_when_their_canonical_pickles_are_equal_and_only_then(recipe, data):
    other = data.draw(changes(recipe) | recipes)
    one, two = made_by(recipe), made_by(other)

    assert (digest_of(one) == digest_of(two)) == (seen(one) == seen(two))


@thoroughly
@given(recipes, st.sampled_from([used, laid_out_anew, copy.deepcopy, copy.copy]))
def test_what_a_function_cannot_see_of_a_value_is_no_part_of_its_key(recipe, make):
    one, two = made_by(recipe), make(made_by(recipe))

    assert seen(one) == seen(two)
    assert digest_of(one) == digest_of(two)
