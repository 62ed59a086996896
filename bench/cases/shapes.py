"""Every shape that is measured, by name: of the real models, and small ones for launch overhead and CPUs.

``QUICK`` shapes are for machines without a GPU and for ``--quick``: they show that everything runs, their
times say nothing about the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

QUICK = "quick"
LAUNCH = "launch"
INDOOR = ("semseg", "depth", "normals", "edge")
SMALL_OFFSETS, WILD_OFFSETS, WILD_FROM = 1.0, 30.0, 10.0  # pixels


@dataclass(frozen=True)
class Map:
    """Maps as a DeGMix head has them, at a quarter of the picture's size.

    Attributes:
        name: of the data set.
        batch: pictures.
        channels: of every task's map.
        height: of the maps.
        width: of the maps.
        picture: (height, width) of the pictures, for the model; ops need none.
        classes: of semantic segmentation, for the model.
        task_names: the data set's tasks, names of :data:`degmix.tasks.TASKS`, one map each.
        spread: standard deviation of ``deform_mix``'s offsets, in pixels.
    """

    name: str
    batch: int
    channels: int
    height: int
    width: int
    picture: tuple[int, int] = (0, 0)
    classes: int = 0
    task_names: tuple[str, ...] = INDOOR
    spread: float = SMALL_OFFSETS

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        return len(self.task_names)

    @property
    def pixels(self) -> int:
        """Pixels of one map."""
        return self.height * self.width


NYUD = Map("nyud", 8, 256, 107, 140, (425, 560), 40, INDOOR)
PASCAL = Map("pascal", 8, 256, 128, 128, (512, 512), 21, ("semseg", "human_parts", "sal", "normals", "edge"))
CITYSCAPES = Map("cityscapes", 8, 256, 128, 256, (512, 1024), 19, ("semseg", "depth"))
DATA_SETS = (NYUD, PASCAL, CITYSCAPES)
QUICK_MAP = Map(QUICK, 2, 16, 12, 10, (48, 40), 5, INDOOR)
LAUNCH_MAP = Map(LAUNCH, 1, 64, 28, 28, (112, 112), 5, ("semseg", "depth"))
MAPS = (*DATA_SETS, LAUNCH_MAP, QUICK_MAP)


def is_leading(shape: str) -> bool:
    """Whether a shape is of NYUD-v2's maps, which are measured first and which a report shows."""
    return shape.startswith(NYUD.name)


# Gating along tokens has a matrix of tokens × tokens, so the tokens are few: gMLP's 14×14 patches.
GMLP = Map("gmlp", 32, 256, 14, 14, (224, 224), 1, ("classification",))
TOKEN_MAPS = (GMLP, QUICK_MAP)


@dataclass(frozen=True)
class Convolution:
    """A deformable convolution that keeps size and channels.

    Attributes:
        batch: pictures.
        channels: of input and output.
        height: of input and output.
        width: of input and output.
        spread: standard deviation of the offsets, in pixels.
        called: a name, if it is not made of the sizes.
        kernel: side of the kernel, odd.
        offset_groups: divides the channels.
    """

    batch: int
    channels: int
    height: int
    width: int
    spread: float
    called: str = ""
    kernel: int = 3
    offset_groups: int = 1

    @property
    def name(self) -> str:
        """Such as "3x3 c64 56x56 b32 wild", or "3x3 c64 og16 180x320 b8 small"."""
        wild = "wild" if self.spread > WILD_FROM else "small"
        groups = f" og{self.offset_groups}" if self.offset_groups > 1 else ""
        sizes = f"c{self.channels}{groups} {self.height}x{self.width} b{self.batch}"
        return self.called or f"{self.kernel}x{self.kernel} {sizes} {wild}"


CONVOLUTIONS = (
    *(
        Convolution(*size, spread)
        for size in ((32, 64, 56, 56), (32, 256, 56, 56), (8, 128, 100, 160), (2, 256, 200, 320))
        for spread in (SMALL_OFFSETS, WILD_OFFSETS)
    ),
    Convolution(1, 64, 28, 28, SMALL_OFFSETS, LAUNCH),
    Convolution(2, 16, 10, 12, SMALL_OFFSETS, QUICK),
)

# An offset per channel, as DeGMix's operator has it, and few channels per offset group, as video
# super-resolution has them: 64 channels in 16 groups.
PER_CHANNEL = (
    Convolution(8, 256, 107, 140, SMALL_OFFSETS, kernel=1, offset_groups=256),
    Convolution(2, 16, 10, 12, SMALL_OFFSETS, QUICK, kernel=1, offset_groups=16),
)
SMALL_GROUPS = (
    Convolution(8, 64, 180, 320, SMALL_OFFSETS, offset_groups=16),
    Convolution(2, 16, 10, 12, SMALL_OFFSETS, QUICK, offset_groups=4),
)

HEADS = 2  # of every attention, as of the model's head

# Feature maps of the backbones behind which heads are measured: channels at 1/4, 1/8, 1/16 and 1/32.
SWIN_TINY = (96, 192, 384, 768)
QUICK_BACKBONE = (8, 16, 24, 32)
MODEL_BATCHES = (1, 8)
