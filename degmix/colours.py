"""Colours: arrays of predictions or labels in, RGB pictures (H, W, 3) uint8 out. Only numpy."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

UNLABELLED = (72, 72, 72)
"""Colour of pixels without a label."""

# Twenty colours chosen to be told apart; further classes take hues a golden angle apart.
_DISTINCT = bytes.fromhex(
    "4e79a7 f28e2b 59a14f e15759 76b7b2 edc948 b07aa1 ff9da7 9c755f 8cd17d"
    "1f4e79 a05195 d7b5a6 2f6b4f b6992d d37295 499894 86bcb6 79706e d4a6c8"
)

# Dark blue, violet, red, orange, pale yellow: rises in lightness, so it also reads in grey.
_RAMP = np.array(
    [
        (16, 12, 60),
        (74, 20, 118),
        (138, 34, 122),
        (200, 62, 92),
        (240, 116, 62),
        (252, 184, 84),
        (252, 248, 190),
    ],
    dtype=np.float64,
)


def class_colour(index: int) -> tuple[int, int, int]:
    """The colour of class ``index``, the same in every picture."""
    if 3 * index < len(_DISTINCT):
        red, green, blue = _DISTINCT[3 * index : 3 * index + 3]
        return red, green, blue
    lightness = (0.42, 0.58, 0.74)[index % 3]
    rgb = colorsys.hls_to_rgb(index * 0.618034 % 1, lightness, 0.55)
    return tuple(round(255 * value) for value in rgb)


def part_colour(index: int) -> tuple[int, int, int]:
    """The colour of human part ``index``: background nearly black, the parts as the classes' colours."""
    return (24, 24, 32) if index == 0 else class_colour(index)


def paint_classes(labels: NDArray, colours: list[tuple[int, int, int]]) -> Picture:
    """Class indices (H, W), 255 unlabelled, in their colours."""
    table = np.full((256, 3), UNLABELLED, dtype=np.uint8)
    table[: len(colours)] = colours
    return table[labels]


def paint_ramp(values: NDArray, low: float, high: float, valid: NDArray | None = None) -> Picture:
    """Values (H, W) from ``low`` (dark) to ``high`` (bright); others and invalid ones at the ends or grey."""
    position = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(_RAMP) - 1)
    lower = np.minimum(position.astype(np.int64), len(_RAMP) - 2)
    fraction = (position - lower)[..., None]
    picture = (_RAMP[lower] * (1 - fraction) + _RAMP[lower + 1] * fraction).round().astype(np.uint8)
    if valid is not None:
        picture[~valid] = UNLABELLED
    return picture


def paint_normals(normals: NDArray, valid: NDArray | None = None) -> Picture:
    """Unit vectors (3, H, W) as colours: x (right) in red, y (up) in green, z (to the viewer) in blue."""
    picture = np.clip((normals.transpose(1, 2, 0) + 1) * 127.5, 0, 255).round().astype(np.uint8)
    if valid is not None:
        picture[~valid] = UNLABELLED
    return picture
