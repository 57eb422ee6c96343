"""Entries in this process.

Nothing here takes a lock: every step is one operation of a dict, whose keys run no code of the user's (see
`opero.core.keys`). So a finalizer, a signal handler or the garbage collector may come between any two steps and use the
same cache.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import weakref
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any, ClassVar

from opero.core.clock import clock
from opero.core.keys import Instance
from opero.core.steps import Failed
from opero.core.stores.flights import CLAIMED, FOUND, Flights

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opero.core.stores.flights import Answer, Flight, Keep
    from opero.core.stores.settings import Cache

_FEW = 100
# A value, until when a quick look finds it, and until when it is of use if the call fails. An error that is remembered
# is never found by a quick look, which could only return it.
Entry = tuple[Any, float, float]
_NEVER: Entry = (None, math.inf, math.inf)


class MemoryStore:
    """Entries in this process; each has its own end, so that functions with different lifetimes can share it."""

    is_instant: ClassVar[bool] = True
    is_ready: ClassVar[bool] = True

    def __init__(self, settings: Cache, namespace: str | None) -> None:
        self.maxsize: int = settings.options["maxsize"]
        self.policy: str = settings.options["policy"]
        self.is_shared = namespace is not None
        self.flights = Flights()
        # The one that is to go first stands first, but with lfu: there it is the one that was used least.
        self._entries: OrderedDict[Any, Entry] = OrderedDict()
        self._uses = uses = Counter[Any]()
        # When which entry ends; those that never do are not in it.
        self._ends: list[tuple[float, int, Any]] = []
        # The keys that hold each instance.
        self._instances: dict[Instance, set[Any]] = {}
        # What a look does: get the entry, and note that it was used, where something has to be noted. Not by methods,
        # which would keep the store until the garbage collector comes.
        touches = {"lru": self._entries.move_to_end, "lfu": lambda key: uses.update((key,)), "fifo": None}
        self.get: Callable[[Any], Entry | None] = self._entries.get
        self.touch: Callable[[Any], object] | None = touches[self.policy]

    def look_up(self, key: Any) -> Entry | None:
        """The entry of a key that has not ended."""
        entry = self._get(key)
        return entry if entry is not None and entry[1] > clock.now() else None

    find = look_up

    def claim(self, flights: Sequence[Flight]) -> list[Answer]:
        return [self._claim(flight) for flight in flights]

    def keep(self, keeps: Sequence[Keep]) -> list[None]:
        return [self._keep(keep) for keep in keeps]  # type: ignore[func-returns-value]  # nothing can go wrong

    def let_go(self, flight: Flight) -> None:
        """Nobody outside this process waits for it."""

    def close(self) -> None:
        """Nothing is open."""

    def delete(self, key: Any) -> bool:
        entry = self._remove(key)
        return entry is not None and entry[2] > clock.now()

    def clear(self) -> None:
        # A finalizer that comes while a dict is being emptied could put something into it.
        removed = self._entries.copy()
        for part in (self._entries, self._uses, self._ends, self._instances):
            part.clear()
        del removed

    def __repr__(self) -> str:
        return "the memory cache"

    def __len__(self) -> int:
        self._remove_expired()
        return len(self._entries)

    def _get(self, key: Any) -> Entry | None:
        entry = self.get(key)
        if entry is not None and self.touch is not None:
            # Removed since, if it is not there.
            with contextlib.suppress(KeyError):
                self.touch(key)
        return entry

    def _claim(self, flight: Flight) -> Answer:
        entry, now = self._get(flight.key), clock.now()
        if entry is not None and (entry[1] > now or (type(entry[0]) is Failed and entry[2] > now)):
            flight.found = entry[0]
            return FOUND
        if entry is not None and entry[1] + flight.stale > now:
            flight.old = entry[0], None
        return CLAIMED

    def _keep(self, keep: Keep) -> None:
        flight, key = keep.flight, keep.flight.key
        if flight.is_void:
            return
        self._remove(key)
        self._remove_expired()
        end = math.inf if keep.ttl is None else clock.now() + keep.ttl
        entry = (keep.value, -math.inf if type(keep.value) is Failed else end, end + keep.stale)
        self._entries[key] = entry
        if entry[2] != math.inf:
            heapq.heappush(self._ends, (entry[2], id(key), key))
        instance = _instance_in(key)
        if instance is not None:
            instance.stores.add(weakref.ref(self))
            self._instances.setdefault(instance, set()).add(key)
        self._evict()
        if self.policy == "lfu":
            self._uses[key] = 0
        if flight.is_void and self._entries.get(key) is entry:
            # Somebody has cleared meanwhile.
            self._remove(key)

    def _evict(self) -> None:
        """Remove those that are to go, but not the one that has just come: it has no uses yet, and stands last."""
        surplus = len(self._entries) - self.maxsize
        if self.policy == "lfu" and surplus > 0:
            # To find them takes long: of many entries some more go at once.
            uses = self._uses.copy()
            for key in heapq.nsmallest(surplus + self.maxsize // 100, uses, key=uses.__getitem__):
                self._remove(key)
        while len(self._entries) > self.maxsize:
            # Others may have emptied it meanwhile.
            with contextlib.suppress(KeyError):
                self._remove(self._entries.popitem(last=False)[0])

    def _remove(self, key: Any) -> Entry | None:
        instance = _instance_in(key)
        if instance is not None:
            self._instances.get(instance, set()).discard(key)
        self._uses.pop(key, None)
        return self._entries.pop(key, None)

    def _remove_expired(self) -> None:
        entries, now = self._entries, clock.now()
        # Until there are no more, or somebody else has taken the last one.
        with contextlib.suppress(IndexError):
            while self._ends[0][0] <= now:
                _, _, key = heapq.heappop(self._ends)
                if entries.get(key, _NEVER)[2] <= now:
                    self._remove(key)
        if len(self._ends) > 2 * len(entries) + _FEW:
            # Of entries that went before their time.
            self._ends = [end for end in self._ends.copy() if entries.get(end[2], _NEVER)[2] == end[0]]
            heapq.heapify(self._ends)

    def forget_instance(self, instance: Instance) -> None:
        """Remove what nobody can ask for any more; also at the end of a program, when globals are gone."""
        for key in list(self._instances.pop(instance, ())):
            self._uses.pop(key, None)
            self._entries.pop(key, None)


def _instance_in(key: Any) -> Instance | None:
    return key[0] if key.__class__ is tuple and key and key[0].__class__ is Instance else None
