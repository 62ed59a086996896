"""``batch_norm`` against PyTorch's own, and what uses it: BatchNorm2d, the mixer layer."""

from __future__ import annotations

import copy

import pytest
import torch
from contract import compare, draw
from launches import recorded_launches
from torch import Tensor, nn
from torch.nn import functional

from degmix.model.mixer import MixerLayer
from degmix_kernels import BatchNorm2d, ChannelMix, batch_norm, maps, use_backend
from degmix_kernels.batch_norm import plan
from degmix_kernels.testing import assert_close

NAMES = ("x", "mean", "variance", "weight", "bias")
LAYOUTS = {"planar": torch.contiguous_format, "channels_last": torch.channels_last}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def statistics_of(x: Tensor) -> tuple[Tensor, Tensor]:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = exact.mean((0, 2, 3))
    return mean, (exact - mean[:, None, None]).square().mean((0, 2, 3))


@every_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_is_torchs_batch_norm_when_the_statistics_are_of_x(device, dtype, layout):
    x, residual = (draw(3, 6, 5, 4, seed=seed, dtype=dtype).to(device) for seed in (0, 1))
    x = x.contiguous(memory_format=layout)
    vector_dtype = torch.promote_types(dtype, torch.float32)
    weight, bias = (draw(6, seed=seed, dtype=vector_dtype).to(device) for seed in (2, 3))

    def ours(x, weight, bias, residual):
        return batch_norm(x, *statistics_of(x), weight, bias, residual)

    def torchs(x, weight, bias, residual):
        return functional.batch_norm(x, None, None, weight, bias, training=True) + residual

    named = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    compare(ours, torchs, named, 60)


@every_layout
def test_a_mean_of_a_thousand_deviations(device, layout):
    x = (draw(2, 4, 8, 16) + 1000).float().to(device).contiguous(memory_format=layout)
    mean, variance = statistics_of(x.double())
    # fp32 means, which the exact result must be given too: their rounding is the caller's.
    vectors = [mean.float(), variance.float(), draw(4, seed=1).float().to(device)]
    compare(batch_norm, batch_norm, dict(zip(NAMES, (x, *vectors), strict=False)), 256)


def test_many_parts_and_ragged_blocks(device):
    """More tiles than programs: the last part ends past the last tile, and the sums still add up."""
    x = draw(3, 1, 1, 65536, dtype=torch.float32).to(device)
    mean, variance = statistics_of(x)
    launch, partial = plan.plan_backward(x, x, mean, variance, None, None, True, True, 1e-5)
    assert launch.programs == partial.shape[1] == 192
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "_PROGRAMS", 4)
        for shape in ((3, 2, 30, 70), (9, 70), (2, 300, 1, 3)):
            x = draw(*shape, dtype=torch.float32).to(device)
            vectors = [draw(shape[1], seed=seed).float().to(device) for seed in (1, 2, 3, 4)]
            vectors[1] = vectors[1].square().add(0.5)
            tensors = dict(zip(NAMES, (x, *vectors), strict=False))
            compare(batch_norm, batch_norm, tensors, x.numel() // shape[1])


def test_only_what_is_wanted_is_launched_and_read(device):
    x = draw(2, 3, 4, 4, dtype=torch.float32).to(device)
    mean, variance, bias = (torch.ones(3, device=device) for _ in range(3))
    grad = torch.ones_like(x)

    def launches(wanted: Tensor, *arguments: Tensor | None) -> list[tuple[str, bool]]:
        wanted.requires_grad_()
        output = batch_norm(*arguments)
        with recorded_launches() as seen:
            (gradient,) = torch.autograd.grad(output, wanted, grad)
        wanted.requires_grad_(False)
        if wanted.shape == x.shape and not seen:
            assert gradient.data_ptr() == grad.data_ptr()  # no copy
        return [(each.kernel.fn.__name__, each.arguments.get("x_ptr") is not None) for each in seen]

    residual = torch.ones_like(x)
    call = (x, mean, variance, None, bias, residual)
    assert launches(residual, *call) == []
    assert launches(x, *call) == [("backward", False)]
    assert launches(bias, *call) == [("backward", False), ("finish", False)]
    assert launches(mean, *call) == [("backward", False), ("finish", False)]
    assert launches(variance, *call) == [("backward", True), ("finish", False)]


def test_plans_know_how_wide_they_may_read():
    for shape, last, unit in (
        ((8, 256, 107, 140), False, 4),
        ((8, 256, 107, 140), True, 16),
        ((2, 6, 7, 7), False, 1),
        ((2, 6, 7, 7), True, 2),
        ((4, 24, 1, 1), False, 8),  # read as tokens
    ):
        x = torch.empty(shape, device="meta")
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        assert maps.Sizes.of(x).unit == unit
    vector = torch.empty(256, device="meta")
    for size, wide in ((2047, False), (2049, True)):
        x = torch.empty(2, 256, size, 2048, device="meta")
        launch = plan.plan_forward(x, vector, vector, None, None, None, x, 1e-5)
        assert launch.constants["INDEX_64"] == wide


# --- BatchNorm2d -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_statistics_from_elsewhere_move_the_running_ones_as_torch_does(device, momentum):
    ours = BatchNorm2d(4, momentum=momentum).to(device)
    plain = nn.BatchNorm2d(4, momentum=momentum).to(device)
    for seed in range(2):
        x = draw(2, 4, 3, 3, seed=seed, dtype=torch.float32).to(device) + seed
        residual = draw(2, 4, 3, 3, seed=9, dtype=torch.float32).to(device)
        torch.testing.assert_close(ours(x, statistics_of(x), residual), plain(x) + residual)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    ours.eval(), plain.eval()
    torch.testing.assert_close(ours(x, residual=residual), plain(x) + residual)
    wrong = torch.full((4,), torch.nan, device=device)
    torch.testing.assert_close(ours(x, (wrong, wrong)), plain(x))  # running statistics are used
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())


def test_statistics_that_are_refused_change_nothing(device):
    module = BatchNorm2d(4).to(device)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="mean: expected shape"):
        module(torch.randn(2, 4, 3, 3, device=device), (torch.ones(1, device=device),) * 2)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_without_running_statistics(device):
    ours = BatchNorm2d(4, track_running_stats=False).to(device).eval()
    x = draw(2, 4, 3, 3, dtype=torch.float32).to(device)
    expected = functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(ours(x, statistics_of(x), x), expected + x)
    torch.testing.assert_close(ours(x, residual=x), expected + x)


@pytest.mark.parametrize("given", [False, True])
def test_statistics_that_are_no_longer_tracked_stay(device, given):
    ours, plain = BatchNorm2d(4).to(device), nn.BatchNorm2d(4).to(device)
    mixes = ChannelMix(4, 4).to(device)
    ours.track_running_stats = plain.track_running_stats = mixes.norm.track_running_stats = False
    x = draw(2, 4, 3, 3, dtype=torch.float32).to(device) + 1
    torch.testing.assert_close(ours(x, statistics_of(x) if given else None), plain(x))
    mixes(x)
    for norm in (ours, mixes.norm):
        torch.testing.assert_close(norm.state_dict(), plain.state_dict())
    ours.eval(), plain.eval()
    torch.testing.assert_close(ours(x), plain(x))


def test_half_precision_running_statistics_and_an_empty_batch(device):
    ours = BatchNorm2d(4).to(device, torch.bfloat16)
    x = draw(2, 4, 3, 3).to(device, torch.bfloat16)
    mean, variance = statistics_of(x)
    assert ours(x, (mean, variance)).dtype == torch.bfloat16
    assert_close(ours.running_mean, 0.1 * mean, 18)
    before = copy.deepcopy(ours.running_mean)
    assert ours(x[:0], (mean * torch.nan, variance * torch.nan)).shape == (0, 4, 3, 3)
    assert torch.equal(ours.running_mean, before)


# --- MixerLayer --------------------------------------------------------------------------------------------


def layer_and_input(device: torch.device) -> tuple[MixerLayer, Tensor]:
    torch.manual_seed(0)
    layer = MixerLayer(4)
    nn.init.normal_(layer.offsets.p_conv.weight, std=0.2)
    # Small values make GELU linear, and the normalisation then cancels the gradients of biases.
    for mix in (layer.channel_mix, layer.deform_mix):
        nn.init.normal_(mix.weight, std=2)
    for norm in (layer.channel_mix.norm, layer.norm):
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
    return layer.to(device), draw(2, 4, 5, 3, seed=1, dtype=torch.float32).to(device)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_mixer_layer_on_triton_is_the_reference(device, training):
    layer, x = layer_and_input(device)
    probe = draw(2, 4, 5, 3, seed=2, dtype=torch.float32).to(device)
    results = []
    for backend, dtype in (("auto", torch.float32), ("reference", torch.float64)):
        twin, leaf = copy.deepcopy(layer).train(training).to(dtype), x.to(dtype, copy=True).requires_grad_()
        with use_backend(backend), recorded_launches() as seen:
            output = twin(leaf)
            output.backward(probe.to(dtype))
        names = [each.kernel.fn.__module__.split(".")[1] for each in seen]
        assert ("batch_norm" in names) == (backend == "auto")
        gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
        results.append({"output": output, "x": leaf.grad, **gradients, **dict(twin.named_buffers())})
    # Sums over pixels, channels and outputs of each other, twice over; normalising cancels some of them. A
    # coordinate of 4 pixels and more leaves its fraction 4 times the rounding error: 16 times the terms.
    for name, got in results[0].items():
        assert_close(got, results[1][name], 16 * 4 * (2 * 15 * 4 * 4), torch.float32, name)


def test_mixer_layer_with_synchronised_norms_takes_their_own_way(device):
    layer, x = layer_and_input(device)
    layer.eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer))
    for norm in (converted.norm, converted.channel_mix.norm):
        assert isinstance(norm, nn.SyncBatchNorm)
    assert list(converted.state_dict()) == list(layer.state_dict())
    torch.testing.assert_close(converted(x), layer(x))


@pytest.mark.parametrize("momentum", [0.1, None])
@torch._dynamo.config.patch(capture_scalar_outputs=True)  # the number of batches is one
def test_mixer_layer_trains_compiled_whole(device, momentum):
    layer, x = layer_and_input(device)
    layer.norm.momentum = layer.channel_mix.norm.momentum = momentum
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outputs = [each(x) for each in (compiled, twin)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_mixer_layer_under_autocast(device):
    layer, x = layer_and_input(device)
    with torch.autocast(device.type, torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert layer.norm.running_mean.dtype == layer.channel_mix.norm.running_mean.dtype == torch.float32
