"""Occupancy, load widths, and what the comparison with the recorded resources catches; nothing compiles here.

tests/kernels/test_compile.py compiles every kernel and compares it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.cases.shapes import MAPS, QUICK
from bench.compiler import compile_kernels, resources
from bench.compiler.compile_kernels import amd_widths, nvidia_widths
from bench.compiler.compiled import SPILLED_UNDER_A_CAP, Compiled, faults, spills
from bench.compiler.resources import by_key, differences, read_baseline, write_baseline
from bench.compiler.targets import TARGETS, occupancy

ROW = Compiled(
    op="channel_mix",
    kernel="forward",
    dtype="bf16",
    target="sm_90",
    constants={"ACTIVATION": "gelu", "LAST": True, "INDEX_64": False, "NORM": None},
    sizes={"pixels": 64, "groups": 1, "stride": 0},
    tensors={"x_ptr": "bf16", "bias_ptr": None, "sums_ptr": "fp32"},
    warps=8,
    stages=1,
    capped=None,
    registers=128,
    spilled=0,
    shared=49152,
    tensor_memory=0,
    products=True,
    matrix="wgmma.mma_async",
    loads={"128": 4},
    reductions={},
)


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "tensor_memory", "programs"),
    [
        ("sm_90", 4, 32, 0, 0, 16),  # 64 warps ÷ 4
        ("sm_90", 1, 16, 0, 0, 32),  # programs per multiprocessor
        ("sm_90", 4, 128, 0, 0, 4),  # 512 ÷ 128 = 4 warps on each of 4 schedulers
        ("sm_90", 4, 129, 0, 0, 3),  # 136 registers are given out: 3 warps on each
        ("sm_90", 8, 168, 0, 0, 1),  # 12 warps hold one program and a half
        ("sm_90", 16, 168, 0, 0, 0),  # 16 warps of 168 registers need 672 of 512 per lane
        ("sm_90", 4, 32, 100 * 1024, 0, 2),  # 228 KiB hold two of 100 + 1
        ("sm_90", 4, 32, 113 * 1024, 0, 2),  # exactly two
        ("sm_90", 4, 32, 113 * 1024 + 1, 0, 1),
        ("sm_90", 4, 32, 227 * 1024, 0, 1),
        ("sm_90", 4, 32, 227 * 1024 + 1, 0, 0),
        ("sm_80", 4, 32, 100 * 1024, 0, 1),  # 164 KiB hold one
        ("sm_100", 4, 32, 0, 128, 4),  # 512 columns ÷ 128
        ("gfx942", 4, 64, 0, 0, 8),  # 8 wavefronts on each of 4 schedulers
        ("gfx942", 4, 168, 0, 0, 3),  # 512 ÷ 168
        ("gfx942", 4, 256, 32 * 1024, 0, 2),
        ("gfx942", 4, 512, 32 * 1024 + 1, 0, 1),
    ],
)
def test_occupancy(target, warps, registers, shared, tensor_memory, programs):
    filled = occupancy(TARGETS[target], warps, registers, shared, tensor_memory)
    assert (filled.programs, filled.warps) == (programs, programs * warps)
    assert filled.share == programs * warps / TARGETS[target].warps


def test_widths_of_nvidia():
    text = """
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 ld.global.L1::evict_last.v2.b64 { %rd5, %rd6 }, [ %rd2 + 0 ];
    ld.global.b16 { %rs1 }, [ %rd3 + 0 ];
    cp.async.cg.shared.global [ %r7 + 0 ], [ %rd4 + 0 ], 0x10, %r8;
    ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 ];
    red.global.gpu.relaxed.add.v4.f32 [ %rd1 + 0 ], { %f1, %f2, %f3, %f4 };
    atom.global.gpu.relaxed.add.noftz.f16 %rs1, [ %rd1 + 0 ], %rs2;
    """
    assert nvidia_widths(text) == ({"16": 1, "128": 3}, {"16": 1, "128": 1})


def test_widths_of_amd():
    text = """
    global_load_dwordx4 v[0:3], v[4:5], off
    buffer_load_dword v1, v2, s[0:3], 0 offen
    global_load_ushort v1, v[2:3], off
    global_load_short_d16_hi v1, v[2:3], off
    flat_load_ubyte v1, v[2:3]
    ds_read_b128 v[0:3], v4
    s_load_dwordx4 s[0:3], s[4:5], 0x0
    global_atomic_add_f32 v[0:1], v2, off
    global_atomic_add_x2 v[0:1], v[2:3], off
    """
    assert amd_widths(text) == ({"8": 1, "16": 2, "32": 1, "128": 1}, {"32": 1, "64": 1})


def test_a_configuration_names_what_is_set():
    expected = "ACTIVATION=gelu LAST pixels=64 stride=0 bias_ptr=None sums_ptr=fp32"
    assert ROW.configuration == expected
    newer = replace(ROW, constants={**ROW.constants, "GROUPED": False}, sizes={**ROW.sizes, "parts": 1})
    assert newer.key == ROW.key


def test_faults():
    assert faults(ROW) == []
    assert faults(replace(ROW, shared=227 * 1024 + 4)) == [
        "needs 232452 bytes of shared memory; sm_90 has 232448"
    ]
    by_hand = replace(ROW, matrix=None)
    assert faults(by_hand) == ["computes bf16 products with no matrix instruction"]
    assert faults(replace(by_hand, dtype="fp32")) == faults(replace(by_hand, products=False)) == []
    older = replace(ROW, matrix="mma.sync")
    assert faults(older) == []
    assert faults(replace(older, op="deform_conv2d (general)")) == ["computes bf16 products with mma.sync"]


def test_spills():
    assert not spills(ROW)
    assert spills(replace(ROW, spilled=4))
    capped = replace(ROW, capped=128, spilled=SPILLED_UNDER_A_CAP)
    assert not spills(capped)
    assert spills(replace(capped, spilled=SPILLED_UNDER_A_CAP + 4))


def test_the_baseline_catches_what_is_lost(tmp_path: Path):
    path, other = tmp_path / "resources.json", replace(ROW, kernel="backward", matrix="mma.sync")
    write_baseline([ROW, other, replace(ROW, target="gfx942", matrix="v_mfma")], path)
    baseline = read_baseline(path)
    assert len(path.read_text().splitlines()) == 4  # one line per launch between two others
    assert differences("sm_90", [ROW, other], baseline) == []
    # Only these are compared; a gain is none of the test's business.
    faster = replace(other, registers=255, shared=0, loads={"16": 9}, matrix="wgmma.mma_async")
    assert differences("sm_90", [ROW, faster], baseline) == []

    (lost,) = differences("sm_90", [replace(ROW, matrix="mma.sync"), other], baseline)
    assert lost.endswith("8 warps, 1 stages: wgmma.mma_async became mma.sync")
    (lost,) = differences("sm_90", [ROW, replace(other, matrix=None)], baseline)
    assert lost.endswith("mma.sync became no matrix instruction")
    (gone,) = differences("sm_90", [ROW], baseline)
    assert gone.startswith("sm_90: channel_mix backward, bf16, ACTIVATION=gelu")
    assert gone.endswith("gone")
    new = differences("sm_90", [ROW, replace(other, warps=4)], baseline)
    assert [line.rsplit(": ", 1)[1] for line in new] == ["new", "gone"]
    assert differences("sm_90", [ROW, other, replace(ROW, op="added")], baseline) == []  # not recorded yet
    assert differences("sm_80", [], baseline) == []


def test_launches_that_look_the_same_are_refused():
    with pytest.raises(ValueError, match="does not tell two launches apart: channel_mix forward"):
        by_key([ROW, replace(ROW, registers=3)])


def test_the_committed_baseline_has_every_target_and_no_spill():
    baseline = read_baseline(resources.BASELINE)
    assert {len(launches) for launches in baseline.values()} == {len(baseline["sm_90"])}
    for target, launches in baseline.items():
        assert launches
        for values in launches.values():
            # Registers of the launches that have a cap; the compile check knows them by name.
            at_a_cap = target == "sm_90" and values["registers"] == 128
            assert values["spilled"] <= (SPILLED_UNDER_A_CAP if at_a_cap else 0)
            assert values["shared"] <= TARGETS[target].shared_of_program


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Compiled]:
    """What the command finds instead of compiling, and a baseline of its own."""
    rows = [replace(ROW, target=name, matrix=target.matrix) for name, target in TARGETS.items()]
    monkeypatch.setattr(resources, "compile_all", lambda *_: rows)
    monkeypatch.setattr(resources, "BASELINE", tmp_path / "resources.json")
    return rows


def test_the_command_shows_compares_and_updates(compiled, tmp_path, capsys):
    assert resources.main([]) == 1
    assert "resources.json: no such file" in capsys.readouterr().err
    assert resources.main(["--update"]) == 0
    assert resources.main(["--json", str(tmp_path / "all.json")]) == 0
    shown = capsys.readouterr().out
    assert "1 × 8 = 25%" in shown  # gfx942's 64 KiB hold one program of 48: 8 of 32
    assert '"occupancy"' in (tmp_path / "all.json").read_text()
    compiled[0] = replace(compiled[0], matrix=None, dtype="fp32")
    assert resources.main([]) == 1
    assert "python -m bench.resources --update" in capsys.readouterr().err


def test_updating_mends_a_baseline_with_conflicts(compiled, capsys):
    resources.BASELINE.write_text("<<<<<<< ours\n")
    assert resources.main(["--update"]) == 0
    assert "resources.json: not JSON" in capsys.readouterr().err
    assert resources.main([]) == 0


def test_the_command_never_records_a_spill(compiled, capsys):
    compiled[1] = replace(compiled[1], spilled=16)
    assert resources.main(["--update"]) == 1
    assert "sm_90: channel_mix forward" in capsys.readouterr().err
    assert not resources.BASELINE.exists()


def test_a_spill_fails_with_the_baselines_triton_and_the_pinned_one_alone(compiled, monkeypatch, capsys):
    assert resources.main(["--update"]) == 0
    compiled[1] = replace(compiled[1], spilled=16)
    wrote = resources.version("triton")
    for triton, code in ((wrote, 1), (resources.PINNED, 1), ("99.0.0", 0)):
        monkeypatch.setattr(resources, "version", lambda _, triton=triton: triton)
        assert resources.main([]) == code
        assert "sm_90: channel_mix forward" in capsys.readouterr().err


def test_updating_takes_every_kernel(compiled):
    with pytest.raises(SystemExit):
        resources.main(["--update", "--op", "channel_mix"])


def test_the_benchmarks_launches_are_planned_without_memory():
    """All shapes that a GPU measures, in inference and in training, and their backward passes."""
    launches = [launch for *_, launch in compile_kernels.benchmarked("batch_norm", ["bf16", "fp32"])]
    assert {"forward", "backward"} <= {launch.kernel.fn.__name__ for launch in launches}
    normalised = [launch.arguments["x_ptr"] for launch in launches if launch.kernel.fn.__name__ == "forward"]
    sizes = {(shape.height, shape.width) for shape in MAPS if shape.name != QUICK}
    assert {tuple(x.shape[2:]) for x in normalised} == sizes
    assert {x.dtype for x in normalised} == {torch.bfloat16, torch.float32}
    assert not list(compile_kernels.benchmarked("DeGMix", ["bf16"]))  # ops alone
