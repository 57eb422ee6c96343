"""Maps in processes: crashes, what cannot travel, start methods, threads of the parent, Ctrl-C, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import email.message
import faulthandler
import gc
import itertools
import json
import logging
import multiprocessing
import os
import queue
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import uuid
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from leftovers import children, marked, threads
from side_by_side import hang, until

from opero import AllFailedError, CallStats, OperoError, WorkerCrashedError, opero, opmap
from opero.concurrency import process_worker, scheduler
from opero.core import CallTimeoutError, NotTransferableError
from opero.core.interrupts import Hold
from opero.http import retry_after

PATIENCE = 10.0  # seconds until a test gives up waiting for something that must happen
PROCESS_MODES = ("process", "async_process")
START_METHODS = ("fork", "spawn", "forkserver")


class InProcesses:
    """One of the two modes with worker processes, for plain functions."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.options: dict[str, Any] = {"mode": name, "workers": 2, "progress": False, "return_exceptions": True}
        self.one_at_a_time = {"concurrency": 1} if name == "async_process" else {}

    def map(self, function, **options):
        """A map of a plain function, made ``async def`` where the mode asks for it; called as ``.run(items)``."""
        if self.name == "process":
            return opmap(**{**self.options, **options})(function)

        async def work(item, *args):
            return function(item, *args)

        return opmap(**{**self.options, **options})(work)

    def stream(self, mapped, items):
        if self.name == "process":
            return list(mapped.stream(items))

        async def collect():
            return [outcome async for outcome in mapped.stream(items)]

        return asyncio.run(collect())


@pytest.fixture(params=PROCESS_MODES)
def processes(request):
    return InProcesses(request.param)


# What is left


def surroundings() -> tuple[dict[int, str], list[str]]:
    return children(), threads()


@pytest.fixture(autouse=True)
def clean_surroundings():
    """Every test here is also a test that no process and no thread is left."""
    before = surroundings()
    yield before
    assert surroundings() == before


def open_files() -> list[str]:
    """What is open; the queues of a `multiprocess.Pool` are closed when they are collected."""
    gc.collect()
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(str(entry.readlink()).partition(":")[0])
    return sorted(names)


def double(item):
    return item * 2


def test_a_map_leaves_no_open_file_behind(processes):
    mapped = processes.map(double)
    mapped.run(range(5))
    before = open_files()
    for _ in range(3):
        mapped.run(range(5))
    assert open_files() == before


def test_a_crash_leaves_no_open_file_behind(processes):
    mapped = processes.map(lambda item: os._exit(1), retries=0)
    mapped.run([1])
    before = open_files()
    for _ in range(3):
        mapped.run([1])
    assert open_files() == before


# Crashes


def die_by_signal():
    os.kill(os.getpid(), signal.SIGKILL)


def die_by_exit():
    os._exit(7)


def die_by_sys_exit():
    sys.exit(3)


def die_by_segfault():
    faulthandler.disable()  # pytest has it on, and the death is wanted
    ctypes.string_at(0)


DEATHS = [
    pytest.param(die_by_signal, "SIGKILL", id="kill -9"),
    pytest.param(die_by_exit, "exit code 7", id="os._exit"),
    pytest.param(die_by_sys_exit, "exit code 3", id="sys.exit"),
    pytest.param(die_by_segfault, "SIGSEGV", id="segfault"),
]


@pytest.mark.parametrize(("die", "reason"), DEATHS)
def test_only_the_item_that_kills_its_worker_is_charged(processes, die, reason):
    def work(item):
        if item == 3:
            die()
        return item * 2

    results = processes.map(work, retries=0).run(range(8))
    crash = results.pop(3)
    assert isinstance(crash, WorkerCrashedError)
    assert reason in str(crash)
    assert results == [0, 2, 4, 8, 10, 12, 14]


@pytest.mark.parametrize(("die", "reason"), DEATHS)
def test_a_crash_is_retried_like_any_error(processes, journal, die, reason):
    def work(item):
        journal.add(item)
        if item == 1 and journal.count(1) == 1:
            die()
        return item

    mapped = processes.map(work, retries=1, min_delay=0.01)
    seen = processes.stream(mapped, range(3))
    assert [outcome.result for outcome in seen] == [0, 1, 2]
    assert journal.count(1) == 2


class OwnBaseError(BaseException):
    """A user's error that is no `Exception`."""


@pytest.mark.timeout(15)
@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError, GeneratorExit, OwnBaseError])
def test_what_is_no_exception_ends_the_worker_and_is_charged_to_its_item(processes, error):
    def work(item):
        if item == 3:
            raise error
        return item

    results = processes.map(work, retries=0).run(range(6))
    assert isinstance(results.pop(3), WorkerCrashedError)
    assert results == [0, 1, 2, 4, 5]


def test_a_crash_is_charged_as_one_attempt(processes):
    mapped = processes.map(lambda item: os._exit(1), retries=2, min_delay=0.01)
    (outcome,) = processes.stream(mapped, [1])
    assert isinstance(outcome.error, WorkerCrashedError)
    assert outcome.attempts == 3
    assert mapped.stats.snapshot() == CallStats(calls=1, attempts=3, retries=2, failures=1)


def test_a_crash_can_be_excluded_from_the_retries(processes, journal):
    def work(item):
        journal.add(item)
        os._exit(1)

    (error,) = processes.map(work, retry_on=OSError).run([1])
    assert isinstance(error, WorkerCrashedError)
    assert journal.lines() == ["1"]


def test_innocent_items_of_a_large_batch_are_unharmed(processes):
    """Trivial items travel in large batches; the crash comes when the batches have grown."""

    def work(item):
        if item == 1500:
            os._exit(1)
        return item

    mapped = processes.map(work, retries=0)
    seen = processes.stream(mapped, range(2000))
    assert [outcome.index for outcome in seen] == list(range(2000))
    assert [outcome.item for outcome in seen if outcome.error is not None] == [1500]
    assert [outcome.result for outcome in seen if outcome.error is None] == [n for n in range(2000) if n != 1500]


def test_several_crashes_are_all_charged_and_nobody_else(processes):
    def work(item):
        if item % 50 == 0:
            os._exit(1)
        return item

    results = processes.map(work, retries=0).run(range(200))
    assert [n for n, result in enumerate(results) if isinstance(result, WorkerCrashedError)] == [0, 50, 100, 150]
    assert [result for n, result in enumerate(results) if n % 50] == [n for n in range(200) if n % 50]


def test_a_map_whose_every_item_crashes_ends(processes):
    results = processes.map(lambda item: os._exit(1), retries=0).run(range(6))
    assert [type(result) for result in results] == [WorkerCrashedError] * 6


def test_an_item_that_runs_in_another_worker_is_not_run_again_after_a_crash(journal):
    def work(item):
        journal.add(item)
        if item == "crashes":
            journal.wait_for("slow")
            os._exit(1)
        until(lambda: journal.count("crashes") == 2)  # it runs again, in a new worker
        return item

    mapped = opmap(mode="process", workers=2, progress=False, retries=1, min_delay=0.01, return_exceptions=True)(work)
    crash, slow = mapped(["crashes", "slow"])
    assert isinstance(crash, WorkerCrashedError)
    assert slow == "slow"
    assert journal.count("slow") == 1


def test_items_that_ran_in_the_same_process_as_a_crash_are_not_charged(journal):
    @opmap(
        mode="async_process",
        workers=1,
        progress=False,
        retries=0,
        pool_options={"concurrency": 3},
        return_exceptions=True,
    )
    async def work(item):
        journal.add(item)
        deadline = time.monotonic() + PATIENCE
        while len(journal.lines()) < 3:
            assert time.monotonic() < deadline, "waited in vain"
            await asyncio.sleep(0.005)
        if item == "crashes":
            os._exit(1)
        await asyncio.sleep(0.05)
        return item

    first, crash, last = work.run(["first", "crashes", "last"])
    assert (first, last) == ("first", "last")
    assert isinstance(crash, WorkerCrashedError)


def test_a_crash_stops_the_map_without_return_exceptions(processes):
    def work(item):
        if item == 2:
            os._exit(5)
        return item

    mapped = processes.map(work, retries=0, return_exceptions=False)
    with pytest.raises(WorkerCrashedError, match="exit code 5"):
        mapped.run(itertools.count())


def test_after_a_crash_the_next_candidate_is_tried():
    def work(item, *, key):
        if key == "deadly":
            os._exit(1)
        return item, key

    mapped = opmap(mode="process", workers=2, progress=False, retries=0, arg_fallback="key")(work)
    assert mapped([1, 2], key=["deadly", "good"]) == [(1, "good"), (2, "good")]


def test_crashes_with_every_candidate_make_an_all_failed_error():
    mapped = opmap(mode="process", workers=2, progress=False, retries=0, arg_fallback="key", return_exceptions=True)(
        lambda item, *, key: os._exit(1)
    )
    (error,) = mapped([1], key=["a", "b"])
    assert isinstance(error, AllFailedError)
    assert [type(part) for part in error.errors] == [WorkerCrashedError, WorkerCrashedError]


def test_an_idle_worker_that_is_killed_harms_nobody(journal):
    """The input is slow, so that the workers are idle when one of them is killed."""

    def items():
        yield from range(4)
        until(lambda: len(journal.lines()) == 4)
        time.sleep(0.1)  # the last report is on its way
        pid = int(journal.lines()[0])
        os.kill(pid, signal.SIGKILL)
        until(lambda: not is_running(pid))
        yield from range(4, 8)

    def work(item):
        journal.add(os.getpid())
        time.sleep(0.01)
        return item

    mapped = opmap(mode="process", workers=2, progress=False, retries=0)(work)
    assert mapped(items()) == list(range(8))


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_worker_that_is_killed_from_outside_is_charged_to_its_item(journal):
    def work(item):
        if item == "waits":
            journal.add(os.getpid())
            hang()
        journal.wait_for("killed")
        return item

    def kill():
        until(journal.lines)
        os.kill(int(journal.lines()[0]), signal.SIGTERM)
        journal.add("killed")

    killer = threading.Thread(target=kill)
    stream = opmap(mode="process", workers=2, progress=False, retries=0, pool_options={"start_method": "fork"})(
        work
    ).stream(["waits", "other"])
    killer.start()
    waits, other = stream
    killer.join()
    assert isinstance(waits.error, WorkerCrashedError)
    assert "SIGTERM" in str(waits.error)
    assert other.result == "other"


# What cannot travel


def refuse_to_unpickle(text):
    raise ValueError(text)


class CannotArriveError(Exception):
    """Can be pickled, but not unpickled anywhere."""

    def __reduce__(self):
        return refuse_to_unpickle, ("no way back",)


class CannotArrive:
    """Can be pickled, but not unpickled anywhere."""

    def __reduce__(self):
        return refuse_to_unpickle, ("no way back",)


def only_in(pid, kind, *args):
    if os.getpid() != pid:
        raise ValueError("not at home")
    return kind(*args)


class Homebound:
    """Can be unpickled only in the process where it was pickled."""

    def __reduce__(self):
        return only_in, (os.getpid(), Homebound)


class HomeboundError(Exception):
    """Can be unpickled only in the process where it was pickled."""

    def __reduce__(self):
        return only_in, (os.getpid(), HomeboundError)


class OtherArgumentsError(Exception):
    """Its ``__init__`` takes other arguments than it hands on, so that unpickling it fails."""

    def __init__(self, code: int, *, place: str) -> None:
        super().__init__(f"code {code} at {place}")
        self.code = code


class LockedError(Exception):
    """Holds what cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class SpeechlessError(Exception):
    """Has no text, and cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __str__(self) -> str:
        raise RuntimeError("no text")


class SpeechlessItem:
    """Cannot be unpickled, and nobody can say why."""

    def __reduce__(self):
        return raise_speechless, ()


def raise_speechless():
    raise SpeechlessError


class DeadlyItem:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


def kind_of(item):
    return type(item)


def test_an_item_that_cannot_be_pickled_is_an_error_with_the_text(processes):
    results = processes.map(kind_of).run([1, threading.Lock(), 2])
    assert results[0] is int
    assert results[2] is int
    assert isinstance(results[1], OperoError)
    assert "cannot pickle '_thread.lock' object" in str(results[1])


def test_an_item_that_cannot_be_unpickled_is_an_error_with_the_text(processes):
    results = processes.map(kind_of).run([1, CannotArrive(), 2])
    assert results[0] is int
    assert results[2] is int
    assert isinstance(results[1], OperoError)
    assert "no way back" in str(results[1])


def test_items_that_cannot_travel_harm_nobody_in_large_batches(processes):
    items: list[Any] = list(range(1500))
    items[700] = threading.Lock()
    items[1400] = CannotArrive()
    results = processes.map(kind_of).run(items)
    assert [n for n, result in enumerate(results) if result is not int] == [700, 1400]
    assert isinstance(results[700], OperoError)
    assert isinstance(results[1400], OperoError)


def test_an_item_that_kills_whoever_unpickles_it_is_charged(processes):
    results = processes.map(kind_of, retries=0).run([1, DeadlyItem(), 2])
    assert results[0] is int
    assert results[2] is int
    assert isinstance(results[1], WorkerCrashedError)
    assert "exit code 9" in str(results[1])


@pytest.mark.timeout(15)
@pytest.mark.parametrize(
    ("make", "text"),
    [(threading.Lock, "cannot pickle '_thread.lock' object"), (CannotArrive, "no way back"), (Homebound, "at home")],
    ids=["not pickled", "not unpickled", "not unpickled in the parent"],
)
def test_a_result_that_cannot_travel_is_an_error_with_the_text(processes, make, text):
    def work(item):
        return make() if item in (2, 700) else item

    results = processes.map(work).run(range(1000))
    assert [n for n, result in enumerate(results) if result != n] == [2, 700]
    assert isinstance(results[2], OperoError)
    assert isinstance(results[700], OperoError)
    assert text in str(results[2])
    assert text in str(results[700])


@pytest.mark.timeout(15)
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LockedError("bad lock"), "bad lock"),
        (lambda: CannotArriveError("bad way"), "bad way"),
        (lambda: HomeboundError("bad home"), "bad home"),
        (lambda: OtherArgumentsError(5, place="bad place"), "code 5 at bad place"),
        (SpeechlessError, "SpeechlessError"),
    ],
    ids=["not pickled", "not unpickled", "not unpickled in the parent", "other arguments", "without a text"],
)
def test_an_exception_that_cannot_travel_is_an_error_with_the_text(processes, make, text):
    def work(item):
        if item in (2, 700):
            raise make()
        return item

    results = processes.map(work, retries=0).run(range(1000))
    assert [n for n, result in enumerate(results) if result != n] == [2, 700]
    assert text in f"{type(results[2]).__name__}: {results[2]}"
    assert text in f"{type(results[700]).__name__}: {results[700]}"


def test_what_cannot_be_sent_is_left_out_of_an_exception(processes):
    def work(item):
        raise LockedError("bad lock")

    (error,) = processes.map(work, retries=0).run([1])
    assert isinstance(error, LockedError)
    assert (str(error), error.lock) == ("bad lock", None)


# Python 3.14 warns of each that nobody has closed, such as one after which there was a retry.
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up <HTTPError:ResourceWarning")
def test_an_http_error_with_its_open_response_is_retried_when_the_server_wants_it(processes, journal):
    def work(item):
        journal.add("asked")
        headers = email.message.Message()
        headers["Retry-After"] = "0"
        with Path(os.devnull).open("rb") as response:
            raise urllib.error.HTTPError("http://127.0.0.1/", 503, "Busy", headers, response)

    (error,) = processes.map(work, retries=1, retry_on=retry_after).run([1])
    assert isinstance(error, urllib.error.HTTPError)
    assert (error.code, error.headers["Retry-After"]) == (503, "0")
    # Its body stays in the worker.
    assert error.read() == b""
    error.close()
    assert journal.lines() == ["asked", "asked"]


def raise_other_arguments(item):
    raise OtherArgumentsError(item, place="home")


def raise_a_group_of_other_arguments(item):
    raise ExceptionGroup("several", [KeyError(1), OtherArgumentsError(item, place="home")])


def test_an_exception_whose_init_takes_other_arguments_arrives_with_its_class_and_attributes(processes):
    (error,) = processes.map(raise_other_arguments, retries=0).run([5])
    assert isinstance(error, OtherArgumentsError)
    assert (str(error), error.args, error.code) == ("code 5 at home", ("code 5 at home",), 5)
    assert any("raise OtherArgumentsError" in note for note in error.__notes__)


def test_a_group_of_exceptions_whose_init_takes_other_arguments_arrives(processes):
    (group,) = processes.map(raise_a_group_of_other_arguments, retries=0).run([5])
    assert isinstance(group, ExceptionGroup)
    assert group.message == "several"
    first, second = group.exceptions
    assert isinstance(first, KeyError)
    assert isinstance(second, OtherArgumentsError)
    assert second.code == 5


class NoRouteError(OSError):
    def __init__(self, host: str, *, port: int) -> None:
        super().__init__(113, "no route", f"{host}:{port}")


class NotFoundError(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(f"no {name}")


class SlottedError(Exception):
    __slots__ = ("code", "nothing")

    def __init__(self, text: str, *, code: int) -> None:
        super().__init__(text)
        self.code = code

    def __str__(self) -> str:
        return f"{self.args[0]} ({self.code})"


class BadBytesError(UnicodeDecodeError):
    def __init__(self, data: bytes, *, source: str) -> None:
        super().__init__("utf-8", data, 0, 1, f"bad byte in {source}")


ODD = [
    lambda: NoRouteError("host", port=1),
    lambda: NotFoundError("name"),
    lambda: SlottedError("no", code=5),
    lambda: BadBytesError(b"\xff", source="a file"),
    lambda: ExceptionGroup("several", [NotFoundError("name"), SlottedError("no", code=5)]),
]


def test_an_exception_says_the_same_and_has_the_same_in_it_after_it_has_travelled(processes):
    def work(item):
        error = ODD[item]()
        raise error

    *odd, group = processes.map(work, retries=0).run(range(len(ODD)))
    for make, error in [*zip(ODD[:-1], odd, strict=True), *zip((ODD[1], ODD[2]), group.exceptions, strict=True)]:
        original = make()
        assert type(error) is type(original)
        assert (str(error), error.args) == (str(original), original.args)
        for name in ("errno", "filename", "code", "reason", "end"):
            assert getattr(error, name, None) == getattr(original, name, None)
    assert not hasattr(odd[2], "nothing")


def test_an_exception_that_is_raised_again_and_again_has_one_traceback_of_the_worker(processes):
    error = ConnectionError("closed")

    def work(item):
        raise error

    raised = processes.map(work, retries=1, min_delay=0.001).run(range(200))
    for one in raised:
        (note,) = [note for note in one.__notes__ if note.startswith("in the worker:")]
        assert "raise error" in note
        assert note.count("in the worker:") == 1


def test_an_exception_that_says_how_it_is_pickled_keeps_its_notes(processes):
    def work(text):
        try:
            return json.loads(text)
        except ValueError as error:
            error.add_note(f"in line {text!r}")
            raise

    (error,) = processes.map(work, retries=0).run(["{"])
    assert isinstance(error, json.JSONDecodeError)
    first, second, *_ = error.__notes__
    assert first == "in line '{'"
    assert second.startswith("in the worker:")
    assert "return json.loads(text)" in second


class PlacedError(Exception):
    def __new__(cls, message, line):
        return super().__new__(cls, message)

    def __init__(self, message, line):
        super().__init__(message)
        self.line = line


def test_an_exception_keeps_its_class_that_cannot_be_made_of_its_args(processes):
    # Nor can lxml's `XMLSyntaxError`, which inherits the `__new__` of another base.
    def work(item):
        raise PlacedError("no end", item)

    (error,) = processes.map(work, retries=0).run([7])
    assert isinstance(error, PlacedError)
    assert (error.args, error.line) == (("no end",), 7)


@pytest.mark.parametrize("kind", [OtherArgumentsError, LockedError])
def test_an_exception_that_travels_badly_is_retried_by_its_class(processes, kind):
    def work(item):
        raise OtherArgumentsError(item, place="home") if kind is OtherArgumentsError else LockedError("bad lock")

    mapped = processes.map(work, retries=2, min_delay=0.001, retry_on=kind)
    mapped.run([5])
    assert mapped.stats.retries == 2


def test_an_exception_that_cannot_travel_is_not_retried_by_another_class(processes):
    def work(item):
        raise LockedError("bad lock")

    mapped = processes.map(work, retries=2, min_delay=0.001, retry_on=KeyError)
    mapped.run([5])
    assert mapped.stats.retries == 0


def test_an_exception_that_cannot_travel_is_retried_like_any_other(processes, journal):
    def work(item):
        journal.add(item)
        if journal.count(item) == 1:
            raise LockedError("bad lock")
        return item

    assert processes.map(work, retries=1, min_delay=0.01).run([1]) == [1]


def test_an_all_failed_error_of_a_worker_keeps_its_errors(processes):
    @opero(arg_fallback="key", retries=0)
    def inner(key):
        raise KeyError(len(key))

    (error,) = processes.map(lambda item: inner(["a", "bb"]), retries=0).run([1])
    assert isinstance(error, AllFailedError)
    assert [part.args for part in error.errors] == [(1,), (2,)]


def test_an_exception_of_a_worker_tells_where_it_was_raised(processes):
    def work(item):
        raise KeyError("a place to find")

    (error,) = processes.map(work, retries=0).run([1])
    assert any('raise KeyError("a place to find")' in note for note in error.__notes__)


def test_a_keyword_argument_that_cannot_travel_raises_before_anything_starts(journal):
    def work(item, *, lock):
        journal.add(item)

    mapped = opmap(mode="process", workers=2, progress=False, pool_options={"start_method": "spawn"})(work)
    with pytest.raises(OperoError, match=r"cannot pickle '_thread\.lock' object"):
        mapped([1], lock=threading.Lock())
    assert journal.lines() == []


def raise_odd():
    raise OddError


class OddError(BaseException):
    """No exception that a program handles."""


class Odd:
    """Pickling it, and unpickling it, raises what is no exception."""

    def __init__(self, when: str) -> None:
        self.when = when

    def __reduce__(self):
        if self.when == "pickled":
            raise_odd()
        return raise_odd, ()


@pytest.mark.parametrize("where", ["as an item", "as a result"])
def test_what_ends_a_worker_while_it_travels_is_charged_to_its_item(processes, where):
    mapped = processes.map(lambda item: Odd("pickled") if item == 3 else 1, retries=0)
    items = [Odd("unpickled") if item == 3 and where == "as an item" else item for item in range(6)]
    results = mapped.run(items)
    assert isinstance(results.pop(3), WorkerCrashedError)
    assert results == [1] * 5


def test_a_result_that_cannot_arrive_is_told_from_any_number_of_others_on_the_way():
    @opmap(
        mode="async_process",
        workers=1,
        retries=0,
        progress=False,
        pool_options={"concurrency": 200},
        return_exceptions=True,
    )
    async def work(item):
        # All of them are reported in one go.
        await asyncio.sleep(0.3)
        return Homebound() if item == 0 else item

    results = work.run(range(200))
    assert isinstance(results.pop(0), NotTransferableError)
    assert results == list(range(1, 200))


# Time limits


def test_a_worker_that_is_stuck_past_attempt_timeout_is_killed_and_replaced(journal):
    def work(item):
        journal.add(os.getpid())
        if item == "stuck":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            hang()
        return os.getpid()

    mapped = opmap(mode="process", workers=1, progress=False, attempt_timeout=0.2, retries=0, return_exceptions=True)(
        work
    )
    started = time.monotonic()
    before, stuck, after = mapped(["good", "stuck", "good"])
    assert time.monotonic() - started < 10
    assert isinstance(stuck, TimeoutError)
    assert isinstance(stuck, OperoError)
    assert "attempt_timeout" in str(stuck)
    assert before != after
    assert not Path(f"/proc/{before}").exists()


def test_attempt_timeout_begins_when_a_worker_is_ready():
    options = {"mode": "process", "workers": 1, "retries": 0, "progress": False, "attempt_timeout": 1.5}
    mapped = opmap(**options, pool_options={"initializer": time.sleep, "initargs": (1.0,)})(time.sleep)
    assert mapped([0.8]) == [None]


def test_an_attempt_that_was_killed_is_retried(journal):
    def work(item):
        journal.add(item)
        if item == "slow" and journal.count("slow") == 1:
            hang()
        return item

    mapped = opmap(mode="process", workers=2, progress=False, attempt_timeout=0.3, min_delay=0.01)(work)
    assert mapped(["quick", "slow"]) == ["quick", "slow"]
    assert mapped.stats.retries == 1
    assert Counter(journal.lines()) == {"quick": 1, "slow": 2}


def test_a_stuck_worker_harms_no_item_of_another_worker(journal):
    def work(item):
        journal.add(item)
        if item == "stuck":
            hang()
        time.sleep(0.2)
        return item

    mapped = opmap(mode="process", workers=2, progress=False, attempt_timeout=1.0, retries=0, return_exceptions=True)(
        work
    )
    stuck, *others = mapped(["stuck", 1, 2, 3, 4, 5, 6])
    assert isinstance(stuck, TimeoutError)
    assert others == [1, 2, 3, 4, 5, 6]
    assert len(journal.lines()) == 7


def test_total_timeout_kills_a_stuck_worker():
    mapped = opmap(mode="process", workers=1, progress=False, total_timeout=0.3, return_exceptions=True)(
        lambda item: hang() if item == "stuck" else None
    )
    started = time.monotonic()
    stuck, good = mapped(["stuck", "good"])
    assert time.monotonic() - started < 10
    assert isinstance(stuck, TimeoutError)
    assert "total_timeout" in str(stuck)
    assert good is None


def test_the_single_call_is_stopped_by_attempt_timeout():
    def work(item):
        if item == "stuck":
            hang()
        return item

    mapped = opmap(mode="process", progress=False, attempt_timeout=0.3, retries=0)(work)
    assert mapped.one("good") == "good"
    with pytest.raises(TimeoutError, match="attempt_timeout"):
        mapped.one("stuck")


# Functions and start methods

setting = "as imported"


def remember(text):
    global setting  # noqa: PLW0603 - what an initializer does
    setting = text


def setting_seen(item):
    return setting


def setting_and_parent(item):
    return setting, os.getppid()


async def setting_and_parent_async(item):
    return setting_and_parent(item)


@pytest.mark.parametrize("name", PROCESS_MODES)
@pytest.mark.parametrize("method", START_METHODS)
def test_the_start_method_is_the_one_that_was_asked_for(name, method, monkeypatch):
    """Forked workers have the parent's variables; only those of the fork server have another parent."""
    monkeypatch.setitem(globals(), "setting", "changed")
    function = setting_and_parent if name == "process" else setting_and_parent_async
    look = opmap(mode=name, workers=1, progress=False, retries=0, pool_options={"start_method": method})(function)
    ((seen, parent),) = look.run([1])
    assert seen == ("changed" if method == "fork" else "as imported")
    assert (parent == os.getpid()) is (method != "forkserver")


def make_adder(amount):
    def add(item):
        return item + amount

    return add


def make_deep(amount):
    def outer(item):
        def inner():
            return item + amount

        return inner()

    return outer


def make_method(amount):
    class Adder:
        def add(self, item):
            return item + amount

    return Adder().add


def make_lambda(amount):
    return lambda item: item + amount


@pytest.mark.parametrize(
    ("make", "method"),
    [
        *itertools.product([make_lambda, make_adder, make_deep, make_method], ["fork", "forkserver"]),
        (make_adder, "spawn"),
    ],
)
def test_functions_without_a_name_work_with_every_start_method(make, method):
    mapped = opmap(mode="process", workers=1, progress=False, retries=0, pool_options={"start_method": method})(
        make(10)
    )
    assert mapped([1, 2, 3]) == [11, 12, 13]


@pytest.mark.parametrize("name", PROCESS_MODES)
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_async_functions_without_a_name_work(name, method):
    amount = 10

    async def add(item):
        await asyncio.sleep(0)
        return item + amount

    mapped = opmap(mode=name, workers=1, progress=False, retries=0, pool_options={"start_method": method})(add)
    assert mapped.run([1, 2, 3]) == [11, 12, 13]


@pytest.mark.parametrize("method", START_METHODS)
def test_the_initializer_prepares_each_worker_with_its_arguments(method):
    mapped = opmap(
        mode="process",
        workers=1,
        progress=False,
        pool_options={"start_method": method, "initializer": remember, "initargs": ("prepared",)},
    )(setting_seen)
    assert mapped(range(4)) == ["prepared"] * 4
    assert setting == "as imported"


def test_the_initializer_runs_once_in_each_worker_and_in_each_that_replaces_it(processes, journal):
    def work(item):
        if item == "crashes":
            os._exit(1)

    options = {"initializer": journal.add, "initargs": ("x",), **processes.one_at_a_time}
    mapped = processes.map(work, retries=0, workers=1, pool_options=options)
    mapped.run([1, 2, 3])
    assert journal.lines() == ["x"]
    mapped.run(["crashes", 1])
    assert journal.lines() == ["x"] * 3


@pytest.mark.parametrize("mode", PROCESS_MODES)
def test_a_coroutine_that_does_not_end_when_it_is_cancelled_is_ended_with_its_worker(mode, monkeypatch):
    monkeypatch.setattr(scheduler, "UNHEEDED_SECONDS", 0.3)

    @opmap(mode=mode, workers=2, retries=0, attempt_timeout=0.3, progress=False, return_exceptions=True)
    async def work(item):
        if item == 3:
            threading.Event().wait()
        await asyncio.sleep(0.01)
        return item

    results = work.run(range(8))
    assert isinstance(results.pop(3), CallTimeoutError)
    assert results == [0, 1, 2, 4, 5, 6, 7]


def test_an_item_whose_error_has_no_text_is_charged_with_that(processes):
    results = processes.map(kind_of, retries=0).run([1, SpeechlessItem(), "3"])
    assert isinstance(results.pop(1), NotTransferableError)
    assert results == [int, str]


def test_a_failing_initializer_raises(processes):
    def prepare():
        raise ValueError("cannot prepare")

    mapped = processes.map(double, pool_options={"initializer": prepare})
    with pytest.raises(OperoError, match="cannot prepare"):
        mapped.run(range(3))


@pytest.mark.parametrize("error", [SpeechlessError(), ValueError("\udc80")], ids=["without text", "not encodable"])
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_an_initializer_raises_whatever_its_error_says(processes, error, method):
    def prepare(name):
        raise SpeechlessError if name == "SpeechlessError" else ValueError("\udc80")

    options = {"start_method": method, "initializer": prepare, "initargs": (type(error).__name__,)}
    mapped = processes.map(double, pool_options=options)
    with pytest.raises(OperoError, match=f"cannot run .*{type(error).__name__}"):
        mapped.run(range(3))


def test_an_initializer_that_cannot_be_sent_is_not_forked_beside_threads(processes):
    is_over = threading.Event()
    thread = threading.Thread(target=is_over.wait)

    def items():
        yield 1
        thread.start()
        yield -1

    def work(item):
        if item < 0:
            os._exit(1)
        return item

    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        mapped = processes.map(work, workers=1, pool_options={"initializer": id, "initargs": (connection,)})
        with pytest.raises(NotTransferableError, match="initargs"):
            mapped.run(items())
    is_over.set()
    thread.join()


def count_args(_item, argument):
    return len(argument.args)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_arguments_that_cannot_be_unpickled_cost_kept_workers_or_raise(processes, method):
    mapped = processes.map(count_args, pool_options={"start_method": method})
    bad = OtherArgumentsError(1, place="here")
    with mapped.pool():
        assert mapped.run([1, 2], ValueError(1, 2)) == [2, 2]
        if method == "fork":
            assert mapped.run([1, 2], bad) == [1, 1]
        else:
            with pytest.raises(OperoError, match="place"):
                mapped.run([1, 2], bad)
        assert mapped.run([1, 2], ValueError(1, 2)) == [2, 2]


@pytest.mark.timeout(30)
def test_an_initializer_that_ends_its_process_raises(processes):
    mapped = processes.map(double, pool_options={"initializer": die_by_exit})
    with pytest.raises(OperoError):
        mapped.run(range(3))


# Threads of the parent


class HeldLock:
    """A lock that a thread of this process holds while the block runs."""

    def __init__(self, lock):
        self._lock = lock
        self._held = threading.Event()
        self._release = threading.Event()
        self._thread = threading.Thread(target=self._hold)

    def __enter__(self):
        self._thread.start()
        self._held.wait()

    def __exit__(self, *error):
        self._release.set()
        self._thread.join()

    def _hold(self):
        with self._lock:
            self._held.set()
            self._release.wait()


some_lock = threading.Lock()


def take_lock(item):
    """Whether the lock could be taken, within a second, in this process."""
    if not some_lock.acquire(timeout=1.0):
        return "deadlock"
    some_lock.release()
    return item


def crash_or_take_lock(item):
    return os._exit(1) if item == "crashes" else take_lock(item)


async def take_lock_async(item):
    return take_lock(item)


@pytest.mark.parametrize("name", PROCESS_MODES)
def test_a_parent_with_threads_does_not_deadlock(name):
    mapped = opmap(mode=name, workers=2, progress=False)(take_lock if name == "process" else take_lock_async)
    with HeldLock(some_lock):
        assert mapped.run(range(4)) == [0, 1, 2, 3]


def test_a_parent_whose_thread_logs_does_not_deadlock():
    handler = logging.StreamHandler()
    logging.getLogger("crowd").addHandler(handler)
    handler.acquire()
    handler.release()
    items = queue.SimpleQueue()
    stream = opmap(mode="process", workers=1, progress=False)(log_something).stream(iter(items.get, None))
    items.put(0)
    with HeldLock(handler.lock):
        threading.Timer(0.5, lambda: [items.put(item) for item in (1, 2, None)]).start()
        assert next(stream).result == 0
    assert [outcome.result for outcome in stream] == [1, 2]
    logging.getLogger("crowd").removeHandler(handler)


def log_something(item):
    if item:
        logging.getLogger("crowd").error("item %s", item)
    return item


def test_a_worker_replaced_after_the_parent_got_threads_does_not_deadlock():
    mapped = opmap(mode="process", workers=1, progress=False, retries=0)(crash_or_take_lock)
    stream = mapped.stream(["first", "crashes", "last"])
    assert next(stream).result == "first"
    with HeldLock(some_lock):
        crash, last = stream
    assert isinstance(crash.error, WorkerCrashedError)
    assert last.result == "last"


# Large items


class Parcel:
    """An item with some weight."""

    def __init__(self) -> None:
        self.content = bytes(50_000)


@pytest.mark.parametrize("name", PROCESS_MODES)
def test_large_items_travel_in_small_numbers(name):
    """Trivial work makes batches grow; their size in bytes has a bound all the same."""
    alive: weakref.WeakSet[Parcel] = weakref.WeakSet()
    most = 0

    def items():
        nonlocal most
        for _ in range(1500):
            parcel = Parcel()
            alive.add(parcel)
            most = max(most, len(alive))
            yield parcel
            del parcel

    assert InProcesses(name).map(lambda parcel: len(parcel.content)).run(items()) == [50_000] * 1500
    assert most < 600  # 30 MB


def test_large_results_travel():
    mapped = opmap(mode="process", workers=2, progress=False)(lambda size: bytes(size))  # noqa: PLW0108 - a class is no function
    sizes = [0, 5_000_000, 1, 3_000_000] * 3
    assert [len(result) for result in mapped(sizes)] == sizes


# Scripts


@pytest.fixture
def start(tmp_path):
    """Starts a script in a session of its own; all of its processes have a mark in their environment."""
    mark = uuid.uuid4().hex
    started: list[subprocess.Popen[str]] = []

    def start(source: str, *, without_file: bool = False) -> subprocess.Popen[str]:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(source))
        process = subprocess.Popen(
            [sys.executable, *(("-c", path.read_text()) if without_file else (str(path),))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPERO_TEST_MARK": mark},
            start_new_session=True,
        )
        started.append(process)
        return process

    start.survivors = lambda: marked(mark)
    yield start
    for process in started:
        for pid in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def output_of(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.strip()


MAIN_SCRIPT = """
    from dataclasses import dataclass
    from opero import opmap

    FACTOR = 10

    @dataclass(frozen=True)
    class Point:
        x: int

    class OwnError(Exception):
        pass

    def times(x):
        return x * FACTOR

    def grow(point):
        if point.x == 3:
            raise OwnError("three")
        return Point(times(point.x))

    numbers = opmap(mode="process", workers=1, progress=False, retries=0, pool_options=OPTIONS)(times)
    points = opmap(mode="process", workers=1, progress=False, retries=0, pool_options=OPTIONS)(grow)

    if __name__ == "__main__":
        print(numbers([1, 2, 3]))
        grown = points([Point(1), Point(2), Point(3)])
        print(grown)
        print(isinstance(grown[2], OwnError))
"""


@pytest.mark.parametrize("method", START_METHODS)
def test_functions_and_classes_of_the_main_module_work(start, method):
    process = start(MAIN_SCRIPT.replace("OPTIONS", repr({"start_method": method})))
    assert output_of(process).splitlines() == [
        "[10, 20, 30]",
        "[Point(x=10), Point(x=20), OwnError('three')]",
        "True",
    ]


def test_decorated_functions_of_the_main_module_work(start):
    process = start("""
        from opero import opmap

        @opmap(workers=2, progress=False)
        def times(x):
            return x * 10

        if __name__ == "__main__":
            print(times([1, 2, 3]))
    """)
    assert output_of(process) == "[10, 20, 30]"


LOOKING_SCRIPT = """
    import ctypes, multiprocessing, os
    from opero import opmap

    def start_native_thread():
        '''As OpenMP and rayon do: Python knows nothing of it.'''
        libc = ctypes.CDLL(None)
        number = ctypes.c_ulong()
        wait = ctypes.cast(libc.pause, ctypes.c_void_p)
        assert libc.pthread_create(ctypes.byref(number), None, wait, None) == 0
        return number

    def start_thread_of_jemalloc():
        name = ctypes.create_string_buffer(b"jemalloc_bg_thd")
        assert ctypes.CDLL(None).pthread_setname_np(start_native_thread(), name) == 0

    def use_numpy():
        import numpy as np
        return float((np.ones((300, 300)) @ np.ones((300, 300))).sum())

    has_changed = False

    def how(item):
        if item == "numpy":
            assert use_numpy() == 300.0**3
        if has_changed:
            return "fork"
        return "spawn" if os.getppid() == parent else "forkserver"

    async def how_async(item):
        return how(item)

    options = {"workers": 1, "retries": 0, "progress": False}
    maps = [opmap(mode="process", **options)(how), opmap(mode="async_process", **options)(how_async)]
    parent = int(os.environ.setdefault("OPERO_TEST_PARENT", str(os.getpid())))

    if __name__ == "__main__":
        has_changed = True
        PREPARE
        for look in maps:
            print(*look.run(["numpy" if "numpy" in globals() else "nothing"]))
"""


@pytest.fixture
def method_after(start):
    """How the workers of maps of both modes are started after some preparation, in a program that does nothing else."""

    def method_after(preparation: str) -> str:
        of_process, of_async_process = output_of(start(LOOKING_SCRIPT.replace("PREPARE", preparation))).splitlines()
        assert of_process == of_async_process
        return of_process

    return method_after


@pytest.mark.parametrize("before", ["", "multiprocessing.RLock(); "])
def test_nothing_is_forked_beside_threads_that_python_does_not_know(method_after, before):
    assert method_after(f"{before}start_native_thread()") == "forkserver"


def test_processes_are_forked_beside_the_threads_of_openblas(method_after):
    assert method_after("numpy = use_numpy()") == "fork"


def test_processes_are_forked_beside_the_threads_of_jemalloc(method_after):
    """Those of pyarrow, for example, which pandas imports."""
    assert method_after("start_thread_of_jemalloc()") == "fork"


def test_processes_are_forked_beside_the_thread_of_a_queue_that_has_been_used(method_after):
    """Which is for workers that are forked: else it could not be an argument any more."""
    assert method_after("queue = multiprocessing.Queue(); queue.put(1)") == "fork"


@pytest.mark.parametrize("make", ["Lock", "Queue", "Event"])
def test_a_lock_for_forked_workers_is_refused_in_others_with_the_ways_out(processes, make):
    shared = getattr(multiprocessing.get_context("fork"), make)()
    options = {"start_method": "forkserver", "initializer": id, "initargs": (shared,)}
    mapped = processes.map(double, pool_options=options)
    ways = r"make it by multiprocessing.get_context\('spawn'\), or give pool_options={'start_method': 'fork'}"
    with pytest.raises(NotTransferableError, match=ways):
        mapped.run([1])


def test_threads_that_have_just_ended_are_not_taken_for_ones_that_python_does_not_know(start):
    """The system lists them for a moment after `Thread.join`."""
    process = start("""
        import threading
        from opero.concurrency.system import has_other_threads

        seen = 0
        for _ in range(1000):
            thread = threading.Thread(target=int)
            thread.start()
            thread.join()
            seen += has_other_threads()
        print(seen)
    """)
    assert output_of(process) == "0"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_start_method_that_the_program_has_set_holds(method_after, method):
    assert method_after(f"multiprocessing.set_start_method({method!r})") == method


def test_a_start_method_of_the_map_wins_over_that_of_the_program(start):
    process = start("""
        import multiprocessing
        from opero import opmap

        has_changed = False

        def forked(item):
            return has_changed

        if __name__ == "__main__":
            has_changed = True
            multiprocessing.set_start_method("spawn")
            print(opmap(workers=1, retries=0, progress=False, pool_options={"start_method": "fork"})(forked)([1]))
    """)
    assert output_of(process) == "[True]"


@pytest.mark.parametrize("threads", [0, 1])
def test_functions_of_a_session_without_a_file_work(start, threads):
    """As in a notebook, whose kernel has other threads."""
    process = start(
        f"""
        import threading
        from opero import opmap

        for _ in range({threads}):
            threading.Thread(target=threading.Event().wait, daemon=True).start()

        FACTOR = 10

        def helper(x):
            return x * FACTOR

        @opmap(workers=2, progress=False, retries=0)
        def times(x):
            return helper(x)

        print(times([1, 2, 3]))
        """,
        without_file=True,
    )
    assert output_of(process) == "[10, 20, 30]"


def test_classes_of_a_session_without_a_file_work_in_forked_workers(start):
    process = start(
        """
        from dataclasses import dataclass
        from opero import opmap

        @dataclass(frozen=True)
        class Point:
            x: int

        @opmap(workers=2, progress=False, retries=0)
        def grow(point):
            return Point(point.x * 10)

        print(grow([Point(1), Point(2)]) == [Point(10), Point(20)])
        """,
        without_file=True,
    )
    assert output_of(process) == "True"


def test_a_script_without_a_guard_that_spawns_says_so(start):
    process = start("""
        from opero import opmap
        print(opmap(workers=1, progress=False, pool_options={"start_method": "spawn"})(abs)([1]))
    """)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "__main__" in err
    assert start.survivors() == []


INTERRUPTED = """
    import asyncio, itertools, os, signal, time
    from opero import opmap

    def work(item):
        os.write(1, b"running\\n")
        time.sleep(SECONDS)

    async def work_async(item):
        os.write(1, b"running\\n")
        await asyncio.sleep(SECONDS)

    if __name__ == "__main__":
        try:
            opmap(mode=MODE, workers=2, progress=False, pool_options=OPTIONS)(FUNCTION).run(itertools.count())
        finally:
            # What is pressed now is no business of the map, which has ended.
            while True:
                try:
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
                    break
                except KeyboardInterrupt:
                    pass
"""


def interrupted_script(mode: str, function: str, options: dict[str, Any] | None = None) -> str:
    words = {
        "SECONDS": "0.3" if mode == "thread" else "60",  # a thread cannot be stopped
        "MODE": repr(mode),
        "FUNCTION": function,
        "OPTIONS": repr(options),
    }
    source = INTERRUPTED
    for word, value in words.items():
        source = source.replace(word, value)
    return source


@pytest.mark.parametrize(
    ("mode", "function"),
    [
        ("process", "work"),
        ("process", "work_async"),
        ("async_process", "work_async"),
        ("thread", "work"),
        ("async", "work_async"),
    ],
)
def test_ctrl_c_that_only_the_program_hears_ends_a_map_with_one_error_and_no_process_left(start, mode, function):
    process = start(interrupted_script(mode, function))
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGINT
    assert err.splitlines().count("KeyboardInterrupt") == 1
    assert err.count("Traceback") == 1
    assert start.survivors() == []


@pytest.mark.soak
@pytest.mark.parametrize("whole_group", [False, True], ids=["one process", "whole group"])
@pytest.mark.parametrize("mode", PROCESS_MODES)
def test_ctrl_c_while_workers_start_leaves_no_process(start, mode, whole_group):
    for _ in range(10):  # each time it comes in another moment
        process = start(interrupted_script(mode, "work" if mode == "process" else "work_async"))
        until(lambda: len(start.survivors()) >= 2)
        if whole_group:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
        assert process.returncode == -signal.SIGINT
        assert err.splitlines().count("KeyboardInterrupt") == 1
        assert start.survivors() == []


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_ctrl_c_while_workers_are_spawned_leaves_no_process(start, method):
    process = start(interrupted_script("process", "work", {"start_method": method}))
    until(lambda: len(start.survivors()) >= 2)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    until(lambda: not start.survivors())


PRESSED_WHEN_IT_STARTS = """
import os, re, signal
from multiprocessing import util

def handles_ctrl_c(pid):
    status = open(f"/proc/{{pid}}/status").read()
    return any(int(mask, 16) & 1 << signal.SIGINT - 1 for mask in re.findall(r"Sig(?:Cgt|Ign):\\t(\\w+)", status))

start_as_ever = util.spawnv_passfds

def start(path, arguments, fds):
    pid = start_as_ever(path, arguments, fds)
    if "{started}" in " ".join(map(str, arguments)):
        while not handles_ctrl_c(pid):
            pass
        os.killpg(0, signal.SIGINT)
    return pid

if __name__ == "__main__":
    util.spawnv_passfds = start
"""


@pytest.mark.parametrize(
    ("method", "started"),
    [
        ("forkserver", "resource_tracker import main"),
        ("forkserver", "forkserver import main"),
        ("spawn", "--multiprocessing-fork"),
    ],
)
def test_ctrl_c_in_the_moment_in_which_a_process_starts_is_one_error_of_the_caller_only(start, method, started):
    script = textwrap.dedent(interrupted_script("process", "work", {"start_method": method}))
    process = start(PRESSED_WHEN_IT_STARTS.format(started=started) + script)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGINT
    assert err.splitlines().count("KeyboardInterrupt") == 1
    assert err.count("Traceback") == 1
    until(lambda: not start.survivors())


def test_ctrl_c_that_another_thread_is_given_does_not_break_into_what_is_half_made():
    reached = []

    def press_and_go_on():
        with Hold():
            thread = threading.Thread(target=signal.raise_signal, args=(signal.SIGINT,))
            thread.start()
            thread.join()
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        press_and_go_on()
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("mode", PROCESS_MODES)
def test_workers_end_when_their_parent_is_killed(start, mode):
    process = start(
        f"""
        import asyncio, itertools, time
        from opero import opmap

        def work(item):
            print("running", flush=True)
            time.sleep(0.2)

        async def work_async(item):
            print("running", flush=True)
            await asyncio.Event().wait()

        if __name__ == "__main__":
            function = work if {mode!r} == "process" else work_async
            opmap(mode={mode!r}, workers=2, progress=False)(function).run(itertools.count())
        """
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    until(lambda: not start.survivors())


@pytest.mark.parametrize("mode", PROCESS_MODES)
def test_an_uncaught_error_ends_a_script_with_no_process_left(start, mode):
    process = start(
        f"""
        import asyncio
        from opero import opmap

        async def work(item):
            if item == 1:
                raise ValueError("the reason")
            await asyncio.Event().wait()

        if __name__ == "__main__":
            opmap(mode={mode!r}, workers=2, progress=False, retries=0, return_exceptions=False)(work).run(range(9))
        """
    )
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "ValueError: the reason" in err
    assert start.survivors() == []


def test_a_script_that_ends_with_an_open_stream_leaves_no_process(start):
    process = start("""
        import itertools
        from opero import opmap

        if __name__ == "__main__":
            stream = opmap(workers=2, progress=False)(abs).stream(itertools.count())
            print(next(stream).result)
    """)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (0, "0\n", "")
    until(lambda: not start.survivors())


# Workers that are replaced after so many items


@pytest.mark.parametrize("most", [1, 7])
def test_a_worker_is_replaced_after_as_many_items_as_it_may_run(processes, most):
    mapped = processes.map(lambda item: (item, os.getpid()), pool_options={"max_tasks_per_worker": most})
    results = mapped.run(range(24))
    assert [item for item, _ in results] == list(range(24))
    runs = Counter(pid for _, pid in results)
    assert max(runs.values()) == most
    # All but the two that were there at the end have run what they may.
    assert sum(count < most for count in runs.values()) <= 2


def test_a_worker_that_is_to_be_replaced_is_not_waited_for_longer_than_it_may_take_to_end(processes, monkeypatch):
    """Its own threads would keep it for ever; what it has reported counts."""
    monkeypatch.setattr(process_worker, "PEACE_SECONDS", 0.2)

    def work(item):
        threading.Thread(target=threading.Event().wait).start()
        return item

    options = {"start_method": "fork", "max_tasks_per_worker": 1}
    started = time.monotonic()
    assert processes.map(work, workers=1, pool_options=options).run(range(3)) == [0, 1, 2]
    assert time.monotonic() - started < PATIENCE


def test_large_batches_do_not_run_more_items_than_a_worker_may(processes):
    mapped = processes.map(lambda item: (item, os.getpid()), pool_options={"max_tasks_per_worker": 300})
    results = mapped.run(range(2000))
    assert [item for item, _ in results] == list(range(2000))
    runs = Counter(pid for _, pid in results)
    assert max(runs.values()) == 300
    assert sum(count < 300 for count in runs.values()) <= 2


def test_items_that_need_attempts_count_for_each(processes, journal):
    def work(item):
        journal.add(os.getpid())
        raise OSError(item)

    mapped = processes.map(work, retries=3, min_delay=0.01, pool_options={"max_tasks_per_worker": 2})
    outcomes = processes.stream(mapped, range(5))
    assert [type(outcome.error) for outcome in outcomes] == [OSError] * 5
    assert [outcome.attempts for outcome in outcomes] == [4] * 5
    attempts = Counter(journal.lines()).values()
    assert (sum(attempts), max(attempts)) == (20, 2)
    assert sum(count < 2 for count in attempts) <= 2


def test_a_crash_before_a_worker_is_to_be_replaced_is_charged_to_its_item_only(processes):
    def work(item):
        if item == 10:
            die_by_signal()
        return item

    results = processes.map(work, retries=0, pool_options={"max_tasks_per_worker": 4}).run(range(30))
    assert isinstance(results.pop(10), WorkerCrashedError)
    assert results == [n for n in range(30) if n != 10]


def test_a_long_item_does_not_wait_behind_another_while_a_worker_is_replaced(journal):
    """The second item of the slow worker would begin only after its first one, which waits for it."""

    @opmap(mode="process", workers=2, progress=False, retries=0, pool_options={"max_tasks_per_worker": 1})
    def work(item):
        journal.add(item)
        if item == 0:
            journal.wait_for(3)
        return item

    assert work(range(4)) == [0, 1, 2, 3]


def test_an_initializer_runs_in_each_replaced_worker(processes, journal):
    mapped = processes.map(
        lambda item: item,
        pool_options={"max_tasks_per_worker": 2, "initializer": journal.add, "initargs": ("prepared",)},
    )
    assert mapped.run(range(10)) == list(range(10))
    assert journal.count("prepared") >= 5


def test_no_process_runs_more_coroutines_than_it_may_while_another_is_replaced(journal):
    async def work(item):
        journal.add(f"{os.getpid()} +")
        await asyncio.sleep(0.01)
        journal.add(f"{os.getpid()} -")

    options = {"max_tasks_per_worker": 5, "concurrency": 3}
    opmap(mode="async_process", workers=2, progress=False, pool_options=options)(work).run(range(40))
    running: Counter[str] = Counter()
    for line in journal.lines():
        pid, sign = line.split()
        running[pid] += {"+": 1, "-": -1}[sign]
        assert running[pid] <= 3


@pytest.mark.parametrize(("most", "error"), [(0, ValueError), (1.5, TypeError), (None, TypeError)])
@pytest.mark.parametrize("name", PROCESS_MODES)
def test_a_wrong_number_of_items_for_a_worker_raises_and_is_named(name, most, error):
    async def work(item):
        return item

    with pytest.raises(error, match="max_tasks_per_worker"):
        opmap(mode=name, pool_options={"max_tasks_per_worker": most})(work)


class OnlyForWorkers:
    """Can be unpickled anywhere but in the process that is named."""

    def __init__(self, process):
        self.process = process

    def __reduce__(self):
        return load_elsewhere, (self.process,)


def load_elsewhere(process):
    if os.getpid() == process:
        msg = "not here"
        raise ValueError(msg)
    return OnlyForWorkers(process)


def die_with_an_unreadable_result(item):
    parent, number = item
    if number != 1:
        return number
    threading.Timer(0.2, os._exit, [7]).start()
    return OnlyForWorkers(parent)


def leave_a_child(item):
    folder, number = item
    if number < 2:
        child = os.fork()
        if child == 0:
            hang()
            os._exit(0)
        Path(folder, str(child)).touch()
        if number == 0:
            hang()
        os._exit(3)
    return number


def test_the_children_of_a_worker_do_not_hide_its_end(tmp_path):
    options = {"mode": "process", "workers": 2, "retries": 0, "progress": False, "attempt_timeout": 0.5}
    begin = time.monotonic()
    try:
        mapped = opmap(**options, return_exceptions=True)
        killed, crashed, right = mapped(leave_a_child)([(tmp_path, n) for n in range(3)])
    finally:
        for child in tmp_path.iterdir():
            os.kill(int(child.name), signal.SIGKILL)
    assert time.monotonic() - begin < 20
    assert isinstance(killed, TimeoutError)
    assert isinstance(crashed, WorkerCrashedError)
    assert right == 2


def test_a_worker_that_was_in_time_is_not_killed_because_the_input_is_slow():
    def items():
        for number in range(12):
            if number % 3 == 2:
                # Longer than the limit: all that was sent has ended long since.
                time.sleep(0.4)
            yield number

    options = {"mode": "process", "workers": 2, "retries": 0, "progress": False, "attempt_timeout": 0.3}
    seen = opmap(**options)(lambda number: (number, os.getpid()))(items())
    assert [number for number, _ in seen] == list(range(12))
    assert len({process for _, process in seen}) <= 2


def zeros(size):
    return bytes(size)


def test_a_worker_that_was_in_time_is_not_killed_in_the_middle_of_a_large_report():
    options = {"mode": "process", "workers": 2, "retries": 0, "progress": False, "attempt_timeout": 1.0}
    stream = opmap(**options)(zeros).stream([1, 20_000_000, 20_000_000])
    sizes = [len(next(stream).result)]
    # Longer than the limit: nobody looks at what is reported meanwhile.
    time.sleep(1.5)
    sizes += [len(outcome.result) for outcome in stream]
    assert sizes == [1, 20_000_000, 20_000_000]


def test_a_worker_that_dies_after_an_unreadable_report_costs_its_item_only():
    mapped = opmap(mode="process", workers=2, progress=False, retries=0)(die_with_an_unreadable_result)
    outcomes = []
    for outcome in mapped.stream([(os.getpid(), number) for number in range(4)]):
        outcomes.append(outcome)
        if outcome.index == 0:
            # The worker ends while nobody looks at what it has reported.
            time.sleep(0.5)
    assert [outcome.result for outcome in outcomes if outcome.error is None] == [0, 2, 3]
