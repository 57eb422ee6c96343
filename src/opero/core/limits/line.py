"""One line of callers who wait for a limit, first come, first served, and what lets the first of them go on."""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from opero.core.clock import clock
from opero.core.faults import Complaints
from opero.core.forks import watch_forks
from opero.core.limits.ledger import EARLY, Ledger
from opero.core.limits.local import LocalLedger
from opero.core.steps import Await, Consult

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from opero.core.limits.rates import Rates

# One further back may go on this much later for each place: those before it, in a thread or loop that is kept from
# running, may not be able to.
_GRACE = 0.05
_MOST_GRACES = 5
_LONGEST_NAP = 1.0
ONE = (1.0,)

# When a slot would be too late to be of use, as far as is known now.
Latest = Callable[[], float]


class Request:
    """Asked of a gate outside of this process: a slot, a pause, or a correction of what was taken."""

    __slots__ = ("amounts", "pause", "takes", "waited")

    def __init__(
        self, amounts: Sequence[float] = ONE, *, waited: float = 0.0, takes: bool = True, pause: float = 0.0
    ) -> None:
        self.amounts = amounts
        self.waited = waited
        self.takes = takes
        self.pause = pause


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
        self._changes = 0
        self._ledger = LocalLedger(rates) if ledger is None else ledger
        # When the first may ask (again), as far as is known; when one who is not the first found that it could have.
        self._opens_at = self._noticed_at = -math.inf
        # Who comes before that, just after others that had waited, has missed slots, too, while it could not look.
        self._made_up_until = -math.inf
        self._plain = len(rates.paces) == 1 and not rates.quotas
        self._lock = threading.Lock()
        self._turns: deque[Turn] = deque()
        watch_forks(self)

    def after_fork(self) -> None:
        """Forget the parent's callers, and what they took."""
        self._lock = threading.Lock()
        self._turns.clear()
        self._ledger.forget()
        self._opens_at = self._noticed_at = -math.inf

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def is_shared(self) -> bool:
        """Whether somebody outside of this process has to be asked."""
        return self._open_gate is not None and not clock.is_virtual

    # Asked by whoever wants to start

    def take_now(self, amounts: Sequence[float] = ONE) -> bool:
        """Take a slot if one is free and nobody waits; only where nobody outside has to be asked."""
        with self._lock:
            now = clock.now()
            if self._turns:
                first = self._notice(now)
            else:
                ledger, first = self._ledger, None
                if self._plain and amounts is ONE:
                    free_at, late = ledger.free_at[0], now + EARLY
                    if late < free_at or late < ledger.paused_until:
                        return False
                    if now > self._made_up_until:
                        ledger.free_at[0] = now + self._rates.paces[0].interval
                        return True
                return not ledger.ask(now, math.inf if now <= self._made_up_until else 0.0, amounts)
        if first is not None:
            first.rouse()
        return False

    def try_to_take(self, amounts: Sequence[float] = ONE) -> Generator[Any, Any, bool]:
        """The same, whoever has to be asked."""
        if not self.is_shared:
            return self.take_now(amounts)
        if self._turns or clock.now() < self._closed_until():
            return False
        wait = yield from self._ask(Request(amounts))
        return self.take_now(amounts) if wait is None else not wait

    def take(self, amounts: Sequence[float] = ONE, latest: Latest | None = None) -> Generator[Any, Any, bool]:
        """Wait for a slot; False, at once, if it would not come before the clock shows what ``latest`` says."""
        if not self.is_shared and self.take_now(amounts):
            return True
        turn = Turn(self, amounts, latest)
        try:
            while True:
                if not turn.poll():
                    yield Await(turn, is_turn=True)
                if turn.asks:
                    # The gate has to be asked, which a look must not do.
                    turn.asks, changes = False, self._changes
                    wait = yield from self._ask(Request(amounts, waited=self._waited(turn, clock.now())))
                    self._answered(turn, wait, changes)
                if turn.taken or turn.is_late:
                    return turn.taken
        finally:
            turn.leave()

    def correct(self, amounts: Sequence[float]) -> Generator[Any, Any, None]:
        """A call has cost so much more than it took, or less."""
        with self._lock:
            self._ledger.correct(clock.now(), amounts)
        if self.is_shared:
            yield from self._ask(Request(amounts, takes=False))
        self._rouse_all()

    def pause(self, seconds: float) -> Generator[Any, Any, None]:
        """Let nothing start for so long."""
        with self._lock:
            self._ledger.pause(clock.now() + seconds)
        self._rouse_all()
        if self.is_shared:
            yield from self._ask(Request(takes=False, pause=seconds))

    def expected_wait(self, amounts: Sequence[float] = ONE) -> float:
        """Seconds until a slot that is asked for now would come, as far as this process knows."""
        with self._lock:
            now = clock.now()
            return max(0.0, self._expected_start(None, amounts, now) - now)

    def change(self, rates: Rates) -> None:
        """Go on at other rates; those who wait keep their places."""
        with self._lock:
            self._rates = rates
            self._changes += 1
            self._plain = len(rates.paces) == 1 and not rates.quotas
            self._ledger.change(clock.now(), rates)
            self._made_up_until = -math.inf
            if self._gate is not None:
                self._gate.change(rates)
        self._rouse_all()

    def is_idle(self) -> bool:
        """Whether a new line would not behave any differently."""
        now = clock.now()
        return not self._turns and self._ledger.idle_from(now) <= now

    # Asked by those in line

    def look(self, turn: Turn) -> None:
        """Let ``turn`` go on, if it may; the gate of a shared limit has to be asked by whoever may."""
        next_one: Turn | None = None
        with self._lock:
            now = clock.now()
            if turn.joined_at is None:
                turn.joined_at = now
                self._turns.append(turn)
            turn.is_slow = False
            if turn.latest is not None and turn.joined_at < now and now >= turn.latest():
                # It has waited, and others can still use the slot.
                turn.is_late = True
            elif self._may_ask(turn, now):
                if self.is_shared:
                    turn.asks = True
                    return
                next_one = self._let_go_on(turn, now)
            elif now + EARLY >= self._closed_until() and self._turns[0] is not turn:
                next_one = self._turns[0]
            if not turn.has_news and turn.latest is not None:
                turn.is_late = self._expected_start(turn, turn.amounts, now) >= turn.latest()
        if next_one is not None:
            next_one.rouse()

    def seize(self, turn: Turn) -> bool:
        """Take the slot that ``turn`` has reached, unless it has gone meanwhile."""
        with self._lock:
            now = clock.now()
            turn.reached, turn.latest = False, None
            if turn.joined_at is None or self._ledger.opens_at(now, turn.amounts) > now + EARLY:
                return False
            self._ledger.take(now, self._waited(turn, now), turn.amounts)
            self._start(turn, now)
            next_one = self._turns[0] if self._turns else None
        if next_one is not None:
            next_one.rouse()
        return True

    def _answered(self, turn: Turn, wait: float | None, changes: int) -> None:
        """The gate gave a slot, or said how long to wait; None: it failed, and this process goes on alone."""
        next_one: Turn | None = None
        with self._lock:
            now = clock.now()
            waited = self._waited(turn, now)
            if wait is None:
                wait = self._ledger.ask(now, waited, turn.amounts)
            elif not wait:
                self._ledger.take(now, waited, turn.amounts)
            if not wait:
                self._start(turn, now)
                next_one = self._turns[0] if self._turns else None
            elif changes == self._changes:
                # Else it was told by rates that hold no more.
                self._opens_at, self._noticed_at = now + wait, -math.inf
                if turn.latest is not None:
                    turn.is_late = self._expected_start(turn, turn.amounts, now) >= turn.latest()
        if next_one is not None:
            next_one.rouse()

    def due_in(self, turn: Turn) -> float:
        """Seconds until another look is worth it."""
        with self._lock:
            now = clock.now()
            due = self._closed_until()
            before = self._before(turn)
            if before and due <= now:
                due = now if self._noticed_at == -math.inf else self._noticed_at
            # Of what opens at no known time, the first are told; the others look now and then.
            due = now + _LONGEST_NAP if due == math.inf else due + before * _GRACE
            if turn.latest is not None:
                due = min(due, turn.latest())
        return max(0.0, due - now)

    def leave(self, turn: Turn) -> None:
        """It has its slot, or wants none any more.

        The garbage collector may say so, in a thread that holds the lock: then those who wait find out by themselves.
        """
        if turn.joined_at is None or turn.taken:
            return
        turn.has_left = True
        if not self._lock.acquire(timeout=_GRACE):
            return
        try:
            was_first = bool(self._turns) and self._turns[0] is turn
            if turn in self._turns:  # not so in a forked child, for a caller of the parent
                self._turns.remove(turn)
            if was_first:
                self._opens_at = self._noticed_at = -math.inf
            next_one = self._turns[0] if was_first and self._turns else None
        finally:
            self._lock.release()
        if next_one is not None:
            next_one.rouse()

    # Under the lock

    def _let_go_on(self, turn: Turn, now: float) -> Turn | None:
        """Give ``turn`` its slot, if it has come; gives who is next, if so."""
        if turn.stays:
            wait = max(0.0, self._ledger.opens_at(now, turn.amounts) - now)
        else:
            wait = self._ledger.ask(now, self._waited(turn, now), turn.amounts)
        if wait > EARLY:
            self._opens_at, self._noticed_at = now + wait, -math.inf
        elif turn.stays:
            turn.reached, turn.is_slow = True, turn.lets_pass
        else:
            self._start(turn, now)
            return self._turns[0] if self._turns else None
        return None

    def _waited(self, turn: Turn, now: float) -> float:
        if now <= self._made_up_until:
            return math.inf
        return 0.0 if turn.joined_at is None else now - turn.joined_at

    def _start(self, turn: Turn, now: float) -> None:
        turn.taken = True
        if turn.joined_at is not None and now > turn.joined_at:
            self._made_up_until = now + max([pace.tolerance for pace in self._rates.paces], default=0.0)
        if turn in self._turns:
            self._turns.remove(turn)
        self._opens_at = self._noticed_at = -math.inf

    def _closed_until(self) -> float:
        # Of a long pause the gate knows a part only.
        return max(self._opens_at, self._ledger.paused_until)

    def _may_ask(self, turn: Turn, now: float) -> bool:
        while self._turns and self._turns[0].has_left:
            self._turns.popleft()
        if now + EARLY < self._closed_until():
            return False
        before = self._before(turn)
        if before:
            self._notice(now)
            if now < self._noticed_at + before * _GRACE:
                return False
            # Those before it have not looked in time.
            for other in self._turns:
                if other is turn:
                    break
                other.is_slow = True
        return True

    def _notice(self, now: float) -> Turn | None:
        """Somebody finds that the first in line could go on."""
        if now + EARLY < self._closed_until():
            return None
        if self._noticed_at == -math.inf:
            self._noticed_at = now
        return self._turns[0]

    def _before(self, turn: Turn) -> int:
        """How many it has to let go first, as far as that matters."""
        before = 0
        for other in self._turns:
            if other is turn or before == _MOST_GRACES:
                break
            before += not (other.is_slow or other.has_left)
        return before

    def _expected_start(self, turn: Turn | None, amounts: Sequence[float], now: float) -> float:
        ahead = [0.0] * len(self._rates.names)
        for other in self._turns:
            if other is turn:
                break
            if not other.has_left:
                ahead = [total + amount for total, amount in zip(ahead, other.amounts, strict=True)]
        moment = max(now, self._ledger.opens_at(now, amounts, ahead))
        if self.is_shared and self._opens_at > now:
            behind = [ahead[pace.name] * pace.interval for pace in self._rates.paces]
            moment = max(moment, self._opens_at + max(behind, default=0.0))
        return moment

    # Without it

    def _rouse_all(self) -> None:
        """Let all look again, at once: some may not want to wait for so long."""
        with self._lock:
            turns = list(self._turns)
            self._opens_at = self._noticed_at = -math.inf
            if turns and not self.is_shared:
                self._opens_at = self._ledger.opens_at(clock.now(), turns[0].amounts)
        for turn in turns:
            turn.rouse()

    def rouse_first(self) -> None:
        """Let the first look again, at once, and those who may look in its place."""
        with self._lock:
            self._opens_at = self._noticed_at = -math.inf
            turns = list(itertools.islice(self._turns, _MOST_GRACES + 1))
        for turn in turns:
            turn.rouse()

    def _ask(self, request: Request) -> Generator[Any, Any, float | None]:
        """The gate's answer; None if it failed."""
        if self._gate is None:
            assert self._open_gate is not None  # noqa: S101 - for the type checkers
            self._gate = self._open_gate(self._rates)
        gate = self._gate
        (answer,) = gate.perform([request]) if gate.is_instant else [(yield Consult(gate, request))]
        if isinstance(answer, Exception):
            self._complaints.tell(answer)
            return None
        seconds: float = answer
        return seconds


class Turn:
    """One caller's place; an `opero.core.steps.Arrival` of its slot, or of the news that it would come too late.

    Attributes:
        taken: It has its slot.
        is_late: Its slot would come too late.
        asks: It may ask the gate of a shared limit.
        joined_at: Since when it is in line; None before.
        is_slow: It did not look when it could have gone on.
        has_left: It waits no more.
        stays: It takes no slot when it could, but stays there until others have come, too, that it needs.
        reached: It does so now.
        lets_pass: Others may go on meanwhile.
    """

    __slots__ = (
        "_line",
        "_wake",
        "amounts",
        "asks",
        "has_left",
        "is_late",
        "is_slow",
        "joined_at",
        "latest",
        "lets_pass",
        "reached",
        "stays",
        "taken",
    )

    def __init__(
        self,
        line: Line,
        amounts: Sequence[float] = ONE,
        latest: Latest | None = None,
        *,
        stays: bool = False,
        lets_pass: bool = False,
    ) -> None:
        self._line = line
        self._wake: Callable[[], None] | None = None
        self.amounts = amounts
        self.latest = latest
        self.joined_at: float | None = None
        self.taken = self.is_late = self.asks = self.is_slow = self.has_left = self.reached = False
        self.stays = stays
        self.lets_pass = lets_pass

    @property
    def has_news(self) -> bool:
        return self.taken or self.is_late or self.asks or self.reached

    def reach(self) -> Generator[Any, Any, bool]:
        """Wait until its slot has come, and leave it there; of a limit that processes share, take it."""
        if self._line.is_shared:
            self.taken = yield from self._line.take(self.amounts, self.latest)
        elif not self.poll():
            yield Await(self, is_turn=True)
        return self.taken or self.reached

    def seize(self) -> bool:
        """Take the slot that it has reached, unless it has gone meanwhile."""
        return self.taken or self._line.seize(self)

    def poll(self) -> bool:
        if not (self.has_news or self.has_left):
            self._line.look(self)
        return self.has_news

    def due_in(self) -> float | None:
        return 0.0 if self.has_news else self._line.due_in(self)

    def notify(self, wake: Callable[[], None] | None) -> None:
        self._wake = wake

    def rouse(self) -> None:
        wake = self._wake
        if wake is not None:
            wake()

    def withdraw(self) -> None:
        """It may have to go on asking; `leave` comes after that."""

    def leave(self) -> None:
        self._line.leave(self)
