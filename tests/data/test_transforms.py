"""Augmentations move all labels together and keep their geometry true."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_rooms import SIZE, TASKS

from degmix.data import NYUD, DataError, evaluation_transform, training_transform, transforms
from degmix.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PADDING,
    bilinear,
    distort,
    flip,
    hsv_to_rgb,
    nearest,
    normalize,
    pad,
    positions,
    rgb_to_hsv,
    scale_and_crop,
)

FOCAL = 60.0


@pytest.fixture(scope="module")
def dataset(rooms) -> NYUD:
    return NYUD(rooms, "train", TASKS, classes=13)


def plane_sample() -> dict:
    """A tilted plane seen by a camera of known focal length; every label repeats one number per pixel."""
    height, width = SIZE
    normal = torch.nn.functional.normalize(torch.tensor([0.3, 0.5, 0.9]), dim=0)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rays = torch.stack(
        [(columns - (width - 1) / 2) / FOCAL, ((height - 1) / 2 - rows) / FOCAL, -torch.ones(height, width)]
    )
    depth = -2.5 / (normal.view(3, 1, 1) * rays).sum(dim=0)
    ids = (rows // 3 + columns // 5) % 7
    return {
        "image": torch.rand(3, height, width),
        "name": "plane",
        "semseg": ids,
        "human_parts": ids.clone(),
        "sal": ids % 2,
        "depth": depth[None],
        "normals": normal.view(3, 1, 1).expand(3, height, width).clone(),
        "edge": (ids[None] == 3).float(),
    }


def plane_normals(
    depth: torch.Tensor, focal_x: float, focal_y: float, top: float, left: float
) -> torch.Tensor:
    """Normals (3, H-2, W-2) of back-projected depth; (top, left): where the optical axis is."""
    height, width = depth.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rays = torch.stack([(columns - left) / focal_x, (top - rows) / focal_y, -torch.ones(height, width)])
    points = depth.double() * rays
    across = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
    upward = points[:, :-2, 1:-1] - points[:, 2:, 1:-1]
    return torch.nn.functional.normalize(torch.linalg.cross(across, upward, dim=0), dim=0)


def exact_plane(label: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Sample a depth map (1, H, W) of a plane exactly: its inverse is linear in the position."""
    return 1 / bilinear(1 / label, rows, columns) if label.shape[0] == 1 else nearest(label, rows, columns)


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.7, 2.0])
@pytest.mark.parametrize("mirrored", [False, True])
def test_normals_and_depth_keep_agreeing(monkeypatch, factor, mirrored):
    """Depth / s under a focal length times s is the same room, 1/s as large: its normals are unchanged.

    Nearest sampling moves each depth by up to half a source pixel, so the plane's exact depth is sampled.
    """
    sample = plane_sample()
    height, width = sample["depth"].shape[-2:]
    monkeypatch.setattr(transforms, "nearest", exact_plane)
    del sample["edge"]
    result = scale_and_crop(sample, (1000, 1000), np.random.default_rng(0), (factor, factor))
    scaled_height, scaled_width = result["depth"].shape[-2:]
    assert (scaled_height, scaled_width) == (round(height * factor), round(width * factor))
    if mirrored:
        result = flip(result)
    found = plane_normals(
        result["depth"][0],
        FOCAL * scaled_width / width,
        FOCAL * scaled_height / height,
        (scaled_height - 1) / 2,
        (scaled_width - 1) / 2,
    )
    border = 2  # beyond the outermost centres bilinear sampling repeats them
    expected = result["normals"][:, 1:-1, 1:-1].double()
    inner = (slice(None), slice(border, -border), slice(border, -border))
    torch.testing.assert_close(found[inner], expected[inner], atol=2e-3, rtol=0)
    assert (result["normals"][0] < 0).all() == mirrored


def test_flip_is_its_own_inverse(dataset):
    sample = dataset[0]
    mirrored = flip(sample)
    torch.testing.assert_close(mirrored["image"], sample["image"].flip(-1))
    torch.testing.assert_close(mirrored["normals"][0], -sample["normals"][0].flip(-1))
    torch.testing.assert_close(mirrored["normals"][1:], sample["normals"][1:].flip(-1))
    for key, value in flip(mirrored).items():
        if key != "name":
            torch.testing.assert_close(value, sample[key])


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    scaled=st.tuples(st.integers(1, 80), st.integers(1, 80)),
)
@settings(max_examples=60, deadline=None)
def test_sampling_is_torchs_interpolation(size, scaled):
    image = torch.rand(3, *size)
    rows, columns = (positions(0, new, new, old) for new, old in zip(scaled, size, strict=True))
    expected = torch.nn.functional.interpolate(image[None], scaled, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(bilinear(image, rows, columns), expected, atol=2e-5, rtol=0)
    exact = torch.nn.functional.interpolate(image[None], scaled, mode="nearest-exact")[0]
    # at the exact middle between two pixels rounding decides
    assert (nearest(image, rows, columns) == exact).float().mean() > 0.9


def test_a_crop_is_a_window_of_the_whole():
    """Only the window is computed, and it is the window of the resized image."""
    sample = plane_sample()
    window = scale_and_crop(sample, (20, 30), np.random.default_rng(1), (1.5, 1.5))
    whole = scale_and_crop(sample, (1000, 1000), np.random.default_rng(1), (1.5, 1.5))
    rows = whole["image"].unfold(1, 20, 1).unfold(2, 30, 1)
    matches = (rows == window["image"][:, None, None]).flatten(3).all(dim=3).all(dim=0).nonzero()
    assert len(matches) == 1
    top, left = matches[0].tolist()
    for key in TASKS:
        torch.testing.assert_close(window[key], whole[key][..., top : top + 20, left : left + 30])


def test_crops_full_of_one_class_are_drawn_again():
    """A third of the picture is varied: almost every accepted crop shows some of it."""
    sample = plane_sample()
    sample["semseg"] = torch.zeros(48, 64, dtype=torch.long)
    sample["semseg"][:, :24] = torch.arange(48)[:, None] % 5 + 1
    rng = np.random.default_rng(0)
    shares = [transforms.largest_share(scale_and_crop(sample, (16, 16), rng)["semseg"]) for _ in range(60)]
    assert np.mean(np.array(shares) <= transforms.LARGEST_SHARE) > 0.9


def test_share_ignores_void():
    assert transforms.largest_share(torch.full((4, 4), 255)) == 0
    assert transforms.largest_share(torch.tensor([[0, 0, 0, 1], [255, 255, 255, 255]])) == 0.75


@given(seed=st.integers(0, 500), size=st.tuples(st.integers(1, 100), st.integers(1, 100)))
@settings(max_examples=40, deadline=None)
def test_training_transform_keeps_every_promise(seed, size):
    sample = plane_sample()
    before = {key: value.clone() for key, value in sample.items() if key != "name"}
    result = training_transform(size)(sample, np.random.default_rng(seed))
    assert set(result) == set(sample)
    for key, value in before.items():
        assert result[key].shape[-2:] == size
        assert result[key].dtype == value.dtype
        assert torch.equal(sample[key], value), "the argument is unchanged"
    outside = result["depth"][0] == 0
    assert torch.equal(outside, result["semseg"] == 255)
    assert torch.equal(outside, result["human_parts"] == 255)
    assert torch.equal(outside, result["sal"] == 255)
    assert torch.equal(outside, result["edge"][0] == 255)
    assert torch.equal(outside, (result["normals"] == 0).all(dim=0))
    assert (result["image"][:, outside] == 0).all()
    # all labels were sampled at the same pixels
    assert torch.equal(result["semseg"], result["human_parts"])
    inside = ~outside
    assert torch.equal(result["sal"][inside], result["semseg"][inside] % 2)
    assert torch.equal(result["edge"][0][inside], (result["semseg"][inside] == 3).float())


def test_evaluation_changes_only_the_colours(dataset):
    sample = dataset[0]
    result = evaluation_transform(sample)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(result["image"] * std + mean, sample["image"])
    assert all(torch.equal(result[key], sample[key]) for key in TASKS)


def test_padding_holds_no_label(dataset):
    sample = dataset[0]
    padded = pad(sample, (50, 60))
    for key in TASKS:
        assert padded[key].shape[-2:] == (50, 64), "padded where smaller, never cropped"
        assert torch.equal(padded[key][..., :48, :], sample[key])
        assert (padded[key][..., 48:, :] == PADDING[key]).all()
    assert (padded["image"][:, 48:] == 0).all()


def test_pad_leaves_larger_samples_alone(dataset):
    sample = dataset[0]
    assert pad(sample, (10, 10))["image"] is sample["image"]


@given(color=st.tuples(*[st.floats(0, 1, width=32)] * 3))
@settings(max_examples=80, deadline=None)
def test_hsv_is_the_standard_one(color):
    image = torch.tensor(color).view(3, 1, 1)
    hue, saturation, value = rgb_to_hsv(image)
    expected = colorsys.rgb_to_hsv(*color)
    turn = abs(hue.item() / 6 - expected[0])
    # a tiny colour difference leaves the hue to rounding
    assert min(turn, 1 - turn) < 1e-3 or max(color) - min(color) < 1e-3
    assert saturation.item() == pytest.approx(expected[1], abs=1e-4)
    assert value.item() == pytest.approx(expected[2], abs=1e-6)
    torch.testing.assert_close(hsv_to_rgb(hue, saturation, value), image, atol=1e-5, rtol=0)


def test_training_distorts_colours(dataset):
    sample = {"image": dataset[0]["image"], "name": "x"}
    transform = training_transform(SIZE, (1.0, 1.0))
    plain = (normalize(sample["image"]), normalize(flip(sample)["image"]))
    images = [transform(sample, np.random.default_rng(seed))["image"] for seed in range(20)]
    assert sum(not any(torch.allclose(image, each, atol=1e-3) for each in plain) for image in images) >= 15


def test_distorted_colours_stay_near_the_original(dataset):
    """Hue moves by at most 18 degrees: a red picture never turns green or blue."""
    image, rng = dataset[0]["image"], np.random.default_rng(0)
    results = [distort(image, rng) for _ in range(40)]
    assert np.mean([(result - image).abs().mean() > 0.01 for result in results]) > 0.7
    assert abs(np.mean([(result - image).mean() for result in results])) < 0.1, "brighter as often as darker"
    red = torch.tensor([0.7, 0.3, 0.3]).view(3, 1, 1).expand(3, 8, 8)
    reds = [distort(red, rng) for _ in range(50)]
    assert all(result.min() >= 0 and result.max() <= 1 for result in results + reds)
    hues = [rgb_to_hsv(each)[0].mean().item() * 60 for each in reds]
    assert 1 < max(min(hue, 360 - hue) for hue in hues) <= 18.01


def test_a_size_of_zero_is_refused():
    with pytest.raises(DataError, match="size: expected a height and width of at least 1, got 0×5"):
        training_transform((0, 5))
