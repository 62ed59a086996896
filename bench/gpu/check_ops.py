"""Every op in every dtype at the contract's samples, against fp64: ``python -m bench.gpu.check_ops FILE``.

Output and gradients, Triton forced, on a GPU. Each op has a process of its own, so an error of the GPU ends
that op alone. Each line of the file is a check: ``op``, ``dtype``, ``sample``, ``worst`` (the output or
gradient that is furthest off), its relative L2 ``error`` and the ``tolerance``, or what ``failed``; ``ok``;
``seconds``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases.op import op_run
from bench.gpu.process import limited
from bench.harness.case import DTYPES, SEED
from bench.harness.command import FAILURE, USER_ERROR
from degmix_kernels import use_backend
from degmix_kernels.contract import Op, Sample
from degmix_kernels.registry import OPS
from degmix_kernels.testing import relative_l2, tolerance

MOST_ARE_WRONG = 4  # exit code: nothing measured on this GPU would be worth its time
SECONDS = 90.0


def differentiated(
    op: Op, function: Callable[..., Tensor], arguments: Mapping[str, Any], dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a call, and the gradients of its arguments, by name, for :func:`upstream`."""
    run = op_run(op, function, arguments)
    (output,) = run.forward()
    if not output.numel():
        return output, {}
    found = torch.autograd.grad(output, list(run.leaves.values()), upstream(output, dtype))
    return output, dict(zip(run.leaves, found, strict=True))


def upstream(output: Tensor, dtype: torch.dtype) -> Tensor:
    """A random gradient of an output, rounded to a dtype: the reference gets the same values."""
    drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(SEED))
    return drawn.to(dtype).to(output)


def compare(op: Op, sample: Sample, dtype: torch.dtype) -> dict[str, Any]:
    """One check."""
    exact = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in sample.arguments.items()
    }
    with use_backend("triton"):
        output, gradients = differentiated(op, op.function, sample.arguments, dtype)
    torch.cuda.synchronize()
    expected, expected_gradients = differentiated(op, op.reference, exact, dtype)
    found = [("output", relative_l2(output, expected), tolerance(dtype, sample.reduction))]
    terms = sample.terms(sample.arguments, upstream(output, dtype)) if sample.terms is not None else {}
    for name, gradient in gradients.items():
        error = relative_l2(gradient, expected_gradients[name], terms.get(name))
        limit = tolerance(dtype, sample.reduction, sample.roots.get(name, 0))
        found.append((f"gradient of {name}", error, limit))
    worst, error, limit = max(found, key=lambda each: (each[1] != each[1], each[1] / each[2]))  # a NaN first
    return {"worst": worst, "error": error, "tolerance": limit, "ok": all(e <= most for _, e, most in found)}


def check_op(op: Op, write: Callable[[dict[str, Any]], None]) -> None:
    """All checks of an op.

    Raises:
        RuntimeError: if the GPU answers no more, after the line of the check that lost it.
    """
    device = torch.device("cuda")
    torch.backends.cudnn.allow_tf32 = False  # references in fp32 are to be exact
    for name, dtype in DTYPES.items():
        for index, sample in enumerate(op.samples(device, dtype, torch.Generator().manual_seed(SEED))):
            line: dict[str, Any] = {"op": op.label, "dtype": name, "sample": index}
            began = time.monotonic()
            try:
                line |= compare(op, sample, dtype)
            except Exception as error:  # whatever it is, it is that check's
                words = " ".join(str(error).split())
                line |= {"failed": f"{type(error).__name__}: {words[-600:]}", "ok": False}
            write(line | {"seconds": round(time.monotonic() - began, 2)})
            torch.cuda.synchronize()


def check_all(out: Path, seconds: float, processes: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of all ops, and what to say of processes that did not come to their end."""
    until = time.monotonic() + seconds
    parts = {op.label: out.with_name(f"{out.stem}-{index}.jsonl") for index, op in enumerate(OPS)}

    def check_one(label: str) -> str:
        errors, left = parts[label].with_suffix(".err"), until - time.monotonic()
        if left <= 0:
            return f"{label}: not begun"
        command = [sys.executable, "-m", "bench.gpu.check_ops", str(parts[label]), "--op", label]
        with errors.open("wb") as log:
            code = limited(command, left, log, to_end=0)
        tail = errors.read_text().strip()[-700:]
        errors.unlink()
        if time.monotonic() > until:
            return f"{label}: not done within {seconds:.0f} s"
        return f"{label}: ended with {code}: {tail}" if code else ""

    with ThreadPoolExecutor(processes) as pool:
        notes = [note for note in pool.map(check_one, parts) if note]
    text = "".join(part.read_text() for part in parts.values() if part.exists())
    out.write_text(text)
    for part in parts.values():
        part.unlink(missing_ok=True)
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")], notes


def main(arguments: Sequence[str] | None = None) -> int:
    """Check; 0 if all is right, 1 if not, 4 if most is wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser("python -m bench.gpu.check_ops", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="FILE")
    parser.add_argument("--op", choices=[op.label for op in OPS], help="only this one, in this process")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all (default: {SECONDS:.0f})")
    parser.add_argument("--processes", type=int, default=min(len(OPS), os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("check_ops: needs a GPU", file=sys.stderr)
        return USER_ERROR
    if options.op is not None:
        (op,) = (op for op in OPS if op.label == options.op)
        with options.out.open("w", buffering=1) as file:
            try:
                check_op(op, lambda line: print(json.dumps(line), file=file))
            except RuntimeError:
                traceback.print_exc()
                os._exit(FAILURE)  # a lost GPU can hold up an orderly end
        return 0
    began = time.monotonic()
    lines, notes = check_all(options.out, options.seconds, options.processes)
    bad = [line for line in lines if not line["ok"]]
    for line in bad[:40]:
        what = (
            line.get("failed") or f"{line['worst']}: {line['error']:.2e}, tolerance {line['tolerance']:.2e}"
        )
        print(f"WRONG {line['op']}, {line['dtype']}, sample {line['sample']}: {what[:200]}")
    for note in notes:
        print(note)
    ops = len({line["op"] for line in lines})
    print(
        f"{len(lines) - len(bad)} of {len(lines)} checks right, {ops} ops, {time.monotonic() - began:.0f} s"
    )
    if len(bad) > len(lines) / 2:
        return MOST_ARE_WRONG
    return FAILURE if bad or notes or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
