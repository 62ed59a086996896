"""What ops declare to cost, counted by hand for small calls."""

from __future__ import annotations

import pytest
import torch

from degmix_kernels.contract import Op, Work
from degmix_kernels.registry import OPS, find

HALF, SINGLE = 2, 4  # bytes of bf16 and fp32


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def test_deform_conv2d() -> None:
    op = find("deform_conv2d", "general")
    arguments = {
        "input": empty(2, 8, 5, 6),
        "offset": empty(2, 18, 4, 6, dtype=torch.float32),
        "weight": empty(10, 4, 3, 3),  # two groups
        "bias": empty(10),
        "mask": empty(2, 9, 4, 6),
        "padding": (0, 1),
    }
    given, weight = 2 * 8 * 30, 10 * 4 * 9
    offset, mask, result = 2 * 18 * 24, 2 * 9 * 24, 2 * 10 * 24
    flops = 2 * (2 * 24) * 10 * 4 * 9
    read = HALF * (given + weight + mask) + SINGLE * offset
    assert op.forward_work(arguments) == Work(read + HALF * (10 + result), flops)
    # Read: all but the bias, and the result's gradient; written: the gradients of all five.
    assert op.backward_work(arguments) == Work(2 * read + HALF * (result + 10), 2 * flops)


def test_deform_mix_reads_its_bias_again() -> None:
    op = find("deform_mix")
    arguments = {
        "x": empty(1, 3, 2, 2),
        "offset": empty(1, 6, 2, 2),
        "weight": empty(5, 3, 1, 1),
        "bias": empty(5),
    }
    read = HALF * (12 + 24 + 15 + 5)
    assert op.forward_work(arguments) == Work(read + HALF * 20, 2 * 4 * 15)
    assert op.backward_work(arguments) == Work(2 * read + HALF * 20, 4 * 4 * 15)


def test_batch_norm_has_no_product() -> None:
    op = find("batch_norm")
    vector = empty(3, dtype=torch.float32)
    x = empty(2, 3, 4, 5)
    arguments = {"x": x, "mean": vector, "variance": vector, "weight": vector, "bias": vector, "residual": x}
    assert op.forward_work(arguments) == Work(3 * HALF * 120 + 4 * SINGLE * 3, 0)
    # Read: gradient, x, three vectors; written: gradients of x and four vectors. The residual's is there.
    assert op.backward_work(arguments) == Work(3 * HALF * 120 + 7 * SINGLE * 3, 0)


def test_channel_mix() -> None:
    op = find("channel_mix")
    arguments = {"x": empty(2, 6, 5, 7), "weight": empty(4, 3, 1, 1), "bias": empty(4), "training": True}
    flops = 2 * 70 * 4 * 3
    assert op.forward_work(arguments) == Work(HALF * (420 + 12 + 4 + 280), flops)
    backward = Work(HALF * (280 + 2 * (420 + 12 + 4)), 2 * flops)
    assert op.backward_work(arguments) == backward
    assert op.backward_work(arguments | {"residual": empty(2, 4, 5, 7)}) == backward  # its gradient is there


def test_coordinate_bias_passes_its_gradient_on() -> None:
    op = find("coordinate_bias")
    x, tables = empty(2, 6, 5, 7), {"rows": empty(2, 2, 5, 3), "columns": empty(2, 1, 3, 7)}
    assert op.forward_work({"x": x, **tables}) == Work(HALF * (2 * 420 + 60 + 42), 0)
    assert op.backward_work({"x": x, **tables}) == Work(HALF * (420 + 60 + 42), 0)


def test_linear_norm() -> None:
    op = find("linear_norm")
    arguments = {
        "x": empty(2, 9, 10),
        "weight": empty(6, 10),
        "bias": None,
        "norm_weight": empty(6),
        "norm_bias": empty(6),
        "residual": empty(2, 9, 6),
    }
    flops = 2 * 18 * 6 * 10
    assert op.forward_work(arguments) == Work(HALF * (180 + 60 + 12 + 108 + 108), flops)
    read, written = 108 + 180 + 60 + 6, 180 + 60 + 12  # none for the residual
    assert op.backward_work(arguments) == Work(HALF * (read + written), 2 * flops)


def test_task_attention() -> None:
    op = find("task_attention")
    arguments = {"query": empty(2, 3, 7, 8), "key": empty(2, 4, 7, 8), "value": empty(2, 4, 7, 8), "heads": 2}
    flops = 2 * 2 * (2 * 7) * 3 * 4 * 8
    assert op.forward_work(arguments) == Work(HALF * (2 * 336 + 2 * 448), flops)
    assert op.backward_work(arguments) == Work(HALF * (336 + 2 * (336 + 2 * 448)), flops * 5 // 2)
    # Keys that are the values are read once.
    shared = op.forward_work(arguments | {"value": None})
    assert shared == Work(HALF * (2 * 336 + 448), flops)


@pytest.mark.parametrize(("mode", "side"), [("channel", 6), ("token", 5)])
def test_gating(mode: str, side: int) -> None:
    u = empty(3, 5, 6)
    unit = {"u": u, "v": u, "norm_weight": empty(6), "norm_bias": empty(6), "mode": mode}
    unit |= {"weight": empty(side, side), "bias": empty(side)}
    gate = 2 * 15 * 6 * side
    parameters = 12 + side * side + side
    op = find("spatial_gating_unit")
    assert op.forward_work(unit) == Work(HALF * (3 * 90 + parameters), gate)
    assert op.backward_work(unit) == Work(HALF * (5 * 90 + 2 * parameters), 2 * gate)

    mlp = {"x": empty(3, 5, 4), "norm_weight": empty(4), "norm_bias": empty(4), "mode": mode}
    mlp |= {
        "fc1_weight": empty(12, 4),
        "fc1_bias": empty(12),
        "fc2_weight": empty(4, 6),
        "fc2_bias": empty(4),
    }
    mlp |= {"gate_norm_weight": empty(6), "gate_norm_bias": empty(6)}
    mlp |= {"gate_weight": empty(side, side), "gate_bias": empty(side)}
    flops = gate + 2 * 15 * 4 * 12 + 2 * 15 * 6 * 4
    assert find("gated_mlp").forward_work(mlp).flops == flops
    assert find("gated_mlp").backward_work(mlp).flops == 2 * flops


def test_attention() -> None:
    query, key = empty(2, 3, 7, 4), empty(2, 3, 5, 4)
    arguments = {"query": query, "key": key, "value": key, "gate": query, "residual": query}
    softmax, linear = find("gated_attention"), find("linear_attention")
    flops = 2 * 2 * 6 * 7 * 5 * 4
    assert softmax.forward_work(arguments) == Work(HALF * (4 * 168 + 2 * 120), flops)
    # Read: gradient, query, gate, key, value; written: the gradients of these. The residual's is there.
    assert softmax.backward_work(arguments) == Work(HALF * (5 * 168 + 4 * 120), flops * 5 // 2)
    arguments = {"query": query, "key": key, "value": key, "scale": 0.5}
    flops = 2 * 6 * 5 * 16 + 2 * 6 * 7 * 16
    assert linear.forward_work(arguments) == Work(HALF * (2 * 168 + 2 * 120), flops)
    assert linear.backward_work(arguments).flops == 2 * flops


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.label)
def test_declared_shape_is_the_result(op: Op) -> None:
    for sample in op.samples(torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0)):
        assert op.output_shape(sample.arguments) == tuple(op.function(**sample.arguments).shape)
        assert set(op.backward_reads) - {"running_mean", "running_var"} <= set(op.differentiable)
