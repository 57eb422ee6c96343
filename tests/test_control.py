"""What can be done with a decorated function besides calling it: `opero.control`."""

from __future__ import annotations

import functools
import pickle

import cloudpickle
import pytest

from opero import CallStats, MisuseError, control, opero, opmap
from opero.core import get_cache_decorator, get_retry_decorator


class BrokenError(Exception):
    pass


def fails(times):
    """A function that fails so often, and then gives its argument."""
    left = [BrokenError() for _ in range(times)]

    def work(value=1):
        if left:
            raise left.pop()
        return value

    return work


class Client:
    """A class with a cached method."""

    @opero(cache=True)
    def fetch(self, page, size=10):
        return page, size

    @classmethod
    @opero(cache=True)
    def of_class(cls, page):
        return page

    @staticmethod
    @opero(cache=True)
    def static(page):
        return page


def test_it_is_of_the_function_that_was_decorated(world):
    f = opero(cache=True)(world.define(lambda value: value))
    world.run(f, 1)
    its = control(f)
    assert its.stats.snapshot() == f.stats.snapshot() == CallStats(calls=1, attempts=1)
    assert its.cache_info() == f.cache_info()
    assert its.cache_delete(1) is True
    assert its.cache_delete(1) is False
    world.run(f, 1)
    its.cache_clear()
    assert its.cache_info().currsize == 0


def test_of_a_bound_method_it_knows_the_instance():
    one, other = Client(), Client()
    for client in (one, other):
        client.fetch(3)
    assert control(one.fetch).cache_delete(3, size=10) is True
    assert control(one.fetch).cache_delete(3) is False
    assert control(other.fetch).cache_delete(page=3) is True


def test_of_a_bound_class_method_it_knows_the_class():
    Client.of_class(3)
    assert control(Client.of_class).cache_delete(3) is True


def test_of_a_map_it_can_be_pickled():
    its = pickle.loads(pickle.dumps(control(Maps().double)))
    assert its.run([1, 2]) == [2, 4]
    assert its.cache_delete(1) is False


class Maps:
    @opmap(mode="thread", progress=False)
    def double(self, item):
        return 2 * item


def test_of_a_map_it_is_that_of_its_function(mode):
    mapped = opmap(cache=True, **mode.options)(mode.define(fails(0)))
    mode.run(mapped, [1, 2])
    assert control(mapped).stats.calls == 2
    assert control(mapped).cache_delete(1) is True
    assert mapped.cache_info().currsize == 1


@pytest.mark.parametrize("ask", ["cache_delete", "with_options"])
@pytest.mark.parametrize(("name", "whose"), [("fetch", "instance"), ("of_class", "Client")])
def test_a_method_itself_cannot_know_the_instance_and_says_who_does(name, whose, ask):
    method = vars(Client)[name]
    function = getattr(method, "__func__", method)
    with pytest.raises(MisuseError, match=rf"opero\.control\({whose}\.{name}\)\.{ask}"):
        getattr(function, ask)()


def test_a_static_method_has_no_instance():
    Client.static(3)
    assert Client.static.cache_delete(3) is True


def test_it_is_found_through_wrappers_above():
    f = opero(fails(0))

    @functools.wraps(f)
    def above(*args, **kwargs):
        return f(*args, **kwargs)

    above()
    assert control(above).stats.calls == 1


def test_stacked_functions_have_one_each():
    inner = opero(retries=0)(fails(0))
    outer = opero(retries=0)(inner)
    outer()
    inner()
    assert (control(outer).stats.calls, control(inner).stats.calls) == (1, 2)


@pytest.mark.parametrize("thing", [fails(0), len, 5, Client().__init__, functools.partial(opero(fails(0)))], ids=repr)
def test_what_opero_has_not_decorated_is_refused(thing):
    with pytest.raises(TypeError, match="which opero has not decorated"):
        control(thing)


def test_other_options_give_the_same_function_under_them(world, fake_clock):
    f = opero(retries=3, min_delay=1)(world.define(fails(2)))
    with pytest.raises(BrokenError):
        world.run(control(f).with_options(retries=0))
    assert world.run(f, 5) == 5
    assert (f.__name__, f.__wrapped__) == (control(f).with_options(retries=0).__name__, f.__wrapped__)


def test_what_no_option_names_is_shared(world, fake_clock):
    f = opero(cache=True, retries=1, rate_limit=1, rate_limit_options={"max_burst": 1}, breaker=1)(
        world.define(fails(2))
    )
    other = control(f).with_options(retries=0)
    with pytest.raises(BrokenError):
        world.run(other, 1)
    its, others = f.__opero__.plan, other.__opero__.plan
    assert (its.cache, its.limit, its.breaker) == (others.cache, others.limit, others.breaker)
    assert f.stats.failures == other.stats.failures == 1


def test_entries_are_shared_unless_an_option_of_the_cache_is_named():
    f = opero(cache=True)(fails(0))
    f(1)
    control(f).with_options(retries=0)(1)
    assert f.stats.hits == 1
    control(f).with_options(cache_ttl=60)(1)
    assert f.stats.hits == 1


def test_a_policy_can_be_turned_off_with_all_its_options():
    f = opero(retries=3, min_delay=1, backoff_factor=3, cache=True, cache_ttl=60, rate_limit=5)(fails(0))
    bare = control(f).with_options(retries=0, cache=False, rate_limit=None)
    assert bare(3) == 3
    assert bare.__opero__.plan.cache is bare.__opero__.plan.limit is None
    assert bare.__opero__.plan.retry.retries == 0


def test_retries_can_be_turned_off_whatever_tenacity_was_told():
    calls = []
    options = {"stop": lambda state: state.attempt_number == 3, "wait": lambda state: 0}
    patient = opero(min_delay=0, retry_options=options)
    alone = get_retry_decorator(**options)
    for decorator, attempts in [(patient, 1), (alone, 3)]:
        f = decorator(lambda x: calls.append(x) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            control(f).with_options(retries=0)(attempts)
    assert calls == [1, 3, 3, 3]


def test_a_decorator_of_one_policy_keeps_the_options_that_are_not_named(fake_clock):
    f = control(get_cache_decorator(cache_ttl=60)(fails(0))).with_options(maxsize=5)
    f(1)
    fake_clock.tick(61)
    f(1)
    assert control(f).cache_info()[1:3] == (2, 5)


def test_the_errors_are_those_of_the_decorator():
    f = opero(fails(0))
    with pytest.raises(TypeError, match="did you mean 'retries'"):
        control(f).with_options(retires=1)
    with pytest.raises(ValueError, match="cache_ttl=5 has no effect"):
        control(f).with_options(cache_ttl=5)


def test_a_bound_method_under_other_options_is_bound_to_the_same_instance():
    client = Client()
    method = control(client.fetch).with_options(retries=0)
    assert method.__self__ is client
    assert method(3) == (3, 10)


def test_a_map_can_have_other_options(mode):
    def work(item):
        raise BrokenError

    mapped = opmap(retries=2, min_delay=0, max_delay=0, **mode.options)(mode.define(work))
    once = control(mapped).with_options(retries=0, return_exceptions=True)
    assert [type(error) for error in mode.run(once, [1])] == [BrokenError]
    assert (once.stats.attempts, mapped.stats.attempts) == (1, 1)


def test_a_map_with_other_workers_shares_its_policies(mode):
    mapped = opmap(cache=True, **mode.options)(mode.define(fails(0)))
    mode.run(mapped, [1])
    other = control(mapped).with_options(workers=1, ordered=False)
    assert mode.run(other, [1]) == [1]
    assert (mapped.stats.hits, mapped.stats.attempts) == (1, 1)


def test_a_decorator_of_one_policy_takes_its_own_options(fake_clock):
    f = get_retry_decorator(retries=0)(fails(1))
    assert control(f).with_options(retries=2)() == 1
    g = get_cache_decorator()(fails(0))
    g(1)
    assert control(g).with_options(cache_ttl=5).cache_info().currsize == 0


def test_it_can_be_carried_by_value():
    carried = cloudpickle.loads(cloudpickle.dumps(control(Client().fetch)))
    assert carried.cache_delete(3) is False
