"""Synthetic rooms with exact labels for six tasks: ``render`` one, or ``write`` a data set of them."""

from degmix.data.synthetic.objects import CLASSES, PARTS
from degmix.data.synthetic.renderer import render
from degmix.data.synthetic.writer import write

__all__ = ["CLASSES", "PARTS", "render", "write"]
