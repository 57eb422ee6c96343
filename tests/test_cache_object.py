"""`opero.Cache`: what a cache keeps, for how long, and what it gives when a call fails, in every kind of place."""

from __future__ import annotations

import copy
import datetime as dt
import pickle
import threading
import time

import pytest
from side_by_side import SECONDS, results, started, until

from opero import (
    AllFailedError,
    Cache,
    CallTimeoutError,
    MisuseError,
    RateLimitedError,
    RateLimiter,
    clear_cache,
    control,
    opero,
    opmap,
)
from opero.core.clock import clock


@pytest.fixture(params=["memory", "disk", "redis"])
def place(request):
    """The settings of a backend, in a namespace of the test's own."""
    if request.param == "memory":
        return {}
    backend = request.getfixturevalue(f"{request.param}_backend")
    return {"backend": backend.name, "namespace": backend.namespace(), **backend.cache_options}


@pytest.fixture
def wall(fake_clock):
    """The fake clock for all times, those outside of the process included."""
    start = time.time() - fake_clock.now()
    clock.wall = lambda: start + fake_clock.now()
    return fake_clock


class Service:
    """Gives what it is told to, one after the other; an exception is raised."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = 0

    def ask(self, x=0):
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def cached(world, service, *, retries=0, total_timeout=None, **settings):
    def ask(x=0):
        return service.ask(x)

    more = {} if total_timeout is None else {"total_timeout": total_timeout}
    return opero(cache=Cache(**settings), retries=retries, **more)(world.define(ask))


# How long


@pytest.mark.parametrize(
    "ttl", [10, 10.0, dt.timedelta(seconds=10), "10 s", "10seconds", "0.1666666666 minutes"], ids=str
)
def test_a_lifetime_can_be_told_in_many_ways(world, fake_clock, ttl):
    f = cached(world, Service(1, 2), ttl=ttl)
    assert world.run(f) == 1
    fake_clock.tick(9.9)
    assert world.run(f) == 1
    fake_clock.tick(0.2)
    assert world.run(f) == 2


@pytest.mark.parametrize(
    ("text", "seconds"), [("90 s", 90), ("15 minutes", 900), ("2 h", 7200), ("1 day", 86_400), ("1.5 Hours", 5400)]
)
def test_units_are_words_or_letters(text, seconds):
    assert Cache(ttl=text).ttl == seconds


def test_the_result_can_tell_how_long_it_lives(world, place, wall):
    answers = [{"for": said, "n": n} for n, said in enumerate([5, "1 minute", dt.timedelta(hours=1), None, 0, 0])]
    f = cached(world, Service(*answers), ttl=lambda answer: answer["for"], **place)
    for n, life in enumerate([5, 60, 3600]):
        assert world.run(f)["n"] == n
        if "backend" not in place:  # the servers have clocks of their own
            wall.tick(life - 0.5)
            assert world.run(f)["n"] == n
            wall.tick(1)
        else:
            f.cache_delete()
    assert [world.run(f)["n"] for _ in range(3)] == [3, 3, 3]
    f.cache_delete()
    assert [world.run(f)["n"] for _ in range(2)] == [4, 5]


def test_an_error_of_ttl_is_the_calls_own_and_nothing_is_kept(world, place):
    service = Service(1, 2)
    f = cached(world, service, ttl=lambda answer: 1 / 0, **place)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            world.run(f)
    assert service.asked == 2


@pytest.mark.parametrize("said", ["soon", -1, True, object()], ids=repr)
def test_a_wrong_answer_of_ttl_is_named(world, said):
    f = cached(world, Service(1), ttl=lambda answer: said)
    with pytest.raises((TypeError, ValueError), match="what ttl=… returned"):
        world.run(f)


# What is kept


def test_only_results_that_keep_if_wants_are_kept(world, place):
    service = Service([], [], [1], [2])
    f = cached(world, service, keep_if=bool, **place)
    assert [world.run(f) for _ in range(4)] == [[], [], [1], [1]]
    assert service.asked == 3


def test_an_error_of_keep_if_is_the_calls_own(world, place):
    f = cached(world, Service(1, 2), keep_if=lambda answer: answer / 0, **place)
    with pytest.raises(ZeroDivisionError):
        world.run(f)


@pytest.mark.parametrize("ignore", ["api_key", ["api_key"], ("api_key", "trace")])
def test_ignored_parameters_are_no_part_of_the_key(world, place, ignore):
    runs = []

    def ask(question, api_key, trace=None):
        runs.append(api_key)
        return question

    f = opero(cache=Cache(ignore=ignore, **place), retries=0)(world.define(ask))
    assert [world.run(f, "q", "one"), world.run(f, "q", api_key="two"), world.run(f, "r", "two")] == ["q", "q", "r"]
    assert runs == ["one", "two"]
    assert f.cache_delete("q", threading.Lock())


def test_a_method_may_ignore_its_instance(world):
    class Client:
        @opero(cache=Cache(ignore="self"), retries=0)
        def fetch(self, x):
            return [x]

    assert Client().fetch(1) is Client().fetch(1)


class NotThereError(LookupError):
    def __init__(self, what, where):
        super().__init__(f"{what} is not in {where}")


def test_errors_can_be_remembered_like_results(world, place, wall):
    service = Service(LookupError("no"), ValueError("odd"), 2)
    f = cached(world, service, exceptions=LookupError, ttl=10, **place)
    for _ in range(3):
        with pytest.raises(LookupError, match="no"):
            world.run(f)
    assert (service.asked, f.cache_info().hits) == (1, 2)
    f.cache_delete()
    with pytest.raises(ValueError, match="odd"):
        world.run(f)
    assert [world.run(f), world.run(f)] == [2, 2]


def test_a_remembered_error_has_a_traceback_of_its_own_each_time(world):
    service = Service(LookupError("no"))
    f = cached(world, service, exceptions=LookupError)
    lengths = []
    for _ in range(20):
        with pytest.raises(LookupError) as caught:
            world.run(f)
        lengths.append(len(caught.traceback))
    assert len(set(lengths[1:])) == 1


class OfKeywordsError(OSError):
    def __init__(self, path, *, code):
        super().__init__(2, "gone", path)
        self.code = code


class WithSlotsError(LookupError):
    __slots__ = ("name",)

    def __init__(self, name):
        super().__init__()
        self.name = name

    def __str__(self):
        return f"no {self.name}"


def undecodable():
    try:
        b"\xff".decode()
    except UnicodeDecodeError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        NotThereError("a", "b"),
        OfKeywordsError("/data", code=5),
        WithSlotsError("door"),
        undecodable(),
        SyntaxError("odd", ("file.py", 1, 2, "text")),
        ExceptionGroup("both", [NotThereError("a", "b"), OfKeywordsError("/data", code=5)]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_are_remembered_whatever_their_classes_want_to_be_made_of(world, place, error):
    f = cached(world, Service(error), exceptions=Exception, **place)
    for _ in range(3):
        with pytest.raises(type(error)) as caught:
            world.run(f)
        assert str(caught.value) == str(error)
        assert getattr(caught.value, "code", 5) == 5
        assert [*map(str, getattr(caught.value, "exceptions", ()))] == [*map(str, getattr(error, "exceptions", ()))]
    assert f.stats.cache_errors == 0


class OnlyHereError(LookupError):
    def __reduce__(self):
        return OnlyHereError, (1, 2, 3), {"what": 4}

    def __init__(self, what):
        super().__init__(what)


def test_an_error_that_would_not_come_back_from_disk_costs_the_cache_and_not_the_call(world, tmp_path):
    error = OnlyHereError("a")
    service = Service(error, error, "found")
    f = cached(world, service, exceptions=LookupError, backend="disk", cache_dir=tmp_path)
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            world.run(f)
        assert str(caught.value) == str(error)
    assert world.run(f) == "found"


def test_an_error_of_all_candidates_can_be_remembered(world, place):
    runs = []

    def ask(key):
        runs.append(key)
        raise ValueError(key)

    f = opero(cache=Cache(exceptions=AllFailedError, **place), retries=0, arg_fallback="key")(world.define(ask))
    for _ in range(2):
        with pytest.raises(AllFailedError) as caught:
            world.run(f, ["a", "b"])
        assert len(caught.value.errors) == 2
    assert runs == ["a", "b"]


def test_errors_of_opero_itself_are_not_remembered(world, place):
    f = cached(world, Service(), exceptions=Exception, total_timeout=5, **place)
    with pytest.raises(TypeError):
        world.run(f, 1, 2)
    g = opero(cache=Cache(exceptions=Exception, **place), retries=0)(world.define(lambda x: iter(())))
    for _ in range(2):
        with pytest.raises(TypeError, match="only once"):
            world.run(g, 1)
    assert g.cache_info().hits == 0


# When the call fails


def test_an_entry_that_has_ended_is_given_if_the_call_fails(world, place, wall):
    service = Service(1, ConnectionError(), ConnectionError(), 2, ConnectionError())
    f = cached(world, service, ttl=10, stale=100, **place)
    assert world.run(f) == 1
    wall.tick(11)
    assert [world.run(f), world.run(f), world.run(f), world.run(f)] == [1, 1, 2, 2]
    assert service.asked == 4
    assert f.stats.failures == 0
    wall.tick(111)
    with pytest.raises(ConnectionError):
        world.run(f)


def test_an_entry_that_has_ended_is_given_if_a_policy_refuses_the_call(world, place, wall):
    limit = RateLimiter("1/day", spread=False, when_full="raise")
    f = opero(cache=Cache(10, stale=100, **place), retries=0, rate_limit=limit)(world.define(lambda x=1: x))
    assert world.run(f) == 1
    wall.tick(11)
    assert [world.run(f), f.stats.failures] == [1, 0]
    with pytest.raises(RateLimitedError):
        world.run(f, 5)


def test_without_stale_an_entry_that_has_ended_is_gone(world, place, wall):
    f = cached(world, Service(1, ConnectionError()), ttl=10, **place)
    world.run(f)
    wall.tick(11)
    with pytest.raises(ConnectionError):
        world.run(f)


def test_a_call_that_gets_an_old_entry_is_counted_once(world, place, wall):
    f = cached(world, Service(1, ConnectionError()), ttl=10, stale=100, **place)
    world.run(f)
    wall.tick(11)
    world.run(f)
    assert (f.stats.calls, f.stats.attempts, f.stats.hits) == (2, 2, 0)


# Refreshing


def test_a_refresh_runs_the_function_and_keeps_the_new_result(world, place):
    service = Service(1, 2)
    f = cached(world, service, **place)
    assert world.run(f, 5) == 1
    assert world.run(control(f).cache_refresh, x=5) == 2
    assert (world.run(f, 5), service.asked) == (2, 2)


def test_a_refresh_that_fails_keeps_the_old_entry(world, place):
    f = cached(world, Service(1, ConnectionError()), exceptions=ConnectionError, **place)
    world.run(f)
    with pytest.raises(ConnectionError):
        world.run(f.cache_refresh)
    assert world.run(f) == 1


def test_a_refresh_of_what_was_never_there_is_a_call(world, place):
    f = cached(world, Service(1), **place)
    assert [world.run(f.cache_refresh), world.run(f)] == [1, 1]


def test_a_refresh_has_retries_and_stats_like_a_call(world, place, fake_clock):
    service = Service(1, ConnectionError(), 2)
    f = cached(world, service, retries=1, **place)
    world.run(f)
    assert world.run(f.cache_refresh) == 2
    assert (f.stats.calls, f.stats.attempts, f.stats.retries) == (2, 3, 1)


class Held:
    """Runs that go on when they are told to."""

    def __init__(self):
        self.runs = 0
        self.go = threading.Event()
        self.began = threading.Event()

    def run(self, x=0):
        self.runs += 1
        if self.runs == 1:
            return "old"
        self.began.set()
        assert self.go.wait(SECONDS)
        return "new"


def test_others_get_the_old_entry_meanwhile_and_two_refreshes_are_one_run(world, place):
    held = Held()
    f = opero(cache=Cache(**place), retries=0)(world.define(held.run))
    assert world.run(f) == "old"
    refreshes = [started(world.run, f.cache_refresh) for _ in range(3)]
    assert held.began.wait(SECONDS)
    assert world.run(f) == "old"
    flights = f.__opero__.plan.cache.store.flights
    until(lambda: sum(len(flight.seats) for flight in list(flights._under_way.values())) == 2)
    held.go.set()
    assert results(refreshes) == ["new"] * 3
    assert (world.run(f), held.runs) == ("new", 2)


@pytest.mark.parametrize("forget", [lambda f: f.cache_delete(), lambda f: f.cache_clear()], ids=["delete", "clear"])
def test_what_is_forgotten_while_it_is_refreshed_is_not_kept(world, place, forget):
    held = Held()
    f = opero(cache=Cache(**place), retries=0)(world.define(held.run))
    world.run(f)
    refresh = started(world.run, f.cache_refresh)
    assert held.began.wait(SECONDS)
    forget(f)
    held.go.set()
    assert results([refresh]) == ["new"]
    assert (world.run(f), held.runs) == ("new", 3)


def test_a_method_is_refreshed_by_its_control(world):
    class Client:
        def __init__(self):
            self.n = 0

        def fetch(self, x):
            self.n += 1
            return (self.n, x)

    Client.fetch = opero(cache=True, retries=0)(world.define(Client.fetch))
    client = Client()
    assert world.run(client.fetch, 5) == (1, 5)
    assert world.run(control(client.fetch).cache_refresh, 5) == (2, 5)
    assert world.run(client.fetch, 5) == (2, 5)
    with pytest.raises(TypeError, match=r"opero\.control\(instance\.fetch\)\.cache_refresh"):
        Client.fetch.cache_refresh(5)


# Maps


def test_a_map_has_all_of_it(mode, place):
    if mode.name in {"process", "async_process"} and "backend" not in place:
        place = {}
    fetch = opmap(cache=Cache(ttl="1 h", ignore="token", keep_if=is_even, **place), retries=0, **mode.options)(
        mode.define(double)
    )
    assert mode.run(fetch, [1, 2, 3], token="a") == [2, 4, 6]
    assert fetch.stats.attempts == 3
    assert mode.run(fetch, [1, 2, 3], token="b") == [2, 4, 6]
    assert (fetch.stats.attempts, fetch.stats.hits) == (5, 1)
    refreshed = fetch.cache_refresh(2, token="c")
    if mode.is_async:
        import asyncio

        refreshed = asyncio.run(refreshed)
    assert (refreshed, fetch.stats.attempts) == (4, 6)


def double(x, token=None):
    return 2 * x


def is_even(result):
    return result % 4 == 0


def test_items_of_a_map_get_old_entries_when_they_fail(mode, place, wall, journal):
    def ask(x):
        journal.add(x)
        if len(journal.lines()) > 1:
            raise ConnectionError
        return 1

    fetch = opmap(cache=Cache(ttl=10, stale=100, **place), retries=0, **mode.options)(mode.define(ask))
    assert mode.run(fetch, [5]) == [1]
    wall.tick(11)
    assert mode.run(fetch, [5]) == [1]


def once(x):
    return iter([x])


def test_a_result_that_can_be_used_only_once_fails_its_item(mode):
    fetch = opmap(cache=True, retries=0, return_exceptions=True, **mode.options)(mode.define(once))
    got = mode.run(fetch, [1, 2])
    assert [type(error) for error in got] == [MisuseError] * 2
    assert fetch.cache_info().currsize == 0


# Counting


def test_clearing_starts_hits_and_misses_anew(world, place):
    f = cached(world, Service(1, 2), **place)
    for _ in range(3):
        world.run(f)
    assert f.cache_info()[:2] == (2, 1)
    f.cache_clear()
    assert f.cache_info()[:2] == (0, 0)
    world.run(f)
    assert f.cache_info()[:2] == (0, 1)
    assert (f.stats.hits, f.stats.calls) == (2, 4)


def test_clearing_by_namespace_does_so_too(world):
    f = cached(world, Service(1), namespace="test.counts")
    world.run(f)
    clear_cache("test.counts")
    assert f.cache_info()[:2] == (0, 0)


# Joining a computation


def four_at_once(world, backend, result, **settings):
    """What four callers get, three of whom wait for the first one; and the statistics."""
    go, began = threading.Event(), threading.Event()

    def make(x=0):
        began.set()
        assert go.wait(SECONDS)
        return result

    place = {"backend": backend.name, "namespace": backend.namespace(), **backend.cache_options}
    f = opero(cache=Cache(**place, **settings), retries=0)(world.define(make))
    calls = [started(world.run, f) for _ in range(4)]
    assert began.wait(SECONDS)
    flights = f.__opero__.plan.cache.store.flights
    until(lambda: sum(len(flight.seats) for flight in list(flights._under_way.values())) == 3)
    go.set()
    return results(calls), f.stats


def test_those_who_join_get_a_copy_each_where_a_hit_would_be_one(world, backend):
    got, _ = four_at_once(world, backend, [0])
    assert got == [[0]] * 4
    assert len({id(value) for value in got}) == 4


def test_those_who_join_get_a_result_that_cannot_be_read_again(world, backend, warnings):
    error = NotThereError("a", "b")
    got, stats = four_at_once(world, backend, {"error": error})
    assert got == [{"error": error}] * 4
    assert (stats.attempts, stats.cache_errors) == (1, 3)
    assert len(warnings) == 1


def test_each_of_many_waiters_has_the_traceback_of_one():
    import asyncio
    import traceback

    @opero(cache=True, retries=0)
    async def fetch(key):
        await asyncio.sleep(0.05)
        raise ConnectionError

    async def one():
        try:
            await fetch(1)
        except ConnectionError:
            return len(traceback.format_exc().splitlines())

    async def main():
        return await asyncio.gather(*[one() for _ in range(100)])

    lengths = asyncio.run(main())
    assert max(lengths) <= 2 * min(lengths)


def test_the_wait_for_somebody_elses_run_ends_with_total_timeout(world):
    held = Held()
    held.runs = 1
    f = opero(cache=True, retries=0, total_timeout=0.3)(world.define(held.run))
    first = started(world.run, f)
    assert held.began.wait(SECONDS)
    with pytest.raises(CallTimeoutError, match="same call of somebody else's"):
        world.run(f)
    held.go.set()
    assert results([first]) == ["new"]


def test_the_wait_for_another_process_ends_with_total_timeout(world, backend, start):
    namespace = backend.namespace()
    source = """
    def run(x):
        say("began")
        told()

    cached(run)(1)
    """
    program = start(source, {**backend.options, "cache_namespace": namespace, "retries": 0})
    assert program.heard() == "began"
    f = opero(**backend.options, cache_namespace=namespace, retries=0, total_timeout=0.3)(world.define(lambda x: x))
    with pytest.raises(CallTimeoutError, match="same call of somebody else's"):
        world.run(f, 1)
    program.tell("go on")
    program.end()


# Settings


def test_functions_of_one_cache_object_keep_entries_of_their_own(world):
    shared = Cache(ttl=60)
    f, g = (opero(cache=shared, retries=0)(world.define(lambda x, n=n: (n, x))) for n in (1, 2))
    assert [world.run(f, 5), world.run(g, 5)] == [(1, 5), (2, 5)]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ttl": 0}, ValueError, "ttl=0"),
        ({"ttl": "5"}, ValueError, "ttl=…"),
        ({"ttl": "5 fortnights"}, ValueError, "15 minutes"),
        ({"ttl": True}, TypeError, "ttl=True"),
        ({"stale": 5}, ValueError, "stale=5"),
        ({"ttl": 5, "stale": -1}, ValueError, "stale=-1"),
        ({"keep_if": 5}, TypeError, "keep_if=5"),
        ({"exceptions": 5}, TypeError, "exceptions=5"),
        ({"exceptions": KeyboardInterrupt}, TypeError, "exceptions="),
        ({"ignore": 5}, TypeError, "ignore"),
        ({"ignore": "x", "key": len}, ValueError, "ignore=…"),
        ({"backend": "paper"}, ValueError, "backend="),
        ({"maxsize": 0}, ValueError, "maxsize=0"),
        ({"maxsize": None}, TypeError, "maxsize=None"),
        ({"redis_host": "a"}, TypeError, "redis_host"),
        ({"backend": "disk", "serializer": "json", "exceptions": LookupError}, ValueError, "exceptions=…"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_at_once(settings, error, message):
    with pytest.raises(error, match=message):
        Cache(**settings)


def test_a_disk_cache_may_be_said_to_have_no_bound(tmp_path):
    f = opero(cache=Cache(backend="disk", maxsize=None, cache_dir=tmp_path), retries=0)(lambda x: x)
    assert [f(1), f(1), f.cache_info()] == [1, 1, (1, 1, None, 1)]


def test_an_ignored_parameter_has_to_be_one():
    with pytest.raises(ValueError, match=r"ignore='key' names no parameter of .*; write any of 'api_key'"):
        opero(cache=Cache(ignore="key"))(lambda api_key: 1)


@pytest.mark.parametrize("option", [{"cache_ttl": 5}, {"cache_options": {"maxsize": 5}}, {"cache_backend": "disk"}])
@pytest.mark.parametrize("decorate", [opero, opmap])
def test_flat_options_beside_a_cache_object_are_refused(option, decorate):
    with pytest.raises(ValueError, match="stands beside cache=Cache"):
        decorate(cache=Cache(), **option)(lambda x: x)


def test_a_cache_object_does_not_change():
    made = Cache(ttl=5)
    with pytest.raises(AttributeError):
        made.ttl = None
    for copied in (pickle.loads(pickle.dumps(made)), copy.copy(made)):
        assert copied.ttl == 5


def test_its_repr_shows_no_text():
    cache = Cache(ttl=5, backend="redis", redis_password="secret", keep_if=bool)
    assert repr(cache) == "Cache(ttl=5, backend=…, keep_if=bool, redis_password=…)"


def test_with_options_takes_another_cache(world):
    service = Service(1, 2)
    f = opero(cache=True, cache_ttl=5, retries=0)(world.define(lambda x=0: service.ask(x)))
    g = f.with_options(cache=Cache(ttl="1 h"))
    assert [world.run(f), world.run(g), world.run(f), world.run(g)] == [1, 2, 1, 2]
    assert f.with_options(retries=1).cache_info().currsize == 1
