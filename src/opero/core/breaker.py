"""The circuit breaker: is it any use to call now?"""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from opero.core.checks import check_count, check_known, check_mapping, check_seconds
from opero.core.clock import clock
from opero.core.forks import ForkSafeLock, watch_forks
from opero.core.keys import identity_of
from opero.core.showing import kind_of, shown
from opero.core.signature import name_of
from opero.core.steps import Await
from opero.utils.logging import log

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping

    from opero.core.steps import Arrival

_DEFAULTS: dict[str, Any] = {"failures": 5, "window": None, "recovery": 30.0}
_FEWEST_TIDIED = 64
_MOST_KEPT = 1_000


class _Circuit:
    """The last failures in a row; open until a trial call succeeds, once there are too many of them."""

    __slots__ = ("_trial", "failures", "trial_at")

    def __init__(self, most: int) -> None:
        self.failures: deque[float] = deque(maxlen=most)
        # When the next trial may go out; None while the circuit is closed.
        self.trial_at: float | None = None
        self._trial: weakref.ref[Passage] | None = None

    @property
    def trial(self) -> Passage | None:
        """Who is on trial; one that was lost, by an interrupt at the wrong moment, is nobody."""
        passage = None if self._trial is None else self._trial()
        return None if passage is None or passage.is_over else passage

    @trial.setter
    def trial(self, passage: Passage | None) -> None:
        self._trial = None if passage is None else weakref.ref(passage)

    def admits(self, moment: float) -> bool:
        return self.trial_at is None or (moment >= self.trial_at and self.trial is None)

    def open(self, trial_at: float) -> None:
        self.trial = None
        self.trial_at = trial_at

    def tells_nothing(self, now: float, window: float | None) -> bool:
        """Whether a new circuit would not behave any differently."""
        return self.trial_at is None and window is not None and now - self.failures[-1] > window

    def worth(self, now: float) -> int:
        """Which of two to forget, if one has to be: the one that is worth less."""
        if self.trial_at is None:
            return 0
        return 1 if self.admits(now) else 2


class Passage:
    """One attempt through a circuit; left without a word, it tells nothing of the service.

    To leave takes no lock: the garbage collector may do so, in a thread that holds it.
    """

    __slots__ = ("__weakref__", "_breaker", "_value", "is_over", "is_shut", "wake", "watchers")

    def __init__(self, breaker: Breaker, value: Any) -> None:
        self._breaker = breaker
        self._value = value
        self.is_over = False
        # The circuit opened before the attempt began.
        self.is_shut = False
        self.wake: Callable[[], None] | None = None
        # Among which it waits; a list would be slow to leave.
        self.watchers: dict[Passage, None] = {}

    @property
    def key(self) -> Any:
        return _key_of(self._value)

    def waiting(self, wait: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Go through a wait, which gives None as soon as the circuit opens."""
        try:
            step = next(wait)
            self._breaker.watch(self)
            while not self.is_shut:
                if step.__class__ is Await:
                    step = Await(_UnlessShut(step.arrival, self), is_turn=step.is_turn)
                sent = yield step
                step = wait.send(sent)
        except StopIteration as end:
            return end.value
        finally:
            self.watchers.pop(self, None)
            wait.close()

    def may_start(self) -> bool:
        """Whether the attempt may still begin, after it waited for something else."""
        return not self.is_shut and self._breaker.lets_start(self)

    def shut(self) -> None:
        self.is_shut = True
        wake = self.wake
        if wake is not None:
            wake()

    def tell(self, *, failed: bool | None) -> None:
        """How the attempt ended; None if that says nothing of the service."""
        if failed is not None:
            self._breaker.passed(self, failed=failed)
        self.is_over = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.is_over = True


class _UnlessShut:
    """An `opero.core.steps.Arrival` of another one, or of the news that there is no use in waiting for it."""

    __slots__ = ("_arrival", "_passage")

    def __init__(self, arrival: Arrival, passage: Passage) -> None:
        self._arrival = arrival
        self._passage = passage

    def poll(self) -> bool:
        return self._passage.is_shut or self._arrival.poll()

    def due_in(self) -> float | None:
        return 0.0 if self._passage.is_shut else self._arrival.due_in()

    def notify(self, wake: Callable[[], None] | None) -> None:
        self._passage.wake = wake
        self._arrival.notify(wake)

    def withdraw(self) -> None:
        self._arrival.withdraw()


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
        # Those that failed since they last succeeded, in the order of their last failures.
        self._circuits: dict[Any, _Circuit] = {}
        self._tidy_at = _FEWEST_TIDIED
        # Attempts that wait for something else, if any are left.
        self._watchers: dict[Any, dict[Passage, None]] = {}
        self._tidy_watchers_at = _FEWEST_TIDIED
        watch_forks(self)

    def after_fork(self) -> None:
        """Who waits and who is on trial is in the parent."""
        self._watchers.clear()
        for circuit in self._circuits.values():
            circuit.trial = None

    def admits(self, value: Any, *, after: float = 0.0) -> bool:
        """Whether an attempt with this candidate could go through, so many seconds from now."""
        if not self._circuits:
            return True
        key = _key_of(value)
        with self._lock.lock:
            circuit = self._circuits.get(key)
            return circuit is None or circuit.admits(clock.now() + after)

    def enter(self, value: Any) -> Passage | None:
        """Let an attempt through, to be left again; None if the circuit is open."""
        passage = Passage(self, value)
        if not self._circuits:
            return passage
        key = passage.key
        with self._lock.lock:
            circuit = self._circuits.get(key)
            if circuit is not None and circuit.trial_at is not None:
                if not circuit.admits(clock.now()):
                    return None
                circuit.trial = passage
            return passage

    def trial_in(self, values: Iterable[Any]) -> float | None:
        """Seconds until one of these candidates may be tried again; None while one of them is being tried."""
        keys = [_key_of(value) for value in values]
        with self._lock.lock:
            circuits = [self._circuits[key] for key in keys if key in self._circuits]
            if any(circuit.trial is not None for circuit in circuits):
                return None
            now = clock.now()
            times = [circuit.trial_at for circuit in circuits if circuit.trial_at is not None]
            return max(0.0, min(times, default=now) - now)

    def watch(self, passage: Passage) -> None:
        """Shut this passage when its circuit opens."""
        key = passage.key
        with self._lock.lock:
            circuit = self._circuits.get(key)
            if circuit is None or circuit.trial_at is None:
                if len(self._watchers) >= self._tidy_watchers_at:
                    self._watchers = {key: watchers for key, watchers in self._watchers.items() if watchers}
                    self._tidy_watchers_at = max(_FEWEST_TIDIED, 2 * len(self._watchers))
                passage.watchers = self._watchers.setdefault(key, {})
                passage.watchers[passage] = None
            elif circuit.trial is not passage:
                passage.is_shut = True

    def lets_start(self, passage: Passage) -> bool:
        """Whether the circuit is as it was when this attempt entered it."""
        if not self._circuits:
            return True
        circuit = self._circuits.get(passage.key)
        return circuit is None or circuit.trial_at is None or circuit.trial is passage

    def passed(self, passage: Passage, *, failed: bool) -> None:
        """Take note of how an attempt ended."""
        if not failed and not self._circuits:
            return
        key = passage.key
        with self._lock.lock:
            circuit = self._circuits.get(key)
            is_trial = circuit is not None and circuit.trial is passage
            if circuit is not None and circuit.trial_at is not None and not is_trial:
                # It began before the circuit opened; only a trial decides now.
                return
            if not failed:
                self._circuits.pop(key, None)
                return
            shut = self._failed(key, is_trial=is_trial)
        if shut is not None:
            log("WARNING", "{}: the circuit is open, the next trial is in {:.3g} s", self._name, self._recovery)
            for waiting in shut:
                waiting.shut()

    def _failed(self, key: Any, *, is_trial: bool) -> Iterable[Passage] | None:
        """Give those for whom this shut the circuit, or None if it is still closed."""
        now = clock.now()
        circuit = self._circuits.pop(key, None)
        if circuit is None:
            if len(self._circuits) >= self._tidy_at:
                self._tidy(now)
            circuit = _Circuit(self.failures)
        self._circuits[key] = circuit
        circuit.failures.append(now)
        in_time = self._window is None or now - circuit.failures[0] <= self._window
        if not is_trial and not (len(circuit.failures) == self.failures and in_time):
            return None
        circuit.open(now + self._recovery)
        return list(self._watchers.pop(key, ()))

    def _tidy(self, now: float) -> None:
        """Forget what tells nothing any more, and then what is worth least; of equal ones, what failed long ago."""
        kept = {key: c for key, c in self._circuits.items() if not c.tells_nothing(now, self._window)}
        for key in sorted(kept, key=lambda key: kept[key].worth(now))[: max(0, len(kept) - _MOST_KEPT)]:
            if kept[key].trial is None:
                del kept[key]
        self._circuits = kept
        self._tidy_at = max(_FEWEST_TIDIED, 2 * len(kept))


def _key_of(value: Any) -> Any:
    """What tells a candidate from others: of text, which may be a secret, no more than a digest is kept."""
    if value.__class__ is not str and value.__class__ is not bytes:
        return identity_of(value)
    from opero.core.digests import digest_of_plain

    return digest_of_plain((value,))


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
    settings["recovery"] = check_seconds("breaker['recovery']", settings["recovery"], zero=False)
    if settings["window"] is not None:
        settings["window"] = check_seconds("breaker['window']", settings["window"], zero=False)
    return Breaker(name_of(function), **settings)
