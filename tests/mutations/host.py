"""Bugs in the host's code: entrances of ops, the model, checkpoints, the benchmark's instruments."""

from __future__ import annotations

from tests.mutations.mutation import Mutation, select

# In files that are about to be written anew.
ENTRANCES = (
    Mutation(
        "second derivatives are not refused",
        "degmix_kernels/registered.py",
        "Refusing.apply if torch.is_grad_enabled() else backward",
        "backward",
        (select("test_contract", "second_derivative and batch_norm"),),
    ),
    Mutation(
        "channel_mix: its statistics have gradients",
        "degmix_kernels/channel_mix/autograd.py",
        "ctx.mark_non_differentiable(pre, mean, variance, count)",
        "ctx.mark_non_differentiable(pre)",
        (select("kernels/test_channel_mix", "statistics_are_those"),),
    ),
    Mutation(
        "linear_norm: compilers are told another dtype",
        "degmix_kernels/linear_norm/autograd.py",
        "(x.new_empty(shape, dtype=torch.float32) if want else x.new_empty(0) for want in wanted[2:5])",
        "(x.new_empty(shape) if want else x.new_empty(0) for want in wanted[2:5])",
        (select("test_contract", "compilers_are_told and linear_norm"),),
    ),
    Mutation(
        "deform_mix: its variance's gradient around 0",
        "degmix_kernels/deform_conv/autograd.py",
        "constant = -linear * mean",
        "constant = 0 * mean",
        (select("kernels/test_deform_conv", "test_statistics or variance_beside"),),
    ),
    Mutation(
        "deform_mix: inference keeps the value before the activation",
        "degmix_kernels/deform_conv/op.py",
        "keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in leaves)",
        "keep = any(tensor.requires_grad for tensor in leaves)",
        (select("kernels/test_deform_conv", "only_a_gradient"),),
    ),
    Mutation(
        "task_attention: all gradients, whoever wants one",
        "degmix_kernels/task_attention/autograd.py",
        "wanted = list(ctx.needs_input_grad[:3])",
        "wanted = [True, True, ctx.needs_input_grad[2]]",
        (select("kernels/test_task_attention", "only_what_is_wanted"),),
    ),
    Mutation(
        "coordinate_bias: columns' gradient along rows",
        "degmix_kernels/coordinate_bias/autograd.py",
        "parts = grad.split([1, size - 2, 1], axis)",
        "parts = grad.split([1, size - 2, 1], axis)[:2] + grad.split([1, size - 2, 1], axis)[:1]",
        (select("kernels/test_coordinate_bias", "first_middle or non_contiguous"),),
    ),
    Mutation(
        "deform_conv2d: a bias of any length",
        "degmix_kernels/deform_conv/op.py",
        'checks.expect_tensor("bias", bias, dims=1)',
        'checks.expect_tensor("bias", bias)',
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
        "bench/ceilings.py",
        "return max(work.bytes / ceilings.copy,",
        "return min(work.bytes / ceilings.copy,",
        (select("bench/test_ceilings", "slower"),),
    ),
    Mutation(
        "bench: gradients that are passed on are written",
        "degmix_kernels/contract.py",
        "new = (name for name in self.differentiable if name not in self.cost.passed_on)",
        "new = self.differentiable",
        (select("bench/test_costs", "not declared_shape"),),
    ),
    Mutation(
        "bench: only the result is compared before it is timed",
        "bench/check.py",
        "errors = self.errors(run, gradients)",
        "errors = self.errors(run, False)",
        (select("bench/test_check", "every_gradient"),),
    ),
)
