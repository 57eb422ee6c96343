"""Which functions share what they keep on disk and on redis: those that are the same, and no others."""

from __future__ import annotations

import functools
import re
import subprocess
import sys

import pytest

import opero
from opero.core.digests import lasting_identity


def calling(operation):
    def function(x):
        return operation(x)

    return function


def with_keyword_default(n):
    def operation(x, *, factor=n):
        return x * factor

    return calling(operation)


def wrapped(n):
    def operation(x, factor=n):
        return x * factor

    @functools.wraps(operation)
    def wrapper(x):
        return operation(x)

    return wrapper


def around_a_decorated_one(n):
    decorated = opero.opero(calling(abs))

    # As `functools.wraps` does it, this one looks decorated, too.
    @functools.wraps(decorated)
    def wrapper(x):
        return decorated(x) * n

    return wrapper


def with_local_class(n):
    class Factor:
        value = n

    return lambda x: Factor.value * x


def executed(n):
    namespace = {"factor": n}
    exec("def function(x): return factor * x", namespace)
    return namespace["function"]


class Multiplier:
    def __init__(self, n):
        self.n = n

    def __call__(self, x):
        return self.n * x

    def times(self, x):
        return self.n * x


MAKERS = {
    "default of a captured lambda": lambda n: calling(lambda x, factor=n: x * factor),
    "keyword default of a captured function": with_keyword_default,
    "captured value": lambda n: lambda x: x * n,
    "wrapper": wrapped,
    "wrapper around an opero function": around_a_decorated_one,
    "captured class": with_local_class,
    "captured opero function": lambda n: calling(opero.opero(lambda x: x * n)),
    "captured map": lambda n: calling(opero.opmap(rate_limit=opero.RateLimiter("9/s"))(lambda x: x * n)),
    "method of a builtin": lambda n: re.compile(f"[{n}]").findall,
    "method": lambda n: Multiplier(n).times,
    "callable object": Multiplier,
    "partial": lambda n: functools.partial(Multiplier.times, Multiplier(n)),
    "globals of its own": executed,
}


@pytest.mark.parametrize("name", MAKERS)
def test_functions_that_carry_other_values_are_others(name):
    first, second = (lasting_identity(MAKERS[name](n)) for n in (1, 2))

    assert first != second


@pytest.mark.parametrize("name", MAKERS)
def test_functions_that_carry_equal_values_are_the_same(name):
    first, second = (lasting_identity(MAKERS[name](1)) for _ in range(2))

    assert first == second


def test_a_value_that_cannot_be_told_apart_is_refused_with_the_way_out():
    generator = (x for x in "ab")

    with pytest.raises(TypeError, match="cache_namespace="):
        lasting_identity(lambda: generator)


@pytest.mark.parametrize("way", [["-c"], ["-"]], ids=["text", "pipe"])
def test_functions_of_programs_without_a_file_are_told_by_their_code(way):
    program = "from opero.core.digests import lasting_identity\ndef f(x): return x + {}\nprint(lasting_identity(f))"

    def identity(n):
        text = program.format(n)
        given = [*way, text] if way == ["-c"] else way
        return subprocess.check_output([sys.executable, *given], input=text, text=True)

    assert identity(1) == identity(1) != identity(2)
