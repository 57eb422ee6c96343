"""The two decorators."""
