"""The order of training: which sample comes when, as a pure function of the seed and the position."""

from __future__ import annotations

import numpy as np
from torch.utils.data import Dataset

from degmix.data.errors import DataError
from degmix.data.nyud import Sample
from degmix.data.transforms import Transform

# two independent families of random numbers per seed
ORDER, AUGMENTATION = 0, 1


class TrainingStream(Dataset[Sample]):
    """The training samples of steps ``start_step`` to ``steps``, in order, to be read without shuffling.

    Every sample depends on the seed and its position alone, so a run that resumes at step n sees what the
    uninterrupted run saw, with any number of loader workers and no state to save. Each epoch visits all
    samples once, in its own order; a batch may span two epochs.

    Args:
        dataset: has a length and samples.
        transform: called with a sample and its own random generator.
        seed: a number ≥ 0.
        batch_size: samples per step, over all processes and accumulation steps.
        start_step, steps: the first step and the one after the last.

    Raises:
        DataError: the data set is empty, or a number is out of its range.
    """

    def __init__(
        self,
        dataset: Dataset[Sample] | list[Sample],
        transform: Transform,
        seed: int,
        batch_size: int,
        start_step: int,
        steps: int,
    ) -> None:
        if len(dataset) == 0:
            raise DataError("dataset: expected at least one sample, got none")
        for name, value, least in (
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
            ("start_step", start_step, 0),
        ):
            if value < least:
                raise DataError(f"{name}: expected at least {least}, got {value}")
        if steps < start_step:
            raise DataError(f"steps: expected at least start_step ({start_step}), got {steps}")
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.first = start_step * batch_size
        self.last = steps * batch_size
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.last - self.first

    def index(self, position: int) -> int:
        """Which sample of the data set stands at an absolute position (0 is the first of step 0)."""
        epoch, place = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(len(self.dataset))
            self._epoch = epoch
        return int(self._order[place])

    def __getitem__(self, item: int) -> Sample:
        if not 0 <= item < len(self):
            raise IndexError(f"item: expected 0 to {len(self) - 1}, got {item}")
        position = self.first + item
        rng = np.random.default_rng((self.seed, AUGMENTATION, position))
        return self.transform(self.dataset[self.index(position)], rng)
