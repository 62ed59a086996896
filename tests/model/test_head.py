"""What holds for all four attention variants of the head; test_rewrites.py has its equations."""

import math

import pytest
import torch
from contract import draw
from torch.nn import functional

from degmix import DeGMixHead
from degmix.model.mixer import Offsets
from degmix_kernels import use_backend
from degmix_kernels.testing import relative_l2

ATTENTIONS = ("released", "pixel", "linear", "global")
every_attention = pytest.mark.parametrize("attention", ATTENTIONS)
NYUD = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}


def small_head(attention: str, tasks: int = 2, depth: int = 1, dim: int = 8) -> DeGMixHead:
    """In fp64, with every parameter and statistic random: nothing hides behind a zero."""
    names = {f"task{index}": index + 1 for index in range(tasks)}
    head = DeGMixHead((3, 4, 5, 4), names, attention=attention, depth=depth, dim=dim, heads=2).double()
    for seed, (name, tensor) in enumerate(head.state_dict().items()):
        if tensor.is_floating_point():
            value = draw(*tensor.shape, seed=seed)
            if name.endswith("running_var"):
                value = value.abs() + 0.5
            elif tensor.dim() > 1:
                value = value / math.sqrt(tensor[0].numel())
            tensor.copy_(value)
    return head


def small_features(batch: int = 2, height: int = 7, width: int = 9, seed: int = 0) -> list[torch.Tensor]:
    sizes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(4)]
    shapes = zip((3, 4, 5, 4), sizes, strict=True)
    return [draw(batch, channels, *size, seed=seed + channels) for channels, size in shapes]


@every_attention
def test_constants(attention):
    """Those that are no parameters, which the equations written out take from the modules."""
    head = small_head(attention)
    for module in head.modules():
        assert getattr(module, "eps", 1e-5) == 1e-5
        assert getattr(module, "momentum", 0.1) == 0.1
        assert getattr(module, "heads", 2) == 2
        assert getattr(module, "scale", 4**-0.5) == 4**-0.5


@every_attention
@pytest.mark.parametrize("tasks", range(1, 9))
def test_one_to_eight_tasks(attention, tasks):
    head = small_head(attention, tasks).float()
    predictions = head([feature.float() for feature in small_features(1, 5, 3)], (11, 7))
    assert {task: tuple(p.shape) for task, p in predictions.items()} == {
        f"task{index}": (1, index + 1, 11, 7) for index in range(tasks)
    }
    assert all(prediction.isfinite().all() for prediction in predictions.values())


@every_attention
def test_a_single_image_in_training_has_the_gradient_of_a_plain_batch_norm(attention):
    # Some layouts of the gradient that the head returns would be wrong in a CPU BatchNorm before it.
    head, (first, *others) = small_head(attention), small_features(1)
    first.requires_grad_()
    before = functional.batch_norm(first, None, None, training=True)
    predictions = head([before, *others], (7, 9))
    (gradient,) = torch.autograd.grad(sum(p.square().sum() for p in predictions.values()), first)
    mean, var = first.mean((2, 3), keepdim=True), first.var((2, 3), unbiased=False, keepdim=True)
    predictions = head([(first - mean) / torch.sqrt(var + 1e-5), *others], (7, 9))
    (expected,) = torch.autograd.grad(sum(p.square().sum() for p in predictions.values()), first)
    assert relative_l2(gradient, expected) < 1e-9


def test_released_weights_load_into_pixel_and_global():
    released = small_head("released")
    for attention in ("pixel", "global"):
        small_head(attention).load_state_dict(released.state_dict())


def test_initial_weights():
    torch.manual_seed(0)
    head = DeGMixHead((64,), NYUD, depth=1, dim=64)
    for mixer in head.mixers.values():
        assert not mixer[0].offsets.p_conv.weight.any()
        assert mixer[0].offsets.opt.weight.any()
    assert not head.decoder.gate.gate.weight.any()
    assert (head.decoder.gate.gate.bias == 1).all()
    for prediction in head.predictions.values():
        assert not prediction.logits.bias.any()
    assert head.predictions["semseg"].logits.weight.std().item() == pytest.approx(0.01, rel=0.2)


def test_half_precision_keeps_offsets_exact(device):
    head = small_head("pixel").float().to(device).eval()
    offsets = head.mixers["task0"][0].offsets
    x = draw(1, 8, 40, 50).float().to(device)
    exact = offsets(x)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(offsets(x), exact)
        assert offsets(x.bfloat16()).dtype == torch.float32
    features = [feature.float().to(device) for feature in small_features()]
    with torch.autocast(device.type, torch.bfloat16):
        predictions = head(features, (14, 18))
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in predictions.values())


@every_attention
def test_autocast_takes_maps_of_several_dtypes(device, attention):
    """A GPU's autocast leaves Swin's first map, behind a LayerNorm, in fp32 and the others in bf16."""
    head = small_head(attention).float().to(device).eval()
    features = [feature.float().to(device) for feature in small_features()]
    embedded = []  # one dtype, so that concatenated maps are not widened to fp32
    head.embed.register_forward_pre_hook(lambda _, maps: embedded.extend(each.dtype for each in maps[0]))
    with torch.autocast(device.type, torch.bfloat16):
        expected = head([feature.bfloat16() for feature in features], (14, 18))
        mixed = head([features[0], *(feature.bfloat16() for feature in features[1:])], (14, 18))
        with pytest.raises(TypeError, match=r"features\[1\]: expected torch.float32, got torch.float64"):
            head([features[0], *(feature.double() for feature in features[1:])], (14, 18))
    with pytest.raises(TypeError, match=r"features\[1\]: expected torch.float32, got torch.bfloat16"):
        head([features[0], *(feature.bfloat16() for feature in features[1:])], (14, 18))
    assert set(embedded) == {torch.bfloat16}
    for task, prediction in mixed.items():
        assert torch.equal(prediction, expected[task])


@pytest.mark.filterwarnings("error:.*no Triton kernel yet")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_attention
def test_triton_head_agrees_with_the_reference(attention, training, device):
    """Every op forced to its kernels: predictions, statistics, gradients of all features and parameters."""
    # The tokens of "linear" are at a sixteenth: a batch statistic over four of them would amplify rounding.
    size = (2, 11, 13) if attention == "linear" else (1, 5, 6)
    results = []
    for backend in ("reference", "triton"):
        head = small_head(attention, dim=16).float().to(device).train(training)
        features = [feature.float().to(device).requires_grad_() for feature in small_features(*size)]
        with use_backend(backend):
            predictions = head(features, (10, 12))
            sum(p.square().sum() for p in predictions.values()).backward()
        named = {**dict(head.named_parameters()), **dict(enumerate(features))}
        gradients = {name: leaf.grad for name, leaf in named.items() if leaf.grad is not None}
        results.append({**predictions, **gradients, **dict(head.named_buffers())})
    reference, triton = results
    assert reference.keys() == triton.keys()
    for name, value in reference.items():
        close = relative_l2(triton[name], value) < 1e-4 or (triton[name] - value).norm() < 1e-4
        assert close, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "softmax"}, "attention: expected one of 'released', .*'global', got 'softmax'"),
        ({"tasks": {}}, "tasks: expected 1 to 8 tasks, got 0"),
        ({"tasks": {f"t{i}": 1 for i in range(9)}}, "tasks: expected 1 to 8 tasks, got 9"),
        ({"tasks": {"a.b": 1}}, "tasks: expected names that can name a module, got 'a.b'"),
        ({"tasks": {"keys": 1}}, "tasks: expected names that can name a module, got 'keys'"),
        ({"tasks": {"depth": 0}}, r"tasks\['depth'\]: expected at least 1 channel, got 0"),
        ({"heads": 3}, "heads: expected a divisor of dim = 8, got 3"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"in_channels": ()}, "in_channels: expected positive channel counts"),
        ({"in_channels": (3, 0)}, "in_channels: expected positive channel counts"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"in_channels": (3, 4), "tasks": {"depth": 1}, "dim": 8} | change
    with pytest.raises(ValueError, match=message):
        DeGMixHead(arguments.pop("in_channels"), arguments.pop("tasks"), **arguments)


def test_bad_features():
    head = DeGMixHead((3, 4), {"depth": 1}, dim=8)
    good = [torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 2, 2)]
    with pytest.raises(ValueError, match="features: expected 2 maps, got 1"):
        head(good[:1], (8, 8))
    message = r"features\[1\]: expected shape \(B, 4, H, W\) .*got \(1, 3, 4, 4\)"
    with pytest.raises(ValueError, match=message):
        head([good[0], good[0]], (8, 8))
    message = r"size: expected \(height, width\), integers of at least 1, got \(8, 0\)"
    with pytest.raises(ValueError, match=message):
        head(good, (8, 0))


def test_offsets_in_fp32_are_the_fp64_ones_but_for_their_rounding():
    """Large coordinates must not cost the small learned positions their digits."""
    torch.manual_seed(0)
    offsets = Offsets(32)
    torch.nn.init.normal_(offsets.p_conv.weight, std=0.05)
    x = torch.randn(1, 32, 53, 70)
    rounded = offsets(x).double()
    expected = offsets.double()(x.double())
    # The most that rounding the exact result to fp32 can cost.
    assert relative_l2(rounded, expected) <= torch.finfo(torch.float32).eps / 2
