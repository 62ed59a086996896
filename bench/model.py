"""DeGMix's head behind a backbone: pictures per second, in inference and in a step of training.

The backbone is the same for everybody and left out; its feature maps are random. A step of training is the
forward pass and the gradients of all parameters and maps, of a random gradient of the predictions: no
optimizer. In bf16 the head runs under autocast, with parameters in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from bench.cases import COMPILED, SEED, Case, Draw, Problem, Run, compile_here, compile_without_graphs
from bench.deform_conv import load_torchvision
from bench.results import OURS
from bench.shapes import DATA_SETS, MODEL_BATCHES, QUICK, QUICK_BACKBONE, QUICK_MAP, SWIN_TINY, Map
from degmix import DeGMixHead
from degmix.model.formula import formula
from degmix.tasks import task_channels
from degmix_kernels.testing import tolerance

FAMILY = "model"
OP = "DeGMix head"
FORMULA = "eager formula"
MODES = {"fwd": "inference", "fwdbwd": "training step"}

# No sum in the head is longer than those over pixels of a parameter's gradient. And rounding errors multiply
# from layer to layer, of the formula's operations as of ours: ours may show twice the formula's in the same
# dtype.
ALLOWED = 2.0

Predict = Callable[[DeGMixHead, Sequence[Tensor], tuple[int, int]], dict[str, Tensor]]


def _ours(head: DeGMixHead, features: Sequence[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    return head(features, size)


def _run(
    predict: Predict, head: DeGMixHead, features: Sequence[Tensor], shape: Map, dtype: torch.dtype
) -> Run:
    """A copy of the head and its maps, under autocast where ``dtype`` is a half precision."""
    half = dtype in (torch.bfloat16, torch.float16)
    own_head = copy.deepcopy(head).to(torch.float32 if half else dtype)
    own_features = [feature.detach().to(dtype, copy=True).requires_grad_() for feature in features]
    device = features[0].device.type

    def forward() -> tuple[Tensor, ...]:
        with torch.autocast(device, dtype if half else None, enabled=half):
            predictions = predict(own_head, own_features, shape.picture)
        return tuple(predictions.values())

    leaves = dict(own_head.named_parameters())
    leaves |= {f"features[{index}]": feature for index, feature in enumerate(own_features)}
    kept = sum(tensor.nbytes for tensor in (*leaves.values(), *own_head.buffers()))
    return Run(forward, leaves, kept, capturable=False)


def _prepare(
    shape: Map, in_channels: tuple[int, ...], training: bool, device: torch.device, dtype: torch.dtype
) -> Problem:
    draw = Draw(device, dtype)
    features, (height, width) = [], (shape.height, shape.width)
    for channels in in_channels:
        features.append(draw(shape.batch, channels, height, width))
        height, width = -(-height // 2), -(-width // 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        head = DeGMixHead(in_channels, task_channels(shape.task_names, shape.classes), dim=shape.channels)
    head = head.to(device).train(training)

    def of(predict: Predict, dtype: torch.dtype = dtype) -> Run:
        return _run(predict, head, features, shape, dtype)

    def formula_of_today() -> Run:
        load_torchvision(device)
        return of(formula)

    def compiled_formula() -> Run:
        load_torchvision(device)
        run = of(compile_here(formula, device))
        return replace(run, without_graphs=cache(lambda: of(compile_without_graphs(formula))))

    def limit(checker, gradients: bool) -> float:
        yardstick = max(checker.errors(of(formula), gradients).values())
        return max(tolerance(dtype, shape.batch * shape.pixels), ALLOWED * yardstick)

    return Problem(
        exact=lambda: of(formula, torch.float64),
        runs={OURS: lambda: of(_ours), FORMULA: formula_of_today, COMPILED: compiled_formula},
        limit=limit,
        dtype=dtype,
        joint=True,
    )


def _case(shape: Map, in_channels: tuple[int, ...], mode: str) -> Case:
    quick = shape.name == QUICK
    return Case(
        FAMILY,
        OP,
        QUICK if quick else f"{shape.name} b{shape.batch}",
        prepare=lambda device, dtype: _prepare(shape, in_channels, mode != "fwd", device, dtype),
        implementations=(OURS, FORMULA, COMPILED),
        # On a CPU, where the small ones run, torchvision's operator has no bf16.
        dtypes=("fp32",) if quick else ("bf16", "fp32"),
        modes={mode: MODES[mode]},
        images=shape.batch,
    )


CASES: tuple[Case, ...] = tuple(
    _case(shape, in_channels, mode)
    for shape, in_channels in (
        *((replace(shape, batch=batch), SWIN_TINY) for shape in DATA_SETS for batch in MODEL_BATCHES),
        (QUICK_MAP, QUICK_BACKBONE),
    )
    for mode in MODES
)
