"""Lines of callers who wait for limits, first come, first served.

A call takes what it needs of all its limits at one moment by its `Turn`, which stands in the line of each. Whoever
looks takes its slots, if all have come and nobody is before it; no slot is granted ahead of its time.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from bisect import bisect_left
from collections import OrderedDict
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

# Who cannot look, in a thread or loop that is kept from running, is passed after so long by the next one, and after so
# much more for each place by those further back.
_GRACE, _MOST_GRACES = 0.05, 5
# The first in line lets so much of its time pass unused in one limit while it waits for another; others use the rest.
_UNUSED = 0.05
# Of what opens at no known time the first is told; so often the others look whether it has listened.
_LONGEST_NAP = 1.0
# Other processes were faster for so long: then the first of this one claims the next slot.
_REFUSED_SECONDS = 0.1
# By this and their numbers processes tell each other apart, on whatever machines they run.
_ORIGIN = random.SystemRandom().random()
ONE = (1.0,)

# When a slot would be too late to be of use, as far as is known now; -inf if it is of no use any more.
Latest = Callable[[], float]
# The lines that a call stands in, and what it takes of each.
Wants = Sequence[tuple["Line", Sequence[float]]]

# One for all lines, since a turn may stand in several. The garbage collector, or a signal handler, may use a line in a
# thread that has it.
lines = ForkSafeLock()
_numbers = itertools.count()


class Line:
    """Those who wait for one limit, in this process.

    Args:
        ledger: What lets callers go on in this process.
        gate: Of the same limit as other processes have it, if they do.
    """

    # Of a value: that nobody has asked for it lately.
    is_unasked = False

    def __init__(self, ledger: Ledger, gate: Gate | None = None) -> None:
        self.ledger = ledger
        self.gate = gate
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """Forget the parent's callers, and what they took."""
        # In the order in which they came, each by its number.
        self.waiting: list[tuple[int, Turn, Sequence[float]]] = []
        # What all in line take together.
        self._wanted = [0.0] * len(self.ledger.rates.names)
        self.ledger.forget()
        # From when on the first may look whether it can go on.
        self.opens_at = -math.inf
        # Since when, and until when, a limit that processes share had no slot, as was said last.
        self._refused_since, self._refused_until = math.inf, -math.inf
        # Whether its gate has answered last: what was taken is known there.
        self._is_known_elsewhere = False

    def another(self, gate: Gate | None) -> Line:
        """One of the same rates, as for one more value; paused if this one is."""
        line = Line(Ledger(self.ledger.rates), gate)
        line.ledger.pause(self.ledger.paused_until)
        return line

    # Asked by whoever wants to start

    def take_now(self, amounts: Sequence[float] = ONE, *_call: Any) -> bool:
        """Take a slot if one is free and nobody waits; only where nobody outside has to be asked."""
        with lines.lock:
            if self.waiting:
                return False
            now, ledger = clock.now(), self.ledger
            pace = ledger.only_pace
            if pace is not None and amounts is ONE:
                # As below, in half the time.
                free_at = pace.free_at
                if now + EARLY < free_at:
                    return False
                pace.free_at = (free_at if now - free_at <= pace.short else now) + pace.interval
                return True
            is_open = ledger.is_open(now, amounts)
            if is_open:
                ledger.take(now, amounts)
            return is_open

    def correct(self, amounts: Sequence[float], age: float) -> Generator[Any, Any, None]:
        """A call that began so many seconds ago has cost so much more than it took, or less."""
        with lines.lock:
            self.ledger.take(clock.now(), amounts, age=age)
        yield from self.tell(partial(Ledger.take, amounts=amounts, age=age))
        # Not before those who look then could hear of it.
        self.reopen()

    def pause(self, seconds: float) -> Generator[Any, Any, None]:
        """Let nothing start for so long."""
        with lines.lock:
            self.ledger.pause(clock.now() + seconds)
        self.reopen()
        yield from self.tell(lambda ledger, now: ledger.pause(now + min(seconds, LONGEST_PAUSE)))

    def change(self, rates: Rates) -> None:
        """Go on at other rates; those who wait keep their places."""
        with lines.lock:
            self.ledger.change(clock.now(), rates)
        self.reopen()

    def tell(self, change: Callable[[Ledger, float], None]) -> Generator[Any, Any, None]:
        """Let those who share the limit know, too."""
        if self.gate is not None:
            yield from self.gate.ask(self.ledger.rates, change)

    def expected_wait(self, amounts: Sequence[float] = ONE) -> float:
        """Seconds until a slot that is asked for now would come, as far as this process knows."""
        with lines.lock:
            now = clock.now()
            return self.expected_start(amounts, now, self._wanted) - now

    def expected_start(self, amounts: Sequence[float], now: float, ahead: Sequence[float]) -> float:
        """When a call will start, after others that take so much together."""
        moment = max(now, self.ledger.opens_at(now, amounts, ahead))
        if self._refused_until <= now:
            return moment
        return max(moment, self._refused_until + self._seconds_of(ahead))

    def ahead_of(self, turn: Turn, amounts: Sequence[float]) -> list[float]:
        """What those before it take; of those in the middle of the line no more is known than of the first."""
        is_last = bool(self.waiting) and self.waiting[-1][1] is turn
        return [all_of_it - own if is_last else 0.0 for all_of_it, own in zip(self._wanted, amounts, strict=True)]

    def _seconds_of(self, amounts: Sequence[float]) -> float:
        """How long the paces take to give so much."""
        return max([amounts[pace.name] * pace.interval for pace in self.ledger.paces], default=0.0)

    def is_idle(self) -> bool:
        """Whether a new line would not behave any differently; of what processes share, the gate knows more."""
        now = clock.now()
        if self.waiting or self._refused_until > now:
            return False
        return self._is_known_elsewhere or self.ledger.idle_from(now) <= now

    def reopen(self) -> None:
        """The first may be able to go on earlier, or only later, than was known."""
        with lines.lock:
            self._refused_until, self.opens_at = -math.inf, min(self.opens_at, clock.now())
        self.rouse_first()

    def rouse_first(self) -> None:
        """Let the first look, if it may."""
        with lines.lock:
            first = self.first() if clock.now() + EARLY >= self.opens_at else None
        if first is not None:
            first.rouse()

    # Asked by a turn that holds the lock

    def first(self) -> Turn | None:
        """Who may go on next."""
        return self.waiting[0][1] if self.waiting else None

    def due(self, turn: Turn, amounts: Sequence[float], now: float) -> float:
        """When to look again; not after ``now``: it may take its slot, or ask for that of a shared limit."""
        before = bisect_left(self.waiting, (turn.number,))
        if before == len(self.waiting) or self.waiting[before][1] is not turn:
            self.waiting.insert(before, (turn.number, turn, amounts))
            self._want(amounts, 1)
        is_open = now + EARLY >= self.opens_at
        if before:
            grace = min(before, _MOST_GRACES) * _GRACE
            if turn.due_at > now or turn.looked_at <= self.opens_at:
                # Those before it are served first. Thousands that look more often keep their event loop from all else.
                theirs = before * self._seconds_of(amounts)
                return now + min(theirs, _LONGEST_NAP) + grace if is_open else self.opens_at + theirs + grace
            # They could have gone on when it looked last, and have not done so until it had to look again.
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
                self.opens_at = clock.now()

    def _want(self, amounts: Sequence[float], sign: int) -> None:
        for name, amount in enumerate(amounts):
            self._wanted[name] += sign * amount

    def wait_alone(self, amounts: Sequence[float], now: float) -> float:
        """Seconds until this process alone would give a slot."""
        wait = self.ledger.wait(now, amounts)
        if wait:
            self.opens_at = now + wait
        return wait

    def ask(self, gate: Gate, turn: Turn, amounts: Sequence[float]) -> Generator[Any, Any, float | None]:
        """Ask the gate of a limit that processes share for a slot: seconds to wait, or None if it failed."""
        rates, asked, who = self.ledger.rates, clock.now(), os.getpid() + _ORIGIN
        claims = asked - self._refused_since >= _REFUSED_SECONDS and asked + EARLY >= self._refused_until
        request = partial(Ledger.ask, amounts=amounts, who=who, is_late=turn.has_waited, claims=claims)
        wait = yield from gate.ask(rates, request)
        with lines.lock:
            self._is_known_elsewhere = wait is not None
            self._refused_since = min(self._refused_since, asked) if wait else math.inf
            self._refused_until = -math.inf
            if wait and rates is self.ledger.rates:
                self._refused_until = clock.now() + wait
                # What others give back may bring it earlier.
                self.opens_at = min(self._refused_until, clock.now() + _LONGEST_NAP)
        return wait


L = TypeVar("L", bound=Line)
# Values that are their own keys, which no key of another class is equal to.
_OWN_KEYS = (str, int)


class PerValue(Generic[L]):
    """A line for each value, such as one for each API key; those that stay idle are forgotten.

    Each new one looks at two others, so that no call pays for all of them. Nobody has asked for one between two looks
    that is forgotten: who has just done so is about to take a slot of it.
    """

    def __init__(self, make: Callable[[Any], L]) -> None:
        self._make = make
        self._lines: OrderedDict[Any, L] = OrderedDict()
        self._lock = ForkSafeLock()

    def __iter__(self) -> Iterator[L]:
        with self._lock.lock:
            return iter(list(self._lines.values()))

    def of(self, value: Any) -> L:
        """The one of this value."""
        key = value if type(value) in _OWN_KEYS else identity_of(value)
        found = self._lines.get(key)
        if found is not None:
            found.is_unasked = False
            return found
        with self._lock.lock:
            found = self._lines.get(key)
            if found is None:
                for _ in range(min(2, len(self._lines))):
                    oldest, other = self._lines.popitem(last=False)
                    if not (other.is_unasked and other.is_idle()):
                        other.is_unasked = True
                        self._lines[oldest] = other
                found = self._lines[key] = self._make(value)
            found.is_unasked = False
            return found


class Turn:
    """A caller who waits for a slot of each of some lines.

    An `opero.core.steps.Arrival` of news: that it has ``"taken"`` its slots, that it ``"asks"`` for those of limits
    that processes share, that they would come too ``"late"`` by what ``latest`` says, that it is ``"over"`` once that
    is -inf (who changes what it says calls `rouse_all`), or that one of the lines is ``"full"``: its slot would not
    come until the moment among ``untils``. Slots that are free are taken however late it is.

    Attributes:
        news: One of these, or nothing yet.
        has_waited: It has found no slot before.
        looked_at: When it looked last, and ``due_at`` when it has to look again, if nothing is heard before.
        number: Its place among all that came; below 0 before that.
    """

    news = ""
    has_waited = False
    number = -1
    looked_at = due_at = math.inf
    # Since when it is the first everywhere.
    _first_since = math.inf
    _wake: Callable[[], None] | None = None

    def __init__(
        self, wants: Wants, latest: Latest = lambda: math.inf, untils: Sequence[float] = (), *, is_turn: bool = True
    ) -> None:
        # Nothing once it has left.
        self._wants = wants
        self._latest = latest
        self._untils = untils or [math.inf] * len(wants)
        self.is_turn = is_turn

    def wait(self) -> Generator[Any, Any, str]:
        """Wait for news other than that it asks, and give them."""
        try:
            while True:
                if not self.poll():
                    yield self
                if self.news != "asks":
                    return self.news
                # The gate has to be asked, which a look must not do.
                yield from self.ask()
        finally:
            self.leave()

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
        latest = self._latest()
        too_late = "over" if latest == -math.inf else "late"
        if self.number < 0:
            self.number = next(_numbers)
        elif now >= latest:
            # It has waited, and others can still use the slot.
            self.news = too_late
            return
        moments = [line.due(self, amounts, now) for line, amounts in self._wants]
        self.due_at, self.looked_at = max(moments), now
        if self.due_at <= now + EARLY:
            if any(line.gate is not None for line, _ in self._wants):
                self.news = "asks"
            else:
                self._start(now)
            return
        if len(moments) > 1:
            self._let_others_pass(moments, now)
        if not self.has_waited:
            self.has_waited = True
            _all.add(self)
        for until, moment, (line, amounts) in zip(self._untils, moments, self._wants, strict=True):
            bound = min(latest, until)
            is_closed = moment > now + EARLY
            if is_closed and (bound <= now or line.expected_start(amounts, now, line.ahead_of(self, amounts)) >= bound):
                self.news = "full" if until <= max(latest, now) else too_late
                return
        bounds = [bound for bound in (latest, *self._untils) if bound > now]
        self.due_at = min(now + _LONGEST_NAP if self.due_at == math.inf else self.due_at, *bounds)

    def _let_others_pass(self, moments: Sequence[float], now: float) -> None:
        """Others use what would pass unused while it waits for another limit, unless they have done so for long."""
        if all(line.first() is self for line, _ in self._wants):
            self._first_since = min(self._first_since, now)
        unused = EARLY + max(0.0, now - self._first_since) * _UNUSED
        for (line, _), moment in zip(self._wants, moments, strict=True):
            if self.due_at - max(moment, now) > unused:
                line.let_pass(self)
            elif line.first() is self:
                # It lets nobody else go on meanwhile.
                line.opens_at = max(self.due_at, line.opens_at)

    def _start(self, now: float) -> None:
        self.news = "taken"
        for line, amounts in self._wants:
            line.ledger.take(now, amounts, is_late=self.has_waited)
            line.let_pass(self)

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

    def due_in(self) -> float:
        return 0.0 if self.news else max(0.0, self.due_at - clock.now())

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
        self._latest = lambda: math.inf
        for line, _ in wants:
            with lines.lock:
                line.let_pass(self)
            line.rouse_first()


_all: WeakSet[Turn] = WeakSet()


def rouse_all() -> None:
    """Let all who wait in this process look again: it may be of no use any more."""
    with lines.lock:
        turns = list(_all)
    for turn in turns:
        turn.rouse()
