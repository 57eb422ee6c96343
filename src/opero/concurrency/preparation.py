"""What a worker process calls before its first item, and how that travels."""

from __future__ import annotations

import contextlib
import io
import pickle
from typing import TYPE_CHECKING, Any

from opero.concurrency.transport import ByValue, refusing
from opero.core.signature import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opero.concurrency.transport import Packer


class Preparation:
    """An initializer and its arguments; pickled, they can be used only by a process that is being started."""

    def __init__(self, packer: Packer, initializer: Callable[..., Any], initargs: tuple[Any, ...]) -> None:
        self._packer = packer
        self._initializer = initializer
        self._initargs = initargs

    def __reduce__(self) -> Any:
        return PackedPreparation, (self.pack(),)

    def run(self) -> None:
        self._initializer(*self._initargs)

    def pack(self) -> bytes:
        """Pickle it, with what can only be inherited, such as locks.

        Raises:
            NotTransferableError: If it cannot be pickled.
        """
        mentioned: dict[int, type] = {}
        with refusing(f"the initializer {name_of(self._initializer)} or its initargs"), _starting_a_process():
            function = self._packer.function(self._initializer, mentioned, prepares=True)
            try:
                return self._packer.dumps((function, self._initargs), mentioned, _reducers_for_start())
            except Exception:  # noqa: BLE001 - dill can more
                return self._packer.dumps((function, _by_dill(self._initargs)), mentioned)


class PackedPreparation:
    """The same in a worker that was started afresh."""

    def __init__(self, packed: bytes) -> None:
        self._packed = packed

    def run(self) -> None:
        function, initargs = pickle.loads(self._packed)  # noqa: S301 - made by `Preparation.pack`
        function.load()(*(initargs.load() if isinstance(initargs, ByValue) else initargs))


AnyPreparation = Preparation | PackedPreparation


@contextlib.contextmanager
def _starting_a_process() -> Iterator[None]:
    """Let what can only be inherited know that a process is started, whichever library starts it."""
    import multiprocessing.context

    import multiprocess.context

    standard, its_own = multiprocessing.context, multiprocess.context
    before: Any = standard.get_spawning_popen()
    # If none is being started, it is only asked whether this can be pickled.
    started: Any = before or its_own.get_spawning_popen() or _NotStarted()
    standard.set_spawning_popen(started)
    try:
        yield
    finally:
        standard.set_spawning_popen(before)


class _NotStarted:
    """In place of the process that is being started."""

    DupFd = int

    def duplicate_for_child(self, file: int) -> int:
        return file


def _reducers_for_start() -> Any:
    from multiprocessing.reduction import ForkingPickler

    return ForkingPickler(io.BytesIO()).dispatch_table


def _by_dill(initargs: tuple[Any, ...]) -> ByValue:
    from multiprocess.reduction import ForkingPickler

    return ByValue(bytes(ForkingPickler.dumps(initargs)))
