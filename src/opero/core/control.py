"""What can be done with a decorated function besides calling it."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from opero.core.signature import MISSING
from opero.core.stats import CallStats
from opero.exceptions import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opero.core.breaker import Circuit
    from opero.core.cache import CacheInfo
    from opero.core.decoration import Decoration
    from opero.core.plan import Plan
    from opero.core.stats import Stats

__all__ = ["Control", "control"]

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound="Control[..., Any]")

# The options of `opero` with their defaults, by the policy of a plan that they make.
OPTIONS: dict[str, dict[str, Any]] = {
    "cache": {
        "cache": False,
        "cache_ttl": None,
        "cache_backend": "memory",
        "cache_key": None,
        "cache_namespace": None,
        "cache_options": None,
    },
    "retry": {
        "retries": 3,
        "backoff_factor": 2.0,
        "min_delay": 0.1,
        "max_delay": 30.0,
        "jitter": True,
        "retry_on": Exception,
        "retry_if_result": None,
        "retry_options": None,
    },
    "fallback": {"arg_fallback": None, "fallback_cooldown": None},
    "limit": {"rate_limit": None, "rate_limit_cost": None, "rate_limit_options": None, "per": None},
    "attempt_timeout": {"attempt_timeout": None},
    "total_timeout": {"total_timeout": None},
    "places": {"max_concurrent": None, "per": None},
    "breaker": {"breaker": None, "per": None},
    "on_event": {"on_event": None},
    "default": {"default": MISSING},
}
_BESIDE_CACHE = tuple(OPTIONS["cache"])[1:]
_DELAYS = ("backoff_factor", "min_delay", "max_delay", "jitter")
# What an option has no effect without, any of which will do, and what to write.
_NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(_BESIDE_CACHE, ("cache=True", ("cache",))),
    **dict.fromkeys(_DELAYS, ("retries=1", ("retries", "retry_options"))),
    # Without retries, too, it says which errors count, and which of them another candidate may mend.
    "retry_on": ("retries=1", ("retries", "retry_options", "breaker", "arg_fallback")),
    "fallback_cooldown": ("arg_fallback='parameter'", ("arg_fallback",)),
    **dict.fromkeys(("rate_limit_cost", "rate_limit_options"), ("rate_limit=5", ("rate_limit",))),
    "per": ("rate_limit=5", ("rate_limit", "max_concurrent", "breaker")),
}
OPERO_DEFAULTS: dict[str, Any] = {name: default for policy in OPTIONS.values() for name, default in policy.items()}
# Options of a map that belong to no policy.
_OF_THE_MAP = {"mode", "workers", "ordered", "progress", "return_exceptions", "total", "batch_size", "pool_options"}


class LiveStats(CallStats):
    """What a decorated function has done so far: the attributes of `opero.CallStats`, each as it is when it is read."""

    def __init__(self, decoration: Decoration) -> None:
        # Not its stats: in another process the decoration is made anew, with stats of its own.
        vars(self)["_decoration"] = decoration

    def snapshot(self) -> CallStats:
        """All of them, as they are now."""
        stats: Stats = vars(self)["_decoration"].plan.stats
        return stats.snapshot()

    if not TYPE_CHECKING:  # which knows the names, and no others

        def __getattribute__(self, name: str) -> Any:
            return getattr(self.snapshot(), name) if name in CallStats.names else super().__getattribute__(name)


class Control(Generic[P, R]):
    """What can be done with a decorated function, or with a bound method, besides calling it; see `control`.

    A map is its own.

    Attributes:
        stats: A live, read-only view of what the function has done; ``stats.snapshot()`` is an `opero.CallStats`.
    """

    def __init__(self, decoration: Decoration, head: tuple[Any, ...] = (), missing: str | None = None) -> None:
        self._decoration = decoration
        self._head = head
        # The first parameter of a method, where the control hangs on the function: Python does not pass that on there.
        self._missing = missing
        self.stats = LiveStats(decoration)

    def _instance(self, asked_by: str) -> tuple[Any, ...]:
        if self._missing is None:
            return self._head
        name = self._decoration.plan.name
        owner, _, method = name.rpartition(".")
        what, whose = ("class", owner.rpartition(".")[2]) if self._missing == "cls" else ("instance", "instance")
        raise MisuseError(
            f"{name}.{asked_by}(…) does not know the {what} of the method; "
            f"write opero.control({whose}.{method}).{asked_by}(…)"
        )

    def cache_info(self) -> CacheInfo:
        """Hits, misses, largest and current number of entries; zeros without a cache."""
        cache = self._decoration.plan.cache
        if cache is not None:
            return cache.info(self.stats.snapshot())
        from opero.core.cache import CacheInfo

        return CacheInfo(0, 0, 0, 0)

    def cache_clear(self) -> None:
        """Forget all results; one that is being computed now is returned to its callers but not kept.

        Raises:
            OperoError: If the cache's backend failed.
        """
        if self._decoration.plan.cache is not None:
            self._decoration.plan.cache.clear()

    def cache_delete(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Forget the result for these arguments; tells whether there was one.

        Raises:
            OperoError: If the cache's backend failed.
        """
        cache, head = self._decoration.plan.cache, self._instance("cache_delete")
        return cache is not None and cache.delete(cache.keys.key_of(*head, *args, **kwargs))

    def cache_refresh(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function for these arguments, under all its policies, and keep the new result in place of the old.

        Others get the old one meanwhile; two refreshes at once are one run. One that fails raises as a call does, and
        keeps the old result. Of an ``async def`` function it has to be awaited.
        """
        result: R = self._decoration.refresh((*self._instance("cache_refresh"), *args), kwargs)
        return result

    @property
    def circuit(self) -> Circuit:
        """Its circuit: ``.state``, ``.reset()``, ``.open()``; with ``per`` or ``arg_fallback``, ``circuit[value]``.

        Raises:
            MisuseError: If the function has no ``breaker``.
        """
        # Here, since keys, which a breaker tells values by, ask a function for its decoration.
        from opero.core.breaker import Circuit

        policy = self._decoration.plan.breaker
        if policy is None:
            raise MisuseError(f"{self._decoration.plan.name} has no circuit; decorate it with breaker=5")
        return Circuit(policy.shared, are_many=policy.by is not None)

    def with_options(self, **options: Any) -> Callable[P, R]:
        """Give the same function under changed options, such as ``with_options(retries=0)``.

        What no option names is shared with this function, not copied: the cache with its entries, the rate limit, the
        circuits, and always the stats. Decorators that stand above opero's are not part of it.

        Args:
            **options: Those of the decorator that made the function.

        Raises:
            TypeError: If an option is not known or has the wrong type.
            ValueError: If a value is out of range, or an option cannot apply.
        """
        head = self._instance("with_options")
        made = self._decoration.under(options)
        under: Callable[P, R] = made.__get__(*head) if head else made
        return under


@overload
def control(function: C, /) -> C: ...
@overload
def control(function: Callable[P, R], /) -> Control[P, R]: ...
def control(function: Any, /) -> Any:
    """Give access to what a decorated function can do besides being called.

    Args:
        function: What `opero.opero` made, or a bound method of it, as in ``control(client.fetch).cache_delete(3)``.
            Other decorators may stand above opero's if they use `functools.wraps`. Or a map, which is its own control;
            one below ``@classmethod`` knows its class only by this from Python 3.13 on:
            ``control(Client.fetch).stream(urls)``.

    Raises:
        TypeError: If opero has not decorated it.
    """
    is_bound = isinstance(function, types.MethodType)
    found, head = (function.__func__, (function.__self__,)) if is_bound else (function, ())
    decoration = decoration_of(found)
    if decoration is None:
        what = getattr(function, "__qualname__", type(function).__qualname__)
        msg = f"control got {what}, which opero has not decorated; give it what @opero made, or a bound method of it"
        raise TypeError(msg)
    if not isinstance(found, Control):
        return Control(decoration, head)
    of_a_map: Any = found
    return of_a_map.__get__(*head) if is_bound else of_a_map


def decoration_of(function: Any) -> Decoration | None:
    """What stands behind a decorated function; None behind any other."""
    # A bound method shows the attributes of its function, and a mock any that it is asked for.
    attributes = {} if isinstance(function, types.MethodType) else getattr(function, "__dict__", {})
    found: Decoration | None = attributes.get("__opero__")
    return found


def reasons_against(options: Mapping[str, Any]) -> dict[str, str]:
    """Why options have no effect beside the others, by their names."""
    # A decorator of the cache alone has no option to turn it off.
    given = {**OPERO_DEFAULTS, "cache": True, **options}
    reasons = {
        name: f"has no effect without {' or '.join(needed)}; add {example}, or leave it out"
        for name, (example, needed) in _NEEDS.items()
        if not any(given[other] for other in needed)
    }
    if hasattr(given["cache"], "keep_if"):
        reasons |= dict.fromkeys(_BESIDE_CACHE, "stands beside cache=Cache(…), which says all of it; write it there")
    return reasons


def changed_options(given: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """The options after a change, without those that have no effect any more."""
    if named.get("retries") == 0:
        # They could ask for retries of their own.
        given = {name: value for name, value in given.items() if name != "retry_options"}
    changed = {**given, **named}
    without_effect = reasons_against(changed)
    return {name: value for name, value in changed.items() if name in named or name not in without_effect}


def with_shared_policies(new: Plan, old: Plan, named: set[str]) -> Plan:
    """The new plan with those policies of the old one of which no option is named."""
    named = named - _OF_THE_MAP
    # A decorator of one policy has names of its own, which all belong to that one.
    are_known = named <= {name for names in OPTIONS.values() for name in names}
    shared = [policy for policy, names in OPTIONS.items() if are_known and named.isdisjoint(names)]
    return new.changed(stats=old.stats, **{policy: getattr(old, policy) for policy in shared})
