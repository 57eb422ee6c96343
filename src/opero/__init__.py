"""Make functions resilient, and map them over any number of items."""

from typing import TYPE_CHECKING

from opero.core.control import control
from opero.core.retry import GIVE_UP, NEXT
from opero.core.stats import CallStats
from opero.decorators.opero import opero
from opero.events import on_event
from opero.exceptions import (
    AllFailedError,
    CallTimeoutError,
    CircuitOpenError,
    FailedItemsWarning,
    MisuseError,
    OperoError,
    RateLimitedError,
    RejectedResultError,
    WorkerCrashedError,
)
from opero.utils import importing_lazily
from opero.utils.logging import configure_logging

if TYPE_CHECKING:
    from opero import concurrency as concurrency
    from opero import http as http
    from opero import telemetry as telemetry
    from opero import testing as testing
    from opero.concurrency.outcome import Outcome, Results
    from opero.core.breaker import Breaker
    from opero.core.cache import Cache, clear_cache
    from opero.core.fallback import candidates, candidates_from
    from opero.core.rate_limit import RateLimiter
    from opero.decorators.opmap import opmap
else:
    __getattr__, __dir__ = importing_lazily(
        __name__,
        {
            "opero.concurrency": ["concurrency"],
            "opero.concurrency.outcome": ["Outcome", "Results"],
            "opero.core.breaker": ["Breaker"],
            "opero.core.cache": ["Cache", "clear_cache"],
            "opero.core.fallback": ["candidates", "candidates_from"],
            "opero.core.rate_limit": ["RateLimiter"],
            "opero.decorators.opmap": ["opmap"],
            "opero.http": ["http"],
            "opero.telemetry": ["telemetry"],
            "opero.testing": ["testing"],
        },
    )

try:
    from opero.__version__ import __version__
except ImportError:  # a source tree that was never built or installed
    __version__ = "0+unknown"

__all__ = [
    "GIVE_UP",
    "NEXT",
    "AllFailedError",
    "Breaker",
    "Cache",
    "CallStats",
    "CallTimeoutError",
    "CircuitOpenError",
    "FailedItemsWarning",
    "MisuseError",
    "OperoError",
    "Outcome",
    "RateLimitedError",
    "RateLimiter",
    "RejectedResultError",
    "Results",
    "WorkerCrashedError",
    "__version__",
    "candidates",
    "candidates_from",
    "clear_cache",
    "configure_logging",
    "control",
    "on_event",
    "opero",
    "opmap",
]
