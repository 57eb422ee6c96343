"""Lines of callers who wait for limits, first come, first served.

A call takes what it needs of all its limits at one moment (`take`): its `Turn` stands in the line of each. Whoever
looks takes its slots, if all have come and nobody is before it; no slot is granted ahead of its time.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import threading
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakSet

from opero.core.clock import clock
from opero.core.forks import ForkSafeLock, watch_forks
from opero.core.keys import identity_of
from opero.core.limits.ledger import LONGEST_PAUSE, Ledger
from opero.core.limits.rates import EARLY

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from opero.core.limits.gates import Gate
    from opero.core.limits.rates import Rates

# One further back may go on this much later for each place: those before it, in a thread or loop that is kept from
# running, may not be able to.
_GRACE, _MOST_GRACES = 0.05, 5
# The first in line lets so much of its time pass unused in one limit while it waits for another; others use the rest.
_UNUSED = 0.05
# Of what opens at no known time the first is told; so often the others look whether it has listened.
_LONGEST_NAP = 1.0
ONE = (1.0,)

# Other processes were faster for so long: then the first of this one claims the next slot.
_REFUSED_SECONDS = 0.1
# By this and their numbers processes tell each other apart, on whatever machines they run.
_ORIGIN = random.SystemRandom().random()

# When a slot would be too late to be of use, as far as is known now.
Latest = Callable[[], float]
# The lines that a call stands in, and what it takes of each.
Wants = Sequence[tuple["Line", Sequence[float]]]

# One for all lines, since a turn may stand in several. The garbage collector, or a signal handler, may use a line in a
# thread that has it.
lines = ForkSafeLock(threading.RLock)
# Those in which somebody waits.
_waited_in: WeakSet[Line] = WeakSet()
_numbers = itertools.count()


def never() -> float:
    return math.inf


class Line:
    """Those who wait for one limit, in this process.

    Args:
        ledger: What lets callers go on in this process.
        gate: Of the same limit as other processes have it, if they do.
    """

    def __init__(self, ledger: Ledger, gate: Gate | None = None) -> None:
        self.ledger = ledger
        self.gate = gate
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """Forget the parent's callers, and what they took."""
        # In the order in which they came, each by its number; and those that are to be forgotten.
        self.waiting: list[tuple[int, Turn, Sequence[float]]] = []
        self.left: deque[Turn] = deque()
        # What all in line take together.
        self._wanted = [0.0] * len(self.ledger.rates.names)
        self.ledger.forget()
        # When the first may ask (again), as far as is known; when one who is not the first found that it could have.
        self.opens_at, self._noticed_at = -math.inf, math.inf
        # Since when, and until when, a limit that processes share had no slot, as was said last.
        self._refused_since, self._refused_until = math.inf, -math.inf
        # Whether its gate has answered last: what was taken is known there.
        self._is_known_elsewhere = False
        # Until when whoever comes may make up for missed slots, as those that have waited may: one who calls again and
        # again has missed them while it ran.
        self._made_up_until = -math.inf

    def another(self, gate: Gate | None) -> Line:
        """One of the same rates, as for one more value; paused if this one is."""
        line = Line(Ledger(self.ledger.rates), gate)
        line.ledger.pause(self.ledger.paused_until)
        return line

    # Asked by whoever wants to start

    def take_now(self, amounts: Sequence[float] = ONE, *_call: Any) -> bool:
        """Take a slot if one is free and nobody waits; only where nobody outside has to be asked."""
        with lines.lock:
            if self.waiting and self.first() is not None:
                return False
            now, ledger = clock.now(), self.ledger
            is_late, pace = now <= self._made_up_until, ledger.only_pace
            if pace is not None and amounts is ONE and not is_late:
                # As below, in half the time.
                is_open = now + EARLY >= pace.free_at
                if is_open:
                    pace.free_at = now + pace.interval
                return is_open
            is_open = ledger.is_open(now, amounts)
            if is_open:
                ledger.take(now, amounts, is_late=is_late)
            return is_open

    def correct(self, amounts: Sequence[float]) -> Generator[Any, Any, None]:
        """A call has cost so much more than it took, or less."""
        with lines.lock:
            self.ledger.take(clock.now(), amounts)
            self._refused_until = -math.inf
        yield from self.tell(partial(Ledger.take, amounts=amounts))
        self.rouse_first(anew=True)

    def pause(self, seconds: float) -> Generator[Any, Any, None]:
        """Let nothing start for so long."""
        with lines.lock:
            self.ledger.pause(clock.now() + seconds)
        self.rouse_all()
        yield from self.tell(lambda ledger, now: ledger.pause(now + min(seconds, LONGEST_PAUSE)))

    def tell(self, change: Callable[[Ledger, float], None]) -> Generator[Any, Any, None]:
        """Let those who share the limit know, too."""
        if self.gate is not None:
            yield from self.gate.ask(self.ledger.rates, change)

    def change(self, rates: Rates) -> None:
        """Go on at other rates; those who wait keep their places."""
        with lines.lock:
            self.ledger.change(clock.now(), rates)
            self._made_up_until = self._refused_until = -math.inf
        self.rouse_all()

    def expected_wait(self, amounts: Sequence[float] = ONE) -> float:
        """Seconds until a slot that is asked for now would come, as far as this process knows."""
        with lines.lock:
            self.first()
            now = clock.now()
            return self._expected_start(amounts, self._wanted, now) - now

    def _expected_start(self, amounts: Sequence[float], ahead: Sequence[float], now: float) -> float:
        """When a call will start, after others that take so much together."""
        moment = max(now, self.ledger.opens_at(now, amounts, ahead))
        if self.gate is None or self._refused_until <= now:
            return moment
        return max(moment, self._refused_until + self._seconds_of(ahead))

    def _seconds_of(self, amounts: Sequence[float]) -> float:
        """How long the paces take to give so much."""
        return max([amounts[pace.name] * pace.interval for pace in self.ledger.paces], default=0.0)

    def is_idle(self) -> bool:
        """Whether a new line would not behave any differently; of what processes share, the gate knows more."""
        now = clock.now()
        if self.waiting or self._refused_until > now:
            return False
        return self._is_known_elsewhere or self.ledger.idle_from(now) <= now

    # Asked by a turn that holds the lock

    def first(self) -> Turn | None:
        """Who may go on next."""
        while self.left:
            self.let_pass(self.left.popleft())
        return self.waiting[0][1] if self.waiting else None

    def due(self, turn: Turn, amounts: Sequence[float], now: float) -> float:
        """When to look again; not after ``now``: it may take its slot, or ask for that of a shared limit."""
        self.first()
        before = bisect_left(self.waiting, (turn.number,))
        if before == len(self.waiting) or self.waiting[before][1] is not turn:
            self.waiting.insert(before, (turn.number, turn, amounts))
            self._want(amounts, 1)
            _waited_in.add(self)
        is_open = now + EARLY >= self.opens_at
        if before:
            grace, theirs = min(before, _MOST_GRACES) * _GRACE, before * self._seconds_of(amounts)
            if not is_open:
                # Those before it are served first. Thousands that look more often keep their event loop from all else.
                return self.opens_at + theirs + grace
            self._noticed_at = min(self._noticed_at, now)
            if now < max(self._noticed_at, turn.looked_at) + grace:
                # One that comes, or was kept from looking itself, may have kept those before it from that.
                return now + min(theirs, _LONGEST_NAP) + grace
            # Those before it have not looked in time.
            for _, other, _ in self.waiting[:before]:
                self.let_pass(other)
        return now + self.wait_alone(amounts, now) if is_open else self.opens_at

    def let_pass(self, turn: Turn) -> None:
        """Others need not wait for it."""
        place = bisect_left(self.waiting, (turn.number,))
        if place < len(self.waiting) and self.waiting[place][1] is turn:
            self._want(self.waiting.pop(place)[2], -1)
            if not place:
                # When the next one may go on is not known yet.
                self.close_until(-math.inf)
            if not self.waiting:
                _waited_in.discard(self)

    def _want(self, amounts: Sequence[float], sign: int) -> None:
        # One by one: the garbage collector may let others leave meanwhile.
        for name, amount in enumerate(amounts):
            self._wanted[name] += sign * amount

    def wait_alone(self, amounts: Sequence[float], now: float) -> float:
        """Seconds until this process alone would give a slot."""
        wait = self.ledger.wait(now, amounts)
        if wait:
            self.close_until(now + wait)
        return wait

    def close_until(self, moment: float) -> None:
        """The first may not ask again before that."""
        self.opens_at, self._noticed_at = moment, math.inf

    def comes_after(self, latest: float, turn: Turn, amounts: Sequence[float], now: float) -> bool:
        """Whether its slot will come so late. Of those in the middle of the line no more is known than of the first."""
        ahead = [0.0] * len(amounts)
        if self.waiting and self.waiting[-1][1] is turn:
            ahead = [all_of_it - own for all_of_it, own in zip(self._wanted, amounts, strict=True)]
        return self._expected_start(amounts, ahead, now) >= latest

    def is_late(self, turn: Turn, now: float) -> bool:
        """Whether it may have missed slots while it could not look."""
        return turn.has_waited or now <= self._made_up_until

    def start(self, turn: Turn, amounts: Sequence[float], now: float) -> None:
        """It takes its slot, and leaves."""
        self.ledger.take(now, amounts, is_late=self.is_late(turn, now))
        if turn.has_waited:
            self._made_up_until = now + max([pace.tolerance for pace in self.ledger.paces], default=0.0)
        self.let_pass(turn)

    def ask(self, gate: Gate, turn: Turn, amounts: Sequence[float]) -> Generator[Any, Any, float | None]:
        """Ask the gate of a limit that processes share for a slot: seconds to wait, or None if it failed."""
        rates, asked, who = self.ledger.rates, clock.now(), os.getpid() + _ORIGIN
        is_late, claims = self.is_late(turn, asked), asked - self._refused_since >= _REFUSED_SECONDS
        request = partial(Ledger.ask, amounts=amounts, who=who, is_late=is_late, claims=claims)
        wait = yield from gate.ask(rates, request)
        with lines.lock:
            self._is_known_elsewhere = wait is not None
            self._refused_since = min(self._refused_since, asked) if wait else math.inf
            self._refused_until = -math.inf
            if wait and rates is self.ledger.rates:
                self._refused_until = clock.now() + wait
                self.close_until(self._refused_until)
        return wait

    # Without the lock

    def rouse_all(self) -> None:
        """Let all look again, at once: some may not want to wait for so long."""
        with lines.lock:
            waiting = list(self.waiting)
            self.close_until(-math.inf)
        for _, turn, _ in waiting:
            turn.rouse()

    def rouse_first(self, *, anew: bool = False) -> None:
        """Let the first look if it may go on, as far as is known, or in any case."""
        with lines.lock:
            if anew:
                self.close_until(-math.inf)
            first = self.first() if self.waiting and clock.now() + EARLY >= self.opens_at else None
        if first is not None:
            first.rouse()


L = TypeVar("L", bound=Line)
# Values that are their own keys, which no key of another class is equal to.
_OWN_KEYS = (str, int)


class PerValue(Generic[L]):
    """A line for each value, such as one for each API key; those that are idle are forgotten.

    Each new one looks at two others, so that no call pays for all of them.
    """

    def __init__(self, make: Callable[[Any], L]) -> None:
        self._make = make
        self._lines: OrderedDict[Any, L] = OrderedDict()
        self._lock = ForkSafeLock(threading.RLock)

    def __iter__(self) -> Iterator[L]:
        with self._lock.lock:
            return iter(list(self._lines.values()))

    def of(self, value: Any) -> L:
        """The one of this value."""
        key = value if type(value) in _OWN_KEYS else identity_of(value)
        found = self._lines.get(key)
        if found is not None:
            return found
        with self._lock.lock:
            found = self._lines.get(key)
            if found is None:
                for _ in range(min(2, len(self._lines))):
                    oldest, other = self._lines.popitem(last=False)
                    if not other.is_idle():
                        self._lines[oldest] = other
                found = self._lines[key] = self._make(value)
            return found


class Turn:
    """A caller who waits for a slot of each of some lines.

    An `opero.core.steps.Arrival` of news: that it has ``"taken"`` its slots, that it ``"asks"`` for those of limits
    that processes share, that it is ``"late"``, since they would come too late, or that one of the lines is ``"full"``.

    Attributes:
        news: One of these, or nothing yet.
        has_waited: It has found no slot before.
        number: Its place among all that came; below 0 before that.
    """

    def __init__(
        self, wants: Wants, latest: Latest = never, untils: Sequence[float] = (), *, is_turn: bool = True
    ) -> None:
        # Nothing once it has left.
        self._wants = wants
        self._latest = latest
        self._untils = untils
        self.is_turn = is_turn
        # When to look again, if nothing is heard before; since when it is the first everywhere.
        self._due = self._first_since = math.inf
        # When it looked last.
        self.looked_at = math.inf
        self._wake: Callable[[], None] | None = None
        self.news = ""
        self.has_waited = False
        self.number = -1

    def poll(self) -> bool:
        wants = self._wants
        if wants and not self.news:
            with lines.lock:
                self._look(clock.now())
            for line, _ in wants:
                line.rouse_first()
        return bool(self.news)

    def _look(self, now: float) -> None:
        """Go on, if it may."""
        if self.number < 0:
            self.number = next(_numbers)
        elif now >= self._latest():
            # It has waited, and others can still use the slot.
            self.news = "late"
            return
        moments = [line.due(self, amounts, now) for line, amounts in self._wants]
        self._due, self.looked_at = max(moments), now
        if self._due <= now + EARLY:
            if any(line.gate is not None for line, _ in self._wants):
                self.news = "asks"
            else:
                self._start(now)
            return
        if len(moments) > 1:
            self._let_others_pass(moments, now)
        self.has_waited = True
        latest = self._latest()
        for until, moment, (line, amounts) in zip(self._untils, moments, self._wants, strict=False):
            is_bound = until <= max(latest, now) and moment > now + EARLY
            if is_bound and (until <= now or line.comes_after(until, self, amounts, now)):
                self.news = "full"
                return
        if latest < math.inf and any(line.comes_after(latest, self, amounts, now) for line, amounts in self._wants):
            self.news = "late"

    def _let_others_pass(self, moments: Sequence[float], now: float) -> None:
        """Others use what would pass unused while it waits for another limit, unless they have done so for long."""
        if all(line.first() is self for line, _ in self._wants):
            self._first_since = min(self._first_since, now)
        unused = EARLY + max(0.0, now - self._first_since) * _UNUSED
        for (line, _), moment in zip(self._wants, moments, strict=True):
            if self._due - max(moment, now) > unused:
                line.let_pass(self)
            elif line.first() is self:
                # It lets nobody else go on meanwhile.
                line.close_until(max(self._due, line.opens_at))

    def _start(self, now: float) -> None:
        self.news = "taken"
        for line, amounts in self._wants:
            line.start(self, amounts, now)

    def ask(self) -> Generator[Any, Any, None]:
        """Ask the gates of shared limits; what one of them gives goes back if another one has nothing to give."""
        self.news = ""
        wants, given = self._wants, list[tuple[Line, Sequence[float]]]()
        wait: float | None = None
        for line, amounts in wants:
            if line.gate is not None and not wait:
                wait = yield from line.ask(line.gate, self, amounts)
                # A gate that failed leaves it to this process.
                given += [(line, amounts)] if wait == 0 else []
        with lines.lock:
            now = clock.now()
            if not wait and not any(line.wait_alone(amounts, now) for line, amounts in wants):
                self._start(now)
                given.clear()
        for line, amounts in given:
            yield from line.tell(partial(Ledger.take, amounts=[-amount for amount in amounts]))

    def due_in(self) -> float | None:
        if self.news:
            return 0.0
        now = clock.now()
        due = now + _LONGEST_NAP if self._due == math.inf else self._due
        untils = [until for until in self._untils if until > now]
        return max(0.0, min(due, self._latest(), *untils) - now)

    def notify(self, wake: Callable[[], None] | None) -> None:
        self._wake = wake

    def rouse(self) -> None:
        wake = self._wake
        if wake is not None:
            wake()

    def leave(self) -> None:
        """It has its slots, or wants none any more; the garbage collector may say so, too."""
        wants, self._wants = self._wants, ()
        # What it holds, a call and its errors, is not to wait for the garbage collector with the turn.
        self._latest = never
        if self.number < 0:
            return
        is_served = self.news == "taken"
        for line, _ in wants:
            if not is_served:
                # It is forgotten later: this may be in the middle of a change of the line.
                line.left.append(self)
            line.rouse_first(anew=not is_served)


def rouse_all() -> None:
    """Let all who wait in this process look again: it may be of no use any more."""
    with lines.lock:
        waited_in = list(_waited_in)
    for line in waited_in:
        line.rouse_all()


def take(
    wants: Wants, latest: Latest = never, untils: Sequence[float] = (), *, is_turn: bool = True
) -> Generator[Any, Any, bool | None]:
    """Wait for a slot of each line; False, at once, if they would not come before what ``latest`` says.

    None, at once, if that of a line would not come until the moment among ``untils``, which is said of each line.
    Slots that are free are taken however late it is. Who changes what ``latest`` says calls `rouse_all`. ``is_turn`` is
    of `opero.core.steps.Arrival`.
    """
    turn = Turn(wants, latest, untils, is_turn=is_turn)
    try:
        while True:
            if not turn.poll():
                yield turn
            if turn.news != "asks":
                return None if turn.news == "full" else turn.news == "taken"
            # The gate has to be asked, which a look must not do.
            yield from turn.ask()
    finally:
        turn.leave()
