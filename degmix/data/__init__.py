"""Data sets, augmentations and the training stream."""

from degmix.data.errors import DataError
from degmix.data.nyud import NYUD, Sample
from degmix.data.stream import TrainingStream
from degmix.data.transforms import evaluation_transform, training_transform

__all__ = ["NYUD", "DataError", "Sample", "TrainingStream", "evaluation_transform", "training_transform"]
