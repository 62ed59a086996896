"""Typed configuration: dataclasses, read from strict YAML, changed by ``key=value``.

An unknown key or a value of the wrong type is an error that names the key, what came and what was expected.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from degmix.data.transforms import SCALES
from degmix.losses import EDGE_POSITIVE_WEIGHT
from degmix.records import RecordError, convert
from degmix.tasks import TASKS

PRESETS = Path(__file__).parent / "presets"
LARGEST_RATE = 1e30  # far beyond any use, and still a float32


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one sentence for its author."""


@dataclass(frozen=True)
class DataConfig:
    """The data set.

    Attributes:
        root: folder in the NYUD-v2 layout.
        classes: the names of the semantic classes: "nyud", "synthetic", or a list of names.
        size: height and width of a training crop.
        scales: range of the random scale before the crop.
        workers: processes that read samples; 0 reads them in the training process.
        cache: keep the decoded training set in memory, 56 bytes a pixel with all six tasks: steps then wait
            for augmentation alone. Workers share it where they are forked, as on Linux.
    """

    root: str = "data/NYUDv2"
    classes: str | tuple[str, ...] = "nyud"
    size: tuple[int, int] = (425, 560)
    scales: tuple[float, float] = SCALES
    workers: int = 4
    cache: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The model, as ``degmix.DeGMix`` takes it.

    Attributes:
        backbone: "tiny" or a name that timm knows.
        pretrained: start from timm's pretrained weights (downloaded on first use).
        weights: start the backbone from this file instead.
        attention: "pixel", "released", "linear" or "global".
        depth: layers of each deformable mixer.
        dim: channels of the head.
        heads: attention heads.
    """

    backbone: str = "swin_tiny_patch4_window7_224"
    pretrained: bool = False
    weights: str | None = None
    attention: str = "pixel"
    depth: int = 2
    dim: int = 256
    heads: int = 2


@dataclass(frozen=True)
class LossConfig:
    """The sum of losses.

    Attributes:
        weights: weights of tasks that differ from ``degmix.tasks``.
        edge_positive: weight of edge pixels against 1 − it for the others.
    """

    weights: dict[str, float] = field(default_factory=dict)
    edge_positive: float = EDGE_POSITIVE_WEIGHT


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation.

    Attributes:
        steps: optimiser steps.
        batch_size: images that pass through the model together.
        accumulate: batches whose gradients are added up for one step.
        lr: SGD's learning rate at step 0; it falls to zero as (1 − step / steps) ** power.
        momentum, weight_decay: SGD's.
        power: of the decay.
        clip: largest norm of the gradient; a larger one is scaled down.
        amp: bfloat16 autocast on GPUs.
        seed: of the weights, the order of samples and the augmentation.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of log.jsonl.
    """

    steps: int = 40_000
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    power: float = 0.9
    clip: float | None = None
    amp: bool = True
    seed: int = 0
    checkpoint_every: int = 1000
    log_every: int = 20


@dataclass(frozen=True)
class Config:
    """A run: the tasks, the data, the model, the losses and the optimisation."""

    tasks: tuple[str, ...] = ("semseg", "depth", "normals", "edge")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def with_data_root(self, root: Path) -> Config:
        """The same on another data folder."""
        return dataclasses.replace(self, data=dataclasses.replace(self.data, root=str(root)))

    def __post_init__(self) -> None:
        _expect(1 <= len(self.tasks) <= 8, "tasks", "1 to 8 names", f"{len(self.tasks)}")
        _expect(len(set(self.tasks)) == len(self.tasks), "tasks", "each name once", ", ".join(self.tasks))
        for name in self.tasks:
            _expect(name in TASKS, "tasks", "some of " + ", ".join(TASKS), repr(name))
        for name in self.loss.weights:
            _expect(name in TASKS, "loss.weights", "some of " + ", ".join(TASKS), repr(name))
        for key, value in (
            ("data.size", min(self.data.size)),
            ("model.depth", self.model.depth),
            ("model.dim", self.model.dim),
            ("model.heads", self.model.heads),
            ("train.steps", self.train.steps),
            ("train.batch_size", self.train.batch_size),
            ("train.accumulate", self.train.accumulate),
            ("train.checkpoint_every", self.train.checkpoint_every),
            ("train.log_every", self.train.log_every),
        ):
            _expect(value >= 1, key, "at least 1", str(value))
        for key, number in (
            ("data.workers", self.data.workers),
            ("train.seed", self.train.seed),
            ("train.weight_decay", self.train.weight_decay),
            ("train.power", self.train.power),
            *((f"loss.weights.{task}", weight) for task, weight in self.loss.weights.items()),
        ):
            _expect(number >= 0, key, "at least 0", str(number))
        _expect(self.train.seed < 2**63, "train.seed", "less than 2**63", str(self.train.seed))
        _expect(0 <= self.train.momentum < 1, "train.momentum", "from 0 to below 1", str(self.train.momentum))
        _expect(
            0 < self.train.lr <= LARGEST_RATE,
            "train.lr",
            f"a positive number up to {LARGEST_RATE}",
            str(self.train.lr),
        )
        # BatchNorm needs two values of a channel; the coarsest map is at 1/32.
        coarsest = math.prod(-(-side // 32) for side in self.data.size)
        _expect(
            self.train.batch_size * coarsest > 1,
            "train.batch_size",
            f"at least 2 for crops as small as {self.data.size[0]}×{self.data.size[1]}",
            str(self.train.batch_size),
        )
        _expect(
            0 < self.data.scales[0] <= self.data.scales[1],
            "data.scales",
            "a positive range, lower end first",
            str(list(self.data.scales)),
        )
        _expect(
            0 < self.loss.edge_positive < 1,
            "loss.edge_positive",
            "between 0 and 1",
            str(self.loss.edge_positive),
        )
        if self.train.clip is not None:
            _expect(self.train.clip > 0, "train.clip", "a positive number or null", str(self.train.clip))


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        source: the path of a YAML file, or the name of a preset.
        overrides: changes such as ``"train.lr=0.01"``, their values in YAML.

    Raises:
        ConfigError: if there is no such file or preset, or it or an override is not a valid configuration.
    """
    path = Path(source)
    if not path.is_file():
        preset = PRESETS / f"{source}.yaml"
        if path.suffix in (".yaml", ".yml") or path.parent != Path() or not preset.is_file():
            raise ConfigError(
                f"{source}: no such configuration file or preset (presets: {', '.join(preset_names())})"
            )
        path = preset
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected a YAML text file, got bytes that are not UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # PyYAML lets its constructors' errors out
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    for override in overrides:
        _override(tree, override)
    return config_from_tree(tree, str(path))


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def config_from_tree(tree: object, where: str) -> Config:
    """A configuration from nested dictionaries; ``where`` they came from is named in errors."""
    try:
        return convert(tree, Config)
    except (RecordError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from None


def config_to_json(config: Config) -> str:
    """The configuration as JSON, which ``config_from_json`` reads."""
    return json.dumps(dataclasses.asdict(config))


def config_from_json(text: str, where: str) -> Config:
    """The inverse of ``config_to_json``; ``where`` the text came from is named in errors."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError:
        raise ConfigError(f"{where}: its configuration is not JSON") from None
    return config_from_tree(tree, where)


def config_to_yaml(config: Config) -> str:
    """The configuration as YAML, which ``load_config`` reads."""
    return yaml.safe_dump(json.loads(config_to_json(config)), sort_keys=False, default_flow_style=None)


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, where PyYAML would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _override(tree: object, override: str) -> None:
    """Set ``a.b=value`` in the nested dictionaries."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override}: expected key=value, as in train.lr=0.01")
    try:
        value = yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{key}: expected a value in YAML, got {text!r}") from None
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(tree, dict):
            tree = tree.setdefault(parent, {})
    if not isinstance(tree, dict):
        raise ConfigError(f"{key}: unknown key: {key.rpartition('.')[0]} is a value, not a section")
    tree[last] = value


def _expect(condition: bool, key: str, expected: str, got: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {got}")
