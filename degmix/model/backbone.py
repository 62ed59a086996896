"""Backbones: the built-in tiny one, and every timm model that gives a pyramid or is a plain ViT."""

from __future__ import annotations

import difflib
import pickle
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional

from degmix.model.tiny import TinyBackbone

STRIDES = (4, 8, 16, 32)
# Family (module of timm.models) → what features_only needs for maps of any size and of the published planes.
OPTIONS = {
    "swin_transformer": {"strict_img_size": False},
    "swin_transformer_v2": {"strict_img_size": False},
    "hrnet": {"feature_location": ""},
    "vision_transformer": {"dynamic_img_size": True},
    "deit": {"dynamic_img_size": True},
    "eva": {"dynamic_img_size": True},
}
# Buffers that older files carry and timm now computes itself.
COMPUTED_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask", "num_batches_tracked")


def create_backbone(name: str, pretrained: bool = False, weights: str | Path | None = None) -> nn.Module:
    """A backbone by name.

    Its forward turns an image (B, 3, H, W) of any size into maps for :class:`degmix.DeGMixHead`, their
    channel counts are in ``channels``: four maps at ⌈size/4⌉, ⌈size/8⌉, ⌈size/16⌉, ⌈size/32⌉; a ViT's one
    fused map at ⌈size/4⌉.

    Args:
        name: ``"tiny"``, or a timm model such as ``"swin_tiny_patch4_window7_224"``, ``"hrnet_w48"``,
            ``"vit_base_patch16_224"``; a pretrained tag after a dot is allowed.
        pretrained: whether timm downloads the model's weights.
        weights: a file (safetensors, or a checkpoint of tensors) with the model's weights under timm's names,
            for machines without a network; with it nothing is downloaded.

    Raises:
        ValueError: for an unknown name, a model that has no such maps, or weights that do not fit.
        FileNotFoundError: if there is no such file of weights.
        ImportError: if timm is needed and missing.
    """
    if pretrained and weights is not None:
        raise ValueError("weights: expected either pretrained=True or a file of weights, got both")
    if name == "tiny":
        if pretrained:
            raise ValueError(
                "pretrained: expected False for the backbone 'tiny', which has no weights, got True"
            )
        backbone = TinyBackbone()
        if weights is not None:
            load_weights(backbone, read_weights(weights), set(), f"backbone 'tiny' from {weights}")
        return backbone
    timm = import_timm()
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, ["tiny", *timm.list_models()], n=3)
        hint = f"; close matches: {', '.join(close)}" if close else ""
        raise ValueError(
            f"backbone: expected 'tiny' or a model of timm {timm.__version__}, got {name!r}{hint}"
        )
    model = build(timm, name, pretrained)
    if weights is not None:
        # features_only leaves out the classifier and what else comes after the last map.
        complete = timm.create_model(name, pretrained=False).state_dict()
        load_weights(model, read_weights(weights), set(complete), f"backbone {name!r} from {weights}")
    reductions = model.feature_info.reduction()
    if len(set(reductions)) == 1 and reductions[0] > STRIDES[0]:
        return ViT(model, reductions[0])
    if not set(STRIDES) <= set(reductions):
        raise ValueError(
            f"backbone {name!r}: expected maps at 1/4, 1/8, 1/16, 1/32, got reductions {reductions}"
        )
    return Pyramid(model)


def build(timm: ModuleType, name: str, pretrained: bool) -> nn.Module:
    """The timm model with ``features_only``; ``ValueError`` in one sentence if it cannot be had."""
    architecture = name.partition(".")[0]
    family = timm.models.model_entrypoint(architecture).__module__.rpartition(".")[2]
    try:
        return timm.create_model(name, pretrained=pretrained, features_only=True, **OPTIONS.get(family, {}))
    except OSError as error:  # of the hub, when there is no network
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"backbone {name!r}: its pretrained weights cannot be downloaded ({reason}); "
            "a file of them can be given as weights"
        ) from error
    except (TypeError, RuntimeError, AssertionError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"backbone {name!r}: timm cannot give its feature maps ({error})") from error


class Pyramid(nn.Module):
    """A timm ``features_only`` model with maps at 1/4, 1/8, 1/16 and 1/32 of an image of any size.

    Args:
        model: the timm model; its last map of each reduction is used.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        reductions, channels = model.feature_info.reduction(), model.feature_info.channels()
        # HRNet has two maps at 1/2 or 1/4 besides: of equals, the later one.
        self.chosen = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]
        self.channels = tuple(channels[index] for index in self.chosen)
        layout = getattr(model, "output_fmt", "NCHW")  # HRNet does not say
        self.channels_first = getattr(layout, "value", layout) == "NCHW"

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) → (B, channels[i], ⌈H/s⌉, ⌈W/s⌉) for s = 4, 8, 16, 32."""
        features = extract(self.model, pad(image, STRIDES[-1]))
        chosen = [features[index] for index in self.chosen]
        if not self.channels_first:
            chosen = [each.permute(0, 3, 1, 2).contiguous() for each in chosen]
        return [crop(each, image, stride) for each, stride in zip(chosen, STRIDES, strict=True)]


class ViT(nn.Module):
    """A plain ViT, made into one map at 1/4.

    Four levels (blocks 2, 5, 8 and 11 of 12; every sixth of 24): each gets its own 3×3 convolution to 128
    channels and bilinear upsampling to 1/4; a 1×1 convolution fuses the four to 256 channels.
    Convolutions keep PyTorch's default initialisation.

    Args:
        model: timm's ``features_only`` ViT.
        patch: size of its patches, the reduction of its maps; a multiple of 4.

    Raises:
        ValueError: for other patches, or a model without a list of at least four blocks.
    """

    channels = (256,)

    def __init__(self, model: nn.Module, patch: int) -> None:
        super().__init__()
        blocks = getattr(getattr(model, "model", None), "blocks", ())
        if len(blocks) < 4 or patch % STRIDES[0]:
            got = f"{len(blocks)} blocks on patches of {patch}"
            raise ValueError(
                f"backbone: expected a ViT of 4 or more blocks on patches of 4·k pixels, got {got}"
            )
        self.patch = patch
        self.model = model
        self.model.out_indices = [len(blocks) * level // 4 - 1 for level in (1, 2, 3, 4)]
        width = model.feature_info.channels()[-1]
        self.levels = nn.ModuleList(nn.Conv2d(width, 128, 3, padding=1) for _ in range(4))
        self.fusion = nn.Conv2d(4 * 128, self.channels[0], 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) → [(B, 256, ⌈H/4⌉, ⌈W/4⌉)]."""
        features = extract(self.model, pad(image, self.patch))
        scale = self.patch // STRIDES[0]
        levels = [
            functional.interpolate(conv(each), scale_factor=scale, mode="bilinear", align_corners=False)
            for conv, each in zip(self.levels, features, strict=True)
        ]
        return [crop(self.fusion(torch.cat(levels, dim=1)), image, STRIDES[0])]


def extract(model: nn.Module, image: Tensor) -> list[Tensor]:
    """The model's maps; ``ValueError`` if it was made for one image size only."""
    try:
        return model(image)
    except AssertionError as error:  # how timm refuses a size
        size = "×".join(str(side) for side in image.shape[2:])
        raise ValueError(f"image: expected a size that the backbone takes, got {size} ({error})") from error


def pad(image: Tensor, divisor: int) -> Tensor:
    """Zeros at the bottom and the right, up to multiples of the divisor."""
    return functional.pad(image, (0, -image.shape[3] % divisor, 0, -image.shape[2] % divisor))


def crop(feature: Tensor, image: Tensor, stride: int) -> Tensor:
    """The part of a map that belongs to the image before it was padded, ⌈size/stride⌉."""
    height, width = (-(-size // stride) for size in image.shape[2:])
    return feature[:, :, :height, :width]


def import_timm() -> ModuleType:
    """timm, or an ``ImportError`` that says how to get it."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch build
        raise ImportError(
            f"backbones other than 'tiny' need timm: pip install 'degmix[train]' ({error})"
        ) from error
    return timm


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file, or from one of ``torch.save`` that holds tensors only.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is neither; nothing in it is ever run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: expected a file, got {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights: expected a safetensors file, got {path} ({error})") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"weights: expected a checkpoint of tensors only, got {path}; nothing of it was run"
        ) from error
    for nested in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(nested), dict):
            loaded = loaded[nested]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"weights: expected names and tensors, got something else in {path}")
    return loaded


def load_weights(model: nn.Module, state: dict[str, Tensor], ignorable: set[str], what: str) -> None:
    """Load by name, all or nothing.

    timm's features_only renames ``layers.0.x`` to ``layers_0.x`` or puts ``model.`` in front: both match.

    Args:
        model: receives the weights.
        state: name → tensor.
        ignorable: names that may be in ``state`` without being in the model.
        what: model and file, for the message.

    Raises:
        ValueError: naming missing, unexpected or wrongly shaped tensors.
    """
    targets = {canonical(name): name for name in model.state_dict()}
    ignorable_names = {canonical(name) for name in ignorable}
    found, unexpected = {}, []
    for name, tensor in state.items():
        if canonical(name) in targets:
            found[targets[canonical(name)]] = tensor
        elif canonical(name) not in ignorable_names and not name.endswith(COMPUTED_BUFFERS):
            unexpected.append(name)
    own = model.state_dict()
    missing = [name for name in own if name not in found and not name.endswith(COMPUTED_BUFFERS)]
    misshaped = [name for name, tensor in found.items() if tensor.shape != own[name].shape]
    for problem, names in {"missing": missing, "unexpected": unexpected, "wrongly shaped": misshaped}.items():
        if names:
            listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            raise ValueError(
                f"weights: expected those of {what}, got {len(names)} {problem} tensors: {listed}"
            )
    model.load_state_dict(found, strict=False)


def canonical(name: str) -> str:
    """A tensor's name, the same with and without features_only."""
    return name.removeprefix("model.").replace(".", "_")
