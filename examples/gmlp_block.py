"""Build a gMLP classifier from one op: blocks whose tokens talk to each other through a gate.

``GatedMLP(mode="token")`` is a whole gMLP block: LayerNorm, Linear, GELU, a gate that mixes the tokens of
each channel, Linear, residual. On a GPU it runs fused Triton kernels, on a CPU the plain-PyTorch reference.

    python examples/gmlp_block.py
"""

import torch
from torch import Tensor, nn

from degmix_kernels import GatedMLP


class Classifier(nn.Module):
    """Patches to tokens, gMLP blocks, mean, classes: (batch, 1, size, size) → (batch, classes)."""

    def __init__(self, size: int, patch: int, dim: int, depth: int, classes: int) -> None:
        super().__init__()
        tokens = (size // patch) ** 2
        self.embed = nn.Conv2d(1, dim, patch, stride=patch)
        # With recompute=True a block would keep its input only, for less memory and more arithmetic.
        self.blocks = nn.Sequential(
            *(GatedMLP(dim, 2 * dim, mode="token", tokens=tokens) for _ in range(depth))
        )
        self.head = nn.Linear(dim, classes)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.embed(image).flatten(2).transpose(1, 2)
        return self.head(self.blocks(tokens).mean(1))


def draw(count: int, device: str) -> tuple[Tensor, Tensor]:
    """Two bright patches anywhere in noise. The class: do they lie in the same row of patches?"""
    image = 0.1 * torch.randn(count, 1, 16, 16, device=device)
    label = torch.randint(2, (count,), device=device)
    first, shift = torch.randint(4, (count,), device=device), torch.randint(1, 4, (count,), device=device)
    second = torch.where(label == 1, first, (first + shift) % 4)
    left = torch.randint(4, (count,), device=device)
    right = (left + torch.randint(1, 4, (count,), device=device)) % 4
    index = torch.arange(count, device=device)
    patches = image.view(count, 4, 4, 4, 4)  # (image, row, y, column, x)
    patches[index, first, :, left] += 1
    patches[index, second, :, right] += 1
    return image, label


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Classifier(size=16, patch=4, dim=32, depth=2, classes=2).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(151):
        image, label = draw(64, device)
        loss = nn.functional.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 30 == 0:
            print(f"step {step:3d}   loss {loss.item():.4f}")
    image, label = draw(1000, device)
    with torch.no_grad():
        accuracy = (model(image).argmax(1) == label).float().mean().item()
    print(f"right on new pictures: {accuracy:.1%}")


if __name__ == "__main__":
    main()
