"""Attention over tasks against loops over pixels, heads and tasks."""

import math

import pytest
import torch
from torch import nn

from degmix_kernels import TaskAttention, task_attention, use_backend
from degmix_kernels.testing import assert_close


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formula(query, key, value, heads):
    batch, queries, pixels, channels = query.shape
    dim = channels // heads
    output = torch.zeros_like(query)
    for b in range(batch):
        for s in range(queries):
            for n in range(pixels):
                for h in range(heads):
                    own = slice(h * dim, (h + 1) * dim)
                    scores = [query[b, s, n, own] @ k[n, own] / math.sqrt(dim) for k in key[b]]
                    total = sum(score.exp() for score in scores)
                    for score, v in zip(scores, value[b], strict=True):
                        output[b, s, n, own] += score.exp() / total * v[n, own]
    return output


@pytest.mark.parametrize(("queries", "tasks", "heads"), [(1, 4, 2), (3, 3, 1), (2, 8, 3), (1, 1, 6)])
def test_formula_and_gradients(queries, tasks, heads):
    query, key, value = draw(2, queries, 3, 6), draw(2, tasks, 3, 6, seed=1), draw(2, tasks, 3, 6, seed=2)
    inputs = [t.requires_grad_() for t in (query, key, value)]
    got, want = task_attention(query, key, value, heads), formula(query, key, value, heads)
    assert_close(got, want, 8)
    probe = draw(*got.shape, seed=3)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, probe), torch.autograd.grad(want, inputs, probe), strict=True
    ):
        # One task leaves queries and keys without effect: their gradients are rounding noise.
        assert_close(ours + 1, theirs + 1, 48)


def test_module_is_multihead_attention_at_each_pixel():
    torch.manual_seed(0)
    module, plain = TaskAttention(6, 2).double(), nn.MultiheadAttention(6, 2, batch_first=True).double()
    assert sorted(module.state_dict()) == sorted(plain.state_dict())
    plain.load_state_dict(module.state_dict())
    query, context = draw(2, 1, 5, 6), draw(2, 4, 5, 6, seed=1)
    got = module(query, context)
    for pixel in range(5):
        keys = context[:, :, pixel]
        assert_close(got[:, :, pixel], plain(query[:, :, pixel], keys, keys)[0], 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 3, 4)}, ValueError, "query: expected 4 dimensions"),
        ({"heads": 4}, ValueError, "heads: expected a divisor of 6 channels, got 4"),
        ({"heads": 0}, ValueError, "heads: expected a divisor"),
        ({"heads": 2.0}, TypeError, "heads: expected an integer"),
        ({"key": torch.zeros(1, 9, 5, 6)}, ValueError, "key: expected 1 to 8 tasks on axis 1, got 9"),
        ({"value": torch.zeros(1, 3, 5, 6)}, ValueError, "value: expected shape"),
        ({"value": torch.zeros(1, 4, 5, 6).double()}, TypeError, "value: expected dtype torch.float32"),
    ],
)
def test_bad_input(change, error, message):
    tensors = {
        "query": torch.zeros(1, 2, 5, 6),
        "key": torch.zeros(1, 4, 5, 6),
        "value": torch.zeros(1, 4, 5, 6),
    }
    with pytest.raises(error, match=message):
        task_attention(**(tensors | {"heads": 2} | change))


def test_forcing_triton_says_that_there_is_no_kernel():
    x = torch.zeros(1, 2, 5, 6)
    with (
        use_backend("triton"),
        pytest.warns(UserWarning, match="task_attention: this op has no Triton kernel yet"),
    ):
        task_attention(x, x, x, 2)
