"""PyTorch's fused attention, one baseline for every backend it has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases.op import Baseline
from bench.harness.case import Unavailable

BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
REFUSALS = ("No available kernel", "No viable backend")  # in PyTorch's words, on a GPU and on a CPU


def sdpa_baselines(function: Callable[..., Tensor]) -> tuple[Baseline, ...]:
    """A function around ``scaled_dot_product_attention``, with each backend; those that refuse say so."""

    def load(backend: SDPBackend) -> Callable[[torch.device], Callable[..., Tensor]]:
        def forced(**arguments: Tensor) -> Tensor:
            try:
                with sdpa_kernel(backend):
                    return function(**arguments)
            except RuntimeError as error:
                if any(words in str(error) for words in REFUSALS):
                    raise Unavailable("this backend has no kernel for these shapes or this dtype") from error
                raise

        return lambda device: forced

    return tuple(Baseline(name, load(backend)) for name, backend in BACKENDS.items())
