"""The circuit breaker: is it any use to call now?"""

from __future__ import annotations

import math
import sys
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from opero.core.checks import check_count, check_seconds
from opero.core.clock import clock
from opero.core.forks import ForkSafeLock, watch_forks
from opero.core.frozen import itself
from opero.core.keys import identity_of
from opero.core.steps import leaders
from opero.utils.logging import log
from opero.utils.notes import duration

__all__ = ["Breaker", "Circuit"]

if TYPE_CHECKING:
    from opero.core.checks import Duration
    from opero.core.parameters import ParameterSlot, Per

# Of keys or hosts that failed since they last succeeded.
_MOST_KEPT = 10_000


class _Circuit:
    """The last failures in a row; open until a trial call succeeds, once there are too many of them."""

    def __init__(self, most: int) -> None:
        self.failures: deque[float] = deque(maxlen=most)
        # When the next trial may begin, None while the circuit is closed; and who is on trial.
        self.trial_at: float | None = None
        self.trial: Passage | None = None

    def open(self, seconds: float) -> None:
        self.trial, self.trial_at = None, clock.now() + seconds


class Passage(NamedTuple):
    """One attempt through a circuit; left without a word, it tells nothing of the service."""

    breaker: Breaker
    key: Any

    @property
    def is_over(self) -> bool:
        """Whether it is no trial, or not any more; see `opero.core.steps.within`."""
        circuit = self.breaker.circuits.get(self.key)
        return circuit is None or circuit.trial is not self

    def is_shut(self) -> bool:
        """Whether the circuit has opened since; then the attempt must not begin, after it waited for something else."""
        circuit = self.breaker.circuits.get(self.key)
        return circuit is not None and circuit.trial_at is not None and circuit.trial is not self

    def end(self) -> None:
        """The attempt is over, or will not be; others may make the trial that it was.

        It takes no lock: the garbage collector may call it, in a thread that holds the lock.
        """
        circuit = self.breaker.circuits.get(self.key)
        if circuit is not None and circuit.trial is self:
            circuit.trial = None


class Breaker:
    """Stops the calls of a service that failed too often, and lets one try after a while.

    It is alive: functions that are given one object as ``breaker`` share its circuits. With ``per``, or with
    ``arg_fallback``, each value has a circuit of its own.

    Args:
        failures: So many in a row open the circuit; with ``window``, so many within that time.
        window: Seconds, or a `datetime.timedelta`. Default: any time.
        recovery: Seconds, or a `datetime.timedelta`, until one trial call may go through, whose end decides.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If one is out of range.
    """

    def __init__(self, failures: int = 5, *, window: Duration | None = None, recovery: Duration = 30) -> None:
        self.failures = check_count("failures", failures, "failures in a row", smallest=1)
        self._window = math.inf if window is None else check_seconds("window", window, zero=False)
        self.recovery = check_seconds("recovery", recovery, zero=False)
        self._lock = ForkSafeLock()
        # Those that failed since they last succeeded, in the order of their last failures.
        self.circuits: dict[Any, _Circuit] = {}
        watch_forks(self)

    def __repr__(self) -> str:
        window = "" if self._window == math.inf else f", window={self._window:g}"
        return f"Breaker({self.failures}{window}, recovery={self.recovery:g})"

    def __reduce__(self) -> Any:
        raise TypeError("a Breaker belongs to its process, a copy would be another one; make one in each process")

    __copy__ = __deepcopy__ = itself

    def after_fork(self) -> None:
        """Who is on trial is in the parent."""
        for circuit in self.circuits.values():
            circuit.trial = None

    def enter(self, key: Any) -> Passage | None:
        """Let an attempt through, to be left again; None if the circuit is open."""
        with self._lock.lock:
            wait = self.wait_of(key)
            if wait:
                # Calls within the trial are part of it: refused, they would let it fail for ever.
                trial = self.circuits[key].trial
                return next((part for part in leaders() if part is trial), None)
            passage = Passage(self, key)
            if wait is not None:
                self.circuits[key].trial = passage
            return passage

    def wait_of(self, key: Any) -> float | None:
        """Seconds until a trial may begin, infinite while one is under way; None if the circuit is closed."""
        circuit = self.circuits.get(key)
        if circuit is None or circuit.trial_at is None:
            return None
        return math.inf if circuit.trial is not None else max(0.0, circuit.trial_at - clock.now())

    def passed(self, passage: Passage, *, failed: bool) -> str | None:
        """Take note of how an attempt ended; gives the state into which that has brought the circuit, if it has."""
        with self._lock.lock:
            if passage.is_shut():
                # It began before the circuit opened; only a trial decides now.
                return None
            circuit = self.circuits.pop(passage.key, None)
            state = "closed" if circuit is not None and circuit.trial is passage else None
            if failed:
                circuit = self.circuits[passage.key] = circuit or _Circuit(self.failures)
                failures = circuit.failures
                failures.append(clock.now())
                if state is not None or (len(failures) == self.failures and failures[-1] - failures[0] <= self._window):
                    circuit.open(self.recovery)
                    state = "open"
                if len(self.circuits) > _MOST_KEPT:
                    # That of the one that failed longest ago.
                    del self.circuits[next(iter(self.circuits))]
        if state is not None:
            self._has_changed(state)
        return state

    def open(self, key: Any) -> None:
        """Let nobody through for one recovery."""
        with self._lock.lock:
            self.circuits.setdefault(key, _Circuit(self.failures)).open(self.recovery)
        self._has_changed("open")

    def reset(self, key: Any) -> None:
        """Forget all failures."""
        with self._lock.lock:
            self.circuits.pop(key, None)
        self._has_changed("closed")

    def _has_changed(self, state: str) -> None:
        if state == "open":
            log("WARNING", "a circuit is open, the next trial is in {}", duration(self.recovery))
        # Who waits for a slot or a place cannot use it any more, or again.
        if "opero.core.limits.line" in sys.modules:
            from opero.core.limits.line import rouse_all

            rouse_all()


class FunctionBreaker:
    """One function's view of a breaker: each value that ``by`` gives of a call has a circuit, or all have one."""

    def __init__(self, breaker: Any, by: Per | ParameterSlot | None = None) -> None:
        if not isinstance(breaker, Breaker):
            what = "failures in a row (or an opero.Breaker)"
            breaker = Breaker(check_count("breaker", breaker, what, smallest=1))
        self.shared = breaker
        self.by = by

    def key_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What tells the circuit of such a call from others."""
        return None if self.by is None else identity_of(self.by.get(args, kwargs))

    def succeeded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An attempt that found no circuit has succeeded; others may have failed meanwhile."""
        if self.shared.circuits:
            self.shared.passed(Passage(self.shared, self.key_of(args, kwargs)), failed=False)


class Circuit:
    """The circuit of a function, as `opero.control` gives it; with ``per`` or ``arg_fallback``, ``circuit[value]``."""

    def __init__(self, breaker: Breaker, key: Any = None, *, are_many: bool = False) -> None:
        self._breaker = breaker
        self._key = key
        self._are_many = are_many

    def __getitem__(self, value: Any) -> Circuit:
        if not self._are_many:
            msg = "this is one circuit, and not by value; write control(f).circuit.state, or add per='parameter'"
            raise TypeError(msg)
        return Circuit(self._breaker, identity_of(value))

    @property
    def state(self) -> str:
        """``"closed"``; ``"open"``: calls fail at once; ``"half-open"``: a trial is under way, or may begin."""
        wait = self._one().wait_of(self._key)
        return "closed" if wait is None else "half-open" if wait in {0.0, math.inf} else "open"

    def reset(self) -> None:
        """Close it, and forget the failures."""
        self._one().reset(self._key)

    def open(self) -> None:
        """Open it, for one ``recovery``."""
        self._one().open(self._key)

    def _one(self) -> Breaker:
        if self._are_many:
            raise TypeError("each value has a circuit of its own; write control(f).circuit[value]")
        return self._breaker
