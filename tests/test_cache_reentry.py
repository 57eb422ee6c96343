"""A cache that is used from where Python runs code by itself: finalizers, signal handlers, deep recursions."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import opero


def cached(function, **options):
    return opero.opero(cache=True, retries=0, **options)(function)


def within(seconds, function):
    """What a thread gives within some seconds; a deadlock is a failure and not a hang."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "still at it"
    return results[0]


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
@pytest.mark.parametrize(
    "act",
    [
        lambda f, name: f("manager"),
        lambda f, name: f(f"other {name}"),
        lambda f, name: f.cache_delete(name),
        lambda f, name: f.cache_info(),
        lambda f, name: f.cache_clear(),
    ],
    ids=["a call", "a call that stores", "cache_delete", "cache_info", "cache_clear"],
)
def test_a_finalizer_of_a_value_may_use_the_cache_that_held_it(act, policy):
    class Connection:
        def __init__(self, name):
            self.name = name

        def __del__(self):
            if self.name in set("abcd"):
                act(connect, self.name)

    @opero.opero(cache=True, retries=0, cache_options={"maxsize": 2, "policy": policy})
    def connect(name):
        return Connection(name)

    def use():
        connect("manager")
        for name in "abcd":
            connect(name)
        connect.cache_clear()
        return connect.cache_info().currsize

    assert within(10, use) <= 2


def test_a_signal_handler_may_use_the_cache_that_it_interrupted():
    f = cached(lambda x: x, cache_options={"maxsize": 8})
    heard = []

    def handle(*_):
        heard.append((f(len(heard) % 20), f.cache_info(), f.cache_delete(3)))
        if len(heard) % 10 == 0:
            f.cache_clear()

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            for n in range(20):
                assert f(n) == n
            f.cache_info()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(heard) > 50


def test_the_garbage_collector_may_use_the_cache_at_any_allocation():
    f = cached(lambda x: [x], cache_options={"maxsize": 4})

    class Cycle:
        def __init__(self, n):
            self.n = n
            self.me = self

        def __del__(self):
            f(self.n)
            f.cache_delete(self.n)

    thresholds = gc.get_threshold()
    gc.set_threshold(5)
    try:
        assert within(20, lambda: [(Cycle(n), f(n % 7))[1] for n in range(2000)][-1]) == [1999 % 7]
    finally:
        gc.set_threshold(*thresholds)


class Evil:
    """Uses the cache when it is compared or hashed."""

    def __init__(self, n):
        self.n = n

    def __hash__(self):
        evil.cache_info()
        evil(0)
        return 1

    def __eq__(self, other):
        evil.cache_clear()
        evil(1)
        return self.n == other.n


evil = cached(lambda x: x)


def test_equality_and_hash_of_arguments_are_never_asked():
    assert within(10, lambda: [evil(Evil(n)).n for n in (1, 2, 1)]) == [1, 2, 1]
    assert evil.cache_info().hits == 1


def test_a_recursion_goes_as_deep_as_the_stack_allows():
    @opero.opero(cache=True)
    def fib(n):
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    # In a thread, whose stack has nothing else on it.
    assert within(10, lambda: fib(300)) == 222232244629420445529739893461909967206666939096499764990979600


# CPython 3.11.7 crashed in `ContextVar.set` here, in one of two runs, beside garbage of other tests; why is not known.
@pytest.mark.usefixtures("no_garbage_of_others")
def test_a_recursion_that_is_too_deep_fails_promptly_and_harms_no_later_call():
    @opero.opero(cache=True, retries=0)
    def depth(n):
        return 0 if n == 0 else 1 + depth(n - 1)

    def too_deep():
        before = time.monotonic()
        for n in range(10_000, 10_020):
            with pytest.raises(RecursionError):
                depth(n)
        return time.monotonic() - before

    assert within(20, too_deep) < 10
    assert within(10, lambda: [depth(n) for n in range(0, 2_000, 100)]) == list(range(0, 2_000, 100))


# What nobody can ask for any more


class Blob:
    """Counts those that are alive."""

    alive = 0

    def __init__(self):
        type(self).alive += 1

    def __del__(self):
        type(self).alive -= 1


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
def test_expired_results_are_gone_at_the_next_store(fake_clock, policy):
    class Result(Blob):
        pass

    f = cached(lambda n: Result(), cache_ttl=10, cache_options={"policy": policy})
    for n in range(200):
        f(n)
    fake_clock.tick(11)
    f(1000)
    gc.collect()
    assert Result.alive == 1
    assert f.cache_info().currsize == 1


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
def test_an_expired_entry_takes_no_place_from_a_living_one(fake_clock, policy, request):
    namespace = f"{request.node.name}"
    options = {"cache_namespace": namespace, "cache_options": {"maxsize": 4, "policy": policy}}
    brief, lasting = cached(lambda n: [n], cache_ttl=1, **options), cached(lambda n: [n], **options)
    kept = [lasting(n) for n in (1, 2)]
    for n in (3, 4):
        brief(n)
    fake_clock.tick(2)
    for n in (5, 6):
        lasting(n)
    assert [lasting(1), lasting(2)] == kept
    assert lasting.cache_info().hits == 2


def test_what_was_stored_again_and_again_leaves_nothing_behind(fake_clock):
    f = cached(lambda n: n, cache_ttl=1_000, cache_options={"policy": "lfu"})
    for n in range(5_000):
        f(n % 10)
        f.cache_delete(n % 10)
    store = f.__opero__.plan.cache.store
    assert len(store) == 0
    assert len(store._ends) + len(store._uses) < 500


def test_a_first_call_imports_nothing_that_a_forked_child_or_a_finalizer_would_miss(backend, start):
    program = start(
        """
        f = cached(lambda x: x)
        before = set(sys.modules)
        say(f(1))
        say(set(sys.modules) - before)
        """,
        {**backend.options, "cache_namespace": backend.namespace()},
    )
    # To connect, redis-py looks up how names of servers are written.
    assert [program.heard(), program.heard() - {"encodings.idna", "stringprep"}] == [1, set()]


def test_a_finalizer_that_misses_the_cache_lets_the_program_end(backend, start):
    program = start(
        """
        f = cached(lambda x: x)

        class Last:
            def __del__(self):
                say(f(2))

        last = Last()
        say(f(1))
        """,
        {**backend.options, "cache_namespace": backend.namespace()},
    )
    assert [program.heard(), program.heard()] == [1, 2]
    program.end()


def test_the_results_of_thousands_of_dropped_instances_are_gone():
    class Model:
        @opero.opero(cache=True, retries=0)
        def matrix(self, n):
            return Matrix()

        @opero.opero(cache=True, retries=0)
        def size(self):
            return 1

    class Matrix(Blob):
        pass

    for _ in range(3_000):
        model = Model()
        for argument in (1, "a", [1]):
            model.matrix(argument)
        model.size()
    kept = weakref.ref(model)
    assert (Matrix.alive, Model.matrix.cache_info().currsize) == (3, 3)
    del model
    gc.collect()
    assert kept() is None
    assert (Matrix.alive, Model.matrix.cache_info().currsize, Model.size.cache_info().currsize) == (0, 0, 0)
    assert not Model.matrix.__opero__.plan.cache.store._instances


def test_an_evicted_result_of_an_instance_leaves_nothing_behind():
    class Model:
        @opero.opero(cache=True, retries=0, cache_options={"maxsize": 5})
        def double(self, n):
            return 2 * n

    model = Model()
    for n in range(1_000):
        model.double(n)
    (keys,) = Model.double.__opero__.plan.cache.store._instances.values()
    assert len(keys) == 5


@pytest.mark.parametrize(
    "make", [lambda n: np.full(100_000, float(n)), lambda n: f"{n}" * 100_000], ids=["array", "text"]
)
def test_keys_of_large_arguments_are_small(make):
    f = cached(lambda x: None)
    for n in range(50):
        f(make(n))
    keys = list(f.__opero__.plan.cache.store._entries)
    assert len(keys) == 50
    assert max(map(sys.getsizeof, keys)) < 100


def test_a_fork_in_the_middle_of_everything_leaves_a_cache_that_works():
    f = cached(lambda x: x, cache_options={"maxsize": 50})
    stop = threading.Event()

    def use():
        while not stop.is_set():
            for n in range(100):
                f(n)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                signal.alarm(10)
                os._exit(0 if [f(n) for n in range(100)] == list(range(100)) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("backend", ["memory", "disk"])
def test_an_instance_whose_key_asks_the_cached_method_is_a_recursion_error_at_once(tmp_path, backend):
    options = {"cache_backend": backend} | ({"cache_options": {"cache_dir": tmp_path}} if backend == "disk" else {})

    class Circular:
        @opero.opero(cache=True, retries=0, **options)
        def name(self):
            return "name"

        def __cache_key__(self):
            return self.name()

        def __getstate__(self):
            return {"name": self.name()}

    def ask():
        with pytest.raises(RecursionError):
            Circular().name()
        return True

    assert within(20, ask)


def test_a_key_too_deep_for_the_stack_is_a_call_that_failed():
    chain = None
    for _ in range(100_000):
        chain = [chain]
    f = cached(lambda value: value, default="default")
    assert within(20, lambda: f(chain)) == "default"
    assert (f.stats.calls, f.stats.failures, f.stats.attempts) == (1, 1, 0)
