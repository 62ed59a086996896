"""Furniture and fixtures: every builder draws one object of its class at random, sizes in metres."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from degmix.data.synthetic.materials import (
    Color,
    Material,
    checker,
    picked,
    plain,
    rings,
    speckle,
    stripes,
    tinted,
    wood,
)
from degmix.data.synthetic.objects import UNLABELLED, Item, Surface, ball, block, column, item, salt

Rng = np.random.Generator

WOODS: tuple[Color, ...] = ((0.42, 0.22, 0.09), (0.3, 0.14, 0.06), (0.55, 0.34, 0.16), (0.2, 0.1, 0.06))
FABRICS: tuple[Color, ...] = ((0.1, 0.2, 0.42), (0.4, 0.09, 0.1), (0.12, 0.3, 0.25), (0.32, 0.3, 0.28))
LINEN: tuple[Color, ...] = ((0.8, 0.8, 0.78), (0.72, 0.68, 0.58), (0.66, 0.72, 0.8))
BLANKETS: tuple[Color, ...] = ((0.55, 0.2, 0.32), (0.25, 0.4, 0.62), (0.62, 0.5, 0.25), (0.4, 0.28, 0.52))
METAL: Color = (0.3, 0.3, 0.32)


def wooden(rng: Rng, shine: float = 0.15) -> Material:
    """Planks in one of the wood tones."""
    color = picked(rng, WOODS)
    dark = tuple(0.6 * channel for channel in color)
    return Material(color, dark, wood, scale=0.25, shine=shine, salt=salt(rng))


def cloth(rng: Rng, colors: tuple[Color, ...]) -> Material:
    """Woven stuff, sometimes with a pattern."""
    color = picked(rng, colors)
    pattern, scale = [(speckle, 0.06), (speckle, 0.06), (stripes, 0.09), (checker, 0.14)][rng.integers(4)]
    return Material(color, tinted(rng, tuple(0.65 * c for c in color)), pattern, scale=scale, salt=salt(rng))


def bed(rng: Rng) -> Item:
    """A bed with headboard, mattress, blanket and pillows; the head end is at the back."""
    width, length = rng.uniform(1.0, 1.7), rng.uniform(1.95, 2.15)
    frame, linen, blanket = wooden(rng), Material(picked(rng, LINEN), salt=salt(rng)), cloth(rng, BLANKETS)
    top = rng.uniform(0.46, 0.58)
    surfaces = [
        block(frame, width, 0.22, length, y=0.1),
        block(frame, width, rng.uniform(0.85, 1.1), 0.06, z=-length / 2 + 0.03),
        block(linen, width - 0.06, top - 0.3, length - 0.14, y=0.3, z=0.02),
        block(blanket, width + 0.02, top - 0.22, length * 0.66, y=0.25, z=length * 0.17 + 0.02),
    ]
    pillows = 2 if width > 1.3 else 1
    for number in range(pillows):
        x = (number - (pillows - 1) / 2) * 0.62
        surfaces.append(block(linen, 0.52, 0.13, 0.32, x=x, y=top - 0.01, z=-length / 2 + 0.32))
    return item("bed", surfaces, width / 2 + 0.02, length / 2)


def sofa(rng: Rng) -> Item:
    """A sofa or, at the narrow end, an armchair."""
    width, depth = rng.uniform(0.95, 2.1), rng.uniform(0.82, 0.95)
    cover = cloth(rng, FABRICS)
    arm = rng.uniform(0.14, 0.22)
    surfaces = [
        block(cover, width, 0.3, depth, y=0.06),
        block(cover, width, rng.uniform(0.72, 0.88), 0.2, z=-depth / 2 + 0.1, y=0.06),
        block(cover, arm, 0.56, depth, x=-width / 2 + arm / 2, y=0.06),
        block(cover, arm, 0.56, depth, x=width / 2 - arm / 2, y=0.06),
    ]
    seats = max(1, round((width - 2 * arm) / 0.6))
    seat_width = (width - 2 * arm) / seats
    cushion = Material(tinted(rng, cover.first, 0.12), salt=salt(rng), pattern=speckle, scale=0.05)
    for number in range(seats):
        x = (number - (seats - 1) / 2) * seat_width
        surfaces.append(block(cushion, seat_width - 0.02, 0.1, depth - 0.22, x=x, y=0.36, z=0.1))
    return item("sofa", surfaces, width / 2, depth / 2)


def table(rng: Rng) -> Item:
    """A table: rectangular on four legs, or round on one."""
    top = wooden(rng, shine=0.3) if rng.random() < 0.75 else Material((0.75, 0.75, 0.72), shine=0.3)
    height = rng.uniform(0.68, 0.78) if rng.random() < 0.7 else rng.uniform(0.4, 0.5)
    if rng.random() < 0.35:
        radius = rng.uniform(0.4, 0.65)
        surfaces = [
            column(top, radius, 0.045, y=height - 0.045),
            column(Material(METAL, shine=0.4), 0.05, height - 0.07, y=0.03),
            column(Material(METAL, shine=0.4), radius * 0.55, 0.03),
        ]
        return item("table", surfaces, radius, radius)
    width, depth = rng.uniform(0.9, 1.7), rng.uniform(0.6, 0.95)
    surfaces = [block(top, width, 0.05, depth, y=height - 0.05)]
    for side_x in (-1, 1):
        for side_z in (-1, 1):
            x, z = side_x * (width / 2 - 0.06), side_z * (depth / 2 - 0.06)
            surfaces.append(block(top, 0.07, height - 0.05, 0.07, x=x, z=z))
    return item("table", surfaces, width / 2, depth / 2)


def cabinet(rng: Rng) -> Item:
    """A wardrobe, a chest of drawers or a bookcase."""
    kind = rng.choice(["wardrobe", "drawers", "bookcase"])
    body = wooden(rng) if rng.random() < 0.7 else Material(tinted(rng, (0.7, 0.68, 0.62)), salt=salt(rng))
    knob = Material((0.6, 0.5, 0.3), shine=0.6)
    depth = rng.uniform(0.42, 0.58)
    if kind == "bookcase":
        return bookcase(rng, body, depth * 0.75)
    tall = kind == "wardrobe"
    width, height = rng.uniform(0.8, 1.5), rng.uniform(1.7, 2.1) if tall else rng.uniform(0.75, 1.05)
    surfaces = [block(body, width, height, depth)]
    front = Material(
        tinted(rng, tuple(1.2 * c for c in body.first), 0.03), body.second, body.pattern, body.scale
    )
    columns, rows = (2, 1) if tall else (1 if width < 1.1 else 2, 3)
    panel_width, panel_height = width / columns, (height - 0.08) / rows
    for column_number in range(columns):
        for row in range(rows):
            x = (column_number - (columns - 1) / 2) * panel_width
            y = 0.06 + row * panel_height
            panel = (panel_width - 0.05, panel_height - 0.05, 0.02)
            surfaces.append(block(front, *panel, x=x, y=y, z=depth / 2 + 0.01))
            knob_x = x + (panel_width * 0.38 * (-1 if column_number else 1) if tall else 0)
            surfaces.append(ball(knob, 0.022, knob_x, y + panel_height / 2, depth / 2 + 0.035))
    return item("cabinet", surfaces, width / 2, depth / 2 + 0.05)


def bookcase(rng: Rng, body: Material, depth: float) -> Item:
    """Shelves between two sides, with rows of books on them."""
    width, height = rng.uniform(0.7, 1.2), rng.uniform(1.3, 1.9)
    shelves = int(height / 0.36)
    surfaces = [
        block(body, 0.04, height, depth, x=-width / 2 + 0.02),
        block(body, 0.04, height, depth, x=width / 2 - 0.02),
        block(body, width, height, 0.03, z=-depth / 2 + 0.015),
    ]
    pitch = (height - 0.04) / shelves
    for number in range(shelves + 1):
        surfaces.append(block(body, width, 0.04, depth, y=number * pitch))
    for number in range(shelves):
        books = Material(
            picked(rng, FABRICS, 0.15), picked(rng, BLANKETS, 0.15), stripes, scale=rng.uniform(0.03, 0.06)
        )
        row = (width - 0.08) * rng.uniform(0.5, 1)
        x = -(width - 0.08 - row) / 2
        size = (row, pitch * rng.uniform(0.55, 0.8), depth * 0.7)
        surfaces.append(block(books, *size, x=x, y=number * pitch + 0.04, z=-0.02))
    return item("cabinet", surfaces, width / 2, depth / 2)


def shade(rng: Rng) -> Material:
    """A lampshade with the light on."""
    return Material(tinted(rng, (0.9, 0.78, 0.5)), glow=rng.uniform(0.5, 0.9), pattern=plain)


def floor_lamp(rng: Rng) -> Item:
    """A lamp on a pole."""
    pole, height = Material(METAL, shine=0.5), rng.uniform(1.4, 1.75)
    surfaces = [column(pole, 0.15, 0.03), column(pole, 0.018, height - 0.2)]
    if rng.random() < 0.5:
        surfaces.append(column(shade(rng), 0.2, 0.28, y=height - 0.28))
    else:
        surfaces.append(ball(shade(rng), 0.19, 0, height - 0.15, 0))
    return item("lamp", surfaces, 0.2, 0.2)


def table_lamp(rng: Rng) -> Item:
    """A small lamp with a spherical foot."""
    foot = Material(picked(rng, FABRICS, 0.1), shine=0.4)
    surfaces = [
        ball(foot, 0.09, 0, 0.09, 0),
        column(Material(METAL), 0.012, 0.14, y=0.16),
        column(shade(rng), 0.14, 0.19, y=0.26),
    ]
    return item("lamp", surfaces, 0.14, 0.14)


def pendant_lamp(rng: Rng, ceiling: float) -> Item:
    """A globe or drum hanging from the ceiling."""
    drop, radius = rng.uniform(0.35, 0.6), rng.uniform(0.16, 0.24)
    cord = column(Material(METAL), 0.01, drop, y=ceiling - drop)
    if rng.random() < 0.5:
        globe = ball(shade(rng), radius, 0, ceiling - drop, 0)
    else:
        globe = column(shade(rng), radius * 1.2, 0.2, y=ceiling - drop - 0.1)
    return item("lamp", [cord, globe], radius, radius)


def plant(rng: Rng, size: float = 1.0) -> Item:
    """A pot with leaves; ``size`` 1 stands on the floor, smaller ones on furniture."""
    radius, pot = rng.uniform(0.16, 0.2) * size, rng.uniform(0.26, 0.36) * size
    clay = Material(picked(rng, ((0.5, 0.2, 0.1), (0.7, 0.68, 0.64), (0.2, 0.24, 0.3))), salt=salt(rng))
    surfaces = [column(clay, radius, pot)]
    for number in range(7):
        leaf = tinted(rng, (0.07, 0.27, 0.06), 0.05)
        dark = tuple(0.4 * channel for channel in leaf)
        green = Material(leaf, dark, speckle, scale=0.07 * size, salt=salt(rng))
        angle, away = number * 2.4, 0.16 * size * (number > 0)
        y = pot + (0.12 + 0.07 * number * rng.uniform(0.7, 1.2)) * size
        x, z = away * np.cos(angle), away * np.sin(angle)
        surfaces.append(ball(green, rng.uniform(0.12, 0.19) * size, x, y, z, tall=rng.uniform(0.9, 1.5)))
    return item("plant", surfaces, 0.3 * size, 0.3 * size)


def door(rng: Rng) -> Item:
    """A closed door in its frame, to stand with its back against a wall."""
    width, height = rng.uniform(0.8, 0.95), rng.uniform(2.0, 2.1)
    colors = ((0.33, 0.17, 0.07), (0.62, 0.6, 0.55), (0.25, 0.3, 0.33))
    leaf_color = picked(rng, colors)
    leaf = Material(leaf_color, tuple(0.75 * c for c in leaf_color), wood, scale=0.4, salt=salt(rng))
    panel = Material(tuple(0.7 * c for c in leaf_color), salt=salt(rng))
    frame = Material(tinted(rng, (0.75, 0.73, 0.7)))
    surfaces = [
        block(leaf, width, height, 0.05, z=0.02),
        block(frame, 0.08, height + 0.08, 0.08, x=-width / 2 - 0.04, z=0.03),
        block(frame, 0.08, height + 0.08, 0.08, x=width / 2 + 0.04, z=0.03),
        block(frame, width, 0.08, 0.08, y=height, z=0.03),
        block(panel, width * 0.6, height * 0.34, 0.02, y=height * 0.56, z=0.05),
        block(panel, width * 0.6, height * 0.32, 0.02, y=height * 0.1, z=0.05),
        ball(Material((0.6, 0.5, 0.25), shine=0.7), 0.035, width * 0.4, 1.0, 0.09),
    ]
    return item("door", surfaces, width / 2 + 0.1, 0.1)


def window(rng: Rng) -> Item:
    """Bright panes in a cross of frame, centred on y = 0, its back on a wall."""
    width, height = rng.uniform(0.9, 1.7), rng.uniform(0.9, 1.35)
    sky = tinted(rng, (0.5, 0.72, 0.95), 0.1)
    glass = Material(sky, tuple(0.75 * c for c in sky), speckle, scale=0.5, glow=1.0, salt=salt(rng))
    frame = Material(tinted(rng, (0.8, 0.8, 0.78)), shine=0.1)
    surfaces = [
        block(glass, width, height, 0.02, y=-height / 2, z=0.01),
        block(frame, width + 0.12, 0.07, 0.08, y=height / 2, z=0.03),
        block(frame, width + 0.24, 0.07, 0.2, y=-height / 2 - 0.07, z=0.09),
        block(frame, 0.07, height, 0.08, x=-width / 2 - 0.03, y=-height / 2, z=0.03),
        block(frame, 0.07, height, 0.08, x=width / 2 + 0.03, y=-height / 2, z=0.03),
        block(frame, 0.05, height, 0.06, y=-height / 2, z=0.02),
    ]
    return item("window", surfaces, width / 2 + 0.12, height / 2 + 0.1)


def picture(rng: Rng) -> Item:
    """A framed painting, centred on y = 0, its back on a wall."""
    width, height = rng.uniform(0.45, 1.0), rng.uniform(0.4, 0.8)
    pattern, scale = [(checker, 0.16), (speckle, 0.2), (rings, 0.13), (speckle, 0.1)][rng.integers(4)]
    first, second = tinted(rng, (0.45, 0.25, 0.2), 0.3), tinted(rng, (0.2, 0.35, 0.5), 0.3)
    canvas = Material(first, second, pattern, scale=scale, salt=salt(rng))
    frame = Material(picked(rng, ((0.05, 0.04, 0.04), (0.5, 0.36, 0.12), (0.25, 0.12, 0.05))), shine=0.2)
    surfaces = [
        block(frame, width + 0.12, height + 0.12, 0.03, y=-height / 2 - 0.06, z=0.015),
        block(canvas, width, height, 0.02, y=-height / 2, z=0.03),
    ]
    return item("picture", surfaces, width / 2 + 0.08, height / 2 + 0.08)


def clutter(rng: Rng) -> Item:
    """A small thing that no class covers: a ball, a carton, a vase, a pile of books."""
    kind = rng.integers(4)
    paint = Material(
        tinted(rng, (0.5, 0.3, 0.2), 0.35), tinted(rng, (0.5, 0.5, 0.3), 0.35), rings, scale=0.07, shine=0.3
    )
    surfaces: list[Surface]
    if kind == 0:
        radius = rng.uniform(0.1, 0.17)
        surfaces = [ball(paint, radius, 0, radius, 0)]
    elif kind == 1:
        carton = Material(tinted(rng, (0.45, 0.31, 0.18)), pattern=speckle, scale=0.3, salt=salt(rng))
        surfaces = [block(carton, rng.uniform(0.2, 0.36), rng.uniform(0.15, 0.3), rng.uniform(0.2, 0.3))]
    elif kind == 2:
        surfaces = [column(paint, 0.06, 0.22), ball(paint, 0.09, 0, 0.12, 0)]
    else:
        surfaces = []
        for number in range(4):
            cover = Material(tinted(rng, (0.4, 0.3, 0.3), 0.35))
            x, z = rng.uniform(-0.02, 0.02, 2)
            surfaces.append(block(cover, 0.24, 0.045, 0.17, x=x, y=0.045 * number, z=z))
    return item(UNLABELLED, surfaces, 0.18, 0.18)


ALONG_WALLS: tuple[Callable[[Rng], Item], ...] = (bed, sofa, cabinet)
