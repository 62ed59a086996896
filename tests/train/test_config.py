"""Configurations: presets load, round trips keep everything, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from degmix.config import (
    Config,
    ConfigError,
    config_from_json,
    config_to_json,
    config_to_yaml,
    load_config,
    preset_names,
)


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_survive_round_trips(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config_from_json(config_to_json(config), "test") == config
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config


def test_presets_are_there() -> None:
    assert {"demo", "synthetic", "nyud_swin_t", "nyud_swin_l"} <= set(preset_names())


def test_overrides_change_single_values() -> None:
    overrides = [
        "train.lr=1e-2",
        "model.attention=linear",
        "data.size=[32, 48]",
        "tasks=[depth]",
        "train.clip=5",
    ]
    config = load_config("demo", [*overrides, "loss.weights.depth=2", "data.classes=[wall, floor]"])
    assert config.train.lr == 0.01
    assert config.model.attention == "linear"
    assert config.data.size == (32, 48)
    assert config.tasks == ("depth",)
    assert config.train.clip == 5.0
    assert config.loss.weights["depth"] == 2.0
    assert config.data.classes == ("wall", "floor")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "demo.yaml: train.lrr: unknown key; did you mean train.lr?"),
        ("trian.lr=1", "demo.yaml: trian: unknown key; did you mean train?"),
        ("zzz=1", "demo.yaml: zzz: unknown key; known keys: tasks, data, model, loss, train"),
        ("train.lr=fast", 'demo.yaml: train.lr: expected a number, got "fast"'),
        ("train.steps=1.5", "demo.yaml: train.steps: expected an integer, got 1.5"),
        ("train.steps=true", "demo.yaml: train.steps: expected an integer, got true"),
        ("train.amp=1", "demo.yaml: train.amp: expected true or false, got 1"),
        ("data.size=96", "demo.yaml: data.size: expected a list of 2 × an integer, got 96"),
        ("data.size=[96, a]", 'demo.yaml: data.size[1]: expected an integer, got "a"'),
        ("train.momentum=-1", "train.momentum: expected from 0 to below 1, got -1.0"),
        ("train.momentum=.nan", "train.momentum: expected a number, got NaN"),
        ("train.lr=.inf", "train.lr: expected a number, got Infinity"),
        ("train.lr=1e300", "train.lr: expected a positive number up to 1e+30, got 1e+300"),
        ("train.weight_decay=-1", "train.weight_decay: expected at least 0, got -1.0"),
        ("train.power=-1", "train.power: expected at least 0, got -1.0"),
        ("train.seed=18446744073709551616", "less than 2**63, got 18446744073709551616"),
        ("train.steps=2020-13-45", "train.steps: expected a value in YAML, got '2020-13-45'"),
        ("train.steps=!!int abc", "train.steps: expected a value in YAML, got '!!int abc'"),
        ("train.steps=&a [*a]", "train.steps: expected an integer, got [[...]]"),
        ("loss.weights={semseg: -1}", "loss.weights.semseg: expected at least 0, got -1.0"),
        ("data.scales=[2, 1]", "data.scales: expected a positive range, lower end first, got [2.0, 1.0]"),
        ("data.size=[0, 64]", "demo.yaml: data.size: expected at least 1, got 0"),
        (
            "tasks=[depht]",
            "demo.yaml: tasks: expected some of semseg, human_parts, sal, depth, normals, edge, got 'depht'",
        ),
        ("tasks=[]", "demo.yaml: tasks: expected 1 to 8 names, got 0"),
        ("tasks=[depth, depth]", "demo.yaml: tasks: expected each name once, got depth, depth"),
        ("train=3", "demo.yaml: train: expected a section of keys, got 3"),
        ("train.lr.x=3", "train.lr.x: unknown key: train.lr is a value, not a section"),
        ("model.weights=3", "demo.yaml: model.weights: expected text or null, got 3"),
        ("train.lr=-1", "demo.yaml: train.lr: expected a positive number up to 1e+30, got -1.0"),
        ("train.lr", "train.lr: expected key=value, as in train.lr=0.01"),
        ("train.lr=[", "train.lr: expected a value in YAML, got '['"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [override])
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"train: {lr: 1, lr: 2}", "lr stands twice"),
        (b"train: [", "not valid YAML"),
        (b"- 1", "the file: expected a section of keys, got [1]"),
        (b"\xff\xfe\x00", "expected a YAML text file"),
        (b"train: !!python/object/apply:os.system [exit]", "not valid YAML"),
    ],
)
def test_broken_files_are_named(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load_config(path) == Config()


def test_an_unknown_preset_lists_the_known_ones() -> None:
    message = r"demmo: no such configuration file or preset \(presets: demo, nyud_"
    with pytest.raises(ConfigError, match=message):
        load_config("demmo")


def test_one_image_too_small_for_batch_norm_is_named() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size: .* crops as small as 32×32"):
        load_config("demo", ["data.size=[32, 32]", "train.batch_size=1"])
