"""Result files: what one run of the benchmark measured, where, and how far from what the machine can do.

``bench/results/<gpu>/<date>-<commit>.json`` holds one :class:`Results`. Nothing in a report is typed by hand:
whatever is printed, drawn or quoted is read back with :func:`read`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

OURS = "ours"  # the implementation that all others are compared with
OK = "ok"
UNKNOWN = "unknown"  # commit, where there is neither git nor a word about it
_AND = " and "

Key = tuple[str, str, str, str, str]
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Machine:
    """Where the run happened; fields are None where there is nothing to read.

    Attributes:
        gpu: name of the GPU; None if the run was on the CPU, whose times say nothing about a GPU.
        cpu: name of the processor.
        driver: version of the GPU's driver.
        cuda: version of CUDA (or of HIP) that torch was built with.
        torch: version of PyTorch.
        triton: version of Triton.
        python: version of Python.
        clocks: clock frequencies as read while the GPU worked, unchanged, in the driver's own words.
        commit: git revision of the code that was measured, 40 digits, or :data:`UNKNOWN`.
        dirty: whether that code had uncommitted changes, or Python files that git does not know; None
            without git.
    """

    gpu: str | None
    cpu: str | None
    driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    python: str
    clocks: str | None
    commit: str
    dirty: bool | None


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in the same run; speed of light is counted from these.

    Attributes:
        copy: bytes per second of a large device-to-device copy, bytes read plus bytes written.
        matrix: FLOPs per second of a large matrix product, by dtype ("bf16", "fp16", "fp32").
    """

    copy: float | None
    matrix: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One implementation of one op at one shape, in one dtype and mode.

    Attributes:
        op: label of the op in ``degmix_kernels.registry``, or the part of the model.
        shape: name of the shape in ``bench.shapes``.
        dtype: "bf16", "fp16" or "fp32": that of our op's inputs. A baseline that computes in another says so
            in ``impl``, and stands beside the rows it is compared with.
        mode: "fwd", "bwd" or "fwdbwd"; of the model "inference" or "training step".
        impl: ``OURS`` or the name of the baseline.
        timer: "cuda events", "cuda graph" or "cpu clock"; None if nothing was timed.
        images: pictures per call, for images per second; None for ops.
        ms: median milliseconds of one call.
        ms_p20: 20 % of the calls took less.
        ms_p80: 80 % of the calls took less.
        peak_bytes: most device memory allocated at once during a call, what existed before included.
        bytes: fewest bytes that the call has to move, as the op declares.
        flops: floating-point operations of its products, as the op declares.
        speed_of_light: time that ``bytes`` and ``flops`` need at the ceilings, over ``ms``; 1 is perfect.
        rel_error: largest relative L2 error of output and gradients against the fp64 reference, in this run.
        status: ``OK``, or in words why there are no times or no peak memory.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    impl: str
    timer: str | None = None
    images: int | None = None
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    peak_bytes: int | None = None
    bytes: int | None = None
    flops: int | None = None
    speed_of_light: float | None = None
    rel_error: float | None = None
    status: str = OK

    @property
    def case(self) -> tuple[str, str, str, str]:
        """What rows have in common that are compared with each other."""
        return self.op, self.shape, self.dtype, self.mode

    @property
    def key(self) -> Key:
        """What the rows of one measurement, one for each timer, have in common."""
        return (*self.case, self.impl)


@dataclass(frozen=True)
class Results:
    """One run of the benchmark, or several that were continued.

    Attributes:
        machine: where; of several runs drivers and processors may differ, and are all named.
        ceilings: what the device reached.
        rows: what was measured.
        complete: whether all that a report shows is in it (``Selection.headline``); it takes no other file.
        quick: whether it was made by ``--quick``, with few repetitions: no part of a complete one.
    """

    machine: Machine
    ceilings: Ceilings
    rows: tuple[Row, ...]
    complete: bool = False
    quick: bool = False

    @property
    def keys(self) -> frozenset[Key]:
        """Of the measurements that are in it, failed ones too."""
        return frozenset(row.key for row in self.rows)


def merge(before: Results, now: Results) -> Results:
    """A run and the one that continues it: the rows of both, and of what both measured the earlier.

    Raises:
        ValueError: if they are not of the same GPU, versions and commit, or nobody knows the commit.
    """
    for name in ("gpu", "cuda", "torch", "triton", "commit", "dirty"):
        then, here = getattr(before.machine, name), getattr(now.machine, name)
        if then != here:
            raise ValueError(f"{name} was {then} and is {here} now, so it cannot be continued")
    if before.quick or now.quick:
        raise ValueError("what --quick measured is no part of another run")
    expect_continuable(now.machine)
    # Another machine of the same kind may have another driver or processor.
    machine = replace(
        before.machine,
        driver=_both(before.machine.driver, now.machine.driver),
        cpu=_both(before.machine.cpu, now.machine.cpu),
    )
    rows = before.rows + tuple(row for row in now.rows if row.key not in before.keys)
    matrix = {**now.ceilings.matrix, **before.ceilings.matrix}
    copy = now.ceilings.copy if before.ceilings.copy is None else before.ceilings.copy
    return Results(machine, Ceilings(copy, matrix), rows, before.complete)


def _both(then: str | None, now: str | None) -> str | None:
    """All that there are, each named once."""
    every = [*(then or "").split(_AND), now or ""]
    return _AND.join(dict.fromkeys(filter(None, every))) or None


def expect_continuable(machine: Machine) -> None:
    """Raise ``ValueError`` if a run on this machine cannot be continued, as nobody knows what it measured."""
    if machine.commit == UNKNOWN or machine.dirty:
        raise ValueError(
            "only what a known commit without changes measured can be continued; "
            "without git, BENCH_COMMIT says the commit"
        )


def write(results: Results, path: Path) -> None:
    """Write a result file, whole or not at all; numbers that are not finite become null.

    Raises:
        OSError: if the folder cannot be made or the file not written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(asdict(results)), indent=1, allow_nan=False) + "\n"
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(unfinished, 0o644)  # mkstemp lets nobody else read its file
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def read(path: Path) -> Results:
    """Read a result file.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is not one of these result files, naming the first place that is wrong.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if isinstance(data, dict):
        for name in ("complete", "quick"):  # earlier revisions, which can be compared with, did not say
            data.setdefault(name, False)
    _check_keys(data, {field.name for field in fields(Results)}, str(path))
    for name in ("complete", "quick"):
        if not isinstance(data[name], bool):
            raise ValueError(f"{path}: {name}: expected bool, got {data[name]!r}")
    if not isinstance(data["rows"], list):
        raise ValueError(f"{path}: rows: expected a list, got {type(data['rows']).__name__}")
    return Results(
        machine=_record(Machine, data["machine"], f"{path}: machine"),
        ceilings=_record(Ceilings, data["ceilings"], f"{path}: ceilings"),
        rows=tuple(_record(Row, row, f"{path}: rows[{index}]") for index, row in enumerate(data["rows"])),
        complete=data["complete"],
        quick=data["quick"],
    )


def unused(path: Path) -> Path:
    """The path, or the first of path-2, path-3 and so on where nothing is yet."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(each for each in names if not each.exists())


def newest(folder: Path) -> Path | None:
    """The newest result file below a folder, by the date its name begins with; None if there is none."""
    return max(folder.rglob("*.json"), key=lambda path: path.name, default=None)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _check_keys(data: Any, expected: set[str], where: str) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    if data.keys() != expected:
        missing, unknown = sorted(expected - data.keys()), sorted(data.keys() - expected)
        raise ValueError(f"{where}: missing keys {missing}, unknown keys {unknown}")


def _record(kind: type[_Record], data: Any, where: str) -> _Record:
    hints = get_type_hints(kind)
    _check_keys(data, set(hints), where)
    for name, hint in hints.items():
        if not _fits(data[name], hint):
            raise ValueError(f"{where}.{name}: expected {_words(hint)}, got {data[name]!r}")
    return kind(**data)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is dict:
        _, entry = get_args(hint)
        return isinstance(value, dict) and all(_fits(each, entry) for each in value.values())
    accepted = get_args(hint) or (hint,)
    if isinstance(value, bool):  # which Python counts among the integers
        return bool in accepted
    return isinstance(value, accepted) or (float in accepted and isinstance(value, int))


def _words(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
