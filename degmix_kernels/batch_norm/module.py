"""``BatchNorm2d``, with statistics of its own or gathered elsewhere."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from degmix_kernels import autocast, checks
from degmix_kernels.batch_norm.op import batch_norm
from degmix_kernels.batch_norm.reference import gather_and_normalize
from degmix_kernels.batch_norm.running import kept_statistics, step_momentum, update_running


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that takes statistics gathered elsewhere, and a residual.

    Same arguments, state_dict and result; ``nn.SyncBatchNorm.convert_sync_batchnorm`` converts it like any
    other. Half-precision input is normalised in fp32. On a CPU at batch 1 the gradient is right whatever
    layout it arrives in, which PyTorch's own is not.

    Raises:
        TypeError: for a number of channels that is no integer, or an eps or momentum that is no number.
        ValueError: for a number of channels below 1, a negative eps, or a momentum outside of 0 to 1.
    """

    def __init__(self, num_features: int, *arguments: Any, **options: Any) -> None:
        checks.expect_integer("num_features", num_features, 1)
        super().__init__(num_features, *arguments, **options)
        checks.scalar("eps", self.eps, float, allowed=checks.Range(minimum=0.0))
        checks.scalar("momentum", self.momentum, float, optional=True, allowed=checks.Range(0.0, 1.0))

    def forward(
        self, input: Tensor, statistics: tuple[Tensor, Tensor] | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """(B, C, H, W) → (B, C, H, W).

        Args:
            input: what to normalise.
            statistics: mean and biased variance of ``input`` over images and pixels, (C,) each, as
                :func:`degmix_kernels.deform_mix` gives them: spares a pass over ``input``. In evaluation
                running statistics, if kept, are used instead.
            residual: shape and dtype of ``input``, added to the result.

        Raises:
            TypeError: for a wrong type, dtype or device.
            ValueError: for a wrong shape, or statistics of a single value.
        """
        checks.expect_tensor("input", input)
        self._check_input_dim(input)
        rows = statistics.shape[:1] if isinstance(statistics, Tensor) else ()
        pair = rows == (2,) or (isinstance(statistics, (tuple, list)) and len(statistics) == 2)
        if statistics is not None and not pair:
            raise TypeError(f"statistics: expected a mean and a variance, got {checks.shown(statistics)}")
        if residual is not None:
            checks.expect_tensor("residual", residual)
            checks.expect_device("residual", residual, "input", input)
            checks.expect_shape("residual", residual, input.shape)
        if self.uses_batch_statistics and input.numel() == input.shape[1]:
            expected = "Expected more than 1 value per channel when training"
            raise ValueError(f"{expected}, got input size {input.size()}")
        with autocast.disabled(input.device):
            running = kept_statistics(self)
            if self.uses_batch_statistics and statistics is None:
                momentum = step_momentum(self)
                output = gather_and_normalize(
                    input, *running, self.weight, self.bias, self.training, momentum, self.eps
                )
                return (output if residual is None else output + residual).to(input.dtype)
            given = statistics if self.uses_batch_statistics else running
            output = batch_norm(input, *given, self.weight, self.bias, residual, self.eps)
            if self.training:  # now that the statistics have been checked
                momentum = step_momentum(self)
                if running[0] is not None:
                    update_running(*running, *statistics, input.numel() // input.shape[1], momentum)
            return output

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether the next call normalises with the batch's own statistics."""
        return self.training or self.running_mean is None
