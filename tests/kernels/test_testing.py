"""The yardstick of the other tests."""

from __future__ import annotations

import math

import pytest
import torch

from degmix_kernels import testing
from degmix_kernels.registry import OPS
from degmix_kernels.testing import assert_close, relative_l2, tolerance


def test_a_shared_root_counts_in_full_each_time():
    assert tolerance(torch.float32, 1, roots=3) == tolerance(torch.float32, 1) + 3 * testing.RSQRT
    assert tolerance(torch.float64, 1, roots=3) == tolerance(torch.float64, 1)
    one, root = torch.ones(1, dtype=torch.float64), 1 + testing.RSQRT
    assert_close(one * root**3, one, 1, torch.float32, roots=3)
    with pytest.raises(AssertionError, match="relative L2 error"):
        assert_close(one * root**3, one, 1, torch.float32)


def test_what_cancels_is_measured_by_its_terms():
    terms = torch.tensor([3.0, -4.0])
    nothing, rest = torch.zeros(2), torch.tensor([0.0, 1e-6])
    assert relative_l2(rest, nothing) == math.inf
    assert relative_l2(rest, nothing, terms) == pytest.approx(2e-7)
    assert relative_l2(rest, nothing, nothing) == math.inf
    assert math.isnan(relative_l2(rest * math.nan, nothing, terms))
    with pytest.raises(AssertionError, match="relative L2 error nan"):
        assert_close(rest * math.nan, rest, 1)
    more = terms + rest
    assert relative_l2(more, terms, terms / 2) == relative_l2(more, terms)  # larger than these
    assert_close(rest, nothing, 1, terms=terms)
    with pytest.raises(AssertionError, match="relative L2 error"):
        assert_close(rest, nothing, 1, terms=terms / 10)


def test_gradients_that_cancel_are_zero_and_their_terms_are_not():
    """Scores of one key all do; behind a norm of the batch, a gradient of ones does."""
    found = set()
    for op in OPS:
        for sample in op.samples(torch.device("cpu"), torch.float64, torch.Generator().manual_seed(0)):
            if sample.terms is None:
                continue
            leaves = {
                name: value.requires_grad_() if name in op.differentiable else value
                for name, value in sample.arguments.items()
                if value is not None
            }
            output = op.reference(**leaves)
            grad = torch.ones_like(output)
            for name, terms in sample.terms(sample.arguments, grad).items():
                (gradient,) = torch.autograd.grad(output, leaves[name], grad, retain_graph=True)
                assert gradient.norm() <= 1e-14 * terms.norm()
                assert terms.numel() == 0 or terms.norm() > 0
                found.add((op.name, name))
    cancelling = {"gated_attention": ("query", "key"), "channel_mix": ("weight", "bias")}
    assert found == {(op, name) for op, names in cancelling.items() for name in names}
