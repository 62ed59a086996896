"""Swap an op into an existing model: every torchvision ``DeformConv2d`` replaced by ours, weights kept.

The layers have the same arguments, parameter names and shapes: a model keeps its checkpoints and its numbers.

    python examples/swap_op.py
"""

import torch
import torchvision
from torch import Tensor, nn

import degmix_kernels


class SomebodysModel(nn.Module):
    """Stands for a model that was written, and trained, with torchvision's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, kernel_size=3, stride=2, padding=1)
        self.offsets = nn.Conv2d(16, 2 * 9, kernel_size=3, padding=1)
        self.modulation = nn.Conv2d(16, 9, kernel_size=3, padding=1)
        self.deform = torchvision.ops.DeformConv2d(16, 24, kernel_size=3, padding=1)
        self.classifier = nn.Linear(24, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).relu()
        x = self.deform(x, self.offsets(x), self.modulation(x).sigmoid()).relu()
        return self.classifier(x.mean(dim=(2, 3)))


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SomebodysModel().to(device).eval()
    image = torch.randn(2, 3, 64, 80, device=device)
    with torch.no_grad():
        before = model(image)
        print(degmix_kernels.replace_deform_conv(model))
        after = model(image)
    difference = ((after - before).norm() / before.norm()).item()
    print(f"relative difference of the outputs: {difference:.1e}")
    if not difference < 1e-5:
        raise SystemExit("the outputs changed")


if __name__ == "__main__":
    main()
