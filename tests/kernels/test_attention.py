"""Attention over all tokens, with softmax and gate and without softmax, against sums written out."""

import math

import pytest
import torch
from torch import nn

from degmix_kernels import GatedAttention, LinearAttention, gated_attention, linear_attention, use_backend
from degmix_kernels.testing import assert_close


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax_formula(query, key, value, gate, residual):
    weights = torch.exp(torch.einsum("bhnd,bhmd->bhnm", query, key) / math.sqrt(query.shape[3]))
    attended = torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(3, keepdim=True), value)
    return attended * gate + residual


def linear_formula(query, key, value, scale):
    return torch.einsum("bhnm,bhmd->bhnd", torch.einsum("bhnd,bhmd->bhnm", query, key), value) * scale


def assert_same_gradients(got, want, inputs):
    probe = draw(*got.shape, seed=99)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, probe), torch.autograd.grad(want, inputs, probe), strict=True
    ):
        assert_close(ours, theirs, 100)


def test_gated_formula_and_gradients():
    shapes = ((2, 3, 7, 5), (2, 3, 9, 5), (2, 3, 9, 5), (2, 3, 7, 5), (2, 3, 7, 5))
    inputs = [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    got, want = gated_attention(*inputs), softmax_formula(*inputs)
    assert_close(got, want, 9)
    assert_same_gradients(got, want, inputs)
    assert_close(gated_attention(*inputs[:3]), softmax_formula(*inputs[:3], 1, 0), 9)


def test_linear_formula_and_gradients():
    inputs = [draw(2, 3, n, 5, seed=n).requires_grad_() for n in (7, 9)]
    inputs.append(draw(2, 3, 9, 5, seed=1).requires_grad_())
    got, want = linear_attention(*inputs, scale=0.3), linear_formula(*inputs, 0.3)
    assert_close(got, want, 45)
    assert_same_gradients(got, want, inputs)


def test_gated_module_is_multihead_attention():
    torch.manual_seed(0)
    module, plain = GatedAttention(6, 2).double(), nn.MultiheadAttention(6, 2, batch_first=True).double()
    plain.load_state_dict(module.state_dict())
    query, context = draw(2, 5, 6), draw(2, 9, 6, seed=1)
    assert_close(module(query, context), plain(query, context, context)[0], 9)
    nothing = module(query, context, gate=torch.zeros_like(query))
    assert_close(nothing, module.out_proj.bias.expand_as(nothing), 9)


def test_linear_module():
    torch.manual_seed(0)
    module = LinearAttention(6, 2).double()
    query, context = draw(2, 5, 6), draw(2, 9, 6, seed=1)

    def heads(x):
        return torch.stack([x[..., :3], x[..., 3:]], dim=1)

    q, k, v = module.norm_q(query), module.norm_k(context), module.norm_v(context)
    q, k, v = q @ module.to_q.weight.T, k @ module.to_k.weight.T, v @ module.to_v.weight.T
    attended = linear_formula(heads(q), heads(k), heads(v), 3**-0.5)
    want = torch.cat([attended[:, 0], attended[:, 1]], dim=2) @ module.proj.weight.T + module.proj.bias
    assert_close(module(query, context), want, 50)
    assert not any(name.startswith("to_") and name.endswith("bias") for name in module.state_dict())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 3, 4)}, ValueError, "query: expected 4 dimensions"),
        ({"key": torch.zeros(1, 2, 0, 4)}, ValueError, "key: expected at least one token"),
        ({"value": torch.zeros(1, 2, 6, 4)}, ValueError, r"value: expected shape \(1, 2, 5, 4\)"),
        ({"key": torch.zeros(1, 2, 5, 4).half()}, TypeError, "key: expected dtype torch.float32"),
        ({"gate": torch.zeros(1, 2, 5, 4)}, ValueError, r"gate: expected shape \(1, 2, 3, 4\)"),
        ({"residual": 1.0}, TypeError, "residual: expected a tensor, got float"),
    ],
)
def test_bad_input(change, error, message):
    tensors = {
        "query": torch.zeros(1, 2, 3, 4),
        "key": torch.zeros(1, 2, 5, 4),
        "value": torch.zeros(1, 2, 5, 4),
    }
    with pytest.raises(error, match=message):
        gated_attention(**(tensors | change))


def test_forcing_triton_says_that_there_is_no_kernel():
    x = torch.zeros(1, 2, 3, 4)
    with use_backend("triton"):
        with pytest.warns(UserWarning, match="gated_attention: this op has no Triton kernel yet"):
            gated_attention(x, x, x)
        with pytest.warns(UserWarning, match="linear_attention: this op has no Triton kernel yet"):
            linear_attention(x, x, x, 1.0)
