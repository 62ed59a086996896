"""DeGMix: pictures per second, in inference and in a step of training, of its head alone and of all of it.

The head stands behind random feature maps, without what all implementations share. Its step of training is
the forward pass and the gradients of all parameters and maps, of a random gradient of the predictions.

The whole model begins with a Swin-T of timm, the same module for everybody, with random weights. Its step of
training is that of ``degmix train``: predictions of random pictures, the weighted losses of all tasks, the
gradients of all parameters, the optimizer. Left out are reading pictures, the norm of the gradient, which is
for the log, and stochastic depth, whose random numbers no two implementations would share.

In bf16 both run under autocast, with parameters in fp32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from bench.cases.deform_conv import load_torchvision
from bench.cases.op import Draw, compile_here, compile_without_graphs
from bench.cases.shapes import (
    DATA_SETS,
    MODEL_BATCHES,
    QUICK,
    QUICK_BACKBONE,
    QUICK_MAP,
    SWIN_TINY,
    Map,
    is_leading,
)
from bench.harness.case import COMPILED, EVENTS, LOOP, SEED, Case, Problem, Run, Unavailable
from bench.harness.results import OURS
from degmix import DeGMix, DeGMixHead
from degmix.losses import IGNORE
from degmix.model.formula import formula
from degmix.tasks import task_channels
from degmix_kernels.maps import ceil_div
from degmix_kernels.testing import tolerance

FAMILY = "model"
HEAD, WHOLE = "DeGMix head", "DeGMix Swin-T"
BACKBONE = "swin_tiny_patch4_window7_224"
QUICK_NAME = "tiny"  # the backbone that stands in for it where shapes are small
FORMULA = "eager formula"
MODES = {"fwd": "inference", "fwdbwd": "training step"}

# Rounding errors multiply from layer to layer, of the formula's operations as of ours: ours may show twice
# the formula's in the same dtype.
ALLOWED = 2.0

SQUARE = 16  # pixels of one label: by labels of single pixels, gradients cancel, and are rounding errors
ONE_IN_TEN = 1.28  # of standard normal values are above it

Function = Callable[..., tuple[Tensor, ...]]
"""Predictions of a module, from its inputs."""
Predict = Callable[[DeGMix, Tensor], Mapping[str, Tensor]]
Update = Callable[[Sequence[Tensor | None]], None]


def _run(
    function: Function,
    module: nn.Module,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    updating: Callable[[nn.Module], Update] | None,
) -> Run:
    """A copy of the module and of its inputs, under autocast where ``dtype`` is a half precision.

    Inputs stay in the dtypes they were drawn in, but in fp64. Leaves are all parameters, and the inputs that
    require a gradient.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    own = copy.deepcopy(module).to(torch.float32 if half else dtype)
    own_inputs = [_copy(each, dtype) for each in inputs]
    device = inputs[0].device.type

    def forward() -> tuple[Tensor, ...]:
        # The losses, too: they compute in fp32 by themselves.
        with torch.autocast(device, dtype if half else None, enabled=half):
            return function(own, *own_inputs)

    leaves = dict(own.named_parameters())
    leaves |= {f"inputs[{index}]": each for index, each in enumerate(own_inputs) if each.requires_grad}
    momentum = [] if updating is None else own.parameters()  # whose sizes it has
    kept = sum(tensor.nbytes for tensor in (*own.parameters(), *own.buffers(), *own_inputs, *momentum))
    update = None if updating is None else updating(own)
    return Run(forward, leaves, kept, capturable=False, update=update)


def _copy(drawn: Tensor, dtype: torch.dtype) -> Tensor:
    kept = dtype if dtype == torch.float64 and drawn.is_floating_point() else drawn.dtype
    return drawn.detach().to(kept, copy=True).requires_grad_(drawn.requires_grad)


def _problem(
    module: nn.Module,
    inputs: Sequence[Tensor],
    ours: Function,
    written_out: Function,
    dtype: torch.dtype,
    terms: int,
    updating: Callable[[nn.Module], Update] | None = None,
) -> Problem:
    """Ours beside the formula, eager and compiled, all with the module's weights and the same inputs.

    The longest sum has so many terms; ``updating`` makes what ends a step of training of a module.
    """
    device = inputs[0].device

    def of(function: Function, dtype: torch.dtype = dtype) -> Run:
        return _run(function, module, inputs, dtype, updating)

    def formula_of_today() -> Run:
        load_torchvision(device)
        return of(written_out)

    def compiled_formula() -> Run:
        load_torchvision(device)
        run = of(compile_here(written_out, device))
        return replace(run, without_graphs=cache(lambda: of(compile_without_graphs(written_out))))

    def limit(checker, gradients: bool) -> float:
        yardstick = max(checker.errors(of(written_out), gradients).values())
        return max(tolerance(dtype, terms), ALLOWED * yardstick)

    return Problem(
        exact=lambda: of(written_out, torch.float64),
        runs={OURS: lambda: of(ours), FORMULA: formula_of_today, COMPILED: compiled_formula},
        limit=limit,
        dtype=dtype,
        joint=True,
    )


# --- The head ----------------------------------------------------------------------------------------------


def _prepare_head(
    shape: Map, in_channels: tuple[int, ...], training: bool, device: torch.device, dtype: torch.dtype
) -> Problem:
    draw = Draw(device, dtype)
    features, (height, width) = [], (shape.height, shape.width)
    for channels in in_channels:
        features.append(draw(shape.batch, channels, height, width).requires_grad_())
        height, width = ceil_div(height, 2), ceil_div(width, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        head = DeGMixHead(in_channels, task_channels(shape.task_names, shape.classes), dim=shape.channels)

    def ours(head: DeGMixHead, *features: Tensor) -> tuple[Tensor, ...]:
        return tuple(head(features, shape.picture).values())

    def written_out(head: DeGMixHead, *features: Tensor) -> tuple[Tensor, ...]:
        return tuple(formula(head, features, shape.picture).values())

    terms = shape.batch * shape.pixels  # of a parameter's gradient
    return _problem(head.to(device).train(training), features, ours, written_out, dtype, terms)


# --- The whole model ---------------------------------------------------------------------------------------


def _predict_written_out(model: DeGMix, picture: Tensor) -> Mapping[str, Tensor]:
    return formula(model.head, model.backbone(picture), tuple(picture.shape[2:]))


def _prepare_whole(
    shape: Map, backbone: str, training: bool, device: torch.device, dtype: torch.dtype
) -> Problem:
    try:
        model = _untrained(backbone, shape.task_names, shape.classes, shape.channels)
        of, updating = _training_of(shape.task_names) if training else (_predictions_of, None)
    except ImportError as error:  # of timm, or of what reads configurations
        raise Unavailable(str(error)) from error
    model = copy.deepcopy(model).to(device).train(training)
    draw = Draw(device, torch.float32)  # pictures and labels are fp32 in every dtype
    inputs = [draw(shape.batch, 3, *shape.picture)]
    terms = shape.batch * math.prod(shape.picture)  # of a loss
    if training:
        channels = task_channels(shape.task_names, shape.classes)
        inputs += [_labels(draw, task, channels[task], shape) for task in shape.task_names]
    return _problem(model, inputs, of(DeGMix.__call__), of(_predict_written_out), dtype, terms, updating)


@cache
def _untrained(backbone: str, task_names: tuple[str, ...], classes: int, dim: int) -> DeGMix:
    """The model with random weights, on the CPU; the same one every time, to be copied."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = DeGMix(backbone, task_channels(task_names, classes), dim=dim)
    for module in model.modules():
        if hasattr(module, "drop_prob"):  # timm's stochastic depth
            module.drop_prob = 0.0
    return model


def _predictions_of(predict: Predict) -> Function:
    return lambda model, picture: tuple(predict(model, picture).values())


def _training_of(
    task_names: tuple[str, ...],
) -> tuple[Callable[[Predict], Function], Callable[[nn.Module], Update]]:
    """From a prediction to its loss, and from a model to what updates it, both as ``degmix train`` has them.

    Raises:
        ImportError: if something is missing that only training needs.
    """
    from degmix import build
    from degmix.config import Config

    config = Config(tasks=task_names)
    losses = build.build_losses(config)

    def loss_of(predict: Predict) -> Function:
        def loss(model: DeGMix, picture: Tensor, *labels: Tensor) -> tuple[Tensor]:
            predicted = predict(model, picture)
            known = dict(zip(task_names, labels, strict=True))
            return (torch.stack([losses[task](predicted[task], known[task]) for task in task_names]).sum(),)

        return loss

    def updating(model: nn.Module) -> Update:
        optimizer, parameters = build.build_optimizer(config, model), list(model.parameters())

        def update(gradients: Sequence[Tensor | None]) -> None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return update

    return loss_of, updating


def _labels(draw: Draw, task: str, channels: int, shape: Map) -> Tensor:
    """Random labels as the task's loss takes them, the same in squares of pixels; a tenth have none."""

    def noise(channels: int) -> Tensor:
        drawn = draw(shape.batch, channels, *(ceil_div(side, SQUARE) for side in shape.picture))
        height, width = shape.picture
        return drawn.repeat_interleave(SQUARE, 2).repeat_interleave(SQUARE, 3)[:, :, :height, :width]

    known = noise(1) < ONE_IN_TEN
    if task == "depth":
        return torch.where(known, 1.0 + noise(1).abs(), 0.0)
    if task == "normals":
        # Longer than one: no prediction reaches them, where a rounding error would turn a gradient round.
        return torch.where(known, noise(3).sign(), 0.0)
    if task == "edge":
        return torch.where(known, (noise(1) > ONE_IN_TEN).float(), float(IGNORE))
    return torch.where(known[:, 0], noise(channels).argmax(1), IGNORE)


# --- Both --------------------------------------------------------------------------------------------------


def _case(
    op: str, prepare: Callable[..., Problem], shape: Map, behind: str | tuple[int, ...], mode: str
) -> Case:
    quick = shape.name == QUICK
    return Case(
        FAMILY,
        op,
        QUICK if quick else f"{shape.name} b{shape.batch}",
        prepare=lambda device, dtype: prepare(shape, behind, mode != "fwd", device, dtype),
        implementations=(OURS, FORMULA, COMPILED),
        # On a CPU, where the small ones run, torchvision's operator has no bf16.
        dtypes=("fp32",) if quick else ("bf16", "fp32"),
        modes={mode: MODES[mode]},
        images=shape.batch,
        timers=(EVENTS, LOOP) if quick or shape.batch == 1 else (EVENTS,),
        leading=is_leading(shape.name),
        quick=quick,
        compiled_last=op == WHOLE,
    )


CASES: tuple[Case, ...] = tuple(
    _case(op, prepare, shape, behind, mode)
    for op, prepare, real, small in (
        (HEAD, _prepare_head, SWIN_TINY, QUICK_BACKBONE),
        (WHOLE, _prepare_whole, BACKBONE, QUICK_NAME),
    )
    for shape, behind in (
        *((replace(shape, batch=batch), real) for shape in DATA_SETS for batch in MODEL_BATCHES),
        (QUICK_MAP, small),
    )
    for mode in MODES
)
