"""The policies one by one, as decorators of their own, and what they share."""

from typing import TYPE_CHECKING

from opero.core.control import Control, control
from opero.core.retry import get_retry_decorator
from opero.exceptions import (
    AllFailedError,
    CallTimeoutError,
    CircuitOpenError,
    FailedItemsWarning,
    MisuseError,
    NotTransferableError,
    OperoError,
    RateLimitedError,
    RejectedResultError,
    RemoteError,
    UnsafeCacheError,
    WorkerCrashedError,
)
from opero.utils import importing_lazily

if TYPE_CHECKING:
    from opero.core.cache import clear_cache, get_cache_context, get_cache_decorator
    from opero.core.fallback import get_fallback_decorator
    from opero.core.rate_limit import RateLimiter, get_rate_limit_decorator
else:
    __getattr__, __dir__ = importing_lazily(
        __name__,
        {
            "opero.core.cache": ["clear_cache", "get_cache_context", "get_cache_decorator"],
            "opero.core.fallback": ["get_fallback_decorator"],
            "opero.core.rate_limit": ["RateLimiter", "get_rate_limit_decorator"],
        },
    )

__all__ = [
    "AllFailedError",
    "CallTimeoutError",
    "CircuitOpenError",
    "Control",
    "FailedItemsWarning",
    "MisuseError",
    "NotTransferableError",
    "OperoError",
    "RateLimitedError",
    "RateLimiter",
    "RejectedResultError",
    "RemoteError",
    "UnsafeCacheError",
    "WorkerCrashedError",
    "clear_cache",
    "control",
    "get_cache_context",
    "get_cache_decorator",
    "get_fallback_decorator",
    "get_rate_limit_decorator",
    "get_retry_decorator",
]
