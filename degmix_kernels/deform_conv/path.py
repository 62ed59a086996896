"""How a deformable convolution runs on one set of kernels: layouts, parts of the batch, allocation.

Two sets of kernels do the work, ``general`` and ``planar``. Neither builds columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from degmix_kernels import maps
from degmix_kernels.deform_conv.problem import PART_SHARE, Problem
from degmix_kernels.epilogue import Epilogue
from degmix_kernels.launch import Launch, run

Part = tuple[Problem, slice]
"""Some images of a call, and which."""


@dataclass(frozen=True)
class Path:
    """One set of kernels; see the plans of each.

    Attributes:
        channels_last: whether the kernels read the input channels_last only; otherwise in any dense layout.
        plan_forward: ``plan_forward(problem, bias, output)``.
        plan_backward_samples: plans the gradients of input, offset and mask.
        plan_backward_weight: plans the gradient of the weight, and allocates its partial sums.
        finish_weight: makes the weight's gradient of the sums.
    """

    channels_last: bool
    plan_forward: Callable[..., Launch]
    plan_backward_samples: Callable[..., Launch]
    plan_backward_weight: Callable[..., Sequence]
    finish_weight: Callable[[Tensor, Tensor], Tensor]

    def forward(self, problem: Problem, bias: Tensor | None, output: Tensor) -> None:
        """Fill the output."""
        bias = None if bias is None else bias.contiguous()
        for part, images in parts(problem, self.copied_bytes(problem)):
            run(self.plan_forward(self.readable(part), bias, output[images]), output.device)

    def readable(self, problem: Problem) -> Problem:
        """The call on tensors that the kernels read: themselves, or copies."""
        input, offset, mask = problem.input, problem.offset, problem.mask
        dense = maps.is_dense(offset) and (mask is None or maps.is_dense(mask))
        if dense and self._reads(input):
            return problem
        last = torch.channels_last
        return replace(
            problem,
            input=input.contiguous(memory_format=last) if self.channels_last else maps.dense(input),
            offset=maps.dense(offset),
            mask=None if mask is None else maps.dense(mask),
        )

    def copied_bytes(self, problem: Problem, grad: Tensor | None = None) -> int:
        """Bytes that ``readable``, and making the gradient dense, copy per image."""
        copied = [] if self._reads(problem.input) else [problem.input]
        others = (tensor for tensor in (problem.offset, problem.mask, grad) if tensor is not None)
        copied += [tensor for tensor in others if not maps.is_dense(tensor)]
        return sum(tensor[:1].numel() * tensor.element_size() for tensor in copied)

    def _reads(self, input: Tensor) -> bool:
        """Whether the kernels read the input as it lies in memory."""
        if self.channels_last:
            return input.is_contiguous(memory_format=torch.channels_last)
        return maps.is_dense(input)

    def gradients(
        self,
        problem: Problem,
        grad: Tensor,
        wanted: Sequence[bool],
        deterministic: bool,
        epilogue: Epilogue | None = None,
    ) -> list[Tensor | None]:
        """Gradients of input, offset, weight, bias and mask, None where not wanted.

        A part of the batch at a time, to keep the temporaries small: an image in the layout that the kernels
        read, and the sums of the input's gradient, where they are not the result itself.
        """
        wants_input, wants_offset, wants_weight, wants_bias, wants_mask = wanted
        scale = None
        if wants_input and deterministic and grad.numel() > 0:
            scale = fixed_point_scale(problem, grad, epilogue)
        grad_input, grad_offset, grad_mask = (
            maps.empty_like(tensor) if want else None
            for tensor, want in (
                (problem.input, wants_input),
                (problem.offset, wants_offset),
                (problem.mask, wants_mask),
            )
        )
        bytes_per_image = self.copied_bytes(problem, grad)
        summable = scale is None and problem.input.dtype == torch.float32
        in_place = wants_input and summable and self._reads(problem.input)
        if in_place:
            grad_input.zero_()
        elif wants_input:
            bytes_per_image += problem.input[:1].numel() * (4 if scale is None else 8)
        fused = epilogue is not None  # the bias gradient then sums what the weight's kernel computes anyway
        totals = None  # sums of the weight's, then the bias's partial sums

        for part, images in parts(problem, bytes_per_image):
            part = self.readable(part)
            extra = () if epilogue is None else (replace(epilogue, pre=epilogue.pre[images]),)
            grad_part = maps.dense(grad[images])
            if wants_input or wants_offset or wants_mask:
                sums = None
                if in_place:
                    sums = grad_input[images]
                elif wants_input:
                    sums = torch.zeros_like(part.input, dtype=torch.float32 if scale is None else torch.int64)
                offsets, masks = (None if each is None else each[images] for each in (grad_offset, grad_mask))
                run(
                    self.plan_backward_samples(part, grad_part, sums, offsets, masks, scale, *extra),
                    grad.device,
                )
                if wants_input and not in_place:
                    if scale is None:
                        grad_input[images] = sums
                    else:
                        torch.mul(sums, scale.reciprocal(), out=grad_input[images])
                del sums
            if wants_weight or (wants_bias and fused):
                flags = (wants_bias,) if fused else ()
                plan, *partials = self.plan_backward_weight(part, grad_part, *extra, *flags)
                run(plan, grad.device)
                partials = [partial.sum(0) for partial in partials if partial is not None]
                if totals is None:
                    totals = partials
                else:
                    torch._foreach_add_(totals, partials)
                del plan, partials
            del part, grad_part, extra  # before the next part is copied
        grad_weight = grad_bias = None
        if wants_weight and totals is None:  # no images
            grad_weight = torch.zeros_like(problem.weight)
        elif wants_weight:
            grad_weight = self.finish_weight(totals[0], problem.weight)
        if wants_bias:
            of_kernel = fused and totals is not None
            grad_bias = totals[1] if of_kernel else grad.sum((0, 2, 3), dtype=torch.float32)
        return [grad_input, grad_offset, grad_weight, grad_bias, grad_mask]


def parts(problem: Problem, bytes_per_image: int) -> Iterator[Part]:
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
    images = maps.ceil_div(batch, maps.ceil_div(batch, images))
    for start in range(0, batch, images):
        part = slice(start, min(start + images, batch))
        yield problem.images(part.start, part.stop), part


def fixed_point_scale(problem: Problem, grad: Tensor, epilogue: Epilogue | None = None) -> Tensor:
    """The power of two at which no sum of the deterministic input gradient can leave 62 bits.

    The gradient of a sample is at most max|dz| · max over channels and taps of Σ|weight| · max|mask|, and
    every output pixel adds at most that much, once per tap, to an input pixel. NaN if any of these is not
    finite: all of the input gradient is then NaN.
    """
    weight = problem.weight.detach().double().abs()
    per_channel = weight.reshape(problem.groups, problem.group_out, -1, problem.taps).sum((1, 3)).amax()
    bound = _largest(grad)
    if epilogue is not None:
        if epilogue.constant is not None:
            bound = bound + _largest(epilogue.constant)
        if epilogue.linear is not None:
            bound = bound + _largest(epilogue.linear) * _largest(epilogue.pre)  # |act(z)| ≤ |z|
        bound = bound * 1.2  # no activation is steeper
    bound = bound * per_channel * problem.out_pixels
    if problem.mask is not None:
        bound = bound * _largest(problem.mask)
    exponent = (61 - bound.log2()).floor().clamp(-126, 126)
    return torch.where(bound.isfinite(), exponent.exp2(), torch.nan).float()


def _largest(tensor: Tensor) -> Tensor:
    """The largest magnitude, without a temporary of the tensor's size; NaN if there is a NaN."""
    return torch.linalg.vector_norm(tensor.detach(), torch.inf).double()
