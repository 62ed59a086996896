"""The prepared folder, ``.gpu``: what ``make gpu-ready`` leaves and a visit finds there.

cache.tar.xz    Triton's cache for sm_90: kernels, their metadata, launchers; its path is part of the metadata
facts.json      for whom it was made: commit, sources, Triton, Python; how many kernels
wheels/         packages that a GPU machine without a network may lack
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / ".gpu"
CACHE = Path("/tmp/degmix-triton-cache")  # the same on both machines
ARCHIVE, FACTS, WHEELS = "cache.tar.xz", "facts.json", "wheels"
PACKAGES = ("bench", "degmix", "degmix_kernels", "tests")
CAPABILITY = (9, 0)
PRESET = 6  # of xz: 9 takes four times as long for 3 % less


@dataclass(frozen=True)
class Facts:
    """For whom a folder was prepared, and what is in its cache."""

    commit: str  # all 40 digits
    sources: str  # of :func:`sources`
    triton: str  # of :func:`triton_key`
    python: str  # "3.12"
    kernels: int
    launchers: int


def sources() -> str:
    """A hash of every Python file that takes part."""
    total = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            total.update(f"{path.relative_to(REPOSITORY)}\n".encode() + path.read_bytes())
    return total.hexdigest()


def triton_key() -> str:
    """A hash of everything that Triton's cache depends on beside the kernels."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # before Triton 3.6
        from triton.compiler.compiler import triton_key
    known = f"{triton_key()} {sorted(get_cache_invalidating_env_vars().items())}"
    return hashlib.sha256(known.encode()).hexdigest()


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def pack(cache: Path, entries: set[str], folder: Path, commit: str, made_of: str) -> Facts:
    """Write the archive of these entries of Triton's cache, and the facts; what is not complete is left out.

    ``made_of`` is what :func:`sources` was before anything was compiled.
    """
    kernels = launchers = 0
    folder.mkdir(exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)
    partial = folder / f".{ARCHIVE}"
    with tarfile.open(partial, "w:xz", preset=PRESET) as tar:
        for entry in (cache / name for name in sorted(entries)):
            names = {path.name for path in entry.iterdir()}
            group = next((name for name in names if name.startswith("__grp__")), None)
            wanted = {name for name in names if name.endswith(".so")}
            if group is not None:
                kernel = group.removeprefix("__grp__").removesuffix(".json")
                wanted = {group, f"{kernel}.json", f"{kernel}.cubin"}
                if not wanted <= names:
                    continue
                kernels += 1
            else:
                launchers += len(wanted)
            for name in sorted(wanted):
                tar.add(entry / name, arcname=f"{entry.name}/{name}")
    partial.replace(folder / ARCHIVE)
    facts = Facts(commit, made_of, triton_key(), python_version(), kernels, launchers)
    (folder / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n")
    return facts


def read_facts(folder: Path) -> Facts | None:
    """The facts, None where nothing was prepared."""
    path = folder / FACTS
    return Facts(**json.loads(path.read_text())) if path.exists() else None


def misfit(facts: Facts | None, capability: tuple[int, int] | None, triton: str) -> str:
    """Why the cache is of no use on a machine, in words; "" if it is. Only Nvidia's GPUs have a capability.

    A cache of other sources still has what has not changed: entries are named after what they were made of.
    """
    if capability != CAPABILITY:
        return "one can be prepared for Nvidia's compute capability 9.0 only"
    if facts is None:
        return "there is none; make gpu-ready makes one"
    if facts.triton != triton:
        return "it is for another version of Triton"
    if facts.python != python_version():
        return f"its launchers are for Python {facts.python}"
    return ""


def unpack(folder: Path, cache: Path) -> None:
    """Put the archive where it was made."""
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / ARCHIVE) as tar:
        tar.extractall(cache, filter="data")
