"""The training stream is a pure function of seed and position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_rooms import TASKS
from torch.utils.data import DataLoader

from degmix.data import NYUD, DataError, TrainingStream, training_transform


def drawn(sample, rng: np.random.Generator) -> tuple[int, float]:
    return sample, float(rng.random())


@given(
    length=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    batch_size=st.integers(1, 5),
    steps=st.integers(0, 8),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_resuming_gives_the_tail_of_the_full_run(length, seed, batch_size, steps, data):
    start = data.draw(st.integers(0, steps))
    full = list(TrainingStream(range(length), drawn, seed, batch_size, 0, steps))
    assert len(full) == steps * batch_size
    tail = list(TrainingStream(range(length), drawn, seed, batch_size, start, steps))
    assert tail == full[start * batch_size :]


def test_every_epoch_visits_every_sample_once_in_its_own_order():
    stream = TrainingStream(range(10), drawn, 0, 5, 0, 8)
    epochs = [[index for index, _ in list(stream)[e * 10 : e * 10 + 10]] for e in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({number for _, number in stream}) == 40, "each visit has its own augmentation"


def test_order_of_access_does_not_matter():
    stream = TrainingStream(range(7), drawn, 3, 2, 0, 14)
    forward = list(stream)
    backward = [stream[i] for i in reversed(range(len(stream)))]
    assert backward[::-1] == forward


def test_seeds_differ():
    first, second = (list(TrainingStream(range(50), drawn, seed, 1, 0, 50)) for seed in (0, 1))
    assert first != second


def test_loader_workers_change_nothing(rooms):
    dataset = NYUD(rooms, "train", TASKS, classes=13)
    stream = TrainingStream(dataset, training_transform((32, 40)), 5, 2, 0, 3)
    alone, shared = (list(DataLoader(stream, batch_size=2, num_workers=workers)) for workers in (0, 2))
    assert len(alone) == 3
    for first, second in zip(alone, shared, strict=True):
        assert first["name"] == second["name"]
        assert all(torch.equal(first[key], second[key]) for key in ("image", *TASKS))


def test_positions_outside_are_refused():
    stream = TrainingStream(range(3), drawn, 0, 2, 1, 3)
    for item in (-1, 4):
        with pytest.raises(IndexError):
            stream[item]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": range(0)}, "dataset: expected at least one sample, got none"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"start_step": -1}, "start_step: expected at least 0, got -1"),
        ({"start_step": 3, "steps": 2}, r"steps: expected at least start_step \(3\), got 2"),
    ],
)
def test_bad_arguments(arguments, message):
    good = {"dataset": range(3), "seed": 0, "batch_size": 1, "start_step": 0, "steps": 1}
    with pytest.raises(DataError, match=message):
        TrainingStream(transform=drawn, **{**good, **arguments})
