"""Triton's interpreter, with the rounding errors of an NVIDIA GPU's exp, log, square root and division.

``DEGMIX_GPU_ARITHMETIC=1`` switches it on. The interpreter computes these functions in fp32 with NumPy,
nearly correctly rounded. A GPU asks its special function unit, which errs by up to 1.5 units in the last
place (ulp). The error depends on the input alone: the same input always gives the same result.

What Triton 3.6 makes of the functions for sm_90, read from the PTX and the machine code:

- ``exp(x)`` is ``ex2.approx(x · log₂ e)``, the product rounded to fp32. Where the product is below -126, it
  is halved, and the result squared.
- ``exp2(x)`` is ``ex2.approx.ftz``: a result below 2⁻¹²⁶ becomes 0.
- ``a / b`` is ``div.full``: ``a`` times the reciprocal of ``b``, both rounded.
- ``rsqrt`` and ``sqrt`` are ``rsqrt.approx.ftz`` and ``sqrt.approx.ftz``.
- ``log`` and ``log2`` are polynomials, not ``lg2.approx``.
- ``div_rn`` and ``sqrt_rn`` round correctly. The interpreter does the same, so they stay as they are.

Three things of a GPU are not imitated: a product and a sum contracted to one FMA, the order of sums, and
the rounding inside matrix instructions. A process that a test starts computes as the CPU does.

S. Oberman and M. Siu describe the unit in "A High-Performance Area-Efficient Multifunction Interpolator",
2005. E. Lindholm et al., "NVIDIA Tesla: A Unified Graphics and Computing Architecture", 2008, give its
largest errors and the shares of correctly rounded results in table 1. Units of later GPUs are taken to be as
exact.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

VARIABLE = "DEGMIX_GPU_ARITHMETIC"
TINY = np.float32(2.0**-126)  # the smallest normal number
LOG2_E = np.float32(1.4426950408889634)


@dataclass(frozen=True)
class Unit:
    """How exact an instruction is.

    The unit adds an error of its own to the exact value, and rounds the sum to nearest. An error of n ulp
    changes what is nearest in a share |n| of all cases. So |n| is at most ``ulp`` - 1/2, and 1 - ``correct``
    on average.
    Both hold for |n| = m · vᵖ with v uniform in [0, 1], m = ``ulp`` - 1/2 and p = m / (1 - ``correct``) - 1.
    """

    ulp: float  # the largest error
    correct: float  # share of the results that are correctly rounded
    relative: float  # the largest relative error; it is the smaller bound where the mantissa is near 1

    def __call__(self, value: np.ndarray, key: np.ndarray) -> np.ndarray:
        """The fp64 ``value`` in fp32, with an error that the fp32 ``key`` decides.

        A value that fp32 holds exactly is returned as it is.
        """
        largest = self.ulp - 0.5
        uniform = _uniform(key)
        error = largest * np.sign(uniform) * np.abs(uniform) ** (largest / (1 - self.correct) - 1)
        ulp = np.ldexp(1.0, np.frexp(value)[1] - 24)
        room = self.relative * np.abs(value) / ulp - 0.5
        nearest = value.astype(np.float32)
        erring = np.isfinite(value) & (nearest != value)
        shifted = np.where(erring, value + np.clip(error, -room, room) * ulp, 0).astype(np.float32)
        return np.where(erring, shifted, nearest)


# Lindholm et al., table 1: largest error and share. The table's good bits, 24.02, 23.40 and 22.51, agree:
# 0.98 ulp and 1.52 ulp of results in [1/2, 1), and 1.41 ulp of results in [1, 2). The third number is
# documented for PTX. That of the reciprocal keeps a quotient, which is rounded again, within PTX's 2 ulp.
RECIPROCAL = Unit(0.98, 0.87, 1.5 * 2**-24)
RECIPROCAL_SQUARE_ROOT = Unit(1.52, 0.78, 2**-22.9)
POWER_OF_TWO = Unit(1.41, 0.74, 2**-22)
# Only the bound of PTX is published. Error and share are those of the reciprocal.
SQUARE_ROOT = Unit(0.98, 0.87, 2**-23)
# Documented for CUDA is 1 ulp. The polynomial of log2, run with its FMAs on 3 million numbers in each of
# [1, 4), [1/2, 2) and [1, 1000), errs by at most 0.92 ulp, and rounds at least 86 % correctly.
LOGARITHM = Unit(0.92, 0.86, 2**-23)


def _uniform(key: np.ndarray) -> np.ndarray:
    """In [-1, 1), from the bits of fp32 numbers, mixed as MurmurHash3 ends."""
    bits = np.ascontiguousarray(key, dtype=np.float32).view(np.uint32)
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    bits ^= bits >> np.uint32(16)
    return (bits.astype(np.float64) / 2**31 - 1).reshape(np.shape(key))


def _flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < TINY, x * np.float32(0), x)


def exp2(x: np.ndarray) -> np.ndarray:
    fraction = x - np.floor(x)  # the integer part only shifts the result
    return _flushed(POWER_OF_TWO(np.exp2(x.astype(np.float64)), fraction))


def exp(x: np.ndarray) -> np.ndarray:
    power = x * LOG2_E
    small = power < -126
    half = exp2(np.where(small, power * np.float32(0.5), power))
    return np.where(small, half * half, half)


def reciprocal(x: np.ndarray) -> np.ndarray:
    x = _flushed(x)
    return _flushed(RECIPROCAL(1 / x.astype(np.float64), np.frexp(x)[0]))


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    size = np.abs(denominator)
    scale = np.where(size > 2.0**126, 2.0**-2, np.where(size < TINY, 2.0**24, 1.0)).astype(np.float32)
    return reciprocal(denominator * scale) * (numerator * scale)


def _between_1_and_4(x: np.ndarray) -> np.ndarray:
    """x times a power of four: all that the mantissa of a square root depends on."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(mantissa, 2 - exponent % 2)


def rsqrt(x: np.ndarray) -> np.ndarray:
    x = _flushed(x)
    return RECIPROCAL_SQUARE_ROOT(1 / np.sqrt(x.astype(np.float64)), _between_1_and_4(x))


def sqrt(x: np.ndarray) -> np.ndarray:
    x = _flushed(x)
    return SQUARE_ROOT(np.sqrt(x.astype(np.float64)), _between_1_and_4(x))


def log2(x: np.ndarray) -> np.ndarray:
    return LOGARITHM(np.log2(x.astype(np.float64)), x)


def log(x: np.ndarray) -> np.ndarray:
    return LOGARITHM(np.log(x.astype(np.float64)), x)


FUNCTIONS = {
    "create_exp": exp,
    "create_exp2": exp2,
    "create_fdiv": divide,
    "create_log": log,
    "create_log2": log2,
    "create_rsqrt": rsqrt,
    "create_sqrt": sqrt,
}


def switch_on_if_wanted() -> None:
    """Change Triton's interpreter in this process if the environment asks for it.

    Raises:
        RuntimeError: the environment asks for it, but kernels do not run in the interpreter.
    """
    if os.environ.get(VARIABLE, "0") != "1":
        return
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise RuntimeError(f"{VARIABLE}=1 changes Triton's interpreter, and needs TRITON_INTERPRET=1")
    from triton.runtime.interpreter import InterpreterBuilder

    for name, function in FUNCTIONS.items():
        setattr(InterpreterBuilder, name, _in_fp32(function, getattr(InterpreterBuilder, name)))


def _in_fp32(function, original):
    """A method of the interpreter that takes ``function`` for fp32, and the ``original`` for other dtypes."""

    def method(builder, *operands):
        result = original(builder, *operands)
        arrays = [operand.data for operand in operands]
        if any(array.dtype != np.float32 for array in arrays):
            return result
        with np.errstate(all="ignore"):
            result.data = np.asarray(function(*arrays), dtype=np.float32)
        return result

    return method
