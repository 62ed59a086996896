"""From a configuration to the things it describes: names, model, data, losses."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import SGD

import degmix
from degmix import losses
from degmix.config import Config, ConfigError
from degmix.data import nyud, synthetic
from degmix.tasks import TASKS, Labels, task_channels

_CLASS_NAMES = {"nyud": nyud.CLASSES, "synthetic": synthetic.CLASSES}


def class_names(config: Config) -> tuple[str, ...]:
    """Names of the semantic classes."""
    classes = config.data.classes
    if not isinstance(classes, str):
        if not classes:
            raise ConfigError("data.classes: expected at least one name, got an empty list")
        return classes
    if classes not in _CLASS_NAMES:
        known = " or ".join(f'"{name}"' for name in _CLASS_NAMES)
        raise ConfigError(f'data.classes: expected {known} or a list of names, got "{classes}"')
    return _CLASS_NAMES[classes]


def channels(config: Config) -> dict[str, int]:
    """Channels per task."""
    return task_channels(config.tasks, len(class_names(config)))


def build_model(config: Config, *, load_weights: bool = True) -> degmix.DeGMix:
    """The model.

    Args:
        config: what to build.
        load_weights: start from the pretrained weights the configuration asks for; false where a checkpoint
            follows, or for a model on the meta device.

    Raises:
        ConfigError: if a value does not describe a model, such as an unknown backbone or attention.
    """
    model = config.model
    try:
        return degmix.DeGMix(
            model.backbone,
            channels(config),
            pretrained=model.pretrained and load_weights,
            weights=model.weights if load_weights else None,
            attention=model.attention,
            depth=model.depth,
            dim=model.dim,
            heads=model.heads,
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"model: {error}") from error


def open_split(config: Config, split: str) -> nyud.NYUD:
    """The training ("train") or evaluation ("val") part of the data set, with the targets of every task."""
    return nyud.NYUD(config.data.root, split, config.tasks, classes=len(class_names(config)))


def labels(config: Config) -> Labels:
    """Names for legends."""
    return Labels(class_names(config), synthetic.PARTS)


def build_losses(config: Config) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Weighted loss per task, (logits, target) -> scalar."""

    def weighted(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        weight = config.loss.weights.get(name, TASKS[name].weight)
        if name == "edge":
            return lambda logits, target: weight * losses.edge_loss(logits, target, config.loss.edge_positive)
        return lambda logits, target: weight * TASKS[name].loss(logits, target)

    return {name: weighted(name) for name in config.tasks}


def build_optimizer(config: Config, model: nn.Module) -> SGD:
    """The optimizer of all parameters, at the learning rate of step 0."""
    train = config.train
    return SGD(model.parameters(), lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
