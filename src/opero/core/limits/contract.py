"""What a call may ask of a limit, whether it is kept in this process or elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from opero.core.limits.rates import Rates


class Limit(Protocol):
    """One line of callers, and the rates at which they may start."""

    @property
    def take_now(self) -> Callable[[], bool] | None:
        """Takes a slot if one is free and nobody waits, and tells; None if asking could block."""
        ...

    def take(self, deadline: float | None) -> Generator[Any, Any, bool]:
        """Wait for a slot; False, at once, if it would not come before the clock shows ``deadline``."""
        ...

    def try_to_take(self) -> Generator[Any, Any, bool]:
        """Take a slot if one is free and nobody waits; tells."""
        ...

    def expected_wait(self) -> float:
        """Seconds until a slot that is asked for now would come, as far as this process knows."""
        ...

    def pause(self, seconds: float) -> Generator[Any, Any, None]:
        """Let nothing start for so long."""
        ...

    def change(self, rates: Rates) -> None:
        """Go on at other rates; those who wait keep their places."""
        ...

    def is_idle(self) -> bool:
        """Whether a new limit would not behave any differently."""
        ...
