"""The memory cache: what is remembered, for how long, where, and how it is forgotten."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import re
import subprocess
import sys
import weakref
from typing import Any

import pytest
from side_by_side import started

import opero
from opero.core import get_cache_decorator
from opero.core.clock import clock


class Counted:
    """A function that counts its runs; ``result`` makes its results, the number of the run by default."""

    def __init__(self, result=None):
        self.runs = 0
        self.result = result

    def function(self, x=0):
        self.runs += 1
        return self.runs if self.result is None else self.result(x)


@pytest.fixture
def namespace(request):
    """A namespace of the test's own: one of before may live on until its functions are collected."""
    return request.node.nodeid


@pytest.fixture
def counted():
    return Counted()


def cached(world, function, **options):
    return opero.opero(cache=True, retries=0, **options)(world.define(function))


# What is remembered


def test_a_second_call_is_answered_without_running_the_function(world, counted):
    f = cached(world, counted.function)
    assert [world.run(f, 7), world.run(f, 7)] == [1, 1]


def test_other_arguments_run_the_function(world, counted):
    f = cached(world, counted.function)
    assert [world.run(f, 7), world.run(f, 8)] == [1, 2]


def test_a_hit_gives_the_very_object(world):
    f = cached(world, lambda x: [x])
    assert world.run(f, 1) is world.run(f, 1)


@pytest.mark.parametrize(
    "result", [None, False, 0, "", (), [], NotImplemented, Exception("a value, not raised")], ids=repr
)
def test_any_result_is_remembered(world, result):
    counted = Counted(lambda _x: result)
    f = cached(world, counted.function)
    assert world.run(f) is result
    assert world.run(f) is result
    assert counted.runs == 1


def test_without_cache_nothing_is_remembered(world, counted):
    f = opero.opero(retries=0)(world.define(counted.function))
    assert [world.run(f), world.run(f)] == [1, 2]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_is_not_remembered(world, error):
    outcomes = iter([error("first"), "second"])

    def function():
        outcome = next(outcomes)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    f = cached(world, function)
    with pytest.raises(error, match="first"):
        world.run(f)
    assert world.run(f) == "second"
    assert world.run(f) == "second"


def test_a_result_that_a_retry_reached_is_remembered(world, fake_clock):
    outcomes = iter([ValueError("first"), "second"])

    def function():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    f = opero.opero(cache=True, retries=1)(world.define(function))
    assert [world.run(f), world.run(f)] == ["second", "second"]


def test_a_result_that_a_fallback_reached_is_remembered(world):
    tried = []

    def function(server):
        tried.append(server)
        if server == "bad":
            raise ValueError(server)
        return server

    f = cached(world, function, arg_fallback="server")
    assert [world.run(f, ["bad", "good"]), world.run(f, ["bad", "good"])] == ["good", "good"]
    assert tried == ["bad", "good"]


def test_what_a_retry_error_callback_made_up_is_not_remembered(world):
    runs = []

    def function():
        runs.append(1)
        raise ValueError

    f = opero.opero(cache=True, retries=0, retry_options={"retry_error_callback": lambda _state: "made up"})(
        world.define(function)
    )
    assert [world.run(f), world.run(f)] == ["made up", "made up"]
    assert len(runs) == 2
    assert f.cache_info().currsize == 0


def test_a_recursive_function_runs_once_for_each_argument(world):
    runs = []
    if world.is_async:

        @opero.opero(cache=True, retries=0)
        async def fibonacci(n):
            runs.append(n)
            return n if n < 2 else await fibonacci(n - 1) + await fibonacci(n - 2)

    else:

        @opero.opero(cache=True, retries=0)
        def fibonacci(n):
            runs.append(n)
            return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    assert world.run(fibonacci, 30) == 832_040
    assert sorted(runs) == list(range(31))


def test_the_bare_function_goes_around_the_cache(world, counted):
    f = cached(world, counted.function)
    world.run(f, 7)
    assert world.run(f.__wrapped__, 7) == 2


def test_threads_get_right_answers_from_a_cache_that_overflows(world):
    f = cached(world, lambda x: -x, cache_options={"maxsize": 5}, cache_ttl=0.001)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        calls = [started(lambda: [world.run(f, n % 9) for n in range(100)]) for _ in range(8)]
        results = [call.result(timeout=30) for call in calls]
    finally:
        sys.setswitchinterval(before)
    assert results == [[-(n % 9) for n in range(100)]] * 8
    assert f.cache_info().currsize <= 5


# Time to live


def test_an_entry_lives_for_its_time(world, counted, fake_clock):
    f = cached(world, counted.function, cache_ttl=0.25)
    world.run(f)
    fake_clock.tick(0.2499)
    assert world.run(f) == 1


def test_an_entry_dies_after_its_time(world, counted, fake_clock):
    f = cached(world, counted.function, cache_ttl=0.25)
    world.run(f)
    fake_clock.tick(0.2501)
    assert world.run(f) == 2


def test_a_new_entry_lives_as_long_as_the_first(world, counted, fake_clock):
    f = cached(world, counted.function, cache_ttl=1)
    world.run(f)
    fake_clock.tick(1.5)
    world.run(f)
    fake_clock.tick(0.9)
    assert world.run(f) == 2


def test_a_hit_does_not_prolong_an_entrys_life(world, counted, fake_clock):
    f = cached(world, counted.function, cache_ttl=1)
    world.run(f)
    fake_clock.tick(0.9)
    world.run(f)
    fake_clock.tick(0.2)
    assert world.run(f) == 2


def test_an_entrys_life_begins_when_the_result_is_there(world, fake_clock):
    counted = Counted(lambda _x: fake_clock.tick(10))
    f = cached(world, counted.function, cache_ttl=1)
    world.run(f)
    fake_clock.tick(0.9)
    world.run(f)
    assert counted.runs == 1


def test_without_a_time_an_entry_lives_for_ever(world, counted, fake_clock):
    f = cached(world, counted.function)
    world.run(f)
    fake_clock.tick(1e9)
    assert world.run(f) == 1


def test_an_expired_entry_is_replaced_in_its_place(world, counted, fake_clock):
    f = cached(world, counted.function, cache_ttl=1)
    world.run(f)
    fake_clock.tick(2)
    world.run(f)
    assert f.cache_info().currsize == 1


@pytest.mark.parametrize("look", [1, 2])
def test_finding_an_expired_entry_does_not_throw_away_a_fresh_one(world, counted, fake_clock, look):
    f = cached(world, counted.function, cache_ttl=1)
    world.run(f)
    fake_clock.tick(2)
    looks = itertools.count(1)
    others = []

    def another_thread_refreshes_it_just_before_the_look():
        if next(looks) == look:
            others.append(started(world.run, f).result(timeout=10))
        return fake_clock.now()

    clock.now = another_thread_refreshes_it_just_before_the_look
    assert [world.run(f), *others] == [2, 2]


# Size


@pytest.mark.parametrize(
    ("policy", "calls", "evicted"),
    [
        ("lru", [1, 2, 1, 3], 2),
        ("lru", [1, 1, 1, 2, 3], 1),
        ("lfu", [1, 2, 1, 3], 2),
        ("lfu", [1, 1, 1, 2, 3], 2),
        ("fifo", [1, 2, 1, 3], 1),
        ("fifo", [2, 1, 2, 2, 3], 2),
    ],
)
def test_a_full_cache_evicts_by_its_policy(world, policy, calls, evicted):
    runs = []
    f = cached(world, runs.append, cache_key=lambda x: x, cache_options={"maxsize": 2, "policy": policy})
    for x in calls:
        world.run(f, x)
    runs.clear()
    for x in {1, 2, 3} - {evicted}:
        world.run(f, x)
    assert runs == []
    world.run(f, evicted)
    assert runs == [evicted]


def test_the_policy_is_least_recently_used_by_default(world):
    runs = []
    f = cached(world, runs.append, cache_key=lambda x: x, cache_options={"maxsize": 2})
    for x in (1, 1, 2, 1, 3, 1):
        world.run(f, x)
    assert runs == [1, 2, 3]


def test_a_cache_holds_at_most_maxsize_entries(world, counted):
    f = cached(world, counted.function, cache_options={"maxsize": 3})
    for x in range(10):
        world.run(f, x)
    assert f.cache_info().currsize == 3


def test_a_memory_cache_holds_ten_thousand_entries_by_default(counted):
    f = opero.opero(cache=True)(counted.function)
    assert f.cache_info().maxsize == 10_000


# Information


def test_cache_info_tells_hits_misses_and_sizes(world, counted):
    f = cached(world, counted.function, cache_options={"maxsize": 5})
    for x in (1, 1, 2, 1):
        world.run(f, x)
    info = f.cache_info()
    assert info == (2, 2, 5, 2)
    assert (info.hits, info.misses, info.maxsize, info.currsize) == (2, 2, 5, 2)


def test_cache_info_counts_a_failure_as_a_miss(world):
    f = cached(world, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.run(f)
    assert f.cache_info()[:2] == (0, 1)


def test_cache_info_of_a_function_without_cache_is_empty(counted):
    assert opero.control(opero.opero(counted.function)).cache_info() == (0, 0, 0, 0)


def test_a_hit_is_a_call_but_not_an_attempt(world, counted):
    f = cached(world, counted.function)
    world.run(f)
    world.run(f)
    assert (f.stats.calls, f.stats.hits, f.stats.attempts) == (2, 1, 1)


# Forgetting


def test_cache_clear_forgets_everything(world, counted):
    f = cached(world, counted.function)
    world.run(f, 1)
    world.run(f, 2)
    f.cache_clear()
    assert f.cache_info().currsize == 0
    assert [world.run(f, 1), world.run(f, 2)] == [3, 4]


def test_cache_clear_leaves_other_functions_alone(world):
    one, two = Counted(), Counted()
    f, g = cached(world, one.function), cached(world, two.function)
    world.run(f)
    world.run(g)
    f.cache_clear()
    world.run(g)
    assert two.runs == 1


def test_cache_delete_forgets_one_entry(world, counted):
    f = cached(world, counted.function)
    world.run(f, 1)
    world.run(f, 2)
    f.cache_delete(1)
    assert [world.run(f, 2), world.run(f, 1)] == [2, 3]


def test_cache_delete_takes_arguments_in_any_form(world, counted):
    f = cached(world, counted.function)
    world.run(f)
    assert f.cache_delete(x=0)
    assert world.run(f, 0) == 2


def test_cache_delete_tells_whether_there_was_an_entry(world, counted):
    f = cached(world, counted.function)
    world.run(f, 1)
    assert [f.cache_delete(2), f.cache_delete(1), f.cache_delete(1)] == [False, True, False]


def test_cache_delete_finds_no_expired_entry(world, counted, fake_clock):
    f = cached(world, counted.function, cache_ttl=1)
    world.run(f, 1)
    fake_clock.tick(2)
    assert not f.cache_delete(1)


def test_cache_delete_tells_apart_what_calls_tell_apart(world, counted):
    f = cached(world, counted.function)
    world.run(f, 1)
    assert not f.cache_delete(True)
    assert not f.cache_delete(1.0)
    assert world.run(f, 1) == 1


def test_cache_delete_uses_the_users_key(world, counted):
    f = cached(world, counted.function, cache_key=lambda x: x % 10)
    world.run(f, 3)
    assert f.cache_delete(13)


def test_forgetting_without_a_cache_does_nothing(counted):
    its = opero.control(opero.opero(counted.function))
    its.cache_clear()
    assert its.cache_delete(1) is False


def test_a_function_without_a_cache_hides_none_of_a_cache_above(counted):
    f = functools.lru_cache(opero.opero(counted.function))
    f()
    assert f.cache_info().misses == 1


def test_clear_cache_empties_every_cache(world, namespace):
    one, two = Counted(), Counted()
    f, g = cached(world, one.function), cached(world, two.function, cache_namespace=namespace)
    world.run(f)
    world.run(g)
    opero.clear_cache()
    assert (f.cache_info().currsize, g.cache_info().currsize) == (0, 0)


def test_clear_cache_with_a_namespace_empties_only_that_one(world, namespace):
    one, two, three = Counted(), Counted(), Counted()
    f = cached(world, one.function, cache_namespace=namespace)
    g = cached(world, two.function, cache_namespace=f"{namespace}:b")
    h = cached(world, three.function)
    for function in (f, g, h):
        world.run(function)
    opero.clear_cache(namespace)
    assert [function.cache_info().currsize for function in (f, g, h)] == [0, 1, 1]


def test_clear_cache_finds_a_function_by_its_identity(world):
    def one():
        return 1

    def two():
        return 2

    f, g = cached(world, one), cached(world, two)
    world.run(f)
    world.run(g)
    opero.clear_cache(f"{one.__module__}.{one.__qualname__}")
    assert (f.cache_info().currsize, g.cache_info().currsize) == (0, 1)


def test_clear_cache_of_an_unknown_namespace_does_nothing(world, counted):
    f = cached(world, counted.function)
    world.run(f)
    opero.clear_cache("no such namespace")
    assert f.cache_info().currsize == 1


# Namespaces


def test_functions_of_one_namespace_share_entries(world, namespace):
    one, two = Counted(), Counted()
    f = cached(world, one.function, cache_namespace=namespace)
    g = cached(world, two.function, cache_namespace=namespace)
    world.run(f, 5)
    world.run(g, x=5)
    assert (one.runs, two.runs) == (1, 0)


def test_functions_of_one_namespace_are_cleared_together(world, namespace):
    one, two = Counted(), Counted()
    f = cached(world, one.function, cache_namespace=namespace)
    g = cached(world, two.function, cache_namespace=namespace)
    world.run(f)
    g.cache_clear()
    world.run(f)
    assert one.runs == 2


def test_a_function_and_its_async_twin_share_entries(counted, namespace):
    @opero.opero(cache=True, cache_namespace=namespace)
    async def twin(x):
        return counted.function(x)

    f = opero.opero(cache=True, cache_namespace=namespace)(counted.function)
    f(5)
    with pytest.raises(StopIteration) as end:
        twin(5).send(None)
    assert end.value.value == 1


def test_functions_of_different_namespaces_share_nothing(world, namespace):
    one, two = Counted(), Counted()
    f = cached(world, one.function, cache_namespace=namespace)
    g = cached(world, two.function, cache_namespace=f"{namespace}:2")
    world.run(f)
    world.run(g)
    assert (one.runs, two.runs) == (1, 1)


def test_each_entry_of_a_namespace_lives_as_long_as_its_function_says(world, fake_clock, namespace):
    one, two = Counted(), Counted()
    mortal = cached(world, one.function, cache_namespace=namespace, cache_ttl=1)
    immortal = cached(world, two.function, cache_namespace=namespace)
    world.run(mortal, "short")
    world.run(immortal, "long")
    fake_clock.tick(2)
    world.run(mortal, "long")
    world.run(immortal, "short")
    assert (one.runs, two.runs) == (1, 2)


@pytest.mark.parametrize("options", [{"maxsize": 6}, {"policy": "lfu"}, None])
def test_a_namespace_refuses_other_options_than_it_has(counted, options, namespace):
    kept = opero.opero(cache=True, cache_namespace=namespace, cache_options={"maxsize": 5})(counted.function)
    with pytest.raises(ValueError, match=re.escape(namespace) + ".*maxsize=5"):
        opero.opero(cache=True, cache_namespace=namespace, cache_options=options)(counted.function)
    assert kept.cache_info().maxsize == 5


def test_a_namespace_accepts_the_options_that_it_has(world, namespace):
    one, two = Counted(), Counted()
    options = {"maxsize": 5, "policy": "fifo"}
    f = cached(world, one.function, cache_namespace=namespace, cache_options=options)
    g = cached(world, two.function, cache_namespace=namespace, cache_options=dict(options))
    world.run(f)
    world.run(g)
    assert (one.runs, two.runs) == (1, 0)


def test_a_namespace_is_gone_with_its_last_function(counted, namespace):
    def use(maxsize):
        options = {"maxsize": maxsize}
        f = opero.opero(cache=True, cache_namespace=namespace, cache_options=options)(counted.function)
        return f(1)

    use(5)
    gc.collect()
    assert use(6) == 2


def test_lambdas_of_one_name_share_nothing(world):
    f, g = [cached(world, function) for function in (lambda x: x + 1, lambda x: x + 2)]
    assert [world.run(f, 0), world.run(g, 0)] == [1, 2]


def test_closures_of_one_name_share_nothing(world):
    def adder(n):
        return cached(world, lambda x: x + n)

    assert [world.run(adder(n), 0) for n in range(5)] == list(range(5))


def test_results_are_freed_with_the_function(world):
    f = cached(world, lambda: Plain("a"))
    result = weakref.ref(world.run(f))
    gc.collect()
    assert result() is not None
    del f
    gc.collect()
    assert result() is None


# Methods


class Plain:
    """An instance that is equal to itself only."""

    def __init__(self, name):
        self.name = name


@dataclasses.dataclass
class Unhashable:
    """An instance that is equal to others, and cannot be hashed."""

    name: str


@dataclasses.dataclass(frozen=True)
class Hashable:
    """An instance that is equal to others, and can be hashed."""

    name: str


@dataclasses.dataclass(slots=True, weakref_slot=True)
class Slotted:
    """An instance that is equal to others, cannot be hashed and has no attributes but its slots."""

    name: str


class Items(list):
    """An instance that is equal to every list of the same items."""

    name = "items"

    def __init__(self, name):
        super().__init__([name])


KINDS = [Plain, Unhashable, Hashable, Slotted, Items]


def with_method(world, kind, **options):
    """A subclass of ``kind`` with a cached method that counts its runs for each instance."""
    runs = []

    def method(self, x=0):
        runs.append(x)
        return (len(runs), x)

    slots = {"__slots__": ()} if kind is Slotted else {}
    made: Any = type(kind.__name__, (kind,), {"method": cached(world, method, **options), **slots})
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_remembers_for_its_instance(world, kind):
    obj = with_method(world, kind)("a")
    assert [world.run(obj.method, 5), world.run(obj.method, x=5), world.run(obj.method)] == [(1, 5), (1, 5), (2, 0)]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_instances_do_not_share_entries(world, kind):
    made = with_method(world, kind)
    one, two = made("a"), made("a")
    assert [world.run(one.method), world.run(two.method), world.run(one.method)] == [(1, 0), (2, 0), (1, 0)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_that_takes_anything_tells_instances_apart_too(world, kind):
    """As one does that a decorator of the program's own has wrapped."""
    runs = []

    def method(*args, **options):
        runs.append(args)
        return len(runs)

    slots = {"__slots__": ()} if kind is Slotted else {}
    made: Any = type(kind.__name__, (kind,), {"method": cached(world, method), **slots})
    one, two = made("a"), made("a")
    assert [world.run(one.method, 5), world.run(two.method, 5), world.run(one.method, 5)] == [1, 2, 1]
    assert [world.run(one.method), world.run(one.method, 5, x=1), world.run(one.method)] == [3, 4, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_keeps_no_instance_alive(world, kind):
    obj = with_method(world, kind)("a")
    world.run(obj.method)
    alive = weakref.ref(obj)
    del obj
    gc.collect()
    assert alive() is None


def test_an_instance_that_outlives_the_modules_is_forgotten_in_silence():
    program = """if True:
        import sys
        from opero import opero

        class Client:
            @opero(cache=True, retries=0)
            def fetch(self): ...

        client = Client()
        client.fetch()
        sys.kept = list(sys.modules.values())  # so the globals of the program go last
    """
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stderr == b""


def test_an_instance_that_can_have_no_weak_reference_is_refused_with_the_ways_out(world):
    class Owner:
        __slots__ = ()
        method = cached(world, lambda self: 1)

    class Keyed(Owner):
        __slots__ = ()

        def __cache_key__(self):
            return 5

    with pytest.raises(TypeError, match=r"lambda.* was called on a .*Owner.*'__weakref__'.*__cache_key__"):
        world.run(Owner().method)
    assert world.run(Keyed().method) == 1


def test_a_method_of_numbers_and_tuples_remembers_for_equal_ones(world, counted):
    class Pair(tuple):
        __slots__ = ()
        method = cached(world, lambda self: counted.function())

    assert [world.run(Pair(values).method) for values in ((1, 2), (1, 2), (1, True))] == [1, 1, 2]


def test_a_method_that_failed_keeps_no_instance_alive(world):
    class Owner:
        method = cached(world, lambda self: 1 / 0)

    obj = Owner()
    with pytest.raises(ZeroDivisionError):
        world.run(obj.method)
    alive = weakref.ref(obj)
    del obj
    gc.collect()
    assert alive() is None


def test_a_changed_instance_keeps_its_entries(world):
    obj = with_method(world, Unhashable)("a")
    world.run(obj.method)
    obj.name = "b"
    assert world.run(obj.method) == (1, 0)


def test_cache_delete_of_a_method_is_for_one_instance(world):
    made = with_method(world, Unhashable)
    one, two = made("a"), made("a")
    world.run(one.method)
    world.run(two.method)
    assert opero.control(one.method).cache_delete()
    assert [world.run(two.method), world.run(one.method)] == [(2, 0), (3, 0)]


def test_cache_clear_of_a_method_is_for_all_instances(world):
    made = with_method(world, Plain)
    one, two = made("a"), made("b")
    world.run(one.method)
    world.run(two.method)
    one.method.cache_clear()
    assert made.method.cache_info().currsize == 0


def test_a_method_can_be_called_through_its_class(world):
    made = with_method(world, Plain)
    obj = made("a")
    world.run(obj.method, 5)
    assert world.run(made.method, obj, 5) == (1, 5)


def test_a_methods_key_function_gets_the_instance(world):
    made = with_method(world, Plain, cache_key=lambda self, x=0: (self.name, x))
    assert [world.run(made("a").method), world.run(made("a").method), world.run(made("b").method)] == [
        (1, 0),
        (1, 0),
        (2, 0),
    ]


def test_a_class_method_remembers_for_its_class(world, counted):
    class Base:
        method = classmethod(cached(world, lambda cls: (counted.function(), cls)))

    class Derived(Base):
        pass

    assert world.run(Base.method) == (1, Base)
    assert world.run(Derived.method) == (2, Derived)
    assert world.run(Base().method) == (1, Base)


def test_a_static_method_remembers_for_all(world, counted):
    class Owner:
        method = staticmethod(cached(world, counted.function))

    assert [world.run(Owner.method), world.run(Owner().method)] == [1, 1]


def test_an_overriding_method_has_entries_of_its_own(world):
    class Base:
        method = cached(world, lambda self: "base")

    class Derived(Base):
        method = cached(world, lambda self: "derived")

    obj = Derived()
    assert world.run(obj.method) == "derived"
    assert world.run(Base.method, obj) == "base"


# The decorator of this policy alone


def test_the_cache_decorator_remembers(world, counted):
    f = get_cache_decorator()(world.define(counted.function))
    assert [world.run(f, 7), world.run(f, x=7), world.run(f, 8)] == [1, 1, 2]


def test_the_cache_decorator_does_not_retry(world):
    runs = []

    def function():
        runs.append(1)
        raise ZeroDivisionError

    f = get_cache_decorator()(world.define(function))
    with pytest.raises(ZeroDivisionError):
        world.run(f)
    assert len(runs) == 1


def test_the_cache_decorator_takes_every_option_of_the_cache(world, counted, fake_clock, namespace):
    f = get_cache_decorator(
        cache_ttl=1,
        cache_backend="memory",
        cache_key=lambda x: x % 10,
        cache_namespace=namespace,
        maxsize=7,
        policy="fifo",
    )(world.define(counted.function))
    assert [world.run(f, 1), world.run(f, 11)] == [1, 1]
    fake_clock.tick(2)
    assert world.run(f, 1) == 2
    assert f.cache_info().maxsize == 7


def test_one_cache_decorator_gives_each_function_its_own_entries(world):
    decorate = get_cache_decorator()
    f, g = decorate(world.define(lambda: 1)), decorate(world.define(lambda: 2))
    assert [world.run(f), world.run(g)] == [1, 2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache_ttl": 0}, ValueError, "cache_ttl=0"),
        ({"cache_ttl": -1}, ValueError, "cache_ttl=-1"),
        ({"cache_ttl": float("nan")}, ValueError, "cache_ttl=nan"),
        ({"cache_ttl": float("inf")}, ValueError, "cache_ttl=inf"),
        ({"cache_ttl": "1"}, TypeError, "cache_ttl=… is str"),
        ({"cache_ttl": True}, TypeError, "cache_ttl=True"),
        ({"cache_backend": "memroy"}, ValueError, "cache_backend=.*did you mean 'memory'"),
        ({"cache_backend": None}, TypeError, "cache_backend=None"),
        ({"cache_key": "x"}, TypeError, "cache_key=… is str"),
        ({"cache_namespace": ""}, ValueError, "cache_namespace=''"),
        ({"cache_namespace": 5}, TypeError, "cache_namespace=5"),
        ({"maxsize": 0}, ValueError, "maxsize.*0"),
        ({"maxsize": -1}, ValueError, "maxsize.*-1"),
        ({"maxsize": 1.5}, TypeError, "maxsize.*1.5"),
        ({"maxsize": True}, TypeError, "maxsize.*True"),
        ({"policy": "bogus"}, ValueError, "policy.*'fifo', 'lfu', 'lru'"),
        ({"policy": 5}, TypeError, "policy.*5"),
        ({"max_size": 5}, TypeError, "'max_size'.*'maxsize'"),
    ],
)
def test_a_wrong_option_is_refused_when_decorating(counted, options, error, message):
    with pytest.raises(error, match=message):
        get_cache_decorator(**options)(counted.function)


def test_an_async_key_function_is_refused_when_decorating(counted):
    async def key(x):
        return x

    with pytest.raises(TypeError, match=r"cache_key=.*async"):
        get_cache_decorator(cache_key=key)(counted.function)
