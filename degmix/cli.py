"""The command line: ``degmix demo | train | evaluate | predict | info | convert | data synth``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console

from degmix import build, checkpoint, demo, evaluate, info, predict, train
from degmix.checkpoint import CheckpointError
from degmix.config import ConfigError, load_config, preset_names
from degmix.convert import convert_state_dict
from degmix.data import DataError, synthetic
from degmix.predict import ImageError
from degmix.progress import stage
from degmix.tasks import PredictionError
from degmix.train import Interrupted, TrainingError

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="DeGMix: one network for many dense-prediction tasks. Start with: degmix demo",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(no_args_is_help=True, help="Make data sets.")
app.add_typer(data_app, name="data")
console = Console(markup=False, highlight=False)  # paths may hold brackets and numbers

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; the GPU if there is one by default.")]
CheckpointFile = Annotated[Path, typer.Option("--checkpoint", help="A model.safetensors or checkpoint.pt.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, such as train.lr=0.01.")
]
PRESETS_HELP = f"A YAML file, or a preset: {', '.join(preset_names())}."


class UsageError(ValueError):
    """Command-line values that make no sense; the message is one sentence."""


USER_ERRORS = (
    UsageError,
    ConfigError,
    DataError,
    CheckpointError,
    ImageError,
    TrainingError,
    PredictionError,
    OSError,
)
"""What a user can put right, shown as one sentence; anything else is our mistake and shows its traceback."""


@app.command("demo")
def demo_command(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
    scenes: Annotated[int, typer.Option(min=8, help="Rooms to render.")] = demo.SCENES,
    device: Device = "",
) -> None:
    """Render rooms, train a small model on six tasks, evaluate it, draw its predictions."""
    demo.run(out, overrides or (), scenes, _device(device), console)


@app.command("train")
def train_command(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help=PRESETS_HELP)] = "",
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/train"),
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    device: Device = "",
) -> None:
    """Train a model, or go on with a run that was stopped."""
    if resume is not None:
        if config or overrides:
            raise UsageError(
                "--resume goes on with a run as it was configured; it takes no --config or changes"
            )
        train.resume(resume, _device(device), console)
        out = resume
    elif config:
        train.start(load_config(config, overrides or ()), out, _device(device), console)
    else:
        raise UsageError("expected --config FILE, or --resume FOLDER")
    model = out / checkpoint.MODEL_NAME
    console.print(
        f"{model} is trained; measure it with: degmix evaluate --checkpoint {model}", soft_wrap=True
    )


@app.command("evaluate")
def evaluate_command(
    checkpoint_path: CheckpointFile,
    data: Annotated[Path | None, typer.Option(help="The data folder; training's by default.")] = None,
    split: Annotated[str, typer.Option(help="train or val.")] = "val",
    config: Annotated[str, typer.Option(help=f"Expect the tasks and classes of this. {PRESETS_HELP}")] = "",
    out: Annotated[Path | None, typer.Option(help="Write the metrics to this JSON file too.")] = None,
    device: Device = "",
) -> None:
    """Measure a model on a data set, beside the best constant prediction."""
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}")
    if out is not None and out.is_dir():
        raise UsageError(f"--out {out}: expected a file, there is a folder")
    expected = build.channels(load_config(config)) if config else None
    model, model_config = checkpoint.load_model(checkpoint_path, expected)
    if data is not None:
        model_config = model_config.with_data_root(data)
    dataset = build.open_split(model_config, split)
    results = evaluate.evaluate(model.to(_device(device)), dataset, build.channels(model_config), console)
    console.print(evaluate.results_table(results, f"{checkpoint_path} on {model_config.data.root} ({split})"))
    if out is not None:
        evaluate.write_metrics(out, results)


@app.command("predict")
def predict_command(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="Pictures of any size.")],
    checkpoint_path: CheckpointFile,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("predictions"),
    legend: Annotated[bool, typer.Option(help="Draw a legend below each picture.")] = True,
    device: Device = "",
) -> None:
    """Predict every task on pictures: writes OUT/NAME_TASK.png for each."""
    model, config = checkpoint.load_model(checkpoint_path)
    model.to(_device(device))
    # Read all before writing any: a bad one among them leaves no half of the work behind.
    for path in images:
        predict.load_image(path)
    out.mkdir(parents=True, exist_ok=True)
    labels = build.labels(config)
    for path, stem in zip(images, predict.output_stems(images), strict=True):
        predictions = predict.predict(model, predict.image_tensor(predict.load_image(path)))
        written = predict.write_predictions(out, stem, predictions, labels, legend)
        console.print(f"{path} → {', '.join(str(file) for file in written)}", soft_wrap=True)


@app.command("info")
def info_command(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help=PRESETS_HELP)] = "demo",
    size: Annotated[
        str, typer.Option(help="HEIGHTxWIDTH of the image; the training crop's by default.")
    ] = "",
) -> None:
    """Count a model's parameters, multiply-adds and memory, without allocating it."""
    loaded = load_config(config, overrides or ())
    height, width = _size(size) if size else loaded.data.size
    cost = info.measure(loaded, (height, width))
    console.print(info.cost_table(cost, f"{config}: one image of {height}×{width}"))
    console.print(info.NOTE)
    console.print(
        f"Weights: {cost.weights_bytes / 2**20:.1f} MiB. Training with one image: at least "
        f"{cost.training_bytes / 2**20:.0f} MiB (weights, gradients, momentum, what float32 autograd saves).",
    )


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(help="The authors' checkpoint (.ckpt, .pth).")],
    out: Annotated[Path, typer.Argument(help="The model.safetensors to write.")],
    config: Annotated[str, typer.Option(help=f"What the checkpoint is of. {PRESETS_HELP}")],
    overrides: Overrides = None,
) -> None:
    """Turn a checkpoint of the authors' programs into one of ours."""
    loaded = load_config(config, overrides or ())
    tree = checkpoint.read_pickle(source)
    model = build.build_model(loaded, load_weights=False)
    try:
        tensors = convert_state_dict(tree.get("state_dict", tree))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: expected a state dict of the authors' model ({error})") from None
    checkpoint.load_weights(source, model, tensors)
    checkpoint.save_model(out, model, loaded)
    console.print(f"{out} is ready: {config}, {len(tensors)} tensors", soft_wrap=True)


@data_app.command("synth")
def synth_command(
    out: Annotated[Path, typer.Option(help="The new folder.")],
    count: Annotated[int, typer.Option(min=1, help="Rooms to render.")] = 64,
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the images.")] = "240x320",
    seed: Annotated[int, typer.Option(min=0, help="Other seeds give other rooms.")] = 0,
) -> None:
    """Render synthetic rooms with labels for six tasks, in the layout of NYUD-v2."""
    height, width = _size(size)
    with stage(console, "rendering", count) as advance:
        synthetic.write(out, count, (height, width), seed=seed, progress=lambda done, _: advance(done, ""))
    console.print(
        f"{out} is ready; train on it with: degmix train --config synthetic data.root={out}", soft_wrap=True
    )


def run() -> NoReturn:
    """Run the command line of this process; a user's mistake is one sentence and exit code 2."""
    try:
        app()
    except Interrupted as stopped:
        console.print(str(stopped), soft_wrap=True)
        sys.exit(INTERRUPTED)
    except USER_ERRORS as error:
        Console(stderr=True).print(
            f"degmix: {_one_line(error)}", soft_wrap=True, highlight=False, markup=False
        )
        sys.exit(USER_ERROR)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _device(name: str) -> torch.device:
    if not name:
        return train.default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)[xX×]([1-9]\d*)", text)
    if not match:
        raise UsageError(f"--size: expected HEIGHTxWIDTH, both at least 1, as in 240x320, got {text}")
    return int(match[1]), int(match[2])
