"""The parameters of a function: where a call has one of them, and how source text hands them all on."""

from __future__ import annotations

import contextlib
import inspect
import keyword
import types
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from opero.core.checks import check_callable, wrong_type
from opero.core.control import decoration_of
from opero.core.signature import MISSING, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_VARIADIC: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_PLACED = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}


class ParameterSlot:
    """Where the arguments of a call hold one named parameter.

    Raises:
        ValueError: If there is no parameter ``name``; ``option`` is the decorator's option that asked for it.
    """

    def __init__(self, function: Callable[..., Any], name: str, option: str) -> None:
        try:
            parameters = inspect.signature(function).parameters
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{option}=… cannot apply to {name_of(function)}, whose parameters Python does not know; "
                "write a function with named parameters around it"
            ) from error
        parameter = parameters.get(name)
        if parameter is None or parameter.kind in _VARIADIC:
            named = [p.name for p in parameters.values() if p.kind not in _VARIADIC]
            raise ValueError(f"{option}=… names no parameter of {name_of(function)}; write one of {named}")
        place = list(parameters).index(name)
        self.name = name
        self.position = None if parameter.kind is parameter.KEYWORD_ONLY else place
        self.keyword = parameter.kind is not parameter.POSITIONAL_ONLY
        self.default = MISSING if parameter.default is parameter.empty else parameter.default
        self.earlier_defaults = tuple(p.default for p in parameters.values())[:place]

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value in this call, the default if none was passed, `MISSING` if there is none either."""
        if self.position is not None and self.position < len(args):
            return args[self.position]
        return kwargs.get(self.name, self.default) if self.keyword else self.default

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with another value for this parameter, if there is one."""
        if value is MISSING:
            return args, kwargs
        if self.position is not None and self.position < len(args):
            return (*args[: self.position], value, *args[self.position + 1 :]), kwargs
        if self.position is not None and not self.keyword:
            return (*args, *self.earlier_defaults[len(args) :], value), kwargs
        return args, {**kwargs, self.name: value} if kwargs else {self.name: value}


def asked_of_call(
    function: Callable[..., Any], asked: Callable[..., Any]
) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Hands the arguments of a call to ``asked``, in the first of these ways in which it takes them.

    As the call has them; in the places that they have for ``function``, unless it has other ones of these names; by
    their names.
    """
    try:
        theirs, ours = inspect.signature(asked), inspect.signature(function)
    except (ValueError, TypeError):  # not known, as of some builtins
        return lambda args, kwargs: asked(*args, **kwargs)
    places, their_places = ([p for p in s.parameters.values() if p.kind in _PLACED] for s in (ours, theirs))
    names = [p.name for p in places]
    # An option, or what is also called so in ``function``, is meant for the parameter of its name.
    fits = [
        p.name == name or (p.name not in names and p.default is p.empty)
        for p, name in zip(their_places, names, strict=False)
    ]

    @lru_cache(maxsize=64)
    def takes(count: int, *by_name: str) -> bool:
        try:
            theirs.bind(*[None] * count, **dict.fromkeys(by_name))
        except TypeError:
            return False
        return True

    def of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not takes(len(args), *kwargs):
            bound = ours.bind(*args, **kwargs)
            by_name = {**dict(zip(names, bound.args, strict=False)), **bound.kwargs}
            if all(fits[: len(bound.args)]) and takes(len(bound.args), *bound.kwargs):
                args, kwargs = bound.args, bound.kwargs
            elif takes(0, *by_name):
                args, kwargs = (), by_name
        return asked(*args, **kwargs)

    return of_call


class Per:
    """The value of a call by the option ``per``: of a parameter, of several, or what a function makes of all of them.

    Attributes:
        get: Gives it, for positional and keyword arguments.
        parameters: The names of the parameters; None where a function decides.
    """

    def __init__(self, function: Callable[..., Any], per: Any) -> None:
        self.get: Callable[[tuple[Any, ...], dict[str, Any]], Any]
        self.parameters: tuple[str, ...] | None = None
        if callable(per):
            made = check_callable("per", per, "a parameter's name, a tuple of names, or a function of the arguments")
            self.get = asked_of_call(function, made)
            return
        names: Any = per if isinstance(per, tuple) and per else (per,)
        if not all(isinstance(name, str) for name in names) or not all(names):
            raise wrong_type("per", per, "a parameter's name, a tuple of names, or a function of the call's arguments")
        self.parameters = names
        slots = [ParameterSlot(function, name, "per") for name in names]
        self.get = slots[0].get
        if len(slots) > 1:
            self.get = lambda args, kwargs: tuple([slot.get(args, kwargs) for slot in slots])

    def depends_on(self, parameter: str) -> bool:
        """Whether values of this parameter may be told apart."""
        return self.parameters is None or parameter in self.parameters


class Forwarding:
    """How source text takes a function's parameters exactly, and hands them on.

    Where its own signature is not known, or cannot be written, they are ``*args, **kwargs``.

    Attributes:
        parameters: What stands between the parentheses of the ``def``; there each default is None.
        call: What stands between those of the call.
        names: The parameters, in order, ``*args`` and ``**kwargs`` by their bare names.
        named: Those of them that are neither ``*args`` nor ``**kwargs``.
        defaults: By the names of their parameters.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        parameters = inspect.signature(lambda *args, **kwargs: (args, kwargs)).parameters
        with contextlib.suppress(ValueError, TypeError):
            own = own_signature(function).parameters
            if all(n.isidentifier() and not keyword.iskeyword(n) and not n.startswith("_opero_") for n in own):
                parameters = own
        self.names = tuple(parameters)
        self.named = tuple(p.name for p in parameters.values() if p.kind not in _VARIADIC)
        self.defaults = {p.name: p.default for p in parameters.values() if p.default is not p.empty}
        bare = [
            p.replace(annotation=p.empty, default=None if p.name in self.defaults else p.empty)
            for p in parameters.values()
        ]
        self.parameters = str(inspect.Signature(bare))[1:-1]
        self.call = ", ".join(
            f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else f"{_VARIADIC.get(p.kind, '')}{p.name}" for p in bare
        )

    def compiled(self, lines: Iterable[str], namespace: dict[str, Any]) -> Callable[..., Any]:
        """A function of these parameters with this body; ``namespace`` becomes its globals."""
        source = "\n    ".join([f"def made({self.parameters}):", *lines])
        exec(compile(source, "<opero>", "exec"), namespace)  # noqa: S102 - opero's own text and names of parameters
        # Taken out again: a function among its own globals could be freed by the garbage collector only.
        made: Any = namespace.pop("made")
        positional = len(made.__defaults__ or ())
        made.__defaults__ = tuple(self.defaults.values())[:positional]
        made.__kwdefaults__ = {name: self.defaults[name] for name in made.__kwdefaults__ or ()}
        function: Callable[..., Any] = made
        return function


def undecorated(function: Any) -> Any:
    """What opero has decorated; anything else as it is, such as what others have put around that."""
    while (its := decoration_of(function)) is not None and getattr(function, "__wrapped__", None) is its.plan.function:
        function = its.plan.function
    return function


def own_signature(function: Callable[..., Any]) -> inspect.Signature:
    """Not the signature of what it wraps: a wrapper in between may take other arguments.

    Raises:
        ValueError: If it is not known, as of some builtins.
    """
    # opero's own wrapper takes what the function takes.
    function = undecorated(function)
    if isinstance(function, types.FunctionType) and hasattr(function, "__wrapped__"):
        # Without a `__signature__` that `functools.wraps` has copied from another one.
        bare = types.FunctionType(function.__code__, {}, function.__name__, function.__defaults__, function.__closure__)
        bare.__kwdefaults__ = function.__kwdefaults__
        function = bare
    return inspect.signature(function, follow_wrapped=False)


def first_parameter(function: Callable[..., Any]) -> str | None:
    """The name of the first parameter of a ``def``; None of what is none, or has none."""
    function = inspect.unwrap(function)
    code = function.__code__ if isinstance(function, types.FunctionType) else None
    return None if code is None else next(iter(code.co_varnames[: code.co_argcount]), None)
