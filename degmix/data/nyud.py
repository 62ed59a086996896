"""NYUD-v2 on disk, in the layout most multi-task repositories share, and the synthetic rooms written in it.

::

    root/
      gt_sets/{train,val}.txt    one name a line
      images/NAME.png            RGB
      segmentation/NAME.png      0 void, else class + 1
      depth/NAME.npy             metres along the optical axis, 0 where unknown
      normals/NAME.png           (n + 1) · 255/2, n: x right, y up, z toward the viewer; zero vector unknown
      edge/NAME.png              0 or 255
      human_parts/NAME.png       0 background, 1–6 parts, 255 unknown   (not in NYUD-v2)
      sal/NAME.png               above 127 salient                      (not in NYUD-v2)

Nothing is ever written there.
"""

from __future__ import annotations

import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from degmix.data.errors import DataError
from degmix.losses import IGNORE

CLASSES: tuple[str, ...] = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture",
    "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes",
    "ceiling", "books", "refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard",
    "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "other structure", "other furniture",
    "other prop",
)  # fmt: skip
"""The 40 classes of NYUD-v2; the label is the position."""

HUMAN_PARTS = 6

# what pillow and numpy let escape from damaged files
BAD_PICTURE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
BAD_ARRAY = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    MemoryError,
    OverflowError,
    tokenize.TokenError,
    zipfile.BadZipFile,
)

Sample = dict[str, Tensor | str]


def one_line(error: BaseException) -> str:
    """The error's message without line breaks."""
    return " ".join(str(error).split())


def read_picture(path: Path, mode: str) -> np.ndarray:
    """Pixels of an image file as uint8: (H, W, 3) for mode "RGB", (H, W) for "L".

    Raises:
        DataError: missing, corrupt, or of another kind than the mode says.
    """
    kinds = {"RGB": ("RGB", "RGBA", "L", "P"), "L": ("L", "P", "1")}[mode]
    try:
        with Image.open(path) as picture:
            picture.load()
    except FileNotFoundError:
        raise DataError(f"{path}: expected an image file, got nothing there") from None
    except BAD_PICTURE as error:
        raise DataError(
            f"{path}: expected a readable image, got a corrupt file ({one_line(error)})"
        ) from error
    if picture.mode not in kinds:
        raise DataError(f"{path}: expected an 8-bit image of mode {mode}, got mode {picture.mode}")
    if mode == "L" and picture.mode == "P":
        return np.array(
            picture
        )  # labels under a palette of display colours: convert() would look the colours up
    return np.array(picture.convert(mode))


def read_array(path: Path) -> np.ndarray:
    """A two-dimensional array of real numbers from a ``.npy`` file, as float32 (H, W); pickles are refused.

    Raises:
        DataError: missing, corrupt, or not such an array.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: expected a .npy file, got nothing there") from None
    except BAD_ARRAY as error:
        raise DataError(
            f"{path}: expected a readable .npy array, got a corrupt file ({one_line(error)})"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: expected an array of real numbers, got {getattr(array, 'dtype', 'an archive')}"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2:
        raise DataError(f"{path}: expected an array of 2 dimensions, got shape {array.shape}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        return array.astype(np.float32)


def read_image(path: Path) -> Tensor:
    """RGB in [0, 1], float32 (3, H, W)."""
    pixels = torch.from_numpy(read_picture(path, "RGB"))
    return pixels.permute(2, 0, 1).to(torch.float32).contiguous() / 255


def read_labels(path: Path, largest: int) -> np.ndarray:
    """A label map (H, W) whose values are all at most ``largest`` or 255 (which means unknown)."""
    labels = read_picture(path, "L")
    wrong = labels[(labels > largest) & (labels != IGNORE)]
    if wrong.size:
        raise DataError(f"{path}: expected labels from 0 to {largest}, got {int(wrong.max())}")
    return labels


def read_semseg(path: Path, classes: int) -> Tensor:
    """Classes, int64 (H, W); void becomes 255."""
    labels = read_labels(path, classes).astype(np.int64)
    return torch.from_numpy(np.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1))


def read_human_parts(path: Path) -> Tensor:
    """Body parts, int64 (H, W)."""
    return torch.from_numpy(read_labels(path, HUMAN_PARTS).astype(np.int64))


def read_sal(path: Path) -> Tensor:
    """1 where salient, int64 (H, W)."""
    return torch.from_numpy((read_picture(path, "L") > 127).astype(np.int64))


def read_edge(path: Path) -> Tensor:
    """1 on edges, float32 (1, H, W)."""
    return torch.from_numpy(read_picture(path, "L").astype(np.float32) / 255)[None]


def read_depth(path: Path) -> Tensor:
    """Metres, float32 (1, H, W); 0 where unknown, which covers negative and non-finite values too."""
    depth = read_array(path)
    return torch.from_numpy(np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0)))[None]


def read_normals(path: Path) -> Tensor:
    """Unit vectors, float32 (3, H, W); zero where unknown.

    Eight bits cannot hold an exact zero: it is stored as 127 or 128 a channel, some tools leave black. Both
    are far from length 1, while a rounded unit vector is within 0.01 of it.
    """
    normals = read_picture(path, "RGB").astype(np.float32) * np.float32(2 / 255) - 1
    length = np.sqrt((normals * normals).sum(axis=-1, keepdims=True))
    known = (length > 0.5) & (length < 1.5)
    unit = np.where(known, normals / np.maximum(length, np.float32(0.5)), np.float32(0))
    return torch.from_numpy(np.ascontiguousarray(unit.transpose(2, 0, 1)))


# folder, file ending and reader of each task
LABELS: dict[str, tuple[str, str, Callable[..., Tensor]]] = {
    "semseg": ("segmentation", ".png", read_semseg),
    "depth": ("depth", ".npy", read_depth),
    "normals": ("normals", ".png", read_normals),
    "edge": ("edge", ".png", read_edge),
    "human_parts": ("human_parts", ".png", read_human_parts),
    "sal": ("sal", ".png", read_sal),
}


def read_names(root: Path, split: str) -> list[str]:
    """Names of a split, one a line; blank lines are skipped.

    Raises:
        DataError: no such split, or a line that is not a plain file name (it could lead out of the folder).
    """
    folder = root / "gt_sets"
    path = folder / f"{split}.txt"
    known = sorted(p.stem for p in folder.glob("*.txt"))
    if split not in known:
        found = ", ".join(known) or "none"
        raise DataError(f"{path}: expected a list of names, got nothing there (splits found: {found})")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: expected a text file of names, got one that cannot be read ({error})"
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    for name in names:
        if name in (".", "..") or not name.isprintable() or any(mark in name for mark in "/\\:"):
            raise DataError(f"{path}: expected plain file names, got {name!r}")
    if not names:
        raise DataError(f"{path}: expected at least one name, got an empty list")
    return names


class NYUD(Dataset[Sample]):
    """A folder in the NYUD-v2 layout (see the module's description).

    Args:
        root: the data folder; never written to.
        split: "train", "val" or any other list in ``gt_sets``.
        tasks: which labels to read, names from ``semseg, depth, normals, edge, human_parts, sal``.
        classes: number of semantic classes, 40 for NYUD-v2.

    Samples hold ``image`` float32 (3, H, W) in [0, 1], ``name`` str, and per task: ``semseg`` int64 (H, W),
    255 ignore; ``depth`` float32 (1, H, W) metres, 0 ignore; ``normals`` float32 (3, H, W) unit vectors, zero
    ignore; ``edge`` float32 (1, H, W) 0 or 1; ``human_parts`` int64 (H, W) 0–6, 255 ignore; ``sal`` int64 (H,
    W) 0 or 1.

    Raises:
        DataError: on construction, for a missing folder, list or file or an unknown task; on access, for a
        corrupt
            file, sizes that differ, or a label outside the classes. The message names the file.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, tasks: Sequence[str], classes: int = len(CLASSES)
    ) -> None:
        self.root = Path(root)
        self.split = split
        self.tasks = tuple(tasks)
        self.classes = classes
        for task in self.tasks:
            if task not in LABELS:
                raise DataError(f"task: expected one of {', '.join(LABELS)}, got {task!r}")
        if not 1 <= classes < IGNORE:
            raise DataError(f"classes: expected 1 to {IGNORE - 1}, got {classes}")
        if not self.root.is_dir():
            raise DataError(
                f"{self.root}: expected a data folder, got {'a file' if self.root.exists() else 'nothing'}"
            )
        self.names = read_names(self.root, split)
        for folder, ending in [("images", ".png"), *(LABELS[task][:2] for task in self.tasks)]:
            self._check_files(self.root / folder, ending)

    def _check_files(self, folder: Path, ending: str) -> None:
        """Find missing files now rather than hours into a training run."""
        if not folder.is_dir():
            raise DataError(f"{folder}: expected a folder of {ending} files, got nothing there")
        present = set(os.listdir(folder))
        missing = [name for name in self.names if name + ending not in present]
        if missing:
            more = f" ({len(missing)} of {len(self.names)} files of the split are missing)"
            raise DataError(f"{folder / (missing[0] + ending)}: expected a file, got nothing there{more}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        image = read_image(self.root / "images" / f"{name}.png")
        sample: Sample = {"image": image, "name": name}
        for task in self.tasks:
            folder, ending, read = LABELS[task]
            path = self.root / folder / f"{name}{ending}"
            label = read(path, self.classes) if task == "semseg" else read(path)
            if label.shape[-2:] != image.shape[-2:]:
                expected, got = ("×".join(map(str, x.shape[-2:])) for x in (image, label))
                raise DataError(f"{path}: expected the image's size {expected}, got {got}")
            sample[task] = label
        return sample
