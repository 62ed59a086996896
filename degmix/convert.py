"""Weights of the published DeGMix (first called DeMTG) under this package's names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

# Published name → ours; {t} is a task's index and becomes its name, {d} is a mixer's layer.
_MIXER = "defor_mixers.{t}.blocks.{d}."
_SHARED = {
    "linear1.0": "embed.linear",
    "linear1.1": "embed.norm",
    "patch_embed.projection": "embed.projection",
    "patch_embed.norm": "embed.norm",
    "task_fusion": "decoder.interaction.attention",
    "smlp.0": "decoder.interaction.linear",
    "smlp.1": "decoder.interaction.norm",
    "gmlps.gating.0.fn.ln1_0": "decoder.gate.norm",
    "gmlps.gating.0.fn.fc1_0": "decoder.gate.fc1",
    "gmlps.gating.0.fn.fc2_0": "decoder.gate.fc2",
    "gmlps.gating.0.fn.sgu_0.ln": "decoder.gate.gate.norm",
    "gmlps.gating.0.fn.sgu_0.proj": "decoder.gate.gate",
}
_PER_TASK = {
    _MIXER + "0": "mixers.{t}.{d}.channel_mix",
    _MIXER + "2": "mixers.{t}.{d}.channel_mix.norm",
    _MIXER + "3.fn.0.get_offset.p_conv": "mixers.{t}.{d}.offsets.p_conv",
    _MIXER + "3.fn.0.get_offset.opt": "mixers.{t}.{d}.offsets.opt",
    _MIXER + "3.fn.0": "mixers.{t}.{d}.deform_mix",
    _MIXER + "3.fn.2": "mixers.{t}.{d}.norm",
    "task_querys.{t}": "decoder.queries.{t}.attention",
    "smlp2.{t}.0": "decoder.queries.{t}.linear",
    "smlp2.{t}.1": "decoder.queries.{t}.norm",
}
_PREDICTION = {"bottleneck.{t}.conv": "conv", "bottleneck.{t}.bn": "norm", "final_logits.{t}": "logits"}
# What may follow a module's name.
_LEAVES = (
    r"weight|bias|running_mean|running_var|num_batches_tracked|in_proj_weight|in_proj_bias"
    r"|(?:out_proj|proj|norm_[qkv])\.(?:weight|bias)|to_[qkv]\.weight"
)
_UNUSED_BUFFER = re.compile(r"defor_mixers\.\d+\.blocks\.\d+\.3\.fn\.0\.offset")


def convert_state_dict(
    state_dict: Mapping[str, Any], tasks: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Rename a published head's or full model's weights to those of ``DeGMixHead`` or ``DeGMix``.

    A full model's names start with ``head.`` and ``backbone.``; the result is for ``DeGMix`` then, else for
    ``DeGMixHead``. Every parameter is kept, those without effect on the output too (query and key of the
    interaction block). Dropped are the mixers' unused ``offset`` buffers and, in a head of the variant
    ``"linear"``, the unused ``linear1``. The variant shows in the names: with ``patch_embed`` it is
    ``"linear"``, else ``"released"`` (which loads into ``"pixel"`` and ``"global"`` as well).

    Not knowable from names: how the published backbone calls its tensors. Backbone tensors under timm's
    original names become those of features_only (``layers.0.`` → ``layers_0.``, as in a timm Swin here);
    all others pass through unchanged, so a checkpoint of a backbone from another library is for its owner to
    rename. Where timm's and another library's Swin share a name but not the order inside a tensor (the patch
    merging of mmseg), names cannot show it either.

    Args:
        state_dict: name → tensor, or a checkpoint that has this under ``"state_dict"`` (Lightning's).
        tasks: names of the tasks in the order of the published model's numbered modules; by default the
            order in which its ``bottleneck`` entries come, which is the same.

    Returns:
        Name → tensor, the very tensors given but for the gate's weight, reshaped from (C, C, 1) to (C, C).

    Raises:
        ValueError: for names unknown here, for a task index without a task, or if there is no head at all.
    """
    if isinstance(state_dict.get("state_dict"), Mapping):
        state_dict = state_dict["state_dict"]
    full = any(name.startswith("head.") for name in state_dict)
    prefix = "head." if full else ""
    backbone = {name: value for name, value in state_dict.items() if full and name.startswith("backbone.")}
    head = {name: value for name, value in state_dict.items() if name not in backbone}
    if tasks is None:
        found = (re.fullmatch(re.escape(prefix) + r"bottleneck\.([^.]+)\..+", name) for name in head)
        tasks = list(dict.fromkeys(match[1] for match in found if match))
    if not tasks:
        raise ValueError("state_dict: expected a published DeGMix head (bottleneck.<task>.…), got none")
    linear = any(name.startswith(prefix + "patch_embed.") for name in head)

    renamed, unknown = {_backbone_name(name): value for name, value in backbone.items()}, []
    for name, value in head.items():
        inner = name.removeprefix(prefix)
        if _UNUSED_BUFFER.fullmatch(inner) or (linear and inner.startswith("linear1.")):
            continue
        ours = _head_name(inner, tasks) if name.startswith(prefix) else None
        if ours is None:
            unknown.append(name)
            continue
        if ours == "decoder.gate.gate.weight" and value.dim() == 3:
            value = value.squeeze(2)
        renamed[prefix + ours] = value
    if unknown:
        listed = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise ValueError(
            f"state_dict: expected the names of a published DeGMix with tasks {', '.join(tasks)}, "
            f"got {len(unknown)} unknown: {listed}"
        )
    return renamed


def _head_name(name: str, tasks: Sequence[str]) -> str | None:
    """Our name of a published head's tensor, None if it has none."""
    for published, ours in _SHARED.items():
        match = re.fullmatch(rf"{re.escape(published)}\.({_LEAVES})", name)
        if match:
            return f"{ours}.{match[1]}"
    for published, ours in _PER_TASK.items():
        pattern = re.escape(published).replace(r"\{t\}", r"(?P<t>\d+)").replace(r"\{d\}", r"(?P<d>\d+)")
        match = re.fullmatch(rf"{pattern}\.(?P<leaf>{_LEAVES})", name)
        if match and int(match["t"]) < len(tasks):
            return f"{ours.format(t=tasks[int(match['t'])], d=match.groupdict().get('d'))}.{match['leaf']}"
    for published, ours in _PREDICTION.items():
        for task in tasks:
            match = re.fullmatch(rf"{re.escape(published.format(t=task))}\.({_LEAVES})", name)
            if match:
                return f"predictions.{task}.{ours}.{match[1]}"
    return None


def _backbone_name(name: str) -> str:
    """``backbone.layers.0.…`` → ``backbone.model.layers_0.…``; names that are ours already stay."""
    inner = name.removeprefix("backbone.").removeprefix("model.")
    return "backbone.model." + re.sub(r"^(layers|stages)\.(\d+)\.", r"\1_\2.", inner)
