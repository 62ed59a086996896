"""Augmentations: one random view of a sample, all labels with it (the recipe of the DeGMix paper).

Samples are those of :mod:`degmix.data.nyud`; the transforms return them with the image normalised by
ImageNet's mean and standard deviation. Where a view reaches beyond the image, the image holds the mean (zero
after normalisation) and every label its ignore value.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from degmix.data.errors import DataError
from degmix.data.nyud import Sample
from degmix.losses import IGNORE

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SCALES = (0.5, 2.0)  # the paper's range of factors
LARGEST_SHARE = 0.75  # of one class in a crop
CROP_TRIES = 10

# what a label holds where there is none; edge, like the label maps, uses 255
PADDING: dict[str, float] = {
    "semseg": IGNORE,
    "human_parts": IGNORE,
    "sal": IGNORE,
    "edge": IGNORE,
    "depth": 0,
    "normals": 0,
}

Transform = Callable[[Sample, np.random.Generator], Sample]


def normalize(image: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation. ``image`` (…, 3, H, W) in [0, 1]."""
    mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (image - mean) / std


def positions(start: int, length: int, scaled: int, size: int) -> Tensor:
    """Source coordinates of pixels ``start``, … of an axis resized from ``size`` to ``scaled`` pixels.

    Pixel centres lie at half integers, as in ``interpolate(align_corners=False)``.
    """
    return (torch.arange(start, start + length, dtype=torch.float32) + 0.5) * (size / scaled) - 0.5


def nearest(label: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Values of the pixels that the source coordinates fall into. ``label`` (…, H, W)."""
    height, width = label.shape[-2:]
    row_index = rows.add(0.5).floor().long().clamp(0, height - 1)
    column_index = columns.add(0.5).floor().long().clamp(0, width - 1)
    return label.index_select(-2, row_index).index_select(-1, column_index)


def bilinear(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Interpolate ``image`` (…, H, W) at the source coordinates, one axis after the other."""
    for axis, at in ((-2, rows), (-1, columns)):
        at = at.clamp(0, image.shape[axis] - 1)
        low = at.floor().long()
        high = (low + 1).clamp(max=image.shape[axis] - 1)
        weight = (at - low).view(-1, 1) if axis == -2 else at - low
        image = torch.lerp(image.index_select(axis, low), image.index_select(axis, high), weight)
    return image


def pad(sample: Sample, size: tuple[int, int]) -> Sample:
    """Grow a sample with a normalised image to at least ``size``, at the bottom and the right."""
    result = dict(sample)
    for key, value in sample.items():
        if isinstance(value, Tensor):
            height, width = value.shape[-2:]
            border = (0, max(size[1] - width, 0), 0, max(size[0] - height, 0))
            if any(border):
                result[key] = torch.nn.functional.pad(value, border, value=PADDING.get(key, 0))
    return result


def flip(sample: Sample) -> Sample:
    """Mirror left and right; the normals' x component changes its sign."""
    result = {key: value.flip(-1) if isinstance(value, Tensor) else value for key, value in sample.items()}
    if "normals" in result:
        result["normals"] = result["normals"] * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
    return result


def largest_share(semseg: Tensor) -> float:
    """Share of the most frequent class among the labelled pixels; 0 where nothing is labelled."""
    counts = torch.bincount(semseg.flatten(), minlength=IGNORE + 1)[:IGNORE]
    return float(counts.max()) / max(int(counts.sum()), 1)


def scale_and_crop(
    sample: Sample, size: tuple[int, int], rng: np.random.Generator, scales: tuple[float, float] = SCALES
) -> Sample:
    """Resize by a random factor, then take a random window of at most ``size``.

    Depth is divided by the factor: a picture twice as large is the same room seen from half as far. Only the
    pixels of the window are ever computed. The window is drawn anew while one class fills more than 75 % of
    it.
    """
    height, width = sample["image"].shape[-2:]
    factor = rng.uniform(*scales)
    scaled = max(round(height * factor), 1), max(round(width * factor), 1)
    window = min(size[0], scaled[0]), min(size[1], scaled[1])
    for _ in range(CROP_TRIES):
        top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(scaled, window, strict=True))
        rows = positions(top, window[0], scaled[0], height)
        columns = positions(left, window[1], scaled[1], width)
        if "semseg" not in sample or largest_share(nearest(sample["semseg"], rows, columns)) <= LARGEST_SHARE:
            break
    result = dict(sample)
    for key, value in sample.items():
        if key == "image":
            result[key] = bilinear(value, rows, columns)
        elif isinstance(value, Tensor):
            result[key] = nearest(value, rows, columns)
    if "depth" in result:
        result["depth"] = result["depth"] / factor
    return result


def rgb_to_hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in [0, 6), saturation and value in [0, 1], each (H, W), of an image (3, H, W) in [0, 1]."""
    red, green, blue = image
    value, largest = image.max(dim=0)
    chroma = value - image.amin(dim=0)
    safe = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(
        largest == 0,
        (green - blue) / safe,
        torch.where(largest == 1, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return hue % 6, chroma / torch.where(value > 0, value, 1), value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The inverse of :func:`rgb_to_hsv`."""
    offsets = torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1)
    k = (offsets + hue) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def distort(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue, each by chance (photometric distortion of SSD).

    Brightness moves by up to 32/255, contrast and saturation by a factor in [0.5, 1.5], hue by up to 18°;
    contrast comes before or after the colours, by chance. ``image`` (3, H, W) in [0, 1].
    """
    if rng.random() < 0.5:
        image = image + rng.uniform(-32, 32) / 255
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    contrast_first = rng.random() < 0.5
    if contrast_first:
        image = image * contrast
    image = image.clamp(0, 1)
    saturation_factor = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue_shift = rng.uniform(-18, 18) / 60 if rng.random() < 0.5 else 0.0
    if saturation_factor != 1.0 or hue_shift != 0.0:
        hue, saturation, value = rgb_to_hsv(image)
        image = hsv_to_rgb((hue + hue_shift) % 6, (saturation * saturation_factor).clamp(max=1), value)
    if not contrast_first:
        image = (image * contrast).clamp(0, 1)
    return image


def expect_size(size: tuple[int, int]) -> tuple[int, int]:
    """Raise :class:`DataError` unless both sides are at least 1."""
    height, width = size
    if height < 1 or width < 1:
        raise DataError(f"size: expected a height and width of at least 1, got {height}×{width}")
    return int(height), int(width)


def training_transform(size: tuple[int, int], scales: tuple[float, float] = SCALES) -> Transform:
    """Random scale, crop, flip and photometric distortion, then normalise and pad to exactly ``size``.

    Args:
        size: (height, width) of the result.
        scales: range of the random scale.

    Returns:
        A function of a sample and the generator that decides everything random; it leaves its argument
        unchanged.
    """
    size = expect_size(size)

    def transform(sample: Sample, rng: np.random.Generator) -> Sample:
        result = scale_and_crop(sample, size, rng, scales)
        if rng.random() < 0.5:
            result = flip(result)
        result["image"] = normalize(distort(result["image"], rng))
        return pad(result, size)

    return transform


def evaluation_transform(sample: Sample) -> Sample:
    """Normalise; images keep their size and nothing is random. Leaves its argument unchanged."""
    return {**sample, "image": normalize(sample["image"])}
