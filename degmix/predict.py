"""Prediction on anybody's pictures: of any size, grey, with transparency, or turned by their camera."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from degmix.data.transforms import normalize
from degmix.files import atomic_file
from degmix.tasks import Labels, predictions_of
from degmix.visualize import depth_range, legend, paint, with_legend


class ImageError(ValueError):
    """A picture that cannot be read; the message is one sentence that names the file."""


def load_image(path: Path) -> NDArray[np.uint8]:
    """A picture as people see it, RGB (H, W, 3): turned upright, transparency on white, 16-bit grey scaled.

    Raises:
        ImageError: if the file is missing or no readable picture.
    """
    if not path.is_file():
        raise ImageError(f"{path}: {'expected an image, got a folder' if path.is_dir() else 'no such image'}")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode == "F" or (image.mode == "I" and not _is_16_bit(image)):
                raise ImageError(
                    f"{path}: expected 8 or 16 bits a channel, got an image of mode {image.mode}"
                )
            if image.mode.startswith("I"):
                return (np.asarray(image) // 257).astype(np.uint8)[..., None].repeat(3, axis=2)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except ImageError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's decoders raise any of these on damaged files.
        raise ImageError(f"{path}: not a readable image ({error})") from None


def _is_16_bit(image: Image.Image) -> bool:
    """Whether a picture of 32-bit integers holds 16-bit values, as older Pillows read 16-bit PNGs."""
    darkest, brightest = image.getextrema()
    return darkest >= 0 and 255 < brightest <= 65535


def image_tensor(image: NDArray[np.uint8]) -> Tensor:
    """A picture (H, W, 3) as the model takes it, (3, H, W)."""
    return normalize(torch.from_numpy(image.astype(np.float32) / 255).movedim(-1, 0))


@torch.inference_mode()
def predict(model: nn.Module, image: Tensor) -> dict[str, NDArray]:
    """Predictions for one image (3, H, W), by task, without a batch dimension; see ``Task.predict``.

    Raises:
        PredictionError: if a prediction is not finite.
    """
    device = next(model.parameters()).device
    predicted = predictions_of(model(image[None].to(device)))
    return {name: value[0].cpu().numpy() for name, value in predicted.items()}


def write_predictions(
    out: Path, stem: str, predictions: Mapping[str, NDArray], labels: Labels, legends: bool
) -> list[Path]:
    """Write one picture per task, ``out/STEM_TASK.png``, with its legend below if asked for."""
    scale = depth_range(predictions["depth"]) if "depth" in predictions else (0.0, 1.0)
    written = []
    for task, values in predictions.items():
        picture = Image.fromarray(paint(task, values, scale))
        if legends:
            picture = with_legend(picture, legend(task, labels, scale, picture.width))
        path = out / f"{stem}_{task}.png"
        with atomic_file(path) as file:
            picture.save(file, "PNG")
        written.append(path)
    return written


def output_stems(paths: Sequence[Path]) -> list[str]:
    """Names for the outputs of each picture: its own without suffix, numbered where two would collide."""
    stems: list[str] = []
    for path in paths:
        stem, number = path.stem, 2
        while stem in stems:
            stem, number = f"{path.stem}-{number}", number + 1
        stems.append(stem)
    return stems
