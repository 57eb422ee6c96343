"""What opero needs to know of a function: its kind, its name, its parameters."""

from __future__ import annotations

import functools
import inspect
import keyword
import sys
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

_GENERATOR_TESTS = (inspect.isgeneratorfunction, inspect.isasyncgenfunction)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def through_partials(function: Any) -> Any:
    """What a partial, or a partial of one, was made of; anything else as it is."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a partial was made of, or the class of a callable object."""
    function = through_partials(function)
    return function if hasattr(function, "__qualname__") else type(function)


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
    while isinstance(function, functools.partial) and not hasattr(function, "__qualname__"):
        function = function.func
    return function if hasattr(function, "__qualname__") else type(function)


def is_async(function: Callable[..., Any]) -> bool:
    """Tell whether calling gives a coroutine: ``async def``, partials and bound methods of it, async ``__call__``."""
    function = through_partials(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004 - the method itself is looked at, not whether there is one


def check_decoratable(function: Any, decorator: str) -> None:
    """Refuse what the decorator could only get wrong later."""
    if isinstance(function, (classmethod, staticmethod)):
        kind = type(function).__name__
        msg = f"@{decorator} got a {kind} object; put @{decorator} below @{kind}"
        raise TypeError(msg)
    if isinstance(function, type) or not callable(function):
        what = f"the class {function.__qualname__}" if isinstance(function, type) else type(function).__qualname__
        msg = f"@{decorator} got {what}; it decorates functions and other callables that are not classes"
        raise TypeError(msg)
    bare = through_partials(function)
    method = getattr(bare, "__call__", None)  # noqa: B004 - the method itself is looked at, not whether there is one
    if any(is_generator(f) for f in (bare, method) for is_generator in _GENERATOR_TESTS):
        msg = (
            f"@{decorator} got the generator function {name_of(function)}; it cannot be run again once it has yielded. "
            "Decorate a function that returns, such as one that makes a single item"
        )
        raise TypeError(msg)


def refuse_awaitable(function: Callable[..., Any], result: Any) -> None:
    """Raise when a function that is not ``async def`` turned out to return something to await."""
    if hasattr(type(result), "__await__"):
        close = getattr(result, "close", None)
        if close is not None:
            close()
        msg = (
            f"{name_of(function)} returned {type(result).__name__}, an awaitable, but is not `async def`; "
            "write `async def` and await inside, so that opero can see the real result"
        )
        raise MisuseError(msg)


@dataclass(frozen=True)
class ParameterSlot:
    """Where the arguments of a call hold one named parameter."""

    name: str
    position: int | None
    keyword: bool
    default: Any

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value in this call, the default if none was passed, `MISSING` if there is none either."""
        if self.position is not None and self.position < len(args):
            return args[self.position]
        return kwargs.get(self.name, self.default) if self.keyword else self.default

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with another value for this parameter."""
        if self.position is not None and self.position < len(args):
            return (*args[: self.position], value, *args[self.position + 1 :]), kwargs
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
    return ParameterSlot(
        name=name,
        position=list(parameters).index(name) if positional else None,
        keyword=parameter.kind is not inspect.Parameter.POSITIONAL_ONLY,
        default=MISSING if parameter.default is inspect.Parameter.empty else parameter.default,
    )


@dataclass(frozen=True)
class Forwarding:
    """Source text that takes a function's parameters exactly and hands them on.

    Attributes:
        parameters: What stands between the parentheses of the ``def``.
        call: What stands between those of the call.
        packed: An expression for ``args, kwargs``.
        names: The parameters, in order, ``*args`` and ``**kwargs`` by their bare names.
        named: Those of them that are neither ``*args`` nor ``**kwargs``.
        variadic: Whether there is a ``*args`` or ``**kwargs`` among them.
        defaults: Values for the names that stand for defaults in `parameters`.
    """

    parameters: str
    call: str
    packed: str
    names: tuple[str, ...]
    named: tuple[str, ...]
    variadic: bool
    defaults: dict[str, Any]


_ANYTHING = Forwarding("*args, **kwargs", "*args, **kwargs", "args, kwargs", ("args", "kwargs"), (), True, {})  # noqa: FBT003 - a dataclass of text


def forwarding(function: Callable[..., Any]) -> Forwarding:
    """Describe how to forward a call to ``function``; ``*args, **kwargs`` where its own signature is not known."""
    try:
        parameters = list(own_signature(function).parameters.values())
    except (ValueError, TypeError):
        return _ANYTHING
    if any(p.name.startswith("_opero_") or keyword.iskeyword(p.name) or not p.name.isidentifier() for p in parameters):
        return _ANYTHING
    return _describe(parameters)


def own_signature(function: Callable[..., Any]) -> inspect.Signature:
    """Not the signature of what it wraps: a wrapper in between may take other arguments.

    Raises:
        ValueError: If it is not known, as of some builtins.
    """
    return inspect.signature(_as_it_is(function), follow_wrapped=False)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without a ``__signature__`` that `functools.wraps` has copied from another one."""
    if not (isinstance(function, types.FunctionType) and hasattr(function, "__wrapped__")):
        return function
    bare = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, function.__closure__)
    bare.__defaults__, bare.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return bare


def _describe(parameters: list[inspect.Parameter]) -> Forwarding:
    declared: list[str] = []
    positional: list[str] = []
    keywords: list[str] = []
    mapping: list[str] = []
    defaults: dict[str, Any] = {}
    kinds = [p.kind for p in parameters]
    for place, p in enumerate(parameters):
        text = ("*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else "") + p.name
        if p.default is not p.empty:
            text += f"=_opero_default_{p.name}"
            defaults[f"_opero_default_{p.name}"] = p.default
        if p.kind is p.KEYWORD_ONLY and p.VAR_POSITIONAL not in kinds and kinds.index(p.KEYWORD_ONLY) == place:
            declared.append("*")
        declared.append(text)
        if p.kind is p.POSITIONAL_ONLY and p.kind not in kinds[place + 1 :]:
            declared.append("/")
        if p.kind is p.KEYWORD_ONLY:
            keywords.append(f"{p.name}={p.name}")
            mapping.append(f"{p.name!r}: {p.name}")
        elif p.kind is p.VAR_KEYWORD:
            keywords.append(f"**{p.name}")
            mapping.append(f"**{p.name}")
        else:
            positional.append(f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name)
    packed = "".join(f"{name}, " for name in positional)
    return Forwarding(
        parameters=", ".join(declared),
        call=", ".join(positional + keywords),
        packed=f"({packed}), {{{', '.join(mapping)}}}",
        names=tuple(p.name for p in parameters),
        named=tuple(p.name for p in parameters if p.kind not in _VARIADIC),
        variadic=any(kind in _VARIADIC for kind in kinds),
        defaults=defaults,
    )


def compile_function(source: str, name: str, namespace: dict[str, Any]) -> Callable[..., Any]:
    """Define function ``name`` by its source; ``namespace`` becomes its globals."""
    exec(compile(source, "<opero>", "exec"), namespace)  # noqa: S102 - the source is opero's own text and parameter names
    # Taken out again: a function among its own globals could be freed by the garbage collector only.
    function: Callable[..., Any] = namespace.pop(name)
    return function
