"""``bench/gpu_check.sh`` without a GPU: a stub for Python pretends one, and says what the stages do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up import ROW, results, write

from bench import training
from bench.gpu import prepared, rehearse, visit, visits
from bench.harness.results import KILLED, Row
from bench.options import parser, select

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_check.sh"
FIRST = {"ops", "tests", "memcheck", "racecheck", "initcheck", "bench", "profile", "huge"}
SANITIZED = {"memcheck", "racecheck", "initcheck"}
GPU = "Stub H200"

# What stands for each program is a line of shell in $STUB_<name>; what else is asked of Python, Python does.
PYTHON = f"""#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
    *get_device_name*) eval "$STUB_TORCH" ;;
    *torch.ones*) eval "$STUB_PROBE" ;;
    *importlib.util*) eval "$STUB_FIND" ;;
    *-k=values_and_gradients) eval "$STUB_OPS" ;;
    *test_beyond_32_bits) eval "$STUB_HUGE" ;;
    "-m pytest"*) eval "$STUB_TESTS" ;;
    *small_calls*) eval "$STUB_SMALL_CALLS" ;;
    "-m bench.profile_step"*) eval "$STUB_PROFILE" ;;
    "-m bench "*) eval "$STUB_BENCH" ;;
    "-m bench.gpu.decide"*) eval "$STUB_DECIDE" ;;
    "-m bench.training"*) eval "$STUB_TRAINING" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
MAIN = """
import sys
from pathlib import Path
from bench.gpu import visit
python, folder, *arguments = sys.argv[1:]
arguments += ["--prepared", folder + "/gpu"]
visit.TO_ASK = 1
sys.exit(visit.main(arguments, python=python, cache=Path(folder) / "cache"))
"""
COUNTS_INTERRUPTS = """
import os, signal, time
child = os.fork()
signal.signal(signal.SIGINT, lambda *_: print("stage" if child else "child", flush=True))
if child:
    print("pid", child, flush=True)
end = time.monotonic() + (3 if child else 60)
while time.monotonic() < end:
    time.sleep(0.1)
"""


class Check:
    """One call of the visit, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.root, self.folder = folder, folder / "out"
        self.tools = rehearse.install(rehearse.TOOLS | {"python": PYTHON}, folder / "tools")
        self.calls = folder / "calls"
        self.measured = write(results(ROW), folder / "measured.jsonl")

    def __call__(
        self, *options: str, command: str = "", code: int = 0, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run it with these options and variables, or the shell command that runs "$@", until its code."""
        known = {"gpu": GPU, "capability": [9, 0], "triton": "a key"}
        environment = {
            "PATH": f"{self.tools}:/usr/local/bin:/usr/bin:/bin",
            "HOME": os.environ.get("HOME", "/"),
            "PYTHONPATH": str(SCRIPT.parents[1]),
            "OUT": str(self.folder),
            "CALLS": str(self.calls),
            "STUB_FIND": f'exec {sys.executable} "$@"',
            "STUB_TORCH": f"echo '{json.dumps(known)}'",
            "STUB_BENCH": self.leaves_results,
        } | settings
        line = [sys.executable, "-c", MAIN, str(self.tools / "python"), str(self.root), *options]
        if command:
            line = ["bash", "-c", command, "bash", *line]
        self.calls.write_text("")
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    @property
    def leaves_results(self) -> str:
        """A benchmark that measures one thing."""
        return f"cp {self.measured} {self.folder}/results.jsonl"

    @property
    def summary(self) -> dict[str, str]:
        """Stage → outcome."""
        _, *lines = (self.folder / "summary.txt").read_text().splitlines()
        return dict(line.split(maxsplit=1) for line in lines)

    def log(self, name: str) -> str:
        """A log, out of the archive."""
        with tarfile.open(self.folder / "logs.tgz") as archive:
            return archive.extractfile(name).read().decode()

    def called(self, beginning: str) -> list[str]:
        """The calls of Python whose arguments begin so, in order."""
        return [call for call in self.calls.read_text().splitlines() if call.startswith(beginning)]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path)


def only(*names: str, seconds: int = 0) -> list[str]:
    """Options that leave every stage of the first visit out but these."""
    return [
        "--seconds",
        *(f"{name}={seconds}" for name in names if seconds),
        *(f"{name}=0" for name in FIRST.difference(names)),
    ]


def test_everything_runs_and_few_files_are_left(check: Check) -> None:
    check.folder.mkdir()
    (check.folder / "somebody's.txt").write_text("stays")
    check(STUB_PROFILE=f"echo table > {check.folder}/profile.md; echo > {check.folder}/plot.png")
    assert {check.summary[name].split()[0] for name in FIRST} == {"ok"}
    files = {path.name for path in check.folder.iterdir()}
    assert files == {"results.jsonl", "profile.md", "summary.txt", "logs.tgz", "somebody's.txt"}
    assert check.log("plot.png")  # what is not needed at once
    assert check.log("nvidia-smi.txt") == "pretended\n"
    (tests,) = check.called(
        "-m pytest -q -p no:cacheprovider -p bench.gpu.synchronise -o addopts= --tb=short"
    )[:1]
    assert "-n8" in tests
    assert check.called("-m bench.gpu.small_calls") == [
        "-m bench.gpu.small_calls",
        *2 * ["-m bench.gpu.small_calls --first"],
    ]


def test_what_is_left_out_exists() -> None:
    for path in visits.LEFT_TO_MAKE_TEST:
        assert (SCRIPT.parents[1] / path).is_file()
    for file, test in (visits.HUGE.split("::"), (visits.CONTRACT, f"test_{visits.VALUES}")):
        assert f"def {test}" in (SCRIPT.parents[1] / file).read_text()


@pytest.mark.parametrize("name", visits.VISITS)
def test_budgets_add_up(name: str) -> None:
    """Stages of one lane, and the time to load torch and to end."""
    planned = visits.VISITS[name]
    seconds = sum(max(stage.seconds, sum(each.seconds for each in stage.beside)) for stage in planned.stages)
    assert seconds + visit.TO_KILL + visit.TO_FINISH <= planned.deadline


@pytest.mark.parametrize("name", ["first", "compare", "quick"])
def test_the_benchmark_understands_its_commands(name: str, tmp_path: Path) -> None:
    commands = [stage.command for stage in visits.VISITS[name].stages]
    words = [
        [word.format(out=tmp_path, logs=tmp_path, seconds=60) for word in command] for command in commands
    ]
    of_bench = [rest for _, module, *rest in words if module == "bench"]
    assert of_bench
    for rest in of_bench:
        assert len(select(parser().parse_args(rest), torch.device("cuda"))) > 0
    for rest in (rest for _, module, *rest in words if module == "bench.training"):
        assert training.parse(rest).out == tmp_path / "training"


def test_quick_tests_before_it_benchmarks(check: Check) -> None:
    check("quick")
    assert check.called("-m bench ") == [f"-m bench --quick --json {check.folder}/results.jsonl"]
    assert list(check.summary).index("tests") < list(check.summary).index("bench")


def test_without_a_gpu_the_benchmark_runs_on_the_cpu(check: Check) -> None:
    none = json.dumps({"gpu": "", "capability": None, "triton": ""})
    check(STUB_TORCH=f"echo '{none}'", code=visit.NO_GPU)
    assert check.summary.keys() == {"GPU", "bench"}
    assert check.called("-m bench ") == [f"-m bench --quick --json {check.folder}/results.jsonl"]
    check("--resume", str(check.measured), STUB_TORCH=f"echo '{none}'", code=visit.NO_GPU)
    assert check.called("-m bench ") == []  # there is no GPU to continue on


def test_another_machine_is_told_what_it_lacks(check: Check) -> None:
    (check.tools / "compute-sanitizer").unlink()
    amd = json.dumps({"gpu": "Stub MI300X", "capability": None, "triton": "a key"})
    check(STUB_TORCH=f"echo '{amd}'")
    why = "one can be prepared for Nvidia's compute capability 9.0 only"
    assert check.summary["cache"] == f"cold, every kernel has to be compiled: {why}"
    for name in SANITIZED:
        assert check.summary[name] == "not run: compute-sanitizer, Nvidia's, is not installed"


def test_a_machine_that_refuses_the_sanitizer(check: Check) -> None:
    check(STUB_PROBE="echo Device not supported; exit 9")
    for name in SANITIZED:
        expected = "not run: this machine refuses compute-sanitizer, code 9: Device not supported"
        assert check.summary[name] == expected
    assert check.called("-m bench.gpu.small_calls") == []


def test_a_failing_stage_stops_nothing(check: Check) -> None:
    done = check(STUB_TESTS="echo FAILED test_this; exit 1", STUB_SMALL_CALLS="exit 9", code=visit.FAILED)
    assert re.fullmatch(r"FAILED: code 1 after \d+ s", check.summary["tests"])
    assert "FAILED test_this" in done.stdout
    for name in SANITIZED:
        assert re.fullmatch(r"FAILED: code 9 after \d+ s", check.summary[name])
    assert all(check.summary[name].startswith("ok") for name in FIRST - SANITIZED - {"tests"})


def test_where_most_ops_are_wrong_no_time_is_spent(check: Check) -> None:
    check(STUB_OPS=f"exit {visits.MOST_ARE_WRONG}", code=visit.FAILED)
    assert {check.summary[name] for name in ("tests", "bench", "profile", "huge")} == {
        "FAILED: left out: most ops are wrong, which ops.log shows"
    }
    # The same code of another stage ends nothing.
    check(STUB_OPS="exit 1", STUB_TESTS=f"exit {visits.MOST_ARE_WRONG}", code=visit.FAILED)
    assert check.summary["bench"].startswith("ok")


def test_a_stage_over_its_budget(check: Check) -> None:
    check(*only("tests", seconds=1), STUB_TESTS="exec sleep 30", code=visit.FAILED)
    assert check.summary["tests"] == "FAILED: not done within 1 s"


KILLED_ROW = replace(ROW, op="gating", status=KILLED)


@pytest.mark.parametrize(
    ("rows", "begins", "ends"),
    [
        ([ROW], "stopped when its 1 s were over", ""),
        ([ROW, KILLED_ROW], "stopped when", "; killed while it measured gating, nyud, bf16, fwd, ours"),
        ([replace(ROW, ms=None, status="WRONG")], "FAILED: not done within 1 s", ""),
    ],
)
def test_a_benchmark_over_its_budget(check: Check, rows: list[Row], begins: str, ends: str) -> None:
    """It goes on in another call. That it was stopped is no failure; that one of our ops failed is one."""
    check.measured.unlink()
    write(results(*rows), check.measured)
    failed = int(begins.startswith("FAILED"))
    check(*only("bench", seconds=1), STUB_BENCH=f"{check.leaves_results}; exec sleep 30", code=failed)
    assert check.summary["bench"].startswith(begins)
    assert check.summary["bench"].endswith(f"; results.jsonl has 1 rows; {failed} of ours failed{ends}")


def test_a_sanitizer_runs_without_the_tests_that_it_runs_beside(check: Check) -> None:
    check(*only("memcheck"))
    assert check.summary["memcheck"].startswith("ok")
    for name in FIRST - {"memcheck"}:
        assert check.summary[name] == f"left out; --seconds {name}=60 gives it 60 s"
    assert check.called("-m pytest") == []


def test_the_deadline_clips(check: Check) -> None:
    done = check("--deadline", "43", *only("ops", "bench", "huge"))
    granted = {name: int(seconds) for name, seconds in re.findall(r"\] (\w+): at most (\d+) s", done.stdout)}
    most = 43 - visit.TO_KILL - visit.TO_FINISH
    assert visit.WORTHWHILE <= granted["huge"] <= granted["ops"] <= most


def test_without_time_stages_are_left_out(check: Check) -> None:
    check("--deadline", "25", code=visit.FAILED)
    assert {check.summary[name] for name in FIRST} == {"FAILED: left out, no time is left for it"}


def test_a_lost_gpu_is_no_end_of_the_benchmark(check: Check) -> None:
    count = check.root / "count"
    lost = f"echo again >> {count}; {check.leaves_results}; [ $(wc -l < {count}) -gt 2 ] || exit 3"
    check(*only("bench", seconds=60), STUB_BENCH=lost)
    assert check.called("-m bench ") == 3 * [f"-m bench --resume {check.folder}/results.jsonl"]
    assert "; the GPU was lost 2 times, and it went on;" in check.summary["bench"]
    # What quick measures cannot be continued.
    count.unlink()
    check("quick", STUB_BENCH=lost, code=visit.FAILED)
    assert check.summary["bench"].startswith("FAILED: code 3")


def test_an_interrupt_reaches_a_stage_of_a_background_job(check: Check) -> None:
    told = "import time\ntry: time.sleep(30)\nexcept KeyboardInterrupt: print('what it has')"
    waits = f'exec {sys.executable} -c "{told}"'
    check(*only("tests", seconds=1), command='"$@" & wait', STUB_TESTS=waits)
    assert check.log("tests.log") == "what it has\n"


def test_a_stage_is_interrupted_once_and_leaves_nothing(check: Check) -> None:
    """Its child hears the interrupt, too; what that does not end is killed with the stage."""
    program = check.root / "program.py"
    program.write_text(COUNTS_INTERRUPTS)
    check(*only("tests", seconds=1), STUB_TESTS=f"exec {sys.executable} {program}")
    first, *others = check.log("tests.log").splitlines()
    assert sorted(others) == ["child", "stage"]
    status = Path(f"/proc/{first.split()[1]}/status")
    assert not status.exists() or "zombie" in status.read_text()  # dead, if not yet buried


def test_an_interrupt_of_the_visit_ends_with_a_summary(check: Check) -> None:
    pid = check.root / "pid"
    check(
        command=f'"$@" & echo $! > {pid}; wait $!; code=$?; wait; exit $code',
        STUB_TESTS=f"{check.leaves_results}; kill -TERM $(cat {pid}); exec sleep 30",
        code=visit.FAILED,
    )
    assert check.summary["tests"].startswith("FAILED: interrupted after")
    assert check.summary["bench"] == "FAILED: left out, interrupted"
    assert (check.folder / "results.jsonl").exists()


def test_resume(check: Check) -> None:
    before = check.root / "before.jsonl"
    before.write_bytes(check.measured.read_bytes())
    check("--resume", str(before), STUB_BENCH=f"test -f {check.folder}/results.jsonl")
    # The next visit continues nothing: it begins without the results, and keeps them.
    begins = f"test ! -f {check.folder}/results.jsonl && {check.leaves_results}"
    check(STUB_BENCH=begins)
    check(STUB_BENCH=begins)
    for number in (1, 2):
        aside = {path.name for path in (check.folder / f"earlier-{number}").iterdir()}
        assert aside >= {"results.jsonl", "summary.txt", "logs.tgz"}


def test_other_visits(check: Check) -> None:
    check("compare", "--resume", str(check.measured), STUB_BENCH=f"test -f {check.folder}/results.jsonl")
    assert "--baseline torch.compile" in check.called("-m bench ")[0]
    trains = f"mkdir {check.folder}/training && echo > {check.folder}/training/training.json"
    for _ in range(2):
        check("compare", STUB_TRAINING=trains)
        assert (check.folder / "training.json").exists()
    check("decide", STUB_DECIDE=f"cp {check.measured} {check.folder}/decide.jsonl")
    assert check.summary["decide"].endswith("; decide.jsonl has 1 rows; 0 of ours failed")


def folder_for(check: Check, **changes: object) -> None:
    """A prepared folder that fits the stub, but for these facts."""
    cache, gpu = check.root / "made", check.root / "gpu"
    entry = cache / "KEY"
    entry.mkdir(parents=True)
    for name in ("__grp__forward.json", "forward.json", "forward.cubin", "forward.ptx"):
        (entry / name).write_text(name)
    (cache / "BROKEN").mkdir()
    (cache / "BROKEN" / "__grp__backward.json").write_text("interrupted")
    (cache / "LAUNCHER").mkdir()
    (cache / "LAUNCHER" / "launcher.so").write_text("so")
    facts = prepared.pack(cache, {"KEY", "BROKEN", "LAUNCHER"}, gpu, "1" * 40, prepared.sources())
    assert (facts.kernels, facts.launchers) == (1, 1)
    known = json.loads((gpu / prepared.FACTS).read_text()) | {"triton": "a key"} | changes
    (gpu / prepared.FACTS).write_text(json.dumps(known))


def test_what_is_broken_beside_the_stages_costs_itself_alone(check: Check) -> None:
    folder_for(check)
    archive = check.root / "gpu" / prepared.ARCHIVE
    archive.write_bytes(archive.read_bytes()[:50])
    facts = check.root / "gpu" / prepared.FACTS
    whole = facts.read_text()
    (check.tools / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 25\n")
    check(*only("bench"))
    assert check.summary["cache"].startswith("not ready: ")
    assert check.summary["clocks"].startswith("not ready: TimeoutExpired")
    assert check.summary["bench"].startswith("ok")
    facts.write_text(whole[:50])
    (check.tools / "nvidia-smi").unlink()
    check(*only("bench"))
    assert check.summary["prepared"].startswith("not ready: JSONDecodeError")
    assert check.summary["bench"].startswith("ok")


def test_a_machine_without_plugins_of_pytest(check: Check) -> None:
    check(*only("tests"), STUB_FIND="echo pytest_timeout xdist")
    (tests,) = check.called("-m pytest")
    assert "--timeout" not in tests
    assert "-n8" not in tests
    assert "--ignore=" in tests


COLD = "cold, every kernel has to be compiled: "
WARM = "warm: 1 kernels, 1 launchers"
UNPACKED = {"__grp__forward.json", "forward.json", "forward.cubin", "launcher.so"}


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, WARM),
        ({"triton": "another key"}, f"{COLD}it is for another version of Triton"),
        ({"python": "3.9"}, f"{COLD}its launchers are for Python 3.9"),
        ({"sources": "others"}, f"{WARM}; of other sources: what has changed is compiled"),
    ],
)
def test_a_prepared_cache_is_used_where_it_fits(check: Check, changes: dict, outcome: str) -> None:
    folder_for(check, **changes)
    check(*only("bench"), STUB_BENCH=f'echo "$TRITON_CACHE_DIR,$BENCH_COMMIT"; {check.leaves_results}')
    assert check.summary["cache"] == outcome
    cache, used = check.root / "cache", outcome.startswith(WARM)
    assert {path.name for path in cache.rglob("*") if path.is_file()} == (UNPACKED if used else set())
    commit = "" if "sources" in changes else "1" * 40
    assert check.log("bench.log") == f"{cache if used else ''},{commit}\n"


@pytest.mark.parametrize(
    ("options", "settings", "reason"),
    [
        (["slow"], {}, "invalid choice: 'slow'"),
        (["--resume", "nowhere.jsonl"], {}, "--resume nowhere.jsonl: no such file"),
        (["quick", "--resume", __file__], {}, "expected another visit than quick"),
        (["--seconds", "tests=soon"], {}, "--seconds tests=soon: expected STAGE=S, a stage of bench, huge"),
        (["--seconds", "decide=1"], {}, "--seconds decide=1: expected STAGE=S"),
        ([], {"STUB_TORCH": "exit 1"}, "gpu_check: torch does not load, or not within 120 s"),
    ],
)
def test_mistakes(check: Check, options: list[str], settings: dict[str, str], reason: str) -> None:
    done = check(*options, **settings, code=visit.USER_ERROR)
    assert reason in done.stderr
    assert check.called("-m") == []


def test_the_script_is_in_front_of_it(tmp_path: Path) -> None:
    environment = dict(os.environ, PYTHON=sys.executable)
    line = ["bash", str(SCRIPT), "--help"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in (*visits.VISITS, "--seconds", "--deadline", "--resume", "3 without a GPU"):
        assert word in done.stdout
