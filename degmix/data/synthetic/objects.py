"""The classes, and what every object is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from degmix.data.synthetic.geometry import Box, Cylinder, Ellipsoid, Primitive, vector, yaw_rotation
from degmix.data.synthetic.materials import Material

CLASSES: tuple[str, ...] = (
    "wall",
    "floor",
    "ceiling",
    "door",
    "window",
    "picture",
    "cabinet",
    "bed",
    "sofa",
    "table",
    "lamp",
    "plant",
    "person",
)
"""Semantic classes; the label is the position."""

PARTS: tuple[str, ...] = (
    "background",
    "head",
    "torso",
    "upper arm",
    "lower arm",
    "upper leg",
    "lower leg",
)
"""Labels of ``human_parts``, as in PASCAL-Person-Part."""

UNLABELLED = (
    "unlabelled"  # clutter that no class covers: void in semseg, yet an instance with depth and edges
)
VOID = 255


def label_of(name: str) -> int:
    """The class's label, 255 for what no class covers."""
    return VOID if name == UNLABELLED else CLASSES.index(name)


@dataclass(frozen=True)
class Surface:
    """One primitive with its material and, on a person, its body part."""

    shape: Primitive
    material: Material
    part: int = 0


@dataclass(frozen=True)
class Item:
    """One instance: surfaces about the centre of its footprint on the floor, its front along +z.

    ``half_width`` and ``half_depth`` are the footprint's half sizes along x and z, metres.
    """

    name: str
    surfaces: tuple[Surface, ...]
    half_width: float = 0.0
    half_depth: float = 0.0

    def placed(self, yaw: float, x: float, y: float, z: float) -> Item:
        """Turn about the vertical, then move."""
        rotation, translation = yaw_rotation(yaw), vector(x, y, z)
        moved = (replace(s, shape=s.shape.moved(rotation, translation)) for s in self.surfaces)
        return replace(self, surfaces=tuple(moved))


def item(name: str, surfaces: Iterable[Surface], half_width: float = 0.0, half_depth: float = 0.0) -> Item:
    """Build an item from any iterable of surfaces."""
    return Item(name, tuple(surfaces), half_width, half_depth)


def block(
    material: Material, width: float, height: float, depth: float, x: float = 0, y: float = 0, z: float = 0
) -> Surface:
    """A box of the given sizes standing at height y, centred on x and z."""
    low = (x - width / 2, y, z - depth / 2)
    high = (x + width / 2, y + height, z + depth / 2)
    return Surface(Box.upright(low, high), material)


def column(
    material: Material, radius: float, height: float, x: float = 0, y: float = 0, z: float = 0
) -> Surface:
    """An upright cylinder standing at height y."""
    return Surface(Cylinder(vector(x, y, z), height, radius), material)


def ball(material: Material, radius: float, x: float, y: float, z: float, tall: float = 1.0) -> Surface:
    """A sphere about (x, y, z), stretched vertically by ``tall``."""
    return Surface(Ellipsoid(vector(x, y, z), vector(radius, radius * tall, radius)), material)


def salt(rng: np.random.Generator) -> int:
    """A seed for one material's noise."""
    return int(rng.integers(1 << 16))
