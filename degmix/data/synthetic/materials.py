"""Procedural surfaces: the colour of a point from its position on the object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Color = tuple[float, float, float]


# noise values at lattice points: a table is several times faster than a good integer hash
LATTICE = np.random.default_rng(2308).random(1 << 13, dtype=np.float32)


def hashed(x: np.ndarray, y: np.ndarray, z: np.ndarray, salt: int) -> np.ndarray:
    """Numbers in [0, 1) that depend only on the int32 lattice point and the salt."""
    with np.errstate(over="ignore"):
        key = (x * np.int32(73856093)) ^ (y * np.int32(19349663)) ^ (z * np.int32(83492791))
    return LATTICE[((key >> 7) ^ key ^ np.int32(salt)) & np.int32(LATTICE.size - 1)]


def value_noise(points: np.ndarray, salt: int) -> np.ndarray:
    """Smooth noise in [0, 1) with features of size one. ``points`` (3, N)."""
    cell = np.floor(points)
    fraction = points - cell
    x, y, z = fraction * fraction * (3 - 2 * fraction)
    i, j, k = cell.astype(np.int32)

    def along_x(row: np.ndarray, layer: np.ndarray) -> np.ndarray:
        first = hashed(i, row, layer, salt)
        return first + x * (hashed(i + 1, row, layer, salt) - first)

    near = along_x(j, k)
    near += y * (along_x(j + 1, k) - near)
    far = along_x(j, k + 1)
    far += y * (along_x(j + 1, k + 1) - far)
    return near + z * (far - near)


def surface_coordinates(local: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two coordinates along the surface: the local axes that are not nearest to the normal."""
    axis = np.argmax(np.abs(normals), axis=0)
    u = np.where(axis == 0, local[2], local[0])
    v = np.where(axis == 1, local[2], local[1])
    return u, v


Pattern = Callable[[np.ndarray, np.ndarray, float, int], np.ndarray]


def plain(local: np.ndarray, normals: np.ndarray, scale: float, salt: int) -> np.ndarray:
    """Nearly even paint."""
    return 0.25 * value_noise(local / scale, salt)


def checker(local: np.ndarray, normals: np.ndarray, scale: float, salt: int) -> np.ndarray:
    """Squares in two colours."""
    u, v = surface_coordinates(local, normals)
    return ((np.floor(u / scale) + np.floor(v / scale)) % 2).astype(np.float32)


def stripes(local: np.ndarray, normals: np.ndarray, scale: float, salt: int) -> np.ndarray:
    """Bands across the first surface coordinate: wallpaper."""
    u, _ = surface_coordinates(local, normals)
    return (np.floor(u / scale) % 2).astype(np.float32)


def rings(local: np.ndarray, normals: np.ndarray, scale: float, salt: int) -> np.ndarray:
    """Horizontal bands: jumpers, beach balls, rugs."""
    return (np.floor(local[1] / scale) % 2).astype(np.float32)


def wood(local: np.ndarray, normals: np.ndarray, scale: float, salt: int) -> np.ndarray:
    """Long grain along x, in boards of width ``scale``, each of its own tone."""
    board = np.floor(local[2] / scale)
    piece = np.floor(local[0] / 1.1 + 0.37 * board).astype(np.int32)
    tone = hashed(board.astype(np.int32), piece, np.zeros_like(piece), salt)
    grain = value_noise(local * np.float32([[3], [22], [30]]), salt)
    return 0.55 * tone + 0.45 * grain


def tiles(local: np.ndarray, normals: np.ndarray, scale: float, salt: int) -> np.ndarray:
    """Square tiles with joints; the joints take the second colour."""
    u, v = (coordinate / scale for coordinate in surface_coordinates(local, normals))
    joint = (u % 1 < 0.06) | (v % 1 < 0.06)
    zero = np.zeros(u.shape, dtype=np.int32)
    tone = 0.3 * hashed(np.floor(u).astype(np.int32), np.floor(v).astype(np.int32), zero, salt)
    return np.where(joint, np.float32(1), tone)


def speckle(local: np.ndarray, normals: np.ndarray, scale: float, salt: int) -> np.ndarray:
    """Carpet, cloth and leaves: noise at two sizes."""
    return 0.6 * value_noise(local / scale, salt) + 0.4 * value_noise(local / (0.3 * scale), salt + 1)


@dataclass(frozen=True)
class Material:
    """Two colours (linear RGB in [0, 1]) mixed by a pattern; ``glow`` is light it gives off itself."""

    first: Color
    second: Color | None = None
    pattern: Pattern = plain
    scale: float = 0.3
    glow: float = 0.0
    shine: float = 0.0
    salt: int = 0

    def albedo(self, local: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """Colour (3, N) at local positions (3, N) with local normals (3, N)."""
        first = np.float32(self.first)[:, None]
        second = first * np.float32(0.8) if self.second is None else np.float32(self.second)[:, None]
        return first + (second - first) * self.pattern(local, normals, self.scale, self.salt)


def tinted(rng: np.random.Generator, color: Color, spread: float = 0.08) -> Color:
    """The colour, moved a little at random: overall brightness and each channel."""
    value = (
        np.float64(color) * rng.uniform(1 - 2 * spread, 1 + 2 * spread) + rng.uniform(-spread, spread, 3) / 2
    )
    red, green, blue = np.clip(value, 0.01, 0.95)
    return float(red), float(green), float(blue)


def picked(rng: np.random.Generator, colors: tuple[Color, ...], spread: float = 0.06) -> Color:
    """One of the colours, moved a little at random."""
    return tinted(rng, colors[rng.integers(len(colors))], spread)
