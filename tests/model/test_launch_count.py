"""The counts of launches and saved bytes are right, and the head's are below its formula's."""

from __future__ import annotations

import pytest
import torch
from launch_count import NYUD, assert_lean, count_head, count_launches
from test_head import ATTENTIONS

from degmix_kernels import deform_mix, use_backend
from degmix_kernels.backend import INTERPRETED

PASCAL = {"semseg": 21, "human_parts": 7, "sal": 2, "normals": 3, "edge": 1}

CALLS = {
    "nyud": (NYUD, (425, 560), 1),
    "nyud, a batch": (NYUD, (425, 560), 8),
    "pascal": (PASCAL, (512, 512), 1),
}

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or Triton's interpreter"
)


def test_views_and_allocations_launch_nothing() -> None:
    x = torch.ones(4, 6)
    counts = count_launches(lambda: x.t().reshape(3, 8).view(-1)[2:] + torch.empty_like(x).view(-1)[2:])
    assert counts == {"aten.clone": 1, "aten.add": 1}  # reshape has to copy


def test_operators_without_a_result_count() -> None:
    lists = [[torch.ones(3), torch.ones(4)] for _ in range(2)]
    assert count_launches(lambda: torch._foreach_lerp_(*lists, 0.1)) == {"aten._foreach_lerp_": 1}


def test_triton_kernels_count(device: torch.device) -> None:
    x, offset, weight = (
        torch.ones(shape, device=device) for shape in ((1, 4, 5, 5), (1, 8, 5, 5), (4, 4, 1, 1))
    )
    with use_backend("triton"):
        counts = count_launches(lambda: deform_mix(x, offset, weight))
    assert sum(count for name, count in counts.items() if name.startswith("triton ")) == 1
    assert not any(name.startswith("degmix") for name in counts)  # they are seen inside the op


@pytest.mark.parametrize(
    ("attention", "name"),
    [
        pytest.param(
            attention, name, marks=() if name == "nyud" or attention == "pixel" else pytest.mark.full
        )
        for attention in ATTENTIONS
        for name in CALLS
    ],
)
def test_the_head_launches_and_saves_less_than_its_formula(attention, name) -> None:
    tasks, size, batch = CALLS[name]
    assert_lean(count_head(tasks=tasks, size=size, batch=batch, attention=attention))  # Swin-T


def test_saved_bytes_grow_with_the_batch() -> None:
    counts = [count_head((8, 16), {"depth": 1}, (64, 64), batch, dim=16) for batch in (1, 2, 3)]
    for name in ("formula", "head"):
        one, two, three = (count[name].saved_bytes for count in counts)
        assert 0 < three - two == two - one <= one


def test_lean_is_refused_where_it_is_not() -> None:
    plain = count_head((8, 16), {"depth": 1}, (64, 64), dim=16)["formula"]
    with pytest.raises(AssertionError):
        assert_lean({"head": plain, "formula": plain})
