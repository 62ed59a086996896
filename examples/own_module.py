"""Use one op in a module of your own: a residual block whose every channel looks where it wants.

A 3×3 convolution predicts one (dy, dx) pair per channel and pixel; the per-channel deformable convolution
reads each channel at its displaced position and mixes the channels. On a GPU this is one Triton kernel
forward and two backward; on a CPU the same call runs the plain-PyTorch reference.

    python examples/own_module.py
"""

import torch
from torch import Tensor, nn

from degmix_kernels import DeformConv2d


class LookAround(nn.Module):
    """``x + deform_conv2d(x, offsets(x))`` on (batch, channels, height, width)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(channels, 2 * channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.offsets.weight)  # start by looking straight ahead
        nn.init.zeros_(self.offsets.bias)
        self.deform = DeformConv2d(channels, channels, kernel_size=1)
        nn.init.dirac_(self.deform.weight)  # and by keeping the channels apart

    def forward(self, x: Tensor) -> Tensor:
        return x + self.deform(x, self.offsets(x))


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = nn.functional.avg_pool2d(torch.randn(4, 16, 28, 28, device=device), 5, stride=1) * 5
    # The task: add to every channel itself shifted by some pixels. The block has to learn where to look.
    target = x + torch.stack([x[:, c].roll(shifts=c % 5 - 2, dims=-1) for c in range(x.shape[1])], dim=1)

    block = LookAround(16).to(device)
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
    for step in range(201):
        loss = nn.functional.mse_loss(block(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 0:
            print(f"step {step:3d}   loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
