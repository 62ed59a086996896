"""What the pictures show, read back from the figures: bars, points, ceilings, units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import plots
from bench.results import OURS, Ceilings, Machine, Results, Row

MACHINE = Machine("Made-up GPU", None, None, None, "2.11", None, "3.12", None, "c" * 40, False)
OURS_ROW = Row("op", "nyud", "bf16", "fwd", OURS, "cuda events", ms=2.0, bytes=10**9, flops=5 * 10**9)
SLOWER = replace(OURS_ROW, impl="slower", ms=6.0)
FASTER = replace(OURS_ROW, impl="faster", ms=1.0)
MODEL = replace(
    OURS_ROW, op="model", mode="inference", images=1, bytes=None, flops=None, peak_bytes=3 * 2**20
)
RESULTS = Results(MACHINE, Ceilings(2e12, {"bf16": 4e12}), (OURS_ROW, SLOWER, FASTER, MODEL))


def panels(name: str) -> list[Axes]:
    """The panels of a picture."""
    figure: Figure = plots.PICTURES[name][0](RESULTS)
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


def test_memory_is_in_mebibytes() -> None:
    (panel,) = panels("model-memory.png")
    (bar,) = panel.patches
    assert bar.get_height() == 3
    assert panel.get_ylabel() == "MiB"
