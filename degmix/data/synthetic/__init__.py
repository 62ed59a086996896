"""Synthetic rooms with exact labels for six tasks: ``render`` one, or ``write`` a data set of them."""

from .objects import CLASSES, PARTS
from .renderer import render
from .writer import write

__all__ = ["CLASSES", "PARTS", "render", "write"]
