"""The spatial gating unit and the gated MLP around it."""

from degmix_kernels.gating.cases import OPS
from degmix_kernels.gating.mlp_op import gated_mlp
from degmix_kernels.gating.module import GatedMLP, SpatialGatingUnit
from degmix_kernels.gating.unit_op import spatial_gating_unit

__all__ = ["OPS", "GatedMLP", "SpatialGatingUnit", "gated_mlp", "spatial_gating_unit"]
