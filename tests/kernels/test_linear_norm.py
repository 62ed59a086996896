"""``linear_norm`` beyond what every op is tested for: blocks of parameters, many parts, bad input."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from contract import compare
from contract import draw as draw_double
from torch import Tensor

from degmix_kernels import linear_norm, use_backend
from degmix_kernels.backend import INTERPRETED
from degmix_kernels.linear_norm import plan

NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias", "addend", "residual")


draw = partial(draw_double, dtype=torch.float32)


def arguments(blocks: int, batch: int, tokens: int, inner: int, out: int) -> dict[str, Tensor]:
    vectors = {name: draw(blocks, out, seed=i) for i, name in enumerate(("bias", "norm_weight", "norm_bias"))}
    maps = {name: draw(batch, tokens, out, seed=3 + i) for i, name in enumerate(("addend", "residual"))}
    x, weight = draw(batch, tokens, inner, seed=5), draw(blocks, out, inner, seed=6) / inner**0.5
    return {"x": x, "weight": weight, **vectors, **maps}


@pytest.mark.parametrize(
    ("blocks", "batch", "tokens", "inner", "out"),
    [(2, 2, 70, 20, 24), (3, 6, 5, 7, 33), (4, 4, 1, 16, 16), (1, 2, 9, 8, 8), (2, 0, 5, 6, 7)],
)
def test_blocks_are_calls_of_their_own(device, blocks, batch, tokens, inner, out):
    every = {name: value.to(device) for name, value in arguments(blocks, batch, tokens, inner, out).items()}

    def block_by_block(**every):
        results = []
        for block in range(blocks):
            part = slice(block * batch // blocks, (block + 1) * batch // blocks)
            own = {name: value[block if name in NAMES[1:5] else part] for name, value in every.items()}
            results.append(linear_norm(**own))
        return torch.cat(results)

    compare(linear_norm, block_by_block, every, inner * out)


def test_parts_end_in_the_middle_and_at_a_block_s_end(device, monkeypatch):
    """More tiles than the backward pass has programs."""
    monkeypatch.setattr(plan, "_PROGRAMS", 5)
    every = {name: value.to(device) for name, value in arguments(2, 2, 83, 4, 500).items()}
    compare(linear_norm, linear_norm, every, 83 * 500 * 4, wanted=NAMES[1:5])


def test_many_blocks_have_64_bit_addresses():
    """Where neither x nor the result is large, but the parameters or the sums of their gradients are."""
    x, output = (torch.empty(4097, 1, n, device="meta", dtype=torch.bfloat16) for n in (1024, 512))
    weight, vector = output.new_empty(4097, 512, 1024), output.new_empty(4097, 512)
    for blocks, wide in ((4097, True), (1000, False)):
        given = x[:blocks], weight[:blocks], None, vector[:blocks], vector[:blocks]
        launch = plan.plan_forward(*given, None, None, output[:blocks], None, None, 1e-5)
        assert launch.constants["INDEX_64"] == wide
    for blocks, wide in ((1_500_000, True), (1000, False)):
        normed = torch.empty(blocks, 1, 512, device="meta")
        launch, _ = plan.plan_backward(normed, normed, normed[:, 0, 0], normed[:, 0], normed)
        assert launch.constants["INDEX_64"] == wide


@pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or the interpreter"
)
def test_wider_than_a_program_warns(device):
    given = {name: value.to(device) for name, value in arguments(1, 1, 2, 3, 513).items()}
    with use_backend("triton"), pytest.warns(UserWarning, match="more than 512 out channels"):
        linear_norm(**given)
