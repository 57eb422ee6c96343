"""What the options of every decorator refuse when decorating, and what the refusals say."""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import inspect
import math
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from opero import Breaker, Cache, opero, opmap
from opero.concurrency import get_parallel_executor, get_parallel_map_decorator
from opero.core import (
    RateLimiter,
    get_cache_decorator,
    get_fallback_decorator,
    get_rate_limit_decorator,
    get_retry_decorator,
)
from opero.core.control import OPERO_DEFAULTS
from opero.core.signature import MISSING
from opero.decorators.opero import CommonOptions
from opero.decorators.opmap import OPMAP_DEFAULTS, OpmapOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# The tables of the design's section 3.
DESIGNED_FOR_OPERO = {
    "cache": False,
    "cache_ttl": None,
    "cache_backend": "memory",
    "cache_key": None,
    "cache_namespace": None,  # stands for the function's identity
    "cache_options": None,
    "retries": 3,
    "backoff_factor": 2.0,
    "min_delay": 0.1,
    "max_delay": 30.0,
    "jitter": True,
    "retry_on": Exception,
    "retry_if_result": None,
    "retry_options": None,
    "arg_fallback": None,
    "fallback_cooldown": None,
    "rate_limit": None,
    "rate_limit_cost": None,
    "rate_limit_options": None,
    "max_concurrent": None,
    "per": None,
    "attempt_timeout": None,
    "total_timeout": None,
    "breaker": None,
    "on_event": None,
    "default": MISSING,
}
DESIGNED_FOR_OPMAP = {
    "mode": "process",
    "workers": None,  # stands for the mode's own number
    "ordered": True,
    "progress": True,
    "return_exceptions": True,
    "total": None,
    "batch_size": None,
    "pool_options": None,
    **DESIGNED_FOR_OPERO,
}

NAN, INF, BEYOND_FLOAT = math.nan, math.inf, 10**400


def fetch(url, key="k", *more, region="eu", **rest):
    pytest.fail("a refused or merely decorated function was called")


async def fetch_async(url, key="k", *more, region="eu", **rest):
    pytest.fail("a refused or merely decorated function was called")


async def hook(*args, **kwargs):
    return True


class AsyncHook:
    async def __call__(self, *args, **kwargs):
        return True

    def __repr__(self):
        return "AsyncHook()"


def shown(value):
    """The value's text without what differs from run to run, short enough for the name of a test."""
    return re.sub(r"0{50,}", "0...", re.sub(r" at 0x\w+", "", repr(value)))[:70]


@dataclass(frozen=True)
class Refusal:
    """Options, the first of them wrong, and what the error has to be and to show."""

    options: Mapping[str, Any]
    error: type[Exception] | tuple[type[Exception], ...]
    shows: tuple[str, ...]
    function: Callable[..., Any] = fetch

    @property
    def option(self) -> str:
        return next(iter(self.options))

    def __str__(self) -> str:
        text = ", ".join(f"{name}={shown(value)}" for name, value in self.options.items())
        return f"{text[:70]} on {getattr(self.function, '__name__', self.function)}"


def came(value, error):
    """What an error shows of what came in: a number, or a name; of anything else, which may be a secret, its type."""
    while isinstance(value, functools.partial) and not hasattr(value, "__qualname__"):
        value = value.func
    is_rate = isinstance(value, str) and re.fullmatch("[0-9]+/[a-z]+", value)
    if value == "" or value is None or is_rate or isinstance(value, (bool, int, float)):
        return repr(value)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return type(value).__name__ if error is TypeError else "…"


def wrong(error, instead, /, *, on=fetch, came_in=None, **options):
    """The first option is refused; the error shows its name, what came in, and what to write instead."""
    name, value = next(iter(options.items()))
    return Refusal(options, error, (name, came(value, error) if came_in is None else came_in, instead), on)


def wrong_inside(error, instead, /, *, on=fetch, **options):
    """The one value in the first option's mapping is refused."""
    name, mapping = next(iter(options.items()))
    ((key, value),) = mapping.items()
    return Refusal(options, error, (name, key, came(value, error), instead), on)


def unknown_inside(nearest, /, *, on=fetch, error=TypeError, **options):
    """The one key in the first option's mapping is not known, or is known but belongs elsewhere."""
    name, mapping = next(iter(options.items()))
    (key,) = mapping
    return Refusal(options, error, (name, repr(key), nearest), on)


def unknown(name, nearest):
    return Refusal({name: 1}, TypeError, (repr(name), repr(nearest)))


def no_mapping(**options):
    name = next(iter(options))
    for value in ("text", 5, [("a", 1)], True):
        yield wrong(TypeError, "mapping", **{**options, name: value})
    yield Refusal({**options, name: {1: 2}}, TypeError, (name, "1", "text"))


def no_seconds(name, /, *, zero, on=fetch, **others):
    for value in ("5", b"5", True, False, [5], dt.time(0, 5), 5j):
        yield wrong(TypeError, "seconds or a timedelta", on=on, **{name: value}, **others)
    for value in (dt.timedelta(seconds=-1), *(() if zero else (dt.timedelta(),))):
        shows = (name, str(value.total_seconds()), "seconds or a timedelta")
        yield Refusal({name: value, **others}, ValueError, shows, on)
    for value in (-1, -0.5, NAN, INF, -INF, BEYOND_FLOAT, *(() if zero else (0, 0.0))):
        yield wrong(ValueError, "seconds", on=on, **{name: value}, **others)


def no_flag(name, /):
    for value in (0, 1, "yes", None, 0.5):
        yield wrong(TypeError, "True or False", **{name: value})


def no_count(name, /, *, smallest, on=fetch, **others):
    """Refusals of a count; `None` stands for the mode's own number of workers."""
    for value in (True, False, 1.0, NAN, INF, "4", [4]):
        yield wrong(TypeError, "whole number", on=on, **{name: value}, **others)
    for value in (-1, *range(smallest)):
        yield wrong(ValueError, f"{smallest} or more", on=on, **{name: value}, **others)


def no_count_inside(option, key, /, *, smallest, on=fetch, **others):
    for value in (True, 1.5, NAN, INF, "4"):
        yield wrong_inside(TypeError, "whole number", on=on, **{option: {key: value}}, **others)
    for value in (-1, *range(smallest)):
        yield wrong_inside(ValueError, f"{smallest} or more", on=on, **{option: {key: value}}, **others)


def no_hook(name, /, **others):
    yield wrong(TypeError, "function", **{name: 5}, **others)
    for value in (hook, functools.partial(hook, 1), AsyncHook(), opero(AsyncHook())):
        yield wrong(TypeError, "plain", **{name: value}, **others)


def no_hook_inside(option, key, /, **others):
    for value in (3, "text", hook, functools.partial(hook, 1), AsyncHook()):
        yield wrong_inside(TypeError, "write", **{option: {key: value}}, **others)


CACHE = {"cache": True}
DISK = {"cache": True, "cache_backend": "disk"}
REDIS = {"cache": True, "cache_backend": "redis"}
LIMIT = {"rate_limit": 5}
KNOWN_BACKENDS = ("'memory'", "'disk'", "'redis'")

REFUSALS = [
    # Names
    unknown("retires", "retries"),
    unknown("cache_tll", "cache_ttl"),
    unknown("ratelimit", "rate_limit"),
    unknown("argfallback", "arg_fallback"),
    unknown("attempt_time_out", "attempt_timeout"),
    unknown("Cache", "cache"),
    Refusal({"xyzzy": 1}, TypeError, ("'xyzzy'", *map(repr, DESIGNED_FOR_OPERO))),
    # Cache
    *no_flag("cache"),
    *no_seconds("cache_ttl", zero=False, **CACHE),
    Refusal(
        {"cache_backend": "memroy", **CACHE}, ValueError, ("cache_backend", "did you mean 'memory'?", *KNOWN_BACKENDS)
    ),
    Refusal({"cache_backend": "", **CACHE}, ValueError, ("cache_backend", "''", *KNOWN_BACKENDS)),
    *(wrong(TypeError, "'memory'", cache_backend=value, **CACHE) for value in (None, 5, b"memory", ["memory"])),
    *no_hook("cache_key", **CACHE),
    wrong(TypeError, "function", cache_key="url", **CACHE),
    wrong(ValueError, "name", cache_namespace="", **CACHE),
    *(wrong(TypeError, "text", cache_namespace=value, **CACHE) for value in (5, b"prices", True)),
    *no_mapping(cache_options={}, **CACHE),
    unknown_inside("'maxsize'", cache_options={"maxsiz": 5}, **CACHE),
    unknown_inside("'policy'", cache_options={"polici": "lru"}, **CACHE),
    *no_count_inside("cache_options", "maxsize", smallest=1, **CACHE),
    *(wrong_inside(ValueError, "'lru'", cache_options={"policy": value}, **CACHE) for value in ("bogus", "")),
    *(wrong_inside(TypeError, "'lru'", cache_options={"policy": value}, **CACHE) for value in (5, None)),
    *(
        wrong(ValueError, "cache=True", **{name: value})
        for name, value in {
            "cache_ttl": 60,
            "cache_backend": "disk",
            "cache_key": len,
            "cache_namespace": "prices",
            "cache_options": {"maxsize": 5},
        }.items()
    ),
    wrong(ValueError, "cache=True", cache_options={}),
    *no_count_inside("cache_options", "maxsize", smallest=1, **DISK),
    *no_count_inside("cache_options", "size_limit", smallest=1, **DISK),
    *(wrong_inside(ValueError, "'fifo'", cache_options={"policy": value}, **DISK) for value in ("bogus", "")),
    *(wrong_inside(ValueError, "'json'", cache_options={"serializer": value}, **DISK) for value in ("yaml", "")),
    *(wrong_inside(TypeError, "'json'", cache_options={"serializer": value}, **DISK) for value in (5, repr)),
    *(wrong_inside(TypeError, "True or False", cache_options={"compress": value}, **DISK) for value in (1, None)),
    *(
        wrong_inside(ValueError, "cache_dir", cache_options={"folder_name": value}, **DISK)
        for value in ("../elsewhere", "..", ".", "/tmp", "a/b")
    ),
    *(wrong_inside(TypeError, "path", cache_options={"cache_dir": value}, **DISK) for value in (5, None, b"cache")),
    unknown_inside("'cache_dir'", cache_options={"cachedir": "x"}, **DISK),
    unknown_inside("'redis_host'", cache_options={"redis_hots": "x"}, **REDIS),
    *(
        Refusal({"cache_options": {name: value}, **backend}, TypeError, (name,))
        for backend, name, value in (
            (CACHE, "cache_dir", "x"),
            (CACHE, "redis_host", "x"),
            (DISK, "redis_host", "x"),
            (REDIS, "maxsize", 5),
            (REDIS, "policy", "lru"),
            (REDIS, "size_limit", 5),
        )
    ),
    *(wrong_inside(ValueError, "65535", cache_options={"redis_port": value}, **REDIS) for value in (65_536, 999_999)),
    *no_count_inside("cache_options", "redis_db", smallest=0, **REDIS),
    *(wrong_inside(TypeError, "text", cache_options={"redis_host": value}, **REDIS) for value in (5, None)),
    Refusal({"cache_options": {"redis_password": 5}, **REDIS}, TypeError, ("redis_password", "text")),
    # Retry
    *no_count("retries", smallest=0),
    wrong(TypeError, "whole number", retries=None),
    *(
        wrong(ValueError, "retries=1", **{name: value}, retries=0)
        for name, value in {
            "backoff_factor": 3.0,
            "min_delay": 1,
            "max_delay": 9,
            "jitter": False,
            "retry_on": OSError,
        }.items()
    ),
    *(wrong(TypeError, "number", backoff_factor=value) for value in (True, "2", None, [2])),
    *(wrong(ValueError, "number", backoff_factor=value) for value in (0, -1, NAN, INF, -INF, BEYOND_FLOAT)),
    *no_seconds("min_delay", zero=True),
    *no_seconds("max_delay", zero=True),
    wrong(TypeError, "seconds", min_delay=None),
    wrong(TypeError, "seconds", max_delay=None),
    Refusal({"max_delay": 1, "min_delay": 5}, ValueError, ("max_delay=1", "min_delay=5", "write")),
    Refusal({"max_delay": 0.05}, ValueError, ("max_delay=0.05", "min_delay=0.1", "write")),
    Refusal({"min_delay": 60}, ValueError, ("min_delay=60", "max_delay=30.0", "write")),
    *no_flag("jitter"),
    *no_hook("retry_on"),
    *(wrong(TypeError, "Exception", retry_on=value) for value in (None, "ValueError", [ValueError], int, ValueError())),
    *(wrong(TypeError, "Exception", retry_on=value) for value in ((int,), ("ValueError",), (ValueError, 5))),
    *(
        wrong(ValueError, "Exception", retry_on=value, came_in=value.__name__)
        for value in (BaseException, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)
    ),
    wrong(ValueError, "Exception", retry_on=(ValueError, SystemExit), came_in="SystemExit"),
    wrong(ValueError, "Exception", retry_on=BaseExceptionGroup, came_in="BaseExceptionGroup"),
    *no_hook("retry_if_result"),
    Refusal(
        {"retry_if_result": bool, "retry_options": {"retry": callable}},
        ValueError,
        ("retry_if_result", "retry_options['retry']", "retry_any"),
    ),
    *no_mapping(retry_options={}),
    unknown_inside("'stop'", retry_options={"stopp": 1}),
    unknown_inside("'before_sleep'", retry_options={"before_slep": print}),
    Refusal({"retry_options": {"sleep": print}}, ValueError, ("retry_options", "sleep", "'wait'")),
    *(
        refusal
        for key in ("stop", "wait", "retry", "before", "after", "before_sleep", "retry_error_callback")
        for refusal in no_hook_inside("retry_options", key)
    ),
    wrong_inside(TypeError, "retry_on", retry_options={"retry": ValueError}),
    # Fallback
    *(wrong(TypeError, "text", arg_fallback=value) for value in (5, True, ["key"], b"key")),
    wrong(ValueError, "name", arg_fallback=""),
    *(
        Refusal({"arg_fallback": name}, ValueError, ("arg_fallback", "fetch", "'url'", "'key'", "'region'"))
        for name in ("kye", "more", "rest", "*more", "k")
    ),
    wrong(ValueError, "parameter", arg_fallback="key", on=min),
    *no_seconds("fallback_cooldown", zero=False, arg_fallback="key"),
    wrong(ValueError, "arg_fallback=", fallback_cooldown=5),
    # Rate limit
    *(wrong(TypeError, "calls per second", rate_limit=value) for value in (True, False, b"5/s", {5}, 5j)),
    *(wrong(ValueError, "calls per second", rate_limit=v) for v in (0, 0.0, -1, NAN, INF, -INF, BEYOND_FLOAT)),
    *(
        wrong(ValueError, "100/minute", rate_limit=value)
        for value in (
            "",
            "fast",
            "5",
            "5/",
            "/s",
            "-5/s",
            "5/fortnight",
            "5/s/s",
            "nan/s",
            "inf/s",
            "1e5/s",
            "\u0665/s",
        )
    ),
    wrong(ValueError, "calls per second", rate_limit="0/s"),
    wrong(ValueError, "calls per second", rate_limit="9" * 400 + "/s"),
    wrong(ValueError, "'key'", per="ky", **LIMIT),
    wrong(TypeError, "a parameter's name", per=5, **LIMIT),
    wrong(ValueError, "rate_limit=5", per="key"),
    *no_count("max_concurrent", smallest=1),
    *(wrong(TypeError, "a number, a function", rate_limit_cost=value, **LIMIT) for value in ("5", [5])),
    wrong(ValueError, "rate_limit=5", rate_limit_cost=5),
    wrong(ValueError, "'5/60 seconds'", rate_limit=(5, 60)),
    *no_mapping(rate_limit_options={}, **LIMIT),
    unknown_inside("'max_burst'", rate_limit_options={"max_bursts": 1}, **LIMIT),
    unknown_inside("'max_burst'", rate_limit_options={"rate": 1}, error=(TypeError, ValueError), **LIMIT),
    *(
        Refusal({"rate_limit_options": {"max_burst": value}, **LIMIT}, error, ("max_burst", came(value, error), shows))
        for value, error, shows in [
            (True, TypeError, "whole number"),
            (1.5, TypeError, "whole"),
            (0, ValueError, "1 or"),
        ]
    ),
    wrong(ValueError, "rate_limit=", rate_limit_options={"max_burst": 5}),
    # Breaker and events
    wrong(ValueError, "failures in a row", breaker=0),
    *(wrong(TypeError, "failures in a row", breaker=value) for value in (True, 2.5, "5", [5])),
    wrong(TypeError, "opero.Breaker", breaker={"failures": 1}),
    *(wrong(TypeError, "function of one event", on_event=value) for value in (5, "print", [print])),
    wrong(ValueError, "rate_limit=", rate_limit_options={}),
    # Time limits
    *no_seconds("attempt_timeout", zero=False, on=fetch_async),
    *no_seconds("total_timeout", zero=False),
    *no_seconds("total_timeout", zero=False, on=fetch_async),
    Refusal({"attempt_timeout": 5}, ValueError, ("attempt_timeout=5", "fetch", "async def", "mode='process'")),
]

ONLY_OPERO_REFUSES = [
    Refusal({name: DESIGNED_FOR_OPMAP[name]}, TypeError, ("@opero", repr(name)))
    for name in DESIGNED_FOR_OPMAP.keys() - DESIGNED_FOR_OPERO.keys()
]

PROCESS, ASYNC, ASYNC_PROCESS = {"mode": "process"}, {"mode": "async"}, {"mode": "async_process"}
KNOWN_MODES = ("'process'", "'thread'", "'async'", "'async_process'", "'serial'", "'dask'", "'ray'")

ONLY_OPMAP_REFUSES = [
    *(
        Refusal({"default": None, "return_exceptions": value}, ValueError, ("default", f"return_exceptions={value}"))
        for value in (True, False)
    ),
    # Names
    unknown("worker", "workers"),
    unknown("return_exception", "return_exceptions"),
    unknown("pool_option", "pool_options"),
    Refusal({"zyxwv": 1}, TypeError, ("@opmap", "'zyxwv'", *map(repr, DESIGNED_FOR_OPMAP))),
    # Where it runs
    Refusal({"mode": "proces"}, ValueError, ("mode", "did you mean 'process'?", *KNOWN_MODES)),
    Refusal({"mode": ""}, ValueError, ("mode", "''", *KNOWN_MODES)),
    *(Refusal({"mode": v}, TypeError, ("mode", came(v, TypeError), *KNOWN_MODES)) for v in (None, 5, True, ["thread"])),
    *(wrong(TypeError, "mode='thread'", came_in=repr(mode["mode"]), **mode) for mode in (ASYNC, ASYNC_PROCESS)),
    *no_count("workers", smallest=1),
    *(r for r in no_count("workers", smallest=1, on=fetch_async, **ASYNC)),
    *no_flag("ordered"),
    *(wrong(TypeError, "True, False, a label", progress=value) for value in (0, 1, None, 0.5, b"label", ["label"])),
    *no_flag("return_exceptions"),
    *no_count("total", smallest=0),
    *no_count("batch_size", smallest=1),
    # The pool
    *no_mapping(pool_options={}, **PROCESS),
    unknown_inside("'start_method'", pool_options={"start_methodd": "fork"}, **PROCESS),
    unknown_inside("'initializer'", pool_options={"initialiser": print}, **PROCESS),
    *(
        unknown_inside(f"mode={mode!r}", pool_options=options, mode=mode, on=on, error=(TypeError, ValueError))
        for mode, on, options in (
            ("thread", fetch, {"start_method": "fork"}),
            ("thread", fetch, {"concurrency": 5}),
            ("async", fetch_async, {"start_method": "fork"}),
            ("async", fetch_async, {"concurrency": 5}),
            ("process", fetch, {"concurrency": 5}),
            ("process", fetch, {"client": None}),
            ("process", fetch, {"address": "tcp://host:8786"}),
            ("async_process", fetch_async, {"client": None}),
        )
    ),
    *(wrong_inside(ValueError, "'spawn'", pool_options={"start_method": v}, **PROCESS) for v in ("bogus", "")),
    *(wrong_inside(TypeError, "'spawn'", pool_options={"start_method": v}, **PROCESS) for v in (5, None)),
    *no_hook_inside("pool_options", "initializer", **PROCESS),
    *(
        Refusal(
            {"pool_options": {"initializer": len, "initargs": value}, **PROCESS},
            TypeError,
            ("pool_options", "initargs", came(value, TypeError), "tuple"),
        )
        for value in ([1], "text", 5, None)
    ),
    Refusal({"pool_options": {"initargs": (1,)}, **PROCESS}, ValueError, ("pool_options", "initargs", "initializer")),
    *no_count_inside("pool_options", "concurrency", smallest=1, on=fetch_async, **ASYNC_PROCESS),
    # Time limits: in a process of its own an execution can be stopped, and only there
    *no_seconds("attempt_timeout", zero=False, **PROCESS),
    *no_seconds("attempt_timeout", zero=False, on=fetch_async, **ASYNC),
]


@pytest.mark.parametrize("decorate", [opero, opmap])
def test_the_option_that_is_called_per_now_says_so(decorate):
    with pytest.raises(TypeError, match="write per="):
        decorate(rate_limit=5, rate_limit_per="key")


def refusal(row: Refusal, decorate: Callable[[], Any]) -> str:
    with pytest.raises(row.error) as caught:
        decorate()
    return str(caught.value)


@pytest.mark.parametrize("row", REFUSALS + ONLY_OPERO_REFUSES, ids=str)
def test_opero_refuses_when_decorating_and_says_what_came_in_and_what_to_write(row):
    message = refusal(row, lambda: opero(**row.options)(row.function))

    assert [text for text in row.shows if text not in message] == []


@pytest.mark.parametrize("row", REFUSALS + ONLY_OPMAP_REFUSES, ids=str)
def test_opmap_refuses_when_decorating_and_says_what_came_in_and_what_to_write(row):
    options = {"mode": "thread", **row.options}

    message = refusal(row, lambda: opmap(**options)(row.function))

    assert [text for text in row.shows if text not in message] == []


# Anything can be a default.
@pytest.mark.parametrize("name", DESIGNED_FOR_OPERO.keys() - {"default"})
def test_the_table_of_refusals_has_every_option_of_opero(name):
    assert name in {row.option for row in REFUSALS}


@pytest.mark.parametrize("name", DESIGNED_FOR_OPMAP)
def test_the_table_of_refusals_has_every_option_of_opmap(name):
    assert name in {row.option for row in REFUSALS + ONLY_OPMAP_REFUSES}


# Defaults


def with_types(defaults):
    """Equal only to the same values of the same types: True is not 1, and 2.0 is not 2."""
    return {name: (type(value), value) for name, value in defaults.items()}


def keywords_of(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_the_defaults_of_opero_are_those_of_the_design():
    assert with_types(OPERO_DEFAULTS) == with_types(DESIGNED_FOR_OPERO)


def test_the_defaults_of_opmap_are_those_of_the_design():
    assert with_types(OPMAP_DEFAULTS) == with_types(DESIGNED_FOR_OPMAP)


@pytest.mark.parametrize(("decorator", "defaults"), [(opero, OPERO_DEFAULTS), (opmap, OPMAP_DEFAULTS)])
def test_the_signature_shows_every_option_with_its_default(decorator, defaults):
    assert keywords_of(decorator) == defaults


@pytest.mark.parametrize("decorator", [opero, opmap])
def test_the_signature_shows_no_positional_parameter_but_the_function(decorator):
    parameters = inspect.signature(decorator).parameters.values()

    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == ["function"]


def test_the_typed_options_of_opero_are_the_options():
    assert {*CommonOptions.__optional_keys__, "default"} == OPERO_DEFAULTS.keys()
    assert not CommonOptions.__required_keys__


def test_the_typed_options_of_opmap_are_the_options():
    # These decide about the type of the result and stand in the overloads.
    expected = OPMAP_DEFAULTS.keys() - {"return_exceptions", "default", "batch_size"}

    assert (OpmapOptions.__optional_keys__, OpmapOptions.__required_keys__) == (expected, set())


@pytest.mark.parametrize("name", DESIGNED_FOR_OPERO)
def test_every_option_is_told_of_in_the_docstring_of_opero(name):
    assert f"``{name}``" in inspect.getdoc(opero)


@pytest.mark.parametrize("name", sorted(DESIGNED_FOR_OPMAP.keys() - DESIGNED_FOR_OPERO.keys()))
def test_every_option_of_a_map_is_told_of_in_the_docstring_of_opmap(name):
    assert f"``{name}``" in inspect.getdoc(opmap)


def test_all_defaults_of_opero_can_be_given():
    assert opero(**DESIGNED_FOR_OPERO)(fetch).__wrapped__ is fetch


def test_all_defaults_of_opmap_can_be_given():
    assert opmap(**DESIGNED_FOR_OPMAP)(fetch).__wrapped__ is fetch


# What is right


@pytest.mark.parametrize(
    "options",
    [
        {"cache": True, "cache_ttl": 0.001},
        {"cache": True, "cache_ttl": 10**9},
        {"cache": True, "cache_backend": "memory"},
        {"cache": True, "cache_key": str},
        {"cache": True, "cache_options": {}},
        {"cache": True, "cache_options": {"maxsize": 1, "policy": "lfu"}},
        {"cache": True, "cache_options": MappingProxyType({"maxsize": 1})},
        {"retries": 0},
        {"retries": 10**9},
        {"backoff_factor": 1},
        {"min_delay": 0, "max_delay": 0},
        {"min_delay": 5, "max_delay": 5},
        {"retry_on": (ValueError, OSError)},
        {"retry_on": ExceptionGroup},
        {"retry_on": lambda error: 5},
        {"retry_on": OSError, "retries": 0, "arg_fallback": "key"},
        {"retry_on": OSError, "retries": 0, "breaker": 5},
        {"retry_if_result": bool},
        {"retry_if_result": bool, "retries": 0},
        {"retry_options": {}},
        {"retry_options": {"reraise": False, "name": "fetching"}},
        {"arg_fallback": "url"},
        {"arg_fallback": "key"},
        {"arg_fallback": "region", "fallback_cooldown": 0.5},
        {"rate_limit": 0.001},
        {"rate_limit": 10**6},
        {"rate_limit": "100/minute"},
        {"rate_limit": "0.5 / h"},
        {"rate_limit": "1000/day"},
        {"rate_limit": [5, "100/minute"]},
        {"rate_limit": ("1000/day",)},
        {"rate_limit": 5, "per": "key"},
        {"rate_limit": 5, "rate_limit_options": {"max_burst": 1}},
        {"rate_limit": 5, "rate_limit_options": {"max_burst": None, "scope": "process", "when_full": "wait"}},
        {"rate_limit": 5, "rate_limit_options": {"scope": "machine", "name": "fetching", "folder": "/nowhere"}},
        {"rate_limit": 5, "rate_limit_options": {"scope": "redis", "url": "redis://:secret@localhost:6379/0"}},
        {
            "rate_limit": 5,
            "per": "key",
            "arg_fallback": "key",
            "rate_limit_options": {"when_full": "next"},
        },
        {"total_timeout": 0.001},
        {"cache": True, "cache_ttl": dt.timedelta(days=1)},
        {"min_delay": dt.timedelta(0), "max_delay": dt.timedelta(milliseconds=1)},
        {"arg_fallback": "region", "fallback_cooldown": dt.timedelta(minutes=1)},
        {"total_timeout": dt.timedelta(minutes=1)},
        {"breaker": Breaker(window=dt.timedelta(minutes=1), recovery=dt.timedelta(seconds=1))},
        {"default": None},
        {"default": fetch, "retries": 0},
    ],
    ids=shown,
)
@pytest.mark.parametrize("decorator", [opero, opmap])
def test_an_option_at_the_edge_of_its_range_is_taken(decorator, options):
    assert decorator(**options)(fetch).__wrapped__ is fetch


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (fetch, {"mode": "process"}),
        (fetch, {"mode": "thread"}),
        (fetch_async, {"mode": "process"}),
        (fetch_async, {"mode": "thread"}),
        (fetch_async, {"mode": "async"}),
        (fetch_async, {"mode": "async_process"}),
        (fetch, {"workers": 1}),
        (fetch, {"progress": "fetching"}),
        (fetch, {"progress": ""}),
        (fetch, {"pool_options": {}}),
        (fetch, {"pool_options": {"start_method": "spawn"}}),
        (fetch, {"pool_options": {"initializer": print, "initargs": (1,)}}),
        (fetch_async, {"mode": "async_process", "pool_options": {"concurrency": 1}}),
        (fetch, {"attempt_timeout": 0.5}),
        (fetch, {"attempt_timeout": dt.timedelta(seconds=0.5)}),
        (fetch_async, {"mode": "thread", "attempt_timeout": 0.5}),
        (fetch_async, {"mode": "async", "attempt_timeout": 0.5}),
    ],
    ids=shown,
)
def test_opmap_takes_what_fits_its_mode(function, options):
    assert opmap(**options)(function).__wrapped__ is function


def test_attempt_timeout_is_taken_for_an_async_function():
    assert opero(attempt_timeout=0.5)(fetch_async).__wrapped__ is fetch_async


def test_options_changed_after_decorating_change_nothing():
    options = {"maxsize": 7}
    decorated = opero(cache=True, cache_options=options)(fetch)
    options["maxsize"] = 1

    assert decorated.cache_info().maxsize == 7


# What is decorated


def generator(item):
    yield item


async def async_generator(item):
    yield item


class Generating:
    def __call__(self, item):
        yield item

    def method(self, item):
        yield item


class Some:
    def __init__(self, item):
        pass


@pytest.mark.parametrize("decorator", [opero, opmap])
@pytest.mark.parametrize("called", [False, True], ids=["bare", "called"])
@pytest.mark.parametrize(
    ("thing", "shows"),
    [
        (classmethod(fetch), ("classmethod", "below @classmethod")),
        (staticmethod(fetch), ("staticmethod", "below @staticmethod")),
        (Some, ("Some", "functions")),
        (5, ("int", "functions")),
        ("fetch", ("str", "functions")),
        (property(fetch), ("property", "functions")),
    ],
    ids=shown,
)
def test_what_cannot_be_decorated_is_refused(decorator, called, thing, shows):
    decorate = decorator() if called else decorator

    with pytest.raises(TypeError) as caught:
        decorate(thing)

    assert [text for text in (f"@{decorator.__name__}", *shows) if text not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("what", "decorate"),
    [
        ("cache", opero(cache=True)),
        ("cache", get_cache_decorator()),
        ("a map", opmap),
        ("a map", opmap(mode="thread")),
        ("a map", get_parallel_map_decorator("thread")),
    ],
    ids=["opero", "cache", "opmap", "opmap()", "map"],
)
@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (generator, "generator"),
        (async_generator, "async_generator"),
        (functools.partial(generator, 1), "generator"),
        (Generating().method, "Generating.method"),
        (Generating(), "Generating"),
    ],
    ids=shown,
)
def test_a_generator_function_is_refused_where_it_cannot_apply(what, decorate, thing, name):
    with pytest.raises(TypeError, match=f"^{what} cannot apply to the generator function {name}; return a list"):
        decorate(thing)


@pytest.mark.parametrize("decorator", [opero, opmap])
def test_a_function_and_options_at_once_are_refused_with_the_right_way_to_write_them(decorator):
    with pytest.raises(TypeError, match=rf"{decorator.__name__}\(retries=…, jitter=…\)\(function\)"):
        decorator(fetch, retries=2, jitter=False)


@pytest.mark.parametrize("decorator", [opero, opmap])
def test_a_function_and_an_unknown_option_at_once_are_refused_for_the_option(decorator):
    with pytest.raises(TypeError, match="'retires'; did you mean 'retries'"):
        decorator(fetch, retires=2)


@pytest.mark.parametrize("decorator", [opero, opmap])
def test_options_are_taken_by_keyword_only(decorator):
    with pytest.raises(TypeError, match="positional argument"):
        decorator(fetch, True)


# The single-policy decorators

MAKERS = (
    (get_cache_decorator, ()),
    (get_retry_decorator, ()),
    (get_rate_limit_decorator, (5,)),
    (get_fallback_decorator, ("key",)),
    (get_parallel_map_decorator, ("thread",)),
)


@pytest.mark.parametrize(
    ("make", "error", "shows"),
    [
        (lambda: get_cache_decorator(cache_ttl=-1), ValueError, ("cache_ttl", "-1", "seconds")),
        (lambda: get_cache_decorator(cache_ttl=True), TypeError, ("cache_ttl", "True", "seconds")),
        (lambda: get_cache_decorator(cache_backend="memroy"), ValueError, ("cache_backend", "did you mean 'memory'?")),
        (lambda: get_cache_decorator(cache_key=hook), TypeError, ("cache_key", "hook", "plain")),
        (lambda: get_cache_decorator(cache_namespace=""), ValueError, ("cache_namespace", "''", "name")),
        (lambda: get_cache_decorator(maxsiz=5), TypeError, ("'maxsiz'", "'maxsize'")),
        (lambda: get_cache_decorator(maxsize=0), ValueError, ("maxsize", "0", "1 or more")),
        (lambda: get_cache_decorator(policy="bogus"), ValueError, ("policy", "'lru'")),
        (lambda: get_retry_decorator(retries=-1), ValueError, ("retries", "-1", "0 or more")),
        (lambda: get_retry_decorator(retries=True), TypeError, ("retries", "True", "whole number")),
        (lambda: get_retry_decorator(backoff_factor=NAN), ValueError, ("backoff_factor", "nan", "number")),
        (lambda: get_retry_decorator(max_delay=0.01), ValueError, ("max_delay=0.01", "min_delay=0.1")),
        (lambda: get_retry_decorator(jitter=1), TypeError, ("jitter", "1", "True or False")),
        (lambda: get_retry_decorator(retry_on=SystemExit), ValueError, ("retry_on", "SystemExit", "Exception")),
        (lambda: get_retry_decorator(retry_on=hook), TypeError, ("retry_on", "hook", "plain")),
        (lambda: get_retry_decorator(stopp=1), TypeError, ("'stopp'", "'stop'")),
        (lambda: get_retry_decorator(stop=3), TypeError, ("stop", "3", "write")),
        (lambda: get_retry_decorator(sleep=print), ValueError, ("sleep", "'wait'")),
        (lambda: get_rate_limit_decorator(0), ValueError, ("rate_limit", "0", "calls per second")),
        (lambda: get_rate_limit_decorator(True), TypeError, ("rate_limit", "True", "calls per second")),
        (lambda: get_rate_limit_decorator("5/fortnight"), ValueError, ("rate_limit", "'5/fortnight'", "100/minute")),
        (lambda: get_rate_limit_decorator(5, max_bursts=1), TypeError, ("'max_bursts'", "'max_burst'")),
        (lambda: get_rate_limit_decorator(5, max_burst=0), ValueError, ("max_burst", "0", "1 or more")),
        (lambda: get_fallback_decorator(5), TypeError, ("arg_fallback", "5", "text")),
        (lambda: get_fallback_decorator(""), ValueError, ("arg_fallback", "''", "name")),
        (lambda: get_fallback_decorator("kye"), ValueError, ("arg_fallback", "'key'")),
        (lambda: get_fallback_decorator("more"), ValueError, ("arg_fallback", "'key'")),
        (
            lambda: get_fallback_decorator("key", fallback_cooldown=0),
            ValueError,
            ("fallback_cooldown", "0", "seconds"),
        ),
        (lambda: get_parallel_map_decorator("proces"), ValueError, ("mode", "did you mean 'process'?")),
        (lambda: get_parallel_map_decorator("async"), TypeError, ("mode", "'async'", "'thread'")),
        (lambda: get_parallel_map_decorator("thread", workers=0), ValueError, ("workers", "0", "1 or more")),
        (lambda: get_parallel_map_decorator("thread", ordered=1), TypeError, ("ordered", "1", "True or False")),
        (
            lambda: get_parallel_map_decorator("thread", progress=1),
            TypeError,
            ("progress", "1", "True, False, a label"),
        ),
        (
            lambda: get_parallel_map_decorator(start_methodd="fork"),
            TypeError,
            ("'start_methodd'", "'start_method'"),
        ),
        (
            lambda: get_parallel_map_decorator("thread", start_method="fork"),
            (TypeError, ValueError),
            ("'start_method'", "mode='thread'"),
        ),
    ],
)
def test_a_single_policy_decorator_refuses_when_decorating(make, error, shows):
    with pytest.raises(error) as caught:
        make()(fetch)

    assert [text for text in shows if text not in str(caught.value)] == []


@pytest.mark.parametrize(("maker", "given"), MAKERS)
def test_a_single_policy_decorator_names_itself_when_it_gets_a_classmethod(maker, given):
    with pytest.raises(TypeError, match=f"@{maker.__name__} .*classmethod.* below @classmethod"):
        maker(*given)(classmethod(fetch))


@pytest.mark.parametrize("make", [get_cache_decorator, get_retry_decorator])
def test_the_options_of_a_single_policy_decorator_are_taken_by_keyword_only(make):
    with pytest.raises(TypeError, match="positional argument"):
        make(3)


@pytest.mark.parametrize(
    ("options", "error", "shows"),
    [
        ({"mode": "proces"}, ValueError, ("mode", "did you mean 'process'?")),
        ({"mode": "thread", "workers": 0}, ValueError, ("workers", "0", "1 or more")),
        ({"mode": "thread", "start_method": "fork"}, (TypeError, ValueError), ("'start_method'", "mode='thread'")),
        ({"mode": "async"}, TypeError, ("mode", "'async'", "'thread'")),
    ],
    ids=shown,
)
def test_an_executor_refuses_before_it_calls_the_function(options, error, shows):
    with pytest.raises(error) as caught:
        get_parallel_executor(**options)(fetch, [1])

    assert [text for text in shows if text not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("rate", "options", "error", "shows"),
    [
        (0, {}, ValueError, ("rate", "0", "calls per second")),
        (NAN, {}, ValueError, ("rate", "nan", "calls per second")),
        (INF, {}, ValueError, ("rate", "inf", "calls per second")),
        (BEYOND_FLOAT, {}, ValueError, ("rate", "calls per second")),
        (True, {}, TypeError, ("rate", "True", "calls per second")),
        (None, {}, TypeError, ("rate", "None", "calls per second")),
        ("5/fortnight", {}, ValueError, ("rate", "'5/fortnight'", "100/minute")),
        (5, {"max_burst": 0}, ValueError, ("max_burst", "0", "1 or more")),
        (5, {"max_burst": True}, TypeError, ("max_burst", "True", "whole number")),
        (5, {"max_burst": 1.5}, TypeError, ("max_burst", "1.5", "whole number")),
    ],
    ids=shown,
)
def test_a_rate_limiter_refuses_a_wrong_rate_and_a_wrong_burst(rate, options, error, shows):
    with pytest.raises(error) as caught:
        RateLimiter(rate, **options)

    assert [text for text in shows if text not in str(caught.value)] == []


def test_a_password_is_not_in_the_message_about_its_mapping():
    with pytest.raises(ValueError, match="cache=True") as caught:
        opero(cache_options={"redis_password": "hunter2"})(fetch)

    assert "hunter2" not in str(caught.value)


# Numbers of other libraries


def test_numbers_of_other_libraries_are_taken_for_what_they_are(world):
    left = [ConnectionError(), "result"]

    def function():
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    decorated = opero(
        retries=np.int64(1),
        max_delay=np.int32(3),
        total_timeout=np.float32(4.5),
        retry_on=lambda _: np.float32(0),
        cache=Cache(ttl=lambda _: np.float32(5), maxsize=np.int64(9)),
        rate_limit=[np.int64(100), np.float32(200)],
        rate_limit_cost=lambda: np.int64(2),
        max_concurrent=np.int16(2),
        breaker=np.uint8(3),
    )(world.define(function))
    assert [world.run(decorated), world.run(decorated)] == ["result"] * 2
    assert decorated.stats.attempts == 2


def test_counts_of_a_map_may_be_numpys():
    @opmap(mode="thread", workers=np.int64(2), total=np.int64(3), batch_size=np.int64(2), progress=False)
    def doubled(items):
        return [2 * item for item in items]

    assert doubled([1, 2, 3]) == [2, 4, 6]


@pytest.mark.parametrize(
    "options",
    [
        {"retries": np.True_},
        {"retries": np.float64(1)},
        {"retries": np.timedelta64(5, "s")},
        {"min_delay": np.timedelta64(5, "ms")},
        {"rate_limit": (np.int64(900), 15)},
        {"rate_limit": np.int64(0)},
    ],
    ids=str,
)
def test_what_is_no_plain_number_of_numpys_is_refused(options):
    with pytest.raises((TypeError, ValueError), match="write"):
        opero(**options)(len)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("option", ["max_delay", "backoff_factor", "total_timeout", "rate_limit", "rate_limit_cost"])
def test_a_number_too_large_for_a_float_is_out_of_range(option, sign):
    options = {"rate_limit": 5, option: sign * 10**400}
    with pytest.raises(ValueError, match="write"):
        opero(**options)(len)
