"""What the backward pass computes again is what the forward pass had."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from contract import draw
from test_head import every_attention, small_features, small_head
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from degmix.info import _Storages
from degmix.model import decoder
from degmix.model.recompute import recomputed
from degmix_kernels import GatedAttention, use_backend
from degmix_kernels.testing import relative_l2


def square(x: Tensor, layer: nn.Linear) -> Tensor:
    """The sum of squares of a Linear's result, which is not kept."""
    hidden = layer(x)
    with recomputed([(hidden, functional.linear, (x, layer.weight, layer.bias))]):
        return (hidden * hidden).sum()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_gradients_are_those_of_the_forward_pass(dtype):
    x, layer = draw(3, 5).float().requires_grad_(), nn.Linear(5, 4)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        hidden = layer(x)
        want = (hidden * hidden).sum()
        got = square(x, layer)
    wanted = (x, *layer.parameters())
    for one, other in zip(torch.autograd.grad(got, wanted), torch.autograd.grad(want, wanted), strict=True):
        assert torch.equal(one, other)


def test_a_changed_parameter_is_refused():
    x, layer = torch.ones(3, 5, requires_grad=True), nn.Linear(5, 4)
    result = square(x, layer)
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        result.backward()


def test_other_parts_of_the_same_memory_are_kept():
    x, calls = torch.arange(6.0, requires_grad=True), []
    whole = x * 1
    first, second = whole.split(3)
    with recomputed([(first, lambda x: calls.append(0) or x[:3], (x,))]):
        result = (first * second).sum()
    (grad,) = torch.autograd.grad(result, x)
    assert torch.equal(grad, torch.tensor([3.0, 4.0, 5.0, 0.0, 1.0, 2.0]))
    assert len(calls) == 1


def test_nothing_lives_on_without_a_backward_pass():
    """rsqrt keeps its own result."""
    x = torch.ones(5, requires_grad=True)
    hidden = x * 2
    with recomputed([(hidden, lambda x: x * 2, (x,))]):
        result = (hidden * hidden).rsqrt()
    result = weakref.ref(result.untyped_storage())
    assert result() is None


@every_attention
def test_a_head_leaves_nothing_behind(attention):
    head, features = small_head(attention), [f.requires_grad_() for f in small_features(2, 8, 8)]
    head(features, (9, 9))  # the first call imports what PyTorch imports late
    gc.collect()
    gc.disable()
    try:
        with _Storages() as made:
            head(features, (9, 9))
        left = {id(storage) for storage in made.alive()}
    finally:
        gc.enable()
    assert not left


@every_attention
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_inference_mode_takes_tensors_made_in_it(attention, training):
    head, features = small_head(attention).train(training), small_features(2, 16, 16)
    want = head(features, (9, 9))
    with torch.inference_mode():
        got = head([feature * 1 for feature in features], (9, 9))
    with torch.no_grad():
        again = head(features, (9, 9))
    for task, prediction in got.items():
        assert relative_l2(prediction, want[task]) < 1e-12
        assert relative_l2(again[task], want[task]) < 1e-12


@every_attention
def test_no_parameter_changes_unnoticed(attention):
    """Between forward and backward pass; the gradient would belong to neither value."""
    head = small_head(attention, tasks=1)
    features = [feature.requires_grad_() for feature in small_features(2, 8, 8)]

    def loss() -> Tensor:
        return sum(prediction.sum() for prediction in head(features, (9, 9)).values())

    refused = 0
    for parameter in head.parameters():
        want = torch.autograd.grad(loss(), features)
        result = loss()
        with torch.no_grad():
            parameter.mul_(2)
        try:
            got = torch.autograd.grad(result, features)
        except RuntimeError:
            refused += 1
        else:  # its value is not needed, or its old one was kept
            assert all(relative_l2(one, other) < 1e-12 for one, other in zip(got, want, strict=True))
    assert refused > 10


# "linear" has few tokens, more matrices.
@pytest.mark.parametrize("attention", ["released", "pixel", "global"])
def test_a_checkpoint_around_the_head_frees_most_of_what_it_keeps(attention):
    head, features = small_head(attention), [f.requires_grad_() for f in small_features(2, 16, 16)]

    def total(*features: Tensor) -> Tensor:
        return sum(prediction.square().sum() for prediction in head(features, (9, 9)).values())

    with _Storages() as made:
        want = total(*features)
    kept = sum(storage.nbytes() for storage in made.alive())
    with _Storages() as made:
        got = checkpoint(total, *features, use_reentrant=False)
    assert sum(storage.nbytes() for storage in made.alive()) < kept / 4
    gradients = [torch.autograd.grad(each, features) for each in (got, want)]
    for one, other in zip(*gradients, strict=True):
        assert relative_l2(one, other) < 1e-12


def test_the_backend_of_the_forward_pass_computes_again(device):
    head = small_head("pixel").float().to(device)
    for forward, backward in (("reference", "auto"), ("auto", "reference")):
        with use_backend(forward):
            features = [f.float().to(device).requires_grad_() for f in small_features(1, 8, 8)]
            result = sum(prediction.sum() for prediction in head(features, (9, 9)).values())
        with use_backend(backward):
            result.backward()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("own", [False, True], ids=["another", "itself"])
def test_attention_over_tokens_projects_again_to_the_same_values(own, dtype):
    attention = GatedAttention(8, 2)
    nn.init.normal_(attention.in_proj_bias)
    tokens, context = (draw(*n, 8, seed=1).float().requires_grad_() for n in ((1, 2, 5), (2, 7)))
    wanted = (*([] if own else [tokens]), context, attention.in_proj_weight, attention.in_proj_bias)
    results = []
    for again in (recomputed, lambda *_: nullcontext()):
        with (
            torch.autocast("cpu", dtype, enabled=dtype is not None),
            patch.object(decoder, "recomputed", again),
        ):
            if own:
                attended = decoder.attend_all_tokens(attention, context)
            else:
                (attended,) = decoder.attend_tokens([attention], tokens, context)
        results.append((attended, *torch.autograd.grad(attended.square().sum(), wanted)))
    # The same products, though not of matrices of the same shape.
    tolerance = 1e-6 if dtype is None else 2**-8
    for one, other in zip(*results, strict=True):
        assert relative_l2(one, other) < tolerance
