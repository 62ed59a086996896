"""Launches of ``task_attention``'s kernels: rows, blocks, strides. Plans touch no memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import gcd
from typing import Any

from torch import Tensor

from degmix_kernels.launch import Launch, needs_64_bit
from degmix_kernels.maps import ceil_div, power_of_two
from degmix_kernels.task_attention import kernels

_WARPS, _MOST_WARPS = 4, 8
_LOAD = 16  # bytes per thread and tile: one load of 128 bits
_FORWARD_CHUNK, _BACKWARD_CHUNK = 4, 2  # queries whose loads are in flight together
# Most key tasks, with and without values, of which the backward pass keeps a load of 128 bits per thread in
# registers, next to as many sums in fp32; of more it keeps half as much each.
_BACKWARD_TASKS = {True: 5, False: 7}


@dataclass(frozen=True)
class Sizes:
    """A call as the kernels see it.

    Attributes:
        batch: B.
        query_tasks: S.
        tasks: T.
        pixels: N.
        heads: heads of the keys.
        sharing: heads of the query for each of the keys'.
        head_dim: D.
    """

    batch: int
    query_tasks: int
    tasks: int
    pixels: int
    heads: int
    sharing: int
    head_dim: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, heads: int) -> Sizes:
        """The sizes of a (B, S, N, heads·D) and a (B, T, N, heads·D or D)."""
        batch, query_tasks, pixels, channels = query.shape
        head_dim = channels // heads
        key_heads = key.shape[3] // head_dim
        return cls(batch, query_tasks, key.shape[1], pixels, key_heads, heads // key_heads, head_dim)

    def launch(
        self, kernel: Any, chunk: int, strided: dict[str, Tensor | None], **arguments: Tensor | float | None
    ) -> Launch:
        """A launch of either kernel.

        Args:
            kernel: one of them.
            chunk: most queries to take at a time.
            strided: argument name without ``_ptr`` → tensor whose strides the kernel is given.
            arguments: the others.
        """
        given = [tensor for tensor in strided.values() if tensor is not None]
        unit = reduce(gcd, (stride for tensor in given for stride in _strides(tensor)), self.head_dim)
        unit = gcd(unit, 16)
        block_channels = power_of_two(self.head_dim)
        # Where loads must be narrow there are fewer, for the registers that their addresses take.
        elements = min(_LOAD // given[0].element_size(), max(unit, 2))
        if kernel is kernels.backward and self.tasks > _BACKWARD_TASKS[strided["value"] is not None]:
            elements = max(elements // 2, 1)
        warps = min(max(_WARPS, block_channels // (32 * elements)), _MOST_WARPS)
        block_rows = max(32 * warps * elements // block_channels, 1)
        rows, queries = self.pixels * self.heads, self.query_tasks * self.sharing
        row_blocks = ceil_div(rows, block_rows)
        for name, tensor in strided.items():
            arguments[f"{name}_ptr"] = tensor
            strides = (0, 0, 0) if tensor is None else _strides(tensor)
            for axis, stride in zip(("batch", "task", "pixel"), strides, strict=True):
                arguments[f"{name}_stride_{axis}"] = stride // unit
        sizes = {
            "rows": rows,
            "row_blocks": row_blocks,
            "query_tasks": self.query_tasks,
            "queries": queries,
            "sharing": self.sharing,
        }
        others = [tensor for tensor in arguments.values() if isinstance(tensor, Tensor)]
        constants = {
            "UNIT": unit,
            "INDEX_64": needs_64_bit(*others),
            "TASKS": self.tasks,
            "HEADS": self.heads,
            "HEAD_DIM": self.head_dim,
            "CHUNK": ceil_div(queries, ceil_div(queries, chunk)),
            "BLOCK_ROWS": block_rows,
            "BLOCK_CHANNELS": block_channels,
        }
        return Launch(kernel, self.batch * row_blocks, arguments | sizes, constants, num_warps=warps)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of the first three axes; 0 for those of size 1, whose stride means nothing."""
    return tuple(
        stride if size > 1 else 0 for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    )


def plan_forward(
    query: Tensor, key: Tensor, value: Tensor | None, output: Tensor, heads: int, scale: float
) -> Launch:
    """The forward pass on tensors whose last axis is contiguous, the output's axes all."""
    return Sizes.of(query, key, heads).launch(
        kernels.forward,
        _FORWARD_CHUNK,
        {"query": query, "key": key, "value": value},
        output_ptr=output,
        scale=scale,
    )


def plan_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    heads: int,
    scale: float,
) -> Launch:
    """The backward pass: the gradients given are contiguous and are filled."""
    return Sizes.of(query, key, heads).launch(
        kernels.backward,
        _BACKWARD_CHUNK,
        {"grad": grad, "query": query, "key": key, "value": value},
        grad_query_ptr=grad_query,
        grad_key_ptr=grad_key,
        grad_value_ptr=grad_value,
        scale=scale,
    )
