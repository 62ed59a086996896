"""``batch_norm`` against PyTorch's own, and what uses it: BatchNorm2d, the mixer layer."""

from __future__ import annotations

import copy

import pytest
import torch
from launches import recorded_launches
from torch import Tensor, nn
from torch.nn import functional

from degmix.model.mixer import MixerLayer
from degmix_kernels import BatchNorm2d, ChannelMix, batch_norm, maps, use_backend
from degmix_kernels.batch_norm import plan
from degmix_kernels.testing import assert_close


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def statistics_of(x: Tensor) -> tuple[Tensor, Tensor]:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = exact.mean((0, 2, 3))
    return mean, (exact - mean[:, None, None]).square().mean((0, 2, 3))


@pytest.mark.parametrize("last", [False, True], ids=["planar", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_is_torchs_batch_norm_when_the_statistics_are_of_x(device, dtype, last):
    x, residual = (draw(3, 6, 5, 4, seed=seed, dtype=dtype).to(device) for seed in (0, 1))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    vector_dtype = torch.promote_types(dtype, torch.float32)
    weight, bias = (draw(6, seed=seed, dtype=vector_dtype).to(device) for seed in (2, 3))
    ours = [tensor.requires_grad_() for tensor in (x, weight, bias, residual)]
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    probe = draw(3, 6, 5, 4, seed=4, dtype=dtype).to(device)

    output = batch_norm(x, *statistics_of(x), weight, bias, residual)
    expected = functional.batch_norm(exact[0], None, None, exact[1], exact[2], training=True) + exact[3]
    assert_close(output, expected, 60)
    actual = torch.autograd.grad(output, ours, probe)
    wanted = torch.autograd.grad(expected, exact, probe.double())
    for name, got, want in zip(("x", "weight", "bias", "residual"), actual, wanted, strict=True):
        assert_close(got, want, 60, dtype, name)


@pytest.mark.parametrize("last", [False, True], ids=["planar", "channels_last"])
def test_a_mean_of_a_thousand_deviations(device, last):
    x = (draw(2, 4, 8, 16) + 1000).float().to(device)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    mean, variance = statistics_of(x.double())
    # fp32 means, which the exact result must be given too: their rounding is the caller's.
    tensors = [x, mean.float(), variance.float(), draw(4, seed=1).float().to(device)]
    ours = [tensor.requires_grad_() for tensor in tensors]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    probe = draw(2, 4, 8, 16, seed=2).float().to(device)
    output = batch_norm(*ours)
    with use_backend("reference"):
        expected = batch_norm(*exact)
    assert_close(output, expected, 256)
    for got, want in zip(
        torch.autograd.grad(output, ours, probe),
        torch.autograd.grad(expected, exact, probe.double()),
        strict=True,
    ):
        assert_close(got, want, 256)


def test_many_parts_and_ragged_blocks(device):
    """More tiles than programs: the last part ends past the last tile, and the sums still add up."""
    x = draw(3, 1, 1, 65536, dtype=torch.float32).to(device)
    mean, variance = statistics_of(x)
    launch, partial = plan.plan_backward(x, x, mean, variance, None, None, True, True, 1e-5)
    assert launch.programs == partial.shape[1] == 192
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "_PROGRAMS", 5)
        for shape in ((3, 2, 30, 70), (9, 70), (2, 300, 1, 3)):
            x = draw(*shape, dtype=torch.float32).to(device).requires_grad_()
            vectors = [draw(shape[1], seed=seed).float().to(device).requires_grad_() for seed in (1, 2, 3, 4)]
            vectors[1] = vectors[1].detach().square().add(0.5).requires_grad_()
            exact = [tensor.detach().double().requires_grad_() for tensor in (x, *vectors)]
            probe = draw(*shape, seed=5, dtype=torch.float32).to(device)
            actual = torch.autograd.grad(batch_norm(x, *vectors), (x, *vectors), probe)
            wanted = torch.autograd.grad(batch_norm(*exact), exact, probe.double())
            for got, want in zip(actual, wanted, strict=True):
                assert_close(got, want, x.numel() // shape[1])


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


def test_saves_the_input_and_vectors_only(device):
    x = draw(2, 3, 4, 4, dtype=torch.float32).to(device).requires_grad_()
    mean, variance, weight, bias = (torch.ones(3, device=device) for _ in range(4))
    saved = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        batch_norm(x, mean, variance, weight, bias, torch.ones_like(x))
    assert saved == [tensor.data_ptr() for tensor in (x, mean, variance, weight, bias)]


def test_opcheck(device):
    x, residual = (draw(2, 5, 3, 4, seed=s, dtype=torch.float32).to(device) for s in (0, 1))
    vectors = [draw(5, seed=s).square().add(0.5).float().to(device) for s in (2, 3, 4, 5)]
    tensors = [tensor.requires_grad_() for tensor in (x, *vectors, residual)]
    torch.library.opcheck(torch.ops.degmix.batch_norm.default, (*tensors, 1e-5))
    last = x.detach().contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.degmix.batch_norm.default, (last, *vectors[:2], None, None, None, 1e-5))


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "x: expected 2 or 4 dimensions"),
        ({"x": torch.zeros(2, 0)}, ValueError, "x: expected at least one channel"),
        ({"mean": None}, TypeError, "mean: expected a tensor, got NoneType"),
        ({"variance": torch.zeros(4)}, ValueError, r"variance: expected shape \(3,\), got \(4,\)"),
        ({"weight": torch.zeros(3, device="meta")}, TypeError, "weight: expected device cpu as x, got meta"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias: expected shape \(3,\)"),
        ({"residual": torch.zeros(3, 2)}, ValueError, r"residual: expected shape \(2, 3\)"),
        ({"residual": torch.zeros(2, 3).half()}, TypeError, "residual: expected dtype torch.float32"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"x": torch.zeros(2, 3), "mean": torch.zeros(3), "variance": torch.ones(3)} | change
    with pytest.raises(error, match=message):
        batch_norm(**arguments)


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


def test_one_element_has_no_batch_statistic(device):
    x = torch.zeros(1, 4, 1, 1, device=device)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm2d(4).to(device)(x, statistics_of(x))


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


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_mixer_layer_is_its_formula(training):
    layer, x = layer_and_input(torch.device("cpu"))
    layer, x = layer.double().train(training), x.double()
    plain = copy.deepcopy(layer)
    mixed = plain.channel_mix(x)
    expected = mixed + nn.BatchNorm2d.forward(plain.norm, plain.deform_mix(mixed, plain.offsets(mixed)))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())


def test_mixer_layer_with_synchronised_norms_takes_their_own_way(device):
    layer, x = layer_and_input(device)
    layer.eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer))
    assert isinstance(converted.norm, nn.SyncBatchNorm)
    assert list(converted.state_dict()) == list(layer.state_dict())
    torch.testing.assert_close(converted(x), layer(x))


def test_mixer_layer_trains_compiled_whole(device):
    layer, x = layer_and_input(device)
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
    assert layer.norm.running_mean.dtype == torch.float32
