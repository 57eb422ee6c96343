"""The two decorators, a module for each."""
