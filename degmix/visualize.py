"""Pictures for people: predictions and labels in colours, their legends, and the sheet that compares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from degmix import colours
from degmix.losses import IGNORE
from degmix.tasks import TASKS, Labels

BACKGROUND = (255, 255, 255)
INK = (32, 32, 40)
GAP = 12


def paint(task: str, values: NDArray, depth_range: tuple[float, float]) -> colours.Picture:
    """A prediction or target of one image, (H, W) or (channels, H, W), as an RGB picture (H, W, 3).

    Args:
        task: the task's name.
        values: as ``Task.predict`` returns it or as the data set holds it, unlabelled pixels as there.
        depth_range: metres at the two ends of the colour scale.
    """
    match TASKS[task].picture:
        case "classes":
            return colours.paint_classes(values, [colours.class_colour(i) for i in range(IGNORE)])
        case "parts":
            return colours.paint_classes(values, [colours.part_colour(i) for i in range(IGNORE)])
        case "probability":
            values = values.reshape(values.shape[-2:])
            return colours.paint_ramp(values, 0.0, 1.0, values != IGNORE)
        case "depth":
            return colours.paint_ramp(values[0], *depth_range, values[0] != 0)
        case "normals":
            return colours.paint_normals(values, (values != 0).any(axis=0))


def depth_range(*depths: NDArray) -> tuple[float, float]:
    """Ends for a colour scale: nearly the nearest and farthest of the valid depths."""
    valid = np.concatenate([depth[depth > 0].ravel() for depth in depths])
    if not valid.size:
        return 0.0, 1.0
    low, high = np.percentile(valid, (1, 99))
    return float(low), float(max(high, low + 0.1))


def legend(task: str, labels: Labels, scale: tuple[float, float], width: int, size: int = 20) -> Image.Image:
    """The legend of one task, ``width`` pixels wide, in letters ``size`` pixels high."""
    match TASKS[task].picture:
        case "classes":
            entries = [(name, colours.class_colour(i)) for i, name in enumerate(labels.classes)]
            return _swatches([*entries, ("no label", colours.UNLABELLED)], width, size)
        case "parts":
            entries = [(name, colours.part_colour(i)) for i, name in enumerate(labels.parts)]
            return _swatches([*entries, ("no label", colours.UNLABELLED)], width, size)
        case "probability":
            return _scale("0", "1", width, size)
        case "depth":
            return _scale(f"{scale[0]:.1f} m", f"{scale[1]:.1f} m", width, size)
        case "normals":
            return _normals_ball(width, size)


def prediction_sheet(
    images: Sequence[NDArray],
    targets: Sequence[Mapping[str, NDArray]],
    predictions: Sequence[Mapping[str, NDArray]],
    labels: Labels,
) -> Image.Image:
    """Image, ground truth and prediction of every task, one column each, with headings and legends.

    Args:
        images: RGB pictures (H, W, 3) uint8, all of one size.
        targets, predictions: per image, the arrays that ``paint`` takes, by task.
        labels: names for the legends.
    """
    tasks = list(predictions[0])
    height, width = images[0].shape[:2]
    zoom = max(1, round(240 / width))
    height, width = height * zoom, width * zoom
    size = 22
    left, heading = 150, 2 * size + GAP
    scale = depth_range(*(target["depth"] for target in targets)) if "depth" in tasks else (0.0, 1.0)
    keys = [legend(task, labels, scale, width, size=18) for task in tasks]
    block = 2 * height + GAP // 2

    columns = [left + i * (width + GAP) for i in range(len(tasks) + 1)]
    bottom = heading + len(images) * (block + 2 * GAP)
    sheet = Image.new(
        "RGB", (columns[-1] + width + GAP, bottom + max(key.height for key in keys) + GAP), BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    for column, title in zip(columns, ["Image", *(TASKS[task].title for task in tasks)], strict=True):
        _centred(draw, title, column + width // 2, heading // 2, size, width)
    for row, (image, target, prediction) in enumerate(zip(images, targets, predictions, strict=True)):
        top = heading + row * (block + 2 * GAP)
        below = top + height + GAP // 2
        sheet.paste(_enlarged(image, zoom), (columns[0], top + (block - height) // 2))
        for text, y in (("ground\ntruth", top), ("predicted", below)):
            _centred(draw, text, left // 2, y + height // 2, size, left)
        for column, task in zip(columns[1:], tasks, strict=True):
            sheet.paste(_enlarged(paint(task, target[task], scale), zoom), (column, top))
            sheet.paste(_enlarged(paint(task, prediction[task], scale), zoom), (column, below))
    for column, key in zip(columns[1:], keys, strict=True):
        sheet.paste(key, (column, bottom))
    return sheet


def with_legend(picture: Image.Image, key: Image.Image) -> Image.Image:
    """A picture with a legend below it."""
    canvas = Image.new("RGB", (max(picture.width, key.width), picture.height + GAP + key.height), BACKGROUND)
    canvas.paste(picture, (0, 0))
    canvas.paste(key, (0, picture.height + GAP))
    return canvas


def _enlarged(picture: NDArray, zoom: int) -> Image.Image:
    return Image.fromarray(np.repeat(np.repeat(picture, zoom, axis=0), zoom, axis=1))


def _centred(draw: ImageDraw.ImageDraw, text: str, x: int, y: int, size: int, room: int) -> None:
    """Text centred on a point, in smaller letters if it is wider than its room."""
    font = ImageFont.load_default(size)
    while size > 8 and draw.multiline_textbbox((0, 0), text, font=font)[2] > room:
        size -= 1
        font = ImageFont.load_default(size)
    draw.multiline_text((x, y), text, fill=INK, font=font, anchor="mm", align="center")


def _swatches(entries: Sequence[tuple[str, tuple[int, int, int]]], width: int, size: int) -> Image.Image:
    """Colour patches with names, in as many columns as fit."""
    font = ImageFont.load_default(size)
    line = size + 8
    cell = line + max(round(font.getlength(name)) for name, _ in entries) + GAP
    columns = max(1, width // cell)
    rows = -(-len(entries) // columns)
    key = Image.new("RGB", (max(width, cell), rows * line), BACKGROUND)
    draw = ImageDraw.Draw(key)
    for index, (name, colour) in enumerate(entries):
        x, y = index // rows * cell, index % rows * line
        draw.rectangle((x, y + 4, x + size, y + 4 + size), fill=colour)
        draw.text((x + line, y + 4 + size // 2), name, fill=INK, font=font, anchor="lm")
    return key


def _scale(low: str, high: str, width: int, size: int) -> Image.Image:
    """The colour ramp with its two ends named."""
    font = ImageFont.load_default(size)
    width = max(width, round(font.getlength(low) + font.getlength(high)) + 2 * GAP)
    key = Image.new("RGB", (width, 2 * size + 16), BACKGROUND)
    ramp = colours.paint_ramp(np.linspace(0, 1, width)[None].repeat(size, axis=0), 0.0, 1.0)
    key.paste(Image.fromarray(ramp), (0, 4))
    draw = ImageDraw.Draw(key)
    draw.text((0, size + 10), low, fill=INK, font=font, anchor="lt")
    draw.text((width, size + 10), high, fill=INK, font=font, anchor="rt")
    return key


def _normals_ball(width: int, size: int) -> Image.Image:
    """A ball seen from the front: each colour stands where the surface faces that way."""
    font = ImageFont.load_default(size)
    words = ("facing left, right,", "up, down, and the", "viewer (middle)")
    radius = 2 * size
    wide = 2 * radius + GAP + max(round(font.getlength(word)) for word in words)
    key = Image.new("RGB", (max(width, wide), 2 * radius + 6), BACKGROUND)
    y, x = np.mgrid[-1 : 1 : 2j * radius, -1 : 1 : 2j * radius]
    inside = x**2 + y**2 <= 1
    ball = colours.paint_normals(np.stack((x, -y, np.sqrt(np.clip(1 - x**2 - y**2, 0, 1)))))
    ball[~inside] = BACKGROUND
    key.paste(Image.fromarray(ball), (0, 4))
    draw = ImageDraw.Draw(key)
    for line, word in enumerate(words):
        draw.text((2 * radius + GAP, 4 + (line + 0.5) * 1.3 * size), word, fill=INK, font=font, anchor="lm")
    return key
