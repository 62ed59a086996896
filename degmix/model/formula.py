"""The head as the paper writes it, operation by operation, in plain PyTorch and one operator of torchvision.

:class:`degmix.DeGMixHead` computes the same function of the same parameters with fewer operations. This one
is what the head is tested against, counted against by ``degmix info`` and benchmarked against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from degmix.model.mixer import MixerLayer, Offsets
from degmix_kernels import GatedMLP, LinearAttention, TaskAttention, use_backend

if TYPE_CHECKING:
    from degmix.model.decoder import TaskQuery
    from degmix.model.degmix import DeGMixHead

# Up to so many keys attention is written out: the pixels are on the batch axis then, which PyTorch's fused
# kernels, made for many keys, put on an axis of the grid that ends at 65 535.
FEW_KEYS = 8


def formula(head: DeGMixHead, features: Sequence[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """Predict every task, as ``head(features, size)`` does, with the head's parameters and statistics.

    In training the running statistics move as they do there. Arguments are not checked.

    Args:
        head: whose parameters, statistics, attention and training mode are used.
        features: the backbone's maps, (B, in_channels[i], H_i, W_i), the largest first.
        size: (height, width) of the predictions.

    Returns:
        Task name → (B, channels, height, width).
    """
    x = embed(head, features)
    return predict(head, decode(head, mix(head, x)), size)


def embed(head: DeGMixHead, features: Sequence[Tensor]) -> Tensor:
    """The maps upsampled to the first one's size, concatenated, projected, normalised → (B, C, H, W)."""
    size = features[0].shape[2:]
    x = torch.cat([features[0], *(resize(feature, size) for feature in features[1:])], dim=1)
    if head.attention == "linear":  # patches of 4×4, zeros below and to the right
        x = functional.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        projection = head.embed.projection
        tokens = functional.conv2d(x, projection.weight, projection.bias, stride=4).permute(0, 2, 3, 1)
    else:
        tokens = linear(head.embed.linear, x.permute(0, 2, 3, 1))
    return layer_norm(head.embed.norm, tokens).permute(0, 3, 1, 2).contiguous()


def mix(head: DeGMixHead, x: Tensor) -> list[Tensor]:
    """Every task's deformable mixer, each (B, C, H, W)."""
    maps = []
    for mixer in head.mixers.values():
        mixed = x
        for layer in mixer:
            mixed = mixer_layer(layer, mixed)
        maps.append(mixed)
    return maps


def mixer_layer(layer: MixerLayer, x: Tensor) -> Tensor:
    """Channel-aware mixing, then the spatial-aware deformable operator."""
    mixed = functional.conv2d(x, layer.channel_mix.weight, layer.channel_mix.bias)
    x = batch_norm(layer.channel_mix.norm, functional.gelu(mixed))
    sampled = deform_conv2d(x, offsets(layer.offsets, x), layer.deform_mix.weight, layer.deform_mix.bias)
    return x + batch_norm(layer.norm, functional.gelu(sampled))


def offsets(layer: Offsets, x: Tensor) -> Tensor:
    """Learned positions plus the window's coordinates, convolved; never in half precision."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        positions = functional.conv2d(x, layer.p_conv.weight, layer.p_conv.bias, padding=1)
        positions = positions + window_grid(*x.shape[2:], like=x)
        return functional.conv2d(positions, layer.opt.weight, layer.opt.bias, padding=1, groups=2)


def window_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Coordinates of the 3×3 window around each pixel, 1-based: nine rows, then nine columns.

    Returns:
        (1, 18, height, width), with device and dtype of ``like``.
    """
    rows, columns = window_coordinates(height, width, like)
    grids = (rows[:, :, None].expand(-1, -1, width), columns[:, None, :].expand(-1, height, -1))
    return torch.cat(grids)[None]


def window_coordinates(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """1-based coordinates of the 3×3 window around each pixel.

    Returns:
        (9, height) rows and (9, width) columns, with device and dtype of ``like``.
    """
    options = {"device": like.device, "dtype": like.dtype}
    step = torch.arange(-1, 2, **options)
    rows = torch.arange(1, height + 1, **options) + step.repeat_interleave(3)[:, None]
    columns = torch.arange(1, width + 1, **options) + step.repeat(3)[:, None]
    return rows, columns


def deform_conv2d(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torchvision's operator; where it is missing, the reference of ours, which is written out too."""
    try:
        from torchvision.ops import deform_conv2d as torchvision_deform_conv2d
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision of another torch build
        from degmix_kernels import deform_conv2d as our_deform_conv2d

        with use_backend("reference"):
            return our_deform_conv2d(x, offset, weight, bias)
    return torchvision_deform_conv2d(x, offset, weight, bias)


def decode(head: DeGMixHead, maps: Sequence[Tensor]) -> list[Tensor]:
    """The tasks' maps → the tasks' decoded maps, each (B, C, H, W): interaction, queries, gate."""
    decoder = head.decoder
    # permute: the gradient of flatten(2).transpose(1, 2) is one that PyTorch's CPU BatchNorm gets wrong.
    tokens = torch.stack([each.permute(0, 2, 3, 1).flatten(1, 2) for each in maps], dim=1)  # (B, T, N, C)
    fused = layer_norm(decoder.interaction.norm, linear(decoder.interaction.linear, interact(head, tokens)))
    decoded = []
    for query, own in zip(decoder.queries.values(), tokens.unbind(1), strict=True):
        answer = linear(query.linear, ask(head, query, own, fused))
        answer = gate(decoder.gate, own + layer_norm(query.norm, answer))
        decoded.append(answer.transpose(1, 2).unflatten(2, maps[0].shape[2:]).contiguous())
    return decoded


def interact(head: DeGMixHead, tokens: Tensor) -> Tensor:
    """Self-attention over the tasks at each pixel, over all tokens, or of every token to itself alone."""
    attention, shape = head.decoder.interaction.attention, tokens.shape
    if head.attention == "pixel":
        context = tokens.transpose(1, 2).flatten(0, 1)  # (B·N, T, C)
        attended = multihead_attention(attention, context, context)
        return attended.unflatten(0, (shape[0], shape[2])).transpose(1, 2)
    context = tokens.flatten(1, 2) if head.attention == "global" else tokens.flatten(0, 2)[:, None]
    return multihead_attention(attention, context, context).view(shape)


def ask(head: DeGMixHead, query: TaskQuery, own: Tensor, fused: Tensor) -> Tensor:
    """One task's (B, N, C) attend to all tasks' (B, T, N, C), at their pixel or everywhere → (B, N, C)."""
    if head.attention in ("linear", "global"):
        attend = linear_attention if head.attention == "linear" else multihead_attention
        return attend(query.attention, own, fused.flatten(1, 2))
    context = fused.transpose(1, 2).flatten(0, 1)  # (B·N, T, C)
    return multihead_attention(query.attention, own.flatten(0, 1)[:, None], context).view(own.shape)


def multihead_attention(module: TaskAttention, query: Tensor, context: Tensor) -> Tensor:
    """Softmax attention of (B, N, C) to (B, M, C), as ``nn.MultiheadAttention`` computes it."""
    projections = zip(module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True)
    q, k, v = (
        functional.linear(x, weight, bias).unflatten(2, (module.heads, -1)).transpose(1, 2)
        for x, (weight, bias) in zip((query, context, context), projections, strict=True)
    )
    if context.shape[1] > FEW_KEYS:
        attended = functional.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C/heads)
    else:
        attended = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    return linear(module.out_proj, attended.transpose(1, 2).flatten(2))


def linear_attention(module: LinearAttention, query: Tensor, context: Tensor) -> Tensor:
    """``Q (Kᵀ V) / √(C/heads)`` of (B, N, C) and (B, M, C)."""
    layers = ((module.norm_q, module.to_q), (module.norm_k, module.to_k), (module.norm_v, module.to_v))
    q, k, v = (
        linear(projection, layer_norm(norm, x)).unflatten(2, (module.heads, -1)).transpose(1, 2)
        for x, (norm, projection) in zip((query, context, context), layers, strict=True)
    )
    attended = q @ (k.transpose(-2, -1) @ v) * module.scale
    return linear(module.proj, attended.transpose(1, 2).flatten(2))


def gate(module: GatedMLP, x: Tensor) -> Tensor:
    """(B, N, C) → (B, N, C), through the gate that all tasks share."""
    u, v = functional.gelu(linear(module.fc1, layer_norm(module.norm, x))).chunk(2, dim=-1)
    gated = u * functional.linear(layer_norm(module.gate.norm, v), module.gate.weight, module.gate.bias)
    return x + linear(module.fc2, gated)


def predict(head: DeGMixHead, decoded: Sequence[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """Every task's prediction from its decoded map."""
    predictions = {}
    for (task, layers), x in zip(head.predictions.items(), decoded, strict=True):
        x = functional.relu(batch_norm(layers.norm, functional.conv2d(x, layers.conv.weight, padding=1)))
        predictions[task] = resize(functional.conv2d(x, layers.logits.weight, layers.logits.bias), size)
    return predictions


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A Linear's formula."""
    return functional.linear(x, layer.weight, layer.bias)


def layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """A LayerNorm's formula."""
    return functional.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def batch_norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """PyTorch's BatchNorm, running statistics included, whatever the layer's class makes of it."""
    return nn.BatchNorm2d.forward(layer, x)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resampling without aligned corners."""
    return functional.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
