"""Values that do not change, as frozen dataclasses, which `import opero` would be slow to make; what has no copies."""

from __future__ import annotations

from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


def itself(thing: T, _memo: object = None) -> T:
    """As ``__copy__`` and ``__deepcopy__``: a copy of what is alive, and shared, is the thing itself."""
    return thing


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Frozen:
    """A value with the attributes that its class annotates, which are given by keyword."""

    names: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        cls.names += tuple(cls.__annotations__)

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __setattr__(self, name: str, _value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be changed")

    def _values(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in self.names])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frozen) and other.__class__ is self.__class__ and other._values() == self._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in zip(self.names, self._values(), strict=True))
        return f"{type(self).__name__}({shown})"
