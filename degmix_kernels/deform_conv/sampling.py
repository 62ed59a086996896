"""What the deformable convolution's kernels share: coordinates, addresses, blends.

Coordinates, blends and sums are fp32.
"""

import triton
import triton.language as tl


@triton.jit
def tensor_address(image, channel, pixel, channels, pixels, LAST: tl.constexpr):
    """Offset of an element of a dense tensor, planar (N, channels, pixels) or LAST: (N, pixels, channels)."""
    if LAST:
        return image * channels * pixels + pixel * channels + channel
    return image * channels * pixels + channel * pixels + pixel


@triton.jit
def is_number(value):
    """False where NaN. In fp32, as the interpreter compares the bit patterns of bf16."""
    return value.to(tl.float32) == value.to(tl.float32)


@triton.jit
def split_coordinate(offset, base, size):
    """Integer part and fraction of base + offset along an axis of ``size`` pixels, as reference._split.

    The range is limited before the conversion to integers, so infinite, huge and NaN offsets give -2, which
    has no pixel next to it; a NaN stays in the fraction.
    """
    outside = (offset < -1 - base) | (offset >= size - base)
    offset = tl.where(outside, (-2 - base).to(tl.float32), offset)
    low = tl.floor(offset)
    defined = low == low
    return tl.where(defined, tl.where(defined, low, 0.0).to(tl.int32) + base, -2), offset - low


@triton.jit
def locate(offset_y, offset_x, base_y, base_x, height, width):
    """Upper left corner and fractions of samples at base + offset; a NaN in an axis spoils both fractions."""
    low_y, fraction_y = split_coordinate(offset_y, base_y, height)
    low_x, fraction_x = split_coordinate(offset_x, base_x, width)
    undefined = (fraction_y + fraction_x) * 0  # 0, or NaN
    return low_y, low_x, fraction_y + undefined, fraction_x + undefined


@triton.jit
def corners_on_map(low_y, low_x, valid, height, width):
    """Which of the four corners lie on the map: upper left, upper right, lower left, lower right.

    Rows and columns run from -2 to size - 1, so two comparisons per axis settle all bounds.
    """
    upper = valid & (low_y >= 0)
    lower = valid & (low_y >= -1) & (low_y < height - 1)
    left = low_x >= 0
    right = (low_x >= -1) & (low_x < width - 1)
    return upper & left, upper & right, lower & left, lower & right


@triton.jit
def blend(value_00, value_01, value_10, value_11, fraction_y, fraction_x):
    """Bilinear interpolation."""
    upper = (1 - fraction_x) * value_00 + fraction_x * value_01
    lower = (1 - fraction_x) * value_10 + fraction_x * value_11
    return (1 - fraction_y) * upper + fraction_y * lower


@triton.jit
def scatter(grad_input_ptr, address, gradient, valid, scale, FIXED_POINT: tl.constexpr):
    """Add to the input gradient: fp32, or integers in units of 1 / scale, whose sums know no order."""
    if FIXED_POINT:
        gradient = (gradient * scale).to(tl.int64)
    tl.atomic_add(grad_input_ptr + address, gradient, mask=valid, sem="relaxed")
