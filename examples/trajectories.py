"""What the examples share: trajectories of Lorenz's equations as data, and a small Transformer over their points."""

import torch
from torch import Tensor, nn

import flashattn

POINTS, WIDTH = 64, 64


def sample_trajectories(count: int, seed: int = 0) -> Tensor:
    """(count, POINTS, 3): pieces of solutions of Lorenz's equations (1963), scaled to unit size."""
    x, y, z = torch.randn(3, count, generator=torch.Generator().manual_seed(seed))
    points = []
    for step in range(500 + 4 * POINTS):  # Euler's method; the first 500 steps lead to the attractor
        x, y, z = x + 0.01 * 10 * (y - x), y + 0.01 * (x * (28 - z) - y), z + 0.01 * (x * y - 8 / 3 * z)
        if step >= 500 and step % 4 == 0:
            points.append(torch.stack([x, y, z - 25], -1) / 10)
    return torch.stack(points, 1)


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm, added to what comes in."""

    def __init__(self, attention: type[nn.Module] = flashattn.MultiheadAttention):
        super().__init__()
        self.attention = attention(WIDTH, 4, batch_first=True)
        self.norms = nn.ModuleList(flashattn.LayerNorm(WIDTH) for _ in range(2))
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.feed_forward(self.norms[1](x))


class Transformer(nn.Module):
    """(batch, POINTS, 3) and `conditions` numbers for each trajectory to (batch, POINTS, results)."""

    def __init__(self, conditions: int, results: int, attention: type[nn.Module] = flashattn.MultiheadAttention):
        super().__init__()
        self.embed = nn.Linear(3 + conditions, WIDTH)
        self.position = nn.Parameter(0.1 * torch.randn(POINTS, WIDTH))
        self.blocks = nn.Sequential(Block(attention), Block(attention))
        self.head = nn.Linear(WIDTH, results)

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        own = [c[:, None, None].expand(-1, x.shape[1], 1) for c in conditions]
        return self.head(self.blocks(self.embed(torch.cat([x, *own], -1)) + self.position))
