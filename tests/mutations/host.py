"""Bugs in what all ops share, in the entrances of ops, the model, checkpoints and the benchmark."""

BUGS = r"""
degmix_kernels/product.py
  product: one inner element too many
    - index_valid = index < inner
    + index_valid = index <= inner
    ? test_contract: values_and_gradients and float32 and channel_mix
  product: the weight's gradient of the first image alone
    - return shares.sum(0, dtype=torch.float32).to(weight.dtype).view_as(weight)
    + return shares[0].view_as(weight)
    ? test_contract: values_and_gradients and float32 and channel_mix
    ? test_contract: values_and_gradients and float32 and linear_norm

degmix_kernels/epilogue.py
  epilogue: the variance's gradient takes z for act(z)
    - mask=channel_valid, other=0.0) * value
    + mask=channel_valid, other=0.0) * z
    ? kernels/test_deform_conv_paths: test_epilogue
  epilogue: the slope of relu loses a NaN
    - tl.where(z > 0, 1.0, tl.where(z == z, 0.0, z))
    + tl.where(z > 0, 1.0, 0.0)
    ? kernels/test_deform_conv_paths: undefined or activation_of_nan

degmix_kernels/statistics.py
  statistics: an image's last part counts as a whole one
    - count = tl.minimum(pixels - part % blocks * block, block)
    -         mean +=
    + count = tl.minimum(pixels, block)
    +         mean +=
    ? kernels/test_deform_conv_paths: chan_formula

degmix_kernels/launch.py
  launch: only the longest axis decides on 64 bits
    - last = sum(map(mul, tensor.shape, strides)) - sum(strides)
    + last = max(((size - 1) * step for size, step in zip(tensor.shape, strides)), default=0)
    ? kernels/test_batch_norm: plans_know
    ? kernels/test_task_attention: plans_know
  launch: no grid ends
    - if launch.programs > INT32_MAX:
    + if launch.programs > 2 * INT32_MAX:
    ? kernels/test_launch: grid
  launch: kernels run on the current device
    - if device.type == "cuda" and device.index != torch.cuda.current_device():
    + if device.type == "nothing":
    ? kernels/test_launch: device_of_its
  launch: registers are limited on AMD, too
    - return torch.version.hip is None and _capability(
    + return _capability(
    ? kernels/test_launch

degmix_kernels/autocast.py
  autocast: references compute under it
    - if enabled(device):
    + if device.type == "meta":
    ? test_contract: test_autocast and linear_norm
    ? test_contract: test_autocast and deform_mix

degmix_kernels/backend.py
  backend: a forced backend that cannot run gives way
    - if forced == "triton" and not runnable:
    + if forced == "triton" and not runnable and not HAS_TRITON:
    ? test_contract: forced_backend and batch_norm

degmix_kernels/define.py
  autocast: offsets of the other half outside of autocast
    - if field.own_dtype or (field.coordinates and value.dtype == torch.float32):
    + if field.own_dtype or field.coordinates:
    ? test_arguments: deform_conv2d
  second derivatives are not refused
    - if torch.is_grad_enabled() or is_watched((*grads, *call)) or is_batched(grads):
    + if is_watched((*grads, *call)) or is_batched(grads):
    ? test_contract: second_derivative and batch_norm
  channel_mix: its statistics have gradients
    - ctx.mark_non_differentiable(*output[self.results :])
    + ctx.mark_non_differentiable(output[-1])
    ? kernels/test_channel_mix: statistics_are_those
  compilers are told another dtype
    - gradients.append(self.like(tensor))
    + gradients.append(self.like(tensor).float())
    ? test_contract: compilers_are_told and linear_norm
  deform_mix: inference keeps the value before the activation
    - if not torch.is_grad_enabled():
    -             return False
    + if False:
    +             return False
    ? kernels/test_deform_conv: only_a_gradient
  all gradients, whoever wants one
    - wanted = [*map(and_, self._computed, needed)]
    + wanted = [each and any(needed) for each in self._computed]
    ? kernels/test_task_attention: only_what_is_wanted

degmix_kernels/checks.py
  checks: a bool is an integer
    -  and not isinstance(value, bool)
    ? kernels/test_deform_conv_arguments
  checks: a shape may be broadcast
    - if value is not None and value.shape != shape:
    + if value is not None and any(a not in (1, b) for a, b in zip(value.shape, shape, strict=True)):
    ? test_arguments: shapes_that_are_refused and batch_norm
    ? kernels/test_deform_conv_arguments

degmix_kernels/deform_conv/mix_op.py
  deform_mix: its variance's gradient around 0
    - constant = -linear * mean
    + constant = 0 * mean
    ? kernels/test_deform_conv: test_statistics or variance_beside

degmix_kernels/coordinate_bias/op.py
  coordinate_bias: columns' gradient along rows
    - [part.sum((0, axis), dtype=torch.float32) for part in parts]
    + [part.sum((0, axis), dtype=torch.float32) for part in (*parts[:2], parts[0])]
    ? kernels/test_coordinate_bias: first_middle or non_contiguous

degmix/model/mixer.py
  model: offsets' tables in single precision
    - *kernels, start = gathered(list(kinds), torch.float64)
    + *kernels, start = gathered(list(kinds), torch.float32)
    ? model/test_rewrites: constant_offsets
  model: tasks whose norms differ are mixed together
    - ordinary = len(kinds) == 1 and all(
    + ordinary = all(
    ? model/test_rewrites: norms_differ

degmix/model/decoder.py
  model: a merged bias without the output projection's
    - bias = torch.addmv(promote(linear.bias), promote(linear.weight), promote(output.bias))
    + bias = promote(linear.bias)
    ? model/test_rewrites: pointwise

degmix/model/recompute.py
  model: what is computed again may have changed since
    - if tensor._version != version:
    + if tensor._version < version:
    ? model/test_recompute: changed or unnoticed

degmix/checkpoint.py
  checkpoint: random numbers start anew
    - torch.set_rng_state(state["rng"])
    + torch.set_rng_state(torch.get_rng_state())
    ? train/test_checkpoint: random_numbers

bench/harness/ceilings.py
  bench: the faster of memory and products bounds
    - return max(work.bytes / ceilings.copy,
    + return min(work.bytes / ceilings.copy,
    ? bench/test_ceilings: slower

degmix_kernels/contract.py
  bench: gradients that are passed on are written
    - new = (name for name in self.differentiable if name not in self.op.passed_on)
    + new = self.differentiable
    ? bench/test_costs: not declared_shape

bench/harness/check.py
  bench: only the result is compared before it is timed
    - errors = self.errors(run, gradients)
    + errors = self.errors(run, False)
    ? bench/test_check: every_gradient
"""
