"""DeGMix: multi-task dense prediction with deformable mixers and task-aware gating."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from degmix.model.degmix import DeGMix, DeGMixHead

__all__ = ["DeGMix", "DeGMixHead"]


def __getattr__(name: str) -> type:
    """Import the model when it is first asked for: the command line has to run before PyTorch is loaded."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from degmix.model import degmix as model

    return getattr(model, name)
