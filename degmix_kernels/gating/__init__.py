"""The spatial gating unit and the gated MLP around it."""

from degmix_kernels.gating.entry import OPS
from degmix_kernels.gating.module import GatedMLP, SpatialGatingUnit
from degmix_kernels.gating.op import gated_mlp, spatial_gating_unit

__all__ = ["OPS", "GatedMLP", "SpatialGatingUnit", "gated_mlp", "spatial_gating_unit"]
