"""Training with the kernels and with the formula: comparable, and never lost when it is cut short."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch

from bench import training
from bench.cases.model import FORMULA
from bench.harness.results import OK, OURS
from bench.report.curves import JSON_NAME, PLOT_NAME, Curve, draw
from bench.training import LATE, STOPPED
from degmix import DeGMixHead, train

CPU = torch.device("cpu")
SMALL = ("--size", "48", "64", "--rooms", "4", "--batch", "2", "--workers", "0")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "default_device", lambda: CPU)


def read(out: Path) -> dict:
    """The runs that the two files of a training tell of."""
    assert {path.name for path in out.iterdir()} == {JSON_NAME, PLOT_NAME}
    assert (out / PLOT_NAME).read_bytes().startswith(b"\x89PNG")
    return json.loads((out / JSON_NAME).read_text())["runs"]


def test_both_runs_are_the_same_training(
    tmp_path: Path, torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They see the same pictures in the same order and begin with the same weights; rounding comes later."""
    pictures, formulas = [], []
    batches, formula = train._batches, training.formula

    def seen(config, first_step):
        pictures.append([])
        for batch in batches(config, first_step):
            pictures[-1].append(batch["image"].double().sum().item())
            yield batch

    def counted(*arguments):
        formulas.append(len(pictures))
        return formula(*arguments)

    monkeypatch.setattr(train, "_batches", seen)
    monkeypatch.setattr(training, "formula", counted)
    out, work = tmp_path / "out", tmp_path / "work"
    assert training.main(["--quick", "--out", str(out), "--work", str(work)]) == 0
    assert {path.name for path in work.iterdir()} == {"rooms", "ours", "formula"}
    assert pictures[0] == pictures[1]
    assert len(set(pictures[0])) == 8
    assert formulas == 8 * [2], "the formula is what the second training computes, and only that"
    runs = read(out)
    assert list(runs) == [OURS, FORMULA]
    for run in runs.values():
        assert run["status"] == OK
        assert run["steps_done"] == run["steps_asked"] == len(run["losses"]) == 8
        assert run["images_per_second"] > 0
        assert 0 < run["waiting_for_data"] < 1
    ours, other = (run["losses"] for run in runs.values())
    assert ours[0] == pytest.approx(other[0], rel=1e-5)
    assert ours == pytest.approx(other, rel=1e-3)
    assert ours[-1] < 0.9 * ours[0]


def test_an_interrupt_leaves_what_was_reached(
    tmp_path: Path, torchvision: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    out, log = tmp_path / "out", tmp_path / "work" / "ours" / train.LOG_NAME

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 3):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    code = training.main(["--out", str(out), "--work", str(tmp_path / "work"), "--steps", "1000", *SMALL])
    watcher.join()
    assert code == 130
    assert f"Interrupted; {out} has what was reached." in capsys.readouterr().out
    runs = read(out)
    assert list(runs) == [OURS]
    assert runs[OURS]["status"] == STOPPED
    assert runs[OURS]["steps_asked"] == 1000
    assert 3 <= runs[OURS]["steps_done"] == len(runs[OURS]["losses"]) < 1000


def test_both_runs_get_their_part_of_the_time(tmp_path: Path, torchvision: ModuleType) -> None:
    assert training.main(["--out", str(tmp_path / "out"), "--seconds", "2", "--steps", "1000", *SMALL]) == 0
    for run in read(tmp_path / "out").values():
        assert run["status"] == LATE
        assert 1 <= run["steps_done"] < 1000


Start = Callable[..., None]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, torchvision: ModuleType) -> Iterator[list[Start]]:
    """What each call of ``train.start`` does instead of training. Nothing is rendered; no folder stays."""
    calls: list[Start] = []
    folders: list[Path] = []

    def call(config, folder: Path, *others) -> None:
        folders.append(folder)
        calls.pop(0)(config, folder, *others)

    monkeypatch.setattr(train, "start", call)
    monkeypatch.setattr(training.synthetic, "write", lambda *arguments, **options: None)
    yield calls
    assert not any(folder.parent.exists() for folder in folders)


def write_log(path: Path, *records: tuple[float, float, float]) -> None:
    """A log of losses, images per second and the share of waiting, step by step."""
    names = ("step", "loss", "images_per_second", "waiting_for_data")
    lines = [dict(zip(names, (step, *record), strict=True)) for step, record in enumerate(records, start=1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def trains(steps: int, then: BaseException | None = None) -> Start:
    """A training that logs so many steps, and then ends or raises."""

    def call(config, folder: Path, device, console, seconds) -> None:
        folder.mkdir(parents=True)
        write_log(folder / train.LOG_NAME, *((9 - step, 5.0, 0.5) for step in range(steps)))
        if then is not None:
            raise then

    return call


def test_a_failed_run_leaves_its_curve_and_does_not_stop_the_other(
    start: list[Start], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start += [trains(3, RuntimeError("no\nmemory")), trains(4)]
    assert training.main(["--out", str(tmp_path / "out"), "--steps", "4", *SMALL]) == 1
    runs = read(tmp_path / "out")
    assert runs[OURS]["status"] == "failed: RuntimeError: no memory"
    assert runs[OURS]["losses"] == [9, 8, 7]
    assert runs[FORMULA]["status"] == OK
    output = capsys.readouterr()
    assert "3 of 4 steps: failed: RuntimeError" in output.out
    assert "loss at step 3: ours 7.0000, eager formula 7.0000" in output.out
    assert "Traceback" in output.err


@pytest.mark.parametrize("error", [train.Interrupted("stopped"), KeyboardInterrupt()])
def test_an_interrupt_of_the_second_run_keeps_the_first(
    start: list[Start], tmp_path: Path, error: BaseException
) -> None:
    start += [trains(4), trains(0, error)]
    assert training.main(["--out", str(tmp_path / "out"), "--steps", "4", *SMALL]) == 130
    runs = read(tmp_path / "out")
    assert [run["status"] for run in runs.values()] == [OK, STOPPED]
    assert [run["steps_done"] for run in runs.values()] == [4, 0]
    assert runs[FORMULA]["images_per_second"] is None


def test_the_rate_is_that_of_the_second_half(tmp_path: Path) -> None:
    log, config = tmp_path / "log.jsonl", training.configuration(options(workers=0), tmp_path)
    # (seconds, of which waiting) since the start; batches of 2
    times = [(10, 1), (12, 2), (14, 3), (18, 6)]
    write_log(log, *((1.0, 2 * n / seconds, wait / seconds) for n, (seconds, wait) in enumerate(times, 1)))
    curve = training.read_curve(log, OK, config)
    assert curve.images_per_second == pytest.approx(4 / 6)
    assert curve.waiting_for_data == pytest.approx(4 / 6)


def test_the_plot_names_what_is_cut_and_what_waited() -> None:
    ours = Curve(OK, 4, 4, 12.0, 0.01, (4.0, 3.0, 2.0, 1.0))
    late = Curve(LATE, 9, 2, 6.0, 0.25, (4.0, 3.0))
    (axes,) = draw({OURS: ours, FORMULA: late}, "title").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "ours: 12 images/s",
        "eager formula: 6 images/s, 25% of the time waiting for data, 2 of 9 steps: out of time",
    ]
    assert [len(line.get_xdata()) for line in axes.lines] == [4, 2]


def test_the_formula_is_put_back() -> None:
    ours = DeGMixHead.forward
    with training.written_out():
        assert DeGMixHead.forward is training.formula
    assert DeGMixHead.forward is ours
    with pytest.raises(ValueError, match="stop"), training.written_out():
        raise ValueError("stop")
    assert DeGMixHead.forward is ours


def options(workers: int) -> Namespace:
    return Namespace(size=(48, 64), workers=workers, steps=4, batch=2)


@pytest.mark.parametrize(("batches", "workers"), [(2, 0), (3, 1), (20, 6), (10**6, 8)])
def test_workers_have_room_for_their_batches(
    rooms: Path, monkeypatch: pytest.MonkeyPatch, batches: int, workers: int
) -> None:
    monkeypatch.setattr(training, "SHARED_MEMORY", rooms)  # a folder that is there on any system
    batch = 2 * 48 * 64 * 56  # two pictures, 56 bytes a pixel
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: Namespace(free=batches * batch))
    assert training.configuration(options(workers=8), rooms).data.workers == workers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "."], "--out .: exists already"),
        (["--out", "new", "--work", "."], "--work .: exists already"),
        (["--out", "new", "--steps", "1"], "--steps: expected at least 2"),
        (["--out", "new", "--rooms", "0"], "--rooms: expected at least 1"),
        (["--out", "new", "--batch", "0"], "--batch: expected at least 1"),
        (["--out", "new", "--workers", "-1"], "--workers: expected at least 0"),
        (["--out", "new", "--seconds", "nan"], "--seconds: expected more than 0"),
    ],
)
def test_mistakes_are_said(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        training.main(arguments)
    assert message in capsys.readouterr().err


def test_pictures_that_are_too_small_are_a_mistake(
    tmp_path: Path, torchvision: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert training.main(["--out", str(out), *SMALL, "--size", "8", "8"]) == 2
    assert capsys.readouterr().err == "bench.training: height: expected at least 16, got 8\n"
    assert not out.exists()


def test_an_interrupt_while_rendering_leaves_no_empty_folder(
    start: list[Start], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the same command can be given again."""
    command = ["--out", str(tmp_path / "out"), "--steps", "2", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(training.synthetic, "write", Mock(side_effect=KeyboardInterrupt))
        assert training.main(command) == 130
    start += [trains(2), trains(2)]
    assert training.main(command) == 0
    read(tmp_path / "out")
