"""The third driver: carries out the flows of many calls at once, without acting by itself.

`Scheduler` decides nothing about policies and waits for nothing: `opero.concurrency.running` asks the cache's store
for it, hands out what has ended, waits for what its pool has to tell, and lets it take note of that. First attempts
travel in batches; an item gets a flow when it failed, or from the start where something has to be decided before the
first attempt. An item in backoff is one entry in a heap: it holds no worker.
"""

from __future__ import annotations

import heapq
import itertools
import math
import sys
from collections import deque
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from opero.concurrency.outcome import Outcome
from opero.concurrency.pool import Batch
from opero.concurrency.progress import Tally, make_progress
from opero.concurrency.worker import BATCH_SECONDS, FAR_BATCH_SECONDS, LONG_SECONDS, UNHEEDED_SECONDS, Report, Work
from opero.core.clock import clock
from opero.core.flow import call_flow, item_flow
from opero.core.parameters import ParameterSlot
from opero.core.plan import Call, Plan
from opero.core.signature import MISSING
from opero.core.steps import NOT_RUN, Candidate, Consult, Failed, Flow, Pause, Prepare, Share, Step, stopped
from opero.core.stores.flights import Presence
from opero.events import switches
from opero.exceptions import MisuseError, WorkerCrashedError
from opero.utils.notes import add_note, users_part

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.outcome import Sink
    from opero.concurrency.pool import MapSettings, Pool
    from opero.concurrency.running import Inbox, Source
    from opero.concurrency.worker import Shape
    from opero.core.steps import Arrival

# Items that wait for a retry; above this no new input is taken up.
MOST_WAITING = 5_000
# A batch before which so many workers have ended, each without having begun it, may be what ends them.
MOST_INNOCENT_LOSSES = 5
MOST_BATCH_BYTES = 2_000_000
# Batches that wait at a worker that is far away; behind one that takes so long, none does.
MOST_AHEAD = 3
LONG_BATCH_SECONDS = 1.0
# Until a worker is asked to end again that is reporting, has not ended, or could not be heard before.
_ENDING_SECONDS = 1.0
# Between two looks at how far a worker has come.
_LOOKING_SECONDS = 2.5 * LONG_SECONDS
# How long results are waited for after an input that was late: a part of that, and seconds.
_PART_FOR_LATE, _MOST_FOR_LATE = 0.05, 0.05
# Items whose entries are asked for at once; so many only while all of them are found.
MOST_LOOKED_UP = 500

# What comes into a map's inbox: a function that its own thread calls with its scheduler, and further arguments.
Event: TypeAlias = "tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]"


@dataclass(slots=True, eq=False)
class Entry:
    """One item that is more than a place in a first batch, or one call for several items, its ``members``.

    These are the items that have no result yet, with the error that the last attempt gave for each, if any.
    """

    index: int
    item: Any
    call: Call
    flow: Flow
    members: dict[Entry, Exception | None] | None = None
    waits_for: Pause | Arrival | None = None
    attempt: Candidate | None = None
    alone: bool = False
    losses: int = 0

    def may_begin(self) -> bool:
        return clock.now() < self.call.deadline and (self.attempt is None or self.attempt.may_start())


class Scheduler:
    """One running map: its ``source`` has the input, its ``sink`` gets the outcomes, events come into its ``inbox``.

    ``shape`` is what all calls have in common, ``total`` the number of items, if it is known.
    """

    def __init__(
        self,
        plan: Plan,
        settings: MapSettings,
        *,
        shape: Shape,
        source: Source,
        sink: Sink,
        inbox: Inbox,
        total: int | None,
    ) -> None:
        self._plan = plan = plan.bare if switches.is_disabled else plan
        self._settings = settings
        self._shape, self._source, self._sink, self._inbox = shape, source, sink, inbox
        self._progress = None if settings.progress is False else make_progress(settings.progress, plan.name, total)
        self.tally = Tally(total=total)
        self.pool: Pool = settings.pools.pool_for(self._work())
        self._is_over = False
        self.failure: Exception | None = None
        # Items in a batch, and batches that wait at a worker besides, as learnt from how long they take.
        self._size, self._ahead = 1, 0
        # Seconds of an item, on a cluster.
        self._usual = 0.0
        self._one_at_a_time = any((plan.limit, plan.places, plan.attempt_timeout, plan.total_timeout))
        # A batch that is with a worker when the circuit opens is run to its end.
        self._largest_batch = sys.maxsize if plan.breaker is None else plan.breaker.shared.failures
        if self._one_at_a_time:
            self._largest_batch = 1
        # Of a function that takes lists: the items for the next one, and what is by call.
        self._gathered: list[Entry] = []
        self._call_plan = plan
        if settings.batch_size is not None:
            self._call_plan = plan.changed(cache=None, default=MISSING, stats=plan.stats.of_calls_for_many())
        is_asked = plan.asks_first or plan.cache is not None or switches.listeners
        self._is_direct = not (is_asked or self._one_at_a_time or settings.batch_size is not None)
        self._next_index = 0
        self._look_ahead = 1
        self.presence = Presence()
        # All items that have a flow; how many of them wait, and how many of these for a turn.
        self._flying: set[Entry] = set()
        self._waiting = self._awaiting_turns = 0
        # Who is to be looked at when (at the same time, in order), if it still waits for the same.
        self._timers: list[tuple[float, int, Entry, Pause | Arrival]] = []
        self._ticks = itertools.count()
        # Items that wait for the cache's store, and for a worker: with an attempt, or before they take a slot for one.
        self._consulting: dict[Entry, Consult] = {}
        self._ready: deque[Entry] = deque()
        # Batches that are with workers, and those of them that are watched; whether no other shall be there.
        self._sent: set[Batch] = set()
        self._watched: set[Batch] = set()
        self._runs_alone = False
        # What workers have not begun of first batches: items, and the index of the first one.
        self._given_back: deque[tuple[int, list[Any]]] = deque()
        self.pool.start(inbox, most_batches=total, is_paced=plan.limit is not None, patience=plan.total_timeout)
        # What it took to come here is no fault of the input.
        source.turn_ends = clock.real() + BATCH_SECONDS

    def _work(self) -> Work:
        """What workers get once: they are sent each candidate when it is its turn, and never all, often secrets."""
        plan, fallback, shape = self._plan, self._plan.fallback, self._shape
        slot = None
        if fallback is not None and (fallback.position != len(shape.head) or shape.is_starred):
            slot = ParameterSlot(plan.function, fallback.parameter, "arg_fallback")
            shape = shape.without(slot)
        self._sends_candidates = slot is not None
        return Work(plan.function, plan.is_async, shape, slot)

    # What a driver calls, one after the other

    def send(self) -> list[Consult]:
        """Send workers what they can take; gives what the cache's store has to answer before there can be more."""
        while self._timers and self._timers[0][0] <= clock.now():
            _, _, entry, step = heapq.heappop(self._timers)
            self._look(entry, step)
        while not self._consulting and (batch := self._next_batch()) is not None:
            self.pool.submit(batch)
        return list(self._consulting.values())

    def answered(self, answers: list[Any]) -> None:
        """Take note of what the store said."""
        asked, self._consulting = self._consulting, {}
        ended = self.tally.finished
        for entry, answer in zip(asked, answers, strict=True):
            self._advance(entry, answer)
        all_found = self.tally.finished - ended == len(asked)
        self._look_ahead = min(MOST_LOOKED_UP, self._look_ahead * 2) if all_found else 1

    def outcomes(self) -> deque[Outcome[Any, Any]]:
        """What can be handed out now; meanwhile nobody attends to the map."""
        if self._progress is not None:
            self._progress.show(self.tally)
        self.presence.is_away = True
        return self._sink.ready

    def is_done(self) -> bool:
        """Whether all has been handed out; raises what ends the map before that."""
        self.presence.is_away = False
        if self.failure is not None:
            raise self.failure
        is_over = self._source.exhausted and not (self._sent or self._flying or self._given_back)
        if self._source.error is not None and (is_over or not self._sink.is_stream):
            raise self._source.error
        self._is_over = is_over
        return is_over

    def patience(self) -> tuple[float | None, bool]:
        """For how many seconds to wait until something comes back, None for ever; and whether these are real ones.

        What a worker or another process does takes real time, in which opero's clock skips none.
        """
        if self._source.late_by and not self.pool.is_starting:
            # What is quick is handed out before a slow input is asked for more.
            seconds = min(_MOST_FOR_LATE, _PART_FOR_LATE * self._source.late_by)
            return seconds if self._sink.is_stream and self._sent else 0.0, True
        due, is_real = [], bool(self._sent or self._ready)
        if self._timers:
            at, _, _, step = self._timers[0]
            due.append(at - clock.now())
            is_real = is_real or (isinstance(step, Pause) and step.is_real)
        if self._watched:
            due += [min(batch.look_at, batch.ends_at) - clock.real() for batch in self._watched]
        if self._plan.total_timeout is not None:
            due += [entry.call.deadline - clock.now() for entry in self._ready]
        seconds = min(due, default=math.inf)
        return None if seconds == math.inf else max(0.0, seconds), is_real

    def take_note(self) -> None:
        """Take note of what is in the inbox, and look after workers that have told nothing."""
        while self._inbox.events:
            handle, about, more = self._inbox.events.popleft()
            handle(self, *about, **more)
            # An error in it, and with that the frames of an attempt, shall not outlast this.
            about = ()
        # After all that has come in was seen: a report in time is no reason to kill.
        if self._watched:
            self._watch()
        # Nothing is taken from an input that was late before what has ended meanwhile is handed out.
        if not self._sink.ready:
            self._source.late_by = 0.0
        self._source.turn_ends = clock.real() + BATCH_SECONDS

    def tell(self, interrupt: BaseException) -> None:
        """Say in a note how much was done, and what keeps it next time, if the map was interrupted."""
        if isinstance(interrupt, Exception):
            return
        plan, whole = self._plan, "" if self.tally.total is None else f" of {self.tally.total}"
        stream = "" if self._sink.is_stream else ".stream(items) hands out each that is done, "
        kept = f"{stream}cache=True with cache_backend='disk' keeps their results for the next run"
        if plan.cache is not None and plan.cache.is_lasting:
            kept = "the next run finds their results in the cache"
        add_note(interrupt, f"opero: {self.tally.finished}{whole} items of {plan.name} were done; {kept}")

    def close(self) -> bool:
        """Give up all flows, so that what they hold (places in a line, computations others wait for) is free.

        If the map has come to its end, another one may have its pool; tells whether somebody keeps it.
        """
        self._timers.clear()
        for entry in self._flying:
            if entry.waits_for is not None and not isinstance(entry.waits_for, Pause):
                entry.waits_for.notify(None)
            entry.flow.close()
        self._flying.clear()
        if self._progress is not None:
            self._progress.close()
        if not self._is_over:
            # An error ends the map, whose traceback leads here, and nothing shall lead back.
            self.failure = self._source.error = None
            self._sink.forget()
            return False
        try:
            # What an event loop has heard since the map ended: a worker may have become ready.
            self.take_note()
        except Exception:  # noqa: BLE001 - the map has its results; another one will meet what is wrong
            return False
        return self._settings.pools.keep(self.pool)

    # Input

    def _next_batch(self) -> Batch | None:
        """What to send to a worker now, if anything."""
        if self._ready:
            self._call_off()
        slots = self.pool.slots * (1 + self._ahead)
        while slots and self._ready and self._ready[0].attempt is None:
            self._advance(self._ready.popleft(), None)
        # While no worker is ready, the first item has to tell whether one is needed.
        if self.failure is not None or len(self._sent) >= max(slots, 1):
            return None
        if self._sent and not self.pool.isolates and (self._runs_alone or (self._ready and self._ready[0].alone)):
            return None
        size = min(self._size, self.pool.largest_batch, self._largest_batch)
        if self.pool.is_far and self.tally.total is not None:
            # The last ones are shared evenly: what waits at one worker cannot be given to another.
            left = (self.tally.total - self._next_index) // max(1, self.pool.slots)
            size = max(1, size // 2, min(size, left))
        if self._is_direct and not self._ready:
            start, items = self._pull(size)
            return self._send(Batch(items, start)) if items else None
        if not self._ready:
            self._take_up_input(size, max(slots, 1))
        return self._send(self._batch_of_entries(size)) if self._ready and slots else None

    def _call_off(self) -> None:
        """Let those wait no longer for a worker whose time is over, or whose circuit has been opened."""
        if self._plan.total_timeout is None and self._ready[0].may_begin():
            return
        for entry in [entry for entry in self._ready if not entry.may_begin()]:
            self._ready.remove(entry)
            self._advance(entry, NOT_RUN)

    def _pull(self, count: int) -> tuple[int, list[Any]]:
        """The next items for a first attempt, if there are any now, and the index of the first."""
        if self._given_back:
            start, items = self._given_back.popleft()
            if len(items) > count:
                self._given_back.appendleft((start + count, items[count:]))
            return start, items[:count]
        start, count = self._next_index, min(count, self._sink.room)
        if count <= 0 or self._waiting >= MOST_WAITING or self._source.exhausted or self._source.late_by:
            return start, []
        items = self._source.take(count)
        self._next_index += len(items)
        if self._is_direct:
            self._plan.stats.direct.add(len(items))
        return start, items

    def _take_up_input(self, size: int, slots: int) -> None:
        """Start flows until enough of them are ready, or those that end at once (cache hits) have taken their time."""
        wanted = size if self._one_at_a_time else max(size, self._look_ahead)
        while True:
            coming = len(self._ready) + len(self._consulting)
            busy = coming + self._awaiting_turns + len(self._sent)
            if coming >= wanted or (self._one_at_a_time and busy >= slots):
                break
            index, items = self._pull(1)
            if not items:
                break
            self._open(index, items[0])
        nothing_runs = not (self._sent or self._ready or self._awaiting_turns)
        if self._gathered and not self._consulting and (self._source.exhausted or nothing_runs):
            self._call_for_many()

    # Flows

    def _open(
        self,
        index: int,
        item: Any,
        members: dict[Entry, Exception | None] | None = None,
        **of_the_call: Any,
    ) -> Entry:
        """Give an item a flow of its own, or several that share a call."""
        call = Call(self._shape.arguments(item), self._shape.kwargs, **of_the_call)
        call.index, call.presence = index, self.presence
        is_of_a_list = self._settings.batch_size is not None and members is None
        flow = item_flow(self._plan, call) if is_of_a_list else call_flow(self._call_plan, call)
        entry = Entry(index, item, call, flow, members)
        self._flying.add(entry)
        self._advance(entry, None)
        return entry

    def _advance(self, entry: Entry, sent: Any) -> None:
        """Give a flow what it asked for, and see what it asks for next."""
        try:
            step: Step | Share | Prepare = entry.flow.send(sent)
        except StopIteration as end:
            self._end(entry, end.value)
            return
        if isinstance(step, Candidate):
            entry.attempt = step
            self._ready.append(entry)
        elif isinstance(step, Consult):
            self._consulting[entry] = step
        elif isinstance(step, Prepare):
            if self.pool.slots:
                self._advance(entry, None)
            else:
                entry.attempt = None
                self._ready.append(entry)
                self.pool.prepare()
        elif isinstance(step, Share):
            self._gathered.append(entry)
            if len(self._gathered) == self._settings.batch_size:
                self._call_for_many()
        else:
            entry.waits_for = step
            self._waiting += 1
            if isinstance(step, Pause):
                self._look_again(entry, step, step.seconds)
            else:
                self._awaiting_turns += step.is_turn
                step.notify(lambda: self._inbox.put(Scheduler._look, entry, step))
                self._look(entry, step)

    def _look_again(self, entry: Entry, step: Pause | Arrival, seconds: float) -> None:
        heapq.heappush(self._timers, (clock.now() + seconds, next(self._ticks), entry, step))

    def _look(self, entry: Entry, step: Pause | Arrival) -> None:
        """Go on with an item whose pause has ended, or if what it waits for has come; unless it has done so already."""
        if entry.waits_for is not step:
            return
        if not isinstance(step, Pause):
            if not step.poll():
                due = step.due_in()
                if due is not None:
                    self._look_again(entry, step, due)
                return
            step.notify(None)
            self._awaiting_turns -= step.is_turn
        entry.waits_for = None
        self._waiting -= 1
        self._advance(entry, None)

    def _end(self, entry: Entry, outcome: Any) -> None:
        self._flying.discard(entry)
        if entry.members is not None:
            self._list_ended(entry, entry.members, outcome)
            return
        error = None
        value = outcome
        if type(outcome) is Failed:
            error, value = outcome.error, outcome.instead
            error.with_traceback(users_part(error.__traceback__))
            add_note(error, f"opero: this was item {entry.index} of the map", instead_of="opero: this was item ")
        call = entry.call
        seconds = clock.now() - call.started
        self._count(Outcome(entry.index, entry.item, value, error, call.attempts, seconds, call.cached))

    def _count(self, outcome: Outcome[Any, Any]) -> None:
        self.tally.finished += 1
        self.tally.cached += outcome.cached
        if outcome.error is not None:
            self.tally.failed += 1
            if not (self._settings.return_exceptions or self.failure is not None or outcome.is_excused):
                self.failure = outcome.error
        self._sink.put(outcome)

    # Functions that take lists: one flow for each item, and one for each call

    def _call_for_many(self) -> None:
        members, self._gathered = self._gathered, []
        self._open(members[0].index, [member.item for member in members], dict.fromkeys(members))

    def _taken_apart(self, entry: Entry, outcome: Any) -> Any:
        """Give items what an attempt made of them; returns what that means for the call.

        The call goes on for those of which it returned an exception that is to be retried.
        """
        members = list(entry.members or ())
        values = _values(self._plan.name, outcome, len(members))
        if type(values) is Failed:
            entry.members = dict.fromkeys(members)
            return values
        entry.members = {}
        for member, value in zip(members, values, strict=True):
            if not isinstance(value, Exception):
                self._give(entry, member, value)
            # Another candidate may do better with all of them.
            elif self._plan.fallback is not None or self._is_retried(entry, value):
                entry.members[member] = value
            else:
                self._give(entry, member, Failed(value))
        errors: list[Any] = [*entry.members.values(), *(value for value in values if isinstance(value, Exception))]
        return Failed(errors[0]) if errors else values

    def _is_retried(self, entry: Entry, error: Exception) -> bool:
        try:
            verdict = self._call_plan.retry.judge(self._call_plan, entry.call, Failed(error))
        except Exception:  # noqa: BLE001 - the user's predicate: the flow of the call will meet it, too, and end with it
            return True
        return verdict is not None and verdict.again

    def _list_ended(self, entry: Entry, members: dict[Entry, Exception | None], outcome: Any) -> None:
        """Give those items what the call has ended with that have no result: each its own error, or all the same."""
        if members:
            # It may be what a hook of tenacity's supplied.
            outcome = _values(self._plan.name, outcome, len(members))
        error = outcome.error if type(outcome) is Failed else None
        has_own = any(own is error for own in members.values())
        for place, (member, own) in enumerate(members.items()):
            if error is None:
                self._give(entry, member, outcome[place])
            else:
                self._give(entry, member, Failed(own) if has_own and own is not None else outcome)
        if error is not None and len(members) > 1 and not has_own:
            text = f"opero: this was item {entry.index} of the map, and {len(members) - 1} more in one list"
            add_note(error, text, instead_of="opero: this was item ")

    def _give(self, entry: Entry, member: Entry, outcome: Any) -> None:
        member.call.attempts = entry.call.attempts
        self._advance(member, outcome)

    # Batches

    def _batch_of_entries(self, size: int) -> Batch:
        """As many ready items as fit one batch, or one that may end its worker."""
        first = self._ready.popleft()
        entries = [first]
        while self._ready and len(entries) < size and not first.alone:
            following = self._ready[0]
            if following.alone or not following.may_begin():
                break
            entries.append(self._ready.popleft())
        batch = Batch([], first.index, entries, has_candidates=self._sends_candidates, alone=first.alone)
        batch.time_limit = None if first.attempt is None else first.attempt.time_limit()
        place = len(self._shape.head)
        for entry in entries:
            attempt: Any = entry.attempt
            # The item, or the candidate that it is in this attempt; or a pair of both.
            item = attempt.args[place:] if self._shape.is_starred else attempt.args[place]
            if entry.members is not None:
                item = [member.item for member in entry.members]
            batch.items.append((item, attempt.value) if self._sends_candidates else item)
            # A worker may have ended, or had no time, before it began.
            if not attempt.has_begun:
                rounds = entry.call.rounds
                attempt.begins()
                self.tally.retried += rounds == 1 and entry.call.rounds > 1
        return batch

    def _send(self, batch: Batch) -> Batch:
        batch.sent_at = clock.now()
        self._sent.add(batch)
        self._runs_alone = batch.alone
        if batch.time_limit is not None and self.pool.can_kill:
            # A coroutine is cancelled in the worker, which may take some time.
            batch.grace = UNHEEDED_SECONDS if self._plan.is_async else 0.0
            batch.ends_at = clock.real() + batch.time_limit[0] + batch.grace
            self._watched.add(batch)
        if len(batch.items) > 1 and self.pool.marks:
            batch.look_at = clock.real() + _LOOKING_SECONDS
            self._watched.add(batch)
        return batch

    def _give_back(self, batch: Batch, place: int) -> None:
        """Take the items from there on out of a batch: they are the next to be sent."""
        items, entries = batch.cut(place)
        if entries is not None:
            self._ready.extendleft(reversed(entries))
        elif items:
            self._given_back.appendleft((batch.start + place, items))

    def _watch(self) -> None:
        """Look after workers that may be busy with one item, or longer than they have."""
        for batch in self._watched:
            now = clock.real()
            if batch.look_at <= now:
                begun = batch.begun_now()
                is_busy = batch.reported < begun == batch.begun
                if is_busy:
                    # It will begin no other, see `worker.run_batch`.
                    self._size = 1
                    self._give_back(batch, begun - batch.reported)
                is_at_last = is_busy or begun >= batch.reported + len(batch.items)
                batch.begun, batch.look_at = begun, math.inf if is_at_last else now + _LOOKING_SECONDS
            if batch.ends_at <= now:
                batch.is_overdue = self.pool.kill(batch) or batch.is_overdue
                batch.ends_at = now + _ENDING_SECONDS

    # What became of them, as the pool tells

    def done(self, batch: Batch, report: Report, *, is_part: bool = False) -> None:
        """A worker has reported.

        Unless it is a part, after which the worker has gone on, items for which there is no value have not begun. An
        error of one that has no value is that of a batch that could not be read.
        """
        if batch not in self._sent:
            return
        if report.errors and not report.values:
            self.not_sent(batch, report.errors[0])
            return
        count = len(report.values)
        seconds = report.seconds / max(1, batch.reported + count)
        if not is_part:
            self._sent.discard(batch)
            self._watched.discard(batch)
            self._learn(batch, seconds, max(batch.size, report.size))
            if count < len(batch.items):
                self._give_back(batch, count)
        if batch.entries is None and not report.errors:
            self.tally.finished += count
            self._sink.put_results(batch.start, batch.items, report.values, seconds)
        else:
            for place, value in enumerate(report.values):
                self._item_done(batch, place, value, report.errors.get(place), seconds)
        if is_part:
            batch.drop(count)

    def _learn(self, batch: Batch, seconds: float, size: int) -> None:
        """How many items to send at once: as many as fill a batch's time, one by one those that take longer.

        To a worker that is far away some more batches, so that it has something to do while word of the last one is on
        its way; none behind one that takes long, which another worker could begin meanwhile.
        """
        if not self.pool.is_far:
            fitting = BATCH_SECONDS / max(seconds, 1e-9) if seconds < LONG_SECONDS else 1.0
        else:
            # Many threads of one process hold each other up now and then, which is no reason for small batches.
            self._usual = max(1e-9, min(seconds, 0.9 * (self._usual or seconds) + 0.1 * seconds))
            fitting = FAR_BATCH_SECONDS / self._usual + 0.5
        if size:
            fitting = min(fitting, MOST_BATCH_BYTES * len(batch.items) / size)
        self._size = max(1, min(int(fitting), self._size * 4))
        # No call waits at a worker that has its time.
        if self.pool.is_far and not self._one_at_a_time:
            of_a_batch = self._usual * self._size
            self._ahead = 0 if of_a_batch >= LONG_BATCH_SECONDS else min(MOST_AHEAD, 1 + int(0.1 / of_a_batch))

    def _item_done(self, batch: Batch, place: int, value: Any, error: Exception | None, seconds: float) -> None:
        if batch.entries is not None:
            entry = batch.entries[place]
            outcome = value if error is None else Failed(error)
            self._advance(entry, outcome if entry.members is None else self._taken_apart(entry, outcome))
            return
        index, item = batch.start + place, batch.items[place]
        if error is None:
            self._count(Outcome(index, item, value, None, 1, seconds, False))  # noqa: FBT003 - plain facts
        else:
            self._open(index, item, started=clock.now() - seconds, failure=error)

    def not_sent(self, batch: Batch, error: Exception) -> None:
        """An item of the batch cannot travel; alone, it is known which."""
        if len(batch.items) == 1:
            self.done(batch, Report([None], {0: error}, 0.0))
        else:
            self.lost([batch], str(error))

    def fail(self, error: BaseException) -> None:
        """Something ends the whole map: Ctrl-C or exit in a worker thread, a pool that cannot work."""
        raise error

    def lost(
        self,
        lost: list[Batch],
        reason: str,
        innocent: Collection[Batch] = (),
        *,
        sure: bool = True,
        begun: int | None = None,
    ) -> None:
        """A worker ended, with which these were, of which it had not begun the ``innocent`` ones.

        The item that surely ran is charged; those of which only one can be guilty run again, one by one.

        Args:
            lost: Those batches.
            reason: How it ended.
            innocent: Some of them.
            sure: Whether nothing else can have ended it.
            begun: How many items of the only batch have begun, if it is known; the last of them was running.
        """
        batches = [batch for batch in lost if batch in self._sent]
        self._sent.difference_update(batches)
        self._watched.difference_update(batches)
        unlucky = [b for b in batches if any(e.losses + 1 >= MOST_INNOCENT_LOSSES for e in b.entries or ())]
        suspects = [batch for batch in batches if batch not in innocent or batch in unlucky]
        for batch in batches:
            if begun is not None:
                self._charge(batch, begun - batch.reported, reason)
            elif sure and suspects == [batch] and len(batch.items) == 1:
                self._charge(batch, 1, reason)
            else:
                self._run_again(batch, alone=batch in suspects)

    def _charge(self, batch: Batch, begun: int, reason: str) -> None:
        """Charge the last item that has begun; those before it, which were fast, and those after it run again."""
        self._give_back(batch, begun)
        # Between two items it was ended by nobody's.
        if begun > 0 and batch.items:
            error: Exception = WorkerCrashedError(f"the worker that ran {self._plan.name} ended: {reason}")
            if batch.is_overdue and batch.time_limit is not None:
                error = stopped(self._plan.name, *batch.time_limit)
            self._item_done(batch, begun - 1, None, error, clock.now() - batch.sent_at)
            batch.cut(begun - 1)
        self._give_back(batch, 0)

    def _run_again(self, batch: Batch, *, alone: bool) -> None:
        """Run the items of a lost batch again, each alone, if one of them may have ended its worker."""
        entries = batch.entries
        if entries is not None:
            self._ready.extendleft(reversed(entries))
        else:
            # They are counted by their flows now.
            self._plan.stats.direct.add(-len(batch.items))
            entries = [self._open(batch.start + place, item) for place, item in enumerate(batch.items)]
        for entry in entries:
            entry.alone, entry.losses = alone, entry.losses + 1


def _values(name: str, result: Any, count: int) -> Any:
    """The results of a function that was given a list of so many items; `Failed` if it has, or they are not as many."""
    if type(result) is Failed:
        return result
    got = type(result).__name__
    # A list of a table, such as a frame of pandas, would be its columns.
    is_table = hasattr(result, "columns")
    if isinstance(result, Collection) and not (is_table or isinstance(result, (str, bytes, Mapping, AbstractSet))):
        if len(result) == count:
            return list(result)
        got = f"a {got} of {len(result)}"
    return Failed(
        MisuseError(f"{name} got a list of {count} and returned {got}; return a list with a result for each item")
    )
