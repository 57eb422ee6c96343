"""tenacity's `RetryError`, as one that can leave its process; imports tenacity, and so is imported with it only."""

from __future__ import annotations

from typing import Any

import tenacity


class RetryError(tenacity.RetryError):
    """Raised where tenacity raises its own, which cannot be pickled or copied: its last attempt holds a lock."""

    def __reduce__(self) -> Any:
        last = self.last_attempt
        value = last.exception() if last.failed else last.result()
        notes = {name: value for name, value in vars(self).items() if name != "last_attempt"}
        return _made_again, (type(self), last.attempt_number, value, last.failed), notes


def _made_again(kind: type[RetryError], *last_attempt: Any) -> RetryError:
    return kind(tenacity.Future.construct(*last_attempt))
