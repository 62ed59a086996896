"""``replace_deform_conv``: torchvision's layers become ours, and nothing else about the model changes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import degmix_kernels
from degmix_kernels import DeformConv2d, replace_deform_conv
from degmix_kernels.testing import assert_close, relative_l2


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    """What the layers compute is tested elsewhere; the reference is quick."""
    with degmix_kernels.use_backend("reference"):
        yield


def call(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The layer, 4 input channels and any kernel, on a 7×8 map with one offset group and a mask."""
    generator = torch.Generator().manual_seed(0)
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    size = [
        (extent + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for extent, padding, dilation, kernel, stride in zip(
            (7, 8), layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    shapes = ((2, 4, 7, 8), (2, 2 * taps, *size), (2, taps, *size))
    return layer(*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes))


class Network(nn.Module):
    """Layers in a list, a sequence and an attribute, one of them used twice, beside others."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.first = layer(4, 4, 1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ModuleList([layer(4, 6, (3, 2), stride=(2, 1))]))
        self.again = self.first
        self.other = nn.Linear(3, 2)


def test_replaces_all_and_names_them(torchvision: ModuleType) -> None:
    model = Network(torchvision.ops.DeformConv2d)
    before = {name: call(model.get_submodule(name)) for name in ("first", "body.1.0")}
    saved = copy.deepcopy(model.state_dict())
    report = replace_deform_conv(model)
    assert report.replaced == ("first", "body.1.0")
    assert report.kept == {}
    assert str(report) == "replaced 2 deformable convolutions: first, body.1.0"
    assert not any(isinstance(module, torchvision.ops.DeformConv2d) for module in model.modules())
    assert model.again is model.first
    for name, expected in before.items():
        layer = model.get_submodule(name)
        assert type(layer) is DeformConv2d
        assert_close(call(layer), expected.double(), 36)
    assert list(model.state_dict()) == list(saved)
    model.load_state_dict(saved)
    assert torch.equal(call(copy.deepcopy(model).first), call(model.first))
    assert repr(model) == repr(Network(DeformConv2d))
    assert str(replace_deform_conv(model)) == "replaced 0 deformable convolutions"


def test_the_model_itself_may_be_a_layer_and_runs_our_op(
    torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torchvision.ops.DeformConv2d(4, 4, 3)
    report = replace_deform_conv(layer)
    assert report.replaced == ("",)
    assert str(report) == "replaced 1 deformable convolution: the model itself"
    assert type(layer) is DeformConv2d
    monkeypatch.setattr(degmix_kernels.deform_conv.module, "deform_conv2d", lambda *arguments: "ours")
    assert call(layer) == "ours"


def test_a_replaced_layer_has_every_attribute_of_ours(torchvision: ModuleType) -> None:
    """The layer keeps its own attributes, so ours must not need another one."""
    arguments = {"kernel_size": (3, 2), "stride": 2, "padding": (1, 0), "dilation": 2, "groups": 2}
    theirs = torchvision.ops.DeformConv2d(4, 6, **arguments, bias=False)
    replace_deform_conv(theirs)
    ours = DeformConv2d(4, 6, **arguments, bias=False)
    assert vars(theirs).keys() == vars(ours).keys()
    assert repr(theirs) == repr(ours)


def test_parameters_are_the_same_objects(torchvision: ModuleType) -> None:
    """So an optimizer made before goes on working, tied weights stay tied, frozen ones frozen."""
    model = nn.ModuleList(torchvision.ops.DeformConv2d(4, 4, 1) for _ in range(2)).double().eval()
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    model[1].train()
    before, optimizer = list(model.named_parameters()), torch.optim.SGD(model.parameters(), lr=1.0)
    replace_deform_conv(model)
    after = list(model.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before] == ["0.weight", "0.bias", "1.bias"]
    assert all(new is old for (_, new), (_, old) in zip(after, before, strict=True))
    assert model[1].weight is model[0].weight
    assert not model[0].bias.requires_grad
    assert (model[0].training, model[1].training) == (False, True)
    output = call(model[0], torch.float64)
    assert output.dtype == torch.float64
    weight = model[0].weight.detach().clone()
    output.sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, weight)


def test_hooks_and_buffers_stay(torchvision: ModuleType) -> None:
    layer = torchvision.ops.DeformConv2d(4, 4, 1)
    layer.register_buffer("steps", torch.zeros(()))
    seen = []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    layer.register_forward_hook(lambda module, inputs, output: output * 0)
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward"))
    replace_deform_conv(layer)
    output = call(layer)
    output.sum().backward()
    assert not output.any()
    assert seen == ["before", "backward"]
    assert "steps" in dict(layer.named_buffers())


@pytest.mark.parametrize("how", ["parametrization", "hook"])
def test_weight_norm(how: str, torchvision: ModuleType) -> None:
    model = nn.Sequential(torchvision.ops.DeformConv2d(4, 6, 3), torchvision.ops.DeformConv2d(4, 6, 3))
    layer = model[0]
    if how == "parametrization":
        parametrizations.weight_norm(layer)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in many published models
            nn.utils.weight_norm(layer)
    before, names = call(layer), [name for name, _ in model.named_parameters()]
    assert replace_deform_conv(model).replaced == ("0", "1")
    assert isinstance(layer, DeformConv2d)
    assert not isinstance(layer, torchvision.ops.DeformConv2d)
    assert [name for name, _ in model.named_parameters()] == names
    assert_close(call(layer), before.double(), 36)
    scale = next(value for name, value in layer.named_parameters() if "original0" in name or "_g" in name)
    scale.data.mul_(2)  # the weight still follows its parameters
    bias = layer.bias[:, None, None]
    assert relative_l2(call(layer) - bias, 2 * (before - bias)) < 1e-6
    if how == "parametrization":
        assert torch.equal(call(copy.deepcopy(layer)), call(layer))
        parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is DeformConv2d


def test_subclasses_and_patched_layers_are_kept_and_named(torchvision: ModuleType) -> None:
    class Packed(torchvision.ops.DeformConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Renamed(torchvision.ops.DeformConv2d):
        pass

    model = nn.ModuleList([Packed(4, 4, 1), Renamed(4, 4, 1)] + [torchvision.ops.DeformConv2d(4, 4, 1)] * 2)
    model.append(torchvision.ops.DeformConv2d(4, 4, 1))
    parametrizations.weight_norm(model[1])
    original = model[4].forward
    model[4].forward = lambda *inputs: original(*inputs)
    kinds = [type(layer) for layer in model]
    report = replace_deform_conv(model)
    assert report.replaced == ("2",)
    assert list(report.kept) == ["0", "1", "4"]
    assert [type(model[index]) for index in (0, 1, 4)] == [kinds[0], kinds[1], kinds[4]]
    first, second, third, fourth = str(report).splitlines()
    assert first == "replaced 1 deformable convolution: 2"
    assert second.startswith("kept 0: ")
    assert "Packed is a subclass" in second
    assert "Renamed is a subclass" in third
    assert fourth == "kept 4: its forward was replaced on the instance"


def test_nothing_to_swap() -> None:
    report = replace_deform_conv(nn.Sequential(nn.Linear(2, 2), DeformConv2d(2, 2, 1)))
    assert (report.replaced, report.kept) == ((), {})
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got list"):
        replace_deform_conv([nn.Linear(2, 2)])
