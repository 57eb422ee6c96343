"""What a value is, as bytes: its type and the state that pickle would take of it, recursively.

The bytes are the same in every process and for all values that a function could not tell apart; the order of a dict's
items and of a set's elements makes no difference. What makes an object equal to others in its own opinion is not asked.
A plain value is spelled by `marshal`, everything else is the digest of its parts: so large values have short keys from
which nothing can be read.
"""

from __future__ import annotations

import collections
import copyreg
import dis
import enum
import functools
import itertools
import marshal
import os
import pickle
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from hashlib import blake2b
from typing import Any

from opero.core.control import decoration_of
from opero.core.signature import find_by_name, innermost, name_of
from opero.exceptions import MisuseError

PLAIN_TYPES = frozenset({int, str, bool, bytes, type(None)})
_LEAVES = PLAIN_TYPES | {float, complex, type(...)}
SIZE = 20
# Stands before a digest; nothing that marshal writes begins with it.
_DIGEST = b"#"
_PROTOCOL = 4
# Later versions of the format note which objects are one and the same, so that equal values look different.
_MARSHAL_VERSION = 2
# One module under two names: in worker processes, and in Python 3.13.
_SAME_MODULES = {"__mp_main__": "__main__", "pathlib._local": "pathlib"}


def is_class(value: Any) -> bool:
    """Whether it is a class; ``list[int]`` only says that it is."""
    return issubclass(type(value), type)


class UncacheableError(TypeError):
    """A value that cannot be told apart from others."""


def digest_of(*values: Any) -> bytes:
    """The digest of some values.

    Raises:
        UncacheableError: If one of them has a state that pickle cannot take.
    """
    return digest_of_spelled([spelling_of(value) for value in values])


def digest_of_spelled(spelled: Iterable[bytes]) -> bytes:
    """The digest of values that `spelling_of` has spelled."""
    return blake2b(b"".join(spelled), digest_size=SIZE, person=b"values").digest()


def digest_of_plain(values: tuple[Any, ...]) -> bytes:
    """The digest of values that are all of exactly the `PLAIN_TYPES`, quickly."""
    # Half of the time that a new one takes.
    made = _PLAIN.copy()
    made.update(marshal.dumps(values, _MARSHAL_VERSION))
    return made.digest()


_PLAIN = blake2b(digest_size=SIZE, person=b"plain")


class _Bag:
    """Parts whose order makes no difference; those of a mapping are a key and a value in turn."""

    __slots__ = ("in_pairs", "values")

    def __init__(self, values: Iterable[Any], *, in_pairs: bool = False) -> None:
        self.values = values
        self.in_pairs = in_pairs


_IN_PAIRS = frozenset({"dict", "pairs"})
_IN_ANY_ORDER = _IN_PAIRS | {"set", "frozenset", "elements"}


def _digest(label: str, content: bytes) -> bytes:
    head = marshal.dumps(label, _MARSHAL_VERSION)
    return _DIGEST + blake2b(head + content, digest_size=SIZE, person=b"value").digest()


def spelling_of(value: Any) -> bytes:
    """The bytes that tell a value from all others.

    Raises:
        UncacheableError: If it has a state that pickle cannot take.
    """
    found, _ = _Walk().spell(value)
    return found


def _class_spelling(kind: type) -> bytes:
    # By itself: so it is the same wherever the class is met.
    found = _classes.get(kind)
    if found is None:
        found, _ = _Walk(into_classes=True).spell(kind)
        _classes[kind] = found
    return found


_classes: weakref.WeakKeyDictionary[type, bytes] = weakref.WeakKeyDictionary()


class _Walk:
    """Takes a value apart, and the parts that it has.

    Args:
        into_classes: Whether classes that cannot be imported are taken apart on the way, too.
    """

    def __init__(self, *, into_classes: bool = False) -> None:
        self._into_classes = into_classes
        # By their ids: how deep those lie that are being taken apart, and what is known of those that have been.
        self._depths: dict[int, int] = {}
        self._known: dict[int, tuple[Any, bytes]] = {}

    def spell(self, value: Any) -> tuple[bytes, int]:
        """The spelling of a value, and the depth of the outermost one that it refers back to."""
        found = _at_once(value)
        if found is None and is_class(value) and not self._into_classes:
            found = _class_spelling(value)
        if found is None and id(value) in self._known:
            found = self._known[id(value)][1]
        if found is not None:
            return found, _NONE
        depth = self._depths.get(id(value))
        if depth is not None:
            return _digest("inside", marshal.dumps(len(self._depths) - depth, _MARSHAL_VERSION)), depth
        label, parts = _opened(value)
        depth = self._depths[id(value)] = len(self._depths)
        number = len(self._known) + depth
        done, top = [], _NONE
        try:
            for part in parts:
                try:
                    spelled, back = self.spell(part)
                except UncacheableError:
                    # A class is told from others by all that can be told of it.
                    if label != "class":
                        raise
                    spelled, back = _UNKNOWN, _NONE
                done.append(spelled)
                top = min(top, back)
        finally:
            del self._depths[id(value)]
        if label in _IN_PAIRS:
            done = [key + held for key, held in zip(done[::2], done[1::2], strict=True)]
        found = _digest(label, b"".join(sorted(done) if label in _IN_ANY_ORDER else done))
        if top >= depth:
            self._known[id(value)] = (value, found)
            return found, _NONE
        # Met again, it cannot be taken for the same: what it refers back to may be elsewhere then.
        self._known[id(value)] = (value, _digest("again", marshal.dumps(number, _MARSHAL_VERSION)))
        return found, top


# Deeper than anything: nothing is referred back to.
_NONE = sys.maxsize
_UNKNOWN = _digest("unknown", b"")


def _at_once(value: Any) -> bytes | None:
    """The spelling of what need not be taken apart."""
    kind = type(value)
    if kind in _LEAVES:
        return marshal.dumps(value, _MARSHAL_VERSION)
    if kind is object:
        # It has no state, and can have no weak reference: kept for ever, it is told from all others, in any process.
        return _bare_objects.setdefault(id(value), (value, _digest("object", os.urandom(SIZE))))[1]
    if kind in {list, tuple} and _LEAVES.issuperset(map(type, value)):
        return _digest(kind.__name__, marshal.dumps(value, _MARSHAL_VERSION))
    if is_class(value):
        if not _is_importable(value):
            return None
        return _digest("type", marshal.dumps((_module_of(value), value.__qualname__), _MARSHAL_VERSION))
    return None


_bare_objects: dict[int, tuple[object, bytes]] = {}


def _module_of(value: Any) -> str:
    module = getattr(value, "__module__", None) or ""
    return _SAME_MODULES.get(module, module)


def _is_importable(value: Any) -> bool:
    """Whether every process that imports its module finds this under its name."""
    module = _module_of(value)
    # What a module that no file makes has is known to this process only.
    is_made_by_file = getattr(sys.modules.get(value.__module__ or ""), "__spec__", None) is not None
    return module != "__main__" and is_made_by_file and find_by_name(value.__module__, value.__qualname__) is value


def _opened(value: Any) -> tuple[str, Iterable[Any]]:  # noqa: PLR0911 - one for each kind
    """A label and the parts of a value: the one place that knows kinds of values."""
    kind = type(value)
    if kind is dict:
        return "dict", itertools.chain.from_iterable(value.items())
    if kind in {list, tuple, set, frozenset}:
        return kind.__name__, value
    if kind is _Bag:
        return "pairs" if value.in_pairs else "elements", value.values
    if is_class(value):
        return "class", [*_parts_of_class(value)]
    if kind in _PARTS:
        return kind.__name__, [*_PARTS[kind](value)]
    if hasattr(kind, "__cache_key__"):
        return "keyed", (kind, value.__cache_key__())
    if isinstance(value, enum.Enum):
        # A combination of flags may have no name.
        return "member", (kind, value.value if value.name is None else value.name)
    for base in kind.__mro__:
        parts = _PARTS_BY_BASE.get(f"{_module_of(base).partition('.')[0]}.{base.__name__}")
        if parts is not None:
            return base.__name__, (kind, *parts(value), _beside(value, base))
    return "object", [*_parts_by_pickle(value)]


def _pairs(mapping: Mapping[Any, Any]) -> _Bag:
    return _Bag(itertools.chain.from_iterable(mapping.items()), in_pairs=True)


# Functions and classes


def _parts_of_class(kind: type) -> Iterator[Any]:
    """Of a class that is not known by its name alone: what it is made of."""
    members = {
        name: value
        for name, value in vars(kind).items()
        if name not in _OF_EVERY_CLASS and (name[:2] != "__" or isinstance(value, _FUNCTIONS))
    }
    yield _module_of(kind)
    yield kind.__qualname__
    yield from kind.__bases__
    for name in sorted(members):
        yield name
        yield members[name]


_FUNCTIONS = (types.FunctionType, classmethod, staticmethod, property)
# Known from the others, or telling nothing of what the class does.
_OF_EVERY_CLASS = frozenset({"__dict__", "__weakref__", "_abc_impl"})


def _parts_of_function(function: Any) -> Iterator[Any]:
    """Its code, and what it has captured; of one that can be imported the code of all that it wraps."""
    function = undecorated(function)
    if not isinstance(function, types.FunctionType):
        yield function
        return
    yield _module_of(function)
    yield function.__qualname__
    if _is_importable(function):
        wrapped: Any = function
        while isinstance(wrapped, types.FunctionType):
            yield wrapped.__code__
            wrapped = getattr(wrapped, "__wrapped__", None)
        return
    yield from _captured_by(function)
    yield from _found_in_main(function)
    yield _contents((*(function.__defaults__ or ()),))
    yield dict(zip(function.__kwdefaults__ or (), _contents((function.__kwdefaults__ or {}).values()), strict=True))
    yield {name: value for name, value in vars(function).items() if name != "__wrapped__"}


def _found_in_main(function: types.FunctionType) -> Iterator[Any]:
    """The code and the plain values that a function of the main module uses there: another program has others."""
    seen: set[Any] = set()
    waiting: list[Any] = [function]
    while waiting:
        user = waiting.pop()
        if not isinstance(user, types.FunctionType) or user in seen:
            continue
        seen.add(user)
        yield user.__code__
        waiting.append(getattr(user, "__wrapped__", None))
        known = user.__globals__
        for name in _names_in(user.__code__) if known.get("__name__") in {"__main__", "__mp_main__"} else ():
            value = known.get(name)
            yield (name, value) if type(value) in _LEAVES else name
            members = vars(value).values() if is_class(value) else [value]
            waiting += [member.__wrapped__ if isinstance(member, _WRAPPERS) else member for member in members]


_WRAPPERS = (classmethod, staticmethod, type(functools.cache(len)))


@functools.lru_cache(maxsize=1000)
def _names_in(code: types.CodeType) -> list[str]:
    """The names of a module that it reads, and does not assign itself as one that counts its calls does."""
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names_in(const))
    steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
    assigned = {name for operation, name in steps if operation == "STORE_GLOBAL"}
    return sorted({name for operation, name in steps if operation == "LOAD_GLOBAL"}.union(inner) - assigned)


def _captured_by(function: types.FunctionType) -> Iterator[Any]:
    yield function.__code__
    for cell in function.__closure__ or ():
        try:
            yield _contents((cell.cell_contents,))
        except ValueError:
            yield "nothing yet"
    yield _contents(_borrowed_globals(function))


def _contents(values: Iterable[Any]) -> list[Any]:
    # A bare object, which marks what is missing, is known by its place.
    return ["object()" if type(value) is object else undecorated(value) for value in values]


def _borrowed_globals(function: types.FunctionType) -> list[Any]:
    """What a function uses that was compiled with globals of its own: they do what cells do elsewhere."""
    known = function.__globals__
    if "__file__" in known or known is getattr(sys.modules.get(function.__module__), "__dict__", None):
        return []
    return [known[name] for name in function.__code__.co_names if name in known]


def _parts_of_code(code: types.CodeType) -> tuple[Any, ...]:
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    return (code.co_code, code.co_consts, code.co_names, code.co_varnames, code.co_freevars, *counts)


def _parts_of_builtin(function: types.BuiltinFunctionType) -> tuple[Any, ...]:
    owner = function.__self__
    is_bound = owner is not None and not isinstance(owner, types.ModuleType)
    return (_module_of(function), function.__qualname__, owner if is_bound else None)


def undecorated(function: Any) -> Any:
    """What opero has decorated; anything else as it is."""
    while (decoration := decoration_of(function)) is not None:
        function = decoration.function
    return function


_PARTS: dict[type, Callable[[Any], Iterable[Any]]] = {
    types.FunctionType: _parts_of_function,
    types.CodeType: _parts_of_code,
    types.BuiltinFunctionType: _parts_of_builtin,
    types.MethodType: lambda value: (undecorated(value.__func__), value.__self__),
    types.ModuleType: lambda value: (value.__name__,),
    types.MemberDescriptorType: lambda value: (value.__name__,),
    types.GetSetDescriptorType: lambda value: (value.__name__,),
    weakref.ReferenceType: lambda value: (value(),),
    classmethod: lambda value: (undecorated(value.__func__),),
    staticmethod: lambda value: (undecorated(value.__func__),),
    property: lambda value: (value.fget, value.fset, value.fdel),
    functools.cached_property: lambda value: (undecorated(value.func),),
}


# Objects


def _parts_of_array(array: Any) -> tuple[Any, ...]:
    """The contents in one order, and whether they lie in memory by columns: sums and flat views depend on that."""
    plain = array.view(sys.modules["numpy"].ndarray)
    contents = plain.ravel().tolist() if plain.dtype.hasobject else plain.tobytes()
    dtype = plain.dtype
    # Of a number, a date or text, not of what other libraries have made or what has fields.
    is_named = dtype.kind in "biufcmMSUO" and type(dtype).__module__ == "numpy.dtypes" and dtype.metadata is None
    return (dtype.str if is_named else dtype, plain.shape, plain.flags.fnc, contents)


def _parts_of_frame(frame: Any) -> tuple[Any, ...]:
    """The columns one by one: how they are grouped in memory does not matter."""
    columns = [_values_of_pandas(frame.iloc[:, place]) for place in range(frame.shape[1])]
    return (frame.columns, frame.index, columns, _parts_beside_pandas(frame))


def _parts_of_column(column: Any) -> tuple[Any, ...]:
    return (column.name, column.index, _values_of_pandas(column), _parts_beside_pandas(column))


def _parts_of_index(index: Any) -> tuple[Any, ...]:
    """Without what it has found out of itself meanwhile, and without levels that no label has."""
    besides = (list(index.names), _public(index))
    if isinstance(index, sys.modules["pandas"].RangeIndex):
        return (besides, range(index.start, index.stop, index.step))
    levels = [index.get_level_values(level) for level in range(index.nlevels)] if index.nlevels > 1 else [index]
    return (besides, [(_values_of_pandas(level), getattr(level, "freq", None)) for level in levels])


def _values_of_pandas(column: Any) -> tuple[Any, ...]:
    values, dtype = column.array, column.dtype
    if isinstance(dtype, sys.modules["numpy"].dtype):
        return (column.to_numpy(),)
    if not type(values).__module__.startswith("pandas."):
        # Others may keep something besides.
        return (dtype, values)
    if hasattr(values, "asi8"):
        # Times, by the numbers that they are kept as.
        return (dtype, values.asi8)
    # What pandas has under a mask, or in which chunks, does not matter.
    is_missing = values.isna()
    return (dtype, is_missing, values[~is_missing].tolist())


def _contents_of_polars(series: Any) -> Any:
    # Not what polars pickles, which says in which chunks the values lie and what is under missing ones. Python's times
    # have no nanoseconds.
    is_finer = "'ns'" in str(series.dtype) or "Time" in str(series.dtype)
    return (series.to_list(), series.to_physical().to_list() if is_finer else None)


def _public(value: Any) -> dict[str, Any]:
    """What a program has put on a frame; the library's own has an underscore."""
    return {name: held for name, held in vars(value).items() if name[0] != "_"}


def _parts_beside_pandas(value: Any) -> tuple[Any, ...]:
    besides = {name: getattr(value, name, None) for name in value._metadata if name != "name"}  # noqa: SLF001 - where subclasses list what they carry
    return (value.attrs, value.flags.allows_duplicate_labels, besides | _public(value))


# By the package and the name of a class or of one of its bases: nothing has to be imported to know of it. Pickle lists
# a set in the order of its hashes, and a path by how it was put together.
_PARTS_BY_BASE: dict[str, Callable[[Any], Iterable[Any]]] = {
    "builtins.set": lambda value: (_Bag(value),),
    "builtins.frozenset": lambda value: (_Bag(value),),
    "pathlib.PurePath": lambda value: (str(value),),
    "numpy.ndarray": _parts_of_array,
    "pandas.DataFrame": _parts_of_frame,
    "pandas.Series": _parts_of_column,
    "pandas.Index": _parts_of_index,
    "polars.DataFrame": lambda value: (value.get_columns(), _public(value)),
    "polars.Series": lambda value: (value.name, value.dtype, _contents_of_polars(value), _public(value)),
}


def _parts_by_pickle(value: Any) -> Iterator[Any]:
    kind = type(value)
    reduction = _reduction(value)
    yield kind
    if isinstance(reduction, str):
        module = pickle.whichmodule(value, reduction)  # type: ignore[attr-defined]  # not in typeshed
        if find_by_name(module, reduction) is not value:
            msg = f"a {kind.__qualname__} is known by its name only, and not found by that"
            raise UncacheableError(msg)
        yield from (module, reduction, getattr(value, "__wrapped__", None))
        return
    maker: Any
    arguments: Any
    maker, arguments, state, items, pairs, setter = (*reduction, None, None, None, None)[:6]
    yield from (_maker(maker), [None if part is kind else part for part in arguments], _own(state, kind), setter)
    yield None if items is None else list(items)
    if isinstance(value, collections.OrderedDict):
        yield list(pairs or ())
    else:
        yield None if pairs is None else _Bag(itertools.chain.from_iterable(pairs), in_pairs=True)
    owner = next(base for base in kind.__mro__ if not _REDUCERS.isdisjoint(vars(base)))
    yield None if owner is object or kind in copyreg.dispatch_table else _beside(value, owner)
    if isinstance(value, BaseException):
        import traceback

        # pickle leaves out where it came from.
        lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(value.__traceback__)]
        yield (value.__cause__, value.__context__, value.__suppress_context__, lines)


_REDUCERS = frozenset({"__reduce_ex__", "__reduce__", "__getstate__"})


def _reduction(value: Any) -> Any:
    try:
        registered = copyreg.dispatch_table.get(type(value))
        if registered is not None:
            return registered(value)
        if hasattr(type(value), "__getattr__"):
            # Pickle's look for what is not set changes some the first time, such as the datasets of xarray.
            value.__reduce_ex__(_PROTOCOL)
        return value.__reduce_ex__(_PROTOCOL)
    except RecursionError:
        raise
    except Exception as error:
        if isinstance(value, Mapping):
            return (type(value), (), _pairs(value))
        if isinstance(value, AbstractSet):
            return (type(value), (), _Bag(value))
        msg = f"a {type(value).__qualname__} cannot be pickled ({type(error).__name__})"
        raise UncacheableError(msg) from error


def _maker(maker: Any) -> Any:
    """What makes an object anew, by its name, as pickle knows it."""
    name = getattr(maker, "__qualname__", None)
    return maker if name is None else (_module_of(maker), name)


def _beside(value: Any, base: type) -> dict[str, Any] | None:
    """What the classes below ``base``, which takes the state of its own instances, have added to an instance."""
    mro = type(value).__mro__
    slots = []
    for owner in mro[: mro.index(base)]:
        declared = vars(owner).get("__slots__", ())
        for name in [declared] if isinstance(declared, str) else declared:
            is_private = name[:2] == "__" and name[-2:] != "__"
            slots.append(f"_{owner.__name__.lstrip('_')}{name}" if is_private else name)
    added = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    # `list[int]` has none, and shows that of `list`.
    if type(value).__dictoffset__ and not base.__dictoffset__:
        added |= _own(vars(value), type(value))
    return {name: held for name, held in added.items() if name not in _NO_STATE} or None


# msgspec keeps the hash of an instance, and NumPy the mapping of an array that lies in a file.
_NO_STATE = frozenset({"__dict__", "__weakref__", "__msgspec_cached_hash__", "_mmap"})


def _own(state: Any, kind: type) -> Any:
    """The state without what cached properties keep: it comes of the rest, and may be a session or a lock."""
    names = _cached_properties(kind)
    if not names or not isinstance(state, dict):
        return state
    # pydantic has the attributes one level deeper.
    return {name: _own(part, kind) if name == "__dict__" else part for name, part in state.items() if name not in names}


def _cached_properties(kind: type) -> frozenset[str]:
    found = _cached.get(kind)
    if found is None:
        members = {name: member for owner in reversed(kind.__mro__) for name, member in list(vars(owner).items())}
        # Those of Django and werkzeug, too.
        names = (name for name, member in members.items() if type(member).__name__ == "cached_property")
        found = _cached[kind] = frozenset(names)
    return found


_cached: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


# Which function is it?


def lasting_identity(function: Callable[..., Any], option: str = "cache_namespace=") -> str:
    """A name that no other function has, in this process or another one; ``option`` could give it another one.

    Functions that are reached by module and name are known by these. What can share a name (lambdas, functions made
    inside functions, partials, bound methods, callable objects, sessions without a file) is known by its code and by
    the values that it carries, too.

    Raises:
        MisuseError: If these values cannot be told apart.
    """
    function = undecorated(function)
    module, has_file = _place(innermost(function))
    name = f"{module}.{name_of(function)}"
    try:
        particulars = _particulars(function, has_file=has_file)
        return name if particulars is None else f"{name}#{digest_of(*particulars).hex()}"
    except UncacheableError as error:
        msg = f"{name_of(function)} carries a value that cannot be told apart from others: {error}; give {option}"
        raise MisuseError(msg) from error


def _place(function: Any) -> tuple[str, bool]:
    name = getattr(function, "__module__", None) or ""
    if name not in {"__main__", "__mp_main__"}:
        return name, True
    # Every script is `__main__`, and its own worker processes know it as `__mp_main__`.
    file = getattr(function, "__globals__", {}).get("__file__") or getattr(sys.modules.get(name), "__file__", None)
    return ("__main__", False) if file is None else (f"__main__({os.path.realpath(file)})", True)


def _particulars(function: Any, *, has_file: bool) -> tuple[Any, ...] | None:
    if isinstance(function, types.BuiltinFunctionType):
        owner = function.__self__
        return None if owner is None or isinstance(owner, types.ModuleType) else (owner,)
    if not isinstance(function, types.FunctionType):
        return (function,)
    is_reached_by_name = "<" not in function.__qualname__ and function.__code__.co_name == function.__name__
    if is_reached_by_name and has_file and not function.__closure__ and not _borrowed_globals(function):
        return None
    # Not its defaults, which are among the arguments of each call.
    return tuple(_captured_by(function))
