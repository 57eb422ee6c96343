"""Which function is it? The name under which its results are kept, the same in every process."""

from __future__ import annotations

import functools
import os
import sys
import types
from typing import TYPE_CHECKING, Any

from opero.core.control import decoration_of
from opero.core.digests import digest_of
from opero.core.keys import UncacheableError, freeze, values_only
from opero.core.signature import innermost, name_of
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable


def lasting_identity(function: Callable[..., Any], option: str = "cache_namespace=") -> str:
    """A name that no other function has, in this process or another one; ``option`` could give it another one.

    Functions that are reached by module and name are known by these. What can share a name (lambdas, functions made
    inside functions, partials, bound methods, callable objects, sessions without a file) is known by its code and by
    the values that it carries, too.

    Raises:
        MisuseError: If these values cannot be told apart.
    """
    try:
        with values_only():
            return _identity(function, frozenset())
    except (UncacheableError, RecursionError) as error:
        reason = str(error) if isinstance(error, UncacheableError) else "it is nested too deeply"
        name = name_of(function)
        msg = f"{name} carries a value that cannot be told apart from others: {reason}; give {option}"
        raise MisuseError(msg) from error


def _identity(function: Any, inside: frozenset[int]) -> str:
    function = _undecorated(function)
    module, has_file = _module(innermost(function))
    name = f"{module}.{name_of(function)}"
    particulars = _particulars(function, inside | {id(function)}, has_file=has_file)
    return name if particulars is None else f"{name}#{digest_of(particulars).hex()}"


def _undecorated(function: Any) -> Any:
    while (decoration := decoration_of(function)) is not None:
        function = decoration.function
    return function


def _module(function: Any) -> tuple[str, bool]:
    name = getattr(function, "__module__", None) or ""
    if name not in {"__main__", "__mp_main__"}:
        return name, True
    # Every script is `__main__`, and its own worker processes know it as `__mp_main__`.
    file = getattr(function, "__globals__", {}).get("__file__") or getattr(sys.modules.get(name), "__file__", None)
    return ("__main__", False) if file is None else (f"__main__({os.path.realpath(file)})", True)


def _particulars(function: Any, inside: frozenset[int], *, has_file: bool) -> Any:
    if isinstance(function, functools.partial):
        return (_identity(function.func, inside), freeze(function.args), freeze(function.keywords))
    if isinstance(function, types.MethodType):
        return (_identity(function.__func__, inside), freeze(function.__self__))
    if isinstance(function, types.BuiltinFunctionType):
        owner = function.__self__
        return None if owner is None or isinstance(owner, types.ModuleType) else freeze(owner)
    if not isinstance(function, types.FunctionType):
        return freeze(function)
    code = function.__code__
    by_name = "<" not in function.__qualname__ and code.co_name == function.__name__
    borrowed = _borrowed_globals(function)
    if by_name and has_file and not function.__closure__ and not borrowed:
        return None
    captured = [_in_cell(cell, inside) for cell in function.__closure__ or ()]
    captured += [_captured(value, inside) for value in borrowed]
    if len(inside) > 1:
        # The key of a call binds the defaults of the function itself, but not those of one that it calls.
        keywords = function.__kwdefaults__ or {}
        defaults = (*(function.__defaults__ or ()), *(keywords[name] for name in sorted(keywords)))
        captured += [_captured(value, inside) for value in defaults]
    return (_freeze_code(code), tuple(captured))


def _borrowed_globals(function: types.FunctionType) -> list[Any]:
    """What a function uses that was compiled with globals of its own: they do what cells do elsewhere."""
    known = function.__globals__
    if "__file__" in known or known is getattr(sys.modules.get(function.__module__), "__dict__", None):
        return []
    return [known[name] for name in function.__code__.co_names if name in known]


def _in_cell(cell: Any, inside: frozenset[int]) -> Any:
    try:
        return _captured(cell.cell_contents, inside)
    except ValueError:
        return "nothing yet"


def _captured(value: Any, inside: frozenset[int]) -> Any:
    value = _undecorated(value)
    if id(value) in inside:
        return "itself"
    if isinstance(value, types.ModuleType):
        return ("module", value.__name__)
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return ("function", _identity(value, inside))
    if isinstance(value, type):
        return _class_identity(value, inside)
    return freeze(value)


def _class_identity(kind: type, inside: frozenset[int]) -> Any:
    """A class by its name; one made inside a function, by what it is made of, too."""
    if "<locals>" not in kind.__qualname__:
        return kind
    inside |= {id(kind)}
    members = {name: value for name, value in vars(kind).items() if name not in _OF_EVERY_CLASS}
    parts = [(name, _member(value, inside)) for name, value in sorted(members.items())]
    return (kind, tuple([_class_identity(base, inside) for base in kind.__bases__]), tuple(parts))


def _member(value: Any, inside: frozenset[int]) -> Any:
    if isinstance(value, (classmethod, staticmethod)):
        return _captured(value.__func__, inside)
    if isinstance(value, property):
        return tuple([_captured(part, inside) for part in (value.fget, value.fset, value.fdel)])
    if isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType)):
        return "a slot"
    return _captured(value, inside)


# Known from the name, or telling nothing of what the class does.
_OF_EVERY_CLASS = frozenset(
    {
        "__annotations__",
        "__dict__",
        "__doc__",
        "__firstlineno__",
        "__module__",
        "__qualname__",
        "__static_attributes__",
        "__weakref__",
    }
)


def _freeze_code(code: types.CodeType) -> Any:
    constants = [_freeze_code(part) if isinstance(part, types.CodeType) else freeze(part) for part in code.co_consts]
    return (code.co_code, tuple(constants), code.co_names, code.co_varnames, code.co_freevars)
