"""DeGMix: a shared backbone, a deformable mixer per task, the gating decoder, a prediction per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from degmix.model.backbone import create_backbone
from degmix.model.decoder import ATTENTIONS, GatingDecoder
from degmix.model.mixer import DeformableMixers
from degmix.model.recompute import checkpointed
from degmix_kernels import BatchNorm2d, autocast, linear_norm

MAX_TASKS = 8


class DeGMix(nn.Module):
    """Dense predictions of several tasks from one image.

    Args:
        backbone: a name for :func:`degmix.model.backbone.create_backbone`, or a module that returns feature
            maps for :class:`DeGMixHead`, the one at 1/4 first, and has their channel counts in ``channels``.
        tasks: task name → channels of its prediction, 1 to 8 tasks.
        pretrained: whether a named backbone downloads timm's weights.
        weights: a file with weights for a named backbone, instead of a download.
        attention: as in :class:`DeGMixHead`.
        depth: as in :class:`DeGMixHead`.
        dim: as in :class:`DeGMixHead`.
        heads: as in :class:`DeGMixHead`.

    Raises:
        ValueError: for an unknown backbone or attention, or a number out of range.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        tasks: Mapping[str, int],
        *,
        pretrained: bool = False,
        weights: str | Path | None = None,
        attention: str = "pixel",
        depth: int = 2,
        dim: int = 256,
        heads: int = 2,
    ) -> None:
        super().__init__()
        check_arguments(tasks, attention, depth, dim, heads)  # before a download
        if isinstance(backbone, str):
            backbone = create_backbone(backbone, pretrained, weights)
        elif pretrained or weights is not None:
            raise ValueError("backbone: expected a name along with pretrained or weights, got a module")
        self.backbone = backbone
        self.head = DeGMixHead(
            backbone.channels, tasks, attention=attention, depth=depth, dim=dim, heads=heads
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Predict every task.

        Args:
            image: (B, 3, H, W), floating point, normalised as the backbone's weights want it; any H and W.

        Returns:
            Task name → (B, channels, H, W), logits where the task is a classification.

        Raises:
            ValueError: for another shape, or an empty image.
        """
        if image.dim() != 4 or image.shape[1] != 3 or min(image.shape[2:]) < 1:
            raise ValueError(f"image: expected shape (B, 3, H, W) with H, W ≥ 1, got {tuple(image.shape)}")
        return self.head(self.backbone(image), tuple(image.shape[2:]))


class DeGMixHead(nn.Module):
    """Everything of DeGMix behind the backbone (arXiv 2308.05721).

    ``attention`` chooses what interaction and query blocks attend to:

    - ``"pixel"``: the T tasks' tokens at each pixel, in both blocks.
    - ``"released"``: the program behind the published weights; the interaction block is pointwise, the query
      block as in ``"pixel"``. Same parameters as ``"pixel"``.
    - ``"linear"``: the authors' later program; tokens at 1/16, attention without softmax over all of them.
    - ``"global"``: the paper's text; softmax over all T·N tokens, in both blocks.

    Every image is predicted independently of the rest of the batch (in training, but for BatchNorm).

    Initial weights: zeros for the offsets' ``p_conv.weight``, N(0, 0.01) and zero bias for the last
    convolution of each task, W = 0 and b = 1 for the gate, as published; attention projections as in
    ``nn.MultiheadAttention``; PyTorch's defaults for all else.

    Args:
        in_channels: channels of the feature maps, the one at 1/4 first.
        tasks: task name → channels of its prediction, 1 to 8 tasks.
        attention: ``"pixel"``, ``"released"``, ``"linear"`` or ``"global"``.
        depth: layers of each task's deformable mixer.
        dim: channels of the tokens.
        heads: heads of every attention; divides ``dim``.

    Raises:
        ValueError: for an unknown attention or a number out of range.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        tasks: Mapping[str, int],
        *,
        attention: str = "pixel",
        depth: int = 2,
        dim: int = 256,
        heads: int = 2,
    ) -> None:
        super().__init__()
        check_arguments(tasks, attention, depth, dim, heads)
        if not in_channels or min(in_channels) < 1:
            raise ValueError(f"in_channels: expected positive channel counts, got {list(in_channels)}")
        self.in_channels = tuple(in_channels)
        self.attention = attention
        channels = sum(in_channels)
        self.embed = (PatchEmbed if attention == "linear" else LinearEmbed)(in_channels, dim)
        self.mixers = DeformableMixers(tasks, dim, depth)
        self.decoder = GatingDecoder(list(tasks), attention, dim, heads)
        hidden = max(channels // 8, 1)
        self.predictions = nn.ModuleDict({task: Prediction(dim, hidden, out) for task, out in tasks.items()})

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """Predict every task.

        Args:
            features: the backbone's maps, (B, in_channels[i], H_i, W_i), the largest first; the others are
                upsampled to its size.
            size: (height, width) of the predictions.

        Returns:
            Task name → (B, channels, height, width).

        Raises:
            TypeError: for a map that is no tensor, or of another dtype or device.
            ValueError: for another number of maps, images or channels, or an empty size.
        """
        self._check_features(features, size)
        device = features[0].device
        if autocast.enabled(device):
            features = [autocast.cast(feature, device) for feature in features]
        x = self.embed(features)
        maps = self.mixers(x)
        # permute: the gradient of flatten(2).transpose(1, 2) is one that PyTorch's CPU BatchNorm gets wrong.
        tokens = torch.stack([each.permute(0, 2, 3, 1).flatten(1, 2) for each in maps])  # (T, B, N, C)
        decoded = self.decoder(tokens).transpose(2, 3).contiguous()  # (T, B, C, N)
        decoded = decoded.unflatten(3, x.shape[2:]).unbind()
        predictions = zip(self.predictions.items(), decoded, strict=True)
        return {task: resize(predict(each), size) for (task, predict), each in predictions}

    def _check_features(self, features: Sequence[Tensor], size: tuple[int, int]) -> None:
        if len(features) != len(self.in_channels):
            raise ValueError(f"features: expected {len(self.in_channels)} maps, got {len(features)}")
        weight = next(self.embed.parameters())
        for index, (feature, channels) in enumerate(zip(features, self.in_channels, strict=True)):
            name = f"features[{index}]"
            if not isinstance(feature, Tensor) or not feature.is_floating_point():
                kind = feature.dtype if isinstance(feature, Tensor) else type(feature).__name__
                raise TypeError(f"{name}: expected a floating-point tensor, got {kind}")
            if feature.dim() != 4 or feature.shape[1] != channels or min(feature.shape[2:]) < 1:
                expected = f"(B, {channels}, H, W) with H, W ≥ 1"
                raise ValueError(f"{name}: expected shape {expected}, got {tuple(feature.shape)}")
            if feature.shape[0] != features[0].shape[0]:
                images = f"{features[0].shape[0]} images as features[0]"
                raise ValueError(f"{name}: expected {images}, got {feature.shape[0]}")
            if feature.device != weight.device:
                raise TypeError(
                    f"{name}: expected device {weight.device} as the parameters, got {feature.device}"
                )
            # Autocast leaves a backbone's maps in several dtypes, and the head casts them all.
            castable = autocast.enabled(weight.device) and feature.dtype != torch.float64
            if feature.dtype != weight.dtype and not castable:
                raise TypeError(f"{name}: expected {weight.dtype}, got {feature.dtype}")
        if len(size) != 2 or not all(isinstance(side, (int, torch.SymInt)) and side >= 1 for side in size):
            raise ValueError(f"size: expected (height, width), integers of at least 1, got {tuple(size)}")


class LinearEmbed(nn.Module):
    """A Linear and a LayerNorm at every pixel of all maps, upsampled to the first one's size.

    A Linear and bilinear upsampling commute: the part of the Linear that belongs to a map is applied at the
    map's own resolution and the results are upsampled and added, so that the concatenation never exists.

    Args:
        in_channels: channels of the maps.
        dim: channels C of the result.
    """

    def __init__(self, in_channels: Sequence[int], dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(sum(in_channels), dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Maps (B, in_channels[i], H_i, W_i) → (B, C, H_0, W_0)."""
        size = features[0].shape[2:]
        own, *weights = self.linear.weight.split([feature.shape[1] for feature in features], dim=1)
        coarser = None
        for feature, weight in zip(features[1:], weights, strict=True):
            each = resize(project(feature, weight), size)
            coarser = each if coarser is None else coarser + each
        norm = self.norm
        x = linear_norm(features[0], own, self.linear.bias, norm.weight, norm.bias, addend=coarser)
        return x.contiguous()  # the mixers sample maps channel by channel


class PatchEmbed(nn.Module):
    """A 4×4 convolution of stride 4 and a LayerNorm; bottom and right are zero-padded to a multiple of 4.

    It takes the maps upsampled and concatenated: a patch weighs its sixteen pixels differently, so projecting
    a map at its own resolution would take sixteen projections, and spare operations at 1/32 only.

    Args:
        in_channels: channels of the maps.
        dim: channels C of the result.
    """

    def __init__(self, in_channels: Sequence[int], dim: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(sum(in_channels), dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Maps (B, in_channels[i], H_i, W_i) → (B, C, ⌈H_0/4⌉, ⌈W_0/4⌉)."""
        # Concatenated they take eight times the memory.
        x = checkpointed(self._project, *features, parameters=list(self.projection.parameters()))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()

    def _project(self, *features: Tensor) -> Tensor:
        x = concatenate(features)
        return self.projection(functional.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)))


class Prediction(nn.Module):
    """One task's prediction from its decoded map.

    Args:
        dim: channels of the map.
        hidden: channels in between, an eighth of the concatenated features'.
        out_channels: channels of the task.
    """

    def __init__(self, dim: int, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, hidden, 3, padding=1, bias=False)
        self.norm = BatchNorm2d(hidden)
        self.logits = nn.Conv2d(hidden, out_channels, 1)
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.zeros_(self.logits.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) → (B, out_channels, H, W)."""
        return self.logits(functional.relu(self.norm(self.conv(x))))


def project(feature: Tensor, weight: Tensor) -> Tensor:
    """(B, in_channels, H, W) times (C, in_channels) at every pixel → (B, C, H, W).

    A product, not a convolution: PyTorch lets cuDNN run the latter in TF32.
    """
    projected = torch.bmm(weight.expand(len(feature), -1, -1), feature.flatten(2))
    return projected.unflatten(2, feature.shape[2:])


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resampling without aligned corners, the only one of the model."""
    return functional.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def concatenate(features: Sequence[Tensor]) -> Tensor:
    """The maps at the size of the first, one behind the other: (B, Σ channels, H, W)."""
    size = features[0].shape[2:]
    return torch.cat([features[0], *(resize(feature, size) for feature in features[1:])], dim=1)


def check_arguments(tasks: Mapping[str, int], attention: str, depth: int, dim: int, heads: int) -> None:
    """Raise ``ValueError`` for what no head can be built from."""
    if attention not in ATTENTIONS:
        known = ", ".join(repr(name) for name in ATTENTIONS)
        raise ValueError(f"attention: expected one of {known}, got {attention!r}")
    if not 1 <= len(tasks) <= MAX_TASKS:
        raise ValueError(f"tasks: expected 1 to {MAX_TASKS} tasks, got {len(tasks)}")
    for task, channels in tasks.items():
        if not task or "." in task or hasattr(nn.ModuleDict, task):
            raise ValueError(f"tasks: expected names that can name a module, got {task!r}")
        if channels < 1:
            raise ValueError(f"tasks[{task!r}]: expected at least 1 channel, got {channels}")
    for name, value in {"depth": depth, "dim": dim, "heads": heads}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if dim % heads:
        raise ValueError(f"heads: expected a divisor of dim = {dim}, got {heads}")
