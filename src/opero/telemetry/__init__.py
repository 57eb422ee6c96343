"""opero's events as OpenTelemetry spans and metrics, or as Prometheus metrics: one module for each.

Each is imported where it is first asked for, and imports the library that it speaks to and no other.
"""

from typing import TYPE_CHECKING

from opero.utils.lazily import importing_lazily

if TYPE_CHECKING:
    from opero.telemetry import otel as otel
    from opero.telemetry import prometheus as prometheus
else:
    __getattr__, __dir__ = importing_lazily(__name__, {name: f"{__name__}.{name}" for name in ("otel", "prometheus")})
