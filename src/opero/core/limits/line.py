"""Lines of callers who wait for limits, first come, first served, and what lets the first of each go on.

A call takes what it needs of all its limits at one moment (`take`): its `Turn` stands in the line of each.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from opero.core.clock import clock
from opero.core.faults import Complaints
from opero.core.forks import ForkSafeLock, watch_forks
from opero.core.limits.ledger import EARLY, LONGEST_PAUSE, Ledger
from opero.core.limits.local import LocalLedger
from opero.core.steps import Consult

if TYPE_CHECKING:
    from collections.abc import Generator

    from opero.core.limits.rates import Rates

# One further back may go on this much later for each place: those before it, in a thread or loop that is kept from
# running, may not be able to.
_GRACE = 0.05
_MOST_GRACES = 5
_LONGEST_NAP = 1.0
# And it looks so much more seldom for each that is before those.
_NAP_FOR_EACH, _LONGEST_FAR_BACK = 0.005, 5.0
# Who waits for another limit lets so many others pass for each slot for which it holds them up, up to a few slots.
_PASSES, _MOST_HELD = 20, 5
# So long is believed what a gate has told with a slot of when the next one comes.
_LONGEST_TRUST = 0.05
# Others were faster for so long: then the first of this process claims the next slot.
_REFUSED_SECONDS = 0.1
ONE = (1.0,)

# When a slot would be too late to be of use, as far as is known now.
Latest = Callable[[], float]
# Told, by whom, what to call when that may have changed; None: nothing any more.
Listen = Callable[[object, Callable[[], None] | None], None]


def never() -> float:
    return math.inf


# The lines that a call stands in, and what it takes of each.
Wants = Sequence[tuple["Line", Sequence[float]]]

# One for all lines, since a turn may stand in several. The garbage collector, or a signal handler, may use a line in a
# thread that has it.
lines = ForkSafeLock(threading.RLock)


class Request(NamedTuple):
    """Asked of a gate: to do something with the ledger of these rates.

    ``act`` is given the time there, and gives 0 or None if it has changed the ledger, or seconds until a slot comes.
    """

    rates: Rates
    act: Callable[[Ledger, float], float | None]


class Gate(Protocol):
    """A limit that processes share. ``is_instant``: asking blocks for no longer than microseconds."""

    is_instant: bool

    def perform(self, requests: Sequence[Request]) -> list[Any]:
        """For each: 0 if it was done, seconds until a slot comes, or the exception that prevents it."""
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
        open_gate: Callable[[], Gate] | None = None,
        what: str = "",
        *,
        ledger: Ledger | None = None,
    ) -> None:
        self._set(rates)
        self._open_gate = open_gate
        self._gate: Gate | None = None
        self._complaints = Complaints(what, "going on with a limit of this process alone")
        self._is_known_elsewhere = False
        # How many have started.
        self.starts = 0
        self._ledger = LocalLedger(rates) if ledger is None else ledger
        self._spots: dict[_Spot, None] = {}
        # Of these, in the order in which they came, those that others do not pass; and those that are to be forgotten.
        self._ready: list[_Spot] = []
        self._left: deque[_Spot] = deque()
        self._joined = 0
        self.after_fork()
        watch_forks(self)

    def _set(self, rates: Rates) -> None:
        self._rates = rates
        # Of the only pace; 0 where there is more to look at.
        self._interval = rates.paces[0].interval if len(rates.paces) == 1 and not rates.quotas else 0.0

    def after_fork(self) -> None:
        """Forget the parent's callers, and what they took."""
        self._spots.clear()
        self._ready.clear()
        self._left.clear()
        self._wanted = [0.0] * len(self._rates.names)
        self._ledger.forget()
        # When the first may ask (again), as far as is known; when one who is not the first found that it could have.
        self.opens_at, self._noticed_at = -math.inf, math.inf
        # Who comes before that, just after others that had waited, has missed slots, too, while it could not look.
        self._made_up_until = -math.inf
        # How long after a slot of a gate the next one comes.
        self._next_wait = -math.inf
        # By this the processes that share a limit tell each other apart.
        self._name = random.SystemRandom().random()

    def __len__(self) -> int:
        with lines.lock:
            self._forget_those_who_left()
            return len(self._spots)

    @property
    def is_shared(self) -> bool:
        """Whether somebody outside of this process has to be asked."""
        return self._open_gate is not None and not clock.is_virtual

    # Asked by whoever wants to start

    def take_now(self, amounts: Sequence[float] = ONE) -> bool:
        """Take a slot if one is free and nobody waits; only where nobody outside has to be asked."""
        with lines.lock:
            now = clock.now()
            first = self.first() if self._spots else None
            if first is None:
                ledger, late, made_up_until = self._ledger, now + EARLY, self._made_up_until
                if amounts is ONE and self._interval and now > made_up_until:
                    # As below, in half the time.
                    if late < ledger.free_at[0] or late < ledger.paused_until:
                        return False
                    ledger.free_at[0] = now + self._interval
                    return True
                if not ledger.is_open(now, amounts):
                    return False
                ledger.take(now, 0.0 if now > made_up_until else math.inf, amounts)
                return True
            if not self.may_open(now):
                return False
            self._noticed_at = min(self._noticed_at, now)
        first.turn.rouse()
        return False

    def take(self, amounts: Sequence[float] = ONE, latest: Latest | None = None) -> Generator[Any, Any, bool]:
        """As `take`, of this line alone."""
        return take([(self, amounts)], latest or never)

    def correct(self, amounts: Sequence[float]) -> Generator[Any, Any, None]:
        """A call has cost so much more than it took, or less."""
        with lines.lock:
            self._ledger.correct(clock.now(), amounts)
        if self.is_shared:
            yield from self.ask(lambda ledger, now: ledger.correct(now, amounts))
        self.rouse_first()

    def pause(self, seconds: float) -> Generator[Any, Any, None]:
        """Let nothing start for so long."""
        with lines.lock:
            self._ledger.pause(clock.now() + seconds)
        self._rouse_all()
        if self.is_shared:
            yield from self.ask(lambda ledger, now: ledger.pause(now + min(seconds, LONGEST_PAUSE)))

    def expected_wait(self, amounts: Sequence[float] = ONE) -> float:
        """Seconds until a slot that is asked for now would come, as far as this process knows."""
        with lines.lock:
            now = clock.now()
            return max(0.0, self.expected_start(None, amounts, now) - now)

    def change(self, rates: Rates) -> None:
        """Go on at other rates; those who wait keep their places."""
        with lines.lock:
            self._set(rates)
            self._ledger.change(clock.now(), rates)
            self._made_up_until = -math.inf
        self._rouse_all()

    def is_idle(self) -> bool:
        """Whether a new line would not behave any differently; of what processes share, the gate knows more."""
        now = clock.now()
        return not self._spots and (self._is_known_elsewhere or self._ledger.idle_from(now) <= now)

    # Asked by a turn that holds the lock

    def join(self, spot: _Spot) -> None:
        self._joined += 1
        spot.number = self._joined
        self._spots[spot] = None
        self._ready.append(spot)
        self._want(spot.amounts)

    def _want(self, amounts: Sequence[float], sign: int = 1) -> None:
        # One by one: the garbage collector may let others leave meanwhile.
        for place, amount in enumerate(amounts):
            self._wanted[place] += sign * amount

    def keep_place(self, spot: _Spot) -> None:
        """Nobody passes it any more."""
        if spot.is_passed and spot in self._spots:
            insort(self._ready, spot, key=_number)
        spot.is_passed = False

    def let_pass(self, spot: _Spot) -> None:
        """Others need not wait for it."""
        spot.is_passed = True
        place = self._place(spot)
        if place < len(self._ready) and self._ready[place] is spot:
            del self._ready[place]

    def _place(self, spot: _Spot) -> int:
        """How many may go on before it."""
        return bisect_left(self._ready, spot.number, key=_number)

    def due(self, spot: _Spot, now: float) -> float:
        """When to look again; not after ``now``: it may take its slot, or ask the gate of a shared limit for it."""
        self._forget_those_who_left()
        before = self._place(spot)
        # Far back it looks seldom: thousands that look again and again would keep their event loop from all else.
        far = min(max(0, before - _MOST_GRACES) * _NAP_FOR_EACH, _LONGEST_FAR_BACK)
        later = min(before, _MOST_GRACES) * _GRACE + far
        if not self.may_open(now):
            return self._closed_until + later
        if before:
            self._noticed_at = min(self._noticed_at, now)
            if now < self._noticed_at + later:
                return self._noticed_at + later
            # Those before it have not looked in time.
            for other in self._ready[:before]:
                other.is_passed = True
            del self._ready[: self._place(spot)]
        return now if self.is_shared else now + self.wait_alone(spot, now)

    def wait_alone(self, spot: _Spot, now: float) -> float:
        """Seconds until this process alone would give it a slot."""
        if self._ledger.is_open(now, spot.amounts):
            return 0.0
        wait = self._ledger.wait(now, spot.amounts)
        self.close_until(now + wait)
        return wait

    def close_until(self, moment: float) -> None:
        """The first may not ask again before that."""
        self.opens_at, self._noticed_at = moment, math.inf

    @property
    def _closed_until(self) -> float:
        # Of a long pause the gate knows a part only.
        return max(self.opens_at, self._ledger.paused_until)

    def may_open(self, now: float) -> bool:
        """Whether the first may ask, as far as is known."""
        return now + EARLY >= self._closed_until

    def start(self, spot: _Spot, now: float) -> None:
        """It takes its slot, and leaves."""
        self.starts += 1
        self._ledger.take(now, self.waited(spot, now), spot.amounts)
        joined_at = spot.turn.joined_at
        if joined_at is not None:
            if now > joined_at:
                self._made_up_until = now + max([pace.tolerance for pace in self._rates.paces], default=0.0)
            self._forget(spot)
        self.close_until(now + self._next_wait)

    def first(self) -> _Spot | None:
        """Who may go on next."""
        self._forget_those_who_left()
        return self._ready[0] if self._ready else None

    def _forget_those_who_left(self) -> None:
        while self._left:
            self._forget(self._left.popleft())

    def _forget(self, spot: _Spot) -> None:
        if spot in self._spots:  # not so in a forked child, for a caller of the parent
            del self._spots[spot]
            self._want(spot.amounts, -1)
            self.let_pass(spot)

    def waited(self, spot: _Spot, now: float) -> float:
        """For how long it has missed slots."""
        if now <= self._made_up_until:
            return math.inf
        return 0.0 if spot.turn.joined_at is None else now - max(spot.turn.joined_at, min(self.opens_at, now))

    def expected_start(self, spot: _Spot | None, amounts: Sequence[float], now: float) -> float:
        """When a call that costs so much will start, after those that wait before it."""
        self._forget_those_who_left()
        if spot is None or spot.number == self._joined:
            own = itertools.repeat(0.0) if spot is None else amounts
            ahead = [wanted - amount for wanted, amount in zip(self._wanted, own, strict=False)]
        else:
            ahead = [0.0] * len(self._rates.names)
            for other in itertools.takewhile(lambda other: other is not spot, self._spots):
                ahead = [total + amount for total, amount in zip(ahead, other.amounts, strict=True)]
        moment = max(now, self._ledger.opens_at(now, amounts, ahead))
        if self.is_shared and self.opens_at > now:
            behind = [ahead[pace.name] * pace.interval for pace in self._rates.paces]
            moment = max(moment, self.opens_at + max(behind, default=0.0))
        return moment

    def seconds_of(self, amounts: Sequence[float]) -> float:
        """How long the rates take to give so much."""
        paces = [amounts[pace.name] * pace.interval for pace in self._rates.paces]
        return max(paces + [amounts[q.name] * q.seconds / q.units for q in self._rates.quotas], default=0.0)

    # Without the lock

    def _rouse_all(self) -> None:
        """Let all look again, at once: some may not want to wait for so long."""
        with lines.lock:
            spots = list(self._spots)
            is_known = bool(spots) and not self.is_shared
            self.close_until(self._ledger.opens_at(clock.now(), spots[0].amounts) if is_known else -math.inf)
        for spot in spots:
            spot.turn.rouse()

    def leave(self, spot: _Spot) -> None:
        """It is forgotten later: the garbage collector may say so while the line is being changed."""
        self._left.append(spot)
        self.rouse_first()

    def rouse_first(self) -> None:
        """Let the first look again, at once."""
        with lines.lock:
            self.close_until(-math.inf)
            first = self.first()
        if first is not None:
            first.turn.rouse()

    def ask(self, act: Callable[[Ledger, float], float | None]) -> Generator[Any, Any, float | None]:
        """The gate's answer; None if it failed."""
        if self._gate is None:
            assert self._open_gate is not None  # noqa: S101 - for the type checkers
            self._gate = self._open_gate()
        gate, request = self._gate, Request(self._rates, act)
        (answer,) = gate.perform([request]) if gate.is_instant else [(yield Consult(gate, request))]
        self._is_known_elsewhere = not isinstance(answer, Exception)
        if isinstance(answer, Exception):
            self._complaints.tell(answer)
            return None
        seconds: float = answer
        return seconds

    def ask_for(self, spot: _Spot) -> Generator[Any, Any, float | None]:
        """Ask the gate for a slot."""
        now, rates, amounts = clock.now(), self._rates, spot.amounts
        waited, who = self.waited(spot, now), self._name
        claims = now - spot.asked_since >= _REFUSED_SECONDS
        spot.asked_since = min(spot.asked_since, now)
        next_wait = 0.0

        def act(ledger: Ledger, now: float) -> float:
            nonlocal next_wait
            wait = ledger.ask(now, waited, amounts, who, claims=claims)
            next_wait = min(ledger.opens_at(now, amounts) - now, _LONGEST_TRUST)
            return wait

        wait = yield from self.ask(act)
        with lines.lock:
            self._next_wait = 0.0 if wait is None else next_wait
            if wait and rates is self._rates:
                self.close_until(clock.now() + wait)
        return wait


def take(
    wants: Wants, latest: Latest = never, listen: Listen | None = None, *, is_turn: bool = True
) -> Generator[Any, Any, bool]:
    """Wait for a slot of each line; False, at once, if they would not come before what ``latest`` says.

    Slots that are free are taken however late it is. ``listen`` is told whom to wake when ``latest`` may say something
    else; ``is_turn`` is of `opero.core.steps.Arrival`.
    """
    turn = Turn(wants, latest, listen, is_turn=is_turn)
    try:
        while True:
            if not turn.poll():
                yield turn
            if not turn.asks:
                return turn.taken
            # The gate has to be asked, which a look must not do.
            yield from turn.ask()
    finally:
        turn.leave()


def _give_back(amounts: Sequence[float], ledger: Ledger, now: float) -> None:
    ledger.correct(now, [-amount for amount in amounts])


class _Spot:
    """Where a turn stands in one line.

    Attributes:
        is_passed: Others need not wait for it: it did not look when it could have gone on, or waits for another limit.
        number: Its place among all that came.
        starts_before: How many had started when it came.
        asked_since: When it has first asked the gate of a shared limit.
    """

    __slots__ = ("amounts", "asked_since", "is_passed", "line", "number", "starts_before", "turn")

    def __init__(self, turn: Turn, line: Line, amounts: Sequence[float]) -> None:
        self.turn = turn
        self.line = line
        self.amounts = amounts
        self.is_passed = False
        self.number = 0
        self.starts_before = line.starts
        self.asked_since = math.inf


_number = attrgetter("number")


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

    __slots__ = (
        "_due",
        "_latest",
        "_listen",
        "_spots",
        "_wake",
        "asks",
        "has_left",
        "is_late",
        "is_turn",
        "joined_at",
        "taken",
    )

    def __init__(
        self, wants: Wants, latest: Latest = never, listen: Listen | None = None, *, is_turn: bool = True
    ) -> None:
        self._spots = [_Spot(self, line, amounts) for line, amounts in wants]
        self._latest = latest
        self._listen = listen
        self.is_turn = is_turn
        # When to look again, if nothing is heard before.
        self._due = math.inf
        self._wake: Callable[[], None] | None = None
        self.joined_at: float | None = None
        self.taken = self.is_late = self.asks = self.has_left = False

    @property
    def has_news(self) -> bool:
        return self.taken or self.is_late or self.asks

    def poll(self) -> bool:
        if not (self.has_news or self.has_left):
            with lines.lock:
                self._look(clock.now())
            self._rouse_others()
        return self.has_news

    def _look(self, now: float) -> None:
        """Go on, if it may."""
        if self.joined_at is None:
            self.joined_at = now
            for spot in self._spots:
                spot.line.join(spot)
        elif now >= self._latest():
            # It has waited, and others can still use the slot.
            self.is_late = True
            return
        self._due = self._find_due(now)
        if self._due > now + EARLY:
            self._find_out_whether_late(now)
        elif any(spot.line.is_shared for spot in self._spots):
            self.asks = True
        else:
            self._start(now)

    def _find_due(self, now: float) -> float:
        """When to look again, if nothing is heard before; not after ``now``: all its slots have come."""
        for spot in self._spots:
            spot.line.keep_place(spot)
        moments = [spot.line.due(spot, now) for spot in self._spots]
        due = max(moments)
        for spot, moment in zip(self._spots, moments, strict=True):
            unused = due - max(moment, now)
            if unused <= 0:
                continue
            # Others use what would pass unused while it waits for another limit. So many may pass it for each slot that
            # it then lets pass unused.
            slots = min((spot.line.starts - spot.starts_before) // _PASSES, _MOST_HELD)
            if unused > EARLY + slots * spot.line.seconds_of(spot.amounts):
                spot.line.let_pass(spot)
            if spot.line.first() is spot:
                # It lets nobody else go on meanwhile.
                spot.line.close_until(max(due, spot.line.opens_at))
        return due

    def _start(self, now: float) -> None:
        self.taken = True
        for spot in self._spots:
            spot.line.start(spot, now)

    def _find_out_whether_late(self, now: float) -> None:
        latest = self._latest()
        if latest < math.inf:
            starts = [spot.line.expected_start(spot, spot.amounts, now) for spot in self._spots]
            self.is_late = max(starts) >= latest

    def _rouse_others(self) -> None:
        """Let the first ones look that may go on, after this one or as it has found out."""
        with lines.lock:
            now = clock.now()
            firsts = [spot.line.first() for spot in self._spots if spot.line.may_open(now)]
        for first in firsts:
            if first is not None and first.turn is not self:
                first.turn.rouse()

    def ask(self) -> Generator[Any, Any, None]:
        """Ask the gates of shared limits; what one of them gives goes back if another one has nothing to give."""
        self.asks = False
        alone = [spot for spot in self._spots if not spot.line.is_shared]
        shared = [spot for spot in self._spots if spot not in alone]
        given: list[_Spot] = []
        wait: float | None = None
        for spot in sorted(shared, key=lambda spot: spot.line.opens_at, reverse=True):
            wait = yield from spot.line.ask_for(spot)
            if wait:
                break
            # A gate that failed leaves it to this process.
            (alone if wait is None else given).append(spot)
        with lines.lock:
            now = clock.now()
            if wait or any(spot.line.wait_alone(spot, now) for spot in alone):
                self._find_out_whether_late(now)
            else:
                self._start(now)
        self._rouse_others()
        for spot in () if self.taken else given:
            yield from spot.line.ask(partial(_give_back, spot.amounts))

    def due_in(self) -> float | None:
        if self.has_news:
            return 0.0
        # Of what opens at no known time, the first are told; the others look now and then.
        now = clock.now()
        due = now + _LONGEST_NAP if self._due == math.inf else self._due
        return max(0.0, min(due, self._latest()) - now)

    def notify(self, wake: Callable[[], None] | None) -> None:
        self._wake = wake
        if self._listen is not None:
            self._listen(self, wake)

    def rouse(self) -> None:
        wake = self._wake
        if wake is not None:
            wake()

    def leave(self) -> None:
        """It has its slots, or wants none any more; the garbage collector may say so, too."""
        # What these hold, a call and its errors, is not to wait for the garbage collector with the turn and its spots.
        self._latest, self._listen = never, None
        if self.joined_at is None or self.taken or self.has_left:
            return
        self.has_left = True
        for spot in self._spots:
            spot.line.leave(spot)
