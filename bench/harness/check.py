"""Whether an implementation computes what the fp64 reference computes; nothing is timed before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.harness.case import SEED, Problem, Run
from degmix_kernels.testing import relative_l2

# A baseline that is further off than this computes something else; nearer ones have their error in their row.
ANOTHER_FUNCTION = 0.5


class CheckFailed(Exception):
    """The result is not the reference's; the message says by how much, ``error`` in relative L2 error."""

    def __init__(self, message: str, error: float) -> None:
        super().__init__(message)
        self.error = error


class Unchecked(Exception):
    """There is nothing to compare a result with; the message says why."""


@contextmanager
def exact_products() -> Iterator[None]:
    """PyTorch's own products and convolutions of fp32 in fp32, not TF32."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    try:
        yield
    finally:
        for setting, allowed in zip(settings, before, strict=True):
            setting.allow_tf32 = allowed


class Checker:
    """Compares runs of one problem with its fp64 reference, which is computed once; gradients, if asked."""

    def __init__(self, problem: Problem, gradients: bool) -> None:
        self.problem = problem
        self._gradients = gradients
        self._expected: dict[str, Tensor] | None = None
        self._too_large = False

    def check_ours(self, run: Run, gradients: bool) -> None:
        """See that ours is within the problem's limit, where nothing around it is rounded to TF32.

        Raises:
            CheckFailed, Unchecked: as of :meth:`check`.
        """
        with exact_products():
            self.check(run, gradients, self.problem.limit(self, gradients))

    def check(self, run: Run, gradients: bool, limit: float = ANOTHER_FUNCTION) -> float:
        """The largest relative L2 error of output and, if asked for, gradients.

        Raises:
            CheckFailed: if the error is above the limit, or NaN, or a shape is wrong.
            Unchecked: if the reference does not fit; it is tried once.
        """
        errors = self.errors(run, gradients)
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        if not errors[worst] <= limit:  # written so that NaN fails
            message = f"{worst}: relative L2 error {errors[worst]:.3e}, tolerance {limit:.3e}"
            raise CheckFailed(message, errors[worst])
        return errors[worst]

    def errors(self, run: Run, gradients: bool) -> dict[str, float]:
        """Relative L2 error by name of output or gradient."""
        if self._expected is None and not self._too_large:
            self._expect(run)  # first, as it may not fit beside what a backward pass of the run needs
        if self._too_large:
            raise Unchecked("the fp64 reference does not fit")
        with torch.set_grad_enabled(gradients):
            outputs = run.forward()
            grads = upstream(outputs, self.problem.dtype) if gradients else None
            actual = self._results(run, outputs, grads)
        errors = {}
        for name, result in actual.items():
            part, wanted = result[self.problem.part], self._expected[name]
            if part.shape != wanted.shape:
                message = f"{name}: expected shape {tuple(wanted.shape)}, got {tuple(part.shape)}"
                raise CheckFailed(message, math.inf)
            errors[name] = relative_l2(part, wanted)
        return errors

    def _expect(self, run: Run) -> None:
        """Compute the reference, or remember that it does not fit."""
        like = None
        if self._gradients and self.problem.part:  # of outputs that only a run has as a whole
            with torch.no_grad():
                like = run.forward()
        try:
            self._expected = self._reference(like)
        except torch.OutOfMemoryError:
            self._too_large = True

    def _reference(self, like: Sequence[Tensor] | None) -> dict[str, Tensor]:
        """What the reference computes; upstream gradients are as for ``like``, or for its outputs."""
        exact, part, grads = self.problem.exact(), self.problem.part, None
        with torch.set_grad_enabled(self._gradients):
            outputs = exact.forward()
            if self._gradients:
                whole = upstream(like or outputs, self.problem.dtype, torch.float64)
                grads = [grad[part] for grad in whole]
            results = self._results(exact, outputs, grads)
        return {name: result.detach() for name, result in results.items()}

    def _results(
        self, run: Run, outputs: Sequence[Tensor], grads: Sequence[Tensor] | None
    ) -> dict[str, Tensor]:
        results = {f"output {index}" if index else "output": each for index, each in enumerate(outputs)}
        if grads is None:
            return results
        leaves = list(run.leaves.values())
        gradients = torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)
        if self.problem.joint:
            return results | {"gradients": torch.cat([gradient.flatten() for gradient in gradients])}
        named = zip(run.leaves, gradients, strict=True)
        return results | {f"gradient of {name}": gradient for name, gradient in named}


def upstream(
    outputs: Sequence[Tensor], rounded: torch.dtype, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Random gradients that arrive at a backward pass, the same for all implementations.

    Args:
        outputs: what they are the gradients of.
        rounded: whose digits they have at most: those of the inputs that are measured.
        dtype: what they are handed over in, if not in the dtypes of the outputs.
    """
    generator = torch.Generator(outputs[0].device).manual_seed(SEED + 1)
    return [
        torch.randn(each.shape, generator=generator, device=each.device).to(rounded).to(dtype or each.dtype)
        for each in outputs
    ]
