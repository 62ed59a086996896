"""Channel mixing against its formula written out, and nn.BatchNorm2d's habits."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from contract import compare, draw, saved_tensors
from launches import kernel_names, recorded_launches
from torch import nn

from degmix_kernels import BatchNorm2d, ChannelMix, channel_mix, launch, use_backend
from degmix_kernels.backend import INTERPRETED
from degmix_kernels.testing import assert_close, relative_l2


def formula(x, weight, bias, mean, var, scale, shift, eps=1e-5):
    """Every pixel on its own: y_o = GELU(Σ_c W_oc x_c + b_o), then normalised."""
    mixed = torch.einsum("oc,bchw->bohw", weight, x) + bias.view(1, -1, 1, 1)
    active = mixed * 0.5 * (1 + torch.erf(mixed / 2**0.5))
    if mean is None:
        mean = active.mean((0, 2, 3))
        var = ((active - mean.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
    normed = (active - mean.view(1, -1, 1, 1)) / torch.sqrt(var.view(1, -1, 1, 1) + eps)
    return normed * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1), active


@pytest.mark.parametrize("training", [True, False])
def test_formula_output_gradients_and_statistics(training):
    shapes = {"x": (2, 5, 4, 3), "weight": (7, 5), "bias": (7,), "norm_weight": (7,), "norm_bias": (7,)}
    shapes["residual"] = (2, 7, 4, 3)
    named = {name: draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    mean, var = draw(7, seed=6), draw(7, seed=7).square() + 0.5
    kept, statistics = (mean.clone(), var.clone()), (None, None) if training else (mean, var)

    def plain(x, weight, bias, norm_weight, norm_bias, residual):
        return formula(x, weight, bias, *statistics, norm_weight, norm_bias)[0] + residual

    ours = partial(channel_mix, running_mean=kept[0], running_var=kept[1], training=training)
    compare(ours, plain, named, 24 * 5)
    _, active = formula(*(named[name] for name in ("x", "weight", "bias")), None, None, *[torch.ones(7)] * 2)
    if training:
        count = 2 * 4 * 3
        batch_var = active.var((0, 2, 3), unbiased=False) * count / (count - 1)
        assert_close(kept[0], 0.9 * mean + 0.1 * active.mean((0, 2, 3)), 24)
        assert_close(kept[1], 0.9 * var + 0.1 * batch_var, 24)
    else:
        assert torch.equal(kept[0], mean)


def test_tokens_are_a_map_of_one_row():
    tokens, weight = draw(11, 5), draw(3, 5, seed=1)
    as_map = channel_mix(tokens.T[None, :, None], weight.view(3, 5, 1, 1), training=True)
    assert_close(channel_mix(tokens, weight, training=True), as_map[0, :, 0].T, 11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_sums_in_fp32(device, dtype):
    # Σ x² of 4096 values of 64 overflows fp16, and bf16 cannot count to 4096.
    x = (draw(1, 2, 64, 64) + 64).to(device, dtype)
    weight = torch.eye(2, device=device, dtype=dtype)
    got = channel_mix(x, weight, activation="identity", training=True)
    expected = channel_mix(x.double(), weight.double(), activation="identity", training=True)
    assert got.dtype == dtype
    assert_close(got, expected, 4096)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_module_is_convolution_gelu_batch_norm(momentum):
    torch.manual_seed(0)
    module = ChannelMix(5, 7, momentum=momentum).double()
    plain = nn.Sequential(nn.Conv2d(5, 7, 1), nn.GELU(), nn.BatchNorm2d(7, momentum=momentum)).double()
    names = {"weight": "0.weight", "bias": "0.bias"}
    plain.load_state_dict(
        {names.get(name, name.replace("norm.", "2.")): value for name, value in module.state_dict().items()}
    )
    x = draw(3, 5, 4, 6)
    for training in (True, True, False):
        assert_close(module.train(training)(x), plain.train(training)(x), 72)
    assert module.norm.num_batches_tracked == plain[2].num_batches_tracked == 2
    for name in ("running_mean", "running_var"):
        assert_close(module.norm.get_buffer(name), plain[2].get_buffer(name), 72)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_statistics_are_those_of_the_batch(device, backend, last):
    x, weight, bias = draw(2, 5, 4, 3), draw(7, 5, seed=1), draw(7, seed=2)
    _, active = formula(x, weight, bias, None, None, torch.ones(7), torch.zeros(7))
    given = [each.float().to(device).requires_grad_() for each in (x, weight, bias)]
    if last:
        given[0] = given[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with use_backend(backend):
        output, mean, variance = channel_mix(*given, statistics=True)
        plain = channel_mix(*given)
        empty, *nothing = channel_mix(given[0][:0], *given[1:], statistics=True)
    assert torch.equal(output, plain)
    assert output.stride() == plain.stride()
    assert output.requires_grad
    for got, want in ((mean, active.mean((0, 2, 3))), (variance, active.var((0, 2, 3), correction=0))):
        assert_close(got, want.to(device), 24 * 5)
        assert not got.requires_grad
    assert empty.shape == (0, 7, 4, 3)
    assert all(torch.equal(each, torch.zeros(7, device=device)) for each in nothing)
    probe = draw(*output.shape, seed=3).float().to(device)
    gradients = (torch.autograd.grad(each, given, probe) for each in (output, plain))
    for one, other in zip(*gradients, strict=True):  # cuDNN may add up in another order each time
        assert_close(one, other.double(), 24 * 5)


@pytest.mark.parametrize("training", [False, True])
def test_a_tile_of_many_parts(device, monkeypatch, training):
    """Parts are no smaller than a quarter of a tile, whatever the plan says."""
    original = launch._launch

    def in_small_parts(planned):
        part = {"PART": 4} if "PART" in planned.constants else {}
        original(planned._replace(constants={**planned.constants, **part}))

    monkeypatch.setattr(launch, "_launch", in_small_parts)
    x, weight = draw(2, 3, 7, 8, dtype=torch.float32).to(device), torch.eye(3, device=device)
    running = {"running_mean": torch.zeros(3, device=device), "running_var": torch.ones(3, device=device)}
    with use_backend("triton"):
        output = channel_mix(x, weight, **running, training=training)
    with use_backend("reference"):
        expected = channel_mix(x.double(), weight.double(), **running, training=training)
    assert_close(output, expected, 112)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_an_ensemble_trains_under_vmap(device, backend):
    """Weights and running statistics of several layers, each moved as its own."""
    x = draw(2, 3, 4, 5, dtype=torch.float32).to(device)
    weight = draw(2, 6, 3, dtype=torch.float32).to(device)
    running = torch.zeros(2, 6, device=device), torch.ones(2, 6, device=device)
    expected = [each.clone() for each in running]

    def layer(weight, mean, variance):
        return channel_mix(x, weight, running_mean=mean, running_var=variance, training=True)

    with use_backend(backend):
        outputs = torch.vmap(layer)(weight, *running)
    with use_backend("reference"):
        each = torch.stack([layer(*one) for one in zip(weight, *expected, strict=True)])
    torch.testing.assert_close(outputs, each)
    torch.testing.assert_close(running, tuple(expected))


@pytest.mark.parametrize("layer", [ChannelMix(4, 4), BatchNorm2d(4)], ids=["ChannelMix", "BatchNorm2d"])
def test_one_element_has_no_batch_statistic(layer):
    with pytest.raises(ValueError, match=r"more than (one element|1 value)"):
        layer.train()(torch.zeros(1, 4, 1, 1))
    assert layer.eval()(torch.zeros(1, 4, 1, 1)).shape == (1, 4, 1, 1)


@pytest.mark.parametrize("module", [BatchNorm2d, partial(ChannelMix, 4), lambda size: ChannelMix(size, 4)])
def test_modules_of_no_size_are_refused(module):
    with pytest.raises(TypeError, match=r"expected an integer, got 4\.5"):
        module(4.5)
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        module(0)


# --- kernels ----------------------------------------------------------------------------------------------


def mix_call(device) -> dict:
    """A call in training, with gradients wanted for everything."""
    shapes = {"x": (3, 5, 4, 6), "weight": (7, 5), "bias": (7,), "residual": (3, 7, 4, 6)}
    shapes |= {"norm_weight": (7,), "norm_bias": (7,)}
    call = {name: draw(*shape, seed=seed).float() for seed, (name, shape) in enumerate(shapes.items())}
    call["x"] *= 4
    return {name: value.to(device).requires_grad_() for name, value in call.items()} | {"training": True}


def test_launches(device):
    call = mix_call(device)
    running = {"running_mean": torch.zeros(7, device=device), "running_var": torch.ones(7, device=device)}
    with use_backend("triton"):
        with recorded_launches() as forward:
            output = channel_mix(**call)
        with recorded_launches() as backward:
            output.sum().backward()
        with recorded_launches() as evaluation:
            channel_mix(**call | {"training": False} | running)
        weights = {name: call[name].detach() for name in ("weight", "bias", "norm_weight", "norm_bias")}
        output = channel_mix(**call | weights)
        with recorded_launches() as frozen:
            output.sum().backward()

    assert kernel_names(forward) == ["forward", "combine", "forward"]
    assert forward[0].arguments["output_ptr"] is None  # z alone: its activation is computed where it is read
    assert kernel_names(backward) == ["backward", "finish", "backward_activation"]
    assert kernel_names(evaluation) == ["forward"]
    assert kernel_names(frozen) == kernel_names(backward)
    assert frozen[2].arguments["sums_ptr"] is None


def test_saves_x_and_z_only(device):
    call = mix_call(device)
    with use_backend("triton"), saved_tensors() as saved:
        channel_mix(**call)
    parameters = {call[name].data_ptr() for name in ("weight", "bias", "norm_weight", "norm_bias")}
    kept = sum(each.untyped_storage().nbytes() for key, each in saved.items() if key not in parameters)
    z = 3 * 7 * 24
    assert kept <= 4 * (call["x"].numel() + z + 2 * 7)


def test_gelu_of_the_kernels(device):
    """Within 5e-7 of the exact one, beside its own rounding; so is its slope.

    With exact exp and division the slope errs by 2.0e-7, the most of both. A GPU's are approximate: 2 ulp
    (2.4e-7) each, of a tail of at most 1/2, and of the exp once more in z · density of at most 1/4.
    """
    x = torch.linspace(-12, 12, 4096, device=device)[:, None].requires_grad_()
    statistics = {"running_mean": torch.zeros(1, device=device), "running_var": torch.ones(1, device=device)}
    with use_backend("triton"):
        output = channel_mix(x, torch.ones(1, 1, device=device), eps=0.0, **statistics)
    (slope,) = torch.autograd.grad(output.sum(), x)
    exact = x.detach().double().requires_grad_()
    expected = nn.functional.gelu(exact)
    (exact_slope,) = torch.autograd.grad(expected.sum(), exact)
    assert ((output - expected).abs() - expected.abs() * 2**-24).max() < 5e-7
    assert (slope - exact_slope).abs().max() < 5e-7


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_statistics_far_from_zero(device, last):
    call = mix_call(device)
    with torch.no_grad():
        call["bias"].add_(5000)  # z has a standard deviation of about 5
        if last:
            call["x"] = call["x"].contiguous(memory_format=torch.channels_last)
    call["x"].requires_grad_()
    tensors = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    exact = {name: value.detach().double().requires_grad_() for name, value in tensors.items()}
    running = [torch.zeros(7, device=device), torch.ones(7, device=device)]
    kept = [value.double() for value in running]
    outputs = []
    for backend, values, buffers in (("triton", tensors, running), ("reference", exact, kept)):
        statistics = {"running_mean": buffers[0], "running_var": buffers[1], "momentum": 1.0}
        with use_backend(backend):
            outputs.append(channel_mix(**values, **statistics, training=True))
    # A sum in fp32 loses the digits of the mean: one part in a thousand deviations of 2⁻²⁴.
    assert relative_l2(outputs[0], outputs[1]) < 1000 * 2**-23
    assert relative_l2(running[0], kept[0]) < 1e-6
    assert relative_l2(running[1], kept[1]) < 1000 * 2**-23
    probe = draw(*outputs[0].shape, seed=9, dtype=torch.float32).to(device)
    for output in outputs:
        output.backward(probe.to(output.dtype))
    for name in ("x", "weight", "norm_weight", "norm_bias", "residual"):
        assert relative_l2(tensors[name].grad, exact[name].grad) < 10 * 1000 * 2**-23, name


# --- several processes ------------------------------------------------------------------------------------


def results_of(part: slice, backend: str, synchronised: bool) -> dict[str, torch.Tensor]:
    """Output, gradients and statistics of a part of a batch."""
    torch.manual_seed(0)
    dtype = torch.float32 if backend == "triton" else torch.float64
    module = ChannelMix(3, 4).to(dtype)
    nn.init.normal_(module.norm.weight)
    if synchronised:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    x, residual, probe = (draw(3, n, 2, 3, seed=seed).to(dtype)[part] for seed, n in enumerate((3, 4, 4)))
    x, residual = (4 * x).requires_grad_(), residual.requires_grad_()
    with use_backend(backend):
        output = module(x, residual)
        output.backward(probe)
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    of_images = {"output": output.detach(), "x": x.grad, "residual": residual.grad}
    return of_images | gradients | dict(module.named_buffers())


def one_process(rank: int, folder: str) -> None:
    """Compare the share of one process, a part of the batch, with the whole."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        mine = slice(0, 1) if rank == 0 else slice(1, None)
        whole = results_of(slice(None), "reference", synchronised=False)
        # Kernels on CPUs need Triton's interpreter, which a GPU machine does not use.
        for backend in ("triton", "reference") if INTERPRETED else ("reference",):
            share = results_of(mine, backend, synchronised=True)
            assert share.pop("norm.num_batches_tracked") == 1
            for name, value in share.items():
                if name in ("output", "x", "residual"):
                    expected = whole[name][mine]
                else:
                    expected = whole[name]
                    if "running" not in name:
                        dist.all_reduce(value)  # a parameter's gradient
                assert_close(value, expected, 18 * 3 * 4, name=name)
    finally:
        dist.destroy_process_group()


def test_two_processes_normalise_as_one(tmp_path):
    torch.multiprocessing.spawn(one_process, (str(tmp_path),), nprocs=2)
