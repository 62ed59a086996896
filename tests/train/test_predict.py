"""Prediction on pictures as people have them, and the pictures it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from small_rooms import SIZE

from degmix import build, checkpoint
from degmix.evaluate import evaluate
from degmix.losses import IGNORE
from degmix.predict import ImageError, image_tensor, load_image, output_stems, predict, write_predictions
from degmix.tasks import TASKS, Labels, PredictionError
from degmix.visualize import depth_range, legend, paint, prediction_sheet

LABELS = Labels(classes=("wall", "floor", "chair"), parts=("background", "head"))


def picture(mode: str, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return rgb.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_colour_mode_reads_as_rgb(mode: str, tmp_path: Path) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    picture(mode, 7, 5).save(tmp_path / f"image.{suffix}")
    image = load_image(tmp_path / f"image.{suffix}")
    assert (image.shape, image.dtype) == ((5, 7, 3), np.uint8)


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    Image.new("RGBA", (3, 3), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load_image(tmp_path / "clear.png") == 255).all()


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    image = load_image(tmp_path / "deep.png")
    assert image.dtype == np.uint8
    assert image[0, :, 0].tolist() == [0, 127, 255]


def test_a_picture_turned_by_its_camera_is_set_upright(tmp_path: Path) -> None:
    upright = picture("RGB", 6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held clockwise: turn by 90° to show
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "turned.png"), np.asarray(upright))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (33, 47), (64, 96)])
def test_any_size_gives_pictures_of_that_size(
    size: tuple[int, int], run_folder: Path, tmp_path: Path
) -> None:
    height, width = size
    model, config = checkpoint.load_model(run_folder / checkpoint.MODEL_NAME)
    image = image_tensor(np.asarray(picture("RGB", width, height)))
    predictions = predict(model, image)
    written = write_predictions(tmp_path, "x", predictions, build.labels(config), legends=False)
    assert [path.name for path in written] == [f"x_{task}.png" for task in config.tasks]
    assert all(Image.open(path).size == (width, height) for path in written)
    legends = write_predictions(tmp_path, "y", predictions, build.labels(config), legends=True)
    assert all(Image.open(path).height > height for path in legends)


def test_a_model_without_numbers_predicts_and_measures_nothing(run_folder: Path) -> None:
    model, config = checkpoint.load_model(run_folder / checkpoint.MODEL_NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(PredictionError, match="not finite"):
        predict(model, image_tensor(np.asarray(picture("RGB", 48, 40))))
    with pytest.raises(PredictionError, match="not finite"):
        evaluate(model, build.open_split(config, "val"), build.channels(config), Console(quiet=True))


def test_names_that_collide_are_numbered() -> None:
    assert output_stems([Path("a/x.png"), Path("b/x.jpg"), Path("x-2.png")]) == ["x", "x-2", "x-2-2"]


def test_unlabelled_pixels_are_grey() -> None:
    grey = (72, 72, 72)
    ignored = {
        "semseg": np.full((1, 1), IGNORE),
        "human_parts": np.full((1, 1), IGNORE),
        "sal": np.full((1, 1), IGNORE),
        "depth": np.zeros((1, 1, 1)),
        "normals": np.zeros((3, 1, 1)),
        "edge": np.full((1, 1, 1), float(IGNORE)),
    }
    for task, values in ignored.items():
        assert tuple(paint(task, values, (0.0, 1.0))[0, 0]) == grey


def test_classes_have_distinct_colours() -> None:
    colours = paint("semseg", np.arange(60)[None], (0.0, 1.0))[0]
    assert len({tuple(colour) for colour in colours.tolist()}) == 60


def test_depth_colours_rise_in_brightness() -> None:
    brightness = paint("depth", np.linspace(1, 5, 20)[None, None], (1.0, 5.0))[0].astype(int).sum(axis=1)
    assert (np.diff(brightness) > 0).all()


def test_depth_range_survives_constant_and_missing_depth() -> None:
    assert depth_range(np.zeros((1, 2, 2))) == (0.0, 1.0)
    low, high = depth_range(np.full((1, 2, 2), 3.0))
    assert low == 3.0 < high


@pytest.mark.parametrize("task", TASKS)
def test_legends_fit_their_width(task: str) -> None:
    assert legend(task, LABELS, (1.0, 4.0), 320).width == 320


def test_the_sheet_shows_every_image_and_task(rooms: Path, run_folder: Path) -> None:
    model, config = checkpoint.load_model(run_folder / checkpoint.MODEL_NAME)
    sample = build.open_split(config, "val")[0]
    prediction = predict(model, torch.zeros(3, *SIZE))
    image = np.zeros((*SIZE, 3), dtype=np.uint8)
    target = {task: sample[task].numpy() for task in prediction}
    one = prediction_sheet([image], [target], [prediction], build.labels(config))
    two = prediction_sheet([image] * 2, [target] * 2, [prediction] * 2, build.labels(config))
    assert two.width == one.width > 7 * SIZE[1]
    assert two.height > one.height


@pytest.mark.parametrize("values", [np.full((4, 5), 0.5, np.float32), np.full((4, 5), 2**20, np.int32)])
def test_pictures_of_floats_and_of_32_bit_integers_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "wide.tiff")
    with pytest.raises(ImageError, match="expected 8 or 16 bits a channel"):
        load_image(tmp_path / "wide.tiff")


def test_a_folder_is_not_an_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="expected an image, got a folder"):
        load_image(tmp_path)
