"""Attention over all tokens, with softmax and gate and without softmax, against sums written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from allocations import Allocations
from contract import compare, draw, every_dtype, saved_tensors
from launches import kernel_names, recorded_launches
from torch import Tensor, nn

from degmix_kernels import GatedAttention, LinearAttention, gated_attention, linear_attention, use_backend
from degmix_kernels.attention import linear_plan, plan, reference
from degmix_kernels.attention.module import join_heads
from degmix_kernels.testing import assert_close


def softmax_formula(query, key, value, gate=1, residual=0):
    weights = torch.exp(torch.einsum("bhnd,bhmd->bhnm", query, key) / math.sqrt(query.shape[3]))
    attended = torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(3, keepdim=True), value)
    return attended * gate + residual


def linear_formula(query, key, value, scale):
    return torch.einsum("bhnm,bhmd->bhnd", torch.einsum("bhnd,bhmd->bhnm", query, key), value) * scale


NAMES = ("query", "key", "value", "gate", "residual")


@pytest.mark.parametrize("given", [5, 3])
def test_gated_formula_and_gradients(given):
    shapes = ((2, 3, 7, 5), (2, 3, 9, 5), (2, 3, 9, 5), (2, 3, 7, 5), (2, 3, 7, 5))
    inputs = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    compare(gated_attention, softmax_formula, dict(zip(NAMES[:given], inputs, strict=False)), 100)


def test_linear_formula_and_gradients():
    inputs = [draw(2, 3, n, 5, seed=seed) for seed, n in enumerate((7, 9, 9))]
    compare_linear(inputs, 0.3, 45, linear_formula)


def test_gated_module_is_multihead_attention():
    torch.manual_seed(0)
    module, plain = GatedAttention(6, 2).double(), nn.MultiheadAttention(6, 2, batch_first=True).double()
    plain.load_state_dict(module.state_dict())
    query, context = draw(2, 5, 6), draw(2, 9, 6, seed=1)
    assert_close(module(query, context), plain(query, context, context)[0], 9)
    nothing = module(query, context, gate=torch.zeros_like(query))
    assert_close(nothing, module.out_proj.bias.expand_as(nothing), 9)


def test_linear_module():
    torch.manual_seed(0)
    module = LinearAttention(6, 2).double()
    query, context = draw(2, 5, 6), draw(2, 9, 6, seed=1)

    def heads(x):
        return torch.stack([x[..., :3], x[..., 3:]], dim=1)

    q, k, v = module.norm_q(query), module.norm_k(context), module.norm_v(context)
    q, k, v = q @ module.to_q.weight.T, k @ module.to_k.weight.T, v @ module.to_v.weight.T
    attended = linear_formula(heads(q), heads(k), heads(v), 3**-0.5)
    want = torch.cat([attended[:, 0], attended[:, 1]], dim=2) @ module.proj.weight.T + module.proj.bias
    assert_close(module(query, context), want, 50)
    assert not any(name.startswith("to_") and name.endswith("bias") for name in module.state_dict())


def test_wide_heads_keep_the_reference(device):
    x = draw(1, 1, 3, 129).float().to(device)
    for function, name, more in ((gated_attention, "gated", ()), (linear_attention, "linear", (0.5,))):
        message = f"{name}_attention: head dimension above 128 has no Triton kernel yet"
        with recorded_launches() as seen:
            quiet = function(x, x, x, *more)
            with use_backend("triton"), pytest.warns(UserWarning, match=message):
                assert torch.equal(function(x, x, x, *more), quiet)
        assert seen == []
        assert_close(quiet, getattr(reference, f"{name}_attention")(*[x.double()] * 3, *more), 129)


# --- Kernels -----------------------------------------------------------------------------------------------


def tokens(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: Any, strided: bool) -> Tensor:
    """(B, heads, N, D), with the heads inside the tokens if strided."""
    batch, heads, length, head_dim = shape
    if strided:
        x = draw(batch, length, heads * head_dim, seed=seed).to(device, dtype)
        return x.unflatten(2, (heads, head_dim)).transpose(1, 2)
    return draw(*shape, seed=seed).to(device, dtype)


def compare_gated(inputs: list[Tensor | None], reduction: int) -> None:
    tensors = dict(zip(NAMES, inputs, strict=True))
    compare(gated_attention, reference.gated_attention, tensors, reduction)


def compare_linear(
    inputs: list[Tensor], scale: float, reduction: int, plain: Callable = reference.linear_attention
) -> None:
    ours, plain = (partial(each, scale=scale) for each in (linear_attention, plain))
    compare(ours, plain, dict(zip(NAMES[:3], inputs, strict=True)), reduction)


@every_dtype
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "gate", "residual", "strided"),
    [
        (7, 9, 1, True, True, False),
        (130, 40, 5, True, False, True),
        (33, 64, 16, False, True, False),
        (64, 65, 40, False, False, True),
        (17, 33, 128, True, True, True),
    ],
)
def test_gated_kernels(device, dtype, queries, keys, head_dim, gate, residual, strided):
    lengths = (queries, keys, keys, queries if gate else None, queries if residual else None)
    batch = 1 if queries > 128 else 2
    inputs = [
        None if length is None else tokens((batch, 2, length, head_dim), seed, dtype, device, strided)
        for seed, length in enumerate(lengths)
    ]
    with recorded_launches() as seen:
        compare_gated(inputs, max(queries, keys, head_dim))
    assert kernel_names(seen) == ["forward", "prepare", "backward_query", "backward_context"]


@every_dtype
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "strided"), [(7, 9, 1, False), (130, 70, 5, True), (17, 33, 128, True)]
)
def test_linear_kernels(device, dtype, queries, keys, head_dim, strided):
    inputs = [
        tokens((2, 2, length, head_dim), seed, dtype, device, strided)
        for seed, length in enumerate((queries, keys, keys))
    ]

    with recorded_launches() as seen:
        compare_linear(inputs, 0.3, max(queries, keys) * head_dim)
    context, tokens_of = "multiply_tokens", "apply_matrix"
    assert kernel_names(seen) == [context, tokens_of, tokens_of, context, tokens_of, tokens_of]


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_views_that_share_memory_and_64_bit_addresses(device, monkeypatch, wide):
    """Keys and values from one projection, one query for the whole batch, a gate laid out otherwise."""
    if wide:
        for module in (plan, linear_plan):
            monkeypatch.setattr(module, "needs_64_bit", lambda *tensors: True)
    both = draw(2, 11, 2, 2, 6, seed=1).float().to(device)  # B, M, key or value, heads, D
    key, value = (each.transpose(1, 2) for each in both.unbind(2))
    query = draw(1, 2, 9, 6).float().to(device).expand(2, -1, -1, -1)
    gate = draw(2, 2, 6, 9, seed=2).float().to(device).mT
    with recorded_launches() as seen:
        compare_gated([query, key, value, gate, None], 11)
        compare_linear([query, key, value], 2.0, 66)
    assert {each.constants["INDEX_64"] for each in seen} == {wide}


def test_results_are_laid_out_as_their_queries(device):
    strided = [tokens((2, 3, 5, 4), seed, torch.float32, device, True).requires_grad_() for seed in range(3)]
    dense = [x.detach().contiguous().requires_grad_() for x in strided]
    mixed = [strided[0], dense[1], strided[2]]
    for function in (gated_attention, lambda *args: linear_attention(*args, 1.0)):
        results = []
        for inputs in (strided, dense, mixed):
            output = function(*inputs)
            results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
            for got, like in zip(results[-1], (inputs[0], *inputs), strict=True):
                assert got.stride() == like.stride()
        for got in zip(*results, strict=True):
            assert torch.equal(got[0], got[1])
            assert torch.equal(got[0], got[2])
        joined = join_heads(function(*strided))
        assert joined._base is not None  # a view
    gate = dense[0].detach().requires_grad_()  # laid out unlike its query
    output = gated_attention(*strided, gate)
    (gradient,) = torch.autograd.grad(output, gate, torch.ones_like(output))
    assert gradient.is_contiguous()
    assert torch.equal(gradient, gated_attention(*strided))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_and_equal_scores(device, dtype):
    """Scores of ±10⁴: one key has all the weight, or all keys have the same."""
    signs = torch.tensor([1.0, -1.0, 1.0]).view(1, 1, 3, 1)
    hot = torch.eye(16).view(1, 1, 16, 16)[:, :, :3] * 200
    query, key = hot * signs, torch.cat([hot, -hot], 2)
    value = draw(1, 1, 6, 16, seed=1).mul(4).round()
    query, key, value = (x.to(device, dtype).requires_grad_() for x in (query, key, value))
    output = gated_attention(query, key, value)
    assert_close(output, value[:, :, [0, 4, 2]].double(), 16)
    grads = torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
    # Weights of 0 and 1 have no derivative: exactly, if scores and their maximum are rounded alike, which
    # fused multiplications do not. Then a result in fp32 misses its value by its last bit, and so does the
    # gradient of a score: 16 such sums, times keys of 200 at a scale of 1/4.
    last_bit = 0 if dtype == torch.bfloat16 else 2.0**-23 * 16 * value.abs().max() * 200 / 4
    assert max(grads[0].abs().max(), grads[1].abs().max()) <= last_bit
    # The sum's logarithm is rounded to 24 bits of 14 427.
    chosen = torch.tensor([1.0, 0, 1, 0, 1, 0], device=device)[:, None].expand(6, 16).to(dtype)
    torch.testing.assert_close(grads[2][0, 0], chosen, rtol=1e-3, atol=0)

    key = torch.full((1, 1, 40, 16), 50.0, dtype=dtype, device=device)
    value = draw(1, 1, 40, 16, seed=2).to(device, dtype).requires_grad_()
    for size in (0.0, 200.0, -200.0):
        constant = torch.full((1, 1, 5, 16), size, dtype=dtype, device=device)
        output = gated_attention(constant, key, value)
        assert_close(output, value.double().mean(2, keepdim=True).expand_as(output), 40)
        (gradient,) = torch.autograd.grad(output, value, torch.ones_like(output))
        # Scores are 40 000 here: their logarithm's last bit is 0.004.
        expected = torch.full_like(gradient, 5 / 40)
        torch.testing.assert_close(gradient, expected, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=0)


def test_nan_stays_where_the_reference_has_it(device):
    shape = (2, 2, 37, 5)
    inputs = {name: draw(*shape, seed=seed).float().to(device) for seed, name in enumerate(NAMES)}
    for name in NAMES:
        spoiled = dict(inputs)
        spoiled[name] = inputs[name].clone()
        spoiled[name][1, 0, 35, 2] = torch.nan
        output = gated_attention(**spoiled)
        expected = reference.gated_attention(**{name: value.double() for name, value in spoiled.items()})
        assert torch.equal(output.isnan(), expected.isnan()), name
        assert 0 < output.isnan().sum() < output.numel() / 2
        assert_close(output.nan_to_num(0), expected.nan_to_num(0), 37)


def test_scores_of_minus_infinity(device):
    """A key that no query may see has no weight; a query that may see no key attends to nothing."""
    query, key, value, gate = (draw(1, 1, 37, 4, seed=seed).float().to(device) for seed in range(4))
    query[..., 0] = query[..., 0].abs() + 0.1
    key[:, :, :33, 0] = -torch.inf  # a whole block, and one more
    ours = [x.detach().requires_grad_() for x in (query, key, value, gate)]
    seen = [query, key[:, :, 33:], value[:, :, 33:], gate]
    seen = [x.detach().double().requires_grad_() for x in seen]
    output, expected = gated_attention(*ours), gated_attention(*seen)
    assert_close(output, expected, 37)
    grads = torch.autograd.grad(output, ours, torch.ones_like(output))
    wanted = torch.autograd.grad(expected, seen, torch.ones_like(expected))
    assert_close(grads[0][..., 1:], wanted[0][..., 1:], 37)  # of the first it is 0 · ∞
    assert grads[1][:, :, :33].count_nonzero() == grads[2][:, :, :33].count_nonzero() == 0
    assert_close(grads[1][:, :, 33:], wanted[1], 37)
    assert_close(grads[2][:, :, 33:], wanted[2], 37)
    assert_close(grads[3], wanted[3], 37)

    key[..., 0] = -torch.inf
    output = gated_attention(query, key, value, gate, gate)
    assert torch.equal(output, gate)
    # In fp64: PyTorch's fused kernels for fp32 need not agree on rows without a finite score.
    query, key, value, gate = (x.double() for x in (query, key, value, gate))
    assert_close(output, reference.gated_attention(query, key, value, gate, gate), 37)
    query[0, 0, 3, 0] = torch.inf
    key[..., 0] = 1.0
    output = gated_attention(query.float(), key.float(), value.float())
    expected = reference.gated_attention(query, key, value)
    assert torch.equal(output.isnan(), expected.isnan())
    assert output.isnan().any(3).sum() == 1


def test_only_what_is_wanted_is_launched(device):
    inputs = {name: draw(1, 1, 5, 4, seed=seed).float().to(device) for seed, name in enumerate(NAMES)}

    def launches(*wanted: str) -> list[str]:
        given = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
        output = gated_attention(**given)
        with recorded_launches() as seen:
            torch.autograd.grad(output, [given[name] for name in wanted], torch.ones_like(output))
        return kernel_names(seen)

    assert launches("residual") == []
    assert launches("gate") == ["prepare"]
    assert launches("query") == ["prepare", "backward_query"]
    assert launches("value") == launches("key") == ["prepare", "backward_context"]
    assert launches(*NAMES) == ["prepare", "backward_query", "backward_context"]
    given = {name: x.detach() for name, x in inputs.items()}
    value = given["value"].requires_grad_()
    with recorded_launches() as seen:
        output = gated_attention(given["query"], given["key"], value)
        torch.autograd.grad(output, value, torch.ones_like(output))
    assert kernel_names(seen) == ["forward", "backward_context"]
    with recorded_launches() as seen, torch.no_grad():
        gated_attention(**inputs)
    assert seen[0].arguments["attended_ptr"] is None
    assert seen[0].arguments["log_sum_ptr"] is None


@pytest.mark.parametrize("programs", [1, 5, 512])
def test_splits_of_the_tokens(device, monkeypatch, programs):
    monkeypatch.setattr(linear_plan, "_PROGRAMS", programs)
    query, key, value = (draw(1, 2, 200, 3, seed=seed).float().to(device) for seed in range(3))
    _, parts = linear_plan.plan_multiply_tokens(key, value, 1.0)
    assert parts.shape[2] == {1: 1, 5: 3, 512: 7}[programs]
    output = linear_attention(query, key, value, 0.5)
    assert_close(output, reference.linear_attention(query.double(), key.double(), value.double(), 0.5), 200)


@pytest.mark.parametrize(
    ("size", "scale", "query_size"), [(20, 1.0, 1e-3), (0.02, 1e-5, 1e3)], ids=["above", "below"]
)
def test_sums_beyond_half_precision(device, size, scale, query_size):
    """Kᵀ V of fp16 tokens leaves its range at either end, and the result does not."""
    key, value = (draw(1, 1, 300, 16, seed=seed).abs().mul(size).half().to(device) for seed in range(2))
    query = draw(1, 1, 7, 16, seed=2).mul(query_size).half().to(device)
    context = key.double().mT @ value.double() * scale
    assert (context > 65504).any() if size > 1 else (context < 2e-6).all()
    output = linear_attention(query, key, value, scale)
    assert_close(output, reference.linear_attention(query.double(), key.double(), value.double(), scale), 300)


def test_tiles_of_amd(device, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "made up")
    shape = (1, 1, 37, 128)
    assert plan.context_blocks(torch.empty(shape, dtype=torch.bfloat16)).queries == 16
    inputs = [tokens(shape, seed, torch.bfloat16, device, strided=False) for seed in range(3)]
    compare_gated([*inputs, None, None], 128 + 37)


def test_plans_know_how_wide_they_may_read():
    for head_dim, unit in ((128, 16), (40, 8), (5, 1)):
        x = torch.empty(2, 50, 2, head_dim, device="meta").transpose(1, 2)
        assert plan.plan_forward(x, x, x, None, None, x, None, None).constants["UNIT"] == unit
    for length, wide in ((2**22 - 1, False), (2**22 + 1, True)):
        x = torch.empty(2, length, 2, 128, device="meta").transpose(1, 2)
        assert plan.plan_forward(x, x, x, None, None, x, None, None).constants["INDEX_64"] == wide


# --- Memory ------------------------------------------------------------------------------------------------


def saved_bytes(function: Callable[..., Tensor], *inputs: Tensor | None) -> int:
    with saved_tensors() as saved:
        assert function(*inputs).requires_grad
    return sum(each.untyped_storage().nbytes() for each in saved.values())


def test_saved_bytes(device):
    queries, keys = 2 * 3 * 9 * 8, 2 * 3 * 11 * 8  # elements
    query, gate, residual = (
        draw(2, 3, 9, 8, seed=s).bfloat16().to(device).requires_grad_() for s in (0, 3, 4)
    )
    key, value = (draw(2, 3, 11, 8, seed=s).bfloat16().to(device).requires_grad_() for s in (1, 2))
    log_sum = 2 * 3 * 9 * 4
    # Queries and result; keys and values.
    assert saved_bytes(gated_attention, query, key, value) == 2 * (2 * queries + 2 * keys) + log_sum
    # Attended values instead of the result, and the gate.
    call = (query, key, value, gate, residual)
    assert saved_bytes(gated_attention, *call) == 2 * (3 * queries + 2 * keys) + log_sum
    # The gradient of the residual reads nothing.
    nothing = (query.detach(), key.detach(), value.detach(), gate.detach(), residual)
    assert saved_bytes(gated_attention, *nothing) == 0
    context = 2 * 3 * 8 * 8 * 4
    got = saved_bytes(lambda *args: linear_attention(*args, 1.0), query, key, value)
    assert got == 2 * (queries + 2 * keys) + context


def test_no_matrix_of_all_pairs(device):
    """Memory at 65 536 tokens: forward and backward take a few times the inputs, not 65 536² scores."""
    query, key, value, gate = (
        torch.empty(1, 65536, 2, 64, dtype=torch.bfloat16, device=device).transpose(1, 2).requires_grad_()
        for _ in range(4)
    )
    with recorded_launches(execute=False), Allocations(query, key, value, gate) as memory:
        output = gated_attention(query, key, value, gate)
        gradients = torch.autograd.grad(output, (query, key, value, gate), output.detach())
    assert len(gradients) == 4
    # Result, attended values and their gradient, four gradients; two vectors in fp32 of N · heads.
    most, _ = memory.peak()
    assert most <= 7 * query.nbytes + 2 * 2 * 65536 * 4
