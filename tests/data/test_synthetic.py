"""The rendered labels are exact, agree with each other and depend on nothing but the seed."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from degmix.data.synthetic import CLASSES, PARTS, render
from degmix.data.synthetic.geometry import Box, Capsule, Cylinder, Ellipsoid, Plane, dot, unit, yaw_rotation
from degmix.data.synthetic.renderer import DEPTH_RANGE, FIXED, SALIENT_PEOPLE

SEEDS = range(8)
HEIGHT, WIDTH = 128, 160
PERSON = CLASSES.index("person")


@pytest.fixture(scope="module")
def scenes() -> list[dict[str, np.ndarray]]:
    start = time.perf_counter()
    rendered = [render(seed, HEIGHT, WIDTH) for seed in SEEDS]
    assert time.perf_counter() - start < 12, "generous for slow machines"
    return rendered


def differing_neighbours(ids: np.ndarray) -> np.ndarray:
    padded = np.pad(ids, 1, mode="edge")
    middle = padded[1:-1, 1:-1]
    around = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
    return np.any([other != middle for other in around], axis=0)


def back_projected(depth: np.ndarray, focal: float) -> np.ndarray:
    """Points (H, W, 3) in the camera's frame: x right, y up, z toward the viewer."""
    height, width = depth.shape
    rows, columns = np.mgrid[:height, :width]
    x = (columns - (width - 1) / 2) / focal
    y = ((height - 1) / 2 - rows) / focal
    return depth.astype(np.float64)[..., None] * np.stack([x, y, -np.ones_like(x)], axis=-1)


def angles(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Degrees between unit vectors (N, 3)."""
    return np.degrees(np.arccos(np.clip((first * second).sum(axis=-1), -1, 1)))


def equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(first[key], second[key]) for key in first)


def test_types_and_ranges(scenes):
    for scene in scenes:
        assert scene["image"].shape == (HEIGHT, WIDTH, 3)
        assert scene["image"].dtype == np.uint8
        assert scene["image"].std() > 20, "a picture one can see something in"
        labels = scene["semseg"][scene["semseg"] != 255]
        assert labels.max() < len(CLASSES)
        parts = scene["human_parts"][scene["human_parts"] != 255]
        assert parts.max(initial=0) < len(PARTS)
        assert set(np.unique(scene["edge"])) <= {0, 1}
        assert set(np.unique(scene["sal"])) <= {0, 1}
        depth = scene["depth"]
        assert depth.dtype == np.float32
        assert depth.min() >= 0
        assert depth.max() <= DEPTH_RANGE
        assert np.mean(depth > 0) > 0.8


def test_every_class_and_part_appears():
    """Small pictures of many rooms: no class is rare."""
    seen_classes, seen_parts = np.zeros(256), np.zeros(256)
    count = 24
    for seed in range(100, 100 + count):
        scene = render(seed, 48, 60)
        seen_classes[np.unique(scene["semseg"])] += 1
        seen_parts[np.unique(scene["human_parts"])] += 1
    assert (seen_classes[: len(CLASSES)] >= 0.2 * count).all(), dict(zip(CLASSES, seen_classes, strict=False))
    assert (seen_parts[: len(PARTS)] >= 0.4 * count).all(), dict(zip(PARTS, seen_parts, strict=False))
    assert 0 < seen_parts[255] < count, "some images without people, some with"


def test_same_seed_same_scene(scenes):
    assert equal(render(0, HEIGHT, WIDTH), scenes[0])
    assert not np.array_equal(scenes[0]["image"], scenes[1]["image"])


def test_same_scene_in_another_process(scenes):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        other = pool.submit(render, 2, HEIGHT, WIDTH).result()
    assert equal(other, scenes[2])


def test_normals_agree_with_depth(scenes):
    """Back-project the depth: the cross product of two tangents of the surface is the normal.

    Objects have creases inside, where a difference spans two faces: of central, left, right the one
    that fits best counts, and so vertically.
    """
    for scene in scenes:
        points = back_projected(scene["depth"], float(scene["focal"]))
        middle, normals = points[1:-1, 1:-1], scene["normals"][1:-1, 1:-1]
        error = np.full(middle.shape[:2], 180.0)
        left, right, above, below = points[1:-1, :-2], points[1:-1, 2:], points[:-2, 1:-1], points[2:, 1:-1]
        for across in (right - left, right - middle, middle - left):
            for upward in (above - below, above - middle, middle - below):
                geometric = np.cross(across, upward)
                geometric /= np.maximum(np.linalg.norm(geometric, axis=-1, keepdims=True), 1e-12)
                error = np.minimum(error, angles(geometric, normals))

        known = scene["depth"] > 0
        holes = differing_neighbours(known.astype(int))
        inner = (known & ~holes & (scene["edge"] == 0))[1:-1, 1:-1]
        assert np.median(error[inner]) < 0.1
        assert np.mean(error[inner] < 3) > 0.95


def test_normals_are_unit_and_face_the_camera(scenes):
    for scene in scenes:
        known = scene["depth"] > 0
        length = np.linalg.norm(scene["normals"], axis=-1)
        np.testing.assert_allclose(length[known], 1, atol=1e-5)
        assert (length[~known] == 0).all()
        toward = -back_projected(np.ones_like(scene["depth"]), float(scene["focal"]))
        assert ((toward * scene["normals"]).sum(axis=-1)[known] > 0).all()


def test_edges_are_the_borders_of_instances(scenes):
    for scene in scenes:
        np.testing.assert_array_equal(scene["edge"] == 1, differing_neighbours(scene["instance"]))
        # where two classes meet, two instances meet
        labelled = np.where(scene["semseg"] == 255, 0, scene["semseg"] + 1)
        meeting = differing_neighbours(labelled) & (scene["semseg"] != 255)
        near_void = differing_neighbours((scene["semseg"] == 255).astype(int))
        assert (scene["edge"][meeting & ~near_void] == 1).all()


def test_parts_cover_exactly_the_people(scenes):
    for scene in scenes:
        semseg, parts = scene["semseg"], scene["human_parts"]
        if (parts == 255).all():
            assert not (semseg == PERSON).any()
            continue
        on_person = (parts > 0) & (parts != 255)
        np.testing.assert_array_equal(on_person, semseg == PERSON)
        assert (semseg[parts == 255] == 255).all(), "a missed patch is missed by both"


def test_instances_have_one_class(scenes):
    for scene in scenes:
        for number in np.unique(scene["instance"]):
            labels = scene["semseg"][scene["instance"] == number]
            assert np.unique(labels[labels != 255]).size <= 1


def test_saliency_follows_its_rule(scenes):
    people_seen = others_seen = 0
    for scene in scenes:
        salient, semseg = scene["sal"] == 1, scene["semseg"]
        people = (semseg == PERSON) | (salient & (semseg == 255))
        if (semseg == PERSON).mean() > SALIENT_PEOPLE:
            people_seen += 1
            np.testing.assert_array_equal(salient, people)
        elif salient.any():
            others_seen += 1
            chosen = np.unique(scene["instance"][salient])
            assert chosen.size == 1, "one object"
            np.testing.assert_array_equal(salient, scene["instance"] == chosen[0])
            assert not np.isin(semseg[salient], [CLASSES.index(name) for name in FIXED]).any()
    assert people_seen, "the seeds show people"
    assert others_seen, "and a room without"


POSITION = st.tuples(*[st.floats(-1, 1, width=32)] * 3).map(np.float32)
LENGTH = st.floats(0.125, 1, width=32)
SHAPES = st.one_of(
    st.builds(
        lambda center, half, yaw: Box(center, np.float32(half), yaw_rotation(yaw)),
        POSITION,
        st.tuples(LENGTH, LENGTH, LENGTH),
        st.floats(0, 6),
    ),
    st.builds(
        lambda center, radius, tall: Ellipsoid(center, np.float32([radius, tall, radius])),
        POSITION,
        LENGTH,
        LENGTH,
    ),
    st.builds(
        lambda start, step, radius: Capsule(start, start + step + np.float32([0, 0.1, 0]), radius),
        POSITION,
        POSITION,
        LENGTH,
    ),
    st.builds(Cylinder, POSITION, LENGTH, LENGTH),
    st.builds(lambda point, yaw: Plane(point, yaw_rotation(yaw)[:, 2]), POSITION, st.floats(0, 6)),
)


def inside(shape, points: np.ndarray) -> np.ndarray:
    """Whether points (3, N) lie in the solid, from its definition."""
    local = shape.local(points)
    match shape:
        case Box(half=half):
            return (np.abs(local) <= half[:, None]).all(axis=0)
        case Ellipsoid(radii=radii):
            return ((local / radii[:, None]) ** 2).sum(axis=0) <= 1
        case Cylinder(height=height, radius=radius):
            return (local[1] >= 0) & (local[1] <= height) & (np.hypot(local[0], local[2]) <= radius)
        case Capsule(start=start, end=end, radius=radius):
            axis = (end - start)[:, None]
            nearest = axis * np.clip((local * axis).sum(axis=0) / (axis * axis).sum(), 0, 1)
            return np.linalg.norm(local - nearest, axis=0) <= radius
        case Plane(point=point, normal=normal):
            return dot(normal, points - point[:, None]) <= 0


@given(shape=SHAPES, seed=st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_rays_stop_where_they_enter_the_solid(shape, seed):
    """Before t the ray is outside, right after it inside; a miss never enters. The normal faces the ray."""
    rng = np.random.default_rng(seed)
    origin = np.float32(unit(rng.standard_normal(3)) * 6)
    if inside(shape, origin[:, None])[0]:
        return
    directions = np.float32(unit(rng.uniform(-1.5, 1.5, (3, 40)) - origin[:, None]))
    t = shape.intersect(origin, directions)
    steps = np.linspace(0, 9, 500)
    points = origin[:, None, None].astype(np.float64) + directions[:, :, None] * steps
    entered = inside(shape, points.reshape(3, -1)).reshape(40, -1)
    first = np.where(entered.any(axis=1), steps[entered.argmax(axis=1)], np.inf)
    hit = np.isfinite(t) & (t < 9)
    # float32 may miss a solid that the ray barely scratches, for two samples at most
    assert (entered[~hit].sum(axis=1) <= 2).all()
    assert (t[hit] <= first[hit] + 1e-3).all()
    if hit.any():
        surface = origin[:, None] + directions[:, hit] * t[hit]
        normals = shape.normals(surface)
        np.testing.assert_allclose(np.linalg.norm(normals, axis=0), 1, atol=1e-4)
        assert not inside(shape, surface.astype(np.float64) + 3e-3 * normals).any()
        assert inside(shape, surface.astype(np.float64) - 3e-3 * normals).mean() > 0.9
        center, radius = shape.bounding_sphere()
        assert (np.linalg.norm(surface - center[:, None], axis=0) <= radius + 1e-3).all()
