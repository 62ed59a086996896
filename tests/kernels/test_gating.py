"""The gating unit and the gated MLP against sums written out, in both modes, and their kernels."""

import pytest
import torch
from allocations import Allocations
from contract import compare, draw, saved_tensors
from launches import kernel_names, recorded_launches

from degmix_kernels import GatedMLP, SpatialGatingUnit, gated_mlp, spatial_gating_unit, use_backend
from degmix_kernels.gating import backward_plan, plan
from degmix_kernels.testing import assert_close, inside_ops, poisoned_empty


def layer_norm(x, weight, bias):
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred / torch.sqrt((centred**2).sum(-1, keepdim=True) / x.shape[-1] + 1e-5) * weight + bias


def gate_formula(u, v, norm_weight, norm_bias, weight, bias, mode):
    normed = layer_norm(v, norm_weight, norm_bias)
    if mode == "channel":
        return u * (torch.einsum("oc,bnc->bno", weight, normed) + bias)
    return u * (torch.einsum("mn,bnc->bmc", weight, normed) + bias[None, :, None])


def mlp_formula(x, norm_weight, norm_bias, fc1, bias1, *gate, mode):
    *gate, fc2, bias2 = gate
    hidden = torch.einsum("oc,bnc->bno", fc1, layer_norm(x, norm_weight, norm_bias)) + bias1
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    gated = gate_formula(hidden[..., :6], hidden[..., 6:], *gate, mode)
    return x + torch.einsum("oc,bnc->bno", fc2, gated) + bias2


both_modes = pytest.mark.parametrize("mode", ["channel", "token"])


def by_index(function, mode, **flags):
    """The function of tensors that are named by their places."""
    return lambda **tensors: function(*tensors.values(), mode=mode, **flags)


def numbered(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"tensor {index}": tensor for index, tensor in enumerate(tensors)}


@both_modes
def test_formulas_and_gradients(mode):
    size, hidden = (5, 6) if mode == "channel" else (7, 7)
    unit = ((2, 7, 5), (2, 7, 5), (5,), (5,), (size, size), (size,))
    mlp = ((2, 7, 5), (5,), (5,), (12, 5), (12,), (6,), (6,), (hidden, hidden), (hidden,), (5, 6), (5,))
    for function, formula, shapes, terms in (
        (spatial_gating_unit, gate_formula, unit, 7),
        (gated_mlp, mlp_formula, mlp, 12),
    ):
        inputs = numbered([draw(*shape, seed=seed) for seed, shape in enumerate(shapes)])
        ours, plain = by_index(function, mode), by_index(formula, mode)
        compare(ours, plain, inputs, terms, of_gradients=200)


@both_modes
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_gate_starts_as_an_exact_pass_through(device, mode, backend):
    u_v, module = draw(2, 7, 10).to(device, torch.bfloat16), SpatialGatingUnit(5, mode, tokens=7)
    with use_backend(backend):
        assert torch.equal(module.to(u_v)(u_v), u_v[..., :5])


@both_modes
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
    with pytest.raises(TypeError, match=r"tokens: expected an integer, got 7\.0"):
        SpatialGatingUnit(4, "token", tokens=7.0)
    with pytest.raises(TypeError, match=r"hidden: expected an integer, got 4\.5"):
        GatedMLP(4, 4.5)
    with pytest.raises(ValueError, match="dim: expected at least 1, got 0"):
        GatedMLP(0)
    module = GatedMLP(4)
    with pytest.raises(ValueError, match=r"fc1_weight: expected shape \(8, 5\), got \(8, 4\)"):
        module(torch.zeros(1, 3, 5))


# --- kernels -----------------------------------------------------------------------------------------------


def gate_arguments(device, dtype, batch, tokens, channels, mode) -> list[torch.Tensor]:
    """u and v, halves of one tensor, and parameters; those of the LayerNorm are fp32, as under autocast."""
    size = channels if mode == "channel" else tokens
    u, v = draw(batch, tokens, 2 * channels).to(device, dtype).chunk(2, dim=2)
    vectors = [draw(channels, seed=seed).float().to(device) for seed in (1, 2)]
    weight = draw(size, size, seed=3).to(device, dtype) / size**0.5
    tensors = [u, v, *vectors, weight, draw(size, seed=4).to(device, dtype)]
    return [tensor.detach().requires_grad_() for tensor in tensors]


def mlp_arguments(device, dtype, batch, tokens, channels, hidden, mode) -> list[torch.Tensor]:
    size = hidden if mode == "channel" else tokens
    shapes = ((2 * hidden, channels), (2 * hidden,), (size, size), (size,), (channels, hidden), (channels,))
    products = [
        (draw(*shape, seed=seed) / shape[-1] ** 0.5).to(device, dtype)
        for seed, shape in enumerate(shapes, start=1)
    ]
    norms = [draw(n, seed=n + s).float().to(device) for n in (channels, hidden) for s in (0, 1)]
    x = draw(batch, tokens, channels).to(device, dtype)
    tensors = [x, *norms[:2], *products[:2], *norms[2:], *products[2:]]
    return [tensor.detach().requires_grad_() for tensor in tensors]


def assert_exact(function, arguments, mode, reduction, **flags):
    """Compare value and every gradient with the fp64 reference, which gets the same numbers."""
    ours, exact = by_index(function, mode, **flags), by_index(function, mode)
    _, *gradients = compare(ours, exact, numbered(arguments), reduction).values()
    return gradients


single_and_half = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
"""Half precision is in bf16: the samples of the contract have fp16, whose code is the same."""


@single_and_half
@both_modes
def test_many_ragged_tiles(device, dtype, mode):
    gate, mlp = ((2, 37, 75), (2, 37, 75, 34)) if mode == "channel" else ((2, 71, 37), (2, 71, 33, 38))
    assert_exact(spatial_gating_unit, gate_arguments(device, dtype, *gate, mode), mode, 9999)
    assert_exact(gated_mlp, mlp_arguments(device, dtype, *mlp, mode), mode, 99999)


@both_modes
def test_sums_over_several_tiles_of_one_program(device, mode, monkeypatch):
    monkeypatch.setattr(backward_plan, "_PROGRAMS", 3)
    monkeypatch.setattr(backward_plan, "_WEIGHT_PROGRAMS", 2)
    assert_exact(gated_mlp, mlp_arguments(device, torch.float32, 3, 33, 70, 20, mode), mode, 99999)


def test_rows_wider_than_a_tile(device, monkeypatch):
    """LayerNorms in steps."""
    monkeypatch.setattr(plan, "_WIDEST", 32)
    monkeypatch.setattr(plan, "_STEP", 16)
    for mode in ("channel", "token"):
        with recorded_launches() as seen:
            assert_exact(gated_mlp, mlp_arguments(device, torch.float32, 2, 5, 35, 33, mode), mode, 99999)
        assert kernel_names(seen).count("norm_sums") == 2


@both_modes
def test_where_nothing_is_kept(device, mode):
    """Inference makes the launches of training. What recomputing gives is what keeping gives."""
    arguments = mlp_arguments(device, torch.bfloat16, 2, 41, 37, 45, mode)
    with use_backend("reference"):
        expected = gated_mlp(*(tensor.detach().double() for tensor in arguments), mode)
    with torch.no_grad(), recorded_launches() as inference, poisoned_empty():
        output = gated_mlp(*arguments, mode)
    assert_close(output, expected, 999)
    with recorded_launches(execute=False) as training:
        gated_mlp(*arguments, mode)
    assert kernel_names(inference) == kernel_names(training)
    recomputed = assert_exact(gated_mlp, arguments, mode, 99999, recompute=True)
    kept = assert_exact(gated_mlp, arguments, mode, 99999)
    for one, other in zip(recomputed, kept, strict=True):  # a GPU may contract the two to other FMAs
        assert_close(one, other.double(), 999)


def test_many_programs_share_statistics(device):
    """Rows that more than two programs read have their statistics computed beforehand."""
    arguments = mlp_arguments(device, torch.bfloat16, 1, 3, 5, 257, "channel")
    with recorded_launches() as seen:
        assert_exact(gated_mlp, arguments, "channel", 99999)
    assert kernel_names(seen)[:5] == ["normalise", "linear", "normalise", "linear", "linear"]


@both_modes
def test_memory_of_inference(device, mode):
    """The result, and fc1's, twice as wide, which takes the gate's; LayerNorm(v) in token mode."""
    arguments = mlp_arguments(device, torch.bfloat16, 4, 64, 128, 128, mode)
    with torch.no_grad(), recorded_launches(execute=False), inside_ops(Allocations(*arguments)) as memory:
        output = gated_mlp(*arguments, mode)
    assert memory.alive() == output.nbytes
    assert memory.peak()[0] == (3 if mode == "channel" else 4) * output.nbytes


@both_modes
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_saved(device, mode, recompute):
    arguments = mlp_arguments(device, torch.bfloat16, 2, 7, 10, 6, mode)
    parameters = {tensor.data_ptr() for tensor in arguments[1:]}
    with saved_tensors() as saved:
        gated_mlp(*arguments, mode, recompute=recompute)
    rows = 2 * 7 * 2  # of two bytes
    sizes = [each.nbytes for pointer, each in saved.items() if pointer not in parameters]
    assert sizes == ([rows * 10] if recompute else [rows * 10, rows * 2 * 6])


@both_modes
def test_recompute_on_the_reference(mode):
    arguments = [
        tensor.detach().double().requires_grad_()
        for tensor in mlp_arguments("cpu", torch.float32, 2, 7, 5, 6, mode)
    ]
    with saved_tensors() as saved:
        recomputed = gated_mlp(*arguments, mode, recompute=True)
    assert 2 * 7 * 12 not in {each.numel() for each in saved.values()}
    outputs = recomputed, gated_mlp(*arguments, mode)
    for pair in zip(*(torch.autograd.grad(each.sum(), arguments) for each in outputs), strict=True):
        assert torch.equal(*pair)


def test_launches(device):
    def of(function, arguments, mode, wanted):
        for index, tensor in enumerate(arguments):
            tensor.requires_grad_(wanted is None or index in wanted)
        with recorded_launches() as forward:
            output = function(*arguments, mode)
        inputs = [tensor for tensor in arguments if tensor.requires_grad]
        with recorded_launches() as backward:
            torch.autograd.grad(output, inputs, torch.ones_like(output))
        return kernel_names(forward), kernel_names(backward)

    channel = gate_arguments(device, torch.float32, 2, 5, 6, "channel")
    token = gate_arguments(device, torch.float32, 2, 5, 6, "token")
    steps = ["normalise", "gate_backward"]
    assert of(spatial_gating_unit, channel, "channel", None) == (["linear"], [*steps, "norm_backward"])
    assert of(spatial_gating_unit, token, "token", None) == (
        ["normalise", "mix_tokens"], [*steps, "token_weight", "norm_backward"],
    )  # fmt: skip
    assert of(spatial_gating_unit, channel, "channel", [0])[1] == steps
    assert of(spatial_gating_unit, token, "token", [1])[1] == [*steps, "norm_backward"]
    mlp = mlp_arguments(device, torch.float32, 2, 5, 6, 4, "channel")
    assert of(gated_mlp, mlp, "channel", None) == (["linear"] * 3, [*steps, "norm_backward", "norm_backward"])
    assert of(gated_mlp, mlp, "channel", [9])[1] == steps  # fc2's weight
    assert of(gated_mlp, mlp, "channel", [10])[1] == []  # fc2's bias
    assert of(gated_mlp, mlp, "channel", [3])[1] == [*steps, "norm_backward", "normalise"]  # fc1's weight


def test_halves_of_a_tensor_are_not_copied(device):
    arguments = gate_arguments(device, torch.float32, 2, 5, 6, "channel")
    with recorded_launches() as seen:
        spatial_gating_unit(*arguments)
    assert (seen[0].arguments["x_stride"], seen[0].arguments["multiplier_stride"]) == (12, 12)


@both_modes
def test_means_of_a_thousand_deviations(device, mode):
    """Statistics of x and v. In fp32 the inputs' rounding is 6e-5 deviations; nothing may be added to it."""
    gate = gate_arguments(device, torch.float32, 2, 9, 40, mode)
    gate[1] = (gate[1].detach() + 1000).requires_grad_()
    assert_exact(spatial_gating_unit, gate, mode, 9999)
    mlp = mlp_arguments(device, torch.float32, 2, 9, 40, 24, mode)
    # The value is next to nothing but residual; the parameters' gradients tell what came of the rest.
    assert_exact(gated_mlp, [mlp[0].detach() + 1000, *mlp[1:]], mode, 99999)


@single_and_half
@both_modes
def test_constant_rows(device, dtype, mode):
    """Without any deviation LayerNorm gives its bias, exactly, and no NaN."""
    arguments = gate_arguments(device, dtype, 2, 9, 16, mode)
    v = arguments[1].detach().clone()
    v[:, ::2] = 3.75
    arguments[1] = v.requires_grad_()
    assert_exact(spatial_gating_unit, arguments, mode, 9999)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@both_modes
def test_parameters_of_the_layer_norms_in_double(device, mode, backend):
    """Tokens decide what is computed in, and the dtype of the result."""
    for function, arguments, doubles in (
        (spatial_gating_unit, gate_arguments(device, torch.float32, 2, 5, 6, mode), (2, 3)),
        (gated_mlp, mlp_arguments(device, torch.float32, 2, 5, 6, 4, mode), (1, 2, 5, 6)),
    ):
        mixed = [
            tensor.detach().double().requires_grad_() if index in doubles else tensor
            for index, tensor in enumerate(arguments)
        ]
        with use_backend(backend):
            outputs = [function(*each, mode) for each in (mixed, arguments)]
        probe = draw(*outputs[0].shape, seed=99).to(outputs[0])
        assert torch.equal(*outputs)
        gradients = (
            torch.autograd.grad(output, each, probe)
            for output, each in zip(outputs, (mixed, arguments), strict=True)
        )
        for one, other, tensor in zip(*gradients, mixed, strict=True):
            assert one.dtype == tensor.dtype
            assert torch.equal(one, other.to(one.dtype))
