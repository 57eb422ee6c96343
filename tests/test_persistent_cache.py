"""The cache on disk and in redis: what survives, who shares it, what it keeps secret, and what it outlasts."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import pathlib
import pickle
import random
import shutil
import signal
import sqlite3
import stat
import statistics
import sys
import threading
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor

import diskcache
import pytest
from hypothesis import given
from redis.client import Redis
from redis.connection import AbstractConnection
from side_by_side import SECONDS, errors, forked, forks, note_turns, results, started, until
from test_cache_keys import are_alike, arguments, copied, thoroughly
from test_single_flight import Held, waiters

import opero
from opero.core import faults
from opero.core.keys import KeyMaker
from opero.core.stores import disk
from opero.core.stores.disk import DiskStore
from opero.core.stores.flights import CLAIMED
from opero.core.stores.redis import RedisStore


@pytest.fixture
def held():
    return Held()


@pytest.fixture
def options(backend):
    """Of functions that share the entries of one test."""
    return {**backend.options, "cache_namespace": backend.namespace(), "retries": 0}


@pytest.fixture
def cached(options):
    """Decorate a function; without options all functions of one test share their entries."""

    def decorate(function, **more):
        return opero.opero(**{**options, **more})(function)

    return decorate


# Programs take long to start: enough that each world and each backend is seen, not each world with each backend.
in_pairs = pytest.mark.parametrize(("world", "backend"), [("sync", "disk"), ("async", "redis")], indirect=True)


def own(backend, **more):
    """The options of one function, apart from all others."""
    return {**backend.options, "cache_namespace": backend.namespace(), "retries": 0, **more}


# What survives

VALUES = [None, 0, "text", b"bytes", 1.5, (1, [2, {"three": {4}}])]


@in_pairs
def test_results_survive_into_a_new_process_none_included(world, cached, options, start, journal):
    f = cached(world.define(lambda place: VALUES[place]))
    for place in range(len(VALUES)):
        world.run(f, place)
    program = start(
        """
        DEF f(place):
            note("ran")
        f = cached(f)
        say([run(f, place) for place in range(6)])
        """,
        options,
        world=world,
    )
    assert program.end() == [VALUES]
    assert journal.lines() == []


def test_a_new_function_of_the_namespace_finds_the_entries(world, cached):
    world.run(cached(world.define(lambda x: "first")), 1)
    assert world.run(cached(world.define(lambda x: "second")), 1) == "first"


def test_a_hit_is_a_copy(world, cached):
    f = cached(world.define(lambda: [1]))
    world.run(f).append(2)
    world.run(f).append(3)
    assert world.run(f) == [1]


def test_hits_and_misses_are_counted(world, cached):
    f = cached(world.define(lambda x: x))
    for x in (1, 2, 1):
        world.run(f, x)
    assert f.cache_info()[:2] == (1, 2)
    assert (f.stats.hits, f.stats.attempts, f.stats.cache_errors) == (1, 2, 0)


def test_a_failure_is_not_stored(world, cached):
    runs = []

    def function():
        runs.append(1)
        if len(runs) == 1:
            raise KeyError
        return "result"

    f = cached(world.define(function))
    with pytest.raises(KeyError):
        world.run(f)
    assert world.run(f) == "result"


@pytest.mark.parametrize("compress", [False, True])
def test_json_gives_values_of_json(world, backend, compress):
    choice = {**backend.cache_options, "serializer": "json", "compress": compress}
    f = opero.opero(**own(backend, cache_options=choice))(world.define(lambda: {"a": [1, None, "text"]}))
    world.run(f)
    assert world.run(f) == {"a": [1, None, "text"]}
    assert f.stats.hits == 1


def test_json_stores_no_pickle(world, backend):
    choice = {**backend.cache_options, "serializer": "json"}
    f = opero.opero(**own(backend, cache_options=choice))(world.define(lambda: ["a long enough result"]))
    world.run(f)
    assert any(b'["a long enough result"]' in part for part in backend.stored())


def test_compressed_results_take_less_room(world, backend):
    choice = {**backend.cache_options, "compress": True}
    f = opero.opero(**own(backend, cache_options=choice))(world.define(lambda: "long " * 100_000))
    world.run(f)
    assert sum(map(len, backend.stored())) < 250_000
    assert world.run(f) == "long " * 100_000
    assert f.stats.hits == 1


# Keys


def test_keys_do_not_depend_on_the_hash_seed(cached, options, start):
    def function(values, other="default", **more):
        return "mine"

    f = cached(function)
    values = [{"b", "a", "c"}, frozenset("xyz"), {"k": {1, 2}, "l": "m"}, b"", 1.5, (True, None)]
    f(values)
    f(values, z={"a", "b"}, y=1)
    program = start(
        """
        def function(values, other="default", **more):
            return "not found"
        f = cached(function)
        values = [{"c", "b", "a"}, frozenset("zyx"), {"l": "m", "k": {2, 1}}, b"", 1.5, (True, None)]
        say([f(values), f(values=values, other="default"), f(values, "default", y=1, z={"b", "a"})])
        """,
        options,
        environment={"PYTHONHASHSEED": "1"},
    )
    assert program.end() == [["mine"] * 3]


def test_a_key_does_not_depend_on_the_way_an_argument_is_passed(world, cached):
    runs = []
    f = cached(world.define(lambda x=1, *, y="y": runs.append(1)))
    for args, kwargs in [((1,), {}), ((), {"x": 1}), ((), {}), ((), {"y": "y", "x": 1})]:
        world.run(f, *args, **kwargs)
    assert runs == [1]


def test_int_float_and_bool_are_three_entries(world, cached):
    f = cached(world.define(lambda x: [x]))
    answers = [world.run(f, x) for x in (1, 1.0, True) * 2]
    assert repr(answers) == "[[1], [1.0], [True], [1], [1.0], [True]]"
    assert f.stats.attempts == 3


def test_minus_one_and_minus_two_are_two_entries(world, cached):
    f = cached(world.define(lambda x: x))
    assert [world.run(f, x) for x in (-1, -2)] == [-1, -2]


def test_functions_without_a_namespace_are_kept_apart_by_what_they_carry(world, backend):
    def make(answer):
        def function(x):
            return answer

        async def function_async(x):
            return answer

        return opero.opero(**backend.options)(function_async if world.is_async else function)

    assert [world.run(make(answer), 1) for answer in ("a", "b")] == ["a", "b"]


def key_makers():
    def function(first, second=(), *more, third=None, **rest):
        pass

    return KeyMaker(function, opero.Cache(backend="disk")).key_of


@thoroughly
@given(arguments, arguments)
def test_digests_of_equal_values_passed_in_different_ways_are_equal(one, two):
    key_of = key_makers()
    digests = {
        key_of(one, two),
        key_of(copied(one), second=copied(two)),
        key_of(second=two, first=one, third=None),
        key_of(*[copied(one), two], third=None),
    }
    assert len(digests) == 1
    assert key_of(one, *[()]) == key_of(copied(one))


@thoroughly
@given(arguments, arguments)
def test_digests_are_equal_for_values_that_are_alike_and_only_for_them(one, two):
    def function(x):
        pass

    key_of = KeyMaker(function, opero.Cache(backend="disk")).key_of
    assert (key_of(one) == key_of(two)) == are_alike(one, two)


@thoroughly
@given(arguments, arguments)
def test_a_digest_tells_the_places_of_values_apart(one, two):
    key_of = key_makers()
    assert (key_of(one, two) == key_of(two, one)) == are_alike(one, two)
    assert key_of(one, two) != key_of((one, two))
    assert key_of(one, (), two) != key_of(one, third=two)
    assert key_of(one, (), x=two) != key_of(one, (), y=two)


# Secrets

SECRET = "a-secret-argument"


def test_no_argument_is_stored_in_clear(world, backend, cached):
    f = cached(world.define(lambda x, **more: "the result"))
    world.run(f, SECRET, more=[{SECRET: SECRET.encode()}])
    stored = backend.stored()
    assert any(b"the result" in part for part in stored)
    assert not any(SECRET.encode() in part for part in stored)


def test_no_argument_is_to_be_seen_while_the_function_runs(world, backend, cached):
    seen = []
    f = cached(world.define(lambda x: seen.extend(backend.stored())))
    world.run(f, SECRET)
    assert seen
    assert not any(SECRET.encode() in part for part in seen)


def test_no_key_of_cache_key_is_stored_in_clear(world, backend, cached):
    f = cached(world.define(lambda x: "the result"), cache_key=lambda x: x)
    world.run(f, SECRET)
    stored = backend.stored()
    assert any(b"the result" in part for part in stored)
    assert not any(SECRET.encode() in part for part in stored)


# Time to live


def test_an_entry_lives_for_a_fraction_of_a_second(world, cached):
    runs = []
    f = cached(world.define(lambda: runs.append(1)), cache_ttl=0.4)
    world.run(f)
    stored = time.monotonic()
    world.run(f)
    assert len(runs) == 1 or time.monotonic() - stored > 0.3
    until(lambda: world.run(f) or len(runs) == 2)
    assert 0.3 < time.monotonic() - stored < 3


def test_each_function_of_a_namespace_has_its_own_time_to_live(world, cached):
    short = cached(world.define(lambda x: [x]), cache_ttl=0.05)
    lasting = cached(world.define(lambda x: [x]))
    world.run(short, 1)
    world.run(lasting, 2)
    until(lambda: world.run(short, 1) and short.stats.attempts == 2)
    world.run(lasting, 2)
    assert lasting.stats.hits == 1


# Forgetting


def test_cache_delete_forgets_one_entry(world, cached):
    f = cached(world.define(lambda x: x))
    for x in (1, 2):
        world.run(f, x)
    assert f.cache_delete(1) is True
    assert f.cache_delete(1) is False
    for x in (1, 2):
        world.run(f, x)
    assert (f.stats.attempts, f.stats.hits) == (3, 1)


def forgetting():
    return {
        "cache_clear": lambda f: f.cache_clear(),
        "cache_delete": lambda f: f.cache_delete(1),
        "clear_cache": lambda f: opero.clear_cache(),
        "clear_cache of the namespace": lambda f: opero.clear_cache(f.__opero__.plan.cache.namespace),
    }


@pytest.fixture(params=forgetting().values(), ids=forgetting())
def forget(request):
    return request.param


def test_what_is_forgotten_is_computed_anew(world, cached, forget):
    f = cached(world.define(lambda x: x))
    world.run(f, 1)
    forget(f)
    world.run(f, 1)
    assert f.stats.attempts == 2


@pytest.mark.parametrize("suffixes", [("", ":b"), ("", "*"), ("*", "b"), ("?", "b"), ("[b]", "b"), ("/b", "_b")])
@pytest.mark.parametrize("turn", [1, -1])
def test_namespaces_that_look_alike_are_kept_apart(world, backend, cached, suffixes, turn):
    base = backend.namespace()
    f, g = [
        cached(world.define(lambda x, answer=n: answer), cache_namespace=base + n, cache_key=lambda x, answer=0: x)
        for n in suffixes[::turn]
    ]
    assert (world.run(f, 1), world.run(g, 1)) == suffixes[::turn]
    f.cache_clear()
    assert (world.run(f, 1), world.run(g, 1)) == suffixes[::turn]
    assert (f.stats.attempts, g.stats.attempts) == (2, 1)


def test_clearing_leaves_foreign_redis_keys_alone(redis_backend, world, forget):
    f = opero.opero(**own(redis_backend))(world.define(lambda x: x))
    with redis_backend.client() as client:
        names = ["foreign", "opero", "opero:", "opero:foreign", f.__opero__.plan.cache.namespace]
        client.mset(dict.fromkeys(names, "kept"))
        world.run(f, 1)
        forget(f)
        assert client.mget(names) == [b"kept"] * len(names)
        client.delete(*names)


def test_clearing_leaves_foreign_files_alone(disk_backend, world, forget):
    f = opero.opero(**own(disk_backend))(world.define(lambda x: x))
    world.run(f, 1)
    folders = [disk_backend.folder, *(path for path in disk_backend.folder.rglob("*") if path.is_dir())]
    for folder in folders:
        (folder / "foreign.txt").write_text("kept")
    forget(f)
    assert [(folder / "foreign.txt").read_text() for folder in folders if folder.exists()] == ["kept"] * len(folders)


@contextlib.contextmanager
def recorded(backend):
    """The names of the commands that the server is given."""
    names: list[str] = []
    with backend.client() as client, backend.client() as other, client.monitor() as monitor:

        def record():
            for command in monitor.listen():
                words = command["command"].split()
                if words[-1] == "the-end":
                    return
                names.append(words[0].upper())

        thread = started(record)
        yield names
        other.echo("the-end")
        thread.result(SECONDS)


def test_clearing_neither_lists_all_keys_nor_flushes(redis_backend, world, forget):
    f = opero.opero(**own(redis_backend))(world.define(lambda x: x))
    for x in range(3):
        world.run(f, x)
    with recorded(redis_backend) as names:
        forget(f)
    assert names
    assert not {"KEYS", "FLUSHDB", "FLUSHALL"} & set(names)


def test_forgetting_in_the_middle_is_not_undone_by_the_late_result(world, cached, held, forget):
    f = cached(world.define(held.function))
    first = started(world.run, f, 1)
    held.wait()
    forget(f)
    held.end("old")
    assert first.result(SECONDS) == "old"
    again = started(world.run, f, 1)
    held.wait()
    held.end("new", run=1)
    assert again.result(SECONDS) == "new"


def test_a_thread_that_the_main_thread_leaves_behind_has_the_cache(cached, options, start, world):
    """Nobody else begins a thread for it then."""
    program = start(
        """
        import threading
        DEF f(x):
            return x
        f = cached(f)
        def call():
            threading.main_thread().join()
            say([run(f, 1), run(f, 1)])
        threading.Thread(target=call).start()
        """,
        options,
        world=world,
    )
    assert program.end() == [[1, 1]]


@pytest.mark.parametrize("name", ["cache_clear", "cache_delete"])
def test_another_process_that_forgets_in_the_middle_is_obeyed(cached, options, start, name):
    program = start(
        """
        DEF f(x):
            say("began")
            told()
            return "old"
        f = cached(f)
        say(run(f, 1))
        """,
        options,
    )
    g = cached(lambda x: "new")
    assert program.heard() == "began"
    forgetting()[name](g)
    program.tell("go on")
    assert program.end() == ["old"]
    assert g(1) == "new"


# One run for identical calls at once


async def until_waiting(f, count):
    async with asyncio.timeout(SECONDS):
        while waiters(f) < count:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.001)


def test_fifty_threads_run_the_function_once(world, cached, held):
    f = cached(world.define(held.function))
    calls = [started(world.run, f, 1) for _ in range(50)]
    held.wait()
    until(lambda: waiters(f) == 49)
    held.end("result")
    assert results(calls) == ["result"] * 50
    assert held.runs == [1]


def test_five_hundred_tasks_run_the_function_once(cached):
    runs = []

    async def main():
        release = asyncio.Event()

        async def function(x):
            runs.append(x)
            await release.wait()
            return "result"

        f = cached(function)
        tasks = [asyncio.create_task(f(1)) for _ in range(500)]
        async with asyncio.timeout(SECONDS):
            await until_waiting(f, 499)
            release.set()
            return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == ["result"] * 500
    assert runs == [1]


@in_pairs
def test_eight_processes_run_the_function_once(world, options, start, journal):
    program = start(
        """
        DEF f(x):
            if x:
                note("ran")
                while noted("asking") < 8:
                    time.sleep(0.001)
            return os.getpid()

        f = cached(f)
        run(f, 0)  # what is imported late would be imported by every child
        children = []
        for _ in range(8):
            child = os.fork()
            if child == 0:
                note("asking")
                say(run(f, 1))
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        """,
        options,
        world=world,
    )
    said = program.end()
    assert len(said) == 8
    assert len(set(said)) == 1
    assert journal.lines().count("ran") == 1


BEGIN = """
DEF f(x):
    note("ran")
    say("began")
    return told()
f = cached(f)
say(run(f, 1))
"""


@in_pairs
def test_a_process_waits_for_the_run_of_another(world, cached, options, start):
    program = start(BEGIN, options, world=world)
    f = cached(world.define(lambda x: "not run"))
    assert program.heard() == "began"
    call = started(world.run, f, 1)
    with pytest.raises(TimeoutError):
        call.result(0.1)
    program.tell("result")
    assert program.end() == ["result"]
    assert call.result(SECONDS) == "result"
    assert (f.stats.hits, f.stats.attempts) == (1, 0)


@pytest.fixture
def short_leases(monkeypatch):
    """Leases in redis that last for half a second; gives the line that does the same to a program."""
    from opero.core.stores import redis

    assert redis.LEASE_SECONDS < 15  # what a killed process may cost the others
    monkeypatch.setattr(redis, "LEASE_SECONDS", 0.5)
    return "import opero.core.stores.redis\nopero.core.stores.redis.LEASE_SECONDS = 0.5\n"


def test_another_process_takes_over_from_one_that_was_killed(cached, options, start, short_leases):
    program = start(short_leases + BEGIN, options)
    f = cached(lambda x: "taken over")
    assert program.heard() == "began"
    call = started(f, 1)
    program.kill()
    assert call.result(5) == "taken over"


def test_a_long_run_is_not_taken_over(cached, options, start, short_leases):
    program = start(short_leases + BEGIN, options)
    f = cached(lambda x: "taken over")
    assert program.heard() == "began"
    call = started(f, 1)
    with pytest.raises(TimeoutError):
        call.result(0.9)
    program.tell("result")
    assert call.result(SECONDS) == "result"


def test_each_waiter_gets_the_error_of_the_leader(world, cached, held):
    f = cached(world.define(held.function))
    calls = [started(world.run, f, 1) for _ in range(10)]
    held.wait()
    until(lambda: waiters(f) == 9)
    held.fail(ValueError("for all"))
    got = errors(calls)
    assert {repr(error) for error in got} == {repr(ValueError("for all"))}
    assert len({id(error) for error in got}) == 10
    assert held.runs == [1]


def test_a_process_does_not_wait_for_one_whose_run_failed(cached, options, start):
    program = start(
        """
        DEF f(x):
            say("began")
            told()
            raise ValueError
        f = cached(f)
        try:
            run(f, 1)
        except ValueError:
            say("failed")
        told()
        """,
        options,
    )
    f = cached(lambda x: "mine")
    assert program.heard() == "began"
    call = started(f, 1)
    program.tell("fail")
    assert program.heard() == "failed"
    assert call.result(3) == "mine"


def test_different_arguments_run_at_the_same_time(world, cached):
    barrier = threading.Barrier(3)
    f = cached(world.define(lambda x: barrier.wait(SECONDS)))
    assert sorted(results([started(world.run, f, x) for x in (1, 1.0, True)])) == [0, 1, 2]


def test_a_call_within_its_own_run_finishes(world, cached):
    depth = []

    def function(x):
        depth.append(x)
        return "inner" if len(depth) > 1 else [f(x)]

    async def function_async(x):
        depth.append(x)
        return "inner" if len(depth) > 1 else [await f(x)]

    f = cached(function_async if world.is_async else function)
    assert started(world.run, f, 1).result(SECONDS) == ["inner"]


def test_a_cancelled_leader_is_replaced(cached):
    runs = []

    began = asyncio.Event()

    async def function():
        runs.append(1)
        began.set()
        if len(runs) == 1:
            await asyncio.Event().wait()
        return "result"

    f = cached(function)

    async def main():
        first = asyncio.create_task(f())
        await began.wait()
        second = asyncio.create_task(f())
        await until_waiting(f, 1)
        first.cancel()
        async with asyncio.timeout(SECONDS):
            return await second

    assert asyncio.run(main()) == "result"


class TestForks:
    pytestmark = forks

    def test_a_child_forked_during_a_run_can_call_the_function(self, world, cached, held, journal):
        parent = os.getpid()
        f = cached(world.define(lambda x: held.function(x) if os.getpid() == parent else "child"))

        def call():
            journal.add("asking")
            return world.run(f, 1)

        running = started(world.run, f, 1)
        held.wait()
        child = started(forked, call)
        until(journal.lines)
        held.end("parent")
        assert child.result(2 * SECONDS) in {"'child'", "'parent'"}
        assert running.result(SECONDS) == "parent"

    @pytest.mark.soak
    def test_threads_can_fork_at_once_while_others_call_the_function(self, world, cached):
        f = cached(world.define(lambda x: x))
        g = cached(world.define(lambda x: x), cache_namespace="another")
        world.run(f, 0)
        world.run(g, 0)
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            forking = [
                started(lambda: [forked(lambda: [world.run(f, 0), world.run(g, 1)]) for _ in range(5)])
                for _ in range(4)
            ]
            calls = started(lambda: [world.run(h, x) for x in range(100) for h in (f, g)])
            assert results(forking) == [["[0, 1]"] * 5] * 4
            assert calls.result(SECONDS) == [x for x in range(100) for _ in (f, g)]
        finally:
            sys.setswitchinterval(before)

    def test_a_child_does_not_disturb_its_parents_connections(self, world, cached):
        f = cached(world.define(lambda x: x))
        world.run(f, 0)
        answers = []
        for first in range(0, 60, 20):
            child = started(forked, lambda first=first: [world.run(f, x) for x in range(first, first + 20)])
            answers += [world.run(f, x) for x in range(first, first + 20)]
            assert child.result(2 * SECONDS) == repr(list(range(first, first + 20)))
        assert answers == list(range(60))
        assert f.stats.cache_errors == 0

    def test_what_a_child_stores_is_there_whoever_opens_and_closes_the_database_meanwhile(self, disk_backend, start):
        options = own(disk_backend)
        f = opero.opero(**options)(lambda x: x)
        f(0)
        other = start(
            """
            DEF f(x):
                return x
            f = cached(f)
            say(f(int(told())))
            """,
            options,
        )
        goes_on, may_go_on = os.pipe()
        child = started(forked, lambda: [f(1), os.read(goes_on, 1), f(2)])
        until(lambda: f.cache_info().currsize == 2)
        f.__opero__.plan.cache.store.close()
        other.tell("3")
        other.end()
        os.write(may_go_on, b".")
        assert child.result(2 * SECONDS) == "[1, b'.', 2]"
        assert f.cache_info().currsize == 4
        os.close(goes_on)
        os.close(may_go_on)

    def test_a_folder_that_vanished_before_a_fork_is_made_again(self, disk_backend):
        f = opero.opero(**own(disk_backend))(lambda x: x)
        f(0)
        for folder in disk_backend.folder.iterdir():
            shutil.rmtree(folder)
        assert forked(lambda: [f(1), f(2), f.stats.cache_errors]) == "[1, 2, 0]"
        assert [f(1), f(0), f.stats.hits] == [1, 0, 1]

    def test_a_child_waits_for_no_lock_of_its_parents_connections(self, world, redis_backend):
        f = opero.opero(**own(redis_backend))(world.define(lambda x: x))
        world.run(f, 0)
        with f.__opero__.plan.cache.store.server.client.connection_pool._lock:
            child = started(forked, lambda: world.run(f, 1))
            assert child.result(2 * SECONDS) == "1"


# Broken things cost the caching, not the call


def test_a_result_that_cannot_be_stored_is_returned(world, cached, warnings):
    result = threading.Lock()
    f = cached(world.define(lambda: result))
    assert [world.run(f) for _ in range(3)] == [result] * 3
    assert f.stats.attempts == 3
    assert f.stats.cache_errors >= 3
    assert len(warnings) <= 1


def test_a_result_that_is_no_json_is_returned(world, backend):
    choice = {**backend.cache_options, "serializer": "json"}
    f = opero.opero(**own(backend, cache_options=choice))(world.define(lambda: {1, 2}))
    assert [world.run(f), world.run(f)] == [{1, 2}] * 2
    assert f.stats.cache_errors >= 2


DAMAGES = {
    "emptied": lambda value: b"",
    "cut": lambda value: value[: len(value) // 2],
    "overwritten": lambda value: random.Random(1).randbytes(len(value)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("size", [20, 20_000])  # in the database, and in a file beside it
def test_a_corrupt_entry_is_computed_anew(  # noqa: PLR0917 - each is a fixture
    world, backend, cached, warnings, damage, size
):
    text = "marker" * size
    world.run(cached(world.define(lambda: text)))
    assert backend.spoil(b"markermarker", damage) == 1
    f = cached(world.define(lambda: "anew"))
    assert [world.run(f) for _ in range(3)] == ["anew"] * 3
    assert f.stats.hits >= 1
    assert f.stats.cache_errors >= 1
    assert len(warnings) <= 1


class Planted:
    """What a stranger would put into a cache: unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("compression", ["-", "Z"])
def test_a_function_that_writes_json_never_reads_a_pickle(world, backend, tmp_path, compression):
    text = backend.namespace()
    choice = {**backend.cache_options, "serializer": "json"}
    f = opero.opero(**own(backend, cache_options=choice))(world.define(lambda: text))
    world.run(f)
    payload = pickle.dumps(Planted(tmp_path / "code ran"))
    if compression == "Z":
        payload = zlib.compress(payload)
    entry = f"P{compression}".encode() + zlib.crc32(payload).to_bytes(4, "big") + payload
    assert backend.spoil(text.encode(), lambda value: entry) == 1
    assert [world.run(f) for _ in range(3)] == [text] * 3
    assert not (tmp_path / "code ran").exists()
    assert f.stats.attempts >= 2
    assert f.stats.hits >= 1
    assert f.stats.cache_errors >= 1


def test_a_broken_database_costs_no_call(world, disk_backend, start, journal):
    options = own(disk_backend)
    world.run(opero.opero(**options)(world.define(lambda x: x)), 0)
    program = start(
        """
        DEF f(x):
            return [x]
        heard = listen()
        f = cached(f)
        say("ready")
        while (x := int(told())) >= 0:
            say((run(f, x), f.stats.cache_errors))
        say(len(heard))
        """,
        options,
        world=world,
    )
    assert program.heard() == "ready"
    for database in disk_backend.databases():
        database.write_bytes(b"garbage" * 10_000)
    for x in (1, 2, 1):
        program.tell(str(x))
        result, count = program.heard()
        assert result == [x]
    assert count > 0
    program.tell("-1")
    assert program.end() == [1]


def test_a_database_that_breaks_in_use_costs_no_call(world, disk_backend, warnings):
    f = opero.opero(**own(disk_backend))(world.define(lambda x: [x]))
    assert world.run(f, 1) == [1]
    for path in disk_backend.files():
        path.write_bytes(b"garbage" * 10_000)
    assert [world.run(f, x) for x in (1, 2, 3)] == [[1], [2], [3]]
    assert f.stats.cache_errors > 0
    assert len(warnings) <= 1


DATABASE_DAMAGES = {"garbage": lambda found: b"garbage" * 10_000, "cut": lambda found: found[: len(found) // 3]}


@pytest.mark.parametrize("damage", DATABASE_DAMAGES.values(), ids=DATABASE_DAMAGES)
def test_a_damaged_database_is_made_anew(world, disk_backend, fake_clock, warnings, damage):
    options = own(disk_backend)
    first = opero.opero(**options)(world.define(lambda x: [x]))
    world.run(first, 1)
    first.__opero__.plan.cache.store.close()
    for path in disk_backend.databases():
        path.write_bytes(damage(path.read_bytes()))
    f, g = (opero.opero(**options)(world.define(lambda x: [x])) for _ in range(2))
    assert world.run(f, 1) == [1]
    assert (f.stats.cache_errors > 0, len(warnings)) == (True, 1)
    fake_clock.tick(faults.REST_SECONDS + 1)
    assert [world.run(f, 1), world.run(f, 1), world.run(g, 1)] == [[1]] * 3
    assert (f.stats.attempts, g.stats.attempts) == (2, 0)


def test_a_damaged_database_can_be_cleared(disk_backend):
    f = opero.opero(**own(disk_backend))(lambda x: [x])
    f(1)
    f.__opero__.plan.cache.store.close()
    for path in disk_backend.databases():
        path.write_bytes(b"garbage" * 10_000)
    f.cache_clear()
    assert [f(1), f(1), f.stats.attempts, f.stats.cache_errors] == [[1], [1], 2, 0]


def test_a_folder_that_vanishes_costs_no_call(world, disk_backend, warnings):
    import shutil

    f = opero.opero(**own(disk_backend))(world.define(lambda x: [x]))
    assert world.run(f, 1) == [1]
    shutil.rmtree(disk_backend.folder)
    assert [world.run(f, x) for x in (1, 2, 3)] == [[1], [2], [3]]
    assert len(warnings) <= 1


@pytest.mark.parametrize("limit", [0, 100_000])
def test_a_full_disk_costs_no_call(disk_backend, start, limit):
    program = start(
        f"""
        import resource
        DEF f(x):
            return os.urandom(1_000_000)
        heard = listen()
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
        f = cached(f)
        say([len(run(f, x)) for x in (1, 2, 1)])
        say((f.stats.cache_errors > 0, len(heard)))
        """,
        own(disk_backend),
    )
    assert program.end() == [[1_000_000] * 3, (True, 1)]


def test_a_cache_that_has_filled_its_disk_can_be_cleared(disk_backend, start):
    program = start(
        """
        import resource
        DEF f(x):
            return os.urandom(1_000_000)
        f = cached(f)
        for limit in (3_000_000, 1_900_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            [run(f, x) for x in range(5)]
            f.cache_clear()
        say(run(f, 1) == run(f, 1))
        """,
        own(disk_backend),
    )
    assert program.end() == [True]


def leave(server):
    server.stop()


def freeze(server):
    server.freeze()


def connected(world, backend, function):
    """A function whose cache works."""
    f = opero.opero(**own(backend))(world.define(function))
    for _ in range(2):
        world.run(f, 0)
    assert f.stats.hits == 1
    return f


gone = pytest.mark.parametrize("break_", [leave, freeze], ids=["stopped", "frozen"])


@gone
def test_redis_that_was_never_there_costs_no_call(own_redis, start, break_):
    break_(own_redis.server)
    program = start(
        """
        DEF f(x):
            return [x]
        heard = listen()
        f = cached(f)
        say([run(f, x) for x in (0, 1, 1, 2)])
        say((f.stats.cache_errors > 0, len(heard)))
        """,
        own(own_redis),
    )
    assert program.end() == [[[0], [1], [1], [2]], (True, 1)]


@gone
@pytest.mark.parametrize("was_there", [True, False])
def test_redis_that_is_gone_costs_no_call_and_two_seconds_at_most_and_then_next_to_nothing(
    world, own_redis, warnings, break_, was_there
):
    f = connected(world, own_redis, lambda x: [x])
    if not was_there:
        f = opero.opero(**own(own_redis))(world.define(lambda x: [x]))
    break_(own_redis.server)
    seconds = []
    for x in (0, 1, 1, *range(2, 9)):
        begin = time.perf_counter()
        assert world.run(f, x) == [x]
        seconds.append(time.perf_counter() - begin)
    assert seconds[0] < 4
    assert statistics.median(seconds[1:]) < 0.4  # each wait for a server that is frozen would be one of 0.9 s
    assert f.stats.cache_errors > 0
    assert len(warnings) <= 1


@gone
def test_who_clears_is_told_that_redis_is_gone(own_redis, break_):
    f = opero.opero(**own(own_redis))(lambda x: [x])
    f(1)
    break_(own_redis.server)
    with pytest.raises(opero.OperoError):
        started(f.cache_clear).result(3)
    assert f(1) == [1]


def test_the_cache_works_again_when_redis_is_back(world, own_redis, monkeypatch):
    assert faults.REST_SECONDS <= 10
    monkeypatch.setattr(faults, "REST_SECONDS", 0.3)
    f = connected(world, own_redis, lambda x: [x])
    own_redis.server.stop()
    world.run(f, 1)
    own_redis.server.start()
    before = f.stats.hits
    until(lambda: world.run(f, 1) and f.stats.hits > before)


def test_the_event_loop_goes_on_while_redis_is_frozen(own_redis):
    async def function(x):
        return [x]

    f = opero.opero(**own(own_redis))(function)
    turns = []

    async def main():
        await f(0)
        own_redis.server.freeze()
        ticker = asyncio.create_task(note_turns(turns))
        answers = await asyncio.gather(*[f(x) for x in range(20)])
        ticker.cancel()
        return answers

    assert asyncio.run(main()) == [[x] for x in range(20)]
    assert len(turns) > 20


@pytest.mark.parametrize("policy", ["fifo", "lru"])
def test_the_event_loop_goes_on_while_another_process_writes_to_the_disk(disk_backend, policy):
    choice = {**disk_backend.cache_options, "policy": policy}

    async def function(x):
        return [x]

    f = opero.opero(**own(disk_backend, cache_options=choice))(function)

    async def main():
        await f(0)
        (database,) = disk_backend.databases()
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            hit, miss = (asyncio.create_task(f(x)) for x in (0, 1))
            for _ in range(5):
                await asyncio.sleep(0.01)
            # It would have waited in vain, and ended, before the loop came to this.
            assert not miss.done()
            writer.execute("COMMIT")
        assert await asyncio.gather(hit, miss) == [[0], [1]]
        assert await f(1) == [1]

    asyncio.run(main())
    assert f.stats.attempts == 2


@pytest.fixture
def busy_database(disk_backend):
    """Another process has begun to write to the entries of a function, and does not end."""

    @contextlib.contextmanager
    def busy(function):
        database = function.__opero__.plan.cache.store.folder / "cache.db"
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            yield

    return busy


def test_a_call_waits_no_longer_than_its_total_timeout_for_another_process_that_writes(disk_backend, busy_database):
    f = opero.opero(**own(disk_backend), total_timeout=0.1)(lambda x: x)
    f(0)
    with busy_database(f):
        begin = time.monotonic()
        assert f(1) == 1
        assert time.monotonic() - begin < disk._LOCK_SECONDS / 2
    assert f.stats.cache_errors == 1


def test_another_process_that_writes_for_long_is_waited_for_once_by_a_map(disk_backend, busy_database, monkeypatch):
    monkeypatch.setattr(disk, "_LOCK_SECONDS", 0.2)
    f = opero.opmap(**own(disk_backend), mode="thread", workers=1, progress=False)(lambda x: x)
    f([0])
    rest = f.single.__opero__.plan.cache.store.rest
    waits = []
    monkeypatch.setattr(rest, "begin", lambda error, begin=rest.begin: (waits.append(0.2), begin(error)))
    with busy_database(f.single):
        begin = time.monotonic()
        assert f(range(200)) == [*range(200)]
        assert time.monotonic() - begin < 200 * 0.2 / 2
    assert f.stats.cache_errors == 199
    assert waits == [0.2]


def test_the_event_loop_goes_on_while_another_process_computes(cached, options, start):
    program = start(BEGIN, options)

    async def function(x):
        return "not run"

    f = cached(function)
    assert program.heard() == "began"

    async def main():
        call = asyncio.create_task(f(1))
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert not call.done()
        # Unless the loop came to this, both would wait for each other.
        program.tell("result")
        return await call

    assert asyncio.run(main()) == "result"


# The folder


def use(world, folder):
    options = {"cache": True, "cache_backend": "disk", "cache_options": {"cache_dir": str(folder)}}
    return world.run(opero.opero(**options, retries=0, cache_namespace="namespace")(world.define(lambda x: x)), 1)


def test_the_folders_are_for_their_owner_only(world, tmp_path):
    before = os.umask(0)
    try:
        use(world, tmp_path / "cache")
    finally:
        os.umask(before)
    folders = [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()]
    assert folders
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}


@pytest.fixture(params=["folder", "namespace"])
def place(request, tmp_path, world):
    """Where a folder of the cache's should be, but is not yet."""
    use(world, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    (of_namespace,) = [path for path in folder.iterdir() if path.is_dir()]
    path = folder if request.param == "folder" else of_namespace
    path.rename(tmp_path / "away")

    def is_closed():
        # The thread that asked for an event loop may hold the cache for a moment longer.
        gc.collect()
        return not open_files(tmp_path)

    until(is_closed)
    return path


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777], ids=oct)
def test_a_folder_that_others_can_write_to_is_refused(world, tmp_path, place, mode):
    place.mkdir()
    place.chmod(mode)
    with pytest.raises(PermissionError):
        use(world, tmp_path / "cache")
    assert not list(place.iterdir())


def test_a_symbolic_link_in_the_place_of_the_folder_is_refused(world, tmp_path, place):
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    place.symlink_to(real, target_is_directory=True)
    with pytest.raises(PermissionError):
        use(world, tmp_path / "cache")
    assert not list(real.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of somebody else's")
def test_a_folder_of_somebody_elses_is_refused(world, tmp_path, place):
    place.mkdir(mode=0o700)
    os.chown(place, 12345, 12345)
    with pytest.raises(PermissionError):
        use(world, tmp_path / "cache")


def test_the_advice_on_an_unsafe_folder_is_to_trust_nothing_in_it(world, tmp_path, place):
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(opero.OperoError) as caught:
        use(world, tmp_path / "cache")
    assert "delete it with all that is in it" in str(caught.value)
    assert "chmod" not in str(caught.value)
    shutil.rmtree(place)
    assert use(world, tmp_path / "cache") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of somebody else's")
def test_a_private_folder_with_a_file_of_somebody_elses_is_refused(world, tmp_path):
    use(world, tmp_path / "cache")
    gc.collect()
    (database,) = (tmp_path / "cache").rglob("*.db")
    os.chown(database, 12345, 12345)
    with pytest.raises(PermissionError, match="has a file that belongs to another user"):
        use(world, tmp_path / "cache")


def test_a_folder_of_the_owners_is_taken(world, tmp_path, place):
    place.mkdir(mode=0o700)
    assert use(world, tmp_path / "cache") == 1


def test_without_cache_dir_the_cache_lies_in_the_users_cache_folder_and_nowhere_else(start, tmp_path):
    options = {"cache": True, "cache_backend": "disk"}
    program = start(
        """
        os.umask(0)
        DEF f(x):
            return x
        run(cached(f), 1)
        folder = os.path.join(os.environ["XDG_CACHE_HOME"], "twat_cache", "opero")
        say((oct(os.stat(folder).st_mode & 0o777), bool(os.listdir(folder))))
        """,
        options,
        environment={"XDG_CACHE_HOME": str(tmp_path / "users"), "HOME": str(tmp_path / "home")},
    )
    assert program.end() == [("0o700", True)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["program0.py", "users"]


@pytest.mark.parametrize("folder", ["cache", "~/cache"])
def test_a_folder_stays_the_same_when_the_working_directory_changes(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    f = opero.opero(cache=opero.Cache(backend="disk", cache_dir=folder))(len)
    f("a")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    f("a")
    f("b")
    assert (f.stats.hits, f.stats.cache_errors) == (1, 0)
    assert (tmp_path / "cache").is_dir()


class Exploit:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_database_of_an_earlier_version_is_made_anew_and_nothing_of_it_unpickled(world, disk_backend, tmp_path):
    options = own(disk_backend)
    f = opero.opero(**options)(world.define(lambda x: [x]))
    store = f.__opero__.plan.cache.store
    store.folder.mkdir(parents=True, mode=0o700)
    store.folder.parent.chmod(0o700)
    with diskcache.Cache(store.folder, disk_pickle_protocol=4) as earlier:
        earlier[1] = Exploit(tmp_path / "exploited")
    assert [world.run(f, 1), world.run(f, 1)] == [[1], [1]]
    assert (f.stats.hits, f.stats.cache_errors) == (1, 0)
    assert not (tmp_path / "exploited").exists()


def limited(world, disk_backend, function, **limits):
    options = own(disk_backend, cache_options={**disk_backend.cache_options, **limits})
    return opero.opero(**options)(world.define(function))


def test_maxsize_counts_entries(world, disk_backend):
    f = limited(world, disk_backend, lambda x: "long" * 1000, maxsize=5)
    for x in range(30):
        world.run(f, x)
    assert f.cache_info()[2:] == (5, 5)
    world.run(f, 29)
    assert f.stats.hits == 1


@pytest.mark.parametrize(
    ("policy", "victim"),
    [("fifo", 1), ("lru", 2), ("lfu", 3)],
)
def test_the_policy_chooses_the_entry_that_goes(world, disk_backend, policy, victim):
    f = limited(world, disk_backend, lambda x: x, maxsize=3, policy=policy)
    for x in (1, 2, 3, 2, 2, 3, 1, 1):
        world.run(f, x)
    world.run(f, 4)
    # `cache_delete` tells what is there, and moves nothing up in the order.
    assert [x for x in (1, 2, 3) if not f.cache_delete(x)] == [victim]


def test_size_limit_bounds_the_bytes(world, disk_backend):
    f = limited(world, disk_backend, lambda x: os.urandom(20_000), size_limit=300_000)
    for x in range(150):
        world.run(f, x)
    sizes = [path.stat().st_size for path in disk_backend.files() if not path.name.endswith(("-wal", "-shm"))]
    assert sum(sizes) < 900_000
    world.run(f, 149)
    assert f.stats.hits == 1


def test_the_room_of_large_results_is_given_back(world, disk_backend):
    f = limited(world, disk_backend, lambda x: b"x" * x)
    world.run(f, 8_000_000)
    f.cache_clear()
    world.run(f, 1)
    assert sum(path.stat().st_size for path in disk_backend.files()) < 6_000_000


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("disk", {"bogus": 1}),
        ("disk", {"redis_host": "localhost"}),
        ("disk", {"maxsize": 0}),
        ("disk", {"maxsize": 1.5}),
        ("disk", {"size_limit": 0}),
        ("disk", {"policy": "bogus"}),
        ("disk", {"serializer": "bogus"}),
        ("disk", {"compress": "yes"}),
        ("disk", {"cache_dir": 1}),
        ("disk", {"folder_name": "../outside"}),
        ("redis", {"bogus": 1}),
        ("redis", {"cache_dir": "here"}),
        ("redis", {"redis_port": 999_999}),
        ("redis", {"redis_port": "6379"}),
        ("redis", {"redis_db": -1}),
        ("redis", {"redis_host": ""}),
        ("memory", {"cache_dir": "here"}),
    ],
)
def test_a_wrong_option_is_refused_when_decorating(name, choice):
    with pytest.raises((TypeError, ValueError), match=next(iter(choice))):
        opero.opero(cache=True, cache_backend=name, cache_options=choice)(lambda x: x)


# Kills

WRITERS = """
import random, select, signal

DEF f(x):
    return [x] * 50

f = cached(f)
run(cached(f.__wrapped__, cache_namespace="warm"), 0)  # what is imported late would be imported by every child

def write(first):
    for x in range(first, first + 10_000):
        run(f, x)
        say(x)

for first in range(0, 500_000, 10_000):
    child = os.fork()
    if child == 0:
        write(first)
    time.sleep(random.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.soak
def test_what_was_finished_before_kills_at_random_moments_is_there_and_the_cache_works(cached, options, start):
    announced = start(WRITERS, options).end()
    assert len(announced) > 20
    runs = []
    f = cached(runs.append)
    assert [x for x in announced if f(x) != [x] * 50] == []
    assert runs == []
    for _ in range(2):
        f(-1)
    assert runs == [-1]
    assert f.stats.cache_errors == 0


# Ctrl-C


def press_after(owner, name, monkeypatch):
    """Let Ctrl-C come when a method has done its work for the next time."""
    method = getattr(owner, name)

    def act_and_press(*args, **kwargs):
        monkeypatch.undo()
        result = method(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(owner, name, act_and_press)


def test_ctrl_c_between_a_command_to_redis_and_its_answer_leaves_that_to_nobody(own_redis, monkeypatch):
    f = opero.opero(**own(own_redis))(lambda x: x)
    answers = [f(0), f(1)]
    with own_redis.client() as client:
        for _ in range(20):
            client.client_pause(20)  # the answer comes when the next command has been sent
            press_after(AbstractConnection, "send_packed_command", monkeypatch)
            with pytest.raises(KeyboardInterrupt):
                f(0)
            answers.append(f(1))
    assert answers == [0, 1] + [1] * 20
    assert (f.stats.attempts, f.stats.cache_errors) == (2, 0)


@pytest.mark.parametrize(
    "moment", [(AbstractConnection, "send_packed_command"), (Redis, "execute_command")], ids=["asked", "answered"]
)
def test_ctrl_c_while_redis_grants_a_claim_leaves_the_key_to_others(redis_backend, monkeypatch, moment):
    f = opero.opero(**own(redis_backend))(lambda x: x)
    f(0)
    # So that the claim is the first command.
    monkeypatch.setattr(RedisStore, "look_up", lambda *_: None)
    press_after(*moment, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        f(1)
    # A lease lasts for 10 s.
    assert started(f, 1).result(4) == 1
    assert f.stats.cache_errors == 0


def test_ctrl_c_when_a_transaction_has_just_begun_keeps_nobody_from_writing(disk_backend, monkeypatch):
    f = opero.opero(**own(disk_backend))(lambda x: x)
    f(0)

    def press(_connection, _name):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(disk, "_number", press)  # the first that is asked in a transaction
    monkeypatch.setattr(DiskStore, "_claim", lambda *_: CLAIMED)
    with pytest.raises(KeyboardInterrupt):
        f(1)
    (folder,) = f.__opero__.plan.cache.store.folder.parent.iterdir()
    with contextlib.closing(sqlite3.connect(folder / "cache.db", timeout=0)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
    assert [f(1), f(1), f.stats.hits, f.stats.cache_errors] == [1, 1, 1, 0]


def test_ctrl_c_while_the_system_locks_a_key_on_disk_leaves_it_to_other_processes(disk_backend, monkeypatch):
    f = opero.opero(**own(disk_backend))(lambda x: x)
    f(0)

    def lock_and_press(*request):
        fcntl.lockf(*request)
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(disk, "fcntl", types.SimpleNamespace(**{**vars(fcntl), "lockf": lock_and_press}))
    with pytest.raises(KeyboardInterrupt):
        f(1)
    assert forked(lambda: f(1)) == "1"


# Many at once


@pytest.mark.soak
def test_threads_that_write_and_read_at_random_get_what_is_theirs(world, cached):
    f = cached(world.define(lambda x: [x]))

    def work(seed):
        choice = random.Random(seed)
        for _ in range(50):
            x = choice.randrange(20)
            if choice.random() < 0.1:
                f.cache_delete(x)
            assert world.run(f, x) == [x]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [None] * 8
    assert f.stats.cache_errors <= 2  # on a busy machine an answer may come later than one is waited for


# The engine by itself


@pytest.fixture(params=["memory", "disk", "redis"])
def context(request):
    """Makes contexts of one namespace."""
    namespace = f"engine.{os.urandom(8).hex()}"
    options = {} if request.param == "memory" else request.getfixturevalue(f"{request.param}_backend").cache_options
    return lambda **more: opero.core.get_cache_context(namespace, cache_backend=request.param, **options, **more)


def test_an_engine_finds_what_it_was_given(context):
    with context() as engine:
        engine.set("key", [1])
        engine.set(("other", 1), None)
        assert (engine.get("key"), engine.get(("other", 1), "default")) == ([1], None)


def test_an_engine_gives_a_default_for_what_it_has_not(context):
    with context() as engine:
        assert (engine.get("key"), engine.get("key", 1)) == (None, 1)


def test_an_engine_tells_1_and_true_apart(context):
    with context() as engine:
        engine.set(1, "int")
        engine.set(True, "bool")
        assert (engine.get(1), engine.get(True), engine.get(1.0)) == ("int", "bool", None)


def test_a_later_value_replaces_an_earlier_one(context):
    with context() as engine:
        engine.set("key", 1)
        engine.get("key")
        engine.set("key", 2)
        assert engine.get("key") == 2


def test_an_engine_forgets_one_entry(context):
    with context() as engine:
        engine.set("key", 1)
        engine.set("other", 2)
        assert engine.delete("key") is True
        assert engine.delete("key") is False
        assert (engine.get("key"), engine.get("other")) == (None, 2)


def test_an_engine_forgets_all(context):
    with context() as engine:
        engine.set("key", 1)
        engine.clear()
        assert engine.get("key") is None


def test_an_engine_can_store_what_it_has_missed(context):
    with context() as engine:
        assert engine.get("key") is None
        engine.set("key", 1)
        assert engine.get("key") == 1


def test_entries_of_an_engine_live_as_long_as_it_was_told(context):
    with context(cache_ttl=0.2) as engine:
        engine.set("key", 1)
        until(lambda: engine.get("key") is None)


@pytest.mark.parametrize("context", ["disk", "redis"], indirect=True)
def test_an_engine_that_cannot_store_says_so(context):
    with context() as engine, pytest.raises(opero.OperoError):
        engine.set("key", threading.Lock())


@pytest.mark.parametrize("name", ["disk", "redis"])
def test_what_an_engine_stored_is_there_in_the_next_context(request, name):
    backend = request.getfixturevalue(f"{name}_backend")
    namespace = backend.namespace()
    for expected in (None, 1):
        with opero.core.get_cache_context(namespace, cache_backend=name, **backend.cache_options) as engine:
            assert engine.get("key") == expected
            engine.set("key", 1)


def test_a_look_of_an_engine_keeps_nobody_waiting(backend, start):
    """Neither here nor elsewhere."""
    namespace = backend.namespace()
    with opero.core.get_cache_context(namespace, cache_backend=backend.name, **backend.cache_options) as engine:
        assert engine.get("key") is None
        begin = time.monotonic()
        assert engine.get("key") is None
        assert time.monotonic() - begin < 1


DESCRIPTORS = pathlib.Path("/proc/self/fd")


def open_files(folder):
    if not DESCRIPTORS.is_dir():
        pytest.skip("only Linux tells what is open")
    return [path for path in (link.resolve() for link in DESCRIPTORS.iterdir()) if path.is_relative_to(folder)]


def test_the_files_of_an_engine_are_closed_at_the_end(disk_backend):
    with opero.core.get_cache_context("engine", cache_backend="disk", **disk_backend.cache_options) as engine:
        engine.set("key", 1)
        assert engine.get("key") == 1
        assert open_files(disk_backend.folder)
    del engine
    gc.collect()
    assert open_files(disk_backend.folder) == []


def test_the_connections_of_an_engine_are_closed_at_the_end(own_redis):
    with own_redis.client() as client:
        with opero.core.get_cache_context("engine", cache_backend="redis", **own_redis.cache_options) as engine:
            engine.set("key", 1)
            assert len(client.client_list()) > 1
        until(lambda: len(client.client_list()) == 1)


def test_the_files_of_a_function_that_is_gone_are_closed(world, disk_backend):
    f = opero.opero(**own(disk_backend))(world.define(lambda x: x))
    world.run(f, 1)
    assert open_files(disk_backend.folder)
    del f
    # A thread that has worked for the loop may let go of it a moment later.
    until(lambda: gc.collect() >= 0 and open_files(disk_backend.folder) == [])


def test_the_connections_of_a_function_that_is_gone_are_closed(world, own_redis, monkeypatch):
    from opero.core.stores import redis

    # The thread that renews leases holds the store, and looks for work a little longer than there is some.
    monkeypatch.setattr(redis, "LEASE_SECONDS", 0.3)
    f = opero.opero(**own(own_redis))(world.define(lambda x: x))
    world.run(f, 1)
    with own_redis.client() as client:
        assert len(client.client_list()) > 1
        del f

        def only_this_one():
            gc.collect()
            return len(client.client_list()) == 1

        until(only_this_one)


def test_a_fork_does_not_wait_for_a_writer_that_another_process_holds_up(disk_backend):
    f = opero.opero(**disk_backend.options, cache_namespace=disk_backend.namespace())(lambda x: x)
    f(0)
    database = f.__opero__.plan.cache.store.folder / "cache.db"
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as elsewhere:
        elsewhere.execute("BEGIN IMMEDIATE")
        writer = started(f, 1)
        until(f.__opero__.plan.cache.store.flights._under_way.__len__)
        assert forked(lambda: "forked") == repr("forked")
        # It goes on trying for some seconds, during which a fork that waits for it would not return.
        assert not writer.done()
        elsewhere.execute("ROLLBACK")
    assert writer.result(SECONDS) == 1
