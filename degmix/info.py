"""What a model costs, counted without allocating it: parameters, multiply-adds, memory of training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from degmix import build
from degmix.config import Config
from degmix_kernels.backend import use_backend

NOTE = (
    "MACs: one per multiply-add of convolutions, matrix products and attention (half of PyTorch's FLOPs); "
    "sampling, normalisation and activations are not counted."
)


@dataclass(frozen=True)
class Cost:
    """The cost of a model for one image.

    Attributes:
        parts: (name, parameters, MACs) of the backbone and the parts of the head.
        parameters, macs: of the whole model.
        weights_bytes: parameters and buffers.
        training_bytes: parameters, gradients and momentum, and the tensors that autograd saves between
            forward and backward for one image in float32. Workspaces and fragmentation come on top.
    """

    parts: list[tuple[str, int, int]]
    parameters: int
    macs: int
    weights_bytes: int
    training_bytes: int


def measure(config: Config, size: tuple[int, int]) -> Cost:
    """Count the cost of a configuration's model at an input size.

    Fake CPU tensors (shapes on the meta device, no memory) take the same path through the model as real ones.
    """
    with FakeTensorMode(), use_backend("reference"):
        model = build.build_model(config, load_weights=False)
        image = torch.zeros(1, 3, *size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(image)
        saved = _saved_for_backward(lambda: model.train()(image), model)
    flops = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    parts = [("backbone", model.backbone)]
    parts += [(f"head.{name}", child) for name, child in model.head.named_children()]
    # The counter names modules after the class of the model they are in.
    prefix = type(model).__name__
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    parameters = _count(model)
    return Cost(
        parts=[
            (name, _count(module), _flops_of(flops, f"{prefix}.{name}", module) // 2)
            for name, module in parts
        ],
        parameters=parameters,
        macs=flops["Global"] // 2,
        weights_bytes=weights,
        training_bytes=weights + 2 * 4 * parameters + saved,
    )


def cost_table(cost: Cost, title: str) -> Table:
    """A table for the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("GMACs", justify="right")
    for name, parameters, macs in cost.parts:
        table.add_row(name, f"{parameters:,}", f"{macs / 1e9:.2f}")
    table.add_section()
    table.add_row("whole model", f"{cost.parameters:,}", f"{cost.macs / 1e9:.2f}")
    return table


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _flops_of(flops: dict[str, int], name: str, module: nn.Module) -> int:
    """FLOPs of a module; containers that are indexed, not called, have their children's."""
    if name in flops:
        return flops[name]
    return sum(_flops_of(flops, f"{name}.{child}", inner) for child, inner in module.named_children())


def _saved_for_backward(forward: Callable[[], Any], model: nn.Module) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass, weights aside."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage  # held, so that no later storage takes its place
        return tensor

    hooks: AbstractContextManager = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks:
        outputs = forward()
    del outputs
    return sum(storage.nbytes() for storage in storages.values())
