"""Data sets, augmentations and the training stream."""

from .errors import DataError
from .nyud import NYUD, Sample
from .stream import TrainingStream
from .transforms import evaluation_transform, training_transform

__all__ = ["NYUD", "DataError", "Sample", "TrainingStream", "evaluation_transform", "training_transform"]
