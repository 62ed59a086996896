"""``bench/gpu_check.sh`` without a GPU: a stub for Python pretends one, and says what the stages do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench.results import OURS, Ceilings, Machine, Results, Row, write

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_check.sh"
STAGES = {"tests", "huge", "memcheck", "racecheck", "bench"}
GPU = "Stub H200"

# What stands for each program is a line of shell in $STUB_<name>; what else is asked of Python, Python does.
PYTHON = f"""#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
    "-m bench.limited "*) exec {sys.executable} "$@" ;;
    *get_device_name*) eval "$STUB_TORCH" ;;
    *torch.ones*) eval "$STUB_PROBE" ;;
    *test_beyond_32_bits) eval "$STUB_HUGE" ;;
    "-m pytest"*) eval "$STUB_TESTS" ;;
    "-m bench.small_calls"*) eval "$STUB_SMALL_CALLS" ;;
    "-m bench "*) eval "$STUB_BENCH" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
SANITIZER = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do
    case $1 in --tool | --error-exitcode) shift ;; esac
    shift
done
exec "$@"
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
    """One call of the script, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "out"
        self.tools = folder / "tools"
        self.calls = folder / "calls"
        self.tools.mkdir()
        programs = {
            "python": PYTHON,
            "compute-sanitizer": SANITIZER,
            "nvidia-smi": "#!/bin/sh\necho a table\n",
        }
        for name, text in programs.items():
            (self.tools / name).write_text(text)
            (self.tools / name).chmod(0o755)
        row = Row("op", "shape", "bf16", "fwd", OURS, ms=1.0)
        machine = Machine(GPU, None, None, None, "2", None, "3", None, "0" * 40, False)
        self.measured = folder / "measured.json"
        write(Results(machine, Ceilings(None, {}), (row,)), self.measured)

    def __call__(self, *options: str, command: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
        """Run it with these options and variables, or the shell command that runs "$SCRIPT"."""
        environment = {
            "PATH": f"{self.tools}:/usr/local/bin:/usr/bin:/bin",
            "HOME": os.environ.get("HOME", "/"),
            "PYTHON": str(self.tools / "python"),
            "OUT": str(self.folder),
            "CALLS": str(self.calls),
            "SCRIPT": str(SCRIPT),
            "STUB_TORCH": f"echo '{GPU}'",
            "STUB_BENCH": self.leaves_results,
        } | settings
        line = ["bash", "-c", command] if command else ["bash", str(SCRIPT), *options]
        self.calls.write_text("")
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)

    @property
    def leaves_results(self) -> str:
        """A benchmark that measures one thing."""
        return f"cp {self.measured} {self.folder}/results.json"

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


def test_everything_runs_and_three_files_are_left(check: Check) -> None:
    check.folder.mkdir()
    (check.folder / ".results.json.abc").write_text("half a file")
    done = check(STUB_TESTS="echo 7 passed", RACECHECK="60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name for name, outcome in check.summary.items() if outcome.startswith("ok")} == STAGES | {
        "sanitizer"
    }
    assert check.summary["bench"].endswith("results.json has 1 rows; 0 of ours failed")
    assert {file.name for file in check.folder.iterdir()} == {"results.json", "summary.txt", "logs.tgz"}
    assert check.log("nvidia-smi.txt") == "a table\n"
    assert check.log("tests.log") == "7 passed\n"
    assert "7 passed" in done.stdout
    # The huge tests run alone, after the others.
    first, second = check.called("-m pytest")
    assert "--deselect=tests/kernels/test_deform_conv_gpu.py::test_beyond_32_bits" in first
    assert second.endswith(" tests/kernels/test_deform_conv_gpu.py::test_beyond_32_bits")
    assert "-n" not in second.split()
    assert check.called("-m bench ") == [f"-m bench --resume {check.folder}/results.json"]
    assert "test_deform_conv_properties.py is left" in check.summary["random"]


def test_what_is_deselected_exists() -> None:
    text = SCRIPT.read_text()
    for file, test in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", text):
        assert f"def {test}" in (SCRIPT.parents[1] / file).read_text()


def test_quick(check: Check) -> None:
    done = check("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert check.called("-m bench ") == [f"-m bench --quick --json {check.folder}/results.json"]
    left_out = {name for name, outcome in check.summary.items() if outcome.startswith("left out; ")}
    assert left_out == {"huge", "racecheck"}
    assert list(check.summary).index("bench") < list(check.summary).index("tests")


def test_without_a_gpu_every_stage_is_named(check: Check) -> None:
    done = check(STUB_TORCH="echo")
    assert done.returncode == 3, done.stdout + done.stderr
    assert check.summary.keys() >= STAGES
    assert {check.summary[name] for name in STAGES - {"bench"}} == {"not run: no GPU"}
    assert check.summary["bench"].startswith("ok")
    assert check.called("-m bench ") == [f"-m bench --quick --json {check.folder}/results.json"]


@pytest.mark.parametrize(("settings", "least", "most"), [({}, 190, 210), ({"BENCH": "7"}, 7, 7)])
def test_without_a_gpu_the_benchmark_has_all_the_time(
    check: Check, settings: dict[str, str], least: int, most: int
) -> None:
    done = check("--quick", STUB_TORCH="echo", **settings)
    (seconds,) = re.findall(r"== bench: at most (\d+) s", done.stdout)
    assert least <= int(seconds) <= most


def test_a_failing_stage_stops_nothing(check: Check) -> None:
    done = check(STUB_TESTS="echo FAILED test_this; exit 1")
    assert done.returncode == 1
    assert re.fullmatch(r"FAILED with code 1 \(\d+ s\)", check.summary["tests"])
    assert "FAILED test_this" in done.stdout
    assert check.summary["racecheck"] == "left out; RACECHECK=60 gives it 60 s"
    others = STAGES - {"tests", "racecheck"}
    assert all(check.summary[name].startswith("ok") for name in others)


def test_one_of_our_ops_that_failed_is_a_failure(check: Check) -> None:
    data = json.loads(check.measured.read_text())
    data["rows"][0] |= {"ms": None, "status": "WRONG"}
    check.measured.write_text(json.dumps(data))
    assert check(BENCH="1", STUB_BENCH=f"{check.leaves_results}; exec sleep 30").returncode == 1
    assert "1 of ours failed" in check.summary["bench"]


def test_a_stage_over_its_budget(check: Check) -> None:
    done = check(
        TESTS="1", BENCH="1", STUB_TESTS="exec sleep 30", STUB_BENCH=f"{check.leaves_results}; exec sleep 30"
    )
    assert done.returncode == 1
    assert check.summary["tests"] == "FAILED: not done within 1 s"
    # The benchmark goes on in another call; that it was stopped is no failure.
    assert check.summary["bench"].startswith("stopped when its 1 s were over; results.json has 1 rows")


def test_what_was_measured_when_the_benchmark_was_killed(check: Check) -> None:
    begins = f"{check.leaves_results}; printf gating > {check.folder}/results.json.begun"
    check(BENCH="1", STUB_BENCH=f"{begins}; exec sleep 30")
    assert check.summary["bench"].endswith("0 of ours failed; killed while it measured gating")
    assert (check.folder / "results.json.begun").exists()


def test_budgets_of_zero(check: Check) -> None:
    done = check(TESTS="0", HUGE="0", MEMCHECK="0", RACECHECK="0", BENCH="0")
    assert done.returncode == 0
    assert {name: check.summary[name] for name in STAGES} == {
        name: f"left out; {name.upper()}=60 gives it 60 s" for name in STAGES
    }
    assert "sanitizer" not in check.summary
    assert check.called("-m bench.limited") == []


def test_the_deadline_clips(check: Check) -> None:
    """Of 43 s, 20 are kept for killing a stage and for the summary."""
    done = check(DEADLINE="43", MEMCHECK="5")
    assert done.returncode == 0, done.stdout + done.stderr
    granted = {name: int(seconds) for name, seconds in re.findall(r"== (\w+): at most (\d+) s", done.stdout)}
    assert 15 <= granted["tests"] <= 23
    assert 15 <= granted["bench"] <= granted["tests"]
    assert granted["memcheck"] == 5


def test_without_time_stages_are_left_out(check: Check) -> None:
    done = check(DEADLINE="25", MEMCHECK="3")
    assert done.returncode == 1
    assert re.fullmatch(r"FAILED: left out, \d+ s are left for it", check.summary["tests"])
    assert check.summary["sanitizer"].startswith("FAILED: left out")
    assert check.summary["memcheck"] == "not run, as sanitizer failed"
    assert check.summary["bench"].startswith("FAILED: left out")
    assert check.called("-m bench.limited") == []


def test_a_sanitizer_that_does_not_work_is_a_failure(check: Check) -> None:
    done = check(STUB_PROBE="exit 9", RACECHECK="60")
    assert done.returncode == 1
    assert check.summary["sanitizer"].startswith("FAILED with code 9")
    assert check.summary["memcheck"] == check.summary["racecheck"] == "not run, as sanitizer failed"
    assert check.called("-m bench.small_calls") == []


def test_a_lost_gpu_is_no_end_of_the_benchmark(check: Check) -> None:
    count = check.folder.parent / "count"
    lost = f"echo again >> {count}; {check.leaves_results}; [ $(wc -l < {count}) -gt 2 ] || exit 3"
    done = check(STUB_BENCH=lost)
    assert done.returncode == 0, done.stdout + done.stderr
    assert check.called("-m bench ") == 3 * [f"-m bench --resume {check.folder}/results.json"]
    assert "; the GPU was lost 2 times, and it went on;" in check.summary["bench"]
    # What --quick measures cannot be continued.
    count.unlink()
    assert check("--quick", STUB_BENCH=lost).returncode == 1
    assert check.summary["bench"].startswith("FAILED with code 3")


@pytest.mark.parametrize("stage", ["tests", "memcheck"])
def test_an_interrupt_reaches_a_stage_of_a_background_job(check: Check, stage: str) -> None:
    told = "import time\ntry: time.sleep(30)\nexcept KeyboardInterrupt: print('what it has')"
    waits = f'exec {sys.executable} -c "{told}"'
    stub = {"tests": "STUB_TESTS", "memcheck": "STUB_SMALL_CALLS"}[stage]
    budgets = dict.fromkeys(("TESTS", "HUGE", "MEMCHECK", "RACECHECK", "BENCH"), "0") | {stage.upper(): "1"}
    check(command='bash "$SCRIPT" & wait', **budgets, **{stub: waits})
    assert check.log(f"{stage}.log") == "what it has\n"


def test_a_stage_is_interrupted_once_and_leaves_nothing(check: Check) -> None:
    """Its child hears the interrupt, too; what that does not end is killed with the stage."""
    program = check.folder.parent / "program.py"
    program.write_text(COUNTS_INTERRUPTS)
    check(TESTS="1", HUGE="0", MEMCHECK="0", BENCH="0", STUB_TESTS=f"exec {sys.executable} {program}")
    first, *others = check.log("tests.log").splitlines()
    assert sorted(others) == ["child", "stage"]
    status = Path(f"/proc/{first.split()[1]}/status")
    assert not status.exists() or "zombie" in status.read_text()  # dead, if not yet buried


def test_an_interrupt_of_the_script_ends_with_a_summary(check: Check) -> None:
    interrupts = f"{check.leaves_results}; kill -TERM $(cut -d' ' -f4 /proc/$PPID/stat); exec sleep 30"
    done = check(STUB_TESTS=interrupts)
    assert done.returncode == 1
    assert check.summary["tests"].startswith("FAILED: interrupted after")
    assert check.summary["bench"] == "FAILED: left out, interrupted"


def test_resume(check: Check) -> None:
    before = check.folder.parent / "before.json"
    before.write_bytes(check.measured.read_bytes())
    begun = before.with_name("before.json.begun")
    begun.write_text("a measurement")
    done = check(RESUME=str(before), STUB_BENCH=f"test -f {check.folder}/results.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (check.folder / "results.json.begun").read_text() == "a measurement"
    # The next check continues nothing: it begins without both, and keeps the results.
    assert (
        check(STUB_BENCH=f"test ! -f {check.folder}/results.json && {check.leaves_results}").returncode == 0
    )
    assert not (check.folder / "results.json.begun").exists()
    assert (check.folder / "earlier.json").exists()


def test_resume_without_a_gpu_leaves_the_file_alone(check: Check) -> None:
    done = check(RESUME=str(check.measured), STUB_TORCH="echo", STUB_BENCH="exit 1")
    assert done.returncode == 3
    assert check.summary["bench"] == "not run: no GPU to continue it on"
    assert (check.folder / "results.json").read_bytes() == check.measured.read_bytes()


@pytest.mark.parametrize(
    ("options", "settings", "reason"),
    [
        (["--slow"], {}, "unknown option --slow; see --help"),
        ([], {"RESUME": "nowhere.json"}, "RESUME=nowhere.json: no such file"),
        (["--quick"], {"RESUME": __file__}, "RESUME: expected no --quick"),
        ([], {"TESTS": "soon"}, "TESTS=soon: expected seconds"),
        ([], {"STUB_TORCH": "exit 1"}, "torch does not load, or not within 90 s"),
    ],
)
def test_mistakes(check: Check, options: list[str], settings: dict[str, str], reason: str) -> None:
    done = check(*options, **settings)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gpu_check: {reason}")
    assert check.called("-m bench.limited") == []


def test_help(check: Check) -> None:
    done = check("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Everything that only a GPU can answer")
    assert done.stdout.endswith("3 if there is no GPU.\n")
