"""Pools, and maps over them without any policy."""

from opero.concurrency.pool import get_parallel_executor, get_parallel_map_decorator

__all__ = ["get_parallel_executor", "get_parallel_map_decorator"]
