"""Maps in workers of somebody else: any `concurrent.futures.Executor` as a mode."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import loky
import pytest
from side_by_side import forked, hang, until

from opero import CallStats, OperoError, WorkerCrashedError, opmap
from opero.concurrency import get_parallel_executor, get_parallel_map_decorator
from opero.core import CallTimeoutError, NotTransferableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 20.0


def standard_processes() -> Executor:
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("forkserver"))


def loky_processes() -> Executor:
    executor: Executor = loky.ProcessPoolExecutor(2, timeout=60)
    return executor


def reusable_loky() -> Executor:
    executor: Executor = loky.get_reusable_executor(2, timeout=60)
    return executor


class Kind:
    """One kind of executor, with two workers."""

    def __init__(self, make: Callable[[], Executor], *, shares_memory: bool = False) -> None:
        self.make = make
        self.shares_memory = shares_memory
        self._given: Executor | None = None

    def given(self) -> Executor:
        """An executor that the tests share: for what leaves it as it is."""
        if self._given is None or self.make is reusable_loky:
            self._given = self.make()
        return self._given

    def close(self) -> None:
        if self._given is not None:
            self._given.shutdown(wait=True)
        self._given = None

    @staticmethod
    def map(function: Any, mode: Any, **options: Any) -> Any:
        return opmap(**{"mode": mode, "progress": False, "retries": 0, "return_exceptions": True, **options})(function)


KINDS = {
    "threads": (lambda: ThreadPoolExecutor(2), True),
    "processes": (standard_processes, False),
    "loky": (loky_processes, False),
    "reusable loky": (reusable_loky, False),
}
PROCESS_KINDS = ["processes", "loky"]


@pytest.fixture(scope="module")
def kinds() -> Iterator[dict[str, Kind]]:
    kinds = {name: Kind(make, shares_memory=shares_memory) for name, (make, shares_memory) in KINDS.items()}
    yield kinds
    for kind in kinds.values():
        kind.close()


@pytest.fixture(params=KINDS)
def kind(kinds: dict[str, Kind], request: pytest.FixtureRequest) -> Kind:
    return kinds[request.param]


@pytest.fixture(params=PROCESS_KINDS)
def processes(kinds: dict[str, Kind], request: pytest.FixtureRequest) -> Kind:
    return kinds[request.param]


@pytest.fixture
def breaking(kinds: dict[str, Kind]) -> Kind:
    """For what follows from a crash: how the others tell of it is tested where it is looked at for the first time."""
    return kinds["processes"]


@pytest.fixture
def threads(kinds: dict[str, Kind]) -> Kind:
    return kinds["threads"]


def double(item):
    return item * 2


class SpoiledError(Exception):
    """A user's error."""


# An executor that is given, and one that is made


def test_a_given_executor_runs_the_items_and_stays_open(kind, world):
    executor = kind.given()
    mapped = kind.map(world.define(double), executor)
    assert mapped.run(range(300)) == [n * 2 for n in range(300)]
    assert mapped.run(range(3)) == [0, 2, 4]
    assert executor.submit(double, 4).result(PATIENCE) == 8


@pytest.mark.skipif(sys.version_info < (3, 14), reason="has no interpreters beside the main one")
def test_interpreters_run_the_items():
    with concurrent.futures.InterpreterPoolExecutor(2) as executor:
        assert Kind.map(math.sqrt, executor)([4, 9, -1])[:2] == [2, 3]
        assert Kind.map(lambda item: item * 2, executor)([4, 9]) == [8, 18]


# Whose executor it is, is the same in both worlds, and each of loky's costs a second.
@pytest.mark.parametrize(
    ("kind", "world"),
    [("threads", "sync"), ("threads", "async"), ("processes", "async"), ("loky", "sync"), ("reusable loky", "sync")],
    indirect=True,
)
def test_a_function_makes_an_executor_for_each_map_and_the_map_shuts_it_down(kind, world):
    made = []

    def make():
        made.append(kind.make())
        return made[-1]

    mapped = kind.map(world.define(double), make)
    assert made == []
    assert mapped.run(range(300)) == [n * 2 for n in range(300)]
    assert mapped.run([1]) == [2]
    assert len(made) == 2
    for executor in made:
        with pytest.raises(RuntimeError):
            executor.submit(double, 4)


def test_the_class_of_an_executor_makes_one(world):
    assert Kind.map(world.define(double), ThreadPoolExecutor).run([1, 2]) == [2, 4]


def test_the_workers_are_those_of_the_executor(processes, world):
    executor = processes.given()
    theirs = {executor.submit(os.getpid).result(PATIENCE) for _ in range(20)}
    pids = set(processes.map(world.define(lambda _: os.getpid()), executor).run(range(50)))
    assert os.getpid() not in pids
    assert pids & theirs
    assert len(pids | theirs) <= 2


def test_the_functions_of_a_map_without_policies_take_an_executor(threads):
    executor = threads.given()
    assert get_parallel_executor(executor)(double, [1, 2]) == [2, 4]
    assert get_parallel_map_decorator(executor)(double)([1, 2]) == [2, 4]


# The same policies, batches and outcomes


def test_a_failed_item_is_its_exception(kind, world):
    def work(item):
        if item == 1:
            raise SpoiledError(item)
        return item

    first, failed, last = kind.map(world.define(work), kind.given()).run(range(3))
    assert (first, last) == (0, 2)
    assert type(failed).__name__ == "SpoiledError"
    assert failed.args == (1,)


def test_a_failed_item_is_tried_again(kind, world, journal):
    def work(item):
        journal.add(item)
        if journal.lines().count(str(item)) < 3:
            raise OSError(item)
        return item

    mapped = kind.map(world.define(work), kind.given(), retries=3, min_delay=0.01)
    assert mapped.run([1, 2]) == [1, 2]
    assert mapped.stats.snapshot() == CallStats(calls=2, attempts=6, retries=4)


def test_candidates_and_arguments_reach_the_workers(kind, world):
    def work(item, *, key, more):
        if key == "bad":
            raise OSError(item)
        return item, key, more

    mapped = kind.map(world.define(work), kind.given(), arg_fallback="key")
    assert mapped.run([1, 2], key=["bad", "good"], more="m") == [(1, "good", "m"), (2, "good", "m")]


def test_equal_items_run_once(kind, world, journal):
    def work(item):
        journal.add(item)
        return item

    mapped = kind.map(world.define(work), kind.given(), cache=True)
    assert mapped.run([1, 2, 1, 2]) == [1, 2, 1, 2]
    assert sorted(journal.lines()) == ["1", "2"]


def test_an_attempt_timeout_ends_a_coroutine(kind):
    async def work(item):
        if item:
            await asyncio.Event().wait()
        return item

    fine, late = kind.map(work, kind.given(), attempt_timeout=0.2).run([0, 1])
    assert fine == 0
    assert isinstance(late, CallTimeoutError)


def test_an_attempt_timeout_of_a_def_function_is_refused(threads):
    with pytest.raises(ValueError, match="cannot be stopped"):
        threads.map(double, threads.given(), attempt_timeout=1)


def test_threads_see_the_context_variables_of_the_caller(threads, world):
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("set")
    assert threads.map(world.define(lambda _: variable.get()), threads.given()).run([1]) == ["set"]


def test_what_cannot_be_pickled_reaches_threads(threads, world):
    lock = threading.Lock()
    assert threads.map(world.define(lambda item: (item, lock)), threads.given()).run([lock]) == [(lock, lock)]


class Inline(Executor):
    """The smallest executor there can be."""

    def submit(self, fn, /, *args, **kwargs):
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def test_an_executor_may_run_in_the_calling_thread():
    here = threading.get_ident()
    assert Kind.map(lambda _: threading.get_ident(), Inline()).run([1, 2]) == [here, here]


# How many batches


class Counting(ThreadPoolExecutor):
    """Notes how many calls it has at the same time."""

    def __init__(self, size):
        super().__init__(size)
        self.now = self.most = 0
        self._counting = threading.Lock()

    def submit(self, fn, /, *args, **kwargs):
        with self._counting:
            self.now += 1
            self.most = max(self.most, self.now)
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(self._leaves)
        return future

    def _leaves(self, _future):
        with self._counting:
            self.now -= 1


@pytest.mark.parametrize(("size", "workers", "expected"), [(3, None, 3), (5, 2, 2), (2, 4, 4)])
def test_workers_says_how_many_batches_are_in_the_executor(world, size, workers, expected):
    with Counting(size) as executor:
        Kind.map(world.define(double), executor, workers=workers).run(range(2000))
        assert executor.most == expected


def test_an_executor_that_does_not_tell_its_size_gets_a_batch_for_each_cpu(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3}, raising=False)
    with Counting(8) as threads:
        executor = Executor()
        executor.submit = threads.submit
        Kind.map(double, executor).run(range(2000))
    assert threads.most == 3


# Crashes


def die():
    os.kill(os.getpid(), signal.SIGKILL)


EACH_KIND_AND_BOTH_WORLDS = pytest.mark.parametrize(
    ("processes", "world"), [("processes", "sync"), ("processes", "async"), ("loky", "sync")], indirect=True
)


@EACH_KIND_AND_BOTH_WORLDS
def test_only_the_item_that_kills_its_worker_is_charged(processes, world):
    def work(item):
        if item == 3:
            die()
        return item * 2

    results = processes.map(world.define(work), processes.make).run(range(8))
    assert isinstance(results.pop(3), WorkerCrashedError)
    assert results == [0, 2, 4, 8, 10, 12, 14]


def test_innocent_items_of_large_batches_are_unharmed(breaking):
    def work(item):
        if item == 700:
            die()
        return item

    results = breaking.map(work, breaking.make).run(range(1000))
    assert isinstance(results.pop(700), WorkerCrashedError)
    assert results == [n for n in range(1000) if n != 700]


def test_an_item_that_runs_beside_a_crash_is_run_again_alone_and_not_charged(breaking, journal):
    """Each waits for the other, so that both are in the executor when it breaks."""

    def work(item):
        journal.add(f"{item} begins")
        first_time = journal.lines().count(f"{item} begins") == 1
        if first_time:
            until(lambda: {"bad begins", "good begins"} <= set(journal.lines()))
        if item == "bad":
            die()
        if first_time:
            hang()  # it dies with its executor
        journal.add(f"{item} ends")
        return item

    bad, good = breaking.map(work, breaking.make, workers=2).run(["bad", "good"])
    assert isinstance(bad, WorkerCrashedError)
    assert good == "good"
    together, again = journal.lines()[:2], journal.lines()[2:]
    assert sorted(together) == ["bad begins", "good begins"]
    assert sorted(again) == ["bad begins", "good begins", "good ends"]
    assert again.index("good ends") - again.index("good begins") == 1


class LosesABatch(ThreadPoolExecutor):
    """Loses a batch and nothing else, as dask does with a worker that died, while item 1 runs."""

    def __init__(self):
        super().__init__(2)
        self.lost: list[int] = []
        self.sent_again_beside_another: list[int] = []
        self.running: Future[Any] | None = None

    def submit(self, fn, /, *args, **kwargs):
        items = args[1] if len(args) > 1 else []
        if self.running and not self.lost and len(items) > 1:
            self.lost = items
            future: Future[Any] = Future()
            future.set_exception(OSError("the worker has gone"))
            return future
        if self.running and not self.running.done():
            self.sent_again_beside_another += [item for item in items if item in self.lost]
        future = super().submit(fn, *args, **kwargs)
        if items == [1]:
            self.running = future
        return future


def test_what_was_lost_is_sent_again_when_nothing_else_is_in_the_executor(threads):
    """Whoever ran beside a crash could be charged with it."""
    with LosesABatch() as executor:
        results = threads.map(lambda item: time.sleep(0.2) if item == 1 else item, executor).run(range(20))
    assert results == [0, None, *range(2, 20)]
    assert len(executor.lost) > 1
    assert executor.sent_again_beside_another == []


class OneForAll:
    """Gives one executor as long as that takes work, as loky's `get_reusable_executor` does."""

    def __init__(self):
        self._executor = None

    def __call__(self):
        if self._executor is None or self._executor._shutdown:
            self._executor = ThreadPoolExecutor(2)
        return self._executor

    def shut_down(self):
        self._executor.shutdown()


@pytest.mark.parametrize("make", [reusable_loky, OneForAll()], ids=["reusable loky", "threads"])
def test_maps_whose_functions_give_the_same_executor_do_not_end_it_for_each_other(make):
    first, second = Kind.map(abs, make), Kind.map(abs, make)
    for _ in range(2):
        one, other = first.stream(itertools.count()), second.stream(range(50))
        assert next(one).result == next(other).result == 0
        one.close()
        assert [outcome.result for outcome in other] == list(range(1, 50))


def test_an_executor_that_somebody_shuts_down_is_made_anew():
    make = OneForAll()
    stream = Kind.map(abs, make).stream(range(2_000))
    assert next(stream).result == 0
    make.shut_down()
    assert [outcome.result for outcome in stream] == list(range(1, 2_000))


def test_a_crash_is_retried_like_any_error(breaking, journal):
    def work(item):
        journal.add(item)
        if item == 1 and journal.lines().count("1") <= 2:
            die()
        return item

    mapped = breaking.map(work, breaking.make, retries=2, min_delay=0.01)
    seen = list(mapped.stream(range(3)))
    assert [outcome.result for outcome in seen] == [0, 1, 2]


def test_a_crash_costs_one_attempt(breaking):
    mapped = breaking.map(lambda _: die(), breaking.make, retries=1, min_delay=0.01)
    (outcome,) = mapped.stream([1])
    assert isinstance(outcome.error, WorkerCrashedError)
    assert outcome.attempts == 2
    assert mapped.stats.snapshot() == CallStats(calls=1, attempts=2, retries=1, failures=1)


def test_a_map_whose_every_item_crashes_ends():
    results = Kind.map(lambda _: die(), standard_processes).run(range(5))
    assert [type(result) for result in results] == [WorkerCrashedError] * 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_what_is_no_exception_is_charged_to_its_item(processes, world, error):
    def work(item):
        if item == 3:
            raise error
        return item

    results = processes.map(world.define(work), processes.given()).run(range(6))
    assert isinstance(results.pop(3), WorkerCrashedError)
    assert results == [0, 1, 2, 4, 5]


class BreaksSilently(ThreadPoolExecutor):
    """Says that it is broken only to whoever submits more than two."""

    def __init__(self):
        super().__init__(2)
        self._left = 2

    def submit(self, function, /, *args, **kwargs):
        self._left -= 1
        if self._left < 0:
            raise BrokenExecutor("a child process ended")
        return super().submit(function, *args, **kwargs)


def test_a_given_executor_that_is_found_broken_when_more_is_submitted_ends_the_map(world):
    with BreaksSilently() as executor, pytest.raises(OperoError, match="a function that makes the executor"):
        opmap(mode=executor, progress=False)(world.define(abs)).run(range(1_000))


def test_exit_in_a_thread_belongs_to_the_caller(threads, world):
    with pytest.raises(SystemExit):
        threads.map(world.define(lambda _: sys.exit(3)), threads.given()).run([1])


@EACH_KIND_AND_BOTH_WORLDS
def test_a_given_executor_that_breaks_ends_the_map_with_an_error(processes, world, journal):
    def work(item):
        journal.add(item)
        if item == 50:
            die()
        return item

    with (
        processes.make() as executor,
        pytest.raises(OperoError, match="a function that makes the executor") as caught,
    ):
        processes.map(world.define(work), executor, retries=3).run(range(100))
    assert not isinstance(caught.value, WorkerCrashedError)
    assert caught.value.__cause__ is not None


def test_an_executor_that_broke_before_the_map_is_told_apart():
    executor = standard_processes()
    with contextlib.suppress(Exception):
        executor.submit(die).result(PATIENCE)
    with pytest.raises(OperoError, match="a function that makes the executor"):
        Kind.map(double, executor).run([1])
    executor.shutdown()


def test_an_executor_that_breaks_while_it_is_idle_harms_nobody(journal):
    executors = []

    def make():
        executors.append(standard_processes())
        return executors[-1]

    def items():
        yield from range(4)
        until(lambda: len(journal.lines()) == 4)
        time.sleep(0.1)  # the last report is on its way
        for pid in list(executors[-1]._processes):
            os.kill(pid, signal.SIGKILL)
        until(lambda: executors[0]._broken)
        yield from range(4, 8)

    def work(item):
        journal.add(item)
        time.sleep(0.02)  # so that each travels by itself
        return item

    assert Kind.map(work, make)(items()) == list(range(8))
    assert sorted(journal.lines()) == [str(n) for n in range(8)]
    assert len(executors) == 2


def fail_to_start():
    raise SpoiledError("no")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("make", [ProcessPoolExecutor, loky.ProcessPoolExecutor], ids=["processes", "loky"])
def test_executors_that_always_break_at_once_raise(make):
    with pytest.raises(OperoError, match="break before they run anything"):
        Kind.map(double, lambda: make(1, initializer=os._exit, initargs=(1,))).run([1, 2])


# What travels to other processes


class Heavy:
    """Notes in which process it is unpickled."""

    def __init__(self, journal):
        self.journal = journal
        self.ballast = os.urandom(100_000)

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.journal.add(os.getpid())


def test_a_function_travels_once_to_each_worker(processes, journal):
    heavy = Heavy(journal)

    def work(item):
        time.sleep(0.002)
        return item, len(heavy.ballast), os.getpid()

    results = processes.map(work, processes.given()).run(range(200))
    assert [(item, size) for item, size, _ in results] == [(n, 100_000) for n in range(200)]
    assert set(Counter(journal.lines()).values()) == {1}
    assert {pid for _, _, pid in results} == {int(line) for line in journal.lines()}


def test_an_item_that_cannot_travel_is_an_error_and_harms_no_other(kind, world):
    results = kind.map(world.define(lambda item: 1), kind.given()).run([1, threading.Lock(), 2, 3])
    travels = kind.shares_memory
    assert [isinstance(result, NotTransferableError) for result in results] == [False, not travels, False, False]


class RefusesToLoad:
    """Can be pickled and not unpickled."""

    def __reduce__(self):
        return fail_to_load, ()


def fail_to_load():
    raise SpoiledError("cannot be loaded")


def test_an_item_that_cannot_be_unpickled_is_an_error_with_the_text(processes, world):
    results = processes.map(world.define(lambda item: 1), processes.given()).run([1, 2, RefusesToLoad(), 3])
    assert isinstance(results[2], NotTransferableError)
    assert "cannot be loaded" in str(results.pop(2))
    assert results == [1, 1, 1]


def test_results_that_cannot_travel_are_errors_and_harm_no_other(processes, world):
    def work(item):
        return {1: threading.Lock, 2: RefusesToLoad}.get(item, lambda: item)()

    results = processes.map(world.define(work), processes.given()).run(range(300))
    refused = [results.pop(2), results.pop(1)]
    assert all(isinstance(error, NotTransferableError) for error in refused)
    assert "cannot be loaded" in str(refused[0])
    assert "Lock" in str(refused[1]) or "lock" in str(refused[1])
    assert results == [0, *range(3, 300)]


def test_an_argument_that_cannot_travel_raises_before_an_item_runs(processes, journal):
    def work(item, *, more):
        journal.add(item)

    with pytest.raises(NotTransferableError, match="keyword arguments"):
        processes.map(work, processes.given()).run([1], more=threading.Lock())
    assert journal.lines() == []


class LoadsOnlyHere:
    """Stands for a function whose module the workers do not have."""

    def __init__(self):
        self.home = os.getpid()

    def __call__(self, item):
        return item

    def __setstate__(self, state):
        if os.getpid() != state["home"]:
            raise SpoiledError("no such module")


def test_a_function_that_a_worker_cannot_load_raises(processes):
    with pytest.raises(OperoError, match="no such module"):
        processes.map(LoadsOnlyHere(), processes.given()).run([1])


MAIN = """
    import loky
    from opero import opmap

    @opmap(mode=lambda: loky.ProcessPoolExecutor(2), progress=False, **OPTIONS)
    DEF triple(item):
        return item * FACTOR

    FACTOR = 3

    if __name__ == "__main__":
        say(triple.run([1, 2, 3]))
"""


def test_functions_of_the_main_module_travel_to_workers_that_do_not_have_it(start):
    program = start(MAIN, {})
    assert program.heard() == [3, 6, 9]
    program.end()


def test_the_parcels_of_a_map_are_all_different(processes):
    """dask runs no call twice that has the same arguments, unless told so."""
    executor = processes.given()
    seen = []

    class Watched(Executor):
        def submit(self, fn, /, *args, **kwargs):
            seen.append(pickle.dumps(args))
            return executor.submit(fn, *args, **kwargs)

    assert processes.map(lambda item: 1, Watched()).run([5] * 20) == [1] * 20
    assert len(set(seen)) == len(seen)


# The end of a map


def test_a_closed_stream_leaves_nothing_behind(processes):
    before = threading.active_count()
    stream = processes.map(double, processes.make, ordered=False).stream(iter(int, 1))
    assert next(stream).result == 0
    stream.close()
    assert threading.active_count() <= before


def test_the_first_failure_stops_the_map_and_withdraws_what_has_not_begun(threads, world, journal):
    def work(item):
        journal.add(item)
        if item == 0:
            raise SpoiledError(item)
        return item

    executor = threads.given()
    with pytest.raises(SpoiledError):
        threads.map(world.define(work), executor, workers=1, return_exceptions=False).run(range(1000))
    assert journal.lines() == ["0"]
    assert executor.submit(double, 2).result(PATIENCE) == 4


def test_a_map_waits_for_its_running_items_before_it_ends(threads, journal):
    def work(item):
        if item == 0:
            until(lambda: "1 begins" in journal.lines())
            raise SpoiledError(item)
        journal.add("1 begins")
        time.sleep(0.1)
        journal.add("1 ends")

    with pytest.raises(SpoiledError):
        threads.map(work, threads.given(), return_exceptions=False).run([0, 1])
    assert journal.lines() == ["1 begins", "1 ends"]


INTERRUPTED = """
    from concurrent.futures import ProcessPoolExecutor
    from opero import opmap

    def work(item):
        note("begun")
        time.sleep(0.2)

    if __name__ == "__main__":
        import multiprocessing, threading
        mapped = opmap(mode=lambda: ProcessPoolExecutor(2), progress=False, **OPTIONS)(work)
        try:
            mapped.run(iter(int, 1))
        except KeyboardInterrupt:
            say(("interrupted", len(multiprocessing.active_children()), threading.active_count()))
"""


def test_ctrl_c_leaves_no_process_and_no_thread(start, journal):
    program = start(INTERRUPTED, {})
    until(lambda: "begun" in journal.lines())
    os.kill(program.pid, signal.SIGINT)
    assert program.heard() == ("interrupted", 0, 1)
    program.end()


# Wrong uses


async def make_later():
    return ThreadPoolExecutor()


@pytest.mark.parametrize(
    ("mode", "error", "words"),
    [
        (5, TypeError, "a function that makes one"),
        (None, TypeError, "a function that makes one"),
        (threading.Thread, TypeError, "no concurrent.futures.Executor"),
        (make_later, TypeError, "async function"),
    ],
    ids=str,
)
@pytest.mark.parametrize("decorate", [opmap, get_parallel_map_decorator])
def test_a_wrong_mode_raises_when_decorating_and_says_what_to_write(decorate, mode, error, words):
    with pytest.raises(error, match=words) as caught:
        decorate(mode=mode)(double)
    assert f"mode={getattr(mode, '__qualname__', mode)}" in str(caught.value)


def test_pool_options_beside_an_executor_are_refused(threads):
    with pytest.raises(TypeError, match="start_method"):
        threads.map(double, threads.given(), pool_options={"start_method": "fork"})


@pytest.mark.parametrize("workers", [0, 1.5])
def test_wrong_workers_beside_an_executor_are_refused(threads, workers):
    with pytest.raises((TypeError, ValueError), match="workers"):
        threads.map(double, threads.given(), workers=workers)


def test_a_function_that_makes_no_executor_raises(world):
    with pytest.raises(TypeError, match=r"made int, which is no concurrent\.futures\.Executor"):
        Kind.map(world.define(double), lambda: 5).run([1])


def test_an_executor_that_is_shut_down_raises(kind, world):
    executor = kind.make()
    executor.shutdown()
    with pytest.raises(OperoError, match="takes no work"):
        kind.map(world.define(double), executor).run([1])


def nap(item):
    time.sleep(0.3)
    return item


def test_a_stream_that_is_closed_in_a_forked_child_is_still_its_parents():
    mapped = opmap(mode=lambda: ProcessPoolExecutor(2), progress=False)(nap)
    stream = mapped.stream(range(6))
    first = next(stream)
    assert forked(stream.close) == "None"
    assert [first.result, *(outcome.result for outcome in stream)] == list(range(6))
