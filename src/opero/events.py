"""What `opero.on_event` and ``on_event=`` tell of: one class for each kind of event."""

from opero.core.events import (
    AttemptFailed,
    AttemptStarted,
    CacheHit,
    CallDone,
    CallStarted,
    CandidateSwitched,
    Event,
    RetryPlanned,
    SlotWaited,
    Subscription,
    on_event,
)

__all__ = [
    "AttemptFailed",
    "AttemptStarted",
    "CacheHit",
    "CallDone",
    "CallStarted",
    "CandidateSwitched",
    "Event",
    "RetryPlanned",
    "SlotWaited",
    "Subscription",
    "on_event",
]
