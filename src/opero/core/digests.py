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
import functools
import inspect
import marshal
import os
import pickle
import sys
import traceback
import types
import typing
import weakref
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from hashlib import blake2b
from typing import Any

from opero.core.parameters import undecorated
from opero.core.signature import find_by_name, innermost, name_of
from opero.exceptions import MisuseError

PLAIN_TYPES: frozenset[type] = frozenset({int, str, bool, bytes, type(None)})
_LEAVES: frozenset[type] = PLAIN_TYPES | {float, complex, type(...)}
_SIZE = 20
_PICKLE_PROTOCOL = 4
_MAIN = frozenset({"__main__", "__mp_main__"})
# One module under two names: in worker processes, and in Python 3.13 and 3.14.
_SAME_MODULES = {"__mp_main__": "__main__", "pathlib._local": "pathlib", "annotationlib": "typing"}


class UncacheableError(TypeError):
    """A value that cannot be told apart from others."""


def digest_of(*values: Any) -> bytes:
    """The digest of some values; raises `UncacheableError` if one has a state that pickle cannot take."""
    return blake2b(b"".join(map(spelling_of, values)), digest_size=_SIZE, person=b"values").digest()


def digest_of_plain(values: tuple[Any, ...]) -> bytes:
    """The digest of values that are all of exactly the `PLAIN_TYPES`, quickly."""
    # Half of the time that a new one takes.
    made = _PLAIN.copy()
    made.update(_marshalled(values))
    return made.digest()


_PLAIN = blake2b(digest_size=_SIZE, person=b"plain")


def spelling_of(value: Any) -> bytes:
    """The bytes that tell a value from all others; raises as `digest_of`."""
    return _spelled(value, {})


def _marshalled(value: Any) -> bytes:
    # Later versions of the format note which objects are one and the same, so that equal values look different.
    return marshal.dumps(value, 2)


def _spelled(
    value: Any, met: dict[int, tuple[Any, bytes]], *, is_within: bool = False, is_lenient: bool = False
) -> bytes:
    """The spelling of a value, by those of its parts; in one frame for each level, to be as deep as the stack.

    What has been ``met`` on the way is known by its id: how it is spelled, and until that is known, by a number. Within
    a class, or what goes with a function, it is lenient: what cannot be told is left out.
    """
    kind = type(value)
    if kind in _LEAVES or (kind in {list, tuple} and _LEAVES.issuperset(map(type, value))):
        return _marshalled(value)
    if id(value) in met:
        return met[id(value)][1]
    if _is_class(value) or kind is _AsFarAsTold:
        if not is_within:
            return _spelled_by_itself(value)
        is_lenient = True
    elif kind is _IfTold:
        return _spelled_if_told(value, met)
    elif kind is object and is_within:
        # It marks what is missing.
        return _marshalled("object()")
    met[id(value)] = (value, b"@%d;" % len(met))
    try:
        label, parts = _opened(value)
    except UncacheableError:
        if not is_lenient:
            raise
        label, parts = "unknown", _members_in_c(value)
    spelled = []
    for part in parts:
        # Not in a comprehension, which may have a frame.
        spelled.append(_spelled(part, met, is_within=is_within, is_lenient=is_lenient))  # noqa: PERF401
    content = _marshalled(label) + b"".join(sorted(spelled) if label in _IN_ANY_ORDER else spelled)
    # Nothing that marshal writes begins so, nor what stands for something met.
    found = b"#" + blake2b(content, digest_size=_SIZE, person=b"value").digest()
    met[id(value)] = (value, found)
    return found


def _members_in_c(value: Any) -> list[Any]:
    """What an object that pickle cannot take shows of itself, such as msgspec's limits of a field."""
    return [
        _read(held, value)
        for owner in type(value).__mro__
        for held in vars(owner).values()
        if isinstance(held, types.MemberDescriptorType)
    ]


def _read(slot: Any, value: Any) -> Any:
    """What a slot holds, or None; not by `getattr`, which asks a ``__getattr__`` of the object where it is empty."""
    try:
        return slot.__get__(value)
    except AttributeError:
        return None


def _spelled_by_itself(value: Any) -> bytes:
    """The same wherever it is met: a class, which is taken apart once, or what goes with a function."""
    found = _classes.get(value) if _is_class(value) else None
    if found is None:
        found = _spelled(value, {}, is_within=True)
        if _is_class(value):
            _classes[value] = found
    return found


_classes: weakref.WeakKeyDictionary[type, bytes] = weakref.WeakKeyDictionary()


class _Unordered(list[Any]):
    """Parts whose order makes no difference, and which may be the same or have no hash."""


class _AsFarAsTold(dict[str, Any]):
    """What goes with a function, and must not have it refused: its annotations, and what it uses of its script."""


class _IfTold(list[Any]):
    """One value that counts as a whole or not at all: a part of what a client is may be another one at each call."""


def _spelled_if_told(value: _IfTold, met: dict[int, tuple[Any, bytes]]) -> bytes:
    tried = met.copy()
    try:
        found = _spelled(value[0], tried, is_within=True)
    except Exception:  # noqa: BLE001 - whatever an object does that nobody has passed
        return _marshalled("unknown")
    met.update(tried)
    return found


_IN_ANY_ORDER = frozenset({"dict", "set", "frozenset", "_Unordered", "_AsFarAsTold"})


def _opened(value: Any) -> tuple[str, Iterable[Any]]:
    """A label and the parts of a value."""
    try:
        return _taken_apart(value)
    except (UncacheableError, RecursionError):
        raise
    except Exception as error:
        # Of its properties and hooks; from Python 3.12 on also of an alias that names what is not there.
        msg = f"a {type(value).__qualname__} cannot be read ({type(error).__name__})"
        raise UncacheableError(msg) from error


def _taken_apart(value: Any) -> tuple[str, Iterable[Any]]:
    kind = type(value)
    if kind in {list, tuple, set, frozenset, _Unordered}:
        return kind.__name__, value
    if kind is dict or kind is _AsFarAsTold:
        return kind.__name__, value.items()
    if _is_class(value):
        return "class", _parts_of_class(value)
    if hasattr(kind, "__cache_key__"):
        return "keyed", (kind, value.__cache_key__())
    for base in kind.__mro__:
        name = f"{_module_of(base).partition('.')[0]}.{base.__name__}"
        if name in _PARTS:
            added = () if kind is base else (kind, _beside(value, base))
            return name, (*_PARTS[name](value), *added)
    return "object", _parts_by_pickle(value)


# Functions and classes


def _is_class(value: Any) -> bool:
    # `list[int]` only says that it is one.
    return issubclass(type(value), type)


def _module_of(value: Any) -> str:
    module = getattr(value, "__module__", None) or ""
    return _SAME_MODULES.get(module, module)


def _is_importable(value: Any) -> bool:
    """Whether every process that imports its module finds this under its name."""
    module = value.__module__ or ""
    # What a module that no file makes has is known to this process only.
    is_made_by_file = getattr(sys.modules.get(module), "__spec__", None) is not None
    return module not in _MAIN and is_made_by_file and find_by_name(module, value.__qualname__) is value


_FUNCTIONS = (types.FunctionType, classmethod, staticmethod, property, type(functools.cache(len)))


def _parts_of_class(kind: Any) -> Iterable[Any]:
    """Its name; of one that is not known by its name alone also what it is made of."""
    named = (_module_of(kind), kind.__qualname__)
    if _is_importable(kind):
        return named
    # Of msgspec's, the metaclass keeps some of it in slots.
    metas = inspect.getmro(type(kind))[:-2]
    slots = [name for meta in metas for name, held in vars(meta).items() if isinstance(held, _SLOTS)]
    held = {**vars(kind), **{name: getattr(kind, name, None) for name in slots}}
    if "_value2member_map_" in held:
        # Not with the combinations of flags that have been asked for.
        held["_value2member_map_"] = [member._value_ for member in kind.__members__.values()]
    members = {name: value for name, value in held.items() if _tells_something(name, value)}
    annotations = _annotations_of(kind, getattr(sys.modules.get(kind.__module__), "__dict__", {}))
    return (*named, kind.__bases__, members, annotations)


_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)


def _tells_something(member: str, value: Any) -> bool:
    """Whether what a class has says more than what else is known of it, and the same in every process."""
    if member.startswith("__pydantic_"):
        # The rest is made of these, and has addresses in it.
        return member in {"__pydantic_fields__", "__pydantic_decorators__", "__pydantic_generic_metadata__"}
    return member not in _TELL_NOTHING and not isinstance(value, weakref.ref)


# Names, where it stands, what Python keeps of its use, and the annotations, which are told by what they stand for.
_TELL_NOTHING = frozenset(
    (
        *("__module__", "__qualname__", "__firstlineno__", "__static_attributes__"),
        *("__dict__", "__weakref__", "__slotnames__", "_abc_impl"),
        *("__annotations__", "__annotations_cache__", "__annotate__", "__annotate_func__"),
    )
)


def _annotations_of(holder: Any, names: dict[str, Any]) -> list[tuple[str, Any]]:
    """In their order, with what text in them stands for, as libraries find it."""

    def meant(annotation: Any) -> Any:
        alone = types.SimpleNamespace(__annotations__={"it": annotation})
        try:
            return typing.get_type_hints(alone, names, include_extras=True)["it"]
        except Exception:  # noqa: BLE001 - it may name what is not there
            return annotation

    try:
        return [(name, meant(annotation)) for name, annotation in inspect.get_annotations(holder).items()]
    except NameError:
        # Python 3.14 finds out only now what they stand for.
        return []


def _parts_of_function(function: Any) -> Iterable[Any]:
    """Its code and signature, and what it has captured; of one that can be imported those of all that it wraps."""
    function = undecorated(function)
    if not isinstance(function, types.FunctionType):
        return (function,)
    named = (_module_of(function), function.__qualname__)
    by_keyword = function.__kwdefaults__ or {}
    defaults = _by_place([*(function.__defaults__ or ()), *by_keyword, *by_keyword.values()])
    told: dict[str, Any] = {"doc": function.__doc__, "annotations": _annotations_of(function, function.__globals__)}
    if _is_importable(function):
        code = (function.__code__, getattr(inspect.unwrap(function), "__code__", None))
        return (*named, *code, _AsFarAsTold(told, defaults=defaults))
    if function.__globals__.get("__name__") in _MAIN:
        # Another script has others of these names, and nobody imports them.
        used = _read_by(function).items()
        told["used"] = {name: held if isinstance(held, (type, *_FUNCTIONS)) else _IfTold([held]) for name, held in used}
    return (*named, *_captured_by(function), defaults, vars(function), _AsFarAsTold(told))


def apart_from_globals(function: Any) -> Any:
    """What a function is by its name, its code and what it carries, whatever the globals that it reads are just now."""
    function = undecorated(function)
    if isinstance(function, types.MethodType):
        return (apart_from_globals(function.__func__), function.__self__)
    if isinstance(function, functools.partial):
        return (apart_from_globals(function.func), function.args, function.keywords)
    if not isinstance(function, types.FunctionType) or _is_importable(function):
        return function
    defaults = _by_place([*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()])
    return (_module_of(function), function.__qualname__, *_captured_by(function), defaults, vars(function))


def _captured_by(function: types.FunctionType) -> Iterable[Any]:
    cells = function.__closure__ or ()
    held = ["nothing yet" if cell == types.CellType() else cell.cell_contents for cell in cells]
    # Globals of its own do what cells do elsewhere.
    used = _read_by(function).values() if _has_own_globals(function) else ()
    return (function.__code__, _by_place([*held, *used]))


def _by_place(values: list[Any]) -> list[Any]:
    """With bare objects, which mark what is missing, as what is the same in every process."""
    return ["object()" if type(value) is object else value for value in values]


def _has_own_globals(function: types.FunctionType) -> bool:
    """Whether it was compiled with a namespace that is no module's, as some libraries compile wrappers."""
    known = function.__globals__
    return "__file__" not in known and known is not getattr(sys.modules.get(function.__module__), "__dict__", None)


def _read_by(function: types.FunctionType) -> dict[str, Any]:
    known = function.__globals__
    return {name: known[name] for name in _names_read_by(function.__code__) if name in known}


@functools.lru_cache(maxsize=1000)
def _names_read_by(code: types.CodeType) -> list[str]:
    """The globals that it reads, and does not assign itself as one that counts its calls does."""
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names_read_by(const))
    steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
    assigned = {name for operation, name in steps if operation == "STORE_GLOBAL"}
    return sorted({name for operation, name in steps if operation == "LOAD_GLOBAL"}.union(inner) - assigned)


def _parts_of_code(code: types.CodeType) -> Iterable[Any]:
    """What it does, and not where it stands."""
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    return (code.co_code, code.co_consts, code.co_names, code.co_varnames, code.co_freevars, *counts)


# Arrays and frames


def _parts_of_array(array: Any) -> Iterable[Any]:
    """The contents in one order, and whether they lie in memory by columns: sums and flat views depend on that."""
    numpy = sys.modules["numpy"]
    plain = array.view(numpy.ndarray)
    dtype = plain.dtype
    contents: Any = plain.ravel().tolist() if dtype.hasobject else b""
    if plain.nbytes and not dtype.hasobject:
        # No copy of it is made, unless it is in pieces.
        contents = blake2b(numpy.ascontiguousarray(plain).reshape(-1).view("u1"), digest_size=_SIZE).digest()
    # Of a number, a date or text, not of what other libraries have made or what has fields.
    is_named = dtype.kind in "biufcmMSUO" and type(dtype).__module__ == "numpy.dtypes" and dtype.metadata is None
    return (dtype.str if is_named else dtype, plain.shape, plain.flags.fnc, contents)


def _values_of_pandas(column: Any) -> Iterable[Any]:
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


def _values_of_polars(series: Any) -> Iterable[Any]:
    # Not what polars pickles, which says in which chunks the values lie and what is under missing ones. Python's times
    # have no nanoseconds.
    is_finer = "'ns'" in str(series.dtype) or "Time" in str(series.dtype)
    return (series.to_list(), series.to_physical().to_list() if is_finer else None)


def _put_on(frame: Any) -> Iterable[Any]:
    """What a program has put on a frame: the library's own has an underscore, but for what subclasses list."""
    names = [*getattr(frame, "_metadata", ()), *(name for name in vars(frame) if name[0] != "_")]
    held = {name: getattr(frame, name, None) for name in names}
    flags = getattr(frame, "flags", None)
    return (held, getattr(frame, "attrs", None), getattr(flags, "allows_duplicate_labels", None))


# Objects


def _parts_by_pickle(value: Any) -> Iterable[Any]:
    kind = type(value)
    if kind is object:
        # It has no state, and can have no weak reference: kept for ever, it is told from all others, in any process.
        return _bare_objects.setdefault(id(value), (os.urandom(_SIZE), value))[:1]
    reduction = _reduction(value)
    if isinstance(reduction, str):
        module = pickle.whichmodule(value, reduction)  # type: ignore[attr-defined]  # not in typeshed
        if find_by_name(module, reduction) is not value:
            msg = f"a {kind.__qualname__} is known by its name only, and not found by that"
            raise UncacheableError(msg)
        return (kind, module, reduction, getattr(value, "__wrapped__", None))
    maker, arguments, state, items, pairs = (*reduction, None, None, None)[:5]
    listed = None if items is None else [*items]
    in_order = list if isinstance(value, collections.OrderedDict) else _Unordered
    mapped = None if pairs is None else in_order(pairs)
    owner = next(base for base in kind.__mro__ if not _REDUCERS.isdisjoint(vars(base)))
    added = None if owner is object or kind in copyreg.dispatch_table else _beside(value, owner)
    # What makes it anew is known by its name, as pickle knows it.
    made_by = (_module_of(maker), getattr(maker, "__qualname__", maker), arguments)
    return (kind, *made_by, _without_what_follows(state, kind), listed, mapped, added)


_bare_objects: dict[int, tuple[bytes, object]] = {}
_REDUCERS = frozenset({"__reduce_ex__", "__reduce__", "__getstate__"})


def _reduction(value: Any) -> Any:
    kind = type(value)
    try:
        if kind in copyreg.dispatch_table:
            return copyreg.dispatch_table[kind](value)
        if hasattr(kind, "__getattr__"):
            # Pickle's look for what is not set changes some the first time, such as the datasets of xarray.
            value.__reduce_ex__(_PICKLE_PROTOCOL)
        return value.__reduce_ex__(_PICKLE_PROTOCOL)
    except RecursionError:
        raise
    except Exception as error:
        if isinstance(value, Mapping):
            return (kind, (), None, None, value.items())
        if isinstance(value, AbstractSet):
            return (kind, (), _Unordered(value))
        msg = f"a {kind.__qualname__} cannot be pickled ({type(error).__name__})"
        raise UncacheableError(msg) from error


def _beside(value: Any, base: type) -> Any:
    """What the classes below ``base``, which takes the state of its own instances, have added to an instance."""
    kind = type(value)
    state: Any = object.__getstate__(value)
    attributes, slots = state if isinstance(state, tuple) else (state, {})
    added = {} if base.__dictoffset__ else dict(attributes or {})
    added |= {name: held for name, held in slots.items() if getattr(kind, name) is not getattr(base, name, None)}
    return _without_what_follows(added, kind)


# The hash of an instance (attrs, msgspec), the mapping of an array that lies in a file (NumPy), and what is known of
# the order in a sparse matrix (SciPy).
_FOLLOWS = {"_attrs_cached_hash", "__msgspec_cached_hash__", "_mmap", "_has_canonical_format", "_has_sorted_indices"}


def _without_what_follows(state: Any, kind: type) -> Any:
    """Cached properties keep what comes of the rest, or a session or a lock; those of Django and werkzeug, too."""
    if not isinstance(state, dict):
        return state
    # pydantic has the attributes one level deeper.
    kept = {
        name: _without_what_follows(part, kind) if name == "__dict__" else part
        for name, part in state.items()
        if name not in _FOLLOWS
        and not (isinstance(name, str) and type(getattr(kind, name, None)).__name__ == "cached_property")
    }
    return kept or None


def _parts_of_type_parameter(value: Any) -> Iterable[Any]:
    """What it says: those of a class, a function or an alias (PEP 695) are found under no name."""
    said = ("__bound__", "__constraints__", "__default__", "__covariant__", "__contravariant__", "__infer_variance__")
    return (_module_of(value), value.__name__, [getattr(value, name, None) for name in said])


def _parts_of_exception(error: BaseException) -> Iterable[Any]:
    """Where it came from, too, which pickle leaves out."""
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return (*_parts_by_pickle(error), error.__cause__, error.__context__, error.__suppress_context__, lines)


def _parts_of_generator(generator: Any) -> Iterable[Any]:
    """Its state, unless it is the one that a module's functions draw from: so is every draw of the program's."""
    module = vars(sys.modules[type(generator).__module__])
    is_the_modules = any(generator is module.get(name) for name in ("_inst", "_rand"))
    return ("of its module",) if is_the_modules else _parts_by_pickle(generator)


# What is known better than pickle knows it, by the package and the name of a class or of one of its bases, so that
# nothing has to be imported. Pickle lists a set in the order of its hashes, and a path by how it was put together.
_PARTS: dict[str, Callable[[Any], Iterable[Any]]] = {
    "builtins.function": _parts_of_function,
    "typing.NewType": lambda value: (_module_of(value), value.__qualname__, value.__supertype__),
    "typing.TypeAliasType": lambda value: (_module_of(value), value.__name__, value.__type_params__, value.__value__),
    "typing.TypeVar": _parts_of_type_parameter,
    "typing.ParamSpec": _parts_of_type_parameter,
    "typing.TypeVarTuple": _parts_of_type_parameter,
    # Whether it has been looked up makes no difference, nor at which address pydantic has met a class.
    "typing.ForwardRef": lambda value: (value.__forward_arg__,),
    "msgspec.StructConfig": lambda value: ([getattr(value, name) for name in dir(value) if name[0] != "_"],),
    "pydantic.Decorator": lambda value: (value.cls_var_name, value.func, value.info),
    "builtins.code": _parts_of_code,
    "builtins.builtin_function_or_method": lambda value: (_module_of(value), value.__qualname__, value.__self__),
    "builtins.method": lambda value: (value.__func__, value.__self__),
    "builtins.module": lambda value: (value.__name__,),
    "builtins.classmethod": lambda value: (value.__func__,),
    "builtins.staticmethod": lambda value: (value.__func__,),
    "builtins.property": lambda value: (value.fget, value.fset, value.fdel),
    "functools.cached_property": lambda value: (value.func,),
    "opero._Map": lambda value: (undecorated(value),),
    # A combination of flags may have no name.
    "enum.Enum": lambda value: (value.value if value.name is None else value.name,),
    "weakref.ReferenceType": lambda value: (value(),),
    "builtins.set": lambda value: (_Unordered(value),),
    "builtins.frozenset": lambda value: (_Unordered(value),),
    "builtins.BaseException": _parts_of_exception,
    "random.Random": _parts_of_generator,
    "numpy.RandomState": _parts_of_generator,
    # But for when it was used last.
    "requests.RequestsCookieJar": lambda jar: ([*jar], {**vars(jar.get_policy()), "_now": None}),
    "pathlib.PurePath": lambda value: (str(value),),
    "numpy.ndarray": _parts_of_array,
    # The columns one by one: how they are grouped in memory does not matter.
    "pandas.DataFrame": lambda value: (value.columns, value.index, [held for _, held in value.items()], _put_on(value)),
    "pandas.Series": lambda value: (value.name, value.index, _values_of_pandas(value), _put_on(value)),
    "pandas.RangeIndex": lambda value: (value.name, range(value.start, value.stop, value.step), _put_on(value)),
    # Without levels that no label has, and what an index has found out of itself meanwhile.
    "pandas.MultiIndex": lambda value: ([*map(value.get_level_values, range(value.nlevels))], _put_on(value)),
    "pandas.Index": lambda value: (value.name, _values_of_pandas(value), getattr(value, "freq", None), _put_on(value)),
    "polars.DataFrame": lambda value: (value.get_columns(), _put_on(value)),
    "polars.Series": lambda value: (value.name, value.dtype, _values_of_polars(value), _put_on(value)),
}


# Which function is it?


def lasting_identity(function: Callable[..., Any], option: str = "cache_namespace=") -> str:
    """A name that no other function has, in this process or another one; ``option`` could give it another one.

    Functions that are reached by module and name are known by these, those of a script by its file in place of the
    module. What can share a name (lambdas, functions made inside functions, partials, bound methods, callable objects,
    sessions without a file) is known by its code and by the values that it carries, too.

    Raises:
        MisuseError: If these values cannot be told apart.
    """
    function = undecorated(function)
    named: Any = innermost(function)
    module = named.__module__ or ""
    file = getattr(named, "__globals__", {}).get("__file__") or getattr(sys.modules.get(module), "__file__", None)
    # Every script is `__main__`, and `__mp_main__` in its own worker processes; one read from a pipe has "<stdin>".
    place = f"__main__({os.path.realpath(file)})" if module in _MAIN and file and file[0] != "<" else _module_of(named)
    name = f"{place}.{name_of(function)}"
    if isinstance(getattr(function, "__self__", None), types.ModuleType):
        return name
    if place not in _MAIN and isinstance(function, types.FunctionType):
        is_alone = not function.__closure__ and not _has_own_globals(function)
        if is_alone and "<" not in function.__qualname__ and function.__code__.co_name == function.__name__:
            return name
    # Not its defaults, which are among the arguments of each call.
    carried = _captured_by(function) if isinstance(function, types.FunctionType) else (function,)
    try:
        return f"{name}#{digest_of(*carried).hex()}"
    except UncacheableError as error:
        msg = f"{name_of(function)} carries a value that cannot be told apart from others: {error}; give {option}"
        raise MisuseError(msg) from error
