"""What the backward pass computes again is what the forward pass had."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from test_head import draw, every_attention, small_features, small_head
from torch import Tensor, nn

from degmix.info import _Storages
from degmix.model import decoder
from degmix.model.recompute import recomputed
from degmix_kernels import GatedAttention


def square(x: Tensor, layer: nn.Linear) -> Tensor:
    """The sum of squares of a Linear's result, which is not kept."""
    hidden = layer(x)
    with recomputed([(hidden, lambda: layer(x.detach()))], list(layer.parameters())):
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
    with recomputed([(first, lambda: calls.append(0) or whole.detach()[:3])], [x]):
        result = (first * second).sum()
    (grad,) = torch.autograd.grad(result, x)
    assert torch.equal(grad, torch.tensor([3.0, 4.0, 5.0, 0.0, 1.0, 2.0]))
    assert len(calls) == 1


def test_nothing_lives_on_without_a_backward_pass():
    """rsqrt keeps its own result."""
    x = torch.ones(5, requires_grad=True)
    hidden = x * 2
    with recomputed([(hidden, lambda: x.detach() * 2)], [x]):
        result = (hidden * hidden).rsqrt()
    result = weakref.ref(result.untyped_storage())
    assert result() is None


@every_attention
def test_a_head_leaves_nothing_behind(attention):
    head, features = small_head(attention), [f.requires_grad_() for f in small_features(2, 8, 8)]
    gc.collect()
    gc.disable()
    try:
        with _Storages() as made:
            head(features, (9, 9))
        left = {id(storage) for storage in made.alive()}
    finally:
        gc.enable()
    assert not left


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_attention_over_tokens_projects_again_to_the_same_values(dtype):
    attention = GatedAttention(8, 2)
    nn.init.normal_(attention.in_proj_bias)
    query, context = (draw(2, n, 8, seed=n).float().requires_grad_() for n in (5, 7))
    wanted = (query, context, attention.in_proj_weight, attention.in_proj_bias)
    results = []
    for again in (recomputed, lambda *_: nullcontext()):
        with (
            torch.autocast("cpu", dtype, enabled=dtype is not None),
            patch.object(decoder, "recomputed", again),
        ):
            attended = decoder.attend_tokens(attention, query, context)
        results.append((attended, *torch.autograd.grad(attended.square().sum(), wanted)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
