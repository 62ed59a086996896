"""The converter, on state dicts made up under the published names."""

import pytest
import torch

from degmix import DeGMix, DeGMixHead, cli
from degmix.checkpoint import load_model
from degmix.convert import convert_state_dict

TASKS = {"semseg": 5, "depth": 1, "edge": 1}
ATTENTION_LEAVES = {
    "released": ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"),
    "linear": (
        *(f"norm_{x}.{leaf}" for x in "qkv" for leaf in ("weight", "bias")),
        *("to_q.weight", "to_k.weight", "to_v.weight", "proj.weight", "proj.bias"),
    ),
}


def published(head: DeGMixHead, variant: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """The head's tensors under the authors' names, in the order of their modules."""
    ours, result = dict(head.state_dict()), {}

    def move(theirs: str, mine: str, leaves: tuple[str, ...] = ("weight", "bias")) -> None:
        for leaf in leaves:
            result[f"{prefix}{theirs}.{leaf}"] = ours.pop(f"{mine}.{leaf}")

    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    for task in TASKS:
        move(f"bottleneck.{task}.conv", f"predictions.{task}.conv", ("weight",))
        move(f"bottleneck.{task}.bn", f"predictions.{task}.norm", norm)
        move(f"final_logits.{task}", f"predictions.{task}.logits")
    for index, task in enumerate(TASKS):
        for layer in range(2):
            theirs, mine = f"defor_mixers.{index}.blocks.{layer}", f"mixers.{task}.{layer}"
            move(f"{theirs}.0", f"{mine}.channel_mix")
            move(f"{theirs}.2", f"{mine}.channel_mix.norm", norm)
            move(f"{theirs}.3.fn.0", f"{mine}.deform_mix")
            result[f"{prefix}{theirs}.3.fn.0.offset"] = torch.zeros(1, 18, 3, 3)
            move(f"{theirs}.3.fn.0.get_offset.p_conv", f"{mine}.offsets.p_conv")
            move(f"{theirs}.3.fn.0.get_offset.opt", f"{mine}.offsets.opt")
            move(f"{theirs}.3.fn.2", f"{mine}.norm", norm)
    if variant == "linear":
        result[f"{prefix}linear1.0.weight"] = torch.zeros(8, 16)
        result[f"{prefix}linear1.1.bias"] = torch.zeros(8)
        move("patch_embed.projection", "embed.projection")
        move("patch_embed.norm", "embed.norm")
    else:
        move("linear1.0", "embed.linear")
        move("linear1.1", "embed.norm")
    move("task_fusion", "decoder.interaction.attention", ATTENTION_LEAVES["released"])
    move("smlp.0", "decoder.interaction.linear")
    move("smlp.1", "decoder.interaction.norm")
    for index, task in enumerate(TASKS):
        move(f"task_querys.{index}", f"decoder.queries.{task}.attention", ATTENTION_LEAVES[variant])
        move(f"smlp2.{index}.0", f"decoder.queries.{task}.linear")
        move(f"smlp2.{index}.1", f"decoder.queries.{task}.norm")
    gate = "gmlps.gating.0.fn"
    move(f"{gate}.ln1_0", "decoder.gate.norm")
    move(f"{gate}.fc1_0", "decoder.gate.fc1")
    move(f"{gate}.fc2_0", "decoder.gate.fc2")
    move(f"{gate}.sgu_0.ln", "decoder.gate.gate.norm")
    move(f"{gate}.sgu_0.proj", "decoder.gate.gate")
    result[f"{prefix}{gate}.sgu_0.proj.weight"] = result[f"{prefix}{gate}.sgu_0.proj.weight"][:, :, None]
    assert not ours
    return result


def make_head(variant: str) -> DeGMixHead:
    head = DeGMixHead((4, 12), TASKS, attention=variant, dim=8)
    for tensor in head.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) * 10)
    return head


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert sorted(got) == sorted(want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("variant", ["released", "linear"])
def test_head_round_trip(variant):
    head = make_head(variant)
    converted = convert_state_dict(published(head, variant))
    assert_same(converted, head.state_dict())
    make_head(variant).load_state_dict(converted)


def test_tasks_may_come_in_another_order_of_ours():
    head = make_head("released")
    converted = convert_state_dict(published(head, "released"))
    other = DeGMixHead((4, 12), dict(reversed(TASKS.items())), attention="released", dim=8)
    other.load_state_dict(converted)
    features = [torch.randn(1, 4, 6, 7), torch.randn(1, 12, 3, 4)]
    with torch.no_grad():
        got, want = other.eval()(features, (8, 9)), head.double().float().eval()(features, (8, 9))
    for task in TASKS:
        torch.testing.assert_close(got[task], want[task], rtol=1e-3, atol=1e-3, equal_nan=True)


def test_order_can_be_given_where_entries_are_sorted():
    head = make_head("released")
    shuffled = dict(sorted(published(head, "released").items()))
    assert_same(convert_state_dict(shuffled, tasks=list(TASKS)), head.state_dict())


def test_lightning_checkpoint_of_a_full_model(timm):
    model = DeGMix("swin_tiny_patch4_window7_224", TASKS, attention="released", dim=8)
    backbone = timm.create_model("swin_tiny_patch4_window7_224")
    mine = {name: value for name, value in model.state_dict().items() if name.startswith("backbone.")}
    theirs = {
        f"backbone.{name}": torch.randn_like(value)
        for name, value in backbone.state_dict().items()
        if not name.startswith(("head.", "norm."))
    }
    checkpoint = {"epoch": 3, "state_dict": theirs | published(model.head, "released", "head.")}
    converted = convert_state_dict(checkpoint)
    assert sorted(converted) == sorted(model.state_dict())
    model.load_state_dict(converted)
    again = convert_state_dict(mine | published(model.head, "released", "head."))
    assert sorted(again) == sorted(model.state_dict())


def test_convert_command_leaves_a_model_that_predicts_the_same(timm, tmp_path):
    torch.manual_seed(0)
    model = DeGMix("resnet18", TASKS, attention="released", dim=8).eval()
    prefix = "backbone.model."
    theirs = {
        "backbone." + name.removeprefix(prefix): value
        for name, value in model.state_dict().items()
        if name.startswith(prefix)
    }
    state = theirs | published(model.head, "released", "head.")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "theirs.ckpt")
    changes = ["tasks=[semseg, depth, edge]", "data.classes=[a, b, c, d, e]", "model.backbone=resnet18"]
    changes += ["model.attention=released", "model.dim=8", "model.depth=2"]
    cli.convert_command(tmp_path / "theirs.ckpt", tmp_path / "ours.safetensors", "demo", changes)
    ours, _ = load_model(tmp_path / "ours.safetensors")
    image = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        expected, got = model(image), ours(image)
    assert all(torch.equal(got[task], expected[task]) for task in TASKS)


def test_unknown_names_are_named():
    state = published(make_head("released"), "released")
    with pytest.raises(ValueError, match=r"tasks semseg, depth, edge, got 1 unknown: smlp3\.0\.weight"):
        convert_state_dict(state | {"smlp3.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unknown: defor_mixers\.3\.blocks\.0\.0\.weight"):
        convert_state_dict(state | {"defor_mixers.3.blocks.0.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected a published DeGMix head"):
        convert_state_dict({"conv1.weight": torch.zeros(1)})
