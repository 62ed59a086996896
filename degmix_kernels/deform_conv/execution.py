"""How a call of the deformable convolution runs: path, allocation, parts of the batch.

Two sets of kernels do the work: the general ones where blocks of 16 channels or more share offsets and
weights, the planar ones everywhere else. Neither builds columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from degmix_kernels import maps
from degmix_kernels.deform_conv import general, planar
from degmix_kernels.deform_conv.problem import PART_SHARE, Problem
from degmix_kernels.epilogue import Epilogue
from degmix_kernels.launch import run
from degmix_kernels.maps import ceil_div


def make_problem(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, geometry: tuple[int, ...]
) -> tuple[Problem, ModuleType]:
    """The call, and its path. ``geometry``: stride, padding, dilation, each (y, x)."""
    # Taps last: neighbouring channels of the weight are then neighbours in memory, as kernels read them.
    weight = weight.contiguous(memory_format=torch.channels_last)
    problem = Problem(input, offset, weight, mask, geometry[0:2], geometry[2:4], geometry[4:6])
    return problem, general if general.suits(problem) else planar


def _reads_input(problem: Problem, path: ModuleType) -> bool:
    """Whether a path reads the input as it lies in memory."""
    if path is general:
        return problem.input.is_contiguous(memory_format=torch.channels_last)
    return maps.is_dense(problem.input)


def readable(problem: Problem, path: ModuleType) -> Problem:
    """The call on tensors that a path reads: themselves, or copies."""
    input, offset, mask = problem.input, problem.offset, problem.mask
    dense = maps.is_dense(offset) and (mask is None or maps.is_dense(mask))
    if dense and _reads_input(problem, path):
        return problem
    last = torch.channels_last
    return replace(
        problem,
        input=input.contiguous(memory_format=last) if path is general else maps.dense(input),
        offset=maps.dense(offset),
        mask=None if mask is None else maps.dense(mask),
    )


def copied_bytes(problem: Problem, path: ModuleType, grad: Tensor | None = None) -> int:
    """Bytes that ``readable``, and making the gradient dense, copy per image."""
    copied = [] if _reads_input(problem, path) else [problem.input]
    others = (tensor for tensor in (problem.offset, problem.mask, grad) if tensor is not None)
    copied += [tensor for tensor in others if not maps.is_dense(tensor)]
    return sum(tensor[:1].numel() * tensor.element_size() for tensor in copied)


def parts(problem: Problem, bytes_per_image: int) -> Iterator[tuple[Problem, slice]]:
    """The call in parts of the batch, as few and as equal as possible, given what an image needs temporarily.

    A part's temporaries take ``PART_SHARE`` of the column buffer at most, or what one image needs.
    """
    batch = images = problem.batch
    if bytes_per_image > 0 and batch > 1:
        budget = PART_SHARE * problem.columns * problem.input.element_size()
        images = min(batch, max(1, int(budget // bytes_per_image)))
    if images == batch:
        if batch > 0:
            yield problem, slice(None)
        return
    images = ceil_div(batch, ceil_div(batch, images))
    for start in range(0, batch, images):
        part = slice(start, min(start + images, batch))
        yield problem.images(part.start, part.stop), part


def empty_output(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """The result, uninitialised: channels_last if the input is."""
    last = maps.is_channels_last(input)
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)


def _empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A dense tensor like this one, uninitialised: channels_last or contiguous."""
    last = maps.is_channels_last(tensor)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(tensor, dtype=dtype, memory_format=memory_format)


def empty_gradients(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, wanted: list[bool]
) -> list[Tensor]:
    """Gradients of input, offset, weight, bias and mask, uninitialised; an empty tensor where not wanted."""
    none = input.new_empty(0)
    like = [
        lambda: _empty_like(input),
        lambda: _empty_like(offset),
        lambda: torch.empty_like(weight, memory_format=torch.contiguous_format),
        lambda: weight.new_empty(weight.shape[0]),
        lambda: none if mask is None else _empty_like(mask),
    ]
    return [make() if want else none.clone() for make, want in zip(like, wanted, strict=True)]


def fill_gradients(
    problem: Problem,
    path: ModuleType,
    grad: Tensor,
    epilogue: Epilogue | None,
    results: list[Tensor],
    wanted: list[bool],
    deterministic: bool,
) -> None:
    """Fill ``results``, gradients of input, offset, weight, bias and mask, where wanted.

    A part of the batch at a time, to keep the temporaries small: an image in the layout a path reads, and the
    sums of the input's gradient, where they are not the result itself.
    """
    grad_input, grad_offset, _, _, grad_mask = (
        result if want else None for result, want in zip(results, wanted, strict=True)
    )
    wants_input, wants_offset, wants_weight, wants_bias, wants_mask = wanted
    scale = None
    if wants_input and deterministic and grad.numel() > 0:
        scale = planar.fixed_point_scale(problem, grad, epilogue)
    bytes_per_image = copied_bytes(problem, path, grad)
    summable = scale is None and problem.input.dtype == torch.float32
    in_place = wants_input and summable and _reads_input(problem, path)
    if in_place:
        grad_input.zero_()
    elif wants_input:
        bytes_per_image += problem.input[:1].numel() * (4 if scale is None else 8)
    fused = epilogue is not None  # the bias gradient then sums what the weight's kernel computes anyway
    totals = None  # sums of the weight's, then the bias's partial sums

    for part, images in parts(problem, bytes_per_image):
        part = readable(part, path)
        extra = () if epilogue is None else (replace(epilogue, pre=epilogue.pre[images]),)
        grad_part = maps.dense(grad[images])
        if wants_input or wants_offset or wants_mask:
            sums = None
            if in_place:
                sums = grad_input[images]
            elif wants_input:
                sums = torch.zeros_like(part.input, dtype=torch.float32 if scale is None else torch.int64)
            offsets, masks = (None if each is None else each[images] for each in (grad_offset, grad_mask))
            run(path.plan_backward_samples(part, grad_part, sums, offsets, masks, scale, *extra), grad.device)
            if wants_input and not in_place:
                if scale is None:
                    grad_input[images] = sums
                else:
                    torch.mul(sums, scale.reciprocal(), out=grad_input[images])
            del sums
        if wants_weight or (wants_bias and fused):
            plan, *partials = path.plan_backward_weight(
                part, grad_part, *extra, *((wants_bias,) if fused else ())
            )
            run(plan, grad.device)
            partials = [partial.sum(0) for partial in partials if partial is not None]
            if totals is None:
                totals = partials
            else:
                torch._foreach_add_(totals, partials)
            del plan, partials
        del part, grad_part, extra  # before the next part is copied
    if problem.batch == 0:
        for result in (results[2], results[3]):
            result.zero_()
        return
    if wants_weight:
        results[2].copy_(path.finish_weight(totals[0], problem.weight))
    if wants_bias:
        results[3].copy_(totals[1] if fused else grad.sum((0, 2, 3), dtype=torch.float32))
