"""What of this program's main module its worker processes have."""

from __future__ import annotations

import ast
import contextlib
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# The second is its name in a process that has imported it again.
MAINS = ("__main__", "__mp_main__")


def names_in_fresh_workers() -> frozenset[str]:
    """Names of the main module that a process which is started afresh has, too."""
    return _names_bound(_path_of_main()) if is_imported_again() else frozenset()


def _path_of_main() -> Path | None:
    path = getattr(sys.modules["__main__"], "__file__", None)
    return None if path is None else Path(path)


def is_imported_again() -> bool:
    """Whether multiprocessing imports it in a process that is started afresh, as `spawn.prepare` there decides."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return spec.name != "__main__" and not spec.name.endswith(".__main__")
    path = _path_of_main()
    return path is not None and path.stem != "ipython" and path.exists()


@contextlib.contextmanager
def only_if_it_can_be_imported() -> Iterator[None]:
    """Let new processes import the main module only if its file is there; that of one that is read as input is not."""
    path, main = _path_of_main(), sys.modules["__main__"]
    # The debugger pdb forgets it, and multiprocessing looks at it.
    vars(main).setdefault("__spec__", None)
    hidden = {} if path is None or path.exists() else {"__file__": vars(main).pop("__file__")}
    try:
        yield
    finally:
        vars(main).update(hidden)


@lru_cache(maxsize=1)
def _names_bound(path: Path | None) -> frozenset[str]:
    """Names that the file binds where it is imported: not those below ``if __name__ == "__main__":``."""
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        if path is not None:
            return frozenset(_bound_in(ast.parse(path.read_bytes())))
    return frozenset()


def _bound_in(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield child.name
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif not (isinstance(child, ast.If) and "__name__" in ast.unparse(child.test)):
            yield from _bound_in(child)
