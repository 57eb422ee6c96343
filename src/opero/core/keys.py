"""Cache keys: equal arguments give equal keys, arguments of different types never do.

`freeze` turns any argument into a hashable form in which every value stands beside its type, at every depth, so that
``1``, ``1.0`` and ``True`` are three. Plain arguments (exactly int, str, bool, bytes or None) need no such form: the
source made by `KeyMaker` pairs them with their classes on the spot.

Within `values_only` the form holds nothing that belongs to this process: objects that are otherwise known by identity
or by their own ``__eq__`` are taken apart by `opero.core.reduction`; what is left is an `Opaque`, which
`opero.core.digests` pickles.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import functools
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Self

from opero.core.signature import compile_function, forwarding, name_of
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    import datetime as dt

    from opero.core.signature import Forwarding

PLAIN_TYPES = frozenset({int, str, bool, bytes, type(None)})

Frozen = Any
Freezer = Callable[[Any], Frozen]


class UncacheableError(TypeError):
    """A value that cannot be part of a cache key."""


class Opaque:
    """A value of which a key that outlives the process knows no more than how to pickle it."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


_manner = threading.local()


@contextlib.contextmanager
def values_only() -> Iterator[None]:
    """Let `freeze`, in this thread, refer to no object of this process."""
    before = _only_values()
    _manner.values_only = True
    try:
        yield
    finally:
        _manner.values_only = before


def _only_values() -> bool:
    return getattr(_manner, "values_only", False)


def freeze(value: Any) -> Frozen:
    """A hashable stand-in for ``value``: the same for equal values of the same type, different for all others."""
    kind = value.__class__
    if kind in PLAIN_TYPES:
        return (kind, value)
    freezer = _FREEZERS.get(kind) or _library_freezers().get(kind) or _freezer_by_inheritance(value)
    return (kind, freezer(value))


def identity_of(value: Any) -> Any:
    """What tells a value from others within this process, whatever it is."""
    try:
        return freeze(value)
    except (UncacheableError, RecursionError):
        return _freeze_by_identity(value)


def _freezer_by_inheritance(value: Any) -> Freezer:
    kind: Any = type(value)
    # Asked of the class: a proxy has every attribute that it is asked for.
    if hasattr(kind, "__cache_key__"):
        return lambda v: freeze(v.__cache_key__())
    if isinstance(value, enum.Enum):
        # A combination of flags may have no name.
        return lambda v: freeze(v.value) if v.name is None else v.name
    if dataclasses.is_dataclass(kind) and kind.__eq__ is not object.__eq__:
        return _freeze_dataclass
    for base, freezer in _inherited_freezers():
        if isinstance(value, base):
            # A subclass may know more than its base does.
            return _with_attributes(freezer) if getattr(value, "__dict__", None) else freezer
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return _freeze_array
    return _pandas_freezer(value) or _freeze_hashable


def _pandas_freezer(value: Any) -> Freezer | None:
    pandas = sys.modules.get("pandas")
    if pandas is None:
        return None
    if isinstance(value, pandas.DataFrame):
        return _freeze_frame
    return _freeze_column if isinstance(value, (pandas.Series, pandas.Index)) else None


def _with_attributes(freezer: Freezer) -> Freezer:
    return lambda value: (freezer(value), _freeze_mapping(vars(value)))


def _freeze_each(values: Any) -> Frozen:
    return tuple([freeze(v) for v in values])


def _freeze_set(values: AbstractSet[Any]) -> Frozen:
    return frozenset([freeze(v) for v in values])


def _freeze_mapping(mapping: Mapping[Any, Any]) -> Frozen:
    return frozenset([(freeze(k), freeze(v)) for k, v in mapping.items()])


def _freeze_ordered(mapping: Mapping[Any, Any]) -> Frozen:
    return tuple([(freeze(k), freeze(v)) for k, v in mapping.items()])


def _freeze_dataclass(value: Any) -> Frozen:
    names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
    return tuple([(name, freeze(getattr(value, name))) for name in names])


def _freeze_float(value: float) -> Frozen:
    # The bits: 0.0 and -0.0 are equal but not the same argument, and NaN is not even equal to itself.
    return struct.pack("<d", value)


def _freeze_complex(value: complex) -> Frozen:
    return struct.pack("<dd", value.real, value.imag)


def _freeze_moment(value: dt.datetime | dt.time) -> Frozen:
    # Two zones can show one moment, and one zone two moments (fold): the text has neither the zone nor the fold.
    zone = value.tzinfo
    return (value.isoformat(), value.fold, zone.__class__, None if zone is None else _freeze_zone(zone))


def _freeze_zone(zone: dt.tzinfo) -> Frozen:
    # Equal offsets do not make two zones one. `timezone` tells all in its repr, `ZoneInfo` in its key.
    if zone.__class__.__module__ == "datetime":
        return repr(zone)
    return getattr(zone, "key", None) or _freeze_by_identity(zone)


def _freeze_array(array: Any) -> Frozen:
    masked = getattr(sys.modules["numpy"], "ma", None)
    if masked is not None and isinstance(array, masked.MaskedArray):
        # `tobytes` would show the fill value in place of what is under the mask.
        return (_freeze_array(array.data), masked.getmaskarray(array).tobytes())
    if array.dtype.hasobject:
        return (array.shape, _freeze_each(array.ravel().tolist()))
    return (repr(array.dtype), array.shape, array.tobytes())


def _freeze_frame(frame: Any) -> Frozen:
    columns = [_freeze_column(frame.iloc[:, place]) for place in range(frame.shape[1])]
    return (_freeze_column(frame.columns), _freeze_column(frame.index), tuple(columns))


def _freeze_column(column: Any) -> Frozen:
    """A pandas Series or Index: its names, its type, its values, and for a Series its index."""
    pandas = sys.modules["pandas"]
    labels = freeze(list(column.names)) if isinstance(column, pandas.Index) else freeze(column.name)
    index = _freeze_column(column.index) if isinstance(column, pandas.Series) else None
    categories = getattr(column.dtype, "categories", None)
    kind = (repr(column.dtype), None if categories is None else _freeze_each(categories.tolist()))
    if isinstance(column.dtype, sys.modules["numpy"].dtype) and not isinstance(column, pandas.MultiIndex):
        return (labels, index, kind, _freeze_array(column.to_numpy()))
    return (labels, index, kind, _freeze_each(column.tolist()))


def _freeze_hashable(value: Any) -> Frozen:
    if _only_values():
        return _freeze_by_state(value)
    try:
        hash(value)
    except Exception as error:
        msg = f"a {type(value).__qualname__} is neither hashable nor of a type that opero knows"
        raise UncacheableError(msg) from error
    equality: Any = type(value).__eq__
    if equality is object.__eq__:
        return _freeze_by_identity(value)
    return value


class _Identity(weakref.ref[Any]):
    """Equal only to another reference to the same living object.

    Nothing is kept alive by it, and a new object at an old address is not mistaken for the old one.
    """

    __slots__ = ("_id",)
    _id: int

    def __new__(cls, value: Any) -> Self:
        made = super().__new__(cls, value)
        made._id = id(value)
        return made

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        value = self()
        return value is not None and isinstance(other, _Identity) and value is other()


class _HeldIdentity:
    """Equal only to another one of the same object."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    def __hash__(self) -> int:
        return id(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _HeldIdentity) and self._value is other._value


def _freeze_by_state(value: Any) -> Frozen:
    from opero.core.reduction import freeze_by_reduction

    return freeze_by_reduction(value)


def _freeze_by_identity(value: Any) -> Frozen:
    if _only_values():
        return _freeze_by_state(value)
    try:
        return _Identity(value)
    except TypeError:
        # Objects with slots only: no weak reference, so the key has to hold the object.
        return _HeldIdentity(value)


_FREEZERS: dict[type, Freezer] = {
    float: _freeze_float,
    complex: _freeze_complex,
    tuple: _freeze_each,
    list: _freeze_each,
    dict: _freeze_mapping,
    set: _freeze_set,
    frozenset: _freeze_set,
    bytearray: bytes,
}


@functools.cache
def _library_freezers() -> dict[type, Freezer]:
    """Exact types whose modules are not needed by programs that never pass them."""
    import datetime as dt
    import decimal
    import uuid

    return {
        dt.date: dt.date.isoformat,
        dt.datetime: _freeze_moment,
        dt.time: _freeze_moment,
        dt.timedelta: repr,
        dt.timezone: repr,
        decimal.Decimal: str,
        uuid.UUID: str,
    }


@functools.cache
def _inherited_freezers() -> tuple[tuple[type, Freezer], ...]:
    import datetime as dt
    import decimal
    import pathlib

    return (
        (tuple, _freeze_each),
        (list, _freeze_each),
        (collections.OrderedDict, _freeze_ordered),
        (Mapping, _freeze_mapping),
        (AbstractSet, _freeze_set),
        (float, _freeze_float),
        (complex, _freeze_complex),
        (decimal.Decimal, str),
        (bytearray, bytes),
        (dt.time, _freeze_moment),
        (dt.datetime, _freeze_moment),
        (pathlib.PurePath, str),
    )


class KeyMaker:
    """Gives the cache key of a call.

    Args:
        function: Whose arguments the key is made of. Where it is a method, the instance that it is called on is told
            apart by identity, and not kept alive; a key that outlives the process knows no identity: there an instance
            is what its values are.
        cache_key: What the user gave to make the key in their place.
        digest: Whether the key has to be the same in every process, and to tell nothing of the arguments.

    Attributes:
        key_of: A function of the same arguments that gives the key.
    """

    def __init__(self, function: Callable[..., Any], cache_key: Callable[..., Any] | None, *, digest: bool) -> None:
        shape = forwarding(function)
        name = name_of(function)
        finish = _by_digest if digest else _as_it_is
        # Functions that do not know of this object: it shall be freed with the decorated function, not by and by.
        namespace: dict[str, Any] = {
            "_opero_plain": PLAIN_TYPES,
            "_opero_digest": _digest_of_plain() if digest else None,
            "_opero_frozen_key": _argument_freezer(shape.names, name, _Owners(function), finish),
            "_opero_users_key": None if cache_key is None else _users_key(cache_key, name, finish),
        }
        expression = _key_source(shape, digest=digest) if cache_key is None else f"_opero_users_key({shape.call})"
        source = f"def key_of({shape.parameters}):\n    return {expression}\n"
        self.key_of = compile_function(source, "key_of", {**namespace, **shape.defaults})
        # A wrong call is reported under the name that the user knows.
        self.key_of.__qualname__ = name


class _Owners:
    """Knows the classes of which a function is a method."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._known: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()

    def has(self, instance: Any) -> bool:
        """Whether the class of ``instance``, or one of its bases, holds something that unwraps to the function."""
        kind = type(instance)
        known = self._known.get(kind)
        if known is None:
            members = (member for owner in kind.__mro__ for member in list(vars(owner).values()))
            known = self._known[kind] = any(_unwraps_to(member, self._function) for member in members)
        return known


# What the decorators of the standard library call the function that they hold.
_HOLDERS = ("__wrapped__", "func", "fget")


def _unwraps_to(member: Any, function: Callable[..., Any]) -> bool:
    if isinstance(member, staticmethod):
        return False
    # Of opero's own wrappers, too; a bound is needed for what has every attribute that it is asked for.
    for _ in range(_MOST_WRAPPERS):
        if member is function:
            return True
        held = (getattr(member, name, None) for name in _HOLDERS)
        member = next((inner for inner in held if inner is not None), None)
        if member is None:
            return False
    return False


_MOST_WRAPPERS = 50


# From a way to freeze something to the finished part of a key.
Finish = Callable[[Callable[[Any], Frozen], Any], Any]


def _as_it_is(freezer: Callable[[Any], Frozen], value: Any) -> Frozen:
    return freezer(value)


def key_of_value(value: Any, *, digest: bool) -> Any:
    """The key that is made of one value."""
    return _by_digest(freeze, value) if digest else freeze(value)


def _digest_of_plain() -> Callable[[tuple[Any, ...]], bytes]:
    from opero.core.digests import digest_of_plain

    return digest_of_plain


def _by_digest(freezer: Callable[[Any], Frozen], value: Any) -> bytes:
    from opero.core.digests import digest_of

    with values_only():
        return digest_of(freezer(value))


def _argument_freezer(names: tuple[str, ...], function: str, owners: _Owners, finish: Finish) -> Callable[..., Frozen]:
    def frozen_key(*values: Any) -> Frozen:
        frozen = []
        for name, value in zip(names, values, strict=True):
            is_owner = name == names[0] and finish is _as_it_is and owners.has(value)
            try:
                frozen.append(finish(_freeze_by_identity if is_owner else freeze, value))
            except (UncacheableError, RecursionError) as error:
                raise MisuseError(_complaint(name, function, error)) from error
        return finish(tuple, frozen)

    return frozen_key


def _users_key(cache_key: Callable[..., Any], function: str, finish: Finish) -> Callable[..., Frozen]:
    def users_key(*args: Any, **kwargs: Any) -> Frozen:
        key = cache_key(*args, **kwargs)
        try:
            return finish(freeze, key)
        except (UncacheableError, RecursionError) as error:
            msg = f"cache_key= of {function} returned a {type(key).__qualname__}: {error}; return text or numbers"
            raise MisuseError(msg) from error

    return users_key


def _complaint(name: str, function: str, error: Exception) -> str:
    reason = str(error) if isinstance(error, UncacheableError) else "it contains itself or is nested too deeply"
    return (
        f"argument {name!r} of {function} cannot be part of a cache key: {reason}; "
        "give cache_key=, a function of the same arguments that returns the key"
    )


def _key_source(shape: Forwarding, *, digest: bool) -> str:
    packed = "".join(f"{name}, " for name in shape.names)
    if shape.variadic:
        return f"_opero_frozen_key({packed})"
    if not shape.names:
        return "_opero_digest(())" if digest else "()"
    plain = " and ".join(f"{name}.__class__ in _opero_plain" for name in shape.names)
    classes = "".join(f"{name}.__class__, " for name in shape.names)
    quick = f"_opero_digest(({packed}))" if digest else f"({packed}{classes})"
    return f"{quick} if {plain} else _opero_frozen_key({packed})"
