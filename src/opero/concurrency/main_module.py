"""What of this program's main module its worker processes have."""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from opero.core.signature import find_by_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

# The second is its name in a process that has imported it again.
MAINS = ("__main__", "__mp_main__")
# Classes by their identity: they need not be hashable.
Classes = dict[int, type]


def unknown_to_fresh_workers() -> Callable[[str], bool] | None:
    """Tells of a qualified name of the main module whether a process that is started afresh has none such.

    None if such processes have them all.
    """
    if not _is_imported_again():
        return unknown
    guarded = _guarded_names(_path_of_main())
    return (lambda name: name.partition(".")[0] in guarded) if guarded else None


def is_surely_in_fresh_workers(name: str) -> bool:
    """Whether a process that is started afresh defines this qualified name of the main module in any case."""
    return _is_imported_again() and name.partition(".")[0] in _always_bound(_path_of_main())


def surely_nothing(_name: str) -> bool:
    """In place of that, for workers of which nothing is sure."""
    return False


def unknown(_name: str) -> bool:
    """Of workers that may have nothing of it."""
    return True


def find_in_main(qualname: str) -> Any:
    """What the main module has by that name; None if it has nothing."""
    return find_by_name("__main__", qualname)


def is_class_of_main(thing: Any) -> bool:
    return isinstance(thing, type) and is_in_main(thing)


def is_in_main(thing: Any) -> bool:
    return thing.__module__ in MAINS and find_in_main(thing.__qualname__) is thing


def note_class(cls: type, mentioned: Classes) -> type:
    """Note it, or the one that it is nested in; and tell which."""
    outermost = find_in_main(cls.__qualname__.partition(".")[0])
    noted = outermost if isinstance(outermost, type) else cls
    mentioned[id(noted)] = noted
    return noted


def globals_of_main() -> dict[str, Any]:
    """What functions of the main module have as globals.

    In a process that has imported it again these are not the module's own names but those that they were copied from.
    """
    main = sys.modules["__main__"]
    if main.__name__ == MAINS[1]:
        for function in _functions_in(vars(main)):
            names: dict[str, Any] = getattr(function, "__globals__", {})
            if names.get("__name__") == MAINS[1]:
                return names
    return vars(main)


def _functions_in(names: Mapping[str, Any]) -> Iterator[Any]:
    for value in names.values():
        if isinstance(value, type) and value.__module__ in MAINS:
            yield from _functions_in(vars(value))
        elif isinstance(value, FunctionType):
            yield inspect.unwrap(value)


def _is_imported_again() -> bool:
    """Whether multiprocessing imports it in a process that is started afresh, as `spawn.prepare` there decides."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name != "__main__" and not spec.name.endswith(".__main__")
    path = _path_of_main()
    return path is not None and path.stem != "ipython" and path.exists()


def _path_of_main() -> Path | None:
    path = getattr(sys.modules["__main__"], "__file__", None)
    return None if path is None else Path(path)


@contextlib.contextmanager
def only_if_it_can_be_imported() -> Iterator[None]:
    """Let new processes import the main module only if its file is there; that of one that is read as input is not."""
    path, main = _path_of_main(), sys.modules["__main__"]
    if path is None or path.exists():
        yield
        return
    named = main.__dict__.pop("__file__")
    try:
        yield
    finally:
        main.__file__ = named


@lru_cache(maxsize=1)
def _guarded_names(path: Path | None) -> frozenset[str]:
    """Names that are defined only where the file is run: below ``if __name__ == "__main__":``."""
    tree = _parsed(path)
    guards = [statement for statement in tree.body if isinstance(statement, ast.If) and _is_guard(statement.test)]
    guarded = {name for guard in guards for name in _defined(guard.body)}
    others = [statement for statement in tree.body if statement not in guards]
    return frozenset(guarded.difference(_defined(others)))


@lru_cache(maxsize=1)
def _always_bound(path: Path | None) -> frozenset[str]:
    """Names that the file binds under no condition, and nowhere else."""
    body = _parsed(path).body
    bound = Counter(name for statement in body for name in _bound(statement))
    elsewhere = Counter(
        name for statement in body for child in ast.walk(statement) for name in _bound(child) if child is not statement
    )
    return frozenset(bound - elsewhere)


def _parsed(path: Path | None) -> ast.Module:
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        if path is not None:
            return ast.parse(path.read_bytes())
    return ast.Module([], [])


def _bound(statement: ast.AST) -> Iterator[str]:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, ast.Assign):
        yield from (target.id for target in statement.targets if isinstance(target, ast.Name))


def _is_guard(test: ast.expr) -> bool:
    return {ast.unparse(side) for side in ast.walk(test)} >= {"__name__", "'__main__'"}


def _defined(statements: Iterable[ast.stmt]) -> Iterator[str]:
    for statement in statements:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield statement.name
        else:
            yield from _defined(child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt))
