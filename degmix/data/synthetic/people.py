"""People built of capsules, in random poses: six body parts as in PASCAL-Person-Part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from degmix.data.synthetic.geometry import Capsule, vector
from degmix.data.synthetic.materials import Color, Material, picked, rings, speckle, stripes, tinted
from degmix.data.synthetic.objects import PARTS, Item, Surface, ball, item, salt

HEAD, TORSO, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG = range(1, len(PARTS))

SKINS: tuple[Color, ...] = ((0.78, 0.5, 0.37), (0.6, 0.34, 0.22), (0.36, 0.19, 0.11), (0.85, 0.6, 0.48))
HAIR: tuple[Color, ...] = ((0.03, 0.02, 0.02), (0.15, 0.07, 0.03), (0.5, 0.34, 0.12), (0.4, 0.38, 0.36))
SHIRTS: tuple[Color, ...] = (
    (0.7, 0.08, 0.08),
    (0.08, 0.45, 0.16),
    (0.1, 0.2, 0.65),
    (0.85, 0.6, 0.08),
    (0.8, 0.8, 0.8),
    (0.45, 0.1, 0.5),
)
TROUSERS: tuple[Color, ...] = ((0.05, 0.08, 0.2), (0.04, 0.04, 0.05), (0.35, 0.28, 0.18), (0.22, 0.24, 0.26))


@dataclass(frozen=True)
class Pose:
    """Joint angles in radians, arms and legs as (right, left).

    ``swing`` turns a limb forward, ``spread`` away from the body; knees bend backward, elbows forward.
    """

    arm_swing: tuple[float, float]
    arm_spread: tuple[float, float]
    elbow: tuple[float, float]
    leg_swing: tuple[float, float]
    leg_spread: tuple[float, float]
    knee: tuple[float, float]
    lean: float


def limb_direction(swing: float, spread: float, side: int) -> np.ndarray:
    """Unit vector of a limb that hangs down at zero angles."""
    return vector(side * np.sin(spread), -np.cos(spread) * np.cos(swing), np.cos(spread) * np.sin(swing))


def pair(rng: np.random.Generator, low: float, high: float) -> tuple[float, float]:
    """Two independent angles, right and left."""
    right, left = rng.uniform(low, high, 2)
    return float(right), float(left)


def standing(rng: np.random.Generator) -> Pose:
    """Standing or walking, arms anywhere from hanging to raised."""
    stride = rng.uniform(-0.5, 0.5)
    raised = rng.random(2) < 0.25
    swing = tuple(float(rng.uniform(1.2, 2.8) if up else rng.uniform(-0.5, 0.8)) for up in raised)
    return Pose(
        arm_swing=swing,
        arm_spread=pair(rng, 0.08, 0.7),
        elbow=pair(rng, 0.05, 1.4),
        leg_swing=(stride, -stride),
        leg_spread=pair(rng, 0.02, 0.2),
        knee=pair(rng, 0.0, 0.4),
        lean=rng.uniform(-0.05, 0.15),
    )


def seated(rng: np.random.Generator) -> Pose:
    """Sitting on a sofa or a bed's edge."""
    return Pose(
        arm_swing=pair(rng, 0.0, 0.9),
        arm_spread=pair(rng, 0.05, 0.3),
        elbow=pair(rng, 0.3, 1.3),
        leg_swing=pair(rng, 1.4, 1.55),
        leg_spread=pair(rng, 0.05, 0.25),
        knee=pair(rng, 1.3, 1.6),
        lean=rng.uniform(-0.15, 0.05),
    )


def wardrobe(rng: np.random.Generator) -> dict[int, Material]:
    """What each body part is covered with: skin on bare forearms and shins, else clothes."""
    skin = Material(picked(rng, SKINS, 0.04), salt=salt(rng))
    color = picked(rng, SHIRTS)
    pattern, scale = [(speckle, 0.1), (rings, 0.07), (stripes, 0.05), (speckle, 0.1)][rng.integers(4)]
    shirt = Material(color, tinted(rng, tuple(0.55 * c for c in color)), pattern, scale=scale, salt=salt(rng))
    trousers = Material(picked(rng, TROUSERS, 0.04), pattern=speckle, scale=0.08, salt=salt(rng))
    short_sleeves, shorts = rng.random() < 0.6, rng.random() < 0.3
    return {
        HEAD: skin,
        TORSO: shirt,
        UPPER_ARM: shirt,
        LOWER_ARM: skin if short_sleeves else shirt,
        UPPER_LEG: trousers,
        LOWER_LEG: skin if shorts else trousers,
    }


def person(rng: np.random.Generator, pose: Pose, seat: float | None = None) -> Item:
    """A person facing +z with the feet on the floor, or with the hips on a ``seat`` of that height."""
    height = rng.uniform(1.5, 1.88)
    build = rng.uniform(0.9, 1.2) * height
    clothes = wardrobe(rng)
    skin, shoes = clothes[HEAD], Material(picked(rng, HAIR), shine=0.2)
    hair = Material(picked(rng, HAIR, 0.03), pattern=speckle, scale=0.03, salt=salt(rng))
    surfaces: list[Surface] = []

    def limb(
        part: int, start: np.ndarray, end: np.ndarray, radius: float, cover: Material | None = None
    ) -> None:
        surfaces.append(Surface(Capsule(start, end, radius * build), cover or clothes[part], part))

    hips = vector(0, 0, 0)
    spine = vector(0, np.cos(pose.lean), np.sin(pose.lean))
    chest, neck = hips + spine * (0.2 * height), hips + spine * (0.28 * height)
    half_shoulder, half_hip = 0.095 * height, 0.05 * height
    limb(TORSO, hips + spine * (0.02 * height), chest, 0.082)
    limb(TORSO, hips - vector(half_hip, 0, 0), hips + vector(half_hip, 0, 0), 0.068)
    limb(TORSO, chest - vector(half_hip, 0, 0), chest + vector(half_hip, 0, 0), 0.07)
    limb(TORSO, neck - vector(half_shoulder * 0.8, 0, 0), neck + vector(half_shoulder * 0.8, 0, 0), 0.04)

    head = neck + spine * (0.125 * height)
    limb(HEAD, neck, head, 0.03, skin)
    limb(HEAD, head - vector(0, 0.02 * height, 0), head + vector(0, 0.015 * height, 0), 0.055, skin)
    crown = head + vector(0, 0.03 * height, -0.018 * height)
    x, y, z = crown
    surfaces.append(Surface(ball(hair, 0.058 * build, x, y, z).shape, hair, HEAD))

    for number, side in enumerate((-1, 1)):
        shoulder = neck + vector(side * half_shoulder, -0.01 * height, 0)
        swing, spread = pose.arm_swing[number], pose.arm_spread[number]
        elbow = shoulder + limb_direction(swing, spread, side) * (0.175 * height)
        hand = elbow + limb_direction(swing + pose.elbow[number], spread * 0.5, side) * (0.17 * height)
        limb(UPPER_ARM, shoulder, elbow, 0.032)
        limb(LOWER_ARM, elbow, hand, 0.025)
        limb(LOWER_ARM, hand, hand + (hand - elbow) * 0.15, 0.03, skin)

        joint = hips + vector(side * half_hip, -0.02 * height, 0)
        swing, spread = pose.leg_swing[number], pose.leg_spread[number]
        knee = joint + limb_direction(swing, spread, side) * (0.235 * height)
        ankle = knee + limb_direction(swing - pose.knee[number], spread * 0.3, side) * (0.23 * height)
        limb(UPPER_LEG, joint, knee, 0.048)
        limb(LOWER_LEG, knee, ankle, 0.034)
        limb(LOWER_LEG, ankle, ankle + vector(0, -0.01, 0.075) * height, 0.026, shoes)

    if seat is None:
        lowest = min(
            min(s.shape.start[1], s.shape.end[1]) - s.shape.radius for s in surfaces if s.part == LOWER_LEG
        )
        lift = -float(lowest)
    else:
        lift = seat + 0.068 * build
    return item("person", surfaces, 0.35, 0.3).placed(0, 0, lift, 0)
