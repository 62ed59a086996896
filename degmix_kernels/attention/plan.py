"""Launches of ``gated_attention``'s kernels: layouts, sizes, blocks. Plans touch no memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from degmix_kernels.attention import backward_kernels, kernels
from degmix_kernels.launch import Launch, needs_64_bit
from degmix_kernels.maps import ceil_div, power_of_two
from degmix_kernels.product import precision


def strides(**tensors: Tensor) -> tuple[dict[str, int], int]:
    """Strides of batch, head and token as kernels take them, and the unit they are in.

    The largest power of two up to 16 that divides them all: multiplied by it again, the compiler knows how
    wide it may load.
    """
    named: dict[str, int] = {}
    for name, tensor in tensors.items():
        named[f"{name}_stride_b"], named[f"{name}_stride_h"], named[f"{name}_stride_n"], _ = tensor.stride()
    unit = math.gcd(16, *named.values())
    return {name: stride // unit for name, stride in named.items()}, unit


@dataclass(frozen=True)
class Blocks:
    """How a kernel goes over the scores.

    Attributes:
        queries: of a tile.
        keys: of a tile.
        warps: of a program.
        stages: of the software pipeline.
    """

    queries: int
    keys: int
    warps: int
    stages: int

    def constants(self, tokens: Tensor) -> dict[str, Any]:
        """Compile-time arguments, of tokens (B, heads, N, D)."""
        return {
            "PRECISION": precision(tokens.dtype),
            "HEAD_DIM": tokens.shape[3],
            "BLOCK_QUERIES": self.queries,
            "BLOCK_KEYS": self.keys,
            "BLOCK_DIM": padded(tokens.shape[3]),
        }


def padded(head_dim: int) -> int:
    """Channels of a tile: a power of two that matrix units can take."""
    return power_of_two(head_dim, 16)


# Large tiles of 128 channels that spill no register on any GPU of the compile check: small in fp32, whose
# products keep their operands in registers. In half precision the rows that stay are many, so that what is
# read for them over and over is little.


def forward_blocks(tokens: Tensor) -> Blocks:
    """Tiles of the forward kernel."""
    return Blocks(32, 32, 8, 1) if tokens.dtype == torch.float32 else Blocks(128, 32, 8, 3)


def query_blocks(tokens: Tensor, wide: bool) -> Blocks:
    """Tiles of the gradient of the queries; ``wide`` addresses of 64 bits take more registers."""
    if tokens.dtype == torch.float32:
        return Blocks(32, 16, 4, 1)
    return Blocks(64, 32, 4, 2) if wide else Blocks(128, 32, 8, 2)


def context_blocks(tokens: Tensor) -> Blocks:
    """Tiles of the gradients of keys and values."""
    wide = padded(tokens.shape[3]) > 64
    if tokens.dtype == torch.float32:
        return Blocks(16, 16, 4, 1) if wide else Blocks(32, 16, 4, 1)
    # With 32 queries, AMD's compiler is out of registers where all sizes are multiples of 16.
    return Blocks(16 if wide and torch.version.hip else 32, 64, 4 if wide else 8, 2)


def scales(head_dim: int) -> dict[str, float]:
    """1 / √D, and the same for scores to the base 2."""
    return {"scale": head_dim**-0.5, "score_scale": math.log2(math.e) * head_dim**-0.5}


def _launch(
    kernel: Any,
    blocks: Blocks,
    tensors: dict[str, Tensor],
    arguments: dict[str, Any],
    by_keys: bool = False,
    registers: int | None = None,
) -> Launch:
    """A kernel whose programs each own a block of queries, or of keys, and go over all of the other.

    Args:
        kernel: the kernel.
        blocks: its tiles.
        tensors: all that it takes strides of, by name; query and key among them.
        arguments: all that is its own.
        by_keys: whether programs own keys.
        registers: at most so many on Hopper, if addresses have 32 bits.
    """
    batch, heads, queries, _ = tensors["query"].shape
    keys = tensors["key"].shape[2]
    steps, unit = strides(**tensors)
    sides = ((queries, blocks.queries), (keys, blocks.keys))
    (own, block), (other, other_block) = reversed(sides) if by_keys else sides
    count = ceil_div(own, block)
    large = needs_64_bit(*tensors.values())
    return Launch(
        kernel,
        batch * heads * count,
        {
            **arguments,
            **steps,
            "heads": heads,
            "queries": queries,
            "keys": keys,
            "blocks": count,
            "whole": other // other_block * other_block,
        },
        {"UNIT": unit, "INDEX_64": large, **blocks.constants(tensors["query"])},
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        hopper_registers=None if large else registers,
    )


def plan_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    attended: Tensor | None,
    log_sum: Tensor | None,
) -> Launch:
    """The forward pass; gate, residual and attended are laid out as output, channels are contiguous."""
    head_dim = query.shape[3]
    # 136 registers with Triton 3.6: capped, 2.11 ms instead of 2.62 on an H100 (bf16, 14 980 tokens). A call
    # that saves nothing for a backward pass gains nothing.
    saves = log_sum is not None
    capped = query.dtype != torch.float32 and head_dim == 128 and saves and residual is None
    arguments = {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "gate_ptr": gate,
        "residual_ptr": residual,
        "output_ptr": output,
        "attended_ptr": attended,
        "log_sum_ptr": log_sum,
        "score_scale": scales(head_dim)["score_scale"],
    }
    tensors = {"query": query, "key": key, "value": value, "output": output}
    registers = 128 if capped else None
    return _launch(kernels.forward, forward_blocks(query), tensors, arguments, registers=registers)


def plan_prepare(
    grad: Tensor,
    gate: Tensor | None,
    attended: Tensor,
    grad_gate: Tensor | None,
    grad_attended: Tensor | None,
    delta: Tensor | None,
) -> Launch:
    """The pass over the gradient of the result; all but delta are laid out alike."""
    batch, heads, queries, head_dim = grad.shape
    block_dim = padded(head_dim)
    block = 4096 // block_dim
    steps, unit = strides(x=grad)
    query_blocks = ceil_div(queries, block)
    return Launch(
        backward_kernels.prepare,
        batch * heads * query_blocks,
        {
            "grad_ptr": grad,
            "gate_ptr": gate,
            "attended_ptr": attended,
            "grad_gate_ptr": grad_gate,
            "grad_attended_ptr": grad_attended,
            "delta_ptr": delta,
            **{name.removeprefix("x_"): step for name, step in steps.items()},
            "heads": heads,
            "queries": queries,
            "query_blocks": query_blocks,
        },
        {
            "UNIT": unit,
            "INDEX_64": needs_64_bit(grad),
            "HEAD_DIM": head_dim,
            "BLOCK_QUERIES": block,
            "BLOCK_DIM": block_dim,
        },
        num_warps=4,
    )


def plan_backward_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    grad_query: Tensor,
) -> Launch:
    """The gradient of the queries, laid out as that of the attended values, ``grad``."""
    arguments = {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "grad_ptr": grad,
        "log_sum_ptr": log_sum,
        "delta_ptr": delta,
        "grad_query_ptr": grad_query,
        **scales(query.shape[3]),
    }
    blocks = query_blocks(query, needs_64_bit(query, key, value, grad))
    tensors = {"query": query, "key": key, "value": value, "output": grad}
    return _launch(backward_kernels.backward_query, blocks, tensors, arguments)


def plan_backward_context(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    log_sum: Tensor,
    delta: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
) -> Launch:
    """The gradients of keys and values, laid out alike, each filled if given; delta only for the keys'."""
    arguments = {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "grad_ptr": grad,
        "log_sum_ptr": log_sum,
        "delta_ptr": delta,
        "grad_key_ptr": grad_key,
        "grad_value_ptr": grad_value,
        **scales(query.shape[3]),
    }
    context = grad_value if grad_key is None else grad_key
    tensors = {"query": query, "key": key, "value": value, "output": grad, "context": context}
    kernel = backward_kernels.backward_context
    return _launch(kernel, context_blocks(query), tensors, arguments, by_keys=True)
