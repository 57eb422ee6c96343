"""The two decorators."""

from opero.decorators.opero import opero
from opero.decorators.opmap import opmap

__all__ = ["opero", "opmap"]
