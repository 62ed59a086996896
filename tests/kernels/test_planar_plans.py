"""The launches that the planar kernels of the deformable convolution plan, on meta tensors."""

from __future__ import annotations

import itertools

import torch

from degmix_kernels.deform_conv.general import plan as general
from degmix_kernels.deform_conv.planar import plan as planar
from degmix_kernels.deform_conv.problem import Problem


def test_tiles_waste_less_than_half() -> None:
    """Rows of all tiles of all programs are at most twice the channels, or 32: a product takes 16."""

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    def divisors(number: int) -> list[int]:
        return [divisor for divisor in range(1, number + 1) if number % divisor == 0]

    for channels in (*range(1, 65), 72, 96, 120, 128, 192, 256):
        for groups, offset_groups in itertools.product(divisors(channels), repeat=2):
            problem = Problem(
                meta(1, channels, 32, 32), meta(1, 2 * offset_groups, 32, 32),
                meta(channels, channels // groups, 1, 1), None, (1, 1), (0, 0), (1, 1),
            )  # fmt: skip
            if general.suits(problem):
                continue
            output = meta(1, channels, 32, 32)
            forward = planar.plan_forward(problem, None, output)
            weight = planar.plan_backward_weight(problem, output)[0]
            samples = planar.plan_backward_samples(problem, output, output, problem.offset, None, None)
            for plan, tiles in (
                (forward, forward.arguments["spans"] * forward.arguments["steps"]),
                (weight, weight.arguments["spans"] * weight.arguments["tiles"]),
                (samples, samples.arguments["blocks"] * samples.arguments["within_steps"]),
            ):
                rows = plan.constants["BLOCK_GROUPS"] * plan.constants["BLOCK_WITHIN"]
                assert rows * tiles <= 2 * max(16, channels), (plan.kernel, channels, groups, offset_groups)
