"""What memory a piece of PyTorch code takes, counted allocation by allocation, on any device or none."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from degmix_kernels.tracers import transparent


@dataclass(frozen=True, eq=False)
class Allocation:
    """A storage: its bytes, and who made it."""

    size: int
    made_by: str


class Allocations(TorchDispatchMode):
    """Records every storage that ATen calls inside allocate, until it is freed.

    Fake tensors serve as well as real ones, so that large shapes cost nothing. What a single ATen call
    allocates and frees within itself is not seen.

    Args:
        before: tensors made earlier, which do not count.
    """

    def __init__(self, *before: Tensor | None) -> None:
        super().__init__()
        # By identity of the storage, while it lives. None: made before.
        self._living: dict[int, tuple[weakref.ref, Allocation | None]] = {}
        # What was alive right after each allocation: memory is fullest at one of these moments.
        self._moments: list[list[Allocation]] = []
        for tensor in before:
            if tensor is not None:
                self._watch(tensor, None)

    def _watch(self, tensor: Tensor, allocation: Allocation | None) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        self._living[key] = (weakref.ref(storage, lambda _: self._living.pop(key)), allocation)

    def __enter__(self) -> Allocations:
        self._inside = transparent(True)  # what an op allocates, not the op as one call
        self._inside.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._inside.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self._living:
                made_by = f"{func} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
                self._watch(tensor, Allocation(tensor.untyped_storage().nbytes(), made_by))
                self._moments.append(self._alive())
        return result

    def _alive(self) -> list[Allocation]:
        return [allocation for _, allocation in self._living.values() if allocation is not None]

    def alive(self) -> int:
        """Bytes allocated inside that are still in use."""
        return sum(allocation.size for allocation in self._alive())

    def peak(self, results: Iterable[Tensor] = ()) -> tuple[int, list[Allocation]]:
        """Most bytes alive at one time, and the storages these were.

        Args:
            results: living tensors whose elements do not count; what their storages hold beyond does.
        """
        free: Counter[Allocation | None] = Counter()
        for tensor in results:
            free[self._living[id(tensor.untyped_storage())][1]] += tensor.nbytes

        def counted(moment: list[Allocation]) -> int:
            return sum(each.size - free[each] for each in moment)

        fullest = max(self._moments, key=counted, default=[])
        return counted(fullest), [each for each in fullest if each.size > free[each]]


def describe(size: int, whole: int, alive: list[Allocation]) -> str:
    """A peak in words: size, share of ``whole`` bytes, and what it consisted of, largest first."""
    parts = sorted(alive, key=lambda each: -each.size)
    lines = [f"{size / 2**20:.1f} MiB, {100 * size / whole:.1f} % of {whole / 2**20:.1f} MiB"]
    return "\n".join(lines + [f"  {each.size / 2**20:9.1f} MiB  {each.made_by}" for each in parts[:12]])
