"""From a scene to a picture and its exact labels.

Conventions. Depth is measured along the optical axis (as NYU Depth), in metres. Normals are in the camera's
frame, x right, y up, z toward the viewer: a wall that faces the camera is (0, 0, 1). Everything is evaluated
at pixel centres, so all labels agree with each other to the pixel; only the picture is antialiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from degmix.data.synthetic.geometry import Box, dot, lit, rotate, trace, unit
from degmix.data.synthetic.objects import VOID, label_of
from degmix.data.synthetic.scene import Scene, build

DEPTH_RANGE = 7.0  # metres; a depth sensor returns nothing beyond
GRAZING_COSINE = 0.08  # nor where a surface is seen edge-on
SALIENT_PEOPLE = 0.005  # share of the image from which people are what one looks at
AMBIENT = 0.42

FIXED = ("wall", "floor", "ceiling", "door", "window", "picture")  # never the salient object


@dataclass(frozen=True)
class Hits:
    """The surfaces met by a bundle of rays: arrays (3, N) and (N,) in world coordinates."""

    directions: np.ndarray
    depth: np.ndarray
    index: np.ndarray
    points: np.ndarray
    normals: np.ndarray


def joined(first: Hits, second: Hits) -> Hits:
    """Two bundles as one, so that shading walks the primitives once."""
    pairs = ((getattr(first, name.name), getattr(second, name.name)) for name in fields(Hits))
    return Hits(*(np.concatenate(pair, axis=-1) for pair in pairs))


def look(scene: Scene, rows: np.ndarray, columns: np.ndarray, size: tuple[int, int]) -> Hits:
    """Cast the camera's rays through pixel positions."""
    directions = scene.camera.directions(rows, columns, *size)
    depth, index = trace(scene.groups, scene.camera.position, directions)
    points = scene.camera.position[:, None] + directions * depth
    normals = np.empty_like(points)
    for number in np.unique(index):
        here = np.flatnonzero(index == number)
        normals[:, here] = scene.primitives[number].normals(points[:, here])
    return Hits(directions, depth, index, points, normals)


def shade(scene: Scene, hits: Hits) -> np.ndarray:
    """Linear colour (3, N) of what the rays met: ambient light, lamps with shadows, gloss."""
    points, normals = hits.points, hits.normals
    albedo = np.empty_like(points)
    glow, shine = np.zeros_like(hits.depth), np.zeros_like(hits.depth)
    for number in np.unique(hits.index):
        here = np.flatnonzero(hits.index == number)
        shape, material = scene.primitives[number], scene.materials[number]
        normal = normals[:, here]
        local_normal = rotate(shape.rotation.T, normal) if isinstance(shape, Box) else normal
        albedo[:, here] = material.albedo(shape.local(points[:, here]), local_normal)
        glow[here], shine[here] = material.glow, material.shine

    # light from all around, a little more from the floor than from above; corners get less of it
    openness = np.ones_like(hits.depth)
    for axis, extent in enumerate(scene.size):
        low = 0.0 if axis == 1 else -extent / 2
        nearest = np.minimum(points[axis] - low, low + extent - points[axis])
        openness *= 1 - np.float32(0.35) * np.exp(-np.maximum(nearest, 0) / np.float32(0.18))
    ambient = np.float32(AMBIENT) * (np.float32(1) - np.float32(0.2) * normals[1]) * openness
    color = albedo * (ambient + glow * np.float32(1.1))

    raised = points + normals * np.float32(2e-3)
    for light in scene.lights:
        seen = np.flatnonzero(dot(light.position[:, None] - points, normals) > 0)
        seen = seen[lit(scene.casters, light.position, raised[:, seen])]
        normal = normals[:, seen]
        to_light = light.position[:, None] - points[:, seen]
        squared = dot(to_light, to_light)
        direction = to_light / np.sqrt(squared)
        strength = dot(direction, normal) / (np.float32(1) + squared * np.float32(0.35))
        half = unit(direction - unit(hits.directions[:, seen]))
        mirrored = np.maximum(dot(half, normal), 0)
        for _ in range(4):  # to the power of 16; numpy's own power is slow
            mirrored *= mirrored
        gloss = shine[seen] * mirrored
        color[:, seen] += light.color[:, None] * ((albedo[:, seen] + gloss) * strength)
    return color


SUBPIXELS = ((-0.33, -0.17), (0.33, -0.17), (0.0, 0.33))


def photograph(scene: Scene, hits: Hits, height: int, width: int) -> np.ndarray:
    """Linear colour (3, H·W) of all pixels; the mean of three more rays where materials meet."""
    numbers = {material: number for number, material in enumerate(dict.fromkeys(scene.materials))}
    looks = np.array([numbers[material] for material in scene.materials]) + 1000 * scene.instances
    meets = changes(looks[hits.index].reshape(height, width))
    rows, columns = np.nonzero(meets)
    finer = look(
        scene,
        np.concatenate([rows + down for down, _ in SUBPIXELS]),
        np.concatenate([columns + across for _, across in SUBPIXELS]),
        (height, width),
    )
    color, samples = np.split(shade(scene, joined(hits, finer)), [height * width], axis=1)
    samples = np.minimum(samples, 1.5).reshape(3, len(SUBPIXELS), rows.size)
    color[:, meets.ravel()] = samples.mean(axis=1)
    return color


def changes(ids: np.ndarray) -> np.ndarray:
    """Pixels of an id map (H, W) with another id above, below, left or right of them. Bool (H, W)."""
    result = np.zeros(ids.shape, dtype=bool)
    vertical, horizontal = ids[1:] != ids[:-1], ids[:, 1:] != ids[:, :-1]
    result[1:] |= vertical
    result[:-1] |= vertical
    result[:, 1:] |= horizontal
    result[:, :-1] |= horizontal
    return result


def develop(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """Linear colour (H, W, 3) to an 8-bit picture: exposure, vignette, gamma, sensor noise."""
    height, width, _ = color.shape
    bright = np.percentile(color.max(axis=-1), 92)
    exposed = color * np.float32(rng.uniform(0.75, 0.95) / max(bright, 1e-3))
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    exposed = exposed * (1 - np.float32(0.12) * (x * x + y * y))[..., None]
    tint = np.float32(rng.uniform(0.95, 1.05, 3))
    picture = np.clip(exposed * tint, 0, 1) ** np.float32(1 / 2.2)
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(rng.uniform(0.006, 0.016))
    return np.round(np.clip(picture + noise, 0, 1) * 255).astype(np.uint8)


def blob(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random ellipse that an annotator or a sensor missed. Bool (H, W)."""
    center_y, center_x = rng.uniform(0, height), rng.uniform(0, width)
    radius_y, radius_x = rng.uniform(0.03, 0.1, 2) * height
    y, x = np.mgrid[:height, :width]
    return ((y - center_y) / radius_y) ** 2 + ((x - center_x) / radius_x) ** 2 < 1


def salient(semseg: np.ndarray, instances: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """What one looks at: people if they cover enough of the image, else the most prominent object.

    Prominence is an instance's area weighted by a Gaussian about the image's centre, with a standard
    deviation of 0.3 of the height and width. Returns 0 or 1, uint8 (H, W); all 0 if there is nothing but
    walls.
    """
    people = semseg == label_of("person")
    if people.mean() >= SALIENT_PEOPLE:
        return people.astype(np.uint8)
    height, width = semseg.shape
    y = (np.arange(height) - (height - 1) / 2) / (0.3 * height)
    x = (np.arange(width) - (width - 1) / 2) / (0.3 * width)
    weight = np.exp(-0.5 * (y[:, None] ** 2 + x[None, :] ** 2)) * ~fixed
    prominence = np.bincount(instances.ravel(), weights=weight.ravel())
    if prominence.max() <= 0:
        return np.zeros(semseg.shape, dtype=np.uint8)
    return (instances == prominence.argmax()).astype(np.uint8)


def render(seed: int | Sequence[int], height: int, width: int) -> dict[str, np.ndarray]:
    """Render one room.

    Args:
        seed: decides everything but the resolution; any seed of ``numpy.random.default_rng``.
        height, width: size in pixels.

    Returns:
        ``image`` uint8 (H, W, 3); ``semseg`` uint8 (H, W), 255 on unlabelled objects and in a missed patch;
        ``depth`` float32 (H, W) metres along the optical axis, 0 beyond 7 m, at grazing angles, in a border
        strip and in a missed patch; ``normals`` float32 (H, W, 3), zero where depth is; ``edge`` uint8 (H,
        W), 1 on both sides of every border between instances; ``human_parts`` uint8 (H, W), 255 all over if
        nobody is in the image and where semseg's missed patch is; ``sal`` uint8 (H, W), 1 on the salient
        object; ``instance`` int32 (H, W), complete; ``focal`` float32 (), pixels (the principal point is the
        centre).
    """
    rng = np.random.default_rng(seed)
    scene = build(rng)
    rows, columns = np.mgrid[:height, :width].reshape(2, -1)
    hits = look(scene, rows, columns, (height, width))
    color = photograph(scene, hits, height, width)
    depth, index = hits.depth, hits.index
    cosine = -dot(unit(hits.directions), hits.normals)
    normals = rotate(scene.camera.rotation.T, hits.normals)

    shape = (height, width)
    instance, semseg = scene.instances[index].reshape(shape), scene.labels[index].reshape(shape)
    fixed = np.isin(semseg, [label_of(name) for name in FIXED])
    sal = salient(semseg, instance, fixed)
    parts = scene.parts[index].reshape(shape)
    if not parts.any():
        parts = np.full_like(parts, VOID)

    missed = blob(rng, height, width) & (rng.random() < 0.5)
    strip = np.zeros(shape, dtype=bool)
    strip[:, : round(width * rng.uniform(0, 0.04))] = (
        True  # a depth sensor sees less on one side than the camera
    )
    no_depth = (depth > DEPTH_RANGE).reshape(shape) | (cosine < GRAZING_COSINE).reshape(shape)
    no_depth |= strip | (blob(rng, height, width) & (rng.random() < 0.7))
    valid = ~no_depth
    return {
        "image": develop(rng, np.moveaxis(color, 0, -1).reshape(height, width, 3)),
        "semseg": np.where(missed, np.uint8(VOID), semseg),
        "depth": np.where(valid, depth.reshape(shape), np.float32(0)),
        "normals": np.moveaxis(normals, 0, -1).reshape(height, width, 3) * valid[..., None],
        "edge": changes(instance).astype(np.uint8),
        "human_parts": np.where(missed, np.uint8(VOID), parts),
        "sal": sal,
        "instance": instance,
        "focal": np.float32(scene.camera.focal(height, width)),
    }
