"""What tells calls apart that have limits, places and circuits of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opero.core.checks import check_callable
from opero.core.parameters import ParameterSlot
from opero.core.showing import kind_of, shown

if TYPE_CHECKING:
    from collections.abc import Callable


class Per:
    """The value of a call by the option ``per``: of a parameter, of several, or what a function makes of all of them.

    Attributes:
        get: Gives it, for positional and keyword arguments.
        parameters: The names of the parameters; None where a function decides.
    """

    __slots__ = ("get", "parameters")

    def __init__(self, function: Callable[..., Any], per: Any) -> None:
        self.get: Callable[[tuple[Any, ...], dict[str, Any]], Any]
        self.parameters: tuple[str, ...] | None = None
        if callable(per):
            made = check_callable("per", per, "a parameter's name, a tuple of names, or a function of the arguments")
            self.get = lambda args, kwargs: made(*args, **kwargs)
            return
        names: Any = per if isinstance(per, tuple) and per else (per,)
        if not all(isinstance(name, str) for name in names) or not all(names):
            msg = (
                f"per={shown(per)} is {kind_of(per)}; write a parameter's name, a tuple of names, or a function of the "
                "call's arguments"
            )
            raise TypeError(msg)
        self.parameters = names
        slots = [ParameterSlot(function, name, "per") for name in names]
        self.get = slots[0].get
        if len(slots) > 1:
            self.get = lambda args, kwargs: tuple([slot.get(args, kwargs) for slot in slots])

    def depends_on(self, parameter: str) -> bool:
        """Whether values of this parameter may be told apart."""
        return self.parameters is None or parameter in self.parameters
