"""multiprocess' pools, as those of opero need them: nothing is left of them, however they begin and end."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from multiprocess import process as multiprocess_process
from multiprocess.pool import TERMINATE, Pool, ThreadPool

if TYPE_CHECKING:
    import threading


class WholePool(Pool):  # type: ignore[misc]  # multiprocess has no types
    """A pool of one process that starts no other when that has ended, and frees all it has when it is ended itself.

    It tidies up what it has made when the rest cannot be made.
    """

    _worker_handler: threading.Thread
    _task_handler: threading.Thread

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._made: list[Any] = []
        # A thread of the pool has it, and must not have the pool, which could not be collected.
        self.Process = partial(_make_only_one, self._made)  # pyright: ignore[reportAttributeAccessIssue] - in place of a method
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            self._undo()
            raise

    @property
    def process(self) -> Any:
        return self._made[0]

    def kill(self) -> None:
        """Kill its process; what else there is of the pool can be ended then."""
        self.process.kill()
        # As the thread that looks for dead processes does, unless it could not go on.
        self._taskqueue.put(None)

    def free(self) -> None:
        """Close what is open of a pool that has ended: only the garbage collector would, and late."""
        for queue in (self._inqueue, self._outqueue, self._change_notifier):
            queue.close()
        # Not by its own `close`, which fails where another thread or the system was told how it ended.
        self.process._popen.close()  # noqa: SLF001 - see above
        self.disown()

    def disown(self) -> None:
        """Forget the process, which would be ended with this one: as a forked child does, it is the parent's."""
        multiprocess_process._children.discard(self.process)  # noqa: SLF001 - there is no function for it

    def _undo(self) -> None:
        """End what runs of a half-made pool, of which a thread could not be started, for example."""
        _end_worker_handler(self)
        for process in self._made:
            if process.ident is not None:
                process.kill()
                process.join()
        _end_task_handler(self)


class WholeThreads(ThreadPool):  # type: ignore[misc]  # as above
    """A pool of threads that ends those that it has started when the rest cannot be started."""

    def __init__(self, nodes: int) -> None:
        try:
            super().__init__(nodes)
        except AttributeError as error:
            self._undo()
            # It has tried to terminate the threads, as if they were processes.
            raise error.__context__ or error from None
        except BaseException:
            self._undo()
            raise

    def end_when_idle(self) -> None:
        """Take no more work, and end with what there is, without the finalizer, in which Ctrl-C would be lost."""
        self.close()
        self._terminate.cancel()

    def _undo(self) -> None:
        _end_worker_handler(self)
        for _ in self._pool:
            self._inqueue.put(None)
        for thread in self._pool:
            thread.join()
        _end_task_handler(self)


def enter(pool: Any) -> Any:
    """Start a pool of twat-mp's; raises what has happened, which that would hide in an error of its own."""
    try:
        return pool.__enter__()
    except RuntimeError as error:
        failure = error.__cause__ or error
    raise failure


def _end_worker_handler(pool: Any) -> None:
    pool._state = TERMINATE  # noqa: SLF001 - as `Pool.terminate` does
    handler = pool.__dict__.get("_worker_handler")
    if handler is not None and handler.ident is not None:
        handler._state = TERMINATE  # noqa: SLF001 - as above
        pool._change_notifier.put(None)  # noqa: SLF001 - as above
        handler.join()


def _end_task_handler(pool: Any) -> None:
    handler = pool.__dict__.get("_task_handler")
    if handler is not None and handler.ident is not None:
        pool._taskqueue.put(None)  # noqa: SLF001 - as above
        handler.join()


def _make_only_one(made: list[Any], context: Any, *args: Any, **kwargs: Any) -> Any:
    if made:
        return _Nobody()
    made.append(context.Process(*args, **kwargs))
    return made[0]


class _Nobody:
    """What the pool has in place of the process that has ended; it looks to it like one that runs."""

    name = ""
    daemon = True
    exitcode = None

    def start(self) -> None:
        """There is nothing to start."""

    def terminate(self) -> None:
        """There is nothing to end."""

    def is_alive(self) -> bool:
        return False
