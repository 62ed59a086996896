"""The interpreter with a GPU's rounding errors: as exact as a GPU, and no more."""

from __future__ import annotations

import gpu_arithmetic
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from degmix_kernels.backend import INTERPRETED

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from NumPy, of overflow

RANDOM = np.random.default_rng(0)


def uniform(low: float, high: float) -> np.ndarray:
    return RANDOM.uniform(low, high, 200_000).astype(np.float32)


def ulps(actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return (actual - exact) / np.ldexp(1.0, np.frexp(exact)[1] - 24)


@pytest.mark.parametrize(
    ("function", "exact_function", "interval", "correct", "ulp", "relative"),
    [
        (gpu_arithmetic.reciprocal, lambda x: 1 / x, (1, 2), 0.87, 1, 2**-23),
        (gpu_arithmetic.rsqrt, lambda x: 1 / np.sqrt(x), (1, 4), 0.78, 1.52, 2**-22.9),
        (gpu_arithmetic.sqrt, np.sqrt, (1, 4), 0.87, 1, 2**-23),
        (gpu_arithmetic.exp2, np.exp2, (-20, 20), 0.74, 1.41, 2**-22),
        (gpu_arithmetic.log2, np.log2, (1, 4), 0.86, 1, 2**-23),
        (gpu_arithmetic.log, np.log, (1, 4), 0.86, 1, 2**-23),
    ],
)
def test_errors_are_the_published_ones(function, exact_function, interval, correct, ulp, relative):
    x = uniform(*interval)
    exact = exact_function(x.astype(np.float64))
    actual = function(x)
    assert actual.dtype == np.float32
    assert np.mean(actual == exact.astype(np.float32)) == pytest.approx(correct, abs=0.015)
    assert 0.9 * ulp < np.abs(ulps(actual, exact)).max() <= ulp
    assert np.abs(actual / exact - 1).max() <= relative
    assert abs(np.mean(ulps(actual, exact))) < 0.01  # no bias


def test_division_errs_by_at_most_two_ulp():
    x, y = uniform(1, 4), uniform(1, 4)
    exact = x.astype(np.float64) / y
    assert 1.5 < np.abs(ulps(gpu_arithmetic.divide(x, y), exact)).max() <= 2


def test_exp_rounds_the_product_before_the_power():
    x = uniform(-80, 80)
    power = (x * np.float32(np.log2(np.e))).astype(np.float64)
    assert np.abs(gpu_arithmetic.exp(x) / np.exp2(power) - 1).max() <= 2**-22
    lost = np.abs(gpu_arithmetic.exp(x) / np.exp(x.astype(np.float64)) - 1).max()
    # Half an ulp of the product, times ln 2 · log2 e.
    assert 2**-20 < lost < 80 * np.log2(np.e) * 2**-24 + 2**-22


def test_exact_results_stay_exact():
    integers = np.arange(-126, 128, dtype=np.float32)
    powers = np.ldexp(np.float32(1), integers.astype(int))
    values = uniform(-4, 4)[: len(powers)]
    assert np.array_equal(gpu_arithmetic.exp2(integers), powers)
    assert np.array_equal(gpu_arithmetic.log2(powers), integers)
    assert np.array_equal(
        gpu_arithmetic.rsqrt(powers[::2]), np.ldexp(np.float32(1), -integers[::2].astype(int) // 2)
    )
    moderate = np.abs(integers) < 100
    assert np.array_equal(gpu_arithmetic.divide(values, powers)[moderate], (values / powers)[moderate])
    assert gpu_arithmetic.exp(np.zeros(1, np.float32)) == 1


def test_ends_of_the_range():
    inf, nan = np.inf, np.nan
    exp = gpu_arithmetic.exp(np.float32([-inf, inf, nan, -200, 89]))
    np.testing.assert_array_equal(exp, np.float32([0, inf, nan, 0, inf]))
    np.testing.assert_array_equal(gpu_arithmetic.exp2(np.float32([-126.5, -inf])), np.float32([0, 0]))
    over, under = np.float32([1, 0, 1, inf, 2.0**127, -1]), np.float32([0, 0, inf, inf, 2.0**127, 2.0**-128])
    np.testing.assert_array_equal(gpu_arithmetic.divide(over, under), np.float32([inf, nan, 0, nan, 1, -inf]))
    rsqrt = gpu_arithmetic.rsqrt(np.float32([0, -1, inf, 2.0**-130]))
    np.testing.assert_array_equal(rsqrt, np.float32([inf, nan, 0, inf]))
    np.testing.assert_array_equal(gpu_arithmetic.log2(np.float32([0, -1, inf])), np.float32([-inf, nan, inf]))


def test_an_instruction_is_a_function():
    x = uniform(1, 2)
    assert np.array_equal(gpu_arithmetic.reciprocal(x), gpu_arithmetic.reciprocal(x.copy()))
    assert np.array_equal(gpu_arithmetic.reciprocal(x[::3]), gpu_arithmetic.reciprocal(x)[::3])
    assert np.array_equal(gpu_arithmetic.reciprocal(x * 8), gpu_arithmetic.reciprocal(x) / 8)
    assert np.array_equal(gpu_arithmetic.rsqrt(x * 16), gpu_arithmetic.rsqrt(x) / 4)
    assert np.array_equal(gpu_arithmetic.exp2(x * 2), gpu_arithmetic.exp2(x * 2 - 5) * 32)


@triton.jit
def every_function(x_ptr, output_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)
    tl.store(output_ptr + index, tl.exp(x))
    tl.store(output_ptr + SIZE + index, tl.exp2(x))
    tl.store(output_ptr + 2 * SIZE + index, tl.log2(x))
    tl.store(output_ptr + 3 * SIZE + index, tl.rsqrt(x))
    tl.store(output_ptr + 4 * SIZE + index, tl.sqrt(x))
    tl.store(output_ptr + 5 * SIZE + index, 3.0 / x)
    tl.store(output_ptr + 6 * SIZE + index, tl.div_rn(3.0, x))


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_kernels_compute_with_it(monkeypatch):
    for name in gpu_arithmetic.FUNCTIONS:  # so that they are as before when the test ends
        monkeypatch.setattr(InterpreterBuilder, name, getattr(InterpreterBuilder, name))
    monkeypatch.setenv(gpu_arithmetic.VARIABLE, "1")
    gpu_arithmetic.switch_on_if_wanted()
    x, output = torch.linspace(1, 2, 4096), torch.empty(7, 4096)
    every_function[(1,)](x, output, 4096)
    x = x.double()
    exact = torch.stack([x.exp(), x.exp2(), x.log2(), x.rsqrt(), x.sqrt(), 3 / x, 3 / x])
    *approximate, division_to_nearest = (output == exact.float()).double().mean(1).tolist()
    assert all(0.5 < share < 0.93 for share in approximate), approximate
    assert division_to_nearest == 1


def test_a_compiler_is_not_changed(monkeypatch):
    monkeypatch.setenv(gpu_arithmetic.VARIABLE, "1")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="=1 changes Triton's interpreter, and needs TRITON_INTERPRET=1"):
        gpu_arithmetic.switch_on_if_wanted()
