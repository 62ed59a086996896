"""What a visit to a GPU machine does: its stages, in their order, and the time of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

HUGE = "tests/kernels/test_deform_conv_gpu.py::test_beyond_32_bits"  # 24 to 34 GB each: one at a time
# Compile checks need no GPU, and each of the random calls would have to be compiled.
LEFT_TO_MAKE_TEST = (
    "tests/kernels/test_compile.py",
    "tests/kernels/test_front_end.py",
    "tests/kernels/test_deform_conv_compile.py",
    "tests/kernels/test_deform_conv_properties.py",
)
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.gpu.synchronise", "-o", "addopts=")
PYTEST += ("--tb=short", "--timeout=120", "--timeout-method=thread", "--durations=15", "-rfE")
WORKERS = 8  # with more, a warm cache is read no faster
TO_RENDER = 30  # seconds of training's, before its clock starts
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # of every worker
CONTRACT = "tests/test_contract.py"
VALUES = "values_and_gradients"  # the contract's test of every op in every dtype
MOST_ARE_WRONG = 6  # exit code of pytest with bench.gpu.synchronise: more than half of the tests failed


@dataclass(frozen=True)
class Stage:
    """One process of a visit.

    Attributes:
        name: in the summary, and of its log.
        seconds: it gets at most.
        command: what Python, or the sanitizer, is given; {out} is filled in, and {seconds}, which leave
            :data:`TO_RENDER` of its time.
        sanitizer: the tool of compute-sanitizer under which it runs, if one.
        environment: variables.
        beside: stages that run at the same time, one after the other.
        repeated: whether a later call goes on with it: it is begun again after the GPU was lost, and that its
            time was over is no failure.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    sanitizer: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[Stage, ...] = ()
    repeated: bool = False


def _tests(seconds: int, *which: str, beside: tuple[Stage, ...] = ()) -> Stage:
    left = (f"--ignore={path}" for path in LEFT_TO_MAKE_TEST)
    command = (*PYTEST, f"-n{WORKERS}", f"--deselect={HUGE}", *left, *which)
    return Stage("tests", seconds, command, environment=ONE_THREAD, beside=beside)


def _sanitized(tool: str, seconds: int, *options: str) -> Stage:
    # Without PyTorch's cache every tensor is an allocation of its own, so its ends are known.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(tool, seconds, ("-m", "bench.gpu.small_calls", *options), tool, environment)


BENCH = ("-m", "bench", "--resume", "{out}/results.jsonl")
OPS = Stage("ops", 70, (*PYTEST, f"-n{WORKERS}", CONTRACT, f"-k={VALUES}"), environment=ONE_THREAD)
COMPILED = ("--op", "channel_mix", "gated_mlp", "spatial_gating_unit", "--shapes", "nyud", "--dtype", "bf16")
TRAINING = ("-m", "bench.training", "--out", "{out}/training", "--rooms", "64", "--seconds", "{seconds}")


@dataclass(frozen=True)
class Visit:
    """What one command does, in this order: what has no time left is at the end."""

    what: str  # for the help
    deadline: int  # seconds for all of it
    stages: tuple[Stage, ...]


VISITS = {
    "first": Visit(
        "every op, the kernels' tests and sanitizers, the headline of the benchmark, a profile",
        560,
        (
            OPS,
            _tests(
                150,
                CONTRACT,
                "tests/kernels",
                f"--deselect={CONTRACT}::test_{VALUES}",  # which have run
                beside=(
                    _sanitized("memcheck", 90),
                    _sanitized("racecheck", 30, "--first"),
                    _sanitized("initcheck", 30, "--first"),
                ),
            ),
            Stage("bench", 190, BENCH, repeated=True),
            Stage("profile", 45, ("-m", "bench.profile_step", "--out", "{out}/profile.md")),
            Stage("huge", 55, (*PYTEST, HUGE)),
        ),
    ),
    "decide": Visit(
        "prototypes of kernels beside ours (python -m bench.gpu.decide)",
        200,
        (Stage("decide", 180, ("-m", "bench.gpu.decide", "{out}/decide.jsonl"), repeated=True),),
    ),
    "compare": Visit(
        "torch.compile beside ours, and training with ours and with the formula",
        200,
        (
            Stage("compiled", 95, (*BENCH, *COMPILED, "--baseline", "torch.compile"), repeated=True),
            Stage("training", 85, TRAINING),
        ),
    ),
    "quick": Visit(
        "within four minutes: tests of values and determinism, memcheck, the benchmark at small sizes",
        230,
        (
            _tests(75, CONTRACT, f"-k={VALUES} or deterministic", beside=(_sanitized("memcheck", 75),)),
            Stage("bench", 110, ("-m", "bench", "--quick", "--json", "{out}/results.jsonl")),
        ),
    ),
}
WITHOUT_GPU = Stage("bench", 200, VISITS["quick"].stages[-1].command)


def with_seconds(stage: Stage, budgets: Mapping[str, int]) -> Stage:
    """The stage, and what runs beside it, with the seconds that were asked for."""
    beside = tuple(with_seconds(each, budgets) for each in stage.beside)
    return replace(stage, seconds=budgets.get(stage.name, stage.seconds), beside=beside)
