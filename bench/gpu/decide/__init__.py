"""Prototypes of kernels beside ours and torchvision's operator, to decide which one is built.

``python -m bench.gpu.decide OUT.jsonl`` measures them; the lists are those of ``python -m bench --with``.
"""

from __future__ import annotations

from dataclasses import replace

from bench.cases.own import Contender
from bench.cases.shapes import NYUD, SMALL_OFFSETS, WILD_OFFSETS, Convolution
from bench.gpu.decide.columns import by_columns
from bench.gpu.decide.mix import redesigned
from bench.gpu.decide.vectors import by_vectors

CONTENDERS = [
    Contender("planar scatter", "deform_mix", redesigned(pairs=False)),
    Contender("planar scatter of pairs", "deform_mix", redesigned(pairs=True)),
    *(
        Contender(f"columns of {megabytes} MB", "deform_conv2d (general)", by_columns(megabytes))
        for megabytes in (70, 32, 16)  # an image has 70
    ),
    Contender("columns, tents", "deform_conv2d (general)", by_columns(tents=True)),
    *(
        Contender(f"vectors of {width} channels", "deform_conv2d (small groups)", by_vectors(width))
        for width in (16, 64)
    ),
]
SHAPES = [
    *(
        shape
        for spread in (SMALL_OFFSETS, WILD_OFFSETS)
        for shape in (
            replace(NYUD, name=f"nyud, sigma {spread:.0f}", spread=spread),
            Convolution(8, 256, 100, 152, spread, f"detection, sigma {spread:.0f}"),
        )
    ),
    *(
        Convolution(8, 64, 180, 320, SMALL_OFFSETS, f"video, {groups} groups", offset_groups=groups)
        for groups in (8, 16)
    ),
]
