"""What travels between a map and its worker processes: the work, the batches, and the reports on them."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import pickle
import tempfile
from dataclasses import dataclass
from multiprocessing.context import get_spawning_popen
from multiprocessing.heap import Arena
from typing import TYPE_CHECKING, Any, TypeVar

import cloudpickle

from opero.concurrency.pickling import PLAIN, PROTOCOL, Pickler, loads, pack_error, report_dumps, unpack_error
from opero.concurrency.worker import Report, Work
from opero.core.signature import name_of
from opero.exceptions import NotTransferableError
from opero.utils.notes import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opero.concurrency.pool import Batch
    from opero.core.steps import TimeLimit

T = TypeVar("T")

# What a worker runs: the work of its maps, the initializer and its arguments, the finalizer.
WorkerLife = tuple[Work, "Callable[..., Any] | None", tuple[Any, ...], "Callable[[], Any] | None"]

_NOTHING = pickle.dumps(None, PROTOCOL)
# What a pickle that mentions the main module has in it.
_MENTIONS_MAIN = b"_main__"
_ALIGNMENT = 64


@dataclass(frozen=True)
class Packer:
    """Pickles what is sent to the workers of one pool; they have these names of the main module, or with None all.

    Its methods raise `NotTransferableError` if something cannot be pickled.
    """

    names: frozenset[str] | None = frozenset()

    def start(self, life: WorkerLife, large: list[memoryview] | None = None) -> bytes:
        """Pickle a map's work and what a worker does before and after it, for `unpack_start`.

        One pickler has all, so that functions share their globals there, as they do here. While a process is being
        started, ``large`` gets large arrays, and pipes and locks can be inherited.
        """
        work, initializer, initargs, finalizer = life
        pickler = Pickler(self.names, large=large)
        its = work.is_async, work.shape, work.slot
        the_initializer = f"the initializer {initializer and name_of(initializer)} or its initargs"
        for what, function, arguments in (
            (f"{name_of(work.function)} or its keyword arguments", work.function, its),
            (the_initializer, initializer, initargs),
            ("the finalizer", finalizer, ()),
        ):
            pickler.copies_locks = True
            _or_refuse(what, pickler.dump, function)
            pickler.copies_locks = False
            _or_refuse(what, pickler.dump, arguments)
        return pickler.file.getvalue()

    def arguments(self, work: Work) -> bytes:
        """Pickle what all calls of a map have in common, for workers that have the function."""
        what = f"the keyword arguments of {name_of(work.function)}"
        return _or_refuse(what, Pickler(self.names).dumps, work.shape)

    def batch(self, batch: Batch) -> bytes:
        """Pickle what a batch sends."""
        # Of several, each is tried alone.
        item, *candidate = batch.items[0] if batch.has_candidates else batch.items[:1]
        what = f"the item {type(item).__qualname__}"
        if candidate:
            what += f" or the candidate {type(candidate[0]).__qualname__}"
        data = _or_refuse(what, self.dumps, (batch.items, batch.time_limit))
        batch.size = len(data)
        return data

    def dumps(self, thing: Any) -> bytes:
        """Pickle it; in C alone if nothing in it has to go by value."""
        if self.names is None or not cloudpickle.list_registry_pickle_by_value():
            with contextlib.suppress(Exception):
                data = pickle.dumps(thing, PROTOCOL)
                if self.names is None or _MENTIONS_MAIN not in data:
                    return data
        return Pickler(self.names).dumps(thing)


def _or_refuse(what: str, pickle_it: Callable[[Any], T], thing: Any) -> T:
    try:
        return pickle_it(thing)
    except Exception as error:
        ways = "give what can be pickled, or use threads"
        raise NotTransferableError(f"{what} cannot be sent to a worker process: {describe(error)}; {ways}") from error


def unpack_start(data: bytes, buffers: Iterable[memoryview] = ()) -> WorkerLife:
    unpickler = pickle.Unpickler(io.BytesIO(data), buffers=buffers)  # noqa: S301 - made by `Packer.start`
    function, its, initializer, initargs, finalizer, _ = (unpickler.load() for _ in range(6))
    return Work(function, *its), initializer, initargs, finalizer


def unpack_batch(payload: bytes | memoryview) -> tuple[list[Any], TimeLimit | None] | Report:
    """Items and time limit; if an item cannot be unpickled, a report that says so and has no values."""
    try:
        items, limit = loads(payload)
    except Exception as error:  # noqa: BLE001 - anything may happen in a user's __setstate__
        return Report([], {0: NotTransferableError(f"the item cannot be unpickled: {describe(error)}")}, 0.0)
    return items, limit


@dataclass
class Start:
    """What a worker process begins with; ``life`` is packed while one is started, if it is not forked.

    Large arrays go to a file; its pages are shared by all workers until one writes to them, which the others do not
    see.

    ``levels``, ``filters``, ``environ``: those of the program's loggers and warnings, and its environment, where a
    worker has not got them yet.
    """

    packer: Packer
    life: WorkerLife | None
    levels: dict[str, int]
    filters: list[Any]
    environ: dict[str, str] | None
    packed: Any = None

    def __getstate__(self) -> dict[str, Any]:
        packed = self.packed
        if packed is None and self.life is not None:
            # Files that the process inherits are listed there; without any, others can be sent the same.
            inherited: Any = getattr(get_spawning_popen(), "_fds", [])
            count = len(inherited)
            large: list[memoryview] = []
            packed = self.packer.start(self.life, large), *_in_a_file(large)
            if len(inherited) == count:
                self.packed = packed
        return {**vars(self), "life": None, "packed": packed}

    def load(self) -> WorkerLife:
        """What it was made of, in a worker; one that was forked has it already."""
        if self.life is not None:
            return self.life
        data, file, spans = self.packed
        if file is None:
            return unpack_start(data)
        mapped = memoryview(mmap.mmap(file.fd, file.size, flags=mmap.MAP_PRIVATE))
        return unpack_start(data, (mapped[start:end] for start, end in spans))


def _in_a_file(large: list[memoryview]) -> tuple[Arena | None, list[tuple[int, int]]]:
    """Write them to a file that multiprocessing chooses, in memory if there is room; gives where each is there."""
    if not large:
        return None, []
    made: Any = arena(sum(view.nbytes + _ALIGNMENT for view in large))
    spans = []
    # Twice as fast as to write to the memory into which it is mapped.
    with open(made.fd, "wb", closefd=False) as file:
        for view in large:
            start = file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
            spans.append((start, start + file.write(view)))
    return made, spans


def arena(size: int) -> Arena:
    """Memory of multiprocessing for processes that it starts; a file where it finds no place, such as in AWS Lambda."""
    try:
        return Arena(size)
    except OSError:
        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            return Arena(size, os.dup(file.fileno()))


def pack_report(report: Report) -> bytes:
    """Pickle a worker's report; what cannot be pickled becomes the error of its item."""
    errors = {place: pack_error(error) for place, error in report.errors.items()}
    values, is_plain = report.values, PLAIN.issuperset(map(type, report.values))
    if not is_plain:
        # Each by itself: one that cannot be unpickled shall not take the others with it.
        values = [_NOTHING] * len(values)
        for place, value in enumerate(report.values):
            try:
                values[place] = report_dumps(value)
            except Exception as error:  # noqa: BLE001 - anything may happen in a user's __getstate__
                text = f"the result {type(value).__qualname__} cannot be pickled: {describe(error)}"
                errors[place] = pack_error(NotTransferableError(text))
    return pickle.dumps((values, is_plain, errors, report.seconds), PROTOCOL)


def unpack_report(payload: bytes | memoryview) -> Report:
    """What `pack_report` has packed; what cannot be unpickled here becomes the error of its item."""
    values, is_plain, errors, seconds = loads(payload)
    for place, data in errors.items():
        errors[place] = unpack_error(data)
    if not is_plain:
        for place, data in enumerate(values):
            try:
                values[place] = loads(data)
            except Exception as error:  # noqa: BLE001 - anything may happen in a user's __setstate__
                values[place] = None
                errors[place] = NotTransferableError(f"the result cannot be unpickled: {describe(error)}")
    return Report(values, errors, seconds, len(payload))
