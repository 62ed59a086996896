"""What the augmentation does to colours and to crops of one class: applied at all, and within its ranges."""

from __future__ import annotations

import numpy as np
import torch

from degmix.data import training_transform
from degmix.data.transforms import distort, flip, largest_share, normalize, rgb_to_hsv, scale_and_crop


def coloured(height: int = 24, width: int = 32) -> torch.Tensor:
    """A picture of mild colours, so that no distortion saturates."""
    return 0.35 + 0.3 * torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))


def test_training_distorts_colours():
    sample = {"image": coloured(), "name": "x"}
    transform = training_transform((24, 32), (1.0, 1.0))
    plain = (normalize(sample["image"]), normalize(flip(sample)["image"]))
    changed = 0
    for seed in range(20):
        image = transform(sample, np.random.default_rng(seed))["image"]
        changed += not any(torch.allclose(image, each, atol=1e-3) for each in plain)
    assert changed >= 15


def test_distorted_colours_stay_near_the_original():
    """Hue moves by at most 18 degrees: a red picture never turns green or blue."""
    red = torch.tensor([0.7, 0.3, 0.3]).view(3, 1, 1).expand(3, 8, 8)
    hues = []
    for seed in range(50):
        image = distort(red, np.random.default_rng(seed))
        assert image.min() >= 0
        assert image.max() <= 1
        hue = rgb_to_hsv(image)[0].mean().item() * 60
        hues.append(min(hue, 360 - hue))
    assert max(hues) <= 18.01
    assert max(hues) > 1


def test_crops_of_one_class_are_rare():
    """Nine tenths of the picture are one class: drawn at random, most crops would be of it alone."""
    semseg = torch.zeros(64, 200, dtype=torch.int64)
    semseg[:, 180:] = torch.arange(20) % 5 + 1
    sample = {"image": torch.rand(3, 64, 200), "semseg": semseg, "name": "x"}
    rng = np.random.default_rng(0)
    shares = [largest_share(scale_and_crop(sample, (32, 32), rng, (1.0, 1.0))["semseg"]) for _ in range(100)]
    assert sum(share <= 0.75 for share in shares) >= 40
