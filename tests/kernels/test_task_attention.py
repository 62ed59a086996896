"""Attention over tasks against loops over pixels, heads and tasks, and against its reference in fp64."""

import math
from functools import partial

import pytest
import torch
from contract import draw, leaves_of, result_and_gradients
from launches import kernel_names, recorded_launches
from torch import Tensor, nn

from degmix_kernels import TaskAttention, task_attention, use_backend
from degmix_kernels.task_attention import plan, reference
from degmix_kernels.testing import assert_close, poisoned_empty


def formula(query, key, value, heads):
    """Key and value have the query's channels, or a head's, which all heads share."""
    batch, queries, pixels, channels = query.shape
    dim = channels // heads
    output = torch.zeros_like(query)
    for b in range(batch):
        for s in range(queries):
            for n in range(pixels):
                for h in range(heads):
                    own = slice(h * dim, (h + 1) * dim)
                    theirs = own if key.shape[3] == channels else slice(dim)
                    scores = [query[b, s, n, own] @ k[n, theirs] / math.sqrt(dim) for k in key[b]]
                    total = sum(score.exp() for score in scores)
                    for score, v in zip(scores, value[b], strict=True):
                        output[b, s, n, own] += score.exp() / total * v[n, theirs]
    return output


@pytest.mark.parametrize(
    ("queries", "tasks", "heads", "shared"),
    [(1, 4, 2, False), (3, 3, 1, False), (2, 8, 3, False), (1, 1, 6, False), (2, 3, 3, True)],
)
def test_formula_and_gradients(queries, tasks, heads, shared):
    channels = 6 // heads if shared else 6
    named = {"query": draw(2, queries, 3, 6)}
    named |= {name: draw(2, tasks, 3, channels, seed=seed) for seed, name in ((1, "key"), (2, "value"))}
    query, key, value = named.values()
    got, want = (
        result_and_gradients(partial(each, heads=heads), leaves_of(named))
        for each in (task_attention, formula)
    )
    assert_close(got.pop("output"), want.pop("output"), 8)
    for name, ours in got.items():
        # One task leaves queries and keys without effect: their gradients are rounding noise.
        assert_close(ours + 1, want[name] + 1, 48)
    assert_close(task_attention(query, key, None, heads), formula(query, key, key, heads), 8)
    assert_close(
        task_attention(query, key, value, heads, 0.5),
        formula(query * 0.5 * math.sqrt(6 // heads), key, value, heads),
        8,
    )


# --- The kernels -------------------------------------------------------------------------------------------


def compare(query: Tensor, key: Tensor, value: Tensor | None, heads: int, scale: float | None = None) -> None:
    """Output and gradients against the reference in fp64, on the kernels, which must have been launched."""
    named = {"query": query, "key": key, "value": value}
    probe = draw(*query.shape, seed=9, dtype=query.dtype).to(query.device)
    options = {"heads": heads, "scale": scale}
    with poisoned_empty(), recorded_launches() as seen:
        actual = result_and_gradients(partial(task_attention, **options), leaves_of(named), probe)
    assert kernel_names(seen) == ["forward", "backward"]
    plain = partial(reference.task_attention, value=None, **options)
    wanted = result_and_gradients(plain, leaves_of(named, torch.float64), probe)
    # Sums over the channels of scores in front of an exponential: of these errors, those of large ones count.
    reduction = 4 * query.shape[3]
    for name, got in actual.items():
        assert got.dtype == query.dtype
        if key.shape[1] == 1 and (name == "query" or (name == "key" and value is not None)):
            # One task has all the weight, whatever its score: of its derivative, w (v·g − w v·g), a rounded w
            # leaves a last bit or two.
            slope = scale or (query.shape[3] // heads) ** -0.5
            derivative = probe.norm(dim=3).max() * (key if value is None else value).norm(dim=3).max()
            assert got.abs().max() <= 2**-21 * slope * derivative * max(query.abs().max(), key.abs().max())
        else:
            assert_close(got, wanted[name], reduction, name=name)


def tensors(
    device: torch.device,
    dtype: torch.dtype,
    queries: int,
    tasks: int,
    head_dim: int,
    heads: int,
    form: str,
    pixels: int = 5,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``form``: own or shared keys, with values or none."""
    channels = head_dim if "shared" in form else heads * head_dim
    query = draw(2, queries, pixels, heads * head_dim, dtype=dtype).to(device)
    key = draw(2, tasks, pixels, channels, seed=1, dtype=dtype).to(device)
    return query, key, None if "none" in form else draw(*key.shape, seed=2, dtype=dtype).to(device)


FORMS = ("own", "own none", "shared", "shared none")
# query tasks, tasks, head dim, heads, form
SIZES = [
    *((1, tasks, 4, 2, "own") for tasks in range(1, 9)),
    *((1, tasks, 4, 2, form) for tasks in (1, 3, 8) for form in FORMS[1:]),
    *((4, 4, 4, 2, form) for form in ("own", "own none", "shared none")),
    *(
        (queries, 2, 3, heads, "shared") for queries, heads in ((3, 1), (5, 1), (1, 3), (3, 3))
    ),  # ragged chunks
]


@pytest.mark.parametrize(("queries", "tasks", "head_dim", "heads", "form"), SIZES)
def test_numbers_of_tasks_and_queries(device, queries, tasks, head_dim, heads, form):
    compare(*tensors(device, torch.float32, queries, tasks, head_dim, heads, form), heads)


@pytest.mark.parametrize(
    ("dtype", "form"),
    [(torch.float32, "own"), (torch.float32, "shared none"), (torch.bfloat16, "own"), (torch.float16, "own")],
)
@pytest.mark.parametrize("head_dim", [1, 5, 16, 40, 128, 256])
def test_head_dims_and_dtypes(device, head_dim, dtype, form):
    pixels = 40 if head_dim < 16 else 5  # enough elements for roundings to average out
    compare(*tensors(device, dtype, 1, 2, head_dim, 2, form, pixels), 2)


@pytest.mark.parametrize(("head_dim", "dtype"), [(1023, torch.float32), (1024, torch.bfloat16)])
def test_head_dims_up_to_the_largest(device, head_dim, dtype):
    compare(*tensors(device, dtype, 1, 8, head_dim, 1, "own", pixels=2), 1)


def test_more_rows_than_a_block(device):
    query, key, value = tensors(device, torch.float32, 2, 2, 16, 3, "own", pixels=41)
    launch = plan.plan_forward(query, key, value, query, 3, 1.0)
    assert launch.programs == 2 * math.ceil(123 / launch.constants["BLOCK_ROWS"]) > 2
    compare(query, key, value, 3)


def test_indices_of_64_bits(device, monkeypatch):
    monkeypatch.setattr(plan, "needs_64_bit", lambda *tensors: True)
    compare(*tensors(device, torch.float32, 2, 3, 16, 2, "own", pixels=41), 2)
    compare(*tensors(device, torch.float32, 2, 3, 4, 2, "shared none"), 2)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2])
def test_scale(device, scale):
    query, key, value = tensors(device, torch.float32, 2, 3, 6, 2, "own")
    if scale:
        compare(query, key, value, 2, scale)
        return
    output = task_attention(query, key, value, 2, scale)
    assert_close(output, value.double().mean(1, keepdim=True).expand_as(query), 3)


def test_views_are_read_where_they_are(device):
    tokens = draw(2, 4, 5, 24, dtype=torch.float32).to(device)
    key, value = tokens.chunk(2, -1)
    compare(tokens[:, 1:2, :, :12].detach(), key.detach(), value.detach(), 3)
    compare(key.detach().transpose(0, 1), value.detach().transpose(0, 1), None, 1)
    query = tokens[:1, :, :, :12].expand(2, -1, -1, -1)
    pointers = {query.data_ptr(), key.data_ptr(), value.data_ptr()}
    with recorded_launches(execute=False) as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "contiguous", None)  # nothing is copied
        output = task_attention(query, key, value, 3)
    assert len(pointers) == 2
    assert output.is_contiguous()
    assert seen[0].arguments["query_stride_batch"] == 0
    assert seen[0].arguments["key_stride_pixel"] * seen[0].constants["UNIT"] == 24


def test_scores_in_the_thousands(device):
    query, key, value = tensors(device, torch.float32, 2, 4, 16, 2, "own")
    query, key = (query * 100).round(), (key * 10).round()  # so that scores are exact
    # Two keys with the same scores: without them all weights are nearly 0 or 1, and all gradients nearly
    # nothing, as exact as exp(−d) of the smallest gap d: d · 2⁻²⁴, since d · log₂ e is rounded.
    query[..., ::16], key[:, 1] = 0, key[:, 0]
    key[:, 1, :, ::16] += 100  # or the gradients of the query would cancel
    assert (query.square().sum(-1) * key.square().sum(-1)[:, :1]).sqrt().max() > 4000
    compare(query, key, value, 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_and_infinity_stay_where_the_reference_has_them(device, where, bad):
    query, key, value = tensors(device, torch.float32, 2, 3, 4, 2, "own")
    named = {"query": query, "key": key, "value": value}
    named[where][0, 1, 2, 1] = bad
    results = []
    for backend in ("auto", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in named.values()]
        with use_backend(backend):
            output = task_attention(*leaves, 2)
        results.append([output, *torch.autograd.grad(output, leaves, torch.ones_like(output))])
    assert not all(result.isfinite().all() for result in results[0])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_scores_of_minus_infinity(device):
    query, key, value = tensors(device, torch.float32, 1, 3, 2, 1, "own", pixels=2)
    query = query.abs() + 1
    key[:, 1] = -torch.inf  # no weight
    key[0, :, 1] = -torch.inf  # none has any
    output = task_attention(query, key, value)
    assert output[0, :, 1].isnan().all()
    expected = task_attention(query[1:], key[1:, ::2], value[1:, ::2])
    torch.testing.assert_close(output[1:], expected)


def test_a_value_that_is_the_key(device):
    query, key, _ = tensors(device, torch.float32, 2, 3, 4, 2, "own")
    with recorded_launches() as seen:
        actual = result_and_gradients(lambda key: task_attention(query, key, key, 2), leaves_of({"key": key}))
    assert seen[0].arguments["value_ptr"] is None
    exact = leaves_of({"key": key}, torch.float64)
    expected = result_and_gradients(lambda key: reference.task_attention(query.double(), key, None, 2), exact)
    assert_close(actual["key"], expected["key"], 8)


def test_only_what_is_wanted_is_computed(device):
    names = ("query", "key", "value")
    for wanted in names:
        given = dict(zip(names, tensors(device, torch.float32, 2, 3, 4, 2, "own"), strict=True))
        given[wanted].requires_grad_()
        output = task_attention(**given, heads=2)
        with recorded_launches() as seen:
            torch.autograd.grad(output, given[wanted], torch.ones_like(output))
        (launch,) = seen
        filled = [name for name in names if launch.arguments[f"grad_{name}_ptr"] is not None]
        assert filled == [wanted]


def test_plans_know_how_wide_they_may_read():
    for head_dim, dtype, unit, rows in (
        (256, torch.bfloat16, 16, 4),
        (256, torch.float32, 16, 2),
        (40, torch.float16, 8, 16),
        (37, torch.float16, 1, 4),
    ):
        x = torch.empty(2, 4, 9, head_dim, dtype=dtype, device="meta")
        launch = plan.plan_forward(x, x, x, x, 1, 1.0)
        assert (launch.constants["UNIT"], launch.constants["BLOCK_ROWS"]) == (unit, rows)
    odd = torch.empty(2, 4, 9, 257, device="meta")[..., :256]
    assert plan.plan_forward(odd, odd, None, odd, 1, 1.0).constants["UNIT"] == 1
    for pixels, wide in ((2**18 - 1, False), (2**18 + 1, True)):
        x = torch.empty(8, 4, pixels, 256, dtype=torch.bfloat16, device="meta")
        assert plan.plan_forward(x, x, x, x, 1, 1.0).constants["INDEX_64"] == wide


# --- The module, and what is refused -----------------------------------------------------------------------


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


def test_forcing_triton_says_that_such_heads_have_no_kernel():
    x = torch.zeros(1, 2, 1, 1025)
    with use_backend("triton"), pytest.warns(UserWarning, match="head dimension above 1024 has no Triton"):
        task_attention(x, x)
