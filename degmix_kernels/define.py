"""One definition per op: a record of its arguments and three functions become a differentiable op.

:class:`define` takes a NamedTuple whose annotations are the op's schema, and what is particular to the op:
which results it allocates, how they are filled, how gradients are computed. Everything else is here, once:
checks of types, dtypes and devices, the autocast rule, registration, fakes, what is saved, the order of
gradients, vmap, counts of FLOPs, and the refusal of derivatives that do not exist.

A call takes one of three entrances to the same functions:

- Nobody watches: a plain ``autograd.Function``. The dispatcher would cost several times what autograd costs.
- A compiler, a tracer, a dispatch mode or a tensor subclass watches: the registered op, which they all know.
- A transform of ``torch.func`` is active: an ``autograd.Function`` with ``setup_context`` and a vmap rule.

:func:`degmix_kernels.tracers.transparent` leaves dispatch modes the first entrance.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import and_
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from degmix_kernels import autocast, backend, checks, maps
from degmix_kernels.tracers import (
    NAMESPACE,
    TENSORS,
    is_batched,
    is_traced,
    is_watched,
    over_slices,
    register,
    transform,
)

DEFINED: dict[str, define] = {}


# --- what the annotations of a Call can say ----------------------------------------------------------------

_OWN_DTYPE, _COORDINATES, _CONSTANT = "keeps its dtype", "is fp32 or as the first tensor", "has no gradient"
OwnDtype = Annotated[Tensor, _OWN_DTYPE]
"""A tensor of any floating dtype, which autocast leaves alone."""
Coordinates = Annotated[Tensor, _COORDINATES]
"""A tensor in fp32 or the first tensor's dtype. Under autocast the other half dtype becomes fp32."""
Constant = Annotated[Tensor, _OWN_DTYPE, _CONSTANT]
"""As OwnDtype, and without a gradient."""
NotNegative = Annotated[float, checks.Range(minimum=0.0)]
"""A finite number that is not negative."""
Positive = Annotated[int, checks.Range(minimum=1)]
"""An integer of at least 1."""

_SCHEMA = {Tensor: "Tensor", str: "str", float: "float", int: "SymInt", bool: "bool"}


class Field(NamedTuple):
    """What an annotation says of one argument."""

    name: str
    type: type
    optional: bool
    own_dtype: bool
    coordinates: bool
    differentiable: bool
    range: checks.Range | checks.OneOf | None

    @classmethod
    def of(cls, name: str, hint: Any) -> Field:
        """Read ``T`` or ``Annotated[T, …]``, either of them perhaps ``| None``."""
        optional = get_origin(hint) in (Union, types.UnionType)
        if optional:
            (hint,) = (each for each in get_args(hint) if each is not type(None))
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        ranges = (each for each in marks if isinstance(each, checks.Range | checks.OneOf))
        allowed = next(ranges, checks.Range() if kind is float else None)
        own, coordinates, constant = (mark in marks for mark in (_OWN_DTYPE, _COORDINATES, _CONSTANT))
        return cls(name, kind, optional, own, coordinates, kind is Tensor and not constant, allowed)

    @property
    def schema(self) -> str:
        """As ``torch.library`` reads it."""
        return f"{_SCHEMA[self.type]}{'?' if self.optional else ''} {self.name}"


# --- the op ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class define:
    """A differentiable op. ``op(op.checked(*arguments))`` runs its kernels and returns all outputs.

    Attributes:
        name: the public function's.
        call: a NamedTuple of all arguments, tensors first; its annotations are the op's schema.
        outputs: ``outputs(call)`` allocates the outputs, uninitialised, which is all that tracers ask for: a
            tensor, or a tuple, results with gradients first. Those without may be empty if nobody wants them.
        forward: ``forward(call, *outputs)`` fills them.
        backward: ``backward(call, kept, grads, wanted)`` gives gradients by names of arguments, in any dtype.
            In ``call`` tensors that were not saved are None. ``grads`` has one gradient or None per result.
            ``wanted`` is a ``call`` of booleans. Gradients that are not wanted may be given, too.
        products: ``products(call)`` counts the FLOPs of the forward pass's matrix products, two per
            multiply-add. It reads no more than the shapes of tensors that are saved.
        backward_products: those of the backward pass over those of the forward pass: two for a product whose
            factors both have a gradient; five halves for attention, whose weights have to be computed again.
            Counters of FLOPs add all of them, whichever gradients are wanted.
        results: number of outputs with gradients.
        beside: number of outputs without.
        keeps: ``keeps(call, outputs)`` are the outputs that the backward pass reads, always as many; by
            default those without gradients.
        kept: how many these are.
        passed_on: tensors whose gradient is the first result's. They are not saved.
        unsaved: more tensors that the backward pass does not read. They are shaped as the first result.
        like: ``like(tensor)`` is an uninitialised tensor, laid out as a gradient of this one is: by default
            channels_last if the tensor is, else contiguous.
    """

    name: str
    call: Any
    outputs: Callable[[Any], Any]
    forward: Callable[..., None]
    backward: Callable[[Any, Sequence[Tensor], Sequence[Tensor | None], Any], Mapping[str, Tensor]]
    products: Callable[[Any], int]
    backward_products: float = 2
    results: int = 1
    beside: int = 0
    keeps: Callable[[Any, Sequence[Tensor]], Sequence[Tensor]] | None = None
    kept: int | None = None
    passed_on: tuple[str, ...] = ()
    unsaved: tuple[str, ...] = ()
    like: Callable[[Tensor], Tensor] = maps.empty_like

    def __post_init__(self) -> None:
        hints = get_type_hints(self.call, include_extras=True)
        self.fields = tuple(Field.of(name, hints[name]) for name in self.call._fields)
        tensors = [field for field in self.fields if field.type is Tensor]
        self.count = len(tensors)
        self.differentiable = tuple(field.name for field in tensors if field.differentiable)
        self.autocast = tuple(
            field.name for field in tensors if not field.own_dtype and not field.coordinates
        )
        self._scalars = tuple(
            (field.name, field.type, field.optional, field.range) for field in self.fields[self.count :]
        )
        self._no_settings = (False,) * (len(self.fields) - self.count)
        self._no_gradients = (None,) * len(self._no_settings)
        self._computed = [each.differentiable and each.name not in self.passed_on for each in tensors]
        self._unsaved = [self.call._fields.index(name) for name in (*self.passed_on, *self.unsaved)]
        self._passed_on = [self.call._fields.index(name) for name in self.passed_on]
        self._keep = self.call._fields.index("keep") if "keep" in self.call._fields else None
        self.kept = self.beside if self.kept is None else self.kept
        self._make_functions()
        DEFINED[self.name] = self

    # --- arguments -----------------------------------------------------------------------------------------

    def checked(self, *values: Any) -> Any:
        """The call of these arguments, in the order of ``call``, checked, under the autocast rule.

        Where an op has the field ``keep``, whether to keep more than arguments for a backward pass, it
        becomes False if there will be none.

        Raises:
            TypeError: for a wrong type, dtype or device.
            ValueError: for a scalar out of its range.
        """
        first = values[0]
        if type(first) not in TENSORS or autocast.enabled(first.device):
            values = self._cast(values)
            first = values[0]
        device, dtype = first.device, first.dtype
        if dtype not in checks.FLOATS:
            self._expect(0, first, first)
        for index in range(self.count):
            value = values[index]
            # A shorter way for what is nearly always right: the host's time counts where maps are small.
            if type(value) in TENSORS and value.dtype == dtype and value.device == device:
                if value.layout is torch.strided and not value.is_nested:
                    continue
            elif value is None and self.fields[index].optional:
                continue
            self._expect(index, value, first)
        checked = [*values[: self.count]]
        for (name, kind, optional, allowed), value in zip(self._scalars, values[self.count :], strict=True):
            checked.append(checks.scalar(name, value, kind, optional, allowed))
        if self._keep is not None and checked[self._keep]:
            checked[self._keep] = self._differentiates(checked)
        return self.call(*checked)

    def _expect(self, index: int, value: Any, first: Tensor) -> None:
        """Raise unless the argument is a tensor as its annotation wants it, beside the first one."""
        field = self.fields[index]
        checks.expect_tensor(field.name, value)
        if field.own_dtype or (field.coordinates and value.dtype == torch.float32):
            checks.expect_device(field.name, value, self.fields[0].name, first)
        else:
            checks.expect_like(field.name, value, self.fields[0].name, first)

    def _cast(self, values: Sequence[Any]) -> list[Any]:
        """The values under the autocast rule, after a check that all tensors are some."""
        for index, field in enumerate(self.fields[: self.count]):
            if values[index] is not None or not field.optional:
                checks.expect_tensor(field.name, values[index])
        cast = list(values)
        device = cast[0].device
        if autocast.enabled(device):
            for index, field in enumerate(self.fields[: self.count]):
                if field.coordinates:
                    cast[index] = autocast.widen_other_half(cast[index], cast[0])
                elif not field.own_dtype:
                    cast[index] = autocast.cast(cast[index], device)
        return cast

    def _differentiates(self, values: Sequence[Any]) -> bool:
        """Whether there may be a backward pass that computes anything."""
        compiles = torch.compiler.is_compiling()
        if not compiles and torch._C._get_tracing_state() is not None:
            return True  # torch.jit.trace checks its graph against another, which it makes without gradients
        if not torch.is_grad_enabled():
            return False
        if torch._C._are_functorch_transforms_active():  # a tensor does not tell of outer transforms
            return True
        if not compiles and is_traced():  # nor what will be asked of a trace
            return True
        for index in range(self.count):
            if self._computed[index] and values[index] is not None and values[index].requires_grad:
                return True
        return False

    def runs_triton(self, call: Any, missing: str = "") -> bool:
        """As :func:`degmix_kernels.backend.runs_triton`, of a checked call."""
        first = call[0]
        return backend.runs_triton(self.name, first.device, first.dtype, missing)

    # --- forward -------------------------------------------------------------------------------------------

    def __call__(self, call: Any) -> Any:
        """Run the kernels of a checked call: the result, or a tuple where there are more outputs than one."""
        if torch.compiler.is_compiling():
            return self.registered(*call)
        if torch._C._are_functorch_transforms_active():
            return self._transform(*call)
        tensors = call[: self.count]
        if is_watched(tensors):
            return self.registered(*call)
        return self._eager.apply(call, *tensors)

    def _run(self, ctx: Any, call: Any, *_: Tensor | None) -> Any:
        """Allocate the outputs and fill them, and save for a backward pass if there is a context."""
        made = self.outputs(call)
        if isinstance(made, Tensor):
            self.forward(call, made)
        else:
            self.forward(call, *made)
        if ctx is not None:
            self._setup_context(ctx, call, made)
        return made

    def _setup_context(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.settings = inputs[self.count :]
        saved = list(inputs[: self.count])
        for index in self._unsaved:
            saved[index] = None
        if isinstance(output, Tensor):
            ctx.save_for_backward(*saved)
        else:
            ctx.mark_non_differentiable(*output[self.results :])
            ctx.set_materialize_grads(False)  # no zeros for what has no gradient
            if self._keep is not None and not inputs[self._keep]:
                return  # gradients that are passed on read nothing
            beside = output[self.results :] if self.keeps is None else self.keeps(self.call(*inputs), output)
            ctx.save_for_backward(*saved, *beside)

    # --- backward ------------------------------------------------------------------------------------------

    def _differentiate(
        self, ctx: Any, needed: Sequence[bool], grads: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """One gradient or None for every tensor."""
        grads = grads[: self.results]
        wanted = [*map(and_, self._computed, needed)]
        gradients: list[Tensor | None] = [None] * self.count
        if any(wanted) and (grads[0] is not None or any(grad is not None for grad in grads)):
            if self._keep is not None and not ctx.settings[self._keep - self.count]:
                raise RuntimeError(
                    f"{NAMESPACE}::{self.name}: nothing was kept for gradients: the call, or its trace, was "
                    "made where no tensor required one"
                )
            saved, count = ctx.saved_tensors, self.count
            call, kept = self.call(*saved[:count], *ctx.settings), saved[count:]
            if torch.is_grad_enabled() or is_watched((*grads, *call)) or is_batched(grads):
                found = self._enter_backward(*grads, *call, *kept, wanted)
                gradients = [each if want else None for each, want in zip(found, wanted, strict=True)]
            else:
                gradients = self._compute(grads, call, kept, wanted)
        for index in self._passed_on:
            if needed[index]:
                gradients[index] = grads[0]
        return tuple(gradients)

    def _enter_backward(self, *values: Any) -> Sequence[Tensor]:
        """Gradients of all tensors, empty ones where not wanted, for whoever watches.

        ``values`` are what :meth:`_parted` takes apart, as of all that follow.
        """
        if torch._C._are_functorch_transforms_active():
            return self._transform_backward(*values)
        if is_watched(values) or is_batched(values[: self.results]):
            found = self.registered_backward(*values)
            return (found,) if isinstance(found, Tensor) else found
        if torch.is_grad_enabled():  # somebody builds a graph of the backward pass
            return self._twice.apply(*values)
        return self._gradients(*values)

    def _compute(
        self, grads: Sequence[Tensor | None], call: Any, kept: Sequence[Tensor], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of all tensors, None where not wanted."""
        found = self.backward(call, kept, grads, self.call(*wanted, *self._no_settings))
        gradients: list[Tensor | None] = [None] * self.count
        for index in range(self.count):
            if wanted[index]:
                gradient, tensor = found[self.call._fields[index]], call[index]
                dtype = grads[0].dtype if tensor is None else tensor.dtype
                gradients[index] = gradient if gradient.dtype == dtype else gradient.to(dtype)
        return gradients

    def _gradients(self, *values: Any) -> tuple[Tensor, ...]:
        """As PyTorch wants an op's results: tensors, and always as many."""
        found = self._compute(*self._parted(values))
        return tuple(_some(values).new_empty(0) if each is None else each for each in found)

    def _fake_gradients(self, *values: Any) -> tuple[Tensor, ...]:
        """The same, uninitialised."""
        _, call, _, wanted = self._parted(values)
        gradients = []
        for want, tensor in zip(wanted, call, strict=False):
            if not want:
                gradients.append(_some(values).new_empty(0))
            elif tensor is not None:
                gradients.append(self.like(tensor))
            else:
                made = self.outputs(call)
                gradients.append(self.like(made if isinstance(made, Tensor) else made[0]))
        return tuple(gradients)

    def _parted(self, values: Sequence[Any]) -> tuple[Sequence[Any], Any, Sequence[Any], list[bool]]:
        """Gradients of the results, the call, what was kept, which gradients are wanted."""
        start, stop = self.results, self.results + len(self.fields)
        return values[:start], self.call(*values[start:stop]), values[stop:-1], values[-1]

    def _refuse(self, kind: str) -> Callable[..., None]:
        def refuse(ctx: Any, *_: Any) -> None:
            raise RuntimeError(
                f"{NAMESPACE}::{self.name}: the Triton kernels have no {kind} derivative; "
                'run this call under use_backend("reference")'
            )

        return refuse

    # --- what PyTorch knows of it --------------------------------------------------------------------------

    def _make_functions(self) -> None:
        def make(name: str, **functions: Callable[..., Any]) -> Any:
            return type(name, (Function,), {key: staticmethod(each) for key, each in functions.items()})

        def eager_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return None, *self._differentiate(ctx, ctx.needs_input_grad[1:], grads)

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return *self._differentiate(ctx, ctx.needs_input_grad, grads), *self._no_gradients

        def enter(*values: Any) -> Any:
            return self(self.call(*values))

        def enter_backward(*values: Any) -> tuple[Tensor, ...]:
            return tuple(self._enter_backward(*values))

        def unpacked(made: tuple[Tensor, ...]) -> Any:
            return made if len(made) > 1 else made[0]

        refuse_forward_mode, refuse_second = self._refuse("forward-mode"), self._refuse("second")
        # Not split into forward and setup_context: then PyTorch would look up a signature in every call.
        self._eager = make(self.name, forward=self._run, backward=eager_backward, jvp=refuse_forward_mode)
        self._transformed = make(
            self.name, forward=enter, setup_context=self._setup_context, backward=backward,
            jvp=refuse_forward_mode, vmap=over_slices(enter),
        )  # fmt: skip
        self._twice = make(
            f"{self.name}_backward", forward=enter_backward, setup_context=lambda ctx, inputs, output: None,
            backward=refuse_second, jvp=refuse_forward_mode, vmap=over_slices(enter_backward),
        )  # fmt: skip

        self._transform = transform(self._transformed, enter)
        self._transform_backward = transform(self._twice, enter_backward)

        arguments = ", ".join(field.schema for field in self.fields)
        self.registered = register(
            self.name,
            arguments,
            self.results + self.beside,
            lambda *values: self._run(None, self.call(*values)),
            lambda *values: self.outputs(self.call(*values)),
            self._transform,
        )
        self.registered.register_autograd(backward, setup_context=self._setup_context)
        grads = "".join(f"Tensor? grad_{index}, " for index in range(self.results))
        arguments = ", ".join(
            f"Tensor? {field.name}" if field.type is Tensor else field.schema for field in self.fields
        )
        kept = "".join(f"Tensor kept_{index}, " for index in range(self.kept))
        self.registered_backward = register(
            f"{self.name}_backward",
            f"{grads}{arguments}, {kept}bool[] wanted",
            self.count,
            lambda *values: unpacked(self._gradients(*values)),
            lambda *values: unpacked(self._fake_gradients(*values)),
            lambda *values: unpacked(self._transform_backward(*values)),
        )
        self.registered_backward.register_autograd(
            refuse_second, setup_context=lambda ctx, inputs, output: None
        )

        ops = getattr(torch.ops, NAMESPACE)

        @register_flop_formula(getattr(ops, self.name), get_raw=True)
        def flops(*values: Any, out_val: Any = None) -> int:
            return self.products(self.call(*values))

        @register_flop_formula(getattr(ops, f"{self.name}_backward"), get_raw=True)
        def backward_flops(*values: Any, out_val: Any = None) -> int:
            return round(self.products(self._parted(values)[1]) * self.backward_products)


def _some(values: Sequence[Any]) -> Tensor:
    return next(each for each in values if isinstance(each, Tensor))


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], float]]:
    """What fvcore needs to count the Triton kernels, which it has no way to look up by itself.

    ``FlopCountAnalysis(model, inputs).set_op_handle(**degmix_kernels.fvcore_handles())``. They count one for
    a multiply-add, as fvcore does.
    """

    def handle(op: define) -> Callable[[list[Any], list[Any]], float]:
        def count(inputs: list[Any], outputs: list[Any]) -> float:
            tensors = [
                torch.empty(sizes, device="meta") if (sizes := _sizes(value)) is not None else None
                for value in inputs[: op.count]
            ]
            return op.products(op.call(*tensors, *op._no_settings)) / 2

        return count

    return {f"{NAMESPACE}::{name}": handle(op) for name, op in DEFINED.items()}


def _sizes(value: Any) -> list[int] | None:
    """The sizes of a tensor in a trace; None of what is none."""
    kind = value.type()
    return kind.sizes() if kind.isSubtypeOf(torch._C.TensorType.get()) else None
