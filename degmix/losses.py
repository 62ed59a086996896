"""The training losses of the six tasks, and how a label says "ignore me".

Every loss takes the model's logits and the data set's target, computes in float32 (float64 stays float64)
even under automatic mixed precision, and gives exactly zero, with zero gradient, when no pixel of the batch
has a label: a sum over valid pixels is divided by at least one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
"""Marks pixels without a label in class maps, saliency and edges; depth marks them 0, normals (0, 0, 0)."""

EDGE_POSITIVE_WEIGHT = 0.8
"""Weight of the positives in :func:`edge_loss` on NYUD-v2; PASCAL-Context takes 0.95."""


def cross_entropy_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy, the mean over valid pixels.

    Args:
        logits: (B, classes, H, W).
        target: (B, H, W) int64 class indices, 255 is ignored.
    """
    total = F.cross_entropy(_at_least_float32(logits), target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


def balanced_cross_entropy_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Two-class cross-entropy in which each class weighs as much as the other one is frequent in the batch.

    Args:
        logits: (B, 2, H, W).
        target: (B, H, W) int64, 1 salient, 0 not, 255 is ignored.
    """
    logits = _at_least_float32(logits)
    valid = (target != IGNORE).sum().clamp(min=1)
    positive = (target == 1).sum().to(logits.dtype) / valid
    weight = torch.stack((positive, 1 - positive))
    return F.cross_entropy(logits, target, weight, ignore_index=IGNORE, reduction="sum") / valid


def depth_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Absolute difference in metres, the mean over valid pixels.

    Args:
        logits: (B, 1, H, W) predicted depth.
        target: (B, 1, H, W) depth, 0 is ignored.
    """
    valid = target > 0
    error = (_at_least_float32(logits) - target).abs()
    return torch.where(valid, error, 0.0).sum() / valid.sum().clamp(min=1)


def normals_loss(logits: Tensor, target: Tensor) -> Tensor:
    """L1 distance between unit vectors, summed over the three components, the mean over valid pixels.

    Args:
        logits: (B, 3, H, W) directions of any length.
        target: (B, 3, H, W) unit vectors, the zero vector is ignored.
    """
    valid = valid_normals(target)
    error = (unit_vectors(_at_least_float32(logits)) - target).abs()
    return torch.where(valid, error, 0.0).sum() / valid.sum().clamp(min=1)


def edge_loss(logits: Tensor, target: Tensor, positive_weight: float = EDGE_POSITIVE_WEIGHT) -> Tensor:
    """Binary cross-entropy with the two classes weighted, the mean over valid pixels.

    Args:
        logits: (B, 1, H, W).
        target: (B, 1, H, W), 1 edge, 0 none, 255 is ignored.
        positive_weight: weight w of the edge pixels; the others weigh 1 − w.
    """
    logits = _at_least_float32(logits)
    valid = target != IGNORE
    label = torch.where(valid, target, 0.0).to(logits.dtype)
    weight = (label * positive_weight + (1 - label) * (1 - positive_weight)) * valid
    error = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
    return (error * weight).sum() / valid.sum().clamp(min=1)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Vectors (B, 3, H, W) at length one; a zero vector stays zero and passes its gradient on unscaled."""
    norm = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    # Dividing by a clamped norm would multiply the gradient at a zero vector by 1 / epsilon.
    return vectors / torch.where(norm > 1e-12, norm, 1.0)


def valid_normals(target: Tensor) -> Tensor:
    """Where normals (B, 3, H, W) are known, as a mask (B, 1, H, W)."""
    return (target != 0).any(dim=1, keepdim=True)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
