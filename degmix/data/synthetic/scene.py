"""A furnished room with people, lights and a camera, all drawn from one generator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from degmix.data.synthetic import furniture, people
from degmix.data.synthetic.geometry import Box, Group, Plane, Primitive, rotate, unit, vector, yaw_rotation
from degmix.data.synthetic.materials import (
    Material,
    checker,
    picked,
    plain,
    speckle,
    stripes,
    tiles,
    tinted,
    wood,
)
from degmix.data.synthetic.objects import Item, Surface, item, label_of, salt

Rng = np.random.Generator

CAMERA_CANDIDATES = 12
SHELL = 6  # the first items, and primitives, are the floor, the ceiling and the walls
CLEARANCE = 0.2  # metres between the camera and any footprint


@dataclass(frozen=True)
class Camera:
    """A pinhole camera. ``rotation``'s columns are its right, up and backward axes in the world."""

    position: np.ndarray
    rotation: np.ndarray
    field_of_view: float  # radians, over the longer side

    def focal(self, height: int, width: int) -> float:
        """Focal length in pixels."""
        return max(height, width) / 2 / float(np.tan(self.field_of_view / 2))

    def directions(self, rows: np.ndarray, columns: np.ndarray, height: int, width: int) -> np.ndarray:
        """World directions (3, N) through pixel positions; (0, 0) is the centre of the first pixel.

        The component along the optical axis is one, so the ray parameter of a hit is its depth.
        """
        focal = self.focal(height, width)
        x = ((columns - (width - 1) / 2) / focal).astype(np.float32)
        y = (((height - 1) / 2 - rows) / focal).astype(np.float32)
        return rotate(self.rotation, np.stack([x, y, np.full_like(x, -1)]))


@dataclass(frozen=True)
class Light:
    """A point light."""

    position: np.ndarray
    color: np.ndarray


@dataclass(frozen=True)
class Scene:
    """Everything the renderer needs: ``labels[i]`` is primitive i's class and so on."""

    primitives: list[Primitive]
    groups: list[Group]  # the same, by object
    casters: list[Group]  # those that cast shadows
    materials: list[Material]
    labels: np.ndarray  # uint8, 255 for unlabelled objects
    parts: np.ndarray  # uint8
    instances: np.ndarray  # int32, 1, 2, … in order of placement
    size: tuple[float, float, float]  # the room's width (x), height (y) and depth (z), metres
    lights: list[Light]
    camera: Camera


@dataclass
class Room:
    """A room while it is being furnished: what stands where."""

    width: float
    height: float
    depth: float
    items: list[Item] = field(default_factory=list)
    footprints: list[tuple[float, float, float, float]] = field(default_factory=list)  # x and z from, to
    hung: list[tuple[int, float, float]] = field(default_factory=list)  # wall, from, to: taken above 1 m

    def half_extent(self, wall: int) -> tuple[float, float]:
        """Half the wall's length, and its distance from the room's centre."""
        half = (self.width / 2, self.depth / 2)
        return half if wall % 2 == 0 else half[::-1]

    def free(self, footprint: tuple[float, float, float, float], margin: float = 0.06) -> bool:
        """Whether a rectangle lies in the room and meets no other footprint."""
        x0, x1, z0, z1 = footprint
        if x0 < -self.width / 2 or x1 > self.width / 2 or z0 < -self.depth / 2 or z1 > self.depth / 2:
            return False
        return all(
            x1 + margin < a0 or x0 - margin > a1 or z1 + margin < b0 or z0 - margin > b1
            for a0, a1, b0, b1 in self.footprints
        )

    def stand(self, rng: Rng, thing: Item, wall: int | None = None, tries: int = 16) -> Item | None:
        """Put a thing on a free part of the floor, with its back to a wall if one is named."""
        for _ in range(tries):
            half_width, half_depth = thing.half_width, thing.half_depth
            if wall is None:
                yaw = rng.uniform(0, 2 * np.pi)
                reach_x = reach_z = float(np.hypot(half_width, half_depth)) * 0.9
                x = rng.uniform(-1, 1) * max(self.width / 2 - reach_x, 0)
                z = rng.uniform(-1, 1) * max(self.depth / 2 - reach_z, 0)
            else:
                yaw = wall * np.pi / 2
                half_length, distance = self.half_extent(wall)
                along = rng.uniform(-1, 1) * max(half_length - half_width, 0)
                x, _, z = rotate(yaw_rotation(yaw), vector(along, 0, half_depth + 0.01 - distance))
                reach_x, reach_z = (half_width, half_depth) if wall % 2 == 0 else (half_depth, half_width)
                if top(thing) > 1.1 and not self.hang_free(wall, along - half_width, along + half_width):
                    continue
            footprint = (x - reach_x, x + reach_x, z - reach_z, z + reach_z)
            if self.free(footprint):
                self.footprints.append(footprint)
                if wall is not None and top(thing) > 1.1:
                    self.hung.append((wall, along - half_width, along + half_width))
                placed = thing.placed(yaw, x, 0, z)
                self.items.append(placed)
                return placed
        return None

    def hang_free(self, wall: int, low: float, high: float) -> bool:
        """Whether the wall is free there above 1 m."""
        half_length, _ = self.half_extent(wall)
        if low < -half_length or high > half_length:
            return False
        return all(w != wall or high < a or low > b for w, a, b in self.hung)

    def hang(self, rng: Rng, thing: Item, y: float, tries: int = 8) -> None:
        """Put a thing on a free part of any wall, its middle at height y."""
        for _ in range(tries):
            wall = int(rng.integers(4))
            half_length, distance = self.half_extent(wall)
            along = rng.uniform(-1, 1) * max(half_length - thing.half_width, 0)
            low, high = along - thing.half_width, along + thing.half_width
            if self.hang_free(wall, low, high):
                self.hung.append((wall, low, high))
                x, _, z = rotate(yaw_rotation(wall * np.pi / 2), vector(along, 0, -distance))
                self.items.append(thing.placed(wall * np.pi / 2, x, y, z))
                return


def top(thing: Item) -> float:
    """Height of the thing's highest box."""
    boxes = [s.shape for s in thing.surfaces if isinstance(s.shape, Box)]
    return max((float(box.center[1] + box.half[1]) for box in boxes), default=0.0)


def shell(rng: Rng, room: Room) -> list[Item]:
    """Floor, ceiling and the four walls, each an instance."""
    walls = picked(rng, ((0.72, 0.66, 0.5), (0.5, 0.62, 0.6), (0.7, 0.55, 0.5), (0.62, 0.62, 0.7)), 0.1)
    lighter = tuple(min(0.95, 1.12 * c) for c in walls)
    pattern, scale = [(plain, 0.5), (plain, 0.5), (stripes, 0.14), (speckle, 0.2)][rng.integers(4)]
    paper = Material(walls, lighter, pattern, scale=scale, salt=salt(rng))
    kind = rng.integers(4)
    if kind == 0:
        color = picked(rng, furniture.WOODS)
        ground = Material(color, tuple(0.6 * c for c in color), wood, scale=0.16, shine=0.15, salt=salt(rng))
    elif kind == 1:
        color = picked(rng, ((0.45, 0.42, 0.38), (0.3, 0.36, 0.4), (0.5, 0.34, 0.25)))
        ground = Material(
            color, (0.7, 0.68, 0.64), tiles, scale=rng.uniform(0.3, 0.5), shine=0.25, salt=salt(rng)
        )
    elif kind == 2:
        color = picked(rng, ((0.35, 0.3, 0.24), (0.22, 0.26, 0.34), (0.35, 0.18, 0.16)))
        ground = Material(color, tuple(0.65 * c for c in color), speckle, scale=0.05, salt=salt(rng))
    else:
        light, dark = tinted(rng, (0.6, 0.57, 0.5)), tinted(rng, (0.22, 0.17, 0.14))
        ground = Material(light, dark, checker, scale=rng.uniform(0.3, 0.45), shine=0.2)
    white = Material(tinted(rng, (0.8, 0.8, 0.78), 0.05), scale=0.8, salt=salt(rng))
    result = [
        item("floor", [Surface(Plane(vector(0, 0, 0), vector(0, 1, 0)), ground)]),
        item("ceiling", [Surface(Plane(vector(0, room.height, 0), vector(0, -1, 0)), white)]),
    ]
    for wall in range(4):
        _, distance = room.half_extent(wall)
        plane = Plane(vector(0, 0, -distance), vector(0, 0, 1))
        turned = plane.moved(yaw_rotation(wall * np.pi / 2), vector(0, 0, 0))
        result.append(item("wall", [Surface(turned, paper)]))
    return result


def furnish(rng: Rng, room: Room) -> None:
    """Fixtures on the walls, furniture along them, tables with things on top, lamps, plants, clutter."""
    if rng.random() < 0.9:
        placed = room.stand(rng, furniture.door(rng), wall=int(rng.integers(4)))
        if placed is not None:
            x0, x1, z0, z1 = room.footprints[-1]
            room.footprints[-1] = (x0 - 0.3, x1 + 0.3, z0 - 0.3, z1 + 0.3)  # room to open it
    for _ in range(rng.integers(1, 4)):
        room.hang(rng, furniture.window(rng), y=rng.uniform(1.5, 1.65))
    supports: list[tuple[Item, float]] = []
    for build, chance in (
        (furniture.bed, 0.75),
        (furniture.sofa, 0.75),
        (furniture.cabinet, 0.95),
        (furniture.cabinet, 0.8),
        (furniture.cabinet, 0.4),
    ):
        if rng.random() < chance:
            thing = build(rng)
            placed = room.stand(rng, thing, wall=int(rng.integers(4)))
            if placed is None:
                continue
            if thing.name == "cabinet" and top(thing) < 1.1:
                supports.append((placed, top(thing)))
            elif thing.name in ("sofa", "bed") and rng.random() < 0.45:
                sit(rng, room, placed)
    for chance in (0.95, 0.3):
        if rng.random() < chance:
            placed = room.stand(rng, furniture.table(rng))
            if placed is not None:
                supports.append((placed, table_height(placed)))
    for support, height in supports:
        decorate(rng, room, support, height)
    for _ in range(rng.choice(4, p=[0.2, 0.4, 0.3, 0.1])):
        room.stand(rng, people.person(rng, people.standing(rng)))
    for build, chance in ((furniture.floor_lamp, 0.75), (furniture.plant, 0.85), (furniture.plant, 0.35)):
        if rng.random() < chance:
            room.stand(rng, build(rng), wall=int(rng.integers(4)))
    if rng.random() < 0.7:
        x, z = rng.uniform(-0.25, 0.25, 2) * (room.width, room.depth)
        room.items.append(furniture.pendant_lamp(rng, room.height).placed(0, x, 0, z))
        room.footprints.append((x - 0.2, x + 0.2, z - 0.2, z + 0.2))
    for _ in range(rng.integers(2, 6)):
        room.hang(rng, furniture.picture(rng), y=rng.uniform(1.55, 1.75))
    for _ in range(rng.integers(0, 3)):
        room.stand(rng, furniture.clutter(rng))


def table_height(table: Item) -> float:
    """Height of a table's top, which is its first surface."""
    shape = table.surfaces[0].shape
    return (
        float(shape.center[1] + shape.half[1])
        if isinstance(shape, Box)
        else float(shape.base[1] + shape.height)
    )


def center_of(thing: Item) -> np.ndarray:
    """Where the middle of the thing's first surface is."""
    return thing.surfaces[0].shape.bounding_sphere()[0]


def decorate(rng: Rng, room: Room, support: Item, height: float) -> None:
    """Put a few small things on a table or a chest of drawers."""
    x, _, z = center_of(support)
    start = rng.uniform(0, 2 * np.pi)
    reach = 0.5 * min(support.half_width, support.half_depth)
    count = int(rng.integers(0, 3))
    for number in range(count):
        kind = rng.random()
        if kind < 0.4:
            thing = furniture.table_lamp(rng)
        elif kind < 0.6:
            thing = furniture.plant(rng, size=0.5)
        else:
            thing = furniture.clutter(rng)
        angle = start + 2 * np.pi * number / count
        thing = thing.placed(
            rng.uniform(0, 2 * np.pi), x + reach * np.cos(angle), height, z + reach * np.sin(angle)
        )
        room.items.append(thing)


def sit(rng: Rng, room: Room, support: Item) -> None:
    """Seat a person on a sofa or at the foot of a bed, where the floor in front is free."""
    seat, forward = (0.45, 0.18) if support.name == "sofa" else (0.52, support.half_depth - 0.22)
    sitter = people.person(rng, people.seated(rng), seat=seat)
    spread = max(support.half_width - 0.45, 0)
    along = rng.uniform(-spread, spread)
    front = support.surfaces[0].shape.rotation
    x, _, z = center_of(support) + rotate(front, vector(along, 0, forward))
    yaw = float(np.arctan2(front[0, 2], front[2, 2]))
    room.items.append(sitter.placed(yaw, x, 0, z))
    feet_x, _, feet_z = center_of(support) + rotate(front, vector(along, 0, forward + 0.6))
    room.footprints.append((feet_x - 0.3, feet_x + 0.3, feet_z - 0.3, feet_z + 0.3))


def lamps(rng: Rng, room: Room) -> list[Light]:
    """A lamp under the ceiling, and daylight from the first window."""
    x, z = rng.uniform(-0.2, 0.2, 2) * (room.width, room.depth)
    warm = vector(1.0, rng.uniform(0.86, 0.98), rng.uniform(0.7, 0.92)) * np.float32(rng.uniform(2.6, 3.6))
    result = [Light(vector(x, room.height - 0.12, z), warm)]
    panes = [thing for thing in room.items if thing.name == "window"]
    if panes:
        pane = panes[0].surfaces[0].shape
        place = pane.center + rotate(pane.rotation, vector(0, 0.1, 0.35))
        result.append(Light(place, vector(0.75, 0.9, 1.1) * np.float32(rng.uniform(0.4, 1.4))))
    return result


def candidate_camera(rng: Rng, room: Room) -> Camera:
    """A camera clear of all footprints that looks into the room."""
    for _ in range(64):
        x, z = rng.uniform(-0.5, 0.5, 2) * (room.width - 0.6, room.depth - 0.6)
        spot = (x - CLEARANCE, x + CLEARANCE, z - CLEARANCE, z + CLEARANCE)
        if room.free(spot, margin=0):
            break
    position = vector(x, rng.uniform(1.15, 1.9), z)
    # look across the room's middle, a little down
    aim_x, aim_z = rng.uniform(-0.3, 0.3, 2) * (room.width, room.depth)
    heading = unit(vector(aim_x - 1.5 * x, 0, aim_z - 1.5 * z))
    pitch = np.float32(np.clip(rng.normal(-0.17, 0.1), -0.4, 0.06))
    backward = vector(0, -np.sin(pitch), 0) - heading * np.cos(pitch)
    right = unit(np.cross(vector(0, 1, 0), backward))
    up = np.cross(backward, right)
    roll = np.float32(rng.normal(0, np.deg2rad(2)))
    tilted = np.stack(
        [right * np.cos(roll) + up * np.sin(roll), up * np.cos(roll) - right * np.sin(roll), backward]
    )
    return Camera(position, tilted.T.astype(np.float32), float(np.deg2rad(rng.uniform(60, 78))))


def judge(scene: Scene, centers: np.ndarray, radii: np.ndarray, camera: Camera) -> float:
    """How much a camera sees: objects and classes in view, people above all, less what stands in its way.

    Every primitive but the shell's counts as a sphere (``centers`` (3, P), ``radii`` (P,)); that one
    thing may hide another is left to chance.
    """
    right, up, backward = rotate(camera.rotation.T, centers - camera.position[:, None])
    away = np.maximum(-backward, np.float32(1e-3))
    # the view's half width is about 0.7 of the distance, its half height 0.55
    in_view = (backward < -0.4) & (np.abs(right) < 0.65 * away) & (np.abs(up) < 0.5 * away)
    near = np.sqrt(right**2 + up**2 + backward**2) - radii
    in_the_way = np.count_nonzero((near < 0.7) & (-backward > -radii))
    labels = scene.labels[SHELL:][in_view]
    # heads and torsos that look large enough to see their limbs, but leave room for others
    size = radii[in_view] / away[in_view]
    people = np.count_nonzero((labels == label_of("person")) & (size > 0.03) & (size < 0.12))
    return (
        np.unique(scene.instances[SHELL:][in_view]).size
        + 2.0 * np.unique(labels).size
        + 0.4 * min(people, 20)
        - 1.5 * in_the_way
        + 1.5 * view_length(scene.size, camera)
    )


def view_length(size: tuple[float, float, float], camera: Camera) -> float:
    """Metres to the wall in front of the camera."""
    reach = []
    for axis in (0, 2):
        ahead = -camera.rotation[axis, 2]
        to_wall = size[axis] / 2 - np.sign(ahead) * camera.position[axis]
        reach.append(to_wall / max(abs(ahead), 1e-6))
    return float(min(reach))


def casters(items: list[Item]) -> list[Group]:
    """What casts shadows: not the shell, which surrounds the lights, nor lampshades and window panes."""
    result = []
    for thing in items:
        opaque = [s.shape for s in thing.surfaces if not s.material.glow and not isinstance(s.shape, Plane)]
        if opaque:
            result.append(Group.around(opaque, 0))
    return result


def build(rng: Rng) -> Scene:
    """Draw a room and the best of a few camera positions in it."""
    room = Room(width=rng.uniform(3.6, 5.6), height=rng.uniform(2.4, 2.9), depth=rng.uniform(3.6, 5.6))
    room.items.extend(shell(rng, room))
    furnish(rng, room)
    lights = lamps(rng, room)
    groups, first = [], 0
    for thing in room.items:
        groups.append(Group.around([s.shape for s in thing.surfaces], first))
        first += len(thing.surfaces)
    surfaces = [(number, thing.name, s) for number, thing in enumerate(room.items, 1) for s in thing.surfaces]
    scene = Scene(
        primitives=[s.shape for _, _, s in surfaces],
        groups=groups,
        casters=casters(room.items),
        labels=np.array([label_of(name) for _, name, _ in surfaces], dtype=np.uint8),
        materials=[s.material for _, _, s in surfaces],
        parts=np.array([s.part for _, _, s in surfaces], dtype=np.uint8),
        instances=np.array([number for number, _, _ in surfaces], dtype=np.int32),
        size=(room.width, room.height, room.depth),
        lights=lights,
        camera=candidate_camera(rng, room),
    )
    cameras = [scene.camera, *(candidate_camera(rng, room) for _ in range(CAMERA_CANDIDATES - 1))]
    spheres = [primitive.bounding_sphere() for primitive in scene.primitives[SHELL:]]
    centers = np.stack([center for center, _ in spheres], axis=1)
    radii = np.array([radius for _, radius in spheres], dtype=np.float32)
    return replace(scene, camera=max(cameras, key=partial(judge, scene, centers, radii)))
