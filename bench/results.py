"""Result files: what one run of the benchmark measured, where, and how far from what the machine can do.

``bench/results/<gpu>/<date>-<commit>.json`` holds one :class:`Results`. Nothing in a report is typed by hand:
whatever is printed, drawn or quoted is read back with :func:`read`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from bench import records
from degmix.files import atomic_file

OURS = "ours"  # the implementation that all others are compared with
OK = "ok"
UNAVAILABLE = "not available"  # how the status begins of what is not installed, or not for this machine
UNKNOWN = "unknown"  # commit, where there is neither git nor a word about it
PUBLISHED = Path(__file__).resolve().parent / "results"

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
        shape: name of the shape in ``bench.shapes``.
        dtype: "bf16", "fp16" or "fp32": that of our op's inputs. A baseline that computes in another says so
            in ``impl``, and stands beside the rows it is compared with.
        mode: "fwd", "bwd" or "fwdbwd"; of the model "inference" or "training step".
        impl: ``OURS`` or the name of the baseline.
        timer: "cuda events", "cuda graph", "cuda loop" or "cpu clock"; None if nothing was timed.
        images: pictures per call, for images per second; None for ops.
        ms: median milliseconds of one call.
        ms_p20: 20 % of the calls took less.
        ms_p80: 80 % of the calls took less.
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
        measured: when it began, UTC, such as "2026-01-02T03:04:05"; empty of a file that does not say.
    """

    machine: Machine
    ceilings: Ceilings
    measured: str = ""


@dataclass(frozen=True)
class Results:
    """One run of the benchmark, in one call or in several.

    Attributes:
        machine: where its first call ran.
        ceilings: what the device reached in that call.
        rows: what was measured.
        complete: whether all that a report shows is in it (``Selection.headline``); it prefers such a file.
        quick: whether it was made by ``--quick``, with few repetitions: no part of a complete one.
        measured: as of :class:`Part`, when the first call began.
        continued: the calls that went on where it had ended, in their order.
    """

    machine: Machine
    ceilings: Ceilings
    rows: tuple[Row, ...]
    complete: bool = False
    quick: bool = False
    measured: str = ""
    continued: tuple[Part, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every call. Only times of the same one are compared: the next may have found another machine."""
        return Part(self.machine, self.ceilings, self.measured), *self.continued

    @property
    def keys(self) -> frozenset[Key]:
        """Of the measurements that are in it, failed ones too."""
        return frozenset(row.key for row in self.rows)

    @property
    def repeatable(self) -> frozenset[Key]:
        """Of ours that had a time when last measured."""
        last = {row.key: row for row in self.rows if row.impl == OURS}
        return frozenset(key for key, row in last.items() if row.ms is not None)

    @property
    def file_name(self) -> str:
        """``<date>-<commit>.json``."""
        return f"{self.measured.replace(':', '')}-{self.machine.commit[:10]}.json"

    def with_rows(self, rows: tuple[Row, ...]) -> Results:
        """The results with what the last call measured."""
        part = len(self.continued)
        return replace(self, rows=self.rows + tuple(replace(row, part=part) for row in rows))


def continue_(before: Results, now: Part) -> Results:
    """What one call measured, for another one to add to.

    Raises:
        ValueError: if they are not of the same GPU, versions and commit, or nobody knows the commit.
    """
    # Another machine of the same kind may have another driver or processor.
    for name in ("gpu", "cuda", "torch", "triton", "commit", "dirty", "tf32"):
        then, here = getattr(before.machine, name), getattr(now.machine, name)
        if then != here:
            raise ValueError(f"{name} was {then} and is {here} now, so it cannot be continued")
    if before.quick:
        raise ValueError("what --quick measured is no part of another run")
    expect_continuable(now.machine)
    return replace(before, continued=(*before.continued, now))


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


def write(results: Results, path: Path) -> None:
    """Write a result file, whole or not at all; numbers that are not finite become null.

    Raises:
        OSError: if the folder cannot be made or the file not written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(asdict(results)), indent=1, allow_nan=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())


def read(path: Path) -> Results:
    """Read a result file.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is not one of these result files, naming the first place that is wrong.
    """
    results = records.record(Results, records.read_json(path), str(path))
    for index, row in enumerate(results.rows):
        if not 0 <= row.part < len(results.parts):
            raise ValueError(f"{path}: rows[{index}].part: there is no part {row.part}")
    return results


def machine_of(path: Path) -> Machine:
    """The machine that a file has under ``machine``, of this benchmark or of another measurement.

    Raises:
        OSError: if there is no such file.
        ValueError: if it has none.
    """
    data = records.read_json(path)
    machine = data.get("machine") if isinstance(data, dict) else None
    return records.record(Machine, machine, f"{path}: machine")


def begin(key: Key, file: Path) -> None:
    """Leave word, beside a result file, of what is being measured.

    Raises:
        OSError: if the folder cannot be made or the word not be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(_begun(file)) as word:
        word.write(json.dumps(key).encode())


def end(file: Path) -> None:
    """Take that word back."""
    _begun(file).unlink(missing_ok=True)


def with_unended(results: Results, file: Path) -> Results:
    """The results and a failed row of what was being measured when the process was killed, if one was.

    Whatever hangs would otherwise hang every call that continues the file.

    Raises:
        OSError: if the word cannot be read.
        ValueError: if it is none of :func:`begin`'s.
    """
    path = _begun(file)
    if not path.exists():
        return results
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        key = None
    if not isinstance(key, list) or [type(word) for word in key] != list(get_args(Key)):
        raise ValueError(f"{path}: expected five words that say what was measured; delete it to go on")
    return results.with_rows((Row(*key, status="failed: the process was killed meanwhile"),))


def _begun(file: Path) -> Path:
    return file.with_name(f"{file.name}.begun")


def unused(path: Path) -> Path:
    """The path, or the first of path-2, path-3 and so on where nothing is yet."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(each for each in names if not each.exists())


def publish(file: Path, results: Results, folder: Path = PUBLISHED) -> Path:
    """Move a result file to those that the report reads, under the name that its date and commit give it.

    Raises:
        OSError: if it cannot be moved.
        ValueError: if the report would not take it.
    """
    if results.machine.gpu is None or not results.complete or not results.measured:
        raise ValueError(f"{file}: expected a complete run on a GPU that says when it was measured")
    if results.machine.commit == UNKNOWN or results.machine.dirty:
        raise ValueError(f"{file}: expected the run of a known commit, without changes")
    target = unused(folder / results.machine.folder / results.file_name)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(file, target)
    return target


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
