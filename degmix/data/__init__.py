"""Data sets, augmentations and the training stream."""
