"""Large arrays that all workers of a map need: in one file that each of them maps for itself."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pickle
    from collections.abc import Iterator

# Below that a pipe is as fast.
_LEAST_BYTES = 1_000_000
_ALIGNMENT = 64


class SharedBuffers:
    """Takes buffers out of a pickle (protocol 5) into a file; pickled only for a process that is being started.

    Their pages are shared by all workers until one writes to them, which the others do not see.
    """

    def __init__(self) -> None:
        self._taken: list[memoryview] = []
        self._spans: list[tuple[int, int]] = []
        self._arena: Any = None

    def take(self, buffer: pickle.PickleBuffer) -> bool:
        """As a pickler's ``buffer_callback``; true leaves it in the pickle."""
        if os.name != "posix" or memoryview(buffer).nbytes < _LEAST_BYTES:
            return True
        self._taken.append(buffer.raw())
        return False

    def share(self) -> None:
        """Write the file; multiprocessing chooses its place, in memory if there is room, and gives it no name."""
        if not self._taken:
            return
        from multiprocessing.heap import Arena

        end = 0
        for view in self._taken:
            self._spans.append((end, end + view.nbytes))
            end += view.nbytes + -view.nbytes % _ALIGNMENT
        self._arena = Arena(end)
        # Twice as fast as to write to the memory into which it is mapped.
        with open(self._arena.fd, "wb", closefd=False) as file:
            for view, (start, _) in zip(self._taken, self._spans, strict=True):
                file.seek(start)
                file.write(view)
        self._taken.clear()

    def views(self) -> Iterator[memoryview]:
        """The buffers, in the order in which they were taken; in a worker."""
        if self._arena is not None:
            mapped = memoryview(mmap.mmap(self._arena.fd, self._arena.size, flags=mmap.MAP_PRIVATE))
            for start, stop in self._spans:
                yield mapped[start:stop]
