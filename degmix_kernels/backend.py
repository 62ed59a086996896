"""Which implementation an op runs, Triton or reference, and how to force one.

By default an op runs its Triton kernels wherever they can run (CUDA and ROCm tensors; CPU tensors when
Triton's interpreter is on) and its plain-PyTorch reference everywhere else.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from degmix_kernels.setting import Setting

try:
    import triton
except ImportError:  # Triton has no builds outside Linux; every op still has its reference there
    HAS_TRITON = False
    INTERPRETED = False
else:
    HAS_TRITON = True
    # Triton decides between interpreter and compiler when a kernel is defined, that is, at import.
    INTERPRETED = bool(triton.knobs.runtime.interpret)

Backend = Literal["auto", "triton", "reference"]
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_backend: Setting[Backend] = Setting("degmix_backend", "auto")
chosen = _backend.get
"""The backend that :func:`use_backend` has chosen, for who has to choose the same again later."""


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run every op inside the block on one backend: in this thread or task, and in its backward passes.

    Args:
        name: ``"triton"`` (an op that cannot run there raises and says why), ``"reference"``, or
            ``"auto"``, the default outside any block.

    Raises:
        ValueError: if ``name`` is none of the three.
    """
    if name not in ("auto", "triton", "reference"):
        raise ValueError(f"backend: expected 'auto', 'triton' or 'reference', got {name!r}")
    with _backend.set(name):
        yield


def can_run(device: torch.device | str, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether Triton kernels can run on tensors of this device and dtype, and the reason if not."""
    if not HAS_TRITON:
        return False, "the package triton is not installed"
    if dtype not in KERNEL_DTYPES:
        return False, f"Triton kernels take float32, bfloat16 and float16 tensors, got {dtype}"
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    if kind == "cuda" or (kind == "cpu" and INTERPRETED):
        return True, ""
    if kind == "cpu":
        return False, "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before the import"
    return False, f"Triton kernels take CUDA and ROCm tensors, got a tensor on {device}"


def runs_triton(op: str, device: torch.device, dtype: torch.dtype, missing: str = "") -> bool:
    """Decide the backend of one call.

    Args:
        op: the op's public name, for messages.
        device: device of the op's input.
        dtype: dtype the op computes with.
        missing: what has no Triton kernel yet (``""`` if this call has one).

    Returns:
        True for the Triton kernels, False for the reference.

    Raises:
        RuntimeError: if Triton is forced and this call's kernels cannot run on these tensors.
    """
    forced = chosen()
    if forced == "reference":
        return False
    if missing:
        if forced == "triton":
            warnings.warn(f"{op}: {missing} has no Triton kernel yet; running the reference", stacklevel=4)
        return False
    runnable, reason = can_run(device, dtype)
    if forced == "triton" and not runnable:
        raise RuntimeError(f"{op}: the Triton backend is forced, but {reason}")
    return runnable
