"""What a model costs, counted without allocating it: parameters, multiply-adds, memory of training."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from degmix import build
from degmix.config import Config
from degmix.model import formula
from degmix_kernels.backend import use_backend

NOTE = (
    "MACs: one per multiply-add of convolutions, matrix products and attention (half of PyTorch's FLOPs); "
    "sampling, normalisation and activations are not counted. Formula: the same function computed as the "
    "paper writes it."
)


@dataclass(frozen=True)
class Cost:
    """The cost of a model for one image.

    Attributes:
        parts: (name, parameters, MACs of :mod:`degmix.model.formula`, MACs) of the backbone and the parts of
            the head.
        parameters, formula_macs, macs: of the whole model.
        weights_bytes: parameters and buffers.
        training_bytes: parameters, gradients and momentum, and the tensors that autograd saves between
            forward and backward for one image in float32. Workspaces and fragmentation come on top.
    """

    parts: list[tuple[str, int, int, int]]
    parameters: int
    formula_macs: int
    macs: int
    weights_bytes: int
    training_bytes: int


def measure(config: Config, size: tuple[int, int]) -> Cost:
    """Count the cost of a configuration's model at an input size.

    The model is built on the meta device and run on fake CPU tensors, which have shapes but no memory and
    take the same path as real ones.
    """
    with torch.device("meta"):
        model = build.build_model(config, load_weights=False)
    with FakeTensorMode(), use_backend("reference"):
        parameters = {name: torch.empty(p.shape, requires_grad=True) for name, p in model.named_parameters()}
        buffers = {name: torch.empty(b.shape, dtype=b.dtype) for name, b in model.named_buffers()}
        image = torch.empty(1, 3, *size)

        def forward() -> dict[str, Tensor]:
            return functional_call(model, (parameters, buffers), image)

        model.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward()
        written_out = _WrittenOut(model)
        tensors = {f"model.{name}": tensor for name, tensor in (parameters | buffers).items()}
        with torch.no_grad():
            functional_call(written_out, tensors, image)
        model.train()
        saved = saved_for_backward(forward, list(parameters.values()))
    flops = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    modules = {"backbone": model.backbone}
    modules |= {f"head.{name}": child for name, child in model.head.named_children()}
    # The counter names modules after the class of the model they are in.
    prefix = type(model).__name__
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return Cost(
        parts=[
            (name, _count(module), written_out.macs[name], _flops_of(flops, f"{prefix}.{name}", module) // 2)
            for name, module in modules.items()
        ],
        parameters=_count(model),
        formula_macs=sum(written_out.macs.values()),
        macs=flops["Global"] // 2,
        weights_bytes=weights,
        training_bytes=weights + 2 * 4 * _count(model) + saved,
    )


class _WrittenOut(nn.Module):
    """The model with its head as :mod:`degmix.model.formula` has it; counts the MACs of each part."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.macs: dict[str, int] = {}

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        backbone, head = self.model.backbone, self.model.head
        features = self._counted("backbone", backbone, image)
        x = self._counted("head.embed", formula.embed, head, features)
        maps = self._counted("head.mixers", formula.mix, head, x)
        decoded = self._counted("head.decoder", formula.decode, head, maps)
        return self._counted("head.predictions", formula.predict, head, decoded, tuple(image.shape[2:]))

    def _counted(self, name: str, function: Callable[..., object], *arguments: object) -> object:
        custom = {}
        if hasattr(torch.ops.torchvision, "deform_conv2d"):
            custom[torch.ops.torchvision.deform_conv2d] = _deform_conv2d_flops
        with FlopCounterMode(display=False, custom_mapping=custom) as counter:
            result = function(*arguments)
        self.macs[name] = counter.get_total_flops() // 2
        return result


def _deform_conv2d_flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *_: object,
    out_shape: Sequence[int],
    **__: object,
) -> int:
    """FLOPs of the product behind the samples."""
    return 2 * prod(out_shape) * prod(weight_shape[1:])


def cost_table(cost: Cost, title: str) -> Table:
    """A table for the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("GMACs, formula", justify="right")
    table.add_column("GMACs", justify="right")
    whole = ("whole model", cost.parameters, cost.formula_macs, cost.macs)
    for name, parameters, *macs in (*cost.parts, whole):
        if name == whole[0]:
            table.add_section()
        table.add_row(name, f"{parameters:,}", *(f"{count / 1e9:.2f}" for count in macs))
    return table


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _flops_of(flops: dict[str, int], name: str, module: nn.Module) -> int:
    """FLOPs of a module; containers that are indexed, not called, have their children's."""
    if name in flops:
        return flops[name]
    return sum(_flops_of(flops, f"{name}.{child}", inner) for child, inner in module.named_children())


def saved_for_backward(forward: Callable[[], object], parameters: Sequence[Tensor]) -> int:
    """Bytes of the distinct tensors that are kept for the backward pass, the parameters aside.

    These are what autograd saves, and whatever else outlives the forward pass but its results: what
    activation checkpointing computes from again, for example.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in parameters}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage  # held, so that no later storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _Storages() as made:
        results = forward()
    kept = {storage._cdata: storage for storage in made.alive()}
    for leaf in tree_leaves(results):
        if isinstance(leaf, Tensor):
            kept.pop(leaf.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in {**kept, **saved}.values())


class _Storages(TorchDispatchMode):
    """Knows which of the storages made inside still live."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[torch.UntypedStorage]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._made.append(weakref.ref(leaf.untyped_storage()))
        return result

    def alive(self) -> list[torch.UntypedStorage]:
        """The storages."""
        return [storage for reference in self._made if (storage := reference()) is not None]
