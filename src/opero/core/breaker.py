"""The circuit breaker: is it any use to call now?"""

from __future__ import annotations

import math
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from opero.core.checks import check_count, check_seconds
from opero.core.clock import clock
from opero.core.forks import ForkSafeLock, watch_forks
from opero.core.keys import identity_of
from opero.core.showing import kind_of, shown
from opero.core.signature import MISSING
from opero.utils.logging import log
from opero.utils.notes import duration

__all__ = ["Breaker", "Circuit"]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from opero.core.checks import Duration
    from opero.core.parameters import ParameterSlot
    from opero.core.per import Per

_MOST_KEPT = 1_000


class _Circuit:
    """The last failures in a row; open until a trial call succeeds, once there are too many of them."""

    __slots__ = ("_trial", "failures", "trial_at")

    def __init__(self, most: int) -> None:
        self.failures: deque[float] = deque(maxlen=most)
        # When the next trial may begin; None while the circuit is closed.
        self.trial_at: float | None = None
        self._trial: weakref.ref[Passage] | None = None

    @property
    def trial(self) -> Passage | None:
        """Who is on trial; one that was lost, by an interrupt at the wrong moment, is nobody."""
        passage = None if self._trial is None else self._trial()
        return None if passage is None or passage.is_over else passage

    def put_on_trial(self, passage: Passage, when_lost: Callable[[], None]) -> None:
        passage.is_trial = True
        self._trial = weakref.ref(passage, lambda _: when_lost())

    def forget_trial(self) -> None:
        self._trial = None

    def admits(self, moment: float) -> bool:
        return self.trial_at is None or (moment >= self.trial_at and self.trial is None)

    def open(self, trial_at: float) -> None:
        self.forget_trial()
        self.trial_at = trial_at


class Passage:
    """One attempt through a circuit; left without a word, it tells nothing of the service.

    To leave takes no lock: the garbage collector may do so, in a thread that holds it.
    """

    __slots__ = ("__weakref__", "breaker", "is_over", "is_trial", "value")

    def __init__(self, breaker: Breaker, value: Any) -> None:
        self.breaker = breaker
        self.value = value
        self.is_over = self.is_trial = False

    def is_shut(self) -> bool:
        """Whether the circuit has opened since; then the attempt must not begin, after it waited for something else."""
        return self.breaker.has_shut_out(self)

    def tell(self, *, failed: bool | None) -> str | None:
        """How the attempt ended; None if that says nothing of the service. Gives the circuit's state if it changed."""
        changed = None if failed is None else self.breaker.passed(self, failed=failed)
        self.end()
        return changed

    def end(self) -> None:
        """The attempt is over, or will not be; others may make the trial that it was."""
        self.is_over = True
        if self.is_trial:
            self.breaker.rouse()


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
        self._window = None if window is None else check_seconds("window", window, zero=False)
        self.recovery = check_seconds("recovery", recovery, zero=False)
        self._lock = ForkSafeLock()
        # Those that failed since they last succeeded, in the order of their last failures.
        self.circuits: dict[Any, _Circuit] = {}
        # Of those who wait for a circuit to change, or for something else, which is of no use if it opens.
        self._wakers: dict[object, Callable[[], None]] = {}
        watch_forks(self)

    def __repr__(self) -> str:
        window = "" if self._window is None else f", window={self._window:g}"
        return f"Breaker({self.failures}{window}, recovery={self.recovery:g})"

    def __reduce__(self) -> Any:
        msg = f"{self!r} belongs to its process, a copy would be another one; make one in each process"
        raise TypeError(msg)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def after_fork(self) -> None:
        """Who waits and who is on trial is in the parent."""
        self._wakers.clear()
        for circuit in self.circuits.values():
            circuit.forget_trial()

    def admits(self, value: Any, *, after: float = 0.0) -> bool:
        """Whether an attempt with this candidate could go through, so many seconds from now."""
        if not self.circuits:
            return True
        key = _key_of(value)
        with self._lock.lock:
            circuit = self.circuits.get(key)
            return circuit is None or circuit.admits(clock.now() + after)

    def enter(self, value: Any) -> Passage | None:
        """Let an attempt through, to be left again; None if the circuit is open."""
        passage = Passage(self, value)
        if not self.circuits:
            return passage
        key = _key_of(value)
        with self._lock.lock:
            circuit = self.circuits.get(key)
            if circuit is not None and circuit.trial_at is not None:
                if not circuit.admits(clock.now()):
                    return None
                circuit.put_on_trial(passage, self.rouse)
            return passage

    def trial_in(self, values: Iterable[Any]) -> float | None:
        """Seconds until one of these candidates may be tried again; None while one of them is being tried."""
        keys = [_key_of(value) for value in values]
        with self._lock.lock:
            circuits = [self.circuits[key] for key in keys if key in self.circuits]
            if any(circuit.trial is not None for circuit in circuits):
                return None
            now = clock.now()
            times = [circuit.trial_at for circuit in circuits if circuit.trial_at is not None]
            return max(0.0, min(times, default=now) - now)

    def trial_of(self, values: Sequence[Any], until: float, deadline: float) -> Trial | None:
        """A wait until one of these may be tried; None if nobody knows that it can be in time."""
        trial = Trial(self, values, until, deadline)
        return None if trial.is_late() else trial

    def listen(self, waiter: object, wake: Callable[[], None] | None) -> None:
        """Call ``wake``, from any thread, when a circuit opens or closes or a trial ends; None: no more."""
        if wake is None:
            self._wakers.pop(waiter, None)
        else:
            self._wakers[waiter] = wake

    def rouse(self) -> None:
        """Let those who wait look again; the garbage collector may say so, in any thread."""
        for wake in list(self._wakers.values()):
            wake()

    def has_shut_out(self, passage: Passage) -> bool:
        """Whether the circuit is open, and this is not its trial."""
        circuit = self.circuits.get(_key_of(passage.value)) if self.circuits else None
        return circuit is not None and circuit.trial_at is not None and circuit.trial is not passage

    def passed(self, passage: Passage, *, failed: bool) -> str | None:
        """Take note of how an attempt ended; gives the state into which that has brought the circuit, if it has."""
        if not failed and not self.circuits:
            return None
        key = _key_of(passage.value)
        with self._lock.lock:
            circuit = self.circuits.get(key)
            is_trial = circuit is not None and circuit.trial is passage
            if circuit is not None and circuit.trial_at is not None and not is_trial:
                # It began before the circuit opened; only a trial decides now.
                return None
            if failed:
                changed = "open" if self._failed(key, is_trial=is_trial) else None
            else:
                self.circuits.pop(key, None)
                changed = "closed" if is_trial else None
        if changed is not None:
            self._has_changed(changed)
        return changed

    def state_of(self, value: Any) -> str:
        """``"closed"``, ``"open"``, or ``"half-open"``: a trial is under way, or may begin."""
        with self._lock.lock:
            circuit = self.circuits.get(_key_of(value))
            if circuit is None or circuit.trial_at is None:
                return "closed"
            return "open" if circuit.trial is None and clock.now() < circuit.trial_at else "half-open"

    def open(self, value: Any) -> None:
        """Let nobody through for one recovery."""
        key = _key_of(value)
        with self._lock.lock:
            circuit = self.circuits.setdefault(key, _Circuit(self.failures))
            circuit.failures.append(clock.now())
            circuit.open(clock.now() + self.recovery)
        self._has_changed("open")

    def reset(self, value: Any) -> None:
        """Forget all failures."""
        with self._lock.lock:
            self.circuits.pop(_key_of(value), None)
        self._has_changed("closed")

    def _has_changed(self, state: str) -> None:
        if state == "open":
            log("WARNING", "a circuit is open, the next trial is in {}", duration(self.recovery))
        self.rouse()

    def _failed(self, key: Any, *, is_trial: bool) -> bool:
        """Count a failure; tells whether that has opened the circuit."""
        now = clock.now()
        circuit = self.circuits.pop(key, None)
        if circuit is None:
            if len(self.circuits) >= _MOST_KEPT:
                closed = (key for key, other in self.circuits.items() if other.trial_at is None)
                del self.circuits[next(closed, next(iter(self.circuits)))]
            circuit = _Circuit(self.failures)
        self.circuits[key] = circuit
        circuit.failures.append(now)
        in_time = self._window is None or now - circuit.failures[0] <= self._window
        if not is_trial and not (len(circuit.failures) == self.failures and in_time):
            return False
        circuit.open(now + self.recovery)
        return True


def _key_of(value: Any) -> Any:
    """What tells a candidate from others: of text, which may be a secret, no more than a digest is kept."""
    if value.__class__ is not str and value.__class__ is not bytes:
        return identity_of(value)
    from opero.core.digests import digest_of_plain

    return digest_of_plain((value,))


class Trial:
    """An `opero.core.steps.Arrival` of a chance for one of these values, or of the news that none comes in time.

    By ``until`` a trial has to begin; how it ends is waited for, up to ``deadline``.
    """

    is_turn = False

    def __init__(self, breaker: Breaker, values: Sequence[Any], until: float, deadline: float) -> None:
        self._breaker = breaker
        self._values = values
        self._until = until
        self._deadline = deadline

    def is_late(self) -> bool:
        trial_in, now = self._breaker.trial_in(self._values), clock.now()
        return now >= self._deadline or (trial_in is not None and now + trial_in > min(self._until, self._deadline))

    def poll(self) -> bool:
        return any(self._breaker.admits(value) for value in self._values) or self.is_late()

    def due_in(self) -> float | None:
        # How one ends that is under way is told.
        trial_in = self._breaker.trial_in(self._values)
        seconds = min(math.inf if trial_in is None else trial_in, self._deadline - clock.now())
        return None if seconds == math.inf else max(0.0, seconds)

    def notify(self, wake: Callable[[], None] | None) -> None:
        self._breaker.listen(self, wake)


class FunctionBreaker:
    """One function's view of a breaker: which of its circuits a call goes through.

    Attributes:
        shared: The breaker.
        by: Gives the value that a call's circuit is known by; None where there is one circuit.
    """

    def __init__(self, shared: Breaker, by: Per | ParameterSlot | None) -> None:
        self.shared = shared
        self.by = by

    def value_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return MISSING if self.by is None else self.by.get(args, kwargs)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Passage | None:
        """See `Breaker.enter`."""
        return self.shared.enter(self.value_of(args, kwargs))

    def is_quiet(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether nothing is known that speaks against any call."""
        if self.by is not None:
            # A function that refuses a value refuses it always.
            self.by.get(args, kwargs)
        return not self.shared.circuits

    def succeeded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An attempt that found all quiet has succeeded; others may have failed meanwhile."""
        if self.shared.circuits:
            self.shared.passed(Passage(self.shared, self.value_of(args, kwargs)), failed=False)


class Circuit:
    """The circuit of a function, as `opero.control` gives it; with ``per`` or ``arg_fallback``, ``circuit[value]``."""

    __slots__ = ("_policy", "_value")

    def __init__(self, policy: FunctionBreaker, value: Any = MISSING) -> None:
        self._policy = policy
        self._value = value

    def __getitem__(self, value: Any) -> Circuit:
        if self._policy.by is None:
            msg = "the function has one circuit for all calls; write control(f).circuit.state, or add per='parameter'"
            raise TypeError(msg)
        return Circuit(self._policy, value)

    @property
    def state(self) -> str:
        """``"closed"``; ``"open"``: calls fail at once; ``"half-open"``: a trial is under way, or may begin."""
        return self._policy.shared.state_of(self._one())

    def reset(self) -> None:
        """Close it, and forget the failures."""
        self._policy.shared.reset(self._one())

    def open(self) -> None:
        """Open it, for one ``recovery``."""
        self._policy.shared.open(self._one())

    def __repr__(self) -> str:
        # Not the value, which may be a secret.
        return "<circuits by value>" if self._is_of_many() else f"<{self.state} circuit>"

    def _is_of_many(self) -> bool:
        return self._value is MISSING and self._policy.by is not None

    def _one(self) -> Any:
        if self._is_of_many():
            msg = "each value has a circuit of its own; write control(f).circuit[value]"
            raise TypeError(msg)
        return self._value


def breaker_policy(breaker: Any, by: Per | ParameterSlot | None = None) -> FunctionBreaker:
    """Check the option ``breaker`` and make the policy."""
    if isinstance(breaker, int) and not isinstance(breaker, bool):
        breaker = Breaker(check_count("breaker", breaker, "failures in a row", smallest=1))
    if not isinstance(breaker, Breaker):
        msg = (
            f"breaker={shown(breaker)} is {kind_of(breaker)}; write a number of failures in a row, or "
            "opero.Breaker(5, window=60, recovery=30)"
        )
        raise TypeError(msg)
    return FunctionBreaker(breaker, by)
