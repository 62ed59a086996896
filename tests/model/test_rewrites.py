"""The head computes what :mod:`degmix.model.formula` writes out, with fewer operations: same function, same
gradients, of the same parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from contract import draw
from test_head import every_attention, small_features, small_head
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from degmix import DeGMixHead
from degmix.model import formula as plain
from degmix.model import mixer
from degmix.model.decoder import TaskInteraction, TaskQuery, attend_pixels, fold
from degmix.model.formula import formula
from degmix.model.mixer import Offsets, constant_tables
from degmix_kernels import coordinate_bias
from degmix_kernels.testing import relative_l2

TOLERANCE = 1e-10


def run(head: DeGMixHead, forward, features: list[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """Predictions, gradients of features and parameters, and buffers after one step, by name."""
    head, features = copy.deepcopy(head), [feature.clone().requires_grad_() for feature in features]
    predictions = forward(head, features, size)
    loss = sum((p * draw(*p.shape, seed=7).to(p)).sum() for p in predictions.values())
    wanted = {f"features {i}": feature for i, feature in enumerate(features)} | dict(head.named_parameters())
    gradients = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    found = {f"prediction of {task}": prediction.detach() for task, prediction in predictions.items()}
    found |= {f"gradient of {name}": grad for name, grad in zip(wanted, gradients, strict=True)}
    return found | {name: buffer.double() for name, buffer in head.named_buffers()}


def assert_formula(head: DeGMixHead, features: list[Tensor], size: tuple[int, int]) -> None:
    got, want = (run(head, forward, features, size) for forward in (DeGMixHead.__call__, formula))
    assert list(got) == list(want)
    for name, expected in want.items():
        assert got[name].shape == expected.shape, name
        if expected.norm() < 1e-12:  # such as the gradient of a key's bias: no more than rounding
            assert got[name].norm() < 1e-9, name
        else:
            assert relative_l2(got[name], expected) < TOLERANCE, name


@every_attention
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("tasks", "batch", "height", "width", "depth"), [(3, 2, 7, 9, 2), (1, 1, 5, 6, 1), (3, 4, 1, 2, 1)]
)
def test_head_is_the_formula(attention, training, tasks, batch, height, width, depth):
    if attention == "linear" and training and batch * height * width < 100:
        height, width = 5 * height, 5 * width  # a BatchNorm needs more than one token
    head = small_head(attention, tasks, depth).train(training)
    assert_formula(head, small_features(batch, height, width), (2 * height + 1, 3 * width))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("together", [1, 2, 3])
def test_tasks_mix_together_or_alone(together, training, monkeypatch):
    """As many as fit; the last of three is alone where two fit."""
    head, features = small_head("pixel", 3, 2).train(training), small_features(2, 7, 9)
    with torch.no_grad():
        map_bytes = head.embed(features).numel() * 8
    monkeypatch.setattr(mixer, "TOGETHER_BYTES", together * 2 * map_bytes)
    sizes = []
    original = mixer.mix_tasks

    def spy(mixers, *arguments):
        sizes.append(len(mixers))
        return original(mixers, *arguments)

    monkeypatch.setattr(mixer, "mix_tasks", spy)
    assert_formula(head, features, (15, 27))
    assert sizes == {1: [], 2: [2, 1], 3: [3]}[together]


def test_tasks_whose_norms_differ_mix_alone(monkeypatch):
    """One task's norms are frozen, and another's average is cumulative."""
    head, features = small_head("pixel", 3, 2).train(), small_features(2, 7, 9)
    first, second, _ = head.mixers.values()
    first.eval()
    second[0].norm.momentum = None
    monkeypatch.setattr(mixer, "mix_tasks", None)
    assert_formula(head, features, (15, 27))


@pytest.mark.parametrize("removed", [("running_mean", "running_var"), ("num_batches_tracked",)])
def test_norms_without_buffers(removed):
    head, features = small_head("pixel", 3, 2).train(), small_features(2, 7, 9)
    for layers in head.mixers.values():
        for layer in layers:
            for norm in layer.norms:
                for name in removed:
                    setattr(norm, name, None)
    assert_formula(head, features, (15, 27))


def test_an_empty_batch_has_no_gradient(device):
    head = small_head("pixel").float().to(device)
    features = [feature[:0].float().to(device) for feature in small_features(1, 8, 8)]
    sum(prediction.sum() for prediction in head(features, (9, 9)).values()).backward()
    assert all(parameter.grad is None or (parameter.grad == 0).all() for parameter in head.parameters())


def test_sizes_stay_dynamic_in_a_compiled_head():
    head = DeGMixHead((3, 4), {"one": 1, "two": 2}, depth=1, dim=8).eval()
    features = [draw(2, *shape).float() for shape in ((3, 40, 56), (4, 20, 28))]
    for feature in features:
        torch._dynamo.mark_dynamic(feature, 2)
        torch._dynamo.mark_dynamic(feature, 3)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")  # raises if one became a constant
    want = head(features, (9, 9))
    for task, prediction in compiled(features, (9, 9)).items():
        torch.testing.assert_close(prediction, want[task])


def test_hooks_of_a_layer_are_called():
    head, features, calls = small_head("pixel", 3, 2), small_features(2, 7, 9), []
    hook = head.mixers["task2"][1].deform_mix.register_forward_hook(lambda *_: calls.append(0))
    want = head(features, (15, 27))
    assert calls == [0]
    hook.remove()
    for task, prediction in head(features, (15, 27)).items():
        assert relative_l2(prediction, want[task]) < TOLERANCE
    assert calls == [0]


@every_attention
def test_as_many_heads_and_maps_as_there_may_be(attention):
    head = DeGMixHead((3,), {"one": 2, "two": 1}, attention=attention, depth=1, dim=8, heads=4).double()
    assert_formula(head, [draw(2, 3, 9, 10)], (18, 20))


def grid_offsets(offsets: Offsets, height: int, width: int) -> Tensor:
    """The constant part from the whole grid."""
    grid = plain.window_grid(height, width, like=offsets.p_conv.bias.double())
    grid = grid + offsets.p_conv.bias.double()[:, None, None]
    weight, bias = offsets.opt.weight.double(), offsets.opt.bias.double()
    return functional.conv2d(grid, weight, bias, padding=1, groups=2)


@pytest.mark.parametrize("height", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 13])
def test_constant_offsets_are_those_of_the_whole_grid(height, width):
    layers = [Offsets(4).double() for _ in range(2)]
    every = constant_tables(layers, height, width, torch.float64)
    every = coordinate_bias(torch.zeros(1, 16, height, width, dtype=torch.float64), *every)
    for layer, got in zip(layers, every.chunk(2, 1), strict=True):
        want = grid_offsets(layer, height, width)
        assert got.shape == want.shape == (1, 8, height, width)
        wanted = (layer.opt.weight, layer.opt.bias, layer.p_conv.bias)
        probe = draw(*want.shape)
        for one, other in zip(
            (got, *torch.autograd.grad((got * probe).sum(), wanted, retain_graph=True)),
            (want, *torch.autograd.grad((want * probe).sum(), wanted)),
            strict=True,
        ):
            assert relative_l2(one, other) < TOLERANCE


def test_constant_offsets_of_single_precision_are_computed_in_double(device):
    """In fp32 the sums of far coordinates would lose digits, in TF32 most; autocast has no say in it."""
    offsets = Offsets(16).to(device)
    want = grid_offsets(offsets, 60, 90).float()
    with torch.autocast(device.type, torch.bfloat16):
        tables = constant_tables([offsets], 60, 90, torch.float32)
    got = coordinate_bias(torch.zeros(1, 32, 60, 90, device=device), *tables)
    assert got.dtype == torch.float32
    assert relative_l2(got, want) < 1e-8  # but for an element that rounds to the other side


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (6, 5)])
def test_offsets_compile_into_one_graph(height, width):
    offsets, x = Offsets(4), torch.randn(2, 4, height, width)
    compiled = torch.compile(offsets, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), offsets(x))


def random_blocks(blocks: list, seed: int) -> list:
    for index, parameter in enumerate(p for block in blocks for p in block.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed + index) / parameter.shape[-1] ** 0.5
    return blocks


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("shared", [False, True])
def test_keys_fold_into_queries(tasks, heads, shared):
    """Against ``nn.MultiheadAttention``'s formula at every pixel; one block for all tasks or for each."""
    batch, pixels, dim = 2, 5, 8
    kind, count = (TaskInteraction, 1) if shared else (TaskQuery, tasks)
    blocks = random_blocks([kind("pixel", dim, heads).double() for _ in range(count)], seed=1)
    queries = draw(tasks, batch, pixels, dim, seed=2).requires_grad_()
    context = draw(tasks, batch, pixels, dim, seed=3).requires_grad_()
    got = attend_pixels(fold(blocks), heads, queries, context).view(queries.shape)
    every = context.permute(1, 2, 0, 3).flatten(0, 1)
    want = []
    for own, block in zip(queries, blocks * tasks if shared else blocks, strict=True):
        attended = plain.multihead_attention(block.attention, own.flatten(0, 1)[:, None], every)
        want.append(block.norm(block.linear(attended)).view(own.shape))
    probe = draw(*got.shape, seed=4)
    wanted = [queries, context, *(p for block in blocks for p in block.parameters())]
    pairs = [(got, torch.stack(want))]
    gradients = (
        torch.autograd.grad((each * probe).sum(), wanted, materialize_grads=True) for each in pairs[0]
    )
    for one, other in (*pairs, *zip(*gradients, strict=True)):
        assert relative_l2(one, other) < TOLERANCE or (one - other).norm() < TOLERANCE


@pytest.mark.parametrize("attention", ["released", "linear"])
def test_pointwise_interaction_is_one_product(attention):
    (block,) = random_blocks([TaskInteraction(attention, 8, 2).double()], seed=5)
    weight, bias = block.merge_pointwise(torch.float64)
    tokens = draw(6, 8)
    projected = block.attention.out_proj(block.attention.project_value(tokens))
    assert relative_l2(functional.linear(tokens, weight, bias), block.linear(projected)) < TOLERANCE


def test_autocast_does_not_touch_the_matrices_that_are_merged():
    (block,) = random_blocks([TaskInteraction("released", 8, 2)], seed=6)
    block.float()
    outside = block.merge_pointwise(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = block.merge_pointwise(torch.float32)
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one, other)


class Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result


@pytest.mark.parametrize("attention", ["released", "pixel", "global"])
def test_the_concatenation_of_upsampled_maps_never_exists(attention):
    """No tensor has all maps' channels, or one map's channels at more pixels than the map has."""
    head, features = small_head(attention, dim=12).train(), small_features(2, 7, 9)
    for feature in features:
        feature.requires_grad_()

    def wide(forward) -> set[tuple[int, ...]]:
        with Shapes() as shapes:
            sum(p.sum() for p in forward(head, features, (14, 18)).values()).backward()
        pixels = (2 * 7 * 9, 7 * 9)
        return {
            shape
            for shape in shapes.seen
            if sum(head.in_channels) in shape and any(torch.Size(shape).numel() // 16 == n for n in pixels)
        }

    assert sum(head.in_channels) == 16
    assert wide(formula)
    assert not wide(DeGMixHead.__call__)
