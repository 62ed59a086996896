"""Bugs in the host's code: entrances of ops, the model, checkpoints, the benchmark's instruments."""

from __future__ import annotations

from tests.mutations.mutation import Mutation, select

ENTRANCES = (
    Mutation(
        "second derivatives are not refused",
        "degmix_kernels/define.py",
        "if torch.is_grad_enabled() or _is_watched((*grads, *call)) or _is_batched(grads):",
        "if _is_watched((*grads, *call)) or _is_batched(grads):",
        (select("test_contract", "second_derivative and batch_norm"),),
    ),
    Mutation(
        "channel_mix: its statistics have gradients",
        "degmix_kernels/define.py",
        "ctx.mark_non_differentiable(*output[self.results :])",
        "ctx.mark_non_differentiable(output[-1])",
        (select("kernels/test_channel_mix", "statistics_are_those"),),
    ),
    Mutation(
        "compilers are told another dtype",
        "degmix_kernels/define.py",
        "gradients.append(self.like(tensor))",
        "gradients.append(self.like(tensor).float())",
        (select("test_contract", "compilers_are_told and linear_norm"),),
    ),
    Mutation(
        "deform_mix: its variance's gradient around 0",
        "degmix_kernels/deform_conv/mix_op.py",
        "constant = -linear * mean",
        "constant = 0 * mean",
        (select("kernels/test_deform_conv", "test_statistics or variance_beside"),),
    ),
    Mutation(
        "deform_mix: inference keeps the value before the activation",
        "degmix_kernels/define.py",
        "if not torch.is_grad_enabled():\n            return False\n",
        "if False:\n            return False\n",
        (select("kernels/test_deform_conv", "only_a_gradient"),),
    ),
    Mutation(
        "all gradients, whoever wants one",
        "degmix_kernels/define.py",
        "wanted = [computed and need for computed, need in zip(self._computed, needed, strict=False)]",
        "wanted = [computed and any(needed) for computed, need in zip(self._computed, needed, strict=False)]",
        (select("kernels/test_task_attention", "only_what_is_wanted"),),
    ),
    Mutation(
        "coordinate_bias: columns' gradient along rows",
        "degmix_kernels/coordinate_bias/op.py",
        "parts = grad.split([1, size - 2, 1], axis)",
        "parts = grad.split([1, size - 2, 1], axis)[:2] + grad.split([1, size - 2, 1], axis)[:1]",
        (select("kernels/test_coordinate_bias", "first_middle or non_contiguous"),),
    ),
    Mutation(
        "deform_conv2d: a bias of any length",
        "degmix_kernels/deform_conv/op.py",
        'checks.expect_shape("bias", bias, (out_channels,))',
        "pass",
        (select("kernels/test_deform_conv_arguments"),),
    ),
)

MODEL = (
    Mutation(
        "model: offsets' tables in single precision",
        "degmix/model/mixer.py",
        "*kernels, start = gathered(list(kinds), torch.float64)",
        "*kernels, start = gathered(list(kinds), torch.float32)",
        (select("model/test_rewrites", "constant_offsets"),),
    ),
    Mutation(
        "model: tasks whose norms differ are mixed together",
        "degmix/model/mixer.py",
        "ordinary = len(kinds) == 1 and all(",
        "ordinary = all(",
        (select("model/test_rewrites", "norms_differ"),),
    ),
    Mutation(
        "model: a merged bias without the output projection's",
        "degmix/model/decoder.py",
        "bias = torch.addmv(promote(linear.bias), promote(linear.weight), promote(output.bias))",
        "bias = promote(linear.bias)",
        (select("model/test_rewrites", "pointwise"),),
    ),
    Mutation(
        "model: what is computed again may have changed since",
        "degmix/model/recompute.py",
        "if tensor._version != version:",
        "if tensor._version < version:",
        (select("model/test_recompute", "changed or unnoticed"),),
    ),
    Mutation(
        "checkpoint: random numbers start anew",
        "degmix/checkpoint.py",
        'torch.set_rng_state(state["rng"])',
        "torch.set_rng_state(torch.get_rng_state())",
        (select("train/test_checkpoint", "random_numbers"),),
    ),
)

BENCH = (
    Mutation(
        "bench: the faster of memory and products bounds",
        "bench/harness/ceilings.py",
        "return max(work.bytes / ceilings.copy,",
        "return min(work.bytes / ceilings.copy,",
        (select("bench/test_ceilings", "slower"),),
    ),
    Mutation(
        "bench: gradients that are passed on are written",
        "degmix_kernels/contract.py",
        "new = (name for name in self.differentiable if name not in self.op.passed_on)",
        "new = self.differentiable",
        (select("bench/test_costs", "not declared_shape"),),
    ),
    Mutation(
        "bench: only the result is compared before it is timed",
        "bench/harness/check.py",
        "errors = self.errors(run, gradients)",
        "errors = self.errors(run, False)",
        (select("bench/test_check", "every_gradient"),),
    ),
)
