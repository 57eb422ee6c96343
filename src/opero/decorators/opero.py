"""`@opero`: one function, made resilient."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, overload

from opero.core.checks import check_count, check_known, check_seconds, shown, wrong_type
from opero.core.control import OPERO_DEFAULTS, OPTIONS, reasons_against
from opero.core.decoration import F, decorator
from opero.core.plan import Plan
from opero.core.retry import RetryPolicy
from opero.core.signature import MISSING, is_async, name_of
from opero.events import Subscription

if TYPE_CHECKING:
    import inspect
    from collections.abc import Callable, Coroutine, Mapping

    from opero.core.breaker import Breaker
    from opero.core.cache import Cache, ResultCache
    from opero.core.checks import Duration
    from opero.core.parameters import Per
    from opero.core.rate_limit import Limits, PerOption
    from opero.core.retry import RetryOn
    from opero.core.stores.settings import Backend


P = ParamSpec("P")
R = TypeVar("R")
D = TypeVar("D")
D_co = TypeVar("D_co", covariant=True)


class CommonOptions(TypedDict, total=False):
    """Types of the options of `opero` that are `opmap`'s, too, for type checkers."""

    cache: bool | Cache
    cache_ttl: Duration | None
    cache_backend: Backend
    cache_key: Callable[..., Any] | None
    cache_namespace: str | None
    cache_options: Mapping[str, Any] | None
    retries: int
    backoff_factor: float
    min_delay: Duration
    max_delay: Duration
    jitter: bool
    retry_on: RetryOn
    retry_if_result: Callable[[Any], object] | None
    retry_options: Mapping[str, Any] | None
    arg_fallback: str | None
    fallback_cooldown: Duration | None
    rate_limit: Limits | None
    rate_limit_cost: Any
    rate_limit_options: Mapping[str, Any] | None
    attempt_timeout: Duration | None
    total_timeout: Duration | None
    max_concurrent: int | None
    per: PerOption
    breaker: int | Breaker | None
    on_event: Callable[[Any], object] | None


def keyword_signature(defaults: Mapping[str, Any]) -> inspect.Signature:
    """The signature to show for a decorator whose options come as ``**options``."""
    import inspect

    first = inspect.Parameter("function", inspect.Parameter.POSITIONAL_ONLY, default=None)
    keywords = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=v) for n, v in defaults.items()]
    return inspect.Signature([first, *keywords])


def make_plan(function: Callable[..., Any], options: Mapping[str, Any], *, killable: bool = False) -> Plan:
    """Check the options and plan one function.

    Args:
        function: What is decorated.
        options: Checked to be known names; missing ones have their defaults.
        killable: Whether an execution of a plain function can be stopped from outside, as in a process of its own.
    """
    given: dict[str, Any] = {**OPERO_DEFAULTS, **options}
    for name, reason in reasons_against(given).items():
        if given[name] != OPERO_DEFAULTS[name]:
            raise ValueError(f"{name}={shown(given[name])} {reason}")
    limits = {name: given[name] for name in ("attempt_timeout", "total_timeout") if given[name] is not None}
    limits = {name: check_seconds(name, seconds, zero=False) for name, seconds in limits.items()}
    if "attempt_timeout" in limits and not killable and not is_async(function):
        raise ValueError(
            f"attempt_timeout={limits['attempt_timeout']!r} cannot apply to {name_of(function)}: a running `def` "
            "function cannot be stopped; write `async def`, use the function's own timeout, or map it with "
            "@opmap(mode='process')"
        )
    # Given by hand, `Exception` is meant as it is written.
    rounds = {name: given[name] for name in OPTIONS["retry"]} | {"retry_on": options.get("retry_on", MISSING)}
    told = None if given["on_event"] is None else Subscription(given["on_event"])
    layers = {"on_event": told, "default": given["default"], **limits}
    return Plan(function, RetryPolicy(**rounds), **layers, **_policies(function, given))


def _policies(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Those of a plan that not every function has; each is imported here, so that `import opero` is quick."""
    policies: dict[str, Any] = {}
    per: Per | None = None
    if given["per"] is not None:
        from opero.core.parameters import Per

        per = Per(function, given["per"])
    if given["cache"] is not False:
        policies["cache"] = _cache(function, given)
    if given["arg_fallback"] is not None:
        from opero.core.fallback import FallbackOverParameter

        policies["fallback"] = FallbackOverParameter(function, given["arg_fallback"], given["fallback_cooldown"])
    if given["breaker"] is not None:
        from opero.core.breaker import FunctionBreaker

        candidates = policies["fallback"].slot if "fallback" in policies else None
        policies["breaker"] = FunctionBreaker(given["breaker"], per or candidates)
    if given["max_concurrent"] is not None:
        from opero.core.limits.places import PlacesForFunction

        count = check_count("max_concurrent", given["max_concurrent"], "executions", smallest=1)
        policies["places"] = PlacesForFunction(count, per, name_of(function))
    if given["rate_limit"] is not None:
        from opero.core.rate_limit import FunctionLimit

        policies["limit"] = FunctionLimit(function, **{**given, "per": per})
    return policies


def _cache(function: Callable[..., Any], given: dict[str, Any]) -> ResultCache:
    from opero.core.cache import Cache, ResultCache
    from opero.core.stores.settings import flat_cache

    if isinstance(given["cache"], Cache):
        return ResultCache(function, given["cache"])
    if not isinstance(given["cache"], bool):
        instead = "True or False, and beside it cache_backend='disk', or a Cache, such as cache=Cache(ttl='15 minutes')"
        raise wrong_type("cache", given["cache"], instead)
    _, *flat = OPTIONS["cache"]
    return ResultCache(function, flat_cache(**{name: given[name] for name in flat}))


class _WithDefault(Protocol[D_co]):
    """A decorator whose functions give a default in place of raising."""

    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> Callable[P, Coroutine[Any, Any, R | D_co]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Callable[P, R | D_co]: ...


@overload
def opero(function: F, /) -> F: ...
@overload
def opero(*, default: D, **options: Unpack[CommonOptions]) -> _WithDefault[D]: ...
@overload
def opero(**options: Unpack[CommonOptions]) -> Callable[[F], F]: ...
def opero(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a function resilient: cache, time limits, retry, fallback and rate limit, in this order from outside in.

    Works with and without parentheses, on ``def`` and ``async def`` functions and on methods; ``@classmethod`` and
    ``@staticmethod`` go above it. The decorated function has the same signature, and ``.stats``, ``.cache_info()``,
    ``.cache_clear()``, ``.cache_delete(…)``, ``.cache_refresh(…)`` and ``.__wrapped__``.

    Only `Exception` is handled; Ctrl-C, exit and cancellation pass through at once. When retries have run out the
    function's own last exception is raised, with a note telling attempts and seconds. Calls of opero functions inside
    opero functions work; their retries multiply.

    Args:
        function: The function, when used without parentheses.
        **options: All by keyword. What is told in seconds may also be a `datetime.timedelta`:

            - ``cache`` (False): cache successful results, or an `opero.Cache` that says how. Identical calls under way
              share one execution.
            - ``cache_ttl`` (None): seconds an entry lives; None keeps it for ever.
            - ``cache_backend`` (``"memory"``): where entries live: ``"memory"``, ``"disk"`` or ``"redis"``.
            - ``cache_key`` (None): ``callable(*args, **kwargs)`` giving the key in place of the arguments.
            - ``cache_namespace``: functions with one namespace share entries; each has its own by default.
            - ``cache_options`` (None): mapping. In memory ``maxsize`` (10 000 entries) and ``policy`` (``"lru"``,
              ``"lfu"``, ``"fifo"``). On disk ``cache_dir``, ``folder_name`` (``"opero"``), ``maxsize`` (entries, no
              bound), ``size_limit`` (bytes, 16 GiB), ``policy`` (``"fifo"``), ``serializer`` (``"pickle"``,
              ``"json"``), ``compress`` (False). On redis ``url`` or ``client`` (of redis-py), or
              ``redis_host``, ``redis_port``, ``redis_db``, ``redis_password``; ``folder_name``, ``serializer``,
              ``compress``.
            - ``retries`` (3): extra rounds after the first.
            - ``backoff_factor``, ``min_delay``, ``max_delay`` (2.0, 0.1 s, 30 s): the delay after round n is
              ``min(max_delay, min_delay * backoff_factor**(n-1))``.
            - ``jitter`` (True): draw each delay from its upper half at random.
            - ``retry_on`` (Exception): class, tuple, or ``callable(exception)``. That answers True or False (None is
              False), a delay (seconds or `datetime.timedelta`), `opero.NEXT` (no retry, and no fault of this
              candidate) or `opero.GIVE_UP` (the call ends, without trying other candidates); anything else is a
              `TypeError`, and an error of its own ends the call. Classes match a group of exceptions, too, if they
              match all in it. Where it is not given, errors of the program itself end the call: `NameError`,
              `ImportError`, `SyntaxError`, `NotImplementedError`, `RecursionError`, `MemoryError`; and what celery, rq
              and other queues, FastAPI, Flask, Django, other servers, Airflow, typer, click, unittest are steered by.
            - ``retry_if_result`` (None): ``callable(result)`` that says whether to reject a result: that is a failed
              attempt then, whatever ``retry_on`` says, and in the end a `RejectedResultError`.
            - ``retry_options`` (None): mapping for `tenacity.Retrying`; it wins over the above.
            - ``arg_fallback`` (None): name of the parameter whose list or tuple, `opero.candidates` or
              `opero.candidates_from`, holds candidates to try in order; any other value is the only one.
            - ``fallback_cooldown`` (None): seconds for which a candidate that failed is tried last.
            - ``rate_limit`` (None): calls per second, text such as ``"100/minute"``, an `opero.RateLimiter` that
              functions share, a list of such limits that all hold, or a mapping of names to rates, as
              ``{"calls": "500/minute", "tokens": "90000/minute"}``. Every execution takes a slot, and none that would
              come too late to be of use, by ``total_timeout`` and what the function usually takes. Seconds that
              ``retry_on`` returns hold for the whole limit, with ``per`` for that value's: nothing of it starts before.
            - ``rate_limit_cost`` (None): what a call takes of the limit: a number, or ``callable(*args, **kwargs)``; a
              pair ``(before, after)`` is corrected by ``after(result)``; or a mapping of the limit's names to these.
              ``calls`` is 1. More than the whole rate is a `ValueError`.
            - ``rate_limit_options`` (None): mapping of keywords of `opero.RateLimiter`: ``when_full`` and ``max_wait``,
              ``spread`` and ``max_burst`` (of `asynciolimiter.Limiter`), ``scope`` with ``name`` (here the function's
              identity by default), ``folder`` and ``url``.
            - ``max_concurrent`` (None): executions under way at once, for all callers of the process, first come, first
              served. Of a generator function one lasts until it ends or is closed. A call within its own place is a
              `MisuseError`.
            - ``per`` (None): name of a parameter, a tuple of names, or ``callable(*args, **kwargs)``: each of its
              values has a limit, places and a circuit of its own.
            - ``attempt_timeout`` (None): seconds for one execution; for ``async def`` only.
            - ``total_timeout`` (None): seconds for the whole call, waits included; an execution of a ``def`` function
              is not stopped, but none starts later.
            - ``breaker`` (None): failures in a row, of the function, of one candidate or of one value of ``per``, after
              which calls fail at once and the items of a map wait, until after 30 s one trial call decides; or an
              `opero.Breaker`. Errors that no class in ``retry_on`` matches, or to which it answers `opero.NEXT` or
              `opero.GIVE_UP`, count as answers, except of time limits; an execution that was cut short because others
              had used up ``total_timeout`` says nothing.
            - ``default``: what a call that failed returns in place of raising, whatever ended it: the object itself, no
              copy. It is never cached, the call counts as a failure, and listeners are told of the error. A
              `MisuseError` and arguments that do not fit the function are raised all the same; what the function itself
              raises, `NameError` among it, is not.
            - ``on_event`` (None): ``callable(event)``, told of what happens during each call (`opero.events`).

    Raises:
        TypeError: When decorating: an unknown option, a wrong type, something that is not a function, or a generator
            function with what needs a result: ``cache``, ``default``, ``retry_if_result``, tenacity's
            ``retry_error_callback``, or a cost that is told by the result.
        ValueError: When decorating: a value out of range, or an option that cannot apply. At a call: no candidates.
        UnsafeCacheError: At a call: the folder of the disk cache could have been filled by somebody else.
        AllFailedError: At a call with ``arg_fallback``: every candidate failed in every round.
        RejectedResultError: At a call with ``retry_if_result``: the last result was rejected, too.
        CallTimeoutError: At a call: a time limit ended it.
        CircuitOpenError: At a call with ``breaker``: it was not tried.
        RateLimitedError: At a call with ``rate_limit``: by ``when_full`` or ``max_wait`` it does not wait for a slot.
    """
    check_known("@opero", options, OPERO_DEFAULTS)
    if function is not None and options:
        msg = f"opero got a function and options; write opero({', '.join(f'{n}=…' for n in options)})(function)"
        raise TypeError(msg)
    decorate = decorator(lambda f: make_plan(f, options), (opero, {**options}))
    return decorate if function is None else decorate(function)


# Those who look at signatures (notebooks, `help`, Sphinx) have imported inspect, which takes longer than opero.
if "inspect" in sys.modules:
    opero.__signature__ = keyword_signature(OPERO_DEFAULTS)  # type: ignore[attr-defined]
