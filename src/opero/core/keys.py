"""Cache keys: the same for calls whose arguments a function could not tell apart, different for all others.

Of arguments that are exactly int, or text that is not long, a key is these, or the only one of them; with a bool, None
or bytes among them it is these with their classes, so that ``1`` and ``True`` are two; other arguments are in it by
their digest, see `opero.core.digests`. In memory the instance that a method is called on is in it by its identity. No
key runs code of the user's when it is looked up, and none keeps an object of the user's alive.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

from opero.core.digests import PLAIN_TYPES, UncacheableError, digest_of, digest_of_plain, spelling_of
from opero.core.parameters import compile_function, forwarding
from opero.core.signature import name_of
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from opero.core.clock import Clock
    from opero.core.parameters import Forwarding

_BARE = frozenset({int, str})
_SMALL = frozenset({int, bool, type(None)})
_TEXTS = frozenset({str, bytes})
# Longer text is in a key by its digest.
_LONG = 1024


class Instance(weakref.ref[Any]):
    """The identity of a living object, of which there is one for each; equal to itself only, without asking the object.

    Attributes:
        users: Marks of those `KeyMaker`s whose keys hold it.
        stores: The stores that have such keys, which are told of the object's end.
    """

    __slots__ = ("name", "stores", "users")

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    name: int
    users: set[object]
    stores: set[weakref.ref[Any]]


_instances: dict[int, Instance] = {}


def _forget(gone: Instance, instances: dict[int, Instance] = _instances) -> None:
    if instances.get(gone.name) is gone:
        del instances[gone.name]
    for known in gone.stores:
        store = known()
        if store is not None:
            store.forget_instance(gone)


def instance_of(value: Any) -> Instance:
    """The identity of an object; raises a TypeError if it can have no weak reference."""
    made = Instance(value, _forget)
    made.name, made.users, made.stores = id(value), set(), set()
    while (known := _instances.setdefault(id(value), made))() is not value:
        # Of one that was at its address before, and whose end is just being told.
        _forget(known)
    return known


def identity_of(value: Any) -> Any:
    """What tells a value from others within this process, whatever it is."""
    if value.__class__ in PLAIN_TYPES:
        return (value.__class__, value)
    # What can have no weak reference is told by its state, too.
    if is_value(value) or not type(value).__weakrefoffset__:
        with contextlib.suppress(UncacheableError):
            return digest_of(value)
    return instance_of(value)


def is_value(value: Any) -> bool:
    """Whether it is meant to be equal to others, and not an object with a life of its own."""
    equality: Any = type(value).__eq__
    is_container = isinstance(value, (list, dict, set, bytearray)) or hasattr(type(value), "__dataclass_fields__")
    return equality is not object.__eq__ and (type(value).__hash__ is not None or is_container)


class KeyMaker:
    """Gives the cache key of a call.

    Args:
        function: Whose arguments the key is made of. Where it is a method, the instance that it is called on is told
            apart by identity, and not kept alive; a key that outlives the process knows no identity: there an instance
            is what its values are.
        cache_key: What the user gave to make the key in their place.
        digest: Whether the key has to be the same in every process, and to tell nothing of the arguments.
        ignore: Names of parameters that are not part of the key.

    Attributes:
        key_of: A function of the same arguments that gives the key.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        cache_key: Callable[..., Any] | None,
        *,
        digest: bool,
        ignore: Collection[str] = (),
    ) -> None:
        self._shape = shape = forwarding(function)
        self._name = name_of(function)
        self._names = names = tuple(name for name in shape.names if name not in ignore)
        mark = None if digest else object()
        # All of them can be plain; not so `*args` and `**kwargs`.
        is_quick = cache_key is None and set(names) <= set(shape.named)
        self._has_finder = is_quick and not digest
        if cache_key is None:
            make, given = _key_function(function, shape, names, mark), ", ".join(names)
        else:
            make, given = _users_key(cache_key, self._name), shape.call
        # Functions that do not know of this object: it shall be freed with the decorated function, not by and by.
        self._namespace: dict[str, Any] = {
            "_opero_int": int,
            "_opero_str": str,
            "_opero_small": PLAIN_TYPES if digest else _SMALL,
            "_opero_texts": _TEXTS,
            "_opero_digest": digest_of_plain,
            "_opero_instances": _instances,
            "_opero_mark": mark,
            "_opero_id": id,
            "_opero_len": len,
            "_opero_make": make,
            **shape.defaults,
        }
        lines = [f"return _opero_make({given})"]
        if is_quick and digest:
            lines.insert(0, f"if {_all_are(_IS_SMALL, names)}: return _opero_digest({_tuple(names)})")
        self.key_of = self._compiled(lines)

    def finder(
        self,
        get: Callable[[Any], Any],
        touch: Callable[[Any], object] | None,
        tick: Callable[[], object],
        clock: Clock | None,
    ) -> Callable[..., Any] | None:
        """A function of the same arguments that gives the entry of plain ones at once, and counts it.

        It gives None for others, where there is no entry, and for one that has ended by the ``clock``.
        """
        if not self._has_finder:
            return None
        self._namespace.update(_opero_get=get, _opero_touch=touch, _opero_tick=tick, _opero_clock=clock)
        end = "" if clock is None else " or _opero_entry[1] <= _opero_clock.now()"
        lines = [
            *_lines_for_plain_arguments(self._names, may_be_method=self._names[:1] == self._shape.names[:1] != ()),
            "_opero_entry = _opero_get(_opero_key)",
            f"if _opero_entry is None{end}: return None",
            "_opero_tick()",
            # Removed since, if it is not there.
            *([] if touch is None else ["try: _opero_touch(_opero_key)", "except KeyError: return _opero_entry"]),
            "return _opero_entry",
        ]
        return self._compiled(lines)

    def _compiled(self, lines: list[str]) -> Callable[..., Any]:
        source = "".join(f"    {line}\n" for line in lines)
        made = compile_function(f"def key_of({self._shape.parameters}):\n{source}", "key_of", {**self._namespace})
        # A wrong call is reported under the name that the user knows.
        made.__qualname__ = self._name
        return made


def _lines_for_plain_arguments(names: tuple[str, ...], *, may_be_method: bool) -> list[str]:
    """What `_key_function` does, where all arguments are plain, or all but the instance that a method is called on."""
    if not may_be_method:
        return _lines_for_key(names)
    owner, *others = names
    is_known = f"_opero_known is not None and _opero_mark in _opero_known.users and _opero_known() is {owner}"
    return [
        *_lines_for_key(names)[:-1],
        "else:",
        f"    _opero_known = _opero_instances.get(_opero_id({owner}))",
        f"    if not ({is_known}): return None",
        *[f"    {line}" for line in _lines_for_key(others, "_opero_known")],
    ]


def _lines_for_key(names: Sequence[str], *known: str) -> list[str]:
    bare = names[0] if len(names) == 1 and not known else _tuple([*known, *names])
    with_classes = _tuple([*known, *names, *(f"{name}.__class__" for name in names)])
    return [
        f"if {_all_are(_IS_BARE, names)}: _opero_key = {bare}",
        f"elif {_all_are(_IS_PLAIN, names)}: _opero_key = {with_classes}",
        "else: return None",
    ]


_IS_SMALL = "{0}.__class__ in _opero_small"
_IS_BARE = f"({{0}}.__class__ is _opero_int or {{0}}.__class__ is _opero_str and _opero_len({{0}}) < {_LONG})"
_IS_PLAIN = f"({_IS_SMALL} or {{0}}.__class__ in _opero_texts and _opero_len({{0}}) < {_LONG})"


def _all_are(test: str, names: Collection[str]) -> str:
    return " and ".join(test.format(name) for name in names) or "True"


def _tuple(names: Collection[str]) -> str:
    return f"({''.join(f'{name}, ' for name in names)})"


def _key_function(
    function: Callable[..., Any], shape: Forwarding, names: tuple[str, ...], mark: object | None
) -> Callable[..., Any]:
    """Makes the key of the values of these parameters; with a ``mark``, of its users, one of memory."""
    name = name_of(function)
    is_owner = _owner_test(function)
    may_be_method = mark is not None and names[:1] == shape.names[:1] != ()
    # As a wrapper has it that takes whatever it is called with.
    has_owner_among_others = may_be_method and shape.parameters.startswith(f"*{names[0]}")

    def spelled(parameter: str, value: Any) -> bytes:
        if type(value) is object and shape.defaults.get(f"_opero_default_{parameter}") is value:
            # It marks what is missing.
            return b"default"
        try:
            return spelling_of(value)
        except UncacheableError as error:
            msg = (
                f"argument {parameter!r} of {name} cannot be part of a cache key: {error}; leave it out by Cache("
                f"ignore={parameter!r}), or give cache_key=, a function of the same arguments that returns the key"
            )
            raise MisuseError(msg) from error

    def key_of(*values: Any) -> Any:
        instance, parameters = None, names
        if has_owner_among_others and values[0]:
            (owner, *others), *rest = values
            values, parameters = (owner, others, *rest), (names[0], *names)
        if may_be_method and not _is_plain(values[0]) and is_owner(values[0]):
            instance = _instance(values[0], name)
        if instance is not None:
            instance.users.add(mark)
        known = () if instance is None else (instance,)
        told = values[len(known) :]
        if mark is None or not all(map(_is_plain, told)):
            digest = digest_of(*map(spelled, parameters[len(known) :], told))
            return (*known, digest) if known else digest
        classes = () if _BARE.issuperset(map(type, told)) else map(type, told)
        key = (*known, *told, *classes)
        return key[0] if len(key) == 1 and not known else key

    return key_of


def _is_plain(value: Any) -> bool:
    return value.__class__ in _SMALL or (value.__class__ in _TEXTS and len(value) < _LONG)


def _instance(value: Any, function: str) -> Instance | None:
    """The identity of what a method is called on; None if it is told by its state."""
    kind = type(value)
    # What has a variable size (numbers, tuples, bytes) can have no weak reference, and does not change.
    if hasattr(kind, "__cache_key__") or kind.__itemsize__:
        return None
    try:
        return instance_of(value)
    except TypeError as error:
        msg = (
            f"{function} was called on a {kind.__qualname__}, which can have no weak reference, so that a cache would "
            "keep it alive; add '__weakref__' to its __slots__ (weakref_slot=True of a dataclass), or give it a method "
            "__cache_key__ that returns what tells it from others"
        )
        raise MisuseError(msg) from error


def _owner_test(function: Callable[..., Any]) -> Callable[[Any], bool]:
    """Tells whether the class of an instance, or one of its bases, holds something that unwraps to the function."""
    known: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()

    def is_owner(instance: Any) -> bool:
        kind = type(instance)
        found = known.get(kind)
        if found is None:
            members = (member for owner in kind.__mro__ for member in list(vars(owner).values()))
            found = known[kind] = any(_unwraps_to(member, function) for member in members)
        return found

    return is_owner


def _unwraps_to(member: Any, function: Callable[..., Any]) -> bool:
    if isinstance(member, staticmethod):
        return False
    # A bound is needed for what has every attribute that it is asked for.
    for _ in range(_MOST_WRAPPERS):
        if member is function:
            return True
        # What decorators of the standard library, and opero's own, call the function that they hold.
        held = (getattr(member, name, None) for name in ("__wrapped__", "func", "fget"))
        member = next((inner for inner in held if inner is not None), None)
        if member is None:
            return False
    return False


_MOST_WRAPPERS = 50


def _users_key(cache_key: Callable[..., Any], function: str) -> Callable[..., Any]:
    def users_key(*args: Any, **kwargs: Any) -> Any:
        key = cache_key(*args, **kwargs)
        try:
            return digest_of(key)
        except UncacheableError as error:
            msg = f"cache_key= of {function} returned a {type(key).__qualname__}: {error}; return text or numbers"
            raise MisuseError(msg) from error

    return users_key
