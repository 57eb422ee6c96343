"""What opero needs to know of a function before it looks at its parameters: its kind and its name."""

from __future__ import annotations

import functools
import sys
import types
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable


class _Missing:
    """The type of `MISSING`, which is one object in every process."""

    def __repr__(self) -> str:
        return "MISSING"

    def __reduce__(self) -> str:
        return "MISSING"


MISSING: Any = _Missing()


def find_by_name(module: str, qualname: str) -> Any:
    """What a module that is imported has by that name; None if it has nothing."""
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """What names a function: what a partial was made of, or the class of a callable object; else itself."""
    while isinstance(function, functools.partial) and not hasattr(function, "__qualname__"):
        function = function.func
    return function if hasattr(function, "__qualname__") else type(function)


def name_of(function: Callable[..., Any]) -> str:
    """Name a function as a message should: its qualified name, through partials."""
    return innermost(function).__qualname__


def module_of(function: Callable[..., Any]) -> str:
    """The module of what `name_of` names, ``""`` if none is known."""
    module = getattr(innermost(function), "__module__", None)
    return module if isinstance(module, str) else ""


Kind = Literal["def", "async def", "generator", "async generator"]


def calling_kind(function: Callable[..., Any]) -> Kind:
    """Tell what calling gives, also for partials, bound methods and objects with such a ``__call__``."""
    # Here, since tenacity, which a decorator needs, imports it in any case, and `import opero` does not need it.
    import inspect

    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, type):
        # Calling it gives an instance, whatever calling that one gives.
        return "def"
    method = getattr(function, "__call__", None)  # noqa: B004 - the method itself is looked at, not whether there is one
    kinds: dict[Kind, Callable[[Any], bool]] = {
        "async def": inspect.iscoroutinefunction,
        "generator": inspect.isgeneratorfunction,
        "async generator": inspect.isasyncgenfunction,
    }
    for kind, fits in kinds.items():
        if fits(function) or fits(method):
            return kind
    # `unittest.mock.AsyncMock` marks itself so for asyncio; inspect has a mark of its own from Python 3.12 on.
    return "async def" if "_is_coroutine" in getattr(function, "__dict__", {}) else "def"


def is_async(function: Callable[..., Any]) -> bool:
    """Tell whether what calling gives has to be awaited."""
    return calling_kind(function) in {"async def", "async generator"}


def check_decoratable(function: Any, decorator: str) -> None:
    """Refuse what the decorator could only get wrong later."""
    if isinstance(function, (classmethod, staticmethod)):
        kind = type(function).__name__
        raise TypeError(f"@{decorator} got a {kind} object; put @{decorator} below @{kind}")
    if isinstance(function, type):
        msg = f"@{decorator} got the class {function.__qualname__}; it decorates functions and other callables"
        raise TypeError(msg)
    if not callable(function):
        kind = type(function).__qualname__
        msg = f"@{decorator} got {kind}; it decorates functions, and its options are keywords: @{decorator}(retries=3)"
        raise TypeError(msg)


def refuse_generator(function: Callable[..., Any], what: str) -> None:
    """Refuse a generator function for ``what``, which needs a result."""
    if calling_kind(function) in {"generator", "async generator"}:
        msg = f"{what} cannot apply to the generator function {name_of(function)}; return a list in place of it"
        raise TypeError(msg)


# The base of both kinds, by its name: `import opero` does not need contextlib's async one.
_GENERATOR_MANAGER = ("contextlib", "_GeneratorContextManagerBase")


def refuse_unfinished(function: Callable[..., Any], result: Any, *, is_cached: bool) -> None:
    """Raise when what a function returned has not happened yet, or can be used only once but would be kept."""
    kind = type(result)
    if hasattr(kind, "__await__"):
        close = getattr(result, "close", None)
        if close is not None:
            close()
        instead = "write `async def` and await inside, so that opero can see the real result"
        _refuse(function, result, "an awaitable", instead)
    nothing_has_run = "of which nothing has run yet"
    # By its type: a proxy says that it is another, and may have to be asked somewhere for that.
    if issubclass(kind, (types.GeneratorType, types.AsyncGeneratorType)):
        _refuse(function, result, nothing_has_run, "write `yield` in the decorated function itself, or return a list")
    if any((base.__module__, base.__name__) == _GENERATOR_MANAGER for base in kind.__mro__):
        _refuse(function, result, nothing_has_run, "put the decorator of contextlib above opero's")
    if is_cached and hasattr(kind, "__next__") and hasattr(kind, "__iter__") and _is_own_iterator(result):
        _refuse(function, result, "which can be read only once, but is cached", "return a list, or what was read")


def _is_own_iterator(result: Any) -> bool:
    try:
        return iter(result) is result
    except Exception:  # noqa: BLE001 - such as of a file that is closed
        return True


def _refuse(function: Callable[..., Any], result: Any, why: str, instead: str) -> NoReturn:
    raise MisuseError(f"{name_of(function)} returned {type(result).__name__}, {why}; {instead}")
