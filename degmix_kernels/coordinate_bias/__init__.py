"""What a 3×3 convolution makes of coordinate channels, added to a map."""

from degmix_kernels.coordinate_bias.cases import OPS
from degmix_kernels.coordinate_bias.module import CoordinateBias
from degmix_kernels.coordinate_bias.op import coordinate_bias

__all__ = ["OPS", "CoordinateBias", "coordinate_bias"]
