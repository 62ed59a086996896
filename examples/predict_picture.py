"""Predict every task on one picture, from Python, and look at the numbers behind the colours.

python examples/predict_picture.py runs/demo/model.safetensors PICTURE.jpg
"""

import argparse
from pathlib import Path

from degmix import build, checkpoint
from degmix.predict import image_tensor, load_image, predict, write_predictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a model.safetensors that degmix left")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--out", type=Path, default=Path("predictions"))
    given = parser.parse_args()

    model, config = checkpoint.load_model(given.checkpoint)
    predictions = predict(model, image_tensor(load_image(given.picture)))  # task → numpy array

    for task, values in predictions.items():
        print(f"{task:12} {values.shape!s:16} from {values.min():.3g} to {values.max():.3g}")
    given.out.mkdir(parents=True, exist_ok=True)
    labels = build.labels(config)
    for path in write_predictions(given.out, given.picture.stem, predictions, labels, legends=True):
        print(path)


if __name__ == "__main__":
    main()
