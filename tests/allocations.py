"""What memory a piece of PyTorch code takes, counted allocation by allocation, on any device or none."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from degmix_kernels.define import transparent


@dataclass
class Allocation:
    """A storage: its bytes, who made it, and the numbers of the events that made and freed it."""

    size: int
    made_by: str
    made: int
    freed: int | None = None


class Allocations(TorchDispatchMode):
    """Records every storage that ATen calls inside allocate, and when it is freed.

    Fake tensors serve as well as real ones, so that large shapes cost nothing. What a single ATen call
    allocates and frees within itself is not seen.

    Args:
        before: tensors made earlier, which do not count.
    """

    def __init__(self, *before: Tensor | None) -> None:
        super().__init__()
        self._events = 0
        self._recorded: list[Allocation] = []
        # By identity of the storage, while it lives. None: made before.
        self._living: dict[int, tuple[weakref.ref, Allocation | None]] = {}
        for tensor in before:
            if tensor is not None:
                self._watch(tensor, None)

    def _watch(self, tensor: Tensor, allocation: Allocation | None) -> None:
        storage = tensor.untyped_storage()
        reference = weakref.ref(storage, partial(self._free, id(storage)))
        self._living[id(storage)] = (reference, allocation)

    def _free(self, key: int, reference: weakref.ref) -> None:
        _, allocation = self._living.pop(key)
        self._events += 1
        if allocation is not None:
            allocation.freed = self._events

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
                self._events += 1
                dtype = str(tensor.dtype).removeprefix("torch.")
                made_by = f"{func} {tuple(tensor.shape)} {dtype}"
                self._recorded.append(Allocation(tensor.untyped_storage().nbytes(), made_by, self._events))
                self._watch(tensor, self._recorded[-1])
        return result

    def alive(self) -> int:
        """Bytes allocated inside that are still in use."""
        return sum(allocation.size for allocation in self._recorded if allocation.freed is None)

    def peak(self, results: Iterable[Tensor] = ()) -> tuple[int, list[Allocation]]:
        """Most bytes alive at one time, and the storages these were.

        Args:
            results: living tensors whose elements do not count; what their storages hold beyond does.
        """
        sizes = {id(allocation): allocation.size for allocation in self._recorded}
        for tensor in results:
            _, allocation = self._living[id(tensor.untyped_storage())]
            if allocation is not None:
                sizes[id(allocation)] -= tensor.nbytes
        most, then = 0, []
        for moment in self._recorded:  # memory is fullest right after one of them
            alive = [
                each
                for each in self._recorded
                if each.made <= moment.made and (each.freed is None or each.freed > moment.made)
            ]
            total = sum(sizes[id(each)] for each in alive)
            if total > most:
                most, then = total, [each for each in alive if sizes[id(each)] > 0]
        return most, then


def describe(size: int, whole: int, alive: list[Allocation]) -> str:
    """A peak in words: size, share of ``whole`` bytes, and what it consisted of, largest first."""
    parts = sorted(alive, key=lambda each: -each.size)
    lines = [f"{size / 2**20:.1f} MiB, {100 * size / whole:.1f} % of {whole / 2**20:.1f} MiB"]
    return "\n".join(lines + [f"  {each.size / 2**20:9.1f} MiB  {each.made_by}" for each in parts[:12]])
