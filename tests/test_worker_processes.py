"""Worker processes are good citizens of multiprocessing, of logging, and of the machine."""

from __future__ import annotations

import abc
import atexit
import collections
import concurrent.futures
import contextlib
import dataclasses
import importlib
import logging
import multiprocessing
import multiprocessing.util
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import types
import warnings
import weakref
from pathlib import Path

import attrs
import cloudpickle
import numpy as np
import pytest
from side_by_side import hang, until

from opero import OperoError, opmap
from opero.core import CallTimeoutError, RemoteError

PATIENCE = 10.0
START_METHODS = ("fork", "spawn", "forkserver")

every_method = pytest.mark.parametrize("method", START_METHODS)


def mapped(function, method, *, workers=2, retries=0, pool_options=None, **options):
    pool_options = {"start_method": method, **(pool_options or {})}
    given = {"workers": workers, "retries": retries, "progress": False, "return_exceptions": True, **options}
    return opmap(mode="process", pool_options=pool_options, **given)(function)


# What multiprocessing shares


def use(item, *, queue, lock, event, proxy):
    with lock:
        queue.put(item)
        proxy[item] = os.getpid()
    return event.is_set()


given = {}


def prepare(**shared):
    given.update(shared)


def use_given(item):
    return use(item, **given)


@every_method
@pytest.mark.parametrize("way", ["arguments", "initargs"])
def test_what_multiprocessing_shares_reaches_workers(method, way):
    context = multiprocessing.get_context(method)
    with context.Manager() as manager:
        shared = {"queue": context.Queue(), "lock": context.Lock(), "event": context.Event(), "proxy": manager.dict()}
        shared["event"].set()
        if way == "arguments":
            results = mapped(use, method, workers=1)([1, 2, 3], **shared)
        else:
            options = {"initializer": prepare_by_position, "initargs": tuple(shared.values())}
            results = mapped(use_given, method, workers=1, pool_options=options)([1, 2, 3])
        assert results == [True] * 3
        assert sorted(shared["queue"].get(timeout=PATIENCE) for _ in range(3)) == [1, 2, 3]
        assert sorted(shared["proxy"].keys()) == [1, 2, 3]
        shared["queue"].close()
        shared["queue"].join_thread()


def prepare_by_position(queue, lock, event, proxy):
    prepare(queue=queue, lock=lock, event=event, proxy=proxy)


def meet(folder):
    """Let each of two workers have an item."""
    (folder / str(os.getpid())).touch()
    until(lambda: len(list(folder.iterdir())) == 2)


def who_am_i(folder):
    meet(folder)
    process = multiprocessing.current_process()
    return process.name, bytes(process.authkey), multiprocessing.parent_process().pid


@every_method
def test_workers_have_names_and_the_programs_key(method, tmp_path):
    names, keys, parents = zip(*mapped(who_am_i, method)([tmp_path] * 2), strict=True)
    assert len(set(names)) == 2
    assert "MainProcess" not in names
    assert set(keys) == {bytes(multiprocessing.current_process().authkey)}
    assert set(parents) == {os.getpid()}


# The end of a worker


class Connection:
    pass


def connect(path):
    given["connection"] = Connection()
    atexit.register(note, path, "atexit")
    weakref.finalize(given["connection"], note, path, "weakref")
    multiprocessing.util.Finalize(None, note, args=(path, "Finalize"), exitpriority=10)


def note(path, text):
    with path.open("a") as file:
        file.write(f"{text}\n")


def work_until(item):
    if item == "fails":
        raise ValueError(item)
    if item == "long":
        hang()
    return item


@every_method
@pytest.mark.parametrize("end", ["items", "failure", "timeout"])
def test_exit_handlers_of_workers_run(method, end, tmp_path):
    path = tmp_path / "notes"
    options = {"pool_options": {"initializer": connect, "initargs": (path,)}, "workers": 1}
    items = {"items": [1], "failure": [1, "fails"], "timeout": ["long"]}[end]
    if end == "failure":
        with pytest.raises(ValueError, match="fails"):
            mapped(work_until, method, return_exceptions=False, **options)(items)
    elif end == "timeout":
        (error,) = mapped(work_until, method, attempt_timeout=0.3, **options)(items)
        assert isinstance(error, CallTimeoutError)
    else:
        mapped(work_until, method, **options)(items)
    assert sorted(path.read_text().split()) == ["Finalize", "atexit", "weakref"]


def test_exit_handlers_of_the_program_do_not_run_in_forked_workers(tmp_path):
    """Of a temporary folder, for example."""
    owner = Connection()
    finalizer = weakref.finalize(owner, note, tmp_path / "notes", "the program's")
    assert mapped(abs, "fork")([-1]) == [1]
    assert not (tmp_path / "notes").exists()
    assert finalizer.alive
    finalizer.detach()


OF_THE_MAIN_MODULE = """
import os, sys, tempfile
from opero import opmap

folder = tempfile.TemporaryDirectory(dir=sys.argv[1])


def has_folder(item):
    return os.path.isdir(folder.name)


if __name__ == "__main__":
    options = {"mode": "process", "workers": 1, "retries": 0, "progress": False}
    for _ in range(2):
        assert opmap(**options, pool_options={"start_method": sys.argv[2]})(has_folder)([1, 2]) == [True, True]
"""


@every_method
def test_exit_handlers_of_a_main_module_run_in_each_process_that_has_imported_it(method, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(OF_THE_MAIN_MODULE)
    (tmp_path / "folders").mkdir()
    subprocess.run([sys.executable, program, tmp_path / "folders", method], check=True, timeout=60)
    assert list((tmp_path / "folders").iterdir()) == []


def stay_in_block(path):
    try:
        path.with_suffix(".begun").touch()
        hang()
    finally:
        path.with_suffix(".tidy").touch()


@pytest.mark.parametrize("end", ["timeout", "stream"])
def test_what_runs_when_a_worker_is_ended_tidies_up(end, tmp_path):
    path = tmp_path / "item"
    if end == "timeout":
        (error,) = mapped(stay_in_block, "fork", attempt_timeout=0.3)([path])
        assert isinstance(error, CallTimeoutError)
    else:
        stream = mapped(lambda item: stay_in_block(item) if item else 0, "fork").stream([None, path])
        next(stream)
        until(path.with_suffix(".begun").exists)
        stream.close()
    assert path.with_suffix(".tidy").exists()


def ignore_everything(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    path.write_text(str(os.getpid()))
    hang()


def test_a_worker_that_does_not_heed_sigterm_is_killed_a_second_later(tmp_path):
    begun = time.monotonic()
    (error,) = mapped(ignore_everything, "fork", attempt_timeout=0.3)([tmp_path / "pid"])
    assert isinstance(error, CallTimeoutError)
    assert 1 < time.monotonic() - begun < PATIENCE / 2


def start_a_program(path):
    program = subprocess.Popen(["sleep", "60"])
    path.write_text(str(program.pid))
    program.wait()


def has_ended(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_programs_that_an_ended_worker_has_started_end_with_it(tmp_path):
    path = tmp_path / "pid"
    (error,) = mapped(start_a_program, "fork", attempt_timeout=0.5)([path])
    assert isinstance(error, CallTimeoutError)
    until(lambda: has_ended(path.read_text()))


KILLED = """
    import os, sys
    from opero import opmap
    from side_by_side import hang

    @opmap(workers=2, retries=0, progress=False, pool_options={"start_method": sys.argv[1]})
    def work(name):
        with open(name, "w") as file:
            print(os.getpid(), file=file, flush=True)
            try:
                hang()
            finally:
                print("tidy", file=file)

    if __name__ == "__main__":
        work(["first", "second"])
"""


@every_method
def test_busy_workers_of_a_program_that_is_killed_tidy_up_and_end(method, tmp_path):
    script, files = tmp_path / "script.py", [tmp_path / "first", tmp_path / "second"]
    script.write_text(textwrap.dedent(KILLED))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen([sys.executable, script, method], cwd=tmp_path, env=environment) as program:
        until(lambda: all(file.exists() and file.read_text() for file in files))
        pids = [file.read_text().strip() for file in files]
        program.kill()
    until(lambda: all(map(has_ended, pids)))
    assert [file.read_text().split() for file in files] == [[pid, "tidy"] for pid in pids]


INTERRUPTED = """
    import os, signal, subprocess, sys, time
    from opero import opmap

    def convert(path):
        # A program that looks like a success though Ctrl-C has ended it.
        source = "import sys, threading; open(sys.argv[1], 'w'); threading.Event().wait(20)"
        subprocess.run([sys.executable, "-c", source, path], stderr=subprocess.DEVNULL)
        return "done"

    options = {"cache": True, "cache_backend": "disk", "cache_options": {"folder_name": "kept"}, "cache_namespace": "n"}
    mapped = opmap(workers=1, retries=0, progress=False, pool_options={"start_method": METHOD}, **options)
    if __name__ == "__main__":
        convert = mapped(convert)
        if len(sys.argv) > 2:
            print(convert.cache_info().currsize)
        else:
            try:
                convert([sys.argv[1]])
            except KeyboardInterrupt:
                print("interrupted")
    else:
        convert = mapped(convert)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_programs_of_workers_hear_ctrl_c_and_what_they_have_left_is_not_stored(tmp_path, method):
    script, begun = tmp_path / "script.py", tmp_path / "begun"
    script.write_text(textwrap.dedent(INTERRUPTED).replace("METHOD", repr(method)))
    command = [sys.executable, str(script), str(begun)]
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    until(begun.exists)
    asked = time.monotonic()
    os.killpg(run.pid, signal.SIGINT)
    assert run.communicate(timeout=PATIENCE)[0] == "interrupted\n"
    assert time.monotonic() - asked < PATIENCE / 2
    again = subprocess.run([*command, "again"], capture_output=True, text=True, check=True, env=environment)
    assert again.stdout == "0\n"


def warn(item):
    warnings.warn(f"item {item}", FutureWarning, stacklevel=1)


@every_method
def test_warnings_are_what_the_program_makes_of_them(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        (error,) = mapped(warn, method)([1])
    assert (type(error), str(error)) == (FutureWarning, "item 1")


# Logging


class Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.name, record.getMessage(), record.processName != "MainProcess"))


@pytest.fixture
def kept():
    handler, logger = Kept(), logging.getLogger("of.a.program")
    logging.getLogger().addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    yield handler
    logging.getLogger().removeHandler(handler)
    logger.setLevel(before)


def log(item):
    logger = logging.getLogger("of.a.program")
    logger.info("item %s", item)
    logger.debug("not shown")
    return item


@every_method
def test_log_records_of_workers_reach_the_programs_handlers_once(kept, method):
    assert mapped(log, method, workers=1)([1, 2, 3]) == [1, 2, 3]
    assert sorted(kept.lines) == [("of.a.program", f"item {item}", True) for item in (1, 2, 3)]


def begin():
    # As a library does that is imported there.
    logging.getLogger("of.a.library").addHandler(logging.NullHandler())
    logging.getLogger("of.a.program").info("begins")


def finish():
    # More than a pipe holds.
    for number in range(1_000):
        logging.getLogger("of.a.program").info("ends%s", " " * number)


@every_method
def test_log_records_of_initializer_and_finalizer_reach_the_programs_handlers_once(kept, method):
    options = {"initializer": begin, "finalizer": finish}
    mapped(log, method, workers=1, pool_options=options)([1])
    said = [text.rstrip() for _, text, is_of_worker in kept.lines if is_of_worker]
    assert said == ["begins", "item 1"] + ["ends"] * 1_000


def log_and_fail():
    logging.getLogger("of.a.program").info("begins")
    raise LookupError


@every_method
def test_log_records_of_an_initializer_that_fails_reach_the_programs_handlers(kept, method):
    with pytest.raises(OperoError, match="LookupError"):
        mapped(log, method, workers=1, pool_options={"initializer": log_and_fail})([1])
    assert [text for _, text, _ in kept.lines] == ["begins"]


def log_for_ever(_item):
    try:
        hang()
    finally:
        logging.getLogger("of.a.program").info("tidies up")


@every_method
def test_log_records_of_a_worker_that_is_ended_reach_the_programs_handlers(kept, method):
    (error,) = mapped(log_for_ever, method, workers=1, attempt_timeout=0.2)([1])
    assert isinstance(error, CallTimeoutError)
    assert [text for _, text, _ in kept.lines] == ["tidies up"]


class Everything(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)


@pytest.fixture
def records():
    handler = Everything()
    logging.getLogger().addHandler(handler)
    yield handler.records
    logging.getLogger().removeHandler(handler)


class Request:
    def __init__(self):
        self.lock = threading.Lock()

    def __repr__(self):
        return "the request"


class StaysThere:
    def __init__(self):
        self.name = "there"

    def __setstate__(self, state):
        raise LookupError("not here")


class RefusedError(Exception):
    def __init__(self, code, body):
        super().__init__(f"{code}: {body}")


def log_extras(item):
    extra = {"request": Request(), "other": StaysThere(), "error": RefusedError(1, "no"), "tags": ["a"]}
    logging.getLogger("of.a.program").warning("item %s for %r", item, extra["request"], extra=extra)


@every_method
def test_a_log_record_says_in_words_what_of_it_cannot_travel(records, capfd, method):
    mapped(log_extras, method, workers=1)([1])
    (record,) = records
    assert record.getMessage() == "item 1 for the request"
    assert (record.request, record.tags, record.error) == ("the request", ["a"], "RefusedError('1: no')")
    assert "StaysThere object" in record.other
    assert capfd.readouterr().err == ""


def log_what_only_workers_know(folder):
    sys.path.append(str(folder))
    logging.getLogger("of.a.program").warning("known", extra={"plugin": importlib.import_module("plugin").Plugin()})
    return 1


@every_method
def test_a_log_record_with_what_only_workers_know_arrives(records, tmp_path, method):
    (tmp_path / "plugin.py").write_text("class Plugin: pass")
    assert mapped(log_what_only_workers_know, method, workers=1)([tmp_path]) == [1]
    assert [(record.msg, record.plugin) for record in records] == [("known", "cannot be unpickled")]


def log_mappings(item):
    logger = logging.getLogger("of.a.program")
    logger.warning("%(item)s", collections.defaultdict(lambda: 0, item=item))
    logger.warning("%(item)s", types.MappingProxyType({"item": item}))
    logger.warning("%(item)s", {"item": item, Request: 0, Request(): 0})


@every_method
def test_log_records_whose_mapping_of_arguments_cannot_be_pickled_arrive(records, capfd, method):
    mapped(log_mappings, method, workers=1)([1])
    assert [record.getMessage() for record in records] == ["1", "1", "1"]
    assert capfd.readouterr().err == ""


def refuse():
    raise RefusedError(404, "gone")


def log_an_error(item):
    logger = logging.getLogger("of.a.program")
    try:
        refuse()
    except RefusedError:
        logger.exception("failed %d of %s", item, "two")
    logger.warning({"event": "failed"})


@every_method
def test_handlers_see_the_parts_of_a_workers_log_record(records, method):
    mapped(log_an_error, method, workers=1)([1])
    failed, structured = records
    assert (failed.msg, failed.args, failed.getMessage()) == ("failed %d of %s", (1, "two"), "failed 1 of two")
    kind, error, _ = failed.exc_info
    assert (kind, str(error)) == (RefusedError, "404: gone")
    lines = logging.Formatter().format(failed).splitlines()
    assert lines[:2] == ["failed 1 of two", "Traceback (most recent call last):"]
    assert lines[-1] == f"{RefusedError.__module__}.RefusedError: 404: gone"
    # Of those that format it by themselves.
    assert "in refuse" in "".join(traceback.format_exception(error))
    assert structured.msg == {"event": "failed"}


def log_a_missing_file(folder):
    try:
        (folder / "missing").read_text()
    except FileNotFoundError:
        logging.getLogger("of.a.program").exception("failed")


@every_method
def test_a_built_in_error_in_a_log_record_arrives_with_all_that_it_has(records, tmp_path, method):
    mapped(log_a_missing_file, method, workers=1)([tmp_path])
    kind, error, _ = records[0].exc_info
    assert (kind, error.filename) == (FileNotFoundError, str(tmp_path / "missing"))
    assert "in log_a_missing_file" in "".join(traceback.format_exception(error))


def give_the_root_a_handler():
    logging.getLogger().addHandler(logging.NullHandler())


def configure_logging():
    logging.basicConfig(filename=os.devnull, level=logging.INFO)
    logging.getLogger("of.a.program").info("begins")


@every_method
@pytest.mark.parametrize("initializer", [give_the_root_a_handler, configure_logging])
def test_log_records_stay_where_an_initializer_has_configured_logging(kept, method, initializer):
    options = {"initializer": initializer, "finalizer": finish}
    assert mapped(log, method, workers=1, pool_options=options)([1, 2, 3]) == [1, 2, 3]
    assert kept.lines == []


# Random numbers, threads of numeric libraries, large arrays


def draw(folder):
    meet(folder)
    return os.getpid(), random.random(), float(np.random.random())  # noqa: NPY002 - the state that is shared


@every_method
def test_random_numbers_differ_in_each_worker(method, tmp_path):
    drawn = mapped(draw, method)([tmp_path] * 6)
    assert len({pid for pid, _, _ in drawn}) == 2
    assert len({number for _, number, _ in drawn}) == len({number for _, _, number in drawn}) == 6


def threads_allowed(_item):
    return os.environ.get("OMP_NUM_THREADS")


@pytest.mark.parametrize("given", [None, "7"])
@pytest.mark.parametrize("asked", [None, 3])
def test_numeric_libraries_have_a_share_of_the_cpus_that_the_program_may_use(monkeypatch, given, asked):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: range(8), raising=False)
    options = {} if asked is None else {"threads_per_worker": asked}
    expected = "3" if asked else given or "4"
    assert mapped(threads_allowed, "fork", pool_options=options)([1]) == [expected]


@pytest.mark.parametrize("name", ["NUMBA_NUM_THREADS", "POLARS_MAX_THREADS", "OPENCV_FOR_THREADS_NUM"])
def test_a_setting_of_one_librarys_own_stays_and_leaves_the_others_their_share(monkeypatch, name):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv(name, "7")
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: range(8), raising=False)
    assert mapped(lambda _item: (os.environ.get("OMP_NUM_THREADS"), os.environ[name]), "fork")([1]) == [("4", "7")]


SHARES = """
    import sys
    from multiprocessing.shared_memory import SharedMemory
    from opero import opmap

    @opmap(workers=2, retries=0, progress=False, pool_options={"start_method": sys.argv[1]})
    def share(number):
        block = SharedMemory(create=True, size=1)
        block.buf[0] = number
        block.close()
        return block.name

    if __name__ == "__main__":
        for name in share([1, 2, 3]):
            block = SharedMemory(name)
            print(block.buf[0])
            block.close()
            block.unlink()
"""


@every_method
def test_shared_memory_that_a_worker_has_made_outlives_it(method, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(SHARES))
    command = [sys.executable, program, method]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.stdout.split(), run.stderr) == (["1", "2", "3"], "")


def change(item, *, array):
    array[item] += 1
    owner = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return float(array.sum()), type(owner.obj).__name__


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_large_array_is_mapped_by_each_worker_for_itself(method):
    array = np.ones(500_000)
    results = mapped(change, method)([0, 1, 2, 3], array=array)
    assert array.sum() == 500_000
    # A worker sees its own changes, and nobody else's.
    assert max(total for total, _ in results) <= 500_004
    assert {base for _, base in results} == {"mmap"}


def square_in_place(item, *, array):
    array[item] **= 2
    return type(array).__name__


PARTS = {
    "all": lambda array: array,
    "a part": lambda array: array[100:][:3],
    "a part of rows": lambda array: array[100:].reshape(-1, 2)[1:],
    "columns": lambda array: array.reshape(2, -1).T,
}


@every_method
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_what_workers_write_to_a_mapped_file_is_in_the_file(tmp_path, method, part):
    file = np.memmap(tmp_path / "numbers", dtype="int64", mode="w+", shape=(1000,), offset=8)
    file[:] = range(1000)
    expected = part(file.copy()) ** 4
    square = mapped(square_in_place, method)
    with square.pool():
        for _ in range(2):
            assert set(square(range(len(expected)), array=part(file))) == {"memmap"}
    assert np.array_equal(part(file), expected)


@every_method
@pytest.mark.parametrize(
    "array",
    [lambda file: file[::2], lambda file: file[:0], lambda file: np.memmap(file.filename, dtype="int64", mode="c")],
    ids=["strides", "nothing", "copy on write"],
)
def test_what_is_no_whole_piece_of_a_mapped_file_is_an_argument_too(tmp_path, method, array):
    file = np.memmap(tmp_path / "numbers", dtype="int64", mode="w+", shape=(1000,))
    file[:] = range(1000)
    given = array(file)
    given[:1] = 5
    assert mapped(total_of, method)([0, 1], array=given) == [given.sum()] * 2


@every_method
def test_a_mapped_file_that_is_removed_is_an_argument_too(tmp_path, method):
    file = np.memmap(tmp_path / "numbers", dtype="int64", mode="w+", shape=(1000,))
    file[:] = range(1000)
    (tmp_path / "numbers").unlink()
    assert mapped(total_of, method)([0, 1], array=file) == [file.sum()] * 2


def total_of(_item, *, array):
    return int(array.sum())


# Inside of workers of others


def map_inside(item):
    return mapped(abs, "fork")([-item, item])


def inside_pool():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(map_inside, [1, 2])


def inside_pathos():
    from pathos.pools import ProcessPool

    pool = ProcessPool(nodes=1, id="inside")
    try:
        return pool.map(map_inside, [1, 2])
    finally:
        pool.close()
        pool.join()
        pool.clear()


def inside_executor():
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        return list(executor.map(map_inside, [1, 2]))


def map_as_usual(item):
    return opmap(workers=2, retries=0, progress=False, return_exceptions=True)(abs)([-item, item])


def inside_joblib():
    """Its workers have a start method of loky's, which only that knows."""
    import joblib  # here, because each spawned worker imports this file

    try:
        return joblib.Parallel(2, backend="loky")(joblib.delayed(map_as_usual)(item) for item in [1, 2])
    finally:
        joblib.externals.loky.get_reusable_executor().shutdown()


@pytest.mark.parametrize("inside", [inside_pool, inside_pathos, inside_executor, inside_joblib])
def test_a_map_works_inside_of_a_worker_of_another_pool(inside):
    assert inside() == [[1, 1], [2, 2]]


def map_by_the_fork_server(item):
    return sum(mapped(abs, "forkserver")(range(item)))


def test_a_forked_worker_has_a_fork_server_of_its_own():
    assert mapped(abs, "forkserver")([-1]) == [1]
    assert mapped(map_by_the_fork_server, "fork")([3]) == [3]


WITH_A_THREAD = """
    import threading

    lock = threading.Lock()

    def hold():
        with lock:
            threading.Event().wait()

    holder = threading.Thread(target=hold, daemon=True)
    holder.start()

    def work(item):
        return item, holder.is_alive()
"""


def test_workers_are_not_forked_beside_threads_that_begin_when_a_module_is_imported(tmp_path):
    """The fork server imports the function's module, once for all workers."""
    (tmp_path / "with_a_thread.py").write_text(textwrap.dedent(WITH_A_THREAD))
    program = tmp_path / "program.py"
    program.write_text(
        "import with_a_thread\n"
        "from opero import opmap\n"
        "if __name__ == '__main__':\n"
        "    for _ in range(2):\n"
        "        print(opmap(workers=1, retries=0, progress=False)(with_a_thread.work)([1, 2]))\n"
    )
    run = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert (run.stdout, run.stderr) == ("[(1, True), (2, True)]\n" * 2, "")


# What goes by value, and errors


def test_a_module_that_is_registered_with_cloudpickle_goes_by_value():
    module = types.ModuleType("made_at_run_time")
    exec("def triple(item):\n    return 3 * item", vars(module))
    sys.modules["made_at_run_time"] = module
    cloudpickle.register_pickle_by_value(module)
    try:
        assert mapped(module.triple, "spawn")([1, 2]) == [3, 6]
        assert mapped(call, "spawn")([module.triple]) == [30]
    finally:
        cloudpickle.unregister_pickle_by_value(module)
        del sys.modules["made_at_run_time"]


def call(function):
    return function(10)


def query(item):
    try:
        reset()
    except ConnectionError as error:
        raise RuntimeError("query failed") from error


def reset():
    raise ConnectionError("reset")


def query_several(item):
    try:
        query(item)
    except RuntimeError as error:
        raise ExceptionGroup("several", [error]) from None


def is_of_the_connection(error):
    error = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
    return isinstance(error.__cause__, ConnectionError)


@pytest.mark.parametrize("function", [query, query_several])
@pytest.mark.parametrize("mode", ["thread", "process"])
def test_a_cause_arrives_with_its_exception(mode, function):
    ask = opmap(
        mode=mode,
        workers=1,
        retries=2,
        min_delay=0,
        retry_on=is_of_the_connection,
        progress=False,
        return_exceptions=True,
    )(function)
    (error,) = ask([1])
    assert ask.stats.attempts == 3
    assert is_of_the_connection(error)


class ClientError(Exception):
    def __init__(self, text, operation):
        super().__init__(f"{text} in {operation}")
        self.its = text, operation

    def __reduce__(self):
        return ClientError, self.its


@every_method
def test_a_class_made_in_a_function_is_one_class_in_all_processes(method):
    class Shape:
        pass

    class ShapeError(Exception):
        pass

    def look(shape):
        if isinstance(shape, Shape):
            return Shape()
        raise ShapeError

    work = mapped(look, method, retries=1, min_delay=0, retry_on=ShapeError)
    shape, error = work([Shape(), None])
    assert (type(shape), type(error)) == (Shape, ShapeError)
    assert work.stats.attempts == 3


def with_slots():
    class Point:
        __slots__ = ("x",)

        def __init__(self, x):
            self.x = x

    return Point


def with_slots_of_dataclasses():
    @dataclasses.dataclass(slots=True, weakref_slot=True)
    class Point:
        x: int

    return Point


def with_slots_of_attrs():
    @attrs.define
    class Point:
        x: int

    return Point


def with_slots_below_others():
    class Named(abc.ABC):
        __slots__ = ("__name", "__weakref__", "_x")

        @abc.abstractmethod
        def name(self): ...

    @dataclasses.dataclass(frozen=True, slots=True)
    class Point(Named):
        x: int

        def name(self): ...

    return Point


@every_method
@pytest.mark.parametrize("make", [with_slots, with_slots_of_dataclasses, with_slots_of_attrs, with_slots_below_others])
def test_instances_of_a_class_with_slots_come_back(method, make):
    cls = make()

    def move(point):
        return hasattr(point, "__dict__"), cls(point.x + 1)

    ((has_more, point),) = mapped(move, method)([cls(1)])
    assert not has_more
    assert (type(point), point.x) == (cls, 2)


def raise_modelled(_item):
    raise type("NoSuchKey", (ClientError,), {"__module__": "made.by.a.factory"})("no key", "GetObject")


def test_an_error_of_a_class_made_at_run_time_arrives_as_what_it_says_by_itself():
    """As botocore's modelled errors do."""
    (error,) = mapped(raise_modelled, "fork")([1])
    assert type(error) is ClientError
    assert not isinstance(error, RemoteError)
    assert str(error) == "no key in GetObject"


class UnanswerableError(Exception):
    """Its text needs an answer of the server's, which cannot be sent."""

    def __init__(self, code):
        super().__init__()
        self.code = code
        self.answers = OpenAnswers()

    def __str__(self):
        return (f"quota exceeded: {self.code}" if self.answers else str(self.code)).strip()


class OpenAnswers:
    def __reduce__(self):
        raise TypeError("there is a connection in it")


def ask_in_vain(code):
    raise UnanswerableError(code)


@every_method
@pytest.mark.parametrize("code", ["", "5"])
def test_an_error_whose_text_needs_what_cannot_be_sent_arrives_as_one_that_says_the_same(method, code):
    (error,) = mapped(ask_in_vain, method)([code])
    assert isinstance(error, RemoteError)
    assert error.error_class.__name__ == "UnanswerableError"
    assert str(error).endswith(f"UnanswerableError: quota exceeded: {code}".strip())


ENDED_EARLY = """
import os, signal, socket
from opero import opmap

parent, make = os.getpid(), socket.socketpair


def make_and_end():
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
    return make()


async def echo(item):
    return item


socket.socketpair = make_and_end
options = {"mode": "process", "workers": 1, "retries": 0, "progress": False, "return_exceptions": True}
print(*map(type, opmap(**options, pool_options={"start_method": "fork"})(echo).run([1])))
"""


def test_a_worker_that_is_ended_while_it_makes_its_event_loop_says_nothing():
    run = subprocess.run([sys.executable, "-c", ENDED_EARLY], capture_output=True, text=True, check=True, timeout=60)
    assert "WorkerCrashedError" in run.stdout
    assert run.stderr == ""


ENDED_WHILE_FORKED = """
import os, pathlib, signal, sys
from opero import opmap

once = pathlib.Path(sys.argv[1])


def end_the_first():
    if not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGTERM)


signal.signal(signal.SIGTERM, lambda *_: print("the handler of the program", file=sys.stderr))
os.register_at_fork(after_in_child=end_the_first)
print(opmap(mode="process", workers=1, retries=0, progress=False, pool_options={"start_method": "fork"})(abs)([-1]))
"""


def test_a_worker_that_is_ended_while_it_is_forked_runs_no_handler_of_the_program(tmp_path):
    command = [sys.executable, "-c", ENDED_WHILE_FORKED, tmp_path / "once"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout == "[1]\n"
    assert run.stderr == ""
    assert (tmp_path / "once").exists()
