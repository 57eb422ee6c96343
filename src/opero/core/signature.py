"""What opero needs to know of a function: its kind, its name, its parameters."""

from __future__ import annotations

import functools
import inspect
import itertools
import keyword
import sys
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class _Missing:
    """The type of `MISSING`, which is one object in every process."""

    def __repr__(self) -> str:
        return "MISSING"

    def __reduce__(self) -> str:
        return "MISSING"


MISSING: Any = _Missing()

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def through_partials(function: Any) -> Any:
    """What a partial, or a partial of one, was made of; anything else as it is."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def find_by_name(module: str, qualname: str) -> Any:
    """What a module that is imported has by that name; None if it has nothing."""
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def name_of(function: Callable[..., Any]) -> str:
    """Name a function as a message should: its qualified name, through partials."""
    return _named(function).__qualname__


def module_of(function: Callable[..., Any]) -> str:
    """The module of what `name_of` names, ``""`` if none is known."""
    module = getattr(_named(function), "__module__", None)
    return module if isinstance(module, str) else ""


def _named(function: Callable[..., Any]) -> Callable[..., Any]:
    return function if hasattr(function, "__qualname__") else innermost(function)


def innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a partial was made of, or the class of a callable object."""
    function = through_partials(function)
    return function if hasattr(function, "__qualname__") else type(function)


Kind = Literal["def", "async def", "generator", "async generator"]

_KINDS: tuple[tuple[Kind, Callable[[Any], bool]], ...] = (
    ("async def", inspect.iscoroutinefunction),
    ("generator", inspect.isgeneratorfunction),
    ("async generator", inspect.isasyncgenfunction),
)


def calling_kind(function: Callable[..., Any]) -> Kind:
    """Tell what calling gives, also for partials, bound methods and objects with such a ``__call__``."""
    function = through_partials(function)
    if isinstance(function, type):
        # Calling it gives an instance, whatever calling that one gives.
        return "def"
    method = getattr(function, "__call__", None)  # noqa: B004 - the method itself is looked at, not whether there is one
    for kind, fits in _KINDS:
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
        msg = f"@{decorator} got a {kind} object; put @{decorator} below @{kind}"
        raise TypeError(msg)
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
    if isinstance(result, (types.GeneratorType, types.AsyncGeneratorType)):
        _refuse(function, result, nothing_has_run, "write `yield` in the decorated function itself, or return a list")
    if any((base.__module__, base.__name__) == _GENERATOR_MANAGER for base in kind.__mro__):
        _refuse(function, result, nothing_has_run, "put the decorator of contextlib above opero's")
    if is_cached and hasattr(kind, "__next__") and hasattr(kind, "__iter__"):
        _refuse(function, result, "which can be read only once, but is cached", "return a list, or what was read")


def _refuse(function: Callable[..., Any], result: Any, why: str, instead: str) -> NoReturn:
    msg = f"{name_of(function)} returned {type(result).__name__}, {why}; {instead}"
    raise MisuseError(msg)


@dataclass(frozen=True)
class ParameterSlot:
    """Where the arguments of a call hold one named parameter."""

    name: str
    position: int | None
    keyword: bool
    default: Any
    earlier_defaults: tuple[Any, ...]

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value in this call, the default if none was passed, `MISSING` if there is none either."""
        if self.position is not None and self.position < len(args):
            return args[self.position]
        return kwargs.get(self.name, self.default) if self.keyword else self.default

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with another value for this parameter."""
        if self.position is not None and self.position < len(args):
            return (*args[: self.position], value, *args[self.position + 1 :]), kwargs
        if self.position is not None and not self.keyword:
            return (*args, *self.earlier_defaults[len(args) :], value), kwargs
        return args, {**kwargs, self.name: value}


def parameter_slot(function: Callable[..., Any], name: str, option: str) -> ParameterSlot:
    """Find parameter ``name``; ``option`` is the decorator's option that asked for it."""
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError) as error:
        msg = (
            f"{option}=… cannot apply to {name_of(function)}, whose parameters Python does not know; "
            "write a function with named parameters around it"
        )
        raise ValueError(msg) from error
    parameter = parameters.get(name)
    if parameter is None or parameter.kind in _VARIADIC:
        named = [p.name for p in parameters.values() if p.kind not in _VARIADIC]
        msg = f"{option}=… names no parameter of {name_of(function)}; write one of {named}"
        raise ValueError(msg)
    positional = parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    earlier = itertools.takewhile(lambda p: p is not parameter, parameters.values())
    return ParameterSlot(
        name=name,
        position=list(parameters).index(name) if positional else None,
        keyword=parameter.kind is not inspect.Parameter.POSITIONAL_ONLY,
        default=MISSING if parameter.default is inspect.Parameter.empty else parameter.default,
        earlier_defaults=tuple(p.default for p in earlier),
    )


@dataclass(frozen=True)
class Forwarding:
    """Source text that takes a function's parameters exactly and hands them on.

    Attributes:
        parameters: What stands between the parentheses of the ``def``.
        call: What stands between those of the call.
        names: The parameters, in order, ``*args`` and ``**kwargs`` by their bare names.
        named: Those of them that are neither ``*args`` nor ``**kwargs``.
        defaults: Values for the names that stand for defaults in `parameters`.
    """

    parameters: str
    call: str
    names: tuple[str, ...]
    named: tuple[str, ...]
    defaults: dict[str, Any]


def forwarding(function: Callable[..., Any]) -> Forwarding:
    """Describe how to forward a call to ``function``; ``*args, **kwargs`` where its own signature is not known."""
    anything = inspect.signature(lambda *args, **kwargs: (args, kwargs)).parameters.values()
    try:
        parameters = [p for p in own_signature(function).parameters.values() if not _is_hidden(p, function)]
    except (ValueError, TypeError):
        return _describe(anything)
    if any(p.name.startswith("_opero_") or keyword.iskeyword(p.name) or not p.name.isidentifier() for p in parameters):
        return _describe(anything)
    return _describe(parameters)


def _is_hidden(parameter: inspect.Parameter, function: Callable[..., Any]) -> bool:
    """Whether a wrapper keeps something there for itself, by a default that the wrapped function does not know."""
    if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
        return False
    return hasattr(function, "__wrapped__") and parameter.name not in inspect.signature(function).parameters


def own_signature(function: Callable[..., Any]) -> inspect.Signature:
    """Not the signature of what it wraps: a wrapper in between may take other arguments.

    Raises:
        ValueError: If it is not known, as of some builtins.
    """
    return inspect.signature(_as_it_is(function), follow_wrapped=False)


def first_parameter(function: Callable[..., Any]) -> str | None:
    """The name of the first parameter of a ``def``; None of what is none, or has none."""
    function = inspect.unwrap(function)
    code = function.__code__ if isinstance(function, types.FunctionType) else None
    return None if code is None else next(iter(code.co_varnames[: code.co_argcount]), None)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without a ``__signature__`` that `functools.wraps` has copied from another one."""
    while isinstance(function, types.FunctionType) and (its := vars(function).get("__opero__")) is not None:
        if vars(function)["__wrapped__"] is not its.function:
            break
        # opero's own wrapper takes what the function takes.
        function = its.function
    if not (isinstance(function, types.FunctionType) and hasattr(function, "__wrapped__")):
        return function
    bare = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, function.__closure__)
    bare.__defaults__, bare.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return bare


class _Spelled:
    """Stands for a default in the text of a signature."""

    def __init__(self, parameter: inspect.Parameter) -> None:
        self.name = f"_opero_default_{parameter.name}"
        self.value = parameter.default

    def __repr__(self) -> str:
        return self.name


def _describe(parameters: Iterable[inspect.Parameter]) -> Forwarding:
    empty = inspect.Parameter.empty
    bare = [p.replace(annotation=empty, default=p.default if p.default is empty else _Spelled(p)) for p in parameters]
    prefixes: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return Forwarding(
        parameters=str(inspect.Signature(bare))[1:-1],
        call=", ".join(
            f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else f"{prefixes.get(p.kind, '')}{p.name}" for p in bare
        ),
        names=tuple(p.name for p in bare),
        named=tuple(p.name for p in bare if p.kind not in _VARIADIC),
        defaults={p.default.name: p.default.value for p in bare if p.default is not empty},
    )


def compile_function(source: str, name: str, namespace: dict[str, Any]) -> Callable[..., Any]:
    """Define function ``name`` by its source; ``namespace`` becomes its globals."""
    exec(compile(source, "<opero>", "exec"), namespace)  # noqa: S102 - the source is opero's own text and parameter names
    # Taken out again: a function among its own globals could be freed by the garbage collector only.
    function: Callable[..., Any] = namespace.pop(name)
    return function
