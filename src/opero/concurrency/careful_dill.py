"""dill, as `by_value` needs it: what it cannot copy is an error, and nothing of the process is changed meanwhile.

dill (0.4.1) only warns of what it cannot copy, and sends a name that the worker may not have. To know the globals that
a function uses it lets `dis` print, to a ``sys.stdout`` that it puts there for all threads: what others print meanwhile
is lost, and two that pickle at once can leave the wrong one there for good. Delete the one or the other when a
release raises or looks without printing.
"""

from __future__ import annotations

import contextlib
import dis
import pickle
import threading
import warnings
from types import CodeType
from typing import TYPE_CHECKING, Any

import dill

if TYPE_CHECKING:
    from collections.abc import Iterator


def globals_used(code: CodeType) -> set[str]:
    """The names of globals that a function and those defined in it read, set or delete."""
    nested = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return _globals_in(code).union(*map(globals_used, nested))


def _globals_in(code: CodeType) -> set[str]:
    return {step.argval for step in dis.get_instructions(code) if step.opname.endswith("_GLOBAL")}


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Where dill would warn in this thread, raise."""
    before = getattr(_here, "raises", False)
    _here.raises = True
    try:
        yield
    finally:
        _here.raises = before


class _Warnings:
    """In place of the module that dill warns by."""

    def warn(self, message: Any, category: type[Warning] = UserWarning, stacklevel: int = 1, **others: Any) -> None:
        if getattr(_here, "raises", False) and issubclass(category, dill.PicklingWarning):
            raise pickle.PicklingError(str(message))
        warnings.warn(message, category, stacklevel + 1, **others)

    def __getattr__(self, name: str) -> Any:
        return getattr(warnings, name)


def _globals_of(function: Any, recurse: bool = True) -> list[str]:  # noqa: FBT001, FBT002 - as dill calls it
    code = dill.detect.code(function)
    if code is None:
        return []
    return list(globals_used(code) if recurse else _globals_in(code))


_here = threading.local()
dill._dill.warnings = _Warnings()  # noqa: SLF001 - see above
dill.detect.nestedglobals = _globals_of
