"""opero's events as log lines, OpenTelemetry spans and metrics, or Prometheus metrics: one module for each.

Nothing of opero imports these modules, and each imports the library that it speaks to and no other.
"""
