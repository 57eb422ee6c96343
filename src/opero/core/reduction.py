"""Objects by what pickle would keep of them, but as values: a pickle lists a set in the order of its hashes."""

from __future__ import annotations

import copyreg
import threading
import types
from typing import TYPE_CHECKING, Any

from opero.core.keys import Opaque, freeze

if TYPE_CHECKING:
    from opero.core.keys import Frozen

_PROTOCOL = 4
# Objects that refer to each other often are frozen as often; beyond this, pickle is the better way.
_MOST_OBJECTS = 10_000


class _Path(threading.local):
    """The objects that are being frozen in this thread, each inside the one before it."""

    def __init__(self) -> None:
        self.inside: list[int] = []
        self.count = 0


_path = _Path()


class _TooManyError(Exception):
    pass


def freeze_by_reduction(value: Any) -> Frozen:
    """A stand-in for an object that nothing more is known of; to be called within ``values_only``."""
    if isinstance(value, (type, types.FunctionType)):
        return Opaque(value)
    is_outermost = not _path.inside
    _path.count = 1 if is_outermost else _path.count + 1
    if id(value) in _path.inside:
        return ("inside", _path.inside.index(id(value)))
    _path.inside.append(id(value))
    try:
        return _reduced(value)
    except (_TooManyError, RecursionError):
        if is_outermost:
            return Opaque(value)
        raise
    finally:
        _path.inside.pop()


def _reduced(value: Any) -> Frozen:
    if _path.count > _MOST_OBJECTS:
        raise _TooManyError
    try:
        reduction = _reduce(value)
    except Exception:  # noqa: BLE001 - whoever pickles it will hear the same, and say which argument it is
        return Opaque(value)
    if isinstance(reduction, str):
        return Opaque(value)
    maker, arguments, *others = reduction
    state, items, pairs, setter = (*others, None, None, None, None)[:4]
    return (
        freeze(maker),
        freeze(arguments),
        freeze(state),
        None if items is None else freeze(list(items)),
        None if pairs is None else freeze(dict(pairs)),
        freeze(setter),
    )


def _reduce(value: Any) -> Any:
    registered = copyreg.dispatch_table.get(type(value))
    return value.__reduce_ex__(_PROTOCOL) if registered is None else registered(value)
