"""Write synthetic rooms to disk in the NYUD-v2 layout that :class:`degmix.data.nyud.NYUD` reads."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from degmix.data.errors import DataError
from degmix.data.synthetic.objects import VOID
from degmix.data.synthetic.renderer import render

FOLDERS = ("images", "segmentation", "edge", "normals", "depth", "human_parts", "sal", "gt_sets")
SMALLEST_SIDE = 16  # pixels


def encode_normals(normals: np.ndarray) -> np.ndarray:
    """Unit vectors (H, W, 3) to 8 bits, (n + 1) · 255/2; a zero becomes 128, which decodes to 0.004."""
    return np.round((normals + 1) * 127.5).astype(np.uint8)


def encode_semseg(semseg: np.ndarray) -> np.ndarray:
    """Labels to the published coding: label + 1, and 0 for void."""
    return np.where(semseg == VOID, 0, semseg + 1).astype(np.uint8)


def write_scene(root: Path, seed: int, size: tuple[int, int], index: int) -> str:
    """Render scene ``index`` of the data set and write its seven files; returns its name."""
    scene = render((seed, index), *size)
    name = f"{index:05d}"
    pictures = {
        "images": scene["image"],
        "segmentation": encode_semseg(scene["semseg"]),
        "edge": scene["edge"] * np.uint8(255),
        "normals": encode_normals(scene["normals"]),
        "human_parts": scene["human_parts"],
        "sal": scene["sal"] * np.uint8(255),
    }
    for folder, pixels in pictures.items():
        Image.fromarray(pixels).save(root / folder / f"{name}.png", compress_level=1)
    np.save(root / "depth" / f"{name}.npy", scene["depth"], allow_pickle=False)
    return name


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``out`` when the block succeeds and disappears when it does not.

    Raises:
        DataError: ``out`` exists and is not an empty folder, or cannot be created.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: expected a new or empty folder to write to, got a file")
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out}: expected a new or empty folder to write to, got one with files in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise DataError(f"{out}: cannot be created: {error.strerror or error}") from error
    try:
        whole = work / "whole"  # made by mkdir, so with the user's usual permissions, unlike ``work``
        whole.mkdir()
        yield whole
        if out.is_dir():
            out.rmdir()
        os.replace(whole, out)
    finally:
        shutil.rmtree(work)


def in_order(task: Callable[[int], str], count: int, workers: int) -> Iterator[str]:
    """Results of ``task(0)``, ``task(1)``, …, computed by that many processes."""
    if workers == 1:
        yield from map(task, range(count))
        return
    # forked workers start at once and do not need the caller's script to be importable; rendering uses only
    # numpy and pillow, no threads and no GPU, so a fork is safe. It is not on macOS.
    method = "fork" if sys.platform == "linux" else "spawn"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        with ProcessPoolExecutor(workers, mp_context=get_context(method)) as pool:
            yield from pool.map(task, range(count), chunksize=1)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write(
    out: str | os.PathLike[str],
    count: int,
    size: tuple[int, int],
    seed: int = 0,
    val_fraction: float = 0.2,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Render ``count`` rooms into a new folder ``out``; all of it appears at once, or nothing.

    The files depend only on ``count``, ``size``, ``seed`` and ``val_fraction``, not on ``workers``.

    Args:
        out: folder to create; an existing one must be empty.
        count: number of rooms, at least 1.
        size: (height, width) in pixels, at least 16 each.
        seed: a number ≥ 0.
        val_fraction: share of rooms in ``gt_sets/val.txt``, in [0, 1); the others are in ``train.txt``. At
        least
            one room goes to each set if the fraction is not 0 and ``count`` is at least 2.
        workers: processes; default all usable cores.
        progress: called as ``progress(done, count)`` after each room.

    Returns:
        The folder.

    Raises:
        DataError: an argument out of its range, or ``out`` is taken or cannot be created.
    """
    for name, value, least in (
        ("count", count, 1),
        ("height", size[0], SMALLEST_SIDE),
        ("width", size[1], SMALLEST_SIDE),
        ("seed", seed, 0),
    ):
        if value < least:
            raise DataError(f"{name}: expected at least {least}, got {value}")
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction: expected a number from 0 to below 1, got {val_fraction}")
    workers = min(usable_cores() if workers is None else workers, count)
    if workers < 1:
        raise DataError(f"workers: expected at least 1, got {workers}")

    out = Path(out)
    with whole_folder(out) as root:
        for folder in FOLDERS:
            (root / folder).mkdir()
        names = []
        for name in in_order(partial(write_scene, root, seed, tuple(size)), count, workers):
            names.append(name)
            if progress is not None:
                progress(len(names), count)
        held_out = round(count * val_fraction)
        if val_fraction > 0 and count > 1:
            held_out = min(max(held_out, 1), count - 1)
        write_names(root / "gt_sets" / "train.txt", names[: count - held_out])
        write_names(root / "gt_sets" / "val.txt", names[count - held_out :])
    return out


def write_names(path: Path, names: Iterable[str]) -> None:
    """One name a line."""
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
