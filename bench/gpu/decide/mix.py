"""The backward pass of ``deform_mix``: as it is, or dz once, a product, a scatter over planes, a product."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.cases.deform_conv import deform_mix_of, mix
from bench.cases.op import Draw
from bench.cases.shapes import NYUD, WILD_OFFSETS
from bench.gpu.decide.common import BF16, FP32, SMALL_MAP, backward, model_offsets, product, torchvision_rows
from bench.gpu.decide.meter import Meter
from degmix_kernels import deform_mix
from degmix_kernels.deform_conv import reference
from degmix_kernels.deform_conv.mix_op import mix_op
from degmix_kernels.deform_conv.sampling import corners_on_map, is_number, locate
from degmix_kernels.epilogue import load_gradient
from degmix_kernels.launch import Launch, run
from degmix_kernels.maps import ceil_div

ALL = ("x", "offset", "weight", "bias")
PARTS = (("x",), ("offset",), ("x", "offset"), ("weight", "bias"))  # of the gradients


@triton.jit
def activation_backward(
    grad_ptr,
    pre_ptr,
    constant_ptr,
    linear_ptr,
    dz_ptr,
    sums_ptr,
    channels,
    pixels,
    blocks,
    BLOCK: tl.constexpr,
):
    """dz, see ``degmix_kernels.epilogue``, and its sums. One program: BLOCK pixels of a plane."""
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    pixel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < pixels
    at = plane * pixels + pixel
    dz = load_gradient(
        grad_ptr, pre_ptr, constant_ptr, linear_ptr, at, plane % channels, plane >= 0, valid, "gelu"
    )
    tl.store(dz_ptr + at, dz, mask=valid)
    tl.store(sums_ptr + program, tl.sum(dz.to(tl.float32)))


@triton.jit
def add_pair(copies_ptr, pixel, left, right, on_left, on_right, size):
    """Add to a pixel and its right neighbour in a plane of two copies, in one aligned piece of 64 bits.

    Pixel p is at p in the first copy and at p + 1 of the second, size + p + 1: pairs of even p are aligned in
    the first, those of odd p, -1 among them, in the second. Beside the map a zero is added.
    """
    odd = pixel & 1
    at = tl.multiple_of(odd * size + pixel + odd, 2)
    pair = tl.join(tl.where(on_left, left, 0.0), tl.where(on_right, right, 0.0))
    address = at[:, None] + tl.arange(0, 2)[None, :]
    tl.atomic_add(copies_ptr + address, pair, mask=(on_left | on_right)[:, None], sem="relaxed")


@triton.jit
def samples_backward(
    dcol_ptr,  # (planes, pixels), the samples' gradients: Wᵀ · dz
    input_ptr,  # (planes, pixels)
    offset_ptr,  # (planes, 2, pixels)
    grad_input_ptr,  # as input, fp32, added to; with PAIRS (planes, 2, size); None if not wanted
    grad_offset_ptr,  # as offset; None if not wanted
    col_ptr,  # as input, for the samples, which the weight's gradient needs; None if not wanted
    height,
    width,
    pixels,
    blocks,
    size,  # of a copy, with PAIRS
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,  # two copies of the input's gradient, see add_pair
):
    """Gradients of input and offset. One program: BLOCK pixels of a plane."""
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    pixel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < pixels
    at = plane * pixels + pixel
    offset_at = at + plane * pixels
    offset_y = tl.load(offset_ptr + offset_at, mask=valid, other=0.0)
    offset_x = tl.load(offset_ptr + offset_at + pixels, mask=valid, other=0.0)
    gradient = tl.load(dcol_ptr + at, mask=valid, other=0.0).to(tl.float32)
    low_y, low_x, fraction_y, fraction_x = locate(
        offset_y, offset_x, pixel // width, pixel % width, height, width
    )
    on_00, on_01, on_10, on_11 = corners_on_map(low_y, low_x, valid, height, width)
    corner = plane * pixels + low_y * width + low_x
    value_00 = tl.load(input_ptr + corner, mask=on_00, other=0.0).to(tl.float32)
    value_01 = tl.load(input_ptr + corner + 1, mask=on_01, other=0.0).to(tl.float32)
    value_10 = tl.load(input_ptr + corner + width, mask=on_10, other=0.0).to(tl.float32)
    value_11 = tl.load(input_ptr + corner + width + 1, mask=on_11, other=0.0).to(tl.float32)
    upper_dx, lower_dx = value_01 - value_00, value_11 - value_10
    upper, lower = value_00 + fraction_x * upper_dx, value_10 + fraction_x * lower_dx
    if col_ptr is not None:
        col = upper + fraction_y * (lower - upper)
        tl.store(col_ptr + at, col.to(col_ptr.dtype.element_ty), mask=valid)
    if grad_offset_ptr is not None:
        grad_y = gradient * (lower - upper)
        grad_x = gradient * (upper_dx + fraction_y * (lower_dx - upper_dx))
        # A coordinate off the map is a constant, whatever gradient arrives there.
        grad_y = tl.where((low_y < -1) & is_number(offset_y), 0.0, grad_y)
        grad_x = tl.where((low_x < -1) & is_number(offset_x), 0.0, grad_x)
        tl.store(grad_offset_ptr + offset_at, grad_y, mask=valid)
        tl.store(grad_offset_ptr + offset_at + pixels, grad_x, mask=valid)
    if grad_input_ptr is not None:
        grad_lower = fraction_y * gradient
        grad_upper = gradient - grad_lower
        upper_right, lower_right = fraction_x * grad_upper, fraction_x * grad_lower
        upper_left, lower_left = grad_upper - upper_right, grad_lower - lower_right
        if PAIRS:
            copies_ptr, pixel = grad_input_ptr + plane * 2 * size, low_y * width + low_x
            add_pair(copies_ptr, pixel, upper_left, upper_right, on_00, on_01, size)
            add_pair(copies_ptr, pixel + width, lower_left, lower_right, on_10, on_11, size)
        else:
            tl.atomic_add(grad_input_ptr + corner, upper_left, mask=on_00, sem="relaxed")
            tl.atomic_add(grad_input_ptr + corner + 1, upper_right, mask=on_01, sem="relaxed")
            tl.atomic_add(grad_input_ptr + corner + width, lower_left, mask=on_10, sem="relaxed")
            tl.atomic_add(grad_input_ptr + corner + width + 1, lower_right, mask=on_11, sem="relaxed")


class Redesign:
    """The backward pass in steps. Call it for all of them.

    Args:
        arguments: of ``deform_mix``.
        grads: of the result, its mean and its variance.
        pairs: whether the input's gradient is added to in pairs of pixels.
    """

    def __init__(
        self, arguments: Mapping[str, Tensor], grads: tuple[Tensor, Tensor, Tensor], pairs: bool = False
    ) -> None:
        self.x, self.offset, self.weight = (arguments[name] for name in ("x", "offset", "weight"))
        self.grad = grads[0]
        with torch.no_grad():
            _, mean, _, self.pre = mix_op(mix_op.call(*arguments.values(), "gelu", True, True, False))
        count = self.x.numel() // self.x.shape[1]
        self.linear = 2 / count * grads[2]
        self.constant = grads[1] / count - self.linear * mean
        self.pixels = self.x.shape[2] * self.x.shape[3]
        self.block = min(1024, triton.next_power_of_2(self.pixels))
        self.blocks = ceil_div(self.pixels, self.block)
        self.dz, self.dcol, self.col = (torch.zeros_like(self.x) for _ in range(3))
        # Of a copy: room for a pixel more at both ends, and a multiple of 16, which Triton knows is even.
        self.pairs, self.size = pairs, ceil_div(self.pixels + 2, 16) * 16
        planes = self.x.shape[:2]
        self.sums = (
            self.x.new_zeros(*planes, 2, self.size, dtype=FP32)
            if pairs
            else torch.zeros_like(self.x, dtype=FP32)
        )
        self.grad_offset = torch.empty_like(self.offset)
        self.dz_sums = self.x.new_empty(*self.x.shape[:2], self.blocks, dtype=FP32)

    def __call__(self) -> tuple[Tensor, ...]:
        """Gradients of x, offset, weight and bias."""
        self.compute_dz()
        self.compute_dcol()
        self.sums.zero_()
        self.scatter()
        return (
            self.input_gradient(),
            self.grad_offset,
            self.weight_gradient(),
            self.dz_sums.sum((0, 2)).to(BF16),
        )

    def compute_dz(self) -> Tensor:
        """dz, and its sums for the bias."""
        arguments = {
            "grad_ptr": self.grad, "pre_ptr": self.pre, "constant_ptr": self.constant,
            "linear_ptr": self.linear, "dz_ptr": self.dz, "sums_ptr": self.dz_sums,
            "channels": self.x.shape[1], "pixels": self.pixels, "blocks": self.blocks,
        }  # fmt: skip
        run(
            Launch(activation_backward, self.dz_sums.numel(), arguments, {"BLOCK": self.block}), self.x.device
        )
        return self.dz

    def compute_dcol(self) -> Tensor:
        """The samples' gradients, Wᵀ · dz."""
        transposed = self.weight[:, :, 0, 0].mT.expand(self.x.shape[0], -1, -1)
        return torch.bmm(transposed, self.dz.flatten(2), out=self.dcol.flatten(2))

    def scatter(self, to_input: bool = True, others: bool = True) -> None:
        """Gradients of input and offset, and the samples."""
        size = 256
        blocks = ceil_div(self.pixels, size)
        arguments = {
            "dcol_ptr": self.dcol, "input_ptr": self.x, "offset_ptr": self.offset,
            "grad_input_ptr": self.sums if to_input else None,
            "grad_offset_ptr": self.grad_offset if others else None, "col_ptr": self.col if others else None,
            "height": self.x.shape[2], "width": self.x.shape[3], "pixels": self.pixels, "blocks": blocks,
            "size": self.size,
        }  # fmt: skip
        programs, constants = self.x.shape[0] * self.x.shape[1] * blocks, {"BLOCK": size, "PAIRS": self.pairs}
        run(Launch(samples_backward, programs, arguments, constants), self.x.device)

    def input_gradient(self) -> Tensor:
        """Of the sums."""
        if not self.pairs:
            return self.sums.to(BF16)
        first, second = self.sums.unbind(2)
        total = first[..., : self.pixels] + second[..., 1 : 1 + self.pixels]
        return total.to(BF16).view_as(self.x)

    def weight_gradient(self) -> Tensor:
        """dz · samplesᵀ, the images' shares in fp32."""
        shares = product(self.dz.flatten(2), self.col.flatten(2).mT)
        return shares.sum(0).to(BF16).view_as(self.weight)

    def sum_nothing(self) -> Tensor:
        """What the sums of the input's gradient cost beside the scatter."""
        self.sums.zero_()
        return self.input_gradient()


def rows(meter: Meter) -> None:
    """The section."""
    shape = SMALL_MAP if meter.dry else NYUD
    drawn = mix(Draw(meter.device, BF16), shape).arguments
    offsets = {
        "as the model": lambda: model_offsets(drawn["x"].float()),
        "sigma 1": lambda: drawn["offset"],
        "sigma 30": lambda: drawn["offset"] * WILD_OFFSETS,
    }
    if meter.dry:
        del offsets["sigma 30"]
    for kind, make in offsets.items():
        _rows(meter, kind, drawn | {"offset": make()})


def _rows(meter: Meter, kind: str, arguments: dict[str, Tensor]) -> None:
    name, x = f"mix bwd, {kind}", arguments["x"]
    count, channels = x.numel() // x.shape[1], x.shape[1]
    draw = partial(torch.randn, device=x.device)
    grads = (draw(x.shape).to(BF16), 0.1 * count * draw(channels), 0.1 * count * draw(channels))
    ours, theirs = (partial(each, statistics=True) for each in (deform_mix, reference.deform_mix))
    checked = {
        "bytes": 4 * x.nbytes + 2 * arguments["offset"].nbytes,
        "expected": cache(lambda: backward(theirs, arguments, ALL, grads, torch.float64)()),
    }
    for wanted in (ALL, *PARTS):
        step = backward(ours, arguments, wanted, grads)
        if wanted == ALL:
            meter.row(name, "present, all", step, **checked)
        else:
            meter.row(name, f"present, {', '.join(wanted)}", step)
    torchvision_rows(meter, name, arguments, ALL, grads[0], deform_mix_of)
    redesign, in_pairs = Redesign(arguments, grads), Redesign(arguments, grads, pairs=True)
    meter.row(name, "redesign, all", redesign, **checked)
    meter.row(name, "redesign, all, pairs", in_pairs, **checked)

    redesign(), in_pairs()  # fills what the steps read
    name = f"mix bwd scatter, {kind}"
    meter.row(name, "all", redesign.scatter)
    meter.row(name, "without the input's gradient", partial(redesign.scatter, to_input=False))
    meter.row(name, "the input's gradient alone", partial(redesign.scatter, others=False))
    meter.row(name, "the input's gradient alone, pairs", partial(in_pairs.scatter, others=False))
    if kind != "sigma 1":
        return
    name, flops = "mix bwd steps", 2 * x.numel() * channels
    meter.row(name, "dz", redesign.compute_dz, bytes=3 * x.nbytes)
    meter.row(name, "samples' gradients", redesign.compute_dcol, flops=flops)
    meter.row(name, "weight's gradient", redesign.weight_gradient, flops=flops)
    meter.row(name, "sums: zeros, then bf16", redesign.sum_nothing, bytes=10 * x.numel())
    meter.row(name, "sums of two copies: zeros, then bf16", in_pairs.sum_nothing, bytes=18 * x.numel())
