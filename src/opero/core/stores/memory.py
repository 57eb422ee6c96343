"""Entries in this process.

Nothing here takes a lock: every step is one operation of a dict, whose keys run no code of the user's (see
`opero.core.keys`), and what is removed is freed after that. So a finalizer, a signal handler or the garbage collector
may come between any two steps and use the same cache.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, ClassVar

from opero.core.clock import clock
from opero.core.flights import CLAIMED, FOUND, Flights, Keep
from opero.core.keys import Instance
from opero.core.steps import Failed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opero.core.flights import Answer, Flight
    from opero.core.stores.settings import CacheSettings

_FEW = 100
# A value, until when a quick look finds it, and until when it is of use if the call fails. An error that is remembered
# is never found by a quick look, which could only return it.
Entry = tuple[Any, float, float]
_NEVER: Entry = (None, math.inf, math.inf)


class MemoryStore:
    """Entries in this process; each has its own end, so that functions with different lifetimes can share it."""

    is_instant: ClassVar[bool] = True
    is_ready: ClassVar[bool] = True

    def __init__(self, settings: CacheSettings, namespace: str | None) -> None:
        self.maxsize: int = settings.options["maxsize"]
        self.policy: str = settings.options["policy"]
        self.is_shared = namespace is not None
        self.flights = Flights()
        # The one that is to go first stands first, but with lfu: there it is the one that was used least.
        self._entries: OrderedDict[Any, Entry] = OrderedDict()
        self._uses: dict[Any, int] = {}
        # When which entry ends; those that never do are not in it.
        self._ends: list[tuple[float, int, Any]] = []
        self._numbers = itertools.count()
        # The keys that hold each instance.
        self._instances: dict[Instance, dict[Any, None]] = {}
        # What a look does: get the entry, and note that it was used, where something has to be noted.
        touches = {"lru": self._entries.move_to_end, "lfu": _counter(self._uses), "fifo": None}
        self.get: Callable[[Any], Entry | None] = self._entries.get
        self.touch: Callable[[Any], object] | None = touches[self.policy]

    def look_up(self, key: Any) -> Entry | None:
        """The entry of a key that has not ended."""
        entry = self._get(key)
        return entry if entry is not None and entry[1] > clock.now() else None

    find = look_up

    def _get(self, key: Any) -> Entry | None:
        entry = self.get(key)
        if entry is not None and self.touch is not None:
            # Removed since, if it is not there.
            with contextlib.suppress(KeyError):
                self.touch(key)
        return entry

    def perform(self, requests: Sequence[Flight | Keep]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def let_go(self, flight: Flight) -> None:
        """Nobody outside this process waits for it."""

    def delete(self, key: Any) -> bool:
        entry = self._remove(key)
        return entry is not None and _has_not_ended(entry)

    def clear(self) -> None:
        removed = self._entries.copy()
        self._entries.clear()
        self._uses.clear()
        self._ends.clear()
        self._instances.clear()
        del removed

    def __repr__(self) -> str:
        return "the memory cache"

    def __len__(self) -> int:
        self._remove_expired()
        return len(self._entries)

    def close(self) -> None:
        """There is nothing to give back."""

    def _answer(self, request: Flight | Keep) -> Answer | None:
        if isinstance(request, Keep):
            self._keep(request)
            return None
        return self._claim(request)

    def _claim(self, flight: Flight) -> Answer:
        entry = self._get(flight.key)
        if entry is None:
            return CLAIMED
        if _has_not_ended(entry):
            flight.found = entry[0]
            return FOUND
        if entry[1] + flight.stale > clock.now():
            flight.old = entry[0], None
        return CLAIMED

    def _keep(self, keep: Keep) -> None:
        flight = keep.flight
        if flight.is_void:
            return
        end = math.inf if keep.ttl is None else clock.now() + keep.ttl
        entry = (keep.value, -math.inf if keep.value.__class__ is Failed else end, end + keep.stale)
        self._store(flight.key, entry)
        if flight.is_void and self._entries.get(flight.key) is entry:
            # Somebody has cleared meanwhile.
            self._remove(flight.key)

    def _store(self, key: Any, entry: Entry) -> None:
        replaced = self._remove(key)
        self._remove_expired()
        self._entries[key] = entry
        if entry[2] != math.inf:
            heapq.heappush(self._ends, (entry[2], next(self._numbers), key))
        instance = _instance_in(key)
        if instance is not None:
            instance.stores.add(weakref.ref(self))
            self._instances.setdefault(instance, {})[key] = None
        evicted = [self._remove(other) for other in self._surplus()]
        if self.policy == "lfu":
            self._uses[key] = 0
        del replaced, evicted

    def _remove(self, key: Any) -> Entry | None:
        instance = _instance_in(key)
        if instance is not None:
            self._instances.get(instance, {}).pop(key, None)
        return self._drop(key)

    def _drop(self, key: Any) -> Entry | None:
        entry = self._entries.pop(key, None)
        self._uses.pop(key, None)
        return entry

    def _surplus(self) -> list[Any]:
        """The keys that are to go, but not the one that has just come: it has no uses yet, and stands last."""
        count: int = len(self._entries) - self.maxsize
        if count <= 0:
            return []
        if self.policy == "lfu":
            # To find them takes long: of many entries some more go at once.
            uses = self._uses.copy()
            return heapq.nsmallest(count + self.maxsize // 100, uses, key=uses.__getitem__)
        try:
            return list(itertools.islice(self._entries, count))
        except RuntimeError:
            # Others have removed some meanwhile; the next to store looks again.
            return []

    def _remove_expired(self) -> None:
        entries, now, removed = self._entries, clock.now(), []
        # Until there are no more, or somebody else has taken the last one.
        with contextlib.suppress(IndexError):
            while self._ends[0][0] <= now:
                _, _, key = heapq.heappop(self._ends)
                if entries.get(key, _NEVER)[2] <= now:
                    removed.append(self._remove(key))
        del removed
        if len(self._ends) > 2 * len(entries) + _FEW:
            # Of entries that went before their time.
            self._ends = [end for end in self._ends.copy() if entries.get(end[2], _NEVER)[2] == end[0]]
            heapq.heapify(self._ends)

    def forget_instance(self, instance: Instance) -> None:
        """Remove what nobody can ask for any more; also at the end of a program, when globals are gone."""
        removed = [self._drop(key) for key in list(self._instances.pop(instance, {}))]
        del removed


def _has_not_ended(entry: Entry) -> bool:
    return (entry[2] if entry[0].__class__ is Failed else entry[1]) > clock.now()


def _instance_in(key: Any) -> Instance | None:
    return key[0] if key.__class__ is tuple and key and key[0].__class__ is Instance else None


def _counter(uses: dict[Any, int]) -> Callable[[Any], object]:
    # No method, which would keep the store until the garbage collector comes.
    def count(key: Any) -> None:
        uses[key] = uses[key] + 1

    return count
