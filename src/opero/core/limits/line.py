"""Lines of callers who wait for limits, first come, first served, and what lets the first of each go on.

A call takes what it needs of all its limits at one moment (`take`): its `Turn` stands in the line of each.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from opero.core.clock import clock
from opero.core.faults import Complaints
from opero.core.forks import watch_forks
from opero.core.limits.ledger import EARLY, Ledger, Request
from opero.core.limits.local import LocalLedger
from opero.core.steps import Await, Consult

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

    from opero.core.limits.rates import Rates

# One further back may go on this much later for each place: those before it, in a thread or loop that is kept from
# running, may not be able to.
_GRACE = 0.05
_MOST_GRACES = 5
_LONGEST_NAP = 1.0
# Who waits for another limit lets so many others pass for each slot for which it holds them up, up to a few slots.
_PASSES, _MOST_HELD = 20, 5
# Others were faster so often, for so long: then the first of this process claims the next slot.
_REFUSALS, _REFUSED_SECONDS = 2, 0.1
ONE = (1.0,)

# When a slot would be too late to be of use, as far as is known now.
Latest = Callable[[], float]


class Gate(Protocol):
    """A limit that processes share. ``is_instant``: asking blocks for no longer than microseconds."""

    is_instant: bool

    def perform(self, requests: Sequence[Request]) -> list[Any]:
        """For each: 0 if it was done, seconds until a slot comes, or the exception that prevents it."""
        ...

    def change(self, rates: Rates) -> None:
        """Ask at other rates from now on."""
        ...


class Line:
    """Those who wait for one limit, in this process.

    Args:
        rates: The limit.
        open_gate: Makes the gate of a limit that processes share. When it fails, and under a clock that jumps (others
            go by real time), this process goes on with a limit of its own.
        what: What the log calls the gate.
        ledger: What lets them go on in this process.
    """

    def __init__(
        self,
        rates: Rates,
        open_gate: Callable[[Rates], Gate] | None = None,
        what: str = "",
        *,
        ledger: Ledger | None = None,
    ) -> None:
        self._rates = rates
        self._open_gate = open_gate
        self._gate: Gate | None = None
        self._complaints = Complaints(what, "going on with a limit of this process alone")
        self._is_known_elsewhere = False
        # How many have started.
        self.starts = 0
        self._changes = 0
        self._ledger = LocalLedger(rates) if ledger is None else ledger
        # When the first may ask (again), as far as is known; when one who is not the first found that it could have.
        self._opens_at = self._noticed_at = -math.inf
        # Who comes before that, just after others that had waited, has missed slots, too, while it could not look.
        self._made_up_until = -math.inf
        self._plain = len(rates.paces) == 1 and not rates.quotas
        self._spots: deque[_Spot] = deque()
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """Forget the parent's callers, and what they took."""
        self.lock = threading.Lock()
        self._spots.clear()
        self._ledger.forget()
        self._opens_at = self._noticed_at = -math.inf
        # By this the processes that share a limit tell each other apart.
        self._name = os.urandom(8)

    def __len__(self) -> int:
        return len(self._spots)

    @property
    def is_shared(self) -> bool:
        """Whether somebody outside of this process has to be asked."""
        return self._open_gate is not None and not clock.is_virtual

    # Asked by whoever wants to start

    def take_now(self, amounts: Sequence[float] = ONE) -> bool:
        """Take a slot if one is free and nobody waits; only where nobody outside has to be asked."""
        with self.lock:
            now = clock.now()
            first = self.first() if self._spots else None
            if first is None:
                ledger = self._ledger
                if self._plain and amounts is ONE:
                    free_at, late = ledger.free_at[0], now + EARLY
                    if late < free_at or late < ledger.paused_until:
                        return False
                    if now > self._made_up_until:
                        ledger.free_at[0] = now + self._rates.paces[0].interval
                        return True
                if not ledger.is_open(now, amounts):
                    return False
                ledger.take(now, math.inf if now <= self._made_up_until else 0.0, amounts)
                return True
            if not self._notice(now):
                return False
        _rouse(first)
        return False

    def take(self, amounts: Sequence[float] = ONE, latest: Latest | None = None) -> Generator[Any, Any, bool]:
        """As `take`, of this line alone."""
        return take([(self, amounts)], latest)

    def correct(self, amounts: Sequence[float]) -> Generator[Any, Any, None]:
        """A call has cost so much more than it took, or less."""
        with self.lock:
            self._ledger.correct(clock.now(), amounts)
        if self.is_shared:
            yield from self.ask(Request(amounts, takes=False))
        self._rouse_all()

    def pause(self, seconds: float) -> Generator[Any, Any, None]:
        """Let nothing start for so long."""
        with self.lock:
            self._ledger.pause(clock.now() + seconds)
        self._rouse_all()
        if self.is_shared:
            yield from self.ask(Request(takes=False, pause=seconds))

    def expected_wait(self, amounts: Sequence[float] = ONE) -> float:
        """Seconds until a slot that is asked for now would come, as far as this process knows."""
        with self.lock:
            now = clock.now()
            return max(0.0, self.expected_start(None, amounts, now) - now)

    def change(self, rates: Rates) -> None:
        """Go on at other rates; those who wait keep their places."""
        with self.lock:
            self._rates = rates
            self._changes += 1
            self._plain = len(rates.paces) == 1 and not rates.quotas
            self._ledger.change(clock.now(), rates)
            self._made_up_until = -math.inf
            if self._gate is not None:
                self._gate.change(rates)
        self._rouse_all()

    def is_idle(self) -> bool:
        """Whether a new line would not behave any differently; of what processes share, the gate knows more."""
        now = clock.now()
        return not self._spots and (self._is_known_elsewhere or self._ledger.idle_from(now) <= now)

    # Asked by a turn that holds the lock

    def join(self, spot: _Spot) -> None:
        self._spots.append(spot)

    def due(self, spot: _Spot, now: float) -> float:
        """When to look again; not after ``now``: it may take its slot, or ask the gate of a shared limit for it."""
        while self._spots and self._spots[0].turn.has_left:
            self._spots.popleft()
        before, closed_until = self._before(spot), self._closed_until()
        if now + EARLY < closed_until:
            return closed_until + before * _GRACE
        if before:
            self._notice(now)
            due = self._noticed_at + before * _GRACE
            if now < due:
                return due
            # Those before it have not looked in time.
            for other in itertools.takewhile(lambda other: other is not spot, self._spots):
                other.is_passed = True
        if self.is_shared:
            return now
        return now + self.wait_alone(spot, now)

    def wait_alone(self, spot: _Spot, now: float) -> float:
        """Seconds until this process alone would give it a slot."""
        if self._ledger.is_open(now, spot.amounts):
            return 0.0
        wait = self._ledger.wait(now, spot.amounts)
        self._opens_at, self._noticed_at = now + wait, -math.inf
        return wait

    def hold(self, until: float) -> None:
        """The first in line lets nobody else go on before that, while it waits for another limit."""
        self._opens_at, self._noticed_at = max(self._opens_at, until), -math.inf

    def refused(self, wait: float, changes: int) -> None:
        """The gate said how long to wait, after so many changes of the rates."""
        if changes == self._changes:
            self._opens_at, self._noticed_at = clock.now() + wait, -math.inf

    def start(self, spot: _Spot, now: float) -> None:
        """It takes its slot, and leaves."""
        self.starts += 1
        self._ledger.take(now, self.waited(spot, now), spot.amounts)
        joined_at = spot.turn.joined_at
        if joined_at is not None:
            if now > joined_at:
                self._made_up_until = now + max([pace.tolerance for pace in self._rates.paces], default=0.0)
            if spot in self._spots:
                self._spots.remove(spot)
        self._opens_at = self._noticed_at = -math.inf

    def leave(self, spot: _Spot) -> None:
        """It wants its slot no more."""
        was_first = bool(self._spots) and self._spots[0] is spot
        if spot in self._spots:  # not so in a forked child, for a caller of the parent
            self._spots.remove(spot)
        if was_first:
            self._opens_at = self._noticed_at = -math.inf

    def first(self) -> _Spot | None:
        """Who may go on next."""
        for spot in self._spots:
            if not (spot.is_passed or spot.turn.has_left):
                return spot
        return None

    def waited(self, spot: _Spot, now: float) -> float:
        """For how long it has missed slots."""
        if now <= self._made_up_until:
            return math.inf
        return 0.0 if spot.turn.joined_at is None else now - spot.turn.joined_at

    @property
    def opens_at(self) -> float:
        """When the first may ask again, as far as is known."""
        return self._opens_at

    def may_open(self, now: float) -> bool:
        return now + EARLY >= self._closed_until()

    def expected_start(self, spot: _Spot | None, amounts: Sequence[float], now: float) -> float:
        """When a call that costs so much will start, after those that wait before it."""
        ahead = [0.0] * len(self._rates.names)
        for other in itertools.takewhile(lambda other: other is not spot, self._spots):
            if not other.turn.has_left:
                ahead = [total + amount for total, amount in zip(ahead, other.amounts, strict=True)]
        moment = max(now, self._ledger.opens_at(now, amounts, ahead))
        if self.is_shared and self._opens_at > now:
            behind = [ahead[pace.name] * pace.interval for pace in self._rates.paces]
            moment = max(moment, self._opens_at + max(behind, default=0.0))
        return moment

    def seconds_of(self, amounts: Sequence[float]) -> float:
        """How long the rates take to give so much."""
        paces = [amounts[pace.name] * pace.interval for pace in self._rates.paces]
        return max(paces + [amounts[q.name] * q.seconds / q.units for q in self._rates.quotas], default=0.0)

    def _closed_until(self) -> float:
        # Of a long pause the gate knows a part only.
        return max(self._opens_at, self._ledger.paused_until)

    def _notice(self, now: float) -> bool:
        """Whether somebody finds that the first in line could go on."""
        if not self.may_open(now):
            return False
        if self._noticed_at == -math.inf:
            self._noticed_at = now
        return True

    def _before(self, spot: _Spot) -> int:
        """How many it has to let go first, as far as that matters."""
        before = 0
        for other in self._spots:
            if other is spot or before == _MOST_GRACES:
                break
            before += not (other.is_passed or other.turn.has_left)
        return before

    # Without the lock

    def _rouse_all(self) -> None:
        """Let all look again, at once: some may not want to wait for so long."""
        with self.lock:
            spots = list(self._spots)
            self._opens_at = self._noticed_at = -math.inf
            if spots and not self.is_shared:
                self._opens_at = self._ledger.opens_at(clock.now(), spots[0].amounts)
        for spot in spots:
            _rouse(spot)

    def rouse_first(self) -> None:
        """Let the first look again, at once, and those who may look in its place.

        Nobody else may be told by the garbage collector, in a thread that holds the lock: then they find out later.
        """
        if not self.lock.acquire(timeout=_GRACE):
            return
        try:
            self._opens_at = self._noticed_at = -math.inf
            spots = list(itertools.islice(self._spots, _MOST_GRACES + 1))
        finally:
            self.lock.release()
        for spot in spots:
            _rouse(spot)

    def ask(self, request: Request) -> Generator[Any, Any, float | None]:
        """The gate's answer; None if it failed."""
        if self._gate is None:
            assert self._open_gate is not None  # noqa: S101 - for the type checkers
            self._gate = self._open_gate(self._rates)
        gate = self._gate
        (answer,) = gate.perform([request]) if gate.is_instant else [(yield Consult(gate, request))]
        self._is_known_elsewhere = not isinstance(answer, Exception)
        if isinstance(answer, Exception):
            self._complaints.tell(answer)
            return None
        seconds: float = answer
        return seconds

    def ask_for(self, spot: _Spot) -> Generator[Any, Any, float | None]:
        """Ask the gate for a slot."""
        now, changes = clock.now(), self._changes
        if spot.refused_at is None:
            spot.refused_at = now
        claims = spot.refusals >= _REFUSALS and now - spot.refused_at >= _REFUSED_SECONDS
        request = Request(spot.amounts, waited=self.waited(spot, now), who=self._name, claims=claims)
        wait = yield from self.ask(request)
        if wait:
            spot.refusals += 1
            with self.lock:
                self.refused(wait, changes)
        return wait


def try_to_take(wants: Sequence[tuple[Line, Sequence[float]]]) -> Generator[Any, Any, bool]:
    """Take a slot of each line if all are free and nobody waits."""
    shared = [line for line, _ in wants if line.is_shared]
    if not shared and len(wants) == 1:
        line, amounts = wants[0]
        return line.take_now(amounts)
    turn, now = Turn(wants), clock.now()
    if any(line.first() is not None or not line.may_open(now) for line, _ in wants):
        return False
    yield from turn.ask()
    return turn.taken


def take(wants: Sequence[tuple[Line, Sequence[float]]], latest: Latest | None = None) -> Generator[Any, Any, bool]:
    """Wait for a slot of each line; False, at once, if they would not come before what ``latest`` says."""
    if len(wants) == 1 and not wants[0][0].is_shared and wants[0][0].take_now(wants[0][1]):
        return True
    turn = Turn(wants, latest)
    try:
        while True:
            if not turn.poll():
                yield Await(turn, is_turn=True)
            if turn.asks:
                # The gate has to be asked, which a look must not do.
                turn.asks = False
                yield from turn.ask()
            if turn.taken or turn.is_late:
                return turn.taken
    finally:
        turn.leave()


class _Spot:
    """Where a turn stands in one line.

    Attributes:
        is_passed: Others need not wait for it: it did not look when it could have gone on, or waits for another limit.
        starts_before: How many had started when it came.
        refused_at: Since when it asks the gate of a shared limit; None before.
        refusals: How often that had no slot for it.
    """

    __slots__ = ("amounts", "is_passed", "line", "refusals", "refused_at", "starts_before", "turn")

    def __init__(self, turn: Turn, line: Line, amounts: Sequence[float]) -> None:
        self.turn = turn
        self.line = line
        self.amounts = amounts
        self.is_passed = False
        self.starts_before = line.starts
        self.refused_at: float | None = None
        self.refusals = 0


class Turn:
    """A caller who waits for a slot of each of some lines.

    An `opero.core.steps.Arrival` of these slots, or of the news that they would come too late.

    Attributes:
        taken: It has its slots.
        is_late: They would come too late.
        asks: It may ask the gates of shared limits.
        joined_at: Since when it is in line; None before.
        has_left: It waits no more.
    """

    __slots__ = ("_due", "_latest", "_locks", "_spots", "_wake", "asks", "has_left", "is_late", "joined_at", "taken")

    def __init__(self, wants: Sequence[tuple[Line, Sequence[float]]], latest: Latest | None = None) -> None:
        self._spots = [_Spot(self, line, amounts) for line, amounts in wants]
        # All take several locks in one order.
        self._locks = sorted([line for line, _ in wants], key=id)
        self._latest = latest
        # When to look again, if nothing is heard before.
        self._due = math.inf
        self._wake: Callable[[], None] | None = None
        self.joined_at: float | None = None
        self.taken = self.is_late = self.asks = self.has_left = False

    @property
    def has_news(self) -> bool:
        return self.taken or self.is_late or self.asks

    def poll(self) -> bool:
        if self.has_news or self.has_left:
            return self.has_news
        with self._locked():
            next_ones = self._look(clock.now())
        for spot in next_ones:
            _rouse(spot)
        return self.has_news

    def _locked(self) -> ExitStack | threading.Lock:
        if len(self._locks) == 1:
            return self._locks[0].lock
        with ExitStack() as stack:
            for line in self._locks:
                stack.enter_context(line.lock)
            return stack.pop_all()

    def _look(self, now: float) -> Iterable[_Spot | None]:
        """Go on, if it may; gives who may look after that."""
        if self.joined_at is None:
            self.joined_at = now
            for spot in self._spots:
                spot.line.join(spot)
        if self._latest is not None and self.joined_at < now and now >= self._latest():
            # It has waited, and others can still use the slot.
            self.is_late = True
            return ()
        self._due = self._find_due(now)
        if self._due <= now + EARLY:
            if any(spot.line.is_shared for spot in self._spots):
                self.asks = True
                return ()
            return self._start(now)
        if self._latest is not None:
            self._find_out_whether_late(now)
        # Whoever looks, and finds that the first could go on, tells it.
        firsts = [spot.line.first() for spot in self._spots if spot.line.may_open(now)]
        return [first for first in firsts if first is not None and first.turn is not self] if firsts else ()

    def _find_due(self, now: float) -> float:
        """When to look again, if nothing is heard before; not after ``now``: all its slots have come."""
        for spot in self._spots:
            spot.is_passed = False
        moments = [spot.line.due(spot, now) for spot in self._spots]
        due = max(moments)
        for spot, moment in zip(self._spots, moments, strict=True):
            unused = due - max(moment, now)
            if unused <= 0:
                continue
            # Others use what would pass unused while it waits for another limit. So many may pass it for each slot that
            # it then lets pass unused.
            slots = min((spot.line.starts - spot.starts_before) // _PASSES, _MOST_HELD)
            spot.is_passed = unused > EARLY + slots * spot.line.seconds_of(spot.amounts)
            if spot.line.first() is spot:
                spot.line.hold(due)
        return due

    def _start(self, now: float) -> Iterable[_Spot | None]:
        self.taken = True
        for spot in self._spots:
            spot.line.start(spot, now)
        return [spot.line.first() for spot in self._spots]

    def _find_out_whether_late(self, now: float) -> None:
        assert self._latest is not None  # noqa: S101 - for the type checkers
        starts = [spot.line.expected_start(spot, spot.amounts, now) for spot in self._spots]
        self.is_late = max(starts) >= self._latest()

    def ask(self) -> Generator[Any, Any, None]:
        """Ask the gates of shared limits; what one of them gives goes back if another one has nothing to give."""
        given: list[_Spot] = []
        alone = [spot for spot in self._spots if not spot.line.is_shared]
        is_refused = False
        for spot in sorted(self._spots, key=lambda spot: spot.line.opens_at, reverse=True):
            if spot in alone:
                continue
            wait = yield from spot.line.ask_for(spot)
            if wait:
                is_refused = True
                break
            # A gate that failed leaves it to this process.
            (alone if wait is None else given).append(spot)
        next_ones: Iterable[_Spot | None] = ()
        with self._locked():
            now = clock.now()
            if not is_refused and not max([spot.line.wait_alone(spot, now) for spot in alone], default=0.0):
                next_ones = self._start(now)
            elif self._latest is not None:
                self._find_out_whether_late(now)
        for first in next_ones:
            _rouse(first)
        for spot in () if self.taken else given:
            yield from spot.line.ask(Request([-amount for amount in spot.amounts], takes=False))

    def due_in(self) -> float | None:
        if self.has_news:
            return 0.0
        # Of what opens at no known time, the first are told; the others look now and then.
        wait = min(self._due - clock.now(), _LONGEST_NAP if self._due == math.inf else math.inf)
        return max(0.0, wait if self._latest is None else min(wait, self._latest() - clock.now()))

    def notify(self, wake: Callable[[], None] | None) -> None:
        self._wake = wake

    def rouse(self) -> None:
        wake = self._wake
        if wake is not None:
            wake()

    def withdraw(self) -> None:
        """It may have to go on asking; `leave` comes after that."""

    def leave(self) -> None:
        """It has its slots, or wants none any more.

        The garbage collector may say so, in a thread that holds a lock: then those who wait find out by themselves.
        """
        if self.joined_at is None or self.taken:
            return
        self.has_left = True
        for spot in self._spots:
            if not spot.line.lock.acquire(timeout=_GRACE):
                continue
            try:
                spot.line.leave(spot)
                first = spot.line.first()
            finally:
                spot.line.lock.release()
            _rouse(first)


def _rouse(spot: _Spot | None) -> None:
    if spot is not None:
        spot.turn.rouse()
