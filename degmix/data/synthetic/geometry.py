"""Ray casting against five primitives, vectorised over all rays.

A bundle of rays is one ``origin`` (3,) and ``directions`` (3, N) float32 of any length; an intersection is
the ray parameter t (N,), infinite for a miss. Arrays keep the three components in the leading axis, so every
step below runs over contiguous memory. World axes: x right, y up, z toward the reader, in metres.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

NEAR = 1e-3  # rays that start this close to a surface do not see it
MISS = np.float32(np.inf)


def vector(*values: float) -> np.ndarray:
    """A float32 vector of three components."""
    return np.array(values, dtype=np.float32)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot product over the leading axis; written out, as BLAS may round differently in another process."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(a: np.ndarray) -> np.ndarray:
    """Scale to length one over the leading axis."""
    return a / np.sqrt(dot(a, a))


def rotate(rotation: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Apply a (3, 3) rotation to vectors (3,) or (3, N), without BLAS for the reason given in :func:`dot`."""
    return np.stack([dot(row, a) for row in rotation])


def yaw_rotation(angle: float) -> np.ndarray:
    """Rotation by ``angle`` radians about the vertical axis; at 0 the object's front looks along +z."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=np.float32)


class Primitive(Protocol):
    """What the renderer asks of a shape."""

    def bounding_sphere(self) -> tuple[np.ndarray, float]: ...
    def moved(self, rotation: np.ndarray, translation: np.ndarray) -> Primitive: ...
    def intersect(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray: ...
    def local(self, points: np.ndarray) -> np.ndarray: ...
    def normals(self, points: np.ndarray) -> np.ndarray: ...


def nearest_root(a: np.ndarray, half_b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Smaller root of a t² + 2 half_b t + c = 0, infinite where there is none."""
    discriminant = half_b * half_b - a * c
    root = (-half_b - np.sqrt(np.maximum(discriminant, 0))) / a
    return np.where(discriminant > 0, root, MISS)


def ahead(t: np.ndarray) -> np.ndarray:
    """Drop hits behind or at the origin."""
    return np.where(t > NEAR, t, MISS)


@dataclass(frozen=True)
class Plane:
    """An infinite plane, seen from the side its ``normal`` points to: the room's shell."""

    point: np.ndarray
    normal: np.ndarray

    def bounding_sphere(self) -> tuple[np.ndarray, float]:
        return self.point, np.inf

    def moved(self, rotation: np.ndarray, translation: np.ndarray) -> Plane:
        return Plane(rotate(rotation, self.point) + translation, rotate(rotation, self.normal))

    def intersect(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        slope = dot(self.normal, directions)
        with np.errstate(divide="ignore"):
            t = dot(self.normal, self.point - origin) / slope
        return np.where(slope < 0, ahead(t), MISS)

    def local(self, points: np.ndarray) -> np.ndarray:
        return points

    def normals(self, points: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.normal[:, None], points.shape)


@dataclass(frozen=True)
class Box:
    """A box of half sizes ``half`` about ``center``; ``rotation`` takes its axes to the world's."""

    center: np.ndarray
    half: np.ndarray
    rotation: np.ndarray

    @classmethod
    def upright(cls, low: tuple[float, float, float], high: tuple[float, float, float]) -> Box:
        """The axis-aligned box between two corners."""
        low_corner, high_corner = vector(*low), vector(*high)
        return cls(
            (low_corner + high_corner) / 2, (high_corner - low_corner) / 2, np.eye(3, dtype=np.float32)
        )

    def bounding_sphere(self) -> tuple[np.ndarray, float]:
        return self.center, float(np.sqrt(dot(self.half, self.half)))

    def moved(self, rotation: np.ndarray, translation: np.ndarray) -> Box:
        turned = rotate(rotation, self.rotation)
        return Box(rotate(rotation, self.center) + translation, self.half, turned)

    def local(self, points: np.ndarray) -> np.ndarray:
        return rotate(self.rotation.T, points - self.center[:, None])

    def intersect(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        start = rotate(self.rotation.T, origin - self.center)
        enter, leave = -MISS, MISS
        for axis, direction in enumerate(rotate(self.rotation.T, directions)):
            # a ray parallel to a slab gets a huge parameter of the right sign instead of a NaN
            inverse = 1 / np.where(np.abs(direction) < 1e-9, np.float32(1e-9), direction)
            middle = -start[axis] * inverse
            reach = self.half[axis] * np.abs(inverse)
            enter = np.maximum(enter, middle - reach)
            leave = np.minimum(leave, middle + reach)
        return np.where(enter < leave, ahead(enter), MISS)

    def normals(self, points: np.ndarray) -> np.ndarray:
        local = self.local(points)
        face = np.argmax(np.abs(local) - self.half[:, None], axis=0)
        columns = np.arange(points.shape[1])
        return self.rotation[:, face] * np.sign(local[face, columns])


@dataclass(frozen=True)
class Ellipsoid:
    """An upright ellipsoid with half axes ``radii``; a sphere when they are equal."""

    center: np.ndarray
    radii: np.ndarray

    def bounding_sphere(self) -> tuple[np.ndarray, float]:
        return self.center, float(self.radii.max())

    def moved(self, rotation: np.ndarray, translation: np.ndarray) -> Ellipsoid:
        # only turned about the vertical, where the builders keep the two horizontal radii equal
        return Ellipsoid(rotate(rotation, self.center) + translation, self.radii)

    def local(self, points: np.ndarray) -> np.ndarray:
        return points - self.center[:, None]

    def intersect(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        start = (origin - self.center) / self.radii
        scaled = directions / self.radii[:, None]
        return ahead(nearest_root(dot(scaled, scaled), dot(start, scaled), dot(start, start) - 1))

    def normals(self, points: np.ndarray) -> np.ndarray:
        return unit(self.local(points) / (self.radii * self.radii)[:, None])


@dataclass(frozen=True)
class Capsule:
    """All points within ``radius`` of the segment from ``start`` to ``end``: a limb."""

    start: np.ndarray
    end: np.ndarray
    radius: float

    def bounding_sphere(self) -> tuple[np.ndarray, float]:
        axis = self.end - self.start
        return (self.start + self.end) / 2, float(np.sqrt(dot(axis, axis))) / 2 + self.radius

    def moved(self, rotation: np.ndarray, translation: np.ndarray) -> Capsule:
        start, end = (rotate(rotation, point) + translation for point in (self.start, self.end))
        return replace(self, start=start, end=end)

    def local(self, points: np.ndarray) -> np.ndarray:
        return points - self.start[:, None]

    def intersect(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        axis = self.end - self.start
        length = dot(axis, axis)
        start = origin - self.start
        axis_direction, axis_start = dot(axis, directions), dot(axis, start)
        squared = dot(directions, directions)
        along = dot(directions, start)
        radius = np.float32(self.radius)
        t = nearest_root(
            np.maximum(length * squared - axis_direction * axis_direction, np.float32(1e-12)),
            length * along - axis_start * axis_direction,
            length * (dot(start, start) - radius * radius) - axis_start * axis_start,
        )
        with np.errstate(invalid="ignore"):  # misses stay infinite or become NaN, neither is on the side
            position = axis_start + t * axis_direction
        on_side = (position > 0) & (position < length)
        t = np.where(on_side, t, MISS)
        for cap in (start, origin - self.end):
            sphere = nearest_root(squared, dot(directions, cap), dot(cap, cap) - radius * radius)
            # a hit on a cap's hidden half lies behind the side, so the nearer one is always right
            t = np.minimum(t, sphere)
        return ahead(t)

    def normals(self, points: np.ndarray) -> np.ndarray:
        axis = self.end - self.start
        local = self.local(points)
        position = np.clip(dot(axis, local) / np.maximum(dot(axis, axis), np.float32(1e-12)), 0, 1)
        return unit(local - axis[:, None] * position)


@dataclass(frozen=True)
class Cylinder:
    """An upright cylinder standing on ``base``, closed at both ends."""

    base: np.ndarray
    height: float
    radius: float

    def bounding_sphere(self) -> tuple[np.ndarray, float]:
        return self.base + vector(0, self.height / 2, 0), float(np.hypot(self.height / 2, self.radius))

    def moved(self, rotation: np.ndarray, translation: np.ndarray) -> Cylinder:
        return replace(self, base=rotate(rotation, self.base) + translation)

    def local(self, points: np.ndarray) -> np.ndarray:
        return points - self.base[:, None]

    def intersect(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        x, y, z = origin - self.base
        dx, dy, dz = directions
        radius, height = np.float32(self.radius), np.float32(self.height)
        t = nearest_root(
            np.maximum(dx * dx + dz * dz, np.float32(1e-12)), x * dx + z * dz, x * x + z * z - radius * radius
        )
        with np.errstate(invalid="ignore"):
            position = y + t * dy
        t = np.where((position > 0) & (position < height), t, MISS)
        # only the lid facing the origin can be seen
        if y > height or y < 0:
            with np.errstate(divide="ignore", invalid="ignore"):
                lid = ((height if y > height else 0) - y) / dy
                inside = (x + lid * dx) ** 2 + (z + lid * dz) ** 2 < radius * radius
            t = np.minimum(t, np.where(inside & (lid > 0), lid, MISS))
        return ahead(t)

    def normals(self, points: np.ndarray) -> np.ndarray:
        x, y, z = self.local(points)
        distance = np.sqrt(x * x + z * z)
        # of the three surfaces the point lies on the nearest
        side, bottom, top = np.abs(distance - self.radius), np.abs(y), np.abs(y - self.height)
        on_side = side < np.minimum(bottom, top)
        safe = np.maximum(distance, np.float32(1e-6))
        lid = np.where(top < bottom, np.float32(1), np.float32(-1))
        zero = np.float32(0)
        return np.stack(
            [
                np.where(on_side, x / safe, zero),
                np.where(on_side, zero, lid),
                np.where(on_side, z / safe, zero),
            ]
        )


@dataclass(frozen=True)
class Group:
    """The primitives of one object and a sphere about them all."""

    primitives: tuple[Primitive, ...]
    first: int  # index of its first primitive in the scene
    center: np.ndarray
    radius: float

    @classmethod
    def around(cls, primitives: Sequence[Primitive], first: int) -> Group:
        """Bound all bounding spheres, about their mean centre."""
        spheres = [primitive.bounding_sphere() for primitive in primitives]
        center = np.mean([middle for middle, _ in spheres], axis=0, dtype=np.float32)
        radius = max(
            radius + float(np.sqrt(dot(middle - center, middle - center))) for middle, radius in spheres
        )
        return cls(tuple(primitives), first, center, radius)


def toward(center: np.ndarray, radius: float, origin: np.ndarray, unit_directions: np.ndarray) -> np.ndarray:
    """Indices of the rays within the cone from the origin about a sphere: the only ones that may meet it."""
    to_center = center - origin
    distance = float(np.sqrt(dot(to_center, to_center)))
    if distance <= 1.01 * radius:
        return np.arange(unit_directions.shape[1])
    cosine = np.float32(np.sqrt(1 - (radius / distance) ** 2) - 1e-4)
    return np.flatnonzero(dot(to_center / np.float32(distance), unit_directions) > cosine)


def candidates(
    groups: Iterable[Group], origin: np.ndarray, directions: np.ndarray
) -> Iterator[tuple[int, Primitive, np.ndarray]]:
    """Every primitive that some rays may hit: its index, itself, and the rays' indices."""
    unit_directions = unit(directions)
    for group in groups:
        near = toward(group.center, group.radius, origin, unit_directions)
        if near.size == 0:
            continue
        if len(group.primitives) == 1:
            yield group.first, group.primitives[0], near
            continue
        near_directions = np.take(unit_directions, near, axis=1)
        for number, primitive in enumerate(group.primitives, group.first):
            rays = toward(*primitive.bounding_sphere(), origin, near_directions)
            if rays.size:
                yield number, primitive, near[rays]


def trace(
    groups: Iterable[Group], origin: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the first surface along every ray.

    Returns t (N,) float32 and the primitive's index (N,) int32 (-1, and t infinite, where nothing is hit).
    """
    nearest = np.full(directions.shape[1], MISS)
    index = np.full(directions.shape[1], -1, dtype=np.int32)
    for number, primitive, rays in candidates(groups, origin, directions):
        t = primitive.intersect(origin, np.take(directions, rays, axis=1))
        closer = t < nearest[rays]
        hit = rays[closer]
        nearest[hit] = t[closer]
        index[hit] = number
    return nearest, index


def lit(groups: Iterable[Group], light: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Which points (3, N) see the light, bool (N,): shadow rays start at the light to share one origin."""
    directions = points - light[:, None]
    visible = np.ones(points.shape[1], dtype=bool)
    for _, primitive, rays in candidates(groups, light, directions):
        rays = rays[visible[rays]]
        if rays.size:
            # the surface itself is at t = 1: stop a little short of it
            t = primitive.intersect(light, np.take(directions, rays, axis=1))
            visible[rays] = t > np.float32(0.995)
    return visible
