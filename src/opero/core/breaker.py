"""The circuit breaker: is it any use to call now?"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Self

from opero.core.checks import check_count, check_known, check_mapping, check_seconds
from opero.core.clock import clock
from opero.core.forks import ForkSafeLock, watch_forks
from opero.core.keys import identity_of
from opero.core.showing import kind_of, shown
from opero.core.signature import name_of
from opero.utils.logging import log

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_DEFAULTS: dict[str, Any] = {"failures": 5, "window": None, "recovery": 30.0}


class _Circuit:
    """The last failures in a row; open until a trial call succeeds, once there are too many of them."""

    __slots__ = ("failures", "on_trial", "opens_again_at")

    def __init__(self, most: int) -> None:
        self.failures: deque[float] = deque(maxlen=most)
        self.opens_again_at: float | None = None
        self.on_trial = False

    def admits(self, moment: float) -> bool:
        return self.opens_again_at is None or (moment >= self.opens_again_at and not self.on_trial)


class Passage:
    """One attempt through a circuit; left without a word, it tells nothing of the service."""

    __slots__ = ("_breaker", "_is_trial", "_key", "_told")

    def __init__(self, breaker: Breaker, key: Any, *, is_trial: bool) -> None:
        self._breaker = breaker
        self._key = key
        self._is_trial = is_trial
        self._told = False

    def tell(self, *, failed: bool) -> None:
        """How the attempt ended."""
        self._told = True
        self._breaker.passed(self._key, failed=failed, is_trial=self._is_trial)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if not self._told:
            self._breaker.passed(self._key, failed=None, is_trial=self._is_trial)


class Breaker:
    """Counts failures in a row, for each candidate by itself, and says when to stop calling.

    Args:
        name: Of the function, for the log.
        failures: So many in a row open the circuit.
        window: Only if they happen within so many seconds; None for any time.
        recovery: Seconds until one trial call may go through, whose end decides.
    """

    def __init__(self, name: str, *, failures: int, window: float | None, recovery: float) -> None:
        self.failures = failures
        self._name = name
        self._window = window
        self._recovery = recovery
        self._lock = ForkSafeLock()
        self._circuits: dict[Any, _Circuit] = {}
        watch_forks(self)

    def after_fork(self) -> None:
        """Who was on trial is in the parent."""
        for circuit in self._circuits.values():
            circuit.on_trial = False

    def admits(self, value: Any, *, after: float = 0.0) -> bool:
        """Whether an attempt with this candidate could go through, so many seconds from now."""
        with self._lock.lock:
            circuit = self._circuits.get(identity_of(value))
            return circuit is None or circuit.admits(clock.now() + after)

    def enter(self, value: Any) -> Passage | None:
        """Let an attempt through, to be left again; None if the circuit is open."""
        key = identity_of(value)
        with self._lock.lock:
            circuit = self._circuits.get(key)
            if circuit is not None:
                if not circuit.admits(clock.now()):
                    return None
                circuit.on_trial = circuit.opens_again_at is not None
            return Passage(self, key, is_trial=circuit is not None and circuit.on_trial)

    def trial_in(self) -> float:
        """Seconds until the first of the open circuits lets a trial call through."""
        with self._lock.lock:
            times = [c.opens_again_at for c in self._circuits.values() if c.opens_again_at is not None]
            return max(0.0, min(times, default=0.0) - clock.now())

    def passed(self, key: Any, *, failed: bool | None, is_trial: bool) -> None:
        """Take note of the end of an attempt; None if it says nothing of the service."""
        with self._lock.lock:
            circuit = self._circuits.get(key)
            if circuit is not None and circuit.opens_again_at is not None and not is_trial:
                # It began before the circuit opened; only a trial decides now.
                return
            if failed is False:
                self._circuits.pop(key, None)
                return
            if failed is None:
                if circuit is not None:
                    circuit.on_trial = False
                return
            if circuit is None:
                self._circuits[key] = circuit = _Circuit(self.failures)
            self._failed(circuit, clock.now())

    def _failed(self, circuit: _Circuit, now: float) -> None:
        circuit.failures.append(now)
        was_trial, circuit.on_trial = circuit.on_trial, False
        in_time = self._window is None or now - circuit.failures[0] <= self._window
        if was_trial or (len(circuit.failures) == self.failures and in_time):
            circuit.opens_again_at = now + self._recovery
            log("WARNING", "{}: the circuit is open, the next trial is in {:.3g} s", self._name, self._recovery)


def breaker_policy(function: Callable[..., Any], breaker: int | Mapping[str, Any]) -> Breaker:
    """Check the breaker's options and make the policy for ``function``."""
    if isinstance(breaker, int) and not isinstance(breaker, bool):
        failures = check_count("breaker", breaker, "failures in a row", smallest=1)
        return Breaker(name_of(function), **{**_DEFAULTS, "failures": failures})
    try:
        given = check_mapping("breaker", breaker)
    except TypeError as error:
        msg = f"breaker={shown(breaker)} is {kind_of(breaker)}; write a number of failures in a row, or a mapping"
        raise TypeError(msg) from error
    check_known("breaker", given, tuple(_DEFAULTS))
    settings = {**_DEFAULTS, **given}
    check_count("breaker['failures']", settings["failures"], "failures in a row", smallest=1)
    check_seconds("breaker['recovery']", settings["recovery"], zero=False)
    if settings["window"] is not None:
        check_seconds("breaker['window']", settings["window"], zero=False)
    return Breaker(name_of(function), **settings)
