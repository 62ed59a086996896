"""Every argument of every op that is wrong in some way gets one sentence that names it, before any launch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from contract import every_definition, first, fresh
from launches import recorded_launches
from torch import Tensor

from degmix_kernels import (
    BatchNorm2d,
    ChannelMix,
    GatedAttention,
    LinearAttention,
    LinearNorm,
    SpatialGatingUnit,
    TaskAttention,
    use_backend,
)
from degmix_kernels.checks import Range
from degmix_kernels.contract import Op
from degmix_kernels.registry import find

MAP = torch.zeros(2, 3, 4, 5)
# What functions take that their ops' records do not have.
MAY_BE_ZERO = {"momentum", "padding"}
RELATIVE = ("another device", "another dimension", "no dimension", "a longer axis", "a longer last axis")


class _Unhelpful:
    """Nothing that any argument can be."""

    def __repr__(self) -> str:
        return "unhelpful"


def wrong_tensors(value: Tensor | None) -> Iterator[tuple[str, object]]:
    """What is wrong for a tensor argument, with what is wrong of it."""
    yield from (
        ("a number", 3.0),
        ("an integer", 1),
        ("a string", "x"),
        ("a list", [1.0]),
        ("an object", _Unhelpful()),
    )
    if value is None:
        return
    yield "integers", value.int()
    yield "booleans", value.bool()
    yield "complex numbers", value.to(torch.complex64)
    yield "8 bits", value.to(torch.float8_e4m3fn)
    yield "a sparse tensor", value.detach().flatten()[None].to_sparse()
    yield "another device", torch.empty_like(value, device="meta")
    yield "another dimension", value[None, None, None]
    yield "no dimension", value.new_zeros(())
    yield "a longer axis", torch.cat([value, value, value[:1]], -1 if value.dim() == 1 else 0)
    yield "a longer last axis", torch.cat([value, value[..., :1]], -1)


def wrong_dtypes(op: Op, name: str, value: Tensor) -> Iterator[tuple[str, object]]:
    """Dtypes that are wrong beside a first tensor in fp32; autocast takes the half for its own."""
    field = next(field for field in op.op.fields if field.name == name)
    if name != op.op.call._fields[0] and not field.own_dtype:
        yield "doubles", value.double()
        if not torch.is_autocast_enabled(value.device.type):
            yield "half precision", value.half()


def wrong_scalars(op: Op, name: str, value: Any) -> Iterator[tuple[str, object]]:
    """What is never right, and what the annotation in the op's record excludes."""
    allowed = {field.name: field.range for field in op.op.fields}
    yield from (("a tensor", torch.zeros(2, 2)), ("a list of strings", ["x"]), ("an object", _Unhelpful()))
    if isinstance(value, bool):
        yield from (("a number", 2), ("a string", "yes"))
    elif isinstance(value, str):
        yield from (("a number", 2), ("another string", "no such choice"))
    else:
        yield from (
            ("a string", "x"),
            ("NaN", float("nan")),
            ("much", 10**400),
            ("infinity", float("inf")),
            ("a truth", True),
        )
        if name in allowed:
            numbers = {"zero": 0, "a negative number": -1}
            yield from (each for each in numbers.items() if each[1] not in (allowed[name] or (0, -1)))
        else:
            yield "a negative number", -1
            yield from [("zero", 0)] if name not in MAY_BE_ZERO else ()
    if inspect.signature(op.function).parameters[name].default is not None:
        yield "nothing", None


def wrong(op: Op, arguments: dict[str, Any]) -> Iterator[tuple[str, str, object]]:
    """Argument, what is wrong, value: of every argument of the function, given in the sample or not."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    for name, parameter in inspect.signature(op.function).parameters.items():
        value = arguments.get(name, parameter.default)
        if name in op.op.call._fields[: op.op.count]:
            if value is None and "None" not in str(parameter.annotation):
                continue
            # A longer batch, or map, is right where no other tensor has that axis.
            alone = op.batched == (name,)
            right = {"a longer axis"} if alone else set()
            if len(tensors) == 1:
                right = RELATIVE
            elif alone and not any(value.shape[-1] in other.shape for other in tensors if other is not value):
                right.add("a longer last axis")
            yield from ((name, what, each) for what, each in wrong_tensors(value) if what not in right)
            if value is not None:
                yield from ((name, what, each) for what, each in wrong_dtypes(op, name, value))
        else:
            yield from ((name, what, each) for what, each in wrong_scalars(op, name, value))


@every_definition
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_one_sentence_names_it(op: Op, backend: str, autocast: bool, device: torch.device) -> None:
    arguments = fresh(op, first(op, device).arguments, wanted=())
    region = torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
    missed = []
    with use_backend(backend), region, recorded_launches() as launches:
        for name, what, value in wrong(op, arguments):
            try:
                op.function(**arguments | {name: value})
            except (TypeError, ValueError) as error:
                # A tensor of another shape or device may be right, and another argument wrong beside it.
                named = "|".join(inspect.signature(op.function).parameters) if what in RELATIVE else name
                if not re.match(rf"({named}): expected [^\n]+, got [^\n]+$", str(error)):
                    missed.append((name, what, str(error)))
            except Exception as error:
                missed.append((name, what, f"{type(error).__name__}: {error}"))
            else:
                missed.append((name, what, "accepted"))
    assert not missed, "\n".join(map(str, missed))
    assert not launches


@every_definition
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_least_that_is_allowed_is_taken(op: Op, backend: str, device: torch.device) -> None:
    names = inspect.signature(op.function).parameters
    least = {
        field.name: field.type(field.range.minimum)
        for field in op.op.fields
        if field.name in names and isinstance(field.range, Range) and field.range.minimum >= 0
    }
    training = {"training": True} if "training" in names else {}
    with use_backend(backend):
        op.function(**fresh(op, first(op, device).arguments) | least | training)


# Good calls, with shapes in place of tensors, and what is refused beyond a size that another tensor sets.
GOOD = {
    "gated_attention": {"query": (1, 2, 3, 4), "key": (1, 2, 5, 4), "value": (1, 2, 5, 4)},
    "task_attention": {"query": (1, 2, 5, 6), "key": (1, 4, 5, 6), "value": (1, 4, 5, 6), "heads": 2},
    "channel_mix": {"x": (2, 3), "weight": (5, 3)},
    "batch_norm": {"x": (2, 3), "mean": (3,), "variance": (3,)},
    "coordinate_bias": {"x": (2, 10, 6, 7), "rows": (2, 3, 6, 3), "columns": (2, 2, 3, 7)},
    "linear_norm": {"x": (6, 2, 5), "weight": (3, 6, 5)}
    | dict.fromkeys(("bias", "norm_weight", "norm_bias"), (3, 6)),
}
BAD = (
    ("gated_attention", {"key": (1, 2, 0, 4), "value": (1, 2, 0, 4)}, "key: expected at least one token"),
    ("task_attention", {"query": (1, 0, 5, 6)}, "query: expected at least one task on axis 1, got 0"),
    ("task_attention", {"query": (1, 2, 5, 0)}, "query: expected at least one channel on axis 3, got 0"),
    ("task_attention", {"heads": 4}, "heads: expected a divisor of 6 channels, got 4"),
    ("task_attention", {"key": (1, 9, 5, 6)}, "key: expected 1 to 8 tasks on axis 1, got 9"),
    ("task_attention", {"key": (1, 0, 5, 6)}, "key: expected 1 to 8 tasks on axis 1, got 0"),
    ("task_attention", {"key": (1, 4, 5, 2)}, "key: expected 6 channels on axis 3, or 3 for all"),
    ("task_attention", {"key": (1, 4, 5, 3)}, r"value: expected shape \(1, 4, 5, 3\), got"),
    ("channel_mix", {"weight": (5, 4)}, r"weight: expected C/groups inputs .*, got \(5, 4\)"),
    ("channel_mix", {"running_mean": (5,)}, "running_var: expected running_mean and running_var"),
    ("channel_mix", {"running_mean": (5,), "running_var": (5,), "statistics": True}, "statistics: .* False"),
    ("batch_norm", {"x": (2, 0)}, "x: expected at least one channel"),
    ("batch_norm", {"bias": (1,)}, r"bias: expected shape \(3,\)"),
    ("coordinate_bias", {"x": (2, 10, 0, 7)}, "x: expected no empty dimension"),
    ("coordinate_bias", {"rows": (2, 3, 6, 7)}, r"rows: expected shape \(2, 3, 6, 3\)"),
    ("coordinate_bias", {"columns": (1, 2, 3, 7)}, r"columns: expected shape \(2, 2, 3, 7\)"),
    ("linear_norm", {"weight": (4, 6, 5)}, "weight: expected a first dimension that divides"),
    ("linear_norm", {"weight": (3, 0, 5)}, "weight: expected no empty dimension"),
    ("linear_norm", {"norm_weight": (6,)}, "norm_weight: expected shape"),
    ("linear_norm", {"x": (6, 5, 2, 2)}, "weight: expected 2 dimensions for a map"),
)


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_shapes_that_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    given = {
        key: torch.zeros(value) if isinstance(value, tuple) else value
        for key, value in (GOOD[name] | change).items()
    }
    with pytest.raises(ValueError, match=message):
        find(name).function(**given)


@pytest.mark.parametrize(
    ("module", "arguments", "error", "message"),
    [
        (BatchNorm2d(3), (MAP, None, 3.0), TypeError, "residual: expected a tensor, got float"),
        (BatchNorm2d(3), (MAP, None, MAP[:1]), ValueError, "residual: expected shape"),
        (GatedAttention(5, 1), (MAP[0], MAP[0], 3.0), TypeError, "gate: expected a tensor, got float"),
        (SpatialGatingUnit(4), (3.0,), TypeError, "u_v: expected a tensor, got float"),
        (SpatialGatingUnit(4), (MAP,), ValueError, "u_v: expected 3 dimensions"),
        (BatchNorm2d(3), (3.0,), TypeError, "input: expected a tensor, got float"),
        (BatchNorm2d(3), (MAP, 3.0), TypeError, "statistics: expected a mean and a variance, got 3.0"),
        (BatchNorm2d(3), (MAP, MAP.sum()), TypeError, "statistics: expected a mean and a variance"),
        (BatchNorm2d(3), (MAP, None, MAP.to("meta")), TypeError, "residual: expected device cpu"),
        (LinearAttention(5, 1), (MAP[0], MAP), ValueError, "context: expected 3 dimensions"),
        (TaskAttention(5, 1), (MAP, MAP[0]), ValueError, "context: expected 4 dimensions"),
        (BatchNorm2d, (3, -1.0), ValueError, "eps: expected at least 0.0, got -1.0"),
        (BatchNorm2d, (3, 1e-5, 3.0), ValueError, "momentum: expected at most 1.0, got 3.0"),
        (ChannelMix, (3, 3, "gelu", MAP), TypeError, "bias: expected True or False, got"),
        (
            ChannelMix,
            (3, 3, "gelu", True, float("nan")),
            ValueError,
            "eps: expected a finite number, got nan",
        ),
        (LinearNorm, (3, 3, "x"), TypeError, "bias: expected True or False, got 'x'"),
        (LinearNorm, (3, 3, True, None), TypeError, "eps: expected a number, got None"),
        (LinearAttention, (10**400, 1), ValueError, "dim: expected at most"),
    ],
)
def test_what_modules_take_themselves(
    module: Callable[..., object], arguments: tuple, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        module(*arguments)
