"""A visit to a GPU machine: tests, sanitizers, benchmark, profile, each within its time; results in a folder.

``bash bench/gpu_check.sh`` runs it. Nothing here imports torch: what it may break is in the stages, which are
processes of their own, each ended when its time is up. A stage that fails stops no other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.gpu import prepared
from bench.gpu.prepared import REPOSITORY
from bench.gpu.process import SECONDS_AFTER_KILL, TO_END, limited
from bench.gpu.visits import MOST_ARE_WRONG, OPS, TO_RENDER, VISITS, WITHOUT_GPU, Stage, with_seconds
from bench.harness.results import KILLED, Results, read

OK, FAILED, USER_ERROR, NO_GPU = 0, 1, 2, 3  # exit codes
LOST = 3  # of the benchmark: the GPU answers no more, another process can go on
TO_KILL = TO_END + SECONDS_AFTER_KILL  # seconds that a stage may take until it is gone
TO_FINISH = 3  # seconds for the summary
TO_ASK = 20  # seconds for a tool that may hang
WORTHWHILE = 15  # with less left, a stage would hardly have loaded torch
SHOWN = 30  # lines of a stage's log
RESULTS = "results.jsonl"
KEPT = (RESULTS, "results.md", "profile.md", "decide.jsonl", "decide.md", "training.json")
SANITIZER = ("--error-exitcode=9",)
# PyTorch's own kernels are not what is to be checked, and are most of the work. initcheck has to see what
# they write.
EXCLUDED = tuple(f"--kernel-name-exclude=kns={words}" for words in ("at6native", "cublas", "cutlass"))
PLUGINS = {"--timeout": "pytest_timeout", "-n": "xdist"}  # what an option of pytest needs


PROBE = """
import json, torch
gpu = torch.cuda.is_available()
key = ""
try:
    from bench.gpu.prepared import triton_key
    key = triton_key()
except ImportError:
    pass
print(json.dumps({
    "gpu": torch.cuda.get_device_name() if gpu else "",
    "capability": torch.cuda.get_device_capability() if gpu and torch.version.hip is None else None,
    "triton": key,
}))
"""


class Call:
    """One command of a visit, from its first second to its summary."""

    def __init__(
        self, out: Path, work: Path, deadline: float, python: str, folder: Path, cache: Path
    ) -> None:
        self.began = time.monotonic()
        self.out, self.deadline, self.python = out, deadline, python
        self.folder, self.cache = folder, cache
        self.logs, self.site = work / "logs", work / "site"
        self.logs.mkdir()
        self.others = set(out.rglob("*"))  # files of somebody else
        self.summary: list[str] = []
        self.sanitizer: tuple[str, str] | None = None  # of _find_sanitizer, once it was asked
        self.missing: set[str] = set()  # packages
        self.facts: prepared.Facts | None = None
        self.same = False  # sources as when they were prepared
        self.failed = self.interrupted = False
        self.environment = dict(os.environ, PYTHONUNBUFFERED="1")  # what is killed leaves a whole log
        self.environment.pop("TRITON_INTERPRET", None)  # the real compiler
        self.environment["DEGMIX_CRASHES"] = str(self.logs / "crashes.txt")
        self._add_to_path(REPOSITORY)

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def note(self, name: str, outcome: str) -> None:
        """A line of the summary."""
        self.summary.append(f"{name:12} {outcome}")
        lines = [f"{self.elapsed:.0f} s", *(f"  {line}" for line in self.summary)]
        (self.out / "summary.txt").write_text("\n".join(lines) + "\n")
        print(f"== [{self.elapsed:.0f} s] {name}: {outcome}", flush=True)

    def fail(self, name: str, outcome: str) -> None:
        """A line of the summary that is a failure."""
        self.failed = True
        self.note(name, f"FAILED: {outcome}")

    def interrupt(self, *_: object) -> None:
        """End what runs, begin nothing more, and still write the summary."""
        self.interrupted = True

    def probe(self) -> str:
        """The GPU's name, "" without one; makes the machine ready.

        Raises:
            RuntimeError: if torch does not load.
        """
        self._ready("prepared", self._look_up)
        command = [self.python, "-c", PROBE]
        try:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
            found = json.loads(done.stdout.strip().splitlines()[-1])
        except (subprocess.TimeoutExpired, IndexError, ValueError):
            raise RuntimeError("torch does not load, or not within 120 s") from None
        self.note("GPU", found["gpu"] or "none")
        if found["gpu"]:
            self._ready("cache", self._warm, tuple(found["capability"] or ()) or None, found["triton"])
            self._ready("packages", self._install)
            self._ready("clocks", self._say_clocks)
        return found["gpu"]

    def _ready(self, name: str, step: Callable[..., None], *arguments: object) -> None:
        """A step of making ready, which costs itself alone if it fails."""
        try:
            step(*arguments)
        except Exception as error:  # a broken archive, a tool that hangs: the stages can do without
            self.note(name, f"not ready: {type(error).__name__}: {error}")

    def _look_up(self) -> None:
        """What was prepared, and whether of these sources."""
        self.facts = prepared.read_facts(self.folder)
        self.same = self.facts is not None and self.facts.sources == prepared.sources()
        if self.same:  # a copy may have no .git, or an older one
            self.environment.setdefault("BENCH_COMMIT", self.facts.commit)

    def _warm(self, capability: tuple[int, int] | None, triton: str) -> None:
        if why := prepared.misfit(self.facts, capability, triton):
            self.note("cache", f"cold, every kernel has to be compiled: {why}")
            return
        prepared.unpack(self.folder, self.cache)
        self.environment["TRITON_CACHE_DIR"] = str(self.cache)
        others = "" if self.same else "; of other sources: what has changed is compiled"
        self.note("cache", f"warm: {self.facts.kernels} kernels, {self.facts.launchers} launchers{others}")

    def _install(self) -> None:
        """Put carried packages beside those of the machine."""
        wheels = sorted(str(path) for path in (self.folder / prepared.WHEELS).glob("*.whl"))
        if wheels:
            options = ("-q", "--no-index", "--no-deps", "--target", str(self.site))
            command = [self.python, "-m", "pip", "install", *options, *wheels]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            self._add_to_path(self.site)
            if done.returncode != 0:
                self.note("wheels", f"not installed: {done.stderr.strip()[-300:]}")
        wanted = ("deformops", "timm", "fvcore", "matplotlib", *PLUGINS.values())
        code = f"import importlib.util as u; print(*[n for n in {wanted} if u.find_spec(n) is None])"
        line = [self.python, "-c", code]
        done = subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=60)
        self.missing = set(done.stdout.split())
        if self.missing:
            self.note("packages", f"not installed, what needs them is left out: {done.stdout.strip()}")

    def _say_clocks(self) -> None:
        for tool, *options in (("nvidia-smi", "-q", "-d", "CLOCK,POWER"), ("rocm-smi",)):
            if shutil.which(tool):
                with (self.logs / f"{tool}.txt").open("w") as file:
                    subprocess.run([tool, *options], stdout=file, stderr=file, timeout=TO_ASK, check=False)

    def _add_to_path(self, folder: Path) -> None:
        before = self.environment.get("PYTHONPATH")
        self.environment["PYTHONPATH"] = f"{folder}{os.pathsep}{before}" if before else str(folder)

    def run(self, stages: Sequence[Stage]) -> None:
        """One stage after the other, each with what runs beside it."""
        wrong = False
        for stage in stages:
            if wrong:
                self.fail(stage.name, "left out: most ops are wrong, which ops.log shows")
                continue
            seconds = max(stage.seconds, sum(each.seconds for each in stage.beside))
            until = min(self.deadline, self.elapsed + seconds + TO_KILL + TO_FINISH)
            lane = threading.Thread(target=self._lane, args=(stage.beside, until))
            lane.start()
            code = self._stage(stage, self.deadline)
            wrong = stage.name == OPS.name and code == MOST_ARE_WRONG
            lane.join()
            self.keep()

    def _lane(self, stages: Sequence[Stage], until: float) -> None:
        for stage in stages:
            try:
                self._stage(stage, until)
            except Exception as error:  # a thread's would be lost
                self.fail(stage.name, f"{type(error).__name__}: {error}")

    def _stage(self, stage: Stage, until: float) -> int | None:
        """Its exit code; None if it did not run. It is gone ``until`` so many seconds after the beginning."""
        began, left = self.elapsed, until - self.elapsed - TO_KILL - TO_FINISH
        seconds = min(stage.seconds, int(left))
        if stage.seconds == 0:
            self.note(stage.name, f"left out; --seconds {stage.name}=60 gives it 60 s")
            return None
        if self.interrupted or seconds < min(stage.seconds, WORTHWHILE):
            why = "interrupted" if self.interrupted else "no time is left for it"
            self.fail(stage.name, f"left out, {why}")
            return None
        command, why = self._command(stage, seconds)
        if why:
            self.note(stage.name, f"not run: {why}")
            return None
        print(f"== [{began:.0f} s] {stage.name}: at most {seconds} s", flush=True)
        code, again = self._limited(stage, seconds, command), 0
        while stage.repeated and code == LOST and not self.interrupted:
            remaining = int(began + seconds - self.elapsed)
            if remaining < WORTHWHILE:
                break
            again += 1
            code = self._limited(stage, remaining, command)
        took = self.elapsed - began
        tail = (self.logs / f"{stage.name}.log").read_text(errors="replace").splitlines()[-SHOWN:]
        print("\n".join(f"   {line}" for line in tail), flush=True)
        measured = [word for word in command if word.endswith(".jsonl")]
        detail, good = self._measured(Path(*measured)) if measured else ("", True)
        if again:
            detail = f"; the GPU was lost {again} times, and it went on{detail}"
        if self.interrupted:
            self.fail(stage.name, f"interrupted after {took:.0f} s{detail}")
        elif code == OK and good:
            self.note(stage.name, f"ok ({took:.0f} s){detail}")
        elif took >= seconds and good and stage.repeated:  # the next command goes on
            self.note(stage.name, f"stopped when its {seconds} s were over{detail}")
        elif took >= seconds:
            self.fail(stage.name, f"not done within {seconds} s{detail}")
        else:
            self.fail(stage.name, f"code {code} after {took:.0f} s{detail}")
        return code

    def _command(self, stage: Stage, seconds: int) -> tuple[list[str], str]:
        """What to run, or why it cannot be."""
        values = {"out": self.out, "seconds": max(1, seconds - TO_RENDER)}
        command = [self.python, *(word.format(**values) for word in stage.command)]
        if not stage.sanitizer:
            lacking = tuple(option for option, plugin in PLUGINS.items() if plugin in self.missing)
            return [word for word in command if not (lacking and word.startswith(lacking))], ""
        if self.sanitizer is None:
            self.sanitizer = self._find_sanitizer()
        sanitizer, why = self.sanitizer
        excluded = EXCLUDED if stage.sanitizer != "initcheck" else ()
        return [sanitizer, "--tool", stage.sanitizer, *SANITIZER, *excluded, *command], why

    def _find_sanitizer(self) -> tuple[str, str]:
        """Where compute-sanitizer is, and why it does not work, in words; "" if it does."""
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
        sanitizer = shutil.which("compute-sanitizer", path=path)
        if sanitizer is None:
            return "", "compute-sanitizer, Nvidia's, is not installed"
        probe = (sanitizer, *SANITIZER, self.python, "-c", "import torch; torch.ones(1, device='cuda')")
        if code := self._limited(Stage("sanitizer", 30, ()), 30, probe):
            said = " ".join((self.logs / "sanitizer.log").read_text(errors="replace").split())[-200:]
            return sanitizer, f"this machine refuses compute-sanitizer, code {code}: {said}"
        return sanitizer, ""

    def _limited(self, stage: Stage, seconds: int, command: Sequence[str]) -> int:
        with (self.logs / f"{stage.name}.log").open("ab") as log:
            environment = {**self.environment, **stage.environment}
            return limited(command, seconds, log, environment, lambda: self.interrupted)

    def _measured(self, path: Path) -> tuple[str, bool]:
        """What a result file has, in words, and whether there is something and none of ours failed."""
        try:
            found = read(path)
        except (OSError, ValueError):
            return "; nothing was measured", False
        *rows, last = found.rows
        whole = Results(found.parts, tuple(rows)) if last.status == KILLED else found
        words = f"; {path.name} has {len(whole.rows)} rows; {whole.failed} of ours failed"
        if whole is not found:
            words += f"; killed while it measured {', '.join(last.key)}"
        return words, bool(whole.rows) and not whole.failed

    def keep(self) -> None:
        """Leave at most eight files, whole at any time: results, the summary, and all else in one archive."""
        for path in sorted(set(self.out.rglob("*")) - self.others):
            if path.is_file() and path.name not in (*KEPT, "summary.txt", "logs.tgz"):
                shutil.move(path, self.logs / path.name)
            elif path.is_file() and path.parent != self.out:
                path.replace(self.out / path.name)
        with tarfile.open(self.out / ".logs.tgz", "w:gz") as tar:
            for path in sorted(self.logs.iterdir()):
                tar.add(path, arcname=path.name)
        (self.out / ".logs.tgz").replace(self.out / "logs.tgz")
        for path in sorted(set(self.out.rglob("*")) - self.others, reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    epilog = "\n".join(f"  {name:8} {visit.what}; {visit.deadline} s" for name, visit in VISITS.items())
    parser = argparse.ArgumentParser(
        "bash bench/gpu_check.sh",
        description=__doc__.splitlines()[0],
        epilog=f"visits:\n{epilog}\n\nExit code: 0 if nothing failed, 1 if something did, 3 without a GPU.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("visit", nargs="?", choices=VISITS, default="first", help="default: first")
    default = os.environ.get("OUT", "gpu_check")
    add("--out", type=Path, default=Path(default), metavar="FOLDER", help=f"default: {default}")
    add("--deadline", type=int, metavar="S", help="seconds for everything")
    add("--seconds", nargs="+", default=[], metavar="STAGE=S", help="for a stage; 0 leaves the stage out")
    add("--prepared", type=Path, default=prepared.FOLDER, metavar="FOLDER", help="of make gpu-ready")
    add("--resume", type=Path, metavar="FILE", help="continue the benchmark of an earlier call")
    options = parser.parse_args(arguments)
    names = {each.name for stage in VISITS[options.visit].stages for each in (stage, *stage.beside)}
    budgets = {}
    for word in options.seconds:
        name, _, seconds = word.partition("=")
        if name not in names or not seconds.isdigit():
            parser.error(f"--seconds {word}: expected STAGE=S, a stage of {', '.join(sorted(names))}")
        budgets[name] = int(seconds)
    if options.resume is not None and not options.resume.is_file():
        parser.error(f"--resume {options.resume}: no such file")
    if options.resume is not None and options.visit == "quick":
        parser.error("--resume: expected another visit than quick, whose results are no part of another run")
    options.seconds = budgets
    return options


def lay_out(options: argparse.Namespace, out: Path) -> None:
    """The folder: what an earlier call left there aside, and the results that this call goes on with."""
    out.mkdir(parents=True, exist_ok=True)
    continued = None if options.resume is None else options.resume.read_bytes()
    earlier = [path for path in (out / name for name in (*KEPT, "summary.txt", "logs.tgz")) if path.exists()]
    if earlier:
        aside = out / f"earlier-{1 + sum(1 for _ in out.glob('earlier-*'))}"
        aside.mkdir()
        for path in earlier:
            path.replace(aside / path.name)
    if continued is not None:
        (out / RESULTS).write_bytes(continued)


def main(
    arguments: Sequence[str] | None = None, *, python: str = sys.executable, cache: Path = prepared.CACHE
) -> int:
    """The visit; the exit code as the help has it."""
    options = parse(arguments)
    visit, out = VISITS[options.visit], options.out.resolve()
    lay_out(options, out)
    with tempfile.TemporaryDirectory(prefix="visit-", ignore_cleanup_errors=True) as work:
        deadline = options.deadline or visit.deadline
        call = Call(out, Path(work), deadline, python, options.prepared, cache)
        signal.signal(signal.SIGINT, call.interrupt)
        signal.signal(signal.SIGTERM, call.interrupt)
        try:
            gpu = call.probe()
        except RuntimeError as error:
            call.fail("GPU", str(error))
            print(f"gpu_check: {error}", file=sys.stderr)
            return USER_ERROR
        if gpu:
            call.run([with_seconds(stage, options.seconds) for stage in visit.stages])
        else:
            print("The benchmark runs at small sizes on the CPU; its times say nothing about the kernels.")
            call.run([WITHOUT_GPU] if options.resume is None else [])
        call.keep()
    print(f"\n{(out / 'summary.txt').read_text()}Everything is in {out}")
    return NO_GPU if not gpu and not call.failed else FAILED if call.failed else OK


if __name__ == "__main__":
    sys.exit(main())
