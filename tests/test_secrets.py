"""Values that may be secrets are in no message, no representation and no line of the log."""

from __future__ import annotations

import contextlib
import functools

import pytest
from loguru import logger

from opero import candidates_from, configure_logging, control, on_event, opero, opmap
from opero.core import RateLimiter
from opero.decorators.opmap import OPMAP_DEFAULTS

SECRET = "hunter2-SECRET"


def fetch(url, key="k"):
    return url


def nothing(url, key="k"):
    pass


def takes_secret(value, token):
    raise ValueError(token)


async def takes_secret_async(value, token):
    raise ValueError(token)


class Holder:
    """Shows a secret wherever it is shown itself."""

    def __init__(self, secret=SECRET):
        self.secret = secret

    def __repr__(self):
        return f"Holder({self.secret!r})"

    def method(self, value=None):
        raise ValueError(self.secret)

    decorated = opero(retries=0)(method)
    mapped = opmap(mode="thread", progress=False, retries=0)(method)


HOLDERS = {
    "text": SECRET,
    "bytes": SECRET.encode(),
    "list": [SECRET],
    "tuple": (SECRET,),
    "mapping": {"name": SECRET},
    "key": {(SECRET,): 1},
    "pairs": [("redis_password", SECRET)],
    "url": f"redis://user:{SECRET}@host/0",
    "object": Holder(),
    "method": Holder().method,
    "partial": functools.partial(takes_secret, token=SECRET),
    "async partial": functools.partial(takes_secret_async, token=SECRET),
    "tuple of partials": (functools.partial(takes_secret, token=SECRET),),
}
# With options beside which each of the others has an effect.
AROUND = ({}, {"cache": True}, {"retries": 0}, {"rate_limit": 5}, {"arg_fallback": "key"})
NAMES_INSIDE = {
    "cache_options": ("maxsize", "policy", "cache_dir", "folder_name", "serializer", "compress", "redis_password"),
    "retry_options": ("stop", "wait", "retry", "before", "sleep", "enabled"),
    "rate_limit_options": ("max_burst", "when_full", "scope", "name", "url", "folder"),
    "breaker": ("failures", "window", "recovery"),
    "pool_options": ("start_method", "initializer", "initargs", "max_tasks_per_worker", "concurrency"),
}


def planted(value):
    """Everything a value can be given as: each option, and each option inside of each mapping."""
    for name in OPMAP_DEFAULTS:
        yield {name: value}
        yield from ({name: {inner: value}} for inner in NAMES_INSIDE.get(name, ()))


def said(decorate, given, function):
    """What decorating says: its error with all its notes, or how what came of it shows itself."""
    try:
        made = decorate(**given)(function)
    except Exception as error:  # noqa: BLE001 - whatever it is
        return f"{error} {error!r} {getattr(error, '__notes__', '')}"
    return f"{made!r} {made} {made.__opero__.plan!r} {made.stats!r} {control(made)!r} {control(made).cache_info()!r}"


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("decorate", [opero, opmap])
def test_no_message_and_no_repr_shows_the_value_of_an_option(decorate, holder):
    defaults = {"mode": "thread"} if decorate is opmap else {}
    for options in planted(HOLDERS[holder]):
        for around in AROUND:
            for function in (fetch, functools.partial(fetch, key=SECRET)):
                text = said(decorate, {**defaults, **around, **options}, function)
                assert SECRET not in text, options


class Unhashable(Holder):
    __hash__ = None

    def __eq__(self, other):
        return False


class Unpicklable(Holder):
    def __reduce__(self):
        raise ValueError(self.secret)


class Nothing(Holder, list):
    """Candidates of which there are none."""


class Endless(Holder):
    """What a plain map cannot take."""

    async def __aiter__(self):
        yield self.secret


ASKS = {
    "what is decorated": opero,
    "what is mapped": opmap,
    "a listener": lambda value: on_event(value).close(),
    "a rate": RateLimiter,
    "a server": lambda value: RateLimiter(5, url=value, scope="redis", name="name"),
    "a limit's name": lambda value: RateLimiter(5, name=value, scope="machine"),
    "items": lambda value: opmap(mode="thread", progress=False)(nothing)(Endless(value)),
    "a key": lambda value: opero(cache=True)(nothing)(Unpicklable(value)),
    "a key on disk": lambda value: opero(cache=True, cache_backend="disk")(nothing)(Unpicklable(value)),
    "a value with a limit": lambda value: opero(rate_limit=5, per="url")(nothing)(Unhashable(value)),
    "candidates": lambda value: opero(arg_fallback="url", retries=0)(nothing)(Nothing(value)),
    "candidates that a function gives": lambda value: opero(arg_fallback="url")(nothing)(
        candidates_from(lambda: value)
    ),
    "a function of candidates": candidates_from,
    "an instance with a map": lambda value: Holder(value).mapped,
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("ask", ASKS)
def test_no_message_and_no_repr_shows_an_argument(ask, holder):
    try:
        text = repr(ASKS[ask](HOLDERS[holder]))
    except Exception as error:  # noqa: BLE001 - whatever it is
        text = f"{error} {error!r} {getattr(error, '__notes__', '')}"
    assert SECRET not in text


def test_no_log_line_shows_a_value(world):
    lines = []
    sink = logger.add(lines.append, level=0, filter="opero")
    configure_logging("DEBUG")
    hooked = functools.partial(takes_secret, token=SECRET)
    try:
        for options in (
            {"on_event": hooked},
            {"retry_on": hooked},
            {"retry_options": {"wait": hooked}},
            {"retry_options": {"before": hooked, "before_sleep": hooked}},
            {"arg_fallback": "value", "breaker": 1, "fallback_cooldown": 5},
            {"breaker": 1},
        ):
            function = opero(**{"retries": 1, "min_delay": 0, **options})(world.define(Holder().method))
            for _ in range(2):
                with contextlib.suppress(Exception):
                    world.run(function, SECRET)
    finally:
        logger.disable("opero")
        logger.remove(sink)
    assert len(lines) > 10
    assert SECRET not in str(lines)
