"""Swap torchvision's ``DeformConv2d`` for ours inside a finished model."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from degmix_kernels.deform_conv.module import DeformConv2d


@dataclass(frozen=True)
class Replacement:
    """What :func:`replace_deform_conv` did to a model; ``print`` it.

    Attributes:
        replaced: qualified name of every layer that is ours now, as in ``model.named_modules()``: each layer
            once, under its first name; ``""`` is the model itself.
        kept: qualified name → reason, of every layer derived from torchvision's that was left alone.
    """

    replaced: tuple[str, ...]
    kept: dict[str, str]

    def __str__(self) -> str:
        def show(name: str) -> str:
            return name or "the model itself"

        count = len(self.replaced)
        lines = [f"replaced {count} deformable convolution{'' if count == 1 else 's'}"]
        if self.replaced:
            lines[0] += ": " + ", ".join(map(show, self.replaced))
        return "\n".join(lines + [f"kept {show(name)}: {reason}" for name, reason in self.kept.items()])


def replace_deform_conv(model: nn.Module) -> Replacement:
    """Turn every ``torchvision.ops.DeformConv2d`` of a model into :class:`degmix_kernels.DeformConv2d`.

    Only the class of a layer changes; the layer stays the same object. So its parameters (optimizers and tied
    weights go on working), parametrizations and ``weight_norm``, buffers, hooks, dtype, device,
    ``requires_grad`` and training mode all stay, a layer used in several places is ours in all of them, and
    the model may itself be such a layer. State dicts keep their keys.

    Left alone, and named in the result, are layers whose forward pass may be another one: instances of
    subclasses (FSDP's wrappers among them: swap before ``fully_shard``), and layers whose ``forward`` was
    replaced on the instance. Calls of the *function* ``torchvision.ops.deform_conv2d`` cannot be seen from
    outside; import ours in its stead. Swap before ``torch.compile``: code compiled earlier may go on
    calling torchvision's op.

    Two things differ afterwards, both in :func:`degmix_kernels.deform_conv2d`: under autocast the result has
    the autocast dtype (torchvision's is fp32), and channels_last input gives channels_last output.
    And two things that torchvision's layer can do, ours cannot: ``torch.jit`` and ``torch.func.vmap``.

    torchvision is not imported: a model with one of its layers has loaded it, else there is none to swap.

    Args:
        model: any module; changed in place.

    Returns:
        The names of the layers replaced, and of those kept with the reason.

    Raises:
        TypeError: if ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    torchvision = sys.modules.get("torchvision.ops.deform_conv")
    if torchvision is None:
        return Replacement((), {})
    replaced, kept = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, torchvision.DeformConv2d):
            continue
        kind = parametrize.type_before_parametrizations(module)
        if kind is not torchvision.DeformConv2d:
            kept[name] = f"{kind.__qualname__} is a subclass, its forward pass may differ"
        elif "forward" in vars(module):
            kept[name] = "its forward was replaced on the instance"
        else:
            module.__class__ = _class_for(module)
            replaced.append(name)
    return Replacement(tuple(replaced), kept)


def _class_for(module: nn.Module) -> type[DeformConv2d]:
    """Our class, or for a parametrized layer a subclass of it with the layer's own properties."""
    if not parametrize.is_parametrized(module):
        return DeformConv2d
    # parametrize gave this one layer a class of its own, whose properties compute the parametrized tensors.
    properties = {name: value for name, value in vars(type(module)).items() if name != "__doc__"}
    return type(f"Parametrized{DeformConv2d.__name__}", (DeformConv2d,), properties)
