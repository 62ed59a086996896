"""What attention over all tokens keeps for its backward pass, and what it takes at most."""

from __future__ import annotations

from typing import Any

import torch
from allocations import Allocations
from contract import draw
from launches import recorded_launches
from torch import Tensor

from degmix_kernels import gated_attention, linear_attention


def saved_bytes(function: Any, *inputs: Tensor | None) -> int:
    """Bytes that a call saves for its backward pass, each storage once."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*inputs)
    assert output.requires_grad
    return sum(storages.values())


def test_saved_bytes(device):
    queries, keys = 2 * 3 * 9 * 8, 2 * 3 * 11 * 8  # elements
    query, gate, residual = (
        draw(2, 3, 9, 8, seed=s).bfloat16().to(device).requires_grad_() for s in (0, 3, 4)
    )
    key, value = (draw(2, 3, 11, 8, seed=s).bfloat16().to(device).requires_grad_() for s in (1, 2))
    log_sum = 2 * 3 * 9 * 4
    # Queries and result; keys and values.
    assert saved_bytes(gated_attention, query, key, value) == 2 * (2 * queries + 2 * keys) + log_sum
    # Attended values instead of the result, and the gate.
    call = (query, key, value, gate, residual)
    assert saved_bytes(gated_attention, *call) == 2 * (3 * queries + 2 * keys) + log_sum
    # The gradient of the residual reads nothing.
    nothing = (query.detach(), key.detach(), value.detach(), gate.detach(), residual)
    assert saved_bytes(gated_attention, *nothing) == 0
    context = 2 * 3 * 8 * 8 * 4
    got = saved_bytes(lambda *args: linear_attention(*args, 1.0), query, key, value)
    assert got == 2 * (queries + 2 * keys) + context


def test_no_matrix_of_all_pairs(device):
    """Memory at 65 536 tokens: forward and backward take a few times the inputs, not 65 536² scores."""
    query, key, value, gate = (
        torch.empty(1, 65536, 2, 64, dtype=torch.bfloat16, device=device).transpose(1, 2).requires_grad_()
        for _ in range(4)
    )
    with recorded_launches(execute=False), Allocations(query, key, value, gate) as memory:
        output = gated_attention(query, key, value, gate)
        gradients = torch.autograd.grad(output, (query, key, value, gate), output.detach())
    assert len(gradients) == 4
    # Result, attended values and their gradient, four gradients; two vectors in fp32 of N · heads.
    most, _ = memory.peak()
    assert most <= 7 * query.nbytes + 2 * 2 * 65536 * 4
