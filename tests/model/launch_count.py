"""Kernel launches and saved activations of the head and of its formula, counted without a GPU.

    TRITON_INTERPRET=1 python tests/model/launch_count.py --attention pixel --size 425x560 --batch 1

Everything runs on fake tensors, which have shapes but no memory, so any size can be counted; kernels are
planned as for a GPU and not executed. What is counted is what reaches PyTorch's dispatcher: an operator of
several kernels, such as torchvision's deformable convolution, counts as one: a profiler on a GPU shows more.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.append(str(Path(__file__).parents[1] / "kernels"))

import torch
from launches import recorded_launches
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from degmix import DeGMixHead
from degmix.info import saved_for_backward
from degmix.model.formula import formula
from degmix_kernels import use_backend
from degmix_kernels.backend import INTERPRETED

SWIN_TINY = (96, 192, 384, 768)
NYUD = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}

# Operators that compute nothing and are no views by their schema: allocations and what only names a tensor.
EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
FREE = (*EMPTY, "_unsafe_view", "lift_fresh")


@dataclass(frozen=True)
class Count:
    """What one forward of the head costs.

    Attributes:
        operators: operator or Triton kernel → its launches in training.
        inference: launches in evaluation, without gradients.
        saved_bytes: of the tensors that autograd keeps for the backward pass, the parameters aside.
    """

    operators: Mapping[str, int]
    inference: int
    saved_bytes: int

    @property
    def training(self) -> int:
        """Launches in training."""
        return sum(self.operators.values())


class _Operators(TorchDispatchMode):
    """Counts the operators that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        free = function.is_view or function.overloadpacket.__name__ in FREE
        # Questions about a tensor, such as for its device, come here too: their answers are no tensors. Nor
        # do operators on lists of tensors, in place, answer with one.
        computes = any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        computes = computes or (isinstance(function, torch._ops.OpOverload) and function._schema.is_mutable)
        if not free and computes:
            self.seen[str(function.overloadpacket)] += 1
        return result


def count_launches(function: Callable[[], object]) -> Counter[str]:
    """Launches of one call, by operator or Triton kernel; Triton kernels are not executed."""
    with recorded_launches(execute=False) as launches, _Operators() as operators:
        function()
    kernels = Counter(f"triton {launch.kernel.__name__}" for launch in launches if launch.programs)
    return operators.seen + kernels


def count_head(
    in_channels: Sequence[int] = SWIN_TINY,
    tasks: Mapping[str, int] = NYUD,
    size: tuple[int, int] = (425, 560),
    batch: int = 1,
    **options: Any,
) -> dict[str, Count]:
    """The counts of ``"formula"`` and ``"head"``, the latter with Triton wherever there is a kernel.

    Args:
        in_channels: as of :class:`degmix.DeGMixHead`.
        tasks: as of :class:`degmix.DeGMixHead`.
        size: of the image; the maps are at 1/4, 1/8, … of it.
        batch: number of images.
        options: further arguments of :class:`degmix.DeGMixHead`.
    """
    counts = {}
    device = "cpu" if INTERPRETED else "cuda"  # where Triton kernels can run
    with FakeTensorMode(), torch.device(device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no Triton kernel yet")
        head = DeGMixHead(in_channels, tasks, **options)
        strides = (4 * 2**level for level in range(len(in_channels)))
        features = [
            torch.empty(batch, channels, *(-(-side // stride) for side in size), requires_grad=True)
            for channels, stride in zip(in_channels, strides, strict=True)
        ]
        for name, forward, backend in (
            ("formula", formula, "reference"),
            ("head", DeGMixHead.__call__, "triton"),
        ):

            def run(forward: Callable[..., dict[str, Tensor]] = forward) -> dict[str, Tensor]:
                return forward(head, features, size)

            with use_backend(backend):
                head.eval()
                with torch.no_grad():
                    inference = count_launches(run).total()
                head.train()
                with recorded_launches(execute=False):
                    saved = saved_for_backward(run, list(head.parameters()))
                counts[name] = Count(count_launches(run), inference, saved)
    return counts


def assert_lean(counts: Mapping[str, Count]) -> None:
    """The head launches at most a third of what its formula does, and saves at most 0.35 of it."""
    head, plain = counts["head"], counts["formula"]
    assert 3 * head.training <= plain.training, (head.training, plain.training)
    assert 3 * head.inference <= plain.inference, (head.inference, plain.inference)
    assert head.saved_bytes <= 0.35 * plain.saved_bytes, (head.saved_bytes, plain.saved_bytes)


def main() -> None:
    """Print the counts of one configuration."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--attention", default="pixel")
    parser.add_argument("--size", default="425x560", help="HEIGHTxWIDTH of the image")
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    size = tuple(int(side) for side in arguments.size.split("x"))
    counts = count_head(size=size, batch=arguments.batch, attention=arguments.attention)
    plain, head = counts["formula"], counts["head"]
    rows = [
        ("launches, evaluation", plain.inference, head.inference),
        ("launches, training forward", plain.training, head.training),
        ("saved for backward, MiB", plain.saved_bytes / 2**20, head.saved_bytes / 2**20),
    ]
    rows += [
        (f"  {name}", plain.operators.get(name, 0), head.operators.get(name, 0))
        for name in sorted({**plain.operators, **head.operators})
    ]
    print(f"{'attention ' + arguments.attention:48}{'formula':>10}{'head':>10}{'share':>8}")
    for name, before, after in rows:
        share = f"{after / before:8.2f}" if before else ""
        print(f"{name:48}{before:10.0f}{after:10.0f}{share}")


if __name__ == "__main__":
    main()
