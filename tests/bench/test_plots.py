"""What the pictures show, read back from the figures: bars, points, ceilings, units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from made_up import PART, ROW, results
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.harness.results import OURS, Ceilings, Results
from bench.report import plots

OURS_ROW = replace(ROW, bytes=10**9, flops=5 * 10**9)
SLOWER = replace(OURS_ROW, impl="slower", ms=6.0)
FASTER = replace(OURS_ROW, impl="faster", ms=1.0)
MODEL = replace(
    OURS_ROW, op="model", mode="inference", images=1, bytes=None, flops=None, peak_bytes=3 * 2**20
)
FIRST = replace(PART, ceilings=Ceilings(2e12, {"bf16": 4e12}))
RESULTS = results(OURS_ROW, SLOWER, FASTER, MODEL, part=FIRST)


def panels(name: str, results: Results = RESULTS) -> list[Axes]:
    """The panels of a picture."""
    figure: Figure = plots.PICTURES[name][0](results)
    return figure.axes


def test_bars_begin_at_one_and_end_at_the_ratio() -> None:
    (panel,) = panels("speed-up.png")
    slower, faster = panel.patches
    assert (slower.get_x(), slower.get_width()) == (1, 2)  # three times as long as ours: faster, to the right
    assert (faster.get_x(), faster.get_width()) == (1, -0.5)
    assert [text.get_text() for text in panel.texts] == [" 3.00×", " 0.50×"]
    # Upside down, so that the first op is at the top.
    assert panel.yaxis_inverted()
    assert panel.get_xscale() == "log"


def test_points_lie_below_the_roof() -> None:
    (panel,) = panels("roofline.png")
    roof, point = panel.lines
    assert point.get_xdata() == [5.0]  # FLOPs per byte
    assert point.get_ydata() == [500.0]  # GB/s: 10⁹ bytes in 2 ms
    intensity, ceiling = roof.get_xdata(), roof.get_ydata()
    expected = np.minimum(2000.0, 4000.0 / np.maximum(intensity, 1e-9))
    np.testing.assert_allclose(ceiling, expected)


def test_every_call_has_its_own_roof_and_every_point_its_place() -> None:
    """The second call's machine is slower, its product as large as attention over all tokens."""
    slower = replace(PART, ceilings=Ceilings(1e12, {"bf16": 3e12}))
    product = replace(OURS_ROW, flops=18_204 * 10**9)
    whole = replace(RESULTS, parts=(FIRST, slower)).with_rows((product,))
    first, second = panels("roofline.png", whole)
    assert [panel.get_title() for panel in (first, second)] == ["bf16", "bf16, call 2"]
    assert [panel.lines[0].get_ydata()[0] for panel in (first, second)] == [2000, 1000]  # GB/s
    for panel, place in ((first, 5), (second, 18_204)):
        (point,) = panel.lines[1:]
        assert point.get_xdata() == [place]
        assert place < panel.get_xlim()[1] == panel.lines[0].get_xdata()[-1]
    other = replace(product, dtype="fp32")  # which the first call measured no ceiling of
    more = replace(slower, ceilings=Ceilings(1e12, {"bf16": 3e12, "fp32": 1e12}))
    whole = replace(whole, parts=(FIRST, more)).with_rows((other,))
    titles = [panel.get_title() for panel in panels("roofline.png", whole)]
    assert titles == ["bf16", "bf16, call 2", "fp32, call 2"]


def test_memory_is_in_mebibytes() -> None:
    (panel,) = panels("model-memory.png")
    (bar,) = panel.patches
    assert bar.get_height() == 3
    assert panel.get_ylabel() == "MiB"


def test_the_head_and_the_whole_model_have_bars_of_their_own() -> None:
    whole = replace(MODEL, op="whole model", peak_bytes=5 * 2**20)
    rows = [replace(row, impl=impl) for row in (MODEL, whole) for impl in (OURS, "formula")]
    (panel,) = panels("model-memory.png", replace(RESULTS, rows=tuple(rows)))
    assert [bar.get_height() for bar in panel.patches] == [3, 3, 5, 5]
    assert len({bar.get_x() for bar in panel.patches}) == 4
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert labels == ["model\nnyud, bf16", "whole model\nnyud, bf16"]
