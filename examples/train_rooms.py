"""Train DeGMix on the synthetic rooms, from Python: render, train, measure.

The same as ``degmix demo``, spelled out. On a GPU the model runs its Triton kernels, on a CPU the references.

    python examples/train_rooms.py --out runs/rooms
    python examples/train_rooms.py --out runs/rooms --scenes 2000 train.steps=5000 model.dim=128
"""

import argparse
from pathlib import Path

from rich.console import Console

from degmix import build, checkpoint, train
from degmix.config import load_config
from degmix.data import synthetic
from degmix.evaluate import evaluate, results_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/rooms"), help="new folder for data and run")
    parser.add_argument("--scenes", type=int, default=192, help="rooms to render")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the preset 'demo'")
    given = parser.parse_intermixed_args()
    console = Console()

    config = load_config("demo", given.overrides).with_data_root(given.out / "data")
    synthetic.write(given.out / "data", given.scenes, config.data.size, seed=1)

    device = train.default_device()
    train.start(config, given.out / "run", device, console)

    model, config = checkpoint.load_model(given.out / "run" / checkpoint.MODEL_NAME)
    results = evaluate(model.to(device), build.open_split(config, "val"), build.channels(config), console)
    console.print(results_table(results, "On rooms it has not seen"))


if __name__ == "__main__":
    main()
