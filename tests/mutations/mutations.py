"""All bugs, in the order in which they are planted."""

from __future__ import annotations

from tests.mutations.deform_conv import DEFORM_CONV
from tests.mutations.families import (
    ATTENTION,
    BATCH_NORM,
    CHANNEL_MIX,
    COORDINATE_BIAS,
    GATING,
    LINEAR_NORM,
    TASK_ATTENTION,
)
from tests.mutations.host import BENCH, ENTRANCES, MODEL
from tests.mutations.shared import SHARED

MUTATIONS = (
    *SHARED, *BATCH_NORM, *CHANNEL_MIX, *LINEAR_NORM, *TASK_ATTENTION, *GATING, *ATTENTION, *COORDINATE_BIAS,
    *DEFORM_CONV, *ENTRANCES, *MODEL, *BENCH,
)  # fmt: skip
