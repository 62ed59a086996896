"""Result files: what the benchmark measured, where, and how far from what the machine can do.

A file has a line of JSON for each :class:`Row`, with all that :class:`Part` says of the call that measured
it, and ``device``. Lines of what was measured are added and never changed, so a run that was cut off goes on
where it ended. Nothing in a report is typed by hand: whatever is printed, drawn or quoted is read
back with :func:`read`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from degmix.records import RecordError, convert

OURS = "ours"  # the implementation that all others are compared with
OK = "ok"
UNAVAILABLE = "not available"  # how the status begins of what is not installed, or not for this machine
KILLED = "failed: the process was killed meanwhile"
UNKNOWN = "unknown"  # commit, where there is neither git nor a word about it
PUBLISHED = Path(__file__).resolve().parents[1] / "results"

Key = tuple[str, str, str, str, str]


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
        tf32: whether PyTorch's own products ("matmul") and convolutions ("cudnn") of fp32 may run in TF32, as
            timed; None of a file that does not say.
        interpreted: whether Triton's interpreter ran our kernels; otherwise a CPU runs the ops' references.
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
    tf32: dict[str, bool] | None = None
    interpreted: bool = False

    def device(self, impl: str) -> str:
        """What computed a row: the GPU, or the CPU and, of ours, in which way."""
        if self.gpu is not None or impl != OURS:
            return self.gpu or "CPU"
        return f"CPU ({'interpreter' if self.interpreted else 'reference'})"

    @property
    def folder(self) -> str:
        """The machine's folder among the results, such as "nvidia-h200"."""
        words = (self.gpu or "cpu").lower().split()
        return "-".join("".join(c for c in word if c.isalnum()) for word in words)


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
        shape: name of the shape in ``bench.cases.shapes``.
        dtype: "bf16", "fp16" or "fp32": that of our op's inputs. A baseline that computes in another says so
            in ``impl``, and stands beside the rows it is compared with.
        mode: "fwd", "bwd" or "fwdbwd"; of the model "inference" or "training step".
        impl: ``OURS`` or the name of the baseline.
        timer: "cuda events", "cuda graph", "cuda loop" or "cpu clock"; None if nothing was timed.
        images: pictures per call, for images per second; None for ops.
        ms: median milliseconds of one call.
        ms_p20: 20 % of the calls took less.
        ms_p80: 80 % of the calls took less.
        runs: how many times were taken, each of one call, or of up to 20 calls in a row; None where unknown.
        peak_bytes: most device memory a call takes beyond what was there, plus its inputs and parameters.
        bytes: fewest bytes that the call has to move, as the op declares.
        flops: floating-point operations of its products, as the op declares.
        speed_of_light: time that ``bytes`` and ``flops`` need at the ceilings, over ``ms``; 1 is perfect.
        rel_error: largest relative L2 error of output and gradients against the fp64 reference, in this run.
        status: ``OK``, or in words why there are no times or no peak memory.
        part: in which of ``Results.parts`` it was measured.
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
    runs: int | None = None
    peak_bytes: int | None = None
    bytes: int | None = None
    flops: int | None = None
    speed_of_light: float | None = None
    rel_error: float | None = None
    status: str = OK
    part: int = 0

    @property
    def case(self) -> tuple[str, str, str, str]:
        """What rows have in common that are compared with each other."""
        return self.op, self.shape, self.dtype, self.mode

    @property
    def failed(self) -> bool:
        """Whether it should have run, and did not or not to its end."""
        return self.status != OK and not self.status.startswith(UNAVAILABLE)

    @property
    def key(self) -> Key:
        """What the rows of one measurement, one for each timer, have in common."""
        return (*self.case, self.impl)


@dataclass(frozen=True)
class Part:
    """What one call of the benchmark has to say of itself.

    Attributes:
        machine: where it ran.
        ceilings: what the device reached in it.
        measured: when it began, UTC, such as "2026-01-02T03:04:05".
        quick: whether it was made by ``--quick``, with few repetitions: no part of another run.
    """

    machine: Machine
    ceilings: Ceilings
    measured: str = ""
    quick: bool = False


@dataclass(frozen=True)
class Results:
    """One run of the benchmark, in one call or in several.

    Attributes:
        parts: every call. Only times of the same one are compared: the next may have found another machine.
        rows: what was measured.
    """

    parts: tuple[Part, ...]
    rows: tuple[Row, ...] = ()

    @property
    def machine(self) -> Machine:
        """Where the first call ran."""
        return self.parts[0].machine

    @property
    def ceilings(self) -> Ceilings:
        """What the device reached in the first call."""
        return self.parts[0].ceilings

    @property
    def measured(self) -> str:
        """When the first call began."""
        return self.parts[0].measured

    @property
    def keys(self) -> frozenset[Key]:
        """The keys of all measurements in the file, failed ones too."""
        return frozenset(row.key for row in self.rows)

    @property
    def repeatable(self) -> frozenset[Key]:
        """The keys of our rows that had a time when last measured."""
        last = {row.key: row for row in self.rows if row.impl == OURS}
        return frozenset(key for key, row in last.items() if row.ms is not None)

    @property
    def failed(self) -> int:
        """How many rows of ours failed."""
        return sum(row.impl == OURS and row.failed for row in self.rows)

    @property
    def file_name(self) -> str:
        """``<date>-<commit>.jsonl``."""
        return f"{self.measured.replace(':', '')}-{self.machine.commit[:10]}.jsonl"

    def with_rows(self, rows: tuple[Row, ...]) -> Results:
        """The results with what the last call measured."""
        part = len(self.parts) - 1
        return replace(self, rows=self.rows + tuple(replace(row, part=part) for row in rows))


def continue_(before: Results, now: Part) -> Results:
    """What one call measured, for another one to add to.

    Raises:
        ValueError: if they are not of the same GPU, versions and commit, or nobody knows the commit.
    """
    # Another machine of the same kind may have another driver or processor.
    for name in ("gpu", "cuda", "torch", "triton", "commit", "dirty", "tf32", "interpreted"):
        then, here = getattr(before.machine, name), getattr(now.machine, name)
        if then != here:
            raise ValueError(f"{name} was {then} and is {here} now, so it cannot be continued")
    if any(part.quick for part in before.parts):
        raise ValueError("what --quick measured is no part of another run")
    expect_continuable(now.machine)
    return replace(before, parts=(*before.parts, now))


def expect_continuable(machine: Machine) -> None:
    """Raise ``ValueError`` if a run on this machine cannot be continued, as nobody knows what it measured."""
    if machine.commit == UNKNOWN or machine.dirty:
        raise ValueError(
            "only what a known commit without changes measured can be continued; "
            "without git, BENCH_COMMIT says the commit"
        )


def expect_writable(path: Path) -> None:
    """See that a file can be written before there is anything to write; its folder is made.

    Raises:
        OSError: if it cannot, in a sentence.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path}: its folder cannot be made: {error.strerror}") from None
    if path.is_dir():
        raise OSError(f"{path}: expected a file, got a folder")
    if not os.access(path.parent, os.W_OK):
        raise OSError(f"{path}: its folder cannot be written to")


def unused(path: Path) -> Path:
    """The path, or the first of path-2, path-3 and so on where nothing is yet."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(each for each in names if not each.exists())


class ResultFile:
    """A file that gets the rows of one call, each as soon as it is known.

    A measurement that is begun has a line that says that it was killed, until its rows take the place of
    that line: whatever hangs would otherwise hang every call that continues the file. Without a row the file
    does not stay.
    """

    def __init__(self, path: Path, part: Part) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._part = path, part
        self._file = path.open("ab", buffering=0)
        self._end = _whole(path.read_bytes())  # of the rows that stay

    def begin(self, row: Row) -> None:
        """Leave word of what is being measured."""
        self._write([replace(row, status=KILLED)])

    def add(self, rows: Iterable[Row]) -> None:
        """Write what was measured."""
        self._end += self._write(rows)

    def close(self) -> None:
        """Take back the word of what was not measured to its end."""
        self._write(())
        self._file.close()
        if not self._end:
            self._path.unlink()

    def _write(self, rows: Iterable[Row]) -> int:
        text = "".join(_line(row, self._part) for row in rows).encode()
        self._file.truncate(self._end)
        return self._file.write(text)


def read(path: Path) -> Results:
    """Read a result file. What a process that was killed has half written is left out, and a line says so.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is not one of these result files, naming the first place that is wrong.
    """
    data = path.read_bytes()
    if torn := len(data) - _whole(data):
        print(f"{path}: its last line has no end, and is left out ({torn} bytes)", file=sys.stderr)
    parts: list[Part] = []
    rows: list[Row] = []
    for number, line in enumerate(data[: len(data) - torn].splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            row, part = _parsed(json.loads(line))
        except RecordError as error:
            raise ValueError(f"{where}: {error}") from None
        except ValueError as error:  # not JSON, or no text at all
            raise ValueError(f"{where}: not JSON: {error}") from None
        if not 0 <= row.part <= len(parts):
            raise ValueError(f"{where}: part: there is no part {row.part}")
        parts += [part] if row.part == len(parts) else []
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: has no line that was measured")
    return Results(tuple(parts), tuple(rows))


def _whole(data: bytes) -> int:
    """How many bytes the whole lines take."""
    return data.rfind(b"\n") + 1


def _line(row: Row, part: Part) -> str:
    """A row with its call; numbers that are not finite become null."""
    columns = asdict(row) | {"device": part.machine.device(row.impl)}
    columns |= asdict(part.machine) | asdict(part.ceilings) | {"measured": part.measured, "quick": part.quick}
    for name, value in columns.items():
        if isinstance(value, float) and not math.isfinite(value):
            columns[name] = None
    return json.dumps(columns, allow_nan=False) + "\n"


def _parsed(line: Any) -> tuple[Row, Part]:
    """The inverse of :func:`_line`."""
    if not isinstance(line, dict):
        raise RecordError(f"expected an object, got {type(line).__name__}")
    line.pop("device", None)  # which follows from the rest

    def taken(*names: str) -> dict[str, Any]:
        return {name: line.pop(name) for name in names if name in line}

    machine, ceilings = (taken(*(each.name for each in fields(kind))) for kind in (Machine, Ceilings))
    part = {"machine": machine, "ceilings": ceilings} | taken("measured", "quick")
    return convert(line, Row), convert(part, Part)
