"""Helpers that belong to no single policy."""
