"""Backbones: sizes, layouts, weights from files, and what they refuse."""

import pickle

import pytest
import torch
from malice import Malice
from torch import nn

from degmix import DeGMix
from degmix.model.backbone import create_backbone
from degmix.model.tiny import TinyBackbone
from degmix_kernels.maps import ceil_div

TASKS = {"semseg": 5, "depth": 1}


def assert_pyramid(backbone: nn.Module, size: tuple[int, int]) -> None:
    """Maps at a quarter of the picture's size, an eighth and so on, rounded up."""
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, *size))
    assert [tuple(f.shape) for f in features] == [
        (1, channels, *(ceil_div(side, stride) for side in size))
        for channels, stride in zip(backbone.channels, (4, 8, 16, 32), strict=False)
    ]


@pytest.mark.parametrize("size", [(64, 96), (61, 83), (425, 560), (1, 5)])
def test_tiny_takes_any_size(size):
    backbone = create_backbone("tiny").eval()
    assert len(backbone.channels) == 4
    assert sum(parameter.numel() for parameter in backbone.parameters()) < 500_000
    assert_pyramid(backbone, size)


@pytest.mark.parametrize("attention", ["released", "pixel", "linear", "global"])
def test_model_predicts_at_image_size_and_each_image_on_its_own(attention):
    torch.manual_seed(0)
    model = DeGMix("tiny", TASKS, attention=attention, depth=1, dim=8).eval()
    image = torch.randn(2, 3, 37, 50)
    with torch.no_grad():
        together, alone = model(image), model(image[1:])
    assert {task: p.shape for task, p in together.items()} == {
        task: (2, channels, 37, 50) for task, channels in TASKS.items()
    }
    for task in TASKS:
        torch.testing.assert_close(together[task][1:], alone[task], rtol=1e-3, atol=1e-5)
    assert all(name.startswith(("backbone.", "head.")) for name in model.state_dict())


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("swin_tiny_patch4_window7_224", (96, 192, 384, 768)),
        ("hrnet_w18_small_v2", (18, 36, 72, 144)),
        ("resnet10t", (64, 128, 256, 512)),
        ("vit_tiny_patch16_224", (256,)),
    ],
)
def test_timm_backbones(timm, name, channels):
    backbone = create_backbone(name).eval()
    assert tuple(backbone.channels) == channels
    for size in [(64, 64), (70, 101), *([(425, 560)] if "swin" in name else [])]:  # the last of the paper
        assert_pyramid(backbone, size)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("swin_tiny_patch4_window7_224", 33_195_899),
        ("swin_small_patch4_window7_224", 54_513_803),
        ("swin_large_patch4_window12_384", 202_910_585),
    ],
)
@pytest.mark.parametrize("attention", ["released", "pixel", "global"])
def test_published_parameter_counts(timm, name, count, attention):
    nyud = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}
    with torch.device("meta"):
        model = DeGMix(name, nyud, attention=attention)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_vit_takes_four_evenly_spaced_blocks(timm):
    backbone = create_backbone("vit_tiny_patch16_224")
    assert backbone.model.out_indices == [2, 5, 8, 11]
    with torch.no_grad():
        maps = backbone.model(torch.zeros(1, 3, 32, 48))
    assert [tuple(each.shape) for each in maps] == [(1, 192, 2, 3)] * 4


@pytest.mark.parametrize(
    ("name", "planes"),
    [
        ("swin_tiny_patch4_window7_224", lambda maps: [each.permute(0, 3, 1, 2) for each in maps]),
        ("hrnet_w18_small", lambda maps: maps[1:]),  # without the stem's
    ],
)
def test_maps_are_the_raw_planes_in_order_channels_first(timm, name, planes):
    backbone = create_backbone(name).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for got, want in zip(backbone(image), planes(backbone.model(image)), strict=True):
            assert torch.equal(got, want)


def test_a_single_image_trains_a_batch_norm_backbone_as_a_batch_would(timm):
    torch.manual_seed(0)
    model = DeGMix("resnet10t", TASKS, depth=1, dim=8).double()
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)

    def total(picture):
        return sum(p.square().sum() for p in model(picture).values())

    image.requires_grad_()
    (gradient,) = torch.autograd.grad(total(image), image)
    direction = torch.randn_like(image)
    with torch.no_grad():
        difference = (total(image + 1e-6 * direction) - total(image - 1e-6 * direction)) / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-4)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_tiny_weights_from_a_file(tmp_path, suffix):
    source, path = TinyBackbone(), tmp_path / f"tiny.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": source.state_dict()}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(source.state_dict(), path)
    loaded = create_backbone("tiny", weights=path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in source.state_dict().items())


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_timm_weights_from_a_file(timm, tmp_path, name):
    torch.manual_seed(0)
    complete = timm.create_model(name).state_dict()
    torch.save(complete, tmp_path / "complete.pth")
    own = create_backbone(name, weights=tmp_path / "complete.pth").model.state_dict()
    flattened = {key.replace(".", "_"): value for key, value in complete.items()}
    for key, value in own.items():
        assert torch.equal(value, flattened[key.removeprefix("model.").replace(".", "_")])


def test_weights_that_do_not_fit(tmp_path):
    state = TinyBackbone().state_dict()
    first = next(iter(state))
    for change, message in (
        ({first: None}, f"1 missing tensors: {first}"),
        ({"head.fc": torch.zeros(1)}, "1 unexpected tensors: head.fc"),
        ({first: torch.zeros(2)}, f"1 wrongly shaped tensors: {first}"),
    ):
        changed = {name: value for name, value in (state | change).items() if value is not None}
        torch.save(changed, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=message):
            create_backbone("tiny", weights=tmp_path / "weights.pt")


def test_weights_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights: expected a file, got .*absent\.pt"):
        create_backbone("tiny", weights=tmp_path / "absent.pt")
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Malice(tmp_path / "ran")))
    with pytest.raises(ValueError, match="weights: expected a checkpoint of tensors only"):
        create_backbone("tiny", weights=tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()
    for name in ("weights.pt", "weights.safetensors"):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(ValueError, match="weights: expected"):
            create_backbone("tiny", weights=tmp_path / name)
    torch.save({"state_dict": [1, 2]}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights: expected names and tensors"):
        create_backbone("tiny", weights=tmp_path / "weights.pt")


def test_unknown_and_unfit_names(timm):
    with pytest.raises(ValueError, match=r"backbone: expected .*got 'swin_tiny'; close matches: .*swin"):
        create_backbone("swin_tiny")
    with pytest.raises(ValueError, match=r"backbone 'levit_128s': expected maps at 1/4, .*got .*16, 32, 64"):
        create_backbone("levit_128s")
    with pytest.raises(ValueError, match=r"backbone: expected a ViT of .*got 12 blocks on patches of 14"):
        create_backbone("eva02_tiny_patch14_224")
    with pytest.raises(ValueError, match=r"image: expected a size that the backbone takes, got 64×48"):
        create_backbone("mixer_s16_224")(torch.zeros(1, 3, 64, 48))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="'tiny', which has no weights, got True"):
        create_backbone("tiny", pretrained=True)
    with pytest.raises(ValueError, match="either pretrained=True or a file"):
        create_backbone("tiny", pretrained=True, weights=tmp_path)
    with pytest.raises(ValueError, match="backbone: expected a name along with pretrained or weights"):
        DeGMix(TinyBackbone(), TASKS, pretrained=True)
    model = DeGMix(TinyBackbone(), TASKS, dim=8)
    for shape in ((3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32)):
        with pytest.raises(ValueError, match=r"image: expected shape \(B, 3, H, W\) with H, W ≥ 1"):
            model(torch.zeros(shape))
