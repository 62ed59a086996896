"""The gating unit and the gated MLP against sums written out, in both modes."""

import pytest
import torch

from degmix_kernels import GatedMLP, SpatialGatingUnit, gated_mlp, spatial_gating_unit, use_backend
from degmix_kernels.testing import assert_close


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_norm(x, weight, bias):
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred / torch.sqrt((centred**2).sum(-1, keepdim=True) / x.shape[-1] + 1e-5) * weight + bias


def gate_formula(u, v, norm_weight, norm_bias, weight, bias, mode):
    normed = layer_norm(v, norm_weight, norm_bias)
    if mode == "channel":
        return u * (torch.einsum("oc,bnc->bno", weight, normed) + bias)
    return u * (torch.einsum("mn,bnc->bmc", weight, normed) + bias[None, :, None])


def assert_same_gradients(got, want, inputs):
    probe = draw(*got.shape, seed=99)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, probe), torch.autograd.grad(want, inputs, probe), strict=True
    ):
        assert_close(ours, theirs, 200)


@pytest.mark.parametrize("mode", ["channel", "token"])
def test_gate_formula_and_gradients(mode):
    size = 5 if mode == "channel" else 7
    shapes = ((2, 7, 5), (2, 7, 5), (5,), (5,), (size, size), (size,))
    inputs = [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    got, want = spatial_gating_unit(*inputs, mode), gate_formula(*inputs, mode)
    assert_close(got, want, 7)
    assert_same_gradients(got, want, inputs)


@pytest.mark.parametrize("mode", ["channel", "token"])
def test_mlp_formula_and_gradients(mode):
    size = 6 if mode == "channel" else 7
    shapes = ((2, 7, 5), (5,), (5,), (12, 5), (12,), (6,), (6,), (size, size), (size,), (5, 6), (5,))
    inputs = [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    x, norm_weight, norm_bias, fc1, bias1, *gate, fc2, bias2 = inputs
    hidden = torch.einsum("oc,bnc->bno", fc1, layer_norm(x, norm_weight, norm_bias)) + bias1
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    gated = gate_formula(hidden[..., :6], hidden[..., 6:], *gate, mode)
    want = x + torch.einsum("oc,bnc->bno", fc2, gated) + bias2
    got = gated_mlp(*inputs, mode)
    assert_close(got, want, 12)
    assert_same_gradients(got, want, inputs)


@pytest.mark.parametrize("mode", ["channel", "token"])
def test_gate_starts_as_a_pass_through(mode):
    u_v = draw(2, 7, 10).float()
    assert torch.equal(SpatialGatingUnit(5, mode, tokens=7)(u_v), u_v[..., :5])


@pytest.mark.parametrize("mode", ["channel", "token"])
def test_modules_call_the_functions(mode):
    module = GatedMLP(4, 6, mode, tokens=7).double()
    gate = module.gate
    for seed, parameter in enumerate((gate.weight, gate.bias)):
        parameter.data.copy_(draw(*parameter.shape, seed=seed))
    x = draw(2, 7, 4, seed=3)
    hidden = torch.nn.functional.gelu(module.fc1(module.norm(x)))
    assert_close(module(x), x + module.fc2(gate(hidden)), 12)


def test_channel_mode_takes_any_token_count_and_token_mode_its_own():
    assert GatedMLP(4)(torch.zeros(1, 9, 4)).shape == (1, 9, 4)
    with pytest.raises(ValueError, match=r"gate_weight: expected shape \(9, 9\), got \(7, 7\)"):
        GatedMLP(4, mode="token", tokens=7)(torch.zeros(1, 9, 4))


def test_bad_input():
    with pytest.raises(ValueError, match=r"mode: expected one of .*'channel', 'token'"):
        SpatialGatingUnit(4, "pixel")
    with pytest.raises(ValueError, match="tokens: expected a token count in mode 'token', got None"):
        SpatialGatingUnit(4, "token")
    x, w = torch.zeros(1, 3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"v: expected shape \(1, 3, 4\)"):
        spatial_gating_unit(x, x[:, :2], w, w, torch.zeros(4, 4), w)
    with pytest.raises(ValueError, match=r"norm_weight: expected shape \(4,\)"):
        spatial_gating_unit(x, x, w[:3], w, torch.zeros(4, 4), w)
    with pytest.raises(TypeError, match=r"weight: expected dtype torch\.float32"):
        spatial_gating_unit(x, x, w, w, torch.zeros(4, 4).double(), w)
    module = GatedMLP(4)
    with pytest.raises(ValueError, match=r"fc1_weight: expected shape \(8, 5\), got \(8, 4\)"):
        module(torch.zeros(1, 3, 5))
