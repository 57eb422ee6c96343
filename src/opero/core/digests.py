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

_LEAVES: frozenset[type] = frozenset({int, str, bool, bytes, float, complex, type(None), type(...)})
_SIZE = 20
_PICKLE_PROTOCOL = 4
_MAIN = frozenset({"__main__", "__mp_main__"})


class UncacheableError(TypeError):
    """A value that cannot be told apart from others."""


def digest_of(*values: Any) -> bytes:
    """The digest of some values; raises `UncacheableError` if one has a state that pickle cannot take."""
    return blake2b(b"".join(map(spelling_of, values)), digest_size=_SIZE, person=b"values").digest()


def digest_of_plain(values: tuple[Any, ...]) -> bytes:
    """The digest of values that are all text, int or None, quickly: a copy takes half of the time of a new one."""
    made = _PLAIN.copy()
    made.update(_marshalled(values))
    return made.digest()


_PLAIN = blake2b(digest_size=_SIZE, person=b"plain")


def spelling_of(value: Any) -> bytes:
    """The bytes that tell a value from all others; raises as `digest_of`."""
    return _spelled(value, {}, _STRICT)


def _marshalled(value: Any) -> bytes:
    # Later versions of the format note which objects are one and the same, so that equal values look different.
    return marshal.dumps(value, 2)


# The walk

# What cannot be told is refused; it is refused within what belongs to a class or function; it is left out there.
_STRICT, _WITHIN, _LENIENT = range(3)


class _Unordered(list[Any]):
    """Parts whose order makes no difference, and which may be the same or have no hash."""


class _AsFarAsTold(dict[str, Any]):
    """What goes with a function, and must not have it refused, such as its annotations."""


class _IfTold(list[Any]):
    """One value that counts as a whole or not at all: a part of what a client is may be another one at each call."""


_IN_ANY_ORDER = frozenset({"dict", "set", "frozenset", "_Unordered", "_AsFarAsTold"})


def _spelled(value: Any, met: dict[int, tuple[Any, bytes]], mode: int) -> bytes:
    """The spelling of a value, by those of its parts; in one frame for each level, to be as deep as the stack.

    What has been ``met`` on the way is known by its id: how it is spelled, and until that is known, by a number.
    """
    kind = type(value)
    if kind in _LEAVES or (kind in {list, tuple} and _LEAVES.issuperset(map(type, value))):
        return _marshalled(value)
    if id(value) in met:
        return met[id(value)][1]
    if _is_class(value) or kind is _AsFarAsTold:
        if mode == _STRICT:
            return _spelled_by_itself(value)
        mode = _LENIENT
    elif kind is _IfTold:
        return _spelled_if_told(value, met)
    met[id(value)] = (value, b"@%d;" % len(met))
    try:
        label, parts = _taken_apart(value)
        parts = [*parts]
    except RecursionError:
        raise
    except Exception as error:
        if mode != _LENIENT:
            reason = error if isinstance(error, UncacheableError) else type(error).__name__
            msg = f"{kind.__qualname__} cannot be pickled ({reason})"
            raise UncacheableError(msg) from error
        label, parts = "unknown", [kind]
    spelled = []
    for part in parts:
        # Not in a comprehension, which may have a frame.
        spelled.append(_spelled(part, met, mode))  # noqa: PERF401
    content = _marshalled(label) + b"".join(sorted(spelled) if label in _IN_ANY_ORDER else spelled)
    # Nothing that marshal writes begins so, nor what stands for something met.
    found = b"#" + blake2b(content, digest_size=_SIZE, person=b"value").digest()
    met[id(value)] = (value, found)
    return found


def _spelled_by_itself(value: Any) -> bytes:
    """The same wherever it is met: a class, which is taken apart once, or what goes with a function."""
    if not _is_class(value):
        return _spelled(value, {}, _LENIENT)
    if value not in _classes:
        _classes[value] = _spelled(value, {}, _LENIENT)
    return _classes[value]


_classes: weakref.WeakKeyDictionary[type, bytes] = weakref.WeakKeyDictionary()


def _spelled_if_told(value: _IfTold, met: dict[int, tuple[Any, bytes]]) -> bytes:
    tried = met.copy()
    try:
        found = _spelled(value[0], tried, _WITHIN)
    except Exception:  # noqa: BLE001 - whatever an object does that nobody has passed
        return _marshalled("unknown")
    met.update(tried)
    return found


def _taken_apart(value: Any) -> tuple[str, Iterable[Any]]:
    """A label and the parts of a value."""
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


# Objects


def _parts_by_pickle(value: Any) -> Iterable[Any]:
    kind = type(value)
    if kind is object:
        raise UncacheableError("a bare object has no state")
    try:
        reduction = _reduction(value)
    except Exception:
        if isinstance(value, Mapping):
            return (kind, _Unordered(value.items()))
        if isinstance(value, AbstractSet):
            return (kind, _Unordered(value))
        raise
    if isinstance(reduction, str):
        module = pickle.whichmodule(value, reduction)  # type: ignore[attr-defined]  # not in typeshed
        if find_by_name(module, reduction) is not value:
            raise UncacheableError("it is known by its name only, and not found by that")
        # Of a function with a cache, a new type, an alias.
        stands_for = {name: getattr(value, name, None) for name in ("__wrapped__", "__supertype__", "__value__")}
        return (kind, module, reduction, _AsFarAsTold(stands_for))
    maker, arguments, state, items, pairs = (*reduction, None, None, None)[:5]
    listed = None if items is None else [*items]
    in_order = list if isinstance(value, collections.OrderedDict) else _Unordered
    mapped = None if pairs is None else in_order(pairs)
    owner = next(base for base in kind.__mro__ if not _REDUCERS.isdisjoint(vars(base)))
    added = None if owner is object or kind in copyreg.dispatch_table else _beside(value, owner)
    # What makes it anew is known by its name, as pickle knows it.
    made_by = (_module_of(maker), getattr(maker, "__qualname__", maker), arguments)
    return (kind, *made_by, _without_what_follows(state, kind), listed, mapped, added)


_REDUCERS = frozenset({"__reduce_ex__", "__reduce__", "__getstate__"})


def _reduction(value: Any) -> Any:
    kind = type(value)
    if kind in copyreg.dispatch_table:
        return copyreg.dispatch_table[kind](value)
    if hasattr(kind, "__getattr__"):
        # Pickle's look for what is not set changes some the first time, such as the datasets of xarray.
        value.__reduce_ex__(_PICKLE_PROTOCOL)
    return value.__reduce_ex__(_PICKLE_PROTOCOL)


def _beside(value: Any, base: type) -> Any:
    """What the classes below ``base``, which takes the state of its own instances, have added to an instance."""
    kind = type(value)
    state: Any = object.__getstate__(value)
    attributes, slots = state if isinstance(state, tuple) else (state, {})
    added = {} if base.__dictoffset__ else dict(attributes or {})
    added |= {name: held for name, held in slots.items() if getattr(kind, name) is not getattr(base, name, None)}
    return _without_what_follows(added, kind)


# The hash of an instance (attrs, msgspec), the mapping of an array that lies in a file (NumPy), what is known of the
# order in a sparse matrix (SciPy), and what a unit is made of (Astropy).
_FOLLOWS = {
    *("_attrs_cached_hash", "__msgspec_cached_hash__", "_mmap", "_decomposed_cache"),
    *("_has_canonical_format", "_has_sorted_indices"),
}


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


def _parts_of_exception(error: BaseException) -> Iterable[Any]:
    """Where it came from, too, which pickle leaves out."""
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return (*_parts_by_pickle(error), error.__cause__, error.__context__, error.__suppress_context__, lines)


# Classes and functions


def _is_class(value: Any) -> bool:
    # `list[int]` only says that it is one.
    return issubclass(type(value), type)


def _module_of(value: Any) -> str:
    """In worker processes the main module has another name."""
    module = getattr(value, "__module__", None) or ""
    return "__main__" if module in _MAIN else module


def _is_importable(value: Any) -> bool:
    """Whether every process that imports its module finds this under its name."""
    module = value.__module__ or ""
    # What a module that no file makes has is known to this process only.
    is_made_by_file = getattr(sys.modules.get(module), "__spec__", None) is not None
    return module not in _MAIN and is_made_by_file and find_by_name(module, value.__qualname__) is value


def _parts_of_class(kind: Any) -> Iterable[Any]:
    """Its name; of one that is not known by its name alone also what it is made of."""
    named = (_module_of(kind), kind.__qualname__)
    if _is_importable(kind):
        return named
    members = {name: value for name, value in vars(kind).items() if _tells_something(name)}
    # Of msgspec's, the metaclass keeps what is no member.
    kept = [getattr(kind, f"__struct_{what}__", None) for what in ("config", "encode_fields", "defaults")]
    return (*named, type(kind), kind.__bases__, members, kept, _annotations_of(kind))


def _tells_something(member: str) -> bool:
    """Whether it says more than what else is known of a class, and the same in every process."""
    return member in _TOLD_BY_PYDANTIC or not (member in _TELL_NOTHING or member.startswith("__pydantic_"))


# The rest of pydantic's is made of these, and has addresses in it.
_TOLD_BY_PYDANTIC = {f"__pydantic_{what}__" for what in ("fields", "decorators", "config", "generic_metadata")}
# Where it stands, what Python keeps of its use, the annotations, which are told by what they stand for, and its hash,
# in which attrs has a number of this process.
_TELL_NOTHING = {
    *("__module__", "__firstlineno__", "__static_attributes__", "__slotnames__", "_value2member_map_", "__hash__"),
    *("__annotations__", "__annotations_cache__", "__annotate__", "__annotate_func__"),
}


def _annotations_of(holder: Any) -> list[tuple[str, Any]]:
    """In their order, with what text in them stands for, as libraries find it."""
    try:
        return [*typing.get_type_hints(holder, include_extras=True).items()]
    except Exception:  # noqa: BLE001 - they may name what is not there
        return [*vars(holder).get("__annotations__", {}).items()]


def _parts_of_function(function: Any) -> Iterable[Any]:
    """Its code and signature, and what it has captured; of one that can be imported what it wraps."""
    function = undecorated(function)
    if not isinstance(function, types.FunctionType):
        return (function,)
    told: dict[str, Any] = {
        "doc": function.__doc__,
        "annotations": _annotations_of(function),
        "defaults": (function.__defaults__, function.__kwdefaults__),
    }
    if _is_importable(function):
        told["wrapped"] = getattr(function, "__wrapped__", None)
        return (_module_of(function), function.__qualname__, function.__code__, _AsFarAsTold(told))
    if function.__globals__.get("__name__") in _MAIN:
        # Another script has others of these names, and nobody imports them.
        kinds = (type, types.FunctionType)
        used = _read_by(function).items()
        told["used"] = {name: held if isinstance(held, kinds) else _IfTold([held]) for name, held in used}
    return (*apart_from_globals(function), _AsFarAsTold(told))


def apart_from_globals(function: Any) -> Any:
    """What a function is by its name, its code and what it carries, whatever the globals that it reads are just now."""
    function = undecorated(function)
    if not isinstance(function, types.FunctionType) or _is_importable(function):
        return function
    defaults = _AsFarAsTold(defaults=(function.__defaults__, function.__kwdefaults__))
    return (_module_of(function), function.__qualname__, *_captured_by(function), defaults, vars(function))


def _captured_by(function: types.FunctionType) -> tuple[Any, ...]:
    cells = function.__closure__ or ()
    held = ["nothing yet" if cell == types.CellType() else cell.cell_contents for cell in cells]
    # Globals of its own do what cells do elsewhere.
    used = [*_read_by(function).values()] if _has_own_globals(function) else []
    return (function.__code__, held, used)


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
    contents: Any = b""
    if plain.dtype.hasobject:
        contents = plain.ravel().tolist()
    elif plain.nbytes:
        # No copy of it is made, unless it is in pieces.
        contents = blake2b(numpy.ascontiguousarray(plain).reshape(-1).view("u1"), digest_size=_SIZE).digest()
    dtype = plain.dtype
    # Of a number, a date or text, not of what other libraries have made or what has fields.
    is_named = dtype.kind in "biufcmMSUO" and type(dtype).__module__ == "numpy.dtypes" and dtype.metadata is None
    return (dtype.str if is_named else dtype, plain.shape, plain.flags.fnc, contents)


def _parts_of_tensor(tensor: Any) -> Iterable[Any]:
    """What pickle writes of a tensor has the address of its memory in it."""
    if tensor.is_quantized or str(tensor.layout) != "torch.strided":
        return (*_parts_by_pickle(tensor), vars(tensor))
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    contents = blake2b(plain.view(sys.modules["torch"].uint8).numpy(), digest_size=_SIZE).digest()
    told = (tensor.dtype, tensor.device, tensor.requires_grad, tuple(tensor.shape), tensor.stride())
    return (*told, contents, vars(tensor))


def _parts_of_pandas(values: Any) -> Iterable[Any]:
    """A column, or an index; a frame is taken for its columns, however they are grouped in memory."""
    held = values.to_numpy() if isinstance(values.dtype, sys.modules["numpy"].dtype) else values.array
    return (values.name, held)


def _parts_of_polars(series: Any) -> Iterable[Any]:
    # Not what polars pickles, which says in which chunks the values lie and what is under missing ones. Numbers stand
    # for times, which are slow in Python and have no nanoseconds there; those of categories are this process' own.
    dtype = str(series.dtype)
    is_named = "Categorical" in dtype
    has_numbers = not is_named or "'ns'" in dtype or "Time" in dtype
    numbers = series.to_physical().to_list() if has_numbers else None
    return (series.name, series.dtype, series.to_list() if is_named else None, numbers)


def _put_on(frame: Any) -> Iterable[Any]:
    """What a program has put on a frame: the library's own has an underscore, but for what subclasses list."""
    names = [*getattr(frame, "_metadata", ()), *(name for name in vars(frame) if name[0] != "_"), "attrs", "_flags"]
    return [{name: getattr(frame, name, None) for name in names}]


def _shown_by(value: Any) -> Iterable[Any]:
    """All that an object shows, which pickle cannot take."""
    return [(name, getattr(value, name)) for name in dir(value) if name[0] != "_"]


def _parts_of_generator(generator: Any) -> Iterable[Any]:
    """Its state, unless it is what a module's functions draw from, which changes with every draw of the program's."""
    module = vars(sys.modules[type(generator).__module__])
    is_the_modules = any(generator is module.get(name) for name in ("_inst", "_rand"))
    return () if is_the_modules else _parts_by_pickle(generator)


# What is known better than pickle knows it, by the package and the name of a class or of one of its bases, so that
# nothing has to be imported. Pickle lists a set in the order of its hashes, and a path by how it was put together.
_PARTS: dict[str, Callable[[Any], Iterable[Any]]] = {
    "builtins.function": _parts_of_function,
    "builtins.code": _parts_of_code,
    "builtins.method": lambda value: (value.__func__, value.__self__),
    "builtins.module": lambda value: (value.__name__,),
    "builtins.classmethod": lambda value: (value.__func__,),
    "builtins.staticmethod": lambda value: (value.__func__,),
    "builtins.property": lambda value: (value.fget, value.fset, value.fdel),
    "opero._Map": lambda value: (undecorated(value),),
    "functools.cached_property": lambda value: (value.func,),
    "weakref.ReferenceType": lambda value: (value(),),
    "builtins.set": lambda value: (_Unordered(value),),
    "builtins.frozenset": lambda value: (_Unordered(value),),
    "builtins.BaseException": _parts_of_exception,
    # Those of `iterdir()` have a look at the disk with them on Python 3.14.
    **dict.fromkeys(("pathlib.PurePath", "pathlib.Path"), lambda value: (str(value),)),
    "numpy.ndarray": _parts_of_array,
    # The value for what is masked is found when it is asked for.
    "numpy.MaskedArray": lambda value: (*_parts_of_array(value), {**vars(value), "_fill_value": value.fill_value}),
    "torch.Tensor": _parts_of_tensor,
    # Pickle gives each process' own a number.
    "numba.Dispatcher": lambda value: (value.py_func, value.targetoptions),
    "random.Random": _parts_of_generator,
    "numpy.RandomState": _parts_of_generator,
    # Without the time of its last look at what has expired.
    "http.CookieJar": lambda jar: ([*jar], {**vars(jar._policy), "_now": None}),  # noqa: SLF001 - not public in all
    "pandas.DataFrame": lambda value: (value.columns, value.index, [*value.items()], *_put_on(value)),
    "pandas.Flags": lambda value: (value.allows_duplicate_labels,),
    "pandas.Series": lambda value: (*_parts_of_pandas(value), value.index, *_put_on(value)),
    "pandas.NDArrayBackedExtensionArray": lambda value: (value.dtype, value._ndarray),  # noqa: SLF001 - all it is
    "pandas.IntervalArray": lambda value: (value.dtype, value.left, value.right),
    # Not in which chunks its text or numbers lie, nor what lies under a mask.
    "pandas.ArrowExtensionArray": lambda value: (repr(value.dtype), value.tolist()),
    "pandas.BaseMaskedArray": lambda value: (value.dtype.name, value.isna(), value[~value.isna()].to_numpy()),
    # Without levels that no label has, and what an index has found out of itself meanwhile.
    "pandas.MultiIndex": lambda value: (*map(value.get_level_values, range(value.nlevels)), *_put_on(value)),
    "pandas.Index": lambda value: (*_parts_by_pickle(value), *_put_on(value)),
    **dict.fromkeys(("msgspec.Meta", "msgspec.StructConfig", "msgspec.Factory"), _shown_by),
    "pydantic.Decorator": lambda value: (value.cls_var_name, value.func, value.info),
    "polars.DataFrame": lambda value: (value.get_columns(), *_put_on(value)),
    "polars.Series": lambda value: (*_parts_of_polars(value), *_put_on(value)),
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
