"""Fixtures of `opero.testing` for pytest, which finds them by itself where opero is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def opero_instant() -> Iterator[Any]:
    """No wait of opero's sleeps; gives the `opero.testing.Instant`."""
    from opero.testing import instant

    with instant() as virtual:
        yield virtual


@pytest.fixture
def opero_disabled() -> Iterator[None]:
    """Decorators do nothing."""
    from opero.testing import disabled

    with disabled():
        yield


@pytest.fixture
def opero_recorded() -> Iterator[list[Any]]:
    """The list of all events during the test."""
    from opero.testing import recorded

    with recorded() as events:
        yield events
