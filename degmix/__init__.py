"""DeGMix: multi-task dense prediction with deformable mixers and task-aware gating."""

from degmix.model.degmix import DeGMix, DeGMixHead

__all__ = ["DeGMix", "DeGMixHead"]
