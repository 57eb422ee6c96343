"""Cache keys: the same for calls whose arguments a function could not tell apart, different for all others.

Of arguments that are None, exactly int, or text that is not long, a key of memory is these, or the only one of them;
with a bool among them it is these with their classes, so that ``1`` and ``True`` are two. All others are in a key by
their digest, see `opero.core.digests`. In memory the instance that a method is called on is in it by its identity. No
key runs code of the user's when it is looked up, and none keeps an object of the user's alive.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

from opero.core.checks import listed
from opero.core.clock import clock
from opero.core.digests import UncacheableError, digest_of, digest_of_plain, spelling_of
from opero.core.parameters import Forwarding, asked_of_call
from opero.core.signature import name_of
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opero.core.stores.memory import MemoryStore
    from opero.core.stores.settings import Cache


class Instance(weakref.ref[Any]):
    """The identity of a living object, of which there is one for each; equal to itself only, without asking the object.

    It knows the stores that are to be told of the object's end.
    """

    __slots__ = ("name", "stores")

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    name: int
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
    made.name, made.stores = id(value), set()
    while (known := _instances.setdefault(id(value), made))() is not value:
        # Of one that was at its address before, and whose end is just being told.
        _forget(known)
    return known


def identity_of(value: Any) -> Any:
    """What tells a value from others within this process: its state, if it is meant to be equal to others."""
    kind: Any = type(value)
    # What can have no weak reference is told by its state, too.
    if kind.__eq__ is not object.__eq__ or not kind.__weakrefoffset__:
        with contextlib.suppress(UncacheableError):
            return digest_of(value)
    return instance_of(value)


class KeyMaker:
    """Makes the functions that give the keys of calls, which take the same arguments.

    Where the function is a method, the instance that it is called on is told apart by identity, and not kept alive. A
    key that outlives the process (``digest``) knows no identity: there an instance is what its values are.

    Attributes:
        key_of: Gives the key of a call.
    """

    def __init__(self, function: Callable[..., Any], settings: Cache) -> None:
        self._shape = shape = Forwarding(function)
        self._name = name_of(function)
        for name in settings.ignore:
            if name not in shape.named:
                msg = f"ignore={name!r} names no parameter of {self._name}; write any of {listed(shape.named)}"
                raise ValueError(msg)
        self._names = tuple(name for name in shape.names if name not in settings.ignore)
        self._settings = settings
        self._is_digest = settings.backend != "memory"
        self._may_be_method = not self._is_digest and self._names[:1] == shape.names[:1] != ()
        if settings.key is not None:
            make, given = _users_key(function, settings.key), shape.call
        else:
            make, given = self._key_function(function), ", ".join(self._names)
        lines = [f"return _opero_make({given})"]
        if self._is_digest and settings.key is None:
            lines = [f"if {_all_plain(self._names)}: return _opero_digest({_tuple(self._names)})", *lines]
        self.key_of = self._compiled(lines, _opero_make=make)

    def finder(self, store: MemoryStore, tick: Callable[[], object]) -> Callable[..., Any] | None:
        """A function of the same arguments that gives the entry of plain ones at once, and counts it by ``tick``.

        It gives None for others, where there is no entry, and for one that has ended. None if the user makes the keys.
        """
        settings, names, touch = self._settings, self._names, store.touch
        if settings.key is not None:
            return None
        lines = [f"if {_all_plain(names)}: _opero_key = {names[0] if len(names) == 1 else _tuple(names)}"]
        if self._may_be_method:
            owner, *others = names
            # What is known as the owner of another method, and an argument here, has no entry by its identity.
            known = f"(_opero_known := _opero_instances.get(_opero_id({owner})))"
            lines += [
                f"elif {known} is not None and _opero_known() is {owner} and {_all_plain(others)}:",
                f"    _opero_key = {_tuple(['_opero_known', *others])}",
            ]
        # A remembered error has expired for a quick look.
        may_expire = settings.ttl is not None or settings.exceptions or store.is_shared
        end = " or _opero_entry[1] <= _opero_clock.now()" if may_expire else ""
        lines += [
            f"elif (_opero_key := _opero_nearly_plain({_tuple(names)})) is None: return None",
            "_opero_entry = _opero_get(_opero_key)",
            f"if _opero_entry is None{end}: return None",
            "_opero_tick()",
        ]
        if touch is not None:
            # Removed since, if it is not there.
            lines += ["try: _opero_touch(_opero_key)", "except KeyError: pass"]
        lines.append("return _opero_entry")
        its = {"_opero_get": store.get, "_opero_touch": touch, "_opero_tick": tick, "_opero_clock": clock}
        return self._compiled(lines, **its)

    def _key_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Makes the key of the values of the parameters."""
        shape, name, names, is_digest = self._shape, self._name, self._names, self._is_digest
        owner_of = _owner_function(function) if self._may_be_method else None

        def spelled(parameter: str, value: Any) -> bytes:
            if type(value) is object and shape.defaults.get(parameter) is value:
                # It marks what is missing.
                return b"default"
            try:
                return spelling_of(value)
            except UncacheableError as error:
                msg = (
                    f"argument {parameter!r} of {name} cannot be part of a cache key: {error}; give its class a method "
                    "__cache_key__ that returns what tells it from others, or give cache_key=, a function of the same "
                    f"arguments that returns the key, or write Cache(ignore={parameter!r}) if no result depends on it"
                )
                raise MisuseError(msg) from error

        # As a wrapper has it that takes whatever it is called with.
        has_owner_among_others = owner_of is not None and shape.parameters.startswith(f"*{names[0]}")

        def key_of(*values: Any) -> Any:
            parameters = names
            if has_owner_among_others and values[0]:
                (owner, *others), *rest = values
                values, parameters = (owner, others, *rest), (names[0], *names)
            instance = None if owner_of is None else owner_of(values[0])
            if instance is not None:
                values, parameters = values[1:], parameters[1:]
            key = None if is_digest else _plain_key(values)
            if key is None:
                key = (digest_of(*map(spelled, parameters, values)),)
            if instance is not None:
                return (instance, *key)
            return key[0] if len(key) == 1 else key

        return key_of

    def _compiled(self, lines: list[str], **namespace: Any) -> Callable[..., Any]:
        made = self._shape.compiled(lines, namespace | _NAMES)
        # A wrong call is reported under the name that the user knows.
        made.__qualname__ = self._name
        return made


# Longer text is in a key by its digest.
_LONG = 1024


def _plain_key(values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The key of plain values, as a finder makes it, and of those among which there is a bool; None of others."""
    for value in values:
        if type(value) not in {int, bool, type(None)} and not (type(value) is str and len(value) < _LONG):
            return None
    return (*values, *map(type, values)) if bool in map(type, values) else values


# Builtins may have the names of parameters. `type`, since a proxy's or a mock's `__class__` is another's.
_NAMES = {
    "_opero_type": type,
    "_opero_int": int,
    "_opero_str": str,
    "_opero_len": len,
    "_opero_id": id,
    "_opero_instances": _instances,
    "_opero_nearly_plain": _plain_key,
    "_opero_digest": digest_of_plain,
}
_IS_TEXT = f"_opero_type({{0}}) is _opero_str and _opero_len({{0}}) < {_LONG}"
_IS_PLAIN = f"(_opero_type({{0}}) is _opero_int or {{0}} is None or {_IS_TEXT})"


def _all_plain(names: Iterable[str]) -> str:
    return " and ".join(_IS_PLAIN.format(name) for name in names) or "True"


def _tuple(names: Iterable[str]) -> str:
    return f"({''.join(f'{name}, ' for name in names)})"


def _owner_function(function: Callable[..., Any]) -> Callable[[Any], Instance | None]:
    """Gives the identity of what a call got first, if that is an instance whose method the function is.

    Its class, or one of the bases, holds something that unwraps to the function.
    """
    name = name_of(function)
    known: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()

    def owner_of(value: Any) -> Instance | None:
        kind = type(value)
        if kind not in known:
            members = (member for owner in kind.__mro__ for member in list(vars(owner).values()))
            # What has a variable size (numbers, tuples, bytes) can have no weak reference, and does not change.
            is_told_by_state = hasattr(kind, "__cache_key__") or kind.__itemsize__
            known[kind] = not is_told_by_state and any(_unwraps_to(member, function) for member in members)
        if not known[kind]:
            return None
        try:
            return instance_of(value)
        except TypeError as error:
            msg = (
                f"{name} was called on a {kind.__qualname__}, which can have no weak reference, so that a cache would "
                "keep it alive; add '__weakref__' to its __slots__ (weakref_slot=True of a dataclass), or give it a "
                "method __cache_key__ that returns what tells it from others"
            )
            raise MisuseError(msg) from error

    return owner_of


def _unwraps_to(member: Any, function: Callable[..., Any]) -> bool:
    if isinstance(member, staticmethod):
        return False
    # A bound is needed for what has every attribute that it is asked for.
    for _ in range(_MOST_WRAPPERS):
        if member is function:
            return True
        # What decorators of the standard library, and opero's own, call the function that they hold.
        held = (getattr(member, name, None) for name in ("__wrapped__", "func", "fget"))
        try:
            member = next((inner for inner in held if inner is not None), None)
        except Exception:  # noqa: BLE001 - of an object of others, such as a proxy for what is not there yet
            return False
    return False


_MOST_WRAPPERS = 50


def _users_key(function: Callable[..., Any], cache_key: Callable[..., Any]) -> Callable[..., Any]:
    asked = asked_of_call(function, cache_key)

    def users_key(*args: Any, **kwargs: Any) -> Any:
        key = asked(args, kwargs)
        try:
            return digest_of(key)
        except UncacheableError as error:
            got = f"cache_key= of {name_of(function)} returned a {type(key).__qualname__}"
            msg = f"{got}: {error}; return text or numbers"
            raise MisuseError(msg) from error

    return users_key
